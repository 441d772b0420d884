//! The client and its durable execution, once more: what a call keeps through a lost answer and a dead connection, what
//! a claim shows and keeps, what a worker, a handler and a task in memory are told.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use absurd_client::durable::testing::{Progress, TestTask, Wake};
use absurd_client::durable::{Absurd, BoxError, Context, Hooks, TaskError, TaskType, WorkerOptions};
use absurd_client::{
    AbsurdClient, Available, Awaited, ClaimOptions, ClaimStream, ClaimedTask, ConnectOptions, DetachMode, Json,
    NewTask, NewWorkflowRun, PolicyChanges, QueueOptions, QueuePolicy, Reason, RetryOptions, RetryStrategy, Revoked,
    Slept, SpawnOptions, State, StorageMode, StreamOptions, TaskResult, blocking,
};
use absurd_server::settings::Settings;
use absurd_tests::{Database, Link, PATIENCE, Server, ServerOptions, Target, Toxic, eventually, in_time};
use serde_json::{Value, json as j};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_postgres::Client;
use uuid::Uuid;

const HOUR: Duration = Duration::from_secs(3600);
const CHILD: TaskType<u32, u32> = TaskType::new("child");
const ELSEWHERE: TaskType<Value, Value> = TaskType::new("elsewhere").on_queue("other");
const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

fn tasks(count: usize) -> Vec<NewTask> {
    (0..count).map(|index| NewTask::new("n", &j!(index), SpawnOptions::default()).unwrap()).collect()
}

async fn spawn(server: &Server) -> Uuid {
    server.client().spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap().task_id
}

async fn claim(client: &AbsurdClient) -> ClaimedTask {
    client.claim_task(ClaimOptions::default()).await.unwrap().remove(0)
}

async fn next(stream: &mut ClaimStream) -> ClaimedTask {
    in_time("a task arrives", stream.next()).await.unwrap()
}

async fn has_streams(server: &Server, count: usize) {
    eventually("the server has as many streams", || async {
        (server.app().engine().dispatcher.streams() == count).then_some(())
    })
    .await;
}

async fn one<T: for<'a> tokio_postgres::types::FromSql<'a>>(sql: &Client, query: &str) -> T {
    sql.query_one(query, &[]).await.unwrap_or_else(|error| panic!("{query}: {error:?}")).get(0)
}

/// A way to a server over two links in a row.
struct Way {
    server: Target,
    near: Link,
    far: Link,
}

impl Way {
    async fn to(server: &Server) -> Self {
        let far = Link::before(&server.url()).await;
        let near = Link::before(&far.url()).await;
        Self { server: Target::Port(server.app().addr().port()), near, far }
    }

    /// A client whose one connection goes over both links.
    async fn client(&self, keepalive: Duration) -> AbsurdClient {
        let options = ConnectOptions { keepalive, ..ConnectOptions::new(self.near.url()) };
        let client = AbsurdClient::connect(&options).unwrap().with_queue("q");
        client.get_queue_stats().await.unwrap();
        client
    }

    /// Connections that come from now on lead to the server past the far link.
    fn shorten(&self) {
        self.near.lead_to(self.server.clone());
    }
}

/// Makes a call whose first answer is lost: once `done` holds in the database the connection ends, before the client
/// has heard of anything. It asks again over another connection.
async fn without_an_answer<T, F>(server: &Server, done: &str, call: impl FnOnce(AbsurdClient) -> F) -> T
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let way = Way::to(server).await;
    let client = way.client(HOUR).await;
    let sql = server.database().connect().await;
    way.far.set(Toxic::Hole(false, true));
    let calling = tokio::spawn(call(client));
    eventually("the call is carried out", || async { one::<bool>(&sql, done).await.then_some(()) }).await;
    way.shorten();
    way.far.set(Toxic::Reset);
    let answer = in_time("the call is answered", calling).await.unwrap();
    assert!(way.near.connections() > 1, "the first answer is lost");
    answer
}

