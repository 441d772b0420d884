//! 20 of 200 queues locked against everybody for a minute, and the times of the other 180. It fails where a bound is not kept.
//!
//! `cargo run --release -p absurd-tests --example locked_figures [SECONDS [LOCKED]]`; with LOCKED 0 the times without any lock.
//!
//! On each good queue a lease of three seconds runs out again and again, a caller awaits a task's result, and a run awaits an event;
//! both come in the middle of the lock. This process takes the times: from the end of a lease to the next claim, from the
//! completion to the answer, from the emission to the claim of the woken run. All queues do the same before, without a lock and
//! unmeasured, so that no time counts in which Postgres sees a queue's statements for the first time.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a program for developers fails by panicking")]

use std::ops::Range;
use std::time::{Duration, Instant};

use absurd_client::{AbsurdClient, ClaimOptions, ClaimedTask, SpawnOptions, State};
use absurd_server::settings::Settings;
use absurd_tests::{OwnCluster, Server, ServerOptions};
use futures_util::future::join_all;
use serde_json::json as j;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

const QUEUES: usize = 200;
const LEASE: Duration = Duration::from_secs(3);
const WARM_UP: Duration = Duration::from_secs(20);
const SWEPT_MAX: Duration = Duration::from_secs(5);

fn claim(name: &str, wait: Duration) -> ClaimOptions {
    ClaimOptions { task_names: vec![name.into()], ..ClaimOptions::default().wait(wait) }
}

async fn claimed(client: &AbsurdClient, options: ClaimOptions) -> ClaimedTask {
    loop {
        if let Some(task) = client.claim_task(options.clone()).await.unwrap().pop() {
            return task;
        }
    }
}

/// Lets leases run out, one after the other, until the time comes; returns how long each took to be claimed again.
async fn lapse(client: &AbsurdClient, round: Round) -> Vec<Duration> {
    let name = format!("lapse {}", round.name);
    let options = claim(&name, LEASE * 10).claim_timeout(LEASE);
    client.spawn_task(&name, &(), SpawnOptions::default().max_attempts(1_000_000)).await.unwrap();
    let mut took = Vec::new();
    claimed(client, options.clone()).await;
    while Instant::now() < round.ends {
        let ends = Instant::now() + LEASE;
        claimed(client, options.clone()).await;
        took.push(ends.elapsed());
    }
    took
}

/// Awaits a result that comes in the middle; returns how long the answer took.
async fn await_result(client: &AbsurdClient, round: Round) -> Duration {
    let spawned = client.spawn_task("result", &(), SpawnOptions::default()).await.unwrap();
    let task = claimed(client, claim("result", LEASE * 10).claim_timeout(LEASE * 600)).await;
    let complete = async {
        tokio::time::sleep_until(round.middle.into()).await;
        task.complete(&1).await.unwrap();
        Instant::now()
    };
    let (end, completed) = tokio::join!(client.await_task_result(spawned.task_id, None), complete);
    assert_eq!(end.unwrap().state, State::Completed);
    completed.elapsed()
}

/// Lets a run wait for an event that comes in the middle; returns how long its next claim took.
async fn await_event(client: &AbsurdClient, round: Round) -> Duration {
    client.spawn_task("event", &(), SpawnOptions::default()).await.unwrap();
    let options = claim("event", LEASE * 10).claim_timeout(LEASE * 600);
    claimed(client, options.clone()).await.await_event("s", round.name, None).await.unwrap();
    tokio::time::sleep_until(round.middle.into()).await;
    let emitted = client.emit_event(round.name, &j!(1)).await.unwrap();
    assert_eq!(emitted.woken, 1);
    let began = Instant::now();
    claimed(client, options).await.complete(&1).await.unwrap();
    began.elapsed()
}

/// A time in which all good queues do their work.
#[derive(Clone, Copy)]
struct Round {
    name: &'static str,
    middle: Instant,
    ends: Instant,
}

impl Round {
    fn begin(name: &'static str, takes: Duration) -> Self {
        let now = Instant::now();
        Self { name, middle: now + takes / 2, ends: now + takes }
    }
}

/// Times of all good queues: ends of leases, results, events.
#[derive(Default)]
struct Times {
    lapses: Vec<Duration>,
    results: Vec<Duration>,
    events: Vec<Duration>,
}

