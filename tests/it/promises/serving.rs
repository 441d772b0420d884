//! Promises of the serving side that no other test holds it to: outcomes in doubt, claims that reach nobody, hints
//! between replicas, bells of direct SQL writers. Servers that start "on hints" look at their queues once an hour, so
//! that no look helps.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use absurd_client::{AbsurdClient, ClaimOptions, QueueOptions, RetryStrategy, SpawnOptions, State, StorageMode};
use absurd_proto::v1 as pb;
use absurd_proto::v1::await_task_response::Outcome;
use absurd_proto::v1::claim_stream_response::Message;
use absurd_proto::v1::settle_item::Action;
use absurd_server::settings::{Settings, Span};
use absurd_server::store::failing::Fate;
use absurd_tests::{Database, Grpc, Server, ServerOptions, eventually, in_time, json};
use futures_util::future::join_all;
use serde_json::json as j;
use tokio_postgres::Client as Sql;
use tonic_types::StatusExt as _;
use uuid::Uuid;

use crate::streams::{Messages, complete, next, next_task, open, request, seconds};

/// Longest time of a hint or a bell, at its quickest.
const QUICK: Duration = Duration::from_millis(300);
/// After an idle queue has armed its bell, its dispatcher looks around for so long.
pub(super) const PROBED: Duration = Duration::from_millis(400);
/// Longest time until an end of which no hint tells is found.
const SOON: Duration = Duration::from_secs(5);
/// Turns of which one must be quick, since the machine may be busy.
const TURNS: usize = 10;

async fn spawn(client: &AbsurdClient) -> Uuid {
    let options = SpawnOptions::default().max_attempts(100).retry(RetryStrategy::Immediate);
    client.spawn_task("n", &j!(null), options).await.unwrap().task_id
}

fn reason(status: &tonic::Status) -> String {
    status.get_error_details().error_info().unwrap().reason.clone()
}

fn span(told: Option<prost_types::Duration>) -> Duration {
    Duration::try_from(told.unwrap()).unwrap()
}

async fn count(sql: &Sql, query: &str) -> i64 {
    sql.query_one(query, &[]).await.unwrap().get(0)
}

fn item(claim_token: &str, action: Action) -> pb::SettleItem {
    pb::SettleItem { run_id: String::new(), claim_token: Some(claim_token.to_owned()), action: Some(action) }
}

fn step(claim_token: &str, name: &str) -> pb::SettleItem {
    let action = pb::CheckpointAction { checkpoint_name: name.into(), state: json("1"), extend_by: None };
    item(claim_token, Action::Checkpoint(action))
}

/// Reports items of queue `q`; the reason of each one's refusal.
async fn settle(grpc: &mut Grpc, items: Vec<pb::SettleItem>) -> Vec<Option<String>> {
    let request = pb::SettleTasksRequest { queue: "q".into(), items };
    let results = grpc.settle_tasks(request).await.unwrap().into_inner().results;
    results.into_iter().map(|result| result.error.map(|error| error.reason)).collect()
}

pub(super) async fn until_armed(sql: &Sql, queue: &str) {
    let armed = "select exists (select from absurd_server.armed where queue_name = $1)";
    eventually("the idle queue arms its bell", async || {
        sql.query_one(armed, &[&queue]).await.unwrap().get::<_, bool>(0).then_some(())
    })
    .await;
}

/// Lets `act` make a task claimable, by itself or in place of the one of the turn before, until one is pushed quickly;
/// that one is returned.
async fn is_quick(
    what: &str,
    (sql, queue): (&Sql, &str),
    messages: &mut Messages,
    first: Option<pb::ClaimedTask>,
    act: impl AsyncFn(Option<pb::ClaimedTask>),
) -> pb::ClaimedTask {
    let (mut before, mut best) = (first, Duration::MAX);
    for _ in 0..TURNS {
        until_armed(sql, queue).await;
        tokio::time::sleep(PROBED).await;
        let began = Instant::now();
        act(before).await;
        let task = next_task(messages).await;
        best = best.min(began.elapsed());
        if best < QUICK {
            return task;
        }
        before = Some(task);
    }
    panic!("{what}: the quickest of {TURNS} turns took {best:?}");
}

