//! Promises of single statements and functions of the database that no other test holds them to, on plain and on
//! partitioned queues where both have them.

use std::collections::HashSet;
use std::time::{Duration, SystemTime};

use absurd_client::{
    AbsurdClient, Available, Awaited, ClaimOptions, DetachMode, Emitted, Json, ListOptions, NewWorkflowRun,
    PolicyChanges, QueueOptions, QueuePolicy, Reason, RetryOptions, RetryStrategy, Slept, SpawnOptions, State,
    StorageMode, StreamOptions, WaitsOf, WorkflowChange, WorkflowStatus,
};
use absurd_proto::v1 as pb;
use absurd_proto::v1::await_task_response::Outcome;
use absurd_proto::v1::claim_stream_response::Message;
use absurd_server::domain::QueueName;
use absurd_server::scope::{Caller, Scope};
use absurd_server::settings::{Settings, Span};
use absurd_server::store::failing::Fate;
use absurd_server::store::migrate;
use absurd_server::store::quarantine::Reason as Aside;
use absurd_server::store::upkeep::Round;
use absurd_tests::{Database, PATIENCE, Server, ServerOptions, eventually, in_time, json};
use serde_json::{Value, json as j};
use tokio_postgres::Client;
use uuid::Uuid;

use super::sql::{await_task, both_kinds, claim, count, extend, server_with_a_clock, spawn, store_many};
use crate::streams::{next, next_task, open, request, seconds};

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);

/// Queues of both kinds, for tests that have no server.
const KINDS: [(&str, &str); 2] = [("plain", "unpartitioned"), ("parted", "partitioned")];

fn scope_of(client: &AbsurdClient) -> Scope {
    Caller::anonymous().scope(QueueName::parse("queue", client.queue_name()).unwrap())
}

/// A function for triggers, which refuses the row.
async fn create_refusal(sql: &Client) {
    sql.batch_execute(
        "create function public.refuse() returns trigger language plpgsql as $$
         begin
           raise exception 'not today';
         end $$",
    )
    .await
    .unwrap();
}

/// The value of a step as it is read by its name; None: there is no such step.
async fn step(client: &AbsurdClient, task_id: Uuid, name: &str) -> Option<String> {
    let stored = client.get_checkpoint(task_id, name, false).await.unwrap()?;
    assert_eq!(stored.status, "committed");
    stored.state.map(|state| state.as_str().to_owned())
}

// Claims: places, leases, strikes.

/// A run that is given back keeps its place, however often: it is claimed again before a task that was spawned after
/// it.
#[tokio::test(flavor = "multi_thread")]
async fn a_release_keeps_the_place_of_its_run() {
    let server = Server::start().await;
    for client in both_kinds(&server).await {
        let (older, younger) = (spawn(&client, "older").await, spawn(&client, "younger").await);
        for _ in 0..3 {
            let run = claim(&client).await;
            assert_eq!((run.task_id, run.attempt), (older, 1), "{}", client.queue_name());
            run.release(Duration::ZERO).await.unwrap();
        }
        let (first, second) = (claim(&client).await, claim(&client).await);
        assert_eq!((first.task_id, second.task_id), (older, younger));
    }
}

/// A task whose start is over when it is spawned can be claimed at once and does not overtake: a task that was spawned
/// before it is claimed first.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_in_the_past_does_not_overtake() {
    let server = Server::start().await;
    for client in both_kinds(&server).await {
        let older = spawn(&client, "older").await;
        let past = SpawnOptions::default().start_at(SystemTime::now() - HOUR);
        let younger = client.spawn_task("younger", &j!(null), past).await.unwrap().task_id;
        assert_eq!(client.get_task_result(younger).await.unwrap().state, State::Pending);
        for expected in [older, younger] {
            assert_eq!(claim(&client).await.task_id, expected, "{}", client.queue_name());
        }
    }
}

/// Nor does a task whose start passes while its spawn is on its way: a task that was spawned meanwhile is claimed first.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_passes_on_the_way_does_not_overtake() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let sql = server.database().connect().await;
    let failing = server.app().engine().store.failing();
    for client in both_kinds(&server).await {
        failing.arm(1, Fate::Hangs);
        let start = SystemTime::now() + SECOND;
        let late = tokio::spawn({
            let client = client.clone();
            async move { client.spawn_task("late", &j!(null), SpawnOptions::default().start_at(start)).await }
        });
        eventually("the spawn is on its way", async || (failing.hanging() > 0).then_some(())).await;
        eventually("its start is over", async || (SystemTime::now() > start).then_some(())).await;
        let meanwhile = "select task_id from absurd.spawn_task($1, 'n', 'null')";
        let meanwhile: Uuid = sql.query_one(meanwhile, &[&client.queue_name()]).await.unwrap().get(0);
        failing.disarm();
        let late = in_time("the spawn is answered", late).await.unwrap().unwrap().task_id;
        for expected in [meanwhile, late] {
            assert_eq!(claim(&client).await.task_id, expected, "{}", client.queue_name());
        }
    }
}

/// A failure that asks for its next attempt at a time that is over does not overtake: a task that was spawned before
/// the failure is claimed first.
#[tokio::test(flavor = "multi_thread")]
async fn a_retry_in_the_past_does_not_overtake() {
    let server = Server::start().await;
    for client in both_kinds(&server).await {
        let options = SpawnOptions::default().max_attempts(2);
        let retried = client.spawn_task("retried", &j!(null), options).await.unwrap().task_id;
        let run = claim(&client).await;
        let waiting = spawn(&client, "waiting").await;
        let past = Some(SystemTime::now() - HOUR);
        let outcome = client.fail_task(run.run_id, &j!({"message": "x"}), past).await.unwrap();
        assert_eq!(outcome.task_state, Some(State::Pending));
        for expected in [(waiting, 1), (retried, 2)] {
            let run = claim(&client).await;
            assert_eq!((run.task_id, run.attempt), expected, "{}", client.queue_name());
        }
    }
}

/// A stream that takes only some task names gets older tasks first, also where more of them wait than one look sees:
/// none of ten younger ones comes while old ones wait.
#[tokio::test(flavor = "multi_thread")]
async fn a_filter_takes_the_older_tasks_first() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        let tasks = format!(
            "select absurd.spawn_task('{queue}', 'wanted', '\"old\"') from generate_series(1, 1000);
             update absurd.r_{queue} set available_at = now() - interval '1 hour';
             select absurd.spawn_task('{queue}', 'wanted', '\"young\"') from generate_series(1, 10)"
        );
        sql.batch_execute(&tasks).await.unwrap();
        let options = StreamOptions { task_names: vec!["wanted".into()], ..StreamOptions::default() };
        let mut stream = client.claim_stream(options).await.unwrap();
        for turn in 0..5 {
            let task = in_time("a task arrives", stream.next()).await.unwrap();
            assert_eq!(task.params.as_ref().map(Json::as_str), Some("\"old\""), "{queue}, turn {turn}");
            task.complete(&j!(null)).await.unwrap();
        }
    }
}

/// Sleeping runs that have come due and that Postgres refuses to have claimed are passed over, more of them than are
/// tried at a time: the others behind them are claimed.
#[tokio::test(flavor = "multi_thread")]
async fn due_sleepers_that_cannot_be_claimed_hold_up_nobody() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    create_refusal(&sql).await;
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        let tasks = format!(
            "select absurd.spawn_task('{queue}', case when i <= 60 then 'poison' else 'fine' end, 'null')
               from generate_series(1, 80) i;
             update absurd.t_{queue} set state = 'sleeping';
             update absurd.r_{queue} r
                set state = 'sleeping',
                    available_at = now() - interval '1 minute' * case t.task_name when 'poison' then 60 else 1 end
               from absurd.t_{queue} t where t.task_id = r.task_id;
             create trigger poison before update of state on absurd.t_{queue} for each row
               when (new.task_name = 'poison' and new.state = 'running') execute function public.refuse()"
        );
        sql.batch_execute(&tasks).await.unwrap();
        let mut claimed = HashSet::new();
        while claimed.len() < 20 {
            let options = ClaimOptions::default().qty(20).wait(Duration::from_secs(30));
            let tasks = client.claim_task(options).await.unwrap();
            assert!(!tasks.is_empty(), "{queue}: only {} of the others are claimed", claimed.len());
            for task in tasks {
                assert_eq!((task.task_name.as_str(), task.attempt), ("fine", 1));
                assert!(claimed.insert(task.task_id));
                task.complete(&j!(null)).await.unwrap();
            }
        }
    }
}

