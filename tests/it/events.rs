//! Events over gRPC: payloads, sleep, timeouts that stay timeouts.

use std::time::Duration;

use absurd_client::durable::testing::TestClock;
use absurd_client::{
    Awaited, ClaimOptions, ClaimStream, ClaimedTask, ConnectOptions, Emitted, Json, NewTask, Reason, Slept,
    SpawnOptions, State, StreamOptions,
};
use absurd_proto::v1 as pb;
use absurd_server::settings::Settings;
use absurd_tests::{Database, Server, ServerOptions, eventually, in_time};
use serde_json::json as j;
use tonic_types::StatusExt as _;

const NOW: Option<Duration> = Some(Duration::ZERO);

async fn stream(server: &Server) -> ClaimStream {
    let options = StreamOptions { max_in_flight: 10, ..StreamOptions::default() };
    server.client().claim_stream(options).await.unwrap()
}

async fn next(stream: &mut ClaimStream) -> ClaimedTask {
    in_time("a task arrives", stream.next()).await.unwrap()
}

async fn spawn(server: &Server) {
    let retry = absurd_client::RetryStrategy::Immediate;
    let options = SpawnOptions { max_attempts: Some(5), retry_strategy: Some(retry), ..SpawnOptions::default() };
    server.client().spawn_task("n", &j!(null), options).await.unwrap();
}

