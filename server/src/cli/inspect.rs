//! Shows the state and the history of a task: `absurd task get` and `absurd task watch`.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use absurd_client::{
    AbsurdClient, Available, Checkpoint, Error, Json, Reason, Run, State, Task, TaskResult, Wait, WaitsOf,
};
use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use uuid::Uuid;

use super::ClientArgs;
use super::output::{self, Output, note, out};

/// Attempts shown in a table; JSON has all that were read.
const ATTEMPTS_SHOWN: usize = 10;
/// Maximum number of attempts and waits to read.
const READ_MAX: usize = 1000;
/// Characters shown of a step's value.
const VALUE_SHOWN: usize = 100;
/// Characters shown of params, headers and a result in a table.
const PAYLOAD_SHOWN: usize = 2000;

/// The number of begun attempts, with their limit.
pub(super) fn attempts(attempts: i32, max_attempts: Option<i32>, started: bool) -> String {
    let begun = if started { attempts } else { attempts.saturating_sub(1) };
    max_attempts.map_or_else(|| format!("{begun}, no limit"), |limit| format!("{begun} of {limit}"))
}

/// The record of a task with its runs, waits and steps.
struct Known {
    queue: String,
    task: Task,
    runs: Vec<Run>,
    waits: Vec<Wait>,
    steps: Vec<Checkpoint>,
}

impl Known {
    async fn read(client: &AbsurdClient, id: Uuid) -> anyhow::Result<Self> {
        let task = client.get_task_status(id).await?;
        let task = task.with_context(|| format!("queue {:?} has no task {id}", client.queue_name()))?;
        let mut runs = Vec::new();
        let mut token = String::new();
        while runs.len() < READ_MAX {
            let page = client.list_runs(id, 100, &token).await?;
            runs.extend(page.items);
            token = page.next_page_token;
            if token.is_empty() {
                break;
            }
        }
        let waits = client.list_waits(WaitsOf::Task(id), 100, "").await?.items;
        let steps = match task.last_attempt_run {
            Some(run) => client.get_all_checkpoints(id, run).await?,
            None => Vec::new(),
        };
        Ok(Self { queue: client.queue_name().to_owned(), task, runs, waits, steps })
    }

    fn print(&self) {
        let task = &self.task;
        let begun =
            self.runs.iter().any(|run| run.run_id == task.last_attempt_run.unwrap_or_default() && has_begun(run));
        let payload = |json: Option<&Json>| json.map(|json| cut(json.as_str(), PAYLOAD_SHOWN)).unwrap_or_default();
        let fields = [
            ("task_id", task.task_id.to_string()),
            ("name", task.task_name.clone()),
            ("queue", self.queue.clone()),
            ("state", task.state.to_string()),
            ("attempts", attempts(task.attempts, task.max_attempts, begun)),
            ("next", self.runs.last().map(next).unwrap_or_default()),
            ("spawned", output::time(task.enqueue_at)),
            ("started", output::time(task.first_started_at)),
            ("cancelled", output::time(task.cancelled_at)),
            ("key", task.idempotency_key.clone().unwrap_or_default()),
            ("retry", payload(task.retry_strategy.as_ref())),
            ("cancellation", payload(task.cancellation.as_ref())),
            ("headers", payload(task.headers.as_ref())),
            ("params", payload(Some(&task.params))),
            ("result", payload(task.completed_payload.as_ref())),
        ];
        output::record(&fields.into_iter().filter(|(_, value)| !value.is_empty()).collect::<Vec<_>>());
        self.print_attempts();
        if !self.steps.is_empty() {
            out!("\nSteps");
            let rows = self.steps.iter().map(|step| {
                let value = step.state.as_ref().map_or("null", Json::as_str);
                vec![format!("  {}", step.checkpoint_name), cut(value, VALUE_SHOWN)]
            });
            output::rows(&rows.collect::<Vec<_>>());
        }
        if !self.waits.is_empty() {
            out!("\nWaits");
            for wait in &self.waits {
                let until = wait.timeout_at.map_or_else(|| "for ever".into(), |at| format!("until {}", moment(at)));
                out!("  for event {:?} as step {:?}, {until}", wait.event_name, wait.step_name);
            }
        }
    }

