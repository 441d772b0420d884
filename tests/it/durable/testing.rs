//! The testing kit: a task in memory behaves as one on a server, and the time of a test server goes where a test wants it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use absurd_client::durable::testing::{Progress, TestClock, TestTask, Wake};
use absurd_client::durable::{Absurd, BoxError, Context, Hooks, TaskError, TaskType, WorkerOptions, blocking};
use absurd_client::{ConnectOptions, Json, State, TaskResult};
use absurd_server::settings::Settings;
use absurd_tests::{Database, Server, ServerOptions, eventually};
use serde_json::{Value, json as j};
use uuid::Uuid;

const HOUR: Duration = Duration::from_secs(3600);
const CHILD: TaskType<u32, u32> = TaskType::new("child");

/// Everything that a handler can do, with a trace of which steps were really done.
async fn story(ctx: Context, done: Arc<std::sync::Mutex<Vec<&'static str>>>) -> Result<Value, BoxError> {
    let note = |what| async move { Ok::<_, BoxError>(what) };
    let first: String = ctx
        .step("same", async || {
            done.lock().unwrap().push("first");
            note("1").await.map(str::to_owned)
        })
        .await?;
    let second: String = ctx
        .step("same", async || {
            done.lock().unwrap().push("second");
            note("2").await.map(str::to_owned)
        })
        .await?;
    ctx.sleep_for("nap", HOUR).await?;
    let late = ctx.await_event::<Value>("late").timeout(HOUR).await;
    let late = match late {
        Err(TaskError::Timeout { .. }) => j!("timed out"),
        other => other?,
    };
    let event: Value = ctx.await_event("go").await?;
    let child = ctx.spawn(&CHILD, &21).await?.task_id;
    let doubled = ctx.await_task_result(&CHILD, child).await?;
    ctx.emit_event("done", &doubled).await?;
    Ok(j!([first, second, late, event, doubled]))
}

#[tokio::test]
async fn a_task_in_memory_has_time_events_and_children() {
    let done = Arc::new(std::sync::Mutex::new(Vec::new()));
    let trace = Arc::clone(&done);
    let mut task = TestTask::new(move |ctx: Context, (): ()| story(ctx, Arc::clone(&trace)), &());
    let start = task.now();
    task.crash_at("same#2");
    assert_eq!(task.run().await, Progress::Crashed);
    assert_eq!(task.run().await, Progress::Suspended(Wake::At(start + HOUR)));
    assert_eq!(*done.lock().unwrap(), ["first", "second", "second"], "what crashed before it was stored is done again");
    task.advance(HOUR / 2);
    assert_eq!(task.run().await, Progress::Suspended(Wake::At(start + HOUR)), "it does not begin anew");
    task.advance(HOUR / 2);
    let until = Some(start + 2 * HOUR);
    assert_eq!(task.run().await, Progress::Suspended(Wake::Event { name: "late".into(), until }));
    task.advance(HOUR);
    assert_eq!(task.run().await, Progress::Suspended(Wake::Event { name: "go".into(), until: None }));
    task.emit("late", &"too late");
    task.emit("go", &j!({"n": 1}));
    task.emit("go", &j!({"n": 2}));
    let child = match task.run().await {
        Progress::Suspended(Wake::Task { task_id, until: None }) => task_id,
        other => panic!("{other:?}"),
    };
    let spawned = task.spawned();
    assert_eq!((spawned.len(), spawned[0].task_id, spawned[0].task_name.as_str()), (1, child, "child"));
    assert_eq!((spawned[0].params.as_str(), spawned[0].max_attempts), ("21", Some(5)));
    task.complete(child, &42);
    let end = j!(["1", "2", "timed out", {"n": 1}, 42]);
    assert_eq!(task.run().await, Progress::Completed(end.clone()));
    assert_eq!(task.run().await, Progress::Completed(end), "it stays as it ended");
    assert_eq!(task.emitted(), [("done".to_owned(), Json::from(j!(42)))]);
    let names: Vec<String> = task.checkpoints().into_iter().map(|(name, _)| name).collect();
    let child = format!("$awaitTaskResult:{child}");
    assert_eq!(names, ["same", "same#2", "nap", "$awaitEvent:go", "$spawn:child", child.as_str()]);
    assert_eq!((task.attempt(), task.checkpoint::<String>("same#2").as_deref()), (2, Some("2")));
}

