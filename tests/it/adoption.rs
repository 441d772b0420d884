//! Databases that upstream's tool made: ours beside it, and gone again without a trace.

use std::time::Duration;

use absurd_client::{SpawnOptions, State, StreamOptions};
use absurd_server::store::migrate::{self, Options, Origin};
use absurd_tests::{Absurd, Database, Server, absurd, eventually, example, in_time};
use serde_json::json as j;

const PLAIN: Options = Options { doorbell: false, no_doorbell: false };

async fn works(database: &Database) {
    let server = Server::start_on(database).await;
    let sql = database.connect().await;
    let client = server.client();
    let mut stream = client.claim_stream(StreamOptions { max_in_flight: 10, ..Default::default() }).await.unwrap();
    let ours = client.spawn_task("n", &j!(1), SpawnOptions::default()).await.unwrap();
    let task = in_time("a task of ours", stream.next()).await.unwrap();
    task.set_checkpoint("step", &j!("stored")).await.unwrap();
    task.complete(&j!("ours")).await.unwrap();
    let spawn = "select absurd.spawn_task('q', 'n', '2',
                    '{\"max_attempts\": 2, \"retry_strategy\": {\"kind\": \"fixed\", \"base_seconds\": 0}}')";
    sql.execute(spawn, &[]).await.unwrap();
    let theirs = in_time("a task of theirs", stream.next()).await.unwrap();
    theirs.fail(&j!({"message": "x"})).await.unwrap();
    let again = in_time("its second attempt", stream.next()).await.unwrap();
    assert_eq!((again.task_id, again.attempt), (theirs.task_id, 2));
    again.complete(&j!("theirs")).await.unwrap();
    assert_eq!(client.get_task_result(ours.task_id).await.unwrap().state, State::Completed);
    assert!(client.create_queue().await.is_ok_and(|created| !created));
    stream.close(Duration::from_secs(5)).await.unwrap();

    // A worker of upstream's SDK beside it.
    let mut worker = example("sdk_worker.py");
    worker.env("ABSURD_DATABASE_URL", database.url()).env("ABSURD_DEFAULT_QUEUE", "q");
    let mut worker = Absurd::start(worker);
    worker.line("ready").await;
    let order = j!({"order_id": 1, "amount": 5, "items": ["i"], "email": "e"});
    let spawned = client.spawn_task("order-fulfillment", &order, SpawnOptions::default()).await.unwrap();
    sql.execute("select absurd.emit_event('q', 'shipment.packed:1', '{\"tracking_number\": \"T\"}')", &[])
        .await
        .unwrap();
    let end = client.await_task_result(spawned.task_id, Some(absurd_tests::PATIENCE)).await.unwrap();
    assert_eq!(end.state, State::Completed);
    drop(worker);
    let other = client.with_queue("other");
    assert!(other.create_queue().await.unwrap());
    assert!(other.drop_queue().await.unwrap());
    server.stop().await;
}

async fn adopt(release: &str) {
    let Some(database) = Database::upstream_where_possible(release).await else { return };
    let config = database.url().parse().unwrap();
    let sql = database.connect().await;
    sql.batch_execute("select absurd.create_queue('q'); select absurd.create_queue('p', 'partitioned')").await.unwrap();
    let (all, theirs) = (database.dump(None).await, database.dump(Some("absurd")).await);

    let plan = migrate::check(&config, PLAIN).await.unwrap();
    assert_eq!((plan.origin, plan.doorbell, plan.applied.is_empty()), (Origin::Adopted, false, false));
    assert_eq!(database.dump(None).await, all, "a check does nothing");
    let report = migrate::migrate(&config, PLAIN).await.unwrap();
    assert_eq!(report, plan, "what was announced is what is done");
    assert!(migrate::check(&config, PLAIN).await.unwrap().applied.is_empty());
    works(&database).await;
    assert_eq!(database.dump(Some("absurd")).await, theirs, "schema absurd is as it was");

    migrate::migrate(&config, Options { doorbell: true, no_doorbell: false }).await.unwrap();
    assert!(database.dump(None).await.contains("TRIGGER absurd_server_doorbell"));
    works(&database).await;
    eventually("the server has signed off", || async { migrate::remove(&config, false).await.ok() }).await;
    assert_eq!(database.dump(None).await, all, "nothing of ours is left");
    migrate::remove(&config, false).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_of_release_0_5_1_is_adopted() {
    adopt("0.5.1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_of_release_0_5_0_is_adopted() {
    adopt("0.5.0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_of_release_0_4_0_is_adopted() {
    adopt("0.4.0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_database_is_refused_with_what_to_do() {
    let Some(database) = Database::upstream_where_possible("0.3.0").await else { return };
    let before = database.dump(None).await;
    let refused = migrate::migrate(&database.url().parse().unwrap(), PLAIN).await.unwrap_err();
    assert!(refused.to_string().contains("absurdctl migrate"), "{refused}");
    assert_eq!(database.dump(None).await, before);
}

/// The command line says the same; on a database of ours the contract stays, and stays ours.
#[tokio::test(flavor = "multi_thread")]
async fn the_side_schema_comes_and_goes() {
    let database = Database::new().await;
    let run = |args: &'static [&'static str]| {
        let mut command = absurd(args);
        command.env("ABSURD_DATABASE_URL", database.url());
        async move {
            let output = in_time("the command ends", command.output()).await.unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
            (output.status.success(), text)
        }
    };
    let (ok, text) = run(&["migrate", "--check"]).await;
    assert!(ok && text.contains("nothing to do"), "{text}");
    let server = Server::start_on(&database).await;
    eventually("a running server is seen", || async {
        let (ok, text) = run(&["migrate", "--remove"]).await;
        (!ok && text.contains("stop it first")).then_some(())
    })
    .await;
    server.stop().await;
    let (ok, text) = run(&["migrate", "--remove"]).await;
    assert!(ok, "{text}");
    let (_, text) = run(&["migrate", "--check"]).await;
    assert!(
        text.contains("to apply: storage contract (version") && text.contains("installed by this program"),
        "{text}"
    );
    let (ok, text) = run(&["migrate"]).await;
    assert!(ok && text.contains("doorbell: on"), "{text}");
    works(&database).await;
}
