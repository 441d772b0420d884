//! `absurd demo`: runs an order, kills its worker after the payment, and shows that a second worker does not pay again.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use absurd_client::{AbsurdClient, Awaited, ClaimedTask, ConnectOptions, SpawnOptions, StreamOptions};
use anyhow::Context as _;
use clap::Args;
use serde_json::{Value, json};

use super::output::{Output, note, out};
use super::{ClientArgs, dev, runtime};
use crate::postgres::{Cluster, ClusterOptions};

const QUEUE: &str = "demo";
/// The line that a worker prints when the task waits for the warehouse.
const WAITS: &str = "the task sleeps until its shipment is packed; this worker is free";
/// Reconnect grace of a lost worker; 1 s is the shortest that the server grants.
const GRACE: Duration = Duration::from_secs(1);

/// Flags of `absurd demo`.
#[derive(Debug, Args)]
pub(super) struct DemoArgs {
    /// Server to use; without one, the demo brings a server and a Postgres of its own
    #[arg(long, env = "ABSURD_URL", value_name = "URL")]
    url: Option<String>,
    /// Directory of initdb and postgres, where they are not found by themselves
    #[arg(long, env = "ABSURD_PG_BIN", value_name = "DIR")]
    pg_bin: Option<PathBuf>,
}

/// Flags of the demo's worker.
#[derive(Debug, Args)]
pub(super) struct DemoWorkerArgs {
    /// Server
    #[arg(long)]
    url: String,
    /// File that stands for the bank
    #[arg(long)]
    ledger: PathBuf,
    /// Wait for ever after the payment, so that there is time to kill this worker
    #[arg(long)]
    linger: bool,
}

/// Runs the demo.
pub(super) fn run(args: DemoArgs) -> anyhow::Result<()> {
    let home = std::env::temp_dir().join(format!("absurd-demo-{}", std::process::id()));
    fs::create_dir_all(&home)?;
    let outcome = match args.url {
        Some(url) => runtime()?.block_on(show(&url, &home)),
        None => with_own_server(&home, args.pg_bin),
    };
    let _ = fs::remove_dir_all(&home);
    outcome
}

fn with_own_server(home: &Path, bin: Option<PathBuf>) -> anyhow::Result<()> {
    let options = ClusterOptions { home: home.join("postgres"), bin, durable: true, settings: Vec::new() };
    let mut cluster = Cluster::start(&options)?;
    let outcome = runtime()?.block_on(async {
        let app = dev::start_on(&cluster, ([127, 0, 0, 1], 0).into(), QUEUE, false).await?;
        let outcome = show(&format!("http://{}", app.addr()), home).await;
        app.shut_down().await?;
        outcome
    });
    cluster.stop();
    outcome
}

async fn show(url: &str, home: &Path) -> anyhow::Result<()> {
    let started = Instant::now();
    let say = |text: &str| out!("{:>6} ms  {text}", started.elapsed().as_millis());
    let client = AbsurdClient::connect(&ConnectOptions::new(url))?.with_queue(QUEUE);
    let server = ClientArgs { url: url.to_owned(), queue: None, tls_ca: None, output: Output::Table };
    server.reach(async { Ok(client.create_queue().await?) }).await?;
    let ledger = home.join("ledger");
    fs::write(&ledger, "")?;
    let order = format!("order-{}", std::process::id());
    let params = json!({
        "order_id": order, "amount": 4200, "items": ["widget"], "email": "customer@example.com",
    });
    let options = SpawnOptions { max_attempts: Some(3), ..SpawnOptions::default() };
    let spawned = client.spawn_task("order-fulfillment", &params, options).await?;
    say(&format!("spawned order-fulfillment for {order}"));

    let mut first = start_worker(url, &ledger, true)?;
    follow(&mut first, &say, "worker 1", Some("payment stored"))?;
    first.kill()?;
    first.wait()?;
    let killed = Instant::now();
    say("worker 1 was killed with SIGKILL, right after the payment");

    let mut second = start_worker(url, &ledger, false)?;
    let mut resumed = None;
    follow_with(&mut second, &say, "worker 2", None, |line| {
        resumed.get_or_insert_with(|| killed.elapsed());
        if line.contains(WAITS) {
            let (client, event) = (client.clone(), format!("shipment.packed:{order}"));
            tokio::spawn(async move {
                if let Err(error) = client.emit_event(&event, &json!({"tracking_number": "TRACK-1"})).await {
                    note!("the warehouse could not be heard: {error}");
                }
            });
        }
    })?;
    let end = client.await_task_result(spawned.task_id, Some(Duration::from_secs(60))).await?;
    let _ = second.kill();
    let _ = second.wait();
    say(&format!("the task is {}: {}", end.state, end.result.map(|result| result.to_string()).unwrap_or_default()));

    let charges = fs::read_to_string(&ledger)?.lines().filter(|line| line.contains(&order)).count();
    let resumed = resumed.context("no second worker took the task")?;
    out!("\ncharges: {charges}");
    out!("from the death of worker 1 to worker 2 having the task: {:.2} s", resumed.as_secs_f64());
    anyhow::ensure!(charges == 1, "the customer was charged {charges} times");
    Ok(())
}