/// A lease without an end keeps none, whatever extends it: an extension, a step that asks for one, and such a step
/// that an SDK stores by SQL.
#[tokio::test(flavor = "multi_thread")]
async fn a_lease_without_an_end_never_gets_one() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    let minute = Duration::from_secs(60);
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        let task_id = spawn(&client, "n").await;
        let endless = ClaimOptions::default().claim_timeout(Duration::ZERO).wait(PATIENCE);
        let run = in_time("it is claimed", client.claim_task(endless)).await.unwrap().remove(0);
        let lease = async || client.get_run_status(run.run_id).await.unwrap().unwrap().claim_expires_at;
        assert_eq!((run.claim_expires_at, lease().await), (None, None));
        assert_eq!(client.extend_claim(run.run_id, minute).await.unwrap(), None);
        assert_eq!(lease().await, None, "{queue}: after an extension");
        assert!(client.set_checkpoint(task_id, "by a call", &j!(1), run.run_id, Some(minute)).await.unwrap());
        assert_eq!(lease().await, None, "{queue}: after a step");
        let by_sql = "select absurd.set_task_checkpoint_state($1, $2, 'by SQL', '1', $3, 60)";
        sql.execute(by_sql, &[&queue, &task_id, &run.run_id]).await.unwrap();
        assert_eq!(lease().await, None, "{queue}: after a step by SQL");
        run.complete(&j!(null)).await.unwrap();
    }
}

/// A stream is lost whose worker has extended one of two leases at another replica: the other lease is cut to the
/// grace, the extended one stays as it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_stream_cuts_no_lease_that_was_extended_elsewhere() {
    let one = Server::start().await;
    let two = Server::start_on(one.database()).await;
    let (sql, mut there) = (one.database().connect().await, two.raw().await);
    for client in both_kinds(&one).await {
        let queue = client.queue_name();
        let mut here = one.raw().await;
        let asked = pb::ClaimStreamRequest {
            queue: queue.into(),
            claim_timeout: seconds(600),
            reconnect_grace: seconds(60),
            ..request(3)
        };
        let (_, mut messages) = open(&mut here, asked).await;
        for _ in 0..2 {
            spawn(&client, "n").await;
        }
        let (left, extended) = (next_task(&mut messages).await, next_task(&mut messages).await);
        // The stream's replica would hear of it with its next look at its claims, in some seconds.
        extend(&mut there, &extended, 3600).await;
        drop(messages);
        let read = format!(
            "select extract(epoch from r.claim_expires_at - r.started_at)::float8 from absurd.r_{queue} r
              where r.run_id::text = $1"
        );
        let lease = async |run_id: &str| -> f64 { sql.query_one(&read, &[&run_id]).await.unwrap().get(0) };
        eventually("the other lease is cut", || async { (lease(&left.run_id).await < 300.0).then_some(()) }).await;
        let extended = lease(&extended.run_id).await;
        assert!(extended > 3000.0, "{queue}: the extended lease has {extended} s now");
    }
}

/// A lease is extended while a sweep is about to end it: the sweep waits for the row, sees the new end and leaves the
/// run alone, and its worker completes it.
#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_spares_a_lease_that_is_extended_meanwhile() {
    let (server, clock) = server_with_a_clock().await;
    let (sql, watch) = (server.database().connect().await, server.database().connect().await);
    let clients = both_kinds(&server).await;
    clock.advance(Duration::ZERO).await.unwrap();
    let waiting = "select count(*) from pg_stat_activity
                    where datname = current_database() and wait_event_type = 'Lock' and query like '-- run_fail%'";
    for client in clients {
        let queue = client.queue_name();
        spawn(&client, "n").await;
        let run = claim(&client).await;
        // The extension is not committed yet.
        sql.batch_execute("begin").await.unwrap();
        let extend = format!(
            "update absurd.r_{queue} set claim_expires_at = claim_expires_at + interval '1 day' where run_id = $1"
        );
        sql.execute(&extend, &[&run.run_id]).await.unwrap();
        let moving = tokio::spawn({
            let clock = clock.clone();
            async move { clock.advance(Duration::from_secs(31)).await.unwrap() }
        });
        eventually("a sweep waits for the run", || async { (count(&watch, waiting).await > 0).then_some(()) }).await;
        sql.batch_execute("commit").await.unwrap();
        in_time("the time is moved", moving).await.unwrap();
        run.complete(&j!(1)).await.unwrap_or_else(|error| panic!("{queue}: {error}"));
    }
}

/// A stream whose run another worker holds hears so by itself: its claim is revoked as lost, and its credit is free
/// for the next task.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_hears_that_another_worker_holds_its_run() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        let mut grpc = server.raw().await;
        let asked = pb::ClaimStreamRequest { queue: queue.into(), claim_timeout: seconds(600), ..request(1) };
        let (_, mut messages) = open(&mut grpc, asked).await;
        spawn(&client, "first").await;
        let held = next_task(&mut messages).await;
        // By plain SQL, of which no replica is told.
        let take =
            format!("update absurd.r_{queue} set claimed_by = 'other#' || repeat('x', 22) where run_id::text = $1");
        sql.execute(&take, &[&held.run_id]).await.unwrap();
        let Message::Revoked(revoked) = next(&mut messages).await else { panic!("{queue}: the claim is revoked") };
        assert_eq!((&revoked.claim_token, revoked.verdict()), (&held.claim_token, pb::Verdict::Lost));
        let second = spawn(&client, "second").await;
        assert_eq!(next_task(&mut messages).await.task_id, second.to_string());
    }
}

/// Workers that took a run and gave no sign of life are counted for a day: two of them and a third one 23 hours later
/// end the task. Counts that are older than a day are forgotten.
#[tokio::test(flavor = "multi_thread")]
async fn strikes_count_for_a_day() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    let store = &server.app().engine().store;
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        let task_id = spawn(&client, "killer").await;
        let mut grpc = server.raw().await;
        let asked = pb::ClaimStreamRequest { queue: queue.into(), start_deadline: seconds(1), ..request(1) };
        for worker in 1..=3 {
            let (_, mut messages) = open(&mut grpc, asked.clone()).await;
            assert_eq!(next_task(&mut messages).await.task_id, task_id.to_string());
            if worker == 3 {
                let age = "update absurd_server.released set released_at = released_at - interval '23 hours'";
                sql.execute(age, &[]).await.unwrap();
                let old = "insert into absurd_server.released (queue_name, run_id, releases, released_at)
                           values ($1, gen_random_uuid(), 1, clock_timestamp() - interval '25 hours')";
                sql.execute(old, &[&queue]).await.unwrap();
                store.release_forget().await.unwrap();
                let kept = "select releases from absurd_server.released where queue_name = $1";
                let kept = sql.query(kept, &[&queue]).await.unwrap();
                assert_eq!(kept.iter().map(|row| row.get(0)).collect::<Vec<i32>>(), [2], "{queue}");
            }
            // The worker dies.
        }
        let end = client.await_task_result(task_id, Some(PATIENCE)).await.unwrap();
        assert_eq!(end.state, State::Failed, "{queue}");
        assert!(end.failure.unwrap().as_str().contains("no sign of life"));
    }
}

/// A run whose lease is over and that Postgres refuses to fail is tried again after 30 s, then after twice as long
/// each time, ten minutes at most.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_moved_on_is_tried_ever_more_seldom() {
    let (server, clock) = server_with_a_clock().await;
    let sql = server.database().connect().await;
    let clients = both_kinds(&server).await;
    clock.advance(Duration::ZERO).await.unwrap();
    create_refusal(&sql).await;
    for client in &clients {
        let refusal = format!(
            "create trigger refuse before update on absurd.r_{} for each row when (new.state = 'failed')
               execute function public.refuse()",
            client.queue_name()
        );
        sql.batch_execute(&refusal).await.unwrap();
        spawn(client, "n").await;
        claim(client).await;
    }
    let mut now = clock.advance(Duration::from_secs(30)).await.unwrap();
    for (tries, pause) in (1..).zip([30, 60, 120, 240, 480, 600, 600]) {
        let tried = format!("select count(*) from absurd_server.quarantine where reason = 'lease' and times = {tries}");
        eventually("both are tried", || async { (count(&sql, &tried).await == 2).then_some(()) }).await;
        let again = sql.query("select retry_at from absurd_server.quarantine", &[]).await.unwrap();
        let until = now + Duration::from_secs(pause);
        assert_eq!(again.iter().map(|row| row.get(0)).collect::<Vec<SystemTime>>(), [until; 2], "after {tries} tries");
        now = clock.set(until).await.unwrap();
    }
}

