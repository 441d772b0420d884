//! Faults: failed statements, classified by the reaction that they allow. `sqlstate` gives each code its meaning; only
//! special cases are decided here.

use std::time::Duration;

use deadpool_postgres::PoolError;
use tokio_postgres::error::{DbError, Severity, SqlState};

use super::sqlstate::{Meaning, meaning};
use crate::domain::Error;
use crate::scope::Scope;

/// A failed statement, classified by the reaction that it allows. `Debug` prints the kind and the text, for log lines.
#[derive(Clone, PartialEq, Eq)]
pub enum Fault {
    /// The queue does not exist.
    Missing,
    /// A table does not exist. [`super::Store`] then finds out whether the queue exists.
    NoTable(String),
    /// Schema `absurd` or `absurd_server` is gone, or lacks a table that every database of this server has.
    Schema(String),
    /// Postgres cannot store a value of the statement.
    Data(String),
    /// A trigger, a constraint or a policy of the database's owner refused a row.
    Refused(String),
    /// The server's role lacks a right.
    Rights(String),
    /// A table of the queue does not match the server's expectations: a column, an index or a table was renamed or
    /// dropped.
    Damaged(String),
    /// A stored row or page cannot be read.
    Unreadable(String),
    /// Postgres' own installation is broken: a library, a file, a setting.
    Broken(String),
    /// A lock was not granted in time.
    Locked,
    /// A serialization failure or a deadlock. Run the statement again.
    Conflict,
    /// No connection, or it was lost before the statement took effect. Nothing was done.
    Gone(String),
    /// The connection was lost while the statement ran. It may have been carried out.
    Unknown(String),
    /// No connection was free in time, or none would have been.
    Busy {
        /// Suggested delay before the next attempt.
        after: Duration,
    },
    /// Postgres accepts no further connection.
    Crowded(String),
    /// Postgres lacks memory or another resource at the moment.
    Exhausted(String),
    /// The statement exceeded its time limit.
    Timeout,
    /// A unique key of the storage contract exists already.
    Duplicate,
    /// A function of the storage contract raised an error.
    Raised {
        /// SQLSTATE of the error.
        code: String,
        /// Primary message of the error.
        message: String,
    },
    /// A cached plan changed its result type, or a pooler lost a prepared statement. Prepare it again.
    StalePlan,
    /// The database takes no writes: it is a standby, or set to read only.
    ReadOnly,
    /// The database's disk is full.
    Full,
    /// The database assigns no more transaction ids until it is vacuumed.
    NoIds,
    /// Anything else: a bug of the server.
    Bug(String),
}

impl Fault {
    pub(crate) fn from_pool(error: PoolError) -> Self {
        match error {
            PoolError::Timeout(deadpool_postgres::TimeoutType::Wait) => {
                Self::Busy { after: Duration::from_millis(500) }
            }
            PoolError::Backend(error) => match Self::from_postgres(&error) {
                Self::Bug(text) | Self::Unknown(text) => Self::Gone(text),
                fault => fault,
            },
            other => Self::Gone(other.to_string()),
        }
    }

    pub(crate) fn from_postgres(error: &tokio_postgres::Error) -> Self {
        let Some(database) = error.as_db_error() else {
            // Without a SQLSTATE, either the connection failed, or a value could not be encoded or decoded. The latter
            // is a bug.
            let text = describe(error);
            return if error.is_closed() || text.contains("communicating") || text.contains("connect") {
                Self::Unknown(text)
            } else {
                Self::Bug(text)
            };
        };
        Self::from_database(database)
    }

