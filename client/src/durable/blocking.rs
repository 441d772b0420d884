//! Durable execution for programs without an async runtime. Handlers are ordinary functions, each executed on a thread
//! of its own.
//!
//! ```no_run
//! use absurd_client::durable::blocking::{Absurd, Context};
//! use absurd_client::durable::{BoxError, WorkerOptions};
//! use std::time::Duration;
//!
//! fn process_order(ctx: Context, order_id: String) -> Result<String, BoxError> {
//!     let payment = ctx.step("process-payment", || Ok::<_, BoxError>(format!("pay-{order_id}")))?;
//!     ctx.sleep_for("let it settle", Duration::from_secs(60))?;
//!     let shipment: String = ctx.await_event(&format!("shipment.packed:{order_id}")).wait()?;
//!     Ok(format!("{payment}, {shipment}"))
//! }
//!
//! fn main() -> Result<(), BoxError> {
//!     let absurd = Absurd::connect()?;
//!     let fulfil = absurd.register("order-fulfillment", process_order);
//!     absurd.spawn(&fulfil, &"42".to_owned()).max_attempts(3).wait()?;
//!     Ok(absurd.run_worker(WorkerOptions::default().concurrency(4))?)
//! }
//! ```
//!
//! Names and rules are those of [`crate::durable`]. An operation that is awaited there ends with `wait()` here. A
//! thread cannot be dropped: when a claim is lost, the next context call of the handler returns the signal. The handler
//! keeps its slot in the worker until it returns.

use std::fmt;
use std::future::{Future, IntoFuture};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokio::sync::oneshot;
use tokio::time::Instant;
use uuid::Uuid;

use super::error::{BoxError, Signal, TaskError};
use super::task::{Handler, result_json};
use super::{ChildSpawn, EventWait, Hooks, ResultWait, Spawn, Step, TaskOptions, TaskType, WorkerOptions};
use crate::blocking::{AbsurdClient, runtime};
use crate::{Emitted, Error, Json, Spawned, TaskResult};

/// Blocks this thread until a future of the client is done. Errors inside an async runtime.
fn wait<T, E: From<Error>>(work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    runtime()?.block_on(work)
}

impl<T: DeserializeOwned + 'static> EventWait<T> {
    /// Blocks until the event has come; for blocking handlers.
    pub fn wait(self) -> Result<T, TaskError> {
        wait(self.into_future())
    }
}

impl<R: DeserializeOwned + 'static> ResultWait<R> {
    /// Blocks until the task has ended; for blocking handlers.
    pub fn wait(self) -> Result<R, TaskError> {
        wait(self.into_future())
    }

    /// As [`ResultWait::outcome`], but blocks; for blocking handlers.
    pub fn wait_outcome(self) -> Result<TaskResult, TaskError> {
        wait(self.outcome())
    }
}

impl<P: Serialize + Sync> Spawn<'_, P> {
    /// Spawns the task and blocks until the server has answered; for blocking programs.
    pub fn wait(self) -> Result<Spawned, Error> {
        wait(self.into_future())
    }
}

impl<P: Serialize + Sync> ChildSpawn<'_, P> {
    /// Spawns the task and blocks until the server has answered; for blocking handlers.
    pub fn wait(self) -> Result<Spawned, TaskError> {
        wait(self.into_future())
    }
}

/// See [`crate::durable::Absurd`].
#[derive(Clone, Debug)]
pub struct Absurd {
    inner: super::Absurd,
}

impl From<super::Absurd> for Absurd {
    /// Shares the registrations, so that blocking and async handlers can serve the same queue.
    fn from(inner: super::Absurd) -> Self {
        Self { inner }
    }
}

impl Absurd {
    /// See [`crate::durable::Absurd::new`].
    pub fn new(client: AbsurdClient) -> Self {
        super::Absurd::new(client.inner).into()
    }

    /// See [`crate::durable::Absurd::connect`].
    pub fn connect() -> Result<Self, Error> {
        let _runtime = runtime()?.enter();
        super::Absurd::connect().map(Self::from)
    }

    /// See [`crate::durable::Absurd::with_hooks`].
    pub fn with_hooks(client: AbsurdClient, default_max_attempts: i32, hooks: Hooks) -> Self {
        super::Absurd::with_hooks(client.inner, default_max_attempts, hooks).into()
    }

    /// A blocking client on the same connection.
    pub fn client(&self) -> AbsurdClient {
        AbsurdClient { inner: self.inner.client().clone() }
    }

