//! The dispatcher, waits for ends, and the edge of the service: credit and claims that come back, sessions, long polls,
//! the bell; which calls are refused, how, and what an answer holds. Servers that start "on hints" look at their queues
//! once an hour, so that no look helps.

use std::time::{Duration, Instant, SystemTime};

use absurd_client::{
    AbsurdClient, Awaited, ClaimOptions, ClaimedTask, FindOptions, Json, NewWorkflowRun, PolicyChanges, QueueOptions,
    SpawnOptions, State, StorageMode,
};
use absurd_proto::v1 as pb;
use absurd_proto::v1::claim_stream_response::Message;
use absurd_proto::v1::test_clock_service_client::TestClockServiceClient;
use absurd_server::settings::Settings;
use absurd_server::store::failing::Fate;
use absurd_tests::{Database, Grpc, Server, ServerOptions, eventually, in_time, json};
use serde_json::{Value, json as j};
use tokio::task::JoinSet;
use tonic::codec::CompressionEncoding;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;

use super::serving::{PROBED, Pair, pair, until_armed};
use crate::limits;
use crate::streams::{Messages, complete, next, next_task, open, request, seconds};

/// Longest time until a task is pushed that nothing but an hourly look would find otherwise.
const SOON: Duration = Duration::from_secs(20);
/// Turns of which one must be quick, since the machine may be busy.
const TURNS: usize = 10;
/// The smallest limit of a message.
const SMALL: i32 = 16 * 1024;

async fn spawn(client: &AbsurdClient) -> Uuid {
    client.spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap().task_id
}

async fn claim(client: &AbsurdClient) -> ClaimedTask {
    client.claim_task(ClaimOptions::default()).await.unwrap().remove(0)
}

/// The plain queue `q` and a new partitioned one, each by its client.
async fn both_kinds(server: &Server) -> [AbsurdClient; 2] {
    let partitioned = QueueOptions { storage_mode: StorageMode::Partitioned, ..QueueOptions::default() };
    let parted = server.client().with_queue("parted");
    parted.create_queue_with(partitioned).await.unwrap();
    [server.client(), parted]
}

/// Gives a claim back.
async fn release(grpc: &mut Grpc, queue: &str, claim_token: &str) {
    let claims = vec![pb::ClaimRef { run_id: String::new(), claim_token: Some(claim_token.to_owned()) }];
    let request = pb::ReleaseClaimsRequest { queue: queue.to_owned(), claims, delay: None };
    let verdicts = grpc.release_claims(request).await.unwrap().into_inner().verdicts;
    assert_eq!(verdicts[0].verdict(), pb::Verdict::Released);
}

/// The next task of a stream, within a time that is far below an hour.
async fn soon(what: &str, messages: &mut Messages) -> pb::ClaimedTask {
    tokio::time::timeout(SOON, next_task(messages)).await.unwrap_or_else(|_| panic!("did not come soon: {what}"))
}

async fn has_streams(server: &Server, count: usize) {
    let dispatcher = &server.app().engine().dispatcher;
    eventually("the server has as many streams", async || (dispatcher.streams() == count).then_some(())).await;
}

async fn has_waits(server: &Server, count: usize) {
    let waits = &server.app().engine().waits;
    eventually("as many callers wait", async || (waits.count() == count).then_some(())).await;
}

fn reason(status: &Status) -> String {
    status.get_error_details().error_info().map(|info| info.reason.clone()).unwrap_or_default()
}

fn field(status: &Status) -> String {
    let details = status.get_error_details();
    let violation = details.bad_request().and_then(|bad| bad.field_violations.first());
    violation.map(|violation| violation.field.clone()).unwrap_or_default()
}

/// A full stream gets its credit back when its claim is given back, and when its run goes to sleep, both at another
/// replica: in one of ten turns, each of one release and one sleep, both next tasks come within 450 ms. The stream's
/// own first look at a claim comes half a second after it was made.
#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_ends_at_one_replica_frees_credit_at_another() {
    const QUICK: Duration = Duration::from_millis(450);
    let Pair { caller, worker, mut grpc, mut messages, sql: _ } = pair(1).await;
    let client = caller.client();
    for _ in 0..=TURNS {
        spawn(&client).await;
    }
    let mut task = next_task(&mut messages).await;
    let mut best = Duration::MAX;
    for _ in 0..TURNS {
        let began = Instant::now();
        release(&mut grpc, "q", &task.claim_token).await;
        let again = next_task(&mut messages).await;
        assert_eq!(again.run_id, task.run_id, "it kept its place");
        let sleep = pb::SleepRequest {
            queue: "q".into(),
            claim_token: Some(again.claim_token),
            step_name: "nap".into(),
            until: seconds(3600).map(pb::sleep_request::Until::Duration),
            ..Default::default()
        };
        grpc.sleep(sleep).await.unwrap();
        task = next_task(&mut messages).await;
        best = best.min(began.elapsed());
        if best < QUICK {
            break;
        }
    }
    assert!(best < QUICK, "the quickest of {TURNS} turns took {best:?}");
    drop(worker);
}

