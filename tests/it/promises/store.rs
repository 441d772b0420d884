//! Promises of the store, of the committers, and of what a replica does by itself, which no other test holds them to.

use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use absurd_client::durable::testing::TestClock;
use absurd_client::{
    AbsurdClient, ClaimOptions, ClaimedTask, ConnectOptions, Json, NewTask, NewWorkflowRun, QueueOptions,
    RetryStrategy, SpawnOptions, State, StorageMode, StreamOptions, WorkflowChange, WorkflowStatus,
};
use absurd_proto::v1 as pb;
use absurd_proto::v1::await_task_response::Outcome;
use absurd_proto::v1::cancel_task_request::Target;
use absurd_server::activity::What;
use absurd_server::app::App;
use absurd_server::settings::{Secret, Settings, Span};
use absurd_server::store::failing::Fate;
use absurd_server::store::migrate::{self, Options};
use absurd_tests::{Database, Grpc, PATIENCE, Server, ServerOptions, eventually, in_time};
use futures_util::future::join_all;
use serde_json::json as j;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_postgres::Client as Sql;
use tonic::transport::Endpoint;
use tonic::{Code, Request};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_types::StatusExt as _;
use uuid::Uuid;

use super::serving::{PROBED, until_armed};
use crate::streams::{Messages, complete, next_task, open, request, seconds};

const HOUR: Duration = Duration::from_secs(3600);
/// Longest time of a call that nothing holds up, at its quickest.
const QUICK: Duration = Duration::from_millis(200);
/// Turns of which one must be quick, since the machine may be busy.
const TURNS: usize = 10;
/// Sessions that a statement of a test keeps busy.
const ASLEEP: &str =
    "select count(*) from pg_stat_activity where datname = current_database() and wait_event = 'PgSleep'";

async fn server_with(settings: Settings) -> Server {
    Server::start_with(Database::new().await, ServerOptions { settings, ..ServerOptions::default() }).await
}

/// A new plain queue and a new partitioned one, each by its client.
async fn both_kinds(server: &Server) -> [AbsurdClient; 2] {
    let (plain, parted) = (server.client().with_queue("plain"), server.client().with_queue("parted"));
    plain.create_queue().await.unwrap();
    parted.create_queue_with(of(StorageMode::Partitioned)).await.unwrap();
    [plain, parted]
}

fn of(storage_mode: StorageMode) -> QueueOptions {
    QueueOptions { storage_mode, ..QueueOptions::default() }
}

async fn count(sql: &Sql, query: &str) -> i64 {
    sql.query_one(query, &[]).await.unwrap().get(0)
}

async fn spawn(client: &AbsurdClient, name: &str) -> Uuid {
    client.spawn_task(name, &j!(null), SpawnOptions::default()).await.unwrap().task_id
}

async fn claim(client: &AbsurdClient) -> ClaimedTask {
    let options = ClaimOptions::default().claim_timeout(24 * HOUR).wait(PATIENCE);
    in_time("a task can be claimed", client.claim_task(options)).await.unwrap().remove(0)
}

fn reason(status: &tonic::Status) -> String {
    status.get_error_details().error_info().unwrap().reason.clone()
}

fn new_task(name: &str) -> pb::NewTask {
    pb::NewTask { task_name: name.into(), ..Default::default() }
}

fn within<T>(limit: Duration, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(limit);
    request
}

/// Spawns tasks until one is handed over: it is claimed by the statement that makes it.
async fn until_handed_over(sql: &Sql, client: &AbsurdClient, grpc: &mut Grpc, messages: &mut Messages) {
    let handed = format!("select started_at = created_at from absurd.r_{} where run_id = $1", client.queue_name());
    in_time("spawned tasks go straight to the worker", async {
        loop {
            let warm = client.spawn_task("warm", &j!(null), SpawnOptions::default()).await.unwrap();
            let task = next_task(messages).await;
            complete(grpc, &task).await;
            tokio::time::sleep(Duration::from_millis(25)).await;
            if sql.query_one(&handed, &[&warm.run_id]).await.unwrap().get(0) {
                break;
            }
        }
    })
    .await;
}

/// A call of two tasks, one of which has the id of another task, is refused as a whole, also where a worker waits for the
/// good one: the next task that this worker gets is the one of the next call.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_call_hands_no_task_to_a_worker() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        let mut grpc = server.raw().await;
        let asked = pb::ClaimStreamRequest { queue: queue.into(), ..request(9) };
        let (_, mut messages) = open(&mut grpc, asked).await;
        let taken = spawn(&client, "taken").await;
        let task = next_task(&mut messages).await;
        complete(&mut grpc, &task).await;
        // A look at the queue may come between: seldom, so that a few rounds show what the call does.
        for round in 0..5 {
            until_handed_over(&sql, &client, &mut grpc, &mut messages).await;
            let conflicting = pb::NewTask { task_id: Some(taken.to_string()), ..new_task("another") };
            let tasks = vec![new_task("good"), conflicting];
            let refused = grpc.spawn_tasks(pb::SpawnTasksRequest { queue: queue.into(), tasks }).await.unwrap_err();
            assert_eq!(reason(&refused), "TASK_ID_CONFLICT", "{queue}");
            let next = spawn(&client, "next").await;
            let task = next_task(&mut messages).await;
            let got = (task.task_name.as_str(), task.task_id.clone());
            assert_eq!(got, ("next", next.to_string()), "{queue}, round {round}");
            complete(&mut grpc, &task).await;
        }
        let good = format!("select count(*) from absurd.t_{queue} where task_name = 'good'");
        assert_eq!(count(&sql, &good).await, 0);
    }
}