/// Two replicas on hints: callers use one, a worker has its stream at the other.
pub(super) struct Pair {
    pub(super) caller: Server,
    /// With the connection of the stream.
    pub(super) worker: (Server, Grpc),
    /// Of the callers' replica.
    pub(super) grpc: Grpc,
    /// Of the worker's stream on queue `q`.
    pub(super) messages: Messages,
    pub(super) sql: Sql,
}

/// A pair whose worker has so much credit. The callers' replica starts last: its first look shows it the other one.
pub(super) async fn pair(max_in_flight: i32) -> Pair {
    let worker = Server::start_on_hints(&Database::new().await).await;
    let caller = Server::start_on_hints(worker.database()).await;
    eventually("the worker's replica listens", async || worker.app().engine().hints.listening().then_some(())).await;
    let mut connection = worker.raw().await;
    let (_, messages) = open(&mut connection, request(max_in_flight)).await;
    let (grpc, sql) = (caller.raw().await, worker.database().connect().await);
    Pair { caller, worker: (worker, connection), grpc, messages, sql }
}

/// A step that Postgres refuses stops the items behind it: the step before it is stored, the completion behind it is
/// skipped, and the task goes on running.
#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_postgres_refuses_stops_the_completion_behind_it() {
    let server = Server::start().await;
    let (client, sql) = (server.client(), server.database().connect().await);
    sql.batch_execute(
        "create function public.refuse() returns trigger language plpgsql as $$
         begin
           if new.checkpoint_name = 'refused' then
             raise exception 'no room for this step';
           end if;
           return new;
         end $$;
         create trigger refuse before insert on absurd.c_q for each row execute function public.refuse()",
    )
    .await
    .unwrap();
    let task_id = spawn(&client).await;
    let task = client.claim_task(ClaimOptions::default()).await.unwrap().remove(0);
    let token = task.claim_token();
    let complete = item(token, Action::Complete(pb::CompleteAction { result: json("2") }));
    let reasons = settle(&mut server.raw().await, vec![step(token, "stored"), step(token, "refused"), complete]).await;
    let reasons: Vec<Option<&str>> = reasons.iter().map(Option::as_deref).collect();
    assert_eq!(reasons, [None, Some("DATABASE_REFUSED"), Some("ITEM_SKIPPED")]);
    assert_eq!(client.get_task_result(task_id).await.unwrap().state, State::Running);
    assert_eq!(count(&sql, "select count(*) from absurd.c_q where checkpoint_name = 'stored'").await, 1);
    assert_eq!(count(&sql, "select count(*) from absurd.c_q").await, 1);
}

