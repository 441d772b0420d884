//! `AbsurdService`: each RPC parses, calls the engine and renders.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use absurd_proto::v1 as pb;
use absurd_proto::v1::absurd_service_server::AbsurdService;
use tokio::time::Instant;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::claim_stream::{self, Responses};
use super::convert::{
    self, chosen_id, duration_between, new_task, pb_spawned, pb_state, pb_verdict, run_ref, scope, settle_item,
    state_filter, timestamp,
};
use super::status::status;
use crate::dispatch::state::StreamOptions;
use crate::dispatch::verdict;
use crate::domain::id::parse_uuid;
use crate::domain::{Error, SessionId, Settled, Verdict, WorkerId};
use crate::engine::Engine;
use crate::scope::Scope;
use crate::store::batch::{RunRef, Write};
use crate::store::policy::Old;
use crate::store::queue::COUNT_MAX;

/// Items of one batch at most.
const BATCH_MAX: usize = 1000;
/// Tokens that a reconnecting stream may hold.
const HELD_MAX: usize = 10_000;
/// Task names of a filter.
const NAMES_MAX: usize = 100;
/// Time of a call that names no deadline.
const DEADLINE: Duration = Duration::from_secs(30);
/// Longest wait for a result or a claim.
const AWAIT_MAX: Duration = Duration::from_secs(600);
const CLAIM_WAIT_MAX: Duration = Duration::from_secs(60);
/// What gRPC clients decode unless told otherwise.
const MESSAGE_DEFAULT: usize = 4 * 1024 * 1024;

/// Bounds of what comes in.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of params, a result, a checkpoint.
    pub payload_bytes_max: usize,
    /// Bytes of headers.
    pub headers_bytes_max: usize,
    /// Refuse per-run calls without a token.
    pub require_claim_token: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self { payload_bytes_max: 1024 * 1024, headers_bytes_max: 64 * 1024, require_claim_token: false }
    }
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Service {
    pub(super) engine: Arc<Engine>,
    pub(super) limits: Limits,
}

type Reply<T> = Result<Response<T>, Status>;

fn reply<T>(outcome: Result<T, Error>) -> Reply<T> {
    outcome.map(Response::new).map_err(|error| status(&error))
}

/// When a call must be answered: a little before the transport would cut it off, which it does with another code.
fn deadline<T>(request: &Request<T>) -> Instant {
    let asked = request.metadata().get("grpc-timeout").and_then(|value| value.to_str().ok()).and_then(timeout);
    Instant::now() + asked.map_or(DEADLINE, |asked| asked.saturating_sub((asked / 10).min(Duration::from_millis(20))))
}

/// `grpc-timeout`: up to eight digits and a unit.
fn timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let amount: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(amount.checked_mul(3600)?),
        "M" => Duration::from_secs(amount.checked_mul(60)?),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return None,
    })
}

pub(super) fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).min(DEADLINE)
}

async fn in_time<T>(deadline: Instant, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    tokio::time::timeout_at(deadline, work).await.unwrap_or(Err(Error::DeadlineExceeded))
}

fn batch_size(field: &str, size: usize) -> Result<(), Error> {
    if size == 0 || size > BATCH_MAX {
        return Err(Error::invalid(field, format!("must hold 1 to {BATCH_MAX} items, not {size}")));
    }
    Ok(())
}

pub(super) fn page_size(asked: i32) -> Result<i64, Error> {
    match asked {
        0 => Ok(100),
        1..=1000 => Ok(asked.into()),
        _ => Err(Error::invalid("page_size", "must be 0 to 1,000")),
    }
}

fn names(asked: Vec<String>) -> Result<Arc<[String]>, Error> {
    if asked.len() > NAMES_MAX {
        return Err(Error::invalid("task_names", format!("must hold at most {NAMES_MAX} names")));
    }
    let mut names = Vec::with_capacity(asked.len());
    for (index, name) in asked.into_iter().enumerate() {
        crate::domain::TaskName::parse(&format!("task_names[{index}]"), &name)?;
        names.push(name);
    }
    names.sort();
    names.dedup();
    Ok(names.into())
}

fn message_bytes(asked: i32) -> Result<usize, Error> {
    match usize::try_from(asked) {
        Ok(0) => Ok(MESSAGE_DEFAULT),
        Ok(bytes) if bytes >= 16 * 1024 => Ok(bytes.min(64 * 1024 * 1024)),
        _ => Err(Error::invalid("max_message_bytes", "must be 0 or at least 16384")),
    }
}

