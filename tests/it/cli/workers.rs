//! `absurd worker` and its like beside unusual programs, servers and people.

use std::time::{Duration, Instant};

use absurd_client::{AbsurdClient, RetryStrategy, SpawnOptions, State};
use absurd_server::settings::Settings;
use absurd_tests::{Absurd, Database, PATIENCE, Place, Server, ServerOptions, absurd, eventually};
use serde_json::{Value, json as j};
use uuid::Uuid;

use super::{busy_worker, run, until_gone};

fn worker(url: &str, flags: &[&str]) -> Absurd {
    let mut command = absurd(&[&["worker"], flags].concat());
    command.env("ABSURD_URL", url).env("ABSURD_DEFAULT_QUEUE", "q");
    Absurd::start(command)
}

async fn failure(client: &AbsurdClient, task_id: Uuid) -> Value {
    let end = client.await_task_result(task_id, Some(PATIENCE)).await.unwrap();
    assert_eq!(end.state, State::Failed);
    end.failure.unwrap().to().unwrap()
}

/// A result that the server refuses for its content fails its attempt, once, and says which refusal it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_result_fails_its_attempt() {
    let server = Server::start().await;
    let client = server.client();
    let home = tempfile::tempdir().unwrap();
    let ran = home.path().join("ran");
    let program = format!(
        "echo $ABSURD_TASK_NAME >>{}; case $ABSURD_TASK_NAME in nul) printf 'a\\000b';; large) yes | head -c 2000000;; \
         surrogate) echo '\"\\ud800\"';; deep) yes '[' | head -n 200 | tr -d '\\n'; yes ']' | head -n 200 | tr -d '\\n';; esac",
        ran.display()
    );
    let mut worker = worker(&server.url(), &["--exec", &program]);
    for (name, reason) in [
        ("nul", "JSON_INVALID"),
        ("surrogate", "JSON_INVALID"),
        ("deep", "JSON_INVALID"),
        ("large", "PAYLOAD_TOO_LARGE"),
    ] {
        let options = SpawnOptions::default().max_attempts(2).retry(RetryStrategy::Immediate);
        let spawned = client.spawn_task(name, &(), options).await.unwrap();
        let failure = failure(&client, spawned.task_id).await;
        assert_eq!(failure["name"], "ResultRefused", "{failure}");
        assert!(failure["message"].as_str().unwrap().contains(reason), "{failure}");
        let ran = std::fs::read_to_string(&ran).unwrap();
        assert_eq!(ran.lines().filter(|line| *line == name).count(), 2, "once per attempt");
    }
    worker.line("failed: result").await;
    worker.signal("TERM");
    assert_eq!(worker.exit_code().await, Some(0));
}

/// A program says by its exit code that another attempt would not help.
#[tokio::test(flavor = "multi_thread")]
async fn one_exit_code_fails_the_task_at_once() {
    let server = Server::start().await;
    let client = server.client();
    let worker = worker(&server.url(), &["--no-retry-code", "65", "--exec", "echo hopeless >&2; exit $(cat)"]);
    for (code, attempts) in [(65, 1), (64, 2)] {
        let options = SpawnOptions::default().max_attempts(2).retry(RetryStrategy::Immediate);
        let spawned = client.spawn_task("t", &code, options).await.unwrap();
        let failure = failure(&client, spawned.task_id).await;
        assert_eq!(failure["message"], format!("exit status: {code}: hopeless"));
        assert_eq!(client.get_task_status(spawned.task_id).await.unwrap().unwrap().attempts, attempts);
    }
    drop(worker);
}