// Attempts and copies.

/// The pauses between attempts grow as the strategy says: the first one is its base, each one is so many times as long
/// as the one before, and none is longer than its bound.
#[tokio::test(flavor = "multi_thread")]
async fn exponential_pauses_begin_with_their_base() {
    let (server, clock) = server_with_a_clock().await;
    let clients = both_kinds(&server).await;
    let mut now = clock.advance(Duration::ZERO).await.unwrap();
    for client in clients {
        let (base, max) = (Duration::from_secs(10), Some(Duration::from_secs(100)));
        let strategy = RetryStrategy::Exponential { base, factor: 3.0, max };
        let options = SpawnOptions::default().max_attempts(5).retry(strategy);
        client.spawn_task("n", &j!(null), options).await.unwrap();
        for pause in [10, 30, 90, 100] {
            let next = claim(&client).await.fail(&j!("x")).await.unwrap().next.unwrap();
            let at = now + Duration::from_secs(pause);
            assert_eq!(next.available_at, Some(at), "{}: {pause} s", client.queue_name());
            now = clock.set(at).await.unwrap();
        }
    }
}

/// A failed task whose next attempt would begin when its hour is over is cancelled at once; one whose next attempt
/// begins a second earlier sleeps until then.
#[tokio::test(flavor = "multi_thread")]
async fn no_attempt_begins_past_the_duration_of_its_task() {
    let (server, clock) = server_with_a_clock().await;
    let clients = both_kinds(&server).await;
    clock.advance(Duration::ZERO).await.unwrap();
    for client in clients {
        for (pause, state) in [(HOUR, State::Cancelled), (HOUR - SECOND, State::Sleeping)] {
            let options = SpawnOptions::default().max_attempts(2).max_duration(HOUR).retry(RetryStrategy::Fixed(pause));
            let task_id = client.spawn_task("n", &j!(null), options).await.unwrap().task_id;
            let outcome = claim(&client).await.fail(&j!("x")).await.unwrap();
            assert_eq!(outcome.task_state, Some(state), "{}: {pause:?}", client.queue_name());
            assert_eq!(outcome.next.is_some(), state == State::Sleeping);
            assert_eq!(client.get_task_result(task_id).await.unwrap().state, state);
        }
    }
}

/// The next attempt gets all steps of the one before with its claim, 1,500 of them.
#[tokio::test(flavor = "multi_thread")]
async fn the_next_attempt_gets_every_step() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        let options = SpawnOptions::default().max_attempts(2);
        let task_id = client.spawn_task("n", &j!(null), options).await.unwrap().task_id;
        let first = claim(&client).await;
        let store = format!(
            "insert into absurd.c_{queue} (task_id, checkpoint_name, state, owner_run_id)
             select $1, 'step ' || i, to_jsonb(i), $2 from generate_series(1, 1500) i"
        );
        sql.execute(&store, &[&task_id, &first.run_id]).await.unwrap();
        first.fail(&j!("x")).await.unwrap();
        let second = claim(&client).await;
        let names: HashSet<&str> = second.checkpoints.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!((second.attempt, names.len(), second.checkpoints_complete), (2, 1500, true), "{queue}");
    }
}

/// A copy of a failed task has all that its source has, whether a call or SQL makes it: name, params, headers, retry
/// strategy, cancellation policy, and the limit of attempts unless another one is asked for.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_has_all_of_its_source() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        let options = SpawnOptions::default()
            .max_attempts(1)
            .max_delay(HOUR)
            .max_duration(2 * HOUR)
            .retry(RetryStrategy::Fixed(7 * SECOND))
            .header("h", 1);
        let source = client.spawn_task("n", &j!({"a": 1}), options).await.unwrap().task_id;
        claim(&client).await.fail(&j!("x")).await.unwrap();
        let source = client.get_task_status(source).await.unwrap().unwrap();
        assert!(source.headers.is_some() && source.retry_strategy.is_some() && source.cancellation.is_some());
        for (max_attempts, expected) in [(None, 1), (Some(7), 7)] {
            let options = RetryOptions { spawn_new: true, max_attempts };
            let by_call = client.retry_task(source.task_id, options).await.unwrap().task_id;
            let options = j!({"spawn_new": true, "max_attempts": max_attempts}).to_string();
            let by_sql = "select task_id from absurd.retry_task($1, $2, $3::text::jsonb)";
            let by_sql: Uuid = sql.query_one(by_sql, &[&queue, &source.task_id, &options]).await.unwrap().get(0);
            for (how, copy) in [("a call", by_call), ("SQL", by_sql)] {
                let copy = client.get_task_status(copy).await.unwrap().unwrap();
                let what = format!("{queue}: a copy by {how}");
                let fresh = (State::Pending, 1, Some(expected));
                assert_eq!((copy.state, copy.attempts, copy.max_attempts), fresh, "{what}");
                assert_eq!((&copy.task_name, &copy.params), (&source.task_name, &source.params), "{what}");
                assert_eq!((&copy.headers, &copy.retry_strategy), (&source.headers, &source.retry_strategy), "{what}");
                assert_eq!(copy.cancellation, source.cancellation, "{what}");
            }
        }
    }
}

/// An id that a caller has chosen names one task: the same spawn again has the same answer, another name or other
/// params under that id are refused, with an idempotency key and without one.
#[tokio::test(flavor = "multi_thread")]
async fn a_chosen_id_names_one_task() {
    let server = Server::start().await;
    for client in both_kinds(&server).await {
        for key in [None, Some("k")] {
            let options = SpawnOptions {
                task_id: Some(Uuid::now_v7()),
                idempotency_key: key.map(str::to_owned),
                ..SpawnOptions::default()
            };
            let asked = async |name: &str, params: i32| client.spawn_task(name, &params, options.clone()).await;
            let first = asked("n", 1).await.unwrap();
            assert_eq!(asked("n", 1).await.unwrap(), first);
            for (name, params) in [("n", 2), ("m", 1)] {
                let what = format!("{}, key {key:?}: task {name} with {params}", client.queue_name());
                let refused = asked(name, params).await.expect_err(&what);
                assert_eq!(refused.reason(), Reason::TaskIdConflict, "{what}");
            }
        }
    }
}

// Waits and time.

/// The name of a wait that timed out may become a step, by a stored value, which comes along with the next claim, or by
/// a sleep: the step is then read by its name.
#[tokio::test(flavor = "multi_thread")]
async fn the_name_of_a_wait_that_timed_out_may_become_a_step() {
    let server = Server::start().await;
    for client in both_kinds(&server).await {
        let task_id = spawn(&client, "n").await;
        let run = claim(&client).await;
        for name in ["value", "nap"] {
            assert_eq!(run.await_event(name, "never", Some(Duration::ZERO)).await.unwrap(), Awaited::TimedOut);
            assert_eq!(step(&client, task_id, name).await, None, "a wait that timed out is no step");
        }
        run.set_checkpoint("value", &j!(7)).await.unwrap();
        assert_eq!(step(&client, task_id, "value").await.as_deref(), Some("7"), "{}", client.queue_name());
        run.release(Duration::ZERO).await.unwrap();
        let run = claim(&client).await;
        assert_eq!(run.checkpoint("value").flatten().map(Json::as_str), Some("7"));
        let slept = run.sleep("nap", HOUR).await.unwrap();
        assert!(matches!(slept, Slept::Suspended { .. }), "{slept:?}");
        let nap = step(&client, task_id, "nap").await;
        assert!(nap.is_some_and(|time| time.starts_with("\"20")), "{}", client.queue_name());
    }
}

