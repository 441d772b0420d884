//! The one error of the service. A variant exists only where a caller does something different because of it.

use uuid::Uuid;

/// What went wrong, with a stable reason (see `absurd_service.proto` for the list).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A field of the request is wrong.
    #[error("{field}: {problem}")]
    Invalid {
        /// Path of the field, as in the proto file.
        field: String,
        /// What to change.
        problem: String,
    },
    /// A JSON field holds what jsonb refuses.
    #[error("{field}: {problem}")]
    Json {
        /// Path of the field.
        field: String,
        /// What is wrong with the text.
        problem: String,
    },
    /// A JSON field is over its limit.
    #[error("{field}: {size} bytes, at most {limit} are allowed")]
    TooLarge {
        /// Path of the field.
        field: String,
        /// Bytes sent.
        size: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// The claim token is not one of ours.
    #[error("claim_token is not a token of this service")]
    TokenInvalid,
    /// The server insists on claim tokens.
    #[error("claim_token is required by this server")]
    TokenRequired,
    /// No such queue.
    #[error("queue {0:?} does not exist; create it first")]
    QueueNotFound(String),
    /// The queue exists with another storage mode.
    #[error("queue {0:?} exists with another storage mode")]
    QueueExists(String),
    /// No such task in the queue.
    #[error("task {0} does not exist in this queue")]
    TaskNotFound(Uuid),
    /// No such run in the queue.
    #[error("run {0} does not exist in this queue")]
    RunNotFound(Uuid),
    /// The chosen task id belongs to another task.
    #[error("task_id {0} belongs to a task with another name or other params")]
    TaskIdConflict(Uuid),
    /// Another claim owns the run.
    #[error("the claim on run {0} is lost: another claim owns the run, or it was given back")]
    ClaimLost(Uuid),
    /// The lease ran out and the attempt was failed.
    #[error("the attempt of run {0} is over: its lease ran out or it was failed")]
    ClaimExpired(Uuid),
    /// The task was cancelled.
    #[error("the task of run {0} was cancelled")]
    TaskCancelled(Uuid),
    /// The run's state does not allow the call.
    #[error("run {run} is {state}")]
    RunNotRunning {
        /// The run.
        run: Uuid,
        /// Its state.
        state: String,
    },
    /// Only failed tasks can be retried.
    #[error("task {task} is {state}; only failed tasks can be retried")]
    TaskNotFailed {
        /// The task.
        task: Uuid,
        /// Its state.
        state: String,
    },
    /// `max_attempts` does not allow another attempt.
    #[error("max_attempts {allowed} must be greater than the {made} attempts made")]
    MaxAttemptsTooLow {
        /// Asked for.
        allowed: i32,
        /// Made so far.
        made: i32,
    },
    /// An earlier item of the same run failed.
    #[error("an earlier item of the same run failed")]
    ItemSkipped,
    /// As many streams are open as may be.
    #[error("{whose} its {limit} streams; try another replica, or raise {flag}")]
    StreamLimit {
        /// Who has them, with the verb.
        whose: &'static str,
        /// How many.
        limit: usize,
        /// What allows more.
        flag: &'static str,
    },
    /// More is asked for than can be done in time.
    #[error("the server is busy; try again in {} ms", after.as_millis())]
    TooManyRequests {
        /// When it may go better.
        after: std::time::Duration,
    },
    /// As many tasks of the queue wait as may.
    #[error(
        "queue {queue:?} has its {limit} waiting tasks; try again when workers have caught up, or raise --max-backlog"
    )]
    BacklogFull {
        /// The queue.
        queue: String,
        /// How many.
        limit: i64,
    },
    /// Postgres cannot be reached.
    #[error("the database is not available: {0}")]
    DatabaseUnreachable(String),
    /// Postgres answers, and did not get the statement done in time; the same one may succeed soon.
    #[error("the database is busy: {0}; try again")]
    DatabaseBusy(String),
    /// Postgres answers, and cannot write.
    #[error("the database {0}; try again later")]
    NotWritable(&'static str),
    /// Another session holds a lock on the queue's tables, or on the rows that the call needs.
    #[error("queue {queue:?} is locked by another session (VACUUM FULL, ALTER TABLE, an open transaction); try again")]
    QueueLocked {
        /// The queue.
        queue: String,
    },
    /// A trigger, a constraint or a policy on the queue's tables refuses a row; the text is the database's.
    #[error("the database refuses it: {0}")]
    DatabaseRefused(String),
    /// The server's role lacks a right.
    #[error("the server's role may not do this{}: {problem}; grant it the right (see `absurd doctor`)", of_queue(queue.as_deref()))]
    DatabasePermission {
        /// The queue, where one is meant.
        queue: Option<String>,
        /// What Postgres said; it names the table.
        problem: String,
    },
    /// The tables of a queue are not as the server knows them, or cannot be read.
    #[error("queue {queue:?} is damaged: {problem}; an operator has to mend its tables (see `absurd doctor`)")]
    QueueDamaged {
        /// The queue.
        queue: String,
        /// What Postgres said.
        problem: String,
    },
    /// The schemas that the server works on are gone, or are not those of this server.
    #[error("the schema of this server is missing or incomplete: {0}; run `absurd migrate`")]
    SchemaMissing(String),
    /// Postgres' own installation is broken.
    #[error("the database is broken: {0}; an operator has to mend it (see `absurd doctor`)")]
    DatabaseBroken(String),
    /// A migration cannot be carried out; the text says why and what to do.
    #[error("{0}")]
    Setup(String),
    /// This replica is stopping.
    #[error("this replica is shutting down")]
    ShuttingDown,
    /// The call's deadline has passed.
    #[error("the deadline has passed")]
    DeadlineExceeded,
    /// A commit's outcome cannot be told.
    #[error("the connection was lost during the commit; whether it happened cannot be told")]
    OutcomeUnknown,
    /// A bug. The text is for the log only.
    #[error("internal error")]
    Internal(String),
}

