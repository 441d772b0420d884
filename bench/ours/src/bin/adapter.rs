//! Our adapters for the benchmark against peers; `bench/README.md` describes each command. `grpc` takes tasks from a
//! claim stream and completes them. `rust` executes them with the durable worker.

#![allow(clippy::print_stdout, reason = "the orchestrator reads it")]

#[path = "adapter/extremes.rs"]
mod extremes;

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use absurd_client::durable::{Absurd, BoxError, Context as Execution, WorkerOptions};
use absurd_client::{AbsurdClient, ConnectOptions, NewTask, SpawnOptions, StreamOptions};
use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::io::AsyncReadExt as _;
use tokio::task::JoinSet;

/// Arguments of a command, as JSON.
#[derive(Debug, Deserialize)]
struct Asked {
    #[serde(default)]
    count: Option<u64>,
    #[serde(default = "one")]
    at_once: u64,
    #[serde(default = "one")]
    batch: u64,
    #[serde(default)]
    seconds: Option<f64>,
    #[serde(default)]
    ahead: u64,
    #[serde(default)]
    gap_ms: u64,
    #[serde(default)]
    workers: usize,
    #[serde(default)]
    counter: Option<String>,
    #[serde(default)]
    settings: Settings,
}

fn one() -> u64 {
    1
}

#[derive(Debug, Deserialize)]
#[serde(default)]
struct Settings {
    credit: i32,
    concurrency: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self { credit: 10, concurrency: 10 }
    }
}

/// Params of the tasks of every peer.
#[derive(Debug, Serialize, Deserialize)]
struct Params {
    id: u64,
    pad: String,
    t: u64,
}

fn params(id: u64, t: u64) -> Params {
    Params { id, pad: "x".repeat(70), t }
}

/// Nanoseconds of `CLOCK_MONOTONIC`, which all processes share.
fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

fn say(line: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()?;
    Ok(())
}

/// Counts handled tasks, in a file that the spawner of the same measurement reads.
#[derive(Debug)]
struct Handled {
    count: AtomicU64,
    wanted: u64,
    file: Option<File>,
    latencies: Mutex<Vec<f64>>,
}

impl Handled {
    fn new(asked: &Asked) -> anyhow::Result<Arc<Self>> {
        let open = |path| File::options().read(true).write(true).open(path);
        let file = asked.counter.as_ref().map(open).transpose()?;
        let wanted = asked.count.unwrap_or(u64::MAX);
        Ok(Arc::new(Self { count: AtomicU64::new(0), wanted, file, latencies: Mutex::default() }))
    }

    fn note(&self, task: &Params) -> anyhow::Result<()> {
        if task.t > 0 {
            let micros = u32::try_from((monotonic_ns() - task.t) / 1000)?;
            self.latencies.lock().unwrap_or_else(PoisonError::into_inner).push(f64::from(micros) / 1000.0);
        }
        let count = self.count.fetch_add(1, Ordering::Relaxed) + 1;
        if let Some(file) = &self.file {
            file.write_all_at(&count.to_le_bytes(), 0)?;
        }
        if count == self.wanted {
            say("handled")?;
        }
        Ok(())
    }

