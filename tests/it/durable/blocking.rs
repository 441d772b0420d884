//! The blocking flavour: the same rules for handlers that are ordinary functions on threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc;
use std::time::Duration;

use absurd_client::blocking::AbsurdClient;
use absurd_client::durable::blocking::{Absurd, Context};
use absurd_client::durable::{BoxError, Signal, TaskError, TaskType, WorkerOptions};
use absurd_client::{ConnectOptions, State};
use absurd_tests::{PATIENCE, Server};
use serde_json::{Value, json as j};
use tokio::runtime::Runtime;
use uuid::Uuid;

const ANY: TaskType<Value, Value> = TaskType::new("any");

/// A server that lives in a runtime of its own, and a program without one.
fn world() -> (Runtime, Server, Absurd) {
    let runtime = Runtime::new().unwrap();
    let server = runtime.block_on(Server::start());
    let client = AbsurdClient::connect(&ConnectOptions::new(server.url())).unwrap().with_queue("q");
    (runtime, server, Absurd::new(client))
}

fn result(absurd: &Absurd, task_id: Uuid) -> Value {
    let end = absurd.await_task_result(&ANY, task_id, Some(PATIENCE)).unwrap();
    assert_eq!(end.state, State::Completed, "{:?}", end.failure);
    end.result.unwrap().to().unwrap()
}

#[test]
fn a_blocking_handler_has_steps_sleeps_events_and_children() {
    let (_runtime, _server, absurd) = world();
    let (executions, charges) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counters = (Arc::clone(&executions), Arc::clone(&charges));
    let child = absurd.register("double", |_: Context, number: i32| Ok::<_, BoxError>(number * 2));
    let inside = absurd.client();
    let order = absurd.register("order", move |ctx: Context, id: String| {
        counters.0.fetch_add(1, SeqCst);
        assert_eq!(Context::current().map(|current| current.run_id()), Some(ctx.run_id()));
        let charge = || {
            // A step may use the blocking client.
            inside.emit_event("charged", &id)?;
            Ok::<_, BoxError>(counters.1.fetch_add(1, SeqCst))
        };
        let charged = ctx.step("charge", charge)?;
        ctx.sleep_for("cool down", Duration::from_millis(200))?;
        let half = ctx.begin_step("charge")?;
        if !half.is_done() {
            ctx.complete_step(half, &"second")?;
        }
        let event: String = ctx.await_event("charged").wait()?;
        let late = ctx.await_event::<Value>("never").timeout(Duration::ZERO).wait();
        assert!(matches!(late, Err(TaskError::Timeout { .. })), "{late:?}");
        let spawned = ctx.spawn(&child, &21).wait()?;
        let doubled = ctx.await_task_result(&child, spawned.task_id).wait()?;
        let more = ctx.spawn_all(&child, [1, 2])?;
        let states = more.into_iter().map(|id| ctx.await_task_result(&child, id).wait_outcome());
        let states: Vec<State> = states.map(|end| end.map(|end| end.state)).collect::<Result<_, _>>()?;
        ctx.heartbeat()?;
        assert_eq!((states, ctx.attempt(), ctx.task_name()), (vec![State::Completed; 2], 1, "order"));
        Ok::<_, BoxError>(j!([charged, event, doubled]))
    });
    let worker = absurd.start_worker(WorkerOptions::default()).unwrap();
    let spawned = absurd.spawn(&order, &"42".to_owned()).max_attempts(1).wait().unwrap();
    assert_eq!(result(&absurd, spawned.task_id), j!([0, "42", 42]));
    assert_eq!(charges.load(SeqCst), 1);
    assert!(executions.load(SeqCst) >= 3, "it was suspended in between");
    worker.stop().unwrap();
}