/// An event that comes before the deadline of a wait makes it a step like any other: the step is read by its name, and
/// comes along with the next claim.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_before_the_deadline_becomes_a_step() {
    let server = Server::start().await;
    for client in both_kinds(&server).await {
        let task_id = spawn(&client, "n").await;
        let waits = claim(&client).await.await_event("s", "paid", Some(HOUR)).await.unwrap();
        assert!(matches!(waits, Awaited::Suspended { wake_at: Some(_) }), "{waits:?}");
        assert_eq!(client.emit_event("paid", &j!(7)).await.unwrap(), Emitted { applied: true, woken: 1 });
        assert_eq!(step(&client, task_id, "s").await.as_deref(), Some("7"), "{}", client.queue_name());
        let woken = claim(&client).await;
        assert_eq!((woken.task_id, woken.checkpoint("s").flatten().map(Json::as_str)), (task_id, Some("7")));
    }
}

/// The same where the run is at work again when the event comes, and says its wait once more.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_a_running_run_finds_becomes_a_step() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        let task_id = spawn(&client, "n").await;
        claim(&client).await.await_event("s", "paid", Some(HOUR)).await.unwrap();
        // Somebody makes the run claimable before its time.
        let wake = format!("update absurd.r_{queue} set available_at = now(), wake_event = null where task_id = $1");
        sql.execute(&wake, &[&task_id]).await.unwrap();
        let run = claim(&client).await;
        assert_eq!(client.emit_event("paid", &j!(7)).await.unwrap(), Emitted { applied: true, woken: 0 });
        let found = run.await_event("s", "paid", Some(HOUR)).await.unwrap();
        assert_eq!(found, Awaited::Payload(Json::from_text("7")));
        assert_eq!(step(&client, task_id, "s").await.as_deref(), Some("7"), "{queue}");
    }
}

/// A wait that is said again when its event has come is answered as before: the run is claimed anew, not by this
/// claim. Another wait under the claim that is over is refused.
#[tokio::test(flavor = "multi_thread")]
async fn a_wait_may_be_repeated_after_its_event() {
    let server = Server::start().await;
    for client in both_kinds(&server).await {
        spawn(&client, "n").await;
        let run = claim(&client).await;
        assert_eq!(run.await_event("s", "e", None).await.unwrap(), Awaited::Suspended { wake_at: None });
        assert_eq!(client.emit_event("e", &j!(7)).await.unwrap(), Emitted { applied: true, woken: 1 });
        let again = run.await_event("s", "e", None).await;
        let again = again.unwrap_or_else(|error| panic!("{}: {error}", client.queue_name()));
        assert!(matches!(again, Awaited::Suspended { .. }), "{again:?}");
        let another = run.await_event("another", "e", None).await.unwrap_err();
        assert_eq!(another.reason(), Reason::ClaimLost);
    }
}

/// A wait under a claim that is over is refused and leaves nothing behind, no event either, while another claim has
/// the run at work.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_wait_leaves_no_event() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    for client in both_kinds(&server).await {
        spawn(&client, "n").await;
        let stale = claim(&client).await;
        stale.release(Duration::ZERO).await.unwrap();
        let current = claim(&client).await;
        assert_eq!(current.run_id, stale.run_id, "another claim of the same run");
        let refused = stale.await_event("s", "never", None).await.unwrap_err();
        assert_eq!(refused.reason(), Reason::ClaimLost);
        for table in ["e", "w", "c"] {
            let rows = format!("select count(*) from absurd.{table}_{}", client.queue_name());
            assert_eq!(count(&sql, &rows).await, 0, "{rows}");
        }
        current.complete(&j!(null)).await.unwrap();
    }
}

/// A run that is moved by so long can be claimed exactly then, whether it was pending, asleep or at work.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_moved_by_as_long_as_was_asked_for() {
    let (server, clock) = server_with_a_clock().await;
    let clients = both_kinds(&server).await;
    let now = clock.advance(Duration::ZERO).await.unwrap();
    for client in clients {
        let moved = async |run_id: Uuid, delay: Duration| {
            client.schedule_task_after(run_id, delay).await.unwrap();
            let run = client.get_run_status(run_id).await.unwrap().unwrap();
            let expected = (State::Sleeping, Available::At(now + delay));
            assert_eq!((run.state, run.available_at), expected, "{}: {delay:?}", client.queue_name());
        };
        let spawned = client.spawn_task("pending", &j!(null), SpawnOptions::default()).await.unwrap();
        moved(spawned.run_id, 90 * SECOND).await;
        moved(spawned.run_id, 45 * SECOND + Duration::from_micros(1)).await;
        spawn(&client, "at work").await;
        moved(claim(&client).await.run_id, HOUR).await;
    }
}

/// An orchestrator puts its run to sleep: for 24 hours where no wait is registered, else until the registered wait is
/// over.
#[tokio::test(flavor = "multi_thread")]
async fn an_orchestrators_run_sleeps_for_a_day() {
    let (server, clock) = server_with_a_clock().await;
    let sql = server.database().connect().await;
    let clients = both_kinds(&server).await;
    let now = clock.advance(Duration::ZERO).await.unwrap();
    for client in clients {
        let queue = client.queue_name();
        spawn(&client, "n").await;
        let run = claim(&client).await;
        assert_eq!(client.set_run_sleeping(run.run_id, "e").await.unwrap(), Some(now + DAY), "{queue}");

        spawn(&client, "n").await;
        let run = claim(&client).await;
        run.await_event("s", "e", Some(HOUR)).await.unwrap();
        // Somebody makes the run claimable before its time; its wait is still registered.
        let wake = format!("update absurd.r_{queue} set available_at = 'epoch', wake_event = null where run_id = $1");
        sql.execute(&wake, &[&run.run_id]).await.unwrap();
        let again = claim(&client).await;
        assert_eq!(again.run_id, run.run_id);
        assert_eq!(client.set_run_sleeping(run.run_id, "e").await.unwrap(), Some(now + HOUR), "{queue}");
    }
}

/// The queue of a task that a run waits for is dropped: the run wakes, and hears that the task is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_parent_hears_that_the_queue_of_its_child_is_gone() {
    let server = Server::start().await;
    let mut grpc = server.raw().await;
    for client in both_kinds(&server).await {
        let children = client.with_queue(format!("children of {}", client.queue_name()));
        children.create_queue().await.unwrap();
        let child = spawn(&children, "child").await;
        spawn(&client, "parent").await;
        let parent = claim(&client).await;
        let waits = await_task(&mut grpc, (&client, &parent), "child", (&children, child)).await;
        assert!(matches!(waits, Outcome::Suspended(_)), "{waits:?}");
        assert!(children.drop_queue().await.unwrap());
        let parent = claim(&client).await;
        let end = await_task(&mut grpc, (&client, &parent), "child", (&children, child)).await;
        assert!(matches!(&end, Outcome::Snapshot(json) if json.text.contains("TaskNotFound")), "{end:?}");
        parent.complete(&j!(null)).await.unwrap();
    }
}

/// More unfinished emissions than one look takes of a queue, none of which Postgres lets go on, keep no other queue
/// waiting: its run is woken.
#[tokio::test(flavor = "multi_thread")]
async fn emissions_that_cannot_go_on_keep_no_other_queue_waiting() {
    let (server, clock) = server_with_a_clock().await;
    let sql = server.database().connect().await;
    both_kinds(&server).await;
    for (queue, events) in [("parted", 12), ("plain", 1)] {
        let asleep = ("available_at, started_at, wake_event", "'infinity', now(), 'go'");
        store_many(&sql, queue, events, "sleeping", asleep).await;
        let emitted = format!(
            "insert into absurd.w_{queue} (task_id, run_id, step_name, event_name)
               select task_id, run_id, 's', 'e' || row_number() over (order by run_id) from absurd.r_{queue};
             insert into absurd.e_{queue} (event_name, payload) select event_name, '7' from absurd.w_{queue};
             insert into absurd_server.emission (queue_name, event_name)
               select '{queue}', event_name from absurd.w_{queue}"
        );
        sql.batch_execute(&emitted).await.unwrap();
    }
    create_refusal(&sql).await;
    // The queue that refuses comes first by its name.
    sql.batch_execute(
        "create trigger refuse before update on absurd.r_parted for each row execute function public.refuse()",
    )
    .await
    .unwrap();
    clock.advance(Duration::ZERO).await.unwrap();
    let woken = "select count(*) from absurd.r_plain where state = 'pending' and event_payload = '7'";
    eventually("the run of the other queue is woken", || async { (count(&sql, woken).await == 1).then_some(()) }).await;
    assert_eq!(count(&sql, "select count(*) from absurd_server.emission where queue_name = 'parted'").await, 12);
}

