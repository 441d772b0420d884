//! Direct hand-over: a task that a worker waits for is claimed as it is spawned; its run was never anything but running.

use std::time::Duration;

use absurd_client::{CancellationRules, NewTask, SpawnOptions, StreamOptions};
use absurd_proto::v1 as pb;
use absurd_tests::{Grpc, OwnCluster, Server, in_time};
use serde_json::json as j;
use uuid::Uuid;

use crate::faults::{standby, waiting_session};
use crate::streams::{Messages, complete, next_task, open, request, seconds};

/// Runs that were claimed by the statement that made them, and runs that waited first.
async fn handed_and_waited(server: &Server) -> (i64, i64) {
    let sql = server.database().connect().await;
    let query =
        "select count(*) filter (where started_at = created_at), count(*) filter (where started_at > created_at)
                   from absurd.r_q";
    let row = sql.query_one(query, &[]).await.unwrap();
    (row.get(0), row.get(1))
}

/// A stream on a queue where nothing is left to look for: from here on tasks are handed over. While its dispatcher looks
/// around (after a stream opens, and at times during the first half second of idleness) they are claimed in the usual way.
async fn idle_stream(server: &Server, grpc: &mut Grpc, asked: pb::ClaimStreamRequest) -> Messages {
    let (_, mut messages) = open(grpc, asked).await;
    let sql = server.database().connect().await;
    let mut in_a_row = 0;
    while in_a_row < 20 {
        server.client().spawn_task("warm", &j!(null), SpawnOptions::default()).await.unwrap();
        let task = next_task(&mut messages).await;
        complete(grpc, &task).await;
        let handed =
            sql.query_one("select started_at = created_at from absurd.r_q order by created_at desc limit 1", &[]);
        in_a_row = if handed.await.unwrap().get(0) { in_a_row + 1 } else { 0 };
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    sql.batch_execute("truncate absurd.r_q, absurd.t_q").await.unwrap();
    messages
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_worker_gets_a_task_in_the_commit_that_spawns_it() {
    let server = Server::start().await;
    let client = server.client();
    let mut grpc = server.raw().await;
    let asked = pb::ClaimStreamRequest { claim_timeout: seconds(60), ..request(9) };
    let mut messages = idle_stream(&server, &mut grpc, asked).await;
    let params = j!({"b": [1, 2.50], "a": "x"});
    let options = SpawnOptions { headers: j!({"h": 1}).as_object().cloned().unwrap(), ..SpawnOptions::default() };
    let spawned = client.spawn_task("n", &params, options).await.unwrap();
    let pushed = next_task(&mut messages).await;
    let task = pushed.clone();
    assert_eq!((task.task_id, task.run_id), (spawned.task_id.to_string(), spawned.run_id.to_string()));
    assert_eq!((task.attempt, task.task_name.as_str(), task.checkpoints_complete), (1, "n", true));
    assert_eq!(handed_and_waited(&server).await, (1, 0));
    // What is pushed is what is stored, to the letter.
    let sql = server.database().connect().await;
    let stored = sql
        .query_one(
            "select t.params::text, t.headers::text, t.state, t.attempts, t.first_started_at = r.started_at,
                    extract(epoch from r.claim_expires_at - r.started_at)::integer, r.claimed_by, t.last_attempt_run,
                    r.xmin = t.xmin
               from absurd.t_q t join absurd.r_q r using (task_id)",
            &[],
        )
        .await
        .unwrap();
    assert_eq!(task.params.unwrap().text, stored.get::<_, &str>(0));
    assert_eq!(task.headers.unwrap().text, stored.get::<_, &str>(1));
    assert_eq!((stored.get::<_, &str>(2), stored.get::<_, i32>(3)), ("running", 1));
    assert_eq!((stored.get::<_, bool>(4), stored.get::<_, i32>(5)), (true, 60));
    assert!(stored.get::<_, &str>(6).starts_with("w#"));
    assert_eq!((stored.get::<_, Uuid>(7), stored.get::<_, bool>(8)), (spawned.run_id, true));
    let expires = task.claim_expires_at.unwrap();
    let matches: bool = sql
        .query_one(
            "select claim_expires_at = to_timestamp($1::bigint) + $2::integer * interval '1 us' from absurd.r_q",
            &[&expires.seconds, &(expires.nanos / 1000)],
        )
        .await
        .unwrap()
        .get(0);
    assert!(matches, "the lease ends when the worker is told");
    complete(&mut grpc, &pushed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keyed_and_many_spawns_are_handed_over_as_far_as_credit_goes() {
    let server = Server::start().await;
    let client = server.client();
    let mut grpc = server.raw().await;
    let mut messages = idle_stream(&server, &mut grpc, request(4)).await;
    let keyed = SpawnOptions { idempotency_key: Some("k".into()), ..SpawnOptions::default() };
    let first = client.spawn_task("n", &j!(0), keyed.clone()).await.unwrap();
    let again = client.spawn_task("n", &j!(0), keyed).await.unwrap();
    assert_eq!((first.task_id, first.created, again.created), (again.task_id, true, false));
    assert_eq!(next_task(&mut messages).await.task_id, first.task_id.to_string());
    let tasks = (1..=5).map(|index| NewTask::new("n", &j!(index), SpawnOptions::default()).unwrap()).collect();
    client.spawn_tasks(tasks).await.unwrap();
    let mut seen = Vec::new();
    for _ in 0..3 {
        seen.push(next_task(&mut messages).await.params.unwrap().text);
    }
    assert_eq!(seen, ["1", "2", "3"]);
    assert_eq!(handed_and_waited(&server).await, (4, 0), "the other two wait for credit");
}

#[tokio::test(flavor = "multi_thread")]
async fn older_work_goes_first_whoever_it_is_for() {
    let server = Server::start().await;
    let client = server.client();
    let mut grpc = server.raw().await;
    let filtered = pb::ClaimStreamRequest { task_names: vec!["warm".into(), "mine".into()], ..request(9) };
    let mut messages = idle_stream(&server, &mut grpc, filtered).await;
    client.spawn_task("other", &j!(null), SpawnOptions::default()).await.unwrap();
    // Nobody takes the other one, so this one is claimed in its turn and not handed over.
    let mine = client.spawn_task("mine", &j!(null), SpawnOptions::default()).await.unwrap();
    assert_eq!(next_task(&mut messages).await.task_id, mine.task_id.to_string());
    assert_eq!(handed_and_waited(&server).await, (0, 1));
    let (_, mut all) = open(&mut grpc, request(1)).await;
    assert_eq!(next_task(&mut all).await.task_name, "other");
    drop(all);
    // A policy that may be due at once is for a claim to look at.
    let policy = CancellationRules { max_delay: Some(Duration::from_secs(60)), ..CancellationRules::default() };
    let policed = SpawnOptions { cancellation: policy, ..SpawnOptions::default() };
    client.spawn_task("mine", &j!(null), policed).await.unwrap();
    next_task(&mut messages).await;
    assert_eq!(handed_and_waited(&server).await, (0, 3));
}

/// One spawner, one task after the other, and a worker that is full at times: whatever was handed over had nothing older
/// waiting.
#[tokio::test(flavor = "multi_thread")]
async fn a_hand_over_never_overtakes() {
    let server = Server::start().await;
    let client = server.client();
    let options = StreamOptions { max_in_flight: 3, ..StreamOptions::default() };
    let mut stream = client.claim_stream(options).await.unwrap();
    let (mut handed, mut waited) = (0, 0);
    for round in 0..200 {
        if round >= 10 && handed > 0 && waited > 0 {
            break;
        }
        for index in 0..10 {
            client.spawn_task("n", &j!(index), SpawnOptions::default()).await.unwrap();
        }
        for _ in 0..10 {
            let task = in_time("a task", stream.next()).await.unwrap();
            task.complete(&j!(null)).await.unwrap();
        }
        (handed, waited) = handed_and_waited(&server).await;
    }
    assert!(handed > 0 && waited > 0, "{handed} handed over, {waited} waited");
    let sql = server.database().connect().await;
    let overtaken: i64 = sql
        .query_one(
            "select count(*) from absurd.r_q later join absurd.r_q older on older.created_at < later.created_at
              where later.started_at = later.created_at and older.started_at > later.started_at",
            &[],
        )
        .await
        .unwrap()
        .get(0);
    assert_eq!(overtaken, 0);
}

/// A server on hints whose commits wait for a standby that does not come, with an idle stream of leases that end tomorrow.
async fn commits_wait() -> (OwnCluster, Server, tokio_postgres::Client, Messages) {
    let cluster = OwnCluster::start(&["synchronous_commit=on"]).await;
    let server = Server::start_on_hints(&cluster.database().await).await;
    let mut grpc = server.raw().await;
    let asked = pb::ClaimStreamRequest { claim_timeout: seconds(86_400), ..request(9) };
    let messages = idle_stream(&server, &mut grpc, asked).await;
    let sql = server.database().connect().await;
    standby(&sql, "nobody").await;
    (cluster, server, sql, messages)
}

const SPAWN: &str = "task_spawn_claimed|^commit";

/// The commit stands, its answer is lost: nobody was told of the claim, and it goes to a worker all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_hand_over_whose_answer_is_lost_is_found() {
    let (_cluster, server, sql, mut messages) = commits_wait().await;
    let client = server.client();
    let spawning =
        tokio::spawn(async move { client.spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap() });
    let session = waiting_session(&sql, SPAWN).await;
    sql.execute("select pg_terminate_backend($1)", &[&session]).await.unwrap();
    standby(&sql, "").await;
    let spawned = in_time("the spawn is answered", spawning).await.unwrap();
    let task = next_task(&mut messages).await;
    assert_eq!((task.task_id, task.attempt), (spawned.task_id.to_string(), 1));
    let tasks = sql.query_one("select count(*) from absurd.t_q", &[]).await.unwrap();
    assert_eq!(tasks.get::<_, i64>(0), 1, "one task, whatever was repeated");
}

/// The caller goes away while the commit is under way: what it spawned is handed over all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_goes_away_leaves_no_claim_behind() {
    let (_cluster, server, sql, mut messages) = commits_wait().await;
    let client = server.client();
    let other = client.clone();
    let spawning = tokio::spawn(async move {
        let new = |index: i32| NewTask::new("n", &j!(index), SpawnOptions::default()).unwrap();
        client.spawn_tasks((0..3).map(new).collect()).await
    });
    waiting_session(&sql, SPAWN).await;
    spawning.abort();
    assert!(spawning.await.unwrap_err().is_cancelled());
    // The server has heard of it by the time that it answers the same connection.
    other.list_queues().await.unwrap();
    standby(&sql, "").await;
    for _ in 0..3 {
        next_task(&mut messages).await;
    }
}