/// Four tasks wait for a stream that takes one at a time. Each completion brings the next one, though the server looks
/// at the queue once an hour.
#[tokio::test(flavor = "multi_thread")]
async fn returned_credit_is_used_without_a_look() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let (client, sql) = (server.client(), server.database().connect().await);
    let mut grpc = server.raw().await;
    let (_, mut messages) = open(&mut grpc, request(1)).await;
    until_armed(&sql, "q").await;
    tokio::time::sleep(PROBED).await;
    for _ in 0..4 {
        spawn(&client).await;
    }
    for _ in 0..4 {
        let task = soon("the next task", &mut messages).await;
        complete(&mut grpc, &task).await;
    }
}

/// A task is claimed for the first time, its worker says nothing, and the server gives it back after the start
/// deadline: it waits as if nobody had ever claimed it, and has not been started.
#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_was_given_back_leaves_no_start() {
    let server = Server::start().await;
    let mut grpc = server.raw().await;
    let clients = both_kinds(&server).await;
    let mut claimed = Vec::new();
    for client in &clients {
        let spawned = client.spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap();
        let asked = pb::ClaimTaskRequest {
            queue: client.queue_name().to_owned(),
            start_deadline: seconds(1),
            claim_timeout: seconds(3600),
            ..Default::default()
        };
        assert_eq!(grpc.claim_task(asked).await.unwrap().into_inner().tasks.len(), 1);
        assert!(client.get_task_status(spawned.task_id).await.unwrap().unwrap().first_started_at.is_some());
        claimed.push((client, spawned));
    }
    for (client, spawned) in claimed {
        let run = eventually("the claim is given back", async || {
            let run = client.get_run_status(spawned.run_id).await.unwrap().unwrap();
            (run.state == State::Pending).then_some(run)
        })
        .await;
        assert_eq!((run.attempt, run.started_at), (1, None));
        let task = client.get_task_status(spawned.task_id).await.unwrap().unwrap();
        assert_eq!((task.state, task.first_started_at), (State::Pending, None));
    }
}

/// A session opens a second stream, which ends the first one. The session is still known when the first one has gone:
/// its worker can be drained, and that ends the second stream.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_known_by_its_newest_stream() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let mut grpc = server.raw().await;
    let asked = || pb::ClaimStreamRequest { session_id: "s".into(), ..request(1) };
    let (_, mut older) = open(&mut grpc, asked()).await;
    let (_, mut newer) = open(&mut grpc, asked()).await;
    let Message::Ending(ending) = next(&mut older).await else { panic!("the older stream ends") };
    assert_eq!(ending.reason(), pb::EndReason::Superseded);
    assert!(in_time("the older stream is over", older.message()).await.unwrap().is_none());
    has_streams(&server, 1).await;
    let drain = pb::DrainWorkerRequest { queue: "q".into(), session_id: "s".into() };
    assert!(grpc.drain_worker(drain).await.unwrap().into_inner().ended);
    let Message::Ending(ending) = next(&mut newer).await else { panic!("the newer stream ends") };
    assert_eq!(ending.reason(), pb::EndReason::Drained);
}

/// The steps of a task do not fit into a message of 16 KiB, the smallest that a worker may ask for. The task comes
/// without them, to a call and to a stream, and says that there are more. In a larger message all of them come along.
#[tokio::test(flavor = "multi_thread")]
async fn steps_that_do_not_fit_are_said_to_be_missing() {
    let server = Server::start().await;
    let (client, mut grpc) = (server.client(), server.raw().await);
    let task_id = spawn(&client).await;
    let first = claim(&client).await;
    first.set_checkpoint("large", &"x".repeat(20_000)).await.unwrap();
    first.set_checkpoint("small", &1).await.unwrap();
    first.release(Duration::ZERO).await.unwrap();

    let asked = pb::ClaimTaskRequest { queue: "q".into(), max_message_bytes: SMALL, ..Default::default() };
    let task = grpc.claim_task(asked).await.unwrap().into_inner().tasks.remove(0);
    assert_eq!((task.checkpoints.len(), task.checkpoints_complete), (0, false), "by a call");
    release(&mut grpc, "q", &task.claim_token).await;

    let (_, mut messages) = open(&mut grpc, pb::ClaimStreamRequest { max_message_bytes: SMALL, ..request(1) }).await;
    let task = next_task(&mut messages).await;
    assert_eq!((task.checkpoints.len(), task.checkpoints_complete), (0, false), "by a stream");
    drop(messages);
    has_streams(&server, 0).await;
    release(&mut grpc, "q", &task.claim_token).await;

    let whole = claim(&client).await;
    assert_eq!((whole.task_id, whole.checkpoints.len(), whole.checkpoints_complete), (task_id, 2, true));
}

/// A call that does not wait and asks for one name gets the task of that name from behind 2,500 others, which is more
/// than one look covers.
#[tokio::test(flavor = "multi_thread")]
async fn a_poll_finds_its_name_behind_many_others() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    for client in both_kinds(&server).await {
        let others = "select absurd.spawn_task($1, 'other', 'null') from generate_series(1, 2500)";
        sql.execute(others, &[&client.queue_name()]).await.unwrap();
        let wanted = client.spawn_task("wanted", &j!(null), SpawnOptions::default()).await.unwrap().task_id;
        let options = ClaimOptions { task_names: vec!["wanted".into()], ..ClaimOptions::default() };
        let found = client.claim_task(options).await.unwrap();
        let found: Vec<Uuid> = found.iter().map(|task| task.task_id).collect();
        assert_eq!(found, [wanted], "{}", client.queue_name());
    }
}

