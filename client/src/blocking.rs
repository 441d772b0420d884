//! The client for programs without an async runtime. It has the methods of the async client, and each call blocks until
//! it is done.
//!
//! ```no_run
//! use absurd_client::blocking::AbsurdClient;
//! use absurd_client::{ClaimOptions, SpawnOptions};
//! use serde_json::json;
//!
//! # fn main() -> Result<(), absurd_client::Error> {
//! let client = AbsurdClient::new(Some("my_queue"), None)?;
//! client.create_queue()?;
//! client.spawn_task("greet", &json!({"name": "world"}), SpawnOptions::default())?;
//! for task in client.claim_task(ClaimOptions::default())? {
//!     client.complete_task(task.run_id, &json!({"greeting": "hello"}))?;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Two threads, shared by all blocking clients of the process, drive connections and streams and extend leases. The
//! leases of streamed tasks are therefore extended while the program computes. Inside an async runtime every call is
//! refused with an error: use [`crate::AbsurdClient`] there.

use std::ops::Deref;
use std::sync::{Arc, LazyLock, OnceLock};
use std::time::{Duration, SystemTime};

use serde::Serialize;
use tokio::runtime::{Builder, Handle, Runtime};
use tonic::Code;
use uuid::Uuid;

use crate::{
    Awaited, CancelOutcome, CancellationRules, Checkpoint, ClaimOptions, ConnectOptions, Emitted, Error, FailOutcome,
    FindOptions, FoundTasks, Json, ListOptions, NewTask, NewWorkflowRun, Page, PolicyChanges, Queue, QueueOptions,
    QueuePolicy, QueueStats, Reason, Retries, RetryOptions, Revoked, Run, Slept, SpawnOptions, Spawned, StreamOptions,
    Task, TaskResult, TaskSummary, Wait, WaitError, WaitsOf, WorkflowChange, WorkflowFilter, WorkflowRun,
    WorkflowStatus,
};

/// The runtime of all blocking clients. Errors on a thread that is inside a Tokio runtime already.
pub(crate) fn runtime() -> Result<&'static Runtime, Error> {
    static RUNTIME: LazyLock<Result<Runtime, String>> = LazyLock::new(|| {
        let built = Builder::new_multi_thread().worker_threads(2).thread_name("absurd-client").enable_all().build();
        built.map_err(|error| format!("the client's threads could not be started: {error}"))
    });
    let wrong = |problem: &str| Error::new(Reason::Other, Code::FailedPrecondition, problem);
    if Handle::try_current().is_ok() {
        return Err(wrong("a blocking call inside an async runtime would stall it; use absurd_client::AbsurdClient"));
    }
    RUNTIME.as_ref().map_err(|problem| wrong(problem))
}

/// Methods that block on the async methods of the same name.
macro_rules! blocking {
    ($(
        $name:ident [$($generics:tt)*] ($($argument:ident: $type:ty),*) -> Result<$out:ty, $error:ty>;
    )*) => {
        $(
            #[doc = concat!("See [`crate::AbsurdClient::", stringify!($name), "`].")]
            pub fn $name<$($generics)*>(&self, $($argument: $type),*) -> Result<$out, $error> {
                runtime()?.block_on(self.inner.$name($($argument),*))
            }
        )*
    };
}

/// Access to one queue of the service; see [`crate::AbsurdClient`].
#[derive(Debug, Clone)]
pub struct AbsurdClient {
    pub(crate) inner: crate::AbsurdClient,
}

impl AbsurdClient {
    /// See [`crate::AbsurdClient::new`].
    pub fn new(queue_name: Option<&str>, worker_id: Option<&str>) -> Result<Self, Error> {
        let _runtime = runtime()?.enter();
        crate::AbsurdClient::new(queue_name, worker_id).map(|inner| Self { inner })
    }

    /// See [`crate::AbsurdClient::connect`].
    pub fn connect(options: &ConnectOptions) -> Result<Self, Error> {
        let _runtime = runtime()?.enter();
        crate::AbsurdClient::connect(options).map(|inner| Self { inner })
    }

    /// The same client on another queue.
    #[must_use]
    pub fn with_queue(&self, queue: impl Into<Arc<str>>) -> Self {
        Self { inner: self.inner.with_queue(queue) }
    }

    /// The same client with another worker id.
    #[must_use]
    pub fn with_worker_id(&self, worker_id: impl Into<Arc<str>>) -> Self {
        Self { inner: self.inner.with_worker_id(worker_id) }
    }

    /// Name of the queue that the calls are about.
    pub fn queue_name(&self) -> &str {
        self.inner.queue_name()
    }

    /// Worker id that claims of this client carry.
    pub fn worker_id(&self) -> &str {
        self.inner.worker_id()
    }

