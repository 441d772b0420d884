//! Tests of handlers: a task in memory, whose time, events, children and crashes the test controls; and the clock of a
//! server that was started with `--test-clock`.
//!
//! ```
//! use absurd_client::durable::testing::{Progress, TestTask, Wake};
//! use absurd_client::durable::{BoxError, Context};
//! use std::time::Duration;
//!
//! async fn process_order(ctx: Context, order_id: String) -> Result<String, BoxError> {
//!     let payment: String = ctx.step("process-payment", async || Ok::<_, BoxError>(format!("pay-{order_id}"))).await?;
//!     ctx.sleep_for("let it settle", Duration::from_secs(3600)).await?;
//!     let tracking: String = ctx.await_event(&format!("shipment.packed:{order_id}")).await?;
//!     Ok(format!("{payment} {tracking}"))
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() {
//! let mut task = TestTask::new(process_order, &"42".to_owned());
//! assert!(matches!(task.run().await, Progress::Suspended(Wake::At(_))));
//! task.advance(Duration::from_secs(3600));
//! assert_eq!(task.run().await, Progress::Suspended(Wake::Event { name: "shipment.packed:42".into(), until: None }));
//! task.emit("shipment.packed:42", &"TRACK-42");
//! assert_eq!(task.run().await, Progress::Completed("pay-42 TRACK-42".to_owned()));
//! assert_eq!(task.checkpoint::<String>("process-payment"), Some("pay-42".into()));
//! # }
//! ```

mod clock;
mod memory;

use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use uuid::Uuid;

use super::blocking;
use super::context::{Context, Facts};
use super::drive::{Outcome, drive};
use super::error::{BoxError, Signal};
use super::handlers::{DEFAULT_MAX_ATTEMPTS, Handlers};
use super::hooks::Hooks;
use super::task::{Handler, erased};
use crate::{Json, State, TaskResult};

pub use clock::TestClock;
use memory::Memory;
pub use memory::SpawnedTask;

/// The condition that wakes a sleeping task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wake {
    /// This time has come.
    At(SystemTime),
    /// An event was emitted, or the wait timed out at `until`.
    Event {
        /// Name of the event.
        name: String,
        /// Time at which the wait times out; `None` means never.
        until: Option<SystemTime>,
    },
    /// A task has ended, or the wait timed out at `until`.
    Task {
        /// Id of the awaited task.
        task_id: Uuid,
        /// Time at which the wait times out; `None` means never.
        until: Option<SystemTime>,
    },
}

/// State of a task after an execution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress<R> {
    /// The task has completed with this result.
    Completed(R),
    /// The attempt has failed.
    Failed {
        /// Recorded name, such as `StepError`.
        name: String,
        /// Recorded message.
        message: String,
        /// Whether the next `run` executes a further attempt.
        retried: bool,
    },
    /// The task sleeps until this condition is met.
    Suspended(Wake),
    /// The task was cancelled.
    Cancelled,
    /// The execution crashed where the test asked for it. The next `run` executes the next attempt.
    Crashed,
}

/// One task in memory. It executes only in [`TestTask::run`] and [`TestTask::run_to_end`]. Its time moves only by
/// [`TestTask::advance`] and by the sleeps of `run_to_end`.
pub struct TestTask<R> {
    handlers: Arc<Handlers>,
    handler: Handler,
    params: Json,
    headers: Map<String, Value>,
    max_attempts: Option<i32>,
    attempt: i32,
    run_id: Uuid,
    memory: Arc<Memory>,
    end: Option<Outcome>,
    result: PhantomData<fn() -> R>,
}

impl<R> fmt::Debug for TestTask<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestTask").field("attempt", &self.attempt).field("memory", &self.memory).finish_non_exhaustive()
    }
}

/// Queue of a task in memory.
const QUEUE: &str = "default";
/// Name of a task in memory.
const NAME: &str = "test-task";

/// A value of the test as JSON. Panics if serde cannot write it, which is a mistake in the test.
fn json<T: Serialize + ?Sized>(value: &T) -> Json {
    Json::of(value).unwrap_or_else(|error| panic!("a value of the test cannot be written as JSON: {error}"))
}

