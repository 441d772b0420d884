//! `absurd bench spawn`, `drain`, `steady`, `steps` and `backlog`: throughput, and the times of its parts.

use std::sync::Arc;
use std::time::{Duration, Instant};

use absurd_client::durable::{Absurd, BoxError, Context as Execution, WorkerOptions};
use absurd_client::{AbsurdClient, ClaimOptions, ConnectOptions, NewTask, SpawnOptions, StreamOptions};
use anyhow::Context as _;
use clap::Args;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_postgres::Client;

use super::report::{Report, Times};
use super::{Stage, StageArgs, connect, progress};
use crate::settings::Span;

const QUEUE: &str = "absurd-bench";
/// Longest time without progress before a measurement fails.
const STANDSTILL_MAX: Duration = Duration::from_secs(60);
/// Tasks per insert of a preload.
const PRELOAD_PART: u32 = 50_000;

/// Flags of `spawn`.
#[derive(Debug, Args)]
pub(in crate::cli) struct SpawnArgs {
    #[command(flatten)]
    pub(super) stage: StageArgs,
    /// Tasks
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    tasks: u32,
    /// Calls at the same time
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    in_flight: u32,
    /// Tasks of one call
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    batch: u32,
}

/// Flags of `drain`.
#[derive(Debug, Args)]
pub(in crate::cli) struct DrainArgs {
    #[command(flatten)]
    pub(super) stage: StageArgs,
    /// Tasks that wait before the worker comes
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    tasks: u32,
    /// Credit of the worker's stream
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(i32).range(1..=10_000))]
    credit: i32,
}

/// Flags of `steady`.
#[derive(Debug, Args)]
pub(in crate::cli) struct SteadyArgs {
    #[command(flatten)]
    pub(super) stage: StageArgs,
    /// How long
    #[arg(long, default_value = "10s", value_name = "SPAN")]
    time: Span,
    /// Spawning calls at the same time
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    in_flight: u32,
    /// Credit of the worker's stream
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(i32).range(1..=10_000))]
    credit: i32,
}

/// Flags of `steps`.
#[derive(Debug, Args)]
pub(in crate::cli) struct StepsArgs {
    #[command(flatten)]
    pub(super) stage: StageArgs,
    /// Tasks that wait before the worker comes
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    tasks: u32,
    /// Steps of each
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=1000))]
    steps: u32,
    /// Tasks at the same time
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    concurrency: u32,
}

/// Flags of `backlog`.
#[derive(Debug, Args)]
pub(in crate::cli) struct BacklogArgs {
    #[command(flatten)]
    pub(super) stage: StageArgs,
    /// Tasks that wait, in rising order
    #[arg(long, value_delimiter = ',', default_value = "0,1000,10000,100000", value_name = "N,...")]
    pending: Vec<u32>,
    /// Claims at each of them
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    samples: u32,
}

/// The bench's own queue, with the clients and the connection that work on it.
struct Bench {
    /// Two connections, as for two programs.
    spawner: AbsurdClient,
    worker: AbsurdClient,
    sql: Client,
}

impl Bench {
    /// Runs a measurement on a fresh queue, prints what it found, and drops the queue.
    async fn run(
        args: &StageArgs,
        stage: &Stage,
        work: impl AsyncFnOnce(&Self) -> anyhow::Result<Report>,
    ) -> anyhow::Result<()> {
        let client = || AbsurdClient::connect(&ConnectOptions::new(&stage.url)).map(|client| client.with_queue(QUEUE));
        let bench = Self { spawner: client()?, worker: client()?, sql: connect(&stage.database).await? };
        anyhow::ensure!(
            bench.spawner.create_queue().await?,
            "queue {QUEUE} exists, maybe from a bench that was stopped; drop it: absurd queue drop --queue {QUEUE} --yes"
        );
        let outcome = work(&bench).await;
        bench.spawner.drop_queue().await?;
        outcome?.print(args.output);
        Ok(())
    }