async fn work(server: &Server, queues: Range<usize>, round: Round) -> Times {
    let each = join_all(queues.map(|number| {
        let client = server.client().with_queue(format!("q{number}"));
        // Not all at the same instant: leases of different queues do not end together.
        let later = LEASE * u32::try_from(number).unwrap() / u32::try_from(QUEUES).unwrap();
        let round = Round { middle: round.middle + later, ..round };
        async move {
            tokio::time::sleep(later).await;
            tokio::join!(lapse(&client, round), await_result(&client, round), await_event(&client, round))
        }
    }));
    let mut times = Times::default();
    for (lapses, result, event) in each.await {
        times.lapses.extend(lapses);
        times.results.push(result);
        times.events.push(event);
    }
    times
}

async fn is_serving(server: &Server) -> bool {
    let channel = tonic::transport::Endpoint::from_shared(server.url()).unwrap().connect().await.unwrap();
    let told = HealthClient::new(channel).check(HealthCheckRequest::default()).await.unwrap();
    told.into_inner().status() == ServingStatus::Serving
}

fn row(what: &str, mut times: Vec<Duration>) -> bool {
    times.sort_unstable();
    let at =
        |share: usize| times.get((times.len().max(1) - 1) * share / 100).copied().unwrap_or_default().as_secs_f64();
    println!("| {what} | {} | {:.2} s | {:.2} s | {:.2} s |", times.len(), at(50), at(99), at(100));
    !times.is_empty() && at(100) <= SWEPT_MAX.as_secs_f64()
}

#[tokio::main]
async fn main() {
    let argument = |index, usual| std::env::args().nth(index).map_or(usual, |text| text.parse().unwrap());
    let seconds = Duration::from_secs(argument(1, 60));
    let locked = usize::try_from(argument(2, 20)).unwrap();
    let cluster = OwnCluster::start(&["max_connections=200", "max_locks_per_transaction=1024"]).await;
    let database = cluster.database().await;
    let sql = database.connect().await;
    for number in 0..QUEUES {
        sql.execute("select absurd.create_queue($1)", &[&format!("q{number}")]).await.unwrap();
    }
    let settings = Settings { max_connections: Some(16), ..Settings::default() };
    let options = ServerOptions { settings, without_queue: true, ..ServerOptions::default() };
    let server = Server::start_with(database.clone(), options).await;

    work(&server, 0..QUEUES, Round::begin("warm up", WARM_UP)).await;

    let tables =
        (0..locked).flat_map(|number| ["t", "r", "c", "e", "w"].map(|kind| format!("absurd.{kind}_q{number}")));
    let lock = format!("begin; lock table {} in access exclusive mode", tables.collect::<Vec<_>>().join(", "));
    if locked > 0 {
        sql.batch_execute(&lock).await.unwrap();
    }
    let round = Round::begin("beside the lock", seconds);
    let until = round.ends;
    let load = work(&server, locked..QUEUES, round);
    let watch = async {
        let mut serving = true;
        while Instant::now() < until {
            tokio::time::sleep(LEASE).await;
            serving &= is_serving(&server).await;
        }
        serving
    };
    // Callers of the locked queues: they wait, and hold up nobody.
    let bad = join_all((0..locked).map(|number| {
        let client = server.client().with_queue(format!("q{number}"));
        async move {
            while Instant::now() < until {
                let _ = client.spawn_task("n", &(), SpawnOptions::default()).await;
            }
        }
    }));
    let (times, serving) = tokio::select! {
        done = async { tokio::join!(load, watch) } => done,
        _ = async { bad.await; std::future::pending::<()>().await } => unreachable!("the callers of locked queues never end"),
    };
    println!("{locked} of {QUEUES} queues locked for {} s, beside their callers\n", seconds.as_secs());
    println!("| on the other queues | times | p50 | p99 | longest |\n|---|---|---|---|---|");
    let kept = [
        row("from the end of a lease to the next claim", times.lapses),
        row("from a completion to its awaited answer", times.results),
        row("from an emission to the claim of the woken run", times.events),
    ];
    println!("\nhealth: {}", if serving { "SERVING throughout" } else { "NOT_SERVING at times" });
    assert!(serving && kept == [true; 3], "a bound of {SWEPT_MAX:?} is not kept");
}