/// A write is carried out, its answer is lost, and when the server repeats it the claim is over. Whether the write was
/// carried out cannot be told then, so the answer is `OUTCOME_UNKNOWN`: for a step, for a release, for a sleep, and for
/// each of several items of one run.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_after_a_lost_answer_is_an_unknown_outcome() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let (client, sql) = (server.client(), server.database().connect().await);
    // What ends the claim is part of the write itself: the task is cancelled with its last step, and another worker holds
    // the run as soon as it is given back or sleeps.
    sql.batch_execute(
        "create function public.cancel_it() returns trigger language plpgsql as $$
         begin
           perform absurd.cancel_task('q', new.task_id);
           return null;
         end $$;
         create trigger cancel_it after insert on absurd.c_q for each row
           when (new.checkpoint_name = 'last') execute function public.cancel_it();
         create function public.steal_it() returns trigger language plpgsql as $$
         begin
           new.state := 'running';
           new.claimed_by := 'thief#' || repeat('x', 22);
           new.claim_expires_at := now() + interval '1 hour';
           return new;
         end $$;
         create trigger steal_it before update on absurd.r_q for each row
           when (old.state = 'running' and new.state in ('pending', 'sleeping')) execute function public.steal_it()",
    )
    .await
    .unwrap();
    for _ in 0..4 {
        spawn(&client).await;
    }
    let claims = client.claim_task(ClaimOptions::default().qty(4)).await.unwrap();
    let tokens: Vec<&str> = claims.iter().map(|claim| claim.claim_token()).collect();
    let failing = server.app().engine().store.failing();
    let mut grpc = server.raw().await;

    failing.arm(1, Fate::FailsAfter);
    let stored = pb::SetCheckpointRequest {
        queue: "q".into(),
        claim_token: Some(tokens[0].to_owned()),
        checkpoint_name: "last".into(),
        state: json("1"),
        ..Default::default()
    };
    let told = grpc.set_checkpoint(stored).await.unwrap_err();
    assert!(failing.disarm());
    assert_eq!(reason(&told), "OUTCOME_UNKNOWN", "a step");

    failing.arm(1, Fate::FailsAfter);
    let release = item(tokens[1], Action::Release(pb::ReleaseAction { delay: None }));
    let told = settle(&mut grpc, vec![release]).await;
    assert!(failing.disarm());
    assert_eq!(told, [Some("OUTCOME_UNKNOWN".to_owned())], "a release");

    failing.arm(1, Fate::FailsAfter);
    let sleep = pb::SleepRequest {
        queue: "q".into(),
        claim_token: Some(tokens[2].to_owned()),
        step_name: "nap".into(),
        until: Some(pb::sleep_request::Until::Duration(prost_types::Duration { seconds: 3600, nanos: 0 })),
        ..Default::default()
    };
    let told = grpc.sleep(sleep).await.unwrap_err();
    assert!(failing.disarm());
    assert_eq!(reason(&told), "OUTCOME_UNKNOWN", "a sleep");

    // The transaction begins, has two statements, and is committed: the fourth call.
    failing.arm(4, Fate::FailsAfter);
    let told = settle(&mut grpc, vec![step(tokens[3], "first"), step(tokens[3], "last")]).await;
    assert!(failing.disarm());
    assert_eq!(told, [Some("OUTCOME_UNKNOWN".to_owned()), Some("OUTCOME_UNKNOWN".to_owned())], "items of one run");

    let stored = "select count(*) from absurd.c_q where checkpoint_name in ('last', 'nap', 'first')";
    assert_eq!(count(&sql, stored).await, 4, "each was carried out by the try whose answer was lost");
    assert_eq!(count(&sql, "select count(*) from absurd.r_q where claimed_by like 'thief#%'").await, 2);
}

/// The answer of a `ClaimTask` call is lost. The run that it took is found and given back while its lease of an hour
/// lasts, and the next caller, who waits, gets it in the same attempt.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_whose_claim_got_no_answer_leaves_its_task_to_the_next() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let client = server.client();
    let task_id = spawn(&client).await;
    let failing = server.app().engine().store.failing();
    let claim = || ClaimOptions::default().claim_timeout(Duration::from_secs(3600));
    // The first call looks for the queue.
    failing.arm(2, Fate::FailsAfter);
    client.claim_task(claim()).await.unwrap_err();
    assert!(failing.disarm());
    let next = client.claim_task(claim().wait(Duration::from_secs(20))).await.unwrap();
    let next: Vec<(Uuid, i32)> = next.iter().map(|task| (task.task_id, task.attempt)).collect();
    assert_eq!(next, [(task_id, 1)]);
}

/// The same for a stream: the task is found, given back, and pushed to the stream in the same attempt.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_whose_claim_got_no_answer_gets_its_task_all_the_same() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let task_id = spawn(&server.client()).await;
    let failing = server.app().engine().store.failing();
    let mut grpc = server.raw().await;
    failing.arm(2, Fate::FailsAfter);
    let asked = pb::ClaimStreamRequest { claim_timeout: seconds(3600), ..request(1) };
    let (_, mut messages) = open(&mut grpc, asked).await;
    let task = next_task(&mut messages).await;
    assert!(failing.disarm());
    assert_eq!((task.task_id, task.attempt), (task_id.to_string(), 1));
}

/// Lets claims of queue `q` pass, or wait with their statement under way.
async fn door(sql: &Sql, is_open: bool) {
    sql.execute("update public.door set is_open = $1", &[&is_open]).await.unwrap();
}

/// State of the only run of queue `q`, and a mark that changes with each write to it.
async fn run(sql: &Sql) -> (String, String) {
    let row = sql.query_one("select state, xmin::text from absurd.r_q", &[]).await.unwrap();
    (row.get(0), row.get(1))
}

