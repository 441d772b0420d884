//! Bad input: a typed error that names the field, and nothing half-written.

use absurd_client::{ClaimOptions, ListOptions, RetryOptions, SpawnOptions};
use absurd_proto::v1 as pb;
use absurd_tests::{Grpc, Server, json};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use serde_json::json as j;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;

/// Code, reason and field of an error.
fn parts(status: &Status) -> (Code, String, String) {
    let details = status.get_error_details();
    let reason = details.error_info().map(|info| info.reason.clone()).unwrap_or_default();
    let field = details
        .bad_request()
        .and_then(|bad| bad.field_violations.first())
        .map(|violation| violation.field.clone())
        .unwrap_or_default();
    (status.code(), reason, field)
}

fn named(name: &str) -> pb::NewTask {
    pb::NewTask { task_name: name.into(), ..Default::default() }
}

async fn spawn(grpc: &mut Grpc, task: pb::NewTask) -> Result<(), Status> {
    grpc.spawn_task(pb::SpawnTaskRequest { queue: "q".into(), task: Some(task) }).await.map(drop)
}

fn duration(seconds: i64, nanos: i32) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos })
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_exist_is_not_found() {
    let server = Server::start().await;
    let mut grpc = server.raw().await;
    let nobody = || Uuid::now_v7().to_string();
    let nowhere = || "nowhere".to_owned();
    let mut seen = Vec::new();
    let mut check = |outcome: Result<(), Status>, reason: &str| seen.push((outcome.unwrap_err(), reason.to_owned()));

    let stream = pb::ClaimStreamRequest { queue: nowhere(), worker_id: "w".into(), ..Default::default() };
    check(grpc.claim_stream(stream).await.map(drop), "QUEUE_NOT_FOUND");
    let claim = pb::ClaimTaskRequest { queue: nowhere(), ..Default::default() };
    check(grpc.claim_task(claim).await.map(drop), "QUEUE_NOT_FOUND");
    let task = pb::SpawnTaskRequest { queue: nowhere(), task: Some(named("n")) };
    check(grpc.spawn_task(task).await.map(drop), "QUEUE_NOT_FOUND");
    let tasks = pb::SpawnTasksRequest { queue: nowhere(), tasks: vec![named("n")] };
    check(grpc.spawn_tasks(tasks).await.map(drop), "QUEUE_NOT_FOUND");
    let stats = pb::GetQueueStatsRequest { queue: nowhere() };
    check(grpc.get_queue_stats(stats).await.map(drop), "QUEUE_NOT_FOUND");
    let list = pb::ListTasksRequest { queue: nowhere(), ..Default::default() };
    check(grpc.list_tasks(list).await.map(drop), "QUEUE_NOT_FOUND");
    let item = pb::SettleItem {
        run_id: nobody(),
        claim_token: None,
        action: Some(pb::settle_item::Action::Complete(pb::CompleteAction::default())),
    };
    let settle = pb::SettleTasksRequest { queue: nowhere(), items: vec![item] };
    check(grpc.settle_tasks(settle).await.map(drop), "QUEUE_NOT_FOUND");

    for (queue, task, run) in
        [("q", "TASK_NOT_FOUND", "RUN_NOT_FOUND"), ("nowhere", "QUEUE_NOT_FOUND", "QUEUE_NOT_FOUND")]
    {
        let queue = || queue.to_owned();
        let get =
            pb::GetTaskStatusRequest { queue: queue(), task_id: nobody(), params_range: None, result_range: None };
        check(grpc.get_task_status(get).await.map(drop), task);
        let result = pb::GetTaskResultRequest { queue: queue(), task_id: nobody(), result_range: None };
        check(grpc.get_task_result(result).await.map(drop), task);
        let wait = pb::AwaitTaskResultRequest { queue: queue(), task_id: nobody(), timeout: None };
        check(grpc.await_task_result(wait).await.map(drop), task);
        let retry = pb::RetryTaskRequest { queue: queue(), task_id: nobody(), ..Default::default() };
        check(grpc.retry_task(retry).await.map(drop), task);
        let cancel =
            pb::CancelTaskRequest { queue: queue(), target: Some(pb::cancel_task_request::Target::TaskId(nobody())) };
        check(grpc.cancel_task(cancel).await.map(drop), task);
        let get = pb::GetRunStatusRequest { queue: queue(), run_id: nobody() };
        check(grpc.get_run_status(get).await.map(drop), run);
        let complete = pb::CompleteTaskRequest { queue: queue(), run_id: nobody(), claim_token: None, result: None };
        check(grpc.complete_task(complete).await.map(drop), run);
        let fail = pb::FailTaskRequest { queue: queue(), run_id: nobody(), ..Default::default() };
        check(grpc.fail_task(fail).await.map(drop), run);
        let extend =
            pb::ExtendClaimRequest { queue: queue(), run_id: nobody(), claim_token: None, extend_by: duration(5, 0) };
        check(grpc.extend_claim(extend).await.map(drop), run);
    }
    for (status, reason) in seen {
        assert_eq!(parts(&status).1, reason, "{status:?}");
        assert_eq!(status.code(), Code::NotFound, "{status:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn queue_names_are_what_the_contract_says() {
    let server = Server::start().await;
    let mut grpc = server.raw().await;
    let create = |name: &str| pb::CreateQueueRequest { queue: name.into(), ..Default::default() };
    for name in ["it's", "\"quoted\"", " ", "UpperCase", "bad space", "-bad", &"x".repeat(57), &"é".repeat(28), "{t}"]
    {
        grpc.create_queue(create(name)).await.unwrap_or_else(|status| panic!("{name:?}: {status:?}"));
        let task = pb::SpawnTaskRequest { queue: name.into(), task: Some(named("n")) };
        let spawned = grpc.spawn_task(task).await.unwrap().into_inner().task.unwrap();
        let claim = pb::ClaimTaskRequest { queue: name.into(), ..Default::default() };
        let claimed = grpc.claim_task(claim).await.unwrap().into_inner().tasks;
        assert_eq!(claimed[0].task_id, spawned.task_id, "{name:?}");
    }
    for name in ["", &"x".repeat(58), &"é".repeat(29), "nul\0"] {
        let refused = grpc.create_queue(create(name)).await.unwrap_err();
        let (code, reason, field) = parts(&refused);
        assert_eq!((code, reason.as_str(), field.as_str()), (Code::InvalidArgument, "INVALID_ARGUMENT", "queue"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_fields_are_named_and_nothing_is_written() {
    let server = Server::start().await;
    let mut grpc = server.raw().await;
    let retry = |strategy| pb::NewTask { retry_strategy: Some(strategy), ..named("n") };
    let policy = |policy| pb::NewTask { cancellation: Some(policy), ..named("n") };
    let exponential = pb::RetryStrategy { kind: pb::RetryKind::Exponential.into(), ..Default::default() };
    let deep = "[".repeat(101) + &"]".repeat(101);
    let large = format!("\"{}\"", "x".repeat(1024 * 1024));
    let cases: Vec<(pb::NewTask, &str, &str)> = vec![
        (named(""), "task.task_name", "INVALID_ARGUMENT"),
        (named("   "), "task.task_name", "INVALID_ARGUMENT"),
        (named(&"n".repeat(513)), "task.task_name", "INVALID_ARGUMENT"),
        (pb::NewTask { params: json("{"), ..named("n") }, "task.params", "JSON_INVALID"),
        (pb::NewTask { params: json(""), ..named("n") }, "task.params", "JSON_INVALID"),
        (pb::NewTask { params: json("\"\\u0000\""), ..named("n") }, "task.params", "JSON_INVALID"),
        (pb::NewTask { params: json("\"\\ud800\""), ..named("n") }, "task.params", "JSON_INVALID"),
        (pb::NewTask { params: json(deep), ..named("n") }, "task.params", "JSON_INVALID"),
        (pb::NewTask { params: json(large), ..named("n") }, "task.params", "PAYLOAD_TOO_LARGE"),
        (pb::NewTask { headers: json("[]"), ..named("n") }, "task.headers", "JSON_INVALID"),
        (pb::NewTask { max_attempts: Some(0), ..named("n") }, "task.max_attempts", "INVALID_ARGUMENT"),
        (pb::NewTask { max_attempts: Some(-1), ..named("n") }, "task.max_attempts", "INVALID_ARGUMENT"),
        (pb::NewTask { task_id: Some("x".into()), ..named("n") }, "task.task_id", "INVALID_ARGUMENT"),
        (pb::NewTask { task_id: Some(Uuid::new_v4().to_string()), ..named("n") }, "task.task_id", "INVALID_ARGUMENT"),
        (
            pb::NewTask { task_id: Some("00000000-0000-7000-8000-000000000000".into()), ..named("n") },
            "task.task_id",
            "INVALID_ARGUMENT",
        ),
        (
            pb::NewTask { idempotency_key: Some("k".repeat(1025)), ..named("n") },
            "task.idempotency_key",
            "INVALID_ARGUMENT",
        ),
        (
            retry(pb::RetryStrategy { base: duration(-1, 0), ..exponential }),
            "task.retry_strategy.base",
            "INVALID_ARGUMENT",
        ),
        (
            retry(pb::RetryStrategy { base: duration(86_401, 0), ..exponential }),
            "task.retry_strategy.base",
            "INVALID_ARGUMENT",
        ),
        (
            retry(pb::RetryStrategy { factor: Some(f64::NAN), ..exponential }),
            "task.retry_strategy.factor",
            "INVALID_ARGUMENT",
        ),
        (
            retry(pb::RetryStrategy { max: duration(i64::MAX, 0), ..exponential }),
            "task.retry_strategy.max",
            "INVALID_ARGUMENT",
        ),
        (retry(pb::RetryStrategy { kind: 99, ..exponential }), "task.retry_strategy.kind", "INVALID_ARGUMENT"),
        (
            policy(pb::CancellationPolicy { max_delay: duration(1, 5), max_duration: None }),
            "task.cancellation.max_delay",
            "INVALID_ARGUMENT",
        ),
        (
            policy(pb::CancellationPolicy { max_delay: None, max_duration: duration(-5, 0) }),
            "task.cancellation.max_duration",
            "INVALID_ARGUMENT",
        ),
        (
            policy(pb::CancellationPolicy { max_delay: duration(i64::MAX, 0), max_duration: None }),
            "task.cancellation.max_delay",
            "INVALID_ARGUMENT",
        ),
    ];
    for (task, field, reason) in cases {
        let refused = spawn(&mut grpc, task.clone()).await.expect_err(field);
        assert_eq!(parts(&refused), (Code::InvalidArgument, reason.to_owned(), field.to_owned()), "{refused:?}");
        // In a batch the same field is named with its place, and its good neighbours are not spawned.
        let batch = pb::SpawnTasksRequest { queue: "q".into(), tasks: vec![named("good"), task] };
        let refused = grpc.spawn_tasks(batch).await.unwrap_err();
        assert_eq!(parts(&refused).2, field.replace("task.", "tasks[1]."), "{refused:?}");
    }
    let sql = server.database().connect().await;
    let count: i64 = sql.query_one("select count(*) from absurd.t_q", &[]).await.unwrap().get(0);
    assert_eq!(count, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conflict_in_a_batch_leaves_nothing_behind() {
    let server = Server::start().await;
    let mut grpc = server.raw().await;
    let taken = Uuid::now_v7().to_string();
    spawn(&mut grpc, pb::NewTask { task_id: Some(taken.clone()), ..named("first") }).await.unwrap();
    let tasks = vec![named("good"), pb::NewTask { task_id: Some(taken), ..named("second") }];
    let refused = grpc.spawn_tasks(pb::SpawnTasksRequest { queue: "q".into(), tasks }).await.unwrap_err();
    assert_eq!((parts(&refused).0, parts(&refused).1.as_str()), (Code::AlreadyExists, "TASK_ID_CONFLICT"));
    let sql = server.database().connect().await;
    let names: Vec<String> =
        sql.query("select task_name from absurd.t_q", &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
    assert_eq!(names, ["first"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_claims_are_refused() {
    let server = Server::start().await;
    let mut grpc = server.raw().await;
    let stream = || crate::streams::request(1);
    let cases: Vec<(pb::ClaimStreamRequest, &str)> = vec![
        (pb::ClaimStreamRequest { worker_id: String::new(), ..stream() }, "worker_id"),
        (pb::ClaimStreamRequest { worker_id: "w".repeat(201), ..stream() }, "worker_id"),
        (pb::ClaimStreamRequest { session_id: "s".repeat(65), ..stream() }, "session_id"),
        (pb::ClaimStreamRequest { max_in_flight: -1, ..stream() }, "max_in_flight"),
        (pb::ClaimStreamRequest { max_in_flight: i32::MAX, ..stream() }, "max_in_flight"),
        (pb::ClaimStreamRequest { claim_timeout: duration(0, 0), ..stream() }, "claim_timeout"),
        (pb::ClaimStreamRequest { claim_timeout: duration(-1, 0), ..stream() }, "claim_timeout"),
        (pb::ClaimStreamRequest { claim_timeout: duration(86_401, 0), ..stream() }, "claim_timeout"),
        (pb::ClaimStreamRequest { claim_timeout: duration(i64::MAX, i32::MAX), ..stream() }, "claim_timeout"),
        (pb::ClaimStreamRequest { start_deadline: duration(31, 0), ..stream() }, "start_deadline"),
        (pb::ClaimStreamRequest { reconnect_grace: duration(0, 1), ..stream() }, "reconnect_grace"),
        (pb::ClaimStreamRequest { task_names: vec!["n".into(); 101], ..stream() }, "task_names"),
        (pb::ClaimStreamRequest { task_names: vec![String::new()], ..stream() }, "task_names[0]"),
        (pb::ClaimStreamRequest { held_claim_tokens: vec![String::new(); 10_001], ..stream() }, "held_claim_tokens"),
        (pb::ClaimStreamRequest { max_message_bytes: -1, ..stream() }, "max_message_bytes"),
        (pb::ClaimStreamRequest { max_message_bytes: 1, ..stream() }, "max_message_bytes"),
    ];
    for (request, field) in cases {
        let refused = grpc.claim_stream(request).await.expect_err(field);
        assert_eq!(parts(&refused).2, field, "{refused:?}");
    }
    let claim = || pb::ClaimTaskRequest { queue: "q".into(), ..Default::default() };
    for (request, field) in [
        (pb::ClaimTaskRequest { qty: -1, ..claim() }, "qty"),
        (pb::ClaimTaskRequest { qty: 1001, ..claim() }, "qty"),
        (pb::ClaimTaskRequest { wait: duration(61, 0), ..claim() }, "wait"),
        (pb::ClaimTaskRequest { wait: duration(-1, 0), ..claim() }, "wait"),
    ] {
        let refused = grpc.claim_task(request).await.expect_err(field);
        assert_eq!(parts(&refused).2, field, "{refused:?}");
    }
    // Zero is a lease that never ends, for ClaimTask only.
    server.client().spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap();
    let forever = pb::ClaimTaskRequest { claim_timeout: duration(0, 0), ..claim() };
    let task = grpc.claim_task(forever).await.unwrap().into_inner().tasks.remove(0);
    assert!(task.claim_expires_at.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_settlements_are_refused_each_on_its_own() {
    use pb::settle_item::Action;
    let server = Server::start().await;
    let client = server.client();
    let mut grpc = server.raw().await;
    for _ in 0..2 {
        client.spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap();
    }
    let claims = client.claim_task(ClaimOptions { qty: 2, ..ClaimOptions::default() }).await.unwrap();
    let complete = |text: &str| Some(Action::Complete(pb::CompleteAction { result: json(text) }));
    let item =
        |token: &str, action| pb::SettleItem { run_id: String::new(), claim_token: Some(token.to_owned()), action };
    let other = claims[1].run_id.to_string();
    let items = vec![
        item("garbage", complete("1")),
        item(claims[0].claim_token(), complete("not json")),
        item(claims[0].claim_token(), None),
        pb::SettleItem { run_id: other, ..item(claims[0].claim_token(), complete("1")) },
        item(claims[1].claim_token(), complete("\"fine\"")),
        pb::SettleItem { run_id: String::new(), claim_token: None, action: complete("1") },
    ];
    let request = pb::SettleTasksRequest { queue: "q".into(), items };
    let results = grpc.settle_tasks(request).await.unwrap().into_inner().results;
    let reasons: Vec<&str> =
        results.iter().map(|result| result.error.as_ref().map_or("", |error| error.reason.as_str())).collect();
    assert_eq!(
        reasons,
        ["CLAIM_TOKEN_INVALID", "JSON_INVALID", "INVALID_ARGUMENT", "INVALID_ARGUMENT", "", "INVALID_ARGUMENT"]
    );
    let fields: Vec<&str> =
        results.iter().map(|result| result.error.as_ref().map_or("", |error| error.field.as_str())).collect();
    assert_eq!(fields, ["claim_token", "items[1].result", "items[2].action", "items[3].run_id", "", "items[5].run_id"]);
    assert_eq!(client.get_task_result(claims[1].task_id).await.unwrap().result.unwrap().as_str(), "\"fine\"");
    for size in [0, 1001] {
        let items = vec![pb::SettleItem::default(); size];
        let refused = grpc.settle_tasks(pb::SettleTasksRequest { queue: "q".into(), items }).await.unwrap_err();
        assert_eq!(parts(&refused).2, "items");
    }
    // A failure is never refused for its content: it is cleaned.
    for reason in ["not json", "{\"message\": \"a\\u0000b\"}", &format!("\"{}\"", "x".repeat(200_000))] {
        client.spawn_task("f", &j!(null), SpawnOptions::default()).await.unwrap();
        let held = client.claim_task(ClaimOptions::default()).await.unwrap().remove(0);
        let fail = pb::FailTaskRequest {
            queue: "q".into(),
            run_id: String::new(),
            claim_token: Some(held.claim_token().to_owned()),
            reason: json(reason),
            ..Default::default()
        };
        grpc.fail_task(fail).await.unwrap();
        let stored = client.get_task_result(held.task_id).await.unwrap().failure.unwrap();
        assert!(stored.as_str().contains("message") && stored.as_str().len() < 70_000);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_deadline_is_deadline_exceeded() {
    let server = Server::start().await;
    let client = server.client();
    let spawned = client.spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap();
    let held = client.claim_task(ClaimOptions::default()).await.unwrap().remove(0);
    let mut sql = server.database().connect().await;
    let lock = sql.transaction().await.unwrap();
    lock.execute("select from absurd.r_q where run_id = $1 for update", &[&spawned.run_id]).await.unwrap();
    let mut request = tonic::Request::new(pb::CompleteTaskRequest {
        queue: "q".into(),
        run_id: String::new(),
        claim_token: Some(held.claim_token().to_owned()),
        result: None,
    });
    request.set_timeout(std::time::Duration::from_millis(300));
    let late = server.raw().await.complete_task(request).await.unwrap_err();
    assert_eq!(parts(&late).0, Code::DeadlineExceeded, "{late:?}");
    assert_eq!(parts(&late).1, "DEADLINE_EXCEEDED");
    lock.rollback().await.unwrap();
    held.complete(&j!(1)).await.unwrap();
}

/// A deadline beyond all time, and texts that are none, are as if nothing was said.
#[tokio::test(flavor = "multi_thread")]
async fn deadlines_that_do_not_exist_hurt_nobody() {
    let server = Server::start().await;
    let mut grpc = server.raw().await;
    for text in ["9999999999999999999S", "18446744073709551615H", "99999999H", "+1S", "-1S", "1", "S", "1 S", "0x1S"] {
        let mut request = tonic::Request::new(pb::GetQueueStatsRequest { queue: "q".into() });
        request.metadata_mut().insert("grpc-timeout", text.parse().unwrap());
        grpc.get_queue_stats(request).await.unwrap_or_else(|status| panic!("{text}: {status:?}"));
    }
}

/// JSON texts, good and nearly good.
fn texts() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        Just("null".to_owned()),
        Just("true".to_owned()),
        "-?(0|[1-9][0-9]{0,20})(\\.[0-9]{1,20})?([eE][+-]?[0-9]{1,6})?",
        "\"([a-z\\u00e9 ]|\\\\[nrtbf/\"\\\\]|\\\\u[0-9a-fA-F]{4}){0,8}\"",
        "[-+.0-9eE]{1,8}",
        "\"[\\x00-\\x7f]{0,4}\"",
        "[\\[\\]{}:,\" a-z0-9\\\\]{0,12}",
    ];
    leaf.prop_recursive(6, 48, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(|items| format!("[{}]", items.join(" , "))),
            prop::collection::vec(("\"[a-z]{0,3}\"", inner), 0..5).prop_map(|items| {
                let members: Vec<String> = items.into_iter().map(|(key, value)| format!("{key}:{value}")).collect();
                format!("{{{}}}", members.join(","))
            }),
        ]
    })
}

/// What our check lets through Postgres takes, and what it refuses Postgres refuses too.
#[tokio::test(flavor = "multi_thread")]
async fn the_json_check_agrees_with_postgres() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    sql.batch_execute(
        "create function pg_temp.takes(t text) returns boolean language plpgsql as $$
         begin perform t::jsonb; return true; exception when others then return false; end $$",
    )
    .await
    .unwrap();
    let takes = sql.prepare("select pg_temp.takes($1)").await.unwrap();
    let length = sql.prepare("select octet_length(($1::text)::jsonb::text)").await.unwrap();
    let mut runner = proptest::test_runner::TestRunner::default();
    let (mut taken, mut refused) = (0, 0);
    for _ in 0..2000 {
        let text = texts().new_tree(&mut runner).unwrap().current();
        // A text with NUL cannot even be sent to Postgres.
        if text.contains('\0') {
            continue;
        }
        let within = |bytes: usize| {
            let bound = absurd_server::domain::json::JsonBound { bytes, depth: 100 };
            absurd_server::domain::JsonText::parse("f", text.clone(), bound).is_ok()
        };
        let ours = within(usize::MAX);
        let theirs: bool = sql.query_one(&takes, &[&text]).await.unwrap().get(0);
        assert_eq!(ours, theirs, "{text:?}");
        if theirs {
            // What Postgres stores is never larger than what was counted, but for the spaces that it writes.
            let stored: i32 = sql.query_one(&length, &[&text]).await.unwrap().get(0);
            let spaces = text.bytes().filter(|byte| matches!(byte, b',' | b':')).count();
            let least = usize::try_from(stored).unwrap().saturating_sub(spaces);
            assert!(least == 0 || !within(least - 1), "{text:?} takes {stored} bytes");
        }
        if ours { taken += 1 } else { refused += 1 }
    }
    assert!(taken > 200 && refused > 200, "{taken} taken, {refused} refused: the texts are lopsided");
}

/// Rows that plain SQL has left with nothing, or with the ends of what a column holds: each read is answered, whatever it says,
/// and a neighbour is claimed.
#[tokio::test(flavor = "multi_thread")]
async fn odd_rows_are_read_and_hold_up_nobody() {
    let server = Server::start().await;
    let (client, sql) = (server.client(), server.database().connect().await);
    let bare = "update absurd.t_q set headers = null, retry_strategy = null, max_attempts = null, cancellation = null,
                  first_started_at = null, last_attempt_run = null, completed_payload = null;
                update absurd.r_q set claimed_by = null, claim_expires_at = null, started_at = null, wake_event = 'e';
                update absurd.c_q set state = null, owner_run_id = null";
    let ends = |time: &str| {
        format!(
            "update absurd.t_q set headers = '[1]', retry_strategy = '\"x\"', cancellation = '7', attempts = 2147483647,
               max_attempts = -2147483648, enqueue_at = '{time}', first_started_at = '{time}', cancelled_at = '{time}';
             update absurd.r_q set claim_expires_at = '{time}', available_at = '{time}', started_at = '{time}',
               completed_at = '{time}', failed_at = '{time}', created_at = '{time}', attempt = -2147483648;
             update absurd.c_q set updated_at = '{time}', status = ''"
        )
    };
    let oddities = [bare.to_owned(), ends("infinity"), ends("-infinity"), ends("294276-12-31"), ends("4713-01-01 BC")];
    for (oddity, state) in oddities.iter().flat_map(|oddity| ["running", "sleeping", "pending"].map(|s| (oddity, s))) {
        sql.batch_execute("truncate absurd.t_q, absurd.r_q, absurd.c_q").await.unwrap();
        let spawned = client.spawn_task("odd", &j!(1), SpawnOptions::default()).await.unwrap();
        let held = client.claim_task(ClaimOptions::default()).await.unwrap().remove(0);
        held.set_checkpoint("s", &j!(1)).await.unwrap();
        sql.batch_execute(oddity).await.unwrap();
        sql.batch_execute(&format!("update absurd.t_q set state = '{state}'; update absurd.r_q set state = '{state}'"))
            .await
            .unwrap();
        let (task, run) = (spawned.task_id, spawned.run_id);
        let answers = [
            client.get_task_status(task).await.err(),
            client.get_run_status(run).await.err(),
            client.get_task_result(task).await.err(),
            client.list_tasks(ListOptions::default()).await.err(),
            client.get_queue_stats().await.err(),
            client.get_all_checkpoints(task, run).await.err(),
            client.get_checkpoints_for_run(run).await.err(),
            client.get_checkpoint(task, "s", true).await.err(),
            client.claim_task(ClaimOptions::default()).await.err(),
            client.extend_claim(run, std::time::Duration::from_secs(30)).await.err(),
            client.retry_task(task, RetryOptions::default()).await.err(),
            client.cancel_task_by_id(task).await.err(),
        ];
        for (place, error) in answers.iter().enumerate().filter_map(|(place, error)| Some((place, error.as_ref()?))) {
            let crashed = matches!(error.code(), Code::Unknown | Code::Cancelled | Code::Internal);
            assert!(!crashed, "call {place} about a row that is {state} after {oddity}: {error:?}");
        }
        client.spawn_task("neighbour", &j!(1), SpawnOptions::default()).await.unwrap();
        absurd_tests::eventually("the neighbour is claimed", || async {
            let claimed = client.claim_task(ClaimOptions::default()).await.ok()?;
            claimed.iter().any(|task| task.task_name == "neighbour").then_some(())
        })
        .await;
    }
    server.stop().await;
}
