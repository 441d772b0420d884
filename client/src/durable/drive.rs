//! One execution of a handler, from its start to its outcome: signals win, panics are caught, nothing that a handler does after
//! its execution is over counts.

use std::future::Future;
use std::panic::AssertUnwindSafe;

use futures_util::FutureExt as _;

use super::context::Context;
use super::error::{BoxError, Signal, TaskError, reason, recorded};
use super::handlers::Handlers;
use super::task::Handler;
use crate::{Error, Json};

/// What became of an execution.
#[derive(Debug)]
pub(crate) enum Outcome {
    Completed(Json),
    Failed(Json),
    /// Another attempt would not mend it.
    FailedForGood(Json),
    Over(Signal),
    /// Its checkpoints could not be read; the run waits for the end of its lease.
    Unread(Error),
    /// The worker ends, and the handler had not.
    LeftOff,
}

/// Runs the handler until it ends, or until the execution is over: then the handler is dropped where it stands.
pub(crate) async fn drive(
    handlers: &Handlers,
    context: Context,
    handler: Handler,
    revoked: impl Future<Output = Signal>,
    left_off: impl Future<Output = ()>,
) -> Outcome {
    let deadline = context.deadline();
    // Inside, so that a panic of the handler or a hook before its first await is caught too.
    let handler = async { handlers.execute(context.clone(), handler).await };
    let handler = AssertUnwindSafe(context.clone().scope(handler)).catch_unwind();
    let late = async {
        match deadline {
            Some(deadline) => tokio::time::sleep_until(deadline).await,
            None => std::future::pending().await,
        }
    };
    let ended = tokio::select! {
        biased;
        signal = context.over() => return Outcome::Over(signal),
        signal = revoked => {
            context.end(signal);
            return Outcome::Over(signal);
        }
        ended = handler => ended,
        () = left_off => {
            context.end(Signal::Lost);
            return Outcome::LeftOff;
        }
        () = late => {
            context.end(Signal::Failed);
            return Outcome::Failed(reason("TimeoutError", "the execution took longer than its task may", None));
        }
    };
    // A signal that the handler has swallowed counts all the same.
    if let Some(signal) = context.signal() {
        return Outcome::Over(signal);
    }
    context.end(Signal::Failed);
    match ended {
        Ok(Ok(result)) => Outcome::Completed(result),
        Ok(Err(error)) => failed(&error),
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
            Outcome::Failed(reason("Panic", &format!("panic: {text}"), None))
        }
    }
}

fn failed(error: &BoxError) -> Outcome {
    match error.downcast_ref::<TaskError>() {
        Some(TaskError::Signal(signal)) => Outcome::Over(*signal),
        Some(TaskError::NonRetryable(_)) => Outcome::FailedForGood(recorded(error)),
        Some(_) | None => Outcome::Failed(recorded(error)),
    }
}
