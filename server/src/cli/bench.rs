//! `absurd bench`: measures a server from outside, beside the limits of its database in the same run.

mod idle;
mod latency;
mod load;
mod overload;
mod report;
mod rpcs;

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use super::dev::create_database;
use super::output::{self, Output, note};
use super::runtime;
use crate::postgres::{Cluster, ClusterOptions, DATABASE};
use crate::settings::{Secret, parse_database};

/// What can be measured.
#[derive(Debug, Subcommand)]
pub(super) enum BenchCommand {
    /// From spawn to delivery on an idle server, over gRPC and from SQL, beside a bare durable commit
    #[command(after_help = "Examples:\n  absurd bench latency\n  absurd bench latency --samples 2000 -o json\n  \
        absurd bench latency --url http://127.0.0.1:50051 --database-url postgresql://app@db/app")]
    Latency(latency::LatencyArgs),
    /// How long each RPC takes on an idle server, beside a round trip to Postgres and a bare durable commit
    #[command(after_help = "Examples:\n  absurd bench rpcs\n  absurd bench rpcs --samples 1000 -o json")]
    Rpcs(rpcs::RpcsArgs),
    /// What streams cost that have nothing to do: memory of the server, transactions of the database
    #[command(after_help = "Examples:\n  absurd bench idle\n  absurd bench idle --streams 10000\n  \
        absurd bench idle --streams 1000 --queues 1000")]
    Idle(idle::IdleArgs),
    /// Spawns, many calls at once
    #[command(after_help = "Examples:\n  absurd bench spawn\n  absurd bench spawn --batch 250 --in-flight 4")]
    Spawn(load::SpawnArgs),
    /// One worker process takes a preloaded queue and completes each task by itself, beside plain SQL on the same tables
    #[command(after_help = "Examples:\n  absurd bench drain\n  absurd bench drain --tasks 100000 -o json >drain.json")]
    Drain(load::DrainArgs),
    /// Spawners and a worker at the same time
    #[command(after_help = "Example:\n  absurd bench steady --time 30s")]
    Steady(load::SteadyArgs),
    /// Tasks with steps, carried out by the durable worker
    #[command(after_help = "Example:\n  absurd bench steps --steps 10 --concurrency 50")]
    Steps(load::StepsArgs),
    /// What one claim takes with more and more tasks waiting
    #[command(after_help = "Example:\n  absurd bench backlog --pending 0,100000,1000000")]
    Backlog(load::BacklogArgs),
    /// What is left of the work when twice as much is asked for as can be done, and how soon the rest is refused
    #[command(
        after_help = "Examples:\n  absurd bench overload\n  absurd bench overload --factor 4 --batch 100 -o json"
    )]
    Overload(overload::OverloadArgs),
    /// Two results side by side
    #[command(
        after_help = "Example:\n  absurd bench drain -o json >before.json\n  absurd bench compare before.json after.json"
    )]
    Compare(report::CompareArgs),
}

/// The smallest write that Postgres must flush: a transaction without a table.
const BARE_COMMIT: &str = "select pg_logical_emit_message(true, 'absurd', 'bench')";

/// Flags of every measurement.
#[derive(Debug, Args)]
struct StageArgs {
    /// Server to measure; without one, the bench brings a server and a Postgres of its own, with safe commits
    #[arg(long, env = "ABSURD_URL", value_name = "URL", requires = "database_url")]
    url: Option<String>,
    /// The database of that server
    #[arg(long, env = "ABSURD_DATABASE_URL", hide_env_values = true, value_name = "URL", requires = "url")]
    database_url: Option<Secret>,
    /// Directory of the own Postgres while the bench runs: put it on the disk that you want to measure
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Directory of initdb and postgres, where they are not found by themselves
    #[arg(long, env = "ABSURD_PG_BIN", value_name = "DIR")]
    pg_bin: Option<PathBuf>,
    /// How to print
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
}

/// The server under measurement, and its database.
#[derive(Debug)]
struct Stage {
    url: String,
    database: tokio_postgres::Config,
    /// The server's process if the bench started it; only then can its memory be read.
    server: Option<OwnServer>,
}

/// Runs a measurement.
pub(super) fn run(command: BenchCommand) -> anyhow::Result<()> {
    match command {
        BenchCommand::Latency(args) => on_stage(&args.stage, async |stage| latency::run(&args, stage).await),
        BenchCommand::Rpcs(args) => on_stage(&args.stage, async |stage| rpcs::run(&args, stage).await),
        BenchCommand::Idle(args) => on_stage(&args.stage, async |stage| idle::run(&args, stage).await),
        BenchCommand::Spawn(args) => on_stage(&args.stage, async |stage| load::spawn(&args, stage).await),
        BenchCommand::Drain(args) => on_stage(&args.stage, async |stage| load::drain(&args, stage).await),
        BenchCommand::Steady(args) => on_stage(&args.stage, async |stage| load::steady(&args, stage).await),
        BenchCommand::Steps(args) => on_stage(&args.stage, async |stage| load::steps(&args, stage).await),
        BenchCommand::Backlog(args) => on_stage(&args.stage, async |stage| load::backlog(&args, stage).await),
        BenchCommand::Overload(args) => on_stage(&args.stage, async |stage| overload::run(&args, stage).await),
        BenchCommand::Compare(args) => report::compare(&args),
    }
}