/// A process that inherits a program's output holds neither its task nor its step nor its failure; it is killed with the program.
#[tokio::test(flavor = "multi_thread")]
async fn a_task_ends_with_its_program() {
    let server = Server::start().await;
    let client = server.client();
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("pid");
    let program = format!(
        "case $ABSURD_TASK_NAME in step) absurd step s -- sh -c 'sleep 1000 & echo 7';; errors) sleep 1000 2>&1 >/dev/null & \
         exit 3;; input) sleep 1000 & cat;; *) sleep 1000 & echo $! >{}; echo 7;; esac",
        file.display()
    );
    let worker = worker(&server.url(), &["--exec", &program]);
    let params = j!("x".repeat(300_000));
    for (name, state) in [
        ("plain", State::Completed),
        ("step", State::Completed),
        ("errors", State::Failed),
        ("input", State::Completed),
    ] {
        let began = Instant::now();
        let spawned = client.spawn_task(name, &params, SpawnOptions::default()).await.unwrap();
        let end = client.await_task_result(spawned.task_id, Some(PATIENCE)).await.unwrap();
        assert_eq!(end.state, state, "{name}");
        assert!(began.elapsed() < Duration::from_secs(30), "{name}");
        if name == "plain" || name == "step" {
            assert_eq!(end.result.unwrap().as_str(), "7", "what was printed is read");
        }
    }
    until_gone(std::fs::read_to_string(&file).unwrap().trim().parse().unwrap()).await;
    worker.signal("TERM");
    assert_eq!(worker.exit_code().await, Some(0));
}

/// A worker says when there is no server, begins when there is one, says when it is lost, and reports the outcome of the
/// meantime later.
#[tokio::test(flavor = "multi_thread")]
async fn an_outage_is_told_and_waited_out() {
    let database = Database::new().await;
    let place = Place::reserve();
    let serve = || {
        let settings = Settings { listen: Some(place.addr), ..Settings::default() };
        Server::start_with(database.clone(), ServerOptions { settings, ..ServerOptions::default() })
    };
    let home = tempfile::tempdir().unwrap();
    let go = home.path().join("go");
    let program = format!("while [ ! -e {} ]; do sleep 0.05; done; echo 7", go.display());
    let mut worker = worker(&place.addr.to_string(), &["--exec", &program]);
    let told = worker.line("no server answers").await;
    assert!(told.contains(&format!("http://{}: connection refused; trying again", place.addr)), "{told}");
    let server = serve().await;
    worker.line("takes tasks").await;
    let spawned = server.client().spawn_task("t", &(), SpawnOptions::default()).await.unwrap();
    let client = server.client();
    eventually("the program runs", || async {
        let task = client.get_task_status(spawned.task_id).await.unwrap().unwrap();
        (task.state == State::Running).then_some(())
    })
    .await;
    server.stop().await;
    // The cause may be a server that still says goodbye, or one that is gone.
    let told = worker.line("; trying again").await;
    assert!(told.contains(&place.addr.to_string()), "{told}");
    std::fs::write(&go, "").unwrap();
    worker.line("cannot be reported yet").await;
    let server = serve().await;
    worker.line("answers again").await;
    let end = server.client().await_task_result(spawned.task_id, Some(PATIENCE)).await.unwrap();
    assert_eq!((end.state, end.result.unwrap().as_str()), (State::Completed, "7"));
    worker.signal("TERM");
    assert_eq!(worker.exit_code().await, Some(0));
}

/// The first signal lets the program finish and says so; the second one gives the task back at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_stops_a_worker_at_once() {
    let server = Server::start().await;
    let home = tempfile::tempdir().unwrap();
    let (mut worker, task, pid) = busy_worker(&server, &home.path().join("pid"), &["--drain", "1h"]).await;
    worker.signal("INT");
    let told = worker.line("finishing").await;
    assert!(told.contains("finishing 1 task; press Ctrl-C again"), "{told}");
    worker.signal("INT");
    worker.line("stopping now").await;
    assert_eq!(worker.exit_code().await, Some(0));
    until_gone(pid).await;
    let status = server.client().get_task_status(task.parse().unwrap()).await.unwrap().unwrap();
    assert_eq!((status.state, status.attempts), (State::Pending, 1), "{status:?}");
}

/// With --max-tasks nobody has asked to stop: the last program takes as long as it takes.
#[tokio::test(flavor = "multi_thread")]
async fn the_last_of_some_tasks_is_not_hurried() {
    let server = Server::start().await;
    let client = server.client();
    let spawned = client.spawn_task("t", &(), SpawnOptions::default()).await.unwrap();
    let flags = ["--exec", "sleep 1; echo 7", "--max-tasks", "1", "--drain", "10ms"];
    let worker = worker(&server.url(), &flags);
    assert_eq!(worker.exit_code().await, Some(0));
    let end = client.get_task_result(spawned.task_id).await.unwrap();
    assert_eq!(end.state, State::Completed);
}

