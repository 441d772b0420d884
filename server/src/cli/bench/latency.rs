//! `absurd bench latency`: times one task at a time on an idle server, from its spawn to its delivery on a claim
//! stream.
//!
//! Three measurements alternate, so that they meet the same disk: a bare durable commit, a spawn over gRPC, a spawn by
//! SQL. Each task is completed before the next sample begins.

use std::time::{Duration, Instant};

use absurd_client::{AbsurdClient, ClaimStream, ConnectOptions, SpawnOptions, StreamOptions};
use anyhow::Context as _;
use clap::Args;
use serde_json::json;

use super::{BARE_COMMIT, Stage, StageArgs, connect, progress, quantiles};

const QUEUE: &str = "absurd-bench";
/// Longest wait for one delivery.
const DELIVERY_MAX: Duration = Duration::from_secs(30);
const SQL_SPAWN: &str = "select task_id from absurd.spawn_task($1, 'bench', '{}'::jsonb, '{}'::jsonb)";

/// Flags of the measurement.
#[derive(Debug, Args)]
pub(in crate::cli) struct LatencyArgs {
    #[command(flatten)]
    pub(super) stage: StageArgs,
    /// Samples of each kind
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    samples: u32,
    /// Samples before that, which do not count
    #[arg(long, default_value_t = 50)]
    warm_up: u32,
    /// Quiet time before each sample
    #[arg(long, default_value = "10ms", value_parser = humantime::parse_duration)]
    pause: Duration,
}

/// Measures, prints, and drops the queue that it used.
pub(super) async fn run(args: &LatencyArgs, stage: &Stage) -> anyhow::Result<()> {
    // Two connections, as for two programs.
    let spawner = AbsurdClient::connect(&ConnectOptions::new(&stage.url))?.with_queue(QUEUE);
    let worker = AbsurdClient::connect(&ConnectOptions::new(&stage.url))?.with_queue(QUEUE);
    anyhow::ensure!(
        spawner.create_queue().await?,
        "queue {QUEUE} exists, maybe from a bench that was stopped; drop it: absurd queue drop --queue {QUEUE} --yes"
    );
    let outcome = measure(args, stage, &spawner, &worker).await;
    spawner.drop_queue().await?;
    quantiles(args.stage.output, outcome?);
    Ok(())
}

async fn measure(
    args: &LatencyArgs,
    stage: &Stage,
    spawner: &AbsurdClient,
    worker: &AbsurdClient,
) -> anyhow::Result<[(&'static str, Vec<Duration>); 3]> {
    let sql = connect(&stage.database).await?;
    let sql_spawn = sql.prepare(SQL_SPAWN).await?;
    let bare_commit = sql.prepare(BARE_COMMIT).await?;
    let mut tasks = worker.claim_stream(StreamOptions::default()).await?;
    let mut times = [Vec::new(), Vec::new(), Vec::new()];
    let rounds = args.warm_up.saturating_add(args.samples);
    let bar = progress("samples", rounds as usize)?;
    for round in 0..rounds {
        let mut took = [Duration::ZERO; 3];
        for (kind, took) in took.iter_mut().enumerate() {
            tokio::time::sleep(args.pause).await;
            let started = Instant::now();
            match kind {
                0 => {
                    sql.query_one(&bare_commit, &[]).await?;
                    *took = started.elapsed();
                }
                1 => {
                    let spawn = async {
                        spawner.spawn_task("bench", &json!({}), SpawnOptions::default()).await?;
                        anyhow::Ok(())
                    };
                    *took = Box::pin(delivered(&mut tasks, started, spawn)).await?;
                }
                _ => {
                    let spawn = async {
                        sql.query_one(&sql_spawn, &[&QUEUE]).await?;
                        anyhow::Ok(())
                    };
                    *took = Box::pin(delivered(&mut tasks, started, spawn)).await?;
                }
            }
        }
        if round >= args.warm_up {
            times.iter_mut().zip(took).for_each(|(times, took)| times.push(took));
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    tasks.close(DELIVERY_MAX).await?;
    let [bare, grpc, sql] = times;
    Ok([("bare commit", bare), ("spawn over gRPC", grpc), ("spawn by SQL", sql)])
}

/// Spawns a task, waits for its delivery and completes it. Returns the time until the delivery.
async fn delivered(
    tasks: &mut ClaimStream,
    started: Instant,
    spawn: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<Duration> {
    let deliver = async {
        let task = tasks.next().await.context("the stream ended")?;
        anyhow::Ok((task, started.elapsed()))
    };
    let ((), (task, took)) = tokio::time::timeout(DELIVERY_MAX, async { tokio::try_join!(spawn, deliver) })
        .await
        .with_context(|| format!("no task came within {} s", DELIVERY_MAX.as_secs()))??;
    task.complete(&json!(null)).await?;
    Ok(took)
}
