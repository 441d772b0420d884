//! `absurd worker`: runs a program for each task, with the params on standard input and the result on standard output.

use std::pin::pin;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use absurd_client::durable::{Absurd, Context, Signal};
use absurd_client::{AbsurdClient, ClaimStream, ClaimedTask, Error, Json, Reason, StreamOptions};
use clap::Args;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::output::{self, note};
use super::shell::SOCKET;
use super::shell::talk::Socket;
use super::{ClientArgs, Stop, log};
use crate::settings::Span;

pub(super) const EXAMPLES: &str = "\
Examples:
  absurd worker --exec ./job.sh
  absurd worker --exec 'python3 job.py' --concurrency 8 --task-name resize --task-name crop
  absurd worker cat                                  one word is a command of the shell too
  absurd worker --queue orders -- jq -c .items       several are a program and its arguments, without a shell

The program gets the params on its standard input and these variables: ABSURD_TASK_ID ABSURD_RUN_ID ABSURD_TASK_NAME
ABSURD_ATTEMPT ABSURD_QUEUE ABSURD_HEADERS. What it prints is the result: JSON as it is, other text as a JSON string,
nothing as null. An exit code other than 0 fails the run, with the end of its standard error as the reason, and so does a result
that the server refuses; the code that --no-retry-code names fails the task, however many attempts are left. The lease is kept as long as it runs; when the task is cancelled or the claim is lost, it is killed.
The task ends when its program does: what it has left in the background is killed.

Ctrl-C or SIGTERM lets programs finish (--drain); the second one ends them at once. Tasks that do not finish go back to the queue
without using up an attempt.

A program may be durable: `absurd step NAME -- COMMAND`, `absurd sleep`, `absurd await-event` and `absurd emit` are for its use.
It starts from its beginning each time; steps that are stored are not done again. While it sleeps or waits it does not run.";

/// Largest output that becomes a result, in bytes.
pub(super) const OUTPUT_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Time for which the output is read after the program's end: a process that it left behind may hold the output open.
const READ_ON: Duration = Duration::from_secs(1);
/// Longest time for giving tasks back after their programs were ended.
const GIVE_BACK_MAX: Duration = Duration::from_secs(5);
/// Pause between attempts to report an outcome, in addition to the client's own pauses.
const REPORT_AGAIN: Duration = Duration::from_secs(1);
/// Limit for closing the stream: longer than any program runs, because [`finish`] bounds the wait.
const AGES: Duration = Duration::from_secs(365 * 24 * 3600);
/// Delay of a task whose checkpoints could not be read; claimed again at once, it would fail the same way.
const READ_AGAIN: Duration = Duration::from_secs(1);
/// Bytes of standard error that a failure keeps.
const ERRORS_BYTES_MAX: usize = 8 * 1024;

/// Flags of `absurd worker`.
#[derive(Debug, Args)]
pub(super) struct WorkerArgs {
    /// Program to run for each task, by the shell
    #[arg(long, value_name = "COMMAND", required_unless_present = "program", conflicts_with = "program")]
    exec: Option<String>,
    /// The same as an argument; with arguments of its own it runs without a shell (write -- before them)
    #[arg(value_name = "PROGRAM")]
    program: Vec<String>,
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
    /// Exit code by which a program says that another attempt would not help: the task fails at once
    #[arg(long, value_name = "CODE", value_parser = clap::value_parser!(i32).range(1..=255))]
    no_retry_code: Option<i32>,
    /// Stop after this many tasks
    #[arg(long, value_name = "N")]
    max_tasks: Option<u64>,
    /// Name of this worker [default: host and process]
    #[arg(long, env = "ABSURD_WORKER_ID")]
    worker_id: Option<String>,
    #[command(flatten)]
    client: ClientArgs,
}

impl WorkerArgs {
    /// A single word is a shell command, like `--exec`; several are a program and its arguments.
    fn command(&self) -> Command {
        match (&self.exec, self.program.as_slice()) {
            (Some(line), _) | (None, [line]) => {
                let mut command = Command::new("/bin/sh");
                command.args(["-c", line]);
                command
            }
            (None, words) => {
                let mut command = Command::new(words.first().map_or("", String::as_str));
                command.args(words.iter().skip(1));
                command
            }
        }
    }

    fn command_line(&self) -> String {
        format!("{:?}", self.exec.clone().unwrap_or_else(|| self.program.join(" ")))
    }
}

