//! `absurd bench idle`: opens streams without work, and measures the server's memory and the database's transactions.

use std::time::Duration;

use absurd_client::{AbsurdClient, ClaimStream, ConnectOptions, StreamOptions};
use anyhow::Context as _;
use clap::Args;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::json;

use super::{Stage, StageArgs, connect, progress};
use crate::cli::output::{self, Output};

/// Streams per connection, as many as behind a mesh.
const STREAMS_PER_CONNECTION: u32 = 100;
/// Calls in flight while queues and streams are created.
const CALLS_MAX: usize = 16;
/// Longest delay with which Postgres reports the transactions of an idle session.
const STATISTICS_DELAY: Duration = Duration::from_secs(11);
const TRANSACTIONS: &str =
    "select (xact_commit + xact_rollback)::float8 from pg_stat_database where datname = current_database()";

/// Flags of the measurement.
#[derive(Debug, Args)]
pub(in crate::cli) struct IdleArgs {
    #[command(flatten)]
    pub(super) stage: StageArgs,
    /// Streams to open, 100 to a connection
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    streams: u32,
    /// Queues to spread them over
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    queues: u32,
    /// How long to count transactions
    #[arg(long, default_value = "60s", value_parser = humantime::parse_duration)]
    time: Duration,
}

/// Measures, prints, and drops the queues that it used.
pub(super) async fn run(args: &IdleArgs, stage: &Stage) -> anyhow::Result<()> {
    let clients: Vec<AbsurdClient> = (0..args.streams.div_ceil(STREAMS_PER_CONNECTION))
        .map(|_| AbsurdClient::connect(&ConnectOptions::new(&stage.url)))
        .collect::<Result<_, _>>()?;
    let queues: Vec<AbsurdClient> = (0..args.queues)
        .map(|queue| clients[queue as usize % clients.len()].with_queue(format!("absurd-bench-{queue}")))
        .collect();
    let bar = progress("creating queues", queues.len())?;
    stream::iter(&queues)
        .map(async |queue| queue.create_queue().await.map(|_| bar.inc(1)))
        .buffer_unordered(CALLS_MAX)
        .try_collect::<()>()
        .await?;
    bar.finish_and_clear();
    let outcome = measure(args, stage, &clients).await;
    let bar = progress("dropping queues", queues.len())?;
    stream::iter(&queues)
        .map(async |queue| queue.drop_queue().await.map(|_| bar.inc(1)))
        .buffer_unordered(CALLS_MAX)
        .try_collect::<()>()
        .await?;
    bar.finish_and_clear();
    outcome
}

async fn measure(args: &IdleArgs, stage: &Stage, clients: &[AbsurdClient]) -> anyhow::Result<()> {
    let memory = || stage.server.as_ref().map(super::OwnServer::memory_kib).transpose();
    let sql = connect(&stage.database).await?;
    let empty = memory()?;
    let bar = progress("opening streams", args.streams as usize)?;
    let open = async |number: u32| {
        let client = &clients[number as usize % clients.len()];
        let queue = client.with_queue(format!("absurd-bench-{}", number % args.queues));
        queue.claim_stream(StreamOptions::default()).await.inspect(|_| bar.inc(1))
    };
    let streams: Vec<ClaimStream> =
        stream::iter(0..args.streams).map(open).buffer_unordered(CALLS_MAX).try_collect().await?;
    bar.finish_and_clear();
    tokio::time::sleep(STATISTICS_DELAY).await;

    let before = transactions(&sql).await?;
    let bar = progress("idle seconds", usize::try_from(args.time.as_secs())?)?;
    let mut second = tokio::time::interval(Duration::from_secs(1));
    second.tick().await;
    let started = tokio::time::Instant::now();
    while started.elapsed() < args.time {
        second.tick().await;
        bar.inc(1);
    }
    bar.finish_and_clear();
    let rate = (transactions(&sql).await? - before) / started.elapsed().as_secs_f64();
    let full = memory()?;
    let per_stream = match (empty, full) {
        (Some(empty), Some(full)) => Some(full.saturating_sub(empty) as f64 / f64::from(args.streams)),
        _ => None,
    };
    drop(streams);
    match args.stage.output {
        Output::Table => output::record(&[
            ("streams", format!("{} on {} connections, {} queues", args.streams, clients.len(), args.queues)),
            ("transactions", format!("{rate:.2}/s at Postgres, over {} s", args.time.as_secs())),
            ("memory", full.map_or("not known: the server is not ours".into(), |kib| format!("{kib} KiB"))),
            ("per stream", per_stream.map_or(String::new(), |kib| format!("{kib:.2} KiB"))),
        ]),
        Output::Json => output::json(&json!({
            "streams": args.streams, "connections": clients.len(), "queues": args.queues,
            "transactions_per_second": rate, "server_memory_kib": full, "memory_per_stream_kib": per_stream,
        })),
    }
    Ok(())
}

/// Transactions of the database so far, including those of the bench.
async fn transactions(sql: &tokio_postgres::Client) -> anyhow::Result<f64> {
    Ok(sql.query_one(TRANSACTIONS, &[]).await.context("cannot read pg_stat_database")?.get(0))
}
