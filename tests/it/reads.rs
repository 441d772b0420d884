//! Reads for those who look: the runs of a task, waits, and tasks by a part of their ids. And every answer stays below the
//! 4 MiB that gRPC clients take, whatever somebody has written by SQL.

use std::time::Duration;

use absurd_client::{ClaimOptions, FindOptions, Reason, RetryStrategy, SpawnOptions, State, WaitsOf};
use absurd_proto::v1 as pb;
use absurd_tests::{Server, in_time};
use serde_json::json as j;
use uuid::Uuid;

#[tokio::test(flavor = "multi_thread")]
async fn the_runs_of_a_task_are_listed_by_attempt() {
    let server = Server::start().await;
    let client = server.client();
    let options = SpawnOptions::default().max_attempts(9);
    let spawned = client.spawn_task("n", &j!(null), options.clone()).await.unwrap();
    client.spawn_task("another", &j!(null), options).await.unwrap();
    for attempt in 1..=4 {
        let claims = client.claim_task(ClaimOptions { qty: 2, ..ClaimOptions::default() }).await.unwrap();
        for claim in claims {
            let large = "x".repeat(if attempt == 2 { 900_000 } else { 10 });
            claim.fail(&j!({"message": attempt, "traceback": large})).await.unwrap();
        }
    }
    let page = client.list_runs(spawned.task_id, 0, "").await.unwrap();
    let seen: Vec<(i32, State)> = page.items.iter().map(|run| (run.attempt, run.state)).collect();
    let failed = |attempt| (attempt, State::Failed);
    assert_eq!(seen, [failed(1), failed(2), failed(3), failed(4), (5, State::Pending)]);
    assert_eq!(page.next_page_token, "");
    for run in &page.items {
        assert_eq!(client.get_run_status(run.run_id).await.unwrap().as_ref(), Some(run), "as it is read alone");
    }
    let mut paged = Vec::new();
    let mut token = String::new();
    loop {
        let next = client.list_runs(spawned.task_id, 2, &token).await.unwrap();
        assert!(next.items.len() <= 2);
        paged.extend(next.items);
        token = next.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(paged, page.items);
    let unknown = client.list_runs(Uuid::now_v7(), 0, "").await.unwrap_err();
    assert_eq!(unknown.reason(), Reason::TaskNotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn waits_are_listed_by_task_and_by_event() {
    let server = Server::start().await;
    let client = server.client();
    let mut waiting = Vec::new();
    for timeout in [None, Some(Duration::from_secs(60)), Some(Duration::from_secs(90))] {
        client.spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap();
        let claim = client.claim_task(ClaimOptions::default()).await.unwrap().remove(0);
        claim.await_event("step", "paid", timeout).await.unwrap();
        waiting.push((claim.task_id, claim.run_id, timeout));
    }
    let idle = client.spawn_task("idle", &j!(null), SpawnOptions::default()).await.unwrap();
    for (task_id, run_id, timeout) in &waiting {
        let waits = client.list_waits(WaitsOf::Task(*task_id), 0, "").await.unwrap().items;
        let [wait] = waits.as_slice() else { panic!("one wait: {waits:?}") };
        assert_eq!((wait.task_id, wait.run_id), (*task_id, *run_id));
        assert_eq!((wait.step_name.as_str(), wait.event_name.as_str()), ("step", "paid"));
        let span = wait.timeout_at.map(|at| at.duration_since(wait.created_at.unwrap()).unwrap());
        assert_eq!(span, *timeout);
    }
    let first = client.list_waits(WaitsOf::Event("paid".into()), 2, "").await.unwrap();
    let rest = client.list_waits(WaitsOf::Event("paid".into()), 2, &first.next_page_token).await.unwrap();
    assert_eq!((first.items.len(), rest.items.len(), rest.next_page_token.as_str()), (2, 1, ""));
    let runs: Vec<Uuid> = first.items.iter().chain(&rest.items).map(|wait| wait.run_id).collect();
    assert_eq!(runs, waiting.iter().map(|(_, run, _)| *run).collect::<Vec<_>>(), "the oldest first");
    for none in [WaitsOf::Event("never".into()), WaitsOf::Task(idle.task_id)] {
        assert!(client.list_waits(none, 0, "").await.unwrap().items.is_empty());
    }
    client.emit_event("paid", &j!(1)).await.unwrap();
    assert!(client.list_waits(WaitsOf::Event("paid".into()), 0, "").await.unwrap().items.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_is_found_by_either_end_of_its_id() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    sql.batch_execute("select absurd.create_queue('p', 'partitioned'), absurd.create_queue('odd \" name')")
        .await
        .unwrap();
    let everywhere = FindOptions::default();
    for queue in ["q", "p", "odd \" name"] {
        let client = server.client().with_queue(queue.to_owned());
        let spawned = client.spawn_task("wanted", &j!(null), SpawnOptions::default()).await.unwrap();
        client.spawn_task("other", &j!(null), SpawnOptions::default()).await.unwrap();
        let (id, here) = (spawned.task_id.to_string(), FindOptions { queue: Some(queue.to_owned()), limit: 0 });
        for text in [&id[24..], &id[20..].to_uppercase(), &id, &id.replace('-', ""), &spawned.run_id.to_string()] {
            for options in [&here, &everywhere] {
                let found = client.find_tasks(text, options.clone()).await.unwrap();
                let [task] = found.tasks.as_slice() else { panic!("{text}: {found:?}") };
                assert_eq!((task.task_id, task.queue.as_str()), (spawned.task_id, queue), "{text}");
                assert_eq!((task.task_name.as_str(), task.state), ("wanted", State::Pending));
                assert!(found.complete);
            }
        }
        // Ids begin with their time, so that many have one beginning.
        let found = client.find_tasks(&id[..8], here.clone()).await.unwrap();
        assert_eq!((found.tasks.len(), found.tasks[0].task_name.as_str(), found.complete), (2, "other", true));
        let found = client.find_tasks(&id[..8], FindOptions { limit: 1, ..here }).await.unwrap();
        assert_eq!((found.tasks.len(), found.complete), (1, false), "over the limit");
        let nothing = client.find_tasks("ffffffff", everywhere.clone()).await.unwrap();
        assert!(nothing.tasks.is_empty() && nothing.complete);
    }
    let wrong = server.client().find_tasks("xyz", everywhere).await.unwrap_err();
    assert_eq!((wrong.reason(), wrong.field()), (Reason::InvalidArgument, Some("text")));
}

/// An end is looked for among so many tasks only, and a queue that cannot be read holds up no search.
#[tokio::test(flavor = "multi_thread")]
async fn a_search_says_when_it_has_not_seen_all() {
    let server = Server::start().await;
    let client = server.client();
    let mut sql = server.database().connect().await;
    let old = client.spawn_task("old", &j!(null), SpawnOptions::default()).await.unwrap().task_id.to_string();
    for queue in ["a", "b", "c"] {
        client.with_queue(queue.to_owned()).create_queue().await.unwrap();
    }
    sql.batch_execute(
        "insert into absurd.t_q (task_id, task_name, params, state)
         select ('ffffffff-ffff-7fff-8fff-' || lpad(to_hex(i), 12, '0'))::uuid, 'n', 'null', 'completed'
           from generate_series(1, 10000) i",
    )
    .await
    .unwrap();
    let find = async |text: &str| client.find_tasks(text, FindOptions::default()).await.unwrap();
    let by_end = find(&old[24..]).await;
    assert!(by_end.tasks.is_empty() && !by_end.complete, "behind 10,000 newer ones");
    let by_id = find(&old).await;
    assert_eq!((by_id.tasks.len(), by_id.complete), (1, true), "an id needs no walk");
    assert_eq!(find(&old[..13]).await.tasks.len(), 1, "nor does a beginning");

    let lock = sql.transaction().await.unwrap();
    lock.batch_execute("lock table absurd.t_b").await.unwrap();
    let locked = in_time("a locked queue holds up no search", find(&old)).await;
    assert_eq!((locked.tasks.len(), locked.complete), (1, false));
    drop(lock);
    let sql = server.database().connect().await;
    sql.batch_execute("drop table absurd.t_c cascade").await.unwrap();
    let broken = find(&old).await;
    assert_eq!((broken.tasks.len(), broken.complete), (1, false), "a queue without a table");
}

/// What these reads walk, on databases of ours and of upstream's alike.
#[tokio::test(flavor = "multi_thread")]
async fn the_reads_walk_indexes() {
    let server = Server::start().await;
    let client = server.client();
    let retries = SpawnOptions::default().max_attempts(3).retry(RetryStrategy::Immediate);
    let spawned = client.spawn_task("n", &j!(null), retries).await.unwrap();
    let databases = [Some(server.database().clone()), absurd_tests::Database::upstream_where_possible("0.5.1").await];
    for database in databases.into_iter().flatten() {
        let sql = database.connect().await;
        sql.batch_execute(
            "select absurd.create_queue('q');
             set enable_seqscan = off; set enable_bitmapscan = off; set plan_cache_mode = force_generic_plan",
        )
        .await
        .unwrap();
        let bytes = "3000000";
        for (statement, arguments) in [
            ("run_list", format!("'{}', 0, '{}', 10, 1000, {bytes}", spawned.task_id, Uuid::nil())),
            ("wait_list_task", format!("'{}', '{}', '', 10, {bytes}", spawned.task_id, Uuid::nil())),
            ("wait_list_event", format!("'e', '{}', '', 10, {bytes}", Uuid::nil())),
            ("task_search", format!("'{0}', '{0}', null, 'abcdef', 20", spawned.task_id)),
        ] {
            let all = absurd_server::store::statement::ALL;
            let template = all.iter().find(|known| known.name == statement).unwrap();
            let text = template.render("q", absurd_server::store::statement::Wait::Skip);
            sql.batch_execute(&format!("prepare {statement} as {text}")).await.unwrap();
            let plan = sql.query(&format!("explain execute {statement} ({arguments})"), &[]).await.unwrap();
            let plan: Vec<String> = plan.iter().map(|row| row.get(0)).collect();
            assert!(!plan.iter().any(|line| line.contains("Seq Scan")), "{statement}: {plan:#?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn waits_of_nothing_are_refused() {
    let server = Server::start().await;
    let mut grpc = server.raw().await;
    let request = pb::ListWaitsRequest { queue: "q".into(), ..Default::default() };
    assert!(grpc.list_waits(request).await.unwrap_err().message().contains("task_id or event_name"));
}

/// The largest message that a gRPC client takes without being told otherwise.
const MESSAGE_MAX: usize = 4 * 1024 * 1024;

/// The answer to a call, which must come, within what any client takes.
fn small<T: prost::Message>(answer: Result<tonic::Response<T>, tonic::Status>) -> T {
    let answer = answer.unwrap().into_inner();
    assert!(answer.encoded_len() < MESSAGE_MAX, "{} bytes", answer.encoded_len());
    answer
}

/// Rows as only plain SQL can write them: every column that may be long is.
#[tokio::test(flavor = "multi_thread")]
async fn no_answer_is_too_large_for_a_client() {
    let server = Server::start().await;
    let client = server.client();
    let sql = server.database().connect().await;
    let mut grpc = server.raw().await;
    let queue = || "q".to_owned();
    for round in 0..4 {
        let options = SpawnOptions::default().max_attempts(3);
        client.spawn_task("n", &j!(null), options).await.unwrap();
        let claim = client.claim_task(ClaimOptions::default()).await.unwrap().remove(0);
        client.set_checkpoint(claim.task_id, "s", &j!(1), claim.run_id, None).await.unwrap();
        match round {
            0 => claim.complete(&j!(1)).await.unwrap(),
            1 => {
                claim.fail(&j!("x")).await.unwrap();
            }
            _ => {
                claim.await_event("w", "e", None).await.unwrap();
            }
        }
    }
    // Text that compression does not shrink away, with characters of four bytes.
    sql.batch_execute(
        "create function pg_temp.long(bytes integer) returns text language sql as
           $$ select string_agg(md5(i::text), '') || repeat('😀', bytes / 8) from generate_series(1, bytes / 64) i $$;
         update absurd.t_q set task_name = pg_temp.long(5000000), params = to_jsonb(pg_temp.long(1200000)),
           headers = jsonb_build_object('h', pg_temp.long(1500000)), completed_payload = to_jsonb(pg_temp.long(1200000)),
           retry_strategy = jsonb_build_object('kind', 'none', 'x', pg_temp.long(500000)),
           cancellation = jsonb_build_object('x', pg_temp.long(500000));
         update absurd.r_q set claimed_by = pg_temp.long(3000000), wake_event = coalesce(wake_event, pg_temp.long(3000000)),
           result = to_jsonb(pg_temp.long(1200000)), failure_reason = to_jsonb(pg_temp.long(1200000)),
           event_payload = to_jsonb(pg_temp.long(1200000));
         update absurd.c_q set status = case when status = 'committed' then status else pg_temp.long(2000000) end,
           state = to_jsonb(pg_temp.long(2900000));
         insert into absurd_server.workflow_run (workflow_run_id, workflow_name, workflow_version, absurd_queue, inputs, result,
             error, tags)
           select gen_random_uuid(), 'big_flow', '1', pg_temp.long(3000000), to_jsonb(pg_temp.long(1000000 * (1 + i % 2))),
                  to_jsonb(pg_temp.long(1000000)), to_jsonb(pg_temp.long(1500000)), '{\"t\": 1}' from generate_series(1, 5) i",
    )
    .await
    .unwrap();
    let tasks: Vec<Uuid> =
        sql.query("select task_id from absurd.t_q", &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
    let range = Some(pb::TextRange { offset: 0, limit: 1_000_000 });
    for task_id in tasks {
        let id = || task_id.to_string();
        let status = |range| pb::GetTaskStatusRequest {
            queue: queue(),
            task_id: id(),
            params_range: range,
            result_range: range,
        };
        let task = small(grpc.get_task_status(status(None)).await).task.unwrap();
        assert!(task.details_omitted && task.headers.is_none());
        small(grpc.get_task_status(status(range)).await);
        for result_range in [None, range] {
            let request = pb::GetTaskResultRequest { queue: queue(), task_id: id(), result_range };
            small(grpc.get_task_result(request).await);
        }
        let request = pb::AwaitTaskResultRequest { queue: queue(), task_id: id(), timeout: Some(Default::default()) };
        small(grpc.await_task_result(request).await);
        let whole = client.get_task_status(task_id).await.unwrap().unwrap();
        assert!(whole.params.as_str().ends_with("😀\""), "parts make the whole");
        let mut token = String::new();
        loop {
            let request =
                pb::ListRunsRequest { queue: queue(), task_id: id(), page_token: token, ..Default::default() };
            let page = small(grpc.list_runs(request).await);
            for run in page.runs {
                let request = pb::GetRunStatusRequest { queue: queue(), run_id: run.run_id.clone() };
                assert_eq!(small(grpc.get_run_status(request).await).run.unwrap(), run);
                let request =
                    pb::GetCheckpointsForRunRequest { queue: queue(), run_id: run.run_id, ..Default::default() };
                small(grpc.get_checkpoints_for_run(request).await);
            }
            token = page.next_page_token;
            if token.is_empty() {
                break;
            }
        }
        for state_range in [None, range] {
            let request = pb::GetCheckpointRequest {
                queue: queue(),
                task_id: id(),
                checkpoint_name: "s".into(),
                include_pending: true,
                state_range,
            };
            small(grpc.get_checkpoint(request).await);
        }
        let of = Some(pb::list_waits_request::Of::TaskId(id()));
        small(grpc.list_waits(pb::ListWaitsRequest { queue: queue(), of, ..Default::default() }).await);
        let found = small(grpc.find(pb::FindRequest { text: id(), ..Default::default() }).await);
        assert_eq!(found.tasks.len(), 1);
    }
    let list = pb::ListTasksRequest { queue: queue(), ..Default::default() };
    assert_eq!(small(grpc.list_tasks(list).await).tasks.len(), 4);
    // The one that failed has another attempt, whose headers fit into no message: it is put off, and the server is well.
    let claim = pb::ClaimTaskRequest { queue: queue(), qty: 10, ..Default::default() };
    assert!(small(grpc.claim_task(claim).await).tasks.is_empty());

    let mut seen = 0;
    let mut token = String::new();
    loop {
        let request = pb::ListWorkflowRunsRequest { page_token: token, ..Default::default() };
        let page = small(grpc.list_workflow_runs(request).await);
        for run in &page.workflow_runs {
            seen += 1;
            assert!(run.payloads_omitted && run.inputs.is_some() && run.error.is_none(), "as many as fit");
            let request = pb::GetWorkflowRunRequest { workflow_run_id: run.workflow_run_id.clone(), part: None };
            assert_eq!(small(grpc.get_workflow_run(request).await).workflow_run.as_ref(), Some(run));
            let id = Uuid::parse_str(&run.workflow_run_id).unwrap();
            let whole = client.get_workflow_run(id).await.unwrap().unwrap();
            let stored = sql
                .query_one("select error::text from absurd_server.workflow_run where workflow_run_id = $1", &[&id])
                .await
                .unwrap();
            assert_eq!(whole.error.unwrap().as_str(), stored.get::<_, &str>(0), "read in parts");
            assert!(whole.result.is_some() && !whole.payloads_omitted);
        }
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(seen, 5);
}

/// Many names that are long, each alone no harm.
#[tokio::test(flavor = "multi_thread")]
async fn pages_of_long_names_end_early_and_lose_nothing() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    let mut grpc = server.raw().await;
    sql.batch_execute(
        "insert into absurd.t_q (task_id, task_name, params, state)
           select gen_random_uuid(), repeat('😀', 3000), 'null', 'completed' from generate_series(1, 2000) i;
         insert into absurd.w_q (task_id, run_id, step_name, event_name)
           select gen_random_uuid(), gen_random_uuid(), i || repeat('s', 2000), repeat('e', 500) from generate_series(1, 2000) i;
         insert into absurd.queues (queue_name) select repeat('n', 2000) || i from generate_series(1, 3000) i",
    )
    .await
    .unwrap();
    let (mut token, mut tasks) = (String::new(), 0);
    loop {
        let list = pb::ListTasksRequest { queue: "q".into(), page_size: 1000, page_token: token, ..Default::default() };
        let page = small(grpc.list_tasks(list).await);
        tasks += page.tasks.len();
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    let mut waits = 0;
    loop {
        let of = Some(pb::list_waits_request::Of::EventName("e".repeat(500)));
        let list = pb::ListWaitsRequest { queue: "q".into(), of, page_size: 1000, page_token: token };
        let page = small(grpc.list_waits(list).await);
        waits += page.waits.len();
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    let mut queues = 0;
    let mut token = String::new();
    loop {
        let page = small(grpc.list_queues(pb::ListQueuesRequest { page_size: 1000, page_token: token }).await);
        queues += page.queues.len();
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!((tasks, waits, queues), (2000, 2000, 3001));
}

/// A number counts with the digits that are stored for it, wherever JSON is taken.
/// A row that alone is more than a page holds ends its page, and not the list.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_fills_a_page_hides_no_row_after_it() {
    let server = Server::start().await;
    let client = server.client();
    let sql = server.database().connect().await;
    let spawned = client.spawn_task("n", &j!(1), SpawnOptions::default()).await.unwrap();
    let run = client.claim_task(ClaimOptions::default()).await.unwrap().remove(0);
    for bytes in (3 * 1024 * 1024 - 200..3 * 1024 * 1024 + 64).step_by(24) {
        sql.execute("delete from absurd.c_q", &[]).await.unwrap();
        let steps = [("a", bytes), ("b", 10), ("c", 10)];
        for (name, bytes) in steps {
            let state = format!("\"{}\"", "x".repeat(bytes));
            let insert = "insert into absurd.c_q (task_id, checkpoint_name, state, owner_run_id, status, updated_at)
                          values ($1, $2, $3::text::jsonb, $4, 'committed', now())";
            sql.execute(insert, &[&spawned.task_id, &name, &state, &run.run_id]).await.unwrap();
        }
        let read = client.get_all_checkpoints(spawned.task_id, run.run_id).await.unwrap();
        assert_eq!(read.len(), steps.len(), "{bytes} bytes");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn exponents_are_held_to_the_size_limit() {
    let server = Server::start().await;
    let client = server.client();
    let mut grpc = server.raw().await;
    let huge = || absurd_tests::json(format!("{{\"a\": [{}]}}", vec!["1e100000"; 3000].join(",")));
    let refused = |status: tonic::Status, field: &str| {
        let details = tonic_types::StatusExt::get_error_details(&status);
        assert_eq!(details.error_info().unwrap().reason, "PAYLOAD_TOO_LARGE", "{status}");
        assert_eq!(details.bad_request().unwrap().field_violations[0].field, field, "{status}");
    };
    for (task, field) in [
        (pb::NewTask { params: huge(), ..Default::default() }, "task.params"),
        (pb::NewTask { headers: huge(), ..Default::default() }, "task.headers"),
    ] {
        let task = Some(pb::NewTask { task_name: "n".into(), ..task });
        let request = pb::SpawnTaskRequest { queue: "q".into(), task };
        refused(grpc.spawn_task(request).await.unwrap_err(), field);
    }
    client.spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap();
    let claim = client.claim_task(ClaimOptions::default()).await.unwrap().remove(0);
    let claim_token = || Some(claim.claim_token().to_owned());
    let complete =
        pb::CompleteTaskRequest { queue: "q".into(), claim_token: claim_token(), result: huge(), ..Default::default() };
    refused(grpc.complete_task(complete).await.unwrap_err(), "result");
    let step = pb::SetCheckpointRequest {
        queue: "q".into(),
        claim_token: claim_token(),
        checkpoint_name: "s".into(),
        state: huge(),
        ..Default::default()
    };
    refused(grpc.set_checkpoint(step).await.unwrap_err(), "state");
    let emit = pb::EmitEventRequest { queue: "q".into(), event_name: "e".into(), payload: huge() };
    refused(grpc.emit_event(emit).await.unwrap_err(), "payload");
    let workflow = pb::CreateWorkflowRunRequest {
        queue: "q".into(),
        workflow_name: "a".into(),
        workflow_version: "1".into(),
        inputs: huge(),
        ..Default::default()
    };
    refused(grpc.create_workflow_run(workflow).await.unwrap_err(), "inputs");
    // A reason is never refused: it is cut.
    let fail =
        pb::FailTaskRequest { queue: "q".into(), claim_token: claim_token(), reason: huge(), ..Default::default() };
    grpc.fail_task(fail).await.unwrap();
    let sql = server.database().connect().await;
    let stored = sql.query_one("select octet_length(failure_reason::text) from absurd.r_q", &[]).await.unwrap();
    assert!(stored.get::<_, i32>(0) < 100_000);
}