    /// See [`crate::durable::Absurd::register`].
    pub fn register<P, R, E, F>(&self, task: impl Into<TaskType<P, R>>, handler: F) -> TaskType<P, R>
    where
        P: DeserializeOwned + Send + 'static,
        R: Serialize + Send + 'static,
        E: Into<BoxError> + 'static,
        F: Fn(Context, P) -> Result<R, E> + Send + Sync + 'static,
    {
        self.register_with(task, TaskOptions::default(), handler)
    }

    /// See [`crate::durable::Absurd::register_with`].
    pub fn register_with<P, R, E, F>(
        &self,
        task: impl Into<TaskType<P, R>>,
        options: TaskOptions,
        handler: F,
    ) -> TaskType<P, R>
    where
        P: DeserializeOwned + Send + 'static,
        R: Serialize + Send + 'static,
        E: Into<BoxError> + 'static,
        F: Fn(Context, P) -> Result<R, E> + Send + Sync + 'static,
    {
        let task = task.into();
        self.inner.register_erased(&task, options, on_a_thread(handler), true);
        task
    }

    /// See [`crate::durable::Absurd::spawn`]; ends with `wait()`.
    pub fn spawn<'a, P, R>(&'a self, task: &TaskType<P, R>, params: &'a P) -> Spawn<'a, P> {
        self.inner.spawn(task, params)
    }

    /// See [`crate::durable::Absurd::fetch_task_result`].
    pub fn fetch_task_result<P, R>(&self, task: &TaskType<P, R>, task_id: Uuid) -> Result<TaskResult, Error> {
        wait(self.inner.fetch_task_result(task, task_id))
    }

    /// See [`crate::durable::Absurd::await_task_result`].
    pub fn await_task_result<P, R>(
        &self,
        task: &TaskType<P, R>,
        task_id: Uuid,
        timeout: Option<Duration>,
    ) -> Result<TaskResult, Error> {
        wait(self.inner.await_task_result(task, task_id, timeout))
    }

    /// See [`crate::durable::Absurd::start_worker`].
    pub fn start_worker(&self, options: WorkerOptions) -> Result<Worker, Error> {
        wait(self.inner.start_worker(options)).map(|inner| Worker { inner })
    }

    /// See [`crate::durable::Absurd::run_worker`].
    pub fn run_worker(&self, options: WorkerOptions) -> Result<(), Error> {
        wait(self.inner.run_worker(options))
    }

    /// See [`crate::durable::Absurd::work_batch`].
    pub fn work_batch(&self, options: WorkerOptions, batch_size: i32) -> Result<usize, Error> {
        wait(self.inner.work_batch(options, batch_size))
    }
}

/// A running worker; see [`crate::durable::Worker`].
#[derive(Debug)]
pub struct Worker {
    inner: super::Worker,
}

impl Worker {
    /// See [`crate::durable::Worker::stop`].
    pub fn stop(self) -> Result<(), Error> {
        runtime()?.block_on(self.inner.stop());
        Ok(())
    }

    /// See [`crate::durable::Worker::begin_stop`].
    pub fn begin_stop(&self) {
        self.inner.begin_stop();
    }
}

/// Wraps a blocking handler as an async one, which executes it on a thread of its own.
pub(super) fn on_a_thread<P, R, E, F>(handler: F) -> Handler
where
    P: DeserializeOwned + Send + 'static,
    R: Serialize + Send + 'static,
    E: Into<BoxError> + 'static,
    F: Fn(Context, P) -> Result<R, E> + Send + Sync + 'static,
{
    let handler = Arc::new(handler);
    Arc::new(move |context| {
        let handler = Arc::clone(&handler);
        Box::pin(async move {
            let (tell, told) = oneshot::channel();
            let (place, span) = (context.place(), tracing::Span::current());
            let work = move || {
                let params = context.params::<P>()?;
                let inner = context.clone();
                let result = context.scope_thread(|| handler(Context { inner }, params)).map_err(Into::into)?;
                result_json(&result)
            };
            std::thread::Builder::new().name("absurd-task".into()).spawn(move || {
                let ended = span.in_scope(|| catch_unwind(AssertUnwindSafe(work)));
                // The receiver is gone if the execution is over already.
                let _ = tell.send(ended);
                drop(place);
            })?;
            match told.await {
                Ok(Ok(result)) => result,
                Ok(Err(panic)) => resume_unwind(panic),
                Err(_) => Err("the handler's thread ended without a result".into()),
            }
        })
    })
}

