//! `Backend`: the calls that a context makes. Their target is the service, or the memory of a test.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, SystemTime};

use uuid::Uuid;

use super::error::{Signal, TaskError};
use crate::{AbsurdClient, Awaited, ClaimedTask, Emitted, Error, Json, NewTask, Reason, Slept, Spawned, TaskResult};

/// A boxed future that can move between threads.
pub(crate) type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// End of a sleep.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Until {
    /// This long after the first call of the sleep.
    After(Duration),
    /// At this time.
    At(SystemTime),
}

/// State of a wait for a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum AwaitedTask {
    /// The awaited task has ended.
    Ended(TaskResult),
    /// The run sleeps and the claim is over.
    Suspended {
        /// Time at which the run wakes without the end of the task; `None` means never.
        wake_at: Option<SystemTime>,
    },
    /// The timeout passed first. Every later call of this step returns the same.
    TimedOut,
}

/// The awaited task, and the step that waits for it.
#[derive(Debug, Clone)]
pub(crate) struct TaskWait {
    pub(crate) step: String,
    pub(crate) queue: String,
    pub(crate) task_id: Uuid,
    pub(crate) timeout: Option<Duration>,
}

/// The calls that one execution makes.
pub(crate) trait Backend: Send + Sync + fmt::Debug {
    fn set_checkpoint(&self, name: String, state: Json) -> BoxFuture<'_, Result<(), Error>>;
    fn sleep(&self, step: String, until: Until) -> BoxFuture<'_, Result<Slept, Error>>;
    fn await_event(
        &self,
        step: String,
        event: String,
        timeout: Option<Duration>,
    ) -> BoxFuture<'_, Result<Awaited, Error>>;
    fn await_task(&self, wait: TaskWait) -> BoxFuture<'_, Result<AwaitedTask, Error>>;
    fn emit_event(&self, event: String, payload: Json) -> BoxFuture<'_, Result<Emitted, Error>>;
    fn heartbeat(&self, extend_by: Duration) -> BoxFuture<'_, Result<(), Error>>;
    fn spawn(&self, queue: String, tasks: Vec<NewTask>) -> BoxFuture<'_, Result<Vec<Spawned>, Error>>;
}

/// The service, called under the claim of one run.
#[derive(Debug)]
pub(crate) struct Remote {
    pub(crate) client: AbsurdClient,
    pub(crate) run_id: Uuid,
    pub(crate) task_id: Uuid,
    pub(crate) token: String,
    /// Each checkpoint extends the lease to this long from then on.
    pub(crate) lease: Duration,
}

impl Remote {
    pub(crate) fn of(task: &ClaimedTask, client: &AbsurdClient, lease: Duration) -> Self {
        Self {
            client: client.clone(),
            run_id: task.run_id,
            task_id: task.task_id,
            token: task.claim_token().to_owned(),
            lease,
        }
    }
}

impl Backend for Remote {
    fn set_checkpoint(&self, name: String, state: Json) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(self.client.checkpoint_of(self.run_id, &self.token, name, state, self.lease))
    }

    fn sleep(&self, step: String, until: Until) -> BoxFuture<'_, Result<Slept, Error>> {
        Box::pin(async move { self.client.sleep_until(self.run_id, Some(self.token.clone()), until, &step).await })
    }

    fn await_event(
        &self,
        step: String,
        event: String,
        timeout: Option<Duration>,
    ) -> BoxFuture<'_, Result<Awaited, Error>> {
        Box::pin(async move {
            let (task_id, token) = (Some(self.task_id), Some(self.token.clone()));
            self.client.await_for(task_id, self.run_id, token, &step, &event, timeout).await
        })
    }

    fn await_task(&self, wait: TaskWait) -> BoxFuture<'_, Result<AwaitedTask, Error>> {
        Box::pin(self.client.await_task_as_step(self.run_id, self.token.clone(), wait))
    }

    fn emit_event(&self, event: String, payload: Json) -> BoxFuture<'_, Result<Emitted, Error>> {
        Box::pin(async move { self.client.emit_event_json(&event, payload).await })
    }

    fn heartbeat(&self, extend_by: Duration) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(self.client.extend_held(self.run_id, self.token.clone(), extend_by))
    }

    fn spawn(&self, queue: String, tasks: Vec<NewTask>) -> BoxFuture<'_, Result<Vec<Spawned>, Error>> {
        Box::pin(async move { self.client.with_queue(queue).spawn_tasks(tasks).await })
    }
}

/// Error of a failed call about the run: a signal if this worker no longer holds the run.
pub(crate) fn failed(error: Error) -> TaskError {
    match error.reason() {
        Reason::TaskCancelled => TaskError::Signal(Signal::Cancelled),
        Reason::ClaimExpired => TaskError::Signal(Signal::Failed),
        Reason::ClaimLost | Reason::RunNotRunning | Reason::RunNotFound => TaskError::Signal(Signal::Lost),
        _ => TaskError::Call(error),
    }
}
