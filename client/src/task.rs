//! What is spawned, what comes back.

use std::time::Duration;

use absurd_proto::v1 as pb;
use serde::Serialize;
use uuid::Uuid;

use crate::{Error, Json};

/// State of a task or run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// Waits to be claimed.
    Pending,
    /// Held by a worker.
    Running,
    /// Waits for a time or an event.
    Sleeping,
    /// Ended well.
    Completed,
    /// Ended badly: the attempts are used up.
    Failed,
    /// Was cancelled.
    Cancelled,
}

impl State {
    /// Whether nothing follows.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }

    /// As stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Sleeping => "sleeping",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    pub(crate) fn from_wire(state: i32) -> Option<Self> {
        match pb::State::try_from(state).ok()? {
            pb::State::Unspecified => None,
            pb::State::Pending => Some(Self::Pending),
            pb::State::Running => Some(Self::Running),
            pb::State::Sleeping => Some(Self::Sleeping),
            pb::State::Completed => Some(Self::Completed),
            pb::State::Failed => Some(Self::Failed),
            pb::State::Cancelled => Some(Self::Cancelled),
        }
    }

    pub(crate) fn to_wire(self) -> pb::State {
        match self {
            Self::Pending => pb::State::Pending,
            Self::Running => pb::State::Running,
            Self::Sleeping => pb::State::Sleeping,
            Self::Completed => pb::State::Completed,
            Self::Failed => pb::State::Failed,
            Self::Cancelled => pb::State::Cancelled,
        }
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

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

/// How to spawn a task.
#[derive(Debug, Clone, Default)]
pub struct SpawnOptions {
    /// Attempts at most; None means 1: no retry unless asked for.
    pub max_attempts: Option<i32>,
    /// Retry for ever; `max_attempts` is ignored.
    pub unlimited_attempts: bool,
    /// A JSON object.
    pub headers: Option<Json>,
    /// None: retry at once.
    pub retry_strategy: Option<RetryStrategy>,
    /// Cancel when unclaimed for this long, whole seconds.
    pub max_delay: Option<Duration>,
    /// Cancel when not ended this long after the first claim, whole seconds.
    pub max_duration: Option<Duration>,
    /// While a task with this key exists in the queue, no second one is made.
    pub idempotency_key: Option<String>,
    /// Id of the task, a `UUIDv7`; None: the client chooses, so that a retried call makes one task.
    pub task_id: Option<Uuid>,
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
        let cancellation =
            (options.max_delay.is_some() || options.max_duration.is_some()).then(|| pb::CancellationPolicy {
                max_delay: options.max_delay.map(duration),
                max_duration: options.max_duration.map(duration),
            });
        Self {
            wire: pb::NewTask {
                task_name: name.to_owned(),
                params: Some(params.into_wire()),
                headers: options.headers.map(Json::into_wire),
                max_attempts: (!options.unlimited_attempts).then(|| options.max_attempts.unwrap_or(1)),
                retry_strategy: options.retry_strategy.map(strategy),
                cancellation,
                idempotency_key: options.idempotency_key,
                task_id: Some(options.task_id.unwrap_or_else(Uuid::now_v7).to_string()),
            },
        }
    }
}

fn strategy(strategy: RetryStrategy) -> pb::RetryStrategy {
    let mut wire = pb::RetryStrategy::default();
    match strategy {
        RetryStrategy::Immediate => wire.set_kind(pb::RetryKind::None),
        RetryStrategy::Fixed(base) => {
            wire.set_kind(pb::RetryKind::Fixed);
            wire.base = Some(duration(base));
        }
        RetryStrategy::Exponential { base, factor, max } => {
            wire.set_kind(pb::RetryKind::Exponential);
            wire.base = Some(duration(base));
            wire.factor = Some(factor);
            wire.max = max.map(duration);
        }
    }
    wire
}

/// Ids of a spawned task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spawned {
    /// The task.
    pub task_id: Uuid,
    /// Its newest run.
    pub run_id: Uuid,
    /// Attempt number of that run.
    pub attempt: i32,
    /// False when an idempotency key found a task that existed before.
    pub created: bool,
}

