//! Durable steps from a shell: `absurd step`, `sleep`, `await-event` and `emit`, inside of `absurd worker --exec`.
//!
//! The worker holds the claim, the stored values and the use counts of step names. These commands ask it over a socket;
//! each execution has its own. When the run is suspended or its claim is lost, the worker kills the program, so no
//! command has to react.

pub(super) mod talk;

use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::time::SystemTime;

use absurd_client::Json;
use anyhow::Context as _;
use clap::Args;
use tokio::io::BufReader;
use tokio::net::UnixStream;
use tokio::process::Command;

use super::input;
use super::output::out;
use super::worker::{Captured, OUTPUT_BYTES_MAX, result, until_exit};
use crate::settings::Span;
use talk::{Answer, Ask, exchange};

/// Environment variable with the path of the execution's socket.
pub(super) const SOCKET: &str = "ABSURD_TASK_SOCKET";
/// Exit code of a wait that has timed out, the same as of `timeout`.
const TIMED_OUT: u8 = 124;

pub(super) const STEP_EXAMPLES: &str = "\
Examples (inside of `absurd worker --exec`):
  payment=$(absurd step process-payment -- ./charge.sh \"$order\")
  absurd step notify -- mail -s shipped \"$email\"

The first time the command runs, and what it prints is stored as the step's value: JSON as it is, other text as a JSON string,
nothing as null. Later, in another attempt or after a sleep, it does not run: the stored value is printed. A command that fails
stores nothing, and its exit code is that of `absurd step`. The second use of a name is another step, `NAME#2`.";

pub(super) const SLEEP_EXAMPLES: &str = "\
Examples (inside of `absurd worker --exec`):
  absurd sleep 1h
  absurd sleep --until 2027-01-01T00:00:00Z
  absurd sleep --until \"$(date -Iseconds -d tomorrow)\"

The program ends here and starts again from its beginning when the time has come, on whichever worker is free; nothing waits
meanwhile. The time is counted from the first call.";

pub(super) const AWAIT_EXAMPLES: &str = "\
Examples (inside of `absurd worker --exec`):
  shipment=$(absurd await-event shipment.packed:42)
  absurd await-event approved:42 --timeout 24h || echo 'nobody approved it'

Prints the event's payload. While it is not there, the program ends here, and starts again from its beginning when it comes.
The exit code is 124 when the time is over first, now and in every later attempt.";

/// Flags of `absurd step`.
#[derive(Debug, Args)]
pub(super) struct StepArgs {
    /// Name of the step
    name: String,
    /// Command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Flags of `absurd sleep`.
#[derive(Debug, Args)]
pub(super) struct SleepArgs {
    /// How long
    #[arg(required_unless_present = "until", conflicts_with = "until", value_name = "SPAN")]
    span: Option<Span>,
    /// Until when, as 2027-01-01T00:00:00Z or 2027-01-01T01:00:00+01:00
    #[arg(long, value_name = "TIME", value_parser = input::time)]
    until: Option<SystemTime>,
    /// Name of the step
    #[arg(long, default_value = "sleep", value_name = "NAME")]
    step: String,
}

/// Flags of `absurd await-event`.
#[derive(Debug, Args)]
pub(super) struct AwaitArgs {
    /// Name of the event
    event: String,
    /// Longest wait, counted from the first call [default: for ever]
    #[arg(long, value_name = "SPAN")]
    timeout: Option<Span>,
    /// Name of the step [default: $awaitEvent:EVENT]
    #[arg(long, value_name = "NAME")]
    step: Option<String>,
}

/// Flags of `absurd emit`.
#[derive(Debug, Args)]
pub(super) struct EmitArgs {
    /// Name of the event
    event: String,
    /// JSON, or any other text as a JSON string; @FILE reads a file, - standard input
    #[arg(default_value = "null")]
    payload: String,
}

/// Connects to the execution's worker.
async fn connect() -> anyhow::Result<BufReader<UnixStream>> {
    let path: PathBuf = std::env::var_os(SOCKET).context(
        "this command works inside of a program that `absurd worker --exec` runs; outside of tasks there is `absurd event emit`",
    )?.into();
    let stream = UnixStream::connect(&path).await;
    Ok(BufReader::new(stream.with_context(|| format!("the worker does not listen at {}", path.display()))?))
}

/// Prints a value in the same form in the first and in later executions.
fn show(value: &Json) {
    match value.to::<String>() {
        Ok(text) => out!("{text}"),
        Err(_) if value.as_str() == "null" => {}
        Err(_) => out!("{value}"),
    }
}

fn wrong(answer: Answer) -> anyhow::Error {
    match answer {
        Answer::Failed { message } => anyhow::anyhow!(message),
        other => anyhow::anyhow!("the worker answered {other:?}"),
    }
}

/// `absurd step`: runs a command and stores its output, unless the step is stored already.
pub(super) async fn step(args: StepArgs) -> anyhow::Result<ExitCode> {
    let mut worker = connect().await?;
    match exchange(&mut worker, &Ask::Begin { step: args.name }).await? {
        Answer::Value { value } => {
            show(&Json::from_text(value.get()));
            return Ok(ExitCode::SUCCESS);
        }
        Answer::ToDo => {}
        other => return Err(wrong(other)),
    }
    let (program, arguments) = args.command.split_first().context("there is no command")?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {program:?}"))?;
    let mut output = Captured::default();
    let stdout = child.stdout.take();
    let status = until_exit(&mut child, output.read(stdout)).await?;
    anyhow::ensure!(!output.is_over, "the command printed more than {OUTPUT_BYTES_MAX} bytes");
    if !status.success() {
        // Like a shell: 128 plus the number of the signal.
        let killed = std::os::unix::process::ExitStatusExt::signal(&status).map(|signal| 128 + signal);
        let code = status.code().or(killed).and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
        return Ok(code.into());
    }
    let value = result(&output.bytes);
    let raw = serde_json::value::RawValue::from_string(value.to_string())?;
    match exchange(&mut worker, &Ask::Complete { value: raw }).await? {
        Answer::Value { .. } => {
            show(&value);
            Ok(ExitCode::SUCCESS)
        }
        other => Err(wrong(other)),
    }
}

/// `absurd sleep`: sleeps until the time has come; the worker suspends the run meanwhile.
pub(super) async fn sleep(args: SleepArgs) -> anyhow::Result<ExitCode> {
    let ask = Ask::Sleep {
        step: args.step,
        ms: args.span.map(|span| span.0.as_millis().try_into().unwrap_or(u64::MAX)),
        until: args.until,
    };
    match exchange(&mut connect().await?, &ask).await? {
        Answer::Done => Ok(ExitCode::SUCCESS),
        other => Err(wrong(other)),
    }
}

/// `absurd await-event`: waits for an event and prints its payload.
pub(super) async fn await_event(args: AwaitArgs) -> anyhow::Result<ExitCode> {
    let ms = args.timeout.map(|span| span.0.as_millis().try_into().unwrap_or(u64::MAX));
    let ask = Ask::Await { event: args.event, step: args.step, ms };
    match exchange(&mut connect().await?, &ask).await? {
        Answer::Value { value } => {
            show(&Json::from_text(value.get()));
            Ok(ExitCode::SUCCESS)
        }
        Answer::TimedOut => Ok(TIMED_OUT.into()),
        other => Err(wrong(other)),
    }
}

/// `absurd emit`: emits an event on the task's queue.
pub(super) async fn emit(args: EmitArgs) -> anyhow::Result<ExitCode> {
    let payload = input::text("payload", &args.payload)?;
    let payload = serde_json::value::RawValue::from_string(result(payload.as_bytes()).to_string())?;
    match exchange(&mut connect().await?, &Ask::Emit { event: args.event, payload }).await? {
        Answer::Done => Ok(ExitCode::SUCCESS),
        other => Err(wrong(other)),
    }
}