/// Many tasks for a bounded queue: as many as fit, a word about it, the others as room comes.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_is_told_and_waited_for() {
    let settings = Settings { max_backlog: Some(5), ..Settings::default() };
    let server =
        Server::start_with(Database::new().await, ServerOptions { settings, ..ServerOptions::default() }).await;
    let mut command = absurd(&["task", "spawn", "t", "--count", "7"]);
    command.env("ABSURD_URL", server.url()).env("ABSURD_DEFAULT_QUEUE", "q");
    let mut spawning = Absurd::start(command);
    spawning.line("queue \"q\" is full").await;
    let worker = worker(&server.url(), &["cat", "--max-tasks", "7"]);
    spawning.line("7 tasks in").await;
    assert_eq!(spawning.exit_code().await, Some(0));
    assert_eq!(worker.exit_code().await, Some(0));
    assert_eq!(server.client().get_queue_stats().await.unwrap().completed, 7, "none is spawned twice");
}

/// `task watch` tells each attempt, `task get` everything that is known: failures with their traces, steps, waits, what is next.
#[tokio::test(flavor = "multi_thread")]
async fn what_became_of_a_task_can_be_seen() {
    let server = Server::start().await;
    let (url, client) = (server.url(), server.client());
    let program = "absurd step paid -- echo '{\"id\": 1}' >/dev/null; test $ABSURD_TASK_NAME = waits && \
        absurd await-event paid:7 --timeout 1h; printf 'Traceback:\\n  line 1\\nbroken\\n' >&2; exit 3";
    let worker = worker(&url, &["--exec", program, "--worker-id", "w1"]);
    let flags = ["--max-attempts", "2", "--retry", "fixed:100ms", "--wait", "60s"];
    let (ok, out, error) = run(&[&["task", "spawn", "fails"], &flags[..]].concat(), &url).await;
    assert!(!ok && out.starts_with("failed\nExitError: exit status: 3: broken\n  Traceback:\n    line 1\n"), "{out}");
    assert!(
        error.starts_with("task 0") && error.contains("attempt 1  failed  on w1") && error.contains("    line 1\n"),
        "{error}"
    );
    let id = error.lines().next().unwrap().strip_prefix("task ").unwrap().to_owned();
    let (_, out, _) = run(&["task", "get", &id], &url).await;
    for part in [
        "2 of 2",
        "  1  failed  on w1",
        "  2  failed  on w1",
        "     ExitError: exit status: 3",
        "       Traceback:\n",
        "Steps\n  paid  {\"id\": 1}",
    ] {
        assert!(out.contains(part), "{part}: {out}");
    }
    let (_, out, _) = run(&["task", "get", &id, "-o", "json"], &url).await;
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (&json["runs"][1]["failure_reason"]["name"], &json["steps"][0]["value"]),
        (&j!("ExitError"), &j!({"id": 1}))
    );
    assert_eq!((&json["completed_payload"], &json["runs"][0]["completed_at"]), (&Value::Null, &Value::Null));

    let spawned = client.spawn_task("waits", &(), SpawnOptions::default()).await.unwrap();
    eventually("it waits", || async {
        let run = client.get_run_status(spawned.run_id).await.unwrap().unwrap();
        run.wake_event.map(drop)
    })
    .await;
    let (_, out, _) = run(&["task", "get", &spawned.task_id.to_string()], &url).await;
    assert!(out.contains("attempt 1 goes on with event \"paid:7\", at the latest in 59m"), "{out}");
    assert!(out.contains("Waits\n  for event \"paid:7\" as step \"$awaitEvent:paid:7\", until in 59m"), "{out}");
    let options = SpawnOptions::default().max_attempts(3).retry(RetryStrategy::Fixed(Duration::from_secs(3600)));
    let spawned = client.spawn_task("later", &(), options).await.unwrap();
    eventually("its first attempt has failed", || async {
        let task = client.get_task_status(spawned.task_id).await.unwrap().unwrap();
        (task.attempts == 2).then_some(())
    })
    .await;
    let (_, out, _) = run(&["task", "get", &spawned.task_id.to_string()], &url).await;
    assert!(out.contains("1 of 3") && out.contains("attempt 2 starts in 59m"), "{out}");
    worker.signal("TERM");
    assert_eq!(worker.exit_code().await, Some(0));
}
