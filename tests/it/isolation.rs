//! One queue never stops the others: whatever is wrong with its tables, leases end elsewhere, waiters wake, health stays.

use std::time::{Duration, Instant};

use absurd_client::{ClaimOptions, SpawnOptions, State, StreamOptions};
use absurd_server::app::App;
use absurd_server::settings::{Secret, Settings};
use absurd_server::store::migrate;
use absurd_tests::{Database, Server, ServerOptions, eventually, in_time};
use serde_json::json as j;
use tokio_postgres::Client;
use tonic::Code;
use tonic::transport::Endpoint;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_types::StatusExt as _;

use crate::limits::metric;

/// A server whose role owns its database and nothing else, and an administrator's session there.
async fn server_of_a_plain_role() -> (Server, Client) {
    let database = Database::empty().await;
    let admin = database.connect().await;
    let role = format!("app_{}", database.name());
    let url = database.url().replace("//absurd@", &format!("//{role}@"));
    admin
        .batch_execute(&format!("create role {role} login; alter database {} owner to {role}", database.name()))
        .await
        .unwrap();
    migrate::migrate(&url.parse().unwrap(), migrate::Options::default()).await.unwrap();
    let settings = Settings {
        database_url: Some(Secret::from(url.as_str())),
        metrics_listen: Some(([127, 0, 0, 1], 0).into()),
        ..Settings::default()
    };
    (Server::start_with(database, ServerOptions { settings, ..ServerOptions::default() }).await, admin)
}

async fn is_serving(server: &Server) -> bool {
    let channel = Endpoint::from_shared(server.url()).unwrap().connect().await.unwrap();
    let told = HealthClient::new(channel).check(HealthCheckRequest::default()).await.unwrap();
    told.into_inner().status() == ServingStatus::Serving
}

/// Spawns a task with one attempt, claims it with a short lease, and lets the lease run out.
async fn lapse(server: &Server, queue: &str) -> uuid::Uuid {
    let client = server.client().with_queue(queue);
    let spawned = client.spawn_task("n", &j!(null), SpawnOptions::default().max_attempts(1)).await.unwrap();
    let claim = ClaimOptions::default().claim_timeout(Duration::from_secs(1)).wait(absurd_tests::PATIENCE);
    let claimed = in_time("the task is claimed", client.claim_task(claim)).await.unwrap();
    assert_eq!(claimed.iter().map(|task| task.task_id).collect::<Vec<_>>(), [spawned.task_id]);
    spawned.task_id
}

async fn until_swept(server: &Server, queue: &str, task_id: uuid::Uuid) {
    let client = server.client().with_queue(queue);
    eventually("the lapsed lease ends", || async {
        let task = client.get_task_status(task_id).await.unwrap().unwrap();
        (task.state == State::Failed).then_some(())
    })
    .await;
}

/// Whatever makes a look at a queue fail: the leases of its neighbour end, with and without a stream on the bad queue, and the
/// replica serves. A metric names the queue.
#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_cannot_be_read_stops_no_other() {
    let (server, admin) = server_of_a_plain_role().await;
    let ways = [
        ("unreadable", "revoke all on absurd.r_K from R; alter table absurd.r_K owner to absurd"),
        ("renamed", "alter table absurd.r_K rename column available_at to then_at"),
        ("retyped", "alter table absurd.t_K alter column cancellation type text using null"),
        ("halved", "drop table absurd.t_K cascade"),
    ];
    let mut streams = Vec::new();
    for (queue, how) in ways {
        let client = server.client().with_queue(queue);
        client.create_queue().await.unwrap();
        streams.push(client.claim_stream(StreamOptions::default()).await.unwrap());
        let how = how.replace('K', queue).replace('R', &format!("app_{}", server.database().name()));
        admin.batch_execute(&how).await.unwrap_or_else(|error| panic!("{queue}: {error:?}"));
    }
    let task_id = lapse(&server, "q").await;
    until_swept(&server, "q", task_id).await;
    // A second round: by now the troubled queues are looked at apart.
    let task_id = lapse(&server, "q").await;
    until_swept(&server, "q", task_id).await;
    assert!(is_serving(&server).await);
    for queue in ["unreadable", "renamed"] {
        let name = format!("absurd_queue_trouble{{queue=\"{queue}\",kind=\"unreadable\"}}");
        let named = || async { (metric(&server, &name).await > 0.0).then_some(()) };
        eventually(&format!("a metric names {queue}: {:?}", server.app().engine().looks.troubles()), named).await;
    }
    // Mended, it works again by itself.
    admin.batch_execute("alter table absurd.r_renamed rename column then_at to available_at").await.unwrap();
    let client = server.client().with_queue("renamed");
    let spawned = client.spawn_task("n", &j!(1), SpawnOptions::default()).await.unwrap();
    let task = in_time("the mended queue hands out its task", streams[1].next()).await.unwrap();
    assert_eq!(task.task_id, spawned.task_id);
}

