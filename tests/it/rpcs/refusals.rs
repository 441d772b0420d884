//! The database's owner refuses rows with every SQLSTATE class there is: each RPC that writes answers with the documented
//! status and reason, nothing is half-written, and neighbours are served as before.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use absurd_proto::v1 as pb;
use absurd_tests::{in_time, root};
use prost_reflect::DynamicMessage;
use serde_json::Value as Json;
use tonic::{Code, Status};

use super::cases::{Expected, cases, filled};
use super::world::{World, reason};

/// RPCs that write rows of a queue, or of the registry, for a caller.
const WRITES: &[&str] = &[
    "CompleteTask",
    "FailTask",
    "ExtendClaim",
    "SetCheckpoint",
    "SaveCheckpointForRun",
    "AwaitEvent",
    "WaitForEvent",
    "AwaitTask",
    "SetRunSleeping",
    "Sleep",
    "ScheduleTask",
    "SetQueuePolicy",
    "CleanupTasks",
    "SpawnTask",
    "SpawnTasks",
    "SettleTasks",
    "EmitEvent",
    "CancelTask",
    "RetryTask",
    "CreateQueue",
    "CreateWorkflowRun",
];

/// One code of each class that the server's table knows, and some whose meaning differs from that of their class.
fn codes() -> BTreeSet<String> {
    let known = std::fs::read_to_string(root().join("server/src/store/sqlstates.txt")).unwrap();
    let known = known.lines().filter(|line| !line.starts_with('#')).flat_map(str::split_whitespace);
    let mut classes = BTreeSet::new();
    let mut codes: BTreeSet<String> =
        known.filter(|code| classes.insert(code[..2].to_owned())).map(str::to_owned).collect();
    codes.remove("00000");
    let more =
        ["40001", "40P01", "55P03", "42501", "P0001", "57014", "57P01", "53300", "23505", "XX001", "AB001", "MY001"];
    codes.extend(more.map(str::to_owned));
    codes
}

/// Whether the server tries again what ends with a code.
fn passes(code: &str) -> bool {
    matches!(code, "55P03" | "55006" | "72000" | "40000" | "40001" | "40P01")
}

struct Asked {
    rpc: &'static str,
    queue: String,
    request: DynamicMessage,
    before: String,
}

async fn prepared(world: &World) -> Vec<Asked> {
    let mut all = Vec::new();
    for (index, case) in cases().into_iter().enumerate() {
        if matches!(case.expected, Expected::Done(_)) && WRITES.contains(&case.rpc) {
            let queue = format!("c{index}");
            let made = world.make(&queue, case.kind).await;
            let request = filled(&case.request, &queue, &made);
            let request = DynamicMessage::deserialize(world.methods[case.rpc].input(), request).unwrap();
            let before = world.fingerprint(&queue).await;
            all.push(Asked { rpc: case.rpc, queue, request, before });
        }
    }
    all
}