/// The claim of a long poll fails once. The poll waits on, and gets the task by the next claim.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_poll_outlives_a_fault() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let client = server.client();
    let task_id = spawn(&client).await;
    let failing = server.app().engine().store.failing();
    // The first call looks for the queue.
    failing.arm(2, Fate::FailsBefore);
    let claimed = client.claim_task(ClaimOptions::default().wait(SOON)).await.unwrap();
    assert!(failing.disarm());
    let claimed: Vec<(Uuid, i32)> = claimed.iter().map(|task| (task.task_id, task.attempt)).collect();
    assert_eq!(claimed, [(task_id, 1)]);
}

/// The session that hears the bell is killed, twice. A task that plain SQL spawns afterwards comes all the same, though
/// the server looks at the queue once an hour.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_bell_is_made_up_for() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let sql = server.database().connect().await;
    let mut grpc = server.raw().await;
    let (_, mut messages) = open(&mut grpc, request(9)).await;
    for _ in 0..2 {
        until_armed(&sql, "q").await;
        tokio::time::sleep(PROBED).await;
        let kill = "select pid, pg_terminate_backend(pid) from pg_stat_activity
                     where datname = current_database() and application_name like '%(listen)'";
        let killed: i32 =
            eventually("the server listens", async || sql.query_opt(kill, &[]).await.unwrap().map(|row| row.get(0)))
                .await;
        eventually("that session has ended", async || {
            let left = sql.query_opt("select from pg_stat_activity where pid = $1", &[&killed]).await.unwrap();
            left.is_none().then_some(())
        })
        .await;
        sql.execute("select absurd.spawn_task('q', 'n', 'null')", &[]).await.unwrap();
        let task = soon("a task of plain SQL", &mut messages).await;
        complete(&mut grpc, &task).await;
    }
}

/// Of ten callers that wait for one task nine go away. One waits from then on, and hears of the end. When all that wait
/// for a task have gone away the server keeps no list of them.
#[tokio::test(flavor = "multi_thread")]
async fn callers_that_stop_waiting_are_in_no_list() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let (client, grpc) = (server.client(), server.raw().await);
    let wait = |task_id: Uuid| {
        let mut grpc = grpc.clone();
        let asked =
            pb::AwaitTaskResultRequest { queue: "q".into(), task_id: task_id.to_string(), timeout: seconds(600) };
        async move { grpc.await_task_result(asked).await }
    };
    let task_id = spawn(&client).await;
    let stays = tokio::spawn(wait(task_id));
    let mut leaving = JoinSet::new();
    for _ in 0..9 {
        leaving.spawn(wait(task_id));
    }
    has_waits(&server, 10).await;
    drop(leaving);
    has_waits(&server, 1).await;
    claim(&client).await.complete(&j!(7)).await.unwrap();
    let told = in_time("the one that stays hears of the end", stays).await.unwrap().unwrap().into_inner();
    assert!(told.done);
    assert_eq!(told.result.unwrap().result, json("7"));

    let task_id = spawn(&client).await;
    let mut leaving = JoinSet::new();
    for _ in 0..3 {
        leaving.spawn(wait(task_id));
    }
    has_waits(&server, 3).await;
    drop(leaving);
    has_waits(&server, 0).await;
    let counts = server.app().engine().under_way();
    assert!(counts.iter().all(|(what, _)| *what != "awaited tasks"), "{counts:?}");
}

/// The end of a task is told at once to those who wait for it at the replica where it ends. In one of three rounds ten
/// ends, one after the other, take less than six seconds; the server reads the ends of awaited tasks once a second, so
/// that ten of its reads are nine seconds apart.
#[tokio::test(flavor = "multi_thread")]
async fn an_end_is_told_at_once_where_it_happens() {
    const ROUND: Duration = Duration::from_secs(6);
    let server = Server::start_on_hints(&Database::new().await).await;
    let client = server.client();
    let mut best = Duration::MAX;
    for _ in 0..3 {
        let began = Instant::now();
        for _ in 0..TURNS {
            let task_id = spawn(&client).await;
            let task = claim(&client).await;
            let waiting = tokio::spawn({
                let client = client.clone();
                async move { client.await_task_result(task_id, Some(SOON)).await.unwrap() }
            });
            has_waits(&server, 1).await;
            task.complete(&j!(7)).await.unwrap();
            let told = in_time("the end is told", waiting).await.unwrap();
            assert_eq!((told.task_id, told.state), (task_id, State::Completed));
        }
        best = best.min(began.elapsed());
        if best < ROUND {
            return;
        }
    }
    panic!("the quickest round took {best:?}");
}

