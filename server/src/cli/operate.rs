//! Operator commands: queues and tasks, over gRPC.

use std::time::Duration;

use absurd_client::{
    AbsurdClient, CancelOutcome, Emitted, Json, ListOptions, NewTask, Queue, QueueOptions, RetryOptions, SpawnOptions,
    State, StorageMode,
};
use anyhow::Context as _;
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use uuid::Uuid;

use super::ClientArgs;
use super::output::{self, Output};
use crate::settings::Span;

/// Tasks of one call when many are spawned.
const BULK: usize = 500;

/// `absurd queue ...`
#[derive(Debug, Subcommand)]
pub(super) enum QueueCommand {
    /// Create a queue; harmless when it exists
    #[command(after_help = "Example:\n  absurd queue create --queue mails")]
    Create {
        /// Weekly partitions
        #[arg(long)]
        partitioned: bool,
        #[command(flatten)]
        client: ClientArgs,
    },
    /// List all queues
    List(ClientArgs),
    /// Drop a queue with all its tasks
    #[command(after_help = "Example:\n  absurd queue drop --queue mails --yes")]
    Drop {
        /// Do not ask
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Count what a queue holds
    Stats(ClientArgs),
}

/// `absurd event ...`
#[derive(Debug, Subcommand)]
pub(super) enum EventCommand {
    /// Emit an event: runs that wait for it go on
    #[command(after_help = "Examples:\n  absurd event emit shipment.packed:42 '{\"tracking_number\":\"T-1\"}'\n  \
        absurd event emit go")]
    Emit {
        /// Name; the first emission of a name wins
        name: String,
        /// Payload, as JSON
        #[arg(default_value = "null")]
        payload: String,
        #[command(flatten)]
        client: ClientArgs,
    },
}

/// `absurd task ...`
#[derive(Debug, Subcommand)]
pub(super) enum TaskCommand {
    /// Spawn a task, or many
    #[command(after_help = "Examples:\n  absurd task spawn greet '{\"name\":\"world\"}'\n  \
        absurd task spawn greet '{}' --max-attempts 5 --key order-42 --wait 30s\n  \
        absurd task spawn noop --count 100000")]
    Spawn(SpawnArgs),
    /// Read a task
    Get(OneTask),
    /// List tasks, newest first
    #[command(after_help = "Example:\n  absurd task list --state failed --limit 20")]
    List(ListArgs),
    /// Cancel a task that has not ended
    Cancel(OneTask),
    /// Give a failed task another attempt
    Retry(RetryArgs),
    /// Follow a task to its end; the exit code says whether it completed
    Watch(WatchArgs),
}

/// A task of a queue.
#[derive(Debug, Args)]
pub(super) struct OneTask {
    /// Id of the task
    task_id: Uuid,
    #[command(flatten)]
    client: ClientArgs,
}

/// Flags of `task spawn`.
#[derive(Debug, Args)]
pub(super) struct SpawnArgs {
    /// Name of the handler
    name: String,
    /// Input, as JSON
    #[arg(default_value = "null")]
    params: String,
    /// Attempts at most
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(i32).range(1..))]
    max_attempts: i32,
    /// Headers, as a JSON object
    #[arg(long)]
    headers: Option<String>,
    /// Idempotency key: while a task with this key exists, no second one is made
    #[arg(long)]
    key: Option<String>,
    /// Spawn this many tasks
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    count: u64,
    /// Wait this long for the task to end, and print its result
    #[arg(long, value_name = "SPAN")]
    wait: Option<Span>,
    #[command(flatten)]
    client: ClientArgs,
}

/// Flags of `task list`.
#[derive(Debug, Args)]
pub(super) struct ListArgs {
    /// Only tasks in this state
    #[arg(long, value_parser = ["pending", "running", "sleeping", "completed", "failed", "cancelled"])]
    state: Option<String>,
    /// Only tasks of this name
    #[arg(long)]
    name: Option<String>,
    /// At most this many
    #[arg(long, default_value_t = 50)]
    limit: usize,
    #[command(flatten)]
    client: ClientArgs,
}

/// Flags of `task retry`.
#[derive(Debug, Args)]
pub(super) struct RetryArgs {
    /// Id of the task
    task_id: Uuid,
    /// Spawn a copy instead
    #[arg(long)]
    spawn_new: bool,
    /// New limit of attempts; one more than now when absent
    #[arg(long)]
    max_attempts: Option<i32>,
    #[command(flatten)]
    client: ClientArgs,
}

/// Flags of `task watch`.
#[derive(Debug, Args)]
pub(super) struct WatchArgs {
    /// Id of the task
    task_id: Uuid,
    /// Give up after this long; for ever when absent
    #[arg(long, value_name = "SPAN")]
    timeout: Option<Span>,
    #[command(flatten)]
    client: ClientArgs,
}

