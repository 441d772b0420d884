//! What a statement can fail with. The only file that knows a SQLSTATE.

use std::time::Duration;

use deadpool_postgres::PoolError;

use crate::domain::Error;
use crate::scope::Scope;

/// A failed statement, by what can be done about it.
#[derive(Debug, Clone)]
pub enum Fault {
    /// A table does not exist: the queue does not.
    Missing,
    /// Postgres refused a value.
    Data(String),
    /// A lock was not to be had in time.
    Locked,
    /// A serialization failure or a deadlock: run it again.
    Conflict,
    /// No connection, or it was lost before the statement was sent.
    Gone(String),
    /// The connection was lost while the statement ran: it may have been carried out.
    Unknown(String),
    /// No connection was free in time, or would have been.
    Busy {
        /// When to come again.
        after: Duration,
    },
    /// The statement ran into its time limit.
    Timeout,
    /// A unique key exists.
    Duplicate,
    /// An error raised by a function of the contract.
    Raised {
        /// SQLSTATE.
        code: String,
        /// Text, for the log.
        message: String,
    },
    /// A cached plan whose result type changed, or a prepared statement that a pooler lost: prepare it again.
    StalePlan,
    /// The database takes no writes: a standby, or set to read only.
    ReadOnly,
    /// The database's disk is full.
    Full,
    /// The database gives out no more transaction ids until it has been vacuumed.
    NoIds,
    /// Anything else; a bug.
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
            // A value that could not be encoded never left this process; everything else is the connection.
            let text = describe(error);
            return if error.is_closed() || text.contains("communicating") || text.contains("connect") {
                Self::Unknown(text)
            } else {
                Self::Bug(text)
            };
        };
        let text = format!("{} {}", database.code().code(), database.message());
        // Too much of something is the caller's, with one exception.
        if database.routine().is_some_and(|routine| matches!(routine, "GetNewTransactionId" | "GetNewMultiXactId")) {
            return Self::NoIds;
        }
        match database.code().code() {
            "42P01" | "3F000" => Self::Missing,
            "22P02" | "22P05" | "22003" | "22021" | "22007" | "22008" | "22004" | "23502" | "23514" | "54000"
            | "54001" | "2201W" => Self::Data(text),
            "23505" => Self::Duplicate,
            "55P03" => Self::Locked,
            "40001" | "40P01" => Self::Conflict,
            "57014" => Self::Timeout,
            "0A000" | "26000" => Self::StalePlan,
            "25006" => Self::ReadOnly,
            "53100" => Self::Full,
            // 25P03, 25P04: the transaction was open for too long, and was rolled back.
            "25P03" | "25P04" | "53300" | "53400" | "53200" | "57P01" | "57P02" | "57P03" | "57P05" => Self::Gone(text),
            code if code.starts_with("08") => Self::Unknown(text),
            code @ ("P0001" | "AB001" | "AB002" | "AB003") => {
                Self::Raised { code: code.into(), message: database.message().into() }
            }
            _ => Self::Bug(text),
        }
    }

    /// For metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Data(_) => "data",
            Self::Locked => "locked",
            Self::Conflict => "conflict",
            Self::Gone(_) => "gone",
            Self::Unknown(_) => "unknown",
            Self::Busy { .. } => "busy",
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
            Self::Conflict
                | Self::Gone(_)
                | Self::Unknown(_)
                | Self::Busy { .. }
                | Self::ReadOnly
                | Self::Full
                | Self::NoIds
                | Self::StalePlan
        )
    }

    /// Whether Postgres refused what some row holds, or what becomes of it: without that row the same statement may succeed.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Data(_) | Self::Raised { .. } | Self::Bug(_))
    }

    /// What Postgres said, for an operator.
    pub fn problem(&self) -> String {
        match self {
            Self::Data(text) | Self::Bug(text) | Self::Gone(text) | Self::Unknown(text) => text.clone(),
            Self::Raised { code, message } => format!("{code} {message}"),
            other => other.kind().to_owned(),
        }
    }

    /// Whether the connection is of no more use, or leads to a server that is of none.
    pub(super) fn is_of_connection(&self) -> bool {
        matches!(self, Self::Gone(_) | Self::Unknown(_) | Self::ReadOnly)
    }

    /// The domain's error.
    pub fn into_error(self, scope: &Scope) -> Error {
        match self {
            Self::Missing => Error::QueueNotFound(scope.queue().as_str().to_owned()),
            Self::Data(problem) => Error::Json { field: "request".into(), problem },
            Self::Locked => Error::QueueLocked { queue: scope.queue().as_str().to_owned() },
            Self::Timeout => Error::DatabaseBusy("the statement ran into its time limit".into()),
            Self::Conflict => Error::DatabaseBusy("conflict with another transaction".into()),
            Self::Gone(text) => Error::DatabaseUnreachable(text),
            Self::ReadOnly => Error::NotWritable("takes no writes: it is a standby or set to read only"),
            Self::Full => Error::NotWritable("has no room: its disk is full"),
            Self::NoIds => Error::NotWritable("gives out no transaction ids: it must be vacuumed first"),
            Self::StalePlan => Error::DatabaseBusy("a statement had to be prepared again".into()),
            Self::Unknown(_) => Error::OutcomeUnknown,
            Self::Busy { after } => Error::TooManyRequests { after },
            Self::Duplicate => Error::DatabaseBusy("a key was taken at the same time".into()),
            Self::Raised { code, message } => Error::Internal(format!("{code} {message}")),
            Self::Bug(text) => Error::Internal(text),
        }
    }

    /// The domain's error of a read, which a lost connection cannot leave in doubt.
    pub fn into_read_error(self, scope: &Scope) -> Error {
        match self {
            Self::Unknown(text) => Error::DatabaseUnreachable(text),
            other => other.into_error(scope),
        }
    }
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