/// Every write to the tables of the queues, and to the registries, ends with the code in `public.refusal`.
async fn refuse_everything(world: &World) {
    let sql = world.server.database().connect().await;
    sql.batch_execute(
        "create table public.refusal (code text);
         insert into public.refusal values ('P0001');
         create function public.refuse() returns trigger language plpgsql as $$
         declare v_code text := (select code from public.refusal);
         begin
           raise exception 'quota exceeded' using errcode = v_code, hint = 'ask the owner';
         end $$;
         do $$ declare v_table regclass; begin
           for v_table in
             select oid from pg_class where relnamespace = 'absurd'::regnamespace and relkind = 'r' and relname ~ '^[trcew]_c'
             union all select unnest(array['absurd.queues', 'absurd_server.workflow_run']::regclass[])
           loop
             execute format('create trigger refuse before insert or update or delete on %s for each row
                             execute function public.refuse()', v_table);
           end loop;
         end $$",
    )
    .await
    .unwrap();
}

/// What one item of a call was answered, where each is answered on its own.
fn answer(rpc: &str, answered: Result<Json, Status>) -> Result<Json, (Code, String, String)> {
    match answered {
        // The transport's own word for a deadline that passed.
        Err(status) if status.code() == Code::Cancelled => {
            Err((Code::DeadlineExceeded, "DEADLINE_EXCEEDED".into(), status.message().to_owned()))
        }
        Err(status) => Err((status.code(), reason(&status), status.message().to_owned())),
        Ok(answer) if rpc == "SettleTasks" => {
            let error = &answer["results"][0]["error"];
            let text = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
            let code = i32::try_from(error["code"].as_i64().unwrap_or_default()).unwrap();
            Err((Code::from_i32(code), text("reason"), text("message")))
        }
        Ok(answer) => Ok(answer),
    }
}

async fn check(world: &World, asked: &Asked, code: &str) {
    let what = format!("{} refused with {code}", asked.rpc);
    let began = Instant::now();
    let answered = in_time(&what, world.call(asked.rpc, &asked.request)).await;
    let Err((status, reason, message)) = answer(asked.rpc, answered) else { panic!("{what}: it was done") };
    if passes(code) {
        let told = (status, reason.as_str());
        let known = [
            (Code::Unavailable, "DATABASE_BUSY"),
            (Code::Unavailable, "QUEUE_LOCKED"),
            (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
        ];
        assert!(known.contains(&told), "{what}: {told:?}");
        assert!(status != Code::DeadlineExceeded || began.elapsed() >= world.limit * 8 / 10, "{what}: before its time");
    } else {
        assert_eq!((status, reason.as_str()), (Code::FailedPrecondition, "DATABASE_REFUSED"), "{what}: {message}");
        assert!(message.contains("quota exceeded") && message.contains("ask the owner"), "{what}: {message}");
    }
}

/// Spawns on a queue that nothing refuses, until told to stop; gives back the longest time of a spawn.
async fn neighbour(world: &World, mut stop: tokio::sync::oneshot::Receiver<()>) -> Duration {
    let mut grpc = world.server.raw().await;
    let mut longest = Duration::ZERO;
    while stop.try_recv().is_err() {
        let task = Some(pb::NewTask { task_name: "n".into(), ..Default::default() });
        let began = Instant::now();
        grpc.spawn_task(pb::SpawnTaskRequest { queue: "q".into(), task }).await.expect("a neighbour's spawn");
        longest = longest.max(began.elapsed());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    longest
}

#[tokio::test(flavor = "multi_thread")]
async fn every_sqlstate_that_a_trigger_raises_is_answered_as_documented() {
    let mut world = World::new().await;
    let all = prepared(&world).await;
    let met: BTreeSet<&str> = all.iter().map(|asked| asked.rpc).collect();
    assert_eq!(met, WRITES.iter().copied().collect(), "an RPC without a case");
    refuse_everything(&world).await;
    world.limit = Duration::from_secs(10);
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let walk = async {
        let sql = world.server.database().connect().await;
        for code in codes().iter().filter(|code| !passes(code)) {
            sql.execute("update public.refusal set code = $1", &[code]).await.unwrap();
            futures_util::future::join_all(all.iter().map(|asked| check(&world, asked, code))).await;
        }
        let _ = stop.send(());
    };
    let ((), longest) = tokio::join!(walk, neighbour(&world, stopped));
    assert!(longest < Duration::from_secs(2), "a neighbour waited {longest:?}");
    for asked in &all {
        assert_eq!(world.fingerprint(&asked.queue).await, asked.before, "{}: refused, and yet written", asked.rpc);
    }
    // What asks for another try gets it, until the deadline.
    world.limit = Duration::from_secs(1);
    let sql = world.server.database().connect().await;
    for code in codes().iter().filter(|code| passes(code)) {
        sql.execute("update public.refusal set code = $1", &[code]).await.unwrap();
        futures_util::future::join_all(all.iter().map(|asked| check(&world, asked, code))).await;
    }
    for asked in &all {
        assert_eq!(world.fingerprint(&asked.queue).await, asked.before, "{}: refused, and yet written", asked.rpc);
    }
}

/// One caller's row is refused, and those who share its batch are served at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_row_costs_those_of_its_batch_nothing() {
    let world = World::new().await;
    let sql = world.server.database().connect().await;
    sql.batch_execute(
        "create function public.refuse() returns trigger language plpgsql as $$
         begin
           if new.task_name like 'code %' then
             raise exception 'no' using errcode = substr(new.task_name, 6);
           end if;
           return new;
         end $$;
         create trigger refuse before insert on absurd.t_q for each row execute function public.refuse()",
    )
    .await
    .unwrap();
    let spawn = async |name: String| {
        let mut grpc = world.server.raw().await;
        let task = Some(pb::NewTask { task_name: name, ..Default::default() });
        grpc.spawn_task(pb::SpawnTaskRequest { queue: "q".into(), task }).await
    };
    for code in ["22P05", "23514", "0A000", "42501", "P0001", "XX000", "08006", "57P01"] {
        let began = Instant::now();
        let names = (0..30).map(|n| if n % 10 == 3 { format!("code {code}") } else { "good".into() });
        let answers = in_time(code, futures_util::future::join_all(names.map(spawn))).await;
        let refused: Vec<Status> = answers.into_iter().filter_map(Result::err).collect();
        assert_eq!(refused.iter().map(reason).collect::<Vec<_>>(), vec!["DATABASE_REFUSED"; 3], "{code}");
        assert!(began.elapsed() < Duration::from_secs(3), "{code}: {:?}", began.elapsed());
    }
}
