//! Eleven repairs of the original client (`docs/migration.md`), one test each, seen through the blocking client: its
//! documented behaviour holds, and the defect is gone.

use std::time::{Duration, SystemTime};

use absurd_client::blocking::{AbsurdClient, ClaimedTask};
use absurd_client::{
    Available, Awaited, CancelOutcome, ClaimOptions, ConnectOptions, Json, Reason, Slept, SpawnOptions, Spawned, State,
    WaitError,
};
use absurd_tests::Server;
use serde_json::json as j;
use tokio::runtime::Runtime;
use uuid::Uuid;

/// A server that lives in a runtime of its own, a blocking client outside of it, and SQL.
struct World {
    client: AbsurdClient,
    sql: tokio_postgres::Client,
    _server: Server,
    runtime: Runtime,
}

impl World {
    fn new() -> Self {
        let runtime = Runtime::new().unwrap();
        let server = runtime.block_on(Server::start());
        let options = ConnectOptions::new(server.url());
        let client = AbsurdClient::connect(&options).unwrap().with_queue("q").with_worker_id("tester");
        let sql = runtime.block_on(server.database().connect());
        Self { client, sql, _server: server, runtime }
    }

    fn spawn(&self) -> Spawned {
        self.client.spawn_task("n", &j!({}), SpawnOptions::default().max_attempts(2)).unwrap()
    }

    fn claim(&self) -> ClaimedTask {
        self.client.claim_task(ClaimOptions::default().wait(absurd_tests::PATIENCE)).unwrap().remove(0)
    }

    fn execute(&self, statement: &str) {
        self.runtime.block_on(self.sql.batch_execute(statement)).unwrap();
    }

    fn count(&self, query: &str) -> i64 {
        self.runtime.block_on(self.sql.query_one(query, &[])).unwrap().get(0)
    }
}

#[test]
fn first_extend_claim_moves_the_lease_and_leaves_nothing_behind() {
    let world = World::new();
    world.spawn();
    let task = world.claim();
    let before = world.client.get_run_status(task.run_id).unwrap().unwrap().claim_expires_at.unwrap();
    let end = world.client.extend_claim(task.run_id, Duration::from_secs(600)).unwrap().unwrap();
    assert!(end > before + Duration::from_secs(500));
    assert_eq!(world.client.get_run_status(task.run_id).unwrap().unwrap().claim_expires_at, Some(end));
    assert_eq!(world.count("select count(*) from absurd.c_q"), 0, "no checkpoint of that name, no orphan");
    let wrong = world.client.extend_claim(task.run_id, Duration::ZERO).unwrap_err();
    assert_eq!((wrong.reason(), wrong.field()), (Reason::InvalidArgument, Some("extend_by")));

    world.client.cancel_task_by_id(task.task_id).unwrap();
    let cancelled = world.client.extend_claim(task.run_id, Duration::from_secs(60)).unwrap_err();
    assert_eq!(cancelled.reason(), Reason::TaskCancelled);
    let pending = world.spawn();
    let not_held = world.client.extend_claim(pending.run_id, Duration::from_secs(60)).unwrap_err();
    assert_eq!(not_held.reason(), Reason::RunNotRunning);
    let options = ClaimOptions::default().claim_timeout(Duration::from_secs(1));
    let late = world.client.claim_task(options).unwrap().remove(0);
    world.claim();
    let expired = world.client.extend_claim(late.run_id, Duration::from_secs(60)).unwrap_err();
    assert_eq!(expired.reason(), Reason::ClaimExpired);
}

#[test]
fn second_cancel_task_takes_a_run_and_says_whether_it_did() {
    let world = World::new();
    let outcome = |cancelled, state| CancelOutcome { cancelled, state };
    let pending = world.spawn();
    assert_eq!(world.client.cancel_task(pending.run_id).unwrap(), outcome(true, State::Cancelled));
    assert_eq!(world.client.cancel_task(pending.run_id).unwrap(), outcome(false, State::Cancelled), "already");
    assert_eq!(world.client.get_task_status(pending.task_id).unwrap().unwrap().state, State::Cancelled);
    world.spawn();
    let task = world.claim();
    assert_eq!(world.client.cancel_task(task.run_id).unwrap(), outcome(false, State::Running));
    assert!(matches!(task.await_event("s", "e", None).unwrap(), Awaited::Suspended { .. }));
    assert_eq!(world.client.cancel_task(task.run_id).unwrap(), outcome(true, State::Cancelled), "a sleeping one");
    assert_eq!(world.count("select count(*) from absurd.w_q"), 0, "with the full effect of a cancellation");
    world.spawn();
    let done = world.claim();
    world.client.complete_task(done.run_id, &j!(1)).unwrap();
    assert_eq!(world.client.cancel_task(done.run_id).unwrap(), outcome(false, State::Completed));
    assert_eq!(world.client.cancel_task(Uuid::now_v7()).unwrap_err().reason(), Reason::RunNotFound);
}