/// Locks the tables of queues as VACUUM FULL and ALTER TABLE do, until the session is dropped.
async fn lock(database: &Database, queues: &[String], mode: &str) -> Client {
    let session = database.connect().await;
    session.batch_execute("begin").await.unwrap();
    for queue in queues {
        let tables = ["t", "r", "c", "e", "w"].map(|kind| format!("absurd.{kind}_{queue}")).join(", ");
        session.batch_execute(&format!("lock table {tables} in {mode} mode")).await.unwrap();
    }
    session
}

/// A third of the queues are locked: leases of the others end, callers that wait for results and runs that wait for events and
/// tasks wake, and the replica serves.
#[tokio::test(flavor = "multi_thread")]
async fn locked_queues_stop_no_other() {
    let server = Server::start().await;
    let client = |queue: &str| server.client().with_queue(queue);
    let mut locked: Vec<String> = (0..10).map(|number| format!("locked{number}")).collect();
    for queue in locked.iter().map(String::as_str).chain(["good", "other"]) {
        client(queue).create_queue().await.unwrap();
    }
    // Something of each kind waits in each locked queue, so that every look has a reason to touch it.
    for queue in &locked {
        lapse(&server, queue).await;
        client(queue).spawn_task("n", &j!(1), SpawnOptions::default()).await.unwrap();
    }
    let parent = client("good").spawn_task("parent", &j!(1), SpawnOptions::default()).await.unwrap();
    let child = client("other").spawn_task("child", &j!(1), SpawnOptions::default()).await.unwrap();
    let run = client("good").claim_task(ClaimOptions::default()).await.unwrap().remove(0);
    let wait = absurd_proto::v1::AwaitTaskRequest {
        queue: "good".into(),
        claim_token: Some(run.claim_token().to_owned()),
        step_name: "child".into(),
        awaited_queue: "other".into(),
        awaited_task_id: child.task_id.to_string(),
        ..Default::default()
    };
    server.raw().await.await_task(wait).await.unwrap();
    let session = lock(server.database(), &locked, "access exclusive").await;
    let waiting: Vec<_> = locked
        .drain(..)
        .map(|queue| {
            let client = client(&queue);
            tokio::spawn(async move {
                let spawned = client.spawn_task("n", &j!(2), SpawnOptions::default()).await;
                spawned.map(|spawned| (queue, spawned.task_id))
            })
        })
        .collect();
    let began = Instant::now();
    let task_id = lapse(&server, "good").await;
    until_swept(&server, "good", task_id).await;
    let waiter = client("other");
    let end = tokio::spawn(async move { waiter.await_task_result(child.task_id, Some(Duration::from_secs(30))).await });
    let run = client("other").claim_task(ClaimOptions::default()).await.unwrap().remove(0);
    run.complete(&j!("done")).await.unwrap();
    assert_eq!(in_time("the waiter wakes", end).await.unwrap().unwrap().state, State::Completed);
    let woken = client("good")
        .claim_task(ClaimOptions {
            task_names: vec!["parent".into()],
            ..ClaimOptions::default().wait(absurd_tests::PATIENCE)
        })
        .await
        .unwrap()
        .remove(0);
    assert_eq!(woken.task_id, parent.task_id);
    assert!(is_serving(&server).await);
    assert!(waiting.iter().all(|call| !call.is_finished()), "calls on a locked queue wait, for {:?}", began.elapsed());
    session.batch_execute("commit").await.unwrap();
    for call in waiting {
        let (queue, task_id) = in_time("the call goes on", call).await.unwrap().unwrap();
        assert!(client(&queue).get_task_status(task_id).await.unwrap().is_some());
    }
}