/// A run that is claimed eight times for callers who have gone by then, workers with streams and callers of `ClaimTask`
/// in turn, is as it was: it has not failed, no attempt is spent, and nothing speaks against it.
#[tokio::test(flavor = "multi_thread")]
async fn claims_that_reach_nobody_do_not_fail_a_task() {
    let server = Server::start().await;
    let (client, sql) = (server.client(), server.database().connect().await);
    sql.batch_execute(
        "create table public.door (is_open boolean not null);
         insert into public.door values (true);
         create function public.pass() returns trigger language plpgsql as $$
         begin
           while not (select is_open from public.door) loop
             perform pg_sleep(0.01);
           end loop;
           return new;
         end $$;
         create trigger pass before update on absurd.r_q for each row
           when (new.state = 'running' and old.state <> 'running') execute function public.pass()",
    )
    .await
    .unwrap();
    let spawned = client.spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap();
    let grpc = server.raw().await;
    for round in 0..8 {
        let (_, before) = run(&sql).await;
        door(&sql, false).await;
        let mut caller = grpc.clone();
        let calling = tokio::spawn(async move {
            if round % 2 == 0 {
                let (_, _messages) = open(&mut caller, request(1)).await;
                std::future::pending::<()>().await;
            } else {
                let claim = pb::ClaimTaskRequest { queue: "q".into(), ..Default::default() };
                drop(caller.claim_task(claim).await);
            }
        });
        let waits = "select count(*) from pg_stat_activity
                      where datname = current_database() and state = 'active' and query like '-- run_claim%'";
        eventually("the claim is under way", async || (count(&sql, waits).await == 1).then_some(())).await;
        calling.abort();
        eventually("the server knows that its caller has gone", async || (server.app().calls() == 0).then_some(()))
            .await;
        door(&sql, true).await;
        let state = eventually("the claim is made and undone", async || {
            let (state, now) = run(&sql).await;
            (now != before && state != "running").then_some(state)
        })
        .await;
        assert_eq!(state, "pending", "after {} claims", round + 1);
    }
    assert_eq!(count(&sql, "select count(*) from absurd_server.released").await, 0);
    let task = client.claim_task(ClaimOptions::default()).await.unwrap().remove(0);
    assert_eq!((task.task_id, task.attempt), (spawned.task_id, 1));
    task.complete(&j!(1)).await.unwrap();
}

/// Thirty streams that open together are told ages that differ, each within a fifth of the setting; and when their
/// replica stops they are told pauses that differ, none over a second.
#[tokio::test(flavor = "multi_thread")]
async fn streams_that_open_together_do_not_come_back_together() {
    const STREAMS: usize = 30;
    let settings = Settings { stream_age: Some(Span(Duration::from_secs(1000))), ..Settings::default() };
    let server =
        Server::start_with(Database::new().await, ServerOptions { settings, ..ServerOptions::default() }).await;
    let mut grpc = server.raw().await;
    let (mut ages, mut streams) = (HashSet::new(), Vec::new());
    for _ in 0..STREAMS {
        let (opened, messages) = open(&mut grpc, request(1)).await;
        let age = span(opened.max_stream_age);
        assert!((800..=1200).contains(&age.as_secs()), "{age:?}");
        ages.insert(age);
        streams.push(messages);
    }
    assert!(ages.len() > STREAMS / 2, "{ages:?}");
    let stopping = tokio::spawn(server.stop());
    let mut pauses = HashSet::new();
    for messages in &mut streams {
        let Message::Ending(ending) = next(messages).await else { panic!("a stopping replica ends its streams") };
        assert_eq!(ending.reason(), pb::EndReason::ServerShutdown);
        let pause = span(ending.reconnect_after);
        assert!(pause <= Duration::from_secs(1), "{pause:?}");
        pauses.insert(pause);
    }
    assert!(pauses.len() > STREAMS / 2, "{pauses:?}");
    drop(streams);
    in_time("the server stops", stopping).await.unwrap();
}

