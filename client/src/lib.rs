//! Client of the Absurd worker-coordination service: spawn tasks, and get tasks pushed.
//!
//! ```no_run
//! use absurd_client::{AbsurdClient, ConnectOptions, SpawnOptions, StreamOptions};
//! use serde_json::json;
//!
//! # async fn run() -> Result<(), absurd_client::Error> {
//! let client = AbsurdClient::connect(&ConnectOptions::from_env())?;
//! client.create_queue().await?;
//! let spawned = client.spawn_task("greet", &json!({"name": "world"}), SpawnOptions::default()).await?;
//!
//! let mut tasks = client.claim_stream(StreamOptions::default()).await?;
//! if let Some(task) = tasks.next().await {
//!     task.complete(&json!({"greeting": "hello"})).await?;
//! }
//!
//! let end = client.await_task_result(spawned.task_id, None).await?;
//! println!("{}", end.state);
//! # Ok(())
//! # }
//! ```
//!
//! The client keeps what a worker must not forget: claim tokens are shown by themselves, leases of streamed tasks are
//! extended in one call for all, outcomes travel together in `SettleTasks` while a call is in flight, and a lost
//! connection is opened again with what was held before.

mod backoff;
mod claimed;
mod client;
mod connect;
mod error;
mod helpers;
mod json;
mod registry;
mod replicas;
mod settle;
mod stream;
mod task;
mod workflow;

pub use absurd_proto::v1 as proto;
pub use claimed::ClaimedTask;
pub use client::{AbsurdClient, ClaimOptions, DEFAULT_QUEUE, ListOptions, RetryOptions};
pub use connect::{ConnectOptions, DEFAULT_URL, TlsOptions};
pub use error::{Error, Reason};
pub use helpers::{AbsurdSleepError, Retries, WaitError, spawn_cancellable_task, spawn_retry_task};
pub use json::Json;
pub use registry::Revoked;
pub use stream::{ClaimStream, StreamOptions};
pub use task::{Awaited, Checkpoint, FailOutcome, NewTask, RetryStrategy, SpawnOptions, Spawned, State, TaskResult};
pub use workflow::{NewWorkflowRun, WorkflowChange};
