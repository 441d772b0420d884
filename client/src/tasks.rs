//! Existing tasks and runs: calls that read, await, list, find, cancel and retry them.

use std::time::{Duration, SystemTime};

use absurd_proto::v1 as pb;
use tokio::time::Instant;
use uuid::Uuid;

use crate::client::{Grpc, rpc};
use crate::wire::{Page, Parts};
use crate::{AbsurdClient, Error, Json, Reason, Spawned, State, wire};

/// Longest wait that one `AwaitTaskResult` call asks for.
const AWAIT_SLICE: Duration = Duration::from_secs(60);

/// A task, as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// Id of the task; this service makes UUIDv7.
    pub task_id: Uuid,
    /// Name of the handler.
    pub task_name: String,
    /// Input, however large.
    pub params: Json,
    /// Headers, a JSON object; `None` when there are none.
    pub headers: Option<Json>,
    /// Retry strategy as stored: an object with `kind`, `base_seconds`, `factor` and `max_seconds`.
    pub retry_strategy: Option<Json>,
    /// Maximum number of attempts; `None` means no limit.
    pub max_attempts: Option<i32>,
    /// Cancellation policy as stored: an object with `max_delay` and `max_duration`, in seconds.
    pub cancellation: Option<Json>,
    /// Time of the spawn.
    pub enqueue_at: Option<SystemTime>,
    /// Time of the first claim.
    pub first_started_at: Option<SystemTime>,
    /// State when the task was read.
    pub state: State,
    /// Highest attempt number that exists.
    pub attempts: i32,
    /// Id of the newest run.
    pub last_attempt_run: Option<Uuid>,
    /// Result, however large; `None` unless the task completed.
    pub completed_payload: Option<Json>,
    /// Time of the cancellation.
    pub cancelled_at: Option<SystemTime>,
    /// Idempotency key of the spawn.
    pub idempotency_key: Option<String>,
    /// Id of the tenant; `None` for the default one.
    pub tenant_id: Option<String>,
    /// True when headers over 1 MiB, or a retry strategy or cancellation policy over 64 KiB, were left out. Such values
    /// come from direct SQL, or from a server with a raised limit for headers.
    pub details_omitted: bool,
}

impl Task {
    fn from_wire(task: pb::Task) -> Result<Self, Error> {
        Ok(Self {
            task_id: wire::id(&task.task_id)?,
            state: State::from_wire(task.state).ok_or_else(wire::unclear)?,
            task_name: task.task_name,
            params: Json::from_wire(task.params).ok_or_else(wire::unclear)?,
            headers: Json::from_wire(task.headers),
            retry_strategy: Json::from_wire(task.retry_strategy),
            max_attempts: task.max_attempts,
            cancellation: Json::from_wire(task.cancellation),
            enqueue_at: wire::time(task.enqueue_at),
            first_started_at: wire::time(task.first_started_at),
            attempts: task.attempts,
            last_attempt_run: wire::maybe_id(task.last_attempt_run)?,
            completed_payload: Json::from_wire(task.completed_payload),
            cancelled_at: wire::time(task.cancelled_at),
            idempotency_key: task.idempotency_key,
            tenant_id: task.tenant_id,
            details_omitted: task.details_omitted,
        })
    }
}

/// Earliest claim of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Available {
    /// The run can be claimed from this time on.
    At(SystemTime),
    /// The run waits for an event without a timeout.
    Never,
}

/// A run, as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Id of the run.
    pub run_id: Uuid,
    /// Id of its task.
    pub task_id: Uuid,
    /// Number of the attempt, from 1.
    pub attempt: i32,
    /// State when the run was read.
    pub state: State,
    /// Id of the worker that holds or held it.
    pub claimed_by: Option<String>,
    /// End of the lease; for a running run, `None` means that the lease never ends.
    pub claim_expires_at: Option<SystemTime>,
    /// Earliest time of its next claim.
    pub available_at: Available,
    /// Event that the run waits for or waited for.
    pub wake_event: Option<String>,
    /// Payload of the event that woke the run; left out when over 1.25 MiB.
    pub event_payload: Option<Json>,
    /// Time of the last claim.
    pub started_at: Option<SystemTime>,
    /// Time of the completion.
    pub completed_at: Option<SystemTime>,
    /// Time of the failure.
    pub failed_at: Option<SystemTime>,
    /// Result; left out when over 1.25 MiB. [`AbsurdClient::get_task_result`] reads it in full.
    pub result: Option<Json>,
    /// Reason of the failure; left out when over 1.25 MiB.
    pub failure_reason: Option<Json>,
    /// Time at which the run was created.
    pub created_at: Option<SystemTime>,
    /// Time of the newest of the run's claim and the checkpoints that it wrote.
    pub last_heartbeat: Option<SystemTime>,
    /// Id of the tenant; `None` for the default one.
    pub tenant_id: Option<String>,
    /// Whether a payload was left out.
    pub payloads_omitted: bool,
}

