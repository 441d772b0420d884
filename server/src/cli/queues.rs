//! `absurd queue`: creates, lists, counts and drops queues.

use std::time::Duration;

use absurd_client::{AbsurdClient, Queue, QueueOptions, QueueStats, StorageMode};
use clap::{Args, Subcommand};
use futures_util::StreamExt as _;
use serde_json::json;

use super::ClientArgs;
use super::output::{self, Output, note, out};
use crate::store::queue::COUNT_MAX;

/// Counts in flight.
const COUNTS_AT_ONCE: usize = 8;

/// `absurd queue ...`
#[derive(Debug, Subcommand)]
pub(super) enum QueueCommand {
    /// Create a queue; harmless when it exists
    #[command(after_help = "Examples:\n  absurd queue create mails\n  absurd queue create events --partitioned")]
    Create {
        /// Weekly partitions
        #[arg(long)]
        partitioned: bool,
        #[command(flatten)]
        queue: OneQueue,
    },
    /// List all queues with their counts
    #[command(alias = "ls", after_help = "Examples:\n  absurd queue list\n  absurd queue list --no-counts -o json")]
    List {
        /// Count nothing, which is quick however many queues there are
        #[arg(long)]
        no_counts: bool,
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Drop a queue with all its tasks
    #[command(aliases = ["delete", "rm"], after_help = "Example:\n  absurd queue drop mails --yes")]
    Drop {
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
        #[command(flatten)]
        queue: OneQueue,
    },
    /// Count what a queue holds
    #[command(after_help = "Examples:\n  absurd queue stats mails\n  absurd queue stats mails -o json")]
    Stats(OneQueue),
}

/// A queue, and where it is.
#[derive(Debug, Args)]
pub(super) struct OneQueue {
    /// Name of the queue, instead of --queue
    #[arg(value_name = "QUEUE")]
    name: Option<String>,
    #[command(flatten)]
    client: ClientArgs,
}

impl OneQueue {
    fn args(self) -> anyhow::Result<ClientArgs> {
        self.client.with_queue(self.name)
    }
}

/// Runs a queue command.
pub(super) async fn run(command: QueueCommand) -> anyhow::Result<()> {
    match command {
        QueueCommand::Create { partitioned, queue } => {
            let args = queue.args()?;
            args.reach(create(&args, partitioned)).await
        }
        QueueCommand::List { no_counts, client } => client.work(list(&client, !no_counts)).await,
        QueueCommand::Drop { yes, queue } => {
            let args = queue.args()?;
            let question = format!("Drop queue {:?} with all its tasks?", args.queue());
            anyhow::ensure!(yes || output::confirm(&question)?, "nothing was dropped");
            args.reach(drop(&args)).await
        }
        QueueCommand::Stats(queue) => {
            let args = queue.args()?;
            args.reach(stats(&args)).await
        }
    }
}

async fn create(args: &ClientArgs, partitioned: bool) -> anyhow::Result<()> {
    let storage_mode = if partitioned { StorageMode::Partitioned } else { StorageMode::Unpartitioned };
    let options = QueueOptions { storage_mode, ..QueueOptions::default() };
    let (client, name) = (args.client()?, args.queue());
    let created = client.create_queue_with(options).await?;
    match args.output {
        Output::Table => out!("{name} {}", if created { "created" } else { "exists" }),
        Output::Json => output::json(&json!({"queue": name, "created": created})),
    }
    Ok(())
}

async fn drop(args: &ClientArgs) -> anyhow::Result<()> {
    let (client, name) = (args.client()?, args.queue());
    let dropped = client.drop_queue().await?;
    match args.output {
        Output::Table => out!("{name} {}", if dropped { "dropped" } else { "did not exist" }),
        Output::Json => output::json(&json!({"queue": name, "dropped": dropped})),
    }
    Ok(())
}

async fn list(args: &ClientArgs, counts: bool) -> anyhow::Result<()> {
    let client = args.client()?;
    let queues = client.list_queues().await?;
    let stats = if counts { Some(count_all(&client, &queues).await) } else { None };
    match args.output {
        Output::Table => {
            let mut names = vec!["QUEUE", "STORAGE", "CREATED"];
            names.extend(stats.iter().flat_map(|_| COLUMNS.map(|(_, column, _)| column)));
            let rows: Vec<Vec<String>> = queues
                .iter()
                .enumerate()
                .map(|(index, queue)| {
                    let mut row = vec![queue.name.clone(), mode(queue).to_owned(), output::time(queue.created_at)];
                    if let Some(stats) = &stats {
                        row.extend(COLUMNS.map(|(_, _, count)| {
                            stats[index].as_ref().map_or_else(|| "?".to_owned(), |stats| shown(stats, count(stats)))
                        }));
                    }
                    row
                })
                .collect();
            output::table(&names, &rows);
        }
        Output::Json => {
            let object = |(index, queue): (usize, &Queue)| {
                let mut object = json!({
                    "queue": queue.name, "storage_mode": mode(queue), "created_at": output::json_time(queue.created_at),
                });
                for (name, _, count) in COLUMNS.iter().filter(|_| stats.is_some()) {
                    let stats = stats.as_ref().and_then(|stats| stats[index].as_ref());
                    object[*name] = json!(stats.map(count));
                }
                object
            };
            output::json(&queues.iter().enumerate().map(object).collect());
        }
    }
    Ok(())
}

fn mode(queue: &Queue) -> &'static str {
    match queue.storage_mode {
        StorageMode::Partitioned => "partitioned",
        StorageMode::Unpartitioned => "unpartitioned",
    }
}

