//! Waits inside of a task: for an event, and for the end of another task.

use std::future::IntoFuture;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::backend::{AwaitedTask, BoxFuture, TaskWait};
use super::context::Context;
use super::error::{Signal, TaskError};
use crate::{Awaited, Json, State, TaskResult};

/// A wait for an event, which starts when it is awaited; see [`Context::await_event`].
#[derive(Debug)]
#[must_use = "nothing is waited for before it is awaited"]
pub struct EventWait<T> {
    pub(super) context: Context,
    pub(super) event: String,
    pub(super) step: String,
    pub(super) timeout: Option<Duration>,
    pub(super) payload: std::marker::PhantomData<fn() -> T>,
}

impl<T> EventWait<T> {
    /// Sets the longest wait, counted from the first call of the step.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Sets the name of the step, unless it is blank; the default is `$awaitEvent:` and the event's name.
    pub fn step_name(mut self, name: &str) -> Self {
        if !name.trim().is_empty() {
            name.clone_into(&mut self.step);
        }
        self
    }
}

impl<T: DeserializeOwned + 'static> IntoFuture for EventWait<T> {
    type Output = Result<T, TaskError>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let context = &self.context;
            context.check()?;
            let checkpoint = context.next_name(&self.step)?;
            let read = |value: &Json| value.to().map_err(|error| TaskError::json(&self.event, error));
            if let Some(value) = context.stored(&checkpoint) {
                return read(&value);
            }
            let wait = context.backend().await_event(checkpoint.clone(), self.event.clone(), self.timeout);
            match wait.await {
                Ok(Awaited::Payload(value)) => {
                    let payload = read(&value);
                    context.remember(checkpoint, value);
                    payload
                }
                Ok(Awaited::Suspended { .. }) => Err(context.end(Signal::Suspended)),
                Ok(Awaited::TimedOut) => Err(TaskError::Timeout { what: format!("event {:?}", self.event) }),
                Err(error) => Err(context.failed(error)),
            }
        })
    }
}

/// A wait for a task, which starts when it is awaited; see [`Context::await_task_result`].
#[derive(Debug)]
#[must_use = "nothing is waited for before it is awaited"]
pub struct ResultWait<R> {
    pub(super) context: Context,
    pub(super) task_id: Uuid,
    pub(super) queue: String,
    pub(super) step: String,
    pub(super) timeout: Option<Duration>,
    pub(super) result: std::marker::PhantomData<fn() -> R>,
}

impl<R> ResultWait<R> {
    /// Sets the longest wait, counted from the first call of the step.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Sets the queue of the awaited task.
    pub fn queue(mut self, queue: impl Into<String>) -> Self {
        self.queue = queue.into();
        self
    }

    /// Sets the name of the step, unless it is blank; the default is `$awaitTaskResult:` and the task's id.
    pub fn step_name(mut self, name: &str) -> Self {
        if !name.trim().is_empty() {
            name.clone_into(&mut self.step);
        }
        self
    }

    /// Waits for the end of the task, and returns it whether the task completed, failed or was cancelled.
    pub async fn outcome(self) -> Result<TaskResult, TaskError> {
        let context = &self.context;
        context.check()?;
        let checkpoint = context.next_name(&self.step)?;
        if let Some(stored) = context.stored(&checkpoint) {
            let snapshot: Snapshot = stored.to().map_err(|error| TaskError::json(&checkpoint, error))?;
            return snapshot.into_result(self.task_id).ok_or_else(|| {
                TaskError::failure("InvalidCheckpoint", format!("{checkpoint} holds no result of a task"))
            });
        }
        let wait = TaskWait {
            step: checkpoint.clone(),
            queue: self.queue.clone(),
            task_id: self.task_id,
            timeout: self.timeout,
        };
        match context.backend().await_task(wait).await {
            Ok(AwaitedTask::Ended(result)) => Ok(result),
            Ok(AwaitedTask::Suspended { .. }) => Err(context.end(Signal::Suspended)),
            Ok(AwaitedTask::TimedOut) => Err(TaskError::Timeout { what: format!("the end of task {}", self.task_id) }),
            Err(error) => Err(context.failed(error)),
        }
    }
}

impl<R: DeserializeOwned + 'static> IntoFuture for ResultWait<R> {
    type Output = Result<R, TaskError>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let task_id = self.task_id;
            let end = self.outcome().await?;
            let text = |json: Option<Json>| json.map(|json| json.to_string()).unwrap_or_default();
            match end.state {
                State::Completed => {
                    let result = end.result.unwrap_or_else(Json::null);
                    result.to().map_err(|error| TaskError::json(&format!("the result of task {task_id}"), error))
                }
                State::Cancelled => Err(TaskError::failure("TaskCancelled", format!("task {task_id} was cancelled"))),
                _ => Err(TaskError::failure("TaskFailed", format!("task {task_id} failed: {}", text(end.failure)))),
            }
        })
    }
}

/// The stored form of the end of a task: `{state, result?|failure?}`, as in all SDKs.
#[derive(Debug, serde::Deserialize)]
pub(crate) struct Snapshot {
    state: String,
    pub(super) result: Option<Box<RawValue>>,
    failure: Option<Box<RawValue>>,
}

impl Snapshot {
    pub(crate) fn into_result(self, task_id: Uuid) -> Option<TaskResult> {
        let state = match self.state.as_str() {
            "completed" => State::Completed,
            "failed" => State::Failed,
            "cancelled" => State::Cancelled,
            _ => return None,
        };
        // A task that completed without a value has the result null.
        let json = |raw: Box<RawValue>| Json::from_text(raw.get());
        let result = (state == State::Completed).then(|| self.result.map_or_else(Json::null, json));
        Some(TaskResult { task_id, state, result, failure: self.failure.map(json) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_of_any_sdk_is_read() {
        let id = Uuid::now_v7();
        let read = |text: &str| serde_json::from_str::<Snapshot>(text).expect("JSON").into_result(id);
        let completed = read(r#"{"state": "completed", "result": {"x": 1}}"#).expect("an end");
        assert_eq!(completed.result.map(|json| json.to_string()), Some(r#"{"x": 1}"#.to_owned()));
        assert_eq!(read(r#"{"state": "completed"}"#).and_then(|end| end.result), Some(Json::null()));
        assert_eq!(read(r#"{"state": "failed", "failure": 1}"#).map(|end| end.state), Some(State::Failed));
        assert_eq!(read(r#"{"state": "running"}"#), None);
    }
}