impl Run {
    fn from_wire(run: pb::Run) -> Result<Self, Error> {
        Ok(Self {
            run_id: wire::id(&run.run_id)?,
            task_id: wire::id(&run.task_id)?,
            state: State::from_wire(run.state).ok_or_else(wire::unclear)?,
            attempt: run.attempt,
            claimed_by: run.claimed_by,
            claim_expires_at: wire::time(run.claim_expires_at),
            available_at: match run.available_never {
                true => Available::Never,
                false => wire::time(run.available_at).map(Available::At).ok_or_else(wire::unclear)?,
            },
            wake_event: run.wake_event,
            event_payload: Json::from_wire(run.event_payload),
            started_at: wire::time(run.started_at),
            completed_at: wire::time(run.completed_at),
            failed_at: wire::time(run.failed_at),
            result: Json::from_wire(run.result),
            failure_reason: Json::from_wire(run.failure_reason),
            created_at: wire::time(run.created_at),
            last_heartbeat: wire::time(run.last_heartbeat),
            tenant_id: run.tenant_id,
            payloads_omitted: run.payloads_omitted,
        })
    }
}

/// A task in a list, without its payloads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskSummary {
    /// Id of the task.
    pub task_id: Uuid,
    /// Name of the handler.
    pub task_name: String,
    /// State when the list was read.
    pub state: State,
    /// Highest attempt number that exists.
    pub attempts: i32,
    /// Maximum number of attempts; `None` means no limit.
    pub max_attempts: Option<i32>,
    /// Time of the spawn.
    pub enqueue_at: Option<SystemTime>,
    /// Time of the first claim.
    pub first_started_at: Option<SystemTime>,
}

impl TaskSummary {
    fn from_wire(task: pb::TaskSummary) -> Result<Self, Error> {
        Ok(Self {
            task_id: wire::id(&task.task_id)?,
            state: State::from_wire(task.state).ok_or_else(wire::unclear)?,
            task_name: task.task_name,
            attempts: task.attempts,
            max_attempts: task.max_attempts,
            enqueue_at: wire::time(task.enqueue_at),
            first_started_at: wire::time(task.first_started_at),
        })
    }
}

/// State of a task, with its result or the reason of its failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskResult {
    /// Id of the task.
    pub task_id: Uuid,
    /// State when the server answered.
    pub state: State,
    /// Result; set only when the task completed.
    pub result: Option<Json>,
    /// Reason of the last attempt's failure; set only when the task failed.
    pub failure: Option<Json>,
}

impl TaskResult {
    fn from_wire(result: pb::TaskResult) -> Result<Self, Error> {
        Ok(Self {
            task_id: wire::id(&result.task_id)?,
            state: State::from_wire(result.state).ok_or_else(wire::unclear)?,
            result: Json::from_wire(result.result),
            failure: Json::from_wire(result.failure_reason),
        })
    }
}

/// Options of [`AbsurdClient::retry_task`].
#[derive(Debug, Clone, Copy, Default)]
pub struct RetryOptions {
    /// Spawns a copy of the task instead of adding an attempt. The copy has neither the idempotency key nor the
    /// checkpoints.
    pub spawn_new: bool,
    /// New maximum number of attempts. `None`: a copy keeps the limit of the original. Otherwise the limit rises by
    /// one; a task without a limit may make one more attempt.
    pub max_attempts: Option<i32>,
}

/// Filter and page of [`AbsurdClient::list_tasks`].
#[derive(Debug, Clone, Default)]
pub struct ListOptions {
    /// Lists only tasks in this state.
    pub state: Option<State>,
    /// Lists only tasks of this name.
    pub task_name: Option<String>,
    /// Longest page, 1 to 1,000 tasks; 0 means 100.
    pub page_size: i32,
    /// Token of the page before; empty for the first page.
    pub page_token: String,
}