/// The answers of a spawn, of a spawn of several tasks, of a retry that makes a copy and of a new workflow run are
/// lost. The client repeats each call and gets its answer, and nothing is made twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_whose_answer_is_lost_is_carried_out_once() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    let count = async || one::<i64>(&sql, "select count(*) from absurd.t_q").await;
    let spawned = without_an_answer(&server, "select count(*) = 1 from absurd.t_q", |client| async move {
        client.spawn_task("n", &j!(null), SpawnOptions::default()).await
    })
    .await
    .unwrap();
    assert_eq!((count().await, one::<Uuid>(&sql, "select task_id from absurd.t_q").await), (1, spawned.task_id));
    let several = without_an_answer(&server, "select count(*) = 4 from absurd.t_q", |client| async move {
        client.spawn_tasks(tasks(3)).await
    })
    .await
    .unwrap();
    assert_eq!((count().await, several.len()), (4, 3));
    let failed = claim(&server.client()).await;
    failed.fail("on purpose").await.unwrap();
    let (task_id, retry) = (failed.task_id, RetryOptions { spawn_new: true, ..RetryOptions::default() });
    let copy = without_an_answer(&server, "select count(*) = 5 from absurd.t_q", move |client| async move {
        client.retry_task(task_id, retry).await
    })
    .await
    .unwrap();
    assert_eq!(count().await, 5);
    assert_ne!(copy.task_id, task_id);
    let stored = "select count(*) = 1 from absurd_server.workflow_run";
    without_an_answer(&server, stored, |client| async move {
        client.create_workflow_run(NewWorkflowRun::new("flow", "1")).await
    })
    .await
    .unwrap();
    assert!(one::<bool>(&sql, stored).await, "one workflow run");
}

/// A connection goes dead without a word. The pings of its client, a second apart, find out; the read that waits for
/// its answer is repeated over a new connection and succeeds before its deadline.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_goes_dead_is_replaced() {
    let server = Server::start().await;
    let way = Way::to(&server).await;
    let client = way.client(Duration::from_secs(1)).await;
    way.far.set(Toxic::Hole(true, true));
    way.shorten();
    in_time("the read is answered", client.get_queue_stats()).await.unwrap();
}

/// The deadline of a client is for the time beyond what a call was asked to wait for. A claim that waits for a task and
/// a wait for a result are under way when nothing gets through any more, while two reads run out of that deadline, one
/// after the other. Both go on waiting, and get what comes then.
#[tokio::test(flavor = "multi_thread")]
async fn a_wait_may_be_longer_than_the_deadline_of_calls() {
    let server = Server::start().await;
    let link = Link::before(&server.url()).await;
    let options = ConnectOptions { deadline: Duration::from_secs(1), ..ConnectOptions::new(link.url()) };
    let client = AbsurdClient::connect(&options).unwrap().with_queue("q");
    let first = spawn(&server).await;
    let held = claim(&server.client()).await;
    let claiming = tokio::spawn({
        let client = client.clone();
        async move { client.claim_task(ClaimOptions::default().wait(PATIENCE)).await }
    });
    let awaiting = tokio::spawn({
        let client = client.clone();
        async move { client.await_task_result(first, Some(PATIENCE)).await }
    });
    eventually("both are under way", async || (server.app().calls() == 2).then_some(())).await;
    link.set(Toxic::Hole(true, true));
    for _ in 0..2 {
        let late = in_time("the read ends", client.get_queue_stats()).await.unwrap_err();
        assert_eq!(late.reason(), Reason::DeadlineExceeded, "{late}");
    }
    link.set(Toxic::Pass);
    held.complete(&j!("late")).await.unwrap();
    let second = spawn(&server).await;
    let claimed = in_time("the claim is answered", claiming).await.unwrap().unwrap();
    assert_eq!(claimed[0].task_id, second);
    let end = in_time("the result comes", awaiting).await.unwrap().unwrap();
    assert_eq!((end.state, end.result), (State::Completed, Some(Json::from(j!("late")))));
}

/// A stream that breaks as soon as it is open, time and again, is opened ever more rarely: at most ten times in five
/// seconds. Once it stays open, it serves.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_breaks_at_once_opens_ever_more_rarely() {
    let server = Server::start().await;
    let link = Link::before(&server.url()).await;
    let client = AbsurdClient::connect(&ConnectOptions::new(link.url())).unwrap().with_queue("q");
    let mut stream = client.claim_stream(StreamOptions::default()).await.unwrap();
    let (began, mut openings) = (Instant::now(), 0);
    while began.elapsed() < Duration::from_secs(5) {
        link.set(Toxic::Reset);
        has_streams(&server, 0).await;
        link.set(Toxic::Pass);
        has_streams(&server, 1).await;
        openings += 1;
    }
    assert!(openings <= 10, "{openings} openings");
    let task_id = spawn(&server).await;
    assert_eq!(next(&mut stream).await.task_id, task_id);
}

