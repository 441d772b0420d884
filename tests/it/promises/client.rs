//! The client: claims that outlive the connection of their stream, claims that end with it, and the answers to handlers.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant, SystemTime};

use absurd_client::durable::testing::{Progress, TestTask};
use absurd_client::durable::{Absurd, BoxError, Context, Signal, TaskType, WorkerOptions};
use absurd_client::{
    AbsurdClient, ClaimOptions, ClaimStream, ClaimedTask, ConnectOptions, Error, Json, NewTask, Reason, Revoked,
    SpawnOptions, State, StreamOptions,
};
use absurd_server::settings::{Settings, Span};
use absurd_tests::{Database, Link, PATIENCE, Server, ServerOptions, Target, Toxic, eventually, in_time};
use serde_json::{Value, json as j};
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio_postgres::Client;
use uuid::Uuid;

const HOUR: Duration = Duration::from_secs(3600);
const CHILD: TaskType<u32, u32> = TaskType::new("child");

fn tasks(count: usize) -> Vec<NewTask> {
    (0..count).map(|index| NewTask::new("n", &j!(index), SpawnOptions::default()).unwrap()).collect()
}

/// Spawns a task past every link; returns its id.
async fn spawn(server: &Server, attempts: i32) -> Uuid {
    let options = SpawnOptions::default().max_attempts(attempts);
    server.client().spawn_task("n", &j!(null), options).await.unwrap().task_id
}

async fn next(stream: &mut ClaimStream) -> ClaimedTask {
    in_time("a task arrives", stream.next()).await.unwrap()
}

/// A client whose connections all go over a link.
fn over(link: &Link) -> AbsurdClient {
    AbsurdClient::connect(&ConnectOptions::new(link.url())).unwrap().with_queue("q")
}

/// Leases of an hour, which the client extends only after twenty minutes: a start deadline would make it extend them earlier.
fn long_leases() -> StreamOptions {
    StreamOptions { claim_timeout: HOUR, start_deadline: None, ..StreamOptions::default() }
}

fn streams(server: &Server) -> usize {
    server.app().engine().dispatcher.streams()
}

async fn has_streams(server: &Server, count: usize) {
    eventually("the server has as many streams", || async { (streams(server) == count).then_some(()) }).await;
}

async fn one<T: for<'a> tokio_postgres::types::FromSql<'a>>(sql: &Client, query: &str) -> T {
    sql.query_one(query, &[]).await.unwrap_or_else(|error| panic!("{query}: {error:?}")).get(0)
}

/// Two replicas of one database, each behind a link of its own.
struct Pair {
    servers: [Server; 2],
    links: [Link; 2],
}

impl Pair {
    async fn start(heartbeat: Duration) -> Self {
        let options = || {
            let settings = Settings { heartbeat: Some(Span(heartbeat)), ..Settings::default() };
            ServerOptions { settings, ..ServerOptions::default() }
        };
        let one = Server::start_with(Database::new().await, options()).await;
        let two = Server::start_with(one.database().clone(), options()).await;
        let links = [Link::before(&one.url()).await, Link::before(&two.url()).await];
        Self { servers: [one, two], links }
    }

    /// A client that asks both replicas. Its transport sends no keepalive pings while the test runs.
    fn client(&self) -> AbsurdClient {
        let urls = format!("{},{}", self.links[0].url(), self.links[1].url());
        let options = ConnectOptions { keepalive: HOUR, ..ConnectOptions::new(urls) };
        AbsurdClient::connect(&options).unwrap().with_queue("q")
    }

    /// The replica that has the only stream, and the other one.
    fn with_the_stream(&self) -> (usize, usize) {
        let here = self.servers.iter().position(|server| streams(server) == 1).expect("one has the stream");
        (here, 1 - here)
    }
}

