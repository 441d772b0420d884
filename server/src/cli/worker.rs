//! `absurd worker --exec`: any program is a worker. Params on standard input, result on standard output.

use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use absurd_client::durable::{Absurd, Context, Signal};
use absurd_client::{AbsurdClient, ClaimedTask, Json, StreamOptions};
use clap::Args;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::shell::SOCKET;
use super::shell::talk::Socket;
use super::{ClientArgs, asked_to_stop, log};
use crate::settings::Span;

pub(super) const EXAMPLES: &str = "\
Examples:
  absurd worker --exec ./job.sh
  absurd worker --exec 'python3 job.py' --concurrency 8 --task-name resize --task-name crop

The program gets the params on its standard input and these variables: ABSURD_TASK_ID ABSURD_RUN_ID ABSURD_TASK_NAME
ABSURD_ATTEMPT ABSURD_QUEUE ABSURD_HEADERS. What it prints is the result: JSON as it is, other text as a JSON string,
nothing as null. An exit code other than 0 fails the run, with the end of its standard error as the reason. The lease is
kept as long as it runs; when the task is cancelled or the claim is lost, it is killed.

A program may be durable: `absurd step NAME -- COMMAND`, `absurd sleep`, `absurd await-event` and `absurd emit` are for its use.
It starts from its beginning each time; steps that are stored are not done again. While it sleeps or waits it does not run.";

/// Largest output that becomes a result.
pub(super) const OUTPUT_BYTES_MAX: u64 = 8 * 1024 * 1024;
/// How long a task waits whose checkpoints could not be read: at once it would come back to the same trouble.
const READ_AGAIN: Duration = Duration::from_secs(1);
/// Bytes of standard error that are recorded.
const ERRORS_BYTES_MAX: usize = 8 * 1024;

/// Flags of `absurd worker`.
#[derive(Debug, Args)]
pub(super) struct WorkerArgs {
    /// Program to run for each task, by the shell
    #[arg(long, value_name = "COMMAND")]
    exec: String,
    /// Programs at the same time
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(i32).range(1..=1000))]
    concurrency: i32,
    /// Only tasks of this name; may be given again
    #[arg(long = "task-name", value_name = "NAME")]
    task_names: Vec<String>,
    /// Lease of a task; extended while its program runs
    #[arg(long, default_value = "30s", value_name = "SPAN")]
    claim_timeout: Span,
    /// How long to let programs finish when asked to stop
    #[arg(long, default_value = "30s", value_name = "SPAN")]
    drain: Span,
    /// Stop after this many tasks
    #[arg(long, value_name = "N")]
    max_tasks: Option<u64>,
    /// Name of this worker [default: host and process]
    #[arg(long, env = "ABSURD_WORKER_ID")]
    worker_id: Option<String>,
    #[command(flatten)]
    client: ClientArgs,
}

/// Works until asked to stop.
pub(super) async fn run(args: WorkerArgs) -> anyhow::Result<()> {
    log(&std::env::var("ABSURD_LOG").unwrap_or_else(|_| "warn".into()), false)?;
    let host = gethostname::gethostname().to_string_lossy().into_owned();
    let worker_id = args.worker_id.clone().unwrap_or_else(|| format!("{host}:{}", std::process::id()));
    let client = args.client.client()?.with_worker_id(worker_id.as_str());
    let options = StreamOptions {
        max_in_flight: args.concurrency,
        claim_timeout: args.claim_timeout.0,
        task_names: args.task_names.clone(),
        ..StreamOptions::default()
    };
    let mut stop = std::pin::pin!(asked_to_stop());
    let mut tasks = tokio::select! {
        tasks = wait_for_queue(&client, options) => tasks?,
        () = &mut stop => return Ok(()),
    };
    eprintln!("worker {worker_id} takes tasks of queue {:?} at {}", args.client.queue, args.client.url);
    let work = Arc::new(Work { args, absurd: Absurd::new(client) });
    let args = &work.args;
    let mut programs = JoinSet::new();
    let mut left = args.max_tasks.unwrap_or(u64::MAX);
    // True once programs that still run must end.
    let over = watch::Sender::new(false);
    while left > 0 {
        tokio::select! {
            () = &mut stop => break,
            task = tasks.next() => {
                let Some(task) = task else { break };
                left -= 1;
                programs.spawn(carry_out(Arc::clone(&work), task, over.subscribe()));
            }
            Some(_) = programs.join_next() => {}
        }
    }
    let finish = async { while programs.join_next().await.is_some() {} };
    let closing = tasks.close(args.drain.0 + Duration::from_secs(10));
    let drain = async {
        if tokio::time::timeout(args.drain.0, finish).await.is_err() {
            eprintln!("programs still run; ending them and giving their tasks back");
            over.send_replace(true);
        }
    };
    let (closed, ()) = tokio::join!(closing, drain);
    while programs.join_next().await.is_some() {}
    closed?;
    Ok(())
}

