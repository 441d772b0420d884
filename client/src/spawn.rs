//! Spawning tasks: what may be said about one, and what comes back.

use std::time::{Duration, SystemTime};

use absurd_proto::v1 as pb;
use serde::Serialize;
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::client::rpc;
use crate::{AbsurdClient, Error, Json, wire};

/// Tasks of one `SpawnTasks` call.
const SPAWN_MAX: usize = 1000;

/// How the delay before a retry is computed (contract section 5.3).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RetryStrategy {
    /// Retry at once.
    Immediate,
    /// Always after this long, at most a day.
    Fixed(Duration),
    /// `base * factor ^ (attempt - 1)`, at most `max`.
    Exponential {
        /// First delay, at most a day.
        base: Duration,
        /// Growth; finite, not negative.
        factor: f64,
        /// Bound, at most a day; None: a day.
        max: Option<Duration>,
    },
}

impl RetryStrategy {
    fn into_wire(self) -> pb::RetryStrategy {
        let mut strategy = pb::RetryStrategy::default();
        match self {
            Self::Immediate => strategy.set_kind(pb::RetryKind::None),
            Self::Fixed(base) => {
                strategy.set_kind(pb::RetryKind::Fixed);
                strategy.base = Some(wire::duration(base));
            }
            Self::Exponential { base, factor, max } => {
                strategy.set_kind(pb::RetryKind::Exponential);
                strategy.base = Some(wire::duration(base));
                strategy.factor = Some(factor);
                strategy.max = max.map(wire::duration);
            }
        }
        strategy
    }
}

/// When a task is cancelled by itself. Whole seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CancellationRules {
    /// When nobody has claimed it this long after it was spawned; None: never.
    pub max_delay: Option<Duration>,
    /// When it has not ended this long after it was first claimed; None: never.
    pub max_duration: Option<Duration>,
}

/// When a task can first be claimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// At a time of the database's clock; one in the past is at once.
    At(SystemTime),
    /// After this long by the database's clock.
    After(Duration),
}

impl Start {
    fn into_wire(self) -> pb::new_task::Start {
        match self {
            Self::At(at) => pb::new_task::Start::StartAt(at.into()),
            Self::After(delay) => pb::new_task::Start::Delay(wire::duration(delay)),
        }
    }
}

/// How to spawn a task; the default is one attempt and nothing else.
///
/// ```
/// # use absurd_client::{RetryStrategy, SpawnOptions};
/// # use std::time::Duration;
/// let options = SpawnOptions::default()
///     .max_attempts(3)
///     .retry(RetryStrategy::Fixed(Duration::from_secs(60)))
///     .header("region", "us-east-1")
///     .idempotency_key("order-42");
/// # assert_eq!(options.max_attempts, Some(3));
/// ```
#[derive(Debug, Clone)]
pub struct SpawnOptions {
    /// Attempts at most; None: the server's default, five. One, unless said otherwise: no retry unless asked for.
    pub max_attempts: Option<i32>,
    /// As many attempts as it takes; `max_attempts` must be None.
    pub unlimited_attempts: bool,
    /// None: retry at once where `max_attempts` is set, else after pauses that grow from a second to five minutes.
    pub retry_strategy: Option<RetryStrategy>,
    /// When it is cancelled by itself.
    pub cancellation: CancellationRules,
    /// Stored with the task and handed to its workers; empty: none.
    pub headers: Map<String, Value>,
    /// While a task with this key exists in the queue, no second one is made.
    pub idempotency_key: Option<String>,
    /// Workflow run that the task belongs to; stored as the header `workflow_run_id`.
    pub workflow_run_id: Option<Uuid>,
    /// Id of the task, a `UUIDv7`; None: the client chooses, so that a retried call makes one task.
    pub task_id: Option<Uuid>,
    /// When it can first be claimed; None: at once.
    pub start: Option<Start>,
}

impl Default for SpawnOptions {
    fn default() -> Self {
        Self {
            max_attempts: Some(1),
            unlimited_attempts: false,
            retry_strategy: None,
            cancellation: CancellationRules::default(),
            headers: Map::new(),
            idempotency_key: None,
            workflow_run_id: None,
            task_id: None,
            start: None,
        }
    }
}

impl SpawnOptions {
    /// At most so many attempts.
    #[must_use]
    pub fn max_attempts(mut self, attempts: i32) -> Self {
        self.max_attempts = Some(attempts);
        self.unlimited_attempts = false;
        self
    }

    /// As many attempts as it takes.
    #[must_use]
    pub fn unlimited_attempts(mut self) -> Self {
        self.max_attempts = None;
        self.unlimited_attempts = true;
        self
    }

    /// How long to wait before a retry.
    #[must_use]
    pub fn retry(mut self, strategy: RetryStrategy) -> Self {
        self.retry_strategy = Some(strategy);
        self
    }

    /// Cancel it when nobody has claimed it for this long.
    #[must_use]
    pub fn max_delay(mut self, delay: Duration) -> Self {
        self.cancellation.max_delay = Some(delay);
        self
    }

    /// Cancel it when it has not ended this long after its first claim.
    #[must_use]
    pub fn max_duration(mut self, duration: Duration) -> Self {
        self.cancellation.max_duration = Some(duration);
        self
    }

