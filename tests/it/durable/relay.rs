//! Checkpoint compatibility: one task, carried on by workers of the original SDKs and of ours in turn, each of which dies in the
//! middle of a step or leaves while the run sleeps.

use std::time::Duration;

use absurd_client::durable::{Absurd, BoxError, Context, TaskType, WorkerOptions};
use absurd_client::{AbsurdClient, ConnectOptions, Json, Reason, State};
use absurd_tests::{Absurd as Program, PATIENCE, Server, eventually, root, tool};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json as j};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use uuid::Uuid;

const CHILD: TaskType<Value, Value> = TaskType::new("child").on_queue("children");
const LEASE: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Language {
    Rust,
    Python,
    TypeScript,
}

#[derive(Debug, Serialize, Deserialize)]
struct Params {
    child: Uuid,
}

/// The same task as in `tests/sdks/relay.py` and `tests/sdks/node/relay.js`.
async fn relay(ctx: Context, params: Params, hold: u32, say: mpsc::UnboundedSender<u32>) -> Result<Value, BoxError> {
    let leg = async |number: u32| {
        let run = async || {
            say.send(number).unwrap();
            if hold == number {
                std::future::pending::<()>().await;
            }
            Ok::<_, BoxError>(j!({"n": number, "by": "rust"}))
        };
        ctx.step("same", run).await
    };
    let mut legs = vec![leg(1).await?, leg(2).await?];
    let half = ctx.begin_step("half")?;
    let half: Value = ctx.complete_step(half, &j!([null, 1.5, "ü"])).await?.to()?;
    ctx.sleep_for("nap", Duration::from_secs(1)).await?;
    legs.push(leg(3).await?);
    let event: Value = ctx.await_event(&format!("go:{}", ctx.task_id())).await?;
    let child = ctx.await_task_result(&CHILD, params.child).await?;
    legs.push(leg(4).await?);
    Ok(j!({"legs": legs, "half": half, "event": event, "child": child}))
}

/// A worker that is running.
enum Runner {
    /// In a runtime that can be torn down.
    Rust(Runtime, mpsc::UnboundedReceiver<u32>),
    /// A process that can be killed.
    Program(Box<Program>),
}

impl Runner {
    /// Starts one that stays in a step; 0: in none.
    async fn start(language: Language, server: &Server, hold: u32) -> Self {
        let mut command = match language {
            Language::Rust => return Self::rust(server, hold).await,
            Language::Python => {
                let mut command = tool("python", &[]);
                command.arg(root().join("tests/sdks/relay.py"));
                command
            }
            Language::TypeScript => {
                let mut command = tokio::process::Command::new("node");
                command.arg(root().join("tests/sdks/node/relay.js")).kill_on_drop(true);
                command
            }
        };
        let (_, socket) = server.database().url().rsplit_once("host=").unwrap();
        command.env("PGHOST", socket).env("PGUSER", "absurd").env("PGDATABASE", server.database().name());
        command.env("ABSURD_DATABASE_URL", server.database().url()).env("HOLD", hold.to_string());
        let mut program = Program::start(command);
        program.line("ready").await;
        Self::Program(Box::new(program))
    }

    async fn rust(server: &Server, hold: u32) -> Self {
        let runtime = Runtime::new().unwrap();
        let (say, said) = mpsc::unbounded_channel();
        let options = ConnectOptions::new(server.url());
        let started = runtime.spawn(async move {
            let absurd = Absurd::new(AbsurdClient::connect(&options).unwrap().with_queue("q"));
            absurd.register("relay", move |ctx: Context, params: Params| relay(ctx, params, hold, say.clone()));
            let worker = absurd.start_worker(WorkerOptions::default().claim_timeout(LEASE)).await.unwrap();
            // It works until its runtime is torn down.
            std::mem::forget(worker);
        });
        started.await.unwrap();
        Self::Rust(runtime, said)
    }

    /// Waits until it does a step.
    async fn does(&mut self, step: u32) {
        match self {
            Self::Rust(_, said) => while absurd_tests::in_time("the step", said.recv()).await != Some(step) {},
            Self::Program(program) => drop(program.line(&format!("step {step}")).await),
        }
    }