fn stream_options(request: &pb::ClaimStreamRequest) -> Result<StreamOptions, Error> {
    let max_in_flight = match request.max_in_flight {
        0 => 1,
        asked @ 1..=10_000 => usize::try_from(asked).unwrap_or(1),
        _ => return Err(Error::invalid("max_in_flight", "must be 0 to 10,000")),
    };
    if request.worker_id.is_empty() {
        return Err(Error::invalid("worker_id", "must not be empty"));
    }
    if request.held_claim_tokens.len() > HELD_MAX {
        return Err(Error::invalid("held_claim_tokens", format!("must hold at most {HELD_MAX} tokens")));
    }
    let lease_seconds = convert::lease("claim_timeout", request.claim_timeout, false)?;
    let second = Duration::from_secs(1);
    let lease = Duration::from_secs(lease_seconds.into());
    Ok(StreamOptions {
        worker_id: WorkerId::parse("worker_id", &request.worker_id)?,
        session_id: SessionId::parse("session_id", &request.session_id)?,
        max_in_flight,
        lease_seconds,
        start_deadline: duration_between("start_deadline", request.start_deadline, second, lease)?,
        reconnect_grace: duration_between("reconnect_grace", request.reconnect_grace, second, AWAIT_MAX)?,
        names: names(request.task_names.clone())?,
        max_message_bytes: message_bytes(request.max_message_bytes)?,
        accepts_omitted_params: request.accepts_omitted_params,
    })
}

fn pull_options(request: pb::ClaimTaskRequest) -> Result<(StreamOptions, Duration), Error> {
    let quantity = match request.qty {
        0 => 1,
        asked @ 1..=1000 => usize::try_from(asked).unwrap_or(1),
        _ => return Err(Error::invalid("qty", "must be 0 to 1,000")),
    };
    let lease_seconds = convert::lease("claim_timeout", request.claim_timeout, true)?;
    let lease = if lease_seconds == 0 { convert::LEASE_MAX } else { Duration::from_secs(lease_seconds.into()) };
    let wait = duration_between("wait", request.wait, Duration::ZERO, CLAIM_WAIT_MAX)?.unwrap_or_default();
    let options = StreamOptions {
        worker_id: WorkerId::parse("worker_id", &request.worker_id)?,
        session_id: SessionId::parse("session_id", "")?,
        max_in_flight: quantity,
        lease_seconds,
        start_deadline: duration_between("start_deadline", request.start_deadline, Duration::from_secs(1), lease)?,
        reconnect_grace: None,
        names: names(request.task_names)?,
        max_message_bytes: message_bytes(request.max_message_bytes)?,
        accepts_omitted_params: request.accepts_omitted_params,
    };
    Ok((options, wait))
}

impl Service {
    /// The service over an engine.
    pub fn new(engine: Arc<Engine>, limits: Limits) -> Self {
        Self { engine, limits }
    }

    pub(super) async fn existing(&self, queue: &str) -> Result<Scope, Error> {
        let scope = scope(queue)?;
        let (_, usable) = self.engine.store.queue_get(&scope).await?;
        if usable { Ok(scope) } else { Err(Error::QueueNotFound(queue.to_owned())) }
    }

    async fn settle_one(
        &self,
        queue: &str,
        run: Result<RunRef, Error>,
        write: Result<Write, Error>,
        deadline: Instant,
    ) -> Result<Settled, Error> {
        let scope = scope(queue)?;
        self.engine.settle(&scope, run?, write?, deadline).await
    }

    fn run(&self, run_id: &str, token: Option<&str>) -> Result<RunRef, Error> {
        run_ref(run_id, token, &self.limits).map(|(run, _)| run)
    }

    /// Items of different runs go into shared batches; several items of one run go in order, in one transaction.
    async fn settle_many(
        &self,
        scope: &Scope,
        items: Vec<Result<(RunRef, Write), Error>>,
        deadline: Instant,
    ) -> Vec<Result<Settled, Error>> {
        let mut outcomes: Vec<Option<Result<Settled, Error>>> = items.iter().map(|_| None).collect();
        let mut by_run: HashMap<Uuid, Vec<(usize, RunRef, Write)>> = HashMap::new();
        for (index, item) in items.into_iter().enumerate() {
            match item {
                Ok((run, write)) => by_run.entry(run.run_id).or_default().push((index, run, write)),
                Err(error) => outcomes[index] = Some(Err(error)),
            }
        }
        let work = by_run.into_values().map(|mut group| async move {
            if let [_] = group.as_slice() {
                let Some((index, run, write)) = group.pop() else { return Vec::new() };
                return vec![(index, self.engine.settle(scope, run, write, deadline).await)];
            }
            self.settle_group(scope, group, deadline).await
        });
        for (index, outcome) in futures_util::future::join_all(work).await.into_iter().flatten() {
            outcomes[index] = Some(outcome);
        }
        outcomes.into_iter().map(|outcome| outcome.unwrap_or(Err(Error::ItemSkipped))).collect()
    }