impl Spawned {
    pub(crate) fn from_wire(task: Option<pb::SpawnedTask>) -> Result<Self, Error> {
        let task = task.unwrap_or_default();
        Ok(Self {
            task_id: id(&task.task_id)?,
            run_id: id(&task.run_id)?,
            attempt: task.attempt,
            created: task.created,
        })
    }
}

/// Where a task stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskResult {
    /// The task.
    pub task_id: Uuid,
    /// Its state.
    pub state: State,
    /// Only when completed.
    pub result: Option<Json>,
    /// Only when failed: that of the last attempt.
    pub failure: Option<Json>,
}

impl TaskResult {
    pub(crate) fn from_wire(result: Option<pb::TaskResult>) -> Result<Self, Error> {
        let result = result.unwrap_or_default();
        Ok(Self {
            task_id: id(&result.task_id)?,
            state: State::from_wire(result.state).ok_or_else(unclear)?,
            result: Json::from_wire(result.result),
            failure: Json::from_wire(result.failure_reason),
        })
    }
}

/// What follows a failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailOutcome {
    /// State of the task now.
    pub task_state: Option<State>,
    /// Run and number of the next attempt, when there is one.
    pub next: Option<(Uuid, i32)>,
}

impl FailOutcome {
    pub(crate) fn from_wire(outcome: Option<pb::FailOutcome>) -> Result<Self, Error> {
        let outcome = outcome.unwrap_or_default();
        let next = match (outcome.next_run_id, outcome.next_attempt) {
            (Some(run), Some(attempt)) => Some((id(&run)?, attempt)),
            _ => None,
        };
        Ok(Self { task_state: State::from_wire(outcome.task_state), next })
    }
}

pub(crate) fn id(text: &str) -> Result<Uuid, Error> {
    Uuid::try_parse(text).map_err(|_| unclear())
}

pub(crate) fn unclear() -> Error {
    Error::new(crate::Reason::Other, tonic::Code::Internal, "the server's answer lacks a field that it must have")
}

pub(crate) fn duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    }
}

pub(crate) fn span(duration: Option<&prost_types::Duration>) -> Option<Duration> {
    let duration = duration?;
    Some(Duration::new(u64::try_from(duration.seconds).ok()?, u32::try_from(duration.nanos).ok()?))
}

pub(crate) fn system_time(at: prost_types::Timestamp) -> Option<std::time::SystemTime> {
    at.try_into().ok()
}

/// How a wait for an event stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Awaited {
    /// The event was emitted: its payload.
    Payload(Json),
    /// The run sleeps and the claim is over.
    Suspended {
        /// When it wakes by itself; None: only the event wakes it.
        wake_at: Option<std::time::SystemTime>,
    },
    /// The time was over before the event came; every later call of this step says the same.
    TimedOut,
}

impl Awaited {
    pub(crate) fn from_wire(response: pb::AwaitEventResponse) -> Result<Self, Error> {
        use pb::await_event_response::Outcome;
        match response.outcome {
            Some(Outcome::Payload(json)) => Json::from_wire(Some(json)).map(Self::Payload).ok_or_else(unclear),
            Some(Outcome::Suspended(suspended)) => {
                Ok(Self::Suspended { wake_at: suspended.wake_at.and_then(system_time) })
            }
            Some(Outcome::TimedOut(_)) => Ok(Self::TimedOut),
            None => Err(unclear()),
        }
    }
}

/// The stored result of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Name of the step.
    pub checkpoint_name: String,
    /// Value; None is SQL NULL.
    pub state: Option<Json>,
    /// `committed`, or whatever a client of the database has written.
    pub status: String,
    /// Run that wrote it.
    pub owner_run_id: Option<Uuid>,
    /// When.
    pub updated_at: Option<std::time::SystemTime>,
}

impl Checkpoint {
    pub(crate) fn from_wire(wire: pb::StoredCheckpoint) -> Result<Self, Error> {
        Ok(Self {
            checkpoint_name: wire.checkpoint_name,
            state: Json::from_wire(wire.state),
            status: wire.status,
            owner_run_id: wire.owner_run_id.as_deref().map(id).transpose()?,
            updated_at: wire.updated_at.and_then(system_time),
        })
    }
}
