//! Promises of single statements that no other test holds them to: seen over gRPC, on plain and on partitioned queues.

use std::time::Duration;

use absurd_client::durable::testing::TestClock;
use absurd_client::{
    AbsurdClient, Awaited, ClaimOptions, ClaimStream, ClaimedTask, ConnectOptions, Emitted, Json, ListOptions, NewTask,
    QueueOptions, Reason, RetryOptions, RetryStrategy, SpawnOptions, State, StorageMode, StreamOptions, WaitsOf,
};
use absurd_proto::v1 as pb;
use absurd_proto::v1::await_task_response::Outcome;
use absurd_server::settings::{Settings, Span};
use absurd_tests::{Database, Grpc, PATIENCE, Server, ServerOptions, eventually, in_time};
use serde_json::json as j;
use tokio_postgres::Client;
use uuid::Uuid;

use crate::streams::{complete, next_task, open, request, seconds};

const HOUR: Duration = Duration::from_secs(3600);

/// A new plain queue and a new partitioned one, each by its client.
pub(super) async fn both_kinds(server: &Server) -> [AbsurdClient; 2] {
    let (plain, parted) = (server.client().with_queue("plain"), server.client().with_queue("parted"));
    let options = QueueOptions { storage_mode: StorageMode::Partitioned, ..QueueOptions::default() };
    plain.create_queue().await.unwrap();
    parted.create_queue_with(options).await.unwrap();
    [plain, parted]
}

pub(super) async fn server_with_a_clock() -> (Server, TestClock) {
    let settings = Settings { test_clock: Some(true), ..Settings::default() };
    let server =
        Server::start_with(Database::new().await, ServerOptions { settings, ..ServerOptions::default() }).await;
    let clock = TestClock::connect(&ConnectOptions::new(server.url())).unwrap();
    (server, clock)
}

pub(super) async fn count(sql: &Client, query: &str) -> i64 {
    sql.query_one(query, &[]).await.unwrap().get(0)
}

pub(super) async fn spawn(client: &AbsurdClient, name: &str) -> Uuid {
    client.spawn_task(name, &j!(null), SpawnOptions::default()).await.unwrap().task_id
}

pub(super) async fn claim(client: &AbsurdClient) -> ClaimedTask {
    let options = ClaimOptions::default().wait(PATIENCE);
    in_time("a task can be claimed", client.claim_task(options)).await.unwrap().remove(0)
}

pub(super) async fn extend(grpc: &mut Grpc, task: &pb::ClaimedTask, by: i64) {
    let request = pb::ExtendClaimRequest {
        queue: task.queue.clone(),
        run_id: String::new(),
        claim_token: Some(task.claim_token.clone()),
        extend_by: seconds(by),
    };
    grpc.extend_claim(request).await.unwrap();
}

pub(super) async fn await_task(
    grpc: &mut Grpc,
    (client, run): (&AbsurdClient, &ClaimedTask),
    step: &str,
    (children, child): (&AbsurdClient, Uuid),
) -> Outcome {
    let request = pb::AwaitTaskRequest {
        queue: client.queue_name().into(),
        claim_token: Some(run.claim_token().to_owned()),
        step_name: step.into(),
        awaited_queue: children.queue_name().into(),
        awaited_task_id: child.to_string(),
        ..Default::default()
    };
    grpc.await_task(request).await.unwrap().into_inner().outcome.unwrap()
}

/// Stores tasks with one run each, past every function: fast enough for thousands. The columns and their values are the
/// run's.
pub(super) async fn store_many(sql: &Client, queue: &str, count: usize, state: &str, (columns, values): (&str, &str)) {
    let insert = format!(
        "with ids as materialized (
           select absurd.portable_uuidv7() as task, absurd.portable_uuidv7() as run from generate_series(1, {count})),
         runs as (
           insert into absurd.r_{queue} (run_id, task_id, attempt, state, {columns})
           select run, task, 1, '{state}', {values} from ids)
         insert into absurd.t_{queue} (task_id, task_name, params, state, attempts, max_attempts, last_attempt_run)
         select task, 'n', 'null', '{state}', 1, 1, run from ids"
    );
    sql.batch_execute(&insert).await.unwrap();
}

