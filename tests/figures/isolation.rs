//! Figures of isolation: 20 good queues beside one bad one, under load, on two replicas; with each trouble beside a run without.
//!
//! `cargo run --release -p absurd-tests --example isolation_figures [SECONDS]`
//!
//! Each queue gets ten tasks a second, spawned one by one and handed to a stream, and one task at a time whose lease of a second
//! runs out. The bad queue gets the same. Both figures are taken by this process: from just before a spawn to the delivery, and from
//! the end of a lease to the next claim. It fails where a p99 is over twice that without trouble, or a replica does not serve.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a program for developers fails by panicking")]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use absurd_client::{AbsurdClient, ClaimOptions, SpawnOptions, StreamOptions};
use absurd_server::settings::Settings;
use absurd_tests::{Database, OwnCluster, Server, ServerOptions};
use serde_json::json as j;
use tokio::task::JoinSet;
use tokio_postgres::Client;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

const GOOD: usize = 20;
const GAP: Duration = Duration::from_millis(100);
const LEASE: Duration = Duration::from_secs(1);

/// What is wrong with the bad queue, and how it comes about.
const TROUBLES: [(&str, &str); 7] = [
    ("none", "select 1"),
    ("unreadable", "alter table absurd.r_bad rename to r_bad_away; create view absurd.r_bad as select 1 / 0 as run_id"),
    ("locked", "begin; lock table absurd.r_bad, absurd.t_bad in access exclusive mode"),
    ("dropped", "select absurd.drop_queue('bad')"),
    ("renamed", "alter table absurd.r_bad rename column available_at to then_at"),
    ("index missing", "drop index absurd.r_bad_sai"),
    ("damaged page", "select 1"),
];

#[derive(Debug, Default)]
struct Figures {
    deliveries: Mutex<Vec<Duration>>,
    lapses: Mutex<Vec<Duration>>,
}

/// Spawns on one replica what a stream on the other receives.
async fn deliver(from: AbsurdClient, to: AbsurdClient, figures: Option<Arc<Figures>>, until: Instant) {
    let options = StreamOptions { task_names: vec!["n".into()], max_in_flight: 100, ..StreamOptions::default() };
    let Ok(mut stream) = to.claim_stream(options).await else { return };
    let began = Instant::now();
    let receive = async {
        while let Some(task) = stream.next().await {
            let sent: u64 = task.params().unwrap();
            let took = began.elapsed().saturating_sub(Duration::from_micros(sent));
            if let Some(figures) = &figures {
                figures.deliveries.lock().unwrap().push(took);
            }
            let _ = task.complete(&j!(null)).await;
        }
    };
    let send = async {
        while Instant::now() < until {
            let sent = u64::try_from(began.elapsed().as_micros()).unwrap();
            let _ = from.spawn_task("n", &j!(sent), SpawnOptions::default()).await;
            tokio::time::sleep(GAP).await;
        }
    };
    tokio::select! {
        () = receive => send_rest(until).await,
        () = send => {}
    }
}

async fn send_rest(until: Instant) {
    tokio::time::sleep_until(until.into()).await;
}

/// Lets leases run out, one after the other, and waits for the next claim.
async fn lapse(client: AbsurdClient, figures: Option<Arc<Figures>>, until: Instant) {
    let claim = || ClaimOptions {
        task_names: vec!["lapse".into()],
        ..ClaimOptions::default().claim_timeout(LEASE).wait(LEASE * 5)
    };
    let _ = client.spawn_task("lapse", &j!(null), SpawnOptions::default().max_attempts(1_000_000)).await;
    let mut ends: Option<Instant> = None;
    while Instant::now() < until {
        match client.claim_task(claim()).await {
            Ok(tasks) if !tasks.is_empty() => {
                if let (Some(ends), Some(figures)) = (ends, &figures) {
                    figures.lapses.lock().unwrap().push(ends.elapsed());
                }
                ends = Some(Instant::now() + LEASE);
            }
            Ok(_) => {}
            Err(_) => tokio::time::sleep(GAP).await,
        }
    }
}

fn percentile(times: &Mutex<Vec<Duration>>, share: usize) -> Duration {
    let mut times = times.lock().unwrap().clone();
    times.sort_unstable();
    times.get((times.len().max(1) - 1) * share / 100).copied().unwrap_or_default()
}