    fn print_attempts(&self) {
        let skipped = self.runs.len().saturating_sub(ATTEMPTS_SHOWN);
        let shown: Vec<&Run> = self.runs.iter().skip(skipped).filter(|run| has_begun(run)).collect();
        if shown.is_empty() {
            return;
        }
        out!("\nAttempts{}", if skipped > 0 { format!(" (the first {skipped} left out)") } else { String::new() });
        for run in shown {
            out!("  {}", attempt(run));
            run.failure_reason.iter().flat_map(failure).for_each(|line| out!("     {line}"));
        }
    }

    fn json(&self) -> Value {
        let task = &self.task;
        json!({
            "task_id": task.task_id, "task_name": task.task_name, "queue": self.queue, "state": task.state.as_str(),
            "attempts": task.attempts, "max_attempts": task.max_attempts,
            "enqueue_at": output::json_time(task.enqueue_at),
            "first_started_at": output::json_time(task.first_started_at),
            "cancelled_at": output::json_time(task.cancelled_at),
            "params": output::value(Some(&task.params)), "headers": output::value(task.headers.as_ref()),
            "retry_strategy": output::value(task.retry_strategy.as_ref()),
            "cancellation": output::value(task.cancellation.as_ref()),
            "completed_payload": output::value(task.completed_payload.as_ref()),
            "last_attempt_run": task.last_attempt_run, "idempotency_key": task.idempotency_key,
            "runs": self.runs.iter().map(run_json).collect::<Vec<_>>(),
            "steps": self.steps.iter().map(|step| json!({
                "name": step.checkpoint_name, "value": output::value(step.state.as_ref()), "status": step.status,
                "run_id": step.owner_run_id, "updated_at": output::json_time(step.updated_at),
            })).collect::<Vec<_>>(),
            "waits": self.waits.iter().map(|wait| json!({
                "run_id": wait.run_id, "step": wait.step_name, "event": wait.event_name,
                "timeout_at": output::json_time(wait.timeout_at), "since": output::json_time(wait.created_at),
            })).collect::<Vec<_>>(),
        })
    }
}

fn run_json(run: &Run) -> Value {
    let available = match run.available_at {
        Available::At(at) => output::json_time(Some(at)),
        Available::Never => Value::Null,
    };
    json!({
        "run_id": run.run_id, "attempt": run.attempt, "state": run.state.as_str(), "worker": run.claimed_by,
        "available_at": available, "claim_expires_at": output::json_time(run.claim_expires_at),
        "created_at": output::json_time(run.created_at), "started_at": output::json_time(run.started_at),
        "completed_at": output::json_time(run.completed_at), "failed_at": output::json_time(run.failed_at),
        "wake_event": run.wake_event, "result": output::value(run.result.as_ref()),
        "failure_reason": output::value(run.failure_reason.as_ref()), "payloads_omitted": run.payloads_omitted,
    })
}

/// Whether a worker has had the run.
fn has_begun(run: &Run) -> bool {
    run.started_at.is_some() || run.failure_reason.is_some()
}

/// A run as one line: attempt, state, worker, times.
fn attempt(run: &Run) -> String {
    let mut line = format!("{}  {}", run.attempt, run.state);
    if let Some(worker) = &run.claimed_by {
        line += &format!("  on {worker}");
    }
    if let Some(started) = run.started_at {
        line += &format!("  from {}", output::time(Some(started)));
        let end = run.completed_at.or(run.failed_at).or((run.state == State::Running).then(SystemTime::now));
        if let Some(took) = end.and_then(|end| end.duration_since(started).ok()) {
            line += &format!("  {} {}", if run.state == State::Running { "for" } else { "took" }, output::span(took));
        }
    }
    line
}

/// The next change of a run as a line; empty once the run has ended.
fn next(run: &Run) -> String {
    let at = match run.available_at {
        Available::At(at) => Some(at).filter(|at| *at > SystemTime::now()),
        Available::Never => None,
    };
    let number = run.attempt;
    match (run.state, at, &run.wake_event) {
        (State::Running, ..) => format!("attempt {number} is running"),
        (State::Sleeping, None, Some(event)) => format!("attempt {number} goes on with event {event:?}"),
        (State::Sleeping, Some(at), Some(event)) => {
            format!("attempt {number} goes on with event {event:?}, at the latest {}", moment(at))
        }
        (State::Pending | State::Sleeping, Some(at), _) if has_begun(run) => {
            format!("attempt {number} goes on {}", moment(at))
        }
        (State::Pending | State::Sleeping, Some(at), _) => format!("attempt {number} starts {}", moment(at)),
        (State::Pending | State::Sleeping, None, _) => format!("attempt {number} waits for a worker"),
        (State::Completed | State::Failed | State::Cancelled, ..) => String::new(),
    }
}