/// A port where connections are taken and nothing is ever said, and how many there were.
async fn silent_door() -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let knocks = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&knocks);
    tokio::spawn(async move {
        let mut taken = Vec::new();
        while let Ok((socket, _)) = listener.accept().await {
            taken.push(socket);
            count.fetch_add(1, SeqCst);
        }
    });
    (port, knocks)
}

/// A stream breaks, and the other of two replicas takes its connection and says nothing. The client gives that opening
/// up, and opens the stream at the first replica, which is back.
#[tokio::test(flavor = "multi_thread")]
async fn a_reopening_that_gets_no_answer_is_given_up() {
    let server = Server::start().await;
    let (door, knocks) = silent_door().await;
    let link = Link::before(&server.url()).await;
    // At first nobody listens there, so that the stream opens at the server.
    let silent = Link::to(Target::Port(1)).await.unwrap();
    let urls = format!("{},{}", link.url(), silent.url());
    let options = ConnectOptions { keepalive: HOUR, ..ConnectOptions::new(urls) };
    let client = AbsurdClient::connect(&options).unwrap().with_queue("q");
    let mut stream = client.claim_stream(StreamOptions::default()).await.unwrap();
    silent.lead_to(Target::Port(door));
    link.set(Toxic::Reset);
    eventually("the client tries the silent one", || async { (knocks.load(SeqCst) > 0).then_some(()) }).await;
    link.set(Toxic::Pass);
    let task_id = spawn(&server).await;
    assert_eq!(next(&mut stream).await.task_id, task_id);
}

/// A task is at work for more than twice the start deadline of its stream, and is not given back: the stream shows that
/// the task has arrived, long before it would extend a lease of two minutes.
#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_has_arrived_is_not_given_back() {
    let server = Server::start().await;
    let options = StreamOptions {
        claim_timeout: Duration::from_secs(120),
        start_deadline: Some(Duration::from_secs(3)),
        ..StreamOptions::default()
    };
    let mut stream = server.client().claim_stream(options).await.unwrap();
    spawn(&server).await;
    let task = next(&mut stream).await;
    tokio::time::sleep(Duration::from_secs(7)).await;
    assert_eq!(task.is_revoked(), None);
    task.complete(&j!("first claim")).await.unwrap();
}

/// A run waits for an event that has come already, another sleeps for no time. Both go on: the stream keeps their
/// leases, three leases long, and they hear that their tasks were cancelled.
#[tokio::test(flavor = "multi_thread")]
async fn a_claim_is_kept_after_a_wait_that_is_over() {
    let server = Server::start().await;
    let client = server.client();
    client.emit_event("e", &j!(1)).await.unwrap();
    let options = StreamOptions {
        max_in_flight: 2,
        claim_timeout: Duration::from_secs(2),
        start_deadline: None,
        ..StreamOptions::default()
    };
    let mut stream = client.claim_stream(options).await.unwrap();
    client.spawn_tasks(tasks(2)).await.unwrap();
    let (waiter, sleeper) = (next(&mut stream).await, next(&mut stream).await);
    let awaited = waiter.await_event("s", "e", None).await.unwrap();
    assert_eq!(awaited, Awaited::Payload(Json::from(j!(1))));
    assert_eq!(sleeper.sleep("z", Duration::ZERO).await.unwrap(), Slept::Elapsed);
    let sql = server.database().connect().await;
    let both_run = eventually("the leases are three times as long as they were, or over", || async {
        let runs = "select bool_and(state = 'running'),
                           bool_and(coalesce(claim_expires_at > started_at + interval '6 s', false)) from absurd.r_q";
        let row = sql.query_one(runs, &[]).await.unwrap();
        let (are_running, are_long): (bool, bool) = (row.get(0), row.get(1));
        (!are_running || are_long).then_some(are_running)
    })
    .await;
    assert!(both_run, "a lease has ended");
    for task in [waiter, sleeper] {
        assert!(client.cancel_task_by_id(task.task_id).await.unwrap().cancelled);
        assert_eq!(in_time("the worker hears of it", task.revoked()).await, Revoked::Cancelled);
    }
}

