//! `chaos`: breaks a running system on purpose, and checks from its books that nothing was lost.

#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "rates and quantiles"
)]

mod bug;
mod crowd;
mod fault;
mod history;
mod ledger;
mod producer;
mod run;
mod scenario;
mod shape;
mod worker;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, Subcommand};

use run::Plan;
use scenario::Scenario;
use world::Size;

/// Breaks a running system on purpose, and checks from its books that nothing was lost.
///
/// Starts a Postgres, three replicas of `absurd serve`, twenty workers (one of them Python's generated client) and two
/// producers, with a link between any two; does to them what the scenario says; heals; waits until every task has ended;
/// and compares what the clients wrote down with what the database's triggers wrote down.
#[derive(Debug, Parser)]
#[command(
    name = "chaos",
    after_help = "Examples:
  chaos list
  chaos run F1 F7 --seconds 30
  chaos run F9 --seed 12345           the same choices once more
  chaos random --seconds 600          any faults, one after the other
  chaos soak --tasks 1000000 --rate 300"
)]
struct Cli {
    #[command(subcommand)]
    command: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Tell the scenarios
    List,
    /// Run scenarios by their names
    Run {
        /// Names, such as F1; none: all
        names: Vec<String>,
        #[command(flatten)]
        how: How,
    },
    /// The short check of every change: F1 F4 F7 F9 F24 F26
    Smoke {
        #[command(flatten)]
        how: How,
    },
    /// Faults at random, one after the other, for a time
    Random {
        #[command(flatten)]
        how: How,
    },
    /// Faults at random until so many tasks have ended
    Soak {
        /// Tasks to spawn
        #[arg(long, default_value_t = 1_000_000)]
        tasks: u64,
        #[command(flatten)]
        how: How,
    },
    /// Test of the test: plants bugs that the checker must find
    Bugs {
        /// Names, such as B-token; none: all
        names: Vec<String>,
        #[command(flatten)]
        how: How,
    },
    /// A worker of the load
    #[command(hide = true)]
    Worker(worker::Options),
    /// A producer of the load
    #[command(hide = true)]
    Producer(producer::Options),
}

#[derive(Debug, Clone, clap::Args)]
struct How {
    /// What all choices follow from; printed, so that a run can be repeated [default: another one each time]
    #[arg(long)]
    seed: Option<u64>,
    /// Time of the faults, in seconds, for each scenario
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// Tasks per second
    #[arg(long, default_value_t = 100.0)]
    rate: f64,
    /// Workers; the first one is Python's
    #[arg(long, default_value_t = 20)]
    workers: usize,
    /// Replicas
    #[arg(long, default_value_t = 3)]
    replicas: usize,
    /// Where books and logs go; they stay when something was found
    #[arg(long, default_value = "/tmp/absurd-chaos")]
    home: PathBuf,
    /// Keep books and logs of good runs too
    #[arg(long)]
    keep: bool,
    /// The program to serve with [default: built from the sources]
    #[arg(long)]
    program: Option<PathBuf>,
}

impl How {
    fn plan(&self) -> anyhow::Result<Plan> {
        let size = Size {
            seed: self.seed.unwrap_or_else(|| fastrand::u64(..1_000_000)),
            replicas: self.replicas,
            workers: self.workers,
            producers: 2,
            rate: self.rate,
            tasks: u64::MAX,
            in_flight: 8,
            work: 20,
            lease: 10,
            redelivery_max: Duration::from_secs(10),
            stubborn: false,
            settings: Vec::new(),
            program: self.program.clone().map_or_else(build, Ok)?,
            new_id_when_unknown: false,
            planted: None,
            connections: 8,
            flags: Vec::new(),
            disk: None,
        };
        let span = Duration::from_secs(self.seconds);
        Ok(Plan { size, span, until_done: false, home: self.home.clone(), keep: self.keep })
    }
}

/// Builds the server, as this program was built; its path.
fn build() -> anyhow::Result<PathBuf> {
    // All of the workspace, as tests build it: the server alone would have other features of its dependencies.
    build_with(&["--workspace", "--bins", "--examples"])?;
    Ok(std::env::current_exe()?.with_file_name("absurd"))
}

/// Builds the server with bugs in it, in a folder of its own; its path.
fn build_planted() -> anyhow::Result<PathBuf> {
    println!("building the server with planted bugs");
    let target = std::env::current_exe()?.ancestors().nth(2).context("a target folder")?.join("planted");
    let target_dir = target.to_string_lossy();
    build_with(&[
        "--package",
        "absurd-server",
        "--bin",
        "absurd",
        "--features",
        "planted-bugs",
        "--target-dir",
        &target_dir,
    ])?;
    Ok(target.join(if cfg!(debug_assertions) { "debug" } else { "release" }).join("absurd"))
}

