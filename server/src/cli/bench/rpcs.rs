//! `absurd bench rpcs`: times each RPC on an idle server, beside a plain round trip to its database and a bare durable
//! commit in the same run. Each round calls every RPC once, on one connection.

use std::time::{Duration, Instant};

use absurd_client::proto as pb;
use absurd_client::proto::absurd_service_client::AbsurdServiceClient;
use anyhow::Context as _;
use clap::Args;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};
use uuid::Uuid;

use super::{BARE_COMMIT, Stage, StageArgs, connect, progress, quantiles};

const QUEUE: &str = "absurd-bench";
/// Created and dropped in each round.
const OTHER_QUEUE: &str = "absurd-bench-2";
/// A statement that reads no table, for the time of a round trip.
const ROUND_TRIP: &str = "select 1";

/// Flags of the measurement.
#[derive(Debug, Args)]
pub(in crate::cli) struct RpcsArgs {
    #[command(flatten)]
    pub(super) stage: StageArgs,
    /// Calls of each RPC
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    samples: u32,
    /// Rounds before that, which do not count
    #[arg(long, default_value_t = 20)]
    warm_up: u32,
}

/// Times per RPC, in the order of the first round.
#[derive(Debug, Default)]
struct Times(Vec<(&'static str, Vec<Duration>)>);

impl Times {
    fn note(&mut self, what: &'static str, took: Duration) {
        match self.0.iter_mut().find(|(known, _)| *known == what) {
            Some((_, times)) => times.push(took),
            None => self.0.push((what, vec![took])),
        }
    }

    async fn of<R>(
        &mut self,
        what: &'static str,
        call: impl Future<Output = Result<Response<R>, Status>>,
    ) -> anyhow::Result<R> {
        let started = Instant::now();
        let answer = call.await.with_context(|| what.to_owned())?;
        self.note(what, started.elapsed());
        Ok(answer.into_inner())
    }
}

/// Measures, prints, and drops the queues that it used.
pub(super) async fn run(args: &RpcsArgs, stage: &Stage) -> anyhow::Result<()> {
    let channel = Endpoint::from_shared(stage.url.clone())?.tcp_nodelay(true).connect().await?;
    let mut grpc = AbsurdServiceClient::new(channel);
    let created = grpc.create_queue(pb::CreateQueueRequest { queue: QUEUE.into(), ..Default::default() }).await?;
    anyhow::ensure!(
        created.into_inner().created,
        "queue {QUEUE} exists, maybe from a bench that was stopped; drop it: absurd queue drop --queue {QUEUE} --yes"
    );
    let outcome = measure(args, stage, &mut grpc).await;
    grpc.drop_queue(pb::DropQueueRequest { queue: QUEUE.into() }).await?;
    quantiles(args.stage.output, outcome?.0);
    Ok(())
}

async fn measure(args: &RpcsArgs, stage: &Stage, grpc: &mut AbsurdServiceClient<Channel>) -> anyhow::Result<Times> {
    let sql = connect(&stage.database).await?;
    let (round_trip, bare_commit) = (sql.prepare(ROUND_TRIP).await?, sql.prepare(BARE_COMMIT).await?);
    let mut times = Times::default();
    let rounds = args.warm_up.saturating_add(args.samples);
    let bar = progress("rounds", rounds as usize)?;
    for round in 0..rounds {
        if round == args.warm_up {
            times = Times::default();
        }
        for (what, statement) in [("Postgres: select 1", &round_trip), ("Postgres: bare commit", &bare_commit)] {
            let started = Instant::now();
            sql.query_one(statement, &[]).await?;
            times.note(what, started.elapsed());
        }
        Round { times: &mut times, grpc, round }.all().await?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(times)
}

fn text(json: &str) -> Option<pb::Json> {
    Some(pb::Json { text: json.into() })
}

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

fn queue() -> String {
    QUEUE.into()
}

/// A claimed run.
struct Held {
    task_id: String,
    run_id: String,
    token: Option<String>,
}

struct Round<'a> {
    times: &'a mut Times,
    grpc: &'a mut AbsurdServiceClient<Channel>,
    round: u32,
}

impl Round<'_> {
    async fn all(&mut self) -> anyhow::Result<()> {
        let mut held = self.claims().await?;
        let mut next = || held.pop().context("a claim is missing");
        let (first, failing, waiting) = (next()?, next()?, next()?);
        let (sleeping, moved, released, settled, put) = (next()?, next()?, next()?, next()?, next()?);
        self.queues().await?;
        self.leases_and_checkpoints(&first).await?;
        self.waits(&first, [&waiting, &sleeping, &moved, &put]).await?;
        self.ends(&first, &failing, &released, &settled).await?;
        self.reads(&first).await?;
        self.workflows().await?;
        self.cleanup().await
    }

    /// Spawns eight tasks and claims them.
    async fn claims(&mut self) -> anyhow::Result<Vec<Held>> {
        let task = || pb::NewTask { task_name: "bench".into(), max_attempts: Some(1), ..Default::default() };
        let one = pb::SpawnTaskRequest { queue: queue(), task: Some(task()) };
        self.times.of("SpawnTask", self.grpc.spawn_task(one)).await?;
        let many = pb::SpawnTasksRequest { queue: queue(), tasks: (0..7).map(|_| task()).collect() };
        self.times.of("SpawnTasks (7)", self.grpc.spawn_tasks(many)).await?;
        let claim =
            |qty| pb::ClaimTaskRequest { queue: queue(), qty, claim_timeout: seconds(3600), ..Default::default() };
        let mut tasks = self.times.of("ClaimTask", self.grpc.claim_task(claim(1))).await?.tasks;
        tasks.extend(self.times.of("ClaimTask (7)", self.grpc.claim_task(claim(7))).await?.tasks);
        let held = tasks.into_iter().map(|task| Held {
            task_id: task.task_id,
            run_id: task.run_id,
            token: Some(task.claim_token),
        });
        Ok(held.collect())
    }

    async fn queues(&mut self) -> anyhow::Result<()> {
        let other = || OTHER_QUEUE.to_owned();
        let create = pb::CreateQueueRequest { queue: other(), ..Default::default() };
        self.times.of("CreateQueue", self.grpc.create_queue(create)).await?;
        self.times.of("DropQueue", self.grpc.drop_queue(pb::DropQueueRequest { queue: other() })).await?;
        self.times.of("ListQueues", self.grpc.list_queues(pb::ListQueuesRequest::default())).await?;
        let stats = pb::GetQueueStatsRequest { queue: queue() };
        self.times.of("GetQueueStats", self.grpc.get_queue_stats(stats)).await?;
        let policy = pb::GetQueuePolicyRequest { queue: queue() };
        self.times.of("GetQueuePolicy", self.grpc.get_queue_policy(policy)).await?;
        let policy = pb::SetQueuePolicyRequest { queue: queue(), cleanup_limit: Some(1000), ..Default::default() };
        self.times.of("SetQueuePolicy", self.grpc.set_queue_policy(policy)).await?;
        let stream = pb::ClaimStreamRequest {
            queue: queue(),
            worker_id: "bench".into(),
            session_id: "bench".into(),
            task_names: vec!["none".into()],
            ..Default::default()
        };
        let started = Instant::now();
        let mut opened = self.grpc.claim_stream(stream).await?.into_inner();
        opened.message().await?;
        self.times.note("ClaimStream (to opened)", started.elapsed());
        let drain = pb::DrainWorkerRequest { queue: queue(), session_id: "bench".into() };
        self.times.of("DrainWorker", self.grpc.drain_worker(drain)).await?;
        while opened.message().await?.is_some() {}
        Ok(())
    }

    async fn leases_and_checkpoints(&mut self, held: &Held) -> anyhow::Result<()> {
        let extend = pb::ExtendClaimRequest {
            queue: queue(),
            claim_token: held.token.clone(),
            extend_by: seconds(3600),
            ..Default::default()
        };
        self.times.of("ExtendClaim", self.grpc.extend_claim(extend)).await?;
        let claims = vec![pb::ClaimRef { run_id: String::new(), claim_token: held.token.clone() }];
        let extend = pb::ExtendClaimsRequest { queue: queue(), claims, extend_by: seconds(3600) };
        self.times.of("ExtendClaims", self.grpc.extend_claims(extend)).await?;
        let set = pb::SetCheckpointRequest {
            queue: queue(),
            claim_token: held.token.clone(),
            checkpoint_name: "one".into(),
            state: text("1"),
            ..Default::default()
        };
        self.times.of("SetCheckpoint", self.grpc.set_checkpoint(set)).await?;
        let save = pb::SaveCheckpointForRunRequest {
            queue: queue(),
            claim_token: held.token.clone(),
            checkpoint_name: "two".into(),
            data: text("2"),
            ..Default::default()
        };
        self.times.of("SaveCheckpointForRun", self.grpc.save_checkpoint_for_run(save)).await?;
        let get = pb::GetCheckpointRequest {
            queue: queue(),
            task_id: held.task_id.clone(),
            checkpoint_name: "one".into(),
            ..Default::default()
        };
        self.times.of("GetCheckpoint", self.grpc.get_checkpoint(get)).await?;
        let run_id = || held.run_id.clone();
        let all = pb::GetAllCheckpointsRequest { queue: queue(), run_id: run_id(), ..Default::default() };
        self.times.of("GetAllCheckpoints", self.grpc.get_all_checkpoints(all)).await?;
        let own = pb::GetCheckpointsForRunRequest { queue: queue(), run_id: run_id(), ..Default::default() };
        self.times.of("GetCheckpointsForRun", self.grpc.get_checkpoints_for_run(own)).await?;
        let own = pb::GetRunCheckpointRequest {
            queue: queue(),
            run_id: run_id(),
            checkpoint_name: "one".into(),
            state_range: None,
        };
        self.times.of("GetRunCheckpoint", self.grpc.get_run_checkpoint(own)).await?;
        Ok(())
    }

    async fn waits(&mut self, first: &Held, others: [&Held; 4]) -> anyhow::Result<()> {
        let [waiting, sleeping, moved, put] = others;
        let event = format!("event-{}", self.round);
        let emit = pb::EmitEventRequest { queue: queue(), event_name: event.clone(), payload: text("1") };
        self.times.of("EmitEvent", self.grpc.emit_event(emit)).await?;
        let wait = |held: &Held, event: &str| pb::AwaitEventRequest {
            queue: queue(),
            claim_token: held.token.clone(),
            step_name: "wait".into(),
            event_name: event.into(),
            ..Default::default()
        };
        self.times.of("AwaitEvent (payload)", self.grpc.await_event(wait(first, &event))).await?;
        let never = format!("never-{}", self.round);
        self.times.of("AwaitEvent (suspends)", self.grpc.await_event(wait(waiting, &never))).await?;
        let wait = pb::WaitForEventRequest {
            queue: queue(),
            claim_token: first.token.clone(),
            step_name: "wait again".into(),
            event_name: event,
            timeout: seconds(60),
            ..Default::default()
        };
        self.times.of("WaitForEvent (payload)", self.grpc.wait_for_event(wait)).await?;
        let sleep = pb::SleepRequest {
            queue: queue(),
            claim_token: sleeping.token.clone(),
            until: seconds(36_000).map(pb::sleep_request::Until::Duration),
            ..Default::default()
        };
        self.times.of("Sleep", self.grpc.sleep(sleep)).await?;
        let schedule = pb::ScheduleTaskRequest {
            queue: queue(),
            claim_token: moved.token.clone(),
            when: seconds(36_000).map(pb::schedule_task_request::When::Delay),
            ..Default::default()
        };
        self.times.of("ScheduleTask", self.grpc.schedule_task(schedule)).await?;
        let put = pb::SetRunSleepingRequest {
            queue: queue(),
            claim_token: put.token.clone(),
            event_name: never,
            ..Default::default()
        };
        self.times.of("SetRunSleeping", self.grpc.set_run_sleeping(put)).await?;
        let cancel = pb::CancelTaskRequest {
            queue: queue(),
            target: Some(pb::cancel_task_request::Target::TaskId(waiting.task_id.clone())),
        };
        self.times.of("CancelTask", self.grpc.cancel_task(cancel)).await?;
        Ok(())
    }

    async fn ends(&mut self, first: &Held, failing: &Held, released: &Held, settled: &Held) -> anyhow::Result<()> {
        let complete = pb::CompleteTaskRequest {
            queue: queue(),
            claim_token: first.token.clone(),
            result: text("1"),
            ..Default::default()
        };
        self.times.of("CompleteTask", self.grpc.complete_task(complete)).await?;
        let wait = pb::AwaitTaskRequest {
            queue: queue(),
            claim_token: settled.token.clone(),
            step_name: "end".into(),
            awaited_task_id: first.task_id.clone(),
            ..Default::default()
        };
        self.times.of("AwaitTask (has ended)", self.grpc.await_task(wait)).await?;
        let fail = pb::FailTaskRequest {
            queue: queue(),
            claim_token: failing.token.clone(),
            reason: text("{}"),
            ..Default::default()
        };
        self.times.of("FailTask", self.grpc.fail_task(fail)).await?;
        let retry = pb::RetryTaskRequest { queue: queue(), task_id: failing.task_id.clone(), ..Default::default() };
        let again = self.times.of("RetryTask", self.grpc.retry_task(retry)).await?;
        // A pending task would be claimed by the next round.
        let run = again.task.context("no task")?.run_id;
        let target = Some(pb::cancel_task_request::Target::RunId(run));
        self.grpc.cancel_task(pb::CancelTaskRequest { queue: queue(), target }).await?;
        let claims = vec![pb::ClaimRef { run_id: String::new(), claim_token: released.token.clone() }];
        let release = pb::ReleaseClaimsRequest { queue: queue(), claims, delay: seconds(3600) };
        self.times.of("ReleaseClaims", self.grpc.release_claims(release)).await?;
        let item = pb::SettleItem {
            run_id: String::new(),
            claim_token: settled.token.clone(),
            action: Some(pb::settle_item::Action::Complete(pb::CompleteAction::default())),
        };
        let settle = pb::SettleTasksRequest { queue: queue(), items: vec![item] };
        self.times.of("SettleTasks", self.grpc.settle_tasks(settle)).await?;
        Ok(())
    }

    async fn reads(&mut self, held: &Held) -> anyhow::Result<()> {
        let task_id = || held.task_id.clone();
        let get = pb::GetTaskStatusRequest { queue: queue(), task_id: task_id(), ..Default::default() };
        self.times.of("GetTaskStatus", self.grpc.get_task_status(get)).await?;
        let get = pb::GetRunStatusRequest { queue: queue(), run_id: held.run_id.clone() };
        self.times.of("GetRunStatus", self.grpc.get_run_status(get)).await?;
        let get = pb::GetTaskResultRequest { queue: queue(), task_id: task_id(), result_range: None };
        self.times.of("GetTaskResult", self.grpc.get_task_result(get)).await?;
        let wait = pb::AwaitTaskResultRequest { queue: queue(), task_id: task_id(), timeout: seconds(60) };
        self.times.of("AwaitTaskResult (has ended)", self.grpc.await_task_result(wait)).await?;
        let list = pb::ListTasksRequest { queue: queue(), page_size: 10, ..Default::default() };
        self.times.of("ListTasks (10)", self.grpc.list_tasks(list)).await?;
        let runs = pb::ListRunsRequest { queue: queue(), task_id: held.task_id.clone(), ..Default::default() };
        self.times.of("ListRuns", self.grpc.list_runs(runs)).await?;
        let of = Some(pb::list_waits_request::Of::TaskId(held.task_id.clone()));
        let waits = pb::ListWaitsRequest { queue: queue(), of, ..Default::default() };
        self.times.of("ListWaits", self.grpc.list_waits(waits)).await?;
        let find = pb::FindRequest { queue: queue(), text: held.task_id.clone(), limit: 0 };
        self.times.of("Find", self.grpc.find(find)).await?;
        Ok(())
    }

    async fn workflows(&mut self) -> anyhow::Result<()> {
        let create = pb::CreateWorkflowRunRequest {
            queue: queue(),
            workflow_run_id: Uuid::new_v4().to_string(),
            workflow_name: "bench".into(),
            workflow_version: "1".into(),
            ..Default::default()
        };
        let workflow_run_id =
            self.times.of("CreateWorkflowRun", self.grpc.create_workflow_run(create)).await?.workflow_run_id;
        let mut update =
            pb::UpdateWorkflowRunStatusRequest { workflow_run_id: workflow_run_id.clone(), ..Default::default() };
        update.set_status(pb::WorkflowStatus::Running);
        self.times.of("UpdateWorkflowRunStatus", self.grpc.update_workflow_run_status(update)).await?;
        let get = pb::GetWorkflowRunRequest { workflow_run_id, part: None };
        self.times.of("GetWorkflowRun", self.grpc.get_workflow_run(get)).await?;
        let list = pb::ListWorkflowRunsRequest { page_size: 10, ..Default::default() };
        self.times.of("ListWorkflowRuns (10)", self.grpc.list_workflow_runs(list)).await?;
        Ok(())
    }

    async fn cleanup(&mut self) -> anyhow::Result<()> {
        let tasks = pb::CleanupTasksRequest { queue: queue(), ttl: seconds(0), limit: 10 };
        self.times.of("CleanupTasks (4)", self.grpc.cleanup_tasks(tasks)).await?;
        let events = pb::CleanupEventsRequest { queue: queue(), ttl: seconds(0), limit: 10 };
        self.times.of("CleanupEvents (3)", self.grpc.cleanup_events(events)).await?;
        Ok(())
    }
}
