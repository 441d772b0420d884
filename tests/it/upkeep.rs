//! What the server does by itself for the queues' policies, and what the doctor finds.

use std::time::Duration;

use absurd_client::{ClaimOptions, NewTask, SpawnOptions, StreamOptions};
use absurd_server::settings::{Settings, Span};
use absurd_tests::{Database, Server, ServerOptions, absurd, eventually, in_time};
use serde_json::{Value, json as j};
use tonic_types::StatusExt as _;

fn every(upkeep: Duration) -> ServerOptions {
    let settings = Settings { upkeep: Some(Span(upkeep)), ..Settings::default() };
    ServerOptions { settings, without_queue: true, ..ServerOptions::default() }
}

/// A server that looks at all queues every second, and does its chores as often. It says its metrics.
async fn quick() -> Server {
    let settings = Settings { metrics_listen: Some(([127, 0, 0, 1], 0).into()), ..Settings::default() };
    let options = ServerOptions { settings, quick_tick: true, ..ServerOptions::default() };
    Server::start_with(Database::new().await, options).await
}

async fn cleans_up(database: &Database) {
    let sql = database.connect().await;
    sql.batch_execute(
        "set client_min_messages = warning;
         select absurd.create_queue('q'), absurd.create_queue('p', 'partitioned');
         select absurd.set_queue_policy('q', '{\"cleanup_ttl\": 0, \"cleanup_limit\": 3}');
         select absurd.set_queue_policy('p', '{\"detach_mode\": \"empty\", \"detach_min_age\": \"60 days\"}');
         select absurd.spawn_task('q', 'n', 'null') from generate_series(1, 10);
         select absurd.complete_run('q', c.run_id) from absurd.claim_task('q', 'w', 30, 8) c;
         select absurd.emit_event('q', 'e' || g) from generate_series(1, 7) g;
         -- Partitions of long ago, and one of the next weeks that is missing.
         set absurd.fake_now = '2024-01-03'; select absurd.ensure_partitions('p'); reset absurd.fake_now",
    )
    .await
    .unwrap();
    let next = "select 't_p_' || absurd.partition_week_tag(absurd.current_time() + interval '14 days')";
    let next: String = sql.query_one(next, &[]).await.unwrap().get(0);
    sql.batch_execute(&format!("drop table absurd.{next}")).await.unwrap();

    let server = Server::start_with(database.clone(), every(Duration::from_secs(1))).await;
    eventually("everything is done", || async {
        let done = "select (select count(*) from absurd.t_q) = 2 and (select count(*) from absurd.e_q) = 0
                       and to_regclass('absurd.t_p_401') is null and to_regclass('absurd.w_p_405') is null
                       and to_regclass('absurd.' || $1::text) is not null";
        sql.query_one(done, &[&next]).await.unwrap().get::<_, bool>(0).then_some(())
    })
    .await;
    let noted = "select count(*) from absurd_server.upkeep where problem is null";
    assert_eq!(sql.query_one(noted, &[]).await.unwrap().get::<_, i64>(0), 2);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_are_carried_out() {
    cleans_up(&Database::new().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_are_carried_out_in_adopted_databases_when_asked() {
    let database = Database::upstream("0.5.1").await;
    let config = database.url().parse().unwrap();
    absurd_server::store::migrate::migrate(&config, absurd_server::store::migrate::Options::default()).await.unwrap();
    cleans_up(&database).await;
}

/// The doctor's word on a database: whether all is well, and its findings.
async fn doctor(database: &Database) -> (bool, Vec<Value>) {
    let mut command = absurd(&["doctor", "-o", "json"]);
    command.env("ABSURD_DATABASE_URL", database.url());
    let output = in_time("the doctor ends", command.output()).await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let found: Value =
        serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text}{}", String::from_utf8_lossy(&output.stderr)));
    // The tests' Postgres runs without fsync.
    let mut findings = found["findings"].as_array().unwrap().clone();
    let before = findings.len();
    findings.retain(|finding| !finding["what"].as_str().unwrap().contains("may be lost"));
    let durable = before == findings.len();
    (output.status.success() || !durable && !findings.iter().any(|finding| finding["wrong"] == true), findings)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_finds_what_is_wrong_and_its_cures_work() {
    let database = Database::new().await;
    let sql = database.connect().await;
    sql.batch_execute(
        "select absurd.create_queue('it''s \"q\"'); select absurd_server.install_doorbell('it''s \"q\"')",
    )
    .await
    .unwrap();
    assert_eq!(doctor(&database).await, (true, vec![]));
    let q = "absurd.\"K_it's \"\"q\"\"\"";
    let t = |kind: &str| q.replace('K', kind);
    let id = "gen_random_uuid()";
    sql.batch_execute(&format!(
        "insert into {c} (task_id, checkpoint_name) select {id}, 'c' from generate_series(1, 3);
         insert into {r} (run_id, task_id, attempt, state, available_at) values ({id}, {id}, 1, 'pending', now());
         insert into {w} (task_id, run_id, step_name, event_name) values ({id}, {id}, 's', 'other');
         insert into {e} (event_name, emitted_at) values ('idle', 'epoch');
         insert into {t} (task_id, task_name, params, state, last_attempt_run) values ({id}, 'n', 'null', 'completed', {id});
         insert into {t} (task_id, task_name, params, state, last_attempt_run) values ({id}, 'n', 'null', 'sleeping', null);
         create table absurd.t_unknown (task_id uuid)",
        c = t("c"), r = t("r"), w = t("w"), e = t("e"), t = t("t"),
    ))
    .await
    .unwrap();
    let (well, findings) = doctor(&database).await;
    assert!(!well);
    let all = findings.iter().map(|finding| finding["what"].as_str().unwrap()).collect::<Vec<_>>().join("\n");
    for part in [
        "3 checkpoints belong to no task",
        "1 runs belong to no task",
        "1 waits belong to no",
        "1 events were awaited",
        "1 tasks have ended",
        "1 tasks have not ended",
        "\"unknown\" has tables, but is not registered",
    ] {
        assert!(all.contains(part), "{part} is not in:\n{all}");
    }
    assert_eq!(findings.len(), 7, "{all}");
    sql.batch_execute("drop table absurd.t_unknown").await.unwrap();
    for finding in findings.iter().filter(|finding| !finding["what"].as_str().unwrap().contains("unknown")) {
        sql.batch_execute(finding["mend"].as_str().unwrap())
            .await
            .unwrap_or_else(|error| panic!("{finding}: {error:?}"));
    }
    let (_, left) = doctor(&database).await;
    let left = left.iter().map(|finding| finding["what"].to_string()).collect::<String>();
    assert!(left.is_empty() || left.contains("1 tasks have ended"), "the stuck task, now failed, has no run: {left}");
}

/// Every key and index that the contract's queues have is missed, in both kinds of storage, and the cures bring all back.
#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_misses_every_key_and_index() {
    let database = Database::new().await;
    let sql = database.connect().await;
    let all = "select n.nspname || '.' || quote_ident(i.relname), k.conname is not null, x.indrelid::regclass::text,
                      quote_ident(k.conname)
                 from pg_index x join pg_class i on i.oid = x.indexrelid join pg_namespace n on n.oid = i.relnamespace
                 join pg_class t on t.oid = x.indrelid and not t.relispartition
                 left join pg_constraint k on k.conindid = x.indexrelid
                where n.nspname = 'absurd' and substr(t.relname, 2) in ('_it''s \"q\"', '_parts')
                  and t.relname not like 'i\\_%' and i.relname not like '%idempotency%'
                order by 1";
    sql.batch_execute(
        "select absurd.create_queue('it''s \"q\"'); select absurd_server.install_doorbell('it''s \"q\"');
         select absurd.create_queue('parts', 'partitioned'); select absurd_server.install_doorbell('parts')",
    )
    .await
    .unwrap();
    assert_eq!(doctor(&database).await, (true, vec![]));
    let indexes = sql.query(all, &[]).await.unwrap();
    assert_eq!(indexes.len(), 30);
    for row in &indexes {
        let (index, is_key, table): (&str, bool, &str) = (row.get(0), row.get(1), row.get(2));
        let constraint: Option<&str> = row.get(3);
        let drop = match constraint.filter(|_| is_key) {
            Some(constraint) => format!("alter table {table} drop constraint {constraint}"),
            None => format!("drop index {index}"),
        };
        sql.batch_execute(&drop).await.unwrap();
    }
    let (well, findings) = doctor(&database).await;
    let missed: Vec<&Value> = findings.iter().filter(|finding| finding["what"].to_string().contains("valid")).collect();
    assert_eq!((well, missed.len()), (false, indexes.len()), "{findings:?}");
    for finding in missed {
        sql.batch_execute(finding["mend"].as_str().unwrap()).await.unwrap();
    }
    assert_eq!(doctor(&database).await, (true, vec![]));
    assert_eq!(sql.query(all, &[]).await.unwrap().len(), indexes.len());
}

/// Names that would share tables or indexes with another queue are refused, in either order.
#[tokio::test(flavor = "multi_thread")]
async fn colliding_names_are_refused() {
    let server = Server::start().await;
    let client = server.client();
    let mut grpc = server.raw().await;
    let mut create = async |queue: &str, mode: i32| {
        let request = absurd_proto::v1::CreateQueueRequest { queue: queue.into(), storage_mode: mode, policy: None };
        grpc.create_queue(request).await.map(drop)
    };
    create("weekly", 2).await.unwrap();
    create("a_604", 1).await.unwrap();
    create("b_ti", 1).await.unwrap();
    for (queue, mode) in [
        ("weekly_d", 1),
        ("weekly_604", 1),
        ("weekly_sai", 1),
        ("q_pkey", 1),
        ("q_idempotency_key_key", 1),
        ("a", 2),
        ("b", 1),
    ] {
        let status = create(queue, mode).await.unwrap_err();
        let details = status.get_error_details();
        assert_eq!(details.bad_request().unwrap().field_violations[0].field, "queue", "{queue}: {status}");
    }
    for (queue, mode) in [("a", 1), ("weekly_dd", 1), ("weekly_60", 1), ("q_d", 1), ("weekly", 2)] {
        create(queue, mode).await.unwrap_or_else(|status| panic!("{queue}: {status}"));
    }
    assert!(client.list_queues().await.unwrap().len() >= 7);
}

/// Policies are read and changed over gRPC; what is not named stays, what depends on the queue is refused by name.
#[tokio::test(flavor = "multi_thread")]
async fn policies_are_read_and_changed() {
    use absurd_client::{DetachMode, PolicyChanges, QueueOptions};
    let server = Server::start().await;
    let client = server.client();
    let days = |days: u64| Duration::from_secs(days * 86400);
    let before = client.get_queue_policy().await.unwrap();
    assert_eq!((before.cleanup_ttl, before.cleanup_limit), (days(30), 1000));
    let changes = PolicyChanges {
        cleanup_ttl: Some(days(7)),
        cleanup_limit: Some(5),
        detach_mode: Some(DetachMode::Empty),
        ..PolicyChanges::default()
    };
    let after = client.set_queue_policy(changes).await.unwrap();
    assert_eq!(client.set_queue_policy(changes).await.unwrap(), after, "said twice");
    assert_eq!((after.cleanup_ttl, after.cleanup_limit, after.detach_mode), (days(7), 5, DetachMode::Empty));
    assert_eq!(after.partition_lookahead, before.partition_lookahead);
    for (wrong, field) in [
        (PolicyChanges { cleanup_limit: Some(0), ..PolicyChanges::default() }, "cleanup_limit"),
        (PolicyChanges { cleanup_ttl: Some(Duration::from_millis(1)), ..PolicyChanges::default() }, "cleanup_ttl"),
        (PolicyChanges { detach_min_age: Some(days(36_601)), ..PolicyChanges::default() }, "detach_min_age"),
        (PolicyChanges { default_partition: Some(true), ..PolicyChanges::default() }, "policy"),
    ] {
        assert_eq!(client.set_queue_policy(wrong).await.unwrap_err().field(), Some(field));
    }
    let nowhere = client.with_queue("nowhere").get_queue_policy().await.unwrap_err();
    assert_eq!(nowhere.reason(), absurd_client::Reason::QueueNotFound);
    assert_eq!(client.get_queue_policy().await.unwrap(), after, "nothing is half-written");

    // A queue is created with its policy, or not at all.
    let kept = client.with_queue("kept");
    let with = |policy| QueueOptions { policy, ..QueueOptions::default() };
    let unfit =
        with(PolicyChanges { default_partition: Some(true), cleanup_limit: Some(7), ..PolicyChanges::default() });
    assert_eq!(kept.create_queue_with(unfit).await.unwrap_err().field(), Some("policy"));
    assert!(client.list_queues().await.unwrap().iter().all(|queue| queue.name != "kept"));
    let policy = PolicyChanges { cleanup_limit: Some(7), ..PolicyChanges::default() };
    assert!(kept.create_queue_with(with(policy)).await.unwrap());
    assert!(!kept.create_queue_with(with(policy)).await.unwrap(), "said twice");
    assert_eq!(kept.get_queue_policy().await.unwrap().cleanup_limit, 7);
}

#[tokio::test(flavor = "multi_thread")]
async fn old_things_are_deleted_by_hand() {
    let server = Server::start().await;
    let client = server.client();
    let sql = server.database().connect().await;
    sql.batch_execute(
        "select absurd.spawn_task('q', 'n', 'null') from generate_series(1, 5);
         select absurd.complete_run('q', c.run_id) from absurd.claim_task('q', 'w', 30, 4) c;
         select absurd.emit_event('q', 'e' || g) from generate_series(1, 3) g",
    )
    .await
    .unwrap();
    assert_eq!(client.cleanup_tasks(Duration::from_secs(3600), None).await.unwrap(), 0);
    assert_eq!(client.cleanup_tasks(Duration::ZERO, Some(3)).await.unwrap(), 3);
    assert_eq!(client.cleanup_tasks(Duration::ZERO, None).await.unwrap(), 1);
    assert_eq!(client.cleanup_events(Duration::ZERO, None).await.unwrap(), 3);
    assert_eq!(client.cleanup_tasks(Duration::ZERO, Some(-1)).await.unwrap_err().field(), Some("limit"));
    let nowhere = client.with_queue("nowhere").cleanup_events(Duration::ZERO, None).await.unwrap_err();
    assert_eq!(nowhere.reason(), absurd_client::Reason::QueueNotFound);
}

/// Tasks that Postgres refuses to move on, more than a sweep takes at once, hold up nobody: they are set aside, the doctor
/// and the metrics tell why, and they move on once they can.
#[tokio::test(flavor = "multi_thread")]
async fn tasks_that_cannot_be_moved_on_hold_up_nobody() {
    let server = quick().await;
    let sql = server.database().connect().await;
    sql.batch_execute(
        "select absurd.spawn_task('q', 'poison', '{}') from generate_series(1, 600);
         select absurd.spawn_task('q', 'fine', '{}', '{\"max_attempts\": 3}');
         select absurd.claim_task('q', 'w', 3600, 1000);
         create function refuse() returns trigger language plpgsql as $$ begin raise exception 'not today'; end $$;
         create trigger poison before update of state on absurd.r_q for each row
           when (old.claim_expires_at = '2001-01-01') execute function refuse();
         update absurd.r_q r set claim_expires_at = case t.task_name when 'poison' then timestamptz '2001-01-01'
                                                                     else now() - interval '1 minute' end
           from absurd.t_q t where t.task_id = r.task_id",
    )
    .await
    .unwrap();
    let count = async |query: &str| sql.query_one(query, &[]).await.unwrap().get::<_, i64>(0);
    eventually("the others' leases are swept", || async {
        (count("select count(*) from absurd.r_q r join absurd.t_q t using (task_id) where t.task_name = 'fine'").await
            == 2)
            .then_some(())
    })
    .await;
    eventually("all of them are set aside", || async {
        (count("select count(*) from absurd_server.quarantine where reason = 'lease'").await == 600).then_some(())
    })
    .await;
    let (good, found) = doctor(server.database()).await;
    let told = found.iter().filter(|finding| finding["what"].as_str().unwrap().contains("not today")).count();
    assert!(!good && told == 600, "{told} {found:?}");
    sql.batch_execute("drop trigger poison on absurd.r_q; update absurd_server.quarantine set retry_at = now()")
        .await
        .unwrap();
    eventually("they move on", || async {
        (count("select count(*) from absurd.r_q where state = 'running'").await == 0).then_some(())
    })
    .await;
    eventually("and are forgotten", || async {
        (count("select count(*) from absurd_server.quarantine").await == 0).then_some(())
    })
    .await;
    server.stop().await;
}

/// Runs that Postgres refuses to have claimed are found and passed over; all others arrive, on every kind of stream, and a
/// spawn of such a task is a spawn. They come once they can.
#[tokio::test(flavor = "multi_thread")]
async fn runs_that_cannot_be_claimed_hold_up_nobody() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    sql.batch_execute(
        "create function refuse() returns trigger language plpgsql as $$ begin raise exception 'not today'; end $$;
         create trigger poison before insert or update of state on absurd.t_q for each row
           when (new.task_name = 'poison' and new.state = 'running') execute function refuse();
         select absurd.spawn_task('q', case when i % 3 = 0 then 'poison' when i % 3 = 1 then 'fine' else 'other' end, '{}')
           from generate_series(1, 120) i",
    )
    .await
    .unwrap();
    let arrive = async |names: &[&str], count: usize| {
        let options = StreamOptions {
            max_in_flight: 10,
            task_names: names.iter().map(|name| (*name).to_owned()).collect(),
            ..StreamOptions::default()
        };
        let mut stream = server.client().claim_stream(options).await.unwrap();
        for _ in 0..count {
            let task = in_time("the others arrive", stream.next()).await.unwrap();
            assert_eq!(task.attempt, 1);
            task.complete(&j!(1)).await.unwrap();
        }
    };
    arrive(&["fine", "poison"], 40).await;
    arrive(&[], 40).await;
    let pulled = ClaimOptions { qty: 10, ..ClaimOptions::default() };
    assert!(server.client().claim_task(pulled).await.unwrap().is_empty(), "the rest is poison");
    let count = async |query: &str| sql.query_one(query, &[]).await.unwrap().get::<_, i64>(0);
    let noted = "select count(*) from absurd_server.quarantine where reason = 'claim' and problem like '%not today%'";
    assert_eq!(count(noted).await, 40);
    let (good, found) = doctor(server.database()).await;
    let told = found.iter().filter(|finding| finding["what"].as_str().unwrap().contains("refuses to have it claimed"));
    assert!(!good && told.count() == 40, "{found:?}");
    // A worker waits: the task would go straight to it.
    let options = StreamOptions { max_in_flight: 50, ..StreamOptions::default() };
    let mut idle = server.client().claim_stream(options).await.unwrap();
    server.client().spawn_task("poison", &j!(1), SpawnOptions::default()).await.unwrap();
    let two = (0..2).map(|_| NewTask::new("poison", &j!(1), SpawnOptions::default()).unwrap()).collect();
    server.client().spawn_tasks(two).await.unwrap();
    server.client().spawn_task("fine", &j!(1), SpawnOptions::default()).await.unwrap();
    let task = in_time("what is fine comes", idle.next()).await.unwrap();
    assert_eq!(task.task_name, "fine");
    task.complete(&j!(1)).await.unwrap();
    drop(idle);
    sql.batch_execute("drop trigger poison on absurd.t_q").await.unwrap();
    // This replica looks at them again after a while; one that knows nothing of them does at once.
    let other = Server::start_on(server.database()).await;
    let options = StreamOptions { max_in_flight: 50, ..StreamOptions::default() };
    let mut stream = other.client().claim_stream(options).await.unwrap();
    for _ in 0..43 {
        in_time("they come once they can", stream.next()).await.unwrap().complete(&j!(1)).await.unwrap();
    }
    eventually("and are forgotten", || async {
        (count("select count(*) from absurd_server.quarantine").await == 0).then_some(())
    })
    .await;
    other.stop().await;
    server.stop().await;
}

/// Policies that nobody can read, written by plain SQL, harm only their own task.
#[tokio::test(flavor = "multi_thread")]
async fn unreadable_policies_harm_only_their_task() {
    let server = Server::start().await;
    let sql = server.database().connect().await;
    sql.batch_execute("select absurd.spawn_task('q', 'fine', '{}') from generate_series(1, 20)").await.unwrap();
    sql.batch_execute(
        r#"update absurd.t_q t set retry_strategy = p.retry, cancellation = p.cancel
             from (select task_id, row_number() over (order by task_id) as n from absurd.t_q) o
             join (select row_number() over () as n, retry, cancel from (values
               ('"x"'::jsonb, '"x"'::jsonb), ('[]', '[1]'), ('{"kind": "exponential", "factor": "NaN"}', '{"max_delay": "NaN"}'),
               ('{"kind": "fixed", "base_seconds": 1e300}', '{"max_duration": 1e300}'),
               ('{"kind": "fixed", "base_seconds": -1}', '{"max_delay": -1e308}'), ('{"kind": 7}', '{"max_delay": {}}'),
               ('{"kind": "fixed", "base_seconds": "1e400"}', '{"max_duration": "1e400"}'), ('7', 'true')) v (retry, cancel)) p using (n)
            where t.task_id = o.task_id"#,
    )
    .await
    .unwrap();
    let client = server.client();
    let mut seen = std::collections::BTreeSet::new();
    while seen.len() < 20 {
        let options = ClaimOptions { qty: 20, wait: Duration::from_secs(10), ..ClaimOptions::default() };
        let tasks = client.claim_task(options).await.unwrap();
        assert!(!tasks.is_empty(), "only {seen:?} arrived");
        for task in tasks {
            task.fail(&"once").await.unwrap();
            seen.insert(task.task_id);
        }
    }
    server.stop().await;
}

/// The same for tasks that a policy cancels: more of them than a sweep takes, before one that can be cancelled.
#[tokio::test(flavor = "multi_thread")]
async fn tasks_that_cannot_be_cancelled_hold_up_nobody() {
    let server = quick().await;
    let sql = server.database().connect().await;
    sql.batch_execute(
        "create function refuse() returns trigger language plpgsql as $$ begin raise exception 'not today' using errcode = 'ZZ001'; end $$;
         create trigger poison before update of state on absurd.t_q for each row
           when (old.task_name = 'poison') execute function refuse();
         select absurd.spawn_task('q', 'poison', '{}', '{\"cancellation\": {\"max_delay\": 1}}') from generate_series(1, 250);
         select absurd.spawn_task('q', 'fine', '{}', '{\"cancellation\": {\"max_delay\": 1}}')",
    )
    .await
    .unwrap();
    eventually("the other one is cancelled", || async {
        let state = "select state from absurd.t_q where task_name = 'fine'";
        (sql.query_one(state, &[]).await.unwrap().get::<_, &str>(0) == "cancelled").then_some(())
    })
    .await;
    eventually("all of them are set aside", || async {
        let count =
            "select count(*) from absurd_server.quarantine where reason = 'policy' and problem like '%not today%'";
        (sql.query_one(count, &[]).await.unwrap().get::<_, i64>(0) == 250).then_some(())
    })
    .await;
    eventually("the metrics tell", || async {
        let count = crate::limits::metric(&server, "absurd_quarantined_tasks{reason=\"policy\"}").await;
        ((count - 250.0).abs() < 0.5).then_some(())
    })
    .await;
    server.stop().await;
}

/// Dead rows stay while a transaction that began before is open: the metrics say for how long.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_transaction_is_told_by_the_metrics() {
    let server = quick().await;
    let sql = server.database().connect().await;
    sql.batch_execute("begin isolation level repeatable read; select from absurd.queues").await.unwrap();
    eventually("the metrics tell", || async {
        let age = crate::limits::metric(&server, "absurd_oldest_transaction_seconds").await;
        (age > 2.0).then_some(())
    })
    .await;
    server.stop().await;
}