    fn from_database(database: &DbError) -> Self {
        let code = database.code().code();
        let text = told(database);
        let meaning = match (meaning(code), database.routine()) {
            // Class 54 blames a value of the caller, except when Postgres is out of transaction ids.
            (_, Some("GetNewTransactionId" | "GetNewMultiXactId")) => return Self::NoIds,
            // Class 0A normally blames the database's owner. These two routines report a stale plan and a value that
            // the encoding lacks.
            (_, Some("RevalidateCachedQuery")) if code == "0A000" => Meaning::Prepared,
            (_, Some("pg_unicode_to_server")) => Meaning::Value,
            // Row security refuses a row with the code of a missing right.
            (Meaning::Rights, Some("ExecWithCheckOptions")) => Meaning::Refused,
            // RAISE in a trigger can use any code. Only codes that ask for a retry keep their meaning.
            (Meaning::Conflict, Some("exec_stmt_raise")) => Meaning::Conflict,
            (Meaning::Lock, Some("exec_stmt_raise")) => Meaning::Lock,
            (_, Some("exec_stmt_raise")) if !is_ours(database) => Meaning::Refused,
            // The outcome is in doubt only if our session ends. Without that, class 08 comes from a foreign server that
            // is unreachable.
            (Meaning::Connection | Meaning::Session, _) if !is_fatal(database) && code.starts_with("08") => {
                Meaning::Resources
            }
            (meaning, _) => meaning,
        };
        match meaning {
            Meaning::Value => Self::Data(text),
            Meaning::Refused => Self::Refused(text),
            Meaning::Key if is_key_of_ours(database) => Self::Duplicate,
            Meaning::Key => Self::Refused(text),
            Meaning::Contract => Self::Raised { code: code.into(), message: database.message().into() },
            Meaning::Rights => Self::Rights(text),
            Meaning::Table => Self::NoTable(text),
            Meaning::Structure => Self::Damaged(text),
            Meaning::Storage => Self::Unreadable(text),
            Meaning::Installation => Self::Broken(text),
            Meaning::Lock => Self::Locked,
            Meaning::Conflict => Self::Conflict,
            Meaning::Cancelled => Self::Timeout,
            Meaning::Resources => Self::Exhausted(text),
            Meaning::Connections => Self::Crowded(text),
            Meaning::Disk => Self::Full,
            Meaning::ReadOnly => Self::ReadOnly,
            Meaning::Session => Self::Gone(text),
            Meaning::Connection => Self::Unknown(text),
            Meaning::Prepared => Self::StalePlan,
            Meaning::Bug => Self::Bug(text),
        }
    }

