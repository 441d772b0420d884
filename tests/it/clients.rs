//! Clients in other languages, generated from the proto files: each opens a claim stream, stores a checkpoint, waits for an
//! event, goes on when it comes without doing the step again, and completes. A worker reports the end of every run: none stays
//! open until its lease ends.

use std::path::{Path, PathBuf};
use std::time::Duration;

use absurd_client::{AbsurdClient, ClaimOptions, SpawnOptions, State};
use absurd_server::settings::Settings;
use absurd_tests::{
    Absurd, Database, Link, PATIENCE, Server, ServerOptions, Toxic, absurd, eventually, example, in_time, root,
};
use serde_json::{Value, json as j};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt as _;
use tokio::net::unix::pipe;
use tokio::process::Command;
use uuid::Uuid;

/// Shorter than the lease of every example, so that no lease ends within it.
const SOON: Duration = Duration::from_secs(20);

async fn fulfils_an_order(mut worker: Command, by: &str) {
    let server = Server::start().await;
    let client = server.client();
    let url = server.url();
    let mut worker = Absurd::start({
        worker.arg("1").env("ABSURD_URL", url).env("ABSURD_DEFAULT_QUEUE", "q").kill_on_drop(true);
        worker
    });
    worker.line("ready").await;
    let options = SpawnOptions::default().max_attempts(2);
    let spawned = client.spawn_task("order", &j!({"order_id": "42"}), options).await.unwrap();
    worker.line("charged 42").await;
    worker.line("suspended").await;
    eventually("the run sleeps", || async {
        (client.get_task_result(spawned.task_id).await.unwrap().state == State::Sleeping).then_some(())
    })
    .await;
    let charged = client.get_checkpoint(spawned.task_id, "charge", false).await.unwrap().unwrap().state.unwrap();
    assert_eq!(charged.to::<Value>().unwrap(), j!({"payment": "pay-42"}));
    client.emit_event("shipment.packed:42", &j!({"tracking_number": "TRACK-42"})).await.unwrap();
    // Its next line: the step is not done again.
    let next = worker.line("").await;
    assert!(next.starts_with("completed"), "{by}: {next}");
    let end = client.await_task_result(spawned.task_id, Some(PATIENCE)).await.unwrap();
    assert_eq!(end.state, State::Completed, "{:?}", end.failure);
    let result: Value = end.result.unwrap().to().unwrap();
    assert_eq!(result, j!({"payment": "pay-42", "tracking_number": "TRACK-42", "by": by}));
    assert_eq!(worker.exit_code().await, Some(0));
}

/// A worker whose parcels contain a file that the test writes.
struct Packing {
    worker: Absurd,
    client: AbsurdClient,
    home: TempDir,
}

impl Packing {
    /// Starts the worker, for so many orders.
    async fn start(mut worker: Command, client: AbsurdClient, url: &str, orders: u32) -> Self {
        let home = tempfile::tempdir().unwrap();
        worker.arg(orders.to_string()).env("ABSURD_URL", url).env("ABSURD_DEFAULT_QUEUE", "q").kill_on_drop(true);
        worker.env("GREETING", home.path().join("greeting"));
        let mut worker = Absurd::start(worker);
        worker.line("ready").await;
        Self { worker, client, home }
    }

    fn greeting(&self) -> PathBuf {
        self.home.path().join("greeting")
    }

    /// Spawns an order of one attempt whose parcel is packed already.
    async fn order(&self, order: &Value) -> Uuid {
        if let Some(id) = order["order_id"].as_str().filter(|id| id.len() < 100) {
            self.client.emit_event(&format!("shipment.packed:{id}"), &j!({"tracking_number": "T"})).await.unwrap();
        }
        let options = SpawnOptions::default().max_attempts(1);
        self.client.spawn_task("order", order, options).await.unwrap().task_id
    }

    /// The worker fails the order, with this text in the reason.
    async fn fails(&self, order: Value, text: &str) {
        let task_id = self.order(&order).await;
        let end = self.client.await_task_result(task_id, Some(SOON)).await.unwrap();
        assert_eq!(end.state, State::Failed, "the task should fail with {text:?}");
        let reason: Value = end.failure.unwrap().to().unwrap();
        assert!(
            reason["message"].as_str().is_some_and(|message| message.contains(text)),
            "{text:?} is not in {reason}"
        );
    }