/// Times that a test sets are kept to the microsecond, and what is stored has them.
#[tokio::test(flavor = "multi_thread")]
async fn a_test_s_time_is_kept_to_the_microsecond() {
    let (server, clock) = server_with_a_clock().await;
    let clients = both_kinds(&server).await;
    let at = SystemTime::UNIX_EPOCH + Duration::from_micros(1_900_000_000_123_457);
    assert_eq!((clock.set(at).await.unwrap(), clock.now().await.unwrap()), (at, at));
    for client in clients {
        let task_id = spawn(&client, "n").await;
        assert_eq!(client.get_task_status(task_id).await.unwrap().unwrap().enqueue_at, Some(at));
    }
}

// Reads.

/// A filter finds the one task that it is for behind 1,500 newer ones.
#[tokio::test(flavor = "multi_thread")]
async fn a_filtered_list_goes_on_past_a_thousand_tasks() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        let others = async |number: i32| {
            let insert = format!(
                "insert into absurd.t_{queue} (task_id, task_name, params, state)
                 select absurd.portable_uuidv7(), 'n', 'null', 'completed' from generate_series(1, {number})"
            );
            sql.batch_execute(&insert).await.unwrap();
        };
        others(500).await;
        let wanted = spawn(&client, "wanted").await;
        others(1500).await;
        let named = ListOptions { task_name: Some("wanted".into()), ..ListOptions::default() };
        let pending = ListOptions { state: Some(State::Pending), ..ListOptions::default() };
        for options in [named, pending] {
            let page = client.list_tasks(options).await.unwrap();
            let found: Vec<Uuid> = page.items.iter().map(|task| task.task_id).collect();
            assert_eq!((found, page.next_page_token.as_str()), (vec![wanted], ""), "{queue}");
        }
    }
}

/// The waits of a task and those for an event are listed each once, in order, whatever the size of a page, also where
/// one run has several.
#[tokio::test(flavor = "multi_thread")]
async fn waits_of_one_run_are_listed_over_many_pages() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        let task_id = spawn(&client, "n").await;
        let store = format!(
            "insert into absurd.w_{queue} (task_id, run_id, step_name, event_name)
             select task_id, run_id, 's' || i, 'shared' from absurd.r_{queue}, generate_series(1, 5) i"
        );
        sql.batch_execute(&store).await.unwrap();
        for of in [WaitsOf::Task(task_id), WaitsOf::Event("shared".into())] {
            for size in 1..=6 {
                let (mut steps, mut token) = (Vec::new(), String::new());
                loop {
                    let page = client.list_waits(of.clone(), size, &token).await.unwrap();
                    steps.extend(page.items.into_iter().map(|wait| wait.step_name));
                    token = page.next_page_token;
                    if token.is_empty() {
                        break;
                    }
                }
                assert_eq!(steps, ["s1", "s2", "s3", "s4", "s5"], "{queue}: {of:?} in pages of {size}");
            }
        }
    }
}

/// The last sign of life of a run is the newest of its own steps, alone and in the list of its task's runs; a step of
/// another attempt is none.
#[tokio::test(flavor = "multi_thread")]
async fn a_step_is_a_sign_of_life_of_its_own_run() {
    let server = Server::start().await;
    for client in both_kinds(&server).await {
        let options = SpawnOptions::default().max_attempts(2);
        let task_id = client.spawn_task("n", &j!(null), options).await.unwrap().task_id;
        let read = async |run_id: Uuid| client.get_run_status(run_id).await.unwrap().unwrap();
        let first = claim(&client).await;
        first.set_checkpoint("a", &j!(1)).await.unwrap();
        let before = read(first.run_id).await;
        assert!(before.last_heartbeat > before.started_at, "{before:?}");
        first.fail(&j!("x")).await.unwrap();
        let second = claim(&client).await;
        second.set_checkpoint("b", &j!(1)).await.unwrap();
        let alone = [read(first.run_id).await, read(second.run_id).await];
        assert_eq!(alone[0].last_heartbeat, before.last_heartbeat, "{}", client.queue_name());
        assert!(alone[1].last_heartbeat > alone[1].started_at);
        let listed = client.list_runs(task_id, 0, "").await.unwrap().items;
        assert_eq!(listed, alone, "{}", client.queue_name());
    }
}

/// The oldest of all claimable runs counts for the age that a queue tells, whether it is pending or sleeps until a
/// time that is over.
#[tokio::test(flavor = "multi_thread")]
async fn the_age_of_a_queue_is_that_of_its_oldest_run() {
    let (server, clock) = server_with_a_clock().await;
    let clients = both_kinds(&server).await;
    clock.advance(Duration::ZERO).await.unwrap();
    for client in clients {
        let queue = client.queue_name();
        let age = async || client.get_queue_stats().await.unwrap().oldest_claimable_age;
        assert_eq!(age().await, None, "{queue}");
        spawn(&client, "pending").await;
        clock.advance(10 * SECOND).await.unwrap();
        let soon = SpawnOptions::default().delay(5 * SECOND);
        client.spawn_task("asleep", &j!(null), soon).await.unwrap();
        clock.advance(20 * SECOND).await.unwrap();
        assert_eq!(age().await, Some(30 * SECOND), "{queue}: the pending one is older");
        claim(&client).await.complete(&j!(null)).await.unwrap();
        spawn(&client, "pending").await;
        clock.advance(10 * SECOND).await.unwrap();
        assert_eq!(age().await, Some(25 * SECOND), "{queue}: the sleeping one is older");
    }
}

/// A look at a queue tells whether a run can be claimed, when the next sleeper and the next end of a lease come, and
/// whether a task has a policy. A run that waits for ever is no trouble to it.
#[tokio::test(flavor = "multi_thread")]
async fn a_look_tells_what_is_due_and_what_comes_next() {
    let (server, clock) = server_with_a_clock().await;
    let clients = both_kinds(&server).await;
    clock.advance(Duration::ZERO).await.unwrap();
    let store = &server.app().engine().store;
    for client in clients {
        let queue = client.queue_name();
        let look = async || {
            let found = store.tick(&[queue], "tester").await.unwrap().queues.remove(0);
            assert_eq!(found.problem, None, "{queue}");
            (found.claimable, found.next_available_ms, found.next_expiry_ms, found.cancellable)
        };
        assert_eq!(look().await, (false, None, None, false), "{queue}: nothing");
        spawn(&client, "waits").await;
        claim(&client).await.await_event("s", "never", None).await.unwrap();
        assert_eq!(look().await, (false, None, None, false), "{queue}: a run that waits for ever");
        client.spawn_task("later", &j!(null), SpawnOptions::default().delay(60 * SECOND)).await.unwrap();
        assert_eq!(look().await, (false, Some(60_000), None, false), "{queue}: a sleeper");
        spawn(&client, "now").await;
        assert_eq!(look().await, (true, Some(60_000), None, false), "{queue}: and a pending run");
        let _held = claim(&client).await;
        assert_eq!(look().await, (false, Some(60_000), Some(30_000), false), "{queue}: which is claimed");
        client.spawn_task("policed", &j!(null), SpawnOptions::default().max_delay(HOUR)).await.unwrap();
        assert_eq!(look().await, (true, Some(60_000), Some(30_000), true), "{queue}: and a policy");
    }
}

// Workflow runs.