/// The newest attempt as one line: the reason of its failure, and the time of the next attempt.
pub(super) async fn news(client: &AbsurdClient, id: Uuid) -> Option<String> {
    let page = client.list_runs(id, 1000, "").await.ok().filter(|page| page.next_page_token.is_empty())?;
    let newest = page.items.last()?;
    let failed = page.items.iter().rev().take(2).find(|run| run.state == State::Failed);
    let failed = failed.filter(|run| run.run_id == newest.run_id || !has_begun(newest)).map(|run| {
        let reason = run.failure_reason.as_ref().and_then(|reason| failure(reason).into_iter().next());
        format!("attempt {} failed: {}", run.attempt, reason.unwrap_or_default())
    });
    let parts: Vec<String> = failed.into_iter().chain(Some(next(newest))).filter(|part| !part.is_empty()).collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}

/// A future time: the span until then, and the time itself.
fn moment(at: SystemTime) -> String {
    let left = at.duration_since(SystemTime::now()).unwrap_or_default();
    format!("in {} ({})", output::span(left), output::time(Some(at)))
}

/// The lines of a failure's reason: name and message, then the traceback, then its other fields.
pub(super) fn failure(reason: &Json) -> Vec<String> {
    let Ok(Value::Object(mut fields)) = reason.to() else { return vec![cut(reason.as_str(), PAYLOAD_SHOWN)] };
    let mut text = |name: &str| match fields.remove(name) {
        Some(Value::String(text)) => text,
        Some(Value::Null) | None => String::new(),
        Some(other) => other.to_string(),
    };
    let (name, message, traceback) = (text("name"), text("message"), text("traceback"));
    let mut lines = Vec::new();
    let head = [name, message].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(": ");
    lines.extend(head.lines().map(printable));
    lines.extend(traceback.lines().map(|line| format!("  {}", printable(line))));
    lines.extend(fields.iter().map(|(name, value)| format!("  {name}: {}", cut(&value.to_string(), VALUE_SHOWN))));
    lines
}

/// Replaces control characters, because a worker's text must not control the terminal.
fn printable(text: &str) -> String {
    text.chars()
        .map(|character| if character.is_control() && character != '\t' { '\u{fffd}' } else { character })
        .collect()
}

/// The first `most` characters of a text, with its size if it is longer.
fn cut(text: &str, most: usize) -> String {
    let kept: String = text.chars().take(most).collect();
    if kept.len() == text.len() { printable(text) } else { format!("{}... ({} bytes)", printable(&kept), text.len()) }
}

/// `absurd task get`: prints a task.
pub(super) async fn get(args: &ClientArgs, client: &AbsurdClient, id: Uuid) -> anyhow::Result<()> {
    let known = Known::read(client, id).await?;
    match args.output {
        Output::Table => known.print(),
        Output::Json => output::json(&known.json()),
    }
    Ok(())
}

/// Prints each change of a task's runs once.
#[derive(Default)]
struct Follower {
    /// Page token of the page with the newest run.
    token: String,
    told: HashMap<Uuid, String>,
}