#[test]
fn third_schedule_task_moves_what_was_just_spawned() {
    let world = World::new();
    let spawned = world.spawn();
    let later = SystemTime::now() + Duration::from_secs(3600);
    world.client.schedule_task(spawned.run_id, later).unwrap();
    assert!(world.client.claim_task(ClaimOptions::default()).unwrap().is_empty());
    let run = world.client.get_run_status(spawned.run_id).unwrap().unwrap();
    let Available::At(at) = run.available_at else { panic!("it has a time") };
    assert!(at.duration_since(later).unwrap_or_else(|early| early.duration()) < Duration::from_millis(1));
    assert_eq!(run.state, State::Sleeping);
    world.client.schedule_task(spawned.run_id, SystemTime::now()).unwrap();
    let task = world.claim();
    world.client.schedule_task(task.run_id, SystemTime::now()).unwrap();
    let task = world.claim();
    assert_eq!((task.run_id, task.attempt), (spawned.run_id, 1), "a running one is given up, no attempt is spent");
    assert!(matches!(task.await_event("s", "e", None).unwrap(), Awaited::Suspended { .. }));
    let waits = world.client.schedule_task(task.run_id, later).unwrap_err();
    assert_eq!(waits.reason(), Reason::RunNotRunning);
    assert_eq!(world.client.schedule_task(Uuid::now_v7(), later).unwrap_err().reason(), Reason::RunNotFound);
}

#[test]
fn fourth_status_is_read_by_name_without_waiting_for_anyone() {
    let world = World::new();
    let options = SpawnOptions::default().idempotency_key("key-1").max_attempts(2).header("h", 1);
    let spawned = world.client.spawn_task("n", &j!({"x": 1}), options).unwrap();
    let task = world.client.get_task_status(spawned.task_id).unwrap().unwrap();
    assert_eq!(
        (task.idempotency_key.as_deref(), task.tenant_id),
        (Some("key-1"), None),
        "neither takes the other's place"
    );
    assert_eq!((task.params.as_str(), task.headers.unwrap().as_str()), ("{\"x\": 1}", "{\"h\": 1}"));
    let claimed = world.claim();
    let run = world.client.get_run_status(spawned.run_id).unwrap().unwrap();
    assert_eq!((run.claimed_by.as_deref(), run.last_heartbeat), (Some("tester"), run.started_at));
    claimed.set_checkpoint("step", &j!(1)).unwrap();
    let run = world.client.get_run_status(spawned.run_id).unwrap().unwrap();
    assert!(run.last_heartbeat > run.started_at, "a checkpoint is a sign of life");
    assert!(matches!(claimed.await_event("s", "e", None).unwrap(), Awaited::Suspended { wake_at: None }));
    let run = world.client.get_run_status(spawned.run_id).unwrap().unwrap();
    assert_eq!((run.available_at, run.claim_expires_at), (Available::Never, None), "infinity is a value of its own");

    world.execute("begin; select * from absurd.t_q for update; select * from absurd.r_q for update");
    assert!(world.client.get_task_status(spawned.task_id).unwrap().is_some());
    assert!(world.client.get_run_status(spawned.run_id).unwrap().is_some());
    world.execute("rollback");
    assert_eq!(world.client.get_task_status(Uuid::now_v7()).unwrap(), None);
    assert_eq!(world.client.get_run_status(Uuid::now_v7()).unwrap(), None);
}

#[test]
fn fifth_sleep_suspends_the_run_and_is_over_afterwards() {
    let world = World::new();
    let spawned = world.spawn();
    let task = world.claim();
    let half = Duration::from_millis(1500);
    let Slept::Suspended { wake_at } = world.client.sleep(task.run_id, half, None).unwrap() else {
        panic!("it sleeps")
    };
    let run = world.client.get_run_status(task.run_id).unwrap().unwrap();
    assert_eq!((run.state, run.available_at), (State::Sleeping, Available::At(wake_at)));
    let woken = world.claim();
    assert_eq!(world.client.sleep(woken.run_id, half, None).unwrap(), Slept::Elapsed);
    let stored = world.client.get_all_checkpoints(spawned.task_id, spawned.run_id).unwrap();
    let names: Vec<&str> = stored.iter().map(|stored| stored.checkpoint_name.as_str()).collect();
    assert_eq!(names, ["sleep_1"], "under its task, where cleanup finds it");
    assert!(matches!(world.client.sleep(woken.run_id, half, Some("another")).unwrap(), Slept::Suspended { .. }));
}

