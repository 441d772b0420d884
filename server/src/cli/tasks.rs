//! `absurd task`: commands on a task by its id, and the list of tasks.

use absurd_client::{
    AbsurdClient, CancelOutcome, FindOptions, FoundTasks, ListOptions, Reason, RetryOptions, State, TaskMatch,
};
use clap::{Args, Subcommand};
use serde_json::json;
use uuid::Uuid;

use super::output::{self, Output, note, out};
use super::{ClientArgs, inspect, spawn};
use crate::settings::Span;

/// `absurd task ...`
#[derive(Debug, Subcommand)]
pub(super) enum TaskCommand {
    /// Spawn a task, or many
    #[command(after_help = spawn::EXAMPLES)]
    Spawn(Box<spawn::SpawnArgs>),
    /// Read a task: attempts, failures, steps, waits, the next try
    #[command(
        alias = "show",
        after_help = "Examples:\n  absurd task get 01a2296c-7d2f-7b0a-9c7e-2f6a51c5d1aa\n  \
            absurd task get 51c5d1aa            six or more characters of the end of an id are enough, or of its beginning\n  \
            absurd task get 51c5d1aa -o json\n\nAn id begins with the time of its task, so that its end is unique sooner."
    )]
    Get(OneTask),
    /// List tasks, newest first
    #[command(
        alias = "ls",
        after_help = "Examples:\n  absurd task list --state failed --limit 20\n  absurd task list --name greet -o json"
    )]
    List(ListArgs),
    /// Cancel a task that has not ended
    #[command(after_help = "Example:\n  absurd task cancel 51c5d1aa")]
    Cancel(OneTask),
    /// Give a failed task another attempt
    #[command(
        after_help = "Examples:\n  absurd task retry 51c5d1aa\n  absurd task retry 51c5d1aa --max-attempts 10\n  \
        absurd task retry 51c5d1aa --spawn-new"
    )]
    Retry(RetryArgs),
    /// Follow a task to its end; the exit code says whether it completed
    #[command(after_help = "Examples:\n  absurd task watch 51c5d1aa\n  absurd task watch 51c5d1aa --timeout 5m")]
    Watch(WatchArgs),
}

/// A task of a queue.
#[derive(Debug, Args)]
pub(super) struct OneTask {
    /// Id of the task, or six or more characters of its beginning or its end
    #[arg(value_name = "TASK")]
    task: String,
    #[command(flatten)]
    client: ClientArgs,
}

/// Flags of `task list`.
#[derive(Debug, Args)]
pub(super) struct ListArgs {
    /// Only tasks in this state
    #[arg(long, value_parser = ["pending", "running", "sleeping", "completed", "failed", "cancelled"])]
    state: Option<String>,
    /// Only tasks of this name
    #[arg(long)]
    name: Option<String>,
    /// At most this many
    #[arg(long, default_value_t = 50)]
    limit: usize,
    #[command(flatten)]
    client: ClientArgs,
}

/// Flags of `task retry`.
#[derive(Debug, Args)]
pub(super) struct RetryArgs {
    /// Spawn a copy instead
    #[arg(long)]
    spawn_new: bool,
    /// New limit of attempts; one more than now when absent
    #[arg(long, value_parser = clap::value_parser!(i32).range(1..), value_name = "N")]
    max_attempts: Option<i32>,
    #[command(flatten)]
    task: OneTask,
}

/// Flags of `task watch`.
#[derive(Debug, Args)]
pub(super) struct WatchArgs {
    /// Give up after this long; for ever when absent
    #[arg(long, value_name = "SPAN")]
    timeout: Option<Span>,
    #[command(flatten)]
    task: OneTask,
}

/// Runs a task command.
pub(super) async fn run(command: TaskCommand) -> anyhow::Result<()> {
    match command {
        TaskCommand::Spawn(args) => Box::pin(spawn::run(*args)).await,
        TaskCommand::Get(task) => {
            let args = &task.client;
            args.reach(async {
                let (client, id) = find_to_read(args, &task.task).await?;
                inspect::get(args, &client, id).await
            })
            .await
        }
        TaskCommand::List(args) => args.client.reach(list(&args)).await,
        TaskCommand::Cancel(task) => task.client.reach(cancel(&task)).await,
        TaskCommand::Retry(args) => args.task.client.reach(retry(&args)).await,
        TaskCommand::Watch(WatchArgs { timeout, task }) => {
            let (client, id) = task.client.reach(find_to_read(&task.client, &task.task)).await?;
            inspect::watch(&task.client, &client, id, timeout.map(|span| span.0)).await
        }
    }
}

/// Shortest part of an id that a command accepts, in digits.
const PART_MIN: usize = 6;
/// Maximum number of candidates in an error.
const CANDIDATES: i32 = 20;

/// Digits of a whole id.
const ID_DIGITS: usize = 32;

/// The task that a command reads; see [`find`].
async fn find_to_read(args: &ClientArgs, text: &str) -> anyhow::Result<(AbsurdClient, Uuid)> {
    find(args, text).await.map(|(client, id, _)| (client, id))
}

