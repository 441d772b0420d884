//! Where a task stands, for people: `absurd task get` and `absurd task watch`.

use std::time::Duration;

use absurd_client::{AbsurdClient, Json, State};
use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use uuid::Uuid;

use super::ClientArgs;
use super::output::{self, Output, out};

/// Attempts that were begun, and how many there may be.
pub(super) fn attempts(attempts: i32, max_attempts: Option<i32>, started: bool) -> String {
    let begun = if started { attempts } else { attempts.saturating_sub(1) };
    max_attempts.map_or_else(|| format!("{begun}, no limit"), |limit| format!("{begun} of {limit}"))
}

/// Prints a task.
pub(super) async fn get(args: &ClientArgs, client: &AbsurdClient, id: Uuid) -> anyhow::Result<()> {
    let task = client.get_task_status(id).await?;
    let task = task.with_context(|| format!("queue {:?} has no task {id}", client.queue_name()))?;
    match args.output {
        Output::Table => {
            let text = |json: Option<&Json>| json.map(ToString::to_string).unwrap_or_default();
            output::record(&[
                ("task_id", task.task_id.to_string()),
                ("name", task.task_name.clone()),
                ("state", task.state.to_string()),
                ("attempts", attempts(task.attempts, task.max_attempts, task.first_started_at.is_some())),
                ("spawned", output::time(task.enqueue_at)),
                ("started", output::time(task.first_started_at)),
                ("params", task.params.to_string()),
                ("headers", text(task.headers.as_ref())),
                ("result", text(task.completed_payload.as_ref())),
                ("last run", task.last_attempt_run.map(|id| id.to_string()).unwrap_or_default()),
            ]);
        }
        Output::Json => output::json(&json!({
            "task_id": task.task_id, "task_name": task.task_name, "state": task.state.as_str(), "attempts": task.attempts,
            "max_attempts": task.max_attempts, "enqueue_at": output::json_time(task.enqueue_at),
            "first_started_at": output::json_time(task.first_started_at),
            "params": output::value(Some(&task.params)), "headers": output::value(task.headers.as_ref()),
            "completed_payload": output::value(task.completed_payload.as_ref()),
            "last_attempt_run": task.last_attempt_run, "idempotency_key": task.idempotency_key,
        })),
    }
    Ok(())
}

/// Follows a task to its end.
pub(super) async fn watch(
    args: &ClientArgs,
    client: &AbsurdClient,
    task_id: Uuid,
    timeout: Option<Duration>,
) -> anyhow::Result<()> {
    let spinner = ProgressBar::new_spinner().with_style(ProgressStyle::with_template("{spinner} {msg}  {elapsed}")?);
    spinner.enable_steady_tick(Duration::from_millis(100));
    let follow = args.follow(async {
        loop {
            let now = client.get_task_result(task_id).await?;
            spinner.set_message(format!("{task_id} {}", now.state));
            if now.state.is_terminal() || output::is_closed() {
                return Ok(now);
            }
            match client.await_task_result(task_id, Some(Duration::from_secs(1))).await {
                Err(error) if error.reason() == absurd_client::Reason::DeadlineExceeded => {}
                outcome => return Ok(outcome?),
            }
        }
    });
    let end = match timeout {
        Some(timeout) => tokio::time::timeout(timeout, follow)
            .await
            .map_err(|_| anyhow::anyhow!("the task has not ended within {}", humantime::format_duration(timeout)))??,
        None => follow.await?,
    };
    spinner.finish_and_clear();
    let payload = end.result.as_ref().or(end.failure.as_ref());
    match args.output {
        Output::Table => {
            out!("{}", end.state);
            if let Some(payload) = payload {
                out!("{payload}");
            }
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