    async fn settle_group(
        &self,
        scope: &Scope,
        group: Vec<(usize, RunRef, Write)>,
        deadline: Instant,
    ) -> Vec<(usize, Result<Settled, Error>)> {
        let indexes: Vec<usize> = group.iter().map(|(index, _, _)| *index).collect();
        let run = group[0].1.clone();
        let writes = group.into_iter().map(|(_, _, write)| write).collect();
        let outcomes = self.engine.settle_in_order(scope, run, writes, deadline).await;
        indexes.into_iter().zip(outcomes).collect()
    }

    /// One verdict per claim.
    async fn verdicts(
        &self,
        scope: &Scope,
        claims: Vec<pb::ClaimRef>,
        write: impl Fn(Option<&crate::domain::ClaimToken>) -> Result<Write, Error>,
        done: Verdict,
        deadline: Instant,
    ) -> Result<Vec<pb::ClaimVerdict>, Error> {
        batch_size("claims", claims.len())?;
        let mut items = Vec::with_capacity(claims.len());
        for claim in &claims {
            let item = match run_ref(&claim.run_id, claim.claim_token.as_deref(), &self.limits) {
                Ok((run, token)) => Ok((run, write(token.as_ref())?)),
                Err(error) => Err(error),
            };
            items.push(item);
        }
        let outcomes = self.settle_many(scope, items, deadline).await;
        Ok(claims
            .into_iter()
            .zip(outcomes)
            .map(|(claim, outcome)| pb::ClaimVerdict {
                claim_token: claim.claim_token.unwrap_or_default(),
                verdict: pb_verdict(outcome.as_ref().map_or_else(verdict, |_| done)),
                claim_expires_at: outcome.ok().and_then(|settled| settled.claim_expires_at).and_then(timestamp),
            })
            .collect())
    }

    async fn open_stream(&self, request: pb::ClaimStreamRequest) -> Result<Responses, Error> {
        let options = stream_options(&request)?;
        let scope = self.existing(&request.queue).await?;
        self.engine.hang_doorbells(&[scope.queue().as_str()]).await;
        let (stream, opened) = self.engine.dispatcher.open(&scope, options.clone(), request.held_claim_tokens).await?;
        let heartbeat = self.engine.dispatcher.options().heartbeat;
        let opened = claim_stream::opened(opened, &options, heartbeat, self.engine.hints.replica_id());
        Ok(Responses::new(scope, stream, opened))
    }

    async fn cancel(&self, request: pb::CancelTaskRequest, deadline: Instant) -> Result<pb::CancelTaskResponse, Error> {
        use pb::cancel_task_request::Target;
        let scope = scope(&request.queue)?;
        let (cancelled, state, task_id) = match &request.target {
            Some(Target::TaskId(id)) => {
                let task_id = parse_uuid("task_id", id)?;
                let (cancelled, state) = self.engine.cancel_task(&scope, task_id, left(deadline)).await?;
                (cancelled, state, task_id)
            }
            Some(Target::RunId(id)) => {
                self.engine.cancel_run(&scope, parse_uuid("run_id", id)?, left(deadline)).await?
            }
            None => return Err(Error::invalid("target", "task_id or run_id must be set")),
        };
        Ok(pb::CancelTaskResponse { cancelled, state: pb_state(state), task_id: task_id.to_string() })
    }

    async fn retry(&self, request: pb::RetryTaskRequest) -> Result<pb::RetryTaskResponse, Error> {
        let scope = scope(&request.queue)?;
        let task_id = parse_uuid("task_id", &request.task_id)?;
        if request.max_attempts.is_some_and(|attempts| attempts < 1) {
            return Err(Error::invalid("max_attempts", "must be at least 1"));
        }
        let store = &self.engine.store;
        let id = match &request.request_id {
            Some(id) => chosen_id("request_id", id, store)?,
            None => store.mint_id(),
        };
        let spawned = if request.spawn_new {
            store.task_respawn(&scope, task_id, id, store.mint_id(), request.max_attempts).await?
        } else {
            store.task_retry(&scope, task_id, id, request.max_attempts).await?
        };
        if spawned.fresh {
            self.engine.new_work(&scope);
        }
        Ok(pb::RetryTaskResponse { task: Some(pb_spawned(&spawned)) })
    }