/// A queue may hold three tasks that wait. `SpawnTasks` takes any number of tasks for later beside those, and no fourth
/// one for now. The refusal names the delay in milliseconds to gRPC's own retry policies, the same as in its details.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_for_later_fits_into_a_full_queue() {
    let server = limits::server(Settings { max_backlog: Some(3), ..Settings::default() }).await;
    let mut grpc = server.raw().await;
    let now = pb::NewTask { task_name: "n".into(), ..Default::default() };
    let later = pb::NewTask { start: seconds(3600).map(pb::new_task::Start::Delay), ..now.clone() };
    let batch = |later_count: usize, now_count: usize| {
        let tasks = [vec![later.clone(); later_count], vec![now.clone(); now_count]].concat();
        pb::SpawnTasksRequest { queue: "q".into(), tasks }
    };
    grpc.spawn_tasks(batch(5, 0)).await.unwrap();
    grpc.spawn_tasks(batch(5, 3)).await.unwrap();
    let refused = grpc.spawn_tasks(batch(1, 1)).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::ResourceExhausted, "BACKLOG_FULL"));
    let details = refused.get_error_details();
    let delay = details.retry_info().unwrap().retry_delay.unwrap();
    let pushback = refused.metadata().get("grpc-retry-pushback-ms").unwrap().to_str().unwrap();
    assert_eq!(pushback, delay.as_millis().to_string());
    assert!(delay >= Duration::from_secs(1), "{delay:?}");
    grpc.spawn_tasks(batch(5, 0)).await.unwrap();
}

/// A call that is refused counts with the code of its refusal.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_call_counts_with_its_code() {
    let server = limits::server(Settings::default()).await;
    let counted = "absurd_rpcs_total{method=\"GetQueuePolicy\",code=\"NOT_FOUND\"}";
    let before = limits::metric(&server, counted).await;
    let refused = server.raw().await.get_queue_policy(pb::GetQueuePolicyRequest { queue: "nowhere".into() }).await;
    assert_eq!(refused.unwrap_err().code(), Code::NotFound);
    eventually("it is counted", async || (limits::metric(&server, counted).await > before).then_some(())).await;
}

/// A claim is given back, by a call of its own and as an item among outcomes: its run keeps its place before a younger
/// one.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_given_back_keeps_its_place() {
    let server = Server::start().await;
    let mut grpc = server.raw().await;
    for client in both_kinds(&server).await {
        let (older, younger) = (spawn(&client).await, spawn(&client).await);
        let task = claim(&client).await;
        assert_eq!(task.task_id, older);
        release(&mut grpc, client.queue_name(), task.claim_token()).await;
        let task = claim(&client).await;
        assert_eq!(task.task_id, older, "by a call");
        task.release(Duration::ZERO).await.unwrap();
        assert_eq!(claim(&client).await.task_id, older, "by an item");
        assert_eq!(claim(&client).await.task_id, younger);
    }
}

/// A deadline of eight digits, the most that gRPC allows, is kept: the server itself says that it has passed, before
/// the transport does.
#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_of_eight_digits_is_kept() {
    let server = Server::start().await;
    let client = server.client();
    spawn(&client).await;
    let held = claim(&client).await;
    let mut sql = server.database().connect().await;
    let lock = sql.transaction().await.unwrap();
    lock.execute("select from absurd.r_q where run_id = $1 for update", &[&held.run_id]).await.unwrap();
    let mut asked = Request::new(pb::CompleteTaskRequest {
        queue: "q".into(),
        claim_token: Some(held.claim_token().to_owned()),
        ..Default::default()
    });
    // Two seconds.
    asked.metadata_mut().insert("grpc-timeout", "02000000u".parse().unwrap());
    let late = in_time("the call is answered", server.raw().await.complete_task(asked)).await.unwrap_err();
    assert_eq!((late.code(), reason(&late).as_str()), (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"), "{late:?}");
    lock.rollback().await.unwrap();
}

/// Each span of a policy is its own: a read returns the value that was set, and setting one changes no other.
#[tokio::test(flavor = "multi_thread")]
async fn each_span_of_a_policy_is_its_own() {
    let server = Server::start().await;
    let days = |days: u64| Duration::from_secs(days * 86_400);
    for client in both_kinds(&server).await {
        let set = async |changes: PolicyChanges| {
            let policy = client.set_queue_policy(changes).await.unwrap();
            [policy.partition_lookahead, policy.partition_lookback, policy.cleanup_ttl, policy.detach_min_age]
        };
        let all = PolicyChanges {
            partition_lookahead: Some(days(56)),
            partition_lookback: Some(days(14)),
            cleanup_ttl: Some(days(7)),
            detach_min_age: Some(days(90)),
            ..PolicyChanges::default()
        };
        assert_eq!(set(all).await, [days(56), days(14), days(7), days(90)]);
        let one = PolicyChanges { partition_lookback: Some(days(21)), ..PolicyChanges::default() };
        assert_eq!(set(one).await, [days(56), days(21), days(7), days(90)]);
        let one = PolicyChanges { partition_lookahead: Some(days(63)), ..PolicyChanges::default() };
        assert_eq!(set(one).await, [days(63), days(21), days(7), days(90)]);
        let one = PolicyChanges { cleanup_ttl: Some(days(8)), ..PolicyChanges::default() };
        assert_eq!(set(one).await, [days(63), days(21), days(8), days(90)]);
        let one = PolicyChanges { detach_min_age: Some(days(91)), ..PolicyChanges::default() };
        assert_eq!(set(one).await, [days(63), days(21), days(8), days(91)]);
    }
}

/// A search through all queues goes on behind the first thousand names: it finds a task behind 1,000 names that only
/// plain SQL can have written, and says that it could not look at those.
#[tokio::test(flavor = "multi_thread")]
async fn a_search_goes_on_behind_a_thousand_queues() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let (client, sql) = (server.client(), server.database().connect().await);
    let task_id = spawn(&client).await;
    let names = "insert into absurd.queues (queue_name) select repeat('a', 60) || i from generate_series(1, 1000) i";
    sql.execute(names, &[]).await.unwrap();
    let found = client.find_tasks(&task_id.to_string(), FindOptions::default()).await.unwrap();
    let tasks: Vec<(Uuid, &str)> = found.tasks.iter().map(|task| (task.task_id, task.queue.as_str())).collect();
    assert_eq!((tasks, found.complete), (vec![(task_id, "q")], false));
}