/// Tells when it is dropped.
struct Tell(mpsc::UnboundedSender<&'static str>);

impl Drop for Tell {
    fn drop(&mut self) {
        let _ = self.0.send("dropped");
    }
}

/// A reset cuts a lease of an hour to the grace of four seconds. The reopened stream hands the claim back in: the worker
/// completes it long after the grace, in the same attempt, and it takes up credit all the while.
#[tokio::test(flavor = "multi_thread")]
async fn a_reopened_stream_keeps_its_claims_beyond_the_grace() {
    let server = Server::start().await;
    let link = Link::before(&server.url()).await;
    let task_id = spawn(&server, 2).await;
    let options = StreamOptions { reconnect_grace: Some(Duration::from_secs(4)), ..long_leases() };
    let mut stream = over(&link).claim_stream(options).await.unwrap();
    let task = next(&mut stream).await;
    link.set(Toxic::Reset);
    let sql = server.database().connect().await;
    eventually("the server cuts the lease to the grace", || async {
        one::<bool>(&sql, "select claim_expires_at < now() + interval '10 s' from absurd.r_q").await.then_some(())
    })
    .await;
    link.set(Toxic::Pass);
    has_streams(&server, 1).await;
    let second = spawn(&server, 1).await;
    // The grace, and the sweep that would end a lease after it.
    tokio::time::sleep(Duration::from_secs(7)).await;
    let early = tokio::time::timeout(Duration::ZERO, stream.next()).await;
    assert!(early.is_err(), "the held task is all that this stream may hold");
    task.complete(&j!("first claim")).await.unwrap();
    assert_eq!(next(&mut stream).await.task_id, second);
    let stored = server.client().get_task_status(task_id).await.unwrap().unwrap();
    assert_eq!((stored.state, stored.attempts), (State::Completed, 1));
}

/// A task that is cancelled while its worker is cut off: the worker hears so as its stream opens again, not only when it
/// extends the lease.
#[tokio::test(flavor = "multi_thread")]
async fn a_reopened_stream_tells_which_claims_are_over() {
    let server = Server::start().await;
    let link = Link::before(&server.url()).await;
    let task_id = spawn(&server, 1).await;
    let mut stream = over(&link).claim_stream(long_leases()).await.unwrap();
    let task = next(&mut stream).await;
    link.set(Toxic::Reset);
    has_streams(&server, 0).await;
    assert!(server.client().cancel_task_by_id(task_id).await.unwrap().cancelled);
    link.set(Toxic::Pass);
    assert_eq!(in_time("the worker hears of it", task.revoked()).await, Revoked::Cancelled);
}

/// 1,500 tasks are held for two leases: each is still its claim's own, and completes in its first attempt.
#[tokio::test(flavor = "multi_thread")]
async fn all_leases_are_extended_also_beyond_one_call() {
    let server = Server::start().await;
    let client = server.client();
    for _ in 0..2 {
        client.spawn_tasks(tasks(750)).await.unwrap();
    }
    let lease = Duration::from_secs(4);
    // Without a start deadline a task whose lease is not extended does not come back by itself.
    let options = StreamOptions { max_in_flight: 1500, claim_timeout: lease, ..long_leases() };
    let mut stream = client.claim_stream(options).await.unwrap();
    let mut held = Vec::new();
    while held.len() < 1500 {
        held.push(next(&mut stream).await);
    }
    tokio::time::sleep(lease * 2).await;
    let revoked = held.iter().filter(|task| task.is_revoked().is_some()).count();
    assert_eq!(revoked, 0, "{revoked} leases have ended");
    let result = j!(null);
    let outcomes = held.iter().map(|task| task.complete(&result));
    in_time("all complete", futures_util::future::try_join_all(outcomes)).await.unwrap();
    let sql = server.database().connect().await;
    let first = "select count(*) from absurd.r_q where state = 'completed' and attempt = 1";
    assert_eq!(one::<i64>(&sql, first).await, 1500);
}

/// A stream's connection stays open and lets nothing through. The client misses three heartbeats of half a second, opens
/// the stream at the other replica, and gets the tasks that are spawned afterwards. No keepalive of the transport helps it.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_falls_silent_is_opened_again() {
    let pair = Pair::start(Duration::from_millis(500)).await;
    let mut stream = pair.client().claim_stream(StreamOptions::default()).await.unwrap();
    let (silent, there) = pair.with_the_stream();
    pair.links[silent].set(Toxic::Hole(true, true));
    let began = Instant::now();
    has_streams(&pair.servers[there], 1).await;
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    // The silent replica does not know yet, and would push tasks into the hole.
    pair.links[silent].set(Toxic::Reset);
    has_streams(&pair.servers[silent], 0).await;
    let task_id = spawn(&pair.servers[there], 1).await;
    assert_eq!(next(&mut stream).await.task_id, task_id);
}