/// Outcome of a cancellation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CancelOutcome {
    /// Whether this call cancelled the task.
    pub cancelled: bool,
    /// State of the task after the call.
    pub state: State,
}

/// A task that was found by a part of its id, or by the id of one of its runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskMatch {
    /// Name of its queue.
    pub queue: String,
    /// Id of the task.
    pub task_id: Uuid,
    /// Name of the handler.
    pub task_name: String,
    /// State when the search read it.
    pub state: State,
    /// Time of the spawn.
    pub enqueue_at: Option<SystemTime>,
}

/// The tasks that a search has found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundTasks {
    /// The tasks, newest first.
    pub tasks: Vec<TaskMatch>,
    /// Whether these are all tasks that match. False when the limit was reached, when a queue has older tasks that were
    /// not searched, when a queue could not be read, or when the time was over.
    pub complete: bool,
}

/// Scope and limit of a search.
#[derive(Debug, Clone, Default)]
pub struct FindOptions {
    /// Name of the queue to search; `None` means all queues.
    pub queue: Option<String>,
    /// Maximum number of tasks, 1 to 100; 0 means 20.
    pub limit: i32,
}

impl AbsurdClient {
    /// Lists a page of a task's runs, in the order of their attempts. `page_size` is 1 to 1,000; 0 means 100. Payloads
    /// over 1.25 MiB are left out.
    pub async fn list_runs(&self, task_id: Uuid, page_size: i32, page_token: &str) -> Result<Page<Run>, Error> {
        let request = pb::ListRunsRequest {
            queue: self.queue(),
            task_id: task_id.to_string(),
            page_size,
            page_token: page_token.to_owned(),
        };
        let response = rpc!(self.list_runs(request))?;
        Ok(Page {
            items: response.runs.into_iter().map(Run::from_wire).collect::<Result<_, _>>()?,
            next_page_token: response.next_page_token,
        })
    }

    /// Finds tasks by the beginning or the end of their ids (6 or more hexadecimal digits), or by the whole id of a
    /// task or run.
    pub async fn find_tasks(&self, text: &str, options: FindOptions) -> Result<FoundTasks, Error> {
        let request =
            pb::FindRequest { queue: options.queue.unwrap_or_default(), text: text.to_owned(), limit: options.limit };
        let response = rpc!(self.find(request))?;
        let found = |task: pb::TaskMatch| {
            Ok(TaskMatch {
                task_id: wire::id(&task.task_id)?,
                state: State::from_wire(task.state).ok_or_else(wire::unclear)?,
                queue: task.queue,
                task_name: task.task_name,
                enqueue_at: wire::time(task.enqueue_at),
            })
        };
        let tasks = response.tasks.into_iter().map(found).collect::<Result<_, Error>>()?;
        Ok(FoundTasks { tasks, complete: response.complete })
    }

    /// Cancels the task of a run, but only while that run is pending or sleeping.
    pub async fn cancel_task(&self, run_id: Uuid) -> Result<CancelOutcome, Error> {
        self.cancel(pb::cancel_task_request::Target::RunId(run_id.to_string())).await
    }

    /// Cancels a task that has not ended, even while a worker runs it.
    pub async fn cancel_task_by_id(&self, task_id: Uuid) -> Result<CancelOutcome, Error> {
        self.cancel(pb::cancel_task_request::Target::TaskId(task_id.to_string())).await
    }

    async fn cancel(&self, target: pb::cancel_task_request::Target) -> Result<CancelOutcome, Error> {
        let request = pb::CancelTaskRequest { queue: self.queue(), target: Some(target) };
        let response = rpc!(self.cancel_task(request))?;
        let state = State::from_wire(response.state).ok_or_else(wire::unclear)?;
        Ok(CancelOutcome { cancelled: response.cancelled, state })
    }

    /// Gives a failed task another attempt, or spawns a copy of it.
    pub async fn retry_task(&self, task_id: Uuid, options: RetryOptions) -> Result<Spawned, Error> {
        let request = pb::RetryTaskRequest {
            queue: self.queue(),
            task_id: task_id.to_string(),
            spawn_new: options.spawn_new,
            max_attempts: options.max_attempts,
            request_id: Some(Uuid::now_v7().to_string()),
        };
        Spawned::from_wire(rpc!(self.retry_task(request))?.task)
    }