/// Each of ten streams ends at the age that it was told, and not before.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_at_the_age_that_it_was_told() {
    let settings = Settings { stream_age: Some(Span(Duration::from_secs(2))), ..Settings::default() };
    let server =
        Server::start_with(Database::new().await, ServerOptions { settings, ..ServerOptions::default() }).await;
    let grpc = server.raw().await;
    let streams = (0..10).map(|_| {
        let mut grpc = grpc.clone();
        async move {
            let began = Instant::now();
            let (opened, mut messages) = open(&mut grpc, request(1)).await;
            let Message::Ending(ending) = next(&mut messages).await else { panic!("an old stream ends") };
            assert_eq!(ending.reason(), pb::EndReason::MaxAge);
            (span(opened.max_stream_age), began.elapsed())
        }
    });
    for (age, lived) in join_all(streams).await {
        assert!(lived >= age && lived < age + Duration::from_secs(5), "told {age:?}, lived {lived:?}");
    }
}

/// Ways to make a task claimable.
#[derive(Debug, Clone, Copy)]
enum Act {
    /// Another one is spawned.
    Spawn,
    /// It waits for an event, which is emitted.
    Emit,
    /// Its claim is given back.
    Release,
    /// Its attempt fails, and the next one may begin at once.
    Fail,
    /// It fails for good, and is retried by hand.
    Retry,
}

impl Act {
    const ALL: [Self; 5] = [Self::Spawn, Self::Emit, Self::Release, Self::Fail, Self::Retry];

    async fn carry_out(self, client: &AbsurdClient, grpc: &mut Grpc, task: Option<pb::ClaimedTask>) {
        let Some(task) = task else {
            spawn(client).await;
            return;
        };
        let (queue, claim_token) = (task.queue.clone(), Some(task.claim_token.clone()));
        match self {
            Self::Spawn => {
                complete(grpc, &task).await;
                spawn(client).await;
            }
            Self::Emit => {
                let event_name = Uuid::new_v4().to_string();
                let wait = pb::AwaitEventRequest {
                    queue: queue.clone(),
                    claim_token,
                    step_name: event_name.clone(),
                    event_name: event_name.clone(),
                    ..Default::default()
                };
                grpc.await_event(wait).await.unwrap();
                let emission = pb::EmitEventRequest { queue, event_name, payload: json("1") };
                assert_eq!(grpc.emit_event(emission).await.unwrap().into_inner().woken, 1);
            }
            Self::Release => {
                let claims = vec![pb::ClaimRef { run_id: String::new(), claim_token }];
                grpc.release_claims(pb::ReleaseClaimsRequest { queue, claims, delay: None }).await.unwrap();
            }
            Self::Fail => {
                grpc.fail_task(pb::FailTaskRequest { queue, claim_token, ..Default::default() }).await.unwrap();
            }
            Self::Retry => {
                let failure =
                    pb::FailTaskRequest { queue: queue.clone(), claim_token, no_retry: true, ..Default::default() };
                grpc.fail_task(failure).await.unwrap();
                let retry = pb::RetryTaskRequest { queue, task_id: task.task_id, ..Default::default() };
                grpc.retry_task(retry).await.unwrap();
            }
        }
    }
}

/// What becomes claimable at one replica is pushed by another within 300 ms, the best of ten turns: a spawned task, a run
/// that an event wakes, a run that is given back, the next attempt of a failed one, a task that is retried by hand.
#[tokio::test(flavor = "multi_thread")]
async fn what_becomes_claimable_at_one_replica_is_pushed_by_another() {
    let Pair { caller, worker, grpc, mut messages, sql } = pair(9).await;
    let client = caller.client();
    let mut task = None;
    for act in Act::ALL {
        let what = format!("{act:?}");
        let carry_out = async |task: Option<pb::ClaimedTask>| {
            let mut grpc = grpc.clone();
            act.carry_out(&client, &mut grpc, task).await;
        };
        task = Some(is_quick(&what, (&sql, "q"), &mut messages, task, carry_out).await);
    }
    drop(worker);
}

