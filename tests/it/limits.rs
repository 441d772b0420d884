//! Limits: what is over a bound is refused at once, with a reason and a delay, and counted; who only costs is cut off.

use std::time::{Duration, Instant};

use absurd_client::{AbsurdClient, ConnectOptions, NewTask, SpawnOptions};
use absurd_proto::v1 as pb;
use absurd_server::settings::{Settings, Span};
use absurd_tests::{Attacker, Database, Flood, Server, ServerOptions, eventually, in_time, json};
use serde_json::json as j;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::streams::request;

pub(crate) async fn server(settings: Settings) -> Server {
    let settings = Settings { metrics_listen: Some(([127, 0, 0, 1], 0).into()), ..settings };
    Server::start_with(Database::new().await, ServerOptions { settings, ..ServerOptions::default() }).await
}

/// A page of the metrics' address: status line and body.
async fn page(server: &Server, path: &str) -> String {
    let mut socket = TcpStream::connect(server.app().metrics_addr().unwrap()).await.unwrap();
    let get = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    socket.write_all(get.as_bytes()).await.unwrap();
    let mut text = String::new();
    in_time("the page comes", socket.read_to_string(&mut text)).await.unwrap();
    text
}

/// A metric's value; 0 when it has none yet.
pub(crate) async fn metric(server: &Server, name: &str) -> f64 {
    let text = page(server, "/metrics").await;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.map_or(0.0, |value| value.trim().parse().unwrap())
}