/// Methods that call those of the async context.
macro_rules! same {
    ($($name:ident() -> $out:ty;)*) => {
        $(
            #[doc = concat!("See [`crate::durable::Context::", stringify!($name), "`].")]
            pub fn $name(&self) -> $out {
                self.inner.$name()
            }
        )*
    };
}

/// One execution of a task, passed to its handler; see [`crate::durable::Context`].
#[derive(Clone)]
pub struct Context {
    inner: super::Context,
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl Context {
    /// The context of the handler that runs on this thread; `None` outside of handlers.
    pub fn current() -> Option<Self> {
        super::Context::current().map(|inner| Self { inner })
    }

    same! {
        task_id() -> Uuid;
        run_id() -> Uuid;
        attempt() -> i32;
        max_attempts() -> Option<i32>;
        task_name() -> &str;
        queue_name() -> &str;
        headers() -> &Map<String, Value>;
        deadline() -> Option<Instant>;
        params_json() -> &Json;
        signal() -> Option<Signal>;
    }

    /// See [`crate::durable::Context::params`].
    pub fn params<P: DeserializeOwned>(&self) -> Result<P, TaskError> {
        self.inner.params()
    }

    /// See [`crate::durable::Context::step`].
    pub fn step<T, E, F>(&self, name: &str, action: F) -> Result<T, TaskError>
    where
        T: Serialize + DeserializeOwned,
        E: Into<BoxError>,
        F: FnOnce() -> Result<T, E>,
    {
        let step = self.inner.begin_step(name)?;
        if let Some(value) = &step.state {
            return value.to().map_err(|error| TaskError::json(&step.checkpoint_name, error));
        }
        // Called outside of the runtime, because the action may make blocking calls of its own.
        let value = step.span().in_scope(action).map_err(|error| TaskError::of_step(error.into()))?;
        self.complete_step(step, &value)?;
        Ok(value)
    }

    /// See [`crate::durable::Context::begin_step`].
    pub fn begin_step(&self, name: &str) -> Result<Step, TaskError> {
        self.inner.begin_step(name)
    }

    /// See [`crate::durable::Context::complete_step`].
    pub fn complete_step<T: Serialize + ?Sized>(&self, step: Step, value: &T) -> Result<Json, TaskError> {
        wait(self.inner.complete_step(step, value))
    }

    /// See [`crate::durable::Context::sleep_for`].
    pub fn sleep_for(&self, name: &str, duration: Duration) -> Result<(), TaskError> {
        wait(self.inner.sleep_for(name, duration))
    }

    /// See [`crate::durable::Context::sleep_until`].
    pub fn sleep_until(&self, name: &str, at: SystemTime) -> Result<(), TaskError> {
        wait(self.inner.sleep_until(name, at))
    }

    /// See [`crate::durable::Context::await_event`]; ends with `wait()`.
    pub fn await_event<T: DeserializeOwned>(&self, event: &str) -> EventWait<T> {
        self.inner.await_event(event)
    }

    /// See [`crate::durable::Context::await_task_result`]; ends with `wait()`.
    pub fn await_task_result<P, R: DeserializeOwned>(&self, task: &TaskType<P, R>, task_id: Uuid) -> ResultWait<R> {
        self.inner.await_task_result(task, task_id)
    }

    /// See [`crate::durable::Context::emit_event`].
    pub fn emit_event<T: Serialize + ?Sized>(&self, event: &str, payload: &T) -> Result<Emitted, TaskError> {
        wait(self.inner.emit_event(event, payload))
    }

    /// See [`crate::durable::Context::heartbeat`].
    pub fn heartbeat(&self) -> Result<(), TaskError> {
        wait(self.inner.heartbeat())
    }

    /// See [`crate::durable::Context::heartbeat_for`].
    pub fn heartbeat_for(&self, extend_by: Duration) -> Result<(), TaskError> {
        wait(self.inner.heartbeat_for(extend_by))
    }

    /// See [`crate::durable::Context::spawn`]; ends with `wait()`.
    pub fn spawn<'a, P: Serialize, R>(&'a self, task: &TaskType<P, R>, params: &'a P) -> ChildSpawn<'a, P> {
        self.inner.spawn(task, params)
    }

    /// See [`crate::durable::Context::spawn_all`].
    pub fn spawn_all<P: Serialize, R>(
        &self,
        task: &TaskType<P, R>,
        params: impl IntoIterator<Item = P>,
    ) -> Result<Vec<Uuid>, TaskError> {
        wait(self.inner.spawn_all(task, params))
    }
}