/// A cancellation is carried out and its answer is lost. The server does not try it again, since the second try would say
/// that this call has cancelled nothing: the answer is `OUTCOME_UNKNOWN`, for a task and for a run.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancellation_without_an_answer_is_not_tried_again() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let mut grpc = server.raw().await;
    let failing = server.app().engine().store.failing();
    for client in both_kinds(&server).await {
        let new = async || client.spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap();
        let (by_task, by_run) = (new().await, new().await);
        // The commit is the last call: after the beginning, the look at a run, and two statements about its task.
        for (commit, task_id, target) in [
            (4, by_task.task_id, Target::TaskId(by_task.task_id.to_string())),
            (5, by_run.task_id, Target::RunId(by_run.run_id.to_string())),
        ] {
            let cancel = pb::CancelTaskRequest { queue: client.queue_name().into(), target: Some(target) };
            failing.arm(commit, Fate::FailsAfter);
            let told = grpc.cancel_task(cancel.clone()).await.unwrap_err();
            assert!(failing.disarm(), "{cancel:?}");
            assert_eq!(reason(&told), "OUTCOME_UNKNOWN", "{cancel:?}");
            assert_eq!(client.get_task_result(task_id).await.unwrap().state, State::Cancelled);
            let again = grpc.cancel_task(cancel).await.unwrap().into_inner();
            assert_eq!((again.cancelled, again.state()), (false, pb::State::Cancelled));
        }
    }
}

/// A read whose answer is lost has changed nothing: its caller is told UNAVAILABLE, never that the outcome is unknown.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_without_an_answer_leaves_nothing_in_doubt() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let spawned = server.client().spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap();
    let (task_id, run_id) = (spawned.task_id.to_string(), spawned.run_id.to_string());
    let queue = || "q".to_owned();
    let failing = server.app().engine().store.failing();
    let mut grpc = server.raw().await;
    macro_rules! read {
        ($($method:ident($request:expr);)*) => {$(
            failing.arm(1, Fate::FailsAfter);
            let told = grpc.$method($request).await.unwrap_err();
            assert!(failing.disarm(), stringify!($method));
            let expected = (Code::Unavailable, "UNAVAILABLE".to_owned());
            assert_eq!((told.code(), reason(&told)), expected, stringify!($method));
            grpc.$method($request).await.unwrap();
        )*};
    }
    let name = || "s".to_owned();
    read! {
        get_task_status(pb::GetTaskStatusRequest { queue: queue(), task_id: task_id.clone(), ..Default::default() });
        get_task_result(pb::GetTaskResultRequest { queue: queue(), task_id: task_id.clone(), ..Default::default() });
        get_run_status(pb::GetRunStatusRequest { queue: queue(), run_id: run_id.clone() });
        list_tasks(pb::ListTasksRequest { queue: queue(), ..Default::default() });
        list_runs(pb::ListRunsRequest { queue: queue(), task_id: task_id.clone(), ..Default::default() });
        get_checkpoint(pb::GetCheckpointRequest {
            queue: queue(), task_id: task_id.clone(), checkpoint_name: name(), ..Default::default()
        });
        get_all_checkpoints(pb::GetAllCheckpointsRequest {
            queue: queue(), run_id: run_id.clone(), ..Default::default()
        });
        get_queue_stats(pb::GetQueueStatsRequest { queue: queue() });
        get_queue_policy(pb::GetQueuePolicyRequest { queue: queue() });
        list_queues(pb::ListQueuesRequest::default());
        list_workflow_runs(pb::ListWorkflowRunsRequest::default());
    }
}

/// A column changes its type after every connection for reads has prepared the statement that returns it: whoever reads
/// next gets an answer, and so do those after.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_whose_plan_is_stale_is_answered() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let sql = server.database().connect().await;
    let grpc = server.raw().await;
    let list = async || {
        let mut grpc = grpc.clone();
        grpc.list_queues(pb::ListQueuesRequest::default()).await.map(|page| page.into_inner().queues.len())
    };
    for told in join_all((0..20).map(|_| list())).await {
        assert_eq!(told.unwrap(), 1);
    }
    sql.batch_execute("alter table absurd.queues alter column storage_mode type varchar(40)").await.unwrap();
    for told in join_all((0..20).map(|_| list())).await {
        assert_eq!(told.unwrap(), 1);
    }
}

/// Twelve calls wait for rows that a transaction holds, and there are four connections for work: a spawn on another queue
/// is answered within 200 ms all the while, the best of ten turns.
#[tokio::test(flavor = "multi_thread")]
async fn calls_that_wait_for_held_rows_leave_connections_to_others() {
    let server = Server::start().await;
    let client = server.client().with_queue("held");
    client.create_queue().await.unwrap();
    let new = |index: i32| NewTask::new("n", &j!(index), SpawnOptions::default()).unwrap();
    let tasks = client.spawn_tasks((0..12).map(new).collect()).await.unwrap();
    let (holder, sql) = (server.database().connect().await, server.database().connect().await);
    holder.batch_execute("begin; select from absurd.t_held for update").await.unwrap();
    let grpc = server.raw().await;
    let mut calls = Vec::new();
    for task in tasks {
        let mut grpc = grpc.clone();
        let target = Some(Target::TaskId(task.task_id.to_string()));
        let cancel = within(PATIENCE, pb::CancelTaskRequest { queue: "held".into(), target });
        calls.push(tokio::spawn(async move { grpc.cancel_task(cancel).await.unwrap().into_inner().cancelled }));
    }
    let waiting = "select count(*) from pg_stat_activity
                    where datname = current_database() and wait_event_type = 'Lock' and query like '-- task_cancel%'";
    eventually("calls wait for the rows", || async { (count(&sql, waiting).await >= 2).then_some(()) }).await;
    let (other, mut best) = (server.client(), Duration::MAX);
    for _ in 0..TURNS {
        let began = Instant::now();
        spawn(&other, "n").await;
        best = best.min(began.elapsed());
        if best < QUICK {
            break;
        }
    }
    assert!(best < QUICK, "the quickest of {TURNS} turns took {best:?}");
    assert!(calls.iter().all(|call| !call.is_finished()), "the rows are held");
    holder.batch_execute("commit").await.unwrap();
    for call in calls {
        assert!(in_time("the call goes on", call).await.unwrap());
    }
}

