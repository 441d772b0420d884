//! The harness of the tests: one temporary Postgres cluster per process, one database per test, and real servers.
//!
//! A test waits for facts ([`eventually`]), never for a duration. Nothing here is a mock.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod attacker;
mod cluster;
mod database;
mod link;
mod process;
mod server;

use std::time::Duration;

pub use attacker::{Attacker, Flood};
pub use cluster::OwnCluster;
pub use database::{Database, cluster, data_directory, pg_bin};
pub use link::{Link, Target, Toxic};
pub use process::{Absurd, absurd, binary, example, root, tool};
pub use server::{Grpc, Place, Server, ServerOptions, json, raw};

/// Longest wait for a fact. A healthy run needs a fraction of it; a loaded machine may need more.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Asks until the answer is `Some`. Fails the test with `what` after [`PATIENCE`].
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut ask: impl FnMut() -> F) -> T {
    let until = tokio::time::Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(tokio::time::Instant::now() < until, "did not come true: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits for `work`. Fails the test with `what` after [`PATIENCE`].
pub async fn in_time<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.unwrap_or_else(|_| panic!("took too long: {what}"))
}