/// A full stream gets its credit back within 300 ms when its task is completed at another replica, the best of ten turns:
/// before its own first look at what it holds, which comes after half a second.
#[tokio::test(flavor = "multi_thread")]
async fn a_completion_at_one_replica_frees_credit_at_another() {
    let Pair { caller, worker, mut grpc, mut messages, sql: _ } = pair(1).await;
    let client = caller.client();
    for _ in 0..=TURNS {
        spawn(&client).await;
    }
    let mut task = next_task(&mut messages).await;
    let mut best = Duration::MAX;
    for _ in 0..TURNS {
        let began = Instant::now();
        complete(&mut grpc, &task).await;
        task = next_task(&mut messages).await;
        best = best.min(began.elapsed());
        if best < QUICK {
            break;
        }
    }
    assert!(best < QUICK, "the quickest of {TURNS} turns took {best:?}");
    drop(worker);
}

/// A worker with credit to spare hears within ten seconds that its task was cancelled at another replica: its stream
/// looks at its claims every five.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancellation_at_one_replica_is_told_by_another() {
    let Pair { caller, worker, mut grpc, mut messages, sql: _ } = pair(9).await;
    spawn(&caller.client()).await;
    let task = next_task(&mut messages).await;
    let began = Instant::now();
    let target = Some(pb::cancel_task_request::Target::TaskId(task.task_id.clone()));
    grpc.cancel_task(pb::CancelTaskRequest { queue: "q".into(), target }).await.unwrap();
    let revoked = async {
        loop {
            if let Message::Revoked(revoked) = next(&mut messages).await {
                return revoked;
            }
        }
    };
    let revoked = in_time("the claim is revoked", revoked).await;
    assert_eq!((&revoked.run_id, revoked.verdict()), (&task.run_id, pb::Verdict::Cancelled));
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    drop(worker);
}

/// A queue has its bells however it was made, after the server started: by a call or by SQL, plain or partitioned. A
/// spawn and an emission by SQL are pushed within 300 ms, the best of ten turns.
#[tokio::test(flavor = "multi_thread")]
async fn every_queue_has_its_bells() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let (client, sql) = (server.client(), server.database().connect().await);
    let partitioned = QueueOptions { storage_mode: StorageMode::Partitioned, ..QueueOptions::default() };
    client.with_queue("called").create_queue().await.unwrap();
    client.with_queue("called_parted").create_queue_with(partitioned).await.unwrap();
    sql.batch_execute("select absurd.create_queue('written'), absurd.create_queue('written_parted', 'partitioned')")
        .await
        .unwrap();
    let mut grpc = server.raw().await;
    for queue in ["called", "called_parted", "written", "written_parted"] {
        let asked = pb::ClaimStreamRequest { queue: queue.into(), ..request(9) };
        let (_, mut messages) = open(&mut grpc, asked).await;
        let spawn = async |_: Option<pb::ClaimedTask>| {
            sql.execute("select absurd.spawn_task($1, 'n', 'null')", &[&queue]).await.unwrap();
        };
        let what = format!("a spawn on queue {queue}");
        let task = is_quick(&what, (&sql, queue), &mut messages, None, spawn).await;
        let emit = async |task: Option<pb::ClaimedTask>| {
            let (mut grpc, event) = (grpc.clone(), Uuid::new_v4().to_string());
            let wait = pb::AwaitEventRequest {
                queue: queue.into(),
                claim_token: task.map(|task| task.claim_token),
                step_name: event.clone(),
                event_name: event.clone(),
                ..Default::default()
            };
            grpc.await_event(wait).await.unwrap();
            sql.execute("select absurd.emit_event($1, $2, '1')", &[&queue, &event]).await.unwrap();
        };
        let what = format!("an emission on queue {queue}");
        is_quick(&what, (&sql, queue), &mut messages, Some(task), emit).await;
    }
}

/// Ends the only open task of a queue: by plain SQL, or by calls.
async fn end(queue: &str, sql: &Sql, by_calls: Option<&mut Grpc>) {
    let Some(grpc) = by_calls else {
        let end = "select absurd.complete_run($1, c.run_id, '7') from absurd.claim_task($1, 'w', 30, 1) c";
        eventually("SQL ends the task", async || (sql.query(end, &[&queue]).await.unwrap().len() == 1).then_some(()))
            .await;
        return;
    };
    let claim = pb::ClaimTaskRequest { queue: queue.into(), wait: seconds(30), ..Default::default() };
    let claimed = grpc.claim_task(claim).await.unwrap().into_inner().tasks.remove(0);
    complete(grpc, &claimed).await;
}