/// Slow reads under way take half of four connections at most: writes on another queue pass by them.
#[tokio::test(flavor = "multi_thread")]
async fn slow_reads_leave_connections_to_writes() {
    let settings = Settings { max_connections: Some(4), ..Settings::default() };
    let options = ServerOptions { settings, slow_tick: true, ..ServerOptions::default() };
    let server = Server::start_with(Database::new().await, options).await;
    let other = server.client().with_queue("other");
    other.create_queue().await.unwrap();
    spawn(&server.client(), "n").await;
    let sql = server.database().connect().await;
    sql.batch_execute(
        "alter table absurd.t_q rename to t_away;
         create view absurd.t_q as select t.* from absurd.t_away t, (select pg_sleep(4)) s",
    )
    .await
    .unwrap();
    let grpc = server.raw().await;
    let mut reads = Vec::new();
    for _ in 0..4 {
        let mut grpc = grpc.clone();
        let list = pb::ListTasksRequest { queue: "q".into(), ..Default::default() };
        reads.push(tokio::spawn(async move { grpc.list_tasks(list).await.unwrap().into_inner().tasks.len() }));
    }
    eventually("reads are under way", || async { (count(&sql, ASLEEP).await >= 2).then_some(()) }).await;
    for _ in 0..5 {
        spawn(&other, "n").await;
    }
    assert!(reads.iter().all(|read| !read.is_finished()), "a write has waited for a read");
    for read in reads {
        assert_eq!(in_time("the read ends", read).await.unwrap(), 1);
    }
}

/// While spawns take all connections for work, a worker extends its lease and a caller reads a task: neither waits until one
/// of the spawns has ended.
#[tokio::test(flavor = "multi_thread")]
async fn extensions_and_reads_pass_by_slow_spawns() {
    let server = Server::start().await;
    let client = server.client();
    let slow = client.with_queue("slow");
    slow.create_queue().await.unwrap();
    let sql = server.database().connect().await;
    sql.batch_execute(
        "create function public.slow() returns trigger language plpgsql as $$
         begin perform pg_sleep(4); return new; end $$;
         create trigger slow before insert on absurd.t_slow for each row execute function public.slow()",
    )
    .await
    .unwrap();
    spawn(&client, "n").await;
    let held = claim(&client).await;
    let mut grpc = server.raw().await;
    // Of the eight connections four are for work. Spawns of one kind share one, calls of several have two.
    let one = |options: SpawnOptions| {
        let slow = slow.clone();
        tokio::spawn(async move { slow.spawn_task("n", &j!(null), options).await.map(drop) })
    };
    let many = || {
        let slow = slow.clone();
        let task = NewTask::new("n", &j!(null), SpawnOptions::default()).unwrap();
        tokio::spawn(async move { slow.spawn_tasks(vec![task]).await.map(drop) })
    };
    let spawns = [one(SpawnOptions::default()), one(SpawnOptions::default().idempotency_key("k")), many(), many()];
    eventually("four spawns are under way", || async { (count(&sql, ASLEEP).await == 4).then_some(()) }).await;
    let extend = pb::ExtendClaimRequest {
        queue: "q".into(),
        claim_token: Some(held.claim_token().to_owned()),
        extend_by: seconds(60),
        ..Default::default()
    };
    grpc.extend_claim(extend).await.unwrap();
    assert!(spawns.iter().all(|spawn| !spawn.is_finished()), "the extension has waited for a spawn");
    client.get_task_status(held.task_id).await.unwrap().unwrap();
    assert!(spawns.iter().all(|spawn| !spawn.is_finished()), "the read has waited for a spawn");
    for spawn in spawns {
        in_time("the spawn ends", spawn).await.unwrap().unwrap();
    }
}

/// Postgres takes no writes for a while, as a standby does until it is promoted. Sessions that were opened meanwhile never
/// take any; once the database does again, a spawn is carried out, and so is a call of two.
#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_cannot_write_are_replaced() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    let name = server.database().name();
    let grpc = server.raw().await;
    let one = async |limit: u64| {
        let spawn = pb::SpawnTaskRequest { queue: "q".into(), task: Some(new_task("n")) };
        let spawned = grpc.clone().spawn_task(within(Duration::from_secs(limit), spawn)).await;
        spawned.map(drop)
    };
    let two = async |limit: u64| {
        let spawn = pb::SpawnTasksRequest { queue: "q".into(), tasks: vec![new_task("n"); 2] };
        let spawned = grpc.clone().spawn_tasks(within(Duration::from_secs(limit), spawn)).await;
        spawned.map(drop)
    };
    let read_only = |told: Result<(), tonic::Status>| told.err()?.message().contains("read only").then_some(());
    sql.batch_execute(&format!("alter database {name} set default_transaction_read_only = on")).await.unwrap();
    sql.batch_execute(
        "select pg_terminate_backend(pid) from pg_stat_activity
          where datname = current_database() and pid <> pg_backend_pid()",
    )
    .await
    .unwrap();
    eventually("a spawn is refused", || async { read_only(one(1).await) }).await;
    eventually("a call of two is refused", || async { read_only(two(1).await) }).await;
    sql.batch_execute(&format!("alter database {name} reset default_transaction_read_only")).await.unwrap();
    one(20).await.unwrap();
    two(20).await.unwrap();
}

