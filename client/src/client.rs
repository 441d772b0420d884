//! `AbsurdClient`: the methods of the service, one call each.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime};

use absurd_proto::v1 as pb;
use absurd_proto::v1::absurd_service_client::AbsurdServiceClient;
use serde::Serialize;
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use crate::backoff::Backoff;
use crate::claimed::ClaimedTask;
use crate::connect::{ConnectOptions, MESSAGE_BYTES_MAX};
use crate::registry::Registry;
use crate::replicas::Replicas;
use crate::settle::Settler;
use crate::stream::{ClaimStream, StreamOptions};
use crate::task::{self, Awaited, Checkpoint, FailOutcome, NewTask, SpawnOptions, Spawned, State, TaskResult};
use crate::{Error, Json};

/// One call of the service, repeated until the client's deadline where its failure is passing.
macro_rules! rpc {
    ($client:ident.$method:ident($request:ident)) => {
        $client
            .call($request, $client.limit(), |mut grpc: $crate::client::Grpc, request| async move {
                grpc.$method(request).await
            })
            .await
    };
}
pub(crate) use rpc;

/// The generated client of one replica.
pub(crate) type Grpc = AbsurdServiceClient<Channel>;

/// Queue of a client that names none and finds none in `ABSURD_DEFAULT_QUEUE`.
pub const DEFAULT_QUEUE: &str = "default";
/// Longest wait that one `AwaitTaskResult` call asks for.
const AWAIT_SLICE: Duration = Duration::from_secs(60);
/// Tasks of one `SpawnTasks` call.
const SPAWN_MAX: usize = 1000;

/// Access to one queue of the service. Cheap to clone; all clones share one connection.
///
/// Every call is a transaction of its own. Calls are repeated until the deadline where repeating them is safe; the
/// claim tokens of runs that were claimed through this client are shown without the caller's doing.
#[derive(Debug, Clone)]
pub struct AbsurdClient {
    queue: Arc<str>,
    worker_id: Arc<str>,
    pub(crate) shared: Arc<Shared>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) replicas: Replicas,
    pub(crate) settler: Settler,
    pub(crate) registry: Registry,
    pub(crate) next_stream: AtomicU64,
    deadline: Duration,
}

/// How to claim once.
#[derive(Debug, Clone)]
pub struct ClaimOptions {
    /// Lease; zero never ends.
    pub claim_timeout: Duration,
    /// Tasks at most, 1 to 1,000.
    pub qty: i32,
    /// Wait this long for a first task.
    pub wait: Duration,
    /// Only tasks of these names; empty: all.
    pub task_names: Vec<String>,
}

impl Default for ClaimOptions {
    fn default() -> Self {
        Self { claim_timeout: Duration::from_secs(30), qty: 1, wait: Duration::ZERO, task_names: Vec::new() }
    }
}

/// How to retry a failed task.
#[derive(Debug, Clone, Default)]
pub struct RetryOptions {
    /// Spawn a copy instead of giving the task another attempt.
    pub spawn_new: bool,
    /// New limit; None: one more than now.
    pub max_attempts: Option<i32>,
}

/// Which tasks to list.
#[derive(Debug, Clone, Default)]
pub struct ListOptions {
    /// Only in this state.
    pub state: Option<State>,
    /// Only of this name.
    pub task_name: Option<String>,
    /// At most this many in the page, 1 to 1,000; 0: 100.
    pub page_size: i32,
    /// Token of the page before.
    pub page_token: String,
}