#[tokio::test]
async fn failures_retries_and_cancellations_in_memory() {
    let handler = |ctx: Context, (): ()| async move {
        ctx.step("s", async || Ok::<_, BoxError>(1)).await?;
        ctx.sleep_for("nap", HOUR).await?;
        match ctx.attempt() {
            1 => panic!("out of luck"),
            2 => Err::<i32, BoxError>(TaskError::failure("Declined", "no money").into()),
            attempt => Ok(attempt),
        }
    };
    let mut task = TestTask::new(handler, &()).max_attempts(3);
    assert!(matches!(task.run().await, Progress::Suspended(_)));
    task.advance(HOUR);
    let panicked = Progress::Failed { name: "Panic".into(), message: "panic: out of luck".into(), retried: true };
    assert_eq!(task.run().await, panicked);
    assert_eq!(task.run_to_end().await, Progress::Completed(3));
    let mut task = TestTask::new(handler, &()).max_attempts(2);
    let declined = Progress::Failed { name: "Declined".into(), message: "no money".into(), retried: false };
    assert_eq!(task.run_to_end().await, declined);
    let mut task = TestTask::new(handler, &());
    assert!(matches!(task.run().await, Progress::Suspended(_)));
    task.cancel();
    assert_eq!(task.run().await, Progress::Cancelled);
    let hooks = Hooks::default().wrap_task_execution(|ctx, execution| async move {
        let result: Value = execution.run().await?.to()?;
        Ok(Json::from(j!({"by": ctx.headers().get("by"), "result": result})))
    });
    let handler = |_: Context, n: i32| async move { Ok::<_, BoxError>(j!(n + 1)) };
    let mut task = TestTask::new(handler, &1).hooks(hooks).header("by", "me");
    assert_eq!(task.run().await, Progress::Completed(j!({"by": "me", "result": 2})));
    let wait = |ctx: Context, id: Uuid| async move {
        let end = ctx.await_task_result(&CHILD, id).outcome().await?;
        Ok::<_, BoxError>(end.state.to_string())
    };
    let id = Uuid::now_v7();
    let mut task = TestTask::new(wait, &id);
    task.end_task(TaskResult { task_id: id, state: State::Cancelled, result: None, failure: None });
    assert_eq!(task.run().await, Progress::Completed("cancelled".into()));
}

#[tokio::test]
async fn a_blocking_handler_in_memory() {
    let calls = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&calls);
    let handler = move |ctx: blocking::Context, n: i32| {
        let n = ctx.step("s", || Ok::<_, BoxError>(n + i32::try_from(counter.fetch_add(1, SeqCst)).unwrap()))?;
        ctx.sleep_for("nap", HOUR)?;
        Ok::<_, BoxError>(n)
    };
    let mut task = TestTask::blocking(handler, &7);
    assert_eq!(task.run_to_end().await, Progress::Completed(7));
    assert_eq!(calls.load(SeqCst), 1);
}

async fn server_with_a_clock() -> (Server, TestClock) {
    let settings = Settings { test_clock: Some(true), ..Settings::default() };
    let server =
        Server::start_with(Database::new().await, ServerOptions { settings, ..ServerOptions::default() }).await;
    let clock = TestClock::connect(&ConnectOptions::new(server.url())).unwrap();
    (server, clock)
}

/// Months go by in a moment: sleeps, timeouts, delayed retries and policies come due, and nothing before its time.
#[tokio::test(flavor = "multi_thread")]
async fn the_time_of_a_test_server_is_the_test_s() {
    let (server, clock) = server_with_a_clock().await;
    let absurd = Absurd::new(server.client());
    let handler = |ctx: Context, (): ()| async move {
        ctx.sleep_for("a month", 720 * HOUR).await?;
        match ctx.await_event::<Value>("never").timeout(24 * HOUR).await {
            Err(TaskError::Timeout { .. }) => {}
            other => return Err(format!("it came: {:?}", other?).into()),
        }
        match ctx.attempt() {
            1 => Err(BoxError::from("again in a day")),
            attempt => Ok(attempt),
        }
    };
    let sleeper = absurd.register("sleeper", handler);
    let worker = absurd.start_worker(WorkerOptions::default()).await.unwrap();
    let start = clock.set(std::time::UNIX_EPOCH + Duration::from_secs(1_800_000_000)).await.unwrap();
    assert_eq!(clock.now().await.unwrap(), start, "it stands still");
    let delay = absurd_client::RetryStrategy::Fixed(24 * HOUR);
    let spawned = absurd.spawn(&sleeper, &()).max_attempts(2).retry(delay).await.unwrap();
    let sleeping = |until: std::time::SystemTime| {
        let client = server.client();
        async move {
            eventually("it sleeps", || async {
                let task = client.get_task_status(spawned.task_id).await.unwrap().unwrap();
                let run = client.get_run_status(task.last_attempt_run.unwrap()).await.unwrap().unwrap();
                (run.state == State::Sleeping && run.available_at == absurd_client::Available::At(until)).then_some(())
            })
            .await;
        }
    };
    let month = start + 720 * HOUR;
    sleeping(month).await;
    assert_eq!(clock.advance(720 * HOUR - Duration::from_secs(1)).await.unwrap(), month - Duration::from_secs(1));
    sleeping(month).await;
    clock.advance(Duration::from_secs(1)).await.unwrap();
    sleeping(month + 24 * HOUR).await;
    clock.advance(24 * HOUR).await.unwrap();
    sleeping(month + 48 * HOUR).await;
    clock.advance(24 * HOUR).await.unwrap();
    let end = absurd.await_task_result(&sleeper, spawned.task_id, Some(absurd_tests::PATIENCE)).await.unwrap();
    assert_eq!(end.result, Some(Json::from(j!(2))), "{:?}", end.failure);
    worker.stop().await;
}

