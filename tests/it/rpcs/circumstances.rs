//! Reasons that lie with the server, and requests that are none: every RPC answers in our words.

use std::collections::BTreeSet;
use std::time::Duration;

use absurd_proto::v1 as pb;
use absurd_server::settings::Settings;
use absurd_tests::{Database, OwnCluster, Server, ServerOptions, eventually, in_time};
use prost_reflect::DynamicMessage;
use tonic::Code;
use tonic_types::StatusExt as _;

use super::cases::{Expected, cases, filled};
use super::world::{World, reason};

#[tokio::test(flavor = "multi_thread")]
async fn a_full_server_refuses_streams() {
    let settings = Settings { max_streams: Some(1), ..Settings::default() };
    let server =
        Server::start_with(Database::new().await, ServerOptions { settings, ..ServerOptions::default() }).await;
    let mut grpc = server.raw().await;
    let request = pb::ClaimStreamRequest { queue: "q".into(), worker_id: "w".into(), ..Default::default() };
    let first = grpc.claim_stream(request.clone()).await.unwrap();
    let refused = grpc.claim_stream(request).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::ResourceExhausted, "STREAM_LIMIT"));
    assert!(refused.get_error_details().retry_info().is_some());
    drop(first);
}

/// Bytes that are no message, and messages that are too large, are refused in our words too.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_request_is_refused_with_a_reason() {
    let world = World::new().await;
    for rpc in world.methods.keys() {
        let garbage = world.send(rpc, vec![0xff; 10]).await.unwrap_err();
        assert_eq!((garbage.code(), reason(&garbage).as_str()), (Code::InvalidArgument, "INVALID_ARGUMENT"), "{rpc}");
        let field = garbage.get_error_details().bad_request().unwrap().field_violations[0].field.clone();
        assert_eq!(field, "request", "{rpc}");
    }
    let large = world.send("SpawnTask", vec![0; 17 * 1024 * 1024]).await.unwrap_err();
    assert_eq!((large.code(), reason(&large).as_str()), (Code::InvalidArgument, "PAYLOAD_TOO_LARGE"));
    let details = large.get_error_details();
    assert_eq!(details.error_info().unwrap().metadata["limit"], (16 * 1024 * 1024).to_string());
    assert_eq!(details.error_info().unwrap().metadata["size"], (17 * 1024 * 1024).to_string());
}

/// Whatever is asked while Postgres is away: an answer that says so, soon, and that it passes; and it does.
#[tokio::test(flavor = "multi_thread")]
async fn without_its_database_every_rpc_says_so() {
    let mut cluster = OwnCluster::start(&[]).await;
    let server = Server::start_on(&cluster.database().await).await;
    let mut world = World::on(server).await;
    let mut seen = BTreeSet::new();
    let mut requests = Vec::new();
    for (index, case) in cases().into_iter().enumerate() {
        if matches!(case.expected, Expected::Done(_)) && seen.insert(case.rpc) {
            let queue = format!("c{index}");
            let made = world.make(&queue, case.kind).await;
            let request = filled(&case.request, &queue, &made);
            requests.push((case.rpc, DynamicMessage::deserialize(world.methods[case.rpc].input(), request).unwrap()));
        }
    }
    cluster.stop().await;
    // Writes that are committed in groups wait for Postgres to come back, as long as their callers do.
    world.limit = Duration::from_secs(4);
    let asked = requests.iter().map(async |(rpc, request)| (*rpc, world.call(rpc, request).await));
    let answers = in_time("all answers", futures_util::future::join_all(asked)).await;
    for (rpc, answer) in answers {
        match answer {
            // Each item is answered on its own; and one call speaks to no database.
            Ok(answer) => match rpc {
                "SettleTasks" => assert_eq!(answer["results"][0]["error"]["reason"], "UNAVAILABLE"),
                "ExtendClaims" | "ReleaseClaims" => assert_eq!(answer["verdicts"][0]["verdict"], "VERDICT_BUSY"),
                _ => assert_eq!(rpc, "DrainWorker"),
            },
            Err(status) => {
                assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "UNAVAILABLE"), "{rpc}");
                assert!(status.get_error_details().retry_info().is_some(), "{rpc}");
            }
        }
    }
    cluster.start_again().await;
    let client = world.server.client();
    eventually("it has passed", || async { client.get_queue_stats().await.ok() }).await;
    world.server.stop().await;
    cluster.stop().await;
}

/// A call that waits when its replica leaves is told to go to another one.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_leaves_says_so() {
    let server = Server::start().await;
    let mut waiting = server.raw().await;
    let claim = tokio::spawn(async move {
        let wait = Some(prost_types::Duration { seconds: 60, nanos: 0 });
        let request = pb::ClaimTaskRequest { queue: "q".into(), wait, ..Default::default() };
        waiting.claim_task(request).await
    });
    let sql = server.database().connect().await;
    eventually("the call waits: the idle server has armed the doorbell", || async {
        let armed = "select count(*) > 0 from absurd_server.armed where queue_name = 'q'";
        sql.query_one(armed, &[]).await.unwrap().get::<_, bool>(0).then_some(())
    })
    .await;
    in_time("it stops", server.stop()).await;
    let told = in_time("an answer", claim).await.unwrap().unwrap_err();
    assert_eq!((told.code(), reason(&told).as_str()), (Code::Unavailable, "SHUTTING_DOWN"));
    assert!(told.get_error_details().retry_info().is_some());
}