impl AbsurdClient {
    /// A client that connects when it is first used. The queue is `ABSURD_DEFAULT_QUEUE`, else `default`; the worker id
    /// is `ABSURD_WORKER_ID`, else host and process.
    pub fn connect(options: &ConnectOptions) -> Result<Self, Error> {
        let replicas = options.replicas()?;
        let from_env = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let queue = from_env("ABSURD_DEFAULT_QUEUE").unwrap_or_else(|| DEFAULT_QUEUE.into());
        let worker_id = from_env("ABSURD_WORKER_ID").unwrap_or_else(|| format!("rust:{}", std::process::id()));
        Ok(Self {
            queue: queue.into(),
            worker_id: worker_id.into(),
            shared: Arc::new(Shared {
                settler: Settler::new(replicas.clone()),
                replicas,
                registry: Registry::default(),
                next_stream: AtomicU64::new(1),
                deadline: options.deadline,
            }),
        })
    }

    /// The same client on another queue.
    #[must_use]
    pub fn with_queue(&self, queue: impl Into<Arc<str>>) -> Self {
        Self { queue: queue.into(), ..self.clone() }
    }

    /// The same client with another worker id.
    #[must_use]
    pub fn with_worker_id(&self, worker_id: impl Into<Arc<str>>) -> Self {
        Self { worker_id: worker_id.into(), ..self.clone() }
    }

    /// The queue.
    pub fn queue_name(&self) -> &str {
        &self.queue
    }

    /// The worker id.
    pub fn worker_id(&self) -> &str {
        &self.worker_id
    }

    /// Longest time of a call.
    pub(crate) fn limit(&self) -> Duration {
        self.shared.deadline
    }

    pub(crate) fn deadline(&self) -> Instant {
        Instant::now() + self.shared.deadline
    }