/// A worker over gRPC claims a run that waits by SQL and gives it back. The run keeps the signal of its timeout, and
/// the payload of its event: the SQL functions still see both.
#[tokio::test(flavor = "multi_thread")]
async fn a_release_keeps_the_signal_that_woke_the_run() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        let task_id = spawn(&client, "n").await;
        let claim_by_sql = async || -> (Uuid, Option<String>, Option<String>) {
            let claim = "select run_id, wake_event, event_payload::text from absurd.claim_task($1, 'w')";
            let row = sql.query_one(claim, &[&queue]).await.unwrap();
            (row.get(0), row.get(1), row.get(2))
        };
        let (run_id, _, _) = claim_by_sql().await;
        let wait_by_sql = async |event: &str, timeout: Option<i32>| -> (bool, Option<String>) {
            let wait = "select should_suspend, payload::text from absurd.await_event($1, $2, $3, $4, $4, $5)";
            let row = sql.query_one(wait, &[&queue, &task_id, &run_id, &event, &timeout]).await.unwrap();
            (row.get(0), row.get(1))
        };

        assert_eq!(wait_by_sql("late", Some(0)).await, (true, None), "it sleeps until its time is over: at once");
        let woken = claim(&client).await;
        assert_eq!((woken.run_id, woken.wake_event.as_deref(), &woken.event_payload), (run_id, Some("late"), &None));
        woken.release(Duration::ZERO).await.unwrap();
        assert_eq!(claim_by_sql().await, (run_id, Some("late".into()), None));
        assert_eq!(wait_by_sql("late", Some(0)).await, (false, None), "this is the timeout");

        assert_eq!(wait_by_sql("paid", None).await, (true, None));
        sql.execute("select absurd.emit_event($1, 'paid', '7')", &[&queue]).await.unwrap();
        let woken = claim(&client).await;
        assert_eq!((woken.run_id, woken.event_payload.as_ref().map(Json::as_str)), (run_id, Some("7")));
        woken.release(Duration::ZERO).await.unwrap();
        assert_eq!(claim_by_sql().await, (run_id, None, Some("7".into())));
    }
}

/// The leases of a lost stream that end after its grace are cut to it, those that end before are left alone: a lease of
/// 20 s is no longer after a grace of a minute.
#[tokio::test(flavor = "multi_thread")]
async fn a_grace_never_lengthens_a_lease() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        let mut grpc = server.raw().await;
        let asked = pb::ClaimStreamRequest {
            queue: queue.into(),
            claim_timeout: seconds(20),
            reconnect_grace: seconds(60),
            ..request(2)
        };
        let (_, mut messages) = open(&mut grpc, asked).await;
        for _ in 0..2 {
            spawn(&client, "n").await;
        }
        let (short, long) = (next_task(&mut messages).await, next_task(&mut messages).await);
        // One statement cuts both: when this one is cut, the other was looked at.
        extend(&mut grpc, &long, 3600).await;
        drop(messages);
        let read = format!(
            "select extract(epoch from r.claim_expires_at - r.started_at)::float8 from absurd.r_{queue} r
              where r.run_id::text = $1"
        );
        let lease = async |run_id: &str| -> f64 { sql.query_one(&read, &[&run_id]).await.unwrap().get(0) };
        eventually("the long lease is cut", || async { (lease(&long.run_id).await < 600.0).then_some(()) }).await;
        let short = lease(&short.run_id).await;
        assert!(short <= 20.0, "the lease of 20 s has {short} s now");
    }
}

/// Spawns a task whose policy gives it an hour, and brings it into a state.
async fn task_that(client: &AbsurdClient, does: &str) -> Uuid {
    let unclaimed = SpawnOptions::default().max_delay(HOUR);
    let claimed = SpawnOptions::default().max_duration(HOUR).max_attempts(2);
    let options = match does {
        "waits for its first claim" => unclaimed,
        "waits for its start" => unclaimed.delay(HOUR / 2),
        "sleeps before its second attempt" => claimed.retry(RetryStrategy::Fixed(HOUR / 2)),
        _ => claimed,
    };
    let task_id = client.spawn_task("n", &j!(null), options).await.unwrap().task_id;
    if matches!(does, "waits for its first claim" | "waits for its start") {
        return task_id;
    }
    let day = ClaimOptions::default().claim_timeout(24 * HOUR).wait(PATIENCE);
    let run = in_time("it is claimed", client.claim_task(day)).await.unwrap().remove(0);
    assert_eq!(run.task_id, task_id);
    match does {
        "sleeps until a time" => {
            run.sleep("nap", 10 * HOUR).await.unwrap();
        }
        "waits for an event" => {
            run.await_event("s", "never", None).await.unwrap();
        }
        "sleeps before its second attempt" | "waits for its second attempt" => {
            run.fail(&j!("x")).await.unwrap();
        }
        _ => {}
    }
    task_id
}