/// The queue may come to be after its worker.
async fn wait_for_queue(client: &AbsurdClient, options: StreamOptions) -> anyhow::Result<absurd_client::ClaimStream> {
    let mut told = false;
    loop {
        match client.claim_stream(options.clone()).await {
            Err(error) if error.reason() == absurd_client::Reason::QueueNotFound => {
                if !told {
                    eprintln!(
                        "waiting for queue {0:?}; create it with: absurd queue create --queue {0}",
                        client.queue_name()
                    );
                    told = true;
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            outcome => return Ok(outcome?),
        }
    }
}

/// What all executions share.
struct Work {
    args: WorkerArgs,
    absurd: Absurd,
}

async fn carry_out(work: Arc<Work>, task: ClaimedTask, over: watch::Receiver<bool>) {
    let started = std::time::Instant::now();
    let end = match work.absurd.context_of(&task, work.args.claim_timeout.0).await {
        Ok(context) => execute(&work.args, &task, &context, over).await,
        Err(error) if error.reason() == absurd_client::Reason::InvalidArgument => {
            failure("InvalidHeaders", error.message(), "")
        }
        Err(error) => {
            eprintln!("{} {}: its checkpoints could not be read: {error}", task.task_name, task.task_id);
            End::Released(READ_AGAIN)
        }
    };
    let (said, what) = match end {
        End::Result(result) => (task.complete_json(result).await.map(drop), "completed".to_owned()),
        End::Failure(reason) => {
            let message = reason["message"].as_str().unwrap_or("failed").to_owned();
            (task.fail(&reason).await.map(drop), format!("failed: {message}"))
        }
        End::Revoked(why) => (Ok(()), format!("stopped: the claim is {why:?}").to_lowercase()),
        End::Over(Signal::Suspended) => (Ok(()), "suspended".to_owned()),
        End::Over(signal) => (Ok(()), format!("stopped: {signal}")),
        End::Released(delay) => (task.release(delay).await.map(drop), "given back".to_owned()),
    };
    let took = started.elapsed().as_millis();
    match said {
        Ok(()) => eprintln!("{} {} {what} after {took} ms", task.task_name, task.task_id),
        Err(error) => eprintln!("{} {} {what}, but could not be reported: {error}", task.task_name, task.task_id),
    }
}

enum End {
    Result(Json),
    Failure(serde_json::Value),
    Revoked(absurd_client::Revoked),
    Over(Signal),
    /// Given back, to be offered again after this long.
    Released(Duration),
}

async fn execute(args: &WorkerArgs, task: &ClaimedTask, context: &Context, mut over: watch::Receiver<bool>) -> End {
    let socket = match Socket::open() {
        Ok(socket) => socket,
        Err(error) => return failure("SpawnError", &format!("cannot open a socket for steps: {error}"), ""),
    };
    let mut child = match start(args, task, &socket) {
        Ok(child) => child,
        Err(error) => return failure("SpawnError", &format!("cannot run {:?}: {error}", args.exec), ""),
    };
    let group = child.id();
    let params = task.params.as_ref().map_or("null", Json::as_str).as_bytes().to_vec();
    let mut serving = std::pin::pin!(socket.serve(context));
    let end = tokio::select! {
        biased;
        // First: what a program prints after its run was suspended is no result.
        signal = context.over() => End::Over(signal),
        why = task.revoked() => End::Revoked(why),
        end = talk(&mut child, params) => end,
        _ = over.wait_for(|over| *over) => End::Released(Duration::ZERO),
        () = &mut serving => End::Released(Duration::ZERO),
    };
    // Whatever the program has started dies with it, before any of it can see that nobody listens any more.
    kill_group(group);
    let _ = child.wait().await;
    end
}

fn start(args: &WorkerArgs, task: &ClaimedTask, socket: &Socket) -> std::io::Result<Child> {
    Command::new("/bin/sh")
        .args(["-c", &args.exec])
        .env("ABSURD_TASK_ID", task.task_id.to_string())
        .env("ABSURD_RUN_ID", task.run_id.to_string())
        .env("ABSURD_TASK_NAME", &task.task_name)
        .env("ABSURD_ATTEMPT", task.attempt.to_string())
        .env("ABSURD_QUEUE", &args.client.queue)
        .env("ABSURD_URL", &args.client.url)
        .env("ABSURD_HEADERS", task.headers.as_ref().map_or("{}", Json::as_str))
        .env(SOCKET, socket.path())
        .env("PATH", path_with_absurd())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
}

/// Programs find `absurd`, wherever this one was started from.
fn path_with_absurd() -> std::ffi::OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    if let Some(own) = std::env::current_exe().ok().as_deref().and_then(std::path::Path::parent) {
        path.push(":");
        path.push(own);
    }
    path
}

fn kill_group(id: Option<u32>) {
    if let Some(pid) = id.and_then(|id| i32::try_from(id).ok()).and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
    }
}