fn payload(awaited: &Awaited) -> String {
    match awaited {
        Awaited::Payload(json) => json.as_str().to_owned(),
        other => panic!("a payload was expected, not {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_wakes_its_run_and_is_found_again() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let client = server.client();
    let mut tasks = stream(&server).await;
    spawn(&server).await;
    let task = next(&mut tasks).await;
    let (run, task_id) = (task.run_id, task.task_id);
    assert_eq!(task.await_event("s", "e", None).await.unwrap(), Awaited::Suspended { wake_at: None });
    // Said twice, as a mesh may do; and by whoever does not hold the run any more.
    assert_eq!(task.await_event("s", "e", None).await.unwrap(), Awaited::Suspended { wake_at: None });
    let lost = task.complete(&j!(1)).await.unwrap_err();
    assert_eq!(lost.reason(), Reason::ClaimLost);
    assert_eq!(client.emit_event("e", &j!({"x": 1})).await.unwrap(), Emitted { applied: true, woken: 1 });
    assert_eq!(
        client.emit_event("e", &j!({"x": 2})).await.unwrap(),
        Emitted { applied: false, woken: 0 },
        "the first emission wins"
    );
    let woken = next(&mut tasks).await;
    assert_eq!((woken.run_id, woken.attempt), (run, 1));
    assert_eq!(woken.checkpoint("s").unwrap().unwrap().as_str(), "{\"x\": 1}");
    assert_eq!(payload(&woken.await_event("s", "e", None).await.unwrap()), "{\"x\": 1}");
    assert_eq!(payload(&woken.await_event("another step", "e", NOW).await.unwrap()), "{\"x\": 1}");
    client.emit_event_json("nothing", Json::null()).await.unwrap();
    assert_eq!(payload(&woken.await_event("s3", "nothing", None).await.unwrap()), "null");
    // The next attempt finds what was stored, without any event.
    woken.fail(&j!({"message": "x"})).await.unwrap();
    let again = next(&mut tasks).await;
    assert_eq!(payload(&again.await_event("s", "never emitted", None).await.unwrap()), "{\"x\": 1}");
    again.complete(&j!("done")).await.unwrap();
    assert_eq!(client.get_task_result(task_id).await.unwrap().state, State::Completed);
}

/// A timeout is remembered, across attempts, deferrals and whatever else is awaited.
#[tokio::test(flavor = "multi_thread")]
async fn a_timeout_stays_a_timeout() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    let mut tasks = stream(&server).await;
    spawn(&server).await;
    let task = next(&mut tasks).await;
    assert_eq!(task.await_event("now", "e", NOW).await.unwrap(), Awaited::TimedOut, "no time at all is over at once");
    let short = Some(Duration::from_millis(300));
    let Awaited::Suspended { wake_at: Some(deadline) } = task.await_event("s", "e", short).await.unwrap() else {
        panic!("the run sleeps until its deadline")
    };
    let woken = next(&mut tasks).await;
    assert!(std::time::SystemTime::now() >= deadline);
    assert_eq!((woken.wake_event.as_deref(), &woken.event_payload), (Some("e"), &None));
    // Another wait comes first, a long one; the first one's timeout is not forgotten over it.
    let Awaited::Suspended { .. } = woken.await_event("other", "o", None).await.unwrap() else { panic!() };
    server.client().emit_event("o", &j!(1)).await.unwrap();
    let woken = next(&mut tasks).await;
    assert_eq!(woken.await_event("s", "e", Some(Duration::from_secs(3600))).await.unwrap(), Awaited::TimedOut);
    // Even when the event comes after all.
    server.client().emit_event("e", &j!("late")).await.unwrap();
    assert_eq!(woken.await_event("s", "e", None).await.unwrap(), Awaited::TimedOut);
    woken.fail(&j!({"message": "x"})).await.unwrap();
    let again = next(&mut tasks).await;
    assert_eq!(again.await_event("s", "e", None).await.unwrap(), Awaited::TimedOut, "nor by the next attempt");

    // A deferral between the end of the time and the call: by SQL, as an SDK does with a task that it does not know.
    let Awaited::Suspended { .. } = again.await_event("d", "defer", short).await.unwrap() else { panic!() };
    let woken = next(&mut tasks).await;
    sql.execute("select absurd.schedule_run('q', $1, now())", &[&woken.run_id]).await.unwrap();
    let woken = next(&mut tasks).await;
    assert_eq!(woken.wake_event, None, "the signal is gone");
    assert_eq!(woken.await_event("d", "defer", short).await.unwrap(), Awaited::TimedOut);
    woken.complete(&j!(1)).await.unwrap();
    // The marks are nobody's checkpoints.
    let visible = "select count(*) from absurd.c_q where status = 'committed' and checkpoint_name in ('s', 'now', 'd')";
    assert_eq!(sql.query_one(visible, &[]).await.unwrap().get::<_, i64>(0), 0);
}

/// The deadline is that of the first call, also for a wait that was interrupted.
#[tokio::test(flavor = "multi_thread")]
async fn a_wait_does_not_begin_anew() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    let mut tasks = stream(&server).await;
    spawn(&server).await;
    let task = next(&mut tasks).await;
    let Awaited::Suspended { wake_at: first } =
        task.await_event("s", "e", Some(Duration::from_secs(3600))).await.unwrap()
    else {
        panic!()
    };
    // Somebody makes the run claimable before its time.
    sql.execute("update absurd.r_q set available_at = now(), wake_event = null", &[]).await.unwrap();
    let woken = next(&mut tasks).await;
    let Awaited::Suspended { wake_at: second } =
        woken.await_event("s", "e", Some(Duration::from_secs(9000))).await.unwrap()
    else {
        panic!()
    };
    assert_eq!(first, second);
}

