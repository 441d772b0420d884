//! Faults: workers that vanish, locked rows, Postgres and its connections going away. Nothing acknowledged is lost.

use std::collections::HashSet;
use std::time::Duration;

use absurd_client::{
    AbsurdClient, Awaited, ClaimOptions, ConnectOptions, NewTask, Slept, SpawnOptions, State, StreamOptions,
};
use absurd_proto::v1 as pb;
use absurd_server::domain::{QueueName, TaskName};
use absurd_server::scope::Caller;
use absurd_server::settings::{Secret, Settings};
use absurd_server::store;
use absurd_tests::{Link, OwnCluster, Server, ServerOptions, Target, Toxic, eventually, in_time, json, raw};
use serde_json::json as j;

use crate::streams::{complete, next_task, open, request, seconds};

fn tasks(count: usize) -> Vec<NewTask> {
    (0..count).map(|index| NewTask::new("n", &j!(index), SpawnOptions::default()).unwrap()).collect()
}

/// A worker is cut off by a TCP reset with tasks in hand: they move on within the grace, long before the lease ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_reset_connection_moves_its_tasks_within_the_grace() {
    let server = Server::start().await;
    let link = Link::before(&server.url()).await;
    let options = SpawnOptions { max_attempts: Some(2), ..SpawnOptions::default() };
    let spawned = server.client().spawn_task("n", &j!(null), options).await.unwrap();
    let mut lost = raw(&link.url()).await;
    let graceful = pb::ClaimStreamRequest { reconnect_grace: seconds(1), claim_timeout: seconds(3600), ..request(1) };
    let (_, mut messages) = open(&mut lost, graceful).await;
    assert_eq!(next_task(&mut messages).await.attempt, 1);
    link.set(Toxic::Reset);
    let mut stream = server.client().claim_stream(StreamOptions::default()).await.unwrap();
    let task = in_time("the task moves on", stream.next()).await.unwrap();
    assert_eq!((task.task_id, task.attempt), (spawned.task_id, 2));
}

/// The same cut, but the worker is alive and says so elsewhere: it keeps its claim.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_comes_back_keeps_its_claims() {
    let server = Server::start().await;
    let link = Link::before(&server.url()).await;
    let spawned = server.client().spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap();
    let client = AbsurdClient::connect(&ConnectOptions::new(link.url())).unwrap().with_queue("q");
    let options =
        StreamOptions { reconnect_grace: Some(Duration::from_secs(5)), max_in_flight: 2, ..StreamOptions::default() };
    let mut stream = client.claim_stream(options).await.unwrap();
    let task = in_time("the task is pushed", stream.next()).await.unwrap();
    link.set(Toxic::Reset);
    tokio::time::sleep(Duration::from_millis(300)).await;
    link.set(Toxic::Pass);
    // The client reconnects by itself, hands the token back in, and gets more.
    let more = server.client().spawn_task("n", &j!(2), SpawnOptions::default()).await.unwrap();
    let second = in_time("the stream is back", stream.next()).await.unwrap();
    assert_eq!((second.task_id, second.attempt), (more.task_id, 1));
    tokio::time::sleep(Duration::from_secs(6)).await;
    task.complete(&j!("first claim")).await.unwrap();
    let run = server.client().get_run_status(spawned.run_id).await.unwrap().unwrap();
    assert_eq!((run.state, run.attempt), (State::Completed, 1));
}

/// Silence instead of a reset: the client notices by itself and connects again, without losing what it does.
#[tokio::test(flavor = "multi_thread")]
async fn a_black_hole_does_not_hold_a_task_for_ever() {
    let server = Server::start().await;
    let link = Link::before(&server.url()).await;
    let mut deaf = raw(&link.url()).await;
    let spawned = {
        let deadline = pb::ClaimStreamRequest { start_deadline: seconds(1), ..request(1) };
        let (_, _messages) = open(&mut deaf, deadline).await;
        link.set(Toxic::Hole(true, true));
        // It is pushed into the hole, and comes back because nobody gives a sign of life.
        let spawned = server.client().spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        spawned
    };
    let mut stream = server.client().claim_stream(StreamOptions::default()).await.unwrap();
    let task = in_time("the task comes back", stream.next()).await.unwrap();
    assert_eq!((task.task_id, task.attempt), (spawned.task_id, 1));
}