    /// Ends it where it stands.
    async fn kill(self) {
        match self {
            Self::Rust(runtime, _) => runtime.shutdown_background(),
            Self::Program(mut program) => program.child.kill().await.unwrap(),
        }
    }
}

async fn run(first: Language, second: Language) {
    let server = Server::start().await;
    let client = server.client();
    let children = client.with_queue("children");
    children.create_queue().await.unwrap();
    let options = absurd_client::SpawnOptions::default;
    let child = children.spawn_task("child", &j!(null), options()).await.unwrap();
    let claimed = children.claim_task(absurd_client::ClaimOptions::default()).await.unwrap();
    claimed[0].complete(&j!({"answer": 42})).await.unwrap();
    let params = Params { child: child.task_id };
    let spawned = client.spawn_task("relay", &params, options().max_attempts(3)).await.unwrap();
    let sleeping_on = async |what: Option<&str>| {
        eventually("it sleeps", || async {
            let task = client.get_task_status(spawned.task_id).await.unwrap().unwrap();
            let run = client.get_run_status(task.last_attempt_run.unwrap()).await.unwrap().unwrap();
            (run.state == State::Sleeping && run.wake_event.as_deref() == what).then_some(())
        })
        .await;
    };
    // Dies within the second use of a name.
    let mut runner = Runner::start(first, &server, 2).await;
    runner.does(2).await;
    runner.kill().await;
    // Does that again, but not the first one; leaves as the run sleeps.
    let mut runner = Runner::start(second, &server, 0).await;
    runner.does(2).await;
    sleeping_on(None).await;
    runner.kill().await;
    // Finds the sleep over, and waits for an event.
    let mut runner = Runner::start(first, &server, 0).await;
    runner.does(3).await;
    let event = format!("go:{}", spawned.task_id);
    sleeping_on(Some(&event)).await;
    runner.kill().await;
    client.emit_event(&event, &j!({"go": [1, null]})).await.unwrap();
    // Takes the payload and the child's result, and dies in the last step.
    let mut runner = Runner::start(second, &server, 4).await;
    runner.does(4).await;
    runner.kill().await;
    let mut runner = Runner::start(first, &server, 0).await;
    runner.does(4).await;
    let end = client.await_task_result(spawned.task_id, Some(PATIENCE)).await;
    assert!(!matches!(&end, Err(error) if error.reason() == Reason::DeadlineExceeded), "{first:?} {second:?}");
    let end = end.unwrap();
    runner.kill().await;
    let by = |language: Language| match language {
        Language::Rust => "rust",
        Language::Python => "python",
        Language::TypeScript => "typescript",
    };
    let (one, two) = (by(first), by(second));
    let legs = [j!({"n": 1, "by": one}), j!({"n": 2, "by": two}), j!({"n": 3, "by": one}), j!({"n": 4, "by": one})];
    let expected = j!({"legs": legs, "half": [null, 1.5, "ü"], "event": {"go": [1, null]}, "child": {"answer": 42}});
    assert_eq!(end.result.as_ref().map(Json::to::<Value>).transpose().unwrap(), Some(expected), "{:?}", end.failure);
    let run = client.get_task_status(spawned.task_id).await.unwrap().unwrap().last_attempt_run.unwrap();
    let stored = client.get_all_checkpoints(spawned.task_id, run).await.unwrap();
    let names: Vec<&str> = stored.iter().map(|stored| stored.checkpoint_name.as_str()).collect();
    let wait = format!("$awaitEvent:{event}");
    let result = format!("$awaitTaskResult:{}", child.task_id);
    assert_eq!(names, ["same", "same#2", "half", "nap", "same#3", &wait, &result, "same#4"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_goes_from_python_to_rust_and_back() {
    run(Language::Python, Language::Rust).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_goes_from_rust_to_python_and_back() {
    run(Language::Rust, Language::Python).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_goes_from_typescript_to_rust_and_back() {
    run(Language::TypeScript, Language::Rust).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_goes_from_rust_to_typescript_and_back() {
    run(Language::Rust, Language::TypeScript).await;
}