    async fn await_result(
        &self,
        request: pb::AwaitTaskResultRequest,
        deadline: Instant,
    ) -> Result<pb::AwaitTaskResultResponse, Error> {
        let scope = scope(&request.queue)?;
        let task_id = parse_uuid("task_id", &request.task_id)?;
        let timeout = duration_between("timeout", request.timeout, Duration::ZERO, AWAIT_MAX)?.unwrap_or(DEADLINE);
        let now = self.engine.store.task_result(&scope, task_id).await?;
        if now.state.is_some_and(crate::domain::State::is_terminal) || timeout.is_zero() {
            let done = now.state.is_some_and(crate::domain::State::is_terminal);
            return Ok(pb::AwaitTaskResultResponse { done, result: Some(convert::pb_task_end(now)) });
        }
        let until = (Instant::now() + timeout).min(deadline);
        match self.engine.waits.wait(scope.queue(), task_id, until).await? {
            Some(end) if end.state.is_some() => {
                Ok(pb::AwaitTaskResultResponse { done: true, result: Some(convert::pb_task_end(end)) })
            }
            Some(_) => Err(Error::TaskNotFound(task_id)),
            None => {
                let end = self.engine.store.task_result(&scope, task_id).await?;
                let done = end.state.is_some_and(crate::domain::State::is_terminal);
                Ok(pb::AwaitTaskResultResponse { done, result: Some(convert::pb_task_end(end)) })
            }
        }
    }

    async fn stats(&self, queue: &str) -> Result<pb::GetQueueStatsResponse, Error> {
        let scope = scope(queue)?;
        let row = self.engine.store.queue_stats(&scope).await?;
        let count = |column: &str| row.get::<_, i64>(column);
        let counts = ["pending", "sleeping", "running", "failed", "completed", "cancelled"].map(count);
        let oldest: Option<i64> = row.get("oldest_ms");
        Ok(pb::GetQueueStatsResponse {
            pending: counts[0],
            sleeping: counts[1],
            running: counts[2],
            failed_runs: counts[3],
            completed: counts[4],
            cancelled: counts[5],
            capped: counts.iter().any(|count| *count >= COUNT_MAX),
            oldest_claimable_age: oldest
                .map(|ms| convert::pb_duration(Duration::from_millis(ms.max(0).unsigned_abs()))),
            streams: i32::try_from(self.engine.dispatcher.stream_count(scope.queue())).unwrap_or(i32::MAX),
        })
    }

    async fn list_tasks_page(&self, request: pb::ListTasksRequest) -> Result<pb::ListTasksResponse, Error> {
        let scope = scope(&request.queue)?;
        let limit = page_size(request.page_size)?;
        let before =
            if request.page_token.is_empty() { Uuid::max() } else { parse_uuid("page_token", &request.page_token)? };
        let state = state_filter(request.state)?;
        let (rows, next) =
            self.engine.store.task_list(&scope, before, state, request.task_name.as_deref(), limit).await?;
        Ok(pb::ListTasksResponse {
            tasks: rows.iter().map(convert::pb_task_summary).collect(),
            next_page_token: next.map(|id| id.to_string()).unwrap_or_default(),
        })
    }

    async fn list_queues_page(&self, request: pb::ListQueuesRequest) -> Result<pb::ListQueuesResponse, Error> {
        let limit = page_size(request.page_size)?;
        if request.page_token.contains('\0') || request.page_token.len() > 1024 {
            return Err(Error::invalid("page_token", "is not a token of this service"));
        }
        let rows = self
            .engine
            .store
            .queue_list(None, &request.page_token, limit)
            .await
            .map_err(|fault| Error::Unavailable(format!("{fault:?}")))?;
        let queues: Vec<pb::Queue> = rows.iter().map(convert::pb_queue).collect();
        let full = i64::try_from(queues.len()).is_ok_and(|count| count == limit);
        let next_page_token = queues.last().filter(|_| full).map(|queue| queue.name.clone()).unwrap_or_default();
        Ok(pb::ListQueuesResponse { queues, next_page_token })
    }

    async fn create(&self, request: pb::CreateQueueRequest) -> Result<pb::CreateQueueResponse, Error> {
        let scope = scope(&request.queue)?;
        let mode = match pb::StorageMode::try_from(request.storage_mode) {
            Ok(pb::StorageMode::Unspecified | pb::StorageMode::Unpartitioned) => "unpartitioned",
            Ok(pb::StorageMode::Partitioned) => "partitioned",
            Err(_) => return Err(Error::invalid("storage_mode", "is not a known mode")),
        };
        let created = self.engine.store.queue_create(&scope, mode).await?;
        self.engine.hang_doorbells(&[scope.queue().as_str()]).await;
        Ok(pb::CreateQueueResponse { created })
    }