impl<R: DeserializeOwned> TestTask<R> {
    /// A task for an async handler. Params and result pass through JSON, as in a worker.
    pub fn new<P, E, F, Fut>(handler: F, params: &P) -> Self
    where
        P: Serialize + DeserializeOwned + Send + 'static,
        R: Serialize + Send + 'static,
        E: Into<BoxError> + 'static,
        F: Fn(Context, P) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<R, E>> + Send + 'static,
    {
        Self::of(erased(handler), params)
    }

    /// A task for a blocking handler.
    pub fn blocking<P, E, F>(handler: F, params: &P) -> Self
    where
        P: Serialize + DeserializeOwned + Send + 'static,
        R: Serialize + Send + 'static,
        E: Into<BoxError> + 'static,
        F: Fn(blocking::Context, P) -> Result<R, E> + Send + Sync + 'static,
    {
        Self::of(blocking::on_a_thread(handler), params)
    }

    fn of<P: Serialize>(handler: Handler, params: &P) -> Self {
        Self {
            handlers: Arc::new(Handlers::new(QUEUE, DEFAULT_MAX_ATTEMPTS, Hooks::default())),
            handler,
            params: json(params),
            headers: Map::new(),
            max_attempts: Some(DEFAULT_MAX_ATTEMPTS),
            attempt: 1,
            run_id: Uuid::now_v7(),
            memory: Arc::new(Memory::new()),
            end: None,
            result: PhantomData,
        }
    }

    /// Sets the hooks.
    #[must_use]
    pub fn hooks(self, hooks: Hooks) -> Self {
        Self { handlers: Arc::new(Handlers::new(QUEUE, DEFAULT_MAX_ATTEMPTS, hooks)), ..self }
    }

    /// Adds a header, or replaces the header of this name.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.headers.insert(name.into(), value.into());
        self
    }

    /// Sets the maximum number of attempts; the default is 5. Attempts follow each other without a delay.
    #[must_use]
    pub fn max_attempts(self, attempts: i32) -> Self {
        Self { max_attempts: Some(attempts), ..self }
    }

    /// Sets the time at which the task begins; the default is 2000-01-01T00:00:00Z.
    #[must_use]
    pub fn starting_at(self, now: SystemTime) -> Self {
        self.memory.lock().now = now;
        self
    }

    /// Executes the handler once, as a worker does with a claim. A task whose condition is not met goes on sleeping; a
    /// task that has ended stays as it is.
    pub async fn run(&mut self) -> Progress<R> {
        if let Some(end) = &self.end {
            return self.ended(end);
        }
        {
            let mut memory = self.memory.lock();
            if memory.cancelled {
                return Progress::Cancelled;
            }
            if let Some(wake) = memory.sleeping() {
                return Progress::Suspended(wake);
            }
        }
        let (handler, never) = (Arc::clone(&self.handler), std::future::pending);
        let outcome = drive(&self.handlers, self.context(), handler, never(), std::future::pending()).await;
        match outcome {
            Outcome::Over(signal) => self.over(signal),
            Outcome::Failed(_) if self.max_attempts.is_none_or(|max| self.attempt < max) => {
                let Progress::Failed { name, message, .. } = self.ended(&outcome) else { return self.ended(&outcome) };
                self.next_attempt();
                Progress::Failed { name, message, retried: true }
            }
            end => {
                let progress = self.ended(&end);
                self.end = Some(end);
                progress
            }
        }
    }

    /// Executes the task until it has ended, or waits for something that only the test can cause. Moves the time to the
    /// end of each sleep. Executes the next attempt after a failure or a crash.
    pub async fn run_to_end(&mut self) -> Progress<R> {
        loop {
            match self.run().await {
                Progress::Suspended(Wake::At(at)) => self.memory.lock().now = at,
                Progress::Failed { retried: true, .. } | Progress::Crashed => {}
                progress => return progress,
            }
        }
    }

    fn context(&self) -> Context {
        let memory = self.memory.lock();
        let facts = Facts {
            task_id: memory.task_id,
            run_id: self.run_id,
            attempt: self.attempt,
            task_name: NAME.to_owned(),
            queue: QUEUE.to_owned(),
            params: self.params.clone(),
            headers: self.headers.clone(),
            max_attempts: self.max_attempts,
            claimed_at: Some(memory.now),
            deadline: None,
            lease: Duration::from_secs(120),
            place: None,
        };
        let stored = memory.checkpoints.clone();
        drop(memory);
        Context::new(facts, Arc::clone(&self.handlers), Arc::clone(&self.memory) as _, stored)
    }

    fn next_attempt(&mut self) {
        self.attempt += 1;
        self.run_id = Uuid::now_v7();
    }

    fn over(&mut self, signal: Signal) -> Progress<R> {
        let wake = self.memory.lock().wake.clone();
        match (signal, wake) {
            (Signal::Suspended, Some(wake)) => Progress::Suspended(wake),
            (Signal::Cancelled, _) => Progress::Cancelled,
            _ => {
                self.next_attempt();
                Progress::Crashed
            }
        }
    }

    fn ended(&self, end: &Outcome) -> Progress<R> {
        let failed = |name: String, message: String| Progress::Failed { name, message, retried: false };
        match end {
            Outcome::Completed(result) => match result.to() {
                Ok(result) => Progress::Completed(result),
                Err(error) => failed("JsonError".into(), format!("the result is not what the test reads: {error}")),
            },
            Outcome::Failed(reason) | Outcome::FailedForGood(reason) => {
                let reason: Value = reason.to().unwrap_or_default();
                let text = |key: &str| reason[key].as_str().unwrap_or_default().to_owned();
                failed(text("name"), text("message"))
            }
            Outcome::Over(_) | Outcome::Unread(_) | Outcome::LeftOff => Progress::Crashed,
        }
    }
}