/// When setting the time answers, leases that ended by it have ended, and policies have cancelled.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_due_is_done_when_the_clock_answers() {
    let (server, clock) = server_with_a_clock().await;
    let client = server.client();
    clock.advance(Duration::ZERO).await.unwrap();
    let once = absurd_client::SpawnOptions::default();
    let held = client.spawn_task("held", &j!(null), once).await.unwrap();
    let claimed = client.claim_task(absurd_client::ClaimOptions::default().claim_timeout(HOUR)).await.unwrap();
    assert_eq!(claimed[0].task_id, held.task_id);
    let rules = absurd_client::CancellationRules { max_delay: Some(HOUR), max_duration: None };
    let options = absurd_client::SpawnOptions { cancellation: rules, ..absurd_client::SpawnOptions::default() };
    let waiting = client.spawn_task("waiting", &j!(null), options).await.unwrap();
    let states = async || {
        let held = client.get_task_result(held.task_id).await.unwrap().state;
        (held, client.get_task_result(waiting.task_id).await.unwrap().state)
    };
    clock.advance(HOUR - Duration::from_secs(1)).await.unwrap();
    assert_eq!(states().await, (State::Running, State::Pending));
    clock.advance(Duration::from_secs(1)).await.unwrap();
    assert_eq!(states().await, (State::Failed, State::Cancelled));
    let real = clock.unset().await.unwrap();
    let apart = std::time::SystemTime::now().duration_since(real).unwrap_or_default();
    assert!(apart < HOUR, "it goes with the real time again");
    let wrong = clock.set(std::time::UNIX_EPOCH).await.unwrap_err();
    assert_eq!(wrong.field(), Some("time"), "{wrong}");
}

#[tokio::test(flavor = "multi_thread")]
async fn other_servers_have_no_test_clock_and_keep_their_time() {
    let database = Database::new().await;
    let server = Server::start_on(&database).await;
    let clock = TestClock::connect(&ConnectOptions::new(server.url())).unwrap();
    let refused = clock.advance(HOUR).await.unwrap_err();
    assert!(refused.message().contains("--test-clock"), "{refused}");
    // Whatever the database gives its sessions as the time: ours keep the real one.
    let sql = database.connect().await;
    let name: String = sql.query_one("select current_database()::text", &[]).await.unwrap().get(0);
    sql.batch_execute(&format!("alter database \"{name}\" set absurd.fake_now = '2001-01-01'")).await.unwrap();
    let fresh = Database::connect(&database).await;
    let theirs: bool = fresh.query_one("select absurd.current_time() < '2002-01-01'", &[]).await.unwrap().get(0);
    assert!(theirs);
    let refused =
        absurd_tests::absurd(&["serve", "--listen", "127.0.0.1:0", "--database-url", database.url()]).output();
    let refused = absurd_tests::in_time("it refuses", refused).await.unwrap();
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("absurd.fake_now is set"));
    sql.batch_execute("select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'absurd server%' and application_name not like '%listen%' and datname = current_database()")
        .await
        .unwrap();
    let client = server.client();
    let spawned = client.spawn_task("n", &j!(null), absurd_client::SpawnOptions::default()).await.unwrap();
    let task = client.get_task_status(spawned.task_id).await.unwrap().unwrap();
    assert!(task.enqueue_at > Some(std::time::UNIX_EPOCH + 24 * 365 * 25 * HOUR), "not in 2001");
}

