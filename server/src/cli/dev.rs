//! `absurd dev`: starts a private Postgres, migrates it, serves on it, and shows its tasks as they run.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinSet;
use uuid::Uuid;

use super::output::{self, out};
use super::{asked_to_stop, default_queue, inspect, log, runtime};
use crate::activity::{Activity, What};
use crate::address::parse_listen;
use crate::app::{App, AppOptions};
use crate::domain::{QueueName, State};
use crate::postgres::{Cluster, ClusterOptions, DATABASE, default_home};
use crate::settings::{DEFAULT_LISTEN, Secret, Settings};

/// Tasks whose failures and waits are read at the same time; under load, the other tasks get no such line.
const NEWS_MAX: usize = 4;
/// Maximum number of tasks with a live line of their own.
const LINES_MAX: usize = 12;

/// Flags of `absurd dev`.
#[derive(Debug, Args)]
pub(super) struct DevArgs {
    /// Address to serve on, as HOST:PORT, or :PORT for this machine alone; port 0 takes a free one
    #[arg(
        long,
        env = "ABSURD_LISTEN",
        default_value_t = DEFAULT_LISTEN,
        value_name = "ADDR:PORT",
        value_parser = parse_listen
    )]
    listen: SocketAddr,
    /// Another port at that address
    #[arg(long, value_name = "PORT")]
    port: Option<u16>,
    /// Directory of the private Postgres [default: /var/lib/absurd as root, else ~/.local/share/absurd]
    #[arg(long, env = "ABSURD_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Directory of initdb and postgres, where they are not found by themselves
    #[arg(long, env = "ABSURD_PG_BIN", value_name = "DIR")]
    pg_bin: Option<PathBuf>,
    #[arg(long, short, help = "Queue to create [env: ABSURD_DEFAULT_QUEUE, else ABSURD_QUEUE] [default: default]")]
    queue: Option<String>,
    /// For tests only: let the `TestClockService` set the time of this server
    #[arg(long, env = "ABSURD_TEST_CLOCK")]
    test_clock: bool,
    /// What to log beside the lines of tasks
    #[arg(long, env = "ABSURD_LOG", default_value = "warn", value_name = "FILTER")]
    log: String,
}

/// Serves until asked to stop.
pub(super) fn run(args: DevArgs) -> anyhow::Result<()> {
    log(&args.log, false)?;
    let started = Instant::now();
    let home = args.data_dir.unwrap_or_else(default_home);
    // Before the runtime, because the start blocks.
    let mut cluster = Cluster::start(&ClusterOptions { home, bin: args.pg_bin, durable: true, settings: Vec::new() })?;
    let listen = args.port.map_or(args.listen, |port| SocketAddr::new(args.listen.ip(), port));
    let queue = args.queue.unwrap_or_else(default_queue);
    let outcome = runtime()?.block_on(serve(&mut cluster, listen, &queue, args.test_clock, started));
    cluster.stop();
    outcome
}

/// Starts a server on a private cluster, with its database, schemas and queue.
pub(super) async fn start_on(
    cluster: &Cluster,
    listen: SocketAddr,
    queue: &str,
    test_clock: bool,
) -> anyhow::Result<App> {
    create_database(cluster).await?;
    let settings = Settings {
        database_url: Some(Secret::from(cluster.url(DATABASE).as_str())),
        listen: Some(listen),
        migrate: Some(true),
        test_clock: Some(test_clock),
        ..Settings::default()
    };
    let options = AppOptions { queue: Some(QueueName::parse("--queue", queue)?), ..settings.into_app_options()? };
    App::start(options).await
}

fn url(addr: SocketAddr) -> String {
    if addr.ip().is_unspecified() { format!("http://127.0.0.1:{}", addr.port()) } else { format!("http://{addr}") }
}

/// Creates the database of a private cluster, if it is missing.
pub(super) async fn create_database(cluster: &Cluster) -> anyhow::Result<()> {
    let (client, connection) = tokio_postgres::connect(&cluster.url("postgres"), tokio_postgres::NoTls).await?;
    let connection = tokio::spawn(connection);
    let known = client.query_opt("select from pg_database where datname = $1", &[&DATABASE]).await?;
    if known.is_none() {
        client.batch_execute(&format!("create database {DATABASE}")).await?;
    }
    drop(client);
    let _ = connection.await;
    Ok(())
}

