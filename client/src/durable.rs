//! Durable execution: ordinary async functions whose steps survive crashes.
//!
//! ```no_run
//! use absurd_client::durable::{Absurd, BoxError, Context, WorkerOptions};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Serialize, Deserialize)]
//! struct Order { id: String, amount: u32 }
//!
//! #[derive(Serialize, Deserialize)]
//! struct Shipment { tracking_number: String }
//!
//! async fn process_order(ctx: Context, order: Order) -> Result<Shipment, BoxError> {
//!     let _payment: String = ctx.step("process-payment", async || charge(order.amount).await).await?;
//!     let shipment = ctx.await_event::<Shipment>(&format!("shipment.packed:{}", order.id)).await?;
//!     ctx.step("send-notification", async || notify(&shipment).await).await?;
//!     Ok(shipment)
//! }
//! # async fn charge(_: u32) -> Result<String, BoxError> { Ok(String::new()) }
//! # async fn notify(_: &Shipment) -> Result<(), BoxError> { Ok(()) }
//!
//! #[tokio::main]
//! async fn main() -> Result<(), BoxError> {
//!     let absurd = Absurd::connect()?;
//!     let fulfil = absurd.register("order-fulfillment", process_order);
//!     absurd.spawn(&fulfil, &Order { id: "42".into(), amount: 100 }).await?;
//!     Ok(absurd.run_worker(WorkerOptions::default().concurrency(4)).await?)
//! }
//! ```
//!
//! # Replay
//!
//! A handler runs from its beginning each time a worker claims its task: the first time, after a failure, after a
//! crash, and after each sleep or wait that suspended it. [`Context::step`] stores the value of its action. In later
//! executions it returns the stored value and does not call the action. Code between steps runs again.
//!
//! # Determinism
//!
//! The sequence of steps must be deterministic: the steps that are reached, their names, and the order of steps with
//! equal names. It may depend on params and on the values of steps, and on nothing else. The clock, random numbers,
//! files and other services belong into steps.
//!
//! # Repeated effects
//!
//! Two kinds of code can run twice: the action of a step, if it took effect but the process died before the value was
//! stored; and any code, if a lease ends while its worker is still busy. The other side should therefore recognise a
//! repeated effect by a key, such as [`Context::task_id`] with the step's name. A stored value is never changed, a run
//! is never completed twice, and calls of a worker that lost its run are refused.
//!
//! # Changes of code under running tasks
//!
//! It is safe to add steps, and to change an action. Keep the names of steps that may be stored, the types of their
//! values, and the order of steps with equal names. If the sequence of steps itself changes, give the new handler a new
//! task name, and keep the old handler registered until its tasks have ended.
//!
//! # Signals
//!
//! When the run is suspended, cancelled or lost, the context call returns [`TaskError::Signal`]; pass it on with `?`. A
//! handler that ignores the signal gains nothing: each further call returns the same signal, the handler is dropped at
//! its next await, and its result is discarded.
//!
//! # Programs without an async runtime
//!
//! [`blocking`] has handlers and workers for them, under the same names.
//!
//! # Tests
//!
//! [`testing`] runs a handler in memory, where the test controls time, events, children and crashes. It also moves the
//! time of a real server that was started with `--test-clock`.

mod app;
mod backend;
pub mod blocking;
mod context;
mod drive;
mod error;
mod handlers;
mod hooks;
mod spawn;
mod task;
pub mod testing;
mod trace;
mod wait;
mod worker;

pub use app::Absurd;
pub use context::{Context, Step};
pub use error::{BoxError, Signal, TaskError};
pub use hooks::{Execution, Hooks};
pub use spawn::{ChildSpawn, Spawn, SpawnDraft};
pub use task::{TaskOptions, TaskType};
pub use wait::{EventWait, ResultWait};
pub use worker::{Worker, WorkerError, WorkerOptions};

pub(crate) use backend::{AwaitedTask, TaskWait, Until};
pub(crate) use wait::Snapshot;