/// The server ends a stream about every half second because of its age. The client opens the next one each time: no task is
/// lost, none spends an attempt, a held one stays its own, and nobody is told of trouble.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_outlives_its_age() {
    let settings = Settings { stream_age: Some(Span(Duration::from_millis(500))), ..Settings::default() };
    let options = ServerOptions { settings, ..ServerOptions::default() };
    let server = Server::start_with(Database::new().await, options).await;
    let options = StreamOptions { max_in_flight: 2, ..long_leases() };
    let mut stream = server.client().claim_stream(options).await.unwrap();
    let mut trouble = stream.trouble();
    let told = tokio::spawn(async move { trouble.wait_for(Option::is_some).await.is_ok() });
    spawn(&server, 1).await;
    let held = next(&mut stream).await;
    for _ in 0..20 {
        let task_id = spawn(&server, 1).await;
        let task = next(&mut stream).await;
        assert_eq!((task.task_id, task.attempt), (task_id, 1));
        task.complete(&j!(null)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(!told.is_finished(), "a polite end is no trouble");
    held.complete(&j!(null)).await.unwrap();
}

/// The queue of an open stream is dropped: the stream names the reason, and serves the queue that is created afterwards.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_outlives_its_queue() {
    let server = Server::start().await;
    let client = server.client();
    let mut stream = client.claim_stream(StreamOptions::default()).await.unwrap();
    let mut trouble = stream.trouble();
    client.drop_queue().await.unwrap();
    let told = in_time("it says why", trouble.wait_for(Option::is_some)).await.unwrap().as_ref().map(Error::reason);
    assert_eq!(told, Some(Reason::QueueNotFound));
    client.create_queue().await.unwrap();
    in_time("it is open again", trouble.wait_for(Option::is_none)).await.unwrap();
    let task_id = spawn(&server, 1).await;
    assert_eq!(next(&mut stream).await.task_id, task_id);
}

/// A port where every connection is closed at once, and how many there were.
async fn closed_door() -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let knocks = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&knocks);
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            count.fetch_add(1, SeqCst);
            drop(socket);
        }
    });
    (port, knocks)
}

/// While a stream cannot be opened, its client tries ever more rarely, at most twenty times in four seconds, and names the
/// reason. Once the server is back, the stream opens by itself and serves.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_cannot_open_tries_ever_more_rarely() {
    let server = Server::start().await;
    let link = Link::before(&server.url()).await;
    let mut stream = over(&link).claim_stream(StreamOptions::default()).await.unwrap();
    let mut trouble = stream.trouble();
    let (door, knocks) = closed_door().await;
    link.lead_to(Target::Port(door));
    link.set(Toxic::Reset);
    has_streams(&server, 0).await;
    link.set(Toxic::Pass);
    let told = in_time("it says why", trouble.wait_for(Option::is_some)).await.unwrap().as_ref().map(Error::reason);
    assert_eq!(told, Some(Reason::Transport));
    let before = knocks.load(SeqCst);
    tokio::time::sleep(Duration::from_secs(4)).await;
    let tries = knocks.load(SeqCst) - before;
    assert!((1..=20).contains(&tries), "{tries} tries");
    link.lead_to(Target::Port(server.app().addr().port()));
    in_time("it is open again", trouble.wait_for(Option::is_none)).await.unwrap();
    let task_id = spawn(&server, 1).await;
    assert_eq!(next(&mut stream).await.task_id, task_id);
}