/// A wait that an SDK began over SQL ends in a worker over gRPC, and the other way round.
#[tokio::test(flavor = "multi_thread")]
async fn waits_cross_between_sql_and_grpc() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    spawn(&server).await;
    let row = sql.query_one("select run_id, task_id from absurd.claim_task('q', 'w')", &[]).await.unwrap();
    let (run, task): (uuid::Uuid, uuid::Uuid) = (row.get(0), row.get(1));
    let wait = "select should_suspend from absurd.await_event('q', $1, $2, 's', 'e', 0)";
    assert!(sql.query_one(wait, &[&task, &run]).await.unwrap().get::<_, bool>(0));
    let mut tasks = stream(&server).await;
    let woken = next(&mut tasks).await;
    assert_eq!(woken.await_event("s", "e", Some(Duration::from_secs(60))).await.unwrap(), Awaited::TimedOut);
    let Awaited::Suspended { .. } = woken.await_event("s2", "e2", Some(Duration::from_secs(60))).await.unwrap() else {
        panic!()
    };
    tasks.close(Duration::from_secs(1)).await.unwrap();
    sql.execute("select absurd.emit_event('q', 'e2', '5')", &[]).await.unwrap();
    let row = sql.query_one("select run_id, event_payload::text from absurd.claim_task('q', 'w')", &[]).await.unwrap();
    assert_eq!((row.get::<_, uuid::Uuid>(0), row.get::<_, &str>(1)), (run, "5"));
    // The mark of the deadline is no checkpoint to the SDK: it waits as if there were none.
    let stored = "select payload::text from absurd.await_event('q', $1, $2, 's2', 'e2')";
    assert_eq!(sql.query_one(stored, &[&task, &run]).await.unwrap().get::<_, &str>(0), "5");
    assert!(
        sql.query_one("select should_suspend from absurd.await_event('q', $1, $2, 's', 'e')", &[&task, &run])
            .await
            .unwrap()
            .get::<_, bool>(0)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_waits_and_emissions_are_refused() {
    let server = Server::start().await;
    let client = server.client();
    let mut grpc = server.raw().await;
    let mut tasks = stream(&server).await;
    spawn(&server).await;
    let task = next(&mut tasks).await;
    let request = |step: &str, event: &str| pb::AwaitEventRequest {
        queue: "q".into(),
        run_id: String::new(),
        claim_token: Some(task.claim_token().to_owned()),
        step_name: step.into(),
        event_name: event.into(),
        timeout: None,
        task_id: String::new(),
    };
    let negative = Some(prost_types::Duration { seconds: -1, nanos: 0 });
    for (wrong, field) in [
        (request(" ", "e"), "step_name"),
        (request("s", ""), "event_name"),
        (request("s", &"x".repeat(513)), "event_name"),
        (pb::AwaitEventRequest { timeout: negative, ..request("s", "e") }, "timeout"),
    ] {
        let status = grpc.await_event(wrong).await.unwrap_err();
        assert_eq!(status.get_error_details().bad_request().unwrap().field_violations[0].field, field, "{status}");
    }
    let unknown = client.await_event(None, uuid::Uuid::now_v7(), "s", "e", None).await.unwrap_err();
    assert_eq!(unknown.reason(), Reason::RunNotFound);
    let emission = pb::EmitEventRequest {
        queue: "q".into(),
        event_name: "e".into(),
        payload: Some(pb::Json { text: "\"\\u0000\"".into() }),
    };
    let status = grpc.emit_event(emission).await.unwrap_err();
    assert!(status.message().contains("payload"), "{status}");
    let nowhere = client.with_queue("nowhere").emit_event("e", &j!(1)).await.unwrap_err();
    assert_eq!(nowhere.reason(), Reason::QueueNotFound);
    client.cancel_task_by_id(task.task_id).await.unwrap();
    let cancelled = task.await_event("s", "e", None).await.unwrap_err();
    assert_eq!(cancelled.reason(), Reason::TaskCancelled);
}

/// A run that sleeps on an event is in flight no more: its credit is free at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_sleeping_run_frees_its_credit() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let mut tasks = server.client().claim_stream(StreamOptions::default()).await.unwrap();
    for _ in 0..5 {
        spawn(&server).await;
    }
    for _ in 0..5 {
        let task = next(&mut tasks).await;
        let Awaited::Suspended { .. } = task.await_event("s", "e", None).await.unwrap() else { panic!() };
    }
    assert_eq!(server.client().emit_event("e", &j!(1)).await.unwrap(), Emitted { applied: true, woken: 5 });
    for _ in 0..5 {
        next(&mut tasks).await.complete(&j!(1)).await.unwrap();
    }
    let sql = server.database().connect().await;
    eventually("all are completed", || async {
        let row = sql.query_one("select count(*) from absurd.t_q where state = 'completed'", &[]).await.unwrap();
        (row.get::<_, i64>(0) == 5).then_some(())
    })
    .await;
}