/// More calls wait for a locked queue than there are connections: none of them holds one.
#[tokio::test(flavor = "multi_thread")]
async fn calls_on_a_locked_queue_hold_no_connection() {
    let settings = Settings { max_connections: Some(5), ..Settings::default() };
    let server =
        Server::start_with(Database::new().await, ServerOptions { settings, ..ServerOptions::default() }).await;
    let client = server.client().with_queue("locked");
    client.create_queue().await.unwrap();
    let spawned = client.spawn_task("n", &j!(0), SpawnOptions::default()).await.unwrap();
    let run = client.claim_task(ClaimOptions::default()).await.unwrap().remove(0);
    let session = lock(server.database(), &["locked".to_owned()], "access exclusive").await;
    let mut calls = tokio::task::JoinSet::new();
    for number in 0..10 {
        let (one, two, three, four) = (client.clone(), client.clone(), client.clone(), client.clone());
        let (task_id, run_id) = (run.task_id, run.run_id);
        calls.spawn(async move {
            let _ = one.spawn_task("n", &j!(number), SpawnOptions::default()).await.unwrap();
        });
        calls.spawn(async move { drop(two.get_task_status(spawned.task_id).await.unwrap().unwrap()) });
        calls.spawn(async move {
            let _ = three.emit_event(&format!("e{number}"), &j!(1)).await.unwrap();
        });
        calls.spawn(async move {
            let _ = four.set_checkpoint(task_id, &format!("s{number}"), &j!(1), run_id, None).await.unwrap();
        });
    }
    // The lock is known by now, and the neighbour has all connections.
    for number in 0..20 {
        server.client().spawn_task("n", &j!(number), SpawnOptions::default()).await.unwrap();
        server.client().get_queue_stats().await.unwrap();
    }
    assert_eq!(calls.len(), 40, "nobody was answered meanwhile");
    session.batch_execute("commit").await.unwrap();
    in_time("all calls are answered", calls.join_all()).await;
    run.complete(&j!(1)).await.unwrap();
    assert_eq!(client.get_queue_stats().await.unwrap().pending, 10);
}

/// CREATE INDEX keeps writers out and lets readers in; so does the server.
#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_is_locked_for_writes_is_read() {
    let server = Server::start().await;
    let client = server.client();
    let spawned = client.spawn_task("n", &j!(0), SpawnOptions::default()).await.unwrap();
    let session = lock(server.database(), &["q".to_owned()], "share").await;
    let mut raw = server.raw().await;
    let mut request = tonic::Request::new(absurd_proto::v1::SpawnTaskRequest {
        queue: "q".into(),
        task: Some(absurd_proto::v1::NewTask { task_name: "n".into(), ..Default::default() }),
    });
    request.set_timeout(Duration::from_secs(2));
    let refused = in_time("the deadline is kept", raw.spawn_task(request)).await.unwrap_err();
    let details = refused.get_error_details();
    assert_eq!((refused.code(), details.error_info().unwrap().reason.as_str()), (Code::Unavailable, "QUEUE_LOCKED"));
    assert!(details.retry_info().is_some());
    assert!(client.get_task_status(spawned.task_id).await.unwrap().is_some());
    session.batch_execute("commit").await.unwrap();
    client.spawn_task("n", &j!(1), SpawnOptions::default()).await.unwrap();
}

/// A worker that only polls has no stream, and finds lapsed leases and due policies as soon.
#[tokio::test(flavor = "multi_thread")]
async fn polling_makes_a_queue_one_that_is_looked_at() {
    let server = Server::start().await;
    let other = server.client().with_queue("other");
    other.create_queue().await.unwrap();
    let kept = server.client().spawn_task("n", &j!(2), SpawnOptions::default().max_attempts(2)).await.unwrap();
    let cancelled = SpawnOptions::default().max_duration(Duration::from_secs(1));
    let cancelled = other.spawn_task("n", &j!(1), cancelled).await.unwrap();
    let poll = || async {
        assert!(other.claim_task(ClaimOptions::default()).await.unwrap().is_empty());
        server.client().claim_task(ClaimOptions::default().claim_timeout(Duration::from_secs(1))).await.unwrap().pop()
    };
    assert_eq!(other.claim_task(ClaimOptions::default()).await.unwrap().len(), 1);
    assert!(poll().await.is_some());
    let began = Instant::now();
    let again = eventually("the lapsed lease is claimed again", poll).await;
    assert_eq!((again.task_id, again.attempt), (kept.task_id, 2));
    eventually("the policy is carried out", || async {
        let task = other.get_task_status(cancelled.task_id).await.unwrap().unwrap();
        (task.state == State::Cancelled).then_some(())
    })
    .await;
    // The wide look comes every ten seconds at the soonest.
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

/// Policies and partitions do not depend on how the database reads backslashes.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_depends_on_standard_strings() {
    let database = Database::new().await;
    let sql = database.connect().await;
    let off = format!("alter database {} set standard_conforming_strings = off", database.name());
    sql.batch_execute(&off).await.unwrap();
    let sql = database.connect().await;
    sql.batch_execute("set escape_string_warning = off; select absurd.create_queue('p', 'partitioned')").await.unwrap();
    let unbounded: i64 = sql
        .query_one(
            "select count(*) from pg_class c join pg_inherits i on i.inhrelid = c.oid
              where i.inhparent = 'absurd.t_p'::regclass and c.relname !~ '_d$'
                and absurd.partition_upper_bound(c.oid) is null",
            &[],
        )
        .await
        .unwrap()
        .get(0);
    assert_eq!(unbounded, 0);
    let read = "select absurd_server.cancellation_seconds('{\"max_delay\": \" 7 \"}', 'max_delay')";
    assert_eq!(sql.query_one(read, &[]).await.unwrap().get::<_, i64>(0), 7);
}