    async fn task_status(&self, request: pb::GetTaskStatusRequest) -> Result<pb::GetTaskStatusResponse, Error> {
        let scope = scope(&request.queue)?;
        let task_id = parse_uuid("task_id", &request.task_id)?;
        let range = match request.params_range {
            None => None,
            Some(range) if range.offset < 0 || !(1..=1_000_000).contains(&range.limit) => {
                return Err(Error::invalid(
                    "params_range",
                    "offset must not be negative, limit must be 1 to 1,000,000",
                ));
            }
            Some(range) => Some((range.offset, range.limit)),
        };
        let row = self.engine.store.task_get(&scope, task_id, range).await?;
        Ok(pb::GetTaskStatusResponse { task: Some(convert::pb_task(&row)), params_length: row.get("params_length") })
    }
}

#[tonic::async_trait]
impl AbsurdService for Service {
    type ClaimStreamStream = Responses;

    async fn create_queue(&self, request: Request<pb::CreateQueueRequest>) -> Reply<pb::CreateQueueResponse> {
        reply(in_time(deadline(&request), self.create(request.into_inner())).await)
    }

    async fn drop_queue(&self, request: Request<pb::DropQueueRequest>) -> Reply<pb::DropQueueResponse> {
        let deadline = deadline(&request);
        let work = async {
            let scope = scope(&request.into_inner().queue)?;
            let dropped = self.engine.store.queue_drop(&scope).await?;
            self.engine.dispatcher.drop_queue(scope.queue());
            Ok(pb::DropQueueResponse { dropped })
        };
        reply(in_time(deadline, work).await)
    }

    async fn list_queues(&self, request: Request<pb::ListQueuesRequest>) -> Reply<pb::ListQueuesResponse> {
        reply(in_time(deadline(&request), self.list_queues_page(request.into_inner())).await)
    }

    async fn get_queue_stats(&self, request: Request<pb::GetQueueStatsRequest>) -> Reply<pb::GetQueueStatsResponse> {
        reply(in_time(deadline(&request), self.stats(&request.get_ref().queue)).await)
    }

    async fn spawn_task(&self, request: Request<pb::SpawnTaskRequest>) -> Reply<pb::SpawnTaskResponse> {
        let deadline = deadline(&request);
        let request = request.into_inner();
        let work = async {
            let scope = scope(&request.queue)?;
            let task = request.task.ok_or_else(|| Error::invalid("task", "must be set"))?;
            let task = new_task(task, &self.limits, &self.engine.store).map_err(|error| error.within("task"))?;
            let spawned = self.engine.spawn(&scope, task, deadline).await?;
            Ok(pb::SpawnTaskResponse { task: Some(pb_spawned(&spawned)) })
        };
        reply(work.await)
    }

    async fn spawn_tasks(&self, request: Request<pb::SpawnTasksRequest>) -> Reply<pb::SpawnTasksResponse> {
        let deadline = deadline(&request);
        let request = request.into_inner();
        let work = async {
            let scope = scope(&request.queue)?;
            batch_size("tasks", request.tasks.len())?;
            let mut tasks = Vec::with_capacity(request.tasks.len());
            for (index, task) in request.tasks.into_iter().enumerate() {
                let task = new_task(task, &self.limits, &self.engine.store);
                tasks.push(task.map_err(|error| error.within(&format!("tasks[{index}]")))?);
            }
            let spawned = self.engine.spawn_all(&scope, tasks, deadline).await?;
            Ok(pb::SpawnTasksResponse { tasks: spawned.iter().map(pb_spawned).collect() })
        };
        reply(work.await)
    }

    async fn claim_stream(&self, request: Request<pb::ClaimStreamRequest>) -> Reply<Responses> {
        reply(self.open_stream(request.into_inner()).await)
    }

    async fn claim_task(&self, request: Request<pb::ClaimTaskRequest>) -> Reply<pb::ClaimTaskResponse> {
        let deadline = deadline(&request);
        let request = request.into_inner();
        let work = async {
            let scope = self.existing(&request.queue).await?;
            let (options, wait) = pull_options(request)?;
            // A claim must be answered before the caller gives up, or it is lost on the way.
            let wait = wait.min(left(deadline).saturating_sub(Duration::from_millis(50)).max(Duration::from_millis(1)));
            let wait = if options.max_in_flight == 0 { Duration::ZERO } else { wait };
            let claims = self.engine.dispatcher.pull(&scope, options, wait).await?;
            let tasks = claims.into_iter().map(|claim| convert::pb_claim(&scope, claim)).collect();
            Ok(pb::ClaimTaskResponse { tasks })
        };
        reply(work.await)
    }