/// The original client's names for it: a wait that raises, and two ways to spawn.
#[tokio::test(flavor = "multi_thread")]
async fn the_helpers_do_what_their_names_say() {
    use absurd_client::{CancellationRules, Retries, WaitError, spawn_cancellable_task, spawn_retry_task};
    let server = Server::start().await;
    let client = server.client();
    let mut tasks = stream(&server).await;
    let spawned = spawn_retry_task(&client, "n", &j!(null), Retries::default()).await.unwrap();
    let stored = client.get_task_status(spawned.task_id).await.unwrap().unwrap();
    let strategy: serde_json::Value = stored.retry_strategy.unwrap().to().unwrap();
    assert_eq!(
        (stored.max_attempts, strategy["kind"].as_str(), strategy["base_seconds"].as_f64()),
        (Some(3), Some("exponential"), Some(30.0))
    );
    let task = next(&mut tasks).await;
    let WaitError::Sleep(sleep) =
        client.wait_for_event(task.run_id, "e", Duration::from_secs(60), Some(task.task_id), "s").await.unwrap_err()
    else {
        panic!("the run sleeps")
    };
    assert_eq!(
        (sleep.run_id, sleep.event_name.as_deref(), sleep.wake_at.is_some()),
        (Some(task.run_id), Some("e"), true)
    );
    client.emit_event("e", &j!("here")).await.unwrap();
    let task = next(&mut tasks).await;
    let payload =
        client.wait_for_event(task.run_id, "e", Duration::from_secs(60), Some(task.task_id), "s").await.unwrap();
    assert_eq!(payload.as_str(), "\"here\"");
    let timeout = client.wait_for_event(task.run_id, "never", Duration::ZERO, None, "s2").await.unwrap_err();
    assert!(matches!(timeout, WaitError::Timeout), "{timeout}");
    task.complete(&j!(1)).await.unwrap();
    let rules = CancellationRules { max_delay: Some(Duration::from_secs(86400)), max_duration: None };
    let spawned = spawn_cancellable_task(&client, "n", &j!(null), rules).await.unwrap();
    let stored = client.get_task_status(spawned.task_id).await.unwrap().unwrap();
    assert_eq!((stored.cancellation.unwrap().as_str(), stored.max_attempts), ("{\"max_delay\": 86400}", Some(1)));
}