/// `max_delay` cancels a task that was never claimed, `max_duration` one that was, whatever it does: when the hour is
/// over, and not a second before.
#[tokio::test(flavor = "multi_thread")]
async fn a_policy_cancels_its_task_in_every_state() {
    let (server, clock) = server_with_a_clock().await;
    let clients = both_kinds(&server).await;
    clock.advance(Duration::ZERO).await.unwrap();
    let mut tasks = Vec::new();
    for client in clients {
        // Those that can be claimed come last, when nothing more is claimed.
        for (does, state) in [
            ("runs", State::Running),
            ("sleeps until a time", State::Sleeping),
            ("waits for an event", State::Sleeping),
            ("sleeps before its second attempt", State::Sleeping),
            ("waits for its second attempt", State::Pending),
            ("waits for its start", State::Sleeping),
            ("waits for its first claim", State::Pending),
        ] {
            tasks.push((client.clone(), does, state, task_that(&client, does).await));
        }
    }
    clock.advance(HOUR - Duration::from_secs(1)).await.unwrap();
    for (client, does, state, task_id) in &tasks {
        let now = client.get_task_result(*task_id).await.unwrap().state;
        assert_eq!(now, *state, "{} has a second left, the one that {does}", client.queue_name());
    }
    clock.advance(Duration::from_secs(1)).await.unwrap();
    for (client, does, _, task_id) in &tasks {
        eventually(&format!("{} cancels the task that {does}", client.queue_name()), || async {
            let now = client.get_task_result(*task_id).await.unwrap().state;
            (now == State::Cancelled).then_some(())
        })
        .await;
    }
}

/// A worker extends its lease at another replica only, and keeps its claim past the start deadline of its stream. The
/// stream has room for more tasks, so that its replica does not look at the claim before the deadline.
#[tokio::test(flavor = "multi_thread")]
async fn an_extension_at_another_replica_is_a_sign_of_life() {
    let one = Server::start().await;
    let two = Server::start_on(one.database()).await;
    let (mut here, mut there) = (one.raw().await, two.raw().await);
    let mut held = Vec::new();
    for client in both_kinds(&one).await {
        let queue = client.queue_name();
        let asked = pb::ClaimStreamRequest { queue: queue.into(), start_deadline: seconds(2), ..request(3) };
        let (_, mut messages) = open(&mut here, asked).await;
        spawn(&client, "n").await;
        let task = next_task(&mut messages).await;
        extend(&mut there, &task, 60).await;
        held.push((client, messages, task));
    }
    // Past the deadlines, and past the time that a replica needs to give a claim back.
    tokio::time::sleep(Duration::from_millis(3500)).await;
    for (client, _messages, task) in held {
        complete(&mut there, &task).await;
        let run = client.get_run_status(Uuid::parse_str(&task.run_id).unwrap()).await.unwrap().unwrap();
        assert_eq!((run.state, run.attempt), (State::Completed, 1));
    }
}

/// A parent hears of its child's failure. The child is retried and the parent waits for it again, under another step:
/// it sleeps until the second attempt has ended, and hears of that one. The first step keeps its answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_retried_child_is_awaited_anew() {
    let server = Server::start().await;
    let mut grpc = server.raw().await;
    for client in both_kinds(&server).await {
        let child = spawn(&client, "child").await;
        claim(&client).await.fail(&j!({"message": "the first attempt"})).await.unwrap();
        spawn(&client, "parent").await;
        let parent = claim(&client).await;
        let first = await_task(&mut grpc, (&client, &parent), "first", (&client, child)).await;
        assert!(matches!(&first, Outcome::Snapshot(json) if json.text.contains("the first attempt")), "{first:?}");

        client.retry_task(child, RetryOptions::default()).await.unwrap();
        let second = await_task(&mut grpc, (&client, &parent), "second", (&client, child)).await;
        assert!(matches!(second, Outcome::Suspended(_)), "{second:?}");
        let retried = claim(&client).await;
        assert_eq!((retried.task_id, retried.attempt), (child, 2));
        retried.complete(&j!("the second attempt")).await.unwrap();
        let parent = claim(&client).await;
        let second = await_task(&mut grpc, (&client, &parent), "second", (&client, child)).await;
        assert!(matches!(&second, Outcome::Snapshot(json) if json.text.contains("the second attempt")), "{second:?}");
        let again = await_task(&mut grpc, (&client, &parent), "first", (&client, child)).await;
        assert_eq!(again, first);
    }
}