/// Five tasks have reached the client, and one of them was taken. Closing the stream gives the other four back in their first
/// attempt, and waits until the one that was taken is completed, no longer.
#[tokio::test(flavor = "multi_thread")]
async fn a_closed_stream_gives_back_what_nobody_took_and_waits_for_the_rest() {
    let server = Server::start().await;
    server.client().spawn_tasks(tasks(5)).await.unwrap();
    let start_deadline = Some(Duration::from_secs(3));
    let options = StreamOptions { max_in_flight: 5, start_deadline, ..long_leases() };
    let mut stream = server.client().claim_stream(options).await.unwrap();
    let held = next(&mut stream).await;
    let sql = server.database().connect().await;
    eventually("the client has received all five and extends their leases", || async {
        let extended = "select count(*) from absurd.r_q where claim_expires_at > started_at + interval '3600.2 s'";
        (one::<i64>(&sql, extended).await == 5).then_some(())
    })
    .await;
    let closing = tokio::spawn(stream.close(PATIENCE));
    eventually("the other four are given back", || async {
        let free = "select count(*) from absurd.r_q where state = 'pending' and attempt = 1";
        (one::<i64>(&sql, free).await == 4).then_some(())
    })
    .await;
    has_streams(&server, 0).await;
    assert!(!closing.is_finished(), "one task is held");
    let began = Instant::now();
    held.complete(&j!(null)).await.unwrap();
    in_time("the stream is closed", closing).await.unwrap().unwrap();
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

/// A stream that is dropped ends at the server, and extends no lease any more: the task that it had delivered goes to another
/// worker when its lease ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_stream_extends_no_lease() {
    let server = Server::start().await;
    let task_id = spawn(&server, 2).await;
    let options = StreamOptions { claim_timeout: Duration::from_secs(2), ..long_leases() };
    let mut stream = server.client().claim_stream(options).await.unwrap();
    let held = next(&mut stream).await;
    drop(stream);
    has_streams(&server, 0).await;
    let mut other = server.client().claim_stream(StreamOptions::default()).await.unwrap();
    let again = next(&mut other).await;
    assert_eq!((again.task_id, again.attempt), (task_id, 2));
    assert_eq!(held.complete(&j!(null)).await.unwrap_err().reason(), Reason::ClaimExpired);
}

/// A stream that may hold one task delivers the next one after a task was dropped, whose lease ends, after one was failed,
/// after one was released, which comes again in the same attempt, and after one was completed.
#[tokio::test(flavor = "multi_thread")]
async fn credit_comes_back_however_a_task_leaves() {
    let server = Server::start().await;
    let options = StreamOptions { claim_timeout: Duration::from_secs(2), ..long_leases() };
    let mut stream = server.client().claim_stream(options).await.unwrap();
    let task_id = spawn(&server, 2).await;
    drop(next(&mut stream).await);
    let again = next(&mut stream).await;
    assert_eq!((again.task_id, again.attempt), (task_id, 2), "nobody keeps the lease of a task that was dropped");
    again.fail(&j!("on purpose")).await.unwrap();
    let task_id = spawn(&server, 1).await;
    next(&mut stream).await.release(Duration::ZERO).await.unwrap();
    let again = next(&mut stream).await;
    assert_eq!((again.task_id, again.attempt), (task_id, 1), "a release spends no attempt");
    again.complete(&j!(null)).await.unwrap();
    let task_id = spawn(&server, 1).await;
    assert_eq!(next(&mut stream).await.task_id, task_id);
}