impl<R> TestTask<R> {
    /// Id of the task.
    pub fn task_id(&self) -> Uuid {
        self.memory.lock().task_id
    }

    /// Number of the attempt that the next `run` executes.
    pub fn attempt(&self) -> i32 {
        self.attempt
    }

    /// Present time of the task.
    pub fn now(&self) -> SystemTime {
        self.memory.lock().now
    }

    /// Advances the time of the task.
    pub fn advance(&mut self, by: Duration) {
        self.memory.lock().now += by;
    }

    /// Emits an event; the first emission of a name wins.
    pub fn emit<T: Serialize + ?Sized>(&mut self, event: &str, payload: &T) {
        let payload = json(payload);
        self.memory.lock().events.entry(event.to_owned()).or_insert(payload);
    }

    /// Events that the task has emitted, in order.
    pub fn emitted(&self) -> Vec<(String, Json)> {
        self.memory.lock().emitted.clone()
    }

    /// Tasks that the task has spawned, in order, each once.
    pub fn spawned(&self) -> Vec<SpawnedTask> {
        self.memory.lock().spawned.clone()
    }

    /// Completes another task, which this one may wait for, with a result.
    pub fn complete<T: Serialize + ?Sized>(&mut self, task_id: Uuid, result: &T) {
        let result = json(result);
        self.end_task(TaskResult { task_id, state: State::Completed, result: Some(result), failure: None });
    }

    /// Ends another task, which this one may wait for, in any way.
    pub fn end_task(&mut self, end: TaskResult) {
        self.memory.lock().ended.insert(end.task_id, end);
    }

    /// Cancels the task: its next call ends the execution.
    pub fn cancel(&mut self) {
        self.memory.lock().cancelled = true;
    }

    /// Makes the execution crash, once, just before the checkpoint of this name is stored. Its action has taken effect
    /// by then.
    pub fn crash_at(&mut self, checkpoint: &str) {
        self.memory.lock().crash = Some(checkpoint.to_owned());
    }

    /// The value of a checkpoint; `None` when it is not stored or has another type.
    pub fn checkpoint<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        let memory = self.memory.lock();
        memory.checkpoint(name).and_then(|value| value.to().ok())
    }

    /// Names and values of the stored checkpoints, in order.
    pub fn checkpoints(&self) -> Vec<(String, Json)> {
        self.memory.lock().checkpoints.clone()
    }

    /// Stores a checkpoint, as an earlier version of the handler may have left it.
    pub fn set_checkpoint<T: Serialize + ?Sized>(&mut self, name: &str, value: &T) {
        let value = json(value);
        self.memory.lock().store(name.to_owned(), value);
    }
}