/// The server refuses calls about a run that show no claim token. Calls that name only the run show the token of the
/// claim that was made through their client, whatever they are about.
#[tokio::test(flavor = "multi_thread")]
async fn calls_by_the_id_of_a_run_show_its_token() {
    let settings = Settings { require_claim_token: Some(true), ..Settings::default() };
    let options = ServerOptions { settings, ..ServerOptions::default() };
    let server = Server::start_with(Database::new().await, options).await;
    let client = server.client();
    client.spawn_tasks(tasks(7)).await.unwrap();
    let claimed = client.claim_task(ClaimOptions::default().qty(7)).await.unwrap();
    let run = |index: usize| claimed[index].run_id;
    client.extend_claim(run(0), HOUR).await.expect("an extension");
    client.set_checkpoint(claimed[0].task_id, "one", &j!(1), run(0), None).await.expect("a step");
    client.save_checkpoint_for_run(run(0), "two", &j!(2), None).await.expect("a step of a run");
    client.complete_task(run(0), &j!(null)).await.expect("a completion");
    client.fail_task(run(1), "on purpose", None).await.expect("a failure");
    client.release_claim(run(2), HOUR / 2).await.expect("a release");
    client.sleep(run(3), HOUR, None).await.expect("a sleep");
    client.schedule_task_after(run(4), HOUR).await.expect("a schedule");
    client.await_event(None, run(5), "s", "e", None).await.expect("a wait");
    client.set_run_sleeping(run(6), "e").await.expect("an orchestrator's sleep");
}

/// A task of 6 MiB, more than what gRPC clients take by default, is claimed whole.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_task_is_claimed_whole() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    sql.execute("select absurd.spawn_task('q', 'huge', to_jsonb(repeat('x', 6 * 1024 * 1024)))", &[]).await.unwrap();
    let options = ClaimOptions::default().wait(Duration::from_secs(20));
    let task = server.client().claim_task(options).await.unwrap().remove(0);
    assert_eq!(task.params.as_ref().map(|params| params.as_str().len()), Some(6 * 1024 * 1024 + 2));
}

/// What a spawn asks for is stored with its task: the retry strategy with its bound, the rules of cancellation,
/// headers, the key, and an hour's delay.
#[tokio::test(flavor = "multi_thread")]
async fn a_spawn_stores_what_it_asks_for() {
    let server = Server::start().await;
    let client = server.client();
    let seconds = Duration::from_secs;
    let strategy = RetryStrategy::Exponential { base: seconds(10), factor: 3.0, max: Some(seconds(60)) };
    let options = SpawnOptions::default()
        .max_attempts(4)
        .retry(strategy)
        .max_delay(seconds(7200))
        .max_duration(seconds(9000))
        .header("h", "x")
        .idempotency_key("k")
        .delay(HOUR);
    let spawned = client.spawn_task("n", &j!({"a": 1}), options).await.unwrap();
    let task = client.get_task_status(spawned.task_id).await.unwrap().unwrap();
    let strategy: Value = task.retry_strategy.unwrap().to().unwrap();
    let number = |key: &str| strategy[key].as_f64();
    assert_eq!(strategy["kind"], "exponential");
    assert_eq!(["base_seconds", "factor", "max_seconds"].map(number), [Some(10.0), Some(3.0), Some(60.0)]);
    let rules: Value = task.cancellation.unwrap().to().unwrap();
    assert_eq!(rules, j!({"max_delay": 7200, "max_duration": 9000}));
    let headers: Value = task.headers.unwrap().to().unwrap();
    assert_eq!((headers, task.idempotency_key.as_deref(), task.max_attempts), (j!({"h": "x"}), Some("k"), Some(4)));
    let run = client.get_run_status(spawned.run_id).await.unwrap().unwrap();
    let Available::At(at) = run.available_at else { panic!("it has a time") };
    let delay = at.duration_since(task.enqueue_at.unwrap()).unwrap();
    assert!(delay > HOUR - seconds(60) && delay < HOUR + seconds(60), "{delay:?}");
}