    async fn complete_task(&self, request: Request<pb::CompleteTaskRequest>) -> Reply<pb::CompleteTaskResponse> {
        let deadline = deadline(&request);
        let request = request.into_inner();
        let run = self.run(&request.run_id, request.claim_token.as_deref());
        let write = convert::complete(request.result, &self.limits);
        let settled = self.settle_one(&request.queue, run, write, deadline).await;
        reply(settled.map(|settled| pb::CompleteTaskResponse { replayed: settled.replayed }))
    }

    async fn fail_task(&self, request: Request<pb::FailTaskRequest>) -> Reply<pb::FailTaskResponse> {
        let deadline = deadline(&request);
        let request = request.into_inner();
        let run = self.run(&request.run_id, request.claim_token.as_deref());
        let write = convert::fail(request.reason, request.retry_at.as_ref());
        let settled = self.settle_one(&request.queue, run, write, deadline).await;
        reply(settled.map(|settled| pb::FailTaskResponse { outcome: convert::pb_fail_outcome(&settled) }))
    }

    async fn settle_tasks(&self, request: Request<pb::SettleTasksRequest>) -> Reply<pb::SettleTasksResponse> {
        let deadline = deadline(&request);
        let request = request.into_inner();
        let work = async {
            let scope = scope(&request.queue)?;
            batch_size("items", request.items.len())?;
            let items = request.items.into_iter().enumerate().map(|(index, item)| {
                settle_item(item, &self.limits).map_err(|error| error.within(&format!("items[{index}]")))
            });
            let outcomes = self.settle_many(&scope, items.collect(), deadline).await;
            // A missing queue is one error, not a thousand.
            if let Some(Err(error @ Error::QueueNotFound(_))) = outcomes.first() {
                return Err(error.clone());
            }
            Ok(pb::SettleTasksResponse { results: outcomes.iter().map(convert::pb_settle_result).collect() })
        };
        reply(work.await)
    }

    async fn extend_claim(&self, request: Request<pb::ExtendClaimRequest>) -> Reply<pb::ExtendClaimResponse> {
        let deadline = deadline(&request);
        let request = request.into_inner();
        let run = self.run(&request.run_id, request.claim_token.as_deref());
        let settled = self.settle_one(&request.queue, run, convert::extend(request.extend_by), deadline).await;
        reply(
            settled.map(|settled| pb::ExtendClaimResponse {
                claim_expires_at: settled.claim_expires_at.and_then(timestamp),
            }),
        )
    }

    async fn extend_claims(&self, request: Request<pb::ExtendClaimsRequest>) -> Reply<pb::ExtendClaimsResponse> {
        let deadline = deadline(&request);
        let request = request.into_inner();
        let work = async {
            let scope = scope(&request.queue)?;
            let extend_by = request.extend_by;
            let write = |token: Option<&crate::domain::ClaimToken>| match (extend_by, token) {
                (None, Some(token)) => {
                    let seconds = i32::try_from(token.lease_seconds.max(1)).unwrap_or(i32::MAX);
                    Ok(Write::Extend { seconds })
                }
                (extend_by, _) => convert::extend(extend_by),
            };
            let verdicts = self.verdicts(&scope, request.claims, write, Verdict::Held, deadline).await?;
            Ok(pb::ExtendClaimsResponse { verdicts })
        };
        reply(work.await)
    }

    async fn release_claims(&self, request: Request<pb::ReleaseClaimsRequest>) -> Reply<pb::ReleaseClaimsResponse> {
        let deadline = deadline(&request);
        let request = request.into_inner();
        let work = async {
            let scope = scope(&request.queue)?;
            let delay = request.delay;
            let write = |token: Option<&crate::domain::ClaimToken>| convert::release(delay, token);
            let verdicts = self.verdicts(&scope, request.claims, write, Verdict::Released, deadline).await?;
            Ok(pb::ReleaseClaimsResponse { verdicts })
        };
        reply(work.await)
    }

    async fn drain_worker(&self, request: Request<pb::DrainWorkerRequest>) -> Reply<pb::DrainWorkerResponse> {
        let request = request.into_inner();
        let drain = || {
            let scope = scope(&request.queue)?;
            if request.session_id.is_empty() {
                return Err(Error::invalid("session_id", "must not be empty"));
            }
            let session = SessionId::parse("session_id", &request.session_id)?;
            let ended = self.engine.dispatcher.drain(scope.queue(), &session);
            self.engine.hints.drain(scope.queue(), &session);
            Ok(pb::DrainWorkerResponse { ended })
        };
        reply(drain())
    }

    async fn create_workflow_run(
        &self,
        request: Request<pb::CreateWorkflowRunRequest>,
    ) -> Reply<pb::CreateWorkflowRunResponse> {
        reply(in_time(deadline(&request), self.create_workflow(request.into_inner())).await)
    }