/// Thousands wait for one event: they are woken batch by batch, each batch whole, and a server that dies in between leaves
/// nothing undone.
#[tokio::test(flavor = "multi_thread")]
async fn many_who_wait_are_woken_in_batches() {
    let settings = Settings { test_clock: Some(true), ..Settings::default() };
    let server =
        Server::start_with(Database::new().await, ServerOptions { settings, ..ServerOptions::default() }).await;
    let sql = server.database().connect().await;
    // A claim may find fewer: a clock that is set back while they are spawned hides the youngest for that long.
    let until_none_is_pending = async |claim: &str| {
        eventually("all are claimed", async || {
            sql.batch_execute(claim).await.unwrap();
            let pending = "select count(*) from absurd.r_q where state = 'pending'";
            (sql.query_one(pending, &[]).await.unwrap().get::<_, i64>(0) == 0).then_some(())
        })
        .await;
    };
    let wait = async |event: &str| {
        sql.batch_execute(
            "select absurd.spawn_task('q', 'n', 'null') from generate_series(1, 2500);
             analyze absurd.r_q, absurd.t_q, absurd.w_q; -- statistics of a time when nobody slept",
        )
        .await
        .unwrap();
        until_none_is_pending(&format!(
            "select absurd.await_event('q', c.task_id, c.run_id, 'wait', '{event}', null)
               from absurd.claim_task('q', 'w', 600, 2500) c"
        ))
        .await;
    };
    let left = async || -> (i64, i64, i64) {
        let query =
            "select (select count(*) from absurd.r_q where state = 'sleeping'), (select count(*) from absurd.w_q),
                            (select count(*) from absurd_server.emission)";
        let row = sql.query_one(query, &[]).await.unwrap();
        (row.get(0), row.get(1), row.get(2))
    };
    wait("go").await;
    assert_eq!(left().await, (2500, 2500, 0));
    // As the server's sessions are.
    sql.batch_execute("begin; set local enable_seqscan = off; set local enable_bitmapscan = off").await.unwrap();
    let explain = "explain (analyze, buffers, format json) select absurd_server.emit_events('q', '{go}', array[jsonb '{}'], 1000)";
    let plan: serde_json::Value = match &sql.simple_query(explain).await.unwrap()[1] {
        tokio_postgres::SimpleQueryMessage::Row(row) => serde_json::from_str(row.get(0).unwrap()).unwrap(),
        other => panic!("{other:?}"),
    };
    // Some 45 pages for each that is woken; with a walk over all sleepers for each it would be 110 already here.
    let pages = plan[0]["Plan"]["Shared Hit Blocks"].as_u64().unwrap();

    assert!(pages < 70_000, "{pages} pages");
    sql.batch_execute("rollback").await.unwrap();
    let emitted = server.client().emit_event("go", &j!({"x": 1})).await.unwrap();
    assert_eq!((emitted.applied, emitted.woken), (true, 2500));
    assert_eq!(left().await, (0, 0, 0));
    let stored = "select count(*) from absurd.c_q c join absurd.r_q r on r.run_id = c.owner_run_id join absurd.t_q t on t.task_id = r.task_id
                   where c.state = '{\"x\": 1}' and r.state = 'pending' and r.event_payload = c.state and t.state = 'pending'";
    assert_eq!(sql.query_one(stored, &[]).await.unwrap().get::<_, i64>(0), 2500);
    // Those are taken, so that the others can wait.
    until_none_is_pending("select absurd.complete_run('q', run_id, null) from absurd.claim_task('q', 'w', 600, 2500)")
        .await;
    wait("other").await;
    assert_eq!(left().await, (2500, 2500, 0));
    // A server that dies after its first batch.
    sql.batch_execute("begin").await.unwrap();
    sql.batch_execute("select absurd_server.emit_events('q', '{other}', '{2}', 1000)").await.unwrap();
    assert_eq!(left().await, (1500, 1500, 1));
    sql.batch_execute("commit").await.unwrap();
    let again = server.client().emit_event("other", &j!(3)).await.unwrap();
    assert_eq!((again.applied, again.woken), (false, 0), "the first emission wins");
    let clock = TestClock::connect(&ConnectOptions::new(server.url())).unwrap();
    clock.advance(Duration::ZERO).await.unwrap();
    assert_eq!(left().await, (0, 0, 0));
    let stored = "select count(*) from absurd.c_q where state = '2'";
    assert_eq!(sql.query_one(stored, &[]).await.unwrap().get::<_, i64>(0), 2500);
}