    async fn completes(&self, order: Value) {
        let task_id = self.order(&order).await;
        let end = self.client.await_task_result(task_id, Some(SOON)).await.unwrap();
        assert_eq!(end.state, State::Completed, "{:?}", end.failure);
    }

    /// The handler reads the greeting once its event was received.
    async fn waits_for_its_greeting(&self, task_id: Uuid) {
        eventually("the event is received", || async {
            self.client.get_checkpoint(task_id, "await-shipment", false).await.unwrap().map(drop)
        })
        .await;
    }

    /// The next read of the greeting waits until somebody writes it.
    fn hold(&self) -> PathBuf {
        let path = self.greeting();
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        path
    }
}

/// Lets the handler that reads a held greeting go on.
async fn release(path: &Path, text: &str) {
    let reader = || async { pipe::OpenOptions::new().open_sender(path).ok() };
    let mut pipe = eventually("the handler reads the greeting", reader).await;
    pipe.write_all(text.as_bytes()).await.unwrap();
}

/// A handler's errors and values that the server refuses fail the task at once, with the cause as the reason.
async fn a_failure_is_told(worker: Command) {
    let settings = Settings { max_payload_bytes: Some(1000), ..Settings::default() };
    let options = ServerOptions { settings, ..ServerOptions::default() };
    let server = Server::start_with(Database::new().await, options).await;
    let packing = Packing::start(worker, server.client(), &server.url(), 1).await;
    packing.fails(j!({"order_id": "1"}), "o such file or directory").await;
    std::fs::write(packing.greeting(), "a\0b").unwrap();
    packing.fails(j!({"order_id": "2"}), "result: the escape \\u0000 cannot be stored").await;
    std::fs::write(packing.greeting(), "x".repeat(1001)).unwrap();
    packing.fails(j!({"order_id": "3"}), "at most 1000 are allowed").await;
    std::fs::write(packing.greeting(), "x".repeat(17 << 20)).unwrap();
    packing.fails(j!({"order_id": "4"}), "request: ").await;
    std::fs::write(packing.greeting(), "hello").unwrap();
    // Short enough for the params, and too long for the value of the step.
    packing.fails(j!({"order_id": "x".repeat(985)}), "state: ").await;
    let unknown = Uuid::now_v7();
    packing.fails(j!({"order_id": "5", "replaces": unknown}), &format!("task {unknown} does not exist")).await;
    packing.fails(j!(null), "").await;
    packing.completes(j!({"order_id": "6"})).await;
    assert_eq!(packing.worker.exit_code().await, Some(0));
}

/// An outcome is repeated while the server cannot be reached: the only attempt completes.
async fn an_outcome_is_repeated(worker: Command) {
    let server = Server::start().await;
    let link = Link::before(&server.url()).await;
    let mut packing = Packing::start(worker, server.client(), &link.url(), 1).await;
    let path = packing.hold();
    let task_id = packing.order(&j!({"order_id": "1"})).await;
    packing.waits_for_its_greeting(task_id).await;
    link.set(Toxic::Reset);
    release(&path, "hello").await;
    packing.worker.line("trying again").await;
    link.set(Toxic::Pass);
    packing.worker.line("completed").await;
    let end = server.client().get_task_result(task_id).await.unwrap();
    assert_eq!(end.state, State::Completed, "{:?}", end.failure);
    assert_eq!(packing.worker.exit_code().await, Some(0));
}

/// A worker whose claim is over reports nothing, and takes the next order.
async fn a_cancelled_order_is_left_alone(worker: Command) {
    let server = Server::start().await;
    let mut packing = Packing::start(worker, server.client(), &server.url(), 1).await;
    for text in ["hello", "a\0b"] {
        let path = packing.hold();
        let task_id = packing.order(&j!({"order_id": "1"})).await;
        packing.waits_for_its_greeting(task_id).await;
        assert!(packing.client.cancel_task_by_id(task_id).await.unwrap().cancelled);
        release(&path, text).await;
        packing.worker.line("cancelled").await;
        assert_eq!(packing.client.get_task_result(task_id).await.unwrap().state, State::Cancelled);
        std::fs::remove_file(path).unwrap();
    }
    std::fs::write(packing.greeting(), "hello").unwrap();
    packing.completes(j!({"order_id": "2"})).await;
    assert_eq!(packing.worker.exit_code().await, Some(0));
}