/// A task that plain SQL has spawned without a limit of attempts is copied and retried once it has failed. One that was
/// cancelled is refused.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_task_without_a_limit_can_be_retried() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        let spawn_by_sql = async || -> Uuid {
            let spawn = "select task_id from absurd.spawn_task($1, 'n', 'null')";
            sql.query_one(spawn, &[&queue]).await.unwrap().get(0)
        };
        let task_id = spawn_by_sql().await;
        let first = claim(&client).await;
        assert_eq!((first.task_id, first.max_attempts), (task_id, None));
        assert_eq!(first.fail_for_good("enough").await.unwrap().task_state, Some(State::Failed));

        let copy = RetryOptions { spawn_new: true, ..RetryOptions::default() };
        let copy = client.retry_task(task_id, copy).await.unwrap();
        let copied = claim(&client).await;
        assert_eq!((copied.task_id, copied.attempt, copied.max_attempts), (copy.task_id, 1, None));
        let again = client.retry_task(task_id, RetryOptions::default()).await.unwrap();
        assert_eq!((again.task_id, again.attempt), (task_id, 2));
        let second = claim(&client).await;
        assert_eq!((second.task_id, second.attempt, second.max_attempts), (task_id, 2, Some(2)));

        let cancelled = spawn_by_sql().await;
        client.cancel_task_by_id(cancelled).await.unwrap();
        let refused = client.retry_task(cancelled, RetryOptions::default()).await.unwrap_err();
        assert_eq!(refused.reason(), Reason::TaskNotFailed);
    }
}

/// Two replicas want the same round of a queue's upkeep at the same moment, its first one and then a later one: each
/// time one of them gets it.
#[tokio::test(flavor = "multi_thread")]
async fn a_round_of_upkeep_goes_to_one_replica() {
    let by_hand = || {
        let settings = Settings { upkeep: Some(Span(Duration::ZERO)), ..Settings::default() };
        ServerOptions { settings, ..ServerOptions::default() }
    };
    let one = Server::start_with(Database::new().await, by_hand()).await;
    let two = Server::start_with(one.database().clone(), by_hand()).await;
    let (sql, holder) = (one.database().connect().await, one.database().connect().await);
    let waiting = "select count(*) from pg_stat_activity
                    where datname = current_database() and wait_event_type = 'Lock' and query like '-- upkeep_take%'";
    for (before, hold, let_go) in [
        (
            "delete from absurd_server.upkeep",
            "insert into absurd_server.upkeep (queue_name, ran_at) values ('q', '2001-01-01')",
            "rollback",
        ),
        (
            "update absurd_server.upkeep set ran_at = '2001-01-01'",
            "select from absurd_server.upkeep for update",
            "commit",
        ),
    ] {
        sql.batch_execute(before).await.unwrap();
        // Somebody holds the queue's row until both have seen that a round is due.
        holder.batch_execute(&format!("begin; {hold}")).await.unwrap();
        let takes = async {
            tokio::join!(
                one.app().engine().store.upkeep_take(3600.0, 20),
                two.app().engine().store.upkeep_take(3600.0, 20)
            )
        };
        let released = async {
            eventually("both wait for the row", || async { (count(&sql, waiting).await == 2).then_some(()) }).await;
            holder.batch_execute(let_go).await.unwrap();
        };
        let ((first, second), ()) = tokio::join!(takes, released);
        assert_eq!([first.unwrap(), second.unwrap()].concat(), ["q"], "{hold}");
    }
}

/// An event that comes after the deadline of a wait neither wakes nor counts its run, also while nobody has claimed the
/// run since: the claim that follows shows the timeout. A run that still waits for the same event is woken and counted.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_after_the_deadline_wakes_nobody() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        let mut held = Vec::new();
        for _ in 0..3 {
            spawn(&client, "n").await;
            held.push(claim(&client).await);
        }
        let soon = Some(Duration::from_millis(100));
        for (run, event, timeout) in [(&held[0], "alone", soon), (&held[1], "shared", soon), (&held[2], "shared", None)]
        {
            let waits = run.await_event("s", event, timeout).await.unwrap();
            assert!(matches!(waits, Awaited::Suspended { .. }), "{waits:?}");
        }
        let overdue = format!("select count(*) from absurd.r_{queue} where available_at < clock_timestamp()");
        eventually("two waits are overdue", || async { (count(&sql, &overdue).await == 2).then_some(()) }).await;
        assert_eq!(client.emit_event("alone", &j!(1)).await.unwrap(), Emitted { applied: true, woken: 0 });
        assert_eq!(client.emit_event("shared", &j!(1)).await.unwrap(), Emitted { applied: true, woken: 1 });
        for _ in 0..3 {
            let run = claim(&client).await;
            let expected = match held.iter().position(|task| task.run_id == run.run_id) {
                Some(0) => (Some("alone"), None, None),
                Some(1) => (Some("shared"), None, None),
                _ => (None, Some("1"), Some("1")),
            };
            let payload = run.event_payload.as_ref().map(Json::as_str);
            let stored = run.checkpoint("s").flatten().map(Json::as_str);
            assert_eq!((run.wake_event.as_deref(), payload, stored), expected, "signal, payload, stored step");
        }
    }
}

