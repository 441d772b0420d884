//! Plans of the hot statements, as Postgres ran them for a server at work on a queue with a backlog and a history.
//!
//! `ABSURD_TEST_ROWS` sets how many tasks wait and how many have ended (100,000 each unless told otherwise);
//! `ABSURD_TEST_UPDATE=1` writes the shapes in `tests/it/plans/` anew.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use absurd_client::{ClaimOptions, ListOptions, NewTask, RetryOptions, SpawnOptions, StreamOptions};
use absurd_tests::{OwnCluster, Server, eventually, in_time, root};
use serde_json::{Value, json as j};

/// Pages that a statement may touch per row that it takes, and beside that.
const PAGES_PER_ROW: u64 = 50;
/// The release of Postgres whose shapes are in the tree.
const SHAPES_OF: &str = "15";

/// Statements that the story below cannot do without, and whose shapes are in the tree.
const HOT: &[&str] = &[
    "checkpoint_list",
    "checkpoint_put",
    "run_claim",
    "run_claim_named",
    "run_complete",
    "run_extend",
    "run_fail",
    "run_get",
    "run_release",
    "task_cancel",
    "task_find",
    "task_get",
    "task_result",
    "task_spawn",
    "task_spawn_claimed",
];
/// Statements of the tick and of checks, which may fall into the story or not.
const WARM: &[&str] = &["run_check", "run_list_expired", "task_list_cancellable", "tick"];

/// One execution.
#[derive(Debug)]
struct Ran {
    name: String,
    /// The first one of its session, which looks the tables up.
    first: bool,
    pages: u64,
    rows: u64,
    shape: String,
}

fn count(plan: &Value, name: &str) -> u64 {
    plan[name].as_f64().map_or(0, |value| format!("{value:.0}").parse().unwrap())
}

fn children(plan: &Value) -> &[Value] {
    plan["Plans"].as_array().map_or(&[], Vec::as_slice)
}

/// Rows that were taken: what was locked, written or returned.
fn rows(plan: &Value) -> u64 {
    let own = count(plan, "Actual Rows") * count(plan, "Actual Loops");
    let taken = match plan["Node Type"].as_str() {
        Some("LockRows") => own,
        Some("ModifyTable") => {
            children(plan).iter().map(|child| count(child, "Actual Rows") * count(child, "Actual Loops")).sum()
        }
        _ => 0,
    };
    children(plan).iter().map(rows).max().unwrap_or(0).max(taken)
}

fn shape(plan: &Value, depth: usize, out: &mut String) {
    let text = |name: &str| plan[name].as_str().map(str::to_owned).unwrap_or_default();
    let mut line = text("Node Type");
    for (name, before) in
        [("Operation", " "), ("Index Name", " using "), ("Relation Name", " on "), ("CTE Name", " of ")]
    {
        if !text(name).is_empty() {
            let _ = write!(line, "{before}{}", text(name));
        }
    }
    let _ = writeln!(out, "{:width$}{line}", "", width = depth * 2);
    for child in children(plan) {
        shape(child, depth + 1, out);
    }
}

/// What the log of the server's Postgres says of statements that have a name.
fn executions(log: &str) -> Vec<Ran> {
    let mut found = Vec::new();
    let mut known = HashSet::new();
    let entries: Vec<&str> = log.split(" ms  plan:\n").collect();
    for (before, entry) in entries.iter().zip(entries.iter().skip(1)) {
        let session = before.rsplit_once("] LOG:").and_then(|(line, _)| Some(line.rsplit_once('[')?.1.to_owned()));
        let text: String = entry.lines().take_while(|line| line.starts_with('\t')).collect::<Vec<_>>().join("\n");
        let Ok(plan) = serde_json::from_str::<Value>(&text) else { continue };
        let query = plan["Query Text"].as_str().unwrap_or_default();
        let Some(name) = query.strip_prefix("-- ").and_then(|rest| rest.lines().next()) else { continue };
        let top = &plan["Plan"];
        let mut tree = String::new();
        shape(top, 0, &mut tree);
        let rows = rows(top).max(count(top, "Actual Rows"));
        // A tick looks up the tables of each queue when it first sees it.
        let queues = if name == "tick" { rows } else { 0 };
        found.push(Ran {
            name: name.to_owned(),
            first: known.insert((session, name.to_owned(), queues)),
            pages: count(top, "Shared Hit Blocks") + count(top, "Shared Read Blocks"),
            rows,
            shape: tree,
        });
    }
    found
}

