//! `absurd queue`.

use std::time::Duration;

use absurd_client::{Queue, QueueOptions, StorageMode};
use clap::{Args, Subcommand};
use serde_json::json;

use super::ClientArgs;
use super::output::{self, Output, out};

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
    /// List all queues
    #[command(alias = "ls", after_help = "Examples:\n  absurd queue list\n  absurd queue list -o json")]
    List(ClientArgs),
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

/// Carries it out.
pub(super) async fn run(command: QueueCommand) -> anyhow::Result<()> {
    match command {
        QueueCommand::Create { partitioned, queue } => {
            let args = queue.args()?;
            args.reach(create(&args, partitioned)).await
        }
        QueueCommand::List(args) => args.reach(list(&args)).await,
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

async fn list(args: &ClientArgs) -> anyhow::Result<()> {
    let queues = args.client()?.list_queues().await?;
    let mode = |queue: &Queue| match queue.storage_mode {
        StorageMode::Partitioned => "partitioned",
        StorageMode::Unpartitioned => "unpartitioned",
    };
    match args.output {
        Output::Table => {
            let rows: Vec<Vec<String>> = queues
                .iter()
                .map(|queue| vec![queue.name.clone(), mode(queue).to_owned(), output::time(queue.created_at)])
                .collect();
            output::table(&["QUEUE", "STORAGE", "CREATED"], &rows);
        }
        Output::Json => output::json(
            &queues
                .iter()
                .map(|queue| {
                    json!({
                        "queue": queue.name, "storage_mode": mode(queue),
                        "created_at": output::json_time(queue.created_at),
                    })
                })
                .collect(),
        ),
    }
    Ok(())
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
            let more =
                |count: i64| if stats.capped && count >= 100_000 { format!("{count}+") } else { count.to_string() };
            let mut fields: Vec<(&str, String)> = counts.iter().map(|(_, name, count)| (*name, more(*count))).collect();
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
