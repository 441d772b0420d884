//! `Absurd`: what is registered, how tasks are spawned, and what is called around them.

use std::collections::HashMap;
use std::fmt;
use std::future::{Future, IntoFuture};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use uuid::Uuid;

use super::backend::BoxFuture;
use super::context::Context;
use super::error::BoxError;
use super::task::{Handler, Registered, TaskOptions, TaskType, erased};
use crate::{
    AbsurdClient, CancellationRules, ConnectOptions, Error, Json, NewTask, RetryStrategy, SpawnOptions, Spawned,
    TaskResult,
};

/// Attempts of a spawn that names none.
const DEFAULT_MAX_ATTEMPTS: i32 = 5;

type BeforeSpawn = Arc<dyn Fn(SpawnDraft) -> BoxFuture<'static, Result<SpawnDraft, BoxError>> + Send + Sync>;
type WrapExecution = Arc<dyn Fn(Context, Execution) -> BoxFuture<'static, Result<Json, BoxError>> + Send + Sync>;

/// Durable execution on one queue: tasks are registered, spawned, and carried out by workers. Cheap to clone; all clones share
/// what is registered.
#[derive(Clone)]
pub struct Absurd {
    inside: Arc<Inside>,
}

struct Inside {
    client: AbsurdClient,
    tasks: RwLock<HashMap<String, Registered>>,
    default_max_attempts: i32,
    before_spawn: Option<BeforeSpawn>,
    wrap_task_execution: Option<WrapExecution>,
}

impl fmt::Debug for Absurd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Absurd").field("queue", &self.inside.client.queue_name()).finish_non_exhaustive()
    }
}

/// What is called around spawns and executions; see [`Absurd::with_hooks`].
#[derive(Clone, Default)]
pub struct Hooks {
    before_spawn: Option<BeforeSpawn>,
    wrap_task_execution: Option<WrapExecution>,
}

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hooks")
            .field("before_spawn", &self.before_spawn.is_some())
            .field("wrap_task_execution", &self.wrap_task_execution.is_some())
            .finish()
    }
}

impl Hooks {
    /// Called with what a spawn asks for, before anything of it is resolved: may change headers, options, the queue.
    #[must_use]
    pub fn before_spawn<F, Fut, E>(mut self, hook: F) -> Self
    where
        F: Fn(SpawnDraft) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<SpawnDraft, E>> + Send + 'static,
        E: Into<BoxError> + 'static,
    {
        self.before_spawn = Some(Arc::new(move |draft| {
            let changed = hook(draft);
            Box::pin(async move { changed.await.map_err(Into::into) })
        }));
        self
    }

    /// Called in place of each execution: must run [`Execution::run`] and return its result, which becomes the task's.
    #[must_use]
    pub fn wrap_task_execution<F, Fut>(mut self, hook: F) -> Self
    where
        F: Fn(Context, Execution) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Json, BoxError>> + Send + 'static,
    {
        self.wrap_task_execution = Some(Arc::new(move |context, execution| Box::pin(hook(context, execution))));
        self
    }
}

/// The handler of one execution, ready to run; see [`Hooks::wrap_task_execution`].
pub struct Execution {
    context: Context,
    handler: Handler,
}

impl fmt::Debug for Execution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Execution").field("context", &self.context).finish_non_exhaustive()
    }
}

impl Execution {
    /// Runs the handler.
    pub async fn run(self) -> Result<Json, BoxError> {
        (self.handler)(self.context).await
    }
}

impl Absurd {
    /// On a client's queue.
    pub fn new(client: AbsurdClient) -> Self {
        Self::with_hooks(client, DEFAULT_MAX_ATTEMPTS, Hooks::default())
    }

    /// For the service at `ABSURD_URL`, on the queue `ABSURD_DEFAULT_QUEUE`, else `default`.
    pub fn connect() -> Result<Self, Error> {
        AbsurdClient::connect(&ConnectOptions::from_env()).map(Self::new)
    }

    /// With another number of attempts for spawns that name none, and with hooks.
    pub fn with_hooks(client: AbsurdClient, default_max_attempts: i32, hooks: Hooks) -> Self {
        let inside = Inside {
            client,
            tasks: RwLock::new(HashMap::new()),
            default_max_attempts,
            before_spawn: hooks.before_spawn,
            wrap_task_execution: hooks.wrap_task_execution,
        };
        Self { inside: Arc::new(inside) }
    }

    /// The client.
    pub fn client(&self) -> &AbsurdClient {
        &self.inside.client
    }