/// A queue whose tables were locked for twelve seconds opens within five after that, and not after as long again.
#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_was_locked_for_long_opens_soon() {
    let server = Server::start().await;
    let store = &server.app().engine().store;
    let session = server.database().connect().await;
    session
        .batch_execute(
            "begin;
             lock table absurd.t_q, absurd.r_q, absurd.c_q, absurd.e_q, absurd.w_q in access exclusive mode",
        )
        .await
        .unwrap();
    let mut grpc = server.raw().await;
    let spawn = pb::SpawnTaskRequest { queue: "q".into(), task: Some(new_task("n")) };
    let waiting = tokio::spawn(async move { grpc.spawn_task(within(PATIENCE, spawn)).await.map(drop) });
    eventually("the lock is known", || async { (store.locked_queues() == ["q"]).then_some(()) }).await;
    tokio::time::sleep(Duration::from_secs(12)).await;
    assert!(!waiting.is_finished(), "the queue is locked");
    session.batch_execute("commit").await.unwrap();
    let began = Instant::now();
    in_time("the queue opens", waiting).await.unwrap().unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

/// Steps of an attempt that take more than half a megabyte do not all ride along with the next one: it is told that some
/// are missing, gets the oldest, and reads all of them.
#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_is_told_of_steps_that_did_not_ride_along() {
    let server = Server::start().await;
    for client in both_kinds(&server).await {
        let retries = SpawnOptions::default().max_attempts(2).retry(RetryStrategy::Immediate);
        client.spawn_task("n", &j!(null), retries).await.unwrap();
        let first = claim(&client).await;
        for name in ["a", "b", "c"] {
            first.set_checkpoint(name, &j!("x".repeat(300_000))).await.unwrap();
        }
        first.fail(&j!("again")).await.unwrap();
        let second = claim(&client).await;
        let came: Vec<&str> = second.checkpoints.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!((second.attempt, came, second.checkpoints_complete), (2, vec!["a"], false));
        let all = client.get_all_checkpoints(second.task_id, second.run_id).await.unwrap();
        assert_eq!(all.len(), 3);
    }
}

/// The second attempt of a task is claimed and given back. When an hour has passed since the first one began, the task's
/// `max_duration` of an hour cancels it, and not a second before: a release does not forget when the task began.
#[tokio::test(flavor = "multi_thread")]
async fn a_release_keeps_the_time_at_which_the_task_began() {
    let server = server_with(Settings { test_clock: Some(true), ..Settings::default() }).await;
    let clock = TestClock::connect(&ConnectOptions::new(server.url())).unwrap();
    let clients = both_kinds(&server).await;
    clock.advance(Duration::ZERO).await.unwrap();
    let mut tasks = Vec::new();
    for client in clients {
        let options = SpawnOptions::default().max_duration(HOUR).max_attempts(2).retry(RetryStrategy::Immediate);
        let task_id = client.spawn_task("n", &j!(null), options).await.unwrap().task_id;
        claim(&client).await.fail(&j!("again")).await.unwrap();
        let second = claim(&client).await;
        assert_eq!((second.task_id, second.attempt), (task_id, 2));
        second.release(Duration::ZERO).await.unwrap();
        tasks.push((client, task_id));
    }
    clock.advance(HOUR - Duration::from_secs(1)).await.unwrap();
    for (client, task_id) in &tasks {
        assert_eq!(client.get_task_result(*task_id).await.unwrap().state, State::Pending, "{}", client.queue_name());
    }
    clock.advance(Duration::from_secs(1)).await.unwrap();
    for (client, task_id) in &tasks {
        eventually(&format!("the task of {} is cancelled", client.queue_name()), || async {
            let state = client.get_task_result(*task_id).await.unwrap().state;
            (state == State::Cancelled).then_some(())
        })
        .await;
    }
}

/// A task that is spawned for a time comes when that is there, though no look at the queue tells of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_task_for_a_time_comes_without_a_look() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let sql = server.database().connect().await;
    for client in both_kinds(&server).await {
        let mut grpc = server.raw().await;
        let asked = pb::ClaimStreamRequest { queue: client.queue_name().into(), ..request(9) };
        let (_, mut messages) = open(&mut grpc, asked).await;
        // An idle dispatcher has looked for later runs, and looks no more.
        until_armed(&sql, client.queue_name()).await;
        tokio::time::sleep(PROBED).await;
        let at = SystemTime::now() + Duration::from_secs(2);
        let options = SpawnOptions::default().start_at(at);
        let later = client.spawn_task("later", &j!(null), options).await.unwrap();
        let task = next_task(&mut messages).await;
        assert_eq!(task.task_id, later.task_id.to_string());
        assert!(SystemTime::now() >= at, "{} hands it out too early", client.queue_name());
    }
}

/// A server that looks fifteen times as often as others do, so that its chores come every second.
async fn quick_app(database: &Database) -> App {
    let settings = Settings {
        database_url: Some(Secret::from(database.url())),
        listen: Some(([127, 0, 0, 1], 0).into()),
        ..Settings::default()
    };
    let mut options = settings.into_app_options().unwrap();
    options.engine.tick = Duration::from_millis(100);
    App::start(options).await.unwrap()
}