fn build_with(flags: &[&str]) -> anyhow::Result<()> {
    let mut cargo = std::process::Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // What cargo tells the programs that it runs would make build scripts run again, and everything above them be built anew.
    let told = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
    for (name, _) in std::env::vars().filter(|(name, _)| told(name)) {
        cargo.env_remove(name);
    }
    cargo.args(["build", "--quiet"]).args(flags).current_dir(env!("CARGO_MANIFEST_DIR"));
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    anyhow::ensure!(cargo.status()?.success(), "the server cannot be built");
    Ok(())
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let threads = match cli.command {
        What::Worker(_) | What::Producer(_) => 1,
        _ => 2,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build();
    let result = runtime.context("no runtime").and_then(|runtime| runtime.block_on(act(cli.command)));
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("chaos: {error:#}");
            ExitCode::from(2)
        }
    }
}

async fn act(command: What) -> anyhow::Result<bool> {
    match command {
        What::Worker(options) => worker::run(options).await.map(|()| true),
        What::Producer(options) => producer::run(options).await.map(|()| true),
        What::List => {
            for scenario in scenario::all() {
                println!("{:>4}  {}", scenario.id, scenario.what);
            }
            Ok(true)
        }
        What::Run { names, how } => {
            let chosen = choose(&names)?;
            run_all(&chosen, how.plan()?).await
        }
        What::Smoke { how } => {
            let names = ["F1", "F4", "F7", "F9", "F24", "F26"].map(str::to_owned);
            run_all(&choose(&names)?, how.plan()?).await
        }
        What::Random { how } => run_all(&[scenario::random()], how.plan()?).await,
        What::Bugs { names, how } => find_bugs(&names, &how.plan()?).await,
        What::Soak { tasks, how } => {
            let mut plan = how.plan()?;
            plan.size.tasks = tasks;
            // A rate that the machine cannot keep up with says nothing about faults: producers are held back.
            plan.size.flags.extend(["--max-backlog".into(), "1000".into()]);
            plan.until_done = true;
            run_all(&[scenario::random()], plan).await
        }
    }
}

fn choose(names: &[String]) -> anyhow::Result<Vec<Scenario>> {
    let all = scenario::all();
    if let Some(unknown) = names.iter().find(|name| !all.iter().any(|scenario| scenario.id == name.as_str())) {
        anyhow::bail!("there is no scenario {unknown}; `chaos list` tells which there are");
    }
    Ok(all.into_iter().filter(|scenario| names.is_empty() || names.iter().any(|name| name == scenario.id)).collect())
}

/// Each planted bug must be found by one of the checks that are there for it.
async fn find_bugs(names: &[String], plan: &Plan) -> anyhow::Result<bool> {
    let mut all_found = true;
    let planted = build_planted()?;
    let all = bug::bugs();
    if let Some(unknown) = names.iter().find(|name| !all.iter().any(|bug| bug.scenario.id == name.as_str())) {
        let known: Vec<&str> = all.iter().map(|bug| bug.scenario.id).collect();
        anyhow::bail!("there is no planted bug {unknown}, but {}", known.join(", "));
    }
    for bug in all.iter().filter(|bug| names.is_empty() || names.iter().any(|name| name == bug.scenario.id)) {
        let mut plan = plan.clone();
        plan.size.planted = bug.planted;
        if bug.planted.is_some() {
            plan.size.program.clone_from(&planted);
        }
        let (seed, home) = (plan.size.seed, plan.home.clone());
        let outcome = run::run(&bug.scenario, plan).await?;
        let found: std::collections::BTreeSet<&str> =
            outcome.verdict.findings.iter().map(|finding| finding.check).collect();
        let good = bug.found_by.iter().any(|check| found.contains(check));
        all_found &= good;
        if !good {
            run::tell(&bug.scenario, seed, &outcome, &home);
        }
        println!("{}: {} ({found:?})", if good { "found" } else { "NOT FOUND" }, bug.name);
    }
    Ok(all_found)
}

async fn run_all(scenarios: &[Scenario], plan: Plan) -> anyhow::Result<bool> {
    let mut good = true;
    for scenario in scenarios {
        println!("{} {}: seed {}", scenario.id, scenario.what, plan.size.seed);
        let seed = plan.size.seed;
        let outcome = run::run(scenario, plan.clone()).await.with_context(|| format!("{} seed {seed}", scenario.id))?;
        good &= run::tell(scenario, seed, &outcome, &plan.home);
    }
    Ok(good)
}