fn load(count: usize) -> String {
    let half = |state: &str, at: &str, cancellation: &str| {
        let ended = if state == "completed" { "now()" } else { "null" };
        format!(
            "with ids as materialized (
               select absurd.portable_uuidv7() as task, absurd.portable_uuidv7() as run, i from generate_series(1, {count}) i),
             runs as (insert into absurd.r_q (run_id, task_id, attempt, state, available_at, completed_at)
                      select run, task, 1, '{state}', {at} + i * interval '1 ms', {ended} from ids)
             insert into absurd.t_q (task_id, task_name, params, state, attempts, last_attempt_run, cancellation)
             select task, 'n', 'null', '{state}', 1, run, {cancellation} from ids;"
        )
    };
    half("completed", "now() - interval '2 days'", "case when i % 100 = 0 then '{\"max_duration\": 99999}'::jsonb end")
        + &half("pending", "now() - interval '1 day'", "null")
        + "insert into absurd.c_q (task_id, checkpoint_name, state)
             select task_id, 'c' || g, '1' from (select task_id from absurd.t_q limit 10000) t, generate_series(1, 3) g"
}

/// A server at work: everything that clients do all the time, a few times over.
async fn work(server: &Server) {
    let client = server.client();
    let options = StreamOptions { max_in_flight: 40, ..StreamOptions::default() };
    let mut stream = client.claim_stream(options).await.unwrap();
    for round in 0..60 {
        let task = in_time("a task", stream.next()).await.unwrap();
        match round % 6 {
            0 => task.set_checkpoint("c", &j!(1)).await.unwrap(),
            1 => drop(client.extend_claim(task.run_id, Duration::from_secs(60)).await.unwrap()),
            2 => {
                client.get_task_status(task.task_id).await.unwrap();
                client.get_run_status(task.run_id).await.unwrap();
                client.get_task_result(task.task_id).await.unwrap();
            }
            3 => {
                task.fail(&j!({"message": "x"})).await.unwrap();
                continue;
            }
            4 => {
                // The first ones come back at once, and have their checkpoints read.
                let delay = if round < 12 { Duration::ZERO } else { Duration::from_secs(3600) };
                task.set_checkpoint("before", &j!(1)).await.unwrap();
                task.release(delay).await.unwrap();
                continue;
            }
            _ => drop(client.cancel_task_by_id(task.task_id).await.unwrap()),
        }
        if round % 6 < 3 {
            task.complete(&j!(1)).await.unwrap();
        }
    }
    let named = ClaimOptions { qty: 3, task_names: vec!["n".into()], ..ClaimOptions::default() };
    assert_eq!(client.claim_task(named).await.unwrap().len(), 3);
    let new = |key: Option<&str>| {
        let options = SpawnOptions { idempotency_key: key.map(str::to_owned), ..SpawnOptions::default() };
        NewTask::new("n", &j!(1), options).unwrap()
    };
    client.spawn_tasks((0..100).map(|_| new(None)).collect()).await.unwrap();
    client.spawn_new_task(new(Some("k"))).await.unwrap();
    client.spawn_new_task(new(Some("k"))).await.unwrap();
    client.list_tasks(ListOptions::default()).await.unwrap();
    let failed = client
        .list_tasks(ListOptions { state: Some(absurd_client::State::Failed), page_size: 1, ..Default::default() })
        .await
        .unwrap();
    if let Some(task) = failed.items.first() {
        client.retry_task(task.task_id, RetryOptions::default()).await.unwrap();
    }
    stream.close(Duration::from_secs(5)).await.unwrap();
}

/// Tasks that a worker waits for.
async fn hand_over(server: &Server) {
    let client = server.client().with_queue("waited_for");
    client.create_queue().await.unwrap();
    let mut stream = client.claim_stream(StreamOptions::default()).await.unwrap();
    let sql = server.database().connect().await;
    let mut handed = 0;
    while handed < 10 {
        client.spawn_task("n", &j!(1), SpawnOptions::default()).await.unwrap();
        in_time("a task", stream.next()).await.unwrap().complete(&j!(1)).await.unwrap();
        let count = sql.query_one("select count(*) from absurd.r_waited_for where started_at = created_at", &[]);
        handed = count.await.unwrap().get::<_, i64>(0);
    }
    stream.close(Duration::from_secs(5)).await.unwrap();
}

fn log_length(log: &Path) -> usize {
    usize::try_from(std::fs::metadata(log).unwrap().len()).unwrap()
}

/// What Postgres has logged since, once that holds the text.
async fn logged(log: &Path, since: usize, until: &str) -> String {
    eventually("the log is complete", || async {
        let text = std::fs::read(log).ok()?;
        let text = String::from_utf8_lossy(&text[since..]).into_owned();
        text.contains(until).then_some(text)
    })
    .await
}