    /// One more header.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.headers.insert(name.into(), value.into());
        self
    }

    /// While a task with this key exists in the queue, make no second one.
    #[must_use]
    pub fn idempotency_key(mut self, key: impl Into<String>) -> Self {
        self.idempotency_key = Some(key.into());
        self
    }

    /// It belongs to this workflow run.
    #[must_use]
    pub fn workflow_run(mut self, workflow_run_id: Uuid) -> Self {
        self.workflow_run_id = Some(workflow_run_id);
        self
    }

    /// It can be claimed only from this time on.
    #[must_use]
    pub fn start_at(mut self, at: SystemTime) -> Self {
        self.start = Some(Start::At(at));
        self
    }

    /// It can be claimed only after this long.
    #[must_use]
    pub fn delay(mut self, delay: Duration) -> Self {
        self.start = Some(Start::After(delay));
        self
    }
}

/// A task to be spawned with others.
#[derive(Debug, Clone)]
pub struct NewTask {
    pub(crate) wire: pb::NewTask,
}

impl NewTask {
    /// A task for a handler.
    pub fn new<P: Serialize + ?Sized>(name: &str, params: &P, options: SpawnOptions) -> Result<Self, Error> {
        Ok(Self::with_json(name, Json::of(params)?, options))
    }

    /// A task whose params are JSON already.
    pub fn with_json(name: &str, params: Json, options: SpawnOptions) -> Self {
        let rules = options.cancellation;
        let cancellation = (rules != CancellationRules::default()).then(|| pb::CancellationPolicy {
            max_delay: rules.max_delay.map(wire::duration),
            max_duration: rules.max_duration.map(wire::duration),
        });
        let headers = (!options.headers.is_empty()).then(|| Json::from(Value::Object(options.headers)).into_wire());
        Self {
            wire: pb::NewTask {
                task_name: name.to_owned(),
                params: Some(params.into_wire()),
                headers,
                max_attempts: options.max_attempts,
                retry_strategy: options.retry_strategy.map(RetryStrategy::into_wire),
                cancellation,
                idempotency_key: options.idempotency_key,
                task_id: Some(options.task_id.unwrap_or_else(Uuid::now_v7).to_string()),
                workflow_run_id: options.workflow_run_id.map(|id| id.to_string()),
                unlimited_attempts: options.unlimited_attempts,
                start: options.start.map(Start::into_wire),
            },
        }
    }
}

/// Ids of a spawned task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spawned {
    /// The task.
    pub task_id: Uuid,
    /// Its newest run.
    pub run_id: Uuid,
    /// The workflow run that was given; else the run.
    pub workflow_run_id: Uuid,
    /// Attempt number of that run.
    pub attempt: i32,
    /// False when an idempotency key found a task that existed before.
    pub created: bool,
}

impl Spawned {
    pub(crate) fn from_wire(task: Option<pb::SpawnedTask>) -> Result<Self, Error> {
        let task = task.unwrap_or_default();
        Ok(Self {
            task_id: wire::id(&task.task_id)?,
            run_id: wire::id(&task.run_id)?,
            workflow_run_id: wire::id(&task.workflow_run_id)?,
            attempt: task.attempt,
            created: task.created,
        })
    }
}

impl AbsurdClient {
    /// Spawns a task. The queue must exist. The client chooses the task's id, so that a repeated call makes one task.
    pub async fn spawn_task<P: Serialize + ?Sized>(
        &self,
        task_name: &str,
        params: &P,
        options: SpawnOptions,
    ) -> Result<Spawned, Error> {
        self.spawn_new_task(NewTask::new(task_name, params, options)?).await
    }

    /// Spawns a task that is put together already.
    pub async fn spawn_new_task(&self, task: NewTask) -> Result<Spawned, Error> {
        let request = pb::SpawnTaskRequest { queue: self.queue(), task: Some(task.wire) };
        Spawned::from_wire(rpc!(self.spawn_task(request))?.task)
    }

    /// Spawns up to 1,000 tasks, all or none.
    pub async fn spawn_tasks(&self, tasks: Vec<NewTask>) -> Result<Vec<Spawned>, Error> {
        if tasks.len() > SPAWN_MAX {
            return Err(Error::argument("tasks", format!("must hold at most {SPAWN_MAX} tasks")));
        }
        let tasks = tasks.into_iter().map(|task| task.wire).collect();
        let request = pb::SpawnTasksRequest { queue: self.queue(), tasks };
        let response = rpc!(self.spawn_tasks(request))?;
        response.tasks.into_iter().map(|task| Spawned::from_wire(Some(task))).collect()
    }
}

/// How often and how a task is retried.
#[derive(Debug, Clone, Copy)]
pub struct Retries {
    /// Attempts at most.
    pub max_attempts: i32,
    /// Delays between them.
    pub strategy: RetryStrategy,
}

impl Default for Retries {
    /// Three attempts, 30 s and 60 s apart.
    fn default() -> Self {
        let strategy = RetryStrategy::Exponential { base: Duration::from_secs(30), factor: 2.0, max: None };
        Self { max_attempts: 3, strategy }
    }
}

impl Retries {
    /// As options of a spawn.
    pub fn options(self) -> SpawnOptions {
        SpawnOptions::default().max_attempts(self.max_attempts).retry(self.strategy)
    }
}

/// Spawns a task that is retried: the original client's helper.
pub async fn spawn_retry_task<P: Serialize + ?Sized>(
    client: &AbsurdClient,
    task_name: &str,
    params: &P,
    retries: Retries,
) -> Result<Spawned, Error> {
    client.spawn_task(task_name, params, retries.options()).await
}

/// Spawns a task with one attempt that is cancelled by itself: the original client's helper.
pub async fn spawn_cancellable_task<P: Serialize + ?Sized>(
    client: &AbsurdClient,
    task_name: &str,
    params: &P,
    rules: CancellationRules,
) -> Result<Spawned, Error> {
    client.spawn_task(task_name, params, SpawnOptions { cancellation: rules, ..SpawnOptions::default() }).await
}