fn days(days: u64) -> Duration {
    Duration::from_secs(days * 24 * 3600)
}

/// The policy of a partitioned queue of which all was said.
fn whole(changes: PolicyChanges) -> QueuePolicy {
    QueuePolicy {
        storage_mode: StorageMode::Partitioned,
        default_partition: changes.default_partition.unwrap(),
        partition_lookahead: changes.partition_lookahead.unwrap(),
        partition_lookback: changes.partition_lookback.unwrap(),
        cleanup_ttl: changes.cleanup_ttl.unwrap(),
        cleanup_limit: changes.cleanup_limit.unwrap(),
        detach_mode: changes.detach_mode.unwrap(),
        detach_min_age: changes.detach_min_age.unwrap(),
    }
}

/// Each value of a policy is kept in its own place, whether the queue is created with it or gets it later.
#[tokio::test(flavor = "multi_thread")]
async fn a_policy_is_kept_as_it_was_given() {
    let server = Server::start().await;
    let client = server.client().with_queue("parted");
    let policy = PolicyChanges {
        default_partition: Some(false),
        partition_lookahead: Some(days(21)),
        partition_lookback: Some(days(3)),
        cleanup_ttl: Some(days(7)),
        cleanup_limit: Some(5),
        detach_mode: Some(DetachMode::Empty),
        detach_min_age: Some(days(60)),
    };
    let options = QueueOptions { storage_mode: StorageMode::Partitioned, policy };
    assert!(client.create_queue_with(options).await.unwrap());
    assert_eq!(client.get_queue_policy().await.unwrap(), whole(policy));
    let policy = PolicyChanges {
        default_partition: Some(true),
        partition_lookahead: Some(days(14)),
        partition_lookback: Some(days(2)),
        cleanup_ttl: Some(days(8)),
        cleanup_limit: Some(6),
        detach_mode: Some(DetachMode::None),
        detach_min_age: Some(days(90)),
    };
    assert_eq!(client.set_queue_policy(policy).await.unwrap(), whole(policy));
    assert_eq!(client.get_queue_policy().await.unwrap(), whole(policy));
}

/// The list of queues goes on past its first thousand.
#[tokio::test(flavor = "multi_thread")]
async fn all_of_many_queues_are_listed() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let sql = server.database().connect().await;
    let insert = "insert into absurd.queues (queue_name) select 'n' || i from generate_series(1, 2500) i";
    sql.batch_execute(insert).await.unwrap();
    let queues = server.client().list_queues().await.unwrap();
    let names: HashSet<&str> = queues.iter().map(|queue| queue.name.as_str()).collect();
    assert_eq!((queues.len(), names.len()), (2501, 2501));
}

/// A failure that another attempt would not mend ends its task in the blocking client too, with attempts to spare.
#[test]
fn a_final_failure_ends_its_task_in_the_blocking_client() {
    let runtime = Runtime::new().unwrap();
    let server = runtime.block_on(Server::start());
    let client = blocking::AbsurdClient::connect(&ConnectOptions::new(server.url())).unwrap().with_queue("q");
    let spawned = client.spawn_task("n", &j!(null), SpawnOptions::default().max_attempts(3)).unwrap();
    let claimed = client.claim_task(ClaimOptions::default().wait(PATIENCE)).unwrap().remove(0);
    let outcome = claimed.fail_for_good("it is gone").unwrap();
    assert_eq!((outcome.task_state, outcome.next), (Some(State::Failed), None));
    assert_eq!(client.get_task_result(spawned.task_id).unwrap().state, State::Failed);
}

/// A step moves the end of the lease to the worker's claim timeout from now.
#[tokio::test(flavor = "multi_thread")]
async fn a_step_extends_the_lease_to_its_full_length() {
    let server = Server::start().await;
    spawn(&server).await;
    let task = claim(&server.client()).await;
    let ctx = Absurd::new(server.client()).context_of(&task, HOUR).await.unwrap();
    ctx.step("s", async || Ok::<_, BoxError>(1)).await.unwrap();
    let sql = server.database().connect().await;
    let left: f64 = one(&sql, "select extract(epoch from claim_expires_at - now())::float8 from absurd.r_q").await;
    assert!(left > 3000.0 && left <= 3600.0, "{left}");
}

