//! `AbsurdService`: gives each RPC its deadline, calls its implementation, and turns errors into statuses. The
//! implementations are in the files beside this one, by topic.

use std::sync::Arc;
use std::time::Duration;

use absurd_proto::v1 as pb;
use absurd_proto::v1::absurd_service_server::AbsurdService;
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use super::claim_stream::Responses;
use super::claims::pull_options;
use super::convert::{self, new_task, pb_spawned, run_ref, scope, settle_item, timestamp};
use super::deadline::{deadline, deadline_of_wait, left, patient};
use super::limits::Limits;
use super::status::status;
use crate::domain::id::parse_uuid;
use crate::domain::{Error, SessionId, Verdict};
use crate::engine::Engine;
use crate::scope::Scope;
use crate::store::batch::{RunRef, Write};
use crate::store::policy::Old;

/// Longest wait for a result, and longest reconnect grace of a stream.
pub(super) const AWAIT_MAX: Duration = Duration::from_secs(600);

/// The implementation of the service.
#[derive(Debug, Clone)]
pub struct Service {
    pub(super) engine: Arc<Engine>,
    pub(super) limits: Limits,
}

type Reply<T> = Result<Response<T>, Status>;

fn reply<T>(outcome: Result<T, Error>) -> Reply<T> {
    outcome.map(Response::new).map_err(|error| status(&error))
}

pub(super) async fn in_time<T>(deadline: Instant, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    tokio::time::timeout_at(deadline, work).await.unwrap_or(Err(Error::DeadlineExceeded))
}

impl Service {
    /// Answers calls with this engine.
    pub fn new(engine: Arc<Engine>, limits: Limits) -> Self {
        Self { engine, limits }
    }

    pub(super) async fn existing(&self, queue: &str) -> Result<Scope, Error> {
        let scope = scope(queue)?;
        let (_, usable) = self.engine.store.queue_get(&scope).await?;
        if usable { Ok(scope) } else { Err(Error::QueueNotFound(queue.to_owned())) }
    }

    fn run(&self, run_id: &str, token: Option<&str>) -> Result<RunRef, Error> {
        run_ref(run_id, token, &self.limits).map(|(run, _)| run)
    }
}

#[tonic::async_trait]
impl AbsurdService for Service {
    type ClaimStreamStream = Responses;

    async fn create_queue(&self, request: Request<pb::CreateQueueRequest>) -> Reply<pb::CreateQueueResponse> {
        let deadline = deadline(&request);
        let request = request.into_inner();
        reply(patient(deadline, || self.create(request.clone())).await)
    }

