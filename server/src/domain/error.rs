//! The error type of the service. Each variant makes a caller react differently.

use uuid::Uuid;

/// An error with a stable reason; `absurd_service.proto` lists the reasons.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A field of the request is invalid.
    #[error("{field}: {problem}")]
    Invalid {
        /// Path of the field, as in the proto file.
        field: String,
        /// How to correct it.
        problem: String,
    },
    /// A JSON field holds text that jsonb does not accept.
    #[error("{field}: {problem}")]
    Json {
        /// Path of the field, as in the proto file.
        field: String,
        /// Error in the text.
        problem: String,
    },
    /// A JSON field exceeds its size limit.
    #[error("{field}: {size} bytes, at most {limit} are allowed")]
    TooLarge {
        /// Path of the field, as in the proto file.
        field: String,
        /// Size in bytes; numbers count with all digits that jsonb stores.
        size: usize,
        /// Largest size allowed, in bytes.
        limit: usize,
    },
    /// The claim token was not made by this service.
    #[error("claim_token is not a token of this service")]
    TokenInvalid,
    /// The server requires claim tokens (`--require-claim-token`).
    #[error("claim_token is required by this server")]
    TokenRequired,
    /// The queue does not exist. Holds its name.
    #[error("queue {0:?} does not exist; create it first")]
    QueueNotFound(String),
    /// The queue exists with another storage mode.
    #[error("queue {0:?} exists with another storage mode")]
    QueueExists(String),
    /// The queue has no task of this id.
    #[error("task {0} does not exist in this queue")]
    TaskNotFound(Uuid),
    /// The queue has no run of this id.
    #[error("run {0} does not exist in this queue")]
    RunNotFound(Uuid),
    /// The chosen task id belongs to a task with another name or other params.
    #[error("task_id {0} belongs to a task with another name or other params")]
    TaskIdConflict(Uuid),
    /// Another claim owns the run, or the claim was released. Holds the run.
    #[error("the claim on run {0} is lost: another claim owns the run, or it was given back")]
    ClaimLost(Uuid),
    /// The run failed with `$ClaimTimeout`, usually because its lease expired. Holds the run.
    #[error("the attempt of run {0} is over: its lease ran out or it was failed")]
    ClaimExpired(Uuid),
    /// The task was cancelled. Holds the run.
    #[error("the task of run {0} was cancelled")]
    TaskCancelled(Uuid),
    /// The run's state does not allow the call.
    #[error("run {run} is {state}")]
    RunNotRunning {
        /// Run of the call.
        run: Uuid,
        /// State of the run, as stored.
        state: String,
    },
    /// Only failed tasks can be retried.
    #[error("task {task} is {state}; only failed tasks can be retried")]
    TaskNotFailed {
        /// Task of the call.
        task: Uuid,
        /// State of the task, as stored.
        state: String,
    },
    /// `max_attempts` does not allow another attempt.
    #[error("max_attempts {allowed} must be greater than the {made} attempts made")]
    MaxAttemptsTooLow {
        /// Requested limit.
        allowed: i32,
        /// Number of attempts made so far.
        made: i32,
    },
    /// An earlier item of the same run failed.
    #[error("an earlier item of the same run failed")]
    ItemSkipped,
    /// The maximum number of streams is open.
    #[error("{whose} its {limit} streams; try another replica, or raise {flag}")]
    StreamLimit {
        /// Holder of the streams, with its verb, such as "this replica has".
        whose: &'static str,
        /// Number of streams allowed.
        limit: usize,
        /// Flag of the server that raises the limit.
        flag: &'static str,
    },
    /// The server has more work than it can do in time.
    #[error("the server is busy; try again in {} ms", after.as_millis())]
    TooManyRequests {
        /// Suggested delay before the next attempt.
        after: std::time::Duration,
    },
    /// The maximum number of tasks waits in the queue.
    #[error(
        "queue {queue:?} has its {limit} waiting tasks; try again when workers have caught up, or raise --max-backlog"
    )]
    BacklogFull {
        /// Name of the queue.
        queue: String,
        /// Number of waiting tasks allowed.
        limit: i64,
    },
    /// Postgres cannot be reached.
    #[error("the database is not available: {0}")]
    DatabaseUnreachable(String),
    /// Postgres answers, but could not complete the statement. The same statement may succeed soon.
    #[error("the database is busy: {0}; try again")]
    DatabaseBusy(String),
    /// Postgres answers, but takes no writes.
    #[error("the database {0}; try again later")]
    NotWritable(&'static str),
    /// Another session has locked the queue's tables, or rows that the call needs.
    #[error("queue {queue:?} is locked by another session (VACUUM FULL, ALTER TABLE, an open transaction); try again")]
    QueueLocked {
        /// Name of the queue.
        queue: String,
    },
    /// A rule of the database's owner refuses a row, or a function of the storage contract raised an error. The text is
    /// that of Postgres.
    #[error("the database refuses it: {0}")]
    DatabaseRefused(String),
    /// The server's role lacks a right.
    #[error("the server's role may not do this{}: {problem}; grant it the right (see `absurd doctor`)", of_queue(queue.as_deref()))]
    DatabasePermission {
        /// Name of the queue, if the statement was about one.
        queue: Option<String>,
        /// Message of Postgres, which names the table.
        problem: String,
    },
    /// The tables of a queue do not match the server's expectations, or cannot be read.
    #[error("queue {queue:?} is damaged: {problem}; an operator has to mend its tables (see `absurd doctor`)")]
    QueueDamaged {
        /// Name of the queue.
        queue: String,
        /// Message of Postgres.
        problem: String,
    },
    /// A schema of the server is missing, incomplete, or of another version.
    #[error("the schema of this server is missing or incomplete: {0}; run `absurd migrate`")]
    SchemaMissing(String),
    /// The installation of Postgres is broken, or stored data cannot be read.
    #[error("the database is broken: {0}; an operator has to mend it (see `absurd doctor`)")]
    DatabaseBroken(String),
    /// A migration or a check of the database failed. The text gives the cause and the remedy.
    #[error("{0}")]
    Setup(String),
    /// This replica is stopping.
    #[error("this replica is shutting down")]
    ShuttingDown,
    /// The deadline of the call has passed.
    #[error("the deadline has passed")]
    DeadlineExceeded,
    /// The connection was lost during a commit. Whether it took effect is unknown.
    #[error("the connection was lost during the commit; whether it happened cannot be told")]
    OutcomeUnknown,
    /// A bug of the server. The text is for the log only.
    #[error("internal error")]
    Internal(String),
}

fn of_queue(queue: Option<&str>) -> String {
    queue.map_or_else(String::new, |queue| format!(" on queue {queue:?}"))
}

impl Error {
    /// An error about the invalid field `field`.
    pub fn invalid(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), problem: problem.into() }
    }

    /// Stable reason on the wire, in `ErrorInfo`.
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

    /// Whether the caller's claim has ended.
    pub fn is_claim_over(&self) -> bool {
        matches!(self, Self::ClaimLost(_) | Self::ClaimExpired(_) | Self::TaskCancelled(_) | Self::RunNotRunning { .. })
    }

    /// Path of the invalid field, if the error is about one.
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