/// Works until asked to stop, or until `--max-tasks` are done.
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
    let mut stop = Stop::listen();
    let mut tasks = tokio::select! {
        tasks = args.client.follow(open(&client, options)) => tasks?,
        () = stop.asked() => return Ok(()),
    };
    note!("worker {worker_id} takes tasks of queue {:?} at {}", args.client.queue(), args.client.urls()?.join(","));
    let outages = tokio::spawn(tell_outages(args.client.clone(), tasks.trouble()));
    let work = Arc::new(Work { args, absurd: Absurd::new(client) });
    let mut programs = JoinSet::new();
    let mut left = work.args.max_tasks.unwrap_or(u64::MAX);
    let mut asked = false;
    // True once programs that still run must end.
    let over = watch::Sender::new(false);
    while left > 0 && !asked {
        tokio::select! {
            () = stop.asked() => asked = true,
            task = tasks.next() => {
                let Some(task) = task else { break };
                left -= 1;
                programs.spawn(carry_out(Arc::clone(&work), task, over.subscribe()));
            }
            Some(_) = programs.join_next() => {}
        }
    }
    let mut closing = pin!(tasks.close(AGES));
    let mut closed = None;
    {
        let mut finished = pin!(finish(&mut programs, &mut stop, asked, work.args.drain.0, &over));
        tokio::select! {
            () = &mut finished => {}
            result = &mut closing => {
                closed = Some(result);
                finished.await;
            }
        }
    }
    if closed.is_none() {
        closed = tokio::time::timeout(GIVE_BACK_MAX, closing).await.ok();
    }
    outages.abort();
    if closed.is_none() {
        note!("the server could not be told that this worker ends: tasks that it held move on when their leases end");
    }
    Ok(closed.transpose().map(drop)?)
}

