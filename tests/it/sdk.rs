//! The original Python SDK and the operator's tool of its release, beside us on one database.

use absurd_client::{SpawnOptions, State, StreamOptions};

use absurd_tests::{Absurd, Server, example, in_time};
use serde_json::{Value, json as j};

/// The SDK spawns in its application's transaction; a Rust and a generated Python worker complete; the SDK reads.
#[tokio::test(flavor = "multi_thread")]
async fn tasks_of_the_sdk_are_carried_out_by_grpc_workers() {
    let server = Server::start().await;
    let mut python = example("worker.py");
    python.env("ABSURD_URL", server.url()).env("ABSURD_DEFAULT_QUEUE", "q");
    let mut python = Absurd::start(python);
    python.line("ready").await;
    let mut stream =
        server.client().claim_stream(StreamOptions { max_in_flight: 2, ..Default::default() }).await.unwrap();
    let worker = tokio::spawn(async move {
        while let Some(task) = stream.next().await {
            let order: Value = task.params().unwrap();
            task.complete(&j!({"order_id": order["order_id"], "by": "rust"})).await.unwrap();
        }
    });
    let mut spawner = example("spawn_orders.py");
    spawner.arg("12").env("ABSURD_DATABASE_URL", server.database().url()).env("ABSURD_DEFAULT_QUEUE", "q");
    let output = in_time("the application ends", spawner.output()).await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(text.matches(" completed ").count(), 12, "{text}");
    python.line("completed").await;
    let sql = server.database().connect().await;
    let by: Vec<String> = sql
        .query("select distinct completed_payload ->> 'by' from absurd.t_q order by 1", &[])
        .await
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(by, ["python", "rust"]);
    worker.abort();
}

/// And the other way round: spawned by gRPC, carried out by the SDK's own worker, with steps and an event.
#[tokio::test(flavor = "multi_thread")]
async fn tasks_spawned_by_grpc_are_carried_out_by_the_sdk() {
    let server = Server::start().await;
    let with_env = |script: &str| {
        let mut command = example(script);
        command.env("ABSURD_DATABASE_URL", server.database().url()).env("ABSURD_DEFAULT_QUEUE", "q");
        command
    };
    let mut worker = Absurd::start(with_env("sdk_worker.py"));
    worker.line("ready").await;
    let client = server.client();
    let order = j!({"order_id": "42", "amount": 100, "items": ["widget"], "email": "a@example.com"});
    let spawned = client.spawn_task("order-fulfillment", &order, SpawnOptions::default()).await.unwrap();
    let mut emit = with_env("emit_event.py");
    emit.args(["shipment.packed:42", "{\"tracking_number\": \"TRACK-42\"}"]);
    assert!(in_time("the event is emitted", emit.status()).await.unwrap().success());
    let end = client.await_task_result(spawned.task_id, Some(absurd_tests::PATIENCE)).await.unwrap();
    assert_eq!(end.state, State::Completed, "{:?}", end.failure);
    let result: Value = end.result.unwrap().to().unwrap();
    assert_eq!(result, j!({"order_id": "pay-42", "tracking_number": "TRACK-42"}));
}