/// A stream that takes no task of these tests: its queue stays one that its replica looks at every second or two.
async fn onlooker(client: &AbsurdClient) -> ClaimStream {
    let options = StreamOptions { task_names: vec!["none of these".into()], ..StreamOptions::default() };
    client.claim_stream(options).await.unwrap()
}

/// The sweep of a queue's policies walks on behind its first thousand tasks, and begins anew at their end: it cancels a
/// due task behind 1,200 whose time is far away, and then the very first one, which becomes due meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_due_policy_is_found_behind_many_distant_ones() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    let clients = both_kinds(&server).await;
    let mut streams = Vec::new();
    for client in &clients {
        let queue = client.queue_name();
        let spawn = |name: &str, seconds: u32, count: u32| {
            let policy = format!("{{\"cancellation\": {{\"max_delay\": {seconds}}}}}");
            format!(
                "select absurd.spawn_task('{queue}', '{name}', 'null', '{policy}') from generate_series(1, {count});"
            )
        };
        sql.batch_execute(&(spawn("distant", 1_000_000, 1200) + &spawn("due", 1, 1))).await.unwrap();
        streams.push(onlooker(client).await);
    }
    let cancelled = async |client: &AbsurdClient, name: &str| {
        let queue = client.queue_name();
        let query = format!("select count(*) from absurd.t_{queue} where state = 'cancelled' and task_name = '{name}'");
        count(&sql, &query).await
    };
    for client in &clients {
        eventually("the due one is cancelled", || async { (cancelled(client, "due").await == 1).then_some(()) }).await;
        assert_eq!(cancelled(client, "distant").await, 0);
    }
    for client in &clients {
        let queue = client.queue_name();
        let first = format!(
            "update absurd.t_{queue} set cancellation = '{{\"max_delay\": 0}}'
              where task_id = (select task_id from absurd.t_{queue} order by task_id limit 1)"
        );
        sql.batch_execute(&first).await.unwrap();
    }
    for client in &clients {
        eventually("so is the first", || async { (cancelled(client, "distant").await == 1).then_some(()) }).await;
    }
}

/// More leases have run out in a queue than one sweep takes: all of their runs fail, and their tasks with them.
#[tokio::test(flavor = "multi_thread")]
async fn all_of_many_expired_leases_end() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    let clients = both_kinds(&server).await;
    let mut streams = Vec::new();
    for client in &clients {
        let columns = "available_at, started_at, claimed_by, claim_expires_at";
        let values = "now(), now() - interval '2 minutes', 'w', now() - interval '1 minute'";
        store_many(&sql, client.queue_name(), 1200, "running", (columns, values)).await;
        streams.push(onlooker(client).await);
    }
    for client in &clients {
        let queue = client.queue_name();
        let failed = format!(
            "select count(*) from absurd.r_{queue} r join absurd.t_{queue} t on t.last_attempt_run = r.run_id
              where r.state = 'failed' and t.state = 'failed' and r.failure_reason ->> 'name' = '$ClaimTimeout'"
        );
        eventually("all have failed", || async { (count(&sql, &failed).await == 1200).then_some(()) }).await;
    }
}

/// Tasks of one call that have the same key are one task, and each of their answers names it.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_comes_again_in_a_call_makes_one_task() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        let new = |key: &str| NewTask::new("n", &j!(key), SpawnOptions::default().idempotency_key(key)).unwrap();
        let spawned = client.spawn_tasks(vec![new("a"), new("a"), new("b"), new("a")]).await.unwrap();
        let created: Vec<bool> = spawned.iter().map(|task| task.created).collect();
        assert_eq!(created, [true, false, true, false], "{queue}");
        for again in [&spawned[1], &spawned[3]] {
            assert_eq!((again.task_id, again.run_id), (spawned[0].task_id, spawned[0].run_id), "{queue}");
        }
        assert_ne!(spawned[2].task_id, spawned[0].task_id);
        for table in ["t", "r"] {
            assert_eq!(count(&sql, &format!("select count(*) from absurd.{table}_{queue}")).await, 2);
        }
    }
}

/// The same for a hundred keys that come three times each, in no order.
#[tokio::test(flavor = "multi_thread")]
async fn many_keys_that_come_again_in_a_call_make_one_task_each() {
    const KEYS: usize = 100;
    let server = Server::start().await;
    let sql = server.database().connect().await;
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        let new = |index: usize| {
            let key = format!("key {}", index * 37 % KEYS);
            NewTask::new("n", &j!(null), SpawnOptions::default().idempotency_key(key)).unwrap()
        };
        let spawned = client.spawn_tasks((0..3 * KEYS).map(new).collect()).await;
        let spawned = spawned.unwrap_or_else(|error| panic!("{queue}: {error}"));
        for (index, task) in spawned.iter().enumerate() {
            let first = spawned[index % KEYS].task_id;
            assert_eq!((task.task_id, task.created), (first, index < KEYS), "{queue}: task {index}");
        }
        assert_eq!(count(&sql, &format!("select count(*) from absurd.t_{queue}")).await, 100);
    }
}