/// Somebody emits an event, wakes ten of the thirty runs that wait for it, and is gone. A server that starts afterwards wakes
/// the others by itself, each with the payload.
#[tokio::test(flavor = "multi_thread")]
async fn an_emission_that_was_only_begun_is_finished() {
    let database = Database::new().await;
    let sql = database.connect().await;
    sql.batch_execute("select absurd.create_queue('plain'), absurd.create_queue('parted', 'partitioned')")
        .await
        .unwrap();
    for queue in ["plain", "parted"] {
        let spawn = format!("select absurd.spawn_task('{queue}', 'n', 'null') from generate_series(1, 30)");
        sql.batch_execute(&spawn).await.unwrap();
        let wait = format!(
            "select absurd.await_event('{queue}', c.task_id, c.run_id, 's', 'go', null)
               from absurd.claim_task('{queue}', 'w', 600, 30) c"
        );
        let asleep = format!("select count(*) from absurd.r_{queue} where state = 'sleeping'");
        eventually("all of them wait", || async {
            sql.batch_execute(&wait).await.unwrap();
            (count(&sql, &asleep).await == 30).then_some(())
        })
        .await;
        let begin = format!("select absurd_server.emit_events('{queue}', '{{go}}', '{{2}}', 10)");
        sql.batch_execute(&begin).await.unwrap();
        assert_eq!(count(&sql, &asleep).await, 20);
    }
    let app = quick_app(&database).await;
    for queue in ["plain", "parted"] {
        let woken = format!(
            "select count(*) from absurd.r_{queue} r join absurd.c_{queue} c on c.owner_run_id = r.run_id
              where r.state = 'pending' and c.checkpoint_name = 's' and c.state = '2'"
        );
        eventually("all of them are awake", || async { (count(&sql, &woken).await == 30).then_some(()) }).await;
    }
    eventually("nothing is left to wake", || async {
        (count(&sql, "select count(*) from absurd_server.emission").await == 0).then_some(())
    })
    .await;
    app.shut_down().await.unwrap();
}

/// A queue that cannot be read is looked at apart from the others; once it is mended it is looked at with them again.
#[tokio::test(flavor = "multi_thread")]
async fn a_mended_queue_joins_the_others() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    let looks = &server.app().engine().looks;
    let options = StreamOptions { task_names: vec!["none of these".into()], ..StreamOptions::default() };
    let _onlooker = server.client().claim_stream(options).await.unwrap();
    sql.batch_execute("alter table absurd.r_q rename column available_at to then_at").await.unwrap();
    eventually("it is looked at apart", || async { looks.is_troubled("q").then_some(()) }).await;
    sql.batch_execute("alter table absurd.r_q rename column then_at to available_at").await.unwrap();
    eventually("it has joined the others", || async { (!looks.is_troubled("q")).then_some(()) }).await;
}

/// Lets a new run of a queue wait for a new task of another one; that task.
async fn wait_for_a_child(grpc: &mut Grpc, parents: &AbsurdClient, children: &AbsurdClient) -> Uuid {
    spawn(parents, "parent").await;
    let parent = claim(parents).await;
    let child = spawn(children, "child").await;
    let wait = pb::AwaitTaskRequest {
        queue: parents.queue_name().into(),
        claim_token: Some(parent.claim_token().to_owned()),
        step_name: "child".into(),
        awaited_queue: children.queue_name().into(),
        awaited_task_id: child.to_string(),
        ..Default::default()
    };
    let outcome = grpc.await_task(wait).await.unwrap().into_inner().outcome.unwrap();
    assert!(matches!(outcome, Outcome::Suspended(_)), "{outcome:?}");
    child
}

/// One queue makes the statement fail that looks at all awaited tasks: a run that waits for a task of another queue is woken
/// all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_breaks_the_look_at_awaited_tasks_keeps_no_other_parent_asleep() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    let mut grpc = server.raw().await;
    let client = |queue: &str| server.client().with_queue(queue);
    for queue in ["spoilt", "bad", "good"] {
        client(queue).create_queue().await.unwrap();
    }
    let bad = wait_for_a_child(&mut grpc, &client("spoilt"), &client("bad")).await;
    let good = wait_for_a_child(&mut grpc, &client("q"), &client("good")).await;
    // Of all errors of a trigger only a failed assertion is nobody's to catch.
    sql.batch_execute(
        "create function public.refuse() returns trigger language plpgsql as $$
         begin assert false, 'no event can be emitted'; return new; end $$;
         create trigger refuse before insert or update on absurd.e_spoilt
           for each row execute function public.refuse()",
    )
    .await
    .unwrap();
    // By SQL, which tells no replica: only a look at all that is awaited finds them.
    sql.execute("select absurd.cancel_task('bad', $1), absurd.cancel_task('good', $2)", &[&bad, &good]).await.unwrap();
    let woken = client("q").claim_task(ClaimOptions::default().wait(Duration::from_secs(20))).await.unwrap();
    let names: Vec<&str> = woken.iter().map(|task| task.task_name.as_str()).collect();
    assert_eq!(names, ["parent"]);
    let asleep = "select count(*) from absurd.r_spoilt where state = 'sleeping'";
    assert_eq!(count(&sql, asleep).await, 1);
}

fn every(upkeep: Duration) -> ServerOptions {
    let settings = Settings { upkeep: Some(Span(upkeep)), ..Settings::default() };
    ServerOptions { settings, without_queue: true, ..ServerOptions::default() }
}

