//! Several replicas on one database, and a client that uses them all.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use absurd_client::{AbsurdClient, ConnectOptions, SpawnOptions, State, StreamOptions};
use absurd_tests::{Absurd, Database, Server, absurd, eventually, in_time};
use serde_json::json as j;

use crate::streams::{complete, next_task, open, seconds};

/// A task claimed at one replica is completed at the other, and the first one's stream gets the next one. Hints bring that about:
/// the one that a task was spawned, and the one that the credit is free.
#[tokio::test(flavor = "multi_thread")]
async fn a_completion_at_another_replica_returns_the_credit() {
    let one = Server::start_on_hints(&Database::new().await).await;
    let two = Server::start_on_hints(one.database()).await;
    let mut stream = one.client().claim_stream(StreamOptions::default()).await.unwrap();
    let elsewhere = two.client();
    for _ in 0..5 {
        elsewhere.spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap();
        let task = in_time("the task is pushed by the other replica", stream.next()).await.unwrap();
        let mut grpc = two.raw().await;
        grpc.complete_task(absurd_client::proto::CompleteTaskRequest {
            queue: "q".into(),
            run_id: String::new(),
            claim_token: Some(task.claim_token().to_owned()),
            result: None,
        })
        .await
        .unwrap();
    }
}

/// A worker that works on its first step and speaks only to the other replica is no silent one: it keeps its claim.
#[tokio::test(flavor = "multi_thread")]
async fn a_sign_of_life_at_another_replica_counts() {
    use absurd_client::proto as pb;
    let one = Server::start().await;
    let two = Server::start_on(one.database()).await;
    let (mut here, mut there) = (one.raw().await, two.raw().await);
    let spawned = one.client().spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap();
    let request = pb::ClaimStreamRequest {
        queue: "q".into(),
        worker_id: "w".into(),
        start_deadline: seconds(1),
        max_in_flight: 1,
        ..Default::default()
    };
    let (_, mut messages) = open(&mut here, request).await;
    let task = next_task(&mut messages).await;
    let step = pb::SetCheckpointRequest {
        queue: "q".into(),
        claim_token: Some(task.claim_token.clone()),
        checkpoint_name: "s".into(),
        state: absurd_tests::json("1"),
        ..Default::default()
    };
    there.set_checkpoint(step).await.unwrap();
    // Past the deadline, and past what the replica needs to give a claim back.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    complete(&mut there, &task).await;
    let run = one.client().get_run_status(spawned.run_id).await.unwrap().unwrap();
    assert_eq!((run.state, run.attempt), (State::Completed, 1));
}

/// The same, where what the worker says changes nothing in the database: the other replica passes it on.
#[tokio::test(flavor = "multi_thread")]
async fn a_sign_of_life_without_a_trace_is_passed_on() {
    use absurd_client::proto as pb;
    // The second one sees the first one as it starts, and is where the worker speaks.
    let one = Server::start_on_hints(&Database::new().await).await;
    let two = Server::start_on_hints(one.database()).await;
    let client = one.client();
    let spawned = client.spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap();
    client.emit_event("e", &j!(1)).await.unwrap();
    let first = client.claim_task(absurd_client::ClaimOptions::default()).await.unwrap().pop().unwrap();
    first.await_event("wait", "e", None).await.unwrap();
    first.release(Duration::ZERO).await.unwrap();
    // What was said under the first claim must not be heard under the second one.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let request = pb::ClaimStreamRequest {
        queue: "q".into(),
        worker_id: "w".into(),
        start_deadline: seconds(1),
        max_in_flight: 1,
        ..Default::default()
    };
    let (mut here, mut there) = (one.raw().await, two.raw().await);
    let (_, mut messages) = open(&mut here, request).await;
    let task = next_task(&mut messages).await;
    let again = pb::AwaitEventRequest {
        queue: "q".into(),
        claim_token: Some(task.claim_token.clone()),
        step_name: "wait".into(),
        event_name: "e".into(),
        ..Default::default()
    };
    there.await_event(again).await.unwrap();
    tokio::time::sleep(Duration::from_millis(2500)).await;
    complete(&mut there, &task).await;
    let run = client.get_run_status(spawned.run_id).await.unwrap().unwrap();
    assert_eq!((run.state, run.attempt), (State::Completed, 1));
}

async fn serve(database: &Database) -> (Absurd, String) {
    let mut command = absurd(&["serve", "--listen", "127.0.0.1:0", "--shutdown-grace", "10s"]);
    command.env("ABSURD_DATABASE_URL", database.url()).env("NO_COLOR", "1");
    let mut server = Absurd::start(command);
    let line = server.line("serving").await;
    let addr = line.rsplit("listen=").next().unwrap().trim().to_owned();
    (server, format!("http://{addr}"))
}