    async fn update_workflow_run_status(
        &self,
        request: Request<pb::UpdateWorkflowRunStatusRequest>,
    ) -> Reply<pb::UpdateWorkflowRunStatusResponse> {
        reply(in_time(deadline(&request), self.update_workflow(request.into_inner())).await)
    }

    async fn get_workflow_run(&self, request: Request<pb::GetWorkflowRunRequest>) -> Reply<pb::GetWorkflowRunResponse> {
        reply(in_time(deadline(&request), self.one_workflow(request.into_inner())).await)
    }

    async fn list_workflow_runs(
        &self,
        request: Request<pb::ListWorkflowRunsRequest>,
    ) -> Reply<pb::ListWorkflowRunsResponse> {
        reply(in_time(deadline(&request), self.workflows(request.into_inner())).await)
    }

    async fn get_queue_policy(&self, request: Request<pb::GetQueuePolicyRequest>) -> Reply<pb::GetQueuePolicyResponse> {
        let read = in_time(deadline(&request), self.policy(&request.get_ref().queue)).await;
        reply(read.map(|policy| pb::GetQueuePolicyResponse { policy: Some(policy) }))
    }

    async fn set_queue_policy(&self, request: Request<pb::SetQueuePolicyRequest>) -> Reply<pb::SetQueuePolicyResponse> {
        let changed = in_time(deadline(&request), self.change_policy(request.into_inner())).await;
        reply(changed.map(|policy| pb::SetQueuePolicyResponse { policy: Some(policy) }))
    }

    async fn cleanup_tasks(&self, request: Request<pb::CleanupTasksRequest>) -> Reply<pb::CleanupTasksResponse> {
        let deadline = deadline(&request);
        let request = request.into_inner();
        let work = self.cleanup(&request.queue, Old::Tasks, request.ttl, request.limit);
        reply(in_time(deadline, work).await.map(|deleted| pb::CleanupTasksResponse { deleted }))
    }

    async fn cleanup_events(&self, request: Request<pb::CleanupEventsRequest>) -> Reply<pb::CleanupEventsResponse> {
        let deadline = deadline(&request);
        let request = request.into_inner();
        let work = self.cleanup(&request.queue, Old::Events, request.ttl, request.limit);
        reply(in_time(deadline, work).await.map(|deleted| pb::CleanupEventsResponse { deleted }))
    }

    async fn set_checkpoint(&self, request: Request<pb::SetCheckpointRequest>) -> Reply<pb::SetCheckpointResponse> {
        let deadline = deadline(&request);
        reply(in_time(deadline, self.put_checkpoint(request.into_inner(), deadline)).await)
    }

    async fn save_checkpoint_for_run(
        &self,
        request: Request<pb::SaveCheckpointForRunRequest>,
    ) -> Reply<pb::SaveCheckpointForRunResponse> {
        let deadline = deadline(&request);
        let request = request.into_inner();
        let write = pb::SetCheckpointRequest {
            queue: request.queue,
            run_id: request.run_id,
            claim_token: request.claim_token,
            task_id: request.task_id,
            checkpoint_name: request.checkpoint_name,
            state: request.data,
            extend_by: None,
        };
        let stored = in_time(deadline, self.put_checkpoint(write, deadline)).await;
        reply(stored.map(|stored| pb::SaveCheckpointForRunResponse { applied: stored.applied }))
    }

    async fn get_checkpoint(&self, request: Request<pb::GetCheckpointRequest>) -> Reply<pb::GetCheckpointResponse> {
        reply(in_time(deadline(&request), self.one_checkpoint(request.into_inner())).await)
    }

    async fn get_all_checkpoints(
        &self,
        request: Request<pb::GetAllCheckpointsRequest>,
    ) -> Reply<pb::GetAllCheckpointsResponse> {
        reply(in_time(deadline(&request), self.all_checkpoints(request.into_inner())).await)
    }

    async fn get_checkpoints_for_run(
        &self,
        request: Request<pb::GetCheckpointsForRunRequest>,
    ) -> Reply<pb::GetCheckpointsForRunResponse> {
        reply(in_time(deadline(&request), self.checkpoints_of_run(request.into_inner())).await)
    }

    async fn get_run_checkpoint(
        &self,
        request: Request<pb::GetRunCheckpointRequest>,
    ) -> Reply<pb::GetRunCheckpointResponse> {
        reply(in_time(deadline(&request), self.one_checkpoint_of_run(request.into_inner())).await)
    }

    async fn await_event(&self, request: Request<pb::AwaitEventRequest>) -> Reply<pb::AwaitEventResponse> {
        let deadline = deadline(&request);
        reply(in_time(deadline, self.await_one(request.into_inner(), deadline)).await)
    }

