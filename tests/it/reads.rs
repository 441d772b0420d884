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