/// Hundreds in one batch, one of them bad, one of them locked: each has its own outcome, nobody waits for the locked.
#[tokio::test(flavor = "multi_thread")]
async fn one_bad_and_one_locked_item_hurt_nobody_else() {
    use pb::settle_item::Action;
    let server = Server::start().await;
    let client = server.client();
    client.spawn_tasks(tasks(300)).await.unwrap();
    let claims = client.claim_task(ClaimOptions { qty: 300, ..ClaimOptions::default() }).await.unwrap();
    assert_eq!(claims.len(), 300);
    let mut sql = server.database().connect().await;
    let lock = sql.transaction().await.unwrap();
    lock.execute("select from absurd.r_q where run_id = $1 for update", &[&claims[7].run_id]).await.unwrap();
    let items = claims
        .iter()
        .enumerate()
        .map(|(index, claim)| pb::SettleItem {
            run_id: String::new(),
            claim_token: Some(claim.claim_token().to_owned()),
            action: Some(Action::Complete(pb::CompleteAction {
                result: json(if index == 3 { "{bad" } else { "\"fine\"" }),
            })),
        })
        .collect();
    let mut grpc = server.raw().await;
    let settling = tokio::spawn(async move {
        grpc.settle_tasks(pb::SettleTasksRequest { queue: "q".into(), items }).await.unwrap().into_inner().results
    });
    let watcher = server.database().connect().await;
    eventually("all others are completed while the lock is held", || async {
        let done: i64 =
            watcher.query_one("select count(*) from absurd.r_q where state = 'completed'", &[]).await.unwrap().get(0);
        (done == 298).then_some(())
    })
    .await;
    assert!(!settling.is_finished(), "the locked item waits");
    lock.rollback().await.unwrap();
    let results = in_time("the batch is answered", settling).await.unwrap();
    let failed: Vec<usize> = (0..300).filter(|index| results[*index].error.is_some()).collect();
    assert_eq!(failed, [3]);
}

/// A server whose connections to Postgres go over a link.
pub(super) async fn over_a_link() -> (Server, Link) {
    let database = absurd_tests::Database::new().await;
    let socket = database.url().rsplit_once("host=").unwrap().1.to_owned();
    let link = Link::to(Target::Path(format!("{socket}/.s.PGSQL.5432").into())).await.unwrap();
    let through = format!("postgresql://absurd@127.0.0.1:{}/{}", link.port(), database.name());
    let settings = Settings { database_url: Some(Secret::from(through.as_str())), ..Settings::default() };
    (Server::start_with(database, ServerOptions { settings, ..ServerOptions::default() }).await, link)
}

/// What the server says next comes too late for Postgres, which has ended the transaction meanwhile: it is begun again.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_stood_idle_too_long_is_begun_again() {
    let (server, link) = over_a_link().await;
    let client = server.client();
    client.spawn_tasks(tasks(1)).await.unwrap();
    let mut sql = server.database().connect().await;
    let held = sql.transaction().await.unwrap();
    held.batch_execute("lock table absurd.t_q in exclusive mode").await.unwrap();
    let spawn = tokio::spawn({
        let client = client.clone();
        async move { client.spawn_tasks(tasks(3)).await }
    });
    let watch = server.database().connect().await;
    let waiting = "select pid from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
    let find = async || watch.query(waiting, &[]).await.unwrap().first().map(|row| row.get::<_, i32>(0));
    let session = eventually("the spawn has begun, and waits", find).await;
    link.set(Toxic::Hole(true, false));
    held.rollback().await.unwrap();
    eventually("Postgres ends the session", async || {
        let row = watch.query_one("select count(*) from pg_stat_activity where pid = $1", &[&session]).await.unwrap();
        (row.get::<_, i64>(0) == 0).then_some(())
    })
    .await;
    link.set(Toxic::Pass);
    in_time("the spawn is carried out", spawn).await.unwrap().unwrap();
    let spawned: i64 = watch.query_one("select count(*) from absurd.t_q", &[]).await.unwrap().get(0);
    assert_eq!(spawned, 4);
}

/// A column changes its type while statements that return it are prepared: they are prepared again, in transactions too.
#[tokio::test(flavor = "multi_thread")]
async fn a_plan_that_is_stale_within_a_transaction_is_made_again() {
    let server = Server::start().await;
    let client = server.client();
    let spawns = (0..40).map(|_| client.spawn_tasks(tasks(1)));
    futures_util::future::try_join_all(spawns).await.unwrap();
    let sql = server.database().connect().await;
    sql.batch_execute("alter table absurd.queues alter column storage_mode type varchar(40)").await.unwrap();
    let store = &server.app().engine().store;
    let scope = Caller::anonymous().scope(QueueName::parse("queue", "q").unwrap());
    let connections: usize = store.connections().iter().map(|(_, most, ..)| most).sum();
    let mut stale = 0;
    let task = store::task::NewTask {
        task_id: store.mint_id(),
        run_id: store.mint_id(),
        name: TaskName::parse("task_name", "n").unwrap(),
        params: None,
        headers: None,
        retry_strategy: None,
        max_attempts: None,
        cancellation: None,
        idempotency_key: None,
        start: None,
    };
    while let Err(fault) = store.task_spawn_all(&scope, &[(&task, None)], Duration::from_secs(1), true).await {
        assert!(matches!(fault, store::Fault::StalePlan), "{fault:?}");
        stale += 1;
        assert!(stale <= connections, "a connection keeps its stale plan");
    }
    assert!(stale > 0, "the plan was stale");
}