    /// Inserts claimable tasks by SQL, oldest first.
    async fn preload(&self, tasks: u32, name: &str, params: &Value) -> anyhow::Result<()> {
        let insert = format!(
            "with ids as materialized (
               select absurd.portable_uuidv7() as task, absurd.portable_uuidv7() as run, i from generate_series(1, $1::int) i),
             runs as (insert into absurd.\"r_{QUEUE}\" (run_id, task_id, attempt, state, available_at)
                      select run, task, 1, 'pending', now() - interval '1 hour' + i * interval '1 us' from ids)
             insert into absurd.\"t_{QUEUE}\" (task_id, task_name, params, state, attempts, max_attempts, last_attempt_run)
             select task, $2, $3::text::jsonb, 'pending', 1, 1, run from ids"
        );
        let insert = self.sql.prepare(&insert).await?;
        let mut left = tasks;
        while left > 0 {
            let part = left.min(PRELOAD_PART);
            self.sql.execute(&insert, &[&part.cast_signed(), &name, &params.to_string()]).await?;
            left -= part;
        }
        self.sql.batch_execute(&format!("vacuum analyze absurd.\"t_{QUEUE}\", absurd.\"r_{QUEUE}\"")).await?;
        Ok(())
    }

    async fn commits(&self) -> anyhow::Result<i64> {
        // Sessions report their commits at most once per second.
        tokio::time::sleep(Duration::from_millis(1200)).await;
        let query = "select xact_commit from pg_stat_database where datname = current_database()";
        Ok(self.sql.query_one(query, &[]).await?.get(0))
    }

    /// The limit of plain SQL: claims and completes tasks in batches of 500, on one connection, over the same tables.
    /// Returns tasks per second.
    async fn sql_limit(&self, tasks: u32) -> anyhow::Result<f64> {
        let claim = format!(
            "with c as materialized (select run_id, task_id from absurd.\"r_{QUEUE}\" where state = 'pending' and available_at <= now()
                                      order by available_at limit 500 for update skip locked),
                  r as (update absurd.\"r_{QUEUE}\" r set state = 'running', claimed_by = 'sql', started_at = now(),
                               claim_expires_at = now() + interval '30 s' from c where r.run_id = c.run_id returning r.run_id),
                  t as (update absurd.\"t_{QUEUE}\" t set state = 'running', first_started_at = now() from c where t.task_id = c.task_id)
             select run_id from r"
        );
        let complete = format!(
            "with r as (update absurd.\"r_{QUEUE}\" r set state = 'completed', completed_at = now(), result = 'null'
                         from unnest($1::uuid[]) u where r.run_id = u and r.state = 'running' returning r.task_id)
             update absurd.\"t_{QUEUE}\" t set state = 'completed', completed_payload = 'null' from r where t.task_id = r.task_id"
        );
        let (claim, complete) = (self.sql.prepare(&claim).await?, self.sql.prepare(&complete).await?);
        self.sql.batch_execute("set enable_seqscan = off").await?;
        let started = Instant::now();
        loop {
            let rows = self.sql.query(&claim, &[]).await?;
            if rows.is_empty() {
                break;
            }
            let runs: Vec<uuid::Uuid> = rows.iter().map(|row| row.get(0)).collect();
            self.sql.execute(&complete, &[&runs]).await?;
        }
        Ok(f64::from(tasks) / started.elapsed().as_secs_f64())
    }
}

fn per_second(count: u32, took: Duration) -> f64 {
    f64::from(count) / took.as_secs_f64()
}

/// `absurd bench spawn`: spawns tasks with many calls in flight.
pub(super) async fn spawn(args: &SpawnArgs, stage: &Stage) -> anyhow::Result<()> {
    Bench::run(&args.stage, stage, async |bench| {
        let calls = args.tasks.div_ceil(args.batch);
        let bar = progress("calls", calls as usize)?;
        let before = bench.commits().await?;
        let places = Arc::new(Semaphore::new(args.in_flight as usize));
        let mut running: JoinSet<anyhow::Result<Duration>> = JoinSet::new();
        let mut times = Times::default();
        let started = Instant::now();
        for _ in 0..calls {
            let place = Arc::clone(&places).acquire_owned().await?;
            let (client, batch, bar) = (bench.spawner.clone(), args.batch, bar.clone());
            running.spawn(async move {
                let began = Instant::now();
                if batch == 1 {
                    client.spawn_task("bench", &json!({}), SpawnOptions::default()).await?;
                } else {
                    let new = |_| NewTask::new("bench", &json!({}), SpawnOptions::default());
                    client.spawn_tasks((0..batch).map(new).collect::<Result<_, _>>()?).await?;
                }
                drop(place);
                bar.inc(1);
                Ok(began.elapsed())
            });
            while let Some(done) = running.try_join_next() {
                times.note(done??);
            }
        }
        while let Some(done) = running.join_next().await {
            times.note(done??);
        }
        let took = started.elapsed();
        bar.finish_and_clear();
        let tasks = calls * args.batch;
        let commits = bench.commits().await? - before;
        Ok(Report::new("spawn")
            .rate("tasks_per_s", per_second(tasks, took))
            .rate("commits_per_task", f64::from(i32::try_from(commits)?) / f64::from(tasks))
            .times("call", times))
    })
    .await
}

