//! One execution of a handler, from its start to its outcome. A signal takes precedence over the handler's result, and
//! a panic becomes a failure. After the execution is over, results and context calls of the handler have no effect.

use std::future::Future;
use std::panic::AssertUnwindSafe;

use futures_util::FutureExt as _;

use super::context::Context;
use super::error::{BoxError, Signal, TaskError, reason, recorded};
use super::handlers::Handlers;
use super::task::Handler;
use crate::{Error, Json};

/// Outcome of an execution.
#[derive(Debug)]
pub(crate) enum Outcome {
    Completed(Json),
    Failed(Json),
    /// Failed in a way that a further attempt would not mend.
    FailedForGood(Json),
    Over(Signal),
    /// Its checkpoints could not be read. The run stays claimed until its lease ends.
    Unread(Error),
    /// The worker ended before the handler did.
    LeftOff,
}

/// Runs the handler until it ends or the execution is over. In the second case the handler is dropped at its current
/// await.
pub(crate) async fn drive(
    handlers: &Handlers,
    context: Context,
    handler: Handler,
    revoked: impl Future<Output = Signal>,
    left_off: impl Future<Output = ()>,
) -> Outcome {
    let deadline = context.deadline();
    // Called inside the block, so that a panic of the handler or a hook before its first await is caught too.
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
    // A signal counts even if the handler has ignored it.
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