/// `absurd health`
pub(super) async fn health(args: ClientArgs) -> anyhow::Result<()> {
    use tonic_health::pb::health_check_response::ServingStatus;
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    let mut endpoint = tonic::transport::Endpoint::from_shared(args.url.clone())?
        .connect_timeout(Duration::from_secs(3))
        .timeout(Duration::from_secs(3));
    if args.url.starts_with("https:") {
        let mut tls = tonic::transport::ClientTlsConfig::new();
        if let Some(ca) = &args.tls_ca {
            tls = tls.ca_certificate(tonic::transport::Certificate::from_pem(std::fs::read(ca)?));
        }
        endpoint = endpoint.tls_config(tls)?;
    }
    let channel = endpoint.connect().await.with_context(|| format!("no server answers at {}", args.url))?;
    let response = HealthClient::new(channel).check(HealthCheckRequest::default()).await;
    let status = response.map_err(|status| anyhow::anyhow!("{}", status.message()))?.into_inner().status();
    match args.output {
        Output::Table => println!("{}", status.as_str_name()),
        Output::Json => output::json(&json!({"status": status.as_str_name()})),
    }
    anyhow::ensure!(status == ServingStatus::Serving, "the server is not ready");
    Ok(())
}

/// `absurd event ...`
pub(super) async fn event(command: EventCommand) -> anyhow::Result<()> {
    let EventCommand::Emit { name, payload, client: args } = command;
    let Emitted { applied, woken } = args.client()?.emit_event_json(&name, Json::from_text(payload)).await?;
    match args.output {
        Output::Json => output::json(&json!({"applied": applied, "woken": woken})),
        Output::Table if applied => println!("emitted; {woken} runs woken"),
        Output::Table => println!("had been emitted before; the first payload stays"),
    }
    Ok(())
}

/// `absurd queue ...`
pub(super) async fn queue(command: QueueCommand) -> anyhow::Result<()> {
    match command {
        QueueCommand::Create { partitioned, client: args } => {
            let storage_mode = if partitioned { StorageMode::Partitioned } else { StorageMode::Unpartitioned };
            let options = QueueOptions { storage_mode, ..QueueOptions::default() };
            let created = args.client()?.create_queue_with(options).await?;
            match args.output {
                Output::Table => println!("{} {}", args.queue, if created { "created" } else { "exists" }),
                Output::Json => output::json(&json!({"queue": args.queue, "created": created})),
            }
        }
        QueueCommand::List(args) => list_queues(&args).await?,
        QueueCommand::Drop { yes, client: args } => {
            anyhow::ensure!(
                yes || confirm(&format!("Drop queue {:?} with all its tasks?", args.queue))?,
                "nothing was dropped"
            );
            let dropped = args.client()?.drop_queue().await?;
            match args.output {
                Output::Table => println!("{} {}", args.queue, if dropped { "dropped" } else { "did not exist" }),
                Output::Json => output::json(&json!({"queue": args.queue, "dropped": dropped})),
            }
        }
        QueueCommand::Stats(args) => stats(&args).await?,
    }
    Ok(())
}

fn confirm(question: &str) -> anyhow::Result<bool> {
    use std::io::{IsTerminal as _, Write as _};
    anyhow::ensure!(std::io::stdin().is_terminal(), "this cannot be undone: say --yes");
    print!("{question} [y/N] ");
    std::io::stdout().flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(answer.trim().eq_ignore_ascii_case("y"))
}

async fn list_queues(args: &ClientArgs) -> anyhow::Result<()> {
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
                        "created_at": output::time(queue.created_at),
                    })
                })
                .collect(),
        ),
    }
    Ok(())
}

async fn stats(args: &ClientArgs) -> anyhow::Result<()> {
    let stats = args.client()?.get_queue_stats().await?;
    let age = stats.oldest_claimable_age.as_ref().map(Duration::as_secs);
    let counts = [
        ("pending", stats.pending),
        ("running", stats.running),
        ("sleeping", stats.sleeping),
        ("completed", stats.completed),
        ("failed_runs", stats.failed_runs),
        ("cancelled", stats.cancelled),
        ("streams", stats.streams.into()),
    ];
    match args.output {
        Output::Table => {
            let more =
                |count: i64| if stats.capped && count >= 100_000 { format!("{count}+") } else { count.to_string() };
            let mut fields: Vec<(&str, String)> = counts.iter().map(|(name, count)| (*name, more(*count))).collect();
            fields.push(("oldest", age.map_or_else(|| "none waits".into(), |seconds| format!("{seconds} s"))));
            output::record(&fields);
        }
        Output::Json => {
            let mut object: serde_json::Map<_, _> =
                counts.iter().map(|(name, count)| ((*name).to_owned(), json!(count))).collect();
            object.insert("capped".into(), stats.capped.into());
            object.insert("oldest_claimable_seconds".into(), json!(age));
            output::json(&object.into());
        }
    }
    Ok(())
}

