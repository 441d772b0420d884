//! The `absurd` command: defines the command line, and calls the module of each command.

#![deny(clippy::print_stdout, clippy::print_stderr, reason = "they panic when nobody reads: use out! and note!")]

mod bench;
mod demo;
mod dev;
mod doctor;
mod input;
mod inspect;
mod operate;
mod output;
mod queues;
mod reach;
mod serve;
mod shell;
mod spawn;
mod tasks;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;

use absurd_client::{AbsurdClient, ConnectOptions, TlsOptions};
use clap::{Args, CommandFactory as _, Parser, Subcommand};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::settings::{Secret, Settings, masked};
use output::{Output, note, out};

const EXAMPLES: &str = "\
Examples:
  absurd dev                                     a server with a Postgres of its own, on 127.0.0.1:50051
  absurd task spawn greet '{\"name\":\"world\"}'     spawn a task
  absurd worker --exec 'jq .name'                any program is a worker
  absurd demo                                    watch a task survive the death of its worker
  absurd serve --migrate --database-url postgresql://app@db/app";

/// Durable tasks in Postgres, pushed to workers over gRPC.
#[derive(Debug, Parser)]
#[command(name = "absurd", version, about, after_help = EXAMPLES, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a server with a private Postgres: one command, no configuration
    #[command(after_help = "Examples:\n  absurd dev\n  absurd dev --port 6000 --data-dir ./data")]
    Dev(dev::DevArgs),
    /// Run a server on a database of yours
    #[command(after_help = "Examples:\n  absurd serve --migrate --database-url postgresql://app@db/app\n  \
        absurd serve --config absurd.toml\n\nA configuration file holds the flags' names as keys:\n  \
        database-url = \"postgresql://app@db/app\"\n  listen = \"0.0.0.0:50051\"\n  stream-age = \"30m\"")]
    Serve(Box<ServeArgs>),
    /// Install or upgrade the schemas of a database
    #[command(after_help = "Examples:\n  absurd migrate --database-url postgresql://app@db/app\n  \
        absurd migrate --check         say what would be done; exit code 0: nothing, 2: something, 1: an error\n  \
        absurd migrate --doorbell      let SQL writers wake the server in a database that upstream's tool made\n  \
        absurd migrate --remove        take our side schema and our triggers away again")]
    Migrate(MigrateArgs),
    /// Look for what should not be in a database, and say how to mend it
    #[command(after_help = "Example:\n  absurd doctor --database-url postgresql://app@db/app")]
    Doctor(doctor::DoctorArgs),
    /// Say whether a server is healthy; the exit code is the answer
    #[command(after_help = "Example:\n  absurd health --url http://127.0.0.1:50051")]
    Health(ClientArgs),
    /// Create, list, count and drop queues
    #[command(
        subcommand,
        after_help = "Examples:\n  absurd queue create orders\n  absurd queue list\n  absurd queue stats orders"
    )]
    Queue(queues::QueueCommand),
    /// Spawn, read, list, watch, cancel and retry tasks
    #[command(
        subcommand,
        after_help = "Examples:\n  absurd task spawn greet '{\"name\":\"world\"}'\n  absurd task list --state failed\n  \
        absurd task get 51c5d1aa"
    )]
    Task(tasks::TaskCommand),
    /// Emit events
    #[command(subcommand, after_help = "Example:\n  absurd event emit approved:42 '{\"by\":\"ann\"}'")]
    Event(operate::EventCommand),
    /// Run a program for each task
    #[command(after_help = worker::EXAMPLES)]
    Worker(worker::WorkerArgs),
    /// Inside of a worker's program: run a command as a durable step
    #[command(after_help = shell::STEP_EXAMPLES)]
    Step(shell::StepArgs),
    /// Inside of a worker's program: sleep, holding nothing meanwhile
    #[command(after_help = shell::SLEEP_EXAMPLES)]
    Sleep(shell::SleepArgs),
    /// Inside of a worker's program: wait for an event, holding nothing meanwhile
    #[command(after_help = shell::AWAIT_EXAMPLES)]
    AwaitEvent(shell::AwaitArgs),
    /// Inside of a worker's program: emit an event on the task's queue
    #[command(after_help = "Example:\n  absurd emit shipment.packed:42 '{\"tracking_number\":\"T-42\"}'")]
    Emit(shell::EmitArgs),
    /// Show a task surviving the death of its worker
    #[command(
        after_help = "Examples:\n  absurd demo                               with a server and a Postgres of its own\n  \
        absurd demo --url http://127.0.0.1:50051  on a running server"
    )]
    Demo(demo::DemoArgs),
    /// Measure a server
    #[command(subcommand, after_help = "Examples:\n  absurd bench latency\n  absurd bench drain --tasks 100000")]
    Bench(bench::BenchCommand),
    /// Print the version
    #[command(after_help = "Example:\n  absurd version")]
    Version,
    /// Print a completion script for a shell
    #[command(
        visible_alias = "completion",
        after_help = "Examples:\n  absurd completions bash >/etc/bash_completion.d/absurd\n  \
        absurd completions zsh >\"${fpath[1]}/_absurd\"\n  \
        absurd completions fish >~/.config/fish/completions/absurd.fish"
    )]
    Completions {
        /// Shell
        shell: clap_complete::Shell,
    },
    /// The worker that the demo kills
    #[command(hide = true)]
    DemoWorker(demo::DemoWorkerArgs),
}