#[test]
fn sixth_wait_for_event_is_one_call_and_times_out_once() {
    let world = World::new();
    let spawned = world.spawn();
    let task = world.claim();
    let hour = Duration::from_secs(3600);
    // A second wait leaves a row without a payload: that is no event.
    world.execute("insert into absurd.e_q (event_name) values ('data_ready')");
    let wait =
        |timeout| world.client.wait_for_event(spawned.run_id, "data_ready", timeout, Some(spawned.task_id), "waiting");
    let WaitError::Sleep(sleep) = wait(hour).unwrap_err() else { panic!("it sleeps") };
    assert_eq!((sleep.run_id, sleep.event_name.as_deref()), (Some(task.run_id), Some("data_ready")));
    assert!(sleep.wake_at.unwrap() > SystemTime::now() + Duration::from_secs(3000));
    assert_eq!(world.client.get_task_status(spawned.task_id).unwrap().unwrap().state, State::Sleeping, "already");
    world.client.emit_event("data_ready", &j!({"timeout": true})).unwrap();
    world.claim();
    assert_eq!(wait(hour).unwrap().as_str(), "{\"timeout\": true}", "a payload is a payload, whatever it looks like");

    let wait = |step: &str, timeout| world.client.wait_for_event(spawned.run_id, "never", timeout, None, step);
    assert!(matches!(wait("slow", Duration::from_secs(1)), Err(WaitError::Sleep(_))));
    let woken = world.claim();
    assert!(matches!(wait("slow", hour), Err(WaitError::Timeout)));
    world.client.fail_task(woken.run_id, "the event did not come", None).unwrap();
    let second = world.claim();
    let again = world.client.wait_for_event(second.run_id, "never", hour, None, "slow");
    assert!(matches!(again, Err(WaitError::Timeout)), "a timeout stays one for the next attempt: {again:?}");
    let fresh = world.client.wait_for_event(second.run_id, "never", hour, None, "other step");
    assert!(matches!(fresh, Err(WaitError::Sleep(_))), "and no false one comes: {fresh:?}");
    let foreign = world.client.await_event(Some(Uuid::now_v7()), second.run_id, "s", "e", None).unwrap_err();
    assert_eq!(foreign.field(), Some("task_id"));
}

#[test]
fn seventh_set_run_sleeping_guards_the_state() {
    let world = World::new();
    let spawned = world.spawn();
    let task = world.claim();
    assert!(world.client.wait_for_event(task.run_id, "e", Duration::from_secs(60), None, "s").is_err());
    let before = world.client.get_run_status(task.run_id).unwrap();
    assert!(world.client.set_run_sleeping(task.run_id, "e").unwrap().is_some());
    assert_eq!(world.client.get_run_status(task.run_id).unwrap(), before, "it sleeps already: nothing changes");
    world.client.emit_event("e", &()).unwrap();
    let task = world.claim();
    let day = world.client.set_run_sleeping(task.run_id, "f").unwrap().unwrap();
    assert!(day > SystemTime::now() + Duration::from_secs(23 * 3600));
    let run = world.client.get_run_status(task.run_id).unwrap().unwrap();
    assert_eq!((run.state, run.claim_expires_at), (State::Sleeping, None), "with the lease");
    assert_eq!(world.client.get_task_status(spawned.task_id).unwrap().unwrap().state, State::Sleeping, "and the task");
    world.spawn();
    let done = world.claim();
    world.client.complete_task(done.run_id, &()).unwrap();
    assert_eq!(world.client.set_run_sleeping(done.run_id, "e").unwrap_err().reason(), Reason::RunNotRunning);
}

