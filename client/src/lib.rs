//! Client of the Absurd worker-coordination service: spawns tasks, and receives claimed tasks over a stream.
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
//! The client takes over the routine duties of a worker. It shows claim tokens automatically. It extends the leases of
//! streamed tasks, up to 1,000 in one call, and batches outcomes in `SettleTasks`. After a lost connection it reopens
//! the stream with the claims that it still holds.
//!
//! [`AbsurdClient`] has the methods of the Python client of the same name, under the same names; `docs/migration.md`
//! compares the two. [`blocking`] has the same methods for programs without an async runtime.

mod backoff;
pub mod blocking;
mod budget;
mod checkpoints;
mod claimed;
mod claims;
mod client;
mod connect;
pub mod durable;
mod error;
mod json;
mod queues;
mod registry;
mod replicas;
mod settle;
mod spawn;
mod stream;
mod tasks;
mod waits;
mod wire;
mod workflow;

pub use absurd_proto::v1 as proto;
pub use checkpoints::Checkpoint;
pub use claimed::ClaimedTask;
pub use claims::{ClaimOptions, FailOutcome, NextAttempt};
pub use client::{AbsurdClient, DEFAULT_QUEUE, get_absurd_client};
pub use connect::{ConnectOptions, DEFAULT_URL, TlsOptions};
pub use error::{Error, Reason};
pub use json::Json;
pub use queues::{CLEANUP_LIMIT, DetachMode, PolicyChanges, Queue, QueueOptions, QueuePolicy, QueueStats, StorageMode};
pub use registry::Revoked;
pub use spawn::{
    CancellationRules, NewTask, Retries, RetryStrategy, SpawnOptions, Spawned, Start, spawn_cancellable_task,
    spawn_retry_task,
};
pub use stream::{ClaimStream, StreamOptions};
pub use tasks::{
    Available, CancelOutcome, FindOptions, FoundTasks, ListOptions, RetryOptions, Run, Task, TaskMatch, TaskResult,
    TaskSummary,
};
pub use waits::{AbsurdSleepError, Awaited, Emitted, Slept, Wait, WaitError, WaitsOf};
pub use wire::{Page, State};
pub use workflow::{NewWorkflowRun, WorkflowChange, WorkflowFilter, WorkflowRun, WorkflowStatus};