/// A task spawns 1,001 children in one call, more than one request may hold. A second execution that does not know of
/// it, as after a crash before the step was stored, gets the same children, and none is made twice.
#[tokio::test(flavor = "multi_thread")]
async fn more_children_than_a_request_holds_are_spawned_once() {
    let server = Server::start().await;
    spawn(&server).await;
    let task = claim(&server.client()).await;
    let absurd = Absurd::new(server.client());
    let mut executions = Vec::new();
    for _ in 0..2 {
        let ctx = absurd.context_of(&task, Duration::from_secs(60)).await.unwrap();
        executions.push(ctx.spawn_all(&CHILD, 0..1001).await.unwrap());
    }
    let distinct: HashSet<&Uuid> = executions[0].iter().collect();
    assert_eq!(distinct.len(), 1001);
    assert_eq!(executions[0], executions[1]);
    let sql = server.database().connect().await;
    assert_eq!(one::<i64>(&sql, "select count(*) from absurd.t_q").await, 1 + 1001);
}

/// Steps whose values do not fit into the message that brings the task are read, and not done again.
#[tokio::test(flavor = "multi_thread")]
async fn steps_that_do_not_come_along_are_not_done_again() {
    let server = Server::start().await;
    let client = server.client();
    let options = SpawnOptions::default().max_attempts(2);
    let task_id = client.spawn_task("n", &j!(null), options).await.unwrap().task_id;
    let first = claim(&client).await;
    first.set_checkpoint("large", &j!("x".repeat(600_000))).await.unwrap();
    first.set_checkpoint("charge", &j!("by the first attempt")).await.unwrap();
    first.fail("on purpose").await.unwrap();
    let absurd = Absurd::new(server.client());
    absurd.register("n", |ctx: Context, _: Value| async move {
        let by: String = ctx.step("charge", async || Ok::<_, BoxError>("by the second attempt".to_owned())).await?;
        Ok::<_, BoxError>(by)
    });
    assert_eq!(absurd.work_batch(WorkerOptions::default(), 1).await.unwrap(), 1);
    let end = client.get_task_result(task_id).await.unwrap();
    assert_eq!((end.state, end.result), (State::Completed, Some(Json::from(j!("by the first attempt")))));
}

/// A result with U+0000, which no JSON in Postgres holds, and a failure of 20 MiB, more than a message may have: each
/// fails its attempt at once. The record of the first one says why, that of the second one has the beginning of the
/// text.
#[tokio::test(flavor = "multi_thread")]
async fn an_outcome_that_cannot_be_stored_fails_its_attempt() {
    let server = Server::start().await;
    let client = server.client();
    let absurd = Absurd::new(server.client());
    absurd.register("n", |_: Context, how: Value| async move {
        match how.as_str() {
            Some("result") => Ok("a\0b"),
            _ => Err(BoxError::from("x".repeat(20 << 20))),
        }
    });
    for (how, name, message) in [("result", "ResultRefused", "\\u0000"), ("failure", "Error", "xxx")] {
        let spawned = client.spawn_task("n", &j!(how), SpawnOptions::default()).await.unwrap();
        assert_eq!(absurd.work_batch(WorkerOptions::default(), 1).await.unwrap(), 1);
        let end = client.get_task_result(spawned.task_id).await.unwrap();
        assert_eq!(end.state, State::Failed, "{how}");
        let recorded: Value = end.failure.unwrap().to().unwrap();
        let text = recorded["message"].as_str().unwrap();
        assert_eq!(recorded["name"], name, "{how}");
        assert!(text.contains(message) && text.len() < 20_000, "{how}: {} bytes", text.len());
    }
}

/// A batch claims as many tasks as it is told to, or as there are.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_as_large_as_it_is_told() {
    let server = Server::start().await;
    let client = server.client();
    let absurd = Absurd::new(server.client());
    absurd.register("n", |_: Context, _: Value| async { Ok::<_, BoxError>(()) });
    client.spawn_tasks(tasks(5)).await.unwrap();
    assert_eq!(absurd.work_batch(WorkerOptions::default(), 3).await.unwrap(), 3);
    assert_eq!(client.get_queue_stats().await.unwrap().completed, 3);
    assert_eq!(absurd.work_batch(WorkerOptions::default(), 10).await.unwrap(), 2);
}

