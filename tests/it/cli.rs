//! The `absurd` command, as a user runs it.

mod lines;
mod workers;

use absurd_client::ConnectOptions;
use absurd_client::durable::testing::TestClock;
use absurd_tests::{Absurd, Server, absurd, eventually, in_time};

async fn run(args: &[&str], url: &str) -> (bool, String, String) {
    let mut command = absurd(args);
    command.env("ABSURD_URL", url).env("ABSURD_DEFAULT_QUEUE", "q");
    let output = in_time("the command ends", command.output()).await.unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), text(&output.stdout), text(&output.stderr))
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_work_over_grpc() {
    let server = Server::start().await;
    let url = server.url();
    assert!(run(&["health"], &url).await.1.contains("SERVING"));
    assert!(run(&["queue", "create", "other"], &url).await.1.contains("created"));
    assert!(run(&["queue", "list", "-o", "json"], &url).await.1.contains("\"other\""));
    let (ok, text, _) = run(&["task", "spawn", "greet", "{\"a\":1}", "-o", "json"], &url).await;
    assert!(ok);
    let spawned: serde_json::Value = serde_json::from_str(&text).unwrap();
    let id = spawned["task_id"].as_str().unwrap();
    assert!(run(&["task", "get", id], &url).await.1.contains("pending"));
    assert!(run(&["task", "list", "--state", "pending"], &url).await.1.contains(id));
    assert!(run(&["task", "cancel", id], &url).await.1.contains("cancelled"));
    let (ok, text, _) = run(&["task", "watch", id], &url).await;
    assert!(!ok && text.contains("cancelled"), "{text}");
    assert!(run(&["task", "spawn", "many", "--count", "1200"], &url).await.1.contains("1200 tasks in"));
    assert!(run(&["queue", "stats", "-o", "json"], &url).await.1.contains("\"pending\": 1200"));
    let (ok, _, error) = run(&["task", "spawn", "n", "--queue", "nowhere"], &url).await;
    assert!(!ok && error.contains("absurd queue create nowhere"), "{error}");
    let (ok, _, error) = run(&["task", "spawn", "n", "{"], &url).await;
    assert!(!ok && error.contains("params: not valid JSON"), "{error}");
    assert!(run(&["event", "emit", "go", "{\"x\": 1}"], &url).await.1.contains("0 runs woken"));
    assert!(run(&["event", "emit", "go"], &url).await.1.contains("before"));
    let (ok, _, error) = run(&["event", "emit", "go", "{"], &url).await;
    assert!(!ok && error.contains("payload"), "{error}");
    assert!(!run(&["queue", "drop", "--queue", "other"], &url).await.0, "without --yes nothing is dropped");
    assert!(run(&["queue", "drop", "--queue", "other", "--yes"], &url).await.1.contains("dropped"));
}