/// The worst execution of each statement, those left out that were the first of their session.
async fn worst(analyzed: bool) -> (String, BTreeMap<String, Ran>) {
    let mut cluster = OwnCluster::start(&[
        "session_preload_libraries=auto_explain",
        "auto_explain.log_min_duration=0",
        "auto_explain.log_analyze=on",
        "auto_explain.log_buffers=on",
        "auto_explain.log_timing=off",
        "auto_explain.log_format=json",
        "autovacuum=off",
    ])
    .await;
    let database = cluster.database().await;
    let server = Server::start_on(&database).await;
    let sql = database.connect().await;
    let rows = std::env::var("ABSURD_TEST_ROWS").ok().and_then(|rows| rows.parse().ok()).unwrap_or(100_000);
    // The server's sessions have made their plans for an empty queue by now.
    work_a_little(&server).await;
    sql.batch_execute(&load(rows)).await.unwrap();
    if analyzed {
        sql.batch_execute("analyze absurd.t_q; analyze absurd.r_q; analyze absurd.c_q").await.unwrap();
    }
    let log = cluster.log();
    let before = log_length(&log);
    in_time("the work is done", work(&server)).await;
    server.stop().await;
    let worked = executions(&logged(&log, before, "-- task_list").await);
    // Sessions of their own: a new queue makes all others look their tables up again. Only the hand-over counts: the
    // queue is new, and what else runs there is seen above with a backlog.
    let server = Server::start_on(&database).await;
    let before = log_length(&log);
    in_time("tasks are handed over", hand_over(&server)).await;
    server.stop().await;
    let handed = executions(&logged(&log, before, "-- task_spawn_claimed").await);
    let handed = handed.into_iter().filter(|ran| ran.name == "task_spawn_claimed");
    let version = cluster.version();
    cluster.stop().await;
    let mut worst: BTreeMap<String, Ran> = BTreeMap::new();
    let mut executions: Vec<_> = worked.into_iter().chain(handed).collect();
    executions.sort_by_key(|ran| ran.first);
    for ran in executions.into_iter().filter(|ran| [HOT, WARM].concat().contains(&ran.name.as_str())) {
        // What was only ever the first of its session still counts, where the story needs it.
        if ran.first && (worst.contains_key(&ran.name) || WARM.contains(&ran.name.as_str())) {
            continue;
        }
        let is_worse =
            worst.get(&ran.name).is_none_or(|known| ran.pages * known.rows.max(1) > known.pages * ran.rows.max(1));
        if is_worse {
            worst.insert(ran.name.clone(), ran);
        }
    }
    (version, worst)
}

async fn work_a_little(server: &Server) {
    let client = server.client();
    client.spawn_task("n", &j!(1), SpawnOptions::default()).await.unwrap();
    let task = client.claim_task(ClaimOptions::default()).await.unwrap().pop().unwrap();
    task.set_checkpoint("c", &j!(1)).await.unwrap();
    task.complete(&j!(1)).await.unwrap();
}

fn bounded(worst: &BTreeMap<String, Ran>) {
    let mut over = String::new();
    for ran in worst.values() {
        eprintln!("{:>24} {:>6} pages {:>4} rows", ran.name, ran.pages, ran.rows);
        if ran.pages > PAGES_PER_ROW * (ran.rows.max(1) + 1) {
            let _ = writeln!(over, "{}: {} pages for {} rows\n{}", ran.name, ran.pages, ran.rows, ran.shape);
        }
    }
    assert!(over.is_empty(), "{over}");
    let missing: Vec<_> = HOT.iter().filter(|name| !worst.contains_key(**name)).collect();
    assert!(missing.is_empty(), "never seen: {missing:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn hot_statements_touch_few_pages_whatever_the_backlog() {
    let (version, worst) = worst(true).await;
    bounded(&worst);
    if !version.starts_with(SHAPES_OF) {
        eprintln!("the shapes in the tree are of Postgres {SHAPES_OF}, this one is {version}");
        return;
    }
    if std::env::var_os("ABSURD_TEST_ROWS").is_some() {
        return; // The shapes are those of the usual number of rows.
    }
    for ran in worst.values().filter(|ran| HOT.contains(&ran.name.as_str())) {
        let path = root().join(format!("tests/it/plans/{}.txt", ran.name));
        if std::env::var_os("ABSURD_TEST_UPDATE").is_some() {
            std::fs::write(&path, &ran.shape).unwrap();
        }
        let known = std::fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(known, ran.shape, "the plan of {} has changed; ABSURD_TEST_UPDATE=1 takes it over", ran.name);
    }
}

/// A queue that was empty a minute ago: no statistics yet, and plans that were made for nothing.
#[tokio::test(flavor = "multi_thread")]
async fn hot_statements_need_no_statistics() {
    bounded(&worst(false).await.1);
}