async fn serve(
    cluster: &mut Cluster,
    listen: SocketAddr,
    queue: &str,
    test_clock: bool,
    started: Instant,
) -> anyhow::Result<()> {
    let mut stop = std::pin::pin!(asked_to_stop());
    let app = tokio::select! {
        app = start_on(cluster, listen, queue, test_clock) => app?,
        () = &mut stop => return Ok(()),
    };
    greet(cluster, &app, queue, started.elapsed());
    let mut feed = app.engine().feed.watch();
    let client = absurd_client::AbsurdClient::connect(&absurd_client::ConnectOptions::new(url(app.addr())))?;
    let mut news = JoinSet::new();
    let mut lines = Lines::new()?;
    let mut look = tokio::time::interval(Duration::from_secs(1));
    let ended = loop {
        tokio::select! {
            () = &mut stop => break Ok(()),
            activity = feed.recv() => match activity {
                Ok(activity) => {
                    lines.show(&activity);
                    if has_more_to_tell(&activity) && news.len() < NEWS_MAX {
                        let (client, id) = (client.with_queue(activity.queue.as_str()), activity.task_id);
                        news.spawn(async move { (id, inspect::news(&client, id).await) });
                    }
                }
                Err(RecvError::Lagged(missed)) => lines.note(&format!("({missed} lines left out)")),
                Err(RecvError::Closed) => break Ok(()),
            },
            Some(Ok((id, Some(text)))) = news.join_next() => lines.note(&format!("    {id}  {text}")),
            _ = look.tick() => if cluster.has_exited() {
                break Err(anyhow::anyhow!("Postgres has ended; see {}", cluster.home().join("postgres.log").display()));
            },
        }
    };
    lines.note("stopping");
    app.shut_down().await.context("cannot stop")?;
    ended
}

/// Whether an attempt failed or the task waits, so that the reason and the next attempt get a line.
fn has_more_to_tell(activity: &Activity) -> bool {
    matches!(activity.what, What::Ended { state: State::Pending | State::Sleeping | State::Failed })
}

fn greet(cluster: &Cluster, app: &App, queue: &str, took: Duration) {
    let url = url(app.addr());
    let database = cluster.url(DATABASE);
    let custom =
        if url == absurd_client::DEFAULT_URL { String::new() } else { format!("    export ABSURD_URL='{url}'\n") };
    out!(
        "\nabsurd {version} is ready, {seconds:.1} s after its start\n\n  \
         gRPC      {url}  (in the clear, for this machine)\n  \
         Postgres  {postgres} in {home}  (kept between starts)\n  \
         Queue     {queue}\n\n  \
         For an SDK that speaks SQL:\n    export ABSURD_DATABASE_URL='{database}'\n\n  \
         Next, in another terminal:\n{custom}    \
         absurd worker --exec 'cat'\n    \
         absurd task spawn greet '{{\"name\":\"world\"}}' --wait 10s\n    \
         absurd demo --url {url}\n\n  \
         Ctrl-C stops server and Postgres.\n",
        version = env!("CARGO_PKG_VERSION"),
        seconds = took.as_secs_f64(),
        postgres = cluster.version(),
        home = cluster.home().display(),
    );
}

/// Shows one live line per task on a terminal, else one line per activity.
struct Lines {
    screen: MultiProgress,
    live: HashMap<Uuid, (ProgressBar, Instant, String)>,
    style: ProgressStyle,
    terminal: bool,
}

impl Lines {
    fn new() -> anyhow::Result<Self> {
        use std::io::IsTerminal as _;
        Ok(Self {
            screen: MultiProgress::new(),
            live: HashMap::new(),
            style: ProgressStyle::with_template("{spinner} {msg}")?,
            terminal: std::io::stderr().is_terminal() && std::io::stdout().is_terminal(),
        })
    }

    fn note(&self, text: &str) {
        if !self.terminal || self.screen.println(text).is_err() {
            out!("{text}");
        }
    }

    fn show(&mut self, activity: &Activity) {
        let id = activity.task_id;
        let (what, over) = match &activity.what {
            What::Spawned { .. } => ("spawned".to_owned(), false),
            What::Pushed { attempt, .. } => (format!("pushed, attempt {attempt}"), false),
            What::Ended { state } => (state.as_str().to_owned(), state.is_terminal()),
        };
        let known = self.live.get(&id);
        let name = match &activity.what {
            What::Spawned { name } | What::Pushed { name, .. } => name.clone(),
            What::Ended { .. } => known.map(|(_, _, name)| name.clone()).unwrap_or_default(),
        };
        let since = known.map(|(_, since, _)| *since);
        let took = since.filter(|_| over).map(|since| format!("  after {}", output::span(since.elapsed())));
        let mark = match &activity.what {
            What::Ended { state: State::Completed } => "✓",
            What::Ended { state: State::Failed | State::Cancelled } => "✗",
            _ => "·",
        };
        let line = format!("{mark} {}  {name}  {id}  {what}{}", activity.queue, took.unwrap_or_default());
        if over {
            if let Some((bar, _, _)) = self.live.remove(&id) {
                bar.finish_and_clear();
                self.screen.remove(&bar);
            }
            return self.note(&line);
        }
        if !self.terminal {
            // Below, the task is remembered for its name and its age: here up to 10,000 tasks, on a terminal
            // `LINES_MAX`.
            out!("{line}");
        }
        if let Some((bar, _, _)) = self.live.get(&id) {
            bar.set_message(line);
        } else if self.live.len() < LINES_MAX || (!self.terminal && self.live.len() < 10_000) {
            let bar = if self.terminal { self.screen.add(ProgressBar::new_spinner()) } else { ProgressBar::hidden() };
            bar.set_style(self.style.clone());
            bar.set_message(line);
            self.live.insert(id, (bar, Instant::now(), name));
        }
    }
}