    async fn wait_for_event(&self, request: Request<pb::WaitForEventRequest>) -> Reply<pb::WaitForEventResponse> {
        use pb::await_event_response::Outcome;
        use pb::wait_for_event_response::Outcome as Waited;
        let deadline = deadline(&request);
        let request = request.into_inner();
        if request.timeout.is_none() {
            return reply(Err(Error::invalid("timeout", "must be set: there is no default on purpose")));
        }
        let wait = pb::AwaitEventRequest {
            queue: request.queue,
            run_id: request.run_id,
            claim_token: request.claim_token,
            step_name: request.step_name,
            event_name: request.event_name,
            timeout: request.timeout,
        };
        let waited = in_time(deadline, self.await_one(wait, deadline)).await;
        reply(waited.map(|waited| pb::WaitForEventResponse {
            outcome: waited.outcome.map(|outcome| match outcome {
                Outcome::Payload(json) => Waited::Payload(json),
                Outcome::Suspended(suspended) => Waited::Suspended(suspended),
                Outcome::TimedOut(timed_out) => Waited::TimedOut(timed_out),
            }),
        }))
    }

    async fn schedule_task(&self, request: Request<pb::ScheduleTaskRequest>) -> Reply<pb::ScheduleTaskResponse> {
        let deadline = deadline(&request);
        reply(in_time(deadline, self.schedule(request.into_inner(), deadline)).await)
    }

    async fn sleep(&self, request: Request<pb::SleepRequest>) -> Reply<pb::SleepResponse> {
        let deadline = deadline(&request);
        reply(in_time(deadline, self.sleep_step(request.into_inner(), deadline)).await)
    }

    async fn set_run_sleeping(&self, request: Request<pb::SetRunSleepingRequest>) -> Reply<pb::SetRunSleepingResponse> {
        let deadline = deadline(&request);
        reply(in_time(deadline, self.put_to_sleep(request.into_inner(), deadline)).await)
    }

    async fn emit_event(&self, request: Request<pb::EmitEventRequest>) -> Reply<pb::EmitEventResponse> {
        let deadline = deadline(&request);
        reply(in_time(deadline, self.emit(request.into_inner(), deadline)).await)
    }

    async fn cancel_task(&self, request: Request<pb::CancelTaskRequest>) -> Reply<pb::CancelTaskResponse> {
        let deadline = deadline(&request);
        reply(in_time(deadline, self.cancel(request.into_inner(), deadline)).await)
    }

    async fn retry_task(&self, request: Request<pb::RetryTaskRequest>) -> Reply<pb::RetryTaskResponse> {
        reply(in_time(deadline(&request), self.retry(request.into_inner())).await)
    }

    async fn get_task_status(&self, request: Request<pb::GetTaskStatusRequest>) -> Reply<pb::GetTaskStatusResponse> {
        reply(in_time(deadline(&request), self.task_status(request.into_inner())).await)
    }

    async fn get_run_status(&self, request: Request<pb::GetRunStatusRequest>) -> Reply<pb::GetRunStatusResponse> {
        let deadline = deadline(&request);
        let request = request.into_inner();
        let work = async {
            let scope = scope(&request.queue)?;
            let run = self.engine.store.run_get(&scope, parse_uuid("run_id", &request.run_id)?).await?;
            Ok(pb::GetRunStatusResponse { run: Some(convert::pb_run(&run.row)) })
        };
        reply(in_time(deadline, work).await)
    }

    async fn get_task_result(&self, request: Request<pb::GetTaskResultRequest>) -> Reply<pb::GetTaskResultResponse> {
        let deadline = deadline(&request);
        let request = request.into_inner();
        let work = async {
            let scope = scope(&request.queue)?;
            let task_id = parse_uuid("task_id", &request.task_id)?;
            let end = self.engine.store.task_result(&scope, task_id).await?;
            Ok(pb::GetTaskResultResponse { result: Some(convert::pb_task_end(end)) })
        };
        reply(in_time(deadline, work).await)
    }

    async fn await_task_result(
        &self,
        request: Request<pb::AwaitTaskResultRequest>,
    ) -> Reply<pb::AwaitTaskResultResponse> {
        let deadline = match request.metadata().contains_key("grpc-timeout") {
            true => deadline(&request),
            false => Instant::now() + AWAIT_MAX + DEADLINE,
        };
        reply(self.await_result(request.into_inner(), deadline).await)
    }

    async fn list_tasks(&self, request: Request<pb::ListTasksRequest>) -> Reply<pb::ListTasksResponse> {
        reply(in_time(deadline(&request), self.list_tasks_page(request.into_inner())).await)
    }
}