/// A task that is spawned beside an idle worker does not overtake a sleeping one that has come due before, unseen by
/// the replica: the worker gets the older one first, and the new one after it.
#[tokio::test(flavor = "multi_thread")]
async fn a_spawn_overtakes_no_sleeper_that_is_due() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        let mut grpc = server.raw().await;
        let asked = pb::ClaimStreamRequest { queue: queue.into(), ..request(1) };
        let (_, mut messages) = open(&mut grpc, asked).await;
        let handed = format!("select started_at = created_at from absurd.r_{queue} where run_id = $1");
        let due = format!("update absurd.r_{queue} set available_at = now() - interval '1 minute' where run_id = $1");
        // A look at the queue may come between, and find the sleeper: seldom, so that a few rounds show what a spawn
        // does.
        for round in 0..8 {
            let later = SpawnOptions::default().delay(HOUR);
            let sleeper = client.spawn_task("sleeper", &j!(null), later).await.unwrap();
            in_time("spawned tasks go straight to the worker", async {
                loop {
                    let warm = client.spawn_task("warm", &j!(null), SpawnOptions::default()).await.unwrap();
                    let task = next_task(&mut messages).await;
                    complete(&mut grpc, &task).await;
                    tokio::time::sleep(Duration::from_millis(25)).await;
                    if sql.query_one(&handed, &[&warm.run_id]).await.unwrap().get(0) {
                        break;
                    }
                }
            })
            .await;
            sql.execute(&due, &[&sleeper.run_id]).await.unwrap();
            let new = spawn(&client, "new").await;
            for expected in [sleeper.task_id, new] {
                let task = next_task(&mut messages).await;
                assert_eq!(task.task_id, expected.to_string(), "{queue}, round {round}: {}", task.task_name);
                complete(&mut grpc, &task).await;
            }
        }
    }
}

/// A wait that is still stored while its run is at work goes with the run, whether that is completed, fails for good or
/// is cancelled: no list names it any more.
#[tokio::test(flavor = "multi_thread")]
async fn no_wait_outlives_its_run() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        for end in ["completed", "failed", "cancelled"] {
            let task_id = spawn(&client, "n").await;
            let waits = claim(&client).await.await_event("s", "never", None).await.unwrap();
            assert_eq!(waits, Awaited::Suspended { wake_at: None });
            // Somebody makes the run claimable before its event has come.
            let wake = format!("update absurd.r_{queue} set available_at = now() where task_id = $1");
            sql.execute(&wake, &[&task_id]).await.unwrap();
            let run = claim(&client).await;
            let listed = async || client.list_waits(WaitsOf::Task(task_id), 0, "").await.unwrap().items.len();
            assert_eq!((run.task_id, listed().await), (task_id, 1), "it is still stored");
            match end {
                "completed" => run.complete(&j!(1)).await.unwrap(),
                "failed" => {
                    run.fail_for_good("x").await.unwrap();
                }
                _ => {
                    client.cancel_task_by_id(task_id).await.unwrap();
                }
            }
            let state = client.get_task_result(task_id).await.unwrap().state;
            assert_eq!((state.as_str(), listed().await), (end, 0), "{queue}");
        }
    }
}

/// A cleanup by hand takes a thousand tasks or events where nothing is said, up to 10,000 where that is asked for, and
/// leaves nothing old in the end.
#[tokio::test(flavor = "multi_thread")]
async fn a_cleanup_leaves_nothing_old() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    let mut grpc = server.raw().await;
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        let store = async || {
            let ended = ("available_at, completed_at, result", "now(), now() - interval '1 hour', 'null'");
            store_many(&sql, queue, 1500, "completed", ended).await;
            let events = format!(
                "insert into absurd.e_{queue} (event_name, payload, emitted_at)
                 select 'e' || i, 'null', now() - interval '1 hour' from generate_series(1, 1500) i"
            );
            sql.batch_execute(&events).await.unwrap();
        };
        store().await;
        let mut deleted = Vec::new();
        for _ in 0..3 {
            let tasks = pb::CleanupTasksRequest { queue: queue.into(), ttl: seconds(60), limit: 0 };
            let events = pb::CleanupEventsRequest { queue: queue.into(), ttl: seconds(60), limit: 0 };
            let tasks = grpc.cleanup_tasks(tasks).await.unwrap().into_inner().deleted;
            deleted.push((tasks, grpc.cleanup_events(events).await.unwrap().into_inner().deleted));
        }
        assert_eq!(deleted, [(1000, 1000), (500, 500), (0, 0)], "{queue}");
        store().await;
        let (minute, many) = (Duration::from_secs(60), Some(10_000));
        assert_eq!(client.cleanup_tasks(minute, many).await.unwrap(), 1500);
        assert_eq!(client.cleanup_events(minute, many).await.unwrap(), 1500);
        for table in ["t", "r", "e"] {
            let rows = format!("select count(*) from absurd.{table}_{queue}");
            assert_eq!(count(&sql, &rows).await, 0, "{table}_{queue}");
        }
    }
}