/// A worker's stream is silent and tells it nothing. The worker learns that its task was cancelled from the answer to an
/// extension of the lease, which goes to the other replica, and drops the handler.
#[tokio::test(flavor = "multi_thread")]
async fn an_extension_that_is_refused_drops_the_handler() {
    // Silence would be noticed after 45 s.
    let pair = Pair::start(Duration::from_secs(15)).await;
    let absurd = Absurd::new(pair.client());
    let (tell, mut told) = mpsc::unbounded_channel();
    absurd.register("n", move |_: Context, _: Value| {
        let tell = tell.clone();
        async move {
            let _guard = Tell(tell.clone());
            tell.send("running").unwrap();
            std::future::pending::<()>().await;
            Ok::<_, BoxError>(())
        }
    });
    let options = WorkerOptions::default().claim_timeout(Duration::from_secs(6));
    let worker = absurd.start_worker(options).await.unwrap();
    let (silent, there) = pair.with_the_stream();
    let task_id = spawn(&pair.servers[there], 1).await;
    assert_eq!(in_time("it runs", told.recv()).await, Some("running"));
    pair.links[silent].set(Toxic::Hole(true, true));
    assert!(pair.servers[there].client().cancel_task_by_id(task_id).await.unwrap().cancelled);
    let heard = tokio::time::timeout(Duration::from_secs(20), told.recv()).await;
    assert_eq!(heard, Ok(Some("dropped")));
    drop(worker);
}

/// A worker that stops keeps the lease of a handler that still runs: three leases later the run is its first attempt still,
/// and completes.
#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_worker_keeps_leases() {
    let server = Server::start().await;
    let absurd = Absurd::new(server.client());
    let (begun, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let signals = (Arc::clone(&begun), Arc::clone(&go));
    let slow = absurd.register("slow", move |ctx: Context, _: Value| {
        let (begun, go) = signals.clone();
        async move {
            begun.notify_one();
            go.notified().await;
            Ok::<_, BoxError>(ctx.attempt())
        }
    });
    let options = WorkerOptions::default().claim_timeout(Duration::from_secs(2));
    let worker = absurd.start_worker(options).await.unwrap();
    let spawned = absurd.spawn(&slow, &j!(null)).max_attempts(2).await.unwrap();
    in_time("it runs", begun.notified()).await;
    let stopping = tokio::spawn(worker.stop());
    let sql = server.database().connect().await;
    let state = eventually("the lease is three times as long as it was, or over", || async {
        let run = "select state, claim_expires_at > started_at + interval '6 s' from absurd.r_q where attempt = 1";
        let row = sql.query_one(run, &[]).await.unwrap();
        let (state, is_long): (String, Option<bool>) = (row.get(0), row.get(1));
        (state != "running" || is_long == Some(true)).then_some(state)
    })
    .await;
    assert_eq!(state, "running");
    go.notify_one();
    in_time("the worker stops", stopping).await.unwrap();
    let end = server.client().get_task_result(spawned.task_id).await.unwrap();
    assert_eq!((end.state, end.result), (State::Completed, Some(Json::from(j!(1)))));
}

/// A worker with two places and a prefetch of three holds five of eight tasks, never works on more than two at once, and
/// completes all.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_holds_what_it_prefetches_and_runs_what_it_has_places_for() {
    let server = Server::start().await;
    let client = server.client();
    let absurd = Absurd::new(server.client());
    let (go, now, most) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let shared = (Arc::clone(&go), Arc::clone(&now), Arc::clone(&most));
    absurd.register("n", move |_: Context, _: Value| {
        let (go, now, most) = shared.clone();
        async move {
            most.fetch_max(now.fetch_add(1, SeqCst) + 1, SeqCst);
            go.acquire().await?.forget();
            now.fetch_sub(1, SeqCst);
            Ok::<_, BoxError>(())
        }
    });
    client.spawn_tasks(tasks(8)).await.unwrap();
    let worker = absurd.start_worker(WorkerOptions::default().concurrency(2).prefetch(3)).await.unwrap();
    eventually("two run, and three more are held", || async {
        let held = client.get_queue_stats().await.unwrap().running;
        (held == 5 && now.load(SeqCst) == 2).then_some(())
    })
    .await;
    go.add_permits(8);
    eventually("all are completed", || async {
        (client.get_queue_stats().await.unwrap().completed == 8).then_some(())
    })
    .await;
    assert_eq!(most.load(SeqCst), 2);
    worker.stop().await;
}