    /// The count of the working process, as the spawning process reads it.
    fn elsewhere(&self) -> anyhow::Result<u64> {
        let mut bytes = [0; 8];
        self.file.as_ref().context("no counter")?.read_exact_at(&mut bytes, 0)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

fn client() -> anyhow::Result<AbsurdClient> {
    let url = std::env::var("ABSURD_URL").context("ABSURD_URL names the server")?;
    Ok(AbsurdClient::connect(&ConnectOptions::new(url))?.with_queue("q"))
}

fn task_name() -> String {
    std::env::var("BENCH_TASK").unwrap_or_else(|_| "noop".into())
}

async fn spawn_some(client: &AbsurdClient, from: u64, count: u64, t: u64) -> anyhow::Result<()> {
    if count == 1 {
        client.spawn_task(&task_name(), &params(from, t), SpawnOptions::default()).await?;
        return Ok(());
    }
    let name = task_name();
    let new = |id| NewTask::new(&name, &params(id, t), SpawnOptions::default());
    client.spawn_tasks((from..from + count).map(new).collect::<Result<_, _>>()?).await?;
    Ok(())
}

/// `spawn` spawns `count` tasks. `feed` spawns for `seconds`, at most `ahead` tasks ahead of the worker.
async fn spawn(asked: Arc<Asked>) -> anyhow::Result<()> {
    let client = client()?;
    let handled = Handled::new(&asked)?;
    client.create_queue().await?; // The queue exists; this opens the connection.
    let next = Arc::new(AtomicU64::new(0));
    let started = Instant::now();
    let until = asked.seconds.map(|seconds| started + Duration::from_secs_f64(seconds));
    say("ready")?;
    let mut callers: JoinSet<anyhow::Result<()>> = JoinSet::new();
    for _ in 0..asked.at_once {
        let (client, next, asked, handled) =
            (client.clone(), Arc::clone(&next), Arc::clone(&asked), Arc::clone(&handled));
        callers.spawn(async move {
            while until.is_none_or(|until| Instant::now() < until) {
                if until.is_some() && next.load(Ordering::Relaxed) >= handled.elsewhere()? + asked.ahead {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                    continue;
                }
                let from = next.fetch_add(asked.batch, Ordering::Relaxed);
                if asked.count.is_some_and(|count| from >= count) {
                    break;
                }
                spawn_some(&client, from, asked.batch, 0).await?;
            }
            Ok(())
        });
    }
    while let Some(done) = callers.join_next().await {
        done??;
    }
    let seconds = started.elapsed().as_secs_f64();
    say(&format!("result {}", json!({"seconds": seconds})))
}

/// `pace` spawns one task at a time, each with the time just before its spawn.
async fn pace(asked: &Asked) -> anyhow::Result<()> {
    let client = client()?;
    spawn_some(&client, 0, 1, 0).await?;
    say("ready")?;
    let mut next = tokio::time::Instant::now() + Duration::from_millis(500);
    for id in 0..asked.count.unwrap_or(1) {
        tokio::time::sleep_until(next).await;
        next += Duration::from_millis(asked.gap_ms);
        spawn_some(&client, id, 1, monotonic_ns()).await?;
    }
    say("result {}")
}

/// `work` on a bare stream.
async fn take(client: AbsurdClient, settings: &Settings, handled: Arc<Handled>) -> anyhow::Result<()> {
    let options = StreamOptions { max_in_flight: settings.credit, ..StreamOptions::default() };
    let mut stream = client.claim_stream(options).await?;
    while let Some(task) = stream.next().await {
        handled.note(&task.params()?)?;
        tokio::spawn(async move { task.complete(&json!({"ok": true})).await });
    }
    anyhow::bail!("the stream ended")
}

/// `work` by the durable worker.
async fn execute(client: AbsurdClient, settings: &Settings, handled: Arc<Handled>) -> anyhow::Result<()> {
    let absurd = Absurd::new(client);
    let noop = Arc::clone(&handled);
    absurd.register("noop", move |_: Execution, params: Params| {
        let handled = Arc::clone(&noop);
        async move {
            handled.note(&params)?;
            Ok::<_, BoxError>(json!({"ok": true}))
        }
    });
    absurd.register("steps", move |ctx: Execution, params: Params| {
        let handled = Arc::clone(&handled);
        async move {
            for step in 0..10 {
                ctx.step("s", async || Ok::<_, BoxError>(json!({"i": step}))).await?;
            }
            handled.note(&params)?;
            Ok::<_, BoxError>(json!({"ok": true}))
        }
    });
    let options = WorkerOptions::default().concurrency(settings.concurrency).prefetch(settings.concurrency);
    absurd.run_worker(options).await?;
    Ok(())
}

async fn work(durable: bool, asked: Arc<Asked>) -> anyhow::Result<()> {
    let handled = Handled::new(&asked)?;
    let mut workers: JoinSet<anyhow::Result<()>> = JoinSet::new();
    for _ in 0..asked.workers.max(1) {
        let (client, asked, handled) = (client()?, Arc::clone(&asked), Arc::clone(&handled));
        workers.spawn(async move {
            if durable {
                execute(client, &asked.settings, handled).await
            } else {
                take(client, &asked.settings, handled).await
            }
        });
    }
    say("ready")?;
    let (mut stdin, mut line) = (tokio::io::stdin(), [0; 1]);
    tokio::select! {
        _ = stdin.read(&mut line) => {}
        Some(ended) = workers.join_next() => ended??,
    }
    let latencies = handled.latencies.lock().unwrap_or_else(PoisonError::into_inner).clone();
    say(&format!("result {}", json!({"latencies": latencies})))
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(kind), Some(command), Some(asked)) = (args.next(), args.next(), args.next()) else {
        anyhow::bail!("usage: absurd-adapter grpc|rust setup|spawn|feed|pace|work|take|extremes JSON")
    };
    let asked: Arc<Asked> = Arc::new(serde_json::from_str(&asked)?);
    match command.as_str() {
        "setup" => {
            client()?.create_queue().await?;
            say("result {}")
        }
        "spawn" | "feed" => spawn(asked).await,
        "pace" => pace(&asked).await,
        "work" => work(kind == "rust", asked).await,
        "take" => extremes::take(&client()?, asked.count.unwrap_or(1)).await,
        "extremes" => extremes::run(&client()?).await,
        other => anyhow::bail!("unknown command {other}"),
    }
}
