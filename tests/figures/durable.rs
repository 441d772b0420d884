//! Figures of durable execution: one worker process of ours, through a server, beside one of each original SDK, on the same
//! Postgres in the same run; and the memory that suspended tasks take in a worker.
//!
//! `cargo build --release -p absurd-server && cargo run --release -p absurd-tests --example durable_figures`
//!
//! The SDKs work on a database that upstream's tool made, ours on one of ours. Commits are flushed. Times are the database's:
//! from the first claim to the last completion.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a program for developers fails by panicking")]

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use absurd_client::durable::{Absurd, BoxError, Context, WorkerOptions};
use absurd_client::{AbsurdClient, ConnectOptions};
use absurd_server::postgres::{Cluster, ClusterOptions};
use absurd_tests::{pg_bin, root, tool};
use serde_json::{Value, json as j};
use tokio::process::{Child, Command};
use tokio_postgres::{Client, NoTls};

const URL: &str = "http://127.0.0.1:50999";
/// Steps of a task, and how many tasks there are.
const LOADS: [(u32, u32); 2] = [(0, 4000), (10, 1000)];
const CONCURRENCIES: [usize; 2] = [1, 20];
const SLEEPERS: u32 = 10_000;

async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// The worker of ours, as a process of its own.
async fn work() {
    let concurrency = std::env::var("CONCURRENCY").unwrap().parse().unwrap();
    let absurd = Absurd::new(AbsurdClient::connect(&ConnectOptions::new(URL)).unwrap().with_queue("q"));
    absurd.register("steps", |ctx: Context, params: Value| async move {
        for _ in 0..params["steps"].as_u64().unwrap() {
            ctx.step("s", async || Ok::<_, BoxError>(j!({"n": 1}))).await?;
        }
        Ok::<_, BoxError>(j!({"done": true}))
    });
    absurd.register("sleeper", |ctx: Context, _: Value| async move {
        ctx.sleep_for("long", Duration::from_secs(36_000)).await?;
        Ok::<_, BoxError>(())
    });
    // As many again wait here, so that no place stays empty for a round trip.
    absurd.run_worker(WorkerOptions::default().concurrency(concurrency).prefetch(concurrency)).await.unwrap();
}

struct Side {
    name: &'static str,
    sql: Client,
    url: String,
    database: String,
}

impl Side {
    fn worker(&self, concurrency: usize) -> Child {
        let mut command = match self.name {
            "Rust, over gRPC" => {
                let mut command = Command::new(std::env::current_exe().unwrap());
                command.arg("worker");
                command
            }
            "TypeScript" => {
                let mut command = Command::new("node");
                command.arg(root().join("tests/sdks/node/figures.js"));
                command
            }
            flavour => {
                let mut command = tool("python", &[]);
                command.arg(root().join("tests/figures/worker.py"));
                command.arg(if flavour == "Python, asyncio" { "async" } else { "threads" });
                command
            }
        };
        let (_, socket) = self.url.rsplit_once("host=").unwrap();
        command.env("PGHOST", socket).env("PGUSER", "absurd").env("PGDATABASE", &self.database);
        command.env("ABSURD_DATABASE_URL", &self.url).env("CONCURRENCY", concurrency.to_string());
        command.stdout(Stdio::null()).kill_on_drop(true).spawn().unwrap()
    }

    async fn commits(&self) -> i64 {
        // Sessions report what they did at most once per second.
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let query = "select xact_commit from pg_stat_database where datname = current_database()";
        self.sql.query_one(query, &[]).await.unwrap().get(0)
    }

    async fn count(&self, state: &str) -> i64 {
        let query = format!("select count(*) from absurd.t_q where state = '{state}'");
        self.sql.query_one(&query, &[]).await.unwrap().get(0)
    }