#[tokio::test(flavor = "multi_thread")]
async fn any_program_is_a_worker() {
    let server = Server::start().await;
    let url = server.url();
    let client = server.client();
    let mut command =
        absurd(&["worker", "--exec", "case $ABSURD_TASK_NAME in bad) echo why >&2; exit 3;; *) cat;; esac"]);
    command.env("ABSURD_URL", &url).env("ABSURD_DEFAULT_QUEUE", "q");
    let mut worker = Absurd::start(command);
    worker.line("takes tasks").await;
    let (ok, text, _) = run(&["task", "spawn", "good", "{\"n\": 1}", "--wait", "30s"], &url).await;
    assert!(ok && text.contains("{\"n\": 1}"), "{text}");
    let (ok, text, _) = run(&["task", "spawn", "bad", "--wait", "30s"], &url).await;
    assert!(!ok && text.contains("exit status: 3") && text.contains("why"), "{text}");
    worker.signal("TERM");
    assert_eq!(worker.exit_code().await, Some(0));
    assert_eq!(client.get_queue_stats().await.unwrap().running, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn dev_brings_everything_and_the_demo_shows_it() {
    let home = tempfile::tempdir().unwrap();
    std::fs::set_permissions(home.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let data = home.path().join("data").to_string_lossy().into_owned();
    for round in 0..2 {
        let mut dev = Absurd::start(absurd(&["dev", "--test-clock", "--listen", "127.0.0.1:0", "--data-dir", &data]));
        let line = dev.line("gRPC").await;
        let url = line.split_whitespace().nth(1).unwrap().to_owned();
        dev.line("ABSURD_DATABASE_URL=").await;
        dev.line("Ctrl-C").await;
        let (_, text, _) = run(&["task", "list", "--queue", "default"], &url).await;
        assert_eq!(text.contains("kept"), round == 1, "what was there before the stop is there again: {text}");
        run(&["task", "spawn", "kept", "--queue", "default"], &url).await;
        dev.line("spawned").await;
        let failing = ["worker", "--exec", "echo why >&2; exit 3", "--max-tasks", "1", "-q", "default"];
        assert!(run(&failing, &url).await.0);
        dev.line("failed: ExitError: exit status: 3: why; attempt").await;
        let (ok, text, error) = run(&["demo"], &url).await;
        assert!(ok && text.contains("charges: 1"), "{text}{error}");
        let clock = TestClock::connect(&ConnectOptions::new(url)).unwrap();
        let now = clock.now().await.unwrap();
        assert_eq!(clock.set(now).await.unwrap(), clock.now().await.unwrap());
        dev.signal("INT");
        assert_eq!(dev.exit_code().await, Some(0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_settings_are_errors() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("absurd.toml");
    std::fs::write(&file, "lisen = \"127.0.0.1:1\"").unwrap();
    let (ok, _, error) = run(&["serve", "--config", &file.to_string_lossy()], "http://127.0.0.1:1").await;
    assert!(!ok && error.contains("lisen"), "{error}");
    let (ok, _, error) = run(&["serve"], "http://127.0.0.1:1").await;
    assert!(!ok && error.contains("ABSURD_DATABASE_URL"), "{error}");
    let (ok, _, error) = run(&["health"], "http://127.0.0.1:1").await;
    assert!(!ok && error.contains("no server answers at http://127.0.0.1:1: connection refused"), "{error}");
}

/// A worker on a queue of one task, whose program writes its process id into a file and then takes very long.
async fn busy_worker(server: &Server, file: &std::path::Path, flags: &[&str]) -> (Absurd, String, i32) {
    let program = format!("echo $$ >{}; exec sleep 100000", file.display());
    let mut command = absurd(&[&["worker", "--exec", &program], flags].concat());
    command.env("ABSURD_URL", server.url()).env("ABSURD_DEFAULT_QUEUE", "q");
    let worker = Absurd::start(command);
    let (ok, text, _) = run(&["task", "spawn", "long", "-o", "json"], &server.url()).await;
    assert!(ok);
    let spawned: serde_json::Value = serde_json::from_str(&text).unwrap();
    let pid =
        eventually("the program runs", || async { std::fs::read_to_string(file).ok()?.trim().parse().ok() }).await;
    (worker, spawned["task_id"].as_str().unwrap().to_owned(), pid)
}

async fn until_gone(pid: i32) {
    let process = format!("/proc/{pid}");
    eventually("the program is ended", || async { (!std::path::Path::new(&process).exists()).then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_task_ends_its_program() {
    let server = Server::start().await;
    let home = tempfile::tempdir().unwrap();
    let (worker, task, pid) = busy_worker(&server, &home.path().join("pid"), &[]).await;
    assert!(run(&["task", "cancel", &task], &server.url()).await.0);
    until_gone(pid).await;
    worker.signal("TERM");
    assert_eq!(worker.exit_code().await, Some(0));
}

/// A worker that is asked to stop lets its program finish for a while; then the task goes back with its attempt unspent.
#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_worker_gives_back_what_does_not_finish() {
    let server = Server::start().await;
    let home = tempfile::tempdir().unwrap();
    let (mut worker, task, pid) = busy_worker(&server, &home.path().join("pid"), &["--drain", "1s"]).await;
    worker.signal("TERM");
    worker.line("still run").await;
    assert_eq!(worker.exit_code().await, Some(0));
    until_gone(pid).await;
    let id = task.parse().unwrap();
    let status = server.client().get_task_status(id).await.unwrap().unwrap();
    assert_eq!((status.state, status.attempts), (absurd_client::State::Pending, 1), "{status:?}");
}

/// Every measurement runs against a server of one's own, prints JSON, and two results are set side by side.
#[tokio::test(flavor = "multi_thread")]
async fn measurements_print_figures_and_leave_nothing_behind() {
    let server = Server::start().await;
    let (url, database) = (server.url(), server.database().url().to_owned());
    let home = tempfile::tempdir().unwrap();
    let mut results = Vec::new();
    for line in [
        "spawn --tasks 40 --in-flight 4",
        "spawn --tasks 40 --batch 20",
        "drain --tasks 30",
        "steady --time 300ms",
        "steps --tasks 5 --steps 3",
        "backlog --pending 0,20 --samples 3",
    ] {
        let flags = ["bench"].into_iter().chain(line.split(' ')).chain(["--database-url", &database, "-o", "json"]);
        let (ok, text, error) = run(&flags.collect::<Vec<_>>(), &url).await;
        assert!(ok, "{line}: {error}");
        let name = line.split(' ').next().unwrap();
        let figures: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert!(figures[name].is_object(), "{line}: {text}");
        if let Some(rate) = figures[name]["tasks_per_s"].as_f64() {
            assert!(rate > 0.0, "{line}: {text}");
        }
        let file = home.path().join(format!("{}.json", results.len()));
        std::fs::write(&file, text).unwrap();
        results.push(file.to_string_lossy().into_owned());
    }
    let (ok, text, error) = run(&["bench", "compare", &results[0], &results[1]], &url).await;
    assert!(ok && text.contains("spawn.tasks_per_s") && text.contains("ratio"), "{text}{error}");
    let (ok, _, error) = run(&["bench", "compare", &results[0], &results[3]], &url).await;
    assert!(!ok && error.contains("no figure in common"), "{error}");
    let (_, text, _) = run(&["queue", "list", "-o", "json"], &url).await;
    assert!(!text.contains("absurd-bench"), "{text}");
}

/// The first line of a server names its version, its database without the password, and where it listens; in plain text.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_says_where_it_is() {
    let database = absurd_tests::Database::empty().await;
    let mut command = absurd(&["serve", "--migrate", "--listen", ":0", "--metrics-listen", "localhost:0"]);
    command.env("ABSURD_DATABASE_URL", database.url()).env("PGPASSWORD", "hunter2");
    let mut server = Absurd::start(command);
    let line = server.line("serving").await;
    let version = format!("version=\"{}\"", env!("CARGO_PKG_VERSION"));
    for part in ["listen=127.0.0.1:", "metrics=127.0.0.1:", "database=\"", &version] {
        assert!(line.contains(part), "{part}: {line}");
    }
    assert!(!line.contains('\u{1b}') && !line.contains("hunter2") && !line.contains(":0 "), "{line}");
    server.signal("TERM");
    assert_eq!(server.exit_code().await, Some(0));
}