/// Two replicas, four workers and a producer of 1,000 tasks; one replica gets a signal in the midst of it. Every spawn and
/// every completion succeeds in the end, and every task is completed. Returns the database, and how long the replica
/// took to end with which exit code.
async fn signal_under_load(signal: &str, claim_timeout: Duration) -> (Database, Option<i32>, Duration) {
    let database = Database::new().await;
    let (one, url_one) = serve(&database).await;
    let (_two, url_two) = serve(&database).await;
    let client = AbsurdClient::connect(&ConnectOptions::new(format!("{url_one},{url_two}"))).unwrap().with_queue("q");
    client.create_queue().await.unwrap();
    let done = Arc::new(AtomicUsize::new(0));
    let mut workers = Vec::new();
    for _ in 0..4 {
        let options = StreamOptions { max_in_flight: 10, claim_timeout, ..StreamOptions::default() };
        let mut stream = client.claim_stream(options).await.unwrap();
        let done = Arc::clone(&done);
        workers.push(tokio::spawn(async move {
            while let Some(task) = stream.next().await {
                let done = Arc::clone(&done);
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    task.complete(&j!(1)).await.expect("no completion fails in the end");
                    done.fetch_add(1, Ordering::Relaxed);
                });
            }
        }));
    }
    let producer = tokio::spawn({
        let client = client.clone();
        async move {
            let mut spawned = Vec::new();
            for index in 0..1000 {
                let options = SpawnOptions { max_attempts: Some(3), ..SpawnOptions::default() };
                spawned.push(client.spawn_task("n", &j!(index), options).await.expect("no spawn fails").task_id);
            }
            spawned
        }
    });
    eventually("the load is in full flow", || async { (done.load(Ordering::Relaxed) > 200).then_some(()) }).await;
    assert!(!producer.is_finished(), "the signal must come while tasks are spawned");
    one.signal(signal);
    let signalled = std::time::Instant::now();
    let code = one.exit_code().await;
    let took = signalled.elapsed();
    let spawned = in_time("all are spawned", producer).await.unwrap();
    for task_id in spawned {
        let end = client.await_task_result(task_id, Some(absurd_tests::PATIENCE)).await.unwrap();
        assert_eq!(end.state, State::Completed);
    }
    for worker in workers {
        worker.abort();
    }
    (database, code, took)
}

/// One of two replicas is stopped under load: it exits in time, no call fails in the end, no attempt is spent.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_stops_under_load_and_nobody_notices() {
    let (database, code, took) = signal_under_load("TERM", Duration::from_secs(30)).await;
    assert_eq!(code, Some(0));
    assert!(took < Duration::from_secs(12), "{took:?}");
    let sql = database.connect().await;
    let retried: i64 = sql.query_one("select count(*) from absurd.r_q where attempt > 1", &[]).await.unwrap().get(0);
    assert_eq!(retried, 0, "no attempt is spent");
}

/// One of two replicas is killed under load: what it had claimed and not delivered comes back when its lease ends;
/// nothing that was acknowledged is lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_is_killed_under_load_and_nothing_is_lost() {
    let (database, code, _) = signal_under_load("KILL", Duration::from_secs(2)).await;
    assert_eq!(code, None);
    let sql = database.connect().await;
    let counts = "select count(*), count(*) filter (where state = 'completed'), max(attempts) from absurd.t_q";
    let row = sql.query_one(counts, &[]).await.unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (1000, 1000), "one task per spawn, each completed once");
    assert!(row.get::<_, i32>(2) <= 2, "the kill costs a run one attempt at most");
}

/// A worker that says so before it stops gets no more tasks, wherever its stream is, and its leases are not cut short.
#[tokio::test(flavor = "multi_thread")]
async fn a_drained_worker_gets_no_more_and_keeps_its_leases() {
    use crate::streams::{next, next_task, open, request, seconds};
    use absurd_proto::v1 as pb;
    use absurd_proto::v1::claim_stream_response::Message;
    let one = Server::start().await;
    let two = Server::start_on(one.database()).await;
    let sql = one.database().connect().await;
    eventually("the replicas know of each other", || async {
        let seen: i64 = sql.query_one("select count(*) from absurd_server.replica", &[]).await.unwrap().get(0);
        (seen == 2).then_some(())
    })
    .await;
    let client = one.client();
    let spawn = async || client.spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap();
    let mut grpc = one.raw().await;
    let asked = pb::ClaimStreamRequest {
        session_id: "worker-1".into(),
        reconnect_grace: seconds(1),
        claim_timeout: seconds(60),
        ..request(5)
    };
    let (_, mut messages) = open(&mut grpc, asked).await;
    spawn().await;
    let held = next_task(&mut messages).await;
    // The other replica is asked; it passes the word on. Asked again, nothing more happens.
    let drain = pb::DrainWorkerRequest { queue: "q".into(), session_id: "worker-1".into() };
    let asked = two.raw().await.drain_worker(drain.clone()).await.unwrap().into_inner();
    assert!(!asked.ended, "its stream is not there");
    let ending = async {
        loop {
            if let Message::Ending(ending) = next(&mut messages).await {
                return ending.reason();
            }
        }
    };
    assert_eq!(in_time("the stream's end is announced", ending).await, pb::EndReason::Drained);
    assert!(in_time("the stream ends", messages.message()).await.unwrap().is_none());
    assert!(!grpc.drain_worker(drain).await.unwrap().into_inner().ended);
    spawn().await;
    drop(messages);
    let mut other = client.claim_stream(StreamOptions::default()).await.unwrap();
    in_time("the next task goes elsewhere", other.next()).await.unwrap().complete(&j!(1)).await.unwrap();
    let left = "select extract(epoch from claim_expires_at - now())::float8 from absurd.r_q where run_id::text = $1";
    let left: f64 = sql.query_one(left, &[&held.run_id]).await.unwrap().get(0);
    assert!(left > 30.0, "{left} s: the lease was cut to the grace of a lost worker");
    let wrong = pb::DrainWorkerRequest { queue: "q".into(), session_id: String::new() };
    assert!(grpc.drain_worker(wrong).await.unwrap_err().message().contains("session_id"));
}