/// A workflow run has each status that it is given, cancelled too, and keeps a result and an error that later changes
/// do not name.
#[tokio::test(flavor = "multi_thread")]
async fn a_workflow_run_takes_every_status() {
    let server = Server::start().await;
    let client = server.client();
    let id = client.create_workflow_run(NewWorkflowRun::new("flow", "1")).await.unwrap();
    let json = |value: Value| Some(Json::of(&value).unwrap());
    let change = WorkflowChange { result: json(j!(7)), error: json(j!({"e": 1})), ..WorkflowChange::default() };
    assert!(client.update_workflow_run_status(id, WorkflowStatus::Failed, change).await.unwrap());
    for status in [
        WorkflowStatus::Running,
        WorkflowStatus::Cancelled,
        WorkflowStatus::Completed,
        WorkflowStatus::Failed,
        WorkflowStatus::Pending,
    ] {
        let changed = client.update_workflow_run_status(id, status, WorkflowChange::default()).await;
        assert!(changed.unwrap_or_else(|error| panic!("{status:?}: {error}")));
        let record = client.get_workflow_run(id).await.unwrap().unwrap();
        assert_eq!(record.status, status);
        let kept = (record.result.as_ref().map(Json::as_str), record.error.as_ref().map(Json::as_str));
        assert_eq!(kept, (Some("7"), Some("{\"e\": 1}")), "{status:?}");
    }
}

/// A creation that is repeated with other inputs, another version, or without inputs is refused; the same one is not.
#[tokio::test(flavor = "multi_thread")]
async fn a_workflow_run_is_not_made_again_with_other_inputs() {
    let server = Server::start().await;
    let mut grpc = server.raw().await;
    let first = pb::CreateWorkflowRunRequest {
        queue: "q".into(),
        workflow_run_id: Uuid::new_v4().to_string(),
        workflow_name: "flow".into(),
        workflow_version: "1".into(),
        inputs: json("{\"n\": 1}"),
        ..Default::default()
    };
    for _ in 0..2 {
        grpc.create_workflow_run(first.clone()).await.unwrap();
    }
    for other in [
        pb::CreateWorkflowRunRequest { inputs: json("{\"n\": 2}"), ..first.clone() },
        pb::CreateWorkflowRunRequest { inputs: None, ..first.clone() },
        pb::CreateWorkflowRunRequest { workflow_version: "2".into(), ..first },
    ] {
        let refused = grpc.create_workflow_run(other).await.unwrap_err();
        assert!(refused.message().contains("another workflow run"), "{refused}");
    }
}

/// Payloads of a workflow run that are too large for one answer are read in parts, and none takes another's place.
#[tokio::test(flavor = "multi_thread")]
async fn large_payloads_of_a_workflow_run_are_not_mixed_up() {
    const LENGTH: usize = 1_600_000;
    let server = Server::start().await;
    let client = server.client();
    let id = client.create_workflow_run(NewWorkflowRun::new("flow", "1")).await.unwrap();
    let large = |name: &str| format!("{name} = jsonb_build_object('of', '{name}', 'x', repeat('x', {LENGTH}))");
    let update = format!(
        "update absurd_server.workflow_run set {}, {}, {}, {}",
        large("tags"),
        large("inputs"),
        large("result"),
        large("error")
    );
    server.database().connect().await.batch_execute(&update).await.unwrap();
    let record = client.get_workflow_run(id).await.unwrap().unwrap();
    for (name, payload) in
        [("tags", record.tags), ("inputs", record.inputs), ("result", record.result), ("error", record.error)]
    {
        let payload: Value = payload.unwrap_or_else(|| panic!("{name} is read")).to().unwrap();
        assert_eq!((payload["of"].as_str(), payload["x"].as_str().map(str::len)), (Some(name), Some(LENGTH)));
    }
}

// Queues and their upkeep.

/// Every part of a queue's policy is read as it was set.
#[tokio::test(flavor = "multi_thread")]
async fn every_part_of_a_policy_is_read_as_it_was_set() {
    let server = Server::start().await;
    for client in both_kinds(&server).await {
        let before = client.get_queue_policy().await.unwrap();
        let parted = before.storage_mode == StorageMode::Partitioned;
        let changes = PolicyChanges {
            // Only partitioned queues may go without.
            default_partition: parted.then_some(false),
            partition_lookahead: Some(11 * DAY),
            partition_lookback: Some(12 * DAY),
            cleanup_ttl: Some(13 * DAY),
            cleanup_limit: Some(14),
            detach_mode: Some(DetachMode::Empty),
            detach_min_age: Some(15 * DAY),
        };
        let expected = QueuePolicy {
            storage_mode: before.storage_mode,
            default_partition: !parted,
            partition_lookahead: 11 * DAY,
            partition_lookback: 12 * DAY,
            cleanup_ttl: 13 * DAY,
            cleanup_limit: 14,
            detach_mode: DetachMode::Empty,
            detach_min_age: 15 * DAY,
        };
        assert_eq!(client.set_queue_policy(changes).await.unwrap(), expected);
        assert_eq!(client.get_queue_policy().await.unwrap(), expected);
        let back = PolicyChanges { detach_mode: Some(DetachMode::None), ..PolicyChanges::default() };
        let expected = QueuePolicy { detach_mode: DetachMode::None, ..expected };
        assert_eq!(client.set_queue_policy(back).await.unwrap(), expected, "nothing else changes");
    }
}

/// A queue one of whose indexes or keys would have the name of a table of an existing queue is refused, whichever
/// suffix makes it so.
#[tokio::test(flavor = "multi_thread")]
async fn a_queue_whose_indexes_have_no_room_is_refused() {
    let server = Server::start().await;
    let suffixes = ["sai", "ti", "cei", "eni", "eai", "ci", "coi", "fai", "cai", "pkey", "idempotency_key_key"];
    for suffix in suffixes {
        let name = format!("x{suffix}");
        let there = server.client().with_queue(format!("{name}_{suffix}"));
        assert!(there.create_queue().await.unwrap());
        match server.client().with_queue(name.clone()).create_queue().await {
            Ok(_) => panic!("queue {name} is created beside queue {name}_{suffix}"),
            Err(refused) => assert_eq!((refused.reason(), refused.field()), (Reason::InvalidArgument, Some("queue"))),
        }
    }
}

/// Each index of a queue that is missing is told by the doctor, and is there again when the queue is created once
/// more.
#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_is_created_again_gets_back_its_indexes() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    let store = &server.app().engine().store;
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        let storage_mode = client.get_queue_policy().await.unwrap().storage_mode;
        let options = QueueOptions { storage_mode, ..QueueOptions::default() };
        let list = "select i.relname::text
                      from pg_index x join pg_class i on i.oid = x.indexrelid join pg_class t on t.oid = x.indrelid
                     where t.relnamespace = 'absurd'::regnamespace and substr(t.relname::text, 2) = '_' || $1::text
                       and not x.indisunique
                     order by 1";
        let indexes = async || -> Vec<String> {
            sql.query(list, &[&queue]).await.unwrap().iter().map(|row| row.get(0)).collect()
        };
        let all = indexes().await;
        assert_eq!(all.len(), if storage_mode == StorageMode::Partitioned { 11 } else { 10 });
        for index in &all {
            sql.batch_execute(&format!("drop index absurd.{index}")).await.unwrap();
            let told = store.doctor_indexes().await.unwrap();
            // The registry of keys is ours alone, and the doctor looks at what the contract has.
            assert_eq!(told.len(), usize::from(!index.starts_with("i_")), "{index}");
            assert!(!client.create_queue_with(options).await.unwrap(), "{queue} is there");
            assert_eq!(indexes().await, all, "{index} is back");
        }
    }
}

/// A migration of an older contract gives queues of both kinds the indexes that they lack.
#[tokio::test(flavor = "multi_thread")]
async fn a_migration_brings_both_kinds_of_queues_up_to_date() {
    let database = Database::new().await;
    let sql = database.connect().await;
    sql.batch_execute(
        "set client_min_messages = warning;
         select absurd.create_queue('plain'), absurd.create_queue('parted', 'partitioned');
         drop index absurd.r_plain_coi, absurd.r_parted_coi;
         update absurd_server.setting set value = '1' where name = 'contract_version'",
    )
    .await
    .unwrap();
    let report = migrate::migrate(&database.url().parse().unwrap(), migrate::Options::default()).await.unwrap();
    assert!(!report.applied.is_empty(), "{report:?}");
    let there = "select count(*) from unnest(array['r_plain_coi', 'r_parted_coi']) name
                  where to_regclass('absurd.' || name) is not null";
    assert_eq!(count(&sql, there).await, 2);
}