/// A step of an earlier attempt is not done again, also when its value does not fit into the message that brings the task.
async fn a_stored_step_is_not_done_again(worker: Command) {
    let server = Server::start().await;
    let client = server.client();
    client.emit_event("shipment.packed:1", &j!({"tracking_number": "T"})).await.unwrap();
    let options = SpawnOptions::default().max_attempts(2);
    let spawned = client.spawn_task("order", &j!({"order_id": "1"}), options).await.unwrap();
    let claimed = client.claim_task(ClaimOptions::default()).await.unwrap().remove(0);
    for number in 0..6 {
        claimed.set_checkpoint(&format!("large-{number}"), &j!("x".repeat(1_000_000))).await.unwrap();
    }
    claimed.set_checkpoint("charge", &j!({"payment": "by an earlier attempt"})).await.unwrap();
    claimed.fail(&j!({"message": "on purpose"})).await.unwrap();
    let mut packing = Packing::start(worker, client, &server.url(), 1).await;
    std::fs::write(packing.greeting(), "hello").unwrap();
    packing.worker.line("completed").await;
    let end = packing.client.get_task_result(spawned.task_id).await.unwrap();
    let result: Value = end.result.unwrap().to().unwrap();
    assert_eq!(result["payment"], j!("by an earlier attempt"));
    assert_eq!(packing.worker.exit_code().await, Some(0));
}

macro_rules! order_workers {
    ($($language:ident, $by:literal: $command:expr;)*) => {$(
        mod $language {
            use super::*;

            #[tokio::test(flavor = "multi_thread")]
            async fn fulfils_an_order() {
                super::fulfils_an_order($command, $by).await;
            }

            #[tokio::test(flavor = "multi_thread")]
            async fn tells_a_failure() {
                super::a_failure_is_told($command).await;
            }

            #[tokio::test(flavor = "multi_thread")]
            async fn repeats_an_outcome() {
                super::an_outcome_is_repeated($command).await;
            }

            #[tokio::test(flavor = "multi_thread")]
            async fn does_no_stored_step_again() {
                super::a_stored_step_is_not_done_again($command).await;
            }

            #[tokio::test(flavor = "multi_thread")]
            async fn leaves_a_cancelled_order_alone() {
                super::a_cancelled_order_is_left_alone($command).await;
            }
        }
    )*};
}

order_workers! {
    python, "python": example("order_worker.py");
    typescript, "typescript": typescript();
    cpp, "c++": Command::new(root().join("docs/examples/cpp/build/order_worker"));
}

fn typescript() -> Command {
    let mut node = Command::new("node");
    node.arg(root().join("docs/examples/node/build/order_worker.js"));
    node
}

/// A lease of ten seconds is kept while its task runs for twelve; a task in flight is finished after SIGTERM, and no other one
/// is taken.
#[tokio::test(flavor = "multi_thread")]
async fn a_python_worker_keeps_its_leases_and_drains() {
    let settings = Settings { max_payload_bytes: Some(1000), ..Settings::default() };
    let options = ServerOptions { settings, ..ServerOptions::default() };
    let server = Server::start_with(Database::new().await, options).await;
    let client = server.client();
    let mut worker = example("worker.py");
    worker.env("ABSURD_URL", server.url()).env("ABSURD_DEFAULT_QUEUE", "q");
    let mut worker = Absurd::start(worker);
    worker.line("ready").await;
    let spawn = async |order: Value| {
        client.spawn_task("order", &order, SpawnOptions::default().max_attempts(1)).await.unwrap().task_id
    };
    let end = async |task_id: Uuid| client.await_task_result(task_id, Some(PATIENCE)).await.unwrap();
    let reason = async |order: Value| {
        let end = end(spawn(order).await).await;
        assert_eq!(end.state, State::Failed);
        end.failure.unwrap().to::<Value>().unwrap()["message"].to_string()
    };
    assert!(reason(j!({})).await.contains("order_id"));
    // The result names the order twice.
    assert!(reason(j!({"order_id": "x".repeat(900)})).await.contains("at most 1000 are allowed"));
    let long = spawn(j!({"order_id": "long", "packing_seconds": 12})).await;
    eventually("it is carried out", || async {
        (client.get_task_result(long).await.unwrap().state == State::Running).then_some(())
    })
    .await;
    worker.signal("TERM");
    eventually("its stream has ended", || async {
        (client.get_queue_stats().await.unwrap().streams == 0).then_some(())
    })
    .await;
    let later = spawn(j!({"order_id": "later"})).await;
    assert_eq!(worker.exit_code().await, Some(0));
    let end = end(long).await;
    assert_eq!(end.state, State::Completed, "{:?}", end.failure);
    assert_eq!(client.get_task_result(later).await.unwrap().state, State::Pending);
}