/// `absurd task ...`
pub(super) async fn task(command: TaskCommand) -> anyhow::Result<()> {
    match command {
        TaskCommand::Spawn(args) => spawn(args).await,
        TaskCommand::Get(args) => get(&args).await,
        TaskCommand::List(args) => list(&args).await,
        TaskCommand::Cancel(args) => {
            let CancelOutcome { cancelled, state } = args.client.client()?.cancel_task_by_id(args.task_id).await?;
            match args.client.output {
                Output::Table if cancelled => println!("cancelled"),
                Output::Table => println!("not cancelled: the task is {state}"),
                Output::Json => output::json(&json!({"cancelled": cancelled, "state": state.as_str()})),
            }
            Ok(())
        }
        TaskCommand::Retry(args) => {
            let options = RetryOptions { spawn_new: args.spawn_new, max_attempts: args.max_attempts };
            let spawned = args.client.client()?.retry_task(args.task_id, options).await?;
            print_spawned(args.client.output, &spawned);
            Ok(())
        }
        TaskCommand::Watch(args) => {
            let client = args.client.client()?;
            watch(&client, args.task_id, args.timeout.map(|span| span.0), args.client.output).await
        }
    }
}

fn print_spawned(how: Output, spawned: &absurd_client::Spawned) {
    match how {
        Output::Table => output::record(&[
            ("task_id", spawned.task_id.to_string()),
            ("run_id", spawned.run_id.to_string()),
            ("attempt", spawned.attempt.to_string()),
            ("created", spawned.created.to_string()),
        ]),
        Output::Json => output::json(&json!({
            "task_id": spawned.task_id, "run_id": spawned.run_id, "attempt": spawned.attempt,
            "created": spawned.created,
        })),
    }
}

async fn spawn(args: SpawnArgs) -> anyhow::Result<()> {
    let client = args.client.client()?;
    let headers = args.headers.as_deref().map(serde_json::from_str).transpose();
    let options = SpawnOptions {
        max_attempts: Some(args.max_attempts),
        headers: headers.context("--headers: not a JSON object")?.unwrap_or_default(),
        idempotency_key: args.key.clone(),
        ..SpawnOptions::default()
    };
    let task = || NewTask::with_json(&args.name, Json::from_text(args.params.clone()), options.clone());
    if args.count > 1 {
        anyhow::ensure!(args.key.is_none(), "--key names one task: it does not go with --count");
        anyhow::ensure!(args.wait.is_none(), "--wait waits for one task: it does not go with --count");
        return spawn_many(&client, args.count, task, args.client.output).await;
    }
    let spawned = match client.spawn_new_task(task()).await {
        Err(error) if error.reason() == absurd_client::Reason::QueueNotFound => {
            anyhow::bail!(
                "queue {0:?} does not exist; create it with: absurd queue create --queue {0}",
                args.client.queue
            )
        }
        outcome => outcome?,
    };
    let Some(wait) = args.wait else {
        print_spawned(args.client.output, &spawned);
        return Ok(());
    };
    watch(&client, spawned.task_id, Some(wait.0), args.client.output).await
}

async fn spawn_many(client: &AbsurdClient, count: u64, task: impl Fn() -> NewTask, how: Output) -> anyhow::Result<()> {
    let started = std::time::Instant::now();
    let bar = ProgressBar::new(count)
        .with_style(ProgressStyle::with_template("{wide_bar} {human_pos}/{human_len} tasks  {per_sec}  {eta} left")?);
    let mut calls = tokio::task::JoinSet::new();
    let mut left = count;
    while left > 0 || !calls.is_empty() {
        while left > 0 && calls.len() < 4 {
            let size = left.min(BULK as u64);
            left -= size;
            let tasks: Vec<NewTask> = (0..size).map(|_| task()).collect();
            let client = client.clone();
            calls.spawn(async move { client.spawn_tasks(tasks).await.map(|_| size) });
        }
        if let Some(done) = calls.join_next().await {
            bar.inc(done??);
        }
    }
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    match how {
        Output::Table => println!("{count} tasks in {seconds:.2} s"),
        Output::Json => output::json(&json!({"spawned": count, "seconds": seconds})),
    }
    Ok(())
}

