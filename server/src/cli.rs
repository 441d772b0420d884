//! The `absurd` command: its words, and which module carries each out.

mod bench;
mod demo;
mod dev;
mod doctor;
mod operate;
mod output;
mod serve;
mod shell;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;

use absurd_client::{AbsurdClient, ConnectOptions, TlsOptions};
use clap::{Args, Parser, Subcommand};

use crate::settings::{Secret, Settings, masked};
use output::Output;

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
    #[command(after_help = "Examples:\n  absurd dev\n  absurd dev --listen 127.0.0.1:6000 --data-dir ./data")]
    Dev(dev::DevArgs),
    /// Run a server on a database of yours
    #[command(after_help = "Examples:\n  absurd serve --migrate --database-url postgresql://app@db/app\n  \
        absurd serve --config absurd.toml\n\nA configuration file holds the flags' names as keys:\n  \
        database-url = \"postgresql://app@db/app\"\n  listen = \"0.0.0.0:50051\"\n  stream-age = \"30m\"")]
    Serve(Box<ServeArgs>),
    /// Install or upgrade the schemas of a database
    #[command(after_help = "Examples:\n  absurd migrate --database-url postgresql://app@db/app\n  \
        absurd migrate --check         say what would be done\n  \
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
    #[command(subcommand)]
    Queue(operate::QueueCommand),
    /// Spawn, read, list, watch, cancel and retry tasks
    #[command(subcommand)]
    Task(operate::TaskCommand),
    /// Emit events
    #[command(subcommand)]
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
    #[command(subcommand)]
    Bench(bench::BenchCommand),
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
    /// Say what would be done, and do nothing
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
    /// Server; several replicas with commas between
    #[arg(long, env = "ABSURD_URL", default_value = absurd_client::DEFAULT_URL, value_name = "URL")]
    url: String,
    /// Queue
    #[arg(long, short, env = "ABSURD_DEFAULT_QUEUE", default_value = absurd_client::DEFAULT_QUEUE)]
    queue: String,
    /// PEM file of the authority that signed the server's certificate
    #[arg(long, env = "ABSURD_TLS_CA", value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// How to print
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
}

impl ClientArgs {
    fn client(&self) -> anyhow::Result<AbsurdClient> {
        let tls = TlsOptions { ca: self.tls_ca.clone(), ..TlsOptions::default() };
        let options = ConnectOptions { tls, ..ConnectOptions::new(&self.url) };
        Ok(AbsurdClient::connect(&options)?.with_queue(self.queue.as_str()))
    }
}

/// Runs the command line; the exit code says how it went.
pub fn main() -> ExitCode {
    let outcome = match parsed().command {
        Command::Dev(args) => dev::run(args),
        Command::Serve(args) => serve::serve(*args),
        Command::Migrate(args) => serve::migrate(&args),
        Command::Doctor(args) => block_on(doctor::run(args)),
        Command::Health(args) => block_on(operate::health(args)),
        Command::Queue(command) => block_on(operate::queue(command)),
        Command::Task(command) => block_on(operate::task(command)),
        Command::Event(command) => block_on(operate::event(command)),
        Command::Worker(args) => block_on(worker::run(args)),
        Command::Step(args) => return in_a_task(shell::step(args)),
        Command::Sleep(args) => return in_a_task(shell::sleep(args)),
        Command::AwaitEvent(args) => return in_a_task(shell::await_event(args)),
        Command::Emit(args) => return in_a_task(shell::emit(args)),
        Command::Demo(args) => demo::run(args),
        Command::Bench(command) => bench::run(command),
        Command::DemoWorker(args) => block_on(demo::work(args)),
    };
    exit_code(outcome.map(|()| ExitCode::SUCCESS))
}

/// The command line. What is said of a mistake in it shows no password.
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
        eprint!("{masked}");
        std::process::exit(error.exit_code());
    })
}

fn exit_code(outcome: anyhow::Result<ExitCode>) -> ExitCode {
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

/// Small programs that start often: one thread is enough.
fn in_a_task(work: impl Future<Output = anyhow::Result<ExitCode>>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    exit_code(runtime.map_err(anyhow::Error::from).and_then(|runtime| runtime.block_on(work)))
}

fn block_on(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    runtime()?.block_on(work)
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}

/// Logs to standard error; `filter` as in `ABSURD_LOG`.
fn log(filter: &str, json: bool) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(filter)
        .map_err(|error| anyhow::anyhow!("log: {error}; write it as info or absurd_server=debug"))?;
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if json {
        subscriber.json().init();
    } else {
        subscriber.init();
    }
    Ok(())
}

/// Resolves when the process is asked to stop. It listens from this call on, not from the first poll: who says "serving"
/// must be ready to be stopped.
fn asked_to_stop() -> impl Future<Output = ()> {
    use tokio::signal::unix::{SignalKind, signal};
    let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    async move {
        let (Ok(mut terminate), Ok(mut interrupt)) = signals else {
            let _ = tokio::signal::ctrl_c().await;
            return;
        };
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
}