    /// Label of the kind in metrics and logs.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Missing | Self::NoTable(_) => "missing",
            Self::Schema(_) => "schema",
            Self::Data(_) => "data",
            Self::Refused(_) => "refused",
            Self::Rights(_) => "rights",
            Self::Damaged(_) => "damaged",
            Self::Unreadable(_) => "unreadable",
            Self::Broken(_) => "broken",
            Self::Locked => "locked",
            Self::Conflict => "conflict",
            Self::Gone(_) => "gone",
            Self::Unknown(_) => "unknown",
            Self::Busy { .. } => "busy",
            Self::Crowded(_) => "crowded",
            Self::Exhausted(_) => "exhausted",
            Self::Timeout => "timeout",
            Self::Duplicate => "duplicate",
            Self::Raised { .. } => "raised",
            Self::StalePlan => "stale_plan",
            Self::ReadOnly => "read_only",
            Self::Full => "disk_full",
            Self::NoIds => "no_transaction_ids",
            Self::Bug(_) => "bug",
        }
    }

    /// Whether the same statement may succeed soon.
    pub fn is_passing(&self) -> bool {
        matches!(
            self,
            Self::Locked
                | Self::Conflict
                | Self::Gone(_)
                | Self::Unknown(_)
                | Self::Busy { .. }
                | Self::Crowded(_)
                | Self::Exhausted(_)
                | Self::Timeout
                | Self::ReadOnly
                | Self::Full
                | Self::NoIds
                | Self::StalePlan
        )
    }

    /// Whether the statement asked too much of Postgres. A smaller part of the work may succeed at once.
    pub fn is_too_much(&self) -> bool {
        matches!(self, Self::Timeout | Self::Exhausted(_))
    }

    /// Whether Postgres refused a stored row, or the change of it. Without that row the same statement may succeed.
    pub fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::Data(_)
                | Self::Refused(_)
                | Self::Unreadable(_)
                | Self::Duplicate
                | Self::Raised { .. }
                | Self::Bug(_)
        )
    }

    /// Whether the same statement fails until an operator repairs the queue or the database: a right, a table, a
    /// library.
    pub fn is_lasting(&self) -> bool {
        matches!(self, Self::Schema(_) | Self::Rights(_) | Self::Damaged(_) | Self::Unreadable(_) | Self::Broken(_))
    }

    /// The message of Postgres, or a description of the fault, for an operator.
    pub fn problem(&self) -> String {
        match self {
            Self::Data(text)
            | Self::NoTable(text)
            | Self::Schema(text)
            | Self::Refused(text)
            | Self::Rights(text)
            | Self::Damaged(text)
            | Self::Unreadable(text)
            | Self::Broken(text)
            | Self::Crowded(text)
            | Self::Exhausted(text)
            | Self::Bug(text)
            | Self::Gone(text)
            | Self::Unknown(text) => text.clone(),
            Self::Raised { code, message } => format!("{message} ({code})"),
            Self::Missing => "the queue does not exist".into(),
            Self::Locked => "another session holds a lock on it".into(),
            Self::Conflict => "conflict with another transaction".into(),
            Self::Busy { .. } => "no connection to Postgres was free in time".into(),
            Self::Timeout => "the statement ran into its time limit".into(),
            Self::Duplicate => "a key was taken at the same time".into(),
            Self::StalePlan => "a statement had to be prepared again".into(),
            Self::ReadOnly => "the database takes no writes: it is a standby or set to read only".into(),
            Self::Full => "the database has no room: its disk is full".into(),
            Self::NoIds => "the database gives out no transaction ids: it must be vacuumed first".into(),
        }
    }

    /// Whether to discard the connection: it is broken, or leads to a server that cannot serve.
    pub(super) fn is_of_connection(&self) -> bool {
        matches!(self, Self::Gone(_) | Self::Unknown(_) | Self::ReadOnly | Self::Exhausted(_))
    }

    /// Converts to the domain's error, for a statement on this queue.
    pub fn into_error(self, scope: &Scope) -> Error {
        let queue = || scope.queue().as_str().to_owned();
        match self {
            Self::Missing | Self::NoTable(_) => Error::QueueNotFound(queue()),
            Self::Damaged(problem) | Self::Unreadable(problem) => Error::QueueDamaged { queue: queue(), problem },
            Self::Rights(problem) => Error::DatabasePermission { queue: Some(queue()), problem },
            Self::Locked => Error::QueueLocked { queue: queue() },
            other => other.into_database_error(),
        }
    }

    /// Converts to the domain's error, for a statement on no particular queue.
    pub fn into_database_error(self) -> Error {
        let text = self.problem();
        match self {
            Self::Missing => Error::SchemaMissing("a table of schema absurd or absurd_server does not exist".into()),
            Self::NoTable(problem) | Self::Damaged(problem) | Self::Schema(problem) => Error::SchemaMissing(problem),
            Self::Data(problem) => Error::Json { field: "request".into(), problem },
            Self::Refused(_) | Self::Raised { .. } => Error::DatabaseRefused(text),
            Self::Rights(problem) => Error::DatabasePermission { queue: None, problem },
            Self::Unreadable(_) | Self::Broken(_) => Error::DatabaseBroken(text),
            Self::Gone(_) => Error::DatabaseUnreachable(text),
            Self::Locked | Self::Conflict | Self::Exhausted(_) | Self::Timeout | Self::Duplicate | Self::StalePlan => {
                Error::DatabaseBusy(text)
            }
            Self::Unknown(_) => Error::OutcomeUnknown,
            Self::Busy { after } => Error::TooManyRequests { after },
            Self::Crowded(_) => Error::TooManyRequests { after: Duration::from_millis(500) },
            Self::ReadOnly => Error::NotWritable("takes no writes: it is a standby or set to read only"),
            Self::Full => Error::NotWritable("has no room: its disk is full"),
            Self::NoIds => Error::NotWritable("gives out no transaction ids: it must be vacuumed first"),
            Self::Bug(_) => Error::Internal(text),
        }
    }

    /// Converts to the domain's error, for a read. A lost connection leaves no outcome in doubt.
    pub fn into_read_error(self, scope: &Scope) -> Error {
        match self {
            Self::Unknown(text) => Error::DatabaseUnreachable(text),
            other => other.into_error(scope),
        }
    }

    /// Like [`Fault::into_read_error`], for a read on no particular queue.
    pub fn into_database_read_error(self) -> Error {
        match self {
            Self::Unknown(text) => Error::DatabaseUnreachable(text),
            other => other.into_database_error(),
        }
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.problem())
    }
}