/// A connection that lets nothing through is noticed, long before the network says so, and another stream is opened.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_connection_is_noticed() {
    let server = Server::start().await;
    let notices = async |mut worker: Command| {
        let link = Link::before(&server.url()).await;
        worker.env("ABSURD_URL", link.url()).env("ABSURD_DEFAULT_QUEUE", "q").kill_on_drop(true);
        let mut worker = Absurd::start(worker);
        worker.line("ready").await;
        link.set(Toxic::Hole(true, true));
        // Any line shows that the worker has noticed.
        worker.line("").await;
        link.set(Toxic::Pass);
        worker.line("ready").await;
    };
    let cpp = Command::new(root().join("docs/examples/cpp/build/order_worker"));
    tokio::join!(
        notices(example("worker.py")),
        notices(example("order_worker.py")),
        notices(typescript()),
        notices(cpp)
    );
}

/// Runs a Python example to its end, with one line of it replaced.
async fn with_another_line(server: &Server, script: &str, line: &str, other: &str) -> String {
    let source = std::fs::read_to_string(root().join("docs/examples").join(script)).unwrap();
    assert_eq!(source.matches(line).count(), 1, "{script} has the line {line}");
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join(script);
    std::fs::write(&path, source.replace(line, other)).unwrap();
    let mut python = example(&path.to_string_lossy());
    python.env("ABSURD_URL", server.url()).env("ABSURD_DEFAULT_QUEUE", "q");
    let output = in_time(script, python.output()).await.unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The first task ends for every kind of handler that a reader writes, and the program prints how.
#[tokio::test(flavor = "multi_thread")]
async fn a_first_task_ends_with_every_kind_of_handler() {
    let server = Server::start().await;
    let line = "return {\"greeting\": f\"hello {params['name']}\"}";
    for (other, text) in [
        (line, "STATE_COMPLETED {\"greeting\": \"hello world\"}"),
        ("return open('/no/such/file').read()", "STATE_FAILED {\"name\": \"FileNotFoundError\""),
        ("raise grpc.RpcError('of another service')", "\"message\": \"of another service\""),
        ("return 'a\\0b'", "result: the escape"),
        ("return 'x' * 2_000_000", "at most 1048576 are allowed"),
        ("return float('nan')", "result: not a JSON value"),
        ("return {1, 2}", "STATE_FAILED {\"name\": \"TypeError\""),
    ] {
        let said = with_another_line(&server, "first_task.py", line, other).await;
        assert!(said.contains(text), "{other}: {said}");
    }
}

/// The first example of the original documentation, on the generated client.
#[tokio::test(flavor = "multi_thread")]
async fn basic_processing_in_python_completes_and_fails() {
    let server = Server::start().await;
    let line = "return {\"output\": f\"Processed: {params['message']}\"}";
    let said = with_another_line(&server, "basic_processing.py", line, line).await;
    assert!(said.contains("completed echo: {'output': 'Processed: Hello, World!'}"), "{said}");
    assert!(said.contains("failed sing: nobody knows how to do sing"), "{said}");
    let said = with_another_line(&server, "basic_processing.py", line, "return float('nan')").await;
    assert!(said.contains("failed echo: ") && said.contains("result: not a JSON value"), "{said}");
}

/// The code in the guide is that of the examples, which the tests run; and the modules hold what the guide says.
#[test]
fn the_guide_to_clients_shows_tested_code() {
    let read = |path: &str| std::fs::read_to_string(root().join(path)).unwrap();
    let (guide, migration) = (read("docs/clients.md"), read("docs/migration.md"));
    let squeeze = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let names = ["order_worker.py", "worker.py", "basic_processing.py", "node/order_worker.ts"];
    let sources = squeeze(&names.map(|name| read(&format!("docs/examples/{name}"))).concat());
    let mut blocks = 0;
    for block in [guide.as_str(), &migration].into_iter().flat_map(|page| page.split("```").skip(1).step_by(2)) {
        if let Some(code) = block.strip_prefix("python\n").or_else(|| block.strip_prefix("ts\n")) {
            assert!(sources.contains(&squeeze(code)), "no example has this code:\n{code}");
            blocks += 1;
        }
    }
    assert!(blocks > 2, "{blocks}");
    let mut seen = 0;
    for row in guide.lines().filter(|line| line.starts_with("| `") && line.contains("_pb2` |")) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let module = cells[1].trim_matches('`').trim_end_matches("_pb2");
        let proto = read(&format!("proto/absurd/v1/{module}.proto"));
        for name in cells[2].split('`').skip(1).step_by(2) {
            let kinds = ["message", "enum", "service"].map(|kind| format!("{kind} {name} {{"));
            assert!(kinds.iter().any(|text| proto.contains(text)), "{module}_pb2 holds no {name}");
            seen += 1;
        }
    }
    for entry in std::fs::read_dir(root().join("proto/absurd/v1")).unwrap() {
        let path = entry.unwrap().path();
        let module = format!("{}_pb2", path.file_stem().unwrap().to_string_lossy());
        assert!(guide.contains(&format!("`{module}`")), "the guide does not name the module {module}");
        let proto = std::fs::read_to_string(path).unwrap();
        let messages = proto.lines().filter_map(|line| line.strip_prefix("message ")?.split_once(' '));
        for (name, _) in messages.filter(|(name, _)| name.ends_with("Request")) {
            assert!(guide.contains(&format!("`{name}`")), "the guide does not say that {module} holds {name}");
        }
    }
    assert!(seen > 40, "{seen}");
}