    /// Reads a task as stored, however large; `None` when there is no such task.
    pub async fn get_task_status(&self, task_id: Uuid) -> Result<Option<Task>, Error> {
        let ask = |params_range, result_range| pb::GetTaskStatusRequest {
            queue: self.queue(),
            task_id: task_id.to_string(),
            params_range,
            result_range,
        };
        let request = ask(None, None);
        let response = match rpc!(self.get_task_status(request)) {
            Ok(response) => response,
            Err(error) if error.reason() == Reason::TaskNotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut task = response.task.ok_or_else(wire::unclear)?;
        if task.params_omitted {
            let mut parts = Parts::of(response.params_length);
            while let Some(range) = parts.wanted() {
                let request = ask(Some(range), None);
                parts.push(rpc!(self.get_task_status(request))?.task.and_then(|task| task.params))?;
            }
            task.params = Some(parts.whole().into_wire());
        }
        if task.completed_payload_omitted {
            let mut parts = Parts::of(response.result_length);
            while let Some(range) = parts.wanted() {
                let request = ask(None, Some(range));
                parts.push(rpc!(self.get_task_status(request))?.task.and_then(|task| task.completed_payload))?;
            }
            task.completed_payload = Some(parts.whole().into_wire());
        }
        Task::from_wire(task).map(Some)
    }

    /// Reads a run as stored; `None` when there is no such run.
    pub async fn get_run_status(&self, run_id: Uuid) -> Result<Option<Run>, Error> {
        let request = pb::GetRunStatusRequest { queue: self.queue(), run_id: run_id.to_string() };
        match rpc!(self.get_run_status(request)) {
            Ok(response) => response.run.map(Run::from_wire).transpose(),
            Err(error) if error.reason() == Reason::RunNotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads the state and the result of a task at this time.
    pub async fn get_task_result(&self, task_id: Uuid) -> Result<TaskResult, Error> {
        let ask =
            |result_range| pb::GetTaskResultRequest { queue: self.queue(), task_id: task_id.to_string(), result_range };
        let request = ask(None);
        let mut now = rpc!(self.get_task_result(request))?.result.unwrap_or_default();
        if now.omitted {
            let mut parts = Parts::of(now.length);
            while let Some(range) = parts.wanted() {
                let request = ask(Some(range));
                let part = rpc!(self.get_task_result(request))?.result.unwrap_or_default();
                parts.push(part.result.or(part.failure_reason))?;
            }
            let whole = Some(parts.whole().into_wire());
            match State::from_wire(now.state) {
                Some(State::Failed) => now.failure_reason = whole,
                _ => now.result = whole,
            }
        }
        TaskResult::from_wire(now)
    }

    /// Waits until a task has ended; without a `timeout`, for ever. The error is [`Reason::DeadlineExceeded`] when the
    /// timeout passes first.
    pub async fn await_task_result(&self, task_id: Uuid, timeout: Option<Duration>) -> Result<TaskResult, Error> {
        let until = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let slice =
                until.map_or(AWAIT_SLICE, |until| until.saturating_duration_since(Instant::now()).min(AWAIT_SLICE));
            let request = pb::AwaitTaskResultRequest {
                queue: self.queue(),
                task_id: task_id.to_string(),
                timeout: Some(wire::duration(slice)),
            };
            let limit = slice + self.limit();
            let send = |mut grpc: Grpc, request| async move { grpc.await_task_result(request).await };
            let response = self.call(request, limit, send).await?;
            if response.done {
                let end = response.result.unwrap_or_default();
                return if end.omitted { self.get_task_result(task_id).await } else { TaskResult::from_wire(end) };
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                return Err(Error::deadline());
            }
        }
    }

    /// Lists a page of tasks, newest first.
    pub async fn list_tasks(&self, options: ListOptions) -> Result<Page<TaskSummary>, Error> {
        let request = pb::ListTasksRequest {
            queue: self.queue(),
            page_size: options.page_size,
            page_token: options.page_token,
            state: options.state.map_or(pb::State::Unspecified, State::to_wire).into(),
            task_name: options.task_name,
        };
        let response = rpc!(self.list_tasks(request))?;
        Ok(Page {
            items: response.tasks.into_iter().map(TaskSummary::from_wire).collect::<Result<_, _>>()?,
            next_page_token: response.next_page_token,
        })
    }
}