/// Claims tasks and completes each by a call of its own, until `tasks` are completed. Returns the time from the first
/// to the last.
async fn complete(worker: &AbsurdClient, tasks: u32, credit: i32, times: &mut Times) -> anyhow::Result<Duration> {
    let bar = progress("tasks", tasks as usize)?;
    let mut stream = worker.claim_stream(StreamOptions { max_in_flight: credit, ..StreamOptions::default() }).await?;
    let mut running: JoinSet<anyhow::Result<Duration>> = JoinSet::new();
    let started = Instant::now();
    let mut taken = 0;
    while taken < tasks {
        let task = tokio::time::timeout(STANDSTILL_MAX, stream.next()).await.context("no task came")?;
        let task = task.context("the stream ended")?;
        taken += 1;
        running.spawn(async move {
            let began = Instant::now();
            task.complete(&json!({})).await?;
            Ok(began.elapsed())
        });
        while let Some(done) = running.try_join_next() {
            times.note(done??);
            bar.inc(1);
        }
    }
    while let Some(done) = running.join_next().await {
        times.note(done??);
    }
    let took = started.elapsed();
    bar.finish_and_clear();
    stream.close(STANDSTILL_MAX).await?;
    Ok(took)
}

/// `absurd bench drain`: drains a preloaded queue, and does the same by plain SQL.
pub(super) async fn drain(args: &DrainArgs, stage: &Stage) -> anyhow::Result<()> {
    Bench::run(&args.stage, stage, async |bench| {
        let mut times = Times::default();
        // Both sides are warmed up before both are measured.
        bench.preload(2000, "bench", &json!({})).await?;
        complete(&bench.worker, 2000, args.credit, &mut Times::default()).await?;
        bench.preload(args.tasks, "bench", &json!({})).await?;
        let limit = bench.sql_limit(args.tasks).await?;
        bench.preload(args.tasks, "bench", &json!({})).await?;
        let before = bench.commits().await?;
        let took = complete(&bench.worker, args.tasks, args.credit, &mut times).await?;
        let commits = bench.commits().await? - before;
        let rate = per_second(args.tasks, took);
        Ok(Report::new("drain")
            .rate("tasks_per_s", rate)
            .rate("sql_limit_tasks_per_s", limit)
            .rate("ratio_to_sql_limit", rate / limit)
            .rate("commits_per_task", f64::from(i32::try_from(commits)?) / f64::from(args.tasks))
            .times("complete", times))
    })
    .await
}