/// A workflow record keeps all that it is made with.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_keeps_all_that_it_is_made_with() {
    let server = Server::start().await;
    let client = server.client();
    let run_id = Uuid::now_v7();
    let record = NewWorkflowRun {
        absurd_run_id: Some(run_id),
        workflow_hash: Some("cafe".into()),
        ..NewWorkflowRun::new("order_flow", "v2").inputs(j!({"order": 1})).created_by("me").tag("team", "a")
    };
    let id = client.create_workflow_run(record).await.unwrap();
    let kept = client.get_workflow_run(id).await.unwrap().unwrap();
    assert_eq!((kept.workflow_run_id, kept.absurd_run_id), (id, Some(run_id)));
    assert_eq!((kept.workflow_name.as_str(), kept.workflow_version.as_str()), ("order_flow", "v2"));
    assert_eq!((kept.workflow_hash.as_deref(), kept.created_by.as_deref()), (Some("cafe"), Some("me")));
    let value = |json: &Option<Json>| json.as_ref().unwrap().to::<Value>().unwrap();
    assert_eq!((value(&kept.inputs), value(&kept.tags)), (j!({"order": 1}), j!({"team": "a"})));
}

/// The payload of an event counts towards the size of its task's message. The task is put off where 16 KiB are all that
/// a worker takes, and comes with its payload to one that takes more.
#[tokio::test(flavor = "multi_thread")]
async fn a_payload_counts_towards_the_size_of_a_message() {
    let server = Server::start().await;
    let (client, sql, mut grpc) = (server.client(), server.database().connect().await, server.raw().await);
    let task_id = spawn(&client).await;
    let waiting = claim(&client).await.await_event("step", "e", None).await.unwrap();
    assert_eq!(waiting, Awaited::Suspended { wake_at: None });
    assert_eq!(client.emit_event("e", &"x".repeat(100_000)).await.unwrap().woken, 1);
    let asked = pb::ClaimTaskRequest { queue: "q".into(), max_message_bytes: SMALL, ..Default::default() };
    assert!(grpc.claim_task(asked).await.unwrap().into_inner().tasks.is_empty());
    eventually("the task is put off", async || {
        let put_off = "select state = 'sleeping' and available_at > now() from absurd.r_q";
        sql.query_one(put_off, &[]).await.unwrap().get::<_, bool>(0).then_some(())
    })
    .await;
    sql.batch_execute("update absurd.r_q set available_at = now()").await.unwrap();
    let task = claim(&client).await;
    let payload = task.event_payload.as_ref().unwrap();
    assert_eq!((task.task_id, payload.as_str().len()), (task_id, 100_002));
}

/// A caller that does not wait is told whether a task has ended: a completed, a failed and a cancelled one have, the
/// others have not.
#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_does_not_wait_hears_of_every_end() {
    let server = Server::start().await;
    let (client, mut grpc) = (server.client(), server.raw().await);
    let completed = spawn(&client).await;
    claim(&client).await.complete(&j!(1)).await.unwrap();
    let failed = spawn(&client).await;
    claim(&client).await.fail(&j!("x")).await.unwrap();
    let cancelled = spawn(&client).await;
    assert!(client.cancel_task_by_id(cancelled).await.unwrap().cancelled);
    let asleep = SpawnOptions::default().delay(Duration::from_secs(3600));
    let sleeping = client.spawn_task("n", &j!(null), asleep).await.unwrap().task_id;
    let running = spawn(&client).await;
    let held = claim(&client).await;
    let pending = spawn(&client).await;
    assert_eq!(held.task_id, running);
    for (task_id, state, done) in [
        (completed, pb::State::Completed, true),
        (failed, pb::State::Failed, true),
        (cancelled, pb::State::Cancelled, true),
        (sleeping, pb::State::Sleeping, false),
        (running, pb::State::Running, false),
        (pending, pb::State::Pending, false),
    ] {
        let task_id = task_id.to_string();
        let asked = pb::AwaitTaskResultRequest { queue: "q".into(), task_id, timeout: seconds(0) };
        let told = grpc.await_task_result(asked).await.unwrap().into_inner();
        assert_eq!((told.result.unwrap().state(), told.done), (state, done));
    }
}