/// Names are counted in one namespace, whatever uses them; what is stored as null is stored.
#[tokio::test]
async fn names_are_counted_and_null_is_a_value() {
    let handler = |ctx: Context, (): ()| async move {
        let one: i32 = ctx.step("x", async || Ok::<_, BoxError>(1)).await?;
        let two: i32 = ctx.step("x", async || Ok::<_, BoxError>(2)).await?;
        // A name that looks like a second use is the second use.
        let same: i32 = ctx.step("x#2", async || Ok::<_, BoxError>(3)).await?;
        let nothing: Option<i32> = ctx.step("null", async || Ok::<_, BoxError>(None)).await?;
        let event: Value = ctx.await_event("go").step_name("null").await?;
        let again: Value = ctx.await_event("go").step_name(" ").await?;
        ctx.sleep_for("x", Duration::ZERO).await?;
        assert!(ctx.begin_step(" ").is_err_and(|error| error.to_string().contains("blank")));
        Ok::<_, BoxError>(j!([one, two, same, nothing, event, again]))
    };
    let mut task = TestTask::new(handler, &());
    task.emit("go", &j!(null));
    assert_eq!(task.run().await, Progress::Completed(j!([1, 2, 2, null, null, null])));
    let stored = task.checkpoints();
    let stored: Vec<(&str, &str)> = stored.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(
        stored[..5],
        [("x", "1"), ("x#2", "2"), ("null", "null"), ("null#2", "null"), ("$awaitEvent:go", "null")]
    );
    assert_eq!((stored.len(), stored[5].0), (6, "x#3"));
}

/// A wait that has timed out stays timed out when a worker that does not know the task gets it first and puts it off.
#[tokio::test(flavor = "multi_thread")]
async fn a_deferral_loses_no_timeout() {
    let (server, clock) = server_with_a_clock().await;
    clock.advance(Duration::ZERO).await.unwrap();
    let client = server.client();
    let knowing = || async {
        let absurd = Absurd::new(server.client());
        let waiter = absurd.register("waiter", |ctx: Context, (): ()| async move {
            match ctx.await_event::<Value>("never").timeout(HOUR).await {
                Err(TaskError::Timeout { .. }) => Ok::<_, BoxError>("timed out"),
                other => Err(format!("{:?}", other?).into()),
            }
        });
        (absurd.start_worker(WorkerOptions::default()).await.unwrap(), absurd, waiter)
    };
    let (worker, absurd, waiter) = knowing().await;
    let spawned = absurd.spawn(&waiter, &()).max_attempts(1).await.unwrap();
    let asleep = async |what: &str, after: Duration| {
        let begun = clock.now().await.unwrap();
        eventually(what, || async {
            let run = client.get_run_status(spawned.run_id).await.unwrap().unwrap();
            let absurd_client::Available::At(at) = run.available_at else { return None };
            (run.state == State::Sleeping && at >= begun + after).then_some(())
        })
        .await;
    };
    asleep("it waits", HOUR).await;
    worker.stop().await;
    let ignorant = Absurd::new(server.client()).start_worker(WorkerOptions::default()).await.unwrap();
    clock.advance(HOUR).await.unwrap();
    asleep("it is put off", Duration::from_secs(15)).await;
    ignorant.stop().await;
    let (worker, absurd, waiter) = knowing().await;
    clock.advance(Duration::from_secs(31)).await.unwrap();
    let end = absurd.await_task_result(&waiter, spawned.task_id, Some(absurd_tests::PATIENCE)).await.unwrap();
    assert_eq!(end.result, Some(Json::from(j!("timed out"))), "{:?}", end.failure);
    worker.stop().await;
}

/// An SDK may have stored SQL NULL for a step without a value: the step is done.
#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_another_sdk_stored_as_nothing_is_done() {
    let server = Server::start().await;
    let absurd = Absurd::new(server.client());
    let done = absurd.register("done", |ctx: Context, (): ()| async move {
        ctx.await_event::<Value>("go").await?;
        let value: Value = ctx.step("s", async || Err(BoxError::from("it is done again"))).await?;
        Ok::<_, BoxError>(value)
    });
    let worker = absurd.start_worker(WorkerOptions::default()).await.unwrap();
    let spawned = absurd.spawn(&done, &()).max_attempts(1).await.unwrap();
    eventually("it sleeps", || async {
        (server.client().get_task_result(spawned.task_id).await.unwrap().state == State::Sleeping).then_some(())
    })
    .await;
    let sql = server.database().connect().await;
    let insert = "insert into absurd.c_q (task_id, checkpoint_name, state, owner_run_id) values ($1, 's', null, $2)";
    sql.execute(insert, &[&spawned.task_id, &spawned.run_id]).await.unwrap();
    server.client().emit_event("go", &j!(1)).await.unwrap();
    let end = absurd.await_task_result(&done, spawned.task_id, Some(absurd_tests::PATIENCE)).await.unwrap();
    assert_eq!(end.result, Some(Json::from(j!(null))), "{:?}", end.failure);
    worker.stop().await;
}