/// Postgres hangs: it takes what is sent and answers nothing, and TCP says that all is well. Each call is answered in time, and
/// what was asked for is carried out once Postgres is back, once.
#[tokio::test(flavor = "multi_thread")]
async fn a_postgres_that_hangs_is_given_up() {
    let (server, link) = over_a_link().await;
    let client = server.client();
    client.spawn_tasks(tasks(1)).await.unwrap();
    link.set(Toxic::Hole(false, true));
    let hung = tokio::spawn({
        let client = client.clone();
        async move { client.spawn_tasks(tasks(1)).await }
    });
    let began = std::time::Instant::now();
    let mut grpc = server.raw().await;
    let mut reading = tonic::Request::new(pb::GetQueueStatsRequest { queue: "q".into() });
    reading.set_timeout(Duration::from_secs(3));
    assert!(in_time("a reader is told", grpc.get_queue_stats(reading)).await.is_err());
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    // Somebody without a deadline of his own: the connection is given up all the same.
    let store = &server.app().engine().store;
    let began = std::time::Instant::now();
    let fault = in_time("the silence ends", store.queue_list(None, "", 1)).await.unwrap_err();
    // Gone: no connection was left, and no new one came about.
    assert!(matches!(fault, store::Fault::Unknown(_) | store::Fault::Gone(_)), "{fault:?}");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    link.set(Toxic::Pass);
    in_time("the spawn is carried out", hung).await.unwrap().unwrap();
    let spawned: i64 =
        server.database().connect().await.query_one("select count(*) from absurd.t_q", &[]).await.unwrap().get(0);
    assert_eq!(spawned, 2);
}

/// One of two replicas says nothing any more. A call that it was sent waits; what is about other runs goes to the other one.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_says_nothing_holds_up_only_what_it_was_told() {
    let server = Server::start().await;
    let other = Server::start_with(
        server.database().clone(),
        ServerOptions { without_queue: true, ..ServerOptions::default() },
    )
    .await;
    let link = Link::before(&other.url()).await;
    let urls = format!("{},{}", server.url(), link.url());
    let client = AbsurdClient::connect(&ConnectOptions::new(urls)).unwrap().with_queue("q");
    client.spawn_tasks(tasks(8)).await.unwrap();
    let claims = client.claim_task(ClaimOptions { qty: 8, ..ClaimOptions::default() }).await.unwrap();
    assert_eq!(claims.len(), 8);
    link.set(Toxic::Hole(true, true));
    let (mut done, mut waiting) = (0, Vec::new());
    for claim in claims {
        let mut completing = tokio::spawn(async move { claim.complete(&j!(1)).await });
        match tokio::time::timeout(Duration::from_secs(2), &mut completing).await {
            Ok(completed) => {
                completed.unwrap().unwrap();
                done += 1;
            }
            Err(_) => waiting.push(completing),
        }
    }
    assert!(done >= 7, "{done} of 8 were completed while one replica said nothing");
    link.set(Toxic::Pass);
    for completing in waiting {
        in_time("what the silent one was told is told again", completing).await.unwrap().unwrap();
    }
}

/// Whoever holds a task's row makes the outcomes of its run wait, and tells nobody that a claim is lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_held_task_makes_each_outcome_wait() {
    let server = Server::start().await;
    let client = server.client();
    client.spawn_tasks(tasks(3)).await.unwrap();
    let claims = client.claim_task(ClaimOptions { qty: 3, ..ClaimOptions::default() }).await.unwrap();
    let mut sql = server.database().connect().await;
    let lock = sql.transaction().await.unwrap();
    lock.execute("select from absurd.t_q for update", &[]).await.unwrap();
    let mut claims = claims.into_iter();
    let mut next = || claims.next().unwrap();
    let (complete, fail, release) = (next(), next(), next());
    let outcomes = [
        tokio::spawn(async move { complete.complete(&j!(1)).await.map(drop) }),
        tokio::spawn(async move { fail.fail(&j!({"message": "x"})).await.map(drop) }),
        tokio::spawn(async move { release.release(Duration::ZERO).await }),
    ];
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(outcomes.iter().all(|outcome| !outcome.is_finished()));
    lock.rollback().await.unwrap();
    for outcome in outcomes {
        in_time("the outcome is taken", outcome).await.unwrap().unwrap();
    }
}