/// A task is deleted while somebody waits for its end: the answer is that there is no such task.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_waits_for_a_deleted_task_is_told() {
    let server = Server::start().await;
    let (client, sql) = (server.client(), server.database().connect().await);
    let task_id = spawn(&client).await;
    let mut grpc = server.raw().await;
    let asked = pb::AwaitTaskResultRequest { queue: "q".into(), task_id: task_id.to_string(), timeout: seconds(50) };
    let waiting = tokio::spawn(async move { grpc.await_task_result(asked).await });
    has_waits(&server, 1).await;
    sql.batch_execute("delete from absurd.r_q; delete from absurd.t_q").await.unwrap();
    let told = in_time("the caller is told", waiting).await.unwrap().unwrap_err();
    assert_eq!((told.code(), reason(&told).as_str()), (Code::NotFound, "TASK_NOT_FOUND"));
}

/// A number or a text just beyond its bound is refused, and its field is named; at the bound it is taken.
#[tokio::test(flavor = "multi_thread")]
async fn bounds_are_kept_to_the_last_step() {
    let server = Server::start().await;
    let (client, mut grpc) = (server.client(), server.raw().await);
    for (factor, is_taken) in [(0.0, true), (-0.5, false), (f64::NEG_INFINITY, false)] {
        let kind = pb::RetryKind::Exponential.into();
        let strategy = pb::RetryStrategy { kind, factor: Some(factor), ..Default::default() };
        let task = pb::NewTask { task_name: "n".into(), retry_strategy: Some(strategy), ..Default::default() };
        let spawned = grpc.spawn_task(pb::SpawnTaskRequest { queue: "q".into(), task: Some(task) }).await;
        let refused = spawned.err().map(|status| field(&status));
        assert_eq!(refused, (!is_taken).then(|| "task.retry_strategy.factor".to_owned()), "{factor}");
    }
    let failed = claim(&client).await;
    failed.fail_for_good("x").await.unwrap();
    let task_id = failed.task_id.to_string();
    for (max_attempts, is_taken) in [(-1, false), (0, false), (2, true)] {
        let retry = pb::RetryTaskRequest {
            queue: "q".into(),
            task_id: task_id.clone(),
            max_attempts: Some(max_attempts),
            ..Default::default()
        };
        let refused = grpc.retry_task(retry).await.err().map(|status| field(&status));
        assert_eq!(refused, (!is_taken).then(|| "max_attempts".to_owned()), "{max_attempts}");
    }
    for (name, version, wrong) in
        [(200, 100, None), (201, 100, Some("workflow_name")), (200, 101, Some("workflow_version"))]
    {
        let record = NewWorkflowRun::new("n".repeat(name), "v".repeat(version));
        let refused = client.create_workflow_run(record).await.err();
        assert_eq!(refused.as_ref().and_then(|error| error.field()), wrong, "{refused:?}");
        assert_eq!(refused.is_some(), wrong.is_some(), "{refused:?}");
    }
}

/// The limits of a task's headers and of a request's header block are those of the settings.
#[tokio::test(flavor = "multi_thread")]
async fn the_limits_of_headers_can_be_set() {
    let settings = Settings { max_headers_bytes: Some(100), max_header_list_bytes: Some(4096), ..Settings::default() };
    let server = limits::server(settings).await;
    let mut grpc = server.raw().await;
    let spawn = |bytes: usize| {
        let headers = json(format!("{{\"h\":\"{}\"}}", "x".repeat(bytes - 8)));
        let task = pb::NewTask { task_name: "n".into(), headers, ..Default::default() };
        pb::SpawnTaskRequest { queue: "q".into(), task: Some(task) }
    };
    grpc.spawn_task(spawn(100)).await.unwrap();
    let refused = grpc.spawn_task(spawn(101)).await.unwrap_err();
    assert_eq!((reason(&refused).as_str(), field(&refused).as_str()), ("PAYLOAD_TOO_LARGE", "task.headers"));
    assert_eq!(refused.get_error_details().error_info().unwrap().metadata["limit"], "100");
    let stats = |bytes: usize| {
        let mut asked = Request::new(pb::GetQueueStatsRequest { queue: "q".into() });
        asked.metadata_mut().insert("x-large", "y".repeat(bytes).parse().unwrap());
        asked
    };
    grpc.get_queue_stats(stats(1000)).await.unwrap();
    assert!(in_time("the call is answered", grpc.get_queue_stats(stats(8000))).await.is_err());
}

/// The steps of a run that is claimed cannot be read. Nobody gets the run without them: it is offered again later, in
/// the same attempt, and brings them along.
#[tokio::test(flavor = "multi_thread")]
async fn a_claim_whose_steps_cannot_be_read_goes_to_nobody() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let client = server.client();
    let task_id = spawn(&client).await;
    let first = claim(&client).await;
    first.set_checkpoint("s", &1).await.unwrap();
    first.release(Duration::ZERO).await.unwrap();
    let failing = server.app().engine().store.failing();
    // The queue is looked for, the run is claimed, and its steps are read.
    failing.arm(3, Fate::FailsBefore);
    let none = client.claim_task(ClaimOptions::default()).await.unwrap();
    assert!(failing.disarm());
    assert_eq!(none.len(), 0);
    let task = eventually("the run is offered again", async || {
        client.claim_task(ClaimOptions::default()).await.unwrap().pop()
    })
    .await;
    assert_eq!((task.task_id, task.attempt, task.checkpoints_complete), (task_id, 1, true));
    assert_eq!(task.checkpoint("s").unwrap().unwrap().as_str(), "1");
}

