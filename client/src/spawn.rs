//! Spawning tasks: the options of a spawn, the spawn calls and their answers. The client chooses the id of each task,
//! so that a repeated call makes one task.

use std::time::{Duration, SystemTime};

use absurd_proto::v1 as pb;
use serde::Serialize;
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::client::rpc;
use crate::{AbsurdClient, Error, Json, wire};

/// Maximum number of tasks in one `SpawnTasks` call.
const SPAWN_MAX: usize = 1000;

/// Rule for the delay before a retry. `attempt` is the number of the failed attempt, from 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RetryStrategy {
    /// Retry at once.
    Immediate,
    /// The same delay each time, at most one day.
    Fixed(Duration),
    /// `base * factor ^ (attempt - 1)`, at most `max`.
    Exponential {
        /// First delay, at most a day.
        base: Duration,
        /// Growth factor: finite, not negative.
        factor: f64,
        /// Upper bound, at most one day; `None` means one day.
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

/// Limits after which the server cancels a task, in whole seconds, at most 100 years each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CancellationRules {
    /// Cancels a task that is still unclaimed this long after its spawn; `None` means never.
    pub max_delay: Option<Duration>,
    /// Cancels a task that has not ended this long after its first claim; `None` means never.
    pub max_duration: Option<Duration>,
}

/// Earliest time at which a task can be claimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// At this time by the database's clock; a past time means at once.
    At(SystemTime),
    /// This long after the spawn by the database's clock, at most 10 years.
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

/// Options of a spawn. The default allows one attempt and sets nothing else.
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
    /// Maximum number of attempts; `None` means the server's default, five unless configured. The default of these
    /// options is one, so that a task is retried only on request.
    pub max_attempts: Option<i32>,
    /// Allows any number of attempts; `max_attempts` must be `None`.
    pub unlimited_attempts: bool,
    /// `None`: with `max_attempts` set, retries follow at once. Without it, the delay grows from 1 s to 5 minutes.
    pub retry_strategy: Option<RetryStrategy>,
    /// Limits after which the server cancels the task.
    pub cancellation: CancellationRules,
    /// Stored with the task and passed to its workers; an empty map means none.
    pub headers: Map<String, Value>,
    /// If a task with this key exists in the queue, the spawn makes no second one.
    pub idempotency_key: Option<String>,
    /// Workflow run that the task belongs to; stored as the header `workflow_run_id`.
    pub workflow_run_id: Option<Uuid>,
    /// Id of the task, a UUIDv7. `None`: the client chooses one, so that a repeated call makes one task.
    pub task_id: Option<Uuid>,
    /// Earliest time at which the task can be claimed; `None` means at once.
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
    /// Sets the maximum number of attempts, and unsets `unlimited_attempts`.
    #[must_use]
    pub fn max_attempts(mut self, attempts: i32) -> Self {
        self.max_attempts = Some(attempts);
        self.unlimited_attempts = false;
        self
    }

    /// Allows any number of attempts, and unsets `max_attempts`.
    #[must_use]
    pub fn unlimited_attempts(mut self) -> Self {
        self.max_attempts = None;
        self.unlimited_attempts = true;
        self
    }

    /// Sets the rule for the delay before a retry.
    #[must_use]
    pub fn retry(mut self, strategy: RetryStrategy) -> Self {
        self.retry_strategy = Some(strategy);
        self
    }

    /// Cancels the task when it is still unclaimed this long after its spawn.
    #[must_use]
    pub fn max_delay(mut self, delay: Duration) -> Self {
        self.cancellation.max_delay = Some(delay);
        self
    }

    /// Cancels the task when it has not ended this long after its first claim.
    #[must_use]
    pub fn max_duration(mut self, duration: Duration) -> Self {
        self.cancellation.max_duration = Some(duration);
        self
    }

    /// Adds a header, or replaces the header of this name.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.headers.insert(name.into(), value.into());
        self
    }

    /// If a task with this key exists in the queue, the spawn makes no second one.
    #[must_use]
    pub fn idempotency_key(mut self, key: impl Into<String>) -> Self {
        self.idempotency_key = Some(key.into());
        self
    }

    /// Links the task to this workflow run, by the header `workflow_run_id`.
    #[must_use]
    pub fn workflow_run(mut self, workflow_run_id: Uuid) -> Self {
        self.workflow_run_id = Some(workflow_run_id);
        self
    }

    /// Keeps the task unclaimed until this time.
    #[must_use]
    pub fn start_at(mut self, at: SystemTime) -> Self {
        self.start = Some(Start::At(at));
        self
    }

    /// Keeps the task unclaimed until this long after its spawn.
    #[must_use]
    pub fn delay(mut self, delay: Duration) -> Self {
        self.start = Some(Start::After(delay));
        self
    }
}

/// A task to spawn, by itself or in a batch.
#[derive(Debug, Clone)]
pub struct NewTask {
    pub(crate) wire: pb::NewTask,
}

impl NewTask {
    /// A task with these params; errors when they cannot be written as JSON.
    pub fn new<P: Serialize + ?Sized>(name: &str, params: &P, options: SpawnOptions) -> Result<Self, Error> {
        Ok(Self::with_json(name, Json::of(params)?, options))
    }

    /// A task whose params are JSON text already; the server checks them.
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
    /// Id of the task.
    pub task_id: Uuid,
    /// Id of the task's newest run.
    pub run_id: Uuid,
    /// Id of the workflow run that the spawn named; without one, `run_id`.
    pub workflow_run_id: Uuid,
    /// Attempt number of the run `run_id`.
    pub attempt: i32,
    /// False when the idempotency key belongs to an existing task, and after a retry that made no copy.
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

    /// Spawns a task that was built with [`NewTask`].
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

/// Limit and delays of the retries of a task.
#[derive(Debug, Clone, Copy)]
pub struct Retries {
    /// Maximum number of attempts.
    pub max_attempts: i32,
    /// Rule for the delay between two attempts.
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
    /// The spawn options with this limit and this rule.
    pub fn options(self) -> SpawnOptions {
        SpawnOptions::default().max_attempts(self.max_attempts).retry(self.strategy)
    }
}

/// Spawns a task with retries: a helper of the original client.
pub async fn spawn_retry_task<P: Serialize + ?Sized>(
    client: &AbsurdClient,
    task_name: &str,
    params: &P,
    retries: Retries,
) -> Result<Spawned, Error> {
    client.spawn_task(task_name, params, retries.options()).await
}

/// Spawns a task with one attempt and cancellation rules: a helper of the original client.
pub async fn spawn_cancellable_task<P: Serialize + ?Sized>(
    client: &AbsurdClient,
    task_name: &str,
    params: &P,
    rules: CancellationRules,
) -> Result<Spawned, Error> {
    client.spawn_task(task_name, params, SpawnOptions { cancellation: rules, ..SpawnOptions::default() }).await
}
