//! What stands around the service: health, reflection, TLS, limits of settings.

use absurd_client::{AbsurdClient, ConnectOptions, TlsOptions};
use absurd_proto::v1 as pb;
use absurd_proto::v1::test_clock_service_client::TestClockServiceClient;
use absurd_server::settings::Settings;
use absurd_tests::{Database, Server, ServerOptions, in_time, json};
use tonic::codec::CompressionEncoding;
use tonic::transport::Endpoint;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServiceResponse};
use tonic_types::StatusExt as _;

use crate::streams::seconds;

#[tokio::test(flavor = "multi_thread")]
async fn health_is_told_overall_and_per_service() {
    let server = Server::start().await;
    let channel = Endpoint::from_shared(server.url()).unwrap().connect().await.unwrap();
    let mut health = HealthClient::new(channel);
    for service in ["", "absurd.v1.AbsurdService"] {
        let response = health.check(HealthCheckRequest { service: service.into() }).await.unwrap().into_inner();
        assert_eq!(response.status(), ServingStatus::Serving, "{service:?}");
    }
    let mut watch = health.watch(HealthCheckRequest { service: String::new() }).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    tokio::spawn(server.stop());
    let told = in_time("a stopping server says so", watch.message()).await.unwrap().unwrap();
    assert_eq!(told.status(), ServingStatus::NotServing);
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_lists_what_is_served() {
    let settings = Settings { test_clock: Some(true), ..Settings::default() };
    let with_clock = Server::start_with(Database::new().await, ServerOptions { settings, ..Default::default() }).await;
    for (server, clock) in [(Server::start().await, false), (with_clock, true)] {
        let names = services(&server).await;
        assert!(names.contains(&"absurd.v1.AbsurdService".to_owned()), "{names:?}");
        assert!(names.contains(&"grpc.health.v1.Health".to_owned()), "{names:?}");
        assert_eq!(names.contains(&"absurd.v1.TestClockService".to_owned()), clock, "{names:?}");
    }
    let server = Server::start().await;
    let mut clock = TestClockServiceClient::connect(server.url()).await.unwrap();
    let unknown = clock.set_time(pb::SetTimeRequest::default()).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::Unimplemented);
    assert!(unknown.message().contains("/absurd.v1.TestClockService/SetTime"), "{unknown}");
}

/// Who compresses is answered so; nobody else pays for it. What a small message unpacks to is held to the limit of requests.
#[tokio::test(flavor = "multi_thread")]
async fn gzip_is_for_those_who_use_it() {
    let server = Server::start().await;
    let mut plain = server.raw().await.accept_compressed(CompressionEncoding::Gzip);
    let mut packed =
        server.raw().await.accept_compressed(CompressionEncoding::Gzip).send_compressed(CompressionEncoding::Gzip);
    let spawn = |bytes: usize| pb::SpawnTaskRequest {
        queue: "q".into(),
        task: Some(pb::NewTask {
            task_name: "n".into(),
            params: json(format!("\"{}\"", "x".repeat(bytes))),
            ..Default::default()
        }),
    };
    for (grpc, encoding) in [(&mut plain, None), (&mut packed, Some("gzip"))] {
        let spawned = grpc.spawn_task(spawn(100_000)).await.unwrap();
        let said = |response: &tonic::metadata::MetadataMap| {
            response.get("grpc-encoding").map(|encoding| encoding.to_str().unwrap().to_owned())
        };
        assert_eq!(said(spawned.metadata()).as_deref(), encoding);
        let task_id = spawned.into_inner().task.unwrap().task_id;
        let read = pb::GetTaskStatusRequest { queue: "q".into(), task_id, ..Default::default() };
        let task = grpc.get_task_status(read).await.unwrap();
        assert_eq!(said(task.metadata()).as_deref(), encoding);
        assert_eq!(task.into_inner().task.unwrap().params.unwrap().text.len(), 100_002);
        let request = pb::ClaimStreamRequest { queue: "q".into(), worker_id: "w".into(), ..Default::default() };
        let stream = grpc.claim_stream(request).await.unwrap();
        assert_eq!(said(stream.metadata()).as_deref(), encoding, "a stream");
        assert!(in_time("it opens", stream.into_inner().message()).await.unwrap().is_some());
    }
    for bytes in [2_000_000, 17_000_000, 40_000_000] {
        let bomb = packed.spawn_task(spawn(bytes)).await.unwrap_err();
        assert_eq!(bomb.get_error_details().error_info().unwrap().reason, "PAYLOAD_TOO_LARGE", "{bytes}: {bomb}");
    }
    assert!(packed.spawn_task(spawn(10)).await.is_ok(), "the server is well");
}