/// Whoever sees a server healthy finds the queue that it was told to make.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_is_healthy_only_after_its_queue_is_there() {
    let database = Database::new().await;
    let settings = Settings {
        database_url: Some(Secret::from(database.url())),
        listen: Some(([127, 0, 0, 1], 0).into()),
        ..Settings::default()
    };
    let queue = Some(absurd_server::domain::QueueName::parse("queue", "mails").unwrap());
    let options = absurd_server::app::AppOptions { queue, ..settings.into_app_options().unwrap() };
    let app = App::start(options).await.unwrap();
    let made = "select count(*) from absurd.queues where queue_name = 'mails'";
    let sql = database.connect().await;
    assert_eq!(sql.query_one(made, &[]).await.unwrap().get::<_, i64>(0), 1);
    let hung = "select count(*) from pg_trigger where tgname = 'absurd_server_doorbell'";
    assert_eq!(sql.query_one(hung, &[]).await.unwrap().get::<_, i64>(0), 2);
    app.shut_down().await.unwrap();
}

/// A queue whose look runs into the time limit of its statement is set apart as slow: the leases of its neighbour end, and the
/// replica serves all the while.
#[tokio::test(flavor = "multi_thread")]
async fn a_look_that_takes_too_long_stops_no_other() {
    let (server, admin) = server_of_a_plain_role().await;
    let channel = Endpoint::from_shared(server.url()).unwrap().connect().await.unwrap();
    let mut health = HealthClient::new(channel).watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(health.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    let mut streams = Vec::new();
    for queue in ["slow", "q"] {
        let client = server.client().with_queue(queue);
        client.create_queue().await.unwrap();
        let options = StreamOptions { task_names: vec!["nobody".into()], ..StreamOptions::default() };
        streams.push(client.claim_stream(options).await.unwrap());
        // A row for the view to take long over.
        client.spawn_task("other", &j!(1), SpawnOptions::default().max_attempts(2)).await.unwrap();
    }
    let role = format!("app_{}", server.database().name());
    admin
        .batch_execute(&format!(
            "alter table absurd.r_slow rename to r_away;
             create view absurd.r_slow as select r.* from absurd.r_away r, (select pg_sleep(60)) s;
             alter view absurd.r_slow owner to {role}"
        ))
        .await
        .unwrap();
    let slow =
        || async { (metric(&server, "absurd_queue_trouble{queue=\"slow\",kind=\"slow\"}").await > 0.0).then_some(()) };
    eventually("the slow queue is set apart", slow).await;
    let client = server.client().with_queue("q");
    let claim = ClaimOptions::default().claim_timeout(Duration::from_secs(1));
    let task_id = client.claim_task(claim).await.unwrap().remove(0).task_id;
    let again = || async { client.claim_task(ClaimOptions::default()).await.unwrap().pop() };
    assert_eq!(eventually("the lapsed lease ends", again).await.task_id, task_id);
    assert!(is_serving(&server).await);
    let told = tokio::time::timeout(Duration::ZERO, health.message()).await;
    assert!(told.is_err(), "health changed meanwhile: {told:?}");
}

/// A trigger that costs 30 ms a row makes a full batch run into its time limit; in smaller ones everything gets through, and a
/// neighbour does at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_takes_too_long_is_halved() {
    let server = Server::start().await;
    let client = server.client();
    let sql = server.database().connect().await;
    sql.batch_execute(
        "create function slow() returns trigger language plpgsql as $$ begin perform pg_sleep(0.03); return new; end $$;
         create trigger slow before insert on absurd.t_q for each row execute function slow()",
    )
    .await
    .unwrap();
    server.client().with_queue("other").create_queue().await.unwrap();
    let mut spawns = tokio::task::JoinSet::new();
    for number in 0..600 {
        let client = client.clone();
        spawns.spawn(async move { client.spawn_task("n", &j!(number), SpawnOptions::default()).await });
    }
    tokio::task::yield_now().await;
    let other = client.with_queue("other");
    in_time("the neighbour's", other.spawn_task("n", &j!(1), SpawnOptions::default())).await.unwrap();
    while let Some(spawned) = in_time("all spawns end", spawns.join_next()).await {
        spawned.unwrap().unwrap();
    }
}