async fn talk(child: &mut Child, params: Vec<u8>) -> End {
    let stdin = child.stdin.take();
    let feed = async move {
        if let Some(mut stdin) = stdin {
            // A program need not read its input.
            let _ = stdin.write_all(&params).await;
        }
    };
    let output = read(child.stdout.take());
    let errors = tail(child.stderr.take());
    let ((), output, errors) = tokio::join!(feed, output, errors);
    let status = match child.wait().await {
        Ok(status) => status,
        Err(error) => return failure("WaitError", &error.to_string(), &errors),
    };
    if !status.success() {
        return failure("ExitError", &status.to_string(), &errors);
    }
    match output {
        Some(output) => End::Result(result(&output)),
        None => failure("OutputError", &format!("more than {OUTPUT_BYTES_MAX} bytes of output"), &errors),
    }
}

/// JSON as it is, other text as a string, nothing as null.
pub(super) fn result(output: &[u8]) -> Json {
    let text = String::from_utf8_lossy(output);
    let text = text.trim();
    if text.is_empty() {
        return Json::null();
    }
    match serde_json::from_str::<&serde_json::value::RawValue>(text) {
        Ok(_) => Json::from_text(text),
        Err(_) => serde_json::Value::from(text).into(),
    }
}

async fn read(from: Option<impl AsyncRead + Unpin>) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    if let Some(from) = from {
        let mut bounded = from.take(OUTPUT_BYTES_MAX + 1);
        bounded.read_to_end(&mut bytes).await.ok()?;
        if bytes.len() as u64 > OUTPUT_BYTES_MAX {
            // Let the program run to its end.
            let _ = tokio::io::copy(&mut bounded.into_inner(), &mut tokio::io::sink()).await;
            return None;
        }
    }
    Some(bytes)
}

/// Passes standard error on and keeps its end.
async fn tail(from: Option<impl AsyncRead + Unpin>) -> String {
    let mut kept = Vec::new();
    let Some(mut from) = from else { return String::new() };
    let mut buffer = vec![0_u8; 4096];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let _ = tokio::io::stderr().write_all(&buffer[..count]).await;
        kept.extend_from_slice(&buffer[..count]);
        let surplus = kept.len().saturating_sub(ERRORS_BYTES_MAX);
        kept.drain(..surplus);
    }
    String::from_utf8_lossy(&kept).replace('\0', "\u{fffd}")
}

fn failure(name: &str, message: &str, errors: &str) -> End {
    let last = errors.lines().rev().find(|line| !line.trim().is_empty());
    let message = last.map_or_else(|| message.to_owned(), |last| format!("{message}: {last}"));
    End::Failure(json!({"name": name, "message": message, "traceback": errors}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_becomes_json() {
        assert_eq!(result(b" {\"a\": 12345678901234567890123}\n").as_str(), "{\"a\": 12345678901234567890123}");
        assert_eq!(result(b"hello\n").as_str(), "\"hello\"");
        assert_eq!(result(b"\n").as_str(), "null");
    }
}