#[test]
fn eighth_emit_event_wakes_with_the_first_payload_and_everything_that_belongs_to_it() {
    let world = World::new();
    world.spawn();
    let task = world.claim();
    world.execute("insert into absurd.e_q (event_name) values ('e')");
    assert!(matches!(task.await_event("s", "e", None).unwrap(), Awaited::Suspended { .. }));
    let emitted = world.client.emit_event("e", &j!({"n": 1})).unwrap();
    assert_eq!((emitted.applied, emitted.woken), (true, 1), "the row of a wait does not swallow the event");
    assert!(!world.client.emit_event("e", &j!({"n": 2})).unwrap().applied);
    let run = world.client.get_run_status(task.run_id).unwrap().unwrap();
    assert_eq!((run.state, run.wake_event), (State::Pending, None), "nothing is left of the wait");
    assert_eq!(
        world.client.get_task_status(task.task_id).unwrap().unwrap().state,
        State::Pending,
        "the task goes along"
    );
    let woken = world.claim();
    assert_eq!(woken.await_event("s", "e", None).unwrap(), Awaited::Payload(Json::from_text("{\"n\": 1}")));
    assert_eq!(woken.await_event("later", "e", None).unwrap(), Awaited::Payload(Json::from_text("{\"n\": 1}")));
    world.client.emit_event("bare", &()).unwrap();
    assert_eq!(woken.await_event("b", "bare", None).unwrap(), Awaited::Payload(Json::from_text("{}")), "no payload");
}

#[test]
fn ninth_checkpoints_of_earlier_attempts_are_where_one_resumes() {
    let world = World::new();
    let spawned = world.spawn();
    let first = world.claim();
    assert!(world.client.save_checkpoint_for_run(first.run_id, "one", &j!(1), None).unwrap());
    world.client.fail_task(first.run_id, "boom", None).unwrap();
    let second = world.claim();
    let own = world.client.get_checkpoints_for_run(second.run_id).unwrap();
    assert!(own.is_empty(), "the owner's read keeps its meaning");
    assert_eq!(world.client.get_run_checkpoint(second.run_id, "one").unwrap(), None);
    let all = world.client.get_all_checkpoints(spawned.task_id, second.run_id).unwrap();
    assert_eq!((all.len(), all[0].checkpoint_name.as_str()), (1, "one"), "this one resumes");
    assert_eq!(second.checkpoint("one"), Some(Some(&Json::from_text("1"))), "and the claim has brought it along");
    let unknown = world.client.save_checkpoint_for_run(Uuid::now_v7(), "two", &j!(2), None).unwrap_err();
    assert_eq!(unknown.reason(), Reason::RunNotFound, "a write is never dropped in silence");
}

#[test]
fn tenth_no_result_is_an_empty_object_and_json_stays_what_it_is() {
    let world = World::new();
    let complete = |stored: &str, complete: &dyn Fn(&ClaimedTask)| {
        let spawned = world.spawn();
        complete(&world.claim());
        assert_eq!(world.client.get_task_result(spawned.task_id).unwrap().result.unwrap().as_str(), stored);
    };
    complete("{}", &|task| world.client.complete_task(task.run_id, &()).unwrap());
    complete("{}", &|task| world.client.complete_task(task.run_id, &None::<i32>).unwrap());
    complete("0", &|task| world.client.complete_task(task.run_id, &0).unwrap());
    complete("null", &|task| task.complete(&()).unwrap());
    let spawned = world.spawn();
    let outcome = world.client.fail_task(world.claim().run_id, "as a text", None).unwrap();
    assert_eq!((outcome.task_state, outcome.next.map(|next| next.attempt)), (Some(State::Pending), Some(2)));
    let failed = world.client.get_run_status(spawned.run_id).unwrap().unwrap().failure_reason.unwrap();
    let reason: serde_json::Value = failed.to().unwrap();
    assert_eq!((&reason["name"], &reason["message"]), (&j!("TaskExecutionError"), &j!("as a text")));
    let retry_at = SystemTime::now() + Duration::from_secs(3600);
    let held = world.claim();
    world.execute(&format!("update absurd.t_q set max_attempts = 3 where task_id = '{}'", held.task_id));
    let next = world.client.fail_task(held.run_id, &j!({"message": "x"}), Some(retry_at)).unwrap().next.unwrap();
    let apart = next.available_at.unwrap().duration_since(retry_at).unwrap_or_else(|early| early.duration());
    assert!(apart < Duration::from_millis(1), "at the time that was asked for");
}

#[test]
fn eleventh_what_a_transaction_did_an_idempotency_key_does() {
    let world = World::new();
    let spawn = || world.client.spawn_task("n", &j!({}), SpawnOptions::default().idempotency_key("order-7")).unwrap();
    // The application does not know whether its first call went through, and calls again.
    let (first, second) = (spawn(), spawn());
    assert_eq!((first.task_id, first.created, second.created), (second.task_id, true, false));
    let task = world.claim();
    world.client.complete_task(task.run_id, &j!(1)).unwrap();
    world.client.complete_task(task.run_id, &j!(1)).unwrap();
    assert_eq!(spawn().task_id, first.task_id, "also when it has ended");
    assert_eq!(world.count("select count(*) from absurd.t_q"), 1);
}