/// `absurd bench steady`: spawns and completes tasks at the same time.
pub(super) async fn steady(args: &SteadyArgs, stage: &Stage) -> anyhow::Result<()> {
    /// Maximum number of tasks spawned but not yet received by the worker.
    const AHEAD_MAX: usize = 2000;
    Bench::run(&args.stage, stage, async |bench| {
        let mut stream =
            bench.worker.claim_stream(StreamOptions { max_in_flight: args.credit, ..StreamOptions::default() }).await?;
        let until = Instant::now() + args.time.0;
        let ahead = Arc::new(Semaphore::new(AHEAD_MAX));
        let zero = Instant::now();
        let mut spawners: JoinSet<anyhow::Result<u32>> = JoinSet::new();
        for _ in 0..args.in_flight {
            let (client, ahead) = (bench.spawner.clone(), Arc::clone(&ahead));
            spawners.spawn(async move {
                let mut spawned = 0;
                while Instant::now() < until {
                    ahead.acquire().await?.forget();
                    let at = u64::try_from(zero.elapsed().as_micros())?;
                    client.spawn_task("bench", &at, SpawnOptions::default()).await?;
                    spawned += 1;
                }
                Ok(spawned)
            });
        }
        let (mut handled, mut times) = (0, Times::default());
        let mut completing: JoinSet<Result<(), absurd_client::Error>> = JoinSet::new();
        let mut spawned = None;
        while spawned.is_none_or(|spawned| handled < spawned) {
            let task = match tokio::time::timeout(Duration::from_millis(50), stream.next()).await {
                Ok(task) => task.context("the stream ended")?,
                Err(_) if Instant::now() > until + STANDSTILL_MAX => anyhow::bail!("no task came"),
                Err(_) => {
                    if Instant::now() > until && spawned.is_none() {
                        let mut count = 0;
                        while let Some(one) = spawners.join_next().await {
                            count += one??;
                        }
                        spawned = Some(count);
                    }
                    continue;
                }
            };
            let at: u64 = task.params()?;
            times.note(zero.elapsed().saturating_sub(Duration::from_micros(at)));
            handled += 1;
            ahead.add_permits(1);
            completing.spawn(async move { task.complete(&json!({})).await });
            while let Some(done) = completing.try_join_next() {
                done??;
            }
        }
        let took = zero.elapsed();
        while let Some(done) = completing.join_next().await {
            done??;
        }
        stream.close(STANDSTILL_MAX).await?;
        Ok(Report::new("steady").rate("tasks_per_s", per_second(handled, took)).times("spawn_to_worker", times))
    })
    .await
}

/// `absurd bench steps`: runs tasks with steps through the durable worker.
pub(super) async fn steps(args: &StepsArgs, stage: &Stage) -> anyhow::Result<()> {
    Bench::run(&args.stage, stage, async |bench| {
        let absurd = Absurd::new(bench.worker.clone());
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        let count = args.steps;
        absurd.register("bench", move |ctx: Execution, _: Value| {
            let tell = tell.clone();
            async move {
                let began = Instant::now();
                for _ in 0..count {
                    ctx.step("s", async || Ok::<_, BoxError>(json!({"n": 1}))).await?;
                }
                let _ = tell.send(began.elapsed());
                Ok::<_, BoxError>(json!({}))
            }
        });
        bench.preload(args.tasks, "bench", &json!({})).await?;
        let before = bench.commits().await?;
        let bar = progress("tasks", args.tasks as usize)?;
        let mut times = Times::default();
        let started = Instant::now();
        let concurrency = args.concurrency as usize;
        let options = WorkerOptions::default().concurrency(concurrency).prefetch(concurrency);
        let worker = absurd.start_worker(options).await?;
        for _ in 0..args.tasks {
            let took = tokio::time::timeout(STANDSTILL_MAX, told.recv()).await.context("no task ended")?;
            times.note(took.context("the worker ended")?);
            bar.inc(1);
        }
        worker.stop().await;
        let took = started.elapsed();
        bar.finish_and_clear();
        let commits = bench.commits().await? - before;
        let rate = per_second(args.tasks, took);
        Ok(Report::new("steps")
            .rate("tasks_per_s", rate)
            .rate("steps_per_s", rate * f64::from(args.steps))
            .rate("commits_per_task", f64::from(i32::try_from(commits)?) / f64::from(args.tasks))
            .times("task", times))
    })
    .await
}

/// `absurd bench backlog`: claims one task at a time, while more and more tasks wait.
pub(super) async fn backlog(args: &BacklogArgs, stage: &Stage) -> anyhow::Result<()> {
    Bench::run(&args.stage, stage, async |bench| {
        let mut report = Report::new("backlog");
        let mut loaded = 0;
        for &pending in &args.pending {
            bench.preload(pending.saturating_sub(loaded), "bench", &json!({})).await?;
            loaded = loaded.max(pending);
            let mut times = Times::default();
            let bar = progress("claims", args.samples as usize)?;
            for _ in 0..args.samples {
                if pending == 0 {
                    bench.preload(1, "bench", &json!({})).await?;
                }
                let began = Instant::now();
                let mut claimed = bench.worker.claim_task(ClaimOptions::default()).await?;
                times.note(began.elapsed());
                let task = claimed.pop().context("there was nothing to claim")?;
                task.complete(&json!({})).await?;
                bar.inc(1);
            }
            loaded = loaded.saturating_sub(args.samples);
            bar.finish_and_clear();
            report = report.times(&format!("claim_at_{pending}"), times);
        }
        Ok(report)
    })
    .await
}