/// A worker claims under the id of its options, in a batch and on a stream.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_claims_under_the_id_of_its_options() {
    let server = Server::start().await;
    let client = server.client();
    let absurd = Absurd::new(server.client());
    let task = absurd.register("n", |_: Context, _: Value| async { Ok::<_, BoxError>(()) });
    let named = |id: &str| {
        let mut options = WorkerOptions::default().concurrency(1);
        options.worker_id = Some(id.to_owned());
        options
    };
    let claimed_by = async |run_id: Uuid| client.get_run_status(run_id).await.unwrap().unwrap().claimed_by;
    let first = absurd.spawn(&task, &j!(null)).await.unwrap();
    assert_eq!(absurd.work_batch(named("batch"), 1).await.unwrap(), 1);
    assert_eq!(claimed_by(first.run_id).await.as_deref(), Some("batch"));
    let worker = absurd.start_worker(named("stream")).await.unwrap();
    let second = absurd.spawn(&task, &j!(null)).await.unwrap();
    let end = absurd.await_task_result(&task, second.task_id, Some(PATIENCE)).await.unwrap();
    assert_eq!(end.state, State::Completed);
    assert_eq!(claimed_by(second.run_id).await.as_deref(), Some("stream"));
    worker.stop().await;
}

/// A registration takes the queue of its task type: a spawn under the bare name goes to that queue, and the result is
/// asked for there.
#[tokio::test(flavor = "multi_thread")]
async fn a_registration_takes_the_queue_of_its_task_type() {
    let server = Server::start().await;
    let other = server.client().with_queue("other");
    other.create_queue().await.unwrap();
    let absurd = Absurd::new(server.client());
    absurd.register(ELSEWHERE, |_: Context, params: Value| async move { Ok::<_, BoxError>(params) });
    let bare = TaskType::<Value, Value>::new("elsewhere");
    let spawned = absurd.spawn(&bare, &j!(1)).await.unwrap();
    let claimed = claim(&other).await;
    assert_eq!(claimed.task_id, spawned.task_id);
    claimed.complete(&j!(2)).await.unwrap();
    for task in [bare, ELSEWHERE] {
        let end = absurd.fetch_task_result(&task, spawned.task_id).await.unwrap();
        assert_eq!((end.state, end.result), (State::Completed, Some(Json::from(j!(2)))));
    }
}

/// A hook that refuses a spawn: the spawner is told in the hook's words, and nothing is spawned.
#[tokio::test(flavor = "multi_thread")]
async fn a_hook_that_refuses_a_spawn_says_why() {
    let server = Server::start().await;
    let hooks = Hooks::default().before_spawn(|draft| async move {
        if draft.task_name() == "costly" { Err(BoxError::from("the budget is spent")) } else { Ok(draft) }
    });
    let absurd = Absurd::with_hooks(server.client(), 1, hooks);
    let costly = absurd.register("costly", |_: Context, _: Value| async { Ok::<_, BoxError>(()) });
    let cheap = absurd.register("cheap", |_: Context, _: Value| async { Ok::<_, BoxError>(()) });
    let refused = absurd.spawn(&costly, &j!(null)).await.unwrap_err();
    assert!(refused.message().contains("the budget is spent"), "{refused}");
    absurd.spawn(&cheap, &j!(null)).await.unwrap();
    assert_eq!(server.client().get_queue_stats().await.unwrap().pending, 1);
}

/// A handler that goes on after a signal and returns a value completes nothing: its task sleeps, and completes once it
/// is awake.
#[tokio::test]
async fn a_swallowed_signal_completes_nothing_in_memory() {
    let handler = |ctx: Context, (): ()| async move {
        let slept = ctx.sleep_for("nap", HOUR).await;
        Ok::<_, BoxError>(slept.is_ok())
    };
    let mut task = TestTask::new(handler, &());
    let until = task.now() + HOUR;
    assert_eq!(task.run().await, Progress::Suspended(Wake::At(until)));
    task.advance(HOUR);
    assert_eq!(task.run().await, Progress::Completed(true));
}