/// A list of more than 10,000 tasks has each of them once, and a filter finds the one that is older than all others.
#[tokio::test(flavor = "multi_thread")]
async fn a_list_goes_on_past_ten_thousand_tasks() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        let wanted = spawn(&client, "wanted").await;
        let others = format!(
            "insert into absurd.t_{queue} (task_id, task_name, params, state)
             select absurd.portable_uuidv7(), 'n', 'null', 'completed' from generate_series(1, 10050)"
        );
        sql.batch_execute(&others).await.unwrap();
        let list = async |options: ListOptions| {
            let (mut seen, mut page_token) = (Vec::new(), String::new());
            loop {
                let options = ListOptions { page_size: 1000, page_token, ..options.clone() };
                let page = client.list_tasks(options).await.unwrap();
                seen.extend(page.items.into_iter().map(|task| task.task_id));
                page_token = page.next_page_token;
                if page_token.is_empty() {
                    return seen;
                }
            }
        };
        let all = list(ListOptions::default()).await;
        assert_eq!((all.len(), all.last()), (10_051, Some(&wanted)), "{queue}");
        assert!(all.is_sorted_by(|a, b| a > b), "newest first, none twice");
        let named = ListOptions { task_name: Some("wanted".into()), ..ListOptions::default() };
        assert_eq!(list(named).await, [wanted], "{queue}");
        let pending = ListOptions { state: Some(State::Pending), ..ListOptions::default() };
        assert_eq!(list(pending).await, [wanted], "{queue}");
    }
}

/// More runs of a partitioned queue wait for an event than one transaction wakes: the one call wakes all of them, each
/// with the payload stored under its step. The same on a plain queue is in `events.rs`.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_wakes_all_of_many_on_a_partitioned_queue() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    let [_, client] = both_kinds(&server).await;
    let asleep = ("available_at, started_at, wake_event", "'infinity', now(), 'go'");
    store_many(&sql, "parted", 1500, "sleeping", asleep).await;
    sql.batch_execute(
        "insert into absurd.w_parted (task_id, run_id, step_name, event_name)
           select task_id, run_id, 's', 'go' from absurd.r_parted;
         insert into absurd.e_parted (event_name, emitted_at) values ('go', 'epoch')",
    )
    .await
    .unwrap();
    assert_eq!(client.emit_event("go", &j!({"x": 1})).await.unwrap(), Emitted { applied: true, woken: 1500 });
    let woken = "select count(*) from absurd.r_parted r join absurd.t_parted t using (task_id)
                   join absurd.c_parted c on c.task_id = t.task_id and c.owner_run_id = r.run_id
                  where r.state = 'pending' and t.state = 'pending' and c.checkpoint_name = 's'
                    and c.state = '{\"x\": 1}' and r.event_payload = c.state";
    assert_eq!(count(&sql, woken).await, 1500);
    assert_eq!(count(&sql, "select count(*) from absurd.w_parted").await, 0);
}

/// More parents wait for one child than one transaction wakes: all of them hear of its end.
#[tokio::test(flavor = "multi_thread")]
async fn all_of_many_parents_hear_of_their_child() {
    let (server, clock) = server_with_a_clock().await;
    let sql = server.database().connect().await;
    let mut grpc = server.raw().await;
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        spawn(&client, "parent").await;
        let parent = claim(&client).await;
        let child = spawn(&client, "child").await;
        let waits = await_task(&mut grpc, (&client, &parent), "child", (&client, child)).await;
        assert!(matches!(waits, Outcome::Suspended(_)), "{waits:?}");
        // 1,200 more wait as this one does.
        let event = format!("'infinity', now(), (select event_name from absurd.w_{queue})");
        store_many(&sql, queue, 1200, "sleeping", ("available_at, started_at, wake_event", event.as_str())).await;
        let waits = format!(
            "insert into absurd.w_{queue} (task_id, run_id, step_name, event_name)
             select r.task_id, r.run_id, w.step_name, w.event_name
               from absurd.r_{queue} r join absurd.w_{queue} w on w.run_id <> r.run_id where r.state = 'sleeping'"
        );
        sql.batch_execute(&waits).await.unwrap();

        let run = claim(&client).await;
        assert_eq!(run.task_id, child);
        run.complete(&j!("done")).await.unwrap();
        let asleep = format!("select count(*) from absurd.r_{queue} where state = 'sleeping'");
        eventually("all of them are awake", || async {
            // Every replica goes on with wake-ups that are left, now and again; moving the clock makes it do so at
            // once.
            clock.advance(Duration::ZERO).await.unwrap();
            (count(&sql, &asleep).await == 0).then_some(())
        })
        .await;
        clock.unset().await.unwrap();
        let heard = format!(
            "select count(*) from absurd.c_{queue}
              where checkpoint_name = 'child' and state = '{{\"state\": \"completed\", \"result\": \"done\"}}'"
        );
        assert_eq!(count(&sql, &heard).await, 1201, "{queue}");
        assert_eq!(count(&sql, &format!("select count(*) from absurd.w_{queue}")).await, 0);
        assert_eq!(count(&sql, "select count(*) from absurd_server.emission").await, 0, "nothing is left to wake");
    }
}