/// A workflow run goes into the headers, over what stands there and beside what else stands there.
#[test]
fn a_task_is_linked_to_its_workflow_run() {
    let world = World::new();
    let workflow = Uuid::new_v4();
    let headers = |spawned: &Spawned| {
        let task = world.client.get_task_status(spawned.task_id).unwrap().unwrap();
        task.headers.map(|headers| headers.to::<serde_json::Value>().unwrap())
    };
    let spawn = |options| world.client.spawn_task("n", &j!({}), options).unwrap();
    let alone = spawn(SpawnOptions::default().workflow_run(workflow));
    assert_eq!((alone.workflow_run_id, headers(&alone)), (workflow, Some(j!({"workflow_run_id": workflow}))));
    let options = SpawnOptions::default().header("a", "}").header("workflow_run_id", "x").workflow_run(workflow);
    assert_eq!(headers(&spawn(options)), Some(j!({"a": "}", "workflow_run_id": workflow})));
    let none = spawn(SpawnOptions::default());
    assert_eq!((none.workflow_run_id, headers(&none)), (none.run_id, None), "the run stands in for it");
}

/// What does not fit into one message is read in parts, and comes back whole.
#[test]
fn long_texts_are_read_in_parts() {
    let world = World::new();
    // 5 MiB, two bytes each: parts are counted in code points.
    world.execute(
        "create temp table long as select '\"' || repeat('\u{e9}', 2621440) || '\"' as text;
         select absurd.spawn_task('q', 'n', text::jsonb) from long;
         select absurd.complete_run('q', c.run_id, text::jsonb) from absurd.claim_task('q', 'w', 30, 1) c, long;
         select absurd.emit_event('q', 'long', text::jsonb) from long",
    );
    let text = format!("\"{}\"", "\u{e9}".repeat(2_621_440));
    let task_id = world.client.list_tasks(absurd_client::ListOptions::default()).unwrap().items[0].task_id;
    let task = world.client.get_task_status(task_id).unwrap().unwrap();
    assert!(task.params.as_str() == text && task.completed_payload.is_some_and(|result| result.as_str() == text));
    assert!(world.client.get_task_result(task_id).unwrap().result.is_some_and(|result| result.as_str() == text));
    let ended = world.client.await_task_result(task_id, Some(absurd_tests::PATIENCE)).unwrap();
    assert!(ended.result.is_some_and(|result| result.as_str() == text));
    let run = world.client.get_run_status(task.last_attempt_run.unwrap()).unwrap().unwrap();
    assert!(run.payloads_omitted && run.result.is_none());

    let spawned = world.spawn();
    let waiting = world.claim();
    for task in [Some(spawned.task_id), None] {
        let awaited = world.client.await_event(task, waiting.run_id, "wait", "long", None).unwrap();
        assert!(matches!(awaited, Awaited::Payload(payload) if payload.as_str() == text));
    }
    waiting.set_checkpoint("after", &j!(1)).unwrap();
    for all in [
        world.client.get_all_checkpoints(spawned.task_id, spawned.run_id).unwrap(),
        world.client.get_checkpoints_for_run(spawned.run_id).unwrap(),
    ] {
        let names: Vec<&str> = all.iter().map(|stored| stored.checkpoint_name.as_str()).collect();
        assert_eq!(names, ["wait", "after"]);
        assert!(all[0].state.as_ref().is_some_and(|state| state.as_str() == text));
    }
    let one = world.client.get_run_checkpoint(spawned.run_id, "wait").unwrap().unwrap();
    assert!(one.state.is_some_and(|state| state.as_str() == text));
}

#[test]
fn the_blocking_stream_keeps_leases_and_refuses_to_stall_a_runtime() {
    let world = World::new();
    let mut tasks = world.client.claim_stream(absurd_client::StreamOptions::default()).unwrap();
    assert!(tasks.next_within(Duration::from_millis(1)).unwrap().is_none());
    let spawned = world.spawn();
    let task = tasks.next_within(absurd_tests::PATIENCE).unwrap().unwrap();
    assert_eq!((task.task_id, task.attempt), (spawned.task_id, 1));
    world.client.cancel_task_by_id(task.task_id).unwrap();
    assert_eq!(task.revoked_within(absurd_tests::PATIENCE).unwrap(), Some(absurd_client::Revoked::Cancelled));
    tasks.close(absurd_tests::PATIENCE).unwrap();
    let inside = world.runtime.block_on(async { world.client.create_queue() }).unwrap_err();
    assert!(inside.message().contains("async runtime"), "{inside}");
    assert!(world.runtime.block_on(async { AbsurdClient::new(None, None) }).is_err());
}