/// A keyed spawn that waits for an open transaction with the same key holds up nobody else.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_held_by_an_open_transaction_stalls_only_its_own_spawn() {
    let server = Server::start().await;
    let client = server.client();
    let mut sql = server.database().connect().await;
    let open = sql.transaction().await.unwrap();
    let first: uuid::Uuid = open
        .query_one("select task_id from absurd.spawn_task('q', 'n', 'null', '{\"idempotency_key\": \"k\"}')", &[])
        .await
        .unwrap()
        .get(0);
    let keyed = |key: &str| SpawnOptions { idempotency_key: Some(key.into()), ..SpawnOptions::default() };
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.spawn_task("n", &j!(null), keyed("k")).await }
    });
    for index in 0..20 {
        in_time("others pass", client.spawn_task("n", &j!(null), keyed(&format!("other {index}")))).await.unwrap();
    }
    assert!(!waiting.is_finished());
    open.commit().await.unwrap();
    let spawned = in_time("the spawn is answered", waiting).await.unwrap().unwrap();
    assert_eq!((spawned.task_id, spawned.created), (first, false));
}

/// A stream that is not read stops only itself, also on a connection that it shares.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_does_not_stop_its_neighbour() {
    let server = Server::start().await;
    let client = server.client();
    let params = "x".repeat(200_000);
    let mut grpc = server.raw().await;
    let (_, slow) = open(&mut grpc, request(100)).await;
    let big = (0..100).map(|_| NewTask::new("n", &params, SpawnOptions::default()).unwrap());
    for chunk in big.collect::<Vec<_>>().chunks(20) {
        client.spawn_tasks(chunk.to_vec()).await.unwrap();
    }
    // What the slow stream holds is bounded (4 MiB wait for it); the rest goes to the one that reads, on the same connection.
    let (_, mut quick) = open(&mut grpc, request(1)).await;
    let mut seen = HashSet::new();
    while seen.len() < 30 {
        let task = next_task(&mut quick).await;
        seen.insert(task.task_id.clone());
        complete(&mut grpc, &task).await;
    }
    drop(slow);
}

/// The LISTEN connection is killed: work from SQL is found all the same, and the bell works again afterwards.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_listen_connection_delays_and_loses_nothing() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    let mut stream =
        server.client().claim_stream(StreamOptions { max_in_flight: 10, ..Default::default() }).await.unwrap();
    let kill = "select count(pg_terminate_backend(pid)) from pg_stat_activity
                 where datname = current_database() and application_name like '%(listen)'";
    eventually("the server listens", || async {
        let killed: i64 = sql.query_one(kill, &[]).await.unwrap().get(0);
        (killed == 1).then_some(())
    })
    .await;
    for round in 0..2 {
        sql.execute("select absurd.spawn_task('q', 'n', to_jsonb($1::int))", &[&round]).await.unwrap();
        let task = in_time("the task is found", stream.next()).await.unwrap();
        assert_eq!(task.params.as_ref().unwrap().as_str(), round.to_string());
        task.complete(&j!(1)).await.unwrap();
        eventually("the server listens again", || async { server.app().engine().hints.listening().then_some(()) })
            .await;
    }
}

