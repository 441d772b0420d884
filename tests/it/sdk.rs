//! The original Python SDK and the operator's tool of its release, beside us on one database.

use std::time::Duration;

use absurd_client::{SpawnOptions, State, StreamOptions};
use absurd_server::store::migrate::{self, Origin};
use absurd_tests::{Absurd, Database, Server, example, in_time, tool};
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

/// A database made by upstream's own tool is recognised, gets our side schema and nothing else, and works.
#[tokio::test(flavor = "multi_thread")]
async fn an_adopted_database_stays_as_it_is_and_works() {
    let database = Database::empty().await;
    let init = tool("absurdctl", &["init", "--database", database.url()]).output().await.unwrap();
    assert!(init.status.success(), "{}", String::from_utf8_lossy(&init.stderr));
    let sql = database.connect().await;
    sql.execute("select absurd.create_queue('q')", &[]).await.unwrap();
    let catalogue = "select string_agg(x, e'\n' order by x) from (
         select p.oid::regprocedure || md5(p.prosrc) from pg_proc p where p.pronamespace = 'absurd'::regnamespace
         union all select c.relname || c.relkind::text || c.relhastriggers from pg_class c where c.relnamespace = 'absurd'::regnamespace) s (x)";
    let before: String = sql.query_one(catalogue, &[]).await.unwrap().get(0);
    let report = migrate::migrate(&database.url().parse().unwrap(), migrate::Options::default()).await.unwrap();
    assert_eq!((report.origin, report.doorbell), (Origin::Adopted, false));
    let server = Server::start_on(&database).await;
    let client = server.client();
    let mut stream = client.claim_stream(StreamOptions { max_in_flight: 10, ..Default::default() }).await.unwrap();
    let by_grpc = client.spawn_task("n", &j!(1), SpawnOptions::default()).await.unwrap();
    in_time("a task of ours", stream.next()).await.unwrap().complete(&j!("ours")).await.unwrap();
    sql.execute("select absurd.spawn_task('q', 'n', '2', '{\"max_attempts\": 2}')", &[]).await.unwrap();
    let theirs = in_time("a task of theirs, by the tick", stream.next()).await.unwrap();
    theirs.fail(&j!({"message": "x"})).await.unwrap();
    let again = in_time("its second attempt", stream.next()).await.unwrap();
    assert_eq!((again.task_id, again.attempt), (theirs.task_id, 2));
    again.complete(&j!("theirs")).await.unwrap();
    assert_eq!(client.get_task_result(by_grpc.task_id).await.unwrap().state, State::Completed);
    stream.close(Duration::from_secs(5)).await.unwrap();
    server.stop().await;
    let after: String = sql.query_one(catalogue, &[]).await.unwrap().get(0);
    assert_eq!(before, after, "schema absurd is as it was");
}

/// The tool reads a database that we installed.
#[tokio::test(flavor = "multi_thread")]
async fn the_operators_tool_works_on_our_database() {
    let database = Database::new().await;
    let run = |args: &'static [&'static str]| {
        let mut command = tool("absurdctl", args);
        command.env("ABSURD_DATABASE_URL", database.url());
        async move {
            let output = command.output().await.unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{args:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
            text
        }
    };
    run(&["create-queue", "mails"]).await;
    assert!(run(&["list-queues"]).await.contains("mails"));
    assert!(run(&["schema-version"]).await.contains("0.5.1"));
}