/// A queue has its doorbell only where it hangs on both of its tables: one that was taken from either is missed, and
/// hung again.
#[tokio::test(flavor = "multi_thread")]
async fn half_a_doorbell_is_hung_again() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let sql = server.database().connect().await;
    let engine = server.app().engine();
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        let missing = async || engine.store.doorbell_missing(&[queue]).await.unwrap();
        // It is tried again where another session has the table just then.
        let hung = async || {
            eventually("it is hung", || async {
                engine.hang_doorbells(&[queue]).await;
                missing().await.is_empty().then_some(())
            })
            .await;
        };
        hung().await;
        for table in ["r", "e"] {
            let take = format!("drop trigger absurd_server_doorbell on absurd.{table}_{queue}");
            sql.batch_execute(&take).await.unwrap();
            assert_eq!(missing().await, [queue], "taken from {table}_{queue}");
            hung().await;
        }
    }
}

/// A replica that takes away what it armed takes away what is left of replicas that are gone, too, and nothing of
/// those that are alive.
#[tokio::test(flavor = "multi_thread")]
async fn what_replicas_armed_that_are_gone_is_taken_away() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let sql = server.database().connect().await;
    sql.batch_execute(
        "insert into absurd_server.replica (replica_id, seen_at)
           values ('alive', clock_timestamp()), ('gone', clock_timestamp() - interval '2 minutes');
         insert into absurd_server.armed (queue_name, replica_id)
           select 'q', replica_id from unnest(array['mine', 'alive', 'gone', 'never seen']) replica_id",
    )
    .await
    .unwrap();
    server.app().engine().store.doorbell_disarm("mine").await.unwrap();
    let left = sql.query("select replica_id from absurd_server.armed order by 1", &[]).await.unwrap();
    assert_eq!(left.iter().map(|row| row.get(0)).collect::<Vec<&str>>(), ["alive"]);
}

/// A replica that looks around renews its entry once that is older than five seconds, so that others know it to be
/// alive for 20 s from then on; after that it counts no more.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_looks_around_is_known_to_be_alive() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let sql = server.database().connect().await;
    let store = &server.app().engine().store;
    sql.batch_execute(
        "delete from absurd_server.replica;
         insert into absurd_server.replica (replica_id, seen_at)
           values ('one', clock_timestamp() - interval '12 seconds')",
    )
    .await
    .unwrap();
    store.tick(&[], "one").await.unwrap();
    let later = "update absurd_server.replica set seen_at = seen_at - interval '10 seconds' where replica_id = 'one'";
    for others in [1, 0] {
        sql.execute(later, &[]).await.unwrap();
        assert_eq!(store.tick(&[], "two").await.unwrap().others, others);
    }
}

/// A replica that stops is listed no more, nor are those that were last seen more than an hour ago.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_stops_signs_off() {
    let server = Server::start().await;
    let database = server.database().clone();
    let sql = database.connect().await;
    let listed = async || -> Vec<String> {
        let list = "select replica_id from absurd_server.replica order by seen_at";
        sql.query(list, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
    };
    let own = server.app().engine().hints.replica_id().to_owned();
    assert_eq!(listed().await, [own]);
    sql.batch_execute(
        "insert into absurd_server.replica (replica_id, seen_at)
         values ('long gone', clock_timestamp() - interval '2 hours'),
                ('gone', clock_timestamp() - interval '1 minute')",
    )
    .await
    .unwrap();
    server.stop().await;
    assert_eq!(listed().await, ["gone"]);
}

/// What is set aside is counted, task by task, while its run could still be moved on, and is forgotten when its queue
/// is dropped.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_set_aside_is_forgotten_with_its_queue() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    let store = &server.app().engine().store;
    for client in both_kinds(&server).await {
        let mut found = Vec::new();
        for _ in 0..2 {
            let spawned = client.spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap();
            found.push((spawned.run_id, "it cannot be cancelled".to_owned()));
        }
        store.quarantine_put(&scope_of(&client), Aside::Policy, &found).await.unwrap();
        store.quarantine_forget().await.unwrap();
        let counts = store.quarantine_count().await.unwrap();
        assert!(counts.contains(&(Aside::Policy, 2)), "{}: {counts:?}", client.queue_name());
        assert!(client.drop_queue().await.unwrap());
        store.quarantine_forget().await.unwrap();
        let aside = "select count(*) from absurd_server.quarantine";
        assert_eq!(count(&sql, aside).await, 0, "{} is gone", client.queue_name());
    }
}

/// A round of upkeep goes on until nothing old is left, tasks or events, batch after batch.
#[tokio::test(flavor = "multi_thread")]
async fn a_round_of_upkeep_deletes_all_that_is_old() {
    let database = Database::new().await;
    let sql = database.connect().await;
    let queue = |name: &str, mode: &str| {
        format!(
            "select absurd.create_queue('{name}', '{mode}');
             select absurd.set_queue_policy('{name}', '{{\"cleanup_ttl\": 0, \"cleanup_limit\": 3}}');"
        )
    };
    let tasks = |name: &str| {
        format!(
            "select absurd.spawn_task('{name}', 'n', 'null') from generate_series(1, 7);
             select absurd.complete_run('{name}', c.run_id) from absurd.claim_task('{name}', 'w', 30, 7) c;"
        )
    };
    let events = |name: &str| format!("select absurd.emit_event('{name}', 'e' || i) from generate_series(1, 7) i;");
    let made = [
        "set client_min_messages = warning;".to_owned(),
        queue("tasks", "unpartitioned") + &tasks("tasks"),
        queue("events", "unpartitioned") + &events("events"),
        queue("parted", "partitioned") + &tasks("parted") + &events("parted"),
    ];
    sql.batch_execute(&made.concat()).await.unwrap();
    // The first round comes after a second or two, the next one 20 s later.
    let settings = Settings { upkeep: Some(Span(Duration::from_secs(20))), ..Settings::default() };
    let options = ServerOptions { settings, without_queue: true, ..ServerOptions::default() };
    let _server = Server::start_with(database, options).await;
    for (queue, expected) in [("tasks", (7, 0)), ("events", (0, 7)), ("parted", (7, 7))] {
        let noted = "select tasks_deleted, events_deleted from absurd_server.upkeep
                      where queue_name = $1 and tasks_deleted + events_deleted > 0";
        let round: (i64, i64) = eventually("the first round is noted", || async {
            let row = sql.query_opt(noted, &[&queue]).await.unwrap()?;
            Some((row.get(0), row.get(1)))
        })
        .await;
        assert_eq!(round, expected, "tasks and events of queue {queue}");
    }
}

/// The note of a round takes away those of queues that are gone, and no other.
#[tokio::test(flavor = "multi_thread")]
async fn the_upkeep_of_queues_that_are_gone_is_forgotten() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let sql = server.database().connect().await;
    let [plain, _] = both_kinds(&server).await;
    sql.batch_execute(
        "insert into absurd_server.upkeep (queue_name, ran_at)
         select name, clock_timestamp() from unnest(array['gone', 'parted', 'plain']) name",
    )
    .await
    .unwrap();
    let round = Round { tasks: 3, ..Round::default() };
    server.app().engine().store.upkeep_note(&scope_of(&plain), &round).await.unwrap();
    let noted = sql.query("select queue_name, tasks_deleted from absurd_server.upkeep order by 1", &[]).await.unwrap();
    let noted: Vec<(&str, i64)> = noted.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(noted, [("parted", 0), ("plain", 3)]);
}

/// A partitioned queue `p` with empty partitions of January 2024, whose policy detaches what is empty and 60 days old.
async fn queue_with_old_partitions(database: &Database) -> Client {
    let sql = database.connect().await;
    sql.batch_execute(
        "set client_min_messages = warning;
         select absurd.create_queue('p', 'partitioned');
         select absurd.set_queue_policy('p', '{\"detach_mode\": \"empty\", \"detach_min_age\": \"60 days\"}');
         set absurd.fake_now = '2024-01-03'; select absurd.ensure_partitions('p'); reset absurd.fake_now",
    )
    .await
    .unwrap();
    sql
}