fn start_worker(url: &str, ledger: &Path, linger: bool) -> anyhow::Result<std::process::Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["demo-worker", "--url", url, "--ledger"]).arg(ledger).stdout(Stdio::piped());
    if linger {
        command.arg("--linger");
    }
    command.spawn().context("cannot start a worker")
}

fn follow(
    worker: &mut std::process::Child,
    say: &impl Fn(&str),
    name: &str,
    until: Option<&str>,
) -> anyhow::Result<()> {
    follow_with(worker, say, name, until, |_| {})
}

/// Prints the lines of a worker, up to one that contains `until` or to the last.
fn follow_with(
    worker: &mut std::process::Child,
    say: &impl Fn(&str),
    name: &str,
    until: Option<&str>,
    mut each: impl FnMut(&str),
) -> anyhow::Result<()> {
    let output = worker.stdout.take().context("the worker has no output")?;
    for line in BufReader::new(output).lines() {
        let line = line?;
        each(&line);
        say(&format!("{name}: {line}"));
        if until.is_some_and(|until| line.contains(until)) {
            return Ok(());
        }
    }
    anyhow::ensure!(until.is_none(), "{name} ended too early");
    Ok(())
}

/// The worker: takes one task, runs its steps, and stores the result of each.
pub(super) async fn work(args: DemoWorkerArgs) -> anyhow::Result<()> {
    let client = AbsurdClient::connect(&ConnectOptions::new(&args.url))?.with_queue(QUEUE);
    let options = StreamOptions { reconnect_grace: Some(GRACE), ..StreamOptions::default() };
    let mut tasks = client.claim_stream(options).await?;
    while let Some(task) = tasks.next().await {
        out!("has the task, attempt {}, {} steps done before", task.attempt, task.checkpoints.len());
        if fulfil(&task, &args).await? {
            break;
        }
    }
    tasks.close(Duration::from_secs(5)).await?;
    Ok(())
}

/// Runs order-fulfillment. Returns false if the task now sleeps.
async fn fulfil(task: &ClaimedTask, args: &DemoWorkerArgs) -> anyhow::Result<bool> {
    let order: Value = task.params()?;
    let payment = step(task, "process-payment", || charge(&args.ledger, &order)).await?;
    out!("payment stored: {}", payment["id"]);
    if args.linger {
        std::future::pending::<()>().await;
    }
    step(task, "reserve-inventory", || Ok(json!({"reserved": order["items"]}))).await?;
    let event = format!("shipment.packed:{}", order["order_id"].as_str().unwrap_or_default());
    let shipment: Value = match task.await_event("await-shipment", &event, Some(Duration::from_secs(60))).await? {
        Awaited::Payload(payload) => payload.to()?,
        Awaited::Suspended { .. } => {
            out!("{WAITS}");
            return Ok(false);
        }
        Awaited::TimedOut => anyhow::bail!("the shipment was not packed in time"),
    };
    step(task, "send-notification", || Ok(json!({"sent_to": order["email"]}))).await?;
    task.complete(&json!({"order_id": payment["id"], "tracking_number": shipment["tracking_number"]})).await?;
    out!("completed the task");
    Ok(true)
}

/// Runs a step once and stores its result. A later attempt gets the stored result.
async fn step(task: &ClaimedTask, name: &str, run: impl FnOnce() -> anyhow::Result<Value>) -> anyhow::Result<Value> {
    if let Some(stored) = task.checkpoint(name) {
        out!("{name}: done before");
        return Ok(stored.map_or(Ok(Value::Null), absurd_client::Json::to)?);
    }
    let value = run()?;
    task.set_checkpoint(name, &value).await?;
    out!("{name}: done");
    Ok(value)
}

fn charge(ledger: &Path, order: &Value) -> anyhow::Result<Value> {
    let mut file = fs::File::options().append(true).create(true).open(ledger)?;
    writeln!(file, "charged {} {}", order["order_id"], order["amount"])?;
    Ok(json!({"id": order["order_id"], "charged": order["amount"]}))
}