    blocking! {
        create_queue[]() -> Result<bool, Error>;
        create_queue_with[](options: QueueOptions) -> Result<bool, Error>;
        drop_queue[]() -> Result<bool, Error>;
        list_queues[]() -> Result<Vec<Queue>, Error>;
        get_queue_stats[]() -> Result<QueueStats, Error>;
        get_queue_policy[]() -> Result<QueuePolicy, Error>;
        set_queue_policy[](changes: PolicyChanges) -> Result<QueuePolicy, Error>;
        cleanup_tasks[](ttl: Duration, limit: Option<i32>) -> Result<i32, Error>;
        cleanup_events[](ttl: Duration, limit: Option<i32>) -> Result<i32, Error>;
        spawn_task[P: Serialize + ?Sized](task_name: &str, params: &P, options: SpawnOptions) -> Result<Spawned, Error>;
        spawn_new_task[](task: NewTask) -> Result<Spawned, Error>;
        spawn_tasks[](tasks: Vec<NewTask>) -> Result<Vec<Spawned>, Error>;
        complete_task[T: Serialize + ?Sized](run_id: Uuid, result: &T) -> Result<(), Error>;
        fail_task[R: Serialize + ?Sized](run_id: Uuid, reason: &R, retry_at: Option<SystemTime>) -> Result<FailOutcome, Error>;
        extend_claim[](run_id: Uuid, extend_by: Duration) -> Result<Option<SystemTime>, Error>;
        release_claim[](run_id: Uuid, delay: Duration) -> Result<(), Error>;
        cancel_task[](run_id: Uuid) -> Result<CancelOutcome, Error>;
        cancel_task_by_id[](task_id: Uuid) -> Result<CancelOutcome, Error>;
        retry_task[](task_id: Uuid, options: RetryOptions) -> Result<Spawned, Error>;
        schedule_task[](run_id: Uuid, wake_at: SystemTime) -> Result<(), Error>;
        schedule_task_after[](run_id: Uuid, delay: Duration) -> Result<(), Error>;
        sleep[](run_id: Uuid, duration: Duration, step_name: Option<&str>) -> Result<Slept, Error>;
        set_checkpoint[T: Serialize + ?Sized](task_id: Uuid, step_name: &str, state: &T, owner_run: Uuid, extend_claim_by: Option<Duration>) -> Result<bool, Error>;
        save_checkpoint_for_run[T: Serialize + ?Sized](run_id: Uuid, step_name: &str, data: &T, task_id: Option<Uuid>) -> Result<bool, Error>;
        get_checkpoint[](task_id: Uuid, step_name: &str, include_pending: bool) -> Result<Option<Checkpoint>, Error>;
        get_all_checkpoints[](task_id: Uuid, run_id: Uuid) -> Result<Vec<Checkpoint>, Error>;
        get_checkpoints_for_run[](run_id: Uuid) -> Result<Vec<Checkpoint>, Error>;
        get_run_checkpoint[](run_id: Uuid, step_name: &str) -> Result<Option<Checkpoint>, Error>;
        await_event[](task_id: Option<Uuid>, run_id: Uuid, step_name: &str, event_name: &str, timeout: Option<Duration>) -> Result<Awaited, Error>;
        wait_for_event[](run_id: Uuid, event_name: &str, timeout: Duration, task_id: Option<Uuid>, step_name: &str) -> Result<Json, WaitError>;
        set_run_sleeping[](run_id: Uuid, event_name: &str) -> Result<Option<SystemTime>, Error>;
        emit_event[P: Serialize + ?Sized](event_name: &str, payload: &P) -> Result<Emitted, Error>;
        emit_event_json[](event_name: &str, payload: Json) -> Result<Emitted, Error>;
        get_task_status[](task_id: Uuid) -> Result<Option<Task>, Error>;
        get_run_status[](run_id: Uuid) -> Result<Option<Run>, Error>;
        get_task_result[](task_id: Uuid) -> Result<TaskResult, Error>;
        await_task_result[](task_id: Uuid, timeout: Option<Duration>) -> Result<TaskResult, Error>;
        list_runs[](task_id: Uuid, page_size: i32, page_token: &str) -> Result<Page<Run>, Error>;
        list_waits[](of: WaitsOf, page_size: i32, page_token: &str) -> Result<Page<Wait>, Error>;
        find_tasks[](text: &str, options: FindOptions) -> Result<FoundTasks, Error>;
        list_tasks[](options: ListOptions) -> Result<Page<TaskSummary>, Error>;
        create_workflow_run[](new: NewWorkflowRun) -> Result<Uuid, Error>;
        update_workflow_run_status[](id: Uuid, status: WorkflowStatus, change: WorkflowChange) -> Result<bool, Error>;
        get_workflow_run[](id: Uuid) -> Result<Option<WorkflowRun>, Error>;
        list_workflow_runs[](filter: WorkflowFilter) -> Result<Page<WorkflowRun>, Error>;
    }

    /// See [`crate::AbsurdClient::claim_task`].
    pub fn claim_task(&self, options: ClaimOptions) -> Result<Vec<ClaimedTask>, Error> {
        let claimed = runtime()?.block_on(self.inner.claim_task(options))?;
        Ok(claimed.into_iter().map(|inner| ClaimedTask { inner }).collect())
    }

    /// See [`crate::AbsurdClient::claim_stream`].
    pub fn claim_stream(&self, options: StreamOptions) -> Result<ClaimStream, Error> {
        runtime()?.block_on(self.inner.claim_stream(options)).map(|inner| ClaimStream { inner })
    }
}