impl Follower {
    /// Prints the changes since the last call. The caller prints the end of the task.
    async fn look(&mut self, client: &AbsurdClient, now: &TaskResult, spinner: &ProgressBar) -> Result<(), Error> {
        let mut page = client.list_runs(now.task_id, 100, &self.token).await?;
        let mut runs = page.items;
        while !page.next_page_token.is_empty() {
            self.token = page.next_page_token;
            page = client.list_runs(now.task_id, 100, &self.token).await?;
            runs.append(&mut page.items);
        }
        let newest = runs.last().map(|run| run.run_id);
        for run in runs {
            if now.state.is_terminal() && Some(run.run_id) == newest {
                break;
            }
            // Keys hold fields, not the printed line, whose relative times change with each look. An extended lease is
            // no change.
            let key = format!("{} {:?} {:?} {:?}", run.state, run.started_at, run.wake_event, run.available_at);
            let key = if run.state == State::Running { format!("{} {:?}", run.state, run.started_at) } else { key };
            if self.told.insert(run.run_id, key.clone()).as_ref() == Some(&key) {
                continue;
            }
            spinner.suspend(|| match run.state {
                State::Failed => {
                    note!("attempt {}", attempt(&run));
                    run.failure_reason.iter().flat_map(failure).for_each(|line| note!("   {line}"));
                }
                State::Running => note!("attempt {}", attempt(&run)),
                _ => note!("{}", next(&run)),
            });
        }
        Ok(())
    }
}

fn is_away(error: &Error) -> bool {
    error.is_passing() || error.reason() == Reason::DeadlineExceeded
}

/// `absurd task watch`: follows a task to its end. Fails if the task does not complete.
pub(super) async fn watch(
    args: &ClientArgs,
    client: &AbsurdClient,
    task_id: Uuid,
    timeout: Option<Duration>,
) -> anyhow::Result<()> {
    let spinner = ProgressBar::new_spinner().with_style(ProgressStyle::with_template("{spinner} {msg}  {elapsed}")?);
    spinner.enable_steady_tick(Duration::from_millis(100));
    let mut follower = Follower::default();
    let follow = args.follow(async {
        loop {
            let seen = async {
                let now = client.get_task_result(task_id).await?;
                spinner.set_message(format!("{task_id} {}", now.state));
                follower.look(client, &now, &spinner).await?;
                Ok(now)
            };
            let now = match seen.await {
                // `ClientArgs::follow` waits for an unreachable server.
                Err(error) if is_away(&error) => {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    continue;
                }
                outcome => outcome?,
            };
            if now.state.is_terminal() || output::is_closed() {
                return Ok(now);
            }
            // Returns at the end of the task, or after a second. The next round reads the state.
            let _ = client.await_task_result(task_id, Some(Duration::from_secs(1))).await;
        }
    });
    let end = match timeout {
        Some(timeout) => tokio::time::timeout(timeout, follow).await.map_err(|_| {
            let timeout = humantime::format_duration(timeout);
            anyhow::anyhow!("the task has not ended within {timeout}; follow it with: absurd task watch {task_id}")
        })??,
        None => follow.await?,
    };
    spinner.finish_and_clear();
    match args.output {
        Output::Table => {
            out!("{}", end.state);
            end.result.iter().for_each(|result| out!("{result}"));
            end.failure.iter().flat_map(failure).for_each(|line| out!("{line}"));
        }
        Output::Json => {
            output::json(&json!({
                "task_id": task_id, "state": end.state.as_str(), "result": output::value(end.result.as_ref()),
                "failure": output::value(end.failure.as_ref()),
            }));
        }
    }
    anyhow::ensure!(end.state == State::Completed, "the task is {}", end.state);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_readable() {
        let reason = json!({
            "name": "ValueError", "message": "no\nmoney \u{1b}[31m", "traceback": "Traceback:\n  File \"a.py\"", "code": 7,
        });
        let lines = failure(&reason.into());
        let expected = ["ValueError: no", "money \u{fffd}[31m", "  Traceback:", "    File \"a.py\"", "  code: 7"];
        assert_eq!(lines, expected);
        assert_eq!(failure(&Json::from_text("\"plain\"")), ["\"plain\""]);
        assert_eq!(failure(&json!({"message": "only"}).into()), ["only"]);
    }

    #[test]
    fn a_long_value_is_cut() {
        assert_eq!(cut("\u{e9}\u{e9}\u{e9}", 3), "\u{e9}\u{e9}\u{e9}");
        assert_eq!(cut("\u{e9}\u{e9}\u{e9}", 2), "\u{e9}\u{e9}... (6 bytes)");
    }

    #[test]
    fn a_task_that_never_ran_has_no_attempts() {
        assert_eq!(attempts(1, Some(5), false), "0 of 5");
        assert_eq!(attempts(2, Some(5), true), "2 of 5");
        assert_eq!(attempts(3, None, true), "3, no limit");
    }
}
