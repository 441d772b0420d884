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
//! # What replays
//!
//! A handler runs from its beginning each time it is taken up: by its first worker, after a failure, after a crash, after
//! each sleep and each wait that had to suspend it. [`Context::step`] stores what its action returned; the next time the stored
//! value comes back and the action is not called. Everything between steps runs again.
//!
//! # What must be deterministic
//!
//! The way from one step to the next: which steps are reached, under which names, in which order where names are equal. It may
//! depend on params and on the values of steps, and on nothing else. The clock, random numbers, files, other services belong
//! into steps.
//!
//! # What may run twice
//!
//! A step's action that had its effect, when the process died before the value was stored; and any code when a lease ends while
//! its worker is still busy: the other side should know an effect again by a key, such as [`Context::task_id`] with the step's
//! name. A stored value is never changed, a run is never completed twice, and a worker that lost its run is not believed.
//!
//! # How to change code under running tasks
//!
//! Adding steps is safe, and so is changing what an action does. Keep the names of steps that may be stored, the types that
//! their values are read as, and the order of steps with equal names. Where the way itself changes, give the new handler a new
//! task name, and keep the old one registered until its tasks have ended.
//!
//! # Signals
//!
//! When the run is suspended, cancelled or lost, the context call says so with [`TaskError::Signal`]; return it with `?`.
//! A handler that holds on to it does not stay: every further call answers the same, the handler is dropped at its next await,
//! and what it returns counts for nothing.
//!
//! # Programs without an async runtime
//!
//! [`blocking`] has handlers and workers for them, under the same names.
//!
//! # Tests
//!
//! [`testing`] runs a handler in memory, with its time, events, children and crashes in the hands of the test; and it moves the
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