/// One of two replicas cuts every connection. Twenty spawns, a stream and twenty completions all succeed within a deadline of
/// five seconds each, and no spawn is carried out twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_away_fails_no_call() {
    let server = Server::start().await;
    let away = Link::before(&server.url()).await;
    away.set(Toxic::Reset);
    let urls = format!("{},{}", away.url(), server.url());
    let options = ConnectOptions { deadline: Duration::from_secs(5), ..ConnectOptions::new(urls) };
    let client = AbsurdClient::connect(&options).unwrap().with_queue("q");
    for index in 0..20 {
        client.spawn_task("n", &j!(index), SpawnOptions::default()).await.unwrap();
    }
    let options = StreamOptions { max_in_flight: 20, ..StreamOptions::default() };
    let mut stream = client.claim_stream(options).await.unwrap();
    for _ in 0..20 {
        next(&mut stream).await.complete(&j!(null)).await.unwrap();
    }
    let stats = server.client().get_queue_stats().await.unwrap();
    assert_eq!((stats.completed, stats.pending, stats.running), (20, 0, 0));
}

/// The call runs out of the client's deadline of one second, and says so not much later.
async fn runs_out<T: std::fmt::Debug>(what: &str, call: impl Future<Output = Result<T, Error>>) {
    let began = Instant::now();
    let error = in_time(what, call).await.expect_err(what);
    assert_eq!(error.reason(), Reason::DeadlineExceeded, "{what}: {error}");
    assert!(began.elapsed() < Duration::from_secs(4), "{what} took {:?}", began.elapsed());
}

/// The server hangs while its connection stays open: a read, a spawn, a claim, an outcome and a wait for a result end with
/// the client's deadline, and say that it has passed.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_hangs_costs_no_more_than_the_deadline() {
    let server = Server::start().await;
    let link = Link::before(&server.url()).await;
    let task_id = spawn(&server, 1).await;
    let options = ConnectOptions { deadline: Duration::from_secs(1), ..ConnectOptions::new(link.url()) };
    let client = AbsurdClient::connect(&options).unwrap().with_queue("q");
    let claimed = client.claim_task(ClaimOptions::default()).await.unwrap().remove(0);
    link.set(Toxic::Hole(true, true));
    runs_out("a read", client.get_queue_stats()).await;
    runs_out("a spawn", Box::pin(client.spawn_task("n", &j!(null), SpawnOptions::default()))).await;
    runs_out("a claim", client.claim_task(ClaimOptions::default())).await;
    runs_out("an outcome", claimed.complete(&j!(null))).await;
    runs_out("a wait for a result", client.await_task_result(task_id, Some(Duration::from_secs(1)))).await;
}

/// The server hangs: opening a stream ends with the client's deadline too.
#[tokio::test(flavor = "multi_thread")]
async fn opening_a_stream_costs_no_more_than_the_deadline() {
    let server = Server::start().await;
    let link = Link::before(&server.url()).await;
    link.set(Toxic::Hole(true, true));
    let options = ConnectOptions { deadline: Duration::from_secs(1), ..ConnectOptions::new(link.url()) };
    let client = AbsurdClient::connect(&options).unwrap().with_queue("q");
    let began = Instant::now();
    in_time("it is given up", client.claim_stream(StreamOptions::default())).await.unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
}

/// A task of 6 MiB, more than what gRPC clients take by default, reaches a stream whole.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_task_reaches_a_stream() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    sql.execute("select absurd.spawn_task('q', 'huge', to_jsonb(repeat('x', 6 * 1024 * 1024)))", &[]).await.unwrap();
    let mut stream = server.client().claim_stream(StreamOptions::default()).await.unwrap();
    let task = next(&mut stream).await;
    assert_eq!(task.params.as_ref().map(|params| params.as_str().len()), Some(6 * 1024 * 1024 + 2));
    task.complete(&j!(null)).await.unwrap();
}