/// Many sleeps, waits and emissions at once share transactions; a run and an event that somebody holds delay nobody else's.
#[tokio::test(flavor = "multi_thread")]
async fn many_at_once_share_transactions() {
    const COUNT: usize = 200;
    let server = Server::start().await;
    let client = server.client();
    let sql = server.database().connect().await;
    let transactions = async |table: &str| -> i64 {
        let query = format!("select count(distinct xmin::text) from absurd.{table}_q");
        sql.query_one(&query, &[]).await.unwrap().get(0)
    };
    let new = |_| NewTask::new("n", &j!(null), SpawnOptions::default()).unwrap();
    client.spawn_tasks((0..COUNT).map(new).collect()).await.unwrap();
    let claim = async || {
        let options = ClaimOptions { qty: 200, wait: Duration::from_secs(30), ..ClaimOptions::default() };
        let mut claimed = Vec::new();
        while claimed.len() < COUNT {
            claimed.extend(in_time("tasks", client.claim_task(options.clone())).await.unwrap());
        }
        claimed
    };
    let tasks = claim().await;
    // One run is held, and one event is being emitted, by somebody who takes his time.
    let other = server.database().connect().await;
    other.batch_execute("begin").await.unwrap();
    other.execute("select from absurd.r_q where run_id = $1 for update", &[&tasks[0].run_id]).await.unwrap();
    sql.batch_execute("insert into absurd.e_q (event_name, emitted_at) values ('e1', 'epoch')").await.unwrap();
    other.batch_execute("update absurd.e_q set payload = '1' where event_name = 'e1'").await.unwrap();
    let event = |index: usize| format!("e{}", if index == 1 { 1 } else { 2 + index % 10 });
    let waits = tasks.iter().enumerate().map(|(index, task)| {
        let (client, event, run_id) = (client.clone(), event(index), task.run_id);
        tokio::spawn(async move { client.await_event(None, run_id, "s", &event, None).await })
    });
    let mut waits: Vec<_> = waits.collect();
    for wait in waits.drain(2..) {
        assert_eq!(in_time("a free one", wait).await.unwrap().unwrap(), Awaited::Suspended { wake_at: None });
    }
    assert!(waits.iter().all(|wait| !wait.is_finished()));
    let shared = transactions("w").await;
    assert!(shared < 50, "{shared} transactions for {COUNT} waits");
    other.batch_execute("commit").await.unwrap();
    let event_held = in_time("the emitted one", waits.remove(1)).await.unwrap().unwrap();
    assert_eq!(payload(&event_held), "1");
    let run_held = in_time("the held one", waits.remove(0)).await.unwrap().unwrap();
    assert_eq!(run_held, Awaited::Suspended { wake_at: None });
    let emissions = (2..12).map(|number| {
        let client = client.clone();
        tokio::spawn(async move { client.emit_event(&format!("e{number}"), &j!(number)).await })
    });
    let mut woken = 0;
    for emission in emissions.collect::<Vec<_>>() {
        let emitted = in_time("an emission", emission).await.unwrap().unwrap();
        assert!(emitted.applied);
        woken += emitted.woken;
    }
    assert_eq!(woken, 199);
    client.schedule_task_after(tasks[1].run_id, Duration::ZERO).await.unwrap();
    let tasks = claim().await;
    let right = "select count(*) from absurd.c_q c join absurd.w_q using (task_id)";
    assert_eq!(sql.query_one(right, &[]).await.unwrap().get::<_, i64>(0), 0, "who has the payload waits no more");
    let sleeps = tasks.iter().map(|task| {
        let (client, run_id) = (client.clone(), task.run_id);
        tokio::spawn(async move { client.sleep(run_id, Duration::from_secs(3600), Some("nap")).await })
    });
    for sleep in sleeps.collect::<Vec<_>>() {
        assert!(matches!(in_time("a sleep", sleep).await.unwrap().unwrap(), Slept::Suspended { .. }));
    }
    sql.batch_execute("delete from absurd.c_q where checkpoint_name <> 'nap'").await.unwrap();
    let shared = transactions("c").await;
    assert!(shared < 50, "{shared} transactions for {COUNT} sleeps");
    let asleep = "select count(*) from absurd.r_q r join absurd.c_q c on c.owner_run_id = r.run_id
                   where r.state = 'sleeping' and r.available_at > now() and c.checkpoint_name = 'nap'";
    assert_eq!(sql.query_one(asleep, &[]).await.unwrap().get::<_, i64>(0), 200);
}