/// A round of upkeep takes so many batches of a queue as there are to delete, and is noted with all that it has deleted.
#[tokio::test(flavor = "multi_thread")]
async fn a_round_of_upkeep_leaves_nothing_old() {
    let database = Database::new().await;
    let sql = database.connect().await;
    sql.batch_execute("select absurd.create_queue('plain'), absurd.create_queue('parted', 'partitioned')")
        .await
        .unwrap();
    for queue in ["plain", "parted"] {
        sql.batch_execute(&format!(
            "select absurd.set_queue_policy('{queue}', '{{\"cleanup_ttl\": 0, \"cleanup_limit\": 3}}');
             select absurd.emit_event('{queue}', 'e' || i) from generate_series(1, 7) i;
             select absurd.spawn_task('{queue}', 'n', 'null') from generate_series(1, 10);
             select absurd.cancel_task('{queue}', task_id) from absurd.t_{queue}"
        ))
        .await
        .unwrap();
    }
    // The first round comes within two seconds, the next one twenty after it.
    let server = Server::start_with(database, every(Duration::from_secs(20))).await;
    let noted = "select tasks_deleted, events_deleted from absurd_server.upkeep where queue_name = $1";
    for queue in ["plain", "parted"] {
        let round = eventually("a round is noted", || async {
            let row = sql.query_opt(noted, &[&queue]).await.unwrap()?;
            let round: (i64, i64) = (row.get(0), row.get(1));
            (round != (0, 0)).then_some(round)
        })
        .await;
        assert_eq!(round, (10, 7), "{queue}");
        assert_eq!(count(&sql, &format!("select count(*) from absurd.t_{queue}")).await, 0);
    }
    server.stop().await;
}

/// A queue whose old tasks take long to delete has its part of each round, and the next queue has its own: that one is
/// clean while the first one still has old tasks.
#[tokio::test(flavor = "multi_thread")]
async fn upkeep_of_a_slow_queue_leaves_time_to_the_next() {
    let database = Database::new().await;
    let sql = database.connect().await;
    sql.batch_execute(
        "select absurd.create_queue('a_slow'), absurd.create_queue('b_quick');
         select absurd.set_queue_policy(q, '{\"cleanup_ttl\": 0, \"cleanup_limit\": 1}')
           from unnest(array['a_slow', 'b_quick']) q;
         select absurd.spawn_task('a_slow', 'n', 'null') from generate_series(1, 60);
         select absurd.spawn_task('b_quick', 'n', 'null');
         select absurd.cancel_task('a_slow', task_id) from absurd.t_a_slow;
         select absurd.cancel_task('b_quick', task_id) from absurd.t_b_quick;
         create function public.slow() returns trigger language plpgsql as $$
         begin perform pg_sleep(0.25); return old; end $$;
         create trigger slow before delete on absurd.t_a_slow for each row execute function public.slow()",
    )
    .await
    .unwrap();
    let server = Server::start_with(database, every(Duration::from_secs(1))).await;
    eventually("the quick queue is clean", || async {
        (count(&sql, "select count(*) from absurd.t_b_quick").await == 0).then_some(())
    })
    .await;
    let left = count(&sql, "select count(*) from absurd.t_a_slow").await;
    assert!((1..60).contains(&left), "the slow queue came first, and has {left} of 60 tasks");
    server.stop().await;
}

/// The first line of a page beside the service.
async fn status_line(address: SocketAddr, path: &str) -> String {
    let mut socket = TcpStream::connect(address).await.unwrap();
    let get = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    socket.write_all(get.as_bytes()).await.unwrap();
    let mut text = String::new();
    in_time("the page comes", socket.read_to_string(&mut text)).await.unwrap();
    text.lines().next().unwrap_or_default().to_owned()
}

/// A newer server has migrated the database, and this one must not serve it: `/readyz` and the health service say so, and
/// say that all is well again where that is taken back.
#[tokio::test(flavor = "multi_thread")]
async fn readiness_goes_with_health() {
    let server = crate::limits::server(Settings::default()).await;
    let sql = server.database().connect().await;
    let address = server.app().metrics_addr().unwrap();
    let channel = Endpoint::from_shared(server.url()).unwrap().connect().await.unwrap();
    let health = HealthClient::new(channel);
    let told = async || {
        let checked = health.clone().check(HealthCheckRequest::default()).await.unwrap().into_inner().status();
        (status_line(address, "/readyz").await, checked)
    };
    let (well, ill) = ("HTTP/1.1 200 OK", "HTTP/1.1 503 Service Unavailable");
    for (min_server, line, status) in
        [(0, well, ServingStatus::Serving), (99, ill, ServingStatus::NotServing), (0, well, ServingStatus::Serving)]
    {
        sql.execute("update absurd_server.migration set min_server = $1", &[&min_server]).await.unwrap();
        let expected = (line.to_owned(), status);
        eventually(&format!("min_server {min_server}: {line}"), || async { (told().await == expected).then_some(()) })
            .await;
    }
}

/// A server that looks at its queues once an hour is healthy: it reads the database's clock by itself.
#[tokio::test(flavor = "multi_thread")]
async fn health_does_not_depend_on_looks() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let channel = Endpoint::from_shared(server.url()).unwrap().connect().await.unwrap();
    let mut health = HealthClient::new(channel).watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(health.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    // After six seconds of silence the database counts as gone.
    let told = tokio::time::timeout(Duration::from_secs(9), health.message()).await;
    assert!(told.is_err(), "health has changed: {told:?}");
}

