//! Differences between our SQL functions and upstream's (`docs/storage.md`), where the storage contract leaves room.
//! Every story is told twice: it must go well on our database and badly on upstream's, so that a test cannot pass by
//! itself.

use absurd_tests::{Database, eventually, in_time};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Error};
use uuid::Uuid;

/// Runs a story on our database and on upstream's.
macro_rules! better {
    ($($(#[$doc:meta])* $name:ident = $story:ident;)*) => {
        $(
            $(#[$doc])*
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                assert!($story(&Database::new().await).await, "it must go well on our database");
                assert!(!$story(&Database::upstream("0.5.1").await).await, "it would go well by itself: the story proves nothing");
            }
        )*
    };
}

better! {
    /// A policy whose value is no whole number counts as absent.
    a_malformed_cancellation_policy_stops_nobody = malformed_policy;
    /// The write waits for the lock of its run, and is refused with `AB002`.
    a_late_checkpoint_cannot_slip_past_the_failure_of_its_run = late_checkpoint;
    /// The retry has not committed when the cleanup begins.
    cleanup_spares_a_task_that_is_just_retried = cleanup_and_retry;
    /// The emission has not committed when the cleanup begins.
    cleanup_spares_an_event_that_is_just_emitted = cleanup_and_emit;
    /// A waiter that loses its placeholder makes it anew.
    no_wake_up_is_lost_when_cleanup_takes_a_placeholder = cleanup_and_await;
    /// 100 years have more seconds than an `integer` holds.
    a_policy_of_a_century_stops_no_cleanup = century;
    /// A week whose rows lie in the default partition is skipped.
    rows_in_the_default_partition_stop_no_upkeep = default_partition;
    /// The session is in Europe/Berlin, and the clock changes within the window.
    weeks_are_utc_whatever_the_sessions_time_zone = summer_time;
    /// Another session has spawned a task and has not committed.
    creating_a_queue_that_exists_waits_for_nobody = create_again;
    /// The history grows by 20,000 completed tasks with a cancellation policy.
    a_claim_does_not_grow_with_the_history_of_policies = claim_history;
    /// The backlog grows by 60,000 pending tasks.
    a_claim_does_not_grow_with_the_backlog = claim_backlog;
    /// The history grows by 60,000 completed tasks.
    cleanup_does_not_grow_with_the_history = cleanup_history;
}

async fn queue(database: &Database) -> Client {
    let sql = database.connect().await;
    sql.batch_execute("set client_min_messages = error; select absurd.create_queue('q')").await.unwrap();
    sql
}

async fn one<T: for<'a> tokio_postgres::types::FromSql<'a>>(sql: &Client, query: &str) -> T {
    sql.query_one(query, &[]).await.unwrap_or_else(|error| panic!("{query}: {error:?}")).get(0)
}

/// Runs something in a session of its own, up to its end or to a lock that it waits for.
async fn started(database: &Database, work: String) -> JoinHandle<Result<(), Error>> {
    let sql = database.connect().await;
    let pid: i32 = one(&sql, "select pg_backend_pid()").await;
    let running = tokio::spawn(async move { sql.batch_execute(&work).await });
    let watch = database.connect().await;
    eventually("it ends or waits", || async {
        let waits = "select exists (select from pg_stat_activity where pid = $1 and wait_event_type = 'Lock')";
        let waits: bool = watch.query_one(waits, &[&pid]).await.unwrap().get(0);
        (running.is_finished() || waits).then_some(())
    })
    .await;
    running
}

async fn malformed_policy(database: &Database) -> bool {
    let sql = queue(database).await;
    for policy in [r#"{"max_delay": 1.5}"#, r#"{"max_duration": "soon"}"#, r#"{"max_delay": 1e30}"#] {
        let options = format!(r#"{{"cancellation": {policy}, "max_attempts": 2}}"#);
        sql.execute("select absurd.spawn_task('q', 'n', 'null', $1::text::jsonb)", &[&options]).await.unwrap();
    }
    for _ in 0..3 {
        let fail = "select absurd.fail_run('q', c.run_id, 'null') from absurd.claim_task('q', 'w', 30, 1) c";
        if sql.execute(fail, &[]).await.is_err() {
            return false;
        }
    }
    one::<i64>(&sql, "select count(*) from absurd.t_q where state = 'pending' and attempts = 2").await == 3
}

async fn late_checkpoint(database: &Database) -> bool {
    let sql = queue(database).await;
    let task: Uuid = one(&sql, "select task_id from absurd.spawn_task('q', 'n', 'null')").await;
    let run: Uuid = one(&sql, "select run_id from absurd.claim_task('q', 'w')").await;
    sql.batch_execute(&format!("begin; select absurd.fail_run('q', '{run}', 'null')")).await.unwrap();
    let write = format!("select absurd.set_task_checkpoint_state('q', '{task}', 's', '1', '{run}')");
    let writer = started(database, write).await;
    sql.batch_execute("commit").await.unwrap();
    let refused = in_time("the writer hears", writer).await.unwrap();
    refused.is_err_and(|error| error.code().is_some_and(|code| code.code() == "AB002"))
}

async fn cleanup_and_retry(database: &Database) -> bool {
    let sql = queue(database).await;
    let task: Uuid =
        one(&sql, r#"select task_id from absurd.spawn_task('q', 'n', 'null', '{"max_attempts": 1}')"#).await;
    sql.batch_execute("select absurd.fail_run('q', c.run_id, 'null') from absurd.claim_task('q', 'w') c")
        .await
        .unwrap();
    sql.batch_execute(&format!("begin; select absurd.retry_task('q', '{task}')")).await.unwrap();
    let cleanup = started(database, "select absurd.cleanup_tasks('q', 0)".into()).await;
    sql.batch_execute("commit").await.unwrap();
    in_time("the cleanup ends", cleanup).await.unwrap().unwrap();
    one::<i64>(&sql, "select count(*) from absurd.claim_task('q', 'w')").await == 1
}

async fn cleanup_and_emit(database: &Database) -> bool {
    let sql = queue(database).await;
    sql.batch_execute("insert into absurd.e_q (event_name, emitted_at) values ('e', 'epoch')").await.unwrap();
    sql.batch_execute("begin; select absurd.emit_event('q', 'e', '1')").await.unwrap();
    let cleanup = started(database, "select absurd.cleanup_events('q', 0)".into()).await;
    sql.batch_execute("commit").await.unwrap();
    in_time("the cleanup ends", cleanup).await.unwrap().unwrap();
    one::<i64>(&sql, "select count(*) from absurd.e_q where payload = '1'").await == 1
}

/// The awaiter is held up between its placeholder and its lock, by a trigger; the cleanup takes the placeholder in
/// between, and somebody emits the event before the awaiter has committed.
async fn cleanup_and_await(database: &Database) -> bool {
    let sql = queue(database).await;
    let task: Uuid = one(&sql, "select task_id from absurd.spawn_task('q', 'n', 'null')").await;
    let run: Uuid = one(&sql, "select run_id from absurd.claim_task('q', 'w')").await;
    sql.batch_execute(
        "insert into absurd.e_q (event_name, emitted_at) values ('e', 'epoch');
         create function hold() returns trigger language plpgsql as $$
           begin perform pg_advisory_lock(7); perform pg_advisory_unlock(7); return null; end $$;
         create trigger hold after insert on absurd.e_q for each statement execute function hold();
         select pg_advisory_lock(7)",
    )
    .await
    .unwrap();
    let waiting = database.connect().await;
    waiting.batch_execute("begin").await.unwrap();
    let awaiter = tokio::spawn(async move {
        waiting.batch_execute(&format!("select absurd.await_event('q', '{task}', '{run}', 's', 'e')")).await.unwrap();
        waiting
    });
    eventually("the awaiter is held up", || async {
        let held = "select exists (select from pg_locks where locktype = 'advisory' and not granted)";
        one::<bool>(&sql, held).await.then_some(())
    })
    .await;
    sql.batch_execute("select absurd.cleanup_events('q', 0); drop trigger if exists none on absurd.e_q").await.unwrap();
    sql.batch_execute("select pg_advisory_unlock(7)").await.unwrap();
    let waiting = in_time("the awaiter waits for its event", awaiter).await.unwrap();
    let emitter = started(database, "select absurd.emit_event('q', 'e', '1')".into()).await;
    waiting.batch_execute("commit").await.unwrap();
    in_time("the event is emitted", emitter).await.unwrap().unwrap();
    one::<i64>(&sql, "select count(*) from absurd.claim_task('q', 'w')").await == 1
}

async fn century(database: &Database) -> bool {
    let sql = queue(database).await;
    sql.batch_execute("select absurd.set_queue_policy('q', '{\"cleanup_ttl\": \"100 years\"}')").await.unwrap();
    sql.batch_execute("select absurd.cleanup_all_queues()").await.is_ok()
}

async fn default_partition(database: &Database) -> bool {
    let sql = queue(database).await;
    sql.batch_execute("select absurd.create_queue('p', 'partitioned')").await.unwrap();
    // A task of a week for which there is no partition yet.
    sql.batch_execute(
        "insert into absurd.t_p (task_id, task_name, params, state)
         values (absurd.uuidv7_floor('2040-01-02'), 'n', 'null', 'pending'); set absurd.fake_now = '2040-01-02'",
    )
    .await
    .unwrap();
    sql.batch_execute("select absurd.ensure_partitions(); select absurd.create_queue('p', 'partitioned')").await.is_ok()
}

async fn summer_time(database: &Database) -> bool {
    let sql = queue(database).await;
    sql.batch_execute(
        "set time zone 'Europe/Berlin'; set absurd.fake_now = '2026-03-20'; select absurd.create_queue('p', 'partitioned')",
    )
    .await
    .unwrap();
    // The first twelve digits of a bound are its milliseconds; a Monday of UTC lies four days after 1970-01-01.
    let wrong = "select count(*) from (
        select b.start, b.bound, lead(b.start) over (order by b.start) as next,
               ('x' || lpad(replace(left(b.start, 13), '-', ''), 16, '0'))::bit(64)::bigint as ms
          from pg_inherits i join pg_class c on c.oid = i.inhrelid,
               lateral (select (regexp_matches(pg_get_expr(c.relpartbound, c.oid), 'FROM \\(''(.*?)''\\)'))[1] as start,
                               (regexp_matches(pg_get_expr(c.relpartbound, c.oid), 'TO \\(''(.*?)''\\)'))[1] as bound) b
         where i.inhparent = 'absurd.t_p'::regclass) w
      where w.bound <> w.next or (w.ms - 345600000) % 604800000 <> 0";
    one::<i64>(&sql, wrong).await == 0
}

async fn create_again(database: &Database) -> bool {
    let sql = queue(database).await;
    sql.batch_execute("begin; select absurd.spawn_task('q', 'n', 'null')").await.unwrap();
    let other = database.connect().await;
    other.batch_execute("set lock_timeout = '500ms'; select absurd.create_queue('q')").await.is_ok()
}

/// Pages that a statement touches, those of the functions that it calls included: the most of several runs, after one that
/// does not count, since it looks things up that are only looked up once.
async fn pages(sql: &Client, statement: &str) -> i64 {
    let mut most = 0;
    for run in 0..4 {
        let explain = format!("explain (analyze, buffers, format json) {statement}");
        let plan: serde_json::Value = serde_json::from_str(&one::<Json>(sql, &explain).await.0).unwrap();
        let count = |name: &str| plan[0]["Plan"][name].as_i64().unwrap();
        if run > 0 {
            most = most.max(count("Shared Hit Blocks") + count("Shared Read Blocks"));
        }
    }
    most
}

/// The text of a json value.
struct Json(String);

impl<'a> tokio_postgres::types::FromSql<'a> for Json {
    fn from_sql(
        _: &tokio_postgres::types::Type,
        raw: &'a [u8],
    ) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Self(String::from_utf8(raw.to_vec())?))
    }

    fn accepts(kind: &tokio_postgres::types::Type) -> bool {
        *kind == tokio_postgres::types::Type::JSON
    }
}

/// How many times more pages a statement touches after more rows have come.
async fn growth(sql: &Client, statement: &str, more: &str) -> f64 {
    let small = pages(sql, statement).await;
    sql.batch_execute(more).await.unwrap();
    sql.batch_execute("analyze absurd.t_q; analyze absurd.r_q; analyze absurd.w_q; analyze absurd.c_q").await.unwrap();
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let growth = pages(sql, statement).await as f64 / small as f64;
    eprintln!("{statement}: {small} pages at first, {growth:.1} times as many later");
    growth
}

/// Finished tasks, as they lie there after years.
fn finished(count: u32, cancellation: &str) -> String {
    format!(
        "with ids as (select absurd.portable_uuidv7() as task, absurd.portable_uuidv7() as run from generate_series(1, {count})),
         runs as (insert into absurd.r_q (run_id, task_id, attempt, state, available_at, completed_at)
                  select run, task, 1, 'completed', now() - interval '1 hour', now() - interval '1 hour' from ids)
         insert into absurd.t_q (task_id, task_name, params, state, attempts, last_attempt_run, cancellation, first_started_at)
         select task, 'n', 'null', 'completed', 1, run, {cancellation}, now() from ids"
    )
}

async fn claim_history(database: &Database) -> bool {
    let sql = queue(database).await;
    let policy = "'{\"max_duration\": 3600}'::jsonb";
    sql.batch_execute(&finished(1000, policy)).await.unwrap();
    growth(&sql, "select absurd.claim_task('q', 'w')", &finished(20_000, policy)).await < 2.5
}

/// Tasks that wait.
fn pending(count: u32) -> String {
    format!(
        "with ids as (select absurd.portable_uuidv7() as task, absurd.portable_uuidv7() as run, g from generate_series(1, {count}) g),
         runs as (insert into absurd.r_q (run_id, task_id, attempt, state, available_at)
                  select run, task, 1, 'pending', now() - interval '1 hour' + g * interval '1 millisecond' from ids)
         insert into absurd.t_q (task_id, task_name, params, state, attempts, last_attempt_run)
         select task, 'n', 'null', 'pending', 1, run from ids"
    )
}

async fn claim_backlog(database: &Database) -> bool {
    let sql = queue(database).await;
    sql.batch_execute(&pending(200)).await.unwrap();
    growth(&sql, "select absurd.claim_task('q', 'w')", &pending(60_000)).await < 2.5
}

async fn cleanup_history(database: &Database) -> bool {
    let sql = queue(database).await;
    sql.batch_execute(&finished(500, "null")).await.unwrap();
    let cleanup = "select absurd.cleanup_tasks('q', 60, 50)";
    let few = pages(&sql, cleanup).await;
    let grown = growth(&sql, cleanup, &finished(60_000, "null")).await;
    eprintln!("{few} pages without statistics");
    // Some 24 pages for each that goes, whatever the statistics say: a walk over the history would be thousands.
    grown < 2.5 && few < 1500
}