async fn get(args: &OneTask) -> anyhow::Result<()> {
    let task = args.client.client()?.get_task_status(args.task_id).await?;
    let task = task.with_context(|| format!("queue {:?} has no task {}", args.client.queue, args.task_id))?;
    match args.client.output {
        Output::Table => {
            let text = |json: Option<&Json>| json.map(ToString::to_string).unwrap_or_default();
            output::record(&[
                ("task_id", task.task_id.to_string()),
                ("name", task.task_name.clone()),
                ("state", task.state.to_string()),
                ("attempts", format!("{} of {}", task.attempts, limit(task.max_attempts))),
                ("spawned", output::time(task.enqueue_at)),
                ("started", output::time(task.first_started_at)),
                ("params", task.params.to_string()),
                ("headers", text(task.headers.as_ref())),
                ("result", text(task.completed_payload.as_ref())),
                ("last run", task.last_attempt_run.map(|id| id.to_string()).unwrap_or_default()),
            ]);
        }
        Output::Json => output::json(&json!({
            "task_id": task.task_id, "task_name": task.task_name, "state": task.state.as_str(), "attempts": task.attempts,
            "max_attempts": task.max_attempts, "enqueue_at": output::time(task.enqueue_at),
            "first_started_at": output::time(task.first_started_at),
            "params": output::value(Some(&task.params)), "headers": output::value(task.headers.as_ref()),
            "completed_payload": output::value(task.completed_payload.as_ref()),
            "last_attempt_run": task.last_attempt_run, "idempotency_key": task.idempotency_key,
        })),
    }
    Ok(())
}

fn limit(max_attempts: Option<i32>) -> String {
    max_attempts.map_or_else(|| "unlimited".into(), |limit| limit.to_string())
}

fn parse_state(name: &str) -> Option<State> {
    [State::Pending, State::Running, State::Sleeping, State::Completed, State::Failed, State::Cancelled]
        .into_iter()
        .find(|state| state.as_str() == name)
}

async fn list(args: &ListArgs) -> anyhow::Result<()> {
    let client = args.client.client()?;
    let mut tasks = Vec::new();
    let mut page_token = String::new();
    while tasks.len() < args.limit {
        let page_size = i32::try_from((args.limit - tasks.len()).min(1000))?;
        let options = ListOptions {
            state: args.state.as_deref().and_then(parse_state),
            task_name: args.name.clone(),
            page_size,
            page_token,
        };
        let page = client.list_tasks(options).await?;
        tasks.extend(page.items);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    match args.client.output {
        Output::Table => {
            let rows: Vec<Vec<String>> = tasks
                .iter()
                .map(|task| {
                    vec![
                        task.task_id.to_string(),
                        task.task_name.clone(),
                        task.state.to_string(),
                        format!("{} of {}", task.attempts, limit(task.max_attempts)),
                        output::time(task.enqueue_at),
                    ]
                })
                .collect();
            output::table(&["TASK", "NAME", "STATE", "ATTEMPTS", "SPAWNED"], &rows);
        }
        Output::Json => output::json(
            &tasks
                .iter()
                .map(|task| {
                    json!({
                        "task_id": task.task_id, "task_name": task.task_name, "state": task.state.as_str(),
                        "attempts": task.attempts, "max_attempts": task.max_attempts,
                        "enqueue_at": output::time(task.enqueue_at),
                    })
                })
                .collect(),
        ),
    }
    Ok(())
}

/// Follows a task to its end.
async fn watch(client: &AbsurdClient, task_id: Uuid, timeout: Option<Duration>, how: Output) -> anyhow::Result<()> {
    let spinner = ProgressBar::new_spinner().with_style(ProgressStyle::with_template("{spinner} {msg}  {elapsed}")?);
    spinner.enable_steady_tick(Duration::from_millis(100));
    let follow = async {
        loop {
            let now = client.get_task_result(task_id).await?;
            spinner.set_message(format!("{task_id} {}", now.state));
            if now.state.is_terminal() {
                return Ok(now);
            }
            match client.await_task_result(task_id, Some(Duration::from_secs(1))).await {
                Err(error) if error.reason() == absurd_client::Reason::DeadlineExceeded => {}
                outcome => return outcome,
            }
        }
    };
    let end = match timeout {
        Some(timeout) => tokio::time::timeout(timeout, follow)
            .await
            .map_err(|_| anyhow::anyhow!("the task has not ended within {}", humantime::format_duration(timeout)))??,
        None => follow.await?,
    };
    spinner.finish_and_clear();
    let payload = end.result.as_ref().or(end.failure.as_ref());
    match how {
        Output::Table => {
            println!("{}", end.state);
            if let Some(payload) = payload {
                println!("{payload}");
            }
        }
        Output::Json => {
            let parse = |json: &Option<Json>| json.as_ref().and_then(|json| json.to::<serde_json::Value>().ok());
            output::json(&json!({
                "task_id": task_id, "state": end.state.as_str(), "result": parse(&end.result),
                "failure": parse(&end.failure),
            }));
        }
    }
    anyhow::ensure!(end.state == State::Completed, "the task is {}", end.state);
    Ok(())
}