/// Calls that are refused because a queue is full take no room in it: a smaller call that fits is accepted right after them.
#[tokio::test(flavor = "multi_thread")]
async fn refused_tasks_take_no_room() {
    let server = server_with(Settings { max_backlog: Some(10), ..Settings::default() }).await;
    for client in both_kinds(&server).await {
        let grpc = server.raw().await;
        let spawn = async |count: usize| {
            let tasks = vec![new_task("n"); count];
            let spawn = pb::SpawnTasksRequest { queue: client.queue_name().into(), tasks };
            let spawned = grpc.clone().spawn_tasks(spawn).await;
            spawned.map(drop).map_err(|status| reason(&status))
        };
        let full = || Err("BACKLOG_FULL".to_owned());
        assert_eq!(spawn(8).await, Ok(()));
        for _ in 0..3 {
            assert_eq!(spawn(3).await, full());
        }
        assert_eq!(spawn(2).await, Ok(()));
        assert_eq!(spawn(1).await, full());
    }
}

/// One stream of a connection is not read for five times as long as a client may take no answer; another one is. The
/// connection stands, and the one that is read gets its tasks.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_read_keeps_its_connection() {
    let settings = Settings {
        max_stall: Some(Span(Duration::from_secs(1))),
        heartbeat: Some(Span(Duration::from_millis(300))),
        ..Settings::default()
    };
    let server = server_with(settings).await;
    let client = server.client();
    let mut grpc = server.raw().await;
    let (_, unread) = open(&mut grpc, request(100)).await;
    let large = "x".repeat(200_000);
    // More than the client's side takes of a stream that nobody reads.
    for _ in 0..2 {
        let tasks = (0..20).map(|_| NewTask::new("large", &large, SpawnOptions::default()).unwrap()).collect();
        client.spawn_tasks(tasks).await.unwrap();
    }
    let (_, mut read) = open(&mut grpc, request(1)).await;
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until {
        spawn(&client, "small").await;
        let task = next_task(&mut read).await;
        complete(&mut grpc, &task).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    drop(unread);
}

/// Each address has its own number of streams: one that has none yet opens its first beside a caller that has as many as it
/// may.
#[tokio::test(flavor = "multi_thread")]
async fn streams_of_one_address_leave_room_to_another() {
    let server = server_with(Settings { max_streams_per_caller: Some(1), ..Settings::default() }).await;
    let from = async |address: [u8; 4]| {
        let endpoint = Endpoint::from_shared(server.url()).unwrap().local_address(Some(address.into()));
        Grpc::new(endpoint.connect().await.unwrap())
    };
    let mut streams = Vec::new();
    for address in [[127, 0, 0, 1], [127, 0, 0, 2]] {
        let mut grpc = from(address).await;
        let (_, messages) = open(&mut grpc, request(1)).await;
        let refused = grpc.claim_stream(request(1)).await.unwrap_err();
        assert_eq!(reason(&refused), "STREAM_LIMIT", "{address:?}");
        streams.push((grpc, messages));
    }
    drop(streams);
}

/// Whoever has taken the doorbell down, or hung it in an adopted database, has chosen: later migrations that say nothing of
/// it leave it so.
#[tokio::test(flavor = "multi_thread")]
async fn a_migration_keeps_the_choice_of_the_doorbell() {
    // Without a server, which would hang the bells of new queues.
    let database = Database::new().await;
    let sql = database.connect().await;
    sql.batch_execute("select absurd.create_queue('q')").await.unwrap();
    let config: tokio_postgres::Config = database.url().parse().unwrap();
    let migrate = async |doorbell: bool, no_doorbell: bool| {
        migrate::migrate(&config, Options { doorbell, no_doorbell }).await.unwrap().doorbell
    };
    let hung = async || {
        count(&sql, "select count(*) from pg_trigger where tgname = 'absurd_server_doorbell' and tgparentid = 0").await
    };
    assert_eq!((migrate(false, false).await, hung().await), (true, 2), "in a database of ours it hangs");
    assert_eq!((migrate(false, true).await, hung().await), (false, 0));
    assert_eq!((migrate(false, false).await, hung().await), (false, 0), "it stays down");
    sql.execute("update absurd_server.setting set value = 'adopted' where name = 'origin'", &[]).await.unwrap();
    assert_eq!((migrate(false, false).await, hung().await), (false, 0));
    assert_eq!((migrate(true, false).await, hung().await), (true, 2));
    assert_eq!((migrate(false, false).await, hung().await), (true, 2), "it stays up");
}

/// A role that may make no schemas can see what a migration would do where the schemas are; in an empty database it is told
/// what it lacks.
#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_makes_no_schemas_may_look() {
    let (database, empty) = (Database::new().await, Database::empty().await);
    let sql = database.connect().await;
    let role = format!("looker_{}", database.name());
    sql.batch_execute(&format!(
        "create role {role} login; grant usage on schema absurd, absurd_server to {role};
         grant select on all tables in schema absurd, absurd_server to {role}"
    ))
    .await
    .unwrap();
    let config = |database: &Database| -> tokio_postgres::Config {
        database.url().replace("//absurd@", &format!("//{role}@")).parse().unwrap()
    };
    let report = migrate::check(&config(&database), Options::default()).await.unwrap();
    assert!(report.applied.is_empty(), "{report:?}");
    let refused = migrate::migrate(&config(&empty), Options::default()).await.unwrap_err().to_string();
    assert!(refused.contains("may not create schemas") && refused.contains(&role), "{refused}");
}

