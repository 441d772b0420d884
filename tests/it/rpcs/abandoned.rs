//! Callers that go away at every await of every RPC. One call to Postgres hangs, and the caller leaves. From then on
//! nothing counts that caller: no call, no waiter, no stream, no write that waits; and once Postgres goes on, nothing is
//! held and the same call succeeds.

use std::collections::BTreeSet;
use std::time::Duration;

use absurd_client::{ClaimOptions, SpawnOptions};
use absurd_proto::v1 as pb;
use absurd_server::store::failing::{Failing, Fate};
use absurd_tests::{Database, PATIENCE, Server, Toxic, eventually, in_time};
use futures_util::future::join_all;
use prost_reflect::DynamicMessage;
use serde_json::{Value as Json, json as j};
use tokio::time::Instant;

use super::cases::{Again, Case, Expected, cases, filled, merged};
use super::world::{World, reason};

/// Calls that an RPC makes at most.
const CALLS_MAX: u32 = 30;
/// Servers that share the cases: what is armed in one holds for all calls that it gets.
const WORLDS: usize = 4;

/// Counts by their names, without the zeros.
type Counts = Vec<(&'static str, usize)>;

/// Calls that wait, beside those of the table: none may wait for long, since the same call is made again.
fn waiting() -> Vec<Case> {
    let case = |rpc, kind, more: Json| Case {
        rpc,
        kind,
        request: merged(&j!({"queue": "$queue"}), &more),
        expected: Expected::Done(Again::Anew),
    };
    vec![
        case("ClaimStream", "running", j!({"worker_id": "w", "held_claim_tokens": ["$token"]})),
        case("ClaimTask", "", j!({"worker_id": "w", "wait": "1s"})),
        case("AwaitTaskResult", "pending", j!({"task_id": "$task", "timeout": "1s"})),
    ]
}

/// What a server counts of its callers.
fn of_callers(server: &Server) -> Counts {
    let engine = server.app().engine();
    let mut all = vec![
        ("calls", server.app().calls()),
        ("waits", engine.waits.count()),
        ("streams", engine.dispatcher.streams()),
        ("writes", engine.waiting()),
    ];
    all.retain(|(_, count)| *count > 0);
    all
}

/// What a server counts at all.
fn of_all(server: &Server) -> Counts {
    let engine = server.app().engine();
    let mut all = vec![("calls", server.app().calls()), ("hung", engine.store.failing().hanging())];
    all.retain(|(_, count)| *count > 0);
    all.extend(engine.under_way());
    all
}

/// Waits until nothing is counted.
async fn until_nothing_is_left(what: &str, count: impl Fn() -> Counts) {
    let until = Instant::now() + PATIENCE;
    loop {
        let left = count();
        if left.is_empty() {
            return;
        }
        assert!(Instant::now() < until, "{what}: left are {left:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn until_one_hangs(failing: &Failing) {
    while failing.hanging() == 0 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// The same call again. What was given up may have been carried out all the same, and then it says so.
async fn succeeds(world: &World, what: &str, case: &Case, message: &DynamicMessage) {
    match (&case.expected, in_time(what, world.call(case.rpc, message)).await) {
        (_, Ok(_)) => {}
        (Expected::Done(Again::Refused(expected)), Err(status)) => {
            assert_eq!(reason(&status), *expected, "{what}: {status:?}");
        }
        (_, Err(status)) => panic!("{what}: {status:?}"),
    }
}

/// Gives one RPC up while its nth call to Postgres hangs; says whether it makes so many.
async fn given_up(world: &World, index: usize, case: &Case, nth: u32) -> bool {
    let queue = format!("a{index}x{nth}");
    let made = world.make(&queue, case.kind).await;
    let request = filled(&case.request, &queue, &made);
    let message = DynamicMessage::deserialize(world.methods[case.rpc].input(), request).unwrap();
    let what = format!("{} {} {:.150}, call {nth} hangs", case.rpc, case.kind, case.request.to_string());
    let failing = world.server.app().engine().store.failing();
    failing.arm(nth, Fate::Hangs);
    // The caller is dropped where the other branch is taken.
    let either = Box::pin(async {
        tokio::select! {
            answered = world.call(case.rpc, &message) => {
                drop(answered.expect(&what));
                false
            }
            () = until_one_hangs(failing) => true,
        }
    });
    let hung = in_time(&what, either).await;
    until_nothing_is_left(&what, || of_callers(&world.server)).await;
    failing.disarm();
    until_nothing_is_left(&what, || of_all(&world.server)).await;
    if !hung {
        return false;
    }
    if case.rpc == "ClaimTask" && case.kind == "pending" {
        // Whatever was claimed for the caller that left goes to the next one.
        eventually(&what, async || {
            let answer = world.call(case.rpc, &message).await.expect(&what);
            answer["tasks"].as_array().is_some_and(|tasks| !tasks.is_empty()).then_some(())
        })
        .await;
    } else {
        succeeds(world, &what, case, &message).await;
    }
    true
}

/// Walks a part of the cases; returns which RPCs were given up, and how many times in all.
async fn walk(part: usize, all: &[Case]) -> (BTreeSet<&'static str>, usize) {
    // Looks would be counted among its calls.
    let world = World::on(Server::start_on_hints(&Database::new().await).await).await;
    let (mut rpcs, mut times) = (BTreeSet::new(), 0);
    for (index, case) in all.iter().enumerate().skip(part).step_by(WORLDS) {
        for nth in 1..=CALLS_MAX {
            if !given_up(&world, index, case, nth).await {
                break;
            }
            assert!(nth < CALLS_MAX, "{}: a call that never ends", case.rpc);
            rpcs.insert(case.rpc);
            times += 1;
        }
    }
    let dispatcher = &world.server.app().engine().dispatcher;
    eventually("no queue is served any more", async || dispatcher.active().is_empty().then_some(())).await;
    (rpcs, times)
}

/// Every RPC but `DrainWorker`, which asks Postgres nothing, is given up at each of its calls to Postgres.
#[tokio::test(flavor = "multi_thread")]
async fn callers_that_go_away_at_any_await_leave_nothing_behind() {
    let done = cases().into_iter().filter(|case| matches!(case.expected, Expected::Done(_)));
    // Those that wait come first, each in a world of its own.
    let all: Vec<Case> = waiting().into_iter().chain(done).collect();
    let walked = join_all((0..WORLDS).map(|part| walk(part, &all))).await;
    let times: usize = walked.iter().map(|(_, times)| times).sum();
    let rpcs: BTreeSet<&str> = walked.iter().flat_map(|(rpcs, _)| rpcs.iter().copied()).collect();
    eprintln!("{times} callers went away");
    let mut expected: BTreeSet<&str> = all.iter().map(|case| case.rpc).collect();
    expected.remove("DrainWorker");
    assert_eq!(rpcs, expected);
    assert!(times > 70, "{times}");
}

/// Makes reads of a task and waits for a task take an hour, and counts those that are cancelled on request.
const SLOW: &str = "
    create sequence public.cancelled;
    create function public.slow() returns boolean language plpgsql as $$
    begin
      perform pg_sleep(3600);
      return true;
    exception when query_canceled then
      if sqlerrm like '%user request%' then
        perform nextval('public.cancelled');
      end if;
      raise;
    end $$;
    alter table absurd.t_q rename to slow_q;
    create view absurd.t_q as
      select * from absurd.slow_q where case when current_query() like '-- task_get%' then public.slow() else true end;
    do $$
    begin
      execute format('create or replace function absurd_server.await_task(%s) returns %s language plpgsql as %L',
                     pg_get_function_arguments(oid), pg_get_function_result(oid), 'begin perform public.slow(); end')
         from pg_proc where proname = 'await_task' and pronamespace = 'absurd_server'::regnamespace;
    end $$";

/// A statement whose caller leaves is cancelled, by itself or in a transaction, and its connection serves the next caller.
#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_nobody_waits_for_is_cancelled() {
    let server = Server::start_on_hints(&Database::new().await).await;
    let (client, sql) = (server.client(), server.database().connect().await);
    let task_id = client.spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap().task_id.to_string();
    let parent = client.claim_task(ClaimOptions::default()).await.unwrap().remove(0);
    sql.batch_execute(SLOW).await.unwrap();
    let get = pb::GetTaskStatusRequest { queue: "q".into(), task_id: task_id.clone(), ..Default::default() };
    let wait = pb::AwaitTaskRequest {
        queue: "q".into(),
        claim_token: Some(parent.claim_token().to_owned()),
        step_name: "s".into(),
        awaited_queue: "q".into(),
        awaited_task_id: task_id,
        ..Default::default()
    };
    let (mut reader, mut waiter) = (server.raw().await, server.raw().await);
    let calls = [
        ("task_get", tokio::spawn(async move { drop(reader.get_task_status(get).await) })),
        ("task_await", tokio::spawn(async move { drop(waiter.await_task(wait).await) })),
    ];
    for (cancelled, (statement, call)) in (1_i64..).zip(calls) {
        let runs = format!(
            "select count(*) = 1 from pg_stat_activity
              where datname = current_database() and wait_event = 'PgSleep' and query like '-- {statement}%'"
        );
        let holds =
            async |condition: &str| sql.query_one(condition, &[]).await.unwrap().get::<_, bool>(0).then_some(());
        eventually("the statement runs", || holds(&runs)).await;
        call.abort();
        let stopped = format!("select is_called and last_value = {cancelled} from public.cancelled");
        eventually("the statement is cancelled", || holds(&stopped)).await;
    }
    until_nothing_is_left("both callers left", || of_all(&server)).await;
}

/// Makes reads of a task last until `public.end` is told.
const HELD: &str = "
    create sequence public.ended;
    create function public.held() returns boolean language plpgsql as $$
    begin
      while not (select is_called from public.ended) loop
        perform pg_sleep(0.01);
      end loop;
      return true;
    end $$;
    alter table absurd.t_q rename to held_q;
    create view absurd.t_q as
      select * from absurd.held_q where case when current_query() like '-- task_get%' then public.held() else true end";

/// A request to cancel that Postgres gets late ends no statement of a later caller.
#[tokio::test(flavor = "multi_thread")]
async fn a_late_cancel_ends_no_statement_of_another_caller() {
    let (server, link) = crate::faults::over_a_link().await;
    let (client, sql) = (server.client(), server.database().connect().await);
    let task_id = client.spawn_task("n", &j!(null), SpawnOptions::default()).await.unwrap().task_id;
    sql.batch_execute(HELD).await.unwrap();
    let running = async |count: i64| {
        let runs = "select count(*) from pg_stat_activity
                     where datname = current_database() and state = 'active' and query like '-- task_get%'";
        let row = sql.query_one(runs, &[]).await.unwrap();
        (row.get::<_, i64>(0) == count).then_some(())
    };
    let grpc = server.raw().await;
    let read = || {
        let mut grpc = grpc.clone();
        let get = pb::GetTaskStatusRequest { queue: "q".into(), task_id: task_id.to_string(), ..Default::default() };
        tokio::spawn(async move { grpc.get_task_status(get).await })
    };
    link.set(Toxic::HeldCancels);
    let abandoned = read();
    eventually("the statement runs", || running(1)).await;
    abandoned.abort();
    eventually("its cancel is under way", async || (link.cancels() > 0).then_some(())).await;
    sql.batch_execute("select nextval('public.ended')").await.unwrap();
    until_nothing_is_left("the caller left", || of_all(&server)).await;
    sql.batch_execute("select setval('public.ended', 1, false)").await.unwrap();
    // As many as there are connections for reads.
    let reads = [read(), read()];
    eventually("later callers read", || running(2)).await;
    link.set(Toxic::Pass);
    eventually("the cancel has passed", async || (link.cancels() == 0).then_some(())).await;
    // Postgres takes connections in their order, also those that carry a request to cancel.
    server.database().connect().await.batch_execute("select 1").await.unwrap();
    sql.batch_execute("select nextval('public.ended')").await.unwrap();
    for read in reads {
        in_time("the read", read).await.unwrap().unwrap();
    }
}
