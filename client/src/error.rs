//! The error of all calls. It holds a reason, a message, and whether the same call may succeed soon.

use std::fmt;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// Domain of the server's `ErrorInfo`.
const DOMAIN: &str = "absurd.v1";

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal;)*) => {
        /// Reason of a failed call. `AbsurdService` in the proto files lists the names on the wire.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Reason {
            $($(#[$doc])* $variant,)*
            /// No answer of the service arrived: the connection failed, or an intermediary answered.
            Transport,
            /// Any other error: an answer without a reason that this crate knows, or a refusal by the client itself.
            Other,
        }

        impl Reason {
            fn from_wire(name: &str) -> Self {
                match name {
                    $($name => Self::$variant,)*
                    _ => Self::Other,
                }
            }

            /// The stable name, as on the wire; `TRANSPORT` and `OTHER` are names of this crate.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                    Self::Transport => "TRANSPORT",
                    Self::Other => "OTHER",
                }
            }
        }
    };
}

reasons! {
    /// A field is wrong; [`Error::field`] names it.
    InvalidArgument = "INVALID_ARGUMENT";
    /// A JSON field holds a value that Postgres refuses.
    JsonInvalid = "JSON_INVALID";
    /// A JSON field or the whole request is over the server's limit, or an answer is larger than the client reads.
    PayloadTooLarge = "PAYLOAD_TOO_LARGE";
    /// The claim token is not a token of this service.
    ClaimTokenInvalid = "CLAIM_TOKEN_INVALID";
    /// The server runs with `--require-claim-token`, and the call shows no token.
    ClaimTokenRequired = "CLAIM_TOKEN_REQUIRED";
    /// The queue does not exist.
    QueueNotFound = "QUEUE_NOT_FOUND";
    /// The queue has no such task.
    TaskNotFound = "TASK_NOT_FOUND";
    /// The queue has no such run.
    RunNotFound = "RUN_NOT_FOUND";
    /// The chosen task id belongs to a task with another name or other params.
    TaskIdConflict = "TASK_ID_CONFLICT";
    /// The queue exists with another storage mode.
    QueueExists = "QUEUE_EXISTS";
    /// Another claim owns the run, or this claim was given back: stop, and report nothing.
    ClaimLost = "CLAIM_LOST";
    /// The lease ran out and the attempt was failed: stop working on the run.
    ClaimExpired = "CLAIM_EXPIRED";
    /// The task was cancelled: stop working on the run.
    TaskCancelled = "TASK_CANCELLED";
    /// The run is not in a state that allows the call.
    RunNotRunning = "RUN_NOT_RUNNING";
    /// Only failed tasks can be retried.
    TaskNotFailed = "TASK_NOT_FAILED";
    /// `max_attempts` does not exceed the number of attempts made.
    MaxAttemptsTooLow = "MAX_ATTEMPTS_TOO_LOW";
    /// An earlier write about the same run failed.
    ItemSkipped = "ITEM_SKIPPED";
    /// The replica, the connection or the caller's address has the maximum number of claim streams.
    StreamLimit = "STREAM_LIMIT";
    /// The replica has more requests than it can answer in time.
    TooManyRequests = "TOO_MANY_REQUESTS";
    /// The queue has the maximum number of waiting tasks.
    BacklogFull = "BACKLOG_FULL";
    /// Postgres cannot be reached, or cannot write.
    Unavailable = "UNAVAILABLE";
    /// Postgres did not finish the statement in time.
    DatabaseBusy = "DATABASE_BUSY";
    /// Another session holds a lock on the queue's tables or rows.
    QueueLocked = "QUEUE_LOCKED";
    /// A trigger, a constraint or a policy on the queue's tables refuses a row; the message is the database's.
    DatabaseRefused = "DATABASE_REFUSED";
    /// The server's role lacks a right in its database.
    DatabasePermission = "DATABASE_PERMISSION";
    /// The queue's tables differ from those that the server expects, or cannot be read.
    QueueDamaged = "QUEUE_DAMAGED";
    /// The server's schemas are missing from its database, or incomplete.
    SchemaMissing = "SCHEMA_MISSING";
    /// The installation of Postgres itself is broken.
    DatabaseBroken = "DATABASE_BROKEN";
    /// The replica is shutting down.
    ShuttingDown = "SHUTTING_DOWN";
    /// The call's deadline passed.
    DeadlineExceeded = "DEADLINE_EXCEEDED";
    /// The connection to Postgres broke during the commit, so that its outcome is unknown.
    OutcomeUnknown = "OUTCOME_UNKNOWN";
    /// A bug in the server; the message holds the id of its log line.
    Internal = "INTERNAL";
}

/// A failed call: its reason, gRPC code and message.
#[derive(Debug, Clone)]
pub struct Error(Box<Inside>);

#[derive(Debug, Clone)]
struct Inside {
    reason: Reason,
    code: Code,
    message: String,
    field: Option<String>,
    retry_after: Option<Duration>,
}

impl Error {
    pub(crate) fn new(reason: Reason, code: Code, message: impl Into<String>) -> Self {
        Self(Box::new(Inside { reason, code, message: message.into(), field: None, retry_after: None }))
    }

    /// A wrong argument, found before anything was sent.
    pub(crate) fn argument(field: &str, problem: impl fmt::Display) -> Self {
        let mut error = Self::new(Reason::InvalidArgument, Code::InvalidArgument, format!("{field}: {problem}"));
        error.0.field = Some(field.to_owned());
        error
    }