async fn services(server: &Server) -> Vec<String> {
    let channel = Endpoint::from_shared(server.url()).unwrap().connect().await.unwrap();
    let ask = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = ServerReflectionClient::new(channel)
        .server_reflection_info(tokio_stream::once(ask))
        .await
        .unwrap()
        .into_inner();
    let Some(MessageResponse::ListServicesResponse(list)) = answers.message().await.unwrap().unwrap().message_response
    else {
        panic!("no list of services")
    };
    list.service.into_iter().map(|ServiceResponse { name }| name).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_with_an_authority_of_ones_own() {
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let mut authority = rcgen::CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority_certificate = authority.self_signed(&authority_key).unwrap();
    let issuer = rcgen::Issuer::new(authority, authority_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let leaf = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    let home = tempfile::tempdir().unwrap();
    let file = |name: &str, text: String| {
        let path = home.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let settings = Settings {
        tls_cert: Some(file("cert.pem", leaf.pem())),
        tls_key: Some(file("key.pem", key.serialize_pem())),
        ..Settings::default()
    };
    let options = ServerOptions { settings, without_queue: true, ..ServerOptions::default() };
    let server = Server::start_with(Database::new().await, options).await;
    let url = format!("https://localhost:{}", server.app().addr().port());
    let tls = TlsOptions { ca: Some(file("ca.pem", authority_certificate.pem())), ..TlsOptions::default() };
    let trusting = AbsurdClient::connect(&ConnectOptions { tls, ..ConnectOptions::new(&url) }).unwrap();
    assert!(trusting.with_queue("q").create_queue().await.unwrap());
    let strict = ConnectOptions { deadline: std::time::Duration::from_millis(500), ..ConnectOptions::new(&url) };
    AbsurdClient::connect(&strict).unwrap().list_queues().await.expect_err("an unknown authority is not trusted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_may_insist_on_claim_tokens() {
    let settings = Settings { require_claim_token: Some(true), ..Settings::default() };
    let options = ServerOptions { settings, ..ServerOptions::default() };
    let server = Server::start_with(Database::new().await, options).await;
    let request = pb::CompleteTaskRequest {
        queue: "q".into(),
        run_id: uuid::Uuid::now_v7().to_string(),
        claim_token: None,
        result: None,
    };
    let refused = server.raw().await.complete_task(request).await.unwrap_err();
    assert_eq!(refused.get_error_details().error_info().unwrap().reason, "CLAIM_TOKEN_REQUIRED");
    let claims = vec![pb::ClaimRef { run_id: uuid::Uuid::now_v7().to_string(), claim_token: None }];
    let extend = pb::ExtendClaimsRequest { queue: "q".into(), claims: claims.clone(), extend_by: seconds(9) };
    let extended = server.raw().await.extend_claims(extend).await.unwrap().into_inner().verdicts;
    let release = pb::ReleaseClaimsRequest { queue: "q".into(), claims, ..Default::default() };
    let released = server.raw().await.release_claims(release).await.unwrap().into_inner().verdicts;
    for verdicts in [extended, released] {
        assert_eq!(verdicts[0].verdict(), pb::Verdict::Invalid, "asking again would change nothing");
    }
}

/// The name in an error is the name in the request, also where two RPCs share their work.
#[tokio::test(flavor = "multi_thread")]
async fn an_error_names_the_field_of_its_own_request() {
    let server = Server::start().await;
    let mut grpc = server.raw().await;
    let (queue, run_id) = ("q".to_owned(), uuid::Uuid::now_v7().to_string());
    let (checkpoint_name, broken) = ("s".to_owned(), json("{"));
    let set = pb::SetCheckpointRequest {
        queue: queue.clone(),
        run_id: run_id.clone(),
        checkpoint_name: checkpoint_name.clone(),
        state: broken.clone(),
        ..Default::default()
    };
    let save = pb::SaveCheckpointForRunRequest { queue, run_id, checkpoint_name, data: broken, ..Default::default() };
    for (field, refused) in [
        ("state", grpc.set_checkpoint(set).await.unwrap_err()),
        ("data", grpc.save_checkpoint_for_run(save).await.unwrap_err()),
    ] {
        let violations = refused.get_error_details().bad_request().unwrap().field_violations.clone();
        assert_eq!(violations[0].field, field, "{refused:?}");
    }
}
