//! The only place where an error becomes a gRPC status.

use std::collections::HashMap;
use std::time::Duration;

use tonic::metadata::MetadataValue;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};
use uuid::Uuid;

use crate::domain::Error;
use crate::metrics;

/// Retry delay after a refusal by a full queue.
const BACKLOG_DELAY: Duration = Duration::from_secs(2);
/// Retry delay after a statement that Postgres did not finish in time.
const BUSY_DELAY: Duration = Duration::from_millis(200);
/// Retry delay after a lock outlived the call's wait; such a lock is held for longer than most.
const LOCKED_DELAY: Duration = Duration::from_secs(1);
/// Domain of every `ErrorInfo` of this service.
pub const DOMAIN: &str = "absurd.v1";

fn pushback_ms(delay: Duration) -> u32 {
    u32::try_from(delay.as_millis()).unwrap_or(u32::MAX)
}

/// The gRPC code of an error.
pub fn code(error: &Error) -> Code {
    match error {
        Error::Invalid { .. }
        | Error::Json { .. }
        | Error::TooLarge { .. }
        | Error::TokenInvalid
        | Error::TokenRequired => Code::InvalidArgument,
        Error::QueueNotFound(_) | Error::TaskNotFound(_) | Error::RunNotFound(_) => Code::NotFound,
        Error::TaskIdConflict(_) | Error::QueueExists(_) => Code::AlreadyExists,
        Error::ClaimLost(_) | Error::ClaimExpired(_) => Code::Aborted,
        Error::TaskCancelled(_)
        | Error::RunNotRunning { .. }
        | Error::TaskNotFailed { .. }
        | Error::MaxAttemptsTooLow { .. }
        | Error::ItemSkipped
        | Error::DatabaseRefused(_)
        | Error::DatabasePermission { .. }
        | Error::QueueDamaged { .. }
        | Error::SchemaMissing(_)
        | Error::DatabaseBroken(_)
        | Error::Setup(_) => Code::FailedPrecondition,
        Error::StreamLimit { .. } | Error::TooManyRequests { .. } | Error::BacklogFull { .. } => {
            Code::ResourceExhausted
        }
        Error::DatabaseUnreachable(_)
        | Error::DatabaseBusy(_)
        | Error::NotWritable(_)
        | Error::QueueLocked { .. }
        | Error::ShuttingDown => Code::Unavailable,
        Error::DeadlineExceeded => Code::DeadlineExceeded,
        Error::OutcomeUnknown => Code::Unknown,
        Error::Internal(_) => Code::Internal,
    }
}

/// The error's text for the caller, cut to at most 1,000 bytes.
pub fn message(error: &Error) -> String {
    let mut text = error.to_string();
    if text.len() > 1000 {
        let mut end = 1000;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
    }
    text
}

/// Delay after which a retry may succeed; `None`: the status suggests no retry.
fn retry_after(error: &Error) -> Option<Duration> {
    match error {
        Error::StreamLimit { .. } => Some(Duration::from_secs(1)),
        Error::BacklogFull { .. } => Some(BACKLOG_DELAY),
        Error::TooManyRequests { after } => Some(*after),
        Error::DatabaseUnreachable(_) | Error::DatabaseBusy(_) => Some(BUSY_DELAY),
        Error::QueueLocked { .. } => Some(LOCKED_DELAY),
        Error::NotWritable(_) => Some(Duration::from_secs(2)),
        Error::ShuttingDown => Some(Duration::from_millis(50)),
        _ => None,
    }
}

/// The status of an error, with its details; also counts the error's reason. The texts of an unreachable database and
/// of an internal error stay in the log.
pub fn status(error: &Error) -> Status {
    let mut details = ErrorDetails::new();
    let mut metadata = HashMap::new();
    let mut message = message(error);
    match error {
        Error::Invalid { field, problem } | Error::Json { field, problem } => {
            details.add_bad_request_violation(field, problem);
        }
        Error::TooLarge { field, size, limit } => {
            details.add_bad_request_violation(field, &message);
            metadata.insert("size".to_owned(), size.to_string());
            metadata.insert("limit".to_owned(), limit.to_string());
        }
        Error::TokenInvalid | Error::TokenRequired => {
            details.add_bad_request_violation("claim_token", &message);
        }
        Error::QueueNotFound(name) | Error::QueueExists(name) => {
            details.set_resource_info("queue", name, "", &message);
        }
        Error::TaskNotFound(id) | Error::TaskIdConflict(id) => {
            details.set_resource_info("task", id.to_string(), "", &message);
        }
        Error::RunNotFound(id) => {
            details.set_resource_info("run", id.to_string(), "", &message);
        }
        Error::DatabaseUnreachable(text) => {
            tracing::debug!(error = text, "unavailable");
            "the database is not available; try again".clone_into(&mut message);
        }
        Error::Internal(text) => {
            let id = Uuid::new_v4().to_string();
            tracing::error!(error.id = id, error = text, "internal error");
            message = format!("internal error; the server's log has it under {id}");
            metadata.insert("error_id".to_owned(), id);
        }
        Error::ClaimLost(run)
        | Error::ClaimExpired(run)
        | Error::TaskCancelled(run)
        | Error::RunNotRunning { run, .. } => {
            metadata.insert("run_id".to_owned(), run.to_string());
        }
        Error::TaskNotFailed { task, .. } => {
            metadata.insert("task_id".to_owned(), task.to_string());
        }
        Error::BacklogFull { queue, .. }
        | Error::QueueLocked { queue }
        | Error::DatabasePermission { queue: Some(queue), .. }
        | Error::QueueDamaged { queue, .. } => {
            details.set_resource_info("queue", queue, "", &message);
        }
        Error::DatabaseRefused(_)
        | Error::DatabasePermission { queue: None, .. }
        | Error::SchemaMissing(_)
        | Error::DatabaseBroken(_)
        | Error::Setup(_)
        | Error::MaxAttemptsTooLow { .. }
        | Error::ItemSkipped
        | Error::StreamLimit { .. }
        | Error::TooManyRequests { .. }
        | Error::DatabaseBusy(_)
        | Error::NotWritable(_)
        | Error::ShuttingDown
        | Error::DeadlineExceeded
        | Error::OutcomeUnknown => {}
    }
    metrics::refused(error.reason());
    let pushback = retry_after(error);
    if pushback.is_some() {
        details.set_retry_info(pushback);
    }
    details.set_error_info(error.reason(), DOMAIN, metadata);
    let mut status = Status::with_error_details(code(error), message, details);
    if let Some(delay) = pushback.filter(|_| code(error) == Code::ResourceExhausted) {
        // gRPC's own retry policies read this header.
        status.metadata_mut().insert("grpc-retry-pushback-ms", MetadataValue::from(pushback_ms(delay)));
    }
    status
}
