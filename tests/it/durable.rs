//! Durable execution in Rust, against a real server: what replays, what suspends, what ends an execution.

mod blocking;
mod relay;
mod testing;
mod traces;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, SystemTime};

use absurd_client::durable::{
    Absurd, BoxError, Context, Hooks, Signal, TaskError, TaskOptions, TaskType, Worker, WorkerOptions,
};
use absurd_client::{AbsurdClient, CancellationRules, ConnectOptions, Json, Reason, State, TaskResult};
use absurd_server::domain::QueueName;
use absurd_tests::{Database, Link, OwnCluster, PATIENCE, Server, Toxic, eventually, in_time};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json as j};
use tokio::sync::{Notify, mpsc};
use uuid::Uuid;

const ANY: TaskType<Value, Value> = TaskType::new("any");

async fn worker(absurd: &Absurd, concurrency: usize) -> Worker {
    absurd.start_worker(WorkerOptions::default().concurrency(concurrency)).await.unwrap()
}

async fn end(absurd: &Absurd, task_id: Uuid) -> TaskResult {
    absurd.await_task_result(&ANY, task_id, Some(PATIENCE)).await.unwrap()
}

/// Result of a task that must complete.
async fn result(absurd: &Absurd, task_id: Uuid) -> Value {
    let end = end(absurd, task_id).await;
    assert_eq!(end.state, State::Completed, "{:?}", end.failure);
    end.result.unwrap().to().unwrap()
}

/// What a failed task has recorded.
async fn failure(absurd: &Absurd, task_id: Uuid) -> Value {
    let end = end(absurd, task_id).await;
    assert_eq!(end.state, State::Failed, "{:?}", end.result);
    end.failure.unwrap().to().unwrap()
}