/// A wait for the result of a task that was cancelled is another failure than one for a task that failed.
#[tokio::test]
async fn a_cancelled_child_is_no_failed_one() {
    let handler = |ctx: Context, id: Uuid| async move {
        match ctx.await_task_result(&CHILD, id).await {
            Err(TaskError::Failure { name, .. }) => Ok::<_, BoxError>(name),
            other => Err(format!("{other:?}").into()),
        }
    };
    for (state, name) in [(State::Cancelled, "TaskCancelled"), (State::Failed, "TaskFailed")] {
        let task_id = Uuid::now_v7();
        let mut task = TestTask::new(handler, &task_id);
        task.end_task(TaskResult { task_id, state, result: None, failure: None });
        assert_eq!(task.run().await, Progress::Completed(name.to_owned()));
    }
}

/// A child keeps the key that its parent gives it: spawned under it twice, it is one task.
#[tokio::test]
async fn a_child_keeps_its_own_key() {
    let handler = |ctx: Context, (): ()| async move {
        let mut ids = Vec::new();
        for _ in 0..2 {
            let spawn = ctx.spawn(&CHILD, &1).options(|draft| draft.idempotency_key("mine"));
            ids.push(spawn.await?.task_id);
        }
        Ok::<_, BoxError>(ids)
    };
    let mut task = TestTask::new(handler, &());
    let Progress::Completed(ids) = task.run().await else { panic!("it completes") };
    let spawned: Vec<Uuid> = task.spawned().iter().map(|child| child.task_id).collect();
    assert_eq!((spawned.len(), ids), (1, vec![spawned[0]; 2]));
}

/// Where no span is recorded, a child carries on the trace that the headers of its parent name, and nothing else of
/// them.
#[tokio::test]
async fn a_child_carries_on_the_trace_of_its_parent() {
    let handler = |ctx: Context, (): ()| async move {
        ctx.spawn(&CHILD, &1).await?;
        Ok::<_, BoxError>(())
    };
    let task = TestTask::new(handler, &()).header("traceparent", TRACE).header("tracestate", "a=b");
    let mut task = task.header("other", 1);
    assert_eq!(task.run().await, Progress::Completed(()));
    let headers = task.spawned().remove(0).headers;
    assert_eq!(Value::Object(headers), j!({"traceparent": TRACE, "tracestate": "a=b"}));
}

/// The first emission of an event by a handler in memory wins, as it does on a server.
#[tokio::test]
async fn the_first_emission_in_memory_wins() {
    let handler = |ctx: Context, (): ()| async move {
        let first = ctx.emit_event("e", &1).await?.applied;
        let second = ctx.emit_event("e", &2).await?.applied;
        let payload: i32 = ctx.await_event("e").await?;
        Ok::<_, BoxError>((first, second, payload))
    };
    let mut task = TestTask::new(handler, &());
    assert_eq!(task.run().await, Progress::Completed((true, false, 1)));
}

/// Each attempt of a task in memory is a run of its own; an attempt that has slept goes on in its run.
#[tokio::test]
async fn each_attempt_in_memory_is_a_run_of_its_own() {
    let runs = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&runs);
    let handler = move |ctx: Context, (): ()| {
        seen.lock().unwrap().push(ctx.run_id());
        async move {
            ctx.sleep_for("nap", HOUR).await?;
            if ctx.attempt() == 1 {
                return Err(BoxError::from("once more"));
            }
            Ok::<_, BoxError>(())
        }
    };
    let mut task = TestTask::new(handler, &());
    assert_eq!(task.run_to_end().await, Progress::Completed(()));
    let runs = runs.lock().unwrap().clone();
    assert_eq!(runs.len(), 3);
    assert!(runs[0] == runs[1] && runs[1] != runs[2], "{runs:?}");
}

/// A number that no 64 bits hold keeps all its digits on its way from a step to the result of its task.
#[tokio::test]
async fn a_result_keeps_its_digits() {
    let handler = |ctx: Context, (): ()| async move {
        let number: u128 = ctx.step("s", async || Ok::<_, BoxError>(u128::MAX)).await?;
        ctx.sleep_for("nap", HOUR).await?;
        Ok::<_, BoxError>(number)
    };
    let mut task = TestTask::new(handler, &());
    assert_eq!(task.run_to_end().await, Progress::Completed(u128::MAX));
}
