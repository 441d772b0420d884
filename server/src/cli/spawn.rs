//! `absurd task spawn`: spawns one task, or many.

use std::time::{Duration, Instant, SystemTime};

use absurd_client::{
    AbsurdClient, CancellationRules, ConnectOptions, Error, Json, NewTask, Reason, SpawnOptions, Spawned, Start,
};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};

use super::input::{self, Retry};
use super::output::{self, Output, note, out};
use super::{ClientArgs, inspect};
use crate::settings::Span;

pub(super) const EXAMPLES: &str = "\
Examples:
  absurd task spawn greet '{\"name\":\"world\"}'
  absurd task spawn greet -P name=world -P count:=42
  absurd task spawn import @orders.json              params from a file; - reads standard input
  absurd task spawn report --delay 1h
  absurd task spawn report --at 2027-01-01T09:00:00+01:00
  absurd task spawn charge '{}' --max-attempts 8 --retry exponential:1s..5m --cancel-after 1h
  absurd task spawn greet '{}' --key order-42 --wait 30s
  absurd task spawn noop --count 100000

With neither --max-attempts nor --retry the server's default holds: five attempts, with pauses that grow from one second to five
minutes. With --max-attempts alone a retry comes at once.";

/// Tasks per call when many are spawned.
const BULK: usize = 500;
/// Deadline of a call that spawns many; short, because a call that is refused for longer may mean a full queue.
const BULK_DEADLINE: Duration = Duration::from_secs(2);
/// Time for which a queue may stay full before the command fails.
const FULL_MAX: Duration = Duration::from_secs(30);

/// Flags of `task spawn`.
#[derive(Debug, Args)]
pub(super) struct SpawnArgs {
    /// Name of the handler
    name: String,
    /// Input: JSON, @FILE, or - for standard input [default: null]
    params: Option<String>,
    /// One field of the input, as KEY=TEXT or KEY:=JSON; may be given again
    #[arg(long = "param", short = 'P', value_name = "KEY=VALUE", conflicts_with = "params")]
    pairs: Vec<String>,
    /// Attempts at most; alone, a retry comes at once [default: five, with growing pauses]
    #[arg(long, value_parser = clap::value_parser!(i32).range(1..), value_name = "N")]
    max_attempts: Option<i32>,
    /// As many attempts as it takes
    #[arg(long, conflicts_with = "max_attempts")]
    unlimited_attempts: bool,
    /// Pauses between attempts: none, fixed:10s, exponential:1s..5m, exponential:1s..5mx3
    #[arg(long, value_name = "STRATEGY")]
    retry: Option<Retry>,
    /// Start this long from now
    #[arg(long, value_name = "SPAN", conflicts_with = "at")]
    delay: Option<Span>,
    /// Start at this time, as 2027-01-01T09:00:00+01:00
    #[arg(long, value_name = "TIME", value_parser = input::time)]
    at: Option<SystemTime>,
    /// Cancel it when nobody has claimed it this long after its spawn
    #[arg(long, value_name = "SPAN")]
    max_delay: Option<Span>,
    /// Cancel it when it has not ended this long after its first claim
    #[arg(long, value_name = "SPAN")]
    cancel_after: Option<Span>,
    /// Headers: a JSON object, @FILE, or - for standard input
    #[arg(long, value_name = "JSON")]
    headers: Option<String>,
    /// One header, as KEY=TEXT or KEY:=JSON; may be given again
    #[arg(long, value_name = "KEY=VALUE")]
    header: Vec<String>,
    /// Idempotency key: while a task with this key exists, no second one is made
    #[arg(long, visible_alias = "idempotency-key")]
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

impl SpawnArgs {
    fn params(&self) -> anyhow::Result<Json> {
        match &self.params {
            Some(argument) => input::json("params", argument),
            None if self.pairs.is_empty() => Ok(Json::null()),
            None => Ok(Value::Object(input::object("-P", &self.pairs)?).into()),
        }
    }

    fn headers(&self) -> anyhow::Result<Map<String, Value>> {
        let twice = self.params.as_deref() == Some("-") && self.headers.as_deref() == Some("-");
        anyhow::ensure!(!twice, "params and --headers cannot both come from standard input");
        let mut headers = match &self.headers {
            Some(argument) => match input::json("--headers", argument)?.to()? {
                Value::Object(object) => object,
                Value::Null => Map::new(),
                _ => anyhow::bail!("--headers: must be a JSON object, such as '{{\"region\":\"eu\"}}'"),
            },
            None => Map::new(),
        };
        headers.extend(input::object("--header", &self.header)?);
        Ok(headers)
    }

