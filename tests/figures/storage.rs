//! Figures of the storage contract's functions, ours beside upstream's, on the same data in the same run:
//! `cargo run --release -p absurd-tests --example storage_figures -- 0 100000 1000000`
//!
//! The arguments are how many tasks wait, in rising order. Commits are flushed; samples of both sides alternate.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a program for developers fails by panicking")]

use std::time::{Duration, Instant};

use absurd_server::postgres::{Cluster, ClusterOptions};
use absurd_server::store::migrate::{self, Options};
use absurd_tests::{pg_bin, tool};
use tokio_postgres::{Client, NoTls};

/// Samples of a measurement, and how long it may take.
const SAMPLES: usize = 200;
const LONGEST: Duration = Duration::from_secs(30);

struct Sides {
    ours: Client,
    theirs: Client,
}

impl Sides {
    async fn both(&self, statement: &str) {
        self.ours.batch_execute(statement).await.unwrap();
        self.theirs.batch_execute(statement).await.unwrap();
    }

    /// Runs a statement on both sides in turn; prints what it took.
    async fn measure(&self, what: &str, statement: &str, samples: usize) {
        let mut times = [Vec::new(), Vec::new()];
        let started = Instant::now();
        for _ in 0..samples {
            for (side, times) in [&self.ours, &self.theirs].into_iter().zip(&mut times) {
                let began = Instant::now();
                side.query(statement, &[]).await.unwrap();
                times.push(began.elapsed());
            }
            if started.elapsed() > LONGEST {
                break;
            }
        }
        let [ours, theirs] = times.map(|mut times| {
            times.sort_unstable();
            let at = |percent: usize| times[(times.len() * percent / 100).min(times.len() - 1)].as_secs_f64() * 1e3;
            (at(50), at(95), times.len())
        });
        println!(
            "| {what} | {:.2} | {:.2} | {:.2} | {:.2} | {:.1} | {} |",
            ours.0,
            ours.1,
            theirs.0,
            theirs.1,
            theirs.0 / ours.0,
            ours.2
        );
    }

    /// Calls a statement over and over; prints calls per second.
    async fn rate(&self, what: &str, statement: &str, calls: u32) {
        let mut rates = [0.0, 0.0];
        for (side, rate) in [&self.ours, &self.theirs].into_iter().zip(&mut rates) {
            let prepared = side.prepare(statement).await.unwrap();
            let began = Instant::now();
            for _ in 0..calls {
                side.query(&prepared, &[]).await.unwrap();
            }
            *rate = f64::from(calls) / began.elapsed().as_secs_f64();
        }
        println!("{what}: ours {:.0}/s, upstream's {:.0}/s", rates[0], rates[1]);
    }
}

fn load(queue: &str, state: &str, count: usize) -> String {
    let completed = if state == "completed" { "now() - interval '2 days'" } else { "null" };
    format!(
        "with ids as materialized (
           select absurd.portable_uuidv7() as task, absurd.portable_uuidv7() as run, i from generate_series(1, {count}) i),
         runs as (insert into absurd.r_{queue} (run_id, task_id, attempt, state, available_at, completed_at)
                  select run, task, 1, '{state}', now() - interval '3 days' + i * interval '1 ms', {completed} from ids)
         insert into absurd.t_{queue} (task_id, task_name, params, state, attempts, last_attempt_run)
         select task, 'n', 'null', '{state}', 1, run from ids"
    )
}

async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

async fn sides(cluster: &Cluster) -> Sides {
    let admin = connect(&cluster.url("postgres")).await;
    admin.batch_execute("create database ours").await.unwrap();
    admin.batch_execute("create database theirs").await.unwrap();
    migrate::migrate(&cluster.url("ours").parse().unwrap(), Options::default()).await.unwrap();
    let init = tool("absurdctl", &["init", "--database", &cluster.url("theirs")]).output().await.unwrap();
    assert!(init.status.success());
    Sides { ours: connect(&cluster.url("ours")).await, theirs: connect(&cluster.url("theirs")).await }
}

fn main() {
    let home = tempfile::Builder::new().prefix("absurd-figures").tempdir().unwrap();
    std::fs::set_permissions(home.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let settings = vec!["shared_buffers=1GB".into(), "max_wal_size=8GB".into()];
    let options = ClusterOptions { home: home.path().join("pg"), bin: pg_bin(), durable: true, settings };
    let mut cluster = Cluster::start(&options).unwrap();
    tokio::runtime::Runtime::new().unwrap().block_on(figures(&cluster));
    cluster.stop();
}

async fn figures(cluster: &Cluster) {
    let mut backlogs: Vec<usize> = std::env::args().skip(1).map(|text| text.parse().unwrap()).collect();
    if backlogs.is_empty() {
        backlogs = vec![0, 100_000, 1_000_000];
    }
    let sides = sides(cluster).await;
    sides
        .both("set client_min_messages = error; select absurd.create_queue('q'); select absurd.create_queue('f')")
        .await;
    println!("Postgres {}, commits flushed\n", cluster.version());
    println!("| ms | ours p50 | ours p95 | upstream p50 | upstream p95 | ratio of p50 | samples |");
    println!("|---|---|---|---|---|---|---|");
    let mut waiting = 0;
    for backlog in backlogs {
        sides.both(&load("q", "pending", backlog - waiting)).await;
        sides.both("vacuum analyze absurd.t_q").await;
        sides.both("vacuum analyze absurd.r_q").await;
        waiting = backlog;
        sides
            .measure(&format!("claim 1, {backlog} pending"), "select * from absurd.claim_task('q', 'w')", SAMPLES)
            .await;
    }
    sides.both(&load("f", "completed", 1_000_000)).await;
    sides.both("vacuum analyze absurd.t_f").await;
    sides.both("vacuum analyze absurd.r_f").await;
    sides
        .measure("claim 1, 1000000 finished, none pending", "select * from absurd.claim_task('f', 'w')", SAMPLES)
        .await;
    sides.measure("cleanup of 1000, 1000000 finished", "select absurd.cleanup_tasks('f', 60, 1000)", 20).await;
    println!();
    sides.both("select absurd.create_queue('s')").await;
    sides.rate("spawn_task", "select * from absurd.spawn_task('s', 'n', '{\"a\": 1}')", 3000).await;
    let complete = "select absurd.complete_run('s', c.run_id, '1') from absurd.claim_task('s', 'w', 60, 1) c";
    sides.rate("claim_task of one and complete_run", complete, 2000).await;
}