    /// Tasks per second, and commits per task.
    async fn measure(&self, steps: u32, tasks: u32, concurrency: usize) -> (f64, f64) {
        self.sql.batch_execute("select absurd.drop_queue('q'); select absurd.create_queue('q')").await.unwrap();
        let spawn = format!(
            "select absurd.spawn_task('q', 'steps', '{{\"steps\": {steps}}}') from generate_series(1, {tasks})"
        );
        self.sql.batch_execute(&spawn).await.unwrap();
        self.sql.batch_execute("vacuum analyze absurd.t_q, absurd.r_q").await.unwrap();
        let before = self.commits().await;
        let mut worker = self.worker(concurrency);
        let until = Instant::now() + Duration::from_secs(180);
        let mut looks = 0;
        while self.count("completed").await < i64::from(tasks) {
            assert!(Instant::now() < until, "{} takes too long", self.name);
            looks += 1;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        let commits = self.commits().await - before - looks;
        worker.kill().await.unwrap();
        let took = "select extract(epoch from max(completed_at) - min(started_at))::float8 from absurd.r_q";
        let took: f64 = self.sql.query_one(took, &[]).await.unwrap().get(0);
        let commits = f64::from(i32::try_from(commits).unwrap());
        (f64::from(tasks) / took, commits / f64::from(tasks))
    }
}

/// Resident memory of a process.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// What suspended tasks leave behind in a worker.
async fn memory(side: &Side) {
    side.sql.batch_execute("select absurd.drop_queue('q'); select absurd.create_queue('q')").await.unwrap();
    let mut worker = side.worker(20);
    let mut sizes = Vec::new();
    for sleeping in [SLEEPERS, 2 * SLEEPERS, 3 * SLEEPERS] {
        let spawn = format!("select absurd.spawn_task('q', 'sleeper', 'null') from generate_series(1, {SLEEPERS})");
        side.sql.batch_execute(&spawn).await.unwrap();
        while side.count("sleeping").await < i64::from(sleeping) {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        sizes.push(resident(worker.id().unwrap()) / 1024);
    }
    worker.kill().await.unwrap();
    println!("\nA worker's resident memory with 10,000, 20,000 and 30,000 tasks suspended: {sizes:?} KiB");
}

async fn figures(cluster: &Cluster) {
    let admin = connect(&cluster.url("postgres")).await;
    admin.batch_execute("create database ours").await.unwrap();
    admin.batch_execute("create database theirs").await.unwrap();
    let init = tool("absurdctl", &["init", "--database", &cluster.url("theirs")]).output().await.unwrap();
    assert!(init.status.success());
    let absurd = std::env::current_exe().unwrap().parent().and_then(Path::parent).unwrap().join("absurd");
    assert!(absurd.exists(), "build it first: cargo build --release -p absurd-server");
    let mut server = Command::new(&absurd)
        .args(["serve", "--migrate", "--listen", "127.0.0.1:50999", "--database-url", &cluster.url("ours")])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let health =
        || Command::new(&absurd).args(["health", "--url", URL]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    while !health().await.unwrap().success() {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let side = async |name, database: &str| {
        let url = cluster.url(database);
        Side { name, sql: connect(&url).await, url, database: database.to_owned() }
    };
    let sides = [
        side("Rust, over gRPC", "ours").await,
        side("TypeScript", "theirs").await,
        side("Python, threads", "theirs").await,
        side("Python, asyncio", "theirs").await,
    ];
    println!("Postgres {}\n", cluster.version());
    println!("| worker | steps | at once | tasks/s | steps/s | commits per task |\n|---|---|---|---|---|---|");
    for (steps, tasks) in LOADS {
        for concurrency in CONCURRENCIES {
            for side in &sides {
                let (rate, commits) = side.measure(steps, tasks, concurrency).await;
                let steps_rate = rate * f64::from(steps);
                println!("| {} | {steps} | {concurrency} | {rate:.0} | {steps_rate:.0} | {commits:.2} |", side.name);
            }
        }
    }
    memory(&sides[0]).await;
    server.kill().await.unwrap();
}

fn main() {
    let runtime = || tokio::runtime::Runtime::new().unwrap();
    if std::env::args().nth(1).as_deref() == Some("worker") {
        return runtime().block_on(work());
    }
    let home = tempfile::Builder::new().prefix("absurd-figures").tempdir().unwrap();
    std::fs::set_permissions(home.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let settings = vec!["shared_buffers=1GB".into(), "max_wal_size=8GB".into()];
    let options = ClusterOptions { home: home.path().join("pg"), bin: pg_bin(), durable: true, settings };
    let mut cluster = Cluster::start(&options).unwrap();
    runtime().block_on(figures(&cluster));
    cluster.stop();
}