/// Flags of `absurd serve`.
#[derive(Debug, Args)]
struct ServeArgs {
    /// TOML file with more settings; flags and environment win
    #[arg(long, env = "ABSURD_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

/// Flags of `absurd migrate`.
#[derive(Debug, Args)]
struct MigrateArgs {
    /// Database to migrate [default: libpq's variables, such as PGHOST]
    #[arg(long, env = "ABSURD_DATABASE_URL", hide_env_values = true, value_name = "URL")]
    database_url: Option<Secret>,
    /// Let direct SQL writers wake the server (the default, except where upstream's tool made the database)
    #[arg(long)]
    doorbell: bool,
    /// Take the doorbell down
    #[arg(long, conflicts_with = "doorbell")]
    no_doorbell: bool,
    /// Say what would be done, and do nothing; the exit code is 0 when that is nothing, 2 when it is something, 1 after an
    /// error
    #[arg(long)]
    check: bool,
    /// Take away everything of ours but schema absurd and what it holds
    #[arg(long, conflicts_with_all = ["check", "doorbell", "no_doorbell"])]
    remove: bool,
    /// With --remove: stored workflow runs too
    #[arg(long, requires = "remove")]
    force: bool,
}

/// Flags of the commands that talk to a server.
#[derive(Debug, Clone, Args)]
struct ClientArgs {
    /// Server, as HOST:PORT or URL; several replicas with commas between
    #[arg(long, env = "ABSURD_URL", default_value = absurd_client::DEFAULT_URL, value_name = "URL")]
    url: String,
    #[arg(long, short, help = "Queue [env: ABSURD_DEFAULT_QUEUE, else ABSURD_QUEUE] [default: default]")]
    queue: Option<String>,
    /// PEM file of the authority that signed the server's certificate
    #[arg(long, env = "ABSURD_TLS_CA", value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// How to print
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
}

/// The queue of a command that names none: `ABSURD_DEFAULT_QUEUE`, else `ABSURD_QUEUE`, else `default`.
fn default_queue() -> String {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    set("ABSURD_DEFAULT_QUEUE").or_else(|| set("ABSURD_QUEUE")).unwrap_or_else(|| absurd_client::DEFAULT_QUEUE.into())
}

impl ClientArgs {
    fn queue(&self) -> String {
        self.queue.clone().unwrap_or_else(default_queue)
    }

    /// These arguments with the queue that a positional argument names. Fails if `--queue` names another one.
    fn with_queue(mut self, name: Option<String>) -> anyhow::Result<Self> {
        if let (Some(name), Some(flag)) = (&name, &self.queue) {
            anyhow::ensure!(name == flag, "the command names two queues: {name:?} and, with --queue, {flag:?}");
        }
        self.queue = name.or(self.queue);
        Ok(self)
    }

    fn connect_options(&self) -> ConnectOptions {
        let tls = TlsOptions { ca: self.tls_ca.clone(), ..TlsOptions::default() };
        ConnectOptions { tls, ..ConnectOptions::new(&self.url) }
    }