/// Postgres stops and starts under load: every acknowledged spawn is completed once, no call fails in the end.
#[tokio::test(flavor = "multi_thread")]
async fn postgres_restarts_under_load() {
    let mut cluster = OwnCluster::start(&[]).await;
    let database = cluster.database().await;
    let server = Server::start_on(&database).await;
    let client = server.client();
    let mut stream =
        client.claim_stream(StreamOptions { max_in_flight: 20, ..StreamOptions::default() }).await.unwrap();
    let worker = tokio::spawn(async move {
        let mut done = 0;
        while let Some(task) = stream.next().await {
            done += usize::from(task.complete(&j!(1)).await.is_ok());
            if task.task_name == "last" {
                break;
            }
        }
        done
    });
    let producer = tokio::spawn({
        let client = client.clone();
        async move {
            let mut spawned = Vec::new();
            let options = || SpawnOptions { max_attempts: Some(5), ..SpawnOptions::default() };
            for index in 0..200 {
                spawned.push(
                    client.spawn_task("n", &j!(index), options()).await.expect("no call fails in the end").task_id,
                );
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            spawned
        }
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    cluster.stop().await;
    cluster.start_again().await;
    let spawned = in_time("all are spawned", producer).await.unwrap();
    for task_id in &spawned {
        let end = client.await_task_result(*task_id, Some(absurd_tests::PATIENCE)).await.unwrap();
        assert_eq!(end.state, State::Completed);
    }
    let distinct: HashSet<_> = spawned.iter().collect();
    let sql = database.connect().await;
    let stored: i64 = sql.query_one("select count(*) from absurd.t_q", &[]).await.unwrap().get(0);
    assert_eq!((distinct.len(), stored), (200, 200), "no spawn was carried out twice");
    client.spawn_task("last", &j!(null), SpawnOptions::default()).await.unwrap();
    assert!(in_time("the worker ends", worker).await.unwrap() >= 1);
    drop(server);
    cluster.stop().await;
}

/// Lets commits wait for a standby of this name; for none: no more.
pub(crate) async fn standby(sql: &tokio_postgres::Client, names: &str) {
    sql.batch_execute(&format!("alter system set synchronous_standby_names = '{names}'")).await.unwrap();
    sql.batch_execute("select pg_reload_conf()").await.unwrap();
    eventually("the setting is in force", async || {
        let row = sql.query_one("select current_setting('synchronous_standby_names')", &[]).await.unwrap();
        (row.get::<_, &str>(0) == names).then_some(())
    })
    .await;
}

/// The session whose commit of such a statement waits.
pub(crate) async fn waiting_session(sql: &tokio_postgres::Client, pattern: &str) -> i32 {
    let query = "select pid from pg_stat_activity where wait_event = 'SyncRep' and query ~ $1";
    let find = async || sql.query(query, &[&pattern]).await.unwrap().first().map(|row| row.get(0));
    eventually("a commit waits", find).await
}

/// Commits a statement of the server and loses its answer.
async fn lose_answer<T: Send + 'static>(
    sql: &tokio_postgres::Client,
    pattern: &str,
    call: impl Future<Output = T> + Send + 'static,
) -> T {
    standby(sql, "nobody").await;
    let calling = tokio::spawn(call);
    let session = waiting_session(sql, pattern).await;
    sql.execute("select pg_terminate_backend($1)", &[&session]).await.unwrap();
    standby(sql, "").await;
    in_time("the call is answered", calling).await.unwrap()
}

/// A sleep, a wait and an emission whose answers are lost are repeated by the server, with one effect and the same answer.
#[tokio::test(flavor = "multi_thread")]
async fn lost_answers_of_waits_and_emissions_are_asked_for_again() {
    let cluster = OwnCluster::start(&["synchronous_commit=on"]).await;
    let server = Server::start_on(&cluster.database().await).await;
    let sql = server.database().connect().await;
    let client = server.client();
    let new = |index: i32| NewTask::new("n", &j!(index), SpawnOptions::default()).unwrap();
    client.spawn_tasks((0..2).map(new).collect()).await.unwrap();
    let claimed = client.claim_task(ClaimOptions { qty: 2, ..ClaimOptions::default() }).await.unwrap();
    let (sleeper, waiter) = (claimed[0].run_id, claimed[1].run_id);
    let sleep = {
        let client = client.clone();
        async move { client.sleep(sleeper, Duration::from_secs(3600), Some("nap")).await.unwrap() }
    };
    let Slept::Suspended { wake_at } = lose_answer(&sql, "run_sleep", sleep).await else { panic!("it sleeps") };
    let stored: std::time::SystemTime =
        sql.query_one("select available_at from absurd.r_q where run_id = $1", &[&sleeper]).await.unwrap().get(0);
    assert_eq!(wake_at, stored, "the time of the first");
    let wait = {
        let client = client.clone();
        async move { client.await_event(None, waiter, "s", "e", None).await.unwrap() }
    };
    assert_eq!(lose_answer(&sql, "^commit", wait).await, Awaited::Suspended { wake_at: None });
    let emit = {
        let client = client.clone();
        async move { client.emit_event("e", &j!(1)).await.unwrap() }
    };
    // That it was the first emission is what the lost answer said.
    assert!(!lose_answer(&sql, "^commit", emit).await.applied);
    let woken: String =
        sql.query_one("select state from absurd.r_q where run_id = $1", &[&waiter]).await.unwrap().get(0);
    assert_eq!(woken, "pending");
}
