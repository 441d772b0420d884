//! Errors of context calls: signals, timeouts and failures; and the record that is stored of a failure.

use std::fmt;

use crate::Error;

/// Any error: the type that handlers and steps may return. `anyhow::Error`, every `std::error::Error`, `String` and
/// `&str` convert to it.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Reason why an execution is over although its handler has not ended. After a signal, every further call of the
/// context returns it, the handler is dropped at its next await, and its result is discarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Signal {
    /// The run sleeps until a time, an event or the end of a task. The handler starts again when the run wakes.
    Suspended,
    /// The task was cancelled.
    Cancelled,
    /// The attempt was failed, because the lease ran out or the execution took too long. Another attempt may be in
    /// progress.
    Failed,
    /// Another claim owns the run.
    Lost,
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Suspended => "the run is suspended",
            Self::Cancelled => "the task was cancelled",
            Self::Failed => "the run has failed already: its lease ran out",
            Self::Lost => "another claim owns the run",
        })
    }
}

/// Error of a context call. Pass it on with `?`: a signal ends the execution, and every other error fails the attempt.
#[derive(Debug)]
pub enum TaskError {
    /// The execution is over.
    Signal(Signal),
    /// The awaited event or task did not come in time. This is remembered: the wait returns the same from then on.
    Timeout {
        /// Text that names the event or the task.
        what: String,
    },
    /// A step or the handler has failed by itself.
    Failure {
        /// Name for programs, such as `PaymentDeclined`.
        name: String,
        /// Text for people.
        message: String,
        /// The underlying error.
        source: Option<BoxError>,
    },
    /// A failure that a retry would not mend: the task fails with this attempt, even if its limit allows more.
    NonRetryable(BoxError),
    /// A value could not be written as JSON, or a stored value does not have the requested type.
    Json {
        /// Text that names the value, such as its step or event.
        what: String,
        /// Error of serde.
        source: serde_json::Error,
    },
    /// A call of the service failed.
    Call(Error),
}

impl TaskError {
    /// A failure with this name and this message, which are both recorded.
    pub fn failure(name: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Failure { name: name.into(), message: message.into(), source: None }
    }

    /// A failure that a retry would not mend; its record is that of `error`.
    pub fn non_retryable(error: impl Into<BoxError>) -> Self {
        Self::NonRetryable(error.into())
    }

    /// The signal, if this is one.
    pub fn signal(&self) -> Option<Signal> {
        match self {
            Self::Signal(signal) => Some(*signal),
            _ => None,
        }
    }

    pub(crate) fn json(what: &str, source: serde_json::Error) -> Self {
        Self::Json { what: what.to_owned(), source }
    }

    /// Error of a step's action. An error that a context call has returned stays as it is.
    pub(crate) fn of_step(error: BoxError) -> Self {
        match error.downcast::<Self>() {
            Ok(own) => *own,
            Err(other) => Self::Failure { name: "StepError".into(), message: other.to_string(), source: Some(other) },
        }
    }
}

impl From<Error> for TaskError {
    fn from(error: Error) -> Self {
        Self::Call(error)
    }
}

impl fmt::Display for TaskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signal(signal) => signal.fmt(f),
            Self::Timeout { what } => write!(f, "{what} did not come in time"),
            Self::Failure { message, .. } => f.write_str(message),
            Self::NonRetryable(error) => error.fmt(f),
            Self::Json { what, source } => write!(f, "{what}: {source}"),
            Self::Call(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for TaskError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Failure { source, .. } => source.as_deref().and_then(|source| source.source()),
            Self::NonRetryable(error) => error.source(),
            Self::Json { source, .. } => Some(source),
            Self::Signal(_) | Self::Timeout { .. } | Self::Call(_) => None,
        }
    }
}

/// Longest recorded text, in code points.
const TEXT_MAX: usize = 16 * 1024;

/// The record of a failure: `name`, `message`, `traceback`, as all SDKs store it.
pub(crate) fn recorded(error: &BoxError) -> crate::Json {
    if let Some(TaskError::NonRetryable(error)) = error.downcast_ref::<TaskError>() {
        return recorded(error);
    }
    let name = match error.downcast_ref::<TaskError>() {
        Some(TaskError::Failure { name, .. }) => name.as_str(),
        Some(TaskError::Timeout { .. }) => "TimeoutError",
        Some(TaskError::Json { .. }) => "JsonError",
        Some(TaskError::Call(_)) => "CallError",
        Some(TaskError::Signal(_) | TaskError::NonRetryable(_)) | None => "Error",
    };
    let mut chain = Vec::new();
    let mut cause = error.source();
    while let Some(error) = cause {
        chain.push(format!("caused by: {error}"));
        cause = error.source();
    }
    reason(name, &error.to_string(), (!chain.is_empty()).then(|| chain.join("\n")))
}

/// Builds the record of a failure. U+0000, which JSON in Postgres cannot hold, is replaced; each text is cut to its
/// bound.
pub(crate) fn reason(name: &str, message: &str, traceback: Option<String>) -> crate::Json {
    let clean = |text: &str| text.replace('\0', "\u{fffd}").chars().take(TEXT_MAX).collect::<String>();
    let traceback = traceback.map(|text| clean(&text));
    serde_json::json!({ "name": clean(name), "message": clean(message), "traceback": traceback }).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_keeps_its_name_and_its_causes() {
        let io = std::io::Error::other("disk\0full");
        let step = TaskError::of_step(Box::new(io));
        let error: BoxError = Box::new(step);
        let stored: serde_json::Value = recorded(&error).to().expect("JSON");
        assert_eq!((&stored["name"], &stored["message"]), (&"StepError".into(), &"disk\u{fffd}full".into()));
        let named: BoxError = Box::new(TaskError::failure("PaymentDeclined", "no money"));
        let stored: serde_json::Value = recorded(&named).to().expect("JSON");
        assert_eq!(stored, serde_json::json!({"name": "PaymentDeclined", "message": "no money", "traceback": null}));
        let last: BoxError = Box::new(TaskError::non_retryable(TaskError::failure("NoSuchOrder", "it is gone")));
        let stored: serde_json::Value = recorded(&last).to().expect("JSON");
        assert_eq!(stored, serde_json::json!({"name": "NoSuchOrder", "message": "it is gone", "traceback": null}));
        let text: BoxError = "plain".into();
        assert_eq!(recorded(&text).to::<serde_json::Value>().expect("JSON")["message"], "plain");
    }

    /// Each text of a failure is cut to 16,384 code points, so that its record stays far below the limit of a message.
    #[test]
    fn a_long_failure_is_cut() {
        let long = "\u{e9}".repeat(TEXT_MAX + 1);
        let stored: serde_json::Value = reason(&long, &long, Some(long.clone())).to().expect("JSON");
        for field in ["name", "message", "traceback"] {
            assert_eq!(stored[field].as_str().map(|text| text.chars().count()), Some(TEXT_MAX), "{field}");
        }
    }

    #[test]
    fn a_context_error_that_a_step_passes_on_stays_itself() {
        let signal: BoxError = Box::new(TaskError::Signal(Signal::Lost));
        assert_eq!(TaskError::of_step(signal).signal(), Some(Signal::Lost));
    }
}