/// A count: its name in JSON, its column in a list, its field.
type Column = (&'static str, &'static str, fn(&QueueStats) -> i64);

const COLUMNS: [Column; 5] = [
    ("pending", "PENDING", |stats| stats.pending),
    ("running", "RUNNING", |stats| stats.running),
    ("sleeping", "SLEEPING", |stats| stats.sleeping),
    ("completed", "COMPLETED", |stats| stats.completed),
    ("cancelled", "CANCELLED", |stats| stats.cancelled),
];

/// A count for people; a capped one ends in a plus.
fn shown(stats: &QueueStats, count: i64) -> String {
    if stats.capped && count >= COUNT_MAX { format!("{count}+") } else { count.to_string() }
}

/// Counts queues, `COUNTS_AT_ONCE` at a time; returns the counts in the order of the queues. A queue that cannot be
/// counted is `None`; the cause is printed to standard error.
async fn count_all(client: &AbsurdClient, queues: &[Queue]) -> Vec<Option<QueueStats>> {
    let counts = queues.iter().map(|queue| {
        let client = client.with_queue(queue.name.as_str());
        async move { client.get_queue_stats().await }
    });
    let answers: Vec<_> = futures_util::stream::iter(counts).buffered(COUNTS_AT_ONCE).collect().await;
    let told = |(queue, answer): (&Queue, Result<QueueStats, absurd_client::Error>)| {
        answer.map_err(|error| note!("queue {:?} cannot be counted: {error}", queue.name)).ok()
    };
    queues.iter().zip(answers).map(told).collect()
}

async fn stats(args: &ClientArgs) -> anyhow::Result<()> {
    let stats = args.client()?.get_queue_stats().await?;
    let age = stats.oldest_claimable_age;
    let counts = [
        ("pending", "pending runs", stats.pending),
        ("running", "running", stats.running),
        ("sleeping", "sleeping", stats.sleeping),
        ("completed", "completed tasks", stats.completed),
        ("failed_runs", "failed attempts", stats.failed_runs),
        ("cancelled", "cancelled", stats.cancelled),
        ("streams", "streams", stats.streams.into()),
    ];
    match args.output {
        Output::Table => {
            let mut fields: Vec<(&str, String)> =
                counts.iter().map(|(_, name, count)| (*name, shown(&stats, *count))).collect();
            fields.push(("oldest waits", age.map_or_else(|| "none waits".into(), output::span)));
            output::record(&fields);
        }
        Output::Json => {
            let mut object: serde_json::Map<_, _> =
                counts.iter().map(|(name, _, count)| ((*name).to_owned(), json!(count))).collect();
            object.insert("capped".into(), stats.capped.into());
            object.insert("oldest_claimable_seconds".into(), json!(age.as_ref().map(Duration::as_secs)));
            output::json(&object.into());
        }
    }
    Ok(())
}
