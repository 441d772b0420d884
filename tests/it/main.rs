//! The integration tests, one module per subject. Each test has a database of its own; all run in parallel.

#![allow(clippy::unwrap_used, clippy::large_futures, reason = "tests")]

mod statements;
mod tasks;