/// The task that a command changes. Fails if not all tasks were searched, because the match may not be the intended
/// task.
async fn find_to_change(args: &ClientArgs, text: &str) -> anyhow::Result<(AbsurdClient, Uuid)> {
    let (client, id, sure) = find(args, text).await?;
    anyhow::ensure!(
        sure,
        "not all tasks could be searched for {text}, and this changes one; if you mean it, write {id}"
    );
    Ok((client, id))
}

/// The task that a text names, a client of its queue, and whether the match is certain. Searches the queue of the
/// command first, then all queues.
async fn find(args: &ClientArgs, text: &str) -> anyhow::Result<(AbsurdClient, Uuid, bool)> {
    let digits = text.chars().filter(|character| *character != '-').count();
    anyhow::ensure!(
        text.chars().all(|character| character.is_ascii_hexdigit() || character == '-'),
        "{text:?} is no id of a task: ids have hexadecimal digits and dashes; `absurd task list` shows them"
    );
    anyhow::ensure!(
        digits >= PART_MIN,
        "{text:?} is too short: the first or last {PART_MIN} characters of a task's id are needed, or more"
    );
    let client = args.client()?;
    let queue = client.queue_name().to_owned();
    let search = async |queue| client.find_tasks(text, FindOptions { queue, limit: CANDIDATES }).await;
    let mut found = match search(Some(queue.clone())).await {
        Err(error) if error.reason() == Reason::QueueNotFound && args.queue.is_none() => None,
        outcome => Some(outcome?).filter(|found| !found.tasks.is_empty()),
    };
    if found.is_none() {
        found = Some(search(None).await?);
    }
    let found = found.unwrap_or(FoundTasks { tasks: Vec::new(), complete: true });
    match found.tasks.as_slice() {
        [] if found.complete => anyhow::bail!("no queue has a task {text}"),
        [] => anyhow::bail!("no task {text} was found; an older one needs the beginning of its id"),
        [task] => {
            let elsewhere = format!("task {} is in queue {:?}", task.task_id, task.queue);
            if task.queue != queue {
                anyhow::ensure!(args.queue.is_none(), "{elsewhere}, not in {queue:?}");
                note!("{elsewhere}");
            }
            Ok((client.with_queue(task.queue.as_str()), task.task_id, found.complete || digits == ID_DIGITS))
        }
        tasks => anyhow::bail!("{}", candidates(text, tasks, found.complete)),
    }
}

fn candidates(text: &str, tasks: &[TaskMatch], complete: bool) -> String {
    let more = if complete { "" } else { " or more" };
    let mut message = format!("{text} names {}{more} tasks; write more of the id:", tasks.len());
    for task in tasks {
        message += &format!("\n  {}  {}  {}  queue {}", task.task_id, task.task_name, task.state, task.queue);
    }
    message
}

async fn cancel(task: &OneTask) -> anyhow::Result<()> {
    let (client, id) = find_to_change(&task.client, &task.task).await?;
    let CancelOutcome { cancelled, state } = client.cancel_task_by_id(id).await?;
    match task.client.output {
        Output::Table if cancelled => out!("cancelled"),
        Output::Table => out!("not cancelled: the task is {state}"),
        Output::Json => output::json(&json!({"task_id": id, "cancelled": cancelled, "state": state.as_str()})),
    }
    Ok(())
}

async fn retry(args: &RetryArgs) -> anyhow::Result<()> {
    let (client, id) = find_to_change(&args.task.client, &args.task.task).await?;
    let options = RetryOptions { spawn_new: args.spawn_new, max_attempts: args.max_attempts };
    let spawned = client.retry_task(id, options).await?;
    spawn::print_spawned(args.task.client.output, &spawned);
    Ok(())
}

fn parse_state(name: &str) -> Option<State> {
    [State::Pending, State::Running, State::Sleeping, State::Completed, State::Failed, State::Cancelled]
        .into_iter()
        .find(|state| state.as_str() == name)
}

async fn list(args: &ListArgs) -> anyhow::Result<()> {
    let client = args.client.client()?;
    let mut tasks = Vec::new();
    let mut page_token = String::new();
    while tasks.len() < args.limit {
        let page_size = i32::try_from((args.limit - tasks.len()).min(1000))?;
        let options = ListOptions {
            state: args.state.as_deref().and_then(parse_state),
            task_name: args.name.clone(),
            page_size,
            page_token,
        };
        let page = client.list_tasks(options).await?;
        tasks.extend(page.items);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    match args.client.output {
        Output::Table => {
            let rows: Vec<Vec<String>> = tasks
                .iter()
                .map(|task| {
                    vec![
                        task.task_id.to_string(),
                        task.task_name.clone(),
                        task.state.to_string(),
                        inspect::attempts(task.attempts, task.max_attempts, task.first_started_at.is_some()),
                        output::time(task.enqueue_at),
                    ]
                })
                .collect();
            output::table(&["TASK", "NAME", "STATE", "ATTEMPTS", "SPAWNED"], &rows);
        }
        Output::Json => output::json(
            &tasks
                .iter()
                .map(|task| {
                    json!({
                        "task_id": task.task_id, "task_name": task.task_name, "state": task.state.as_str(),
                        "attempts": task.attempts, "max_attempts": task.max_attempts,
                        "enqueue_at": output::json_time(task.enqueue_at),
                        "first_started_at": output::json_time(task.first_started_at),
                    })
                })
                .collect(),
        ),
    }
    Ok(())
}