    pub(crate) fn deadline() -> Self {
        Self::new(Reason::DeadlineExceeded, Code::DeadlineExceeded, "the deadline has passed")
    }

    /// The refusal of one item of a batch. The path of its field and its message are those of a call with this item
    /// alone.
    pub(crate) fn of_item(refusal: &absurd_proto::v1::SettleError) -> Self {
        let field = refusal.field.split_once("].").map_or(refusal.field.as_str(), |(_, field)| field);
        let message = match refusal.message.strip_prefix(&refusal.field) {
            Some(rest) if !field.is_empty() => format!("{field}{rest}"),
            _ => refusal.message.clone(),
        };
        let mut error = Self::new(Reason::from_wire(&refusal.reason), Code::from_i32(refusal.code), message);
        error.0.field = Some(field.to_owned()).filter(|field| !field.is_empty());
        error
    }

    /// The reason, by which a program decides.
    pub fn reason(&self) -> Reason {
        self.0.reason
    }

    /// The gRPC code of the status.
    pub fn code(&self) -> Code {
        self.0.code
    }

    /// A text for people; it may change between releases.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Path of the wrong field, such as `tasks[3].params`; `None` when no field is wrong.
    pub fn field(&self) -> Option<&str> {
        self.0.field.as_deref()
    }

    /// Time that the server asks to wait before the next try.
    pub fn retry_after(&self) -> Option<Duration> {
        self.0.retry_after
    }

    /// Whether the claim that the call named is over: stop working on the run, and report nothing.
    pub fn is_claim_over(&self) -> bool {
        matches!(
            self.reason(),
            Reason::ClaimLost
                | Reason::ClaimExpired
                | Reason::TaskCancelled
                | Reason::RunNotRunning
                | Reason::RunNotFound
                | Reason::QueueNotFound
        )
    }

    /// Whether the same call may succeed soon.
    pub fn is_passing(&self) -> bool {
        matches!(
            self.reason(),
            Reason::Transport
                | Reason::Unavailable
                | Reason::DatabaseBusy
                | Reason::QueueLocked
                | Reason::ShuttingDown
                | Reason::TooManyRequests
                | Reason::StreamLimit
                | Reason::BacklogFull
                | Reason::OutcomeUnknown
        )
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.0.message, self.0.reason.as_str())
    }
}

impl std::error::Error for Error {}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        let details = status.get_error_details();
        let info = details.error_info().filter(|info| info.domain == DOMAIN);
        let reason = match (info, status.code()) {
            (Some(info), _) => Reason::from_wire(&info.reason),
            // tonic reports a passed deadline as CANCELLED.
            (None, Code::DeadlineExceeded) => Reason::DeadlineExceeded,
            (None, Code::Cancelled) if status.message().contains("imeout") => Reason::DeadlineExceeded,
            (None, Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal | Code::ResourceExhausted) => {
                Reason::Transport
            }
            (None, Code::OutOfRange) => Reason::PayloadTooLarge,
            (None, _) => Reason::Other,
        };
        let mut message = status.message().to_owned();
        if reason == Reason::Transport {
            append_causes(&mut message, &status);
        }
        let mut error = Self::new(reason, status.code(), message);
        error.0.field =
            details.bad_request().and_then(|bad| bad.field_violations.first()).map(|violation| violation.field.clone());
        error.0.retry_after = details.retry_info().and_then(|info| info.retry_delay);
        error
    }
}

/// A transport error says little by itself; its causes name the fault, such as "connection refused" or "certificate
/// expired".
fn append_causes(message: &mut String, status: &Status) {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let text = error.to_string();
        if !message.contains(&text) {
            message.push_str(": ");
            message.push_str(&text);
        }
        cause = error.source();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic_types::ErrorDetails;

    #[test]
    fn a_status_becomes_its_reason() {
        let mut details = ErrorDetails::new();
        details.set_error_info("CLAIM_LOST", DOMAIN, std::collections::HashMap::new());
        details.set_retry_info(Some(Duration::from_millis(70)));
        let error = Error::from(Status::with_error_details(Code::Aborted, "gone", details));
        assert_eq!(error.reason(), Reason::ClaimLost);
        assert_eq!(error.retry_after(), Some(Duration::from_millis(70)));
        assert!(error.is_claim_over() && !error.is_passing());
    }

    #[test]
    fn a_transport_failure_is_passing_and_a_deadline_is_not() {
        assert!(Error::from(Status::unavailable("no route")).is_passing());
        assert!(Error::from(Status::unknown("h2 protocol error")).is_passing());
        let late = Error::from(Status::cancelled("Timeout expired"));
        assert_eq!(late.reason(), Reason::DeadlineExceeded);
        assert!(!late.is_passing());
    }

    /// An answer larger than the client reads is a lasting error: a repetition would bring the same answer.
    #[test]
    fn an_answer_over_the_limit_is_not_asked_for_again() {
        let error = Error::from(Status::out_of_range("decoded message length too large"));
        assert_eq!(error.reason().as_str(), "PAYLOAD_TOO_LARGE");
        assert!(!error.is_passing() && !error.is_claim_over());
    }

    #[test]
    fn names_survive_the_wire() {
        assert_eq!(Reason::from_wire(Reason::OutcomeUnknown.as_str()), Reason::OutcomeUnknown);
        assert_eq!(Reason::from_wire("SOMETHING_NEW"), Reason::Other);
    }
}