/// Lets a run of queue `q` wait for the end of a task of queue `children`.
async fn wait_for(child: Uuid, grpc: &mut Grpc, parent: &pb::ClaimedTask) {
    let wait = pb::AwaitTaskRequest {
        queue: "q".into(),
        claim_token: Some(parent.claim_token.clone()),
        step_name: "child".into(),
        awaited_queue: "children".into(),
        awaited_task_id: child.to_string(),
        ..Default::default()
    };
    let outcome = grpc.await_task(wait).await.unwrap().into_inner().outcome.unwrap();
    assert!(matches!(outcome, Outcome::Suspended(_)), "{outcome:?}");
}

/// A run that begins to wait for a task wakes its replica's look at such tasks: an end of which no hint tells, by plain
/// SQL or at another replica, brings the run back to its worker in less than five seconds.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_begins_to_wait_is_woken_soon() {
    let here = Server::start_on_hints(&Database::new().await).await;
    let there = Server::start_on_hints(here.database()).await;
    let (client, sql) = (here.client(), here.database().connect().await);
    let children = client.with_queue("children");
    children.create_queue().await.unwrap();
    let (mut grpc, mut elsewhere) = (here.raw().await, there.raw().await);
    let (_, mut messages) = open(&mut grpc, request(1)).await;
    for by_calls in [false, true] {
        let child = spawn(&children).await;
        spawn(&client).await;
        let parent = next_task(&mut messages).await;
        wait_for(child, &mut grpc, &parent).await;
        end("children", &sql, by_calls.then_some(&mut elsewhere)).await;
        let ended = Instant::now();
        let woken = next_task(&mut messages).await;
        assert_eq!(woken.run_id, parent.run_id);
        assert!(ended.elapsed() < SOON, "by calls: {by_calls}, {:?}", ended.elapsed());
        complete(&mut grpc, &woken).await;
    }
}

/// The end of a task at the replica where a run waits for it wakes that run at once: ten in a row take less than four
/// seconds, where ten looks would take ten.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_woken_at_once_by_an_end_at_its_replica() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let (client, sql) = (server.client(), server.database().connect().await);
    let children = client.with_queue("children");
    children.create_queue().await.unwrap();
    let mut grpc = server.raw().await;
    let (_, mut messages) = open(&mut grpc, request(1)).await;
    let mut waited = Duration::ZERO;
    for _ in 0..TURNS {
        let child = spawn(&children).await;
        spawn(&client).await;
        let parent = next_task(&mut messages).await;
        wait_for(child, &mut grpc, &parent).await;
        end("children", &sql, Some(&mut grpc)).await;
        let ended = Instant::now();
        let woken = next_task(&mut messages).await;
        waited += ended.elapsed();
        assert_eq!(woken.run_id, parent.run_id);
        complete(&mut grpc, &woken).await;
    }
    assert!(waited < Duration::from_secs(4), "{waited:?}");
}

/// A caller that begins to wait for a result wakes its replica's reads: an end of which no hint tells, by plain SQL or at
/// another replica, is answered in less than five seconds.
#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_begins_to_wait_is_answered_soon() {
    let here = Server::start_on_hints(&Database::new().await).await;
    let there = Server::start_on_hints(here.database()).await;
    let (client, sql) = (here.client(), here.database().connect().await);
    let mut elsewhere = there.raw().await;
    for by_calls in [false, true] {
        let task_id = spawn(&client).await;
        let waiting = tokio::spawn({
            let client = client.clone();
            async move { client.await_task_result(task_id, Some(Duration::from_secs(20))).await.unwrap() }
        });
        eventually("the caller waits", async || (here.app().engine().waits.count() == 1).then_some(())).await;
        end("q", &sql, by_calls.then_some(&mut elsewhere)).await;
        let ended = Instant::now();
        let told = in_time("the end is told", waiting).await.unwrap();
        assert_eq!(told.state, State::Completed);
        assert!(ended.elapsed() < SOON, "by calls: {by_calls}, {:?}", ended.elapsed());
    }
}
