//! Claim streams on the wire: what comes first, credit, what comes back, how streams end.

use std::time::Duration;

use absurd_client::{ClaimOptions, NewTask, SpawnOptions};
use absurd_proto::v1 as pb;
use absurd_proto::v1::claim_stream_response::Message;
use absurd_server::settings::{Settings, Span};
use absurd_tests::{Database, Grpc, Server, ServerOptions, eventually, in_time};
use serde_json::json as j;
use tonic::{Code, Streaming};
use tonic_types::StatusExt as _;

pub(crate) type Messages = Streaming<pb::ClaimStreamResponse>;

pub(crate) fn request(max_in_flight: i32) -> pb::ClaimStreamRequest {
    pb::ClaimStreamRequest { queue: "q".into(), worker_id: "w".into(), max_in_flight, ..Default::default() }
}

pub(crate) fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

pub(crate) async fn open(grpc: &mut Grpc, request: pb::ClaimStreamRequest) -> (pb::StreamOpened, Messages) {
    let mut messages = in_time("the stream opens", grpc.claim_stream(request)).await.unwrap().into_inner();
    match next(&mut messages).await {
        Message::Opened(opened) => (opened, messages),
        other => panic!("opened must be the first message, not {other:?}"),
    }
}

async fn next_of_any_kind(messages: &mut Messages) -> Message {
    in_time("a message arrives", messages.message()).await.unwrap().expect("no end yet").message.unwrap()
}

/// The next message that is no heartbeat.
pub(crate) async fn next(messages: &mut Messages) -> Message {
    loop {
        match next_of_any_kind(messages).await {
            Message::Heartbeat(_) => {}
            message => return message,
        }
    }
}

pub(crate) async fn next_task(messages: &mut Messages) -> pb::ClaimedTask {
    let arrives = async {
        loop {
            if let Message::Task(task) = next(messages).await {
                return task;
            }
        }
    };
    in_time("a task arrives", arrives).await
}

pub(crate) async fn complete(grpc: &mut Grpc, task: &pb::ClaimedTask) {
    let request = pb::CompleteTaskRequest {
        queue: task.queue.clone(),
        run_id: String::new(),
        claim_token: Some(task.claim_token.clone()),
        result: None,
    };
    grpc.complete_task(request).await.unwrap();
}

async fn spawn(server: &Server, count: usize) {
    let tasks = (0..count).map(|index| NewTask::new("n", &j!(index), SpawnOptions::default()).unwrap()).collect();
    server.client().spawn_tasks(tasks).await.unwrap();
}

async fn count(server: &Server, condition: &str) -> i64 {
    let sql = server.database().connect().await;
    sql.query_one(&format!("select count(*) from absurd.r_q where {condition}"), &[]).await.unwrap().get(0)
}