impl std::fmt::Debug for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.kind(), self.problem())
    }
}

impl std::error::Error for Fault {}

/// Message, detail and hint of an error, and its code in parentheses. The detail of a row that a constraint refused is left
/// out: it is the whole row, which no log may hold.
fn told(database: &DbError) -> String {
    let holds_the_row = [&SqlState::NOT_NULL_VIOLATION, &SqlState::CHECK_VIOLATION].contains(&database.code());
    let mut text = database.message().to_owned();
    for more in [database.detail().filter(|_| !holds_the_row), database.hint()].into_iter().flatten() {
        text = format!("{text}; {more}");
    }
    format!("{text} ({})", database.code().code())
}

fn is_fatal(database: &DbError) -> bool {
    matches!(database.parsed_severity(), Some(Severity::Fatal | Severity::Panic))
}

/// Whether a function of the storage contract or of the side schema raised the error. The first line of the context
/// names the innermost function.
fn is_ours(database: &DbError) -> bool {
    let innermost = database.where_().and_then(|context| context.lines().next()).unwrap_or_default();
    innermost.split_whitespace().any(is_function_of_ours)
}

/// Whether a word of an error's context names a function of ours. Postgres omits the schema if it is in the search
/// path, as for a role named `absurd`. Trigger functions have no arguments; our raising functions do.
fn is_function_of_ours(word: &str) -> bool {
    let Some((name, arguments)) = word.split_once('(') else { return false };
    match name.split_once('.') {
        Some((schema, _)) => matches!(schema, "absurd" | "absurd_server"),
        None => RAISING.contains(&name) && arguments != ")",
    }
}

/// Functions of the storage contract and of the side schema that are recognized without their schema.
const RAISING: &[&str] = &[
    "await_event",
    "await_task",
    "cancel_task",
    "claim_task",
    "cleanup_events",
    "cleanup_tasks",
    "complete_run",
    "create_queue",
    "emit_event",
    "ensure_partitions",
    "ensure_queue_tables",
    "extend_claim",
    "fail_run",
    "retry_delay_seconds",
    "retry_task",
    "schedule_run",
    "set_queue_policy",
    "set_task_checkpoint_state",
    "sleep_run",
    "spawn_task",
    "validate_queue_name",
];

/// Whether a unique key belongs to the storage contract. The database's owner may have added other keys to the tables.
fn is_key_of_ours(database: &DbError) -> bool {
    let schema = database.schema().is_some_and(|schema| schema == "absurd" || schema == "absurd_server");
    schema
        && database.constraint().is_some_and(|name| name.ends_with("_pkey") || name.ends_with("_idempotency_key_key"))
}

/// Text of a driver error with its whole chain of causes, for an operator.
pub(crate) fn explain(error: &tokio_postgres::Error) -> String {
    error.as_db_error().map_or_else(|| describe(error), told)
}

fn describe(error: &tokio_postgres::Error) -> String {
    use std::error::Error as _;
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