    fn client(&self) -> anyhow::Result<AbsurdClient> {
        Ok(AbsurdClient::connect(&self.connect_options())?.with_queue(self.queue()))
    }
}

/// Runs the command line and returns the exit code. Passwords in errors are masked.
pub fn main() -> ExitCode {
    let outcome = carry_out(parsed().command);
    let written = output::finish();
    outcome.and_then(|code| written.map(|()| code)).unwrap_or_else(|error| {
        note!("error: {}", masked(&format!("{error:#}")));
        ExitCode::FAILURE
    })
}

fn carry_out(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Dev(args) => dev::run(args),
        Command::Serve(args) => serve::serve(*args),
        Command::Migrate(args) => return serve::migrate(&args),
        Command::Doctor(args) => block_on(doctor::run(args)),
        Command::Health(args) => block_on(operate::health(args)),
        Command::Queue(command) => block_on(queues::run(command)),
        Command::Task(command) => block_on(tasks::run(command)),
        Command::Event(command) => block_on(operate::event(command)),
        Command::Worker(args) => block_on(worker::run(args)),
        Command::Step(args) => return in_a_task(shell::step(args)),
        Command::Sleep(args) => return in_a_task(shell::sleep(args)),
        Command::AwaitEvent(args) => return in_a_task(shell::await_event(args)),
        Command::Emit(args) => return in_a_task(shell::emit(args)),
        Command::Demo(args) => demo::run(args),
        Command::Bench(command) => bench::run(command),
        Command::Version => {
            out!("absurd {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        Command::Completions { shell } => completions(shell),
        Command::DemoWorker(args) => block_on(demo::work(args)),
    }?;
    Ok(ExitCode::SUCCESS)
}

/// Parses the command line; exits after an error, in which passwords are masked.
fn parsed() -> Cli {
    Cli::try_parse().unwrap_or_else(|error| {
        if !error.use_stderr() {
            error.exit();
        }
        let text = error.render();
        let plain = text.to_string();
        let masked = masked(&plain);
        if masked == plain {
            error.exit();
        }
        note!("{}", masked.trim_end());
        std::process::exit(error.exit_code());
    })
}

fn completions(shell: clap_complete::Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "absurd", &mut script);
    out!("{}", String::from_utf8(script)?.trim_end());
    Ok(())
}

/// Runs a short command that starts often, so on one thread.
fn in_a_task(work: impl Future<Output = anyhow::Result<ExitCode>>) -> anyhow::Result<ExitCode> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

fn block_on(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    runtime()?.block_on(work)
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}

/// Starts logging to standard error; `filter` has the syntax of `ABSURD_LOG`.
fn log(filter: &str, json: bool) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(filter)
        .map_err(|error| anyhow::anyhow!("log: {error}; write it as info or absurd_server=debug"))?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(output::has_colours())
        // Otherwise a failed write would be reported by a macro that panics when it cannot write either.
        .log_internal_errors(false);
    if json {
        subscriber.json().init();
    } else {
        subscriber.init();
    }
    Ok(())
}

/// The signals that ask the process to stop. They are caught from the creation of this value on, not from the first
/// wait: a process that logs "serving" must be ready to be stopped.
#[derive(Debug)]
struct Stop(Option<(Signal, Signal)>);

impl Stop {
    fn listen() -> Self {
        let signals = signal(SignalKind::terminate()).and_then(|first| Ok((first, signal(SignalKind::interrupt())?)));
        Self(signals.ok())
    }

    /// Resolves at the next SIGTERM or SIGINT.
    async fn asked(&mut self) {
        let Some((terminate, interrupt)) = &mut self.0 else {
            let _ = tokio::signal::ctrl_c().await;
            return;
        };
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
}

/// Resolves when the process is asked to stop. Signals are caught from this call on.
fn asked_to_stop() -> impl Future<Output = ()> {
    let mut stop = Stop::listen();
    async move { stop.asked().await }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_of_every_command_has_examples() {
        fn walk(command: &clap::Command, path: &str) {
            let name = format!("{path} {}", command.get_name());
            let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(after.contains("Example") || command.is_hide_set(), "{name} has no examples");
            command.get_subcommands().for_each(|command| walk(command, &name));
        }
        Cli::command().debug_assert();
        walk(&Cli::command(), "");
    }
}