fn with(settings: Settings) -> ServerOptions {
    ServerOptions { settings, ..ServerOptions::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn opened_comes_first_with_the_servers_values() {
    let server = Server::start().await;
    let mut grpc = server.raw().await;
    let asked = pb::ClaimStreamRequest {
        start_deadline: seconds(5),
        reconnect_grace: seconds(7),
        claim_timeout: seconds(60),
        ..request(3)
    };
    let (opened, _messages) = open(&mut grpc, asked).await;
    assert!(!opened.session_id.is_empty() && !opened.stream_id.is_empty() && !opened.server_id.is_empty());
    assert_eq!(opened.max_in_flight, 3);
    assert_eq!(opened.claim_timeout, seconds(60));
    assert_eq!(opened.extend_interval, seconds(20));
    assert_eq!(opened.heartbeat_interval, seconds(15));
    assert_eq!((opened.start_deadline, opened.reconnect_grace), (seconds(5), seconds(7)));
    let age = opened.max_stream_age.unwrap().seconds;
    assert!((24 * 60..=36 * 60).contains(&age), "30 min, less or more by a fifth: {age} s");
}

#[tokio::test(flavor = "multi_thread")]
async fn credit_is_never_exceeded_and_comes_back() {
    let server = Server::start().await;
    let mut grpc = server.raw().await;
    spawn(&server, 30).await;
    let (_, mut messages) = open(&mut grpc, request(3)).await;
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(next_task(&mut messages).await);
    }
    let mut done = 0;
    while done < 30 {
        assert!(count(&server, "state = 'running'").await <= 3);
        complete(&mut grpc, &held.remove(0)).await;
        done += 1;
        if done + held.len() < 30 {
            held.push(next_task(&mut messages).await);
        }
    }
    assert_eq!(count(&server, "state = 'completed' and attempt = 1").await, 30);
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_come_in_order_and_spread_over_streams() {
    let server = Server::start().await;
    let mut grpc = server.raw().await;
    let (_, mut one) = open(&mut grpc, request(2)).await;
    let (_, mut two) = open(&mut grpc, request(2)).await;
    spawn(&server, 4).await;
    let mut seen = Vec::new();
    for messages in [&mut one, &mut two] {
        for _ in 0..2 {
            seen.push(next_task(messages).await.params.unwrap().text.parse::<i32>().unwrap());
        }
    }
    seen.sort_unstable();
    assert_eq!(seen, [0, 1, 2, 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_filter_takes_only_its_names_and_blocks_nobody() {
    let server = Server::start().await;
    let mut grpc = server.raw().await;
    let client = server.client();
    // More of another name in front than one look covers.
    for _ in 0..3 {
        let tasks =
            (0..1000).map(|index| NewTask::new("other", &j!(index), SpawnOptions::default()).unwrap()).collect();
        client.spawn_tasks(tasks).await.unwrap();
    }
    let wanted = client.spawn_task("wanted", &j!(null), SpawnOptions::default()).await.unwrap();
    let filtered = pb::ClaimStreamRequest { task_names: vec!["wanted".into()], ..request(5) };
    let (_, mut messages) = open(&mut grpc, filtered).await;
    assert_eq!(next_task(&mut messages).await.task_id, wanted.task_id.to_string());
    assert_eq!(count(&server, "state = 'pending'").await, 3000, "the others are as they were");
    // And one that comes later is found as well.
    let later = client.spawn_task("wanted", &j!(null), SpawnOptions::default()).await.unwrap();
    assert_eq!(next_task(&mut messages).await.task_id, later.task_id.to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn heartbeats_come_and_the_age_ends_a_stream_politely() {
    let settings = Settings {
        heartbeat: Some(Span(Duration::from_millis(100))),
        stream_age: Some(Span(Duration::from_millis(800))),
        ..Settings::default()
    };
    let server = Server::start_with(Database::new().await, with(settings)).await;
    let mut grpc = server.raw().await;
    let (_, mut messages) = open(&mut grpc, request(2)).await;
    let first = next_of_any_kind(&mut messages).await;
    assert!(matches!(first, Message::Heartbeat(heartbeat) if heartbeat.credit == 2), "the first one comes at once");
    let mut heartbeats = 0;
    let ending = loop {
        match next_of_any_kind(&mut messages).await {
            Message::Heartbeat(heartbeat) => {
                assert_eq!((heartbeat.in_flight, heartbeat.credit), (0, 2));
                heartbeats += 1;
            }
            Message::Ending(ending) => break ending,
            other => panic!("unexpected {other:?}"),
        }
    };
    assert!(heartbeats >= 2, "{heartbeats}");
    assert_eq!(ending.reason(), pb::EndReason::MaxAge);
    assert!(messages.message().await.unwrap().is_none(), "status OK follows");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_stream_of_a_session_supersedes_the_older_one() {
    let server = Server::start().await;
    let mut grpc = server.raw().await;
    let (opened, mut older) = open(&mut grpc, request(2)).await;
    spawn(&server, 1).await;
    let held = next_task(&mut older).await;
    let again = pb::ClaimStreamRequest {
        session_id: opened.session_id.clone(),
        held_claim_tokens: vec![held.claim_token.clone(), "garbage".into()],
        ..request(1)
    };
    let (opened, mut newer) = open(&mut grpc, again).await;
    let verdicts: Vec<pb::Verdict> = opened.held.iter().map(pb::ClaimVerdict::verdict).collect();
    assert_eq!(verdicts, [pb::Verdict::Held, pb::Verdict::Invalid]);
    let Message::Ending(ending) = next(&mut older).await else { panic!("the older one ends") };
    assert_eq!(ending.reason(), pb::EndReason::Superseded);
    // The held run counts as in flight: no credit until it ends.
    spawn(&server, 1).await;
    complete(&mut grpc, &held).await;
    assert_ne!(next_task(&mut newer).await.task_id, held.task_id);
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_a_queue_ends_its_streams() {
    let server = Server::start().await;
    let mut grpc = server.raw().await;
    let (_, mut messages) = open(&mut grpc, request(1)).await;
    server.client().drop_queue().await.unwrap();
    let end = in_time("the stream ends", async {
        loop {
            match messages.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the end must say why"),
                Err(status) => return status,
            }
        }
    })
    .await;
    assert_eq!(end.code(), Code::NotFound);
    assert_eq!(end.get_error_details().error_info().unwrap().reason, "QUEUE_NOT_FOUND");
    // Dropped by SQL it is the tick that notices.
    server.client().create_queue().await.unwrap();
    let (_, mut messages) = open(&mut grpc, request(1)).await;
    server.database().connect().await.execute("select absurd.drop_queue('q')", &[]).await.unwrap();
    let end = in_time("the stream ends", async { while let Ok(Some(_)) = messages.message().await {} });
    end.await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_with_no_sign_of_life_is_given_back() {
    let server = Server::start().await;
    let mut grpc = server.raw().await;
    spawn(&server, 1).await;
    let deadline = pb::ClaimStreamRequest { start_deadline: seconds(1), ..request(1) };
    let (_, mut deaf) = open(&mut grpc, deadline).await;
    let first = next_task(&mut deaf).await;
    let again = next_task(&mut deaf).await;
    assert_eq!((first.run_id.as_str(), first.attempt), (again.run_id.as_str(), again.attempt), "no attempt is spent");
    assert_ne!(first.claim_token, again.claim_token, "but the old claim is worth nothing");
    // A sign of life keeps it: the lease counts from then on.
    let extend = pb::ExtendClaimRequest {
        queue: "q".into(),
        run_id: String::new(),
        claim_token: Some(again.claim_token.clone()),
        extend_by: seconds(60),
    };
    grpc.extend_claim(extend).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    complete(&mut grpc, &again).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_kills_three_workers_in_a_row_fails() {
    let server = Server::start().await;
    let client = server.client();
    let mut grpc = server.raw().await;
    let spawned = client.spawn_task("killer", &j!(null), SpawnOptions::default()).await.unwrap();
    let deadline = pb::ClaimStreamRequest { start_deadline: seconds(1), ..request(1) };
    for _ in 0..3 {
        let (_, mut messages) = open(&mut grpc, deadline.clone()).await;
        assert_eq!(next_task(&mut messages).await.task_id, spawned.task_id.to_string());
        // The worker dies.
    }
    let end = client.await_task_result(spawned.task_id, Some(absurd_tests::PATIENCE)).await.unwrap();
    assert_eq!(end.state, absurd_client::State::Failed);
    assert!(end.failure.unwrap().as_str().contains("$ClaimTimeout"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_whose_reply_nobody_sees_is_given_back() {
    let server = Server::start().await;
    spawn(&server, 1).await;
    let mut grpc = server.raw().await;
    let claim = pb::ClaimTaskRequest { queue: "q".into(), start_deadline: seconds(1), ..Default::default() };
    let lost = grpc.claim_task(claim.clone()).await.unwrap().into_inner().tasks.remove(0);
    let long_poll = pb::ClaimTaskRequest { wait: seconds(30), ..claim };
    let found = in_time("it comes back", grpc.claim_task(long_poll)).await.unwrap().into_inner().tasks.remove(0);
    assert_eq!((lost.run_id, lost.attempt), (found.run_id, found.attempt));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_poll_gets_the_task_when_it_comes() {
    let server = Server::start().await;
    let client = server.client();
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.claim_task(ClaimOptions { wait: Duration::from_secs(50), ..Default::default() }).await }
    });
    let none = client.claim_task(ClaimOptions::default()).await.unwrap();
    assert!(none.is_empty());
    let spawned = client.spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap();
    let claimed = in_time("the poll is answered", waiting).await.unwrap().unwrap();
    assert_eq!(claimed[0].task_id, spawned.task_id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_dropped_loses_nothing() {
    let server = Server::start().await;
    let mut grpc = server.raw().await;
    let unread = pb::ClaimStreamRequest { start_deadline: seconds(1), ..request(100) };
    let (_, messages) = open(&mut grpc, unread).await;
    spawn(&server, 50).await;
    // Not one is read: what has reached the transport comes back with its start deadline, the others at once.
    drop(messages);
    drop(grpc);
    let mut grpc = server.raw().await;
    let claim_all = pb::ClaimStreamRequest { claim_timeout: seconds(60), ..request(100) };
    let (_, mut messages) = open(&mut grpc, claim_all).await;
    let mut seen = std::collections::HashSet::new();
    while seen.len() < 50 {
        let task = next_task(&mut messages).await;
        complete(&mut grpc, &task).await;
        seen.insert(task.task_id);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_server_ends_streams_and_gives_back_what_nobody_took() {
    let server = Server::start().await;
    let database = server.database().clone();
    let mut grpc = server.raw().await;
    let (_, mut messages) = open(&mut grpc, request(1)).await;
    spawn(&server, 3).await;
    let held = next_task(&mut messages).await;
    let stopping = tokio::spawn(server.stop());
    let Message::Ending(ending) = next(&mut messages).await else { panic!("an ending comes first") };
    assert_eq!(ending.reason(), pb::EndReason::ServerShutdown);
    assert!(messages.message().await.unwrap().is_none());
    in_time("the server stops", stopping).await.unwrap();
    let sql = database.connect().await;
    let rows =
        sql.query("select state, attempt from absurd.r_q where run_id::text <> $1", &[&held.run_id]).await.unwrap();
    assert_eq!(rows.len(), 2);
    assert!(rows.iter().all(|row| row.get::<_, &str>(0) == "pending" && row.get::<_, i32>(1) == 1));
    // The claim that was taken still stands, and completes at another replica.
    let other = Server::start_on(&database).await;
    complete(&mut other.raw().await, &held).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_too_large_for_a_stream_is_put_off_not_lost() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    let mut grpc = server.raw().await;
    let (_, mut small) = open(&mut grpc, request(10)).await;
    sql.execute("select absurd.spawn_task('q', 'huge', to_jsonb(repeat('x', 5 * 1024 * 1024)))", &[]).await.unwrap();
    let sleeping = eventually("the huge task is put off", || async {
        sql.query_opt("select available_at - now() > '10 s', attempt from absurd.r_q where state = 'sleeping'", &[])
            .await
            .unwrap()
    })
    .await;
    assert_eq!((sleeping.get::<_, bool>(0), sleeping.get::<_, i32>(1)), (true, 1));
    // The chore forgets entries of runs that have moved on; a task that is put off is as large as before, and its entry stays.
    sql.batch_execute("select absurd_server.quarantine_forget()").await.unwrap();
    let told = "select reason, problem from absurd_server.quarantine where queue_name = 'q'";
    let told = sql.query_one(told, &[]).await.unwrap();
    assert_eq!(told.get::<_, &str>(0), "size");
    assert!(told.get::<_, &str>(1).contains("more than the stream takes"), "{told:?}");
    spawn(&server, 1).await;
    assert_eq!(next_task(&mut small).await.task_name, "n", "the stream lives on");
    // It is for whoever takes large messages, or reads the params himself.
    sql.batch_execute("update absurd.r_q set available_at = now() where state = 'sleeping'").await.unwrap();
    drop(small);
    let omitting = pb::ClaimStreamRequest { accepts_omitted_params: true, ..request(1) };
    let (_, mut messages) = open(&mut grpc, omitting).await;
    let task = next_task(&mut messages).await;
    assert!(task.params_omitted && task.params.is_none());
    assert_eq!(task.params_bytes, 5 * 1024 * 1024 + 2);
    let read = pb::GetTaskStatusRequest {
        queue: "q".into(),
        task_id: task.task_id.clone(),
        params_range: Some(pb::TextRange { offset: 5 * 1024 * 1024 - 1, limit: 1_000_000 }),
        result_range: None,
    };
    let page = grpc.get_task_status(read).await.unwrap().into_inner();
    assert_eq!(page.task.unwrap().params.unwrap().text, "xx\"");
    let release = pb::ReleaseClaimsRequest {
        queue: "q".into(),
        claims: vec![pb::ClaimRef { run_id: String::new(), claim_token: Some(task.claim_token) }],
        delay: None,
    };
    grpc.release_claims(release).await.unwrap();
    drop(messages);
    let large = pb::ClaimStreamRequest { max_message_bytes: 8 * 1024 * 1024, ..request(1) };
    let (_, mut messages) = open(&mut grpc, large).await;
    assert_eq!(next_task(&mut messages).await.params.unwrap().text.len(), 5 * 1024 * 1024 + 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_takes_only_so_many_streams() {
    let settings = Settings { max_streams: Some(2), ..Settings::default() };
    let server = Server::start_with(Database::new().await, with(settings)).await;
    let mut grpc = server.raw().await;
    let (_, first) = open(&mut grpc, request(1)).await;
    let (_, _second) = open(&mut grpc, request(1)).await;
    let refused = grpc.claim_stream(request(1)).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.get_error_details().retry_info().is_some());
    drop(first);
    eventually("the place is free again", || {
        let mut grpc = grpc.clone();
        async move { grpc.claim_stream(request(1)).await.ok() }
    })
    .await;
}

/// The note that a claim has ended returns that claim's credit only: a run that is claimed again since keeps its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_late_note_of_an_ended_claim_frees_no_newer_one() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    let mut grpc = server.raw().await;
    spawn(&server, 4).await;
    let (_, mut messages) = open(&mut grpc, request(2)).await;
    let (first, second) = (next_task(&mut messages).await, next_task(&mut messages).await);
    // As other replicas write it: the run, and the digest of its claim.
    let note = "select pg_notify('absurd_server', 'l' || rtrim(translate(encode(uuid_send(r.run_id) || case when $2
                  then decode(translate(split_part(r.claimed_by, '#', 2), '-_', '+/') || '==', 'base64')
                  else uuid_send(gen_random_uuid()) end, 'base64'), '+/' || chr(10), '-_'), '='))::text
                  from absurd.r_q r where r.run_id::text = $1";
    for (task, ended) in [(&first, false), (&second, true)] {
        sql.query_one(note, &[&task.run_id, &ended]).await.unwrap();
    }
    next_task(&mut messages).await;
    // Notes are heard in their order: were the first one believed, the last task would be claimed as well.
    let left = server.client().claim_task(ClaimOptions::default()).await.unwrap();
    assert_eq!(left.len(), 1);
}

/// What cannot be read, written past every rule by plain SQL, ends no queue: once it is mended, the open stream goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_cannot_be_read_holds_up_nobody() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    sql.batch_execute(
        "alter table absurd.t_q alter column params drop not null;
         select absurd.spawn_task('q', 'n', '1'); update absurd.t_q set params = null;
         select absurd.spawn_task('q', 'n', '2');",
    )
    .await
    .unwrap();
    let mut grpc = server.raw().await;
    let (_, mut messages) = open(&mut grpc, request(2)).await;
    assert_eq!(next_task(&mut messages).await.params.unwrap().text, "2");
    eventually("the first one was given back and is set aside", || async {
        let aside = "select exists (select from absurd_server.quarantine q join absurd.r_q r using (run_id)
                                     where q.reason = 'claim' and r.state = 'pending' and r.attempt = 1)";
        sql.query_one(aside, &[]).await.unwrap().get::<_, bool>(0).then_some(())
    })
    .await;
    sql.batch_execute("update absurd.t_q set params = '3' where params is null").await.unwrap();
    assert_eq!(next_task(&mut messages).await.params.unwrap().text, "3");
}

/// A generated client extends leases only every ten seconds: until then it gets what it asked for, however large.
#[tokio::test(flavor = "multi_thread")]
async fn max_in_flight_is_the_only_window() {
    let settings = Settings { heartbeat: Some(Span(Duration::from_millis(300))), ..Settings::default() };
    let server = Server::start_with(Database::new().await, ServerOptions { settings, ..Default::default() }).await;
    let mut grpc = server.raw().await;
    // Ten that fit into an outbox together, and thirty that do not.
    for (count, bytes) in [(10, 400_000), (30, 1_000_000)] {
        let (_, mut messages) = open(&mut grpc, request(count + 2)).await;
        for index in 0..count {
            let params = j!({"index": index, "x": "y".repeat(bytes)});
            server.client().spawn_task("big", &params, SpawnOptions::default()).await.unwrap();
        }
        for _ in 0..count {
            next_task(&mut messages).await;
        }
        let told = async {
            loop {
                if let Message::Heartbeat(heartbeat) = next_of_any_kind(&mut messages).await
                    && heartbeat.in_flight == count
                {
                    return heartbeat;
                }
            }
        };
        assert_eq!(in_time("a heartbeat comes", told).await.credit, 2, "max_in_flight less what is in flight");
    }
}
