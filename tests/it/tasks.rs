//! A task's way: spawned, pushed, settled, read. And each write said twice.

use std::time::Duration;

use absurd_client::{
    CancelOutcome, ClaimOptions, ListOptions, NewTask, Reason, RetryOptions, SpawnOptions, State, StreamOptions,
};
use absurd_proto::v1 as pb;
use absurd_server::settings::Settings;
use absurd_tests::{Server, eventually, in_time, json};
use serde_json::json as j;
use uuid::Uuid;

#[tokio::test(flavor = "multi_thread")]
async fn a_spawned_task_is_pushed_and_completed() {
    let server = Server::start().await;
    let client = server.client();
    let mut stream = client.claim_stream(StreamOptions::default()).await.unwrap();
    let options = SpawnOptions::default().header("h", 1);
    let spawned = client.spawn_task("greet", &j!({"big": 12_345_678_901_234_567_u64}), options).await.unwrap();
    let task = in_time("the task is pushed", stream.next()).await.unwrap();
    assert_eq!((task.task_id, task.run_id, task.attempt), (spawned.task_id, spawned.run_id, 1));
    assert_eq!(task.params.as_ref().unwrap().as_str(), "{\"big\": 12345678901234567}");
    assert_eq!(task.headers.as_ref().unwrap().as_str(), "{\"h\": 1}");
    task.complete(&j!({"ok": true})).await.unwrap();
    let end = client.await_task_result(spawned.task_id, Some(Duration::from_secs(10))).await.unwrap();
    assert_eq!((end.state, end.result.unwrap().as_str()), (State::Completed, "{\"ok\": true}"));
    let run = client.get_run_status(spawned.run_id).await.unwrap().unwrap();
    assert_eq!(run.claimed_by.as_deref(), Some("tester"), "the digest is nobody's business");
    stream.close(Duration::from_secs(5)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_is_retried_as_the_strategy_says() {
    let server = Server::start().await;
    let client = server.client();
    let options = SpawnOptions { max_attempts: Some(2), ..SpawnOptions::default() };
    let spawned = client.spawn_task("n", &j!(null), options).await.unwrap();
    let claims = client.claim_task(ClaimOptions::default()).await.unwrap();
    let outcome = claims[0].fail(&j!({"message": "first"})).await.unwrap();
    assert_eq!(outcome.task_state, Some(State::Pending));
    assert_eq!(outcome.next.map(|next| next.attempt), Some(2));
    let second = client.claim_task(ClaimOptions::default()).await.unwrap();
    assert_eq!(second[0].attempt, 2);
    let outcome = second[0].fail(&j!({"message": "second"})).await.unwrap();
    assert_eq!((outcome.task_state, outcome.next), (Some(State::Failed), None));
    let end = client.get_task_result(spawned.task_id).await.unwrap();
    assert_eq!(end.failure.unwrap().as_str(), "{\"message\": \"second\"}");
    // Failed tasks can be given another attempt, by the same id or as a copy.
    let again = client.retry_task(spawned.task_id, RetryOptions::default()).await.unwrap();
    assert_eq!((again.task_id, again.attempt, again.created), (spawned.task_id, 3, false));
    let refused = client.retry_task(spawned.task_id, RetryOptions::default()).await.unwrap_err();
    assert_eq!(refused.reason(), Reason::TaskNotFailed);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_write_may_be_said_twice() {
    let server = Server::start().await;
    let mut grpc = server.raw().await;
    let client = server.client();
    let sql = server.database().connect().await;
    let queue = || "q".to_owned();

    let task = pb::NewTask {
        task_name: "n".into(),
        task_id: Some(Uuid::now_v7().to_string()),
        max_attempts: Some(5),
        ..Default::default()
    };
    let spawn = pb::SpawnTaskRequest { queue: queue(), task: Some(task.clone()) };
    let first = grpc.spawn_task(spawn.clone()).await.unwrap().into_inner();
    assert_eq!(first, grpc.spawn_task(spawn).await.unwrap().into_inner());
    let many = pb::SpawnTasksRequest {
        queue: queue(),
        tasks: vec![
            task,
            pb::NewTask { task_name: "k".into(), idempotency_key: Some("k".into()), ..Default::default() },
        ],
    };
    let once = grpc.spawn_tasks(many.clone()).await.unwrap().into_inner();
    let twice = grpc.spawn_tasks(many).await.unwrap().into_inner();
    assert_eq!(once.tasks[0], twice.tasks[0]);
    assert_eq!(once.tasks[1].task_id, twice.tasks[1].task_id);
    assert!(once.tasks[1].created && !twice.tasks[1].created);
    let count: i64 = sql.query_one("select count(*) from absurd.t_q", &[]).await.unwrap().get(0);
    assert_eq!(count, 2);

    let claim = || client.claim_task(ClaimOptions { qty: 1, ..ClaimOptions::default() });
    let held = claim().await.unwrap().remove(0);
    let token = Some(held.claim_token().to_owned());
    let extend = pb::ExtendClaimRequest {
        queue: queue(),
        run_id: String::new(),
        claim_token: token.clone(),
        extend_by: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
    };
    for _ in 0..2 {
        grpc.extend_claim(extend.clone()).await.unwrap();
    }
    let release = pb::ReleaseClaimsRequest {
        queue: queue(),
        claims: vec![pb::ClaimRef { run_id: String::new(), claim_token: token.clone() }],
        delay: None,
    };
    for _ in 0..2 {
        let verdicts = grpc.release_claims(release.clone()).await.unwrap().into_inner().verdicts;
        assert_eq!(verdicts[0].verdict(), pb::Verdict::Released);
    }
    let run = client.get_run_status(held.run_id).await.unwrap().unwrap();
    assert_eq!((run.state, run.attempt), (State::Pending, 1), "a release spends no attempt");
    assert!(run.started_at.is_none(), "and leaves no trace of the claim");

    let held = claim().await.unwrap().remove(0);
    let token = Some(held.claim_token().to_owned());
    let fail = pb::FailTaskRequest {
        queue: queue(),
        run_id: String::new(),
        claim_token: token,
        reason: json("{\"message\":\"x\"}"),
        ..Default::default()
    };
    let failed = grpc.fail_task(fail.clone()).await.unwrap().into_inner().outcome.unwrap();
    let repeated = grpc.fail_task(fail).await.unwrap().into_inner().outcome.unwrap();
    assert!(!failed.replayed && repeated.replayed);
    assert_eq!((failed.next_run_id, failed.next_attempt), (repeated.next_run_id, repeated.next_attempt));

    let held = client.claim_task(ClaimOptions { qty: 10, ..ClaimOptions::default() }).await.unwrap();
    assert_eq!(held.len(), 2, "one retry, one keyed task: nothing was made twice");
    for task in &held {
        let complete = pb::CompleteTaskRequest {
            queue: queue(),
            run_id: String::new(),
            claim_token: Some(task.claim_token().to_owned()),
            result: json("1"),
        };
        assert!(!grpc.complete_task(complete.clone()).await.unwrap().into_inner().replayed);
        assert!(grpc.complete_task(complete).await.unwrap().into_inner().replayed);
    }
    for _ in 0..2 {
        client.create_queue().await.unwrap();
    }
    assert!(client.drop_queue().await.unwrap());
    assert!(!client.drop_queue().await.unwrap());
}

/// A failure that forbids another attempt ends its task, also where attempts are left or unlimited, and says so again when the
/// call is repeated. Only `RetryTask` goes on from there.
#[tokio::test(flavor = "multi_thread")]
async fn a_final_failure_ends_its_task() {
    let server = Server::start().await;
    let client = server.client();
    let mut grpc = server.raw().await;
    for options in [SpawnOptions::default(), SpawnOptions::default().unlimited_attempts()] {
        let spawned = client.spawn_task("t", &j!(1), options).await.unwrap();
        let held = client.claim_task(ClaimOptions::default()).await.unwrap().remove(0);
        let mut fail = pb::FailTaskRequest {
            queue: "q".into(),
            claim_token: Some(held.claim_token().to_owned()),
            reason: json("{\"message\":\"x\"}"),
            retry_at: Some(prost_types::Timestamp { seconds: 4_000_000_000, nanos: 0 }),
            no_retry: true,
            ..Default::default()
        };
        let refused = grpc.fail_task(fail.clone()).await.unwrap_err();
        assert!(refused.message().contains("retry_at"), "{refused}");
        fail.retry_at = None;
        for replayed in [false, true] {
            let outcome = grpc.fail_task(fail.clone()).await.unwrap().into_inner().outcome.unwrap();
            assert_eq!((outcome.replayed, outcome.task_state()), (replayed, pb::State::Failed));
            assert_eq!((outcome.next_run_id, outcome.next_attempt), (None, None));
        }
        client.retry_task(spawned.task_id, RetryOptions::default()).await.unwrap();
        let held = client.claim_task(ClaimOptions::default()).await.unwrap().remove(0);
        assert_eq!((held.task_id, held.attempt), (spawned.task_id, 2));
        held.fail_for_good("once more").await.unwrap();
        assert_eq!(client.get_task_status(spawned.task_id).await.unwrap().unwrap().state, State::Failed);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_retry_makes_one_attempt() {
    let server = Server::start().await;
    let client = server.client();
    let mut grpc = server.raw().await;
    let spawned = client.spawn_task("n", &j!({"a": 1}), SpawnOptions::default()).await.unwrap();
    client.claim_task(ClaimOptions::default()).await.unwrap()[0].fail(&j!("x")).await.unwrap();
    for spawn_new in [true, false] {
        let retry = pb::RetryTaskRequest {
            queue: "q".into(),
            task_id: spawned.task_id.to_string(),
            spawn_new,
            max_attempts: None,
            request_id: Some(Uuid::now_v7().to_string()),
        };
        let first = grpc.retry_task(retry.clone()).await.unwrap().into_inner();
        assert_eq!(first, grpc.retry_task(retry).await.unwrap().into_inner());
    }
    let sql = server.database().connect().await;
    let runs: i64 = sql.query_one("select count(*) from absurd.r_q", &[]).await.unwrap().get(0);
    assert_eq!(runs, 3, "the failed one, its copy's, and the second attempt");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_claim_token_is_never_believed() {
    let server = Server::start().await;
    let client = server.client();
    let spawned = client.spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap();
    let stale = client.claim_task(ClaimOptions::default()).await.unwrap().remove(0);
    stale.release(Duration::ZERO).await.unwrap();
    let other = server.client();
    let current = other.claim_task(ClaimOptions::default()).await.unwrap().remove(0);
    assert_eq!(current.run_id, stale.run_id, "same run, another claim");
    for refused in [
        stale.complete(&j!("stale")).await.map(drop),
        stale.fail(&j!("stale")).await.map(drop),
        stale.set_checkpoint("s", &j!("stale")).await,
        stale.release(Duration::ZERO).await,
    ] {
        assert_eq!(refused.unwrap_err().reason(), Reason::ClaimLost);
    }
    current.complete(&j!("current")).await.unwrap();
    assert_eq!(stale.complete(&j!("stale")).await.unwrap_err().reason(), Reason::ClaimLost);
    let end = client.get_task_result(spawned.task_id).await.unwrap();
    assert_eq!(end.result.unwrap().as_str(), "\"current\"");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_lease_moves_the_task_on_and_its_late_worker_hears_so() {
    let server = Server::start().await;
    let client = server.client();
    let options = SpawnOptions { max_attempts: Some(2), ..SpawnOptions::default() };
    client.spawn_task("n", &j!(null), options).await.unwrap();
    let claim = ClaimOptions { claim_timeout: Duration::from_secs(1), ..ClaimOptions::default() };
    let late = client.claim_task(claim).await.unwrap().remove(0);
    let mut stream = server.client().claim_stream(StreamOptions::default()).await.unwrap();
    let next = in_time("the next attempt is pushed", stream.next()).await.unwrap();
    assert_eq!((next.task_id, next.attempt), (late.task_id, 2));
    assert_eq!(late.complete(&j!(1)).await.unwrap_err().reason(), Reason::ClaimExpired);
    let run = client.get_run_status(late.run_id).await.unwrap().unwrap();
    let reason = run.failure_reason.unwrap().to_string();
    assert!(reason.contains("\"name\": \"$ClaimTimeout\"") && reason.contains("\"workerId\": \"tester\""), "{reason}");
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_by_task_takes_it_from_its_worker_and_by_run_does_not() {
    let server = Server::start().await;
    let client = server.client();
    let spawned = client.spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap();
    let mut stream = client.claim_stream(StreamOptions::default()).await.unwrap();
    let task = in_time("the task is pushed", stream.next()).await.unwrap();
    assert_eq!(
        client.cancel_task(spawned.run_id).await.unwrap(),
        CancelOutcome { cancelled: false, state: State::Running }
    );
    assert_eq!(
        client.cancel_task_by_id(spawned.task_id).await.unwrap(),
        CancelOutcome { cancelled: true, state: State::Cancelled }
    );
    assert_eq!(
        client.cancel_task_by_id(spawned.task_id).await.unwrap(),
        CancelOutcome { cancelled: false, state: State::Cancelled }
    );
    assert_eq!(in_time("the worker hears of it", task.revoked()).await, absurd_client::Revoked::Cancelled);
    assert_eq!(task.complete(&j!(1)).await.unwrap_err().reason(), Reason::TaskCancelled);
    let waiting = client.spawn_task("n2", &j!(null), SpawnOptions { ..SpawnOptions::default() }).await.unwrap();
    drop(stream);
    let cancelled = client.cancel_task(waiting.run_id).await.unwrap().cancelled;
    let state = client.get_task_result(waiting.task_id).await.unwrap().state;
    assert!(cancelled == (state == State::Cancelled), "{state}");
    assert_eq!(client.cancel_task_by_id(Uuid::now_v7()).await.unwrap_err().reason(), Reason::TaskNotFound);
    assert_eq!(client.cancel_task(Uuid::now_v7()).await.unwrap_err().reason(), Reason::RunNotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_cancel_tasks_nobody_takes() {
    let server = Server::start().await;
    let client = server.client();
    let options = SpawnOptions::default().max_delay(Duration::from_secs(1));
    let spawned = client.spawn_task("n", &j!(null), options).await.unwrap();
    // A stream for other names keeps the queue under the tick.
    let other = StreamOptions { task_names: vec!["other".into()], ..StreamOptions::default() };
    let _stream = client.claim_stream(other).await.unwrap();
    let end = client.await_task_result(spawned.task_id, Some(absurd_tests::PATIENCE)).await.unwrap();
    assert_eq!(end.state, State::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_come_in_pages_and_filters_hold() {
    let server = Server::start().await;
    let client = server.client();
    let tasks = (0..25)
        .map(|index| {
            let name = if index % 5 == 0 { "fifth" } else { "plain" };
            NewTask::new(name, &j!(index), SpawnOptions::default()).unwrap()
        })
        .collect();
    client.spawn_tasks(tasks).await.unwrap();
    let mut seen = Vec::new();
    let mut page_token = String::new();
    loop {
        let options = ListOptions { page_size: 10, page_token, ..ListOptions::default() };
        let page = client.list_tasks(options).await.unwrap();
        seen.extend(page.items.into_iter().map(|task| task.task_id));
        if page.next_page_token.is_empty() {
            break;
        }
        page_token = page.next_page_token;
    }
    assert_eq!(seen.len(), 25);
    assert!(seen.is_sorted_by(|a, b| a > b), "newest first, none twice");
    let fifth = ListOptions { task_name: Some("fifth".into()), ..ListOptions::default() };
    assert_eq!(client.list_tasks(fifth).await.unwrap().items.len(), 5);
    let done = ListOptions { state: Some(State::Completed), ..ListOptions::default() };
    assert!(client.list_tasks(done).await.unwrap().items.is_empty());
    let stats = client.get_queue_stats().await.unwrap();
    assert_eq!((stats.pending, stats.completed), (25, 0));
    assert!(stats.oldest_claimable_age.is_some());
    assert!(client.list_queues().await.unwrap().iter().any(|queue| queue.name == "q"));
}

#[tokio::test(flavor = "multi_thread")]
async fn awaiting_a_result_hears_of_ends_by_sql_too() {
    let server = Server::start().await;
    let client = server.client();
    let spawned = client.spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap();
    let early = client.await_task_result(spawned.task_id, Some(Duration::from_millis(50))).await.unwrap_err();
    assert_eq!(early.reason(), Reason::DeadlineExceeded);
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.await_task_result(spawned.task_id, Some(absurd_tests::PATIENCE)).await }
    });
    let sql = server.database().connect().await;
    eventually("SQL claims the task", || async {
        let claimed = sql.query("select run_id from absurd.claim_task('q', 'sql', 30, 1)", &[]).await.unwrap();
        (!claimed.is_empty()).then_some(())
    })
    .await;
    sql.execute("select absurd.complete_run('q', $1, '{\"by\":\"sql\"}')", &[&spawned.run_id]).await.unwrap();
    let end = in_time("the waiter hears", waiting).await.unwrap().unwrap();
    assert_eq!(end.result.unwrap().as_str(), "{\"by\": \"sql\"}");
    let missing = client.await_task_result(Uuid::now_v7(), None).await.unwrap_err();
    assert_eq!(missing.reason(), Reason::TaskNotFound);
}

/// What was stored before a worker gave its task back is there for the next one, also when it was the first claim.
#[tokio::test(flavor = "multi_thread")]
async fn a_released_task_keeps_its_checkpoints() {
    let server = Server::start().await;
    let client = server.client();
    client.spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap();
    let mut stream = client.claim_stream(StreamOptions::default()).await.unwrap();
    for round in 0..3 {
        let task = in_time("the task comes", stream.next()).await.unwrap();
        assert_eq!((task.attempt, task.checkpoints.len()), (1, round), "round {round}");
        task.set_checkpoint(&format!("step {round}"), &j!(round)).await.unwrap();
        task.release(Duration::ZERO).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn checkpoints_ride_along_with_the_next_attempt() {
    let server = Server::start().await;
    let client = server.client();
    let options = SpawnOptions { max_attempts: Some(2), ..SpawnOptions::default() };
    client.spawn_task("n", &j!(null), options).await.unwrap();
    let first = client.claim_task(ClaimOptions::default()).await.unwrap().remove(0);
    assert!(first.checkpoints.is_empty() && first.checkpoints_complete);
    first.set_checkpoint("a", &j!({"n": 1})).await.unwrap();
    first.set_checkpoint("b", &j!(null)).await.unwrap();
    first.fail(&j!("x")).await.unwrap();
    let second = client.claim_task(ClaimOptions::default()).await.unwrap().remove(0);
    assert!(second.checkpoints_complete);
    assert_eq!(second.checkpoint("a").unwrap().unwrap().as_str(), "{\"n\": 1}");
    assert_eq!(second.checkpoint("b").unwrap().unwrap().as_str(), "null");
    assert!(second.checkpoint("c").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn items_of_one_run_are_carried_out_in_order_and_a_failed_one_stops_the_later() {
    use pb::settle_item::Action;
    let server = Server::start().await;
    let client = server.client();
    let mut grpc = server.raw().await;
    client.spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap();
    let task = client.claim_task(ClaimOptions::default()).await.unwrap().remove(0);
    let item = |action| pb::SettleItem {
        run_id: String::new(),
        claim_token: Some(task.claim_token().to_owned()),
        action: Some(action),
    };
    let checkpoint = |name: &str| {
        item(Action::Checkpoint(pb::CheckpointAction {
            checkpoint_name: name.into(),
            state: json("1"),
            extend_by: None,
        }))
    };
    let items = vec![
        checkpoint("one"),
        item(Action::Complete(pb::CompleteAction { result: json("\"done\"") })),
        checkpoint("too late"),
        checkpoint("later still"),
    ];
    let request = pb::SettleTasksRequest { queue: "q".into(), items };
    let results = grpc.settle_tasks(request).await.unwrap().into_inner().results;
    let reasons: Vec<Option<&str>> =
        results.iter().map(|result| result.error.as_ref().map(|error| error.reason.as_str())).collect();
    assert_eq!(reasons, [None, None, Some("RUN_NOT_RUNNING"), Some("ITEM_SKIPPED")]);
    let end = client.get_task_result(task.task_id).await.unwrap();
    assert_eq!(end.result.unwrap().as_str(), "\"done\"");
}

/// Who held a run before is not believed beside the one who holds it now, in whatever order they come in one request.
#[tokio::test(flavor = "multi_thread")]
async fn two_claims_of_one_run_in_one_request_are_two_claims() {
    use pb::settle_item::Action;
    let server = Server::start().await;
    let client = server.client();
    let mut grpc = server.raw().await;
    client.spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap();
    let claim = async || client.claim_task(ClaimOptions::default()).await.unwrap().remove(0);
    let before = claim().await;
    let (task_id, stale) = (before.task_id, before.claim_token().to_owned());
    before.release(Duration::ZERO).await.unwrap();
    let now = claim().await;
    assert_eq!(now.task_id, task_id);
    let token = now.claim_token().to_owned();
    let item = |token: &str, action| pb::SettleItem {
        run_id: String::new(),
        claim_token: Some(token.to_owned()),
        action: Some(action),
    };
    let step = |token: &str, name: &str, value: &str| {
        let action =
            pb::CheckpointAction { checkpoint_name: name.into(), state: json(value.to_owned()), extend_by: None };
        item(token, Action::Checkpoint(action))
    };
    let complete = |token: &str, result: &str| {
        item(token, Action::Complete(pb::CompleteAction { result: json(result.to_owned()) }))
    };
    let mut settle = async |items: Vec<pb::SettleItem>| {
        let request = pb::SettleTasksRequest { queue: "q".into(), items };
        let results = grpc.settle_tasks(request).await.unwrap().into_inner().results;
        results.into_iter().map(|result| result.error.map(|error| error.reason)).collect::<Vec<_>>()
    };
    let lost = || Some("CLAIM_LOST".to_owned());
    assert_eq!(settle(vec![step(&token, "a", "1"), step(&stale, "a", "2")]).await, [None, lost()]);
    assert_eq!(settle(vec![step(&stale, "b", "2"), step(&token, "b", "1")]).await, [lost(), None]);
    let refs = |tokens: [&str; 2]| {
        tokens.map(|token| pb::ClaimRef { run_id: String::new(), claim_token: Some(token.to_owned()) }).to_vec()
    };
    let verdicts = server
        .raw()
        .await
        .extend_claims(pb::ExtendClaimsRequest {
            queue: "q".into(),
            claims: refs([&token, &stale]),
            extend_by: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
        })
        .await
        .unwrap()
        .into_inner()
        .verdicts;
    let verdicts: Vec<pb::Verdict> = verdicts.iter().map(|verdict| verdict.verdict()).collect();
    assert_eq!(verdicts, [pb::Verdict::Held, pb::Verdict::Lost]);
    assert_eq!(settle(vec![complete(&token, "1"), complete(&stale, "2")]).await, [None, lost()]);
    for name in ["a", "b"] {
        let row = server
            .database()
            .connect()
            .await
            .query_one("select state::text from absurd.c_q where checkpoint_name = $1", &[&name])
            .await
            .unwrap();
        assert_eq!(row.get::<_, &str>(0), "1");
    }
    assert_eq!(client.get_task_result(task_id).await.unwrap().result.unwrap().as_str(), "1");
}

/// What a spawn leaves open is decided and stored so that no failing task can run hot for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_spawn_that_says_nothing_of_attempts_gets_five_with_pauses() {
    let settings = Settings { default_max_attempts: Some(4), ..Settings::default() };
    for (server, usual) in [(Server::start().await, 5), (crate::limits::server(settings).await, 4)] {
        let mut grpc = server.raw().await;
        let sql = server.database().connect().await;
        let fixed = pb::RetryStrategy { kind: pb::RetryKind::Fixed.into(), ..Default::default() };
        let pauses = j!({"kind": "exponential", "base_seconds": 1, "factor": 2, "max_seconds": 300});
        let nothing = || pb::NewTask { task_name: "n".into(), ..Default::default() };
        for (task, attempts, strategy) in [
            (nothing(), Some(usual), Some(pauses.clone())),
            (pb::NewTask { max_attempts: Some(9), ..nothing() }, Some(9), None),
            (pb::NewTask { retry_strategy: Some(fixed), ..nothing() }, Some(usual), Some(j!({"kind": "fixed"}))),
            (pb::NewTask { unlimited_attempts: true, ..nothing() }, None, Some(pauses)),
            (
                pb::NewTask { unlimited_attempts: true, retry_strategy: Some(fixed), ..nothing() },
                None,
                Some(j!({"kind": "fixed"})),
            ),
        ] {
            let request = pb::SpawnTaskRequest { queue: "q".into(), task: Some(task.clone()) };
            let task_id = grpc.spawn_task(request).await.unwrap().into_inner().task.unwrap().task_id;
            let read = "select max_attempts, retry_strategy::text from absurd.t_q where task_id = $1";
            let row = sql.query_one(read, &[&Uuid::parse_str(&task_id).unwrap()]).await.unwrap();
            assert_eq!(row.get::<_, Option<i32>>(0), attempts, "{task:?}");
            let stored: Option<serde_json::Value> =
                row.get::<_, Option<&str>>(1).map(|text| serde_json::from_str(text).unwrap());
            assert_eq!(stored, strategy, "{task:?}");
        }
        let both = pb::NewTask { max_attempts: Some(2), unlimited_attempts: true, ..nothing() };
        let request = pb::SpawnTaskRequest { queue: "q".into(), task: Some(both) };
        let status = grpc.spawn_task(request).await.unwrap_err();
        let details = tonic_types::StatusExt::get_details_bad_request(&status).unwrap();
        assert_eq!(details.field_violations[0].field, "task.unlimited_attempts", "{status}");

        // The mirrored client keeps the original's one attempt; with neither it asks for the server's default.
        let client = server.client();
        let stored = async |options| {
            let spawned = client.spawn_task("n", &j!(null), options).await.unwrap();
            let task = client.get_task_status(spawned.task_id).await.unwrap().unwrap();
            (task.max_attempts, task.retry_strategy.is_some())
        };
        assert_eq!(stored(SpawnOptions::default()).await, (Some(1), false));
        assert_eq!(stored(SpawnOptions { max_attempts: None, ..SpawnOptions::default() }).await, (Some(usual), true));
        assert_eq!(stored(SpawnOptions::default().unlimited_attempts()).await, (None, true));
        assert_eq!(stored(SpawnOptions::default().unlimited_attempts().max_attempts(3)).await, (Some(3), false));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_that_fail_hot_are_counted() {
    let server = crate::limits::server(Settings::default()).await;
    let client = server.client().with_queue("hot".to_owned());
    client.create_queue().await.unwrap();
    let hot = async || crate::limits::metric(&server, "absurd_hot_retries_total{queue=\"hot\"}").await;
    let fail = async |times: usize| {
        for _ in 0..times {
            client.claim_task(ClaimOptions::default()).await.unwrap()[0].fail(&j!("x")).await.unwrap();
        }
    };
    client.spawn_task("n", &j!(null), SpawnOptions::default().max_attempts(8)).await.unwrap();
    fail(5).await;
    assert_eq!(hot().await, 0.0, "five attempts are nothing out of the ordinary");
    fail(3).await;
    assert_eq!(hot().await, 2.0, "the sixth and the seventh were tried again at once, the eighth was the last");
}