/// A result of 17 MiB, more than one message may have, is refused at once as too large; the run is held as before.
#[tokio::test(flavor = "multi_thread")]
async fn a_result_over_the_limit_is_refused_at_once() {
    let server = Server::start().await;
    let client = server.client();
    spawn(&server, 1).await;
    let task = client.claim_task(ClaimOptions::default()).await.unwrap().remove(0);
    let large = Json::from_text(format!("\"{}\"", "x".repeat(17 << 20)));
    let began = Instant::now();
    let refused = in_time("it is refused", task.complete_json(large)).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::PayloadTooLarge, "{refused}");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    task.complete(&j!(null)).await.unwrap();
}

/// A context names why its run is over: cancelled, taken away, or failed because its lease ended. The step that finds out is
/// not stored, and the action of the next one is not called.
#[tokio::test(flavor = "multi_thread")]
async fn a_context_says_why_its_run_is_over_and_begins_nothing_more() {
    let server = Server::start().await;
    let client = server.client();
    let absurd = Absurd::new(server.client());
    // A stream for other names keeps the queue under the tick.
    let other = StreamOptions { task_names: vec!["other".into()], ..StreamOptions::default() };
    let _stream = client.claim_stream(other).await.unwrap();
    for signal in [Signal::Cancelled, Signal::Lost, Signal::Failed] {
        let task_id = spawn(&server, 1).await;
        let lease = Duration::from_secs(if signal == Signal::Failed { 1 } else { 60 });
        let task = client.claim_task(ClaimOptions::default().claim_timeout(lease)).await.unwrap().remove(0);
        let ctx = absurd.context_of(&task, lease).await.unwrap();
        ctx.step("one", async || Ok::<_, BoxError>(1)).await.unwrap();
        match signal {
            Signal::Cancelled => assert!(client.cancel_task_by_id(task_id).await.unwrap().cancelled),
            Signal::Lost => client.schedule_task(task.run_id, SystemTime::now() + HOUR).await.unwrap(),
            _ => {
                let end = client.await_task_result(task_id, Some(PATIENCE)).await.unwrap();
                assert_eq!(end.state, State::Failed);
            }
        }
        let second = ctx.step("two", async || Ok::<_, BoxError>(2)).await.unwrap_err();
        assert_eq!((second.signal(), ctx.signal()), (Some(signal), Some(signal)));
        assert_eq!(in_time("the context is over", ctx.over()).await, signal);
        let called = AtomicUsize::new(0);
        let third = ctx.step("three", async || Ok::<_, BoxError>(called.fetch_add(1, SeqCst))).await.unwrap_err();
        assert_eq!((third.signal(), called.load(SeqCst)), (Some(signal), 0));
        assert_eq!(client.get_checkpoint(task_id, "two", false).await.unwrap(), None);
    }
}

/// A heartbeat moves the lease's end to as long from now as it says, or to the length of the lease.
#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_moves_the_end_of_the_lease() {
    let server = Server::start().await;
    let client = server.client();
    spawn(&server, 1).await;
    let lease = Duration::from_secs(60);
    let task = client.claim_task(ClaimOptions::default().claim_timeout(lease)).await.unwrap().remove(0);
    let ctx = Absurd::new(server.client()).context_of(&task, lease).await.unwrap();
    let sql = server.database().connect().await;
    let left = "select extract(epoch from claim_expires_at - now())::float8 from absurd.r_q";
    ctx.heartbeat_for(HOUR).await.unwrap();
    let seconds: f64 = one(&sql, left).await;
    assert!(seconds > 3000.0 && seconds <= 3600.0, "{seconds}");
    ctx.heartbeat().await.unwrap();
    let seconds: f64 = one(&sql, left).await;
    assert!(seconds > 10.0 && seconds <= 60.0, "{seconds}");
}