    /// Registers a handler: `absurd.register("order-fulfillment", process_order)`. A second registration of a name takes the
    /// first one's place. Params and result are whatever serde can read and write.
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

    /// Registers a handler with a queue, defaults and limits of its own.
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
        self.register_erased(&task, options, erased(handler));
        task
    }

    pub(crate) fn register_erased<P, R>(&self, task: &TaskType<P, R>, options: TaskOptions, handler: Handler) {
        let of_type = || task.queue().map(str::to_owned);
        let queue = options.queue.or_else(of_type).unwrap_or_else(|| self.inside.client.queue_name().to_owned());
        let registered = Registered {
            queue,
            default_max_attempts: options.default_max_attempts,
            default_cancellation: options.default_cancellation,
            timeout: options.timeout,
            handler,
        };
        let mut tasks = self.inside.tasks.write().unwrap_or_else(PoisonError::into_inner);
        tasks.insert(task.name().to_owned(), registered);
    }

    pub(crate) fn registered(&self, name: &str) -> Option<Registered> {
        self.inside.tasks.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// Queue of a kind of task: that of its registration, else this one.
    pub(crate) fn queue_of(&self, name: &str) -> String {
        self.registered(name).map_or_else(|| self.inside.client.queue_name().to_owned(), |task| task.queue)
    }

    /// Runs a handler inside the hook.
    pub(crate) fn execute(&self, context: Context, handler: Handler) -> BoxFuture<'static, Result<Json, BoxError>> {
        match &self.inside.wrap_task_execution {
            Some(hook) => hook(context.clone(), Execution { context, handler }),
            None => handler(context),
        }
    }

    /// Spawns a task: `absurd.spawn(&FULFIL, &order).max_attempts(3).await?`. A registered kind goes to its queue; one that is
    /// not registered here needs a queue, from its [`TaskType`] or from [`Spawn::queue`].
    pub fn spawn<'a, P, R>(&'a self, task: &TaskType<P, R>, params: &'a P) -> Spawn<'a, P> {
        Spawn { absurd: self, draft: SpawnDraft::of(task), params }
    }

    /// Fills in what a spawn leaves out (contract/sdk.md 1.5); returns its queue too.
    pub(crate) async fn resolve(&self, draft: SpawnDraft) -> Result<(String, NewTask), Error> {
        let draft = match &self.inside.before_spawn {
            Some(hook) => hook(draft).await.map_err(|error| Error::argument("before_spawn", error))?,
            None => draft,
        };
        let registered = self.registered(&draft.task_name);
        let queue = match (&registered, draft.queue) {
            (Some(task), Some(asked)) if asked != task.queue => {
                let problem = format!(
                    "{:?} is registered for queue {:?} but spawn requested queue {asked:?}",
                    draft.task_name, task.queue
                );
                return Err(Error::argument("queue", problem));
            }
            (Some(task), _) => task.queue.clone(),
            (None, Some(asked)) => asked,
            (None, None) => {
                let problem = format!("{:?} is not registered: say which queue it belongs to", draft.task_name);
                return Err(Error::argument("queue", problem));
            }
        };
        let mut options = draft.options;
        let default = |registered: &Registered| registered.default_max_attempts;
        if !draft.attempts_given {
            let registered = registered.as_ref().and_then(default);
            options.max_attempts = Some(registered.unwrap_or(self.inside.default_max_attempts));
        }
        if !draft.cancellation_given
            && let Some(rules) = registered.and_then(|task| task.default_cancellation)
        {
            options.cancellation = rules;
        }
        Ok((queue, NewTask::with_json(&draft.task_name, draft.params, options)))
    }

    /// State and result of a task, as of now.
    pub async fn fetch_task_result<P, R>(&self, task: &TaskType<P, R>, task_id: Uuid) -> Result<TaskResult, Error> {
        self.on_queue_of(task).get_task_result(task_id).await
    }

    /// Waits for the end of a task, at most so long. Inside of a task use [`Context::await_task_result`], which holds no slot.
    pub async fn await_task_result<P, R>(
        &self,
        task: &TaskType<P, R>,
        task_id: Uuid,
        timeout: Option<Duration>,
    ) -> Result<TaskResult, Error> {
        self.on_queue_of(task).await_task_result(task_id, timeout).await
    }

    fn on_queue_of<P, R>(&self, task: &TaskType<P, R>) -> AbsurdClient {
        let queue = task.queue().map_or_else(|| self.queue_of(task.name()), str::to_owned);
        self.inside.client.with_queue(queue)
    }
}