fn refusal(status: &tonic::Status) -> (Code, String, Option<Duration>) {
    let details = status.get_error_details();
    let delay = details.retry_info().and_then(|retry| retry.retry_delay);
    (status.code(), details.error_info().unwrap().reason.clone(), delay)
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_of_a_connection_and_of_a_caller_are_bounded() {
    let settings =
        Settings { max_streams_per_connection: Some(2), max_streams_per_caller: Some(3), ..Settings::default() };
    let server = server(settings).await;
    let (mut one, mut two) = (server.raw().await, server.raw().await);
    let first = one.claim_stream(request(1)).await.unwrap();
    let second = one.claim_stream(request(1)).await.unwrap();
    let refused = one.claim_stream(request(1)).await.unwrap_err();
    let (code, reason, delay) = refusal(&refused);
    assert_eq!((code, reason.as_str()), (Code::ResourceExhausted, "STREAM_LIMIT"));
    assert!(refused.message().contains("--max-streams-per-connection"), "{}", refused.message());
    assert!(delay.is_some());
    assert!(refused.metadata().get("grpc-retry-pushback-ms").is_some(), "gRPC's own policies know when to come back");
    let third = two.claim_stream(request(1)).await.unwrap();
    let refused = two.claim_stream(request(1)).await.unwrap_err();
    assert!(refused.message().contains("--max-streams-per-caller"), "{}", refused.message());
    assert!(metric(&server, "absurd_refused_total{reason=\"STREAM_LIMIT\"}").await >= 2.0);
    // All servers of this process share the recorder.
    eventually("three streams are counted", || async {
        ((metric(&server, "absurd_streams").await - 3.0).abs() < 0.5).then_some(())
    })
    .await;
    // What ends gives its place back.
    drop((first, second, third));
    eventually("a stream opens again", || async { server.raw().await.claim_stream(request(1)).await.ok() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_in_flight_are_bounded() {
    let server = server(Settings { max_requests: Some(1), ..Settings::default() }).await;
    let spawned = server.client().spawn_task("n", &j!(1), SpawnOptions::default()).await.unwrap();
    let mut grpc = server.raw().await;
    let wait = pb::AwaitTaskResultRequest {
        queue: "q".into(),
        task_id: spawned.task_id.to_string(),
        timeout: Some(prost_types::Duration { seconds: 30, nanos: 0 }),
    };
    let waiting = tokio::spawn({
        let mut grpc = grpc.clone();
        // The other one may have been there first.
        async move { while grpc.await_task_result(wait.clone()).await.is_err() {} }
    });
    let stats = pb::GetQueueStatsRequest { queue: "q".into() };
    let refused = eventually("the call is turned away", || {
        let (mut grpc, stats) = (grpc.clone(), stats.clone());
        async move { grpc.get_queue_stats(stats).await.err() }
    })
    .await;
    let (code, reason, delay) = refusal(&refused);
    assert_eq!((code, reason.as_str()), (Code::ResourceExhausted, "TOO_MANY_REQUESTS"));
    assert!(delay.is_some());
    waiting.abort();
    eventually("a place is free again", || {
        let (mut grpc, stats) = (grpc.clone(), stats.clone());
        async move { grpc.get_queue_stats(stats).await.ok() }
    })
    .await;
    grpc.get_queue_stats(stats).await.unwrap();
}

/// Many who look at one queue cost as much as one.
#[tokio::test(flavor = "multi_thread")]
async fn counts_are_shared_by_those_who_ask_meanwhile() {
    const CALLERS: usize = 50;
    let server = server(Settings { max_requests: Some(CALLERS), ..Settings::default() }).await;
    let mut sql = server.database().connect().await;
    let held = sql.transaction().await.unwrap();
    held.batch_execute("lock table absurd.r_q").await.unwrap();
    let grpc = server.raw().await;
    let ask = move || {
        let mut grpc = grpc.clone();
        async move { grpc.get_queue_stats(pb::GetQueueStatsRequest { queue: "q".into() }).await }
    };
    let mut waiting = tokio::task::JoinSet::new();
    for _ in 0..CALLERS {
        let ask = ask.clone();
        // The one more may have been there before the last of these.
        waiting.spawn(async move {
            loop {
                if let Ok(answer) = ask().await {
                    break answer.into_inner();
                }
            }
        });
    }
    eventually("one more is turned away", || async {
        tokio::time::timeout(Duration::from_millis(200), ask()).await.ok()?.err()
    })
    .await;
    let waiting_for_postgres = metric(&server, "absurd_database_waiting{role=\"upkeep\"}").await;
    assert!(waiting_for_postgres < 5.0, "{waiting_for_postgres}");
    held.rollback().await.unwrap();
    for answer in in_time("all are answered", waiting.join_all()).await {
        assert_eq!(answer.pending, 0);
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_is_bounded_where_one_asks_for_it() {
    let server = server(Settings { max_backlog: Some(10), ..Settings::default() }).await;
    let client = server.client();
    let tasks =
        |count: usize| (0..count).map(|_| NewTask::new("n", &j!(1), SpawnOptions::default()).unwrap()).collect();
    client.spawn_tasks(tasks(8)).await.unwrap();
    let mut grpc = server.raw().await;
    let task = pb::NewTask { task_name: "n".into(), ..Default::default() };
    let three = pb::SpawnTasksRequest { queue: "q".into(), tasks: vec![task.clone(), task.clone(), task.clone()] };
    let refused = grpc.spawn_tasks(three).await.unwrap_err();
    let (code, reason, delay) = refusal(&refused);
    assert_eq!((code, reason.as_str()), (Code::ResourceExhausted, "BACKLOG_FULL"));
    assert!(delay.is_some());
    client.spawn_tasks(tasks(2)).await.unwrap();
    let one = pb::SpawnTaskRequest { queue: "q".into(), task: Some(task) };
    assert_eq!(refusal(&grpc.spawn_task(one).await.unwrap_err()).1, "BACKLOG_FULL");
    // A worker catches up; the client has waited for that.
    let patient = tokio::spawn({
        let client = client.clone();
        async move { client.spawn_task("n", &j!(2), SpawnOptions::default()).await }
    });
    for _ in 0..5 {
        client
            .claim_task(absurd_client::ClaimOptions::default())
            .await
            .unwrap()
            .pop()
            .unwrap()
            .complete(&j!(1))
            .await
            .unwrap();
    }
    in_time("there is room again", patient).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn bounds_of_messages_can_be_set() {
    let settings = Settings {
        max_batch: Some(2),
        max_page: Some(5),
        max_json_depth: Some(3),
        max_request_bytes: Some(100_000),
        max_payload_bytes: Some(1000),
        ..Settings::default()
    };
    let server = server(settings).await;
    let mut grpc = server.raw().await;
    let task = |text: &str| pb::NewTask { task_name: "n".into(), params: json(text), ..Default::default() };
    let spawn = |task| pb::SpawnTaskRequest { queue: "q".into(), task: Some(task) };
    let deep = grpc.spawn_task(spawn(task("[[[[1]]]]"))).await.unwrap_err();
    assert_eq!(refusal(&deep).1, "JSON_INVALID");
    grpc.spawn_task(spawn(task("[[1]]"))).await.unwrap();
    let large = grpc.spawn_task(spawn(task(&format!("\"{}\"", "x".repeat(1000))))).await.unwrap_err();
    assert_eq!(refusal(&large).1, "PAYLOAD_TOO_LARGE");
    let larger = grpc.spawn_task(spawn(task(&format!("\"{}\"", "x".repeat(200_000))))).await.unwrap_err();
    assert_eq!(refusal(&larger).1, "PAYLOAD_TOO_LARGE");
    assert_eq!(larger.get_error_details().error_info().unwrap().metadata["limit"], "100000");
    let many = pb::SpawnTasksRequest { queue: "q".into(), tasks: vec![task("1"); 3] };
    assert_eq!(refusal(&grpc.spawn_tasks(many).await.unwrap_err()).1, "INVALID_ARGUMENT");
    let page = pb::ListTasksRequest { queue: "q".into(), page_size: 6, ..Default::default() };
    assert_eq!(refusal(&grpc.list_tasks(page).await.unwrap_err()).1, "INVALID_ARGUMENT");
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_are_bounded_and_silent_ones_are_cut() {
    let server = server(Settings { max_clients: Some(3), ..Settings::default() }).await;
    let addr = server.url().trim_start_matches("http://").to_owned();
    let began = Instant::now();
    let mut silent = Vec::new();
    for _ in 0..4 {
        silent.push(TcpStream::connect(&addr).await.unwrap());
    }
    let over = "absurd_connections_cut_total{why=\"limit\"}";
    eventually("one is over the bound", || async { (metric(&server, over).await >= 1.0).then_some(()) }).await;
    for socket in &mut silent {
        let mut rest = Vec::new();
        let _ = in_time("a silent connection ends", socket.read_to_end(&mut rest)).await;
    }
    assert!(began.elapsed() < Duration::from_secs(30));
    assert!(metric(&server, "absurd_connections_cut_total{why=\"silent\"}").await >= 1.0);
    let options = ConnectOptions::new(server.url());
    AbsurdClient::connect(&options).unwrap().with_queue("q").get_queue_stats().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_and_readiness_are_served_beside() {
    let server = server(Settings::default()).await;
    server.client().spawn_task("n", &j!(1), SpawnOptions::default()).await.unwrap();
    assert!(page(&server, "/livez").await.starts_with("HTTP/1.1 200"));
    assert!(page(&server, "/readyz").await.starts_with("HTTP/1.1 200"));
    assert!(metric(&server, "absurd_rpcs_total{method=\"SpawnTask\",code=\"OK\"}").await >= 1.0);
    let given_up = "absurd_rpcs_total{method=\"ClaimTask\",code=\"CANCELLED\"}";
    let before = metric(&server, given_up).await;
    let mut grpc = server.raw().await;
    let wait = Some(prost_types::Duration { seconds: 60, nanos: 0 });
    let empty = pb::ClaimTaskRequest { queue: "q".into(), wait, ..Default::default() };
    grpc.claim_task(empty.clone()).await.unwrap();
    tokio::time::timeout(Duration::from_millis(100), grpc.claim_task(empty)).await.unwrap_err();
    eventually("a call given up is counted as such", async || (metric(&server, given_up).await > before).then_some(()))
        .await;
    assert!(metric(&server, "absurd_batch_items_total{batch=\"spawn\"}").await >= 1.0);
    assert!(metric(&server, "absurd_database_connections_max{role=\"work\"}").await >= 1.0);
    assert!(page(&server, "/elsewhere").await.starts_with("HTTP/1.1 404"));
}

/// A worker that reads nothing loses what waits for it to others; its connection is cut.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_reads_nothing_is_given_up() {
    let settings = Settings {
        max_stall: Some(Span(Duration::from_secs(1))),
        heartbeat: Some(Span(Duration::from_secs(1))),
        ..Settings::default()
    };
    let server = server(settings).await;
    let mut raw = Attacker::connect(&server.url()).await.unwrap();
    // No window at all: nothing can be sent on its streams.
    raw.settings(&[(4, 0)]).await.unwrap();
    raw.claim_stream(1, &request(100)).await.unwrap();
    let large = "x".repeat(1000);
    let tasks = (0..20).map(|_| NewTask::new("n", &j!(large), SpawnOptions::default()).unwrap()).collect();
    server.client().spawn_tasks(tasks).await.unwrap();
    let mut stream = server
        .client()
        .claim_stream(absurd_client::StreamOptions { max_in_flight: 20, ..Default::default() })
        .await
        .unwrap();
    for _ in 0..20 {
        let task = in_time("the task comes to somebody who reads", stream.next()).await.unwrap();
        assert_eq!(task.attempt, 1, "no attempt is used up");
        task.complete(&j!(1)).await.unwrap();
    }
    in_time("the connection is cut", raw.end()).await;
    assert!(metric(&server, "absurd_connections_cut_total{why=\"stalled\"}").await >= 1.0);
}

/// Frames that ask for nothing, without end: the connection ends, the server does not.
async fn a_flood_ends_the_attacker(kind: Flood) {
    let server = server(Settings::default()).await;
    let mut raw = Attacker::connect(&server.url()).await.unwrap();
    let ended = in_time("the flood ends", raw.flood(kind)).await.unwrap();
    assert!(ended.is_some(), "{kind:?} was taken without end");
    server.client().get_queue_stats().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_pings_ends_the_attacker() {
    a_flood_ends_the_attacker(Flood::Ping).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_settings_ends_the_attacker() {
    a_flood_ends_the_attacker(Flood::Settings).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_resets_ends_the_attacker() {
    a_flood_ends_the_attacker(Flood::Reset).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_continuations_ends_the_attacker() {
    a_flood_ends_the_attacker(Flood::Continuation).await;
}

/// Bytes that are no HTTP/2, and a header that is far too long, end a connection and not the server.
#[tokio::test(flavor = "multi_thread")]
async fn garbage_ends_the_connection() {
    let server = server(Settings::default()).await;
    for length in [0, 1, 9, 24, 100, 10_000] {
        let mut socket = TcpStream::connect(server.url().trim_start_matches("http://")).await.unwrap();
        let garbage: Vec<u8> = (0..=u8::MAX).cycle().take(length).map(|byte| byte.wrapping_mul(31)).collect();
        let _ = socket.write_all(&garbage).await;
        let _ = socket.shutdown().await;
        let mut rest = Vec::new();
        let _ = in_time("the session ends", socket.read_to_end(&mut rest)).await;
    }
    let headers = "y".repeat(100_000);
    let mut grpc = server.raw().await;
    let mut bomb = tonic::Request::new(pb::GetQueueStatsRequest { queue: "q".into() });
    bomb.metadata_mut().insert("x-bomb", headers.parse().unwrap());
    assert!(in_time("a header bomb is answered", grpc.get_queue_stats(bomb)).await.is_err());
    server.client().get_queue_stats().await.unwrap();
}

/// Hundreds of calls that run out of time together are bad luck, not an attack: what else is on their connection goes on.
#[tokio::test(flavor = "multi_thread")]
async fn calls_given_up_together_end_no_connection() {
    let server = server(Settings::default()).await;
    let mut raw = Attacker::connect(&server.url()).await.unwrap();
    assert!(in_time("the connection says something", raw.give_up(800)).await.unwrap());
}

/// Thousands of tiny requests at once on one connection are work, not an attack.
#[tokio::test(flavor = "multi_thread")]
async fn a_burst_of_tiny_requests_is_answered() {
    let server = server(Settings::default()).await;
    let grpc = server.raw().await;
    let calls = (0..5000).map(|_| {
        let mut grpc = grpc.clone();
        async move { grpc.get_queue_stats(pb::GetQueueStatsRequest { queue: "q".into() }).await }
    });
    let answers = in_time("all are answered", futures_util::future::join_all(calls)).await;
    let refused: Vec<_> = answers.into_iter().filter_map(Result::err).collect();
    assert!(refused.iter().all(|status| status.code() == Code::ResourceExhausted), "{:?}", refused.first());
    server.client().get_queue_stats().await.unwrap();
}

/// Many large requests at once on one connection are work too; one that is far too large hurts nobody beside it.
#[tokio::test(flavor = "multi_thread")]
async fn a_burst_of_large_requests_is_answered() {
    let server = server(Settings::default()).await;
    let grpc = server.raw().await.max_encoding_message_size(usize::MAX);
    let spawn = |bytes: usize| {
        let task = pb::NewTask {
            task_name: "n".into(),
            params: json(format!("\"{}\"", "x".repeat(bytes))),
            ..Default::default()
        };
        let mut grpc = grpc.clone();
        async move { grpc.spawn_task(pb::SpawnTaskRequest { queue: "q".into(), task: Some(task) }).await }
    };
    let (huge, answers) = in_time("all are answered", async {
        tokio::join!(spawn(100 * 1024 * 1024), futures_util::future::join_all((0..40).map(|_| spawn(1_000_000))))
    })
    .await;
    for answer in answers {
        answer.unwrap();
    }
    assert_eq!(refusal(&huge.unwrap_err()).1, "PAYLOAD_TOO_LARGE");
}
