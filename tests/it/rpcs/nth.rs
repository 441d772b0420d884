//! Each call to Postgres that an RPC makes fails once, before it is carried out and after: the answer is honest, asking again
//! brings the same, and there is one effect.

use absurd_server::store::failing::Fate;
use absurd_tests::in_time;
use prost_reflect::DynamicMessage;
use tonic::Code;

use serde_json::json as j;

use super::Sums;
use super::cases::{Again, Case, Expected, cases, filled, merged};
use super::world::{World, reason};

/// Calls that an RPC makes at most.
const CALLS_MAX: u32 = 30;
/// Times that a caller asks until it knows.
const TRIES: usize = 4;

/// What may be answered where Postgres failed.
const HONEST: &[&str] = &["UNAVAILABLE", "OUTCOME_UNKNOWN", "DEADLINE_EXCEEDED"];

/// Failures that came about, in all parts.
static FAILURES: Sums<1> = Sums::new();

/// Asks until the answer says what has happened.
async fn until_known(world: &World, what: &str, case: &Case, message: &DynamicMessage) -> Option<usize> {
    for tries in 1..=TRIES {
        match in_time(what, world.call(case.rpc, message)).await {
            Ok(_) => return Some(tries),
            Err(status) => {
                let reason = reason(&status);
                let known = match &case.expected {
                    // The first try had its effect after all, and says so the second time.
                    Expected::Done(Again::Refused(expected)) if tries > 1 && reason == *expected => true,
                    _ => false,
                };
                if known {
                    return Some(tries);
                }
                assert!(HONEST.contains(&reason.as_str()), "{what}: {status:?}");
                assert_ne!(status.code(), Code::Internal, "{what}");
            }
        }
    }
    None
}

/// One RPC with one failure; says whether the failure came about, and how many rows there are in the end.
async fn once(world: &World, index: usize, case: &Case, nth: u32, fate: Fate) -> (bool, usize) {
    let queue = format!("n{index}x{nth}{}", if fate == Fate::FailsBefore { "b" } else { "a" });
    let made = world.make(&queue, case.kind).await;
    let message =
        DynamicMessage::deserialize(world.methods[case.rpc].input(), filled(&case.request, &queue, &made)).unwrap();
    let what = format!("{} {} {:.150}, call {nth} {fate:?}", case.rpc, case.kind, case.request.to_string());
    let failing = world.server.app().engine().store.failing();
    failing.arm(nth, fate);
    let known = until_known(world, &what, case, &message).await;
    let failed = failing.disarm();
    assert!(known.is_some(), "{what}: nothing is known after {TRIES} tries");
    (failed, world.fingerprint(&queue).await.lines().count())
}

/// The rows that there are without any failure, and as often as it was asked.
async fn undisturbed(world: &World, index: usize, case: &Case) -> usize {
    let queue = format!("n{index}");
    let made = world.make(&queue, case.kind).await;
    let message =
        DynamicMessage::deserialize(world.methods[case.rpc].input(), filled(&case.request, &queue, &made)).unwrap();
    world.call(case.rpc, &message).await.unwrap();
    world.fingerprint(&queue).await.lines().count()
}

/// Takes one case after the other: what is armed holds for all calls that a server gets.
async fn walk(part: usize, parts: usize) {
    let world = World::new().await;
    let mut failures = 0;
    let done = cases().into_iter().enumerate().filter(|(_, case)| matches!(case.expected, Expected::Done(_)));
    for (index, case) in done.skip(part).step_by(parts) {
        let rows = undisturbed(&world, index, &case).await;
        // Without an id of its own each try of such a call is another one.
        let repeats = !matches!(case.expected, Expected::Done(Again::Anew));
        for nth in 1..=CALLS_MAX {
            let mut any = false;
            for fate in [Fate::FailsBefore, Fate::FailsAfter] {
                let (failed, after) = once(&world, index, &case, nth, fate).await;
                any |= failed;
                failures += usize::from(failed);
                if repeats {
                    assert_eq!(
                        after, rows,
                        "{} {}: call {nth} {fate:?} left another number of rows",
                        case.rpc, case.kind
                    );
                }
            }
            if !any {
                break;
            }
            assert!(nth < CALLS_MAX, "{}: a call that never ends", case.rpc);
        }
    }
    eprintln!("{failures} failures");
    if let Some([failures]) = FAILURES.add(parts, [failures]) {
        assert!(failures > 100, "{failures}");
    }
}

mod each_call_to_postgres_may_fail_once {
    in_parts! { super::walk => first second third fourth }
}

/// Several items of one run are one transaction: when its answer is lost, the last item tells what became of all.
#[tokio::test(flavor = "multi_thread")]
async fn items_of_one_run_survive_a_lost_commit() {
    let world = World::new().await;
    let failing = world.server.app().engine().store.failing();
    for nth in 1..=CALLS_MAX {
        let mut any = false;
        for fate in [Fate::FailsBefore, Fate::FailsAfter] {
            let queue = format!("i{nth}{fate:?}").to_lowercase();
            let made = world.make(&queue, "running").await;
            let item = |action: serde_json::Value| merged(&j!({"claim_token": made.token}), &action);
            let items = [
                item(j!({"checkpoint": {"checkpoint_name": "s", "state": {"text": "1"}}})),
                item(j!({"complete": {"result": {"text": "2"}}})),
            ];
            failing.arm(nth, fate);
            let answer = world.ask("SettleTasks", j!({"queue": queue, "items": items})).await;
            any |= failing.disarm();
            let errors: Vec<_> =
                answer["results"].as_array().unwrap().iter().filter(|one| !one["error"].is_null()).collect();
            assert!(errors.is_empty(), "call {nth} {fate:?}: {errors:?}");
            let result = world.ask("GetTaskResult", j!({"queue": queue, "task_id": made.task})).await;
            assert_eq!(result["result"]["result"]["text"], "2", "{result}");
            let step = j!({"queue": queue, "task_id": made.task, "checkpoint_name": "s"});
            assert_eq!(world.ask("GetCheckpoint", step).await["checkpoint"]["state"]["text"], "1");
        }
        if !any {
            return;
        }
    }
    panic!("calls without end");
}