/// What a spawn asks for, before anything is filled in.
#[derive(Debug, Clone)]
pub struct SpawnDraft {
    task_name: String,
    params: Json,
    queue: Option<String>,
    options: SpawnOptions,
    attempts_given: bool,
    cancellation_given: bool,
}

impl SpawnDraft {
    pub(crate) fn of<P, R>(task: &TaskType<P, R>) -> Self {
        Self {
            task_name: task.name().to_owned(),
            params: Json::null(),
            queue: task.queue().map(str::to_owned),
            options: SpawnOptions::default(),
            attempts_given: false,
            cancellation_given: false,
        }
    }

    pub(crate) fn params(mut self, params: Json) -> Self {
        self.params = params;
        self
    }

    pub(crate) fn key(mut self, key: String) -> Self {
        self.options.idempotency_key = Some(key);
        self
    }

    pub(crate) fn has_key(&self) -> bool {
        self.options.idempotency_key.is_some()
    }

    pub(crate) fn or_queue(mut self, queue: &str) -> Self {
        // A child of a kind that nobody registered here stays on its parent's queue.
        self.queue = self.queue.or_else(|| Some(queue.to_owned()));
        self
    }

    /// Name of the task.
    pub fn task_name(&self) -> &str {
        &self.task_name
    }

    /// Its params.
    pub fn params_json(&self) -> &Json {
        &self.params
    }

    /// The headers so far.
    pub fn headers(&self) -> &serde_json::Map<String, Value> {
        &self.options.headers
    }

    /// On this queue.
    #[must_use]
    pub fn queue(mut self, queue: impl Into<String>) -> Self {
        self.queue = Some(queue.into());
        self
    }

    /// At most so many attempts.
    #[must_use]
    pub fn max_attempts(mut self, attempts: i32) -> Self {
        self.options.max_attempts = Some(attempts);
        self.attempts_given = true;
        self
    }

    /// As many attempts as it takes.
    #[must_use]
    pub fn unlimited_attempts(mut self) -> Self {
        self.options.max_attempts = None;
        self.attempts_given = true;
        self
    }

    /// How long to wait before a retry; without one, not at all.
    #[must_use]
    pub fn retry(mut self, strategy: RetryStrategy) -> Self {
        self.options.retry_strategy = Some(strategy);
        self
    }

    /// When it is cancelled by itself; empty rules take the registration's away.
    #[must_use]
    pub fn cancellation(mut self, rules: CancellationRules) -> Self {
        self.options.cancellation = rules;
        self.cancellation_given = true;
        self
    }

    /// One more header.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.options.headers.insert(name.into(), value.into());
        self
    }

    /// While a task with this key exists in the queue, make no second one.
    #[must_use]
    pub fn idempotency_key(self, key: impl Into<String>) -> Self {
        self.key(key.into())
    }
}

/// A spawn; see [`Absurd::spawn`].
#[must_use = "nothing is spawned before it is awaited"]
pub struct Spawn<'a, P> {
    absurd: &'a Absurd,
    draft: SpawnDraft,
    params: &'a P,
}

impl<P> fmt::Debug for Spawn<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spawn").field("draft", &self.draft).finish_non_exhaustive()
    }
}

/// The same words on a spawn as on its draft.
macro_rules! as_on_the_draft {
    ($($(#[$doc:meta])* $name:ident($($argument:ident: $type:ty),*);)*) => {
        $(
            $(#[$doc])*
            pub fn $name(mut self, $($argument: $type),*) -> Self {
                self.draft = self.draft.$name($($argument),*);
                self
            }
        )*
    };
}

impl<P> Spawn<'_, P> {
    as_on_the_draft! {
        /// On this queue.
        queue(queue: impl Into<String>);
        /// At most so many attempts.
        max_attempts(attempts: i32);
        /// As many attempts as it takes.
        unlimited_attempts();
        /// How long to wait before a retry; without one, not at all.
        retry(strategy: RetryStrategy);
        /// When it is cancelled by itself; empty rules take the registration's away.
        cancellation(rules: CancellationRules);
        /// One more header.
        header(name: impl Into<String>, value: impl Into<Value>);
        /// While a task with this key exists in the queue, make no second one.
        idempotency_key(key: impl Into<String>);
    }
}

impl<'a, P: Serialize + Sync> IntoFuture for Spawn<'a, P> {
    type Output = Result<Spawned, Error>;
    type IntoFuture = BoxFuture<'a, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let draft = self.draft.params(Json::of(self.params)?);
            let (queue, task) = self.absurd.resolve(draft).await?;
            self.absurd.inside.client.with_queue(queue).spawn_new_task(task).await
        })
    }
}