async fn server(database: &Database) -> Server {
    let settings = Settings { max_connections: Some(16), ..Settings::default() };
    let options = ServerOptions { settings, without_queue: true, ..ServerOptions::default() };
    Server::start_with(database.clone(), options).await
}

/// Overwrites the middle of a table's first page, while Postgres is down.
async fn damage(cluster: &mut OwnCluster, sql: &Client) {
    sql.batch_execute("select absurd.spawn_task('bad', 'n', '0') from generate_series(1, 1000); checkpoint")
        .await
        .unwrap();
    let place = "select current_setting('data_directory') || '/' || pg_relation_filepath('absurd.r_bad')";
    let path: String = sql.query_one(place, &[]).await.unwrap().get(0);
    cluster.stop().await;
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[..64].fill(0xff);
    std::fs::write(&path, bytes).unwrap();
    cluster.start_again().await;
}

async fn is_serving(server: &Server) -> bool {
    let channel = tonic::transport::Endpoint::from_shared(server.url()).unwrap().connect().await.unwrap();
    let told = HealthClient::new(channel).check(HealthCheckRequest::default()).await.unwrap();
    told.into_inner().status() == ServingStatus::Serving
}

async fn measure(trouble: &str, how: &str, seconds: u64) -> (Arc<Figures>, bool) {
    let mut cluster = OwnCluster::start(&["max_connections=200"]).await;
    let database = cluster.database().await;
    let sql = database.connect().await;
    for queue in (0..GOOD).map(|number| format!("good{number}")).chain(["bad".to_owned()]) {
        sql.execute("select absurd.create_queue($1)", &[&queue]).await.unwrap();
    }
    if trouble == "index missing" {
        let many = "select absurd.spawn_task('bad', 'other', '0') from generate_series(1, 200000)";
        sql.batch_execute(many).await.unwrap();
    }
    if trouble == "damaged page" {
        damage(&mut cluster, &sql).await;
    }
    let sql = database.connect().await;
    let (one, two) = (server(&database).await, server(&database).await);
    let until = Instant::now() + Duration::from_secs(seconds);
    let figures = Arc::new(Figures::default());
    let mut load = JoinSet::new();
    for queue in (0..GOOD).map(|number| format!("good{number}")).chain(["bad".to_owned()]) {
        let figures = (queue != "bad").then(|| Arc::clone(&figures));
        let (from, to) = (one.client().with_queue(queue.as_str()), two.client().with_queue(queue.as_str()));
        load.spawn(deliver(from.clone(), to, figures.clone(), until));
        load.spawn(lapse(from, figures, until));
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    sql.batch_execute(how).await.unwrap();
    let mut serving = true;
    while Instant::now() < until {
        tokio::time::sleep(Duration::from_secs(1)).await;
        serving &= is_serving(&one).await && is_serving(&two).await;
    }
    load.shutdown().await;
    drop(sql);
    (figures, serving)
}

#[tokio::main]
async fn main() {
    let seconds = std::env::args().nth(1).map_or(30, |text| text.parse().unwrap());
    println!("20 good queues beside a bad one, two replicas, {seconds} s each\n");
    println!("| the bad queue is | spawn to delivery p50 | p99 | end of lease to next claim p50 | p99 | health |");
    println!("|---|---|---|---|---|---|");
    let mut without = None;
    let mut kept = true;
    for (trouble, how) in TROUBLES {
        let (figures, serving) = measure(trouble, how, seconds).await;
        let worst = [percentile(&figures.deliveries, 99), percentile(&figures.lapses, 99)];
        let bounds = *without.get_or_insert(worst.map(|time| time * 2));
        kept &= serving && worst.iter().zip(bounds).all(|(time, bound)| *time > Duration::ZERO && *time <= bound);
        let ms = |times, share| format!("{:.1} ms", percentile(times, share).as_secs_f64() * 1000.0);
        println!(
            "| {trouble} | {} | {} | {} | {} | {} |",
            ms(&figures.deliveries, 50),
            ms(&figures.deliveries, 99),
            ms(&figures.lapses, 50),
            ms(&figures.lapses, 99),
            if serving { "SERVING throughout" } else { "NOT_SERVING at times" }
        );
    }
    assert!(kept, "a p99 is over twice that without a bad queue, or a replica did not serve");
}