#[derive(Debug, Serialize, Deserialize)]
struct Order {
    id: String,
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_run_once_however_often_the_handler_does() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let absurd = Absurd::new(server.client());
    let (executions, charges) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counters = (Arc::clone(&executions), Arc::clone(&charges));
    let order = absurd.register("order", move |ctx: Context, order: Order| {
        let (executions, charges) = (Arc::clone(&counters.0), Arc::clone(&counters.1));
        async move {
            executions.fetch_add(1, SeqCst);
            let payment: String =
                ctx.step("charge", async || Ok::<_, BoxError>(format!("pay-{}", charges.fetch_add(1, SeqCst)))).await?;
            ctx.sleep_for("cool down", Duration::from_millis(300)).await?;
            // The second use of a name is another step.
            let again: i32 = ctx.step("charge", async || Ok::<_, BoxError>(2)).await?;
            let shipment: Value = ctx.await_event(&format!("packed:{}", order.id)).await?;
            if ctx.attempt() == 1 {
                return Err("the first attempt fails at its end".into());
            }
            Ok::<_, BoxError>(j!({"payment": payment, "again": again, "shipment": shipment}))
        }
    });
    let worker = worker(&absurd, 1).await;
    let spawned = absurd.spawn(&order, &Order { id: "1".into() }).max_attempts(2).await.unwrap();
    eventually("it waits for the event", || async {
        let run = server.client().get_run_status(spawned.run_id).await.unwrap().unwrap();
        (run.wake_event.as_deref() == Some("packed:1")).then_some(())
    })
    .await;
    server.client().emit_event("packed:1", &j!("T-1")).await.unwrap();
    assert_eq!(result(&absurd, spawned.task_id).await, j!({"payment": "pay-0", "again": 2, "shipment": "T-1"}));
    assert_eq!((executions.load(SeqCst), charges.load(SeqCst)), (4, 1));
    let run = server.client().get_task_status(spawned.task_id).await.unwrap().unwrap().last_attempt_run.unwrap();
    let stored = server.client().get_all_checkpoints(spawned.task_id, run).await.unwrap();
    let names: Vec<&str> = stored.iter().map(|stored| stored.checkpoint_name.as_str()).collect();
    assert_eq!(names, ["charge", "cool down", "charge#2", "$awaitEvent:packed:1"]);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_signal_can_be_swallowed() {
    let server = Server::start().await;
    let absurd = Absurd::new(server.client());
    let (tell, mut told) = mpsc::unbounded_channel();
    let stubborn = absurd.register("stubborn", move |ctx: Context, _: Value| {
        let tell = tell.clone();
        async move {
            let first = ctx.await_event::<Value>("go").await;
            if let Ok(payload) = first {
                return Ok::<_, BoxError>(payload);
            }
            // It holds on to its run, and asks whatever it can ask.
            let mut signals = vec![first.unwrap_err().signal()];
            signals.push(ctx.begin_step("s").unwrap_err().signal());
            signals.push(ctx.sleep_for("z", Duration::ZERO).await.unwrap_err().signal());
            signals.push(ctx.emit_event("e", &1).await.unwrap_err().signal());
            signals.push(ctx.heartbeat().await.unwrap_err().signal());
            tell.send(signals).unwrap();
            Ok(j!("swallowed"))
        }
    });
    let worker = worker(&absurd, 1).await;
    let spawned = absurd.spawn(&stubborn, &j!(null)).await.unwrap();
    assert_eq!(in_time("the signals", told.recv()).await.unwrap(), [Some(Signal::Suspended); 5]);
    let now = server.client().get_task_result(spawned.task_id).await.unwrap();
    assert_eq!(now.state, State::Sleeping, "what it returned counts for nothing");
    server.client().emit_event("go", &j!("went")).await.unwrap();
    assert_eq!(result(&absurd, spawned.task_id).await, "went");
    worker.stop().await;
}

/// Tells when it is dropped.
struct Tell(mpsc::UnboundedSender<&'static str>);

impl Drop for Tell {
    fn drop(&mut self) {
        let _ = self.0.send("dropped");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_claim_drops_the_handler_at_its_next_await() {
    let server = Server::start().await;
    let absurd = Absurd::new(server.client());
    let (tell, mut told) = mpsc::unbounded_channel();
    let endless = absurd.register("endless", move |_: Context, _: Value| {
        let tell = tell.clone();
        async move {
            let _guard = Tell(tell.clone());
            tell.send("running").unwrap();
            std::future::pending::<()>().await;
            Ok::<_, BoxError>(())
        }
    });
    let worker = worker(&absurd, 1).await;
    let spawned = absurd.spawn(&endless, &j!(null)).await.unwrap();
    assert_eq!(in_time("it runs", told.recv()).await, Some("running"));
    server.client().cancel_task_by_id(spawned.task_id).await.unwrap();
    assert_eq!(in_time("it is dropped", told.recv()).await, Some("dropped"));
    assert_eq!(end(&absurd, spawned.task_id).await.state, State::Cancelled);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_are_recorded_as_all_sdks_do() {
    let server = Server::start().await;
    let absurd = Absurd::new(server.client());
    let early = absurd.register("early", |_: Context, how: Value| {
        assert!(how.is_string(), "before its first await");
        async { Ok::<_, BoxError>(()) }
    });
    absurd.register(ANY, |ctx: Context, how: Value| async move {
        match how.as_str().unwrap() {
            "panic" => panic!("out of {}", "luck"),
            "named" => Err(TaskError::failure("PaymentDeclined", "no money").into()),
            "final" => Err(TaskError::non_retryable(TaskError::failure("NoSuchOrder", "it is gone")).into()),
            "final step" => {
                let failed = ctx.step("s", async || Err::<(), _>(TaskError::non_retryable("gone"))).await;
                failed.map(|()| j!(null)).map_err(BoxError::from)
            }
            "io" => Err(BoxError::from(std::io::Error::other("disk full"))),
            "step" => {
                let failed = ctx.step("s", async || Err::<(), _>(std::io::Error::other("disk full"))).await;
                failed.map(|()| j!(null)).map_err(BoxError::from)
            }
            "large" => Ok(j!("x".repeat(2 * 1024 * 1024))),
            "blank" => ctx.step(" ", async || Ok::<_, BoxError>(())).await.map(|()| j!(null)).map_err(BoxError::from),
            "type" => ctx.params::<i32>().map(|_| j!(null)).map_err(BoxError::from),
            _ => ctx.await_event::<Value>("never").timeout(Duration::ZERO).await.map_err(BoxError::from),
        }
    });
    let worker = worker(&absurd, 4).await;
    for (how, name, message) in [
        ("panic", "Panic", "panic: out of luck"),
        ("named", "PaymentDeclined", "no money"),
        ("io", "Error", "disk full"),
        ("step", "StepError", "disk full"),
        ("blank", "InvalidStepName", "a step's name must not be blank"),
        ("type", "JsonError", "the task's params: invalid type"),
        ("large", "ResultRefused", "result: 2097154 bytes, at most 1048576 are allowed"),
        ("timeout", "TimeoutError", "event \"never\" did not come in time"),
    ] {
        let spawned = absurd.spawn(&ANY, &j!(how)).max_attempts(1).await.unwrap();
        let recorded = failure(&absurd, spawned.task_id).await;
        assert_eq!(recorded["name"], name, "{recorded}");
        assert!(recorded["message"].as_str().unwrap().starts_with(message), "{recorded}");
    }
    for (how, name, message) in [("final", "NoSuchOrder", "it is gone"), ("final step", "Error", "gone")] {
        let spawned = absurd.spawn(&ANY, &j!(how)).max_attempts(5).await.unwrap();
        let recorded = failure(&absurd, spawned.task_id).await;
        assert_eq!((&recorded["name"], &recorded["message"]), (&j!(name), &j!(message)));
        let task = absurd.client().get_task_status(spawned.task_id).await.unwrap().unwrap();
        assert_eq!(task.attempts, 1, "another attempt would change nothing");
    }
    // So is a result that a rule of the database's owner refuses.
    let sql = server.database().connect().await;
    sql.batch_execute("alter table absurd.r_q add constraint mine check (result is null or result <> '\"mine\"')")
        .await
        .unwrap();
    let mine = absurd.register("mine", |_: Context, _: Value| async { Ok::<_, BoxError>("mine") });
    let spawned = absurd.spawn(&mine, &j!(1)).max_attempts(1).await.unwrap();
    let recorded = failure(&absurd, spawned.task_id).await;
    assert_eq!(recorded["name"], "ResultRefused", "{recorded}");
    assert!(recorded["message"].as_str().unwrap().contains("mine"), "{recorded}");
    let spawned = absurd.spawn(&early, &j!(1)).max_attempts(1).await.unwrap();
    assert_eq!(failure(&absurd, spawned.task_id).await["message"], "panic: before its first await");
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_takes_no_longer_than_it_may() {
    let server = Server::start().await;
    let absurd = Absurd::new(server.client());
    let options = TaskOptions { timeout: Some(Duration::from_millis(200)), ..TaskOptions::default() };
    let slow = absurd.register_with("slow", options, |ctx: Context, _: Value| async move {
        assert!(ctx.deadline().is_some());
        std::future::pending::<()>().await;
        Ok::<_, BoxError>(())
    });
    let worker = worker(&absurd, 1).await;
    let spawned = absurd.spawn(&slow, &j!(null)).max_attempts(1).await.unwrap();
    assert_eq!(failure(&absurd, spawned.task_id).await["name"], "TimeoutError");
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_task_is_put_off_and_spends_no_attempt() {
    let server = Server::start().await;
    let absurd = Absurd::new(server.client());
    let worker = worker(&absurd, 1).await;
    let before = SystemTime::now();
    let spawned = absurd.spawn(&ANY, &j!(null)).queue("q").await.unwrap();
    let run = eventually("it is put off", || async {
        let run = server.client().get_run_status(spawned.run_id).await.unwrap().unwrap();
        let absurd_client::Available::At(at) = run.available_at else { panic!("it has a time") };
        (at > before + Duration::from_secs(10)).then_some(at)
    })
    .await;
    let delay = run.duration_since(before).unwrap();
    assert!(delay > Duration::from_secs(14) && delay < Duration::from_secs(45), "{delay:?}");
    let task = server.client().get_task_status(spawned.task_id).await.unwrap().unwrap();
    assert_eq!((task.attempts, task.state.is_terminal()), (1, false));
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_misplaced_or_malformed_fails_with_a_reason() {
    let server = Server::start().await;
    let absurd = Absurd::new(server.client());
    let options = TaskOptions { queue: Some("another".into()), ..TaskOptions::default() };
    absurd.register_with(ANY, options, |_: Context, _: Value| async { Ok::<_, BoxError>(j!(null)) });
    let worker = worker(&absurd, 1).await;
    let sql = server.database().connect().await;
    let spawn = "select task_id from absurd.spawn_task('q', $1, 'null', $2::text::jsonb)";
    let task: Uuid = sql.query_one(spawn, &[&"any", &"{\"max_attempts\": 1}"]).await.unwrap().get(0);
    let recorded = failure(&absurd_on(&server), task).await;
    assert!(recorded["message"].as_str().unwrap().contains("queue mismatch"), "{recorded}");
    absurd.register("headers", |_: Context, _: Value| async { Ok::<_, BoxError>(()) });
    let options = "{\"max_attempts\": 1, \"headers\": [1]}";
    let task: Uuid = sql.query_one(spawn, &[&"headers", &options]).await.unwrap().get(0);
    let recorded = failure(&absurd_on(&server), task).await;
    assert!(recorded["message"].as_str().unwrap().contains("invalid task headers"), "{recorded}");
    let asked = absurd.spawn(&ANY, &j!(null)).queue("q").await.unwrap_err();
    assert!(asked.message().contains("is registered for queue \"another\" but spawn requested queue \"q\""), "{asked}");
    let unknown = absurd.spawn(&TaskType::<Value, Value>::new("unknown"), &j!(null)).await.unwrap_err();
    assert!(unknown.message().contains("is not registered"), "{unknown}");
    worker.stop().await;
}

fn absurd_on(server: &Server) -> Absurd {
    Absurd::new(server.client())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spawn_takes_what_it_does_not_say_from_its_registration() {
    let server = Server::start().await;
    let rules = CancellationRules { max_delay: Some(Duration::from_secs(60)), max_duration: None };
    let hooks = Hooks::default().before_spawn(|draft| async move { Ok::<_, BoxError>(draft.header("trace", "t-1")) });
    let absurd = Absurd::with_hooks(server.client(), 7, hooks);
    absurd.register("plain", |_: Context, _: Value| async { Ok::<_, BoxError>(()) });
    let options =
        TaskOptions { default_max_attempts: Some(3), default_cancellation: Some(rules), ..TaskOptions::default() };
    let own = absurd.register_with("own", options, |_: Context, _: Value| async { Ok::<_, BoxError>(()) });
    let stored = async |spawned: absurd_client::Spawned| {
        server.client().get_task_status(spawned.task_id).await.unwrap().unwrap()
    };
    let plain = TaskType::<Value, ()>::new("plain");
    let task = stored(absurd.spawn(&plain, &j!(1)).header("mine", 1).await.unwrap()).await;
    assert_eq!((task.max_attempts, task.cancellation, task.retry_strategy), (Some(7), None, None));
    assert_eq!(task.headers.unwrap().to::<Value>().unwrap(), j!({"mine": 1, "trace": "t-1"}), "none is lost");
    let task = stored(absurd.spawn(&own, &j!(1)).await.unwrap()).await;
    assert_eq!((task.max_attempts, task.cancellation.unwrap().as_str()), (Some(3), "{\"max_delay\": 60}"));
    let none = CancellationRules::default();
    let task = stored(absurd.spawn(&own, &j!(1)).cancellation(none).unlimited_attempts().await.unwrap()).await;
    assert_eq!((task.max_attempts, task.cancellation), (None, None), "an empty policy is a policy");
    let once = absurd.spawn(&own, &j!(1)).idempotency_key("k").await.unwrap();
    let twice = absurd.spawn(&own, &j!(1)).idempotency_key("k").await.unwrap();
    assert_eq!((once.task_id, once.created, twice.created), (twice.task_id, true, false));
}

#[tokio::test(flavor = "multi_thread")]
async fn hooks_stand_around_executions_and_contexts_stay_apart() {
    let server = Server::start().await;
    let hooks = Hooks::default()
        .before_spawn(|draft| async move {
            // Whoever spawns from inside a task passes its trace on.
            let trace = Context::current().and_then(|ctx| ctx.headers().get("trace").cloned());
            Ok::<_, BoxError>(match trace {
                Some(trace) => draft.header("trace", trace),
                None => draft,
            })
        })
        .wrap_task_execution(|ctx, execution| async move {
            assert_eq!(Context::current().map(|current| current.run_id()), Some(ctx.run_id()));
            let result: Value = execution.run().await?.to()?;
            Ok(Json::from(j!({"wrapped": result})))
        });
    let absurd = Absurd::with_hooks(server.client(), 1, hooks);
    let child = absurd.register("child", |ctx: Context, _: Value| async move {
        tokio::task::yield_now().await;
        assert_eq!(Context::current().unwrap().task_id(), ctx.task_id());
        Ok::<_, BoxError>(ctx.headers().get("trace").cloned())
    });
    let parent = absurd.register("parent", move |ctx: Context, _: Value| async move {
        let spawned = ctx.spawn(&child, &j!(null)).await?;
        let end = ctx.await_task_result(&ANY, spawned.task_id).await?;
        Ok::<_, BoxError>(end)
    });
    let worker = worker(&absurd, 4).await;
    let mut spawned = Vec::new();
    for number in 0..8 {
        spawned.push(absurd.spawn(&parent, &j!(null)).header("trace", number).await.unwrap().task_id);
    }
    for (number, task_id) in spawned.into_iter().enumerate() {
        assert_eq!(result(&absurd, task_id).await, j!({"wrapped": {"wrapped": number}}));
    }
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parent_waits_for_its_children_without_holding_a_place() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let absurd = Absurd::new(server.client());
    let child: TaskType<u64, u64> = absurd.register("double", |_: Context, number: u64| async move {
        match number {
            3 => Err("three is not doubled".into()),
            number => Ok::<_, BoxError>(number * 2),
        }
    });
    let executions = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&executions);
    let parent = absurd.register("sum", move |ctx: Context, count: u64| {
        counter.fetch_add(1, SeqCst);
        async move {
            let mut children = Vec::new();
            for number in 0..count {
                let draft = ctx.spawn(&child, &number).options(|draft| draft.max_attempts(1));
                children.push(draft.await?.task_id);
            }
            let mut sum = 0;
            for id in children {
                match ctx.await_task_result(&child, id).await {
                    Ok(doubled) => sum += doubled,
                    Err(TaskError::Failure { name, .. }) if name == "TaskFailed" => sum += 1000,
                    Err(error) => return Err(error.into()),
                }
            }
            let itself = ctx.await_task_result(&ANY, ctx.task_id()).await;
            assert!(itself.is_err_and(|error| error.to_string().contains("its own end")), "it would wait for ever");
            Ok::<_, BoxError>(sum)
        }
    });
    // One place, for the parent and its children.
    let worker = worker(&absurd, 1).await;
    let spawned = absurd.spawn(&parent, &5).max_attempts(1).await.unwrap();
    assert_eq!(result(&absurd, spawned.task_id).await, 14 + 1000);
    assert!(executions.load(SeqCst) > 1, "it was suspended");
    let tasks = server.client().get_queue_stats().await.unwrap();
    assert_eq!((tasks.completed, tasks.failed_runs), (5, 1), "no child was spawned twice");
    let run = server.client().get_task_status(spawned.task_id).await.unwrap().unwrap().last_attempt_run.unwrap();
    let all = server.client().get_all_checkpoints(spawned.task_id, run).await.unwrap();
    let stored = all.iter().find(|stored| stored.checkpoint_name.starts_with("$awaitTaskResult:")).unwrap();
    let stored: Value = stored.state.as_ref().unwrap().to().unwrap();
    assert_eq!(stored, j!({"state": "completed", "result": 0}), "as all SDKs store it");
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parent_waits_no_longer_than_it_wants() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let absurd = Absurd::new(server.client());
    server.client().with_queue("other").create_queue().await.unwrap();
    let parent = absurd.register("parent", |ctx: Context, _: Value| async move {
        let draft = ctx.spawn(&ANY, &j!(null)).options(|draft| draft.queue("other"));
        let child = draft.await?.task_id;
        let wait = ctx.await_task_result(&ANY, child).queue("other").timeout(Duration::from_millis(300));
        match wait.await {
            Err(TaskError::Timeout { what }) => Ok::<_, BoxError>(what.contains(&child.to_string())),
            other => Err(format!("{other:?}").into()),
        }
    });
    let worker = worker(&absurd, 1).await;
    let spawned = absurd.spawn(&parent, &j!(null)).max_attempts(1).await.unwrap();
    assert_eq!(result(&absurd, spawned.task_id).await, true);
    worker.stop().await;
}

/// Postgres stops and starts while parents sleep and children run: everything goes on by itself, and no step is done twice.
#[tokio::test(flavor = "multi_thread")]
async fn postgres_restarts_under_a_worker() {
    let mut cluster = OwnCluster::start(&[]).await;
    let server = Server::start_on(&cluster.database().await).await;
    let absurd = Absurd::new(server.client());
    let (steps, begun, go) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()), Arc::new(Notify::new()));
    let signals = (Arc::clone(&begun), Arc::clone(&go));
    let child = absurd.register("child", move |_: Context, number: u64| {
        let (begun, go) = (Arc::clone(&signals.0), Arc::clone(&signals.1));
        async move {
            begun.notify_one();
            go.notified().await;
            Ok::<_, BoxError>(number)
        }
    });
    let counter = Arc::clone(&steps);
    let parent = absurd.register("parent", move |ctx: Context, _: Value| {
        let steps = Arc::clone(&counter);
        async move {
            let number = ctx.step("s", async || Ok::<_, BoxError>(steps.fetch_add(1, SeqCst) as u64)).await?;
            let spawned = ctx.spawn(&child, &number).await?;
            Ok::<_, BoxError>(ctx.await_task_result(&child, spawned.task_id).await?)
        }
    });
    let worker = worker(&absurd, 2).await;
    let spawned = absurd.spawn(&parent, &j!(null)).await.unwrap();
    in_time("the child runs", begun.notified()).await;
    eventually("the parent sleeps", || async {
        (server.client().get_task_result(spawned.task_id).await.unwrap().state == State::Sleeping).then_some(())
    })
    .await;
    cluster.stop().await;
    go.notify_one();
    cluster.start_again().await;
    assert_eq!(result(&absurd, spawned.task_id).await, 0);
    assert_eq!(steps.load(SeqCst), 1);
    worker.stop().await;
    drop(server);
    cluster.stop().await;
}

/// A task that ends through SQL, or is cleaned away, wakes its parent too.
#[tokio::test(flavor = "multi_thread")]
async fn a_parent_hears_of_children_that_end_elsewhere() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let absurd = Absurd::new(server.client());
    let parent = absurd.register("parent", |ctx: Context, child: Uuid| async move {
        let end = ctx.await_task_result(&ANY, child).queue("other").outcome().await?;
        Ok::<_, BoxError>(j!({"state": end.state.as_str(), "result": end.result.map(|json| json.to_string())}))
    });
    let sql = server.database().connect().await;
    sql.batch_execute("select absurd.create_queue('other')").await.unwrap();
    let worker = worker(&absurd, 3).await;
    let mut children = Vec::new();
    let mut parents = Vec::new();
    for _ in 0..3 {
        let spawn = "select task_id from absurd.spawn_task('other', 'n', 'null')";
        let child: Uuid = sql.query_one(spawn, &[]).await.unwrap().get(0);
        children.push(child);
        parents.push(absurd.spawn(&parent, &child).await.unwrap().task_id);
    }
    eventually("they sleep", || async {
        (server.client().get_queue_stats().await.unwrap().sleeping == 3).then_some(())
    })
    .await;
    sql.batch_execute(
        "select absurd.complete_run('other', c.run_id, '7') from absurd.claim_task('other', 'w', 30, 1) c;
         select absurd.cancel_task('other', task_id) from absurd.t_other where state = 'pending' limit 1;
         delete from absurd.r_other where state = 'pending'; delete from absurd.t_other where state = 'pending'",
    )
    .await
    .unwrap();
    let mut states = Vec::new();
    for parent in parents {
        states.push(result(&absurd, parent).await);
    }
    states.sort_by_key(|state| state["state"].to_string());
    assert_eq!(
        states,
        [
            j!({"state": "cancelled", "result": null}),
            j!({"state": "completed", "result": "7"}),
            j!({"state": "failed", "result": null}),
        ]
    );
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sleeps_end_at_their_time() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let absurd = Absurd::new(server.client());
    let until = SystemTime::now() + Duration::from_millis(700);
    let sleeper = absurd.register("sleeper", move |ctx: Context, _: Value| async move {
        ctx.sleep_until("until", until).await?;
        ctx.sleep_until("long over", SystemTime::UNIX_EPOCH).await?;
        ctx.sleep_for("none", Duration::ZERO).await?;
        Ok::<_, BoxError>(SystemTime::now() >= until)
    });
    let worker = worker(&absurd, 1).await;
    let spawned = absurd.spawn(&sleeper, &j!(null)).await.unwrap();
    assert_eq!(result(&absurd, spawned.task_id).await, true);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_stops_finishes_what_it_has_begun() {
    let server = Server::start().await;
    let absurd = Absurd::new(server.client());
    let (begun, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let signals = (Arc::clone(&begun), Arc::clone(&go));
    let slow = absurd.register("slow", move |_: Context, _: Value| {
        let (begun, go) = (Arc::clone(&signals.0), Arc::clone(&signals.1));
        async move {
            begun.notify_one();
            go.notified().await;
            Ok::<_, BoxError>("done")
        }
    });
    let worker = worker(&absurd, 1).await;
    let first = absurd.spawn(&slow, &j!(null)).await.unwrap();
    in_time("it runs", begun.notified()).await;
    worker.begin_stop();
    let second = absurd.spawn(&slow, &j!(null)).await.unwrap();
    let stopping = tokio::spawn(worker.stop());
    go.notify_one();
    in_time("it stops", stopping).await.unwrap();
    assert_eq!(result(&absurd, first.task_id).await, "done");
    let left = server.client().get_task_status(second.task_id).await.unwrap().unwrap();
    assert_eq!((left.state, left.attempts), (State::Pending, 1), "it took no more");
}

async fn no_stream(server: &Server) {
    let queue = QueueName::parse("queue", "q").unwrap();
    eventually("the stream has ended", || async {
        (server.app().engine().dispatcher.stream_count(&queue) == 0).then_some(())
    })
    .await;
}

/// SIGTERM: the process finishes what it has begun, takes no more, and `run_worker` returns.
#[tokio::test(flavor = "multi_thread")]
async fn a_signal_drains_the_worker() {
    let server = Server::start().await;
    let absurd = Absurd::new(server.client());
    let (tell, mut told) = mpsc::unbounded_channel();
    let go = Arc::new(Notify::new());
    let goes = Arc::clone(&go);
    let slow = absurd.register("slow", move |_: Context, _: Value| {
        let (tell, go) = (tell.clone(), Arc::clone(&goes));
        async move {
            tell.send(()).unwrap();
            go.notified().await;
            Ok::<_, BoxError>("done")
        }
    });
    let first = absurd.spawn(&slow, &j!(null)).await.unwrap();
    let runner = absurd.clone();
    let running = tokio::spawn(async move { runner.run_worker(WorkerOptions::default()).await });
    in_time("it runs", told.recv()).await.unwrap();
    let own = std::process::id().to_string();
    assert!(std::process::Command::new("kill").args(["-TERM", &own]).status().unwrap().success());
    let queue = server.client();
    no_stream(&server).await;
    let second = absurd.spawn(&slow, &j!(null)).await.unwrap();
    assert!(!running.is_finished(), "it waits for what runs");
    go.notify_one();
    in_time("it ends", running).await.unwrap().unwrap();
    assert_eq!(result(&absurd, first.task_id).await, "done");
    assert_eq!(queue.get_task_result(second.task_id).await.unwrap().state, State::Pending);
    assert!(told.try_recv().is_err(), "it took no more");
}

/// A handler that does not end in time is dropped, and its task goes to another worker at once, in the same attempt.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_takes_no_longer_than_its_grace() {
    let server = Server::start().await;
    let absurd = Absurd::new(server.client());
    let (tell, mut told) = mpsc::unbounded_channel();
    let executions = Arc::new(AtomicUsize::new(0));
    let endless = absurd.register("endless", move |ctx: Context, _: Value| {
        let (guard, execution) = (Tell(tell.clone()), executions.fetch_add(1, SeqCst));
        async move {
            ctx.step("s", async || Ok::<_, BoxError>(execution)).await?;
            if execution == 0 {
                guard.0.send("running").unwrap();
                std::future::pending::<()>().await;
            }
            Ok::<_, BoxError>(ctx.attempt())
        }
    });
    let worker = absurd.start_worker(WorkerOptions::default().grace(Duration::from_millis(200))).await.unwrap();
    let spawned = absurd.spawn(&endless, &j!(null)).max_attempts(1).await.unwrap();
    assert_eq!(in_time("it runs", told.recv()).await, Some("running"));
    in_time("it stops", worker.stop()).await;
    assert_eq!(told.recv().await, Some("dropped"));
    let worker = self::worker(&absurd, 1).await;
    assert_eq!(result(&absurd, spawned.task_id).await, 1);
    worker.stop().await;
}

/// The connection is cut while a handler is at work: it goes on in the same attempt.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_connection_loses_no_execution() {
    let server = Server::start().await;
    let link = Link::before(&server.url()).await;
    let absurd = Absurd::new(AbsurdClient::connect(&ConnectOptions::new(link.url())).unwrap().with_queue("q"));
    let executions = Arc::new(AtomicUsize::new(0));
    let (begun, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let signals = (Arc::clone(&begun), Arc::clone(&go), Arc::clone(&executions));
    let cut = absurd.register("cut", move |ctx: Context, _: Value| {
        let (begun, go, executions) = signals.clone();
        async move {
            executions.fetch_add(1, SeqCst);
            ctx.step("one", async || Ok::<_, BoxError>(1)).await?;
            begun.notify_one();
            go.notified().await;
            ctx.step("two", async || Ok::<_, BoxError>(2)).await?;
            Ok::<_, BoxError>(ctx.attempt())
        }
    });
    let worker = worker(&absurd, 1).await;
    let spawned = absurd.spawn(&cut, &j!(null)).max_attempts(2).await.unwrap();
    in_time("it runs", begun.notified()).await;
    link.set(Toxic::Reset);
    no_stream(&server).await;
    link.set(Toxic::Pass);
    go.notify_one();
    assert_eq!(result(&absurd_on(&server), spawned.task_id).await, 1);
    assert_eq!(executions.load(SeqCst), 1);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_carried_out_once() {
    let server = Server::start().await;
    let absurd = Absurd::new(server.client());
    absurd.register(ANY, |_: Context, params: Value| async move { Ok::<_, BoxError>(params) });
    let spawned = absurd.spawn(&ANY, &j!({"n": 18_446_744_073_709_551_615_u64})).await.unwrap();
    assert_eq!(absurd.work_batch(WorkerOptions::default(), 10).await.unwrap(), 1);
    assert_eq!(absurd.work_batch(WorkerOptions::default(), 10).await.unwrap(), 0);
    assert_eq!(result(&absurd, spawned.task_id).await, j!({"n": 18_446_744_073_709_551_615_u64}));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_wrong_outside_of_handlers_is_told() {
    let server = Server::start().await;
    let options = ConnectOptions { deadline: Duration::from_millis(500), ..ConnectOptions::new(server.url()) };
    let absurd = Absurd::new(AbsurdClient::connect(&options).unwrap().with_queue("q"));
    let (begun, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let signals = (Arc::clone(&begun), Arc::clone(&go));
    absurd.register(ANY, move |_: Context, _: Value| {
        let (begun, go) = (Arc::clone(&signals.0), Arc::clone(&signals.1));
        async move {
            begun.notify_one();
            go.notified().await;
            Ok::<_, BoxError>(j!(null))
        }
    });
    let (tell, mut told) = mpsc::unbounded_channel();
    let options = WorkerOptions::default().on_error(move |error| {
        tell.send((error.task_id, error.doing, error.error.reason())).unwrap();
    });
    let worker = absurd.start_worker(options).await.unwrap();
    let spawned = absurd.spawn(&ANY, &j!(null)).max_attempts(1).await.unwrap();
    in_time("it runs", begun.notified()).await;
    server.stop().await;
    go.notify_one();
    let (task, doing, reason) = in_time("the error", told.recv()).await.unwrap();
    assert_eq!((task, doing), (Some(spawned.task_id), "completing a task"));
    assert!(matches!(reason, Reason::Transport | Reason::DeadlineExceeded), "{reason:?}");
    drop(worker);
}
