//! Clients in other languages, generated from the proto files: each opens a claim stream, stores a checkpoint, waits for an
//! event, goes on when it comes without doing the step again, and completes.

use absurd_client::{SpawnOptions, State};
use absurd_tests::{Absurd, Server, eventually, example, root};
use serde_json::{Value, json as j};
use tokio::process::Command;

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
    let end = client.await_task_result(spawned.task_id, Some(absurd_tests::PATIENCE)).await.unwrap();
    assert_eq!(end.state, State::Completed, "{:?}", end.failure);
    let result: Value = end.result.unwrap().to().unwrap();
    assert_eq!(result, j!({"payment": "pay-42", "tracking_number": "TRACK-42", "by": by}));
    assert_eq!(worker.exit_code().await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_python_client_fulfils_an_order() {
    fulfils_an_order(example("order_worker.py"), "python").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_typescript_client_fulfils_an_order() {
    let mut node = Command::new("node");
    node.arg(root().join("docs/examples/node/build/order_worker.js"));
    fulfils_an_order(node, "typescript").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cpp_client_fulfils_an_order() {
    fulfils_an_order(Command::new(root().join("docs/examples/cpp/build/order_worker")), "c++").await;
}