/// `ExtendClaims` returns a verdict for each claim: held, finished by the claim itself, expired, cancelled, lost to
/// another claim, or no claim at all.
#[tokio::test(flavor = "multi_thread")]
async fn each_claim_is_told_what_it_is_worth() {
    use pb::Verdict::{Cancelled, Expired, Finished, Held, Invalid, Lost};
    let server = Server::start().await;
    let (mut grpc, sql) = (server.raw().await, server.database().connect().await);
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        for _ in 0..6 {
            spawn(&client).await;
        }
        let options = ClaimOptions::default().qty(6).claim_timeout(Duration::from_secs(3600));
        let claims = client.claim_task(options).await.unwrap();
        let [held, completed, failed, expired, cancelled, lost] = claims.as_slice() else {
            panic!("{} were claimed", claims.len())
        };
        completed.complete(&j!(1)).await.unwrap();
        failed.fail(&j!("x")).await.unwrap();
        let past =
            format!("update absurd.r_{queue} set claim_expires_at = now() - interval '1 second' where run_id = $1");
        sql.execute(&past, &[&expired.run_id]).await.unwrap();
        eventually("the lease is found to be over", async || {
            let run = client.get_run_status(expired.run_id).await.unwrap().unwrap();
            (run.state == State::Failed).then_some(())
        })
        .await;
        assert!(client.cancel_task_by_id(cancelled.task_id).await.unwrap().cancelled);
        lost.release(Duration::ZERO).await.unwrap();
        let newer = claim(&client).await;
        assert_eq!(newer.run_id, lost.run_id);

        let known = [held, completed, failed, expired, cancelled, lost, &newer].map(ClaimedTask::claim_token);
        let tokens = known.into_iter().chain(["garbage"]);
        let claims = tokens.map(|token| pb::ClaimRef { run_id: String::new(), claim_token: Some(token.to_owned()) });
        let extend =
            pb::ExtendClaimsRequest { queue: queue.to_owned(), claims: claims.collect(), extend_by: seconds(60) };
        let verdicts = grpc.extend_claims(extend).await.unwrap().into_inner().verdicts;
        let verdicts: Vec<pb::Verdict> = verdicts.iter().map(pb::ClaimVerdict::verdict).collect();
        assert_eq!(verdicts, [Held, Finished, Finished, Expired, Cancelled, Lost, Held, Invalid], "{queue}");
    }
}

/// A stream that opens with a claim in hand restores its lease, and is told when that ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_reopened_stream_is_told_the_ends_of_its_leases() {
    let server = Server::start().await;
    let (mut grpc, sql) = (server.raw().await, server.database().connect().await);
    let asked = pb::ClaimStreamRequest { claim_timeout: seconds(3600), ..request(1) };
    let (opened, mut messages) = open(&mut grpc, asked.clone()).await;
    spawn(&server.client()).await;
    let task = next_task(&mut messages).await;
    sql.batch_execute("update absurd.r_q set claim_expires_at = now() + interval '1 minute'").await.unwrap();
    let again = pb::ClaimStreamRequest {
        session_id: opened.session_id,
        held_claim_tokens: vec![task.claim_token, "garbage".into()],
        ..asked
    };
    let (opened, _newer) = open(&mut grpc, again).await;
    let stored = "select claim_expires_at, claim_expires_at > now() + interval '50 minutes' from absurd.r_q";
    let stored = sql.query_one(stored, &[]).await.unwrap();
    assert!(stored.get::<_, bool>(1), "the lease is as long as before");
    let told: Vec<Option<SystemTime>> =
        opened.held.iter().map(|held| held.claim_expires_at.map(|at| SystemTime::try_from(at).unwrap())).collect();
    assert_eq!(told, [Some(stored.get::<_, SystemTime>(0)), None]);
}

/// A part of a step's value is read by its task and by its run.
#[tokio::test(flavor = "multi_thread")]
async fn a_part_of_a_steps_value_is_read() {
    let server = Server::start().await;
    let (client, mut grpc) = (server.client(), server.raw().await);
    spawn(&client).await;
    let task = claim(&client).await;
    task.set_checkpoint("s", &"äbcdef").await.unwrap();
    let range = Some(pb::TextRange { offset: 2, limit: 3 });
    let of_task = pb::GetCheckpointRequest {
        queue: "q".into(),
        task_id: task.task_id.to_string(),
        checkpoint_name: "s".into(),
        state_range: range,
        ..Default::default()
    };
    let of_run = pb::GetRunCheckpointRequest {
        queue: "q".into(),
        run_id: task.run_id.to_string(),
        checkpoint_name: "s".into(),
        state_range: range,
    };
    let of_task = grpc.get_checkpoint(of_task).await.unwrap().into_inner().checkpoint.unwrap();
    let of_run = grpc.get_run_checkpoint(of_run).await.unwrap().into_inner().checkpoint.unwrap();
    for part in [of_task, of_run] {
        assert_eq!((part.state, part.state_length, part.state_omitted), (json("bcd"), 8, false));
    }
}