/// A sleeping run is made claimable before its time. Its handler runs again from the beginning, and the run sleeps on until the
/// time of the first call.
#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_is_woken_too_early_sleeps_on() {
    let server = Server::start().await;
    let client = server.client();
    let absurd = Absurd::new(server.client());
    let executions = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&executions);
    let sleeper = absurd.register("sleeper", move |ctx: Context, _: Value| {
        counter.fetch_add(1, SeqCst);
        async move {
            ctx.sleep_for("nap", HOUR).await?;
            Ok::<_, BoxError>("awake")
        }
    });
    let worker = absurd.start_worker(WorkerOptions::default()).await.unwrap();
    let run_id = absurd.spawn(&sleeper, &j!(null)).await.unwrap().run_id;
    let asleep = async |what: &str, times: usize| {
        eventually(what, || async {
            let run = client.get_run_status(run_id).await.unwrap().unwrap();
            assert_ne!(run.state, State::Completed, "its time is not over");
            (run.state == State::Sleeping && executions.load(SeqCst) == times).then_some(run.available_at)
        })
        .await
    };
    let first = asleep("it sleeps", 1).await;
    let sql = server.database().connect().await;
    sql.batch_execute("update absurd.r_q set available_at = now()").await.unwrap();
    assert_eq!(asleep("it sleeps again", 2).await, first);
    worker.stop().await;
}

/// An execution dies after its spawns, before they are stored as steps: the next attempt gets the same children, one for each
/// spawn, and makes no second one.
#[tokio::test]
async fn a_crash_after_a_spawn_makes_no_second_child() {
    let handler = |ctx: Context, (): ()| async move {
        let single = ctx.spawn(&CHILD, &1).await?.task_id;
        let many = ctx.spawn_all(&CHILD, [2, 3, 4]).await?;
        Ok::<_, BoxError>((single, many))
    };
    let mut task = TestTask::new(handler, &());
    for checkpoint in ["$spawn:child", "$spawn:child#2"] {
        task.crash_at(checkpoint);
        assert_eq!(task.run().await, Progress::Crashed);
    }
    let Progress::Completed((single, many)) = task.run().await else { panic!("it completes") };
    let spawned = task.spawned();
    let params: Vec<&str> = spawned.iter().map(|child| child.params.as_str()).collect();
    assert_eq!(params, ["1", "2", "3", "4"]);
    let ids: Vec<Uuid> = spawned.iter().map(|child| child.task_id).collect();
    assert_eq!(ids, [vec![single], many].concat());
}

/// A step that is done keeps its value when a later attempt completes it with another one.
#[tokio::test]
async fn a_step_that_is_done_keeps_its_value() {
    let handler = |ctx: Context, (): ()| async move {
        let step = ctx.begin_step("s")?;
        let is_done = step.is_done();
        let value: i32 = ctx.complete_step(step, &ctx.attempt()).await?.to()?;
        if ctx.attempt() == 1 {
            return Err(BoxError::from("once more"));
        }
        Ok::<_, BoxError>((is_done, value))
    };
    let mut task = TestTask::new(handler, &());
    assert_eq!(task.run_to_end().await, Progress::Completed((true, 1)));
    assert_eq!(task.checkpoint::<i32>("s"), Some(1));
}

/// A worker whose run another one has taken over is refused each time it speaks of the run by its id; the newer claim holds.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_has_lost_its_run_never_writes_about_it() {
    let server = Server::start().await;
    let (stale, operator, newer) = (server.client(), server.client(), server.client());
    spawn(&server, 1).await;
    let run_id = stale.claim_task(ClaimOptions::default()).await.unwrap().remove(0).run_id;
    operator.release_claim(run_id, Duration::ZERO).await.unwrap();
    let claim = newer.claim_task(ClaimOptions::default()).await.unwrap().remove(0);
    assert_eq!(claim.run_id, run_id);
    for _ in 0..3 {
        let refused = stale.complete_task(run_id, &j!(1)).await.unwrap_err();
        assert_eq!(refused.reason(), Reason::ClaimLost, "{refused}");
    }
    let refused = stale.fail_task(run_id, "late", None).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::ClaimLost, "{refused}");
    claim.complete(&j!(2)).await.unwrap();
}