#[test]
fn a_blocking_handler_cannot_swallow_a_signal_and_keeps_its_place() {
    let (_runtime, server, absurd) = world();
    let (tell, told) = mpsc::channel();
    let (go, goes) = mpsc::channel::<()>();
    let goes = std::sync::Mutex::new(goes);
    let stubborn = absurd.register("stubborn", move |ctx: Context, _: Value| {
        tell.send(None).unwrap();
        goes.lock().unwrap().recv().unwrap();
        let mut signals = vec![ctx.heartbeat().unwrap_err().signal()];
        signals.push(ctx.step("s", || Ok::<_, BoxError>(1)).unwrap_err().signal());
        signals.push(ctx.sleep_for("z", Duration::ZERO).unwrap_err().signal());
        tell.send(Some(signals)).unwrap();
        Ok::<_, BoxError>(j!("swallowed"))
    });
    absurd.register(ANY, |_: Context, params: Value| Ok::<_, BoxError>(params));
    let worker = absurd.start_worker(WorkerOptions::default().prefetch(1)).unwrap();
    let first = absurd.spawn(&stubborn, &j!(null)).wait().unwrap();
    assert_eq!(told.recv_timeout(PATIENCE).unwrap(), None, "it runs");
    absurd.client().cancel_task_by_id(first.task_id).unwrap();
    let second = absurd.spawn(&ANY, &j!(2)).wait().unwrap();
    // The worker has been told of the cancellation before the second task comes, and the first one's thread still runs.
    let held = absurd.await_task_result(&ANY, second.task_id, Some(Duration::from_millis(500)));
    assert_eq!(held.unwrap_err().reason(), absurd_client::Reason::DeadlineExceeded, "one place, one thread");
    go.send(()).unwrap();
    assert_eq!(told.recv_timeout(PATIENCE).unwrap(), Some(vec![Some(Signal::Cancelled); 3]));
    assert_eq!(result(&absurd, second.task_id), 2);
    let end = absurd.fetch_task_result(&stubborn, first.task_id).unwrap();
    assert_eq!((end.state, end.result), (State::Cancelled, None));
    worker.stop().unwrap();
    drop(server);
}

#[test]
fn a_blocking_handler_s_errors_and_panics_are_recorded() {
    let (_runtime, _server, absurd) = world();
    absurd.register(ANY, |ctx: Context, how: Value| match how.as_str() {
        Some("panic") => panic!("out of luck"),
        Some("step") => Ok(ctx.step("s", || Err::<Value, _>(std::io::Error::other("disk full")))?),
        _ => Err::<_, BoxError>("no such way".into()),
    });
    for (how, name, message) in [
        ("panic", "Panic", "panic: out of luck"),
        ("step", "StepError", "disk full"),
        ("other", "Error", "no such way"),
    ] {
        let spawned = absurd.spawn(&ANY, &j!(how)).max_attempts(1).wait().unwrap();
        assert_eq!(absurd.work_batch(WorkerOptions::default(), 1).unwrap(), 1);
        let recorded: Value = absurd.fetch_task_result(&ANY, spawned.task_id).unwrap().failure.unwrap().to().unwrap();
        assert_eq!((&recorded["name"], &recorded["message"]), (&j!(name), &j!(message)));
    }
}

/// A thread cannot be stopped: the worker ends all the same, and the task is free when its lease ends, not before.
#[test]
fn a_worker_that_stops_leaves_a_stuck_thread_behind() {
    let (_runtime, _server, absurd) = world();
    let (tell, told) = mpsc::channel();
    let (go, goes) = mpsc::channel::<()>();
    let goes = std::sync::Mutex::new(goes);
    let stuck = absurd.register("stuck", move |ctx: Context, _: Value| {
        if ctx.attempt() == 1 {
            tell.send(None).unwrap();
            goes.lock().unwrap().recv().unwrap();
            tell.send(ctx.heartbeat().unwrap_err().signal()).unwrap();
        }
        Ok::<_, BoxError>(ctx.attempt())
    });
    let options = WorkerOptions::default().claim_timeout(Duration::from_secs(5)).grace(Duration::from_millis(100));
    let worker = absurd.start_worker(options).unwrap();
    let spawned = absurd.spawn(&stuck, &j!(null)).max_attempts(2).wait().unwrap();
    assert_eq!(told.recv_timeout(PATIENCE).unwrap(), None, "it runs");
    // The server has heard that the task has arrived: it does not give it back by itself.
    absurd.client().extend_claim(spawned.run_id, Duration::from_secs(5)).unwrap();
    worker.stop().unwrap();
    let run = absurd.client().get_run_status(spawned.run_id).unwrap().unwrap();
    assert_eq!((run.state, run.attempt), (State::Running, 1), "the thread still runs");
    let worker = absurd.start_worker(WorkerOptions::default()).unwrap();
    assert_eq!(result(&absurd, spawned.task_id), 2);
    go.send(()).unwrap();
    assert_eq!(told.recv_timeout(PATIENCE).unwrap(), Some(Signal::Lost));
    worker.stop().unwrap();
}