/// The error of a workflow run is stored as its error, its result as its result, and each stays when the other one comes.
#[tokio::test(flavor = "multi_thread")]
async fn the_error_of_a_workflow_run_is_kept() {
    let server = Server::start().await;
    let client = server.client();
    let id = client.create_workflow_run(NewWorkflowRun::new("order_flow", "1")).await.unwrap();
    let json = |value: serde_json::Value| Some(Json::of(&value).unwrap());
    let update = async |status: WorkflowStatus, change: WorkflowChange| {
        assert!(client.update_workflow_run_status(id, status, change).await.unwrap());
        let record = client.get_workflow_run(id).await.unwrap().unwrap();
        (record.error.map(|error| error.to_string()), record.result.map(|result| result.to_string()))
    };
    let failed = WorkflowChange { error: json(j!({"message": "no"})), ..WorkflowChange::default() };
    let error = Some("{\"message\": \"no\"}".to_owned());
    assert_eq!(update(WorkflowStatus::Failed, failed).await, (error.clone(), None));
    let result = WorkflowChange { result: json(j!(7)), ..WorkflowChange::default() };
    assert_eq!(update(WorkflowStatus::Completed, result).await, (error, Some("7".into())));
}

/// What Postgres says about a run that cannot be claimed is kept with it, up to 500 characters.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_problem_is_kept_in_short() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    sql.batch_execute(
        "create function public.refuse() returns trigger language plpgsql as $$
         begin raise exception '%', repeat('é', 3000); end $$;
         create trigger refuse before update of state on absurd.t_q
           for each row when (new.state = 'running') execute function public.refuse()",
    )
    .await
    .unwrap();
    spawn(&server.client(), "n").await;
    assert!(server.client().claim_task(ClaimOptions::default()).await.unwrap().is_empty());
    let kept = eventually("it is set aside", || async {
        let row = sql.query_opt("select problem from absurd_server.quarantine", &[]).await.unwrap()?;
        Some(row.get::<_, String>(0))
    })
    .await;
    assert_eq!(kept, "é".repeat(500));
}

/// A queue whose tables were dropped, and that is registered still, is missing to whoever creates it: it is made anew, once,
/// and works.
#[tokio::test(flavor = "multi_thread")]
async fn a_queue_without_tables_is_made_anew() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    for (client, mode) in
        both_kinds(&server).await.into_iter().zip([StorageMode::Unpartitioned, StorageMode::Partitioned])
    {
        let queue = client.queue_name();
        for kind in ["i", "w", "e", "c", "r", "t"] {
            sql.batch_execute(&format!("drop table if exists absurd.{kind}_{queue} cascade")).await.unwrap();
        }
        assert!(client.create_queue_with(of(mode)).await.unwrap(), "{queue} was missing");
        assert!(!client.create_queue_with(of(mode)).await.unwrap(), "{queue} is there");
        let task_id = spawn(&client, "n").await;
        assert_eq!(claim(&client).await.task_id, task_id);
    }
}

/// A caller reads a part of a long text of letters that take four bytes. It gets as much as an answer holds, and no half of a
/// letter; the client puts the parts together.
#[tokio::test(flavor = "multi_thread")]
async fn a_part_of_a_text_ends_with_a_letter() {
    let server = Server::start().await;
    let client = server.client();
    let sql = server.database().connect().await;
    let task_id = spawn(&client, "n").await;
    sql.batch_execute("update absurd.t_q set state = 'completed', completed_payload = to_jsonb(repeat('😀', 1000000))")
        .await
        .unwrap();
    let part = pb::GetTaskResultRequest {
        queue: "q".into(),
        task_id: task_id.to_string(),
        result_range: Some(pb::TextRange { offset: 0, limit: 1_000_000 }),
    };
    let part = server.raw().await.get_task_result(part).await.unwrap().into_inner().result.unwrap().result.unwrap();
    // One byte, and as many times four as fit into the rest of 3 MiB.
    assert_eq!(part.text.len(), 3 * 1024 * 1024 - 3);
    assert!(part.text.strip_prefix('"').unwrap().chars().all(|letter| letter == '😀'));
    let whole = client.get_task_result(task_id).await.unwrap().result.unwrap();
    assert!(whole.as_str() == format!("\"{}\"", "😀".repeat(1_000_000)), "the parts make the whole");
}

/// Counts of a queue are taken after they were asked for: each one shows the task that was spawned before.
#[tokio::test(flavor = "multi_thread")]
async fn counts_show_what_was_there_before_the_question() {
    let server = Server::start().await;
    for client in both_kinds(&server).await {
        for spawned in 0..5 {
            assert_eq!(client.get_queue_stats().await.unwrap().pending, spawned, "{}", client.queue_name());
            spawn(&client, "n").await;
        }
    }
}

/// Whoever watches a server hears what becomes of a task, in order, with the number of each attempt.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_watches_hears_of_each_attempt() {
    let server = Server::start().await;
    let client = server.client();
    let mut feed = server.app().engine().feed.watch();
    let retries = SpawnOptions::default().max_attempts(2).retry(RetryStrategy::Immediate);
    let spawned = client.spawn_task("n", &j!(null), retries).await.unwrap();
    claim(&client).await.fail(&j!("again")).await.unwrap();
    claim(&client).await.complete(&j!(1)).await.unwrap();
    let mut heard = Vec::new();
    while heard.len() < 5 {
        let activity = in_time("something happens", feed.recv()).await.unwrap();
        assert_eq!((activity.queue.as_str(), activity.task_id), ("q", spawned.task_id));
        heard.push(match activity.what {
            What::Spawned { name } => format!("{name} is spawned"),
            What::Pushed { name, attempt } => format!("{name} is pushed, attempt {attempt}"),
            What::Ended { state } => format!("it is {}", state.as_str()),
        });
    }
    let expected =
        ["n is spawned", "n is pushed, attempt 1", "it is pending", "n is pushed, attempt 2", "it is completed"];
    assert_eq!(heard, expected);
}