    async fn drop_queue(&self, request: Request<pb::DropQueueRequest>) -> Reply<pb::DropQueueResponse> {
        let deadline = deadline(&request);
        let queue = request.into_inner().queue;
        let work = async || {
            let scope = scope(&queue)?;
            let dropped = self.engine.store.queue_drop(&scope).await?;
            self.engine.dispatcher.drop_queue(scope.queue());
            Ok(pb::DropQueueResponse { dropped })
        };
        reply(patient(deadline, work).await)
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
            let workflow = task.workflow_run_id.clone();
            let task = new_task(task, &self.limits, &self.engine.store).map_err(|error| error.within("task"))?;
            let spawned = self.engine.spawn(&scope, task, deadline).await?;
            Ok(pb::SpawnTaskResponse { task: Some(pb_spawned(&spawned, workflow.as_deref())) })
        };
        reply(work.await)
    }

    async fn spawn_tasks(&self, request: Request<pb::SpawnTasksRequest>) -> Reply<pb::SpawnTasksResponse> {
        let deadline = deadline(&request);
        let request = request.into_inner();
        let work = async {
            let scope = scope(&request.queue)?;
            self.limits.batch("tasks", request.tasks.len())?;
            let workflows: Vec<_> = request.tasks.iter().map(|task| task.workflow_run_id.clone()).collect();
            let mut tasks = Vec::with_capacity(request.tasks.len());
            for (index, task) in request.tasks.into_iter().enumerate() {
                let task = new_task(task, &self.limits, &self.engine.store);
                tasks.push(task.map_err(|error| error.within(&format!("tasks[{index}]")))?);
            }
            let spawned = self.engine.spawn_all(&scope, tasks, deadline).await?;
            let ids = spawned.iter().zip(&workflows).map(|(ids, workflow)| pb_spawned(ids, workflow.as_deref()));
            Ok(pb::SpawnTasksResponse { tasks: ids.collect() })
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
            self.engine.in_use.polled(scope.queue());
            // The claims must be answered before the caller gives up; otherwise they are lost on the way.
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
        let write = convert::fail(request.reason, request.retry_at.as_ref(), request.no_retry);
        let settled = self.settle_one(&request.queue, run, write, deadline).await;
        reply(settled.map(|settled| pb::FailTaskResponse { outcome: convert::pb_fail_outcome(&settled) }))
    }

    async fn settle_tasks(&self, request: Request<pb::SettleTasksRequest>) -> Reply<pb::SettleTasksResponse> {
        let deadline = deadline(&request);
        let request = request.into_inner();
        let work = async {
            let scope = scope(&request.queue)?;
            self.limits.batch("items", request.items.len())?;
            let items = request.items.into_iter().enumerate().map(|(index, item)| {
                settle_item(item, &self.limits).map_err(|error| error.within(&format!("items[{index}]")))
            });
            let outcomes = self.settle_many(&scope, items.collect(), deadline).await;
            // A missing queue fails the whole call, not each item.
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
        let deadline = deadline(&request);
        let request = request.into_inner();
        let changed = patient(deadline, || self.change_policy(request.clone())).await;
        reply(changed.map(|policy| pb::SetQueuePolicyResponse { policy: Some(policy) }))
    }

    async fn cleanup_tasks(&self, request: Request<pb::CleanupTasksRequest>) -> Reply<pb::CleanupTasksResponse> {
        let deadline = deadline(&request);
        let request = request.into_inner();
        let work = || self.cleanup(&request.queue, Old::Tasks, request.ttl, request.limit);
        reply(patient(deadline, work).await.map(|deleted| pb::CleanupTasksResponse { deleted }))
    }

    async fn cleanup_events(&self, request: Request<pb::CleanupEventsRequest>) -> Reply<pb::CleanupEventsResponse> {
        let deadline = deadline(&request);
        let request = request.into_inner();
        let work = || self.cleanup(&request.queue, Old::Events, request.ttl, request.limit);
        reply(patient(deadline, work).await.map(|deleted| pb::CleanupEventsResponse { deleted }))
    }

    async fn set_checkpoint(&self, request: Request<pb::SetCheckpointRequest>) -> Reply<pb::SetCheckpointResponse> {
        let deadline = deadline(&request);
        reply(in_time(deadline, self.put_checkpoint(request.into_inner(), "state", deadline)).await)
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
        let stored = in_time(deadline, self.put_checkpoint(write, "data", deadline)).await;
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
            task_id: request.task_id,
        };
        let waited = in_time(deadline, self.await_one(wait, deadline)).await;
        reply(waited.map(|waited| pb::WaitForEventResponse {
            outcome: waited.outcome.map(|outcome| match outcome {
                Outcome::Payload(json) => Waited::Payload(json),
                Outcome::Suspended(suspended) => Waited::Suspended(suspended),
                Outcome::TimedOut(timed_out) => Waited::TimedOut(timed_out),
                Outcome::PayloadOmitted(omitted) => Waited::PayloadOmitted(omitted),
            }),
        }))
    }

    async fn await_task(&self, request: Request<pb::AwaitTaskRequest>) -> Reply<pb::AwaitTaskResponse> {
        let deadline = deadline(&request);
        reply(in_time(deadline, self.await_end(request.into_inner(), deadline)).await)
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
        let request = request.into_inner();
        reply(patient(deadline, || self.cancel(request.clone(), deadline)).await)
    }

    async fn retry_task(&self, request: Request<pb::RetryTaskRequest>) -> Reply<pb::RetryTaskResponse> {
        let deadline = deadline(&request);
        let request = request.into_inner();
        reply(patient(deadline, || self.retry(request.clone())).await)
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
            let part = convert::part("result_range", request.result_range)?;
            let end = self.engine.store.task_result(&scope, task_id, part).await?;
            Ok(pb::GetTaskResultResponse { result: Some(convert::pb_task_end(end)) })
        };
        reply(in_time(deadline, work).await)
    }

    async fn await_task_result(
        &self,
        request: Request<pb::AwaitTaskResultRequest>,
    ) -> Reply<pb::AwaitTaskResultResponse> {
        let deadline = deadline_of_wait(&request, AWAIT_MAX);
        reply(self.await_result(request.into_inner(), deadline).await)
    }

    async fn list_tasks(&self, request: Request<pb::ListTasksRequest>) -> Reply<pb::ListTasksResponse> {
        reply(in_time(deadline(&request), self.list_tasks_page(request.into_inner())).await)
    }

    async fn list_runs(&self, request: Request<pb::ListRunsRequest>) -> Reply<pb::ListRunsResponse> {
        reply(in_time(deadline(&request), self.list_runs_page(request.into_inner())).await)
    }

    async fn list_waits(&self, request: Request<pb::ListWaitsRequest>) -> Reply<pb::ListWaitsResponse> {
        reply(in_time(deadline(&request), self.list_waits_page(request.into_inner())).await)
    }

    async fn find(&self, request: Request<pb::FindRequest>) -> Reply<pb::FindResponse> {
        let deadline = deadline(&request);
        reply(in_time(deadline, self.find_tasks(request.into_inner(), deadline)).await)
    }
}
