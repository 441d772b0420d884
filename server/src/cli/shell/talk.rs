//! The protocol between the programs of an execution and its worker: one JSON line per request, and one per answer.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use absurd_client::Json;
use absurd_client::durable::{Context, Step, TaskError};
use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tempfile::TempDir;
use tokio::io::{
    AsyncBufRead, AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader,
};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;

use crate::cli::output::note;

/// Longest line in bytes.
const LINE_BYTES_MAX: u64 = 17 * 1024 * 1024;
/// Name of the socket in its directory.
const NAME: &str = "task";
/// Maximum number of commands of one execution at the same time.
const COMMANDS_MAX: usize = 64;

/// A request of a command.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Ask {
    /// Asks whether a step is stored, and begins it if not.
    Begin { step: String },
    /// Stores the value of the step that this connection has begun.
    Complete { value: Box<RawValue> },
    /// Sleeps for `ms` milliseconds, or until `until`.
    Sleep { step: String, ms: Option<u64>, until: Option<SystemTime> },
    /// Waits for an event, for `ms` milliseconds at most.
    Await { event: String, step: Option<String>, ms: Option<u64> },
    /// Emits an event.
    Emit { event: String, payload: Box<RawValue> },
}

/// An answer of the worker.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Answer {
    /// The step is not stored: run it.
    ToDo,
    /// The stored value of a step, or the payload of an event.
    Value { value: Box<RawValue> },
    /// The sleep is over, or the event is emitted.
    Done,
    /// The wait timed out.
    TimedOut,
    /// The request failed.
    Failed { message: String },
}

/// Sends a request and waits for its answer.
pub(super) async fn exchange<S>(worker: &mut S, ask: &Ask) -> anyhow::Result<Answer>
where
    S: AsyncBufRead + AsyncRead + AsyncWrite + Unpin,
{
    write(worker, ask).await?;
    // There is no answer once the execution is over, because the worker kills this program.
    let line = read(worker).await?.context("the execution is over")?;
    Ok(serde_json::from_str(&line)?)
}

async fn write<T: Serialize>(to: &mut (impl AsyncWrite + Unpin), what: &T) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    // The reader stops at this length, and the writer would not learn why.
    anyhow::ensure!(line.len() as u64 <= LINE_BYTES_MAX, "the value has more than {LINE_BYTES_MAX} bytes as JSON");
    to.write_all(&line).await?;
    to.flush().await?;
    Ok(())
}

async fn read(from: &mut (impl AsyncBufRead + Unpin)) -> anyhow::Result<Option<String>> {
    let mut line = String::new();
    let count = from.take(LINE_BYTES_MAX).read_line(&mut line).await?;
    anyhow::ensure!(count == 0 || line.ends_with('\n'), "more than {LINE_BYTES_MAX} bytes");
    Ok((count > 0).then_some(line))
}

/// The worker's end of an execution's socket. Its drop ends all requests.
#[derive(Debug)]
pub(crate) struct Socket {
    listener: UnixListener,
    home: TempDir,
}

impl Socket {
    /// Opens a socket in a new directory that only this user can enter.
    pub(crate) fn open() -> std::io::Result<Self> {
        let home = tempfile::Builder::new().prefix("absurd-").tempdir()?;
        Ok(Self { listener: UnixListener::bind(home.path().join(NAME))?, home })
    }

    /// Path of the socket.
    pub(crate) fn path(&self) -> PathBuf {
        self.home.path().join(NAME)
    }

    /// Answers requests forever.
    pub(crate) async fn serve(&self, context: &Context) {
        let mut commands = JoinSet::new();
        loop {
            tokio::select! {
                accepted = self.listener.accept(), if commands.len() < COMMANDS_MAX => match accepted {
                    Ok((stream, _)) => drop(commands.spawn(serve_one(context.clone(), stream))),
                    // For example, no file descriptor is free; another accept would fail at once.
                    Err(error) => {
                        note!("a step's command could not be heard: {error}");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                },
                Some(_) = commands.join_next() => {}
            }
        }
    }
}

async fn serve_one(context: Context, stream: UnixStream) {
    let mut stream = BufReader::new(stream);
    let mut begun = None;
    while let Ok(Some(line)) = read(&mut stream).await {
        let answer = match serde_json::from_str(&line) {
            Ok(ask) => match answer(&context, &mut begun, ask).await {
                // No answer, because a program that got one could run on until it is killed.
                Err(TaskError::Signal(_)) => std::future::pending().await,
                answer => answer.unwrap_or_else(refused),
            },
            Err(error) => Answer::Failed { message: error.to_string() },
        };
        if write(&mut stream, &answer).await.is_err() {
            return;
        }
    }
}

fn refused(error: TaskError) -> Answer {
    match error {
        TaskError::Timeout { .. } => Answer::TimedOut,
        other => Answer::Failed { message: other.to_string() },
    }
}

async fn answer(context: &Context, begun: &mut Option<Step>, ask: Ask) -> Result<Answer, TaskError> {
    match ask {
        Ask::Begin { step } => {
            let step = context.begin_step(&step)?;
            if let Some(stored) = &step.state {
                return value(stored);
            }
            *begun = Some(step);
            Ok(Answer::ToDo)
        }
        Ask::Complete { value: state } => {
            let step = begun.take().ok_or_else(|| TaskError::failure("NoStep", "no step was begun"))?;
            value(&context.complete_step(step, &state).await?)
        }
        Ask::Sleep { step, ms, until } => {
            match until {
                Some(until) => context.sleep_until(&step, until).await?,
                None => context.sleep_for(&step, Duration::from_millis(ms.unwrap_or(0))).await?,
            }
            Ok(Answer::Done)
        }
        Ask::Await { event, step, ms } => {
            let mut wait = context.await_event::<Box<RawValue>>(&event).step_name(step.as_deref().unwrap_or(""));
            if let Some(ms) = ms {
                wait = wait.timeout(Duration::from_millis(ms));
            }
            Ok(Answer::Value { value: wait.await? })
        }
        Ask::Emit { event, payload } => {
            context.emit_event(&event, &payload).await?;
            Ok(Answer::Done)
        }
    }
}

fn value(json: &Json) -> Result<Answer, TaskError> {
    let value = RawValue::from_string(json.to_string());
    Ok(Answer::Value { value: value.map_err(|error| TaskError::failure("JsonError", error.to_string()))? })
}
