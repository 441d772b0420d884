//! One queue, half SQL and half gRPC: whatever happens, the tables tell a legal story in the end.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use absurd_client::{
    AbsurdClient, Awaited, ClaimedTask, Error as ClientError, NewTask, Reason, SpawnOptions, StreamOptions,
};
use absurd_tests::{Server, eventually, in_time};
use serde_json::json as j;
use tokio::task::JoinSet;
use tokio_postgres::Client;
use uuid::Uuid;

/// Tasks of the whole story.
const TASKS: usize = 4000;
/// Events that cross.
const EVENTS: u64 = 40;

/// A random source whose seed is printed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (value ^ (value >> 31)) % sides
    }
}

fn seed() -> u64 {
    let seed = std::env::var("ABSURD_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    eprintln!("ABSURD_TEST_SEED={seed}");
    seed
}

/// What the story knows from outside.
#[derive(Default)]
struct Book {
    tasks: Mutex<Vec<Uuid>>,
    /// The newest attempt whose write of a task's checkpoint was acknowledged.
    checkpoints: Mutex<HashMap<Uuid, i32>>,
    spawned: AtomicUsize,
    over: AtomicBool,
}

impl Book {
    fn note_spawned(&self, tasks: impl IntoIterator<Item = Uuid>) {
        let mut known = self.tasks.lock().unwrap();
        known.extend(tasks);
        self.spawned.store(known.len(), Ordering::Relaxed);
    }

    fn note_checkpoint(&self, task: Uuid, attempt: i32) {
        let mut known = self.checkpoints.lock().unwrap();
        let newest = known.entry(task).or_default();
        *newest = attempt.max(*newest);
    }

    fn any(&self, dice: &mut Dice) -> Option<Uuid> {
        let known = self.tasks.lock().unwrap();
        (!known.is_empty()).then(|| known[usize::try_from(dice.roll(known.len() as u64)).unwrap()])
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }
}

/// Errors that say that somebody else was faster; any other one, deadlocks above all, fails the story.
fn expected(error: &tokio_postgres::Error) -> bool {
    error.code().is_some_and(|code| ["AB001", "AB002", "P0001"].contains(&code.code()))
}

fn forgive(outcome: Result<u64, tokio_postgres::Error>) -> bool {
    match outcome {
        Ok(_) => true,
        Err(error) if expected(&error) => false,
        Err(error) => panic!("{error:?}"),
    }
}

fn forgive_client<T>(outcome: Result<T, ClientError>) -> bool {
    match outcome {
        Ok(_) => true,
        Err(error)
            if matches!(
                error.reason(),
                Reason::ClaimLost | Reason::ClaimExpired | Reason::TaskCancelled | Reason::RunNotRunning
            ) =>
        {
            false
        }
        Err(error) => panic!("{error:?}"),
    }
}

async fn produce_by_sql(sql: Client, book: Arc<Book>, mut dice: Dice) {
    for _ in 0..TASKS / 20 {
        let strategy = if dice.roll(2) == 0 { "null" } else { r#"{"kind": "fixed", "base_seconds": 0.05}"# };
        let options = if strategy == "null" {
            r#"{"max_attempts": 6}"#.to_owned()
        } else {
            format!(r#"{{"max_attempts": 6, "retry_strategy": {strategy}, "cancellation": {{"max_duration": 600}}}}"#)
        };
        let spawn = "select task_id from generate_series(1, 10), absurd.spawn_task('q', 'n', 'null', $1::text::jsonb)";
        let rows = sql.query(spawn, &[&options]).await.unwrap();
        book.note_spawned(rows.iter().map(|row| row.get::<_, Uuid>(0)));
    }
}

async fn produce_by_grpc(client: AbsurdClient, book: Arc<Book>) {
    for _ in 0..TASKS / 40 {
        let options = || SpawnOptions { max_attempts: Some(6), ..SpawnOptions::default() };
        let tasks = (0..20).map(|n| NewTask::new("n", &j!(n), options()).unwrap()).collect();
        let spawned = client.spawn_tasks(tasks).await.unwrap();
        book.note_spawned(spawned.iter().map(|spawned| spawned.task_id));
    }
}

async fn work_by_sql(sql: Client, book: Arc<Book>, mut dice: Dice) {
    let claim = "select run_id, task_id, attempt from absurd.claim_task('q', 'sql', 1, $1)";
    while !book.is_over() {
        let quantity = i32::try_from(1 + dice.roll(10)).unwrap();
        let rows = sql.query(claim, &[&quantity]).await.unwrap();
        if rows.is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        for row in rows {
            let (run, task, attempt): (Uuid, Uuid, i32) = (row.get(0), row.get(1), row.get(2));
            let what = dice.roll(20);
            if what == 0 {
                continue; // Nobody hears of it again: the lease runs out.
            }
            if what > 3 {
                let write = "select absurd.set_task_checkpoint_state('q', $1, 's', to_jsonb($2::int), $3, 2)";
                if forgive(sql.execute(write, &[&task, &attempt, &run]).await) {
                    book.note_checkpoint(task, attempt);
                }
            }
            let end = match what {
                1..=4 => "select absurd.fail_run('q', $1, '{\"message\": \"x\"}')".to_owned(),
                5 | 6 => "select absurd.schedule_run('q', $1, absurd.current_time() + interval '30 ms')".to_owned(),
                7..=10 => format!(
                    "select absurd.await_event('q', (select task_id from absurd.r_q where run_id = $1), $1, 'w{e}', 'e{e}', 1)",
                    e = dice.roll(EVENTS)
                ),
                _ => "select absurd.complete_run('q', $1, '1')".to_owned(),
            };
            forgive(sql.execute(&end, &[&run]).await);
        }
    }
}

async fn end_by_grpc(task: ClaimedTask, book: Arc<Book>, mut dice: Dice) {
    let what = dice.roll(20);
    if what == 0 {
        return; // Dropped: its lease is no longer kept and runs out.
    }
    if what > 3 && forgive_client(task.set_checkpoint("s", &j!(task.attempt)).await) {
        book.note_checkpoint(task.task_id, task.attempt);
    }
    match what {
        1..=4 => forgive_client(task.fail(&j!({"message": "x"})).await),
        5..=7 => forgive_client(task.release(Duration::from_millis(dice.roll(50))).await),
        8..=10 => {
            // Suspended, told or timed out: whoever holds the run next goes on.
            let event = dice.roll(EVENTS);
            let timeout = Some(Duration::from_millis(dice.roll(800)));
            match task.await_event(&format!("g{event}"), &format!("e{event}"), timeout).await {
                Ok(Awaited::Suspended { .. }) => true,
                Ok(Awaited::Payload(_) | Awaited::TimedOut) => forgive_client(task.complete(&j!(1)).await),
                other => forgive_client(other),
            }
        }
        _ => forgive_client(task.complete(&j!(1)).await),
    };
}

async fn work_by_grpc(client: AbsurdClient, book: Arc<Book>, mut dice: Dice) {
    let options =
        StreamOptions { max_in_flight: 20, claim_timeout: Duration::from_secs(1), ..StreamOptions::default() };
    let mut stream = client.claim_stream(options).await.unwrap();
    let mut ends = JoinSet::new();
    while !book.is_over() {
        if let Ok(Some(task)) = tokio::time::timeout(Duration::from_millis(100), stream.next()).await {
            ends.spawn(end_by_grpc(task, Arc::clone(&book), Dice(dice.roll(u64::MAX))));
        }
        while let Some(ended) = ends.try_join_next() {
            ended.unwrap();
        }
    }
    while let Some(ended) = ends.join_next().await {
        ended.unwrap();
    }
}

async fn disturb(sql: Client, client: AbsurdClient, book: Arc<Book>, mut dice: Dice) {
    while !book.is_over() {
        match dice.roll(4) {
            0 => {
                // The first emission wins for ever, so events come and go.
                let event = format!("e{}", dice.roll(EVENTS));
                if dice.roll(2) == 0 {
                    forgive_client(client.emit_event(&event, &j!(1)).await);
                } else {
                    forgive(sql.execute("select absurd.emit_event('q', $1, '1')", &[&event]).await);
                }
            }
            1 => {
                forgive(sql.execute("select absurd.cleanup_events('q', 1, 5)", &[]).await);
            }
            2 => {
                if let Some(task) = book.any(&mut dice) {
                    forgive(sql.execute("select absurd.cancel_task('q', $1)", &[&task]).await);
                }
            }
            _ => {
                if let Some(task) = book.any(&mut dice) {
                    forgive_client(client.cancel_task_by_id(task).await);
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Things that must not be in the tables, each with how often it is there.
const ILLEGAL: &str = "
    select 'tasks that have not ended', count(*) from absurd.t_q where state not in ('completed', 'failed', 'cancelled')
    union all select 'runs that have not ended', count(*) from absurd.r_q
               where state not in ('completed', 'failed', 'cancelled')
    union all select 'attempts with gaps', count(*) from (
        select task_id from absurd.r_q group by task_id
        having min(attempt) <> 1 or max(attempt) <> count(*) or count(distinct attempt) <> count(*)) x
    union all select 'tasks whose counter is wrong', count(*) from absurd.t_q t
               where t.attempts <> (select max(attempt) from absurd.r_q r where r.task_id = t.task_id)
    union all select 'tasks that point to an old run', count(*) from absurd.t_q t join absurd.r_q r on r.run_id = t.last_attempt_run
               where r.attempt <> t.attempts
    union all select 'tasks without a run', count(*) from absurd.t_q t
               where not exists (select from absurd.r_q r where r.run_id = t.last_attempt_run and r.task_id = t.task_id)
    union all select 'tasks that ended otherwise than their last run', count(*) from absurd.t_q t
                join absurd.r_q r on r.run_id = t.last_attempt_run
               where t.state <> r.state and not (t.state = 'cancelled' and r.state = 'failed')
    union all select 'tasks that were completed twice', count(*) from (
        select task_id from absurd.r_q where state = 'completed' group by task_id having count(*) > 1) x
    union all select 'completed tasks without their result', count(*) from absurd.t_q t
               where t.state = 'completed' and t.completed_payload is distinct from '1'
    union all select 'older runs that did not fail', count(*) from absurd.r_q r join absurd.t_q t using (task_id)
               where r.attempt < t.attempts and r.state <> 'failed'
    union all select 'waits of nobody', count(*) from absurd.w_q
    union all select 'failed tasks with attempts left', count(*) from absurd.t_q where state = 'failed' and attempts < max_attempts
    union all select 'deadlocks', deadlocks from pg_stat_database where datname = current_database()";

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn thousands_of_tasks_by_sql_and_grpc_end_legally() {
    let mut dice = Dice(seed());
    let server = Server::start().await;
    let book = Arc::new(Book::default());
    let mut all = JoinSet::new();
    for _ in 0..4 {
        all.spawn(work_by_sql(server.database().connect().await, Arc::clone(&book), Dice(dice.roll(u64::MAX))));
        all.spawn(work_by_grpc(server.client(), Arc::clone(&book), Dice(dice.roll(u64::MAX))));
    }
    let sql = server.database().connect().await;
    all.spawn(disturb(sql, server.client(), Arc::clone(&book), Dice(dice.roll(u64::MAX))));
    let sql = server.database().connect().await;
    let producing = tokio::spawn(produce_by_sql(sql, Arc::clone(&book), Dice(dice.roll(u64::MAX))));
    produce_by_grpc(server.client(), Arc::clone(&book)).await;
    in_time("all are spawned", producing).await.unwrap();
    assert_eq!(book.spawned.load(Ordering::Relaxed), TASKS);

    let sql = server.database().connect().await;
    eventually("every task has ended", || async {
        // A worker that failed the story tells why.
        let live = "select count(*) from absurd.t_q where state in ('pending', 'running', 'sleeping')";
        (sql.query_one(live, &[]).await.unwrap().get::<_, i64>(0) == 0).then_some(())
    })
    .await;
    book.over.store(true, Ordering::Relaxed);
    while let Some(part) = in_time("all parts end", all.join_next()).await {
        part.unwrap();
    }
    for row in sql.query(ILLEGAL, &[]).await.unwrap() {
        assert_eq!(row.get::<_, i64>(1), 0, "{}", row.get::<_, &str>(0));
    }
    let acknowledged = book.checkpoints.lock().unwrap().clone();
    assert!(acknowledged.len() > TASKS / 2, "{}", acknowledged.len());
    let rows = sql.query("select task_id, state::int from absurd.c_q where checkpoint_name = 's'", &[]).await.unwrap();
    let stored: HashMap<Uuid, i32> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    for (task, attempt) in acknowledged {
        assert!(
            stored.get(&task).is_some_and(|stored| *stored >= attempt),
            "{task}: attempt {attempt} was acknowledged"
        );
    }
    // The story would prove nothing if nothing had happened in it.
    let happened = "select count(*) filter (where state = 'completed'), count(*) filter (where state = 'cancelled'),
                           count(*) filter (where attempts > 1) from absurd.t_q";
    let row = sql.query_one(happened, &[]).await.unwrap();
    let [completed, cancelled, retried] = [0, 1, 2].map(|column| row.get::<_, i64>(column));
    assert!(completed > 1000 && cancelled > 10 && retried > 300, "{completed} {cancelled} {retried}");
}

/// Everybody on the same five tasks at once: every function of the contract and every write of the server, in random order.
/// A broken lock order (`ARCHITECTURE.md`) would show as a deadlock.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nobody_deadlocks_on_the_same_tasks() {
    let mut dice = Dice(seed());
    let server = Server::start().await;
    let client = server.client();
    let options = || SpawnOptions { max_attempts: Some(1000), ..SpawnOptions::default() };
    let tasks = (0..5).map(|n| NewTask::new("n", &j!(n), options()).unwrap()).collect();
    let tasks: Arc<Vec<Uuid>> = Arc::new(client.spawn_tasks(tasks).await.unwrap().iter().map(|t| t.task_id).collect());
    let mut all = JoinSet::new();
    for _ in 0..12 {
        let (sql, client) = (server.database().connect().await, client.clone());
        let (tasks, mut dice) = (Arc::clone(&tasks), Dice(dice.roll(u64::MAX)));
        all.spawn(async move {
            for _ in 0..300 {
                let task = tasks[usize::try_from(dice.roll(5)).unwrap()];
                let event = dice.roll(3);
                let run = "(select r.run_id from absurd.r_q r where r.task_id = $1 order by r.attempt desc limit 1)";
                let statement = match dice.roll(13) {
                    0 => "select count(*) from absurd.claim_task('q', $1::uuid::text, 1, 3)".to_owned(),
                    1 => format!("select absurd.complete_run('q', {run}, '1')"),
                    2 => format!("select absurd.fail_run('q', {run}, '1')"),
                    3 => format!("select absurd.schedule_run('q', {run}, now())"),
                    4 => format!("select absurd.extend_claim('q', {run}, 1)"),
                    5 => format!("select absurd.set_task_checkpoint_state('q', $1, 's', '1', {run}, 1)"),
                    6 => format!("select absurd.await_event('q', $1, {run}, 'w{event}', 'e{event}', 1)"),
                    7 => format!("select absurd.emit_event('q', 'e{event}', '1'), $1::uuid"),
                    8 => "select absurd.cleanup_events('q', 0, 1), $1::uuid".to_owned(),
                    9 if dice.roll(10) == 0 => "select absurd.cancel_task('q', $1)".to_owned(),
                    // Whatever has ended lives again.
                    9 => "with revived as (update absurd.t_q set state = 'failed' where task_id = $1
                             and state in ('completed', 'cancelled') returning 1)
                          select absurd.retry_task('q', $1) where not exists (select from revived)"
                        .to_owned(),
                    10 => {
                        let claimed =
                            client.claim_task(absurd_client::ClaimOptions { qty: 2, ..Default::default() }).await;
                        for task in claimed.unwrap() {
                            match dice.roll(4) {
                                0 => forgive_client(task.complete(&j!(1)).await),
                                1 => forgive_client(task.fail(&j!(1)).await),
                                2 => forgive_client(task.release(Duration::ZERO).await),
                                _ => forgive_client(task.set_checkpoint("s", &j!(1)).await),
                            };
                        }
                        continue;
                    }
                    11 => {
                        forgive_client(client.cancel_task_by_id(task).await);
                        continue;
                    }
                    _ => {
                        let retried = client.retry_task(task, absurd_client::RetryOptions::default()).await;
                        if let Err(error) = retried {
                            assert_eq!(error.reason(), Reason::TaskNotFailed, "{error:?}");
                        }
                        continue;
                    }
                };
                forgive(sql.execute(&statement, &[&task]).await);
            }
        });
    }
    while let Some(part) = in_time("all parts end", all.join_next()).await {
        part.unwrap();
    }
    let sql = server.database().connect().await;
    let deadlocks = "select deadlocks from pg_stat_database where datname = current_database()";
    assert_eq!(sql.query_one(deadlocks, &[]).await.unwrap().get::<_, i64>(0), 0);
    let live = "select count(*) from (select task_id from absurd.r_q where state in ('pending', 'running', 'sleeping')
                 group by task_id having count(*) > 1) x";
    assert_eq!(sql.query_one(live, &[]).await.unwrap().get::<_, i64>(0), 0, "at most one live run per task");
}