    fn options(&self) -> anyhow::Result<SpawnOptions> {
        Ok(SpawnOptions {
            max_attempts: self.max_attempts,
            unlimited_attempts: self.unlimited_attempts,
            retry_strategy: self.retry.map(|retry| retry.0),
            cancellation: CancellationRules {
                max_delay: self.max_delay.map(|span| span.0),
                max_duration: self.cancel_after.map(|span| span.0),
            },
            headers: self.headers()?,
            idempotency_key: self.key.clone(),
            start: self.delay.map(|span| Start::After(span.0)).or(self.at.map(Start::At)),
            ..SpawnOptions::default()
        })
    }
}

/// Spawns one task and may wait for its end; with `--count` spawns many.
pub(super) async fn run(args: SpawnArgs) -> anyhow::Result<()> {
    let (options, params) = (args.options()?, args.params()?);
    let task = || NewTask::with_json(&args.name, params.clone(), options.clone());
    if args.count > 1 {
        anyhow::ensure!(args.key.is_none(), "--key names one task: it does not go with --count");
        anyhow::ensure!(args.wait.is_none(), "--wait waits for one task: it does not go with --count");
        return args.client.work(spawn_many(&args.client, args.count, task)).await;
    }
    let client = args.client.client()?;
    let spawning = Box::pin(async { client.spawn_new_task(task()).await.map_err(helped(&client)) });
    let spawned = args.client.reach(spawning).await?;
    let Some(wait) = args.wait else {
        print_spawned(args.client.output, &spawned);
        return Ok(());
    };
    // Printed first, so that a caller who stops waiting can look up the task.
    note!("task {}", spawned.task_id);
    inspect::watch(&args.client, &client, spawned.task_id, Some(wait.0)).await
}

/// Adds the next command to an error that has one.
fn helped(client: &AbsurdClient) -> impl Fn(Error) -> anyhow::Error {
    let queue = client.queue_name().to_owned();
    move |error| match error.reason() {
        Reason::QueueNotFound => {
            anyhow::anyhow!("queue {queue:?} does not exist; create it with: absurd queue create {queue}")
        }
        Reason::BacklogFull => anyhow::anyhow!(
            "queue {queue:?} is full: {error}; start workers with: absurd worker --queue {queue} --exec COMMAND"
        ),
        _ => error.into(),
    }
}

/// Prints the ids of a spawned task.
pub(super) fn print_spawned(how: Output, spawned: &Spawned) {
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

async fn spawn_many(args: &ClientArgs, count: u64, task: impl Fn() -> NewTask) -> anyhow::Result<()> {
    let options = ConnectOptions { deadline: BULK_DEADLINE, ..args.connect_options() };
    let client = AbsurdClient::connect(&options)?.with_queue(args.queue());
    let started = Instant::now();
    let bar = ProgressBar::new(count)
        .with_style(ProgressStyle::with_template("{wide_bar} {human_pos}/{human_len} tasks  {per_sec}  {eta} left")?);
    let mut bulk = Bulk { size: BULK, spawned: 0, full_since: None, told: false };
    let mut calls = tokio::task::JoinSet::new();
    // A repeated call has the same task ids, so no task is spawned twice.
    let mut waiting: Vec<Vec<NewTask>> = Vec::new();
    let mut left = count;
    while left > 0 || !waiting.is_empty() || !calls.is_empty() {
        while calls.len() < bulk.calls_max() && (left > 0 || !waiting.is_empty()) {
            let mut tasks = waiting.pop().unwrap_or_else(|| {
                let size = left.min(BULK as u64);
                left -= size;
                (0..size).map(|_| task()).collect()
            });
            if tasks.len() > bulk.size {
                waiting.push(tasks.split_off(bulk.size));
            }
            let client = client.clone();
            calls.spawn(async move { (client.spawn_tasks(tasks.clone()).await.map(drop), tasks) });
        }
        let Some(done) = calls.join_next().await else { continue };
        match done? {
            (Ok(()), tasks) => bar.inc(bulk.accepted(tasks.len())),
            (Err(error), tasks) if is_full(&error) => {
                bulk.refused(&client, count).map_err(|()| helped(&client)(error))?;
                waiting.push(tasks);
            }
            (Err(error), tasks) if error.is_passing() || error.reason() == Reason::DeadlineExceeded => {
                waiting.push(tasks);
            }
            (Err(error), _) => return Err(helped(&client)(error)),
        }
    }
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    match args.output {
        Output::Table => out!("{count} tasks in {seconds:.2} s"),
        Output::Json => output::json(&json!({"spawned": count, "seconds": seconds})),
    }
    Ok(())
}

fn is_full(error: &Error) -> bool {
    error.reason() == Reason::BacklogFull
}

/// Size of the calls, and the time since when the queue has been full.
struct Bulk {
    size: usize,
    spawned: usize,
    full_since: Option<Instant>,
    told: bool,
}

impl Bulk {
    fn calls_max(&self) -> usize {
        if self.full_since.is_some() { 1 } else { 4 }
    }

    fn accepted(&mut self, count: usize) -> u64 {
        self.spawned += count;
        self.full_since = None;
        self.size = (self.size * 2).min(BULK);
        count as u64
    }

    /// A full queue refused a call. Calls are all or nothing, so the next ones hold one task. `Err`: it has been full
    /// for `FULL_MAX`.
    fn refused(&mut self, client: &AbsurdClient, count: u64) -> Result<(), ()> {
        let queue = client.queue_name();
        let since = *self.full_since.get_or_insert_with(Instant::now);
        if self.size == 1 && !self.told {
            note!("queue {queue:?} is full: {} of {count} tasks are spawned; waiting for workers", self.spawned);
            self.told = true;
        }
        self.size = 1;
        if since.elapsed() < FULL_MAX {
            return Ok(());
        }
        note!("{} of {count} tasks are spawned", self.spawned);
        Err(())
    }
}