/// A row comes into an old partition after the look that found it empty: the partition stays attached with its row,
/// and upkeep tells why. The others go.
#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_got_a_late_row_is_not_dropped() {
    let database = Database::new().await;
    let sql = queue_with_old_partitions(&database).await;
    // The row is there as soon as the first partition, which is another table's, is detached.
    sql.batch_execute(
        "create table public.fired (at timestamptz);
         create function public.come_late() returns event_trigger language plpgsql as $$
         begin
           if not exists (select from public.fired) then
             insert into public.fired values (now());
             insert into absurd.r_p (run_id, task_id, attempt, state, available_at)
             values (absurd.uuidv7_floor('2024-01-03'), absurd.uuidv7_floor('2024-01-03'), 1, 'pending', now());
           end if;
         end $$;
         create event trigger come_late on ddl_command_end when tag in ('ALTER TABLE')
           execute function public.come_late()",
    )
    .await
    .unwrap();
    let row = sql.query_one("select partitions_dropped, problem from absurd_server.upkeep('p')", &[]).await.unwrap();
    let (dropped, problem): (i32, Option<String>) = (row.get(0), row.get(1));
    assert_eq!(problem.as_deref(), Some("detach r_p_401: it is no longer empty"), "{dropped} were dropped");
    assert_eq!(dropped, 19, "five weeks of four tables, less that one");
    assert_eq!(count(&sql, "select count(*) from only absurd.r_p_401").await, 1);
    assert_eq!(count(&sql, "select count(*) from absurd.r_p").await, 1, "it is attached");
}

/// Upkeep drops empty partitions that are as old as the policy says, and leaves younger ones.
#[tokio::test(flavor = "multi_thread")]
async fn only_partitions_that_are_old_enough_are_dropped() {
    let database = Database::new().await;
    let sql = queue_with_old_partitions(&database).await;
    sql.batch_execute(
        "select set_config('absurd.fake_now', (now() - interval '45 days')::text, false);
         select absurd.ensure_partitions('p'); reset absurd.fake_now",
    )
    .await
    .unwrap();
    let young = "select 't_p_' || absurd.partition_week_tag(now() - interval '45 days')";
    let young: String = sql.query_one(young, &[]).await.unwrap().get(0);
    let there = format!(
        "select count(*) from unnest(array['t_p_401', '{young}']) name where to_regclass('absurd.' || name) is not null"
    );
    assert_eq!(count(&sql, &there).await, 2);
    let row = sql.query_one("select partitions_dropped, problem from absurd_server.upkeep('p')", &[]).await.unwrap();
    assert_eq!((row.get::<_, i32>(0), row.get::<_, Option<&str>>(1)), (20, None), "five weeks of four tables");
    assert_eq!(count(&sql, &there).await, 1, "{young} is 45 days old");
}

/// A failed task is retried while a cleanup that has found it is still looking: the cleanup leaves it alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_cleanup_spares_a_task_that_is_retried_while_it_looks() {
    let database = Database::new().await;
    let (sql, watch) = (database.connect().await, database.connect().await);
    sql.batch_execute(
        "set client_min_messages = warning;
         create function public.hold() returns boolean language plpgsql as $$
         begin
           perform pg_advisory_lock(7);
           perform pg_advisory_unlock(7);
           return true;
         end $$",
    )
    .await
    .unwrap();
    for (queue, mode) in KINDS {
        sql.execute("select absurd.create_queue($1, $2)", &[&queue, &mode]).await.unwrap();
        let spawn = "select task_id from absurd.spawn_task($1, 'n', 'null', '{\"max_attempts\": 1}')";
        let task_id: Uuid = sql.query_one(spawn, &[&queue]).await.unwrap().get(0);
        // Whoever reads a run waits, once it has failed.
        let hold = format!(
            "select absurd.fail_run('{queue}', c.run_id, 'null') from absurd.claim_task('{queue}', 'w') c;
             alter table absurd.r_{queue} rename to held_{queue};
             create view absurd.r_{queue} as select * from absurd.held_{queue} where public.hold();
             select pg_advisory_lock(7)"
        );
        sql.batch_execute(&hold).await.unwrap();
        let cleaner = database.connect().await;
        let cleaning = tokio::spawn(async move {
            let row = cleaner.query_one("select absurd.cleanup_tasks($1, 0)", &[&queue]).await.unwrap();
            row.get::<_, i32>(0)
        });
        let looking = "select count(*) from pg_locks l join pg_database d on d.oid = l.database
                        where d.datname = current_database() and l.locktype = 'advisory' and not l.granted";
        eventually("the cleanup looks", || async { (count(&watch, looking).await > 0).then_some(()) }).await;
        sql.execute("select absurd.retry_task($1, $2)", &[&queue, &task_id]).await.unwrap();
        sql.batch_execute("select pg_advisory_unlock(7)").await.unwrap();
        assert_eq!(in_time("the cleanup ends", cleaning).await.unwrap(), 0, "{queue}");
        let retried = format!("select count(*) from absurd.t_{queue} where state = 'pending' and attempts = 2");
        assert_eq!(count(&sql, &retried).await, 1, "{queue}");
    }
}

/// Claims by SQL look at tasks with a policy 500 at a time, one call after the other: a due one behind 600 whose time
/// is far away is cancelled by the second call of a session.
#[tokio::test(flavor = "multi_thread")]
async fn claims_by_sql_find_a_due_policy_behind_many_distant_ones() {
    let database = Database::new().await;
    let sql = database.connect().await;
    sql.batch_execute("set client_min_messages = warning").await.unwrap();
    for (queue, mode) in KINDS {
        sql.execute("select absurd.create_queue($1, $2)", &[&queue, &mode]).await.unwrap();
        let spawn = |name: &str, seconds: u32, number: u32| {
            let policy = format!("{{\"cancellation\": {{\"max_delay\": {seconds}}}}}");
            format!(
                "select absurd.spawn_task('{queue}', '{name}', 'null', '{policy}') from generate_series(1, {number});"
            )
        };
        sql.batch_execute(&(spawn("distant", 1_000_000, 600) + &spawn("due", 0, 1))).await.unwrap();
        for _ in 0..2 {
            sql.execute("select absurd.claim_task($1, 'w')", &[&queue]).await.unwrap();
        }
        let due = format!("select state from absurd.t_{queue} where task_name = 'due'");
        assert_eq!(sql.query_one(&due, &[]).await.unwrap().get::<_, &str>(0), "cancelled", "{queue}");
    }
}

/// The doctor counts leases that are over for more than a minute, and tasks that lie outside all weeks of a
/// partitioned queue.
#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_counts_what_is_late_and_what_is_outside_all_weeks() {
    // Its replica looks once an hour, so that the leases stay as they are.
    let server = Server::start_on_hints(&Database::new().await).await;
    let sql = server.database().connect().await;
    let store = &server.app().engine().store;
    for client in both_kinds(&server).await {
        let queue = client.queue_name();
        for late in ["20 seconds", "10 minutes"] {
            let values = format!("now(), now(), 'w', now() - interval '{late}'");
            let columns = "available_at, started_at, claimed_by, claim_expires_at";
            store_many(&sql, queue, 1, "running", (columns, values.as_str())).await;
        }
        let outside = format!(
            "insert into absurd.t_{queue} (task_id, task_name, params, state)
             values (absurd.uuidv7_floor('2040-01-02'), 'n', 'null', 'completed')"
        );
        sql.batch_execute(&outside).await.unwrap();
        let found = store.doctor_queue(&scope_of(&client), 100).await.unwrap();
        let told = |column: &str| found[0].get::<_, i64>(column);
        let expected = (1, i64::from(queue == "parted"));
        assert_eq!((told("overdue_leases"), told("in_default_partition")), expected, "{queue}");
    }
}

/// A prepared transaction keeps dead rows as an open one does: its age is told.
#[tokio::test(flavor = "multi_thread")]
async fn the_age_of_a_prepared_transaction_is_told() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let sql = server.database().connect().await;
    // Names of prepared transactions are the cluster's.
    let name = format!("kept by {}", server.database().name());
    sql.batch_execute("begin; create table public.kept ()").await.unwrap();
    sql.batch_execute(&format!("prepare transaction '{name}'")).await.unwrap();
    let mut age = Duration::ZERO;
    for _ in 0..200 {
        age = server.app().engine().store.snapshot_age().await.unwrap();
        if age > SECOND {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // First of all, since the database cannot be dropped while it is there.
    sql.batch_execute(&format!("rollback prepared '{name}'")).await.unwrap();
    assert!(age > SECOND, "{age:?}");
}