fn on_stage(args: &StageArgs, work: impl AsyncFnOnce(&Stage) -> anyhow::Result<()>) -> anyhow::Result<()> {
    if let (Some(url), Some(database)) = (&args.url, &args.database_url) {
        let stage = Stage { url: url.clone(), database: parse_database(database)?, server: None };
        return runtime()?.block_on(work(&stage));
    }
    let parent = args.data_dir.clone().unwrap_or_else(std::env::temp_dir);
    let home = parent.join(format!("absurd-bench-{}", std::process::id()));
    fs::create_dir_all(&home).with_context(|| format!("cannot make {}", home.display()))?;
    let options =
        ClusterOptions { home: home.join("postgres"), bin: args.pg_bin.clone(), durable: true, settings: Vec::new() };
    let outcome = on_own_stage(&options, work);
    let _ = fs::remove_dir_all(&home);
    outcome
}

fn on_own_stage(options: &ClusterOptions, work: impl AsyncFnOnce(&Stage) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut cluster = Cluster::start(options)?;
    let outcome = runtime()?.block_on(async {
        create_database(&cluster).await?;
        let database = cluster.url(DATABASE);
        let (server, url) = OwnServer::start(&database)?;
        work(&Stage { url, database: database.parse()?, server: Some(server) }).await
    });
    cluster.stop();
    outcome
}

/// A server in a process of its own, as users run it. Its drop kills it.
#[derive(Debug)]
struct OwnServer(Child);

impl OwnServer {
    /// Starts the server on a free port; returns it with its URL.
    fn start(database: &str) -> anyhow::Result<(Self, String)> {
        let mut command = Command::new(std::env::current_exe()?);
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("ABSURD_")) {
            command.env_remove(name);
        }
        let child = command
            .args([
                "serve",
                "--migrate",
                "--listen",
                "127.0.0.1:0",
                "--log-json",
                "--log",
                "warn,absurd_server::cli=info",
            ])
            .env("ABSURD_DATABASE_URL", database)
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start a server")?;
        let mut server = Self(child);
        let mut lines = BufReader::new(server.0.stderr.take().context("the server has no log")?).lines();
        let mut said = Vec::new();
        for line in lines.by_ref() {
            let line = line?;
            let entry: Value = serde_json::from_str(&line).unwrap_or_default();
            if let Some(listen) = entry["fields"]["listen"].as_str() {
                let url = format!("http://{listen}");
                // Read in a thread, so that the server never waits for a reader of its log. Its warnings belong to the
                // measurement.
                std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| note!("server: {line}")));
                return Ok((server, url));
            }
            said.push(line);
        }
        anyhow::bail!("the server did not start:\n{}", said.join("\n"))
    }

    /// Resident memory in KiB, from `/proc`.
    fn memory_kib(&self) -> anyhow::Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        Ok(line.trim().trim_end_matches("kB").trim().parse()?)
    }
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Opens a connection to the database, beside the server's.
async fn connect(database: &tokio_postgres::Config) -> anyhow::Result<tokio_postgres::Client> {
    let (client, connection) =
        database.connect(tokio_postgres::NoTls).await.context("cannot connect to the database")?;
    tokio::spawn(connection);
    Ok(client)
}

/// A progress bar on standard error; hidden if that is no terminal.
fn progress(what: &'static str, length: usize) -> anyhow::Result<ProgressBar> {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len}")?;
    Ok(ProgressBar::new(length as u64).with_style(style).with_message(what))
}

/// Prints the quantiles of the measured times.
fn quantiles(how: Output, measured: impl IntoIterator<Item = (&'static str, Vec<Duration>)>) {
    let mut rows = Vec::new();
    let mut values = serde_json::Map::new();
    for (what, mut times) in measured {
        times.sort_unstable();
        let at = |per_mille: usize| times[(times.len() * per_mille / 1000).min(times.len() - 1)].as_secs_f64() * 1e3;
        let figures = [at(500), at(900), at(990), at(1000)];
        let names = ["p50", "p90", "p99", "max"];
        let cells = figures.iter().map(|figure| format!("{figure:.2}"));
        rows.push([what.to_owned()].into_iter().chain(cells).chain([times.len().to_string()]).collect());
        let mut object: serde_json::Map<String, Value> =
            names.iter().zip(figures).map(|(name, figure)| (format!("{name}_ms"), figure.into())).collect();
        object.insert("samples".into(), times.len().into());
        values.insert(what.to_owned(), object.into());
    }
    match how {
        Output::Table => output::table(&["", "p50 ms", "p90 ms", "p99 ms", "max ms", "samples"], &rows),
        Output::Json => output::json(&values.into()),
    }
}