/// The shell's order fails where a value is missing, also in the arguments of a command.
#[tokio::test(flavor = "multi_thread")]
async fn a_script_fails_without_its_values() {
    let server = Server::start().await;
    let client = server.client();
    let script = root().join("docs/examples/order_fulfillment.sh");
    let mut worker = absurd(&["worker", "--exec", &script.to_string_lossy()]);
    worker.env("ABSURD_URL", server.url()).env("ABSURD_DEFAULT_QUEUE", "q");
    let mut worker = Absurd::start(worker);
    worker.line("takes tasks").await;
    client.emit_event("shipment.packed:42", &j!({})).await.unwrap();
    let order = j!({"order_id": "42", "amount": 1, "items": ["nut"], "email": "a@example.com"});
    for missing in ["amount", "items", "email", "tracking_number"] {
        let mut order = order.clone();
        order.as_object_mut().unwrap().remove(missing);
        let options = SpawnOptions::default().max_attempts(1);
        let spawned = client.spawn_task("order-fulfillment", &order, options).await.unwrap();
        let end = client.await_task_result(spawned.task_id, Some(PATIENCE)).await.unwrap();
        assert_eq!(end.state, State::Failed, "without {missing}");
        let reason: Value = end.failure.unwrap().to().unwrap();
        assert!(reason["message"].as_str().is_some_and(|message| message.contains(missing)), "{reason}");
    }
}

/// The original SDK's worker fails a task whose handler throws, at once.
#[tokio::test(flavor = "multi_thread")]
async fn the_sdk_s_worker_tells_a_failure() {
    let server = Server::start().await;
    let client = server.client();
    let mut worker = example("sdk_worker.py");
    worker.env("ABSURD_DATABASE_URL", server.database().url()).env("ABSURD_DEFAULT_QUEUE", "q");
    let mut worker = Absurd::start(worker);
    worker.line("ready").await;
    let options = SpawnOptions::default().max_attempts(1);
    let spawned = client.spawn_task("order-fulfillment", &j!({"order_id": "42"}), options).await.unwrap();
    let end = client.await_task_result(spawned.task_id, Some(SOON)).await.unwrap();
    assert_eq!(end.state, State::Failed);
    let reason: Value = end.failure.unwrap().to().unwrap();
    assert_eq!((&reason["name"], &reason["message"]), (&j!("KeyError"), &j!("'amount'")));
}