/// The tasks of a stream; see [`crate::ClaimStream`].
#[derive(Debug)]
pub struct ClaimStream {
    inner: crate::ClaimStream,
}

impl ClaimStream {
    /// Waits for the next task. Returns `None` where [`crate::ClaimStream::next`] does.
    #[expect(
        clippy::should_implement_trait,
        reason = "the async stream's name, and a refusal is not the end of the stream"
    )]
    pub fn next(&mut self) -> Result<Option<ClaimedTask>, Error> {
        Ok(runtime()?.block_on(self.inner.next()).map(|inner| ClaimedTask { inner }))
    }

    /// Waits for the next task, at most this long. Returns `None` when the time is over, or where [`ClaimStream::next`]
    /// does.
    pub fn next_within(&mut self, limit: Duration) -> Result<Option<ClaimedTask>, Error> {
        let next = async { tokio::time::timeout(limit, self.inner.next()).await.unwrap_or(None) };
        Ok(runtime()?.block_on(next).map(|inner| ClaimedTask { inner }))
    }

    /// See [`crate::ClaimStream::close`].
    pub fn close(self, limit: Duration) -> Result<(), Error> {
        runtime()?.block_on(self.inner.close(limit))
    }
}

/// A task that this process holds. Its fields are those of [`crate::ClaimedTask`].
#[derive(Debug)]
pub struct ClaimedTask {
    inner: crate::ClaimedTask,
}

impl Deref for ClaimedTask {
    type Target = crate::ClaimedTask;

    fn deref(&self) -> &crate::ClaimedTask {
        &self.inner
    }
}

impl ClaimedTask {
    /// See [`crate::ClaimedTask::complete`].
    pub fn complete<T: Serialize + ?Sized>(&self, result: &T) -> Result<(), Error> {
        runtime()?.block_on(self.inner.complete(result))
    }

    /// See [`crate::ClaimedTask::complete_json`].
    pub fn complete_json(&self, result: Json) -> Result<(), Error> {
        runtime()?.block_on(self.inner.complete_json(result))
    }

    /// See [`crate::ClaimedTask::fail`].
    pub fn fail<R: Serialize + ?Sized>(&self, reason: &R) -> Result<FailOutcome, Error> {
        runtime()?.block_on(self.inner.fail(reason))
    }

    /// See [`crate::ClaimedTask::fail_for_good`].
    pub fn fail_for_good<R: Serialize + ?Sized>(&self, reason: &R) -> Result<FailOutcome, Error> {
        runtime()?.block_on(self.inner.fail_for_good(reason))
    }

    /// See [`crate::ClaimedTask::set_checkpoint`].
    pub fn set_checkpoint<T: Serialize + ?Sized>(&self, name: &str, state: &T) -> Result<(), Error> {
        runtime()?.block_on(self.inner.set_checkpoint(name, state))
    }

    /// See [`crate::ClaimedTask::await_event`].
    pub fn await_event(&self, step: &str, event: &str, timeout: Option<Duration>) -> Result<Awaited, Error> {
        runtime()?.block_on(self.inner.await_event(step, event, timeout))
    }

    /// See [`crate::ClaimedTask::sleep`].
    pub fn sleep(&self, step: &str, duration: Duration) -> Result<Slept, Error> {
        runtime()?.block_on(self.inner.sleep(step, duration))
    }

    /// See [`crate::ClaimedTask::release`].
    pub fn release(&self, delay: Duration) -> Result<(), Error> {
        runtime()?.block_on(self.inner.release(delay))
    }

    /// Waits until the claim is revoked, at most this long; `None` while this process knows of no revocation.
    pub fn revoked_within(&self, limit: Duration) -> Result<Option<Revoked>, Error> {
        let revoked = async { tokio::time::timeout(limit, self.inner.revoked()).await.ok() };
        Ok(runtime()?.block_on(revoked))
    }
}

/// See [`crate::get_absurd_client`]. The blocking client and the async one of a process share neither connection nor
/// claims.
pub fn get_absurd_client(queue_name: Option<&str>, worker_id: Option<&str>) -> Result<&'static AbsurdClient, Error> {
    static SHARED: OnceLock<AbsurdClient> = OnceLock::new();
    if let Some(client) = SHARED.get() {
        return Ok(client);
    }
    let client = AbsurdClient::new(queue_name, worker_id)?;
    Ok(SHARED.get_or_init(|| client))
}

/// See [`crate::spawn_retry_task`].
pub fn spawn_retry_task<P: Serialize + ?Sized>(
    client: &AbsurdClient,
    task_name: &str,
    params: &P,
    retries: Retries,
) -> Result<Spawned, Error> {
    client.spawn_task(task_name, params, retries.options())
}

/// See [`crate::spawn_cancellable_task`].
pub fn spawn_cancellable_task<P: Serialize + ?Sized>(
    client: &AbsurdClient,
    task_name: &str,
    params: &P,
    rules: CancellationRules,
) -> Result<Spawned, Error> {
    client.spawn_task(task_name, params, SpawnOptions { cancellation: rules, ..SpawnOptions::default() })
}
