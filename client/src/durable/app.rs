//! `Absurd`: registers handlers on a queue and spawns their tasks.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::context::Context;
use super::error::BoxError;
use super::handlers::{DEFAULT_MAX_ATTEMPTS, Handlers};
use super::hooks::Hooks;
use super::spawn::{Spawn, SpawnDraft};
use super::task::{Handler, Registered, TaskOptions, TaskType, erased};
use crate::{AbsurdClient, ConnectOptions, Error, TaskResult};

/// Durable execution on one queue: registers handlers, spawns tasks and starts workers. Cheap to clone; all clones
/// share the registrations.
#[derive(Clone)]
pub struct Absurd {
    client: AbsurdClient,
    handlers: Arc<Handlers>,
}

impl fmt::Debug for Absurd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Absurd").field("queue", &self.client.queue_name()).finish_non_exhaustive()
    }
}

impl Absurd {
    /// Durable execution on the client's queue, without hooks. A spawn that names no limit allows five attempts.
    pub fn new(client: AbsurdClient) -> Self {
        Self::with_hooks(client, DEFAULT_MAX_ATTEMPTS, Hooks::default())
    }

    /// Durable execution with the service at `ABSURD_URL`, on the queue `ABSURD_DEFAULT_QUEUE`, else `default`.
    pub fn connect() -> Result<Self, Error> {
        AbsurdClient::connect(&ConnectOptions::from_env()).map(Self::new)
    }

    /// As [`Absurd::new`], with hooks, and with another limit of attempts for spawns that name none.
    pub fn with_hooks(client: AbsurdClient, default_max_attempts: i32, hooks: Hooks) -> Self {
        let handlers = Arc::new(Handlers::new(client.queue_name(), default_max_attempts, hooks));
        Self { client, handlers }
    }

    /// The client through which all calls are made.
    pub fn client(&self) -> &AbsurdClient {
        &self.client
    }

    pub(crate) fn handlers(&self) -> &Arc<Handlers> {
        &self.handlers
    }

    /// Registers a handler: `absurd.register("order-fulfillment", process_order)`. A second registration of a name
    /// replaces the first. Params may be of any type that serde deserializes, the result of any type that it
    /// serializes.
    pub fn register<P, R, E, F, Fut>(&self, task: impl Into<TaskType<P, R>>, handler: F) -> TaskType<P, R>
    where
        P: DeserializeOwned + Send + 'static,
        R: Serialize + Send + 'static,
        E: Into<BoxError> + 'static,
        F: Fn(Context, P) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<R, E>> + Send + 'static,
    {
        self.register_with(task, TaskOptions::default(), handler)
    }

    /// As [`Absurd::register`], with a queue, defaults and a time limit of its own.
    pub fn register_with<P, R, E, F, Fut>(
        &self,
        task: impl Into<TaskType<P, R>>,
        options: TaskOptions,
        handler: F,
    ) -> TaskType<P, R>
    where
        P: DeserializeOwned + Send + 'static,
        R: Serialize + Send + 'static,
        E: Into<BoxError> + 'static,
        F: Fn(Context, P) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<R, E>> + Send + 'static,
    {
        let task = task.into();
        self.register_erased(&task, options, erased(handler), false);
        task
    }

    pub(crate) fn register_erased<P, R>(
        &self,
        task: &TaskType<P, R>,
        options: TaskOptions,
        handler: Handler,
        is_blocking: bool,
    ) {
        let of_type = || task.queue().map(str::to_owned);
        let queue = options.queue.or_else(of_type).unwrap_or_else(|| self.handlers.queue().to_owned());
        let registered = Registered {
            queue,
            default_max_attempts: options.default_max_attempts,
            default_cancellation: options.default_cancellation,
            timeout: options.timeout,
            handler,
            is_blocking,
        };
        self.handlers.register(task.name(), registered);
    }

    /// Spawns a task: `absurd.spawn(&FULFIL, &order).max_attempts(3).await?`. A registered task goes to the queue of
    /// its registration. A task that is not registered here needs a queue, from its [`TaskType`] or from
    /// [`Spawn::queue`].
    pub fn spawn<'a, P, R>(&'a self, task: &TaskType<P, R>, params: &'a P) -> Spawn<'a, P> {
        Spawn { absurd: self, draft: SpawnDraft::of(task), params }
    }

    /// Reads the state and the result of a task at this time.
    pub async fn fetch_task_result<P, R>(&self, task: &TaskType<P, R>, task_id: Uuid) -> Result<TaskResult, Error> {
        self.on_queue_of(task).get_task_result(task_id).await
    }

    /// Waits for the end of a task, at most for `timeout`. Inside of a task use [`Context::await_task_result`], which
    /// holds no slot.
    pub async fn await_task_result<P, R>(
        &self,
        task: &TaskType<P, R>,
        task_id: Uuid,
        timeout: Option<Duration>,
    ) -> Result<TaskResult, Error> {
        self.on_queue_of(task).await_task_result(task_id, timeout).await
    }

    fn on_queue_of<P, R>(&self, task: &TaskType<P, R>) -> AbsurdClient {
        let queue = task.queue().map_or_else(|| self.handlers.queue_of(task.name()), str::to_owned);
        self.client.with_queue(queue)
    }
}