/// Waits for the running programs: until asked to stop for as long as they take, then at most `drain`. A second request
/// ends the wait. Programs that still run are then ended, and their tasks given back.
async fn finish(
    programs: &mut JoinSet<()>,
    stop: &mut Stop,
    mut asked: bool,
    drain: Duration,
    over: &watch::Sender<bool>,
) {
    while !asked && !programs.is_empty() {
        tokio::select! {
            () = stop.asked() => asked = true,
            _ = programs.join_next() => {}
        }
    }
    if programs.is_empty() {
        return;
    }
    let count = programs.len();
    let tasks = if count == 1 { "task" } else { "tasks" };
    note!("finishing {count} {tasks}; press Ctrl-C again to stop now");
    let mut ends = pin!(tokio::time::sleep(drain));
    while !programs.is_empty() {
        tokio::select! {
            () = &mut ends => {
                note!("programs still run; ending them and giving their tasks back");
                break;
            }
            () = stop.asked() => {
                note!("stopping now: ending programs and giving their tasks back");
                break;
            }
            _ = programs.join_next() => {}
        }
    }
    over.send_replace(true);
    let given_back = async { while programs.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(GIVE_BACK_MAX, given_back).await;
    programs.abort_all();
}

/// Opens the stream. Waits for a queue that does not exist yet, and for an unreachable server.
async fn open(client: &AbsurdClient, options: StreamOptions) -> anyhow::Result<ClaimStream> {
    let mut told = false;
    loop {
        match client.claim_stream(options.clone()).await {
            Err(error) if error.reason() == Reason::QueueNotFound => {
                if !told {
                    note!("waiting for queue {0:?}; create it with: absurd queue create {0}", client.queue_name());
                    told = true;
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
            Err(error) if may_pass(&error) => {}
            outcome => return Ok(outcome?),
        }
    }
}

/// Reports when the server becomes unreachable, and when it answers again.
async fn tell_outages(server: ClientArgs, mut trouble: watch::Receiver<Option<Error>>) {
    let mut told = false;
    while trouble.changed().await.is_ok() {
        let now = trouble.borrow_and_update().clone();
        match now {
            Some(error) if !told => {
                note!("{}; trying again", server.cause(&error).await);
                told = true;
            }
            None if told => {
                note!("the server answers again");
                told = false;
            }
            Some(_) | None => {}
        }
    }
}

/// Whether the same call may succeed later.
fn may_pass(error: &Error) -> bool {
    error.is_passing() || error.reason() == Reason::DeadlineExceeded
}

/// Whether the server refuses the content of the outcome, so that it would refuse it again.
fn is_refused(error: &Error) -> bool {
    use Reason::{DatabaseRefused, InvalidArgument, JsonInvalid, PayloadTooLarge};
    matches!(error.reason(), JsonInvalid | PayloadTooLarge | InvalidArgument | DatabaseRefused)
}

/// Whether an operator has to mend the database first. The outcome itself may be stored later.
fn is_for_operators(error: &Error) -> bool {
    use Reason::{DatabaseBroken, DatabasePermission, QueueDamaged, SchemaMissing};
    matches!(error.reason(), DatabaseBroken | DatabasePermission | QueueDamaged | SchemaMissing)
}

/// Shared by all executions.
struct Work {
    args: WorkerArgs,
    absurd: Absurd,
}

async fn carry_out(work: Arc<Work>, task: ClaimedTask, over: watch::Receiver<bool>) {
    let started = std::time::Instant::now();
    let end = match work.absurd.context_of(&task, work.args.claim_timeout.0).await {
        Ok(context) => execute(&work.args, &task, &context, over.clone()).await,
        Err(error) if error.reason() == Reason::InvalidArgument => failure("InvalidHeaders", error.message(), ""),
        Err(error) => {
            note!("{} {}: its checkpoints could not be read: {error}", task.task_name, task.task_id);
            End::Released(READ_AGAIN)
        }
    };
    let took = output::span(started.elapsed());
    let (what, said) = report(&task, end, over).await;
    match said {
        Ok(()) => note!("{} {} {what} after {took}", task.task_name, task.task_id),
        Err(error) => note!("{} {} {what}, but could not be reported: {error}", task.task_name, task.task_id),
    }
}

/// Reports the outcome of an execution. A result whose content the server refuses becomes a failure that names the
/// refusal.
async fn report(task: &ClaimedTask, end: End, over: watch::Receiver<bool>) -> (String, Result<(), Error>) {
    let mut no_retry = false;
    let reason = match end {
        End::Result(result) => match persist(task, &over, || task.complete_json(result.clone())).await {
            Err(error) if is_refused(&error) => {
                json!({"name": "ResultRefused", "message": error.to_string(), "traceback": null})
            }
            said => return ("completed".into(), said),
        },
        End::Failure { reason, no_retry: forbidden } => {
            no_retry = forbidden;
            reason
        }
        End::Revoked(why) => return (format!("stopped: the claim is {why:?}").to_lowercase(), Ok(())),
        End::Over(Signal::Suspended) => return ("suspended".into(), Ok(())),
        End::Over(signal) => return (format!("stopped: {signal}"), Ok(())),
        End::Released(delay) => return ("given back".into(), task.release(delay).await),
    };
    let what = format!("failed: {}", reason["message"].as_str().unwrap_or("failed"));
    let fail = async || match no_retry {
        true => task.fail_for_good(&reason).await.map(drop),
        false => task.fail(&reason).await.map(drop),
    };
    let said = persist(task, &over, fail).await;
    (what, said)
}

/// Repeats a report until the server answers, because an outcome is worth the wait and this worker has no other work
/// without a server. Gives up when the claim is revoked or the worker must end.
async fn persist<F: Future<Output = Result<(), Error>>>(
    task: &ClaimedTask,
    over: &watch::Receiver<bool>,
    call: impl Fn() -> F,
) -> Result<(), Error> {
    let mut over = over.clone();
    let mut told = false;
    loop {
        let error = match call().await {
            Err(error) if may_pass(&error) || is_for_operators(&error) => error,
            said => return said,
        };
        if !told {
            note!("{} {}: its outcome cannot be reported yet: {error}; trying again", task.task_name, task.task_id);
            told = true;
        }
        tokio::select! {
            () = tokio::time::sleep(REPORT_AGAIN) => {}
            _ = task.revoked() => return Err(error),
            _ = over.wait_for(|over| *over) => return Err(error),
        }
    }
}

/// The outcome of an execution.
enum End {
    Result(Json),
    /// `no_retry`: the program's exit code says that another attempt would not help.
    Failure {
        reason: serde_json::Value,
        no_retry: bool,
    },
    Revoked(absurd_client::Revoked),
    Over(Signal),
    /// Given back; offered again after this delay.
    Released(Duration),
}

async fn execute(args: &WorkerArgs, task: &ClaimedTask, context: &Context, mut over: watch::Receiver<bool>) -> End {
    let socket = match Socket::open() {
        Ok(socket) => socket,
        Err(error) => return failure("SpawnError", &format!("cannot open a socket for steps: {error}"), ""),
    };
    let mut child = match start(args, task, &socket) {
        Ok(child) => child,
        Err(error) => return failure("SpawnError", &format!("cannot run {}: {error}", args.command_line()), ""),
    };
    let group = child.id();
    let params = task.params.as_ref().map_or("null", Json::as_str).as_bytes().to_vec();
    let mut serving = std::pin::pin!(socket.serve(context));
    let end = tokio::select! {
        biased;
        // Checked first: output after the run was suspended is no result.
        signal = context.over() => End::Over(signal),
        why = task.revoked() => End::Revoked(why),
        end = talk(&mut child, params, args.no_retry_code) => end,
        _ = over.wait_for(|over| *over) => End::Released(Duration::ZERO),
        () = &mut serving => End::Released(Duration::ZERO),
    };
    // Kills the whole process group before any process in it can see that the socket has no listener.
    kill_group(group);
    let _ = child.wait().await;
    end
}

fn start(args: &WorkerArgs, task: &ClaimedTask, socket: &Socket) -> std::io::Result<Child> {
    args.command()
        .env("ABSURD_TASK_ID", task.task_id.to_string())
        .env("ABSURD_RUN_ID", task.run_id.to_string())
        .env("ABSURD_TASK_NAME", &task.task_name)
        .env("ABSURD_ATTEMPT", task.attempt.to_string())
        .env("ABSURD_QUEUE", args.client.queue())
        .env("ABSURD_URL", &args.client.url)
        .env("ABSURD_HEADERS", task.headers.as_ref().map_or("{}", Json::as_str))
        .envs(args.client.tls_ca.as_ref().map(|path| ("ABSURD_TLS_CA", path)))
        .env(SOCKET, socket.path())
        .env("PATH", path_with_absurd())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
}

/// `PATH` with the directory of this `absurd` at its end, so that programs find it.
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

async fn talk(child: &mut Child, params: Vec<u8>, no_retry_code: Option<i32>) -> End {
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let feed = async move {
        if let Some(mut stdin) = stdin {
            // A program need not read its input, so a failed write is no error.
            let _ = stdin.write_all(&params).await;
        }
    };
    let (mut output, mut errors) = (Captured::default(), Vec::new());
    let talking = async {
        let ((), (), ()) = tokio::join!(feed, output.read(stdout), tail(stderr, &mut errors));
    };
    let status = until_exit(child, talking).await;
    let errors = String::from_utf8_lossy(&errors).replace('\0', "\u{fffd}");
    match status {
        Err(error) => failure("WaitError", &error.to_string(), &errors),
        Ok(status) if !status.success() => {
            let no_retry = no_retry_code.is_some() && status.code() == no_retry_code;
            End::Failure { reason: reason("ExitError", &status.to_string(), &errors), no_retry }
        }
        Ok(_) if output.is_over => {
            failure("OutputError", &format!("more than {OUTPUT_BYTES_MAX} bytes of output"), &errors)
        }
        Ok(_) => End::Result(result(&output.bytes)),
    }
}

/// Waits for the end of a program while its output is read. A background process that holds the output open does not
/// prolong the wait by more than `READ_ON`.
pub(super) async fn until_exit(child: &mut Child, reading: impl Future<Output = ()>) -> std::io::Result<ExitStatus> {
    let mut reading = pin!(reading);
    let mut done = false;
    let status = loop {
        tokio::select! {
            status = child.wait() => break status?,
            () = &mut reading, if !done => done = true,
        }
    };
    if !done {
        let _ = tokio::time::timeout(READ_ON, reading).await;
    }
    Ok(status)
}

/// Converts output to JSON: JSON stays as it is, other text becomes a string, no text becomes null.
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

/// Captured output of a program.
#[derive(Debug, Default)]
pub(super) struct Captured {
    pub(super) bytes: Vec<u8>,
    /// The output exceeded `OUTPUT_BYTES_MAX`. The rest was read and dropped, so that the program could run to its end.
    pub(super) is_over: bool,
}

impl Captured {
    /// Reads to the end of the output. The bytes read so far stay when the future is dropped.
    pub(super) async fn read(&mut self, from: Option<impl AsyncRead + Unpin>) {
        let Some(mut from) = from else { return };
        let mut buffer = vec![0_u8; 16 * 1024];
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            self.is_over |= self.bytes.len() + count > OUTPUT_BYTES_MAX;
            if !self.is_over {
                self.bytes.extend_from_slice(&buffer[..count]);
            }
        }
    }
}

/// Copies standard error to this process's, and keeps its last `ERRORS_BYTES_MAX` bytes.
async fn tail(from: Option<impl AsyncRead + Unpin>, kept: &mut Vec<u8>) {
    let Some(mut from) = from else { return };
    let mut buffer = vec![0_u8; 4096];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let _ = tokio::io::stderr().write_all(&buffer[..count]).await;
        kept.extend_from_slice(&buffer[..count]);
        let surplus = kept.len().saturating_sub(ERRORS_BYTES_MAX);
        kept.drain(..surplus);
    }
}

fn failure(name: &str, message: &str, errors: &str) -> End {
    End::Failure { reason: reason(name, message, errors), no_retry: false }
}

/// The reason of a failure. Its message ends with the last line of standard error, which usually says most.
fn reason(name: &str, message: &str, errors: &str) -> serde_json::Value {
    let last = errors.lines().rev().find(|line| !line.trim().is_empty());
    let message = last.map_or_else(|| message.to_owned(), |last| format!("{message}: {last}"));
    json!({"name": name, "message": message, "traceback": errors})
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