    /// Calls until the answer is one that repeating would not change, or the deadline passes.
    pub(crate) async fn call<Q, R, F>(
        &self,
        request: Q,
        limit: Duration,
        send: impl Fn(Grpc, Request<Q>) -> F,
    ) -> Result<R, Error>
    where
        Q: Clone,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let deadline = Instant::now() + limit;
        let mut backoff = Backoff::call();
        loop {
            let mut attempt = Request::new(request.clone());
            let left = deadline.saturating_duration_since(Instant::now());
            attempt.set_timeout(left.max(Duration::from_millis(1)));
            let asked = self.shared.replicas.ask();
            let error = match send(asked.grpc(), attempt).await {
                Ok(response) => {
                    asked.worked();
                    return Ok(response.into_inner());
                }
                Err(status) => Error::from(status),
            };
            let wait = if asked.failed(&error) { Duration::ZERO } else { backoff.after(&error) };
            if !error.is_passing() || Instant::now() + wait >= deadline {
                return Err(error);
            }
            tokio::time::sleep(wait).await;
        }
    }

    fn queue(&self) -> String {
        self.queue.as_ref().to_owned()
    }

    /// Creates the queue if it is missing; says whether it was.
    pub async fn create_queue(&self) -> Result<bool, Error> {
        let request = pb::CreateQueueRequest { queue: self.queue(), ..Default::default() };
        Ok(rpc!(self.create_queue(request))?.created)
    }

    /// Creates the queue with weekly partitions if it is missing; says whether it was.
    pub async fn create_partitioned_queue(&self) -> Result<bool, Error> {
        let mut request = pb::CreateQueueRequest { queue: self.queue(), ..Default::default() };
        request.set_storage_mode(pb::StorageMode::Partitioned);
        Ok(rpc!(self.create_queue(request))?.created)
    }

    /// Drops the queue with all its tasks; says whether there was one.
    pub async fn drop_queue(&self) -> Result<bool, Error> {
        let request = pb::DropQueueRequest { queue: self.queue() };
        Ok(rpc!(self.drop_queue(request))?.dropped)
    }

    /// All queues, by name.
    pub async fn list_queues(&self) -> Result<Vec<pb::Queue>, Error> {
        let mut queues = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = pb::ListQueuesRequest { page_size: 1000, page_token };
            let page = rpc!(self.list_queues(request))?;
            queues.extend(page.queues);
            if page.next_page_token.is_empty() {
                return Ok(queues);
            }
            page_token = page.next_page_token;
        }
    }

    /// Counts of the queue.
    pub async fn get_queue_stats(&self) -> Result<pb::GetQueueStatsResponse, Error> {
        let request = pb::GetQueueStatsRequest { queue: self.queue() };
        rpc!(self.get_queue_stats(request))
    }

    /// Spawns a task. The client chooses its id, so that a repeated call makes one task.
    pub async fn spawn_task<P: Serialize + ?Sized>(
        &self,
        task_name: &str,
        params: &P,
        options: SpawnOptions,
    ) -> Result<Spawned, Error> {
        self.spawn_new_task(NewTask::new(task_name, params, options)?).await
    }

    /// Spawns a task that is put together already.
    pub async fn spawn_new_task(&self, task: NewTask) -> Result<Spawned, Error> {
        let request = pb::SpawnTaskRequest { queue: self.queue(), task: Some(task.wire) };
        Spawned::from_wire(rpc!(self.spawn_task(request))?.task)
    }

    /// Spawns up to 1,000 tasks, all or none.
    pub async fn spawn_tasks(&self, tasks: Vec<NewTask>) -> Result<Vec<Spawned>, Error> {
        if tasks.len() > SPAWN_MAX {
            return Err(Error::argument("tasks", format!("must hold at most {SPAWN_MAX} tasks")));
        }
        let tasks = tasks.into_iter().map(|task| task.wire).collect();
        let request = pb::SpawnTasksRequest { queue: self.queue(), tasks };
        let response = rpc!(self.spawn_tasks(request))?;
        response.tasks.into_iter().map(|task| Spawned::from_wire(Some(task))).collect()
    }

    /// Claims once. The caller keeps the leases ([`AbsurdClient::extend_claim`]). Not repeated on failure: a claim whose
    /// answer was lost comes back when its lease ends.
    pub async fn claim_task(&self, options: ClaimOptions) -> Result<Vec<ClaimedTask>, Error> {
        let mut request = Request::new(pb::ClaimTaskRequest {
            queue: self.queue(),
            worker_id: self.worker_id.as_ref().to_owned(),
            qty: options.qty,
            claim_timeout: Some(task::duration(options.claim_timeout)),
            wait: Some(task::duration(options.wait)),
            start_deadline: None,
            task_names: options.task_names,
            max_message_bytes: i32::try_from(MESSAGE_BYTES_MAX).unwrap_or(i32::MAX),
            accepts_omitted_params: false,
        });
        request.set_timeout(options.wait + self.shared.deadline);
        let asked = self.shared.replicas.ask();
        let response = asked.grpc().claim_task(request).await.map_err(|status| {
            let error = Error::from(status);
            asked.failed(&error);
            error
        })?;
        let response = response.into_inner();
        response.tasks.into_iter().map(|task| ClaimedTask::new(self, task, None)).collect()
    }

    /// Opens a stream on which tasks arrive. Waits for the first answer of the server, whose refusals (a wrong option, an
    /// unknown queue) are errors; afterwards the stream reconnects by itself until it is closed.
    pub async fn claim_stream(&self, options: StreamOptions) -> Result<ClaimStream, Error> {
        ClaimStream::open(self, options).await
    }

    pub(crate) async fn settle(
        &self,
        run_id: Uuid,
        token: Option<String>,
        action: pb::settle_item::Action,
    ) -> Result<pb::SettleResult, Error> {
        use pb::settle_item::Action;
        let ends = matches!(action, Action::Complete(_) | Action::Fail(_) | Action::Release(_));
        let token = token.or_else(|| self.shared.registry.token(run_id));
        let item = pb::SettleItem { run_id: run_id.to_string(), claim_token: token.clone(), action: Some(action) };
        let outcome = self.shared.settler.submit(&self.queue, item, self.deadline()).await;
        let over = match &outcome {
            Ok(_) => ends,
            Err(error) => error.is_claim_over(),
        };
        if over {
            self.shared.registry.remove(run_id, token.as_deref());
        }
        outcome
    }

    /// Completes a run. Repeating it is harmless.
    pub async fn complete_task<T: Serialize + ?Sized>(&self, run_id: Uuid, result: &T) -> Result<(), Error> {
        let result = Some(Json::of(result)?.into_wire());
        let action = pb::settle_item::Action::Complete(pb::CompleteAction { result });
        self.settle(run_id, None, action).await.map(drop)
    }

    /// Fails a run: the task is retried as its strategy says. `reason` is by convention an object with `name`,
    /// `message` and `traceback`.
    pub async fn fail_task<T: Serialize + ?Sized>(&self, run_id: Uuid, reason: &T) -> Result<FailOutcome, Error> {
        let reason = Some(Json::of(reason)?.into_wire());
        let action = pb::settle_item::Action::Fail(pb::FailAction { reason, retry_at: None });
        FailOutcome::from_wire(self.settle(run_id, None, action).await?.fail)
    }

    /// Moves the end of a lease to now + `extend_by`.
    pub async fn extend_claim(&self, run_id: Uuid, extend_by: Duration) -> Result<(), Error> {
        let extend_by = Some(task::duration(extend_by));
        self.settle(run_id, None, pb::settle_item::Action::Extend(pb::ExtendAction { extend_by })).await.map(drop)
    }

    /// Gives a claim back without using up an attempt; the run is offered again after `delay`, at most an hour.
    pub async fn release_claim(&self, run_id: Uuid, delay: Duration) -> Result<(), Error> {
        let delay = Some(task::duration(delay));
        self.settle(run_id, None, pb::settle_item::Action::Release(pb::ReleaseAction { delay })).await.map(drop)
    }

    /// Reads how the queue is kept.
    pub async fn get_queue_policy(&self) -> Result<pb::QueuePolicy, Error> {
        let request = pb::GetQueuePolicyRequest { queue: self.queue() };
        rpc!(self.get_queue_policy(request))?.policy.ok_or_else(task::unclear)
    }

    /// Changes how the queue is kept: what is None or unspecified in `changes` stays; its queue is this client's. Returns
    /// the whole policy.
    pub async fn set_queue_policy(&self, changes: pb::SetQueuePolicyRequest) -> Result<pb::QueuePolicy, Error> {
        let request = pb::SetQueuePolicyRequest { queue: self.queue(), ..changes };
        rpc!(self.set_queue_policy(request))?.policy.ok_or_else(task::unclear)
    }

    /// Deletes up to `limit` tasks that ended longer ago than `ttl`, the oldest first; says how many.
    pub async fn cleanup_tasks(&self, ttl: Duration, limit: i32) -> Result<i32, Error> {
        let request = pb::CleanupTasksRequest { queue: self.queue(), ttl: Some(task::duration(ttl)), limit };
        Ok(rpc!(self.cleanup_tasks(request))?.deleted)
    }

    /// Deletes up to `limit` events that were emitted longer ago than `ttl`, the oldest first; says how many.
    pub async fn cleanup_events(&self, ttl: Duration, limit: i32) -> Result<i32, Error> {
        let request = pb::CleanupEventsRequest { queue: self.queue(), ttl: Some(task::duration(ttl)), limit };
        Ok(rpc!(self.cleanup_events(request))?.deleted)
    }

    /// Stores the result of a step; says whether it was taken: a newer attempt's value is never replaced by an older one's.
    /// `extend_claim_by` extends the lease too.
    pub async fn set_checkpoint<T: Serialize + ?Sized>(
        &self,
        task_id: Uuid,
        step_name: &str,
        state: &T,
        owner_run: Uuid,
        extend_claim_by: Option<Duration>,
    ) -> Result<bool, Error> {
        let request = pb::SetCheckpointRequest {
            queue: self.queue(),
            run_id: owner_run.to_string(),
            claim_token: self.shared.registry.token(owner_run),
            task_id: task_id.to_string(),
            checkpoint_name: step_name.to_owned(),
            state: Some(Json::of(state)?.into_wire()),
            extend_by: extend_claim_by.map(task::duration),
        };
        Ok(rpc!(self.set_checkpoint(request))?.applied)
    }

    /// Stores the result of a step of a run.
    pub async fn save_checkpoint_for_run<T: Serialize + ?Sized>(
        &self,
        run_id: Uuid,
        step_name: &str,
        data: &T,
        task_id: Option<Uuid>,
    ) -> Result<bool, Error> {
        let request = pb::SaveCheckpointForRunRequest {
            queue: self.queue(),
            run_id: run_id.to_string(),
            claim_token: self.shared.registry.token(run_id),
            checkpoint_name: step_name.to_owned(),
            data: Some(Json::of(data)?.into_wire()),
            task_id: task_id.map(|id| id.to_string()).unwrap_or_default(),
        };
        Ok(rpc!(self.save_checkpoint_for_run(request))?.applied)
    }

    /// Reads one checkpoint of a task, whoever wrote it.
    pub async fn get_checkpoint(
        &self,
        task_id: Uuid,
        step_name: &str,
        include_pending: bool,
    ) -> Result<Option<Checkpoint>, Error> {
        let request = pb::GetCheckpointRequest {
            queue: self.queue(),
            task_id: task_id.to_string(),
            checkpoint_name: step_name.to_owned(),
            include_pending,
        };
        let response = rpc!(self.get_checkpoint(request))?;
        response.checkpoint.map(Checkpoint::from_wire).transpose()
    }

    /// Reads all checkpoints that a run may see, oldest first: its own and those of earlier attempts. To resume from.
    pub async fn get_all_checkpoints(&self, task_id: Uuid, run_id: Uuid) -> Result<Vec<Checkpoint>, Error> {
        let mut all = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = pb::GetAllCheckpointsRequest {
                queue: self.queue(),
                task_id: task_id.to_string(),
                run_id: run_id.to_string(),
                page_size: 1000,
                page_token,
            };
            let page = rpc!(self.get_all_checkpoints(request))?;
            for checkpoint in page.checkpoints {
                all.push(Checkpoint::from_wire(checkpoint)?);
            }
            if page.next_page_token.is_empty() {
                return Ok(all);
            }
            page_token = page.next_page_token;
        }
    }

    /// Reads all checkpoints that a run itself has written, oldest first. Not the read to resume from: it does not see
    /// those of earlier attempts.
    pub async fn get_checkpoints_for_run(&self, run_id: Uuid) -> Result<Vec<Checkpoint>, Error> {
        let mut all = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = pb::GetCheckpointsForRunRequest {
                queue: self.queue(),
                run_id: run_id.to_string(),
                page_size: 1000,
                page_token,
            };
            let page = rpc!(self.get_checkpoints_for_run(request))?;
            for checkpoint in page.checkpoints {
                all.push(Checkpoint::from_wire(checkpoint)?);
            }
            if page.next_page_token.is_empty() {
                return Ok(all);
            }
            page_token = page.next_page_token;
        }
    }

    /// Reads one checkpoint that a run itself has written.
    pub async fn get_run_checkpoint(&self, run_id: Uuid, step_name: &str) -> Result<Option<Checkpoint>, Error> {
        let request = pb::GetRunCheckpointRequest {
            queue: self.queue(),
            run_id: run_id.to_string(),
            checkpoint_name: step_name.to_owned(),
        };
        let response = rpc!(self.get_run_checkpoint(request))?;
        response.checkpoint.map(Checkpoint::from_wire).transpose()
    }

    /// Waits for an event, as a step with the name `step_name`. When the run is put to sleep its claim is over.
    pub async fn await_event(
        &self,
        run_id: Uuid,
        step_name: &str,
        event_name: &str,
        timeout: Option<Duration>,
    ) -> Result<Awaited, Error> {
        self.await_for(run_id, self.shared.registry.token(run_id), step_name, event_name, timeout).await
    }

    pub(crate) async fn await_for(
        &self,
        run_id: Uuid,
        claim_token: Option<String>,
        step_name: &str,
        event_name: &str,
        timeout: Option<Duration>,
    ) -> Result<Awaited, Error> {
        let request = pb::AwaitEventRequest {
            queue: self.queue(),
            run_id: run_id.to_string(),
            claim_token: claim_token.clone(),
            step_name: step_name.to_owned(),
            event_name: event_name.to_owned(),
            timeout: timeout.map(task::duration),
        };
        let outcome = rpc!(self.await_event(request)).and_then(Awaited::from_wire);
        self.over_when(run_id, claim_token.as_deref(), &outcome, |awaited| {
            matches!(awaited, Awaited::Suspended { .. })
        });
        outcome
    }

    /// Sleeps, as a step with the name `step_name` (empty: `sleep_` and the seconds); None: the time is over. Else the run
    /// sleeps, its claim is over, and this is when it can be claimed again.
    pub async fn sleep(&self, run_id: Uuid, step_name: &str, duration: Duration) -> Result<Option<SystemTime>, Error> {
        use pb::sleep_response::Outcome;
        let claim_token = self.shared.registry.token(run_id);
        let request = pb::SleepRequest {
            queue: self.queue(),
            run_id: run_id.to_string(),
            claim_token: claim_token.clone(),
            step_name: step_name.to_owned(),
            duration: Some(task::duration(duration)),
        };
        let outcome = rpc!(self.sleep(request));
        self.over_when(run_id, claim_token.as_deref(), &outcome, |response| {
            matches!(response.outcome, Some(Outcome::Suspended(_)))
        });
        match outcome?.outcome {
            Some(Outcome::Suspended(suspended)) => {
                suspended.wake_at.and_then(task::system_time).map(Some).ok_or_else(task::unclear)
            }
            Some(Outcome::Elapsed(_)) => Ok(None),
            None => Err(task::unclear()),
        }
    }

    /// Moves a run to a time: one that this process holds (its claim is over then), one that is pending, or one that sleeps
    /// until a time.
    pub async fn schedule_task(&self, run_id: Uuid, wake_at: SystemTime) -> Result<(), Error> {
        let claim_token = self.shared.registry.token(run_id);
        let request = pb::ScheduleTaskRequest {
            queue: self.queue(),
            run_id: run_id.to_string(),
            claim_token: claim_token.clone(),
            when: Some(pb::schedule_task_request::When::WakeAt(wake_at.into())),
        };
        let outcome = rpc!(self.schedule_task(request));
        self.over_when(run_id, claim_token.as_deref(), &outcome, |_| true);
        outcome.map(drop)
    }

    /// Puts a run to sleep until an event, when its wait is registered already; returns when it wakes all the same.
    pub async fn set_run_sleeping(&self, run_id: Uuid, event_name: &str) -> Result<Option<SystemTime>, Error> {
        let claim_token = self.shared.registry.token(run_id);
        let request = pb::SetRunSleepingRequest {
            queue: self.queue(),
            run_id: run_id.to_string(),
            claim_token: claim_token.clone(),
            event_name: event_name.to_owned(),
        };
        let outcome = rpc!(self.set_run_sleeping(request));
        self.over_when(run_id, claim_token.as_deref(), &outcome, |_| true);
        Ok(outcome?.wake_at.and_then(task::system_time))
    }

    /// Forgets a claim that a call has ended, or that the server says is over.
    fn over_when<R>(&self, run_id: Uuid, token: Option<&str>, outcome: &Result<R, Error>, ends: impl Fn(&R) -> bool) {
        if outcome.as_ref().map_or_else(Error::is_claim_over, ends) {
            self.shared.registry.remove(run_id, token);
        }
    }

    /// Emits an event; says whether this was the first time, and how many runs it woke.
    pub async fn emit_event<P: Serialize + ?Sized>(&self, event_name: &str, payload: &P) -> Result<(bool, i64), Error> {
        let payload = Some(Json::of(payload)?.into_wire());
        let request = pb::EmitEventRequest { queue: self.queue(), event_name: event_name.to_owned(), payload };
        let response = rpc!(self.emit_event(request))?;
        Ok((response.applied, response.woken))
    }

    /// Cancels a task that has not ended; says whether this call did it, and the task's state.
    pub async fn cancel_task(&self, task_id: Uuid) -> Result<(bool, State), Error> {
        self.cancel(pb::cancel_task_request::Target::TaskId(task_id.to_string())).await
    }

    /// Cancels the task of a run, only while that run is pending or sleeping.
    pub async fn cancel_run(&self, run_id: Uuid) -> Result<(bool, State), Error> {
        self.cancel(pb::cancel_task_request::Target::RunId(run_id.to_string())).await
    }

    async fn cancel(&self, target: pb::cancel_task_request::Target) -> Result<(bool, State), Error> {
        let request = pb::CancelTaskRequest { queue: self.queue(), target: Some(target) };
        let response = rpc!(self.cancel_task(request))?;
        Ok((response.cancelled, State::from_wire(response.state).ok_or_else(task::unclear)?))
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

    /// The task, as stored; None: there is none.
    pub async fn get_task_status(&self, task_id: Uuid) -> Result<Option<pb::Task>, Error> {
        let request =
            pb::GetTaskStatusRequest { queue: self.queue(), task_id: task_id.to_string(), params_range: None };
        match rpc!(self.get_task_status(request)) {
            Ok(response) => Ok(response.task),
            Err(error) if error.reason() == crate::Reason::TaskNotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The run, as stored; None: there is none.
    pub async fn get_run_status(&self, run_id: Uuid) -> Result<Option<pb::Run>, Error> {
        let request = pb::GetRunStatusRequest { queue: self.queue(), run_id: run_id.to_string() };
        match rpc!(self.get_run_status(request)) {
            Ok(response) => Ok(response.run),
            Err(error) if error.reason() == crate::Reason::RunNotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// State and result of a task, as of now.
    pub async fn get_task_result(&self, task_id: Uuid) -> Result<TaskResult, Error> {
        let request = pb::GetTaskResultRequest { queue: self.queue(), task_id: task_id.to_string() };
        TaskResult::from_wire(rpc!(self.get_task_result(request))?.result)
    }

    /// Waits until a task has ended, for ever when `timeout` is None. `DeadlineExceeded` when the time is up.
    pub async fn await_task_result(&self, task_id: Uuid, timeout: Option<Duration>) -> Result<TaskResult, Error> {
        let until = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let slice =
                until.map_or(AWAIT_SLICE, |until| until.saturating_duration_since(Instant::now()).min(AWAIT_SLICE));
            let request = pb::AwaitTaskResultRequest {
                queue: self.queue(),
                task_id: task_id.to_string(),
                timeout: Some(task::duration(slice)),
            };
            let limit = slice + self.shared.deadline;
            let send = |mut grpc: Grpc, request| async move { grpc.await_task_result(request).await };
            let response = self.call(request, limit, send).await?;
            if response.done {
                return TaskResult::from_wire(response.result);
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                return Err(Error::deadline());
            }
        }
    }

    /// A page of tasks, newest first, and the token of the next page (empty on the last).
    pub async fn list_tasks(&self, options: ListOptions) -> Result<(Vec<pb::TaskSummary>, String), Error> {
        let request = pb::ListTasksRequest {
            queue: self.queue(),
            page_size: options.page_size,
            page_token: options.page_token,
            state: options.state.map_or(pb::State::Unspecified, State::to_wire).into(),
            task_name: options.task_name,
        };
        let response = rpc!(self.list_tasks(request))?;
        Ok((response.tasks, response.next_page_token))
    }
}