fn of_queue(queue: Option<&str>) -> String {
    queue.map_or_else(String::new, |queue| format!(" on queue {queue:?}"))
}

impl Error {
    /// A wrong field.
    pub fn invalid(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), problem: problem.into() }
    }

    /// The stable name of this error on the wire.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Invalid { .. } => "INVALID_ARGUMENT",
            Self::Json { .. } => "JSON_INVALID",
            Self::TooLarge { .. } => "PAYLOAD_TOO_LARGE",
            Self::TokenInvalid => "CLAIM_TOKEN_INVALID",
            Self::TokenRequired => "CLAIM_TOKEN_REQUIRED",
            Self::QueueNotFound(_) => "QUEUE_NOT_FOUND",
            Self::QueueExists(_) => "QUEUE_EXISTS",
            Self::TaskNotFound(_) => "TASK_NOT_FOUND",
            Self::RunNotFound(_) => "RUN_NOT_FOUND",
            Self::TaskIdConflict(_) => "TASK_ID_CONFLICT",
            Self::ClaimLost(_) => "CLAIM_LOST",
            Self::ClaimExpired(_) => "CLAIM_EXPIRED",
            Self::TaskCancelled(_) => "TASK_CANCELLED",
            Self::RunNotRunning { .. } => "RUN_NOT_RUNNING",
            Self::TaskNotFailed { .. } => "TASK_NOT_FAILED",
            Self::MaxAttemptsTooLow { .. } => "MAX_ATTEMPTS_TOO_LOW",
            Self::ItemSkipped => "ITEM_SKIPPED",
            Self::StreamLimit { .. } => "STREAM_LIMIT",
            Self::TooManyRequests { .. } => "TOO_MANY_REQUESTS",
            Self::BacklogFull { .. } => "BACKLOG_FULL",
            Self::DatabaseUnreachable(_) | Self::NotWritable(_) => "UNAVAILABLE",
            Self::DatabaseBusy(_) => "DATABASE_BUSY",
            Self::QueueLocked { .. } => "QUEUE_LOCKED",
            Self::DatabaseRefused(_) => "DATABASE_REFUSED",
            Self::DatabasePermission { .. } => "DATABASE_PERMISSION",
            Self::QueueDamaged { .. } => "QUEUE_DAMAGED",
            Self::SchemaMissing(_) => "SCHEMA_MISSING",
            Self::DatabaseBroken(_) | Self::Setup(_) => "DATABASE_BROKEN",
            Self::ShuttingDown => "SHUTTING_DOWN",
            Self::DeadlineExceeded => "DEADLINE_EXCEEDED",
            Self::OutcomeUnknown => "OUTCOME_UNKNOWN",
            Self::Internal(_) => "INTERNAL",
        }
    }

    /// Whether the caller's claim is over.
    pub fn is_claim_over(&self) -> bool {
        matches!(self, Self::ClaimLost(_) | Self::ClaimExpired(_) | Self::TaskCancelled(_) | Self::RunNotRunning { .. })
    }

    /// Path of the wrong field, where one is wrong.
    pub fn field(&self) -> Option<&str> {
        match self {
            Self::Invalid { field, .. } | Self::Json { field, .. } | Self::TooLarge { field, .. } => Some(field),
            Self::TokenInvalid | Self::TokenRequired => Some("claim_token"),
            _ => None,
        }
    }

    /// The same error about a field of an enclosing message: `params` becomes `tasks[3].params`.
    #[must_use]
    pub fn within(self, prefix: &str) -> Self {
        let join = |field: String| format!("{prefix}.{field}");
        match self {
            Self::Invalid { field, problem } => Self::Invalid { field: join(field), problem },
            Self::Json { field, problem } => Self::Json { field: join(field), problem },
            Self::TooLarge { field, size, limit } => Self::TooLarge { field: join(field), size, limit },
            other => other,
        }
    }
}