/// A call that says that it is not compressed gets an answer that is not, though it could read one that is.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_not_compressed_gets_such_an_answer() {
    let server = Server::start().await;
    let mut grpc = server.raw().await.accept_compressed(CompressionEncoding::Gzip);
    let task_id = spawn(&server.client()).await.to_string();
    let mut asked = Request::new(pb::GetTaskStatusRequest { queue: "q".into(), task_id, ..Default::default() });
    asked.metadata_mut().insert("grpc-encoding", "identity".parse().unwrap());
    let answer = grpc.get_task_status(asked).await.unwrap();
    assert!(answer.metadata().get("grpc-encoding").is_none(), "{:?}", answer.metadata());
}

/// The streams of a queue are counted without those of other queues.
#[tokio::test(flavor = "multi_thread")]
async fn streams_are_counted_by_queue() {
    let server = Server::start().await;
    let (client, mut grpc) = (server.client(), server.raw().await);
    let other = client.with_queue("other");
    other.create_queue().await.unwrap();
    let streams = async || {
        let here = client.get_queue_stats().await.unwrap().streams;
        (here, other.get_queue_stats().await.unwrap().streams)
    };
    assert_eq!(streams().await, (0, 0));
    let (_, first) = open(&mut grpc, request(1)).await;
    let (_, second) = open(&mut grpc, request(1)).await;
    let (_, third) = open(&mut grpc, pb::ClaimStreamRequest { queue: "other".into(), ..request(1) }).await;
    assert_eq!(streams().await, (2, 1));
    drop(first);
    eventually("one stream of two is left", async || (streams().await == (1, 1)).then_some(())).await;
    drop((second, third));
}

/// The clock of a test server says that it is set from the first time on, and no more once it goes with the real time
/// again.
#[tokio::test(flavor = "multi_thread")]
async fn a_test_clock_says_whether_it_is_set() {
    let settings = Settings { test_clock: Some(true), ..Settings::default() };
    let options = ServerOptions { settings, ..ServerOptions::default() };
    let server = Server::start_with(Database::new().await, options).await;
    let mut clock = TestClockServiceClient::connect(server.url()).await.unwrap();
    let told = clock.get_time(pb::GetTimeRequest {}).await.unwrap().into_inner();
    assert!(!told.is_set);
    let time = prost_types::Timestamp { seconds: 2_000_000_000, nanos: 0 };
    for set in [Some(time), None] {
        clock.set_time(pb::SetTimeRequest { time: set }).await.unwrap();
        let told = clock.get_time(pb::GetTimeRequest {}).await.unwrap().into_inner();
        let is_that_time = told.time.unwrap().seconds == time.seconds;
        assert_eq!((told.is_set, is_that_time), (set.is_some(), set.is_some()));
    }
}

/// An event has a payload of more than 3 MiB, which only plain SQL can emit. The answer to a wait says how long it is,
/// in characters; the client reads all of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_payload_that_is_too_large_for_an_answer_is_read_apart() {
    use pb::await_event_response::Outcome;
    const LENGTH: usize = 1_700_002;
    let server = Server::start().await;
    let (client, sql, mut grpc) = (server.client(), server.database().connect().await, server.raw().await);
    spawn(&client).await;
    let task = claim(&client).await;
    sql.execute("select absurd.emit_event('q', 'e', to_jsonb(repeat('é', 1700000)))", &[]).await.unwrap();
    let wait = pb::AwaitEventRequest {
        queue: "q".into(),
        claim_token: Some(task.claim_token().to_owned()),
        step_name: "first".into(),
        event_name: "e".into(),
        ..Default::default()
    };
    let outcome = grpc.await_event(wait).await.unwrap().into_inner().outcome.unwrap();
    let Outcome::PayloadOmitted(omitted) = outcome else { panic!("the payload is in the answer") };
    assert_eq!(usize::try_from(omitted.length), Ok(LENGTH));
    let Awaited::Payload(payload) = task.await_event("second", "e", None).await.unwrap() else {
        panic!("the client reads the payload")
    };
    let text = payload.as_str();
    assert_eq!(text.chars().count(), LENGTH);
    assert!(text.starts_with("\"é") && text.ends_with("é\""));
}

/// A failure whose message holds a character that Postgres does not store keeps its name and its traceback.
#[tokio::test(flavor = "multi_thread")]
async fn a_failure_that_is_cleaned_keeps_its_parts() {
    let server = Server::start().await;
    let client = server.client();
    spawn(&client).await;
    let held = claim(&client).await;
    let fail = pb::FailTaskRequest {
        queue: "q".into(),
        claim_token: Some(held.claim_token().to_owned()),
        reason: json(r#"{"name":"Broken","message":"a\u0000b","traceback":"line 7","other":1}"#),
        ..Default::default()
    };
    server.raw().await.fail_task(fail).await.unwrap();
    let failure = client.get_task_result(held.task_id).await.unwrap().failure.unwrap();
    let kept = j!({"name": "Broken", "message": "a\u{fffd}b", "traceback": "line 7"});
    assert_eq!(failure.to::<Value>().unwrap(), kept);
}