/// A run that wants to wait for a task of a locked queue is told which queue keeps it, once its time is over.
#[tokio::test(flavor = "multi_thread")]
async fn awaiting_a_task_of_a_locked_queue_names_that_queue() {
    let server = Server::start().await;
    let other = server.client().with_queue("other");
    other.create_queue().await.unwrap();
    let child = other.spawn_task("child", &j!(1), SpawnOptions::default()).await.unwrap();
    server.client().spawn_task("parent", &j!(1), SpawnOptions::default()).await.unwrap();
    let run = server.client().claim_task(ClaimOptions::default()).await.unwrap().remove(0);
    let session = lock(server.database(), &["other".to_owned()], "access exclusive").await;
    let wait = absurd_proto::v1::AwaitTaskRequest {
        queue: "q".into(),
        claim_token: Some(run.claim_token().to_owned()),
        step_name: "child".into(),
        awaited_queue: "other".into(),
        awaited_task_id: child.task_id.to_string(),
        ..Default::default()
    };
    let mut request = tonic::Request::new(wait.clone());
    request.set_timeout(Duration::from_secs(3));
    let refused = server.raw().await.await_task(request).await.unwrap_err();
    let info = refused.get_details_error_info().unwrap();
    assert_eq!(info.reason, "QUEUE_LOCKED", "{refused:?}");
    assert!(refused.message().contains("\"other\""), "{refused}");
    session.batch_execute("commit").await.unwrap();
    in_time("the queue is free", server.raw().await.await_task(wait)).await.unwrap();
}

/// More runs than one look takes wait on a queue that refuses their wake-ups: a run of another queue is woken all the same.
#[tokio::test(flavor = "multi_thread")]
async fn wake_ups_that_are_refused_starve_no_other_queue() {
    let database = Database::new().await;
    let sql = database.connect().await;
    sql.batch_execute(
        "select absurd.create_queue(name) from unnest(array['awaited', 'refuses', 'waits']) name;
         create function refuse() returns trigger language plpgsql as $$ begin raise 'no'; end $$;
         create trigger refuse before insert on absurd.e_refuses for each row execute function refuse();
         insert into absurd_server.awaited_task (queue_name, task_id, waiting_queue, event_name)
           select 'awaited', gen_random_uuid(), queue, 'e' || number
             from (values ('refuses', 700), ('waits', 1)) v (queue, count), generate_series(1, count) number",
    )
    .await
    .unwrap();
    let rows = sql.query("select * from absurd_server.settle_awaited(null, null, 500)", &[]).await.unwrap();
    assert_eq!(rows.iter().map(|row| row.get::<_, &str>(0)).collect::<Vec<_>>(), ["waits"]);
}

/// Checkpoints that cannot be read keep their own task waiting, and no task that has none.
#[tokio::test(flavor = "multi_thread")]
async fn unreadable_checkpoints_keep_only_their_own_task() {
    let server = Server::start().await;
    let client = server.client();
    let sql = server.database().connect().await;
    let resumed = client.spawn_task("resumed", &j!(1), SpawnOptions::default().max_attempts(5)).await.unwrap();
    let run = client.claim_task(ClaimOptions::default()).await.unwrap().remove(0);
    run.set_checkpoint("s", &j!(1)).await.unwrap();
    sql.batch_execute("alter table absurd.c_q rename column state to away").await.unwrap();
    run.fail(&j!("again")).await.unwrap();
    let fresh = client.spawn_task("fresh", &j!(1), SpawnOptions::default()).await.unwrap();
    let both = || ClaimOptions { qty: 2, ..ClaimOptions::default().wait(Duration::from_secs(20)) };
    let got = in_time("the fresh task is claimed", client.claim_task(both())).await.unwrap();
    assert_eq!(got.iter().map(|task| task.task_id).collect::<Vec<_>>(), [fresh.task_id]);
    sql.batch_execute("alter table absurd.c_q rename column away to state").await.unwrap();
    let mended = || async { client.claim_task(both()).await.unwrap().pop() };
    let task = eventually("the other one follows once that is mended", mended).await;
    assert_eq!((task.task_id, task.checkpoint("s").is_some()), (resumed.task_id, true));
}