/// More children of a plain queue are at work than one look takes, and one behind them has ended: its parent, of a
/// partitioned queue, is woken, and the other parents sleep on. They wake when their children have ended, all of them.
#[tokio::test(flavor = "multi_thread")]
async fn children_at_work_hide_none_that_has_ended() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    let mut grpc = server.raw().await;
    let [children, parents] = both_kinds(&server).await;
    let at_work = ("available_at, started_at, claimed_by", "now(), now(), 'w'");
    for queue in ["plain", "parted"] {
        store_many(&sql, queue, 600, "running", at_work).await;
    }
    sql.batch_execute(
        "create temp table pair as
           select p.run_id, c.task_id as child
             from (select run_id, row_number() over (order by run_id) as n from absurd.r_parted) p
             join (select task_id, row_number() over (order by run_id) as n from absurd.r_plain) c using (n);
         select absurd_server.await_task('parted', run_id, null, 'child', 'plain', child, null) from pair",
    )
    .await
    .unwrap();
    spawn(&parents, "parent").await;
    let parent = claim(&parents).await;
    let child = spawn(&children, "child").await;
    let waits = await_task(&mut grpc, (&parents, &parent), "child", (&children, child)).await;
    assert!(matches!(waits, Outcome::Suspended(_)), "{waits:?}");

    // By SQL, which tells no replica: only a look at all that is awaited finds it.
    sql.execute("select absurd.cancel_task('plain', $1)", &[&child]).await.unwrap();
    let parent = claim(&parents).await;
    let end = await_task(&mut grpc, (&parents, &parent), "child", (&children, child)).await;
    assert!(matches!(&end, Outcome::Snapshot(json) if json.text.contains("cancelled")), "{end:?}");
    let asleep = "select count(*) from absurd.r_parted where state = 'sleeping'";
    assert_eq!(count(&sql, asleep).await, 600);

    sql.batch_execute("select absurd.cancel_task('plain', child) from pair").await.unwrap();
    eventually("all of them are awake", || async { (count(&sql, asleep).await == 0).then_some(()) }).await;
    let heard = "select count(*) from absurd.c_parted
                  where checkpoint_name = 'child' and state = '{\"state\": \"cancelled\"}'";
    assert_eq!(count(&sql, heard).await, 601);
    assert_eq!(count(&sql, "select count(*) from absurd_server.awaited_task").await, 0);
}

/// Waking a run takes so long that many wake-ups run into the time limit of one statement: fewer of them get through, and all runs
/// are awake in the end.
#[tokio::test(flavor = "multi_thread")]
async fn wake_ups_that_take_long_get_through_in_smaller_batches() {
    let server = Server::start().await;
    let client = server.client();
    let sql = server.database().connect().await;
    sql.batch_execute(
        "create function slow() returns trigger language plpgsql as $$ begin perform pg_sleep(0.06); return new; end $$;
         create trigger slow before insert on absurd.e_q for each row execute function slow();
         insert into absurd_server.awaited_task (queue_name, task_id, waiting_queue, event_name)
           select 'q', gen_random_uuid(), 'q', 'e' || number from generate_series(1, 160) number",
    )
    .await
    .unwrap();
    spawn(&client, "parent").await;
    let parent = claim(&client).await;
    let child = spawn(&client, "child").await;
    let mut grpc = server.raw().await;
    await_task(&mut grpc, (&client, &parent), "child", (&client, child)).await;
    let left = "select count(*) from absurd_server.awaited_task where event_name like 'e%'";
    eventually("all are woken", || async { (count(&sql, left).await == 0).then_some(()) }).await;
}
