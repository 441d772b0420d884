//! Callers that go away, at whatever moment, leave nothing behind: no waiter, no stream, no place.

use std::time::Duration;

use absurd_client::{ClaimOptions, SpawnOptions};
use absurd_proto::v1 as pb;
use absurd_tests::{Server, eventually};
use serde_json::json as j;

/// Nothing counts any more that a call has counted.
async fn is_clean(server: &Server) -> Option<()> {
    let engine = server.app().engine();
    (engine.waits.count() == 0 && engine.dispatcher.streams() == 0).then_some(())
}

#[tokio::test(flavor = "multi_thread")]
async fn abandoned_waits_for_results_are_forgotten() {
    let server = Server::start().await;
    let spawned = server.client().spawn_task("n", &j!(1), SpawnOptions::default()).await.unwrap();
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..10 {
        let mut grpc = server.raw().await;
        let request = pb::AwaitTaskResultRequest {
            queue: "q".into(),
            task_id: spawned.task_id.to_string(),
            timeout: Some(prost_types::Duration { seconds: 600, nanos: 0 }),
        };
        calls.spawn(async move { grpc.await_task_result(request).await });
    }
    let waiting = || async { (server.app().engine().waits.count() == 10).then_some(()) };
    eventually("all wait", waiting).await;
    drop(calls);
    eventually("no waiter is left", || is_clean(&server)).await;
}

/// The queue is locked, so that opening a stream which takes over a claim takes long enough to be given up.
#[tokio::test(flavor = "multi_thread")]
async fn streams_that_are_given_up_while_they_open_are_forgotten() {
    let server = Server::start().await;
    let client = server.client();
    client.spawn_task("n", &j!(1), SpawnOptions::default()).await.unwrap();
    let held = client.claim_task(ClaimOptions::default()).await.unwrap().remove(0);
    let sql = server.database().connect().await;
    sql.batch_execute("begin; lock table absurd.r_q in access exclusive mode").await.unwrap();
    let mut calls = tokio::task::JoinSet::new();
    for number in 0..5 {
        let mut grpc = server.raw().await;
        let request = pb::ClaimStreamRequest {
            queue: "q".into(),
            worker_id: "w".into(),
            session_id: format!("s{number}"),
            max_in_flight: 1,
            held_claim_tokens: vec![held.claim_token().to_owned()],
            ..Default::default()
        };
        calls.spawn(async move { grpc.claim_stream(request).await.map(drop) });
    }
    let opening = || async { (server.app().engine().dispatcher.streams() == 5).then_some(()) };
    eventually("all are opening", opening).await;
    tokio::time::timeout(Duration::from_millis(10), calls.join_next()).await.unwrap_err();
    drop(calls);
    eventually("no stream is left", || is_clean(&server)).await;
    sql.batch_execute("commit").await.unwrap();
}
