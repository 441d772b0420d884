//! The checker on books written by hand: a good story, and each way in which it can go wrong.

use std::collections::BTreeSet;

use uuid::Uuid;

use super::{Arrival, Asked, Books, Row, Seen, check};
use crate::history::{Call, How, Op};

const TASK: Uuid = Uuid::from_u128(1);
const RUN: Uuid = Uuid::from_u128(2);

fn asked(op: Op, value: &str, began: i64) -> Asked {
    let call = Call { task: Some(TASK), run: Some(RUN), value: Some(value.into()), ..Call::default() };
    Asked {
        op,
        call,
        digest: Some("d".into()),
        began,
        ended: began + 9,
        how: How::Ok,
        why: None,
        value: None,
        first: None,
    }
}

fn run(at: i64, old_state: &str, state: &str) -> Row {
    let op = if old_state.is_empty() { 'I' } else { 'U' };
    let owner = if state == "pending" { "" } else { "w#d" };
    let old_owner = if ["", "pending"].contains(&old_state) { "" } else { "w#d" };
    Row {
        at,
        kind: 'r',
        op,
        task: TASK,
        run: RUN,
        attempt: 1,
        old_state: old_state.into(),
        state: state.into(),
        old_owner: old_owner.into(),
        owner: owner.into(),
        expires: Some(10_000),
        available: Some(0),
        ..Row::default()
    }
}

fn task(at: i64, old_state: &str, state: &str) -> Row {
    Row { kind: 't', run: Uuid::nil(), attempt: 3, old_owner: String::new(), ..run(at, old_state, state) }
}

/// A task is spawned, delivered, does a step, and is completed; an event is emitted.
fn story() -> Books {
    let mut spawn = asked(Op::Spawn, "", 1);
    spawn.call = Call { task: Some(TASK), name: Some("key".into()), ..Call::default() };
    (spawn.digest, spawn.value, spawn.first) = (None, Some(TASK.to_string()), Some(true));
    let mut step = asked(Op::Step, "v1", 110);
    step.call.name = Some("s0".into());
    let mut emit = asked(Op::Emit, "payload", 30);
    (emit.call.task, emit.call.run, emit.digest, emit.call.name) = (None, None, None, Some("event".into()));
    let params = Some("\"x\"".to_owned());
    Books {
        asked: vec![spawn, emit, step, asked(Op::Complete, "v2", 130)],
        arrivals: vec![Arrival {
            process: "w".into(),
            at: 105,
            stream: 1,
            task: TASK,
            run: RUN,
            digest: "d".into(),
            params: "\"x\"".into(),
            steps: Vec::new(),
            complete: true,
            woken: None,
        }],
        seen: vec![Seen { process: "w".into(), at: 90, stream: 1, what: "opened".into(), credit: 1 }],
        audit: vec![
            Row { name: Some("key".into()), value: params, ..task(5, "", "pending") },
            run(5, "", "pending"),
            Row {
                at: 35,
                kind: 'e',
                op: 'I',
                name: Some("event".into()),
                value: Some("payload".into()),
                ..Row::default()
            },
            run(100, "pending", "running"),
            task(100, "pending", "running"),
            Row { at: 115, kind: 'c', op: 'I', name: Some("s0".into()), value: Some("v1".into()), ..run(115, "", "") },
            Row { value: Some("v2".into()), ..run(135, "running", "completed") },
            Row { value: Some("v2".into()), ..task(135, "running", "completed") },
        ],
        redelivery_max: 1000,
        ..Books::default()
    }
}

/// The checks that a changed story breaks.
fn broken(change: impl FnOnce(&mut Books)) -> BTreeSet<&'static str> {
    let mut books = story();
    change(&mut books);
    check(&books).findings.iter().map(|finding| finding.check).collect()
}

#[test]
fn a_good_story_is_good() {
    let verdict = check(&story());
    assert_eq!(verdict.findings, vec![]);
    assert_eq!((verdict.figures["tasks"], verdict.figures["completed"], verdict.figures["deliveries"]), (1, 1, 1));
}

#[test]
fn what_is_lost_is_found() {
    let no_task = broken(|books| drop(books.audit.remove(0)));
    assert!(no_task.contains("C1"), "{no_task:?}");
    let no_step = broken(|books| drop(books.audit.remove(5)));
    assert!(no_step.contains("C5"), "{no_step:?}");
    let no_event = broken(|books| drop(books.audit.remove(2)));
    assert!(no_event.contains("C7"), "{no_event:?}");
    let no_end = broken(|books| books.audit.truncate(6));
    assert!(no_end.is_superset(&BTreeSet::from(["C1", "C6", "C8"])), "{no_end:?}");
}

/// What a second row like one of the story's breaks.
fn again(place: usize, change: impl FnOnce(&mut Row)) -> BTreeSet<&'static str> {
    broken(|books| {
        let mut row = books.audit[place].clone();
        change(&mut row);
        books.audit.insert(place + 1, row);
    })
}

#[test]
fn what_happens_twice_is_found() {
    let other = Uuid::from_u128(9);
    let two_tasks = again(0, |row| row.task = other);
    assert!(two_tasks.contains("C2"), "{two_tasks:?}");
    let two_runs = again(1, |row| row.run = other);
    assert!(two_runs.contains("C3"), "{two_runs:?}");
    let two_payloads = again(2, |row| row.value = Some("another".into()));
    assert!(two_payloads.contains("C7"), "{two_payloads:?}");
    let two_values = again(5, |row| row.value = Some("v3".into()));
    assert!(two_values.contains("C5"), "{two_values:?}");
    let two_ends = again(7, |_| {});
    assert!(two_ends.contains("C6"), "{two_ends:?}");
}

#[test]
fn who_did_not_hold_the_run_is_found() {
    let late_step = broken(|books| books.asked[2].digest = Some("old".into()));
    assert!(late_step.contains("C4"), "{late_step:?}");
    let late_end = broken(|books| books.asked[3].digest = Some("old".into()));
    assert!(late_end.is_superset(&BTreeSet::from(["C4", "C6"])), "{late_end:?}");
    let stolen = broken(|books| {
        let mut row = run(120, "running", "running");
        row.owner = "other#x".into();
        books.audit.insert(6, row);
    });
    assert!(stolen.contains("C4"), "{stolen:?}");
}

/// A claim that reached no worker may go back to be offered later; one that arrived sleeps by its worker's word.
#[test]
fn a_sleep_that_nobody_asked_for_is_found() {
    let slept = |delivered: bool| {
        broken(|books| {
            books.asked.truncate(2);
            books.audit.truncate(5);
            books.audit.push(run(115, "running", "sleeping"));
            books.audit.push(task(115, "running", "sleeping"));
            if !delivered {
                books.arrivals.clear();
            }
        })
    };
    assert!(slept(true).contains("C4"), "{:?}", slept(true));
    assert!(!slept(false).contains("C4"), "{:?}", slept(false));
}

#[test]
fn what_came_early_is_found() {
    let early_answer = broken(|books| books.asked[3].ended = 131);
    assert!(early_answer.contains("C6"), "{early_answer:?}");
    let early_end = broken(|books| {
        books.audit.truncate(6);
        books.audit.push(Row { name: Some("$ClaimTimeout".into()), ..run(500, "running", "failed") });
    });
    assert!(early_end.contains("C9"), "{early_end:?}");
    let early_task = broken(|books| books.seen[0].at = 5_000);
    assert!(early_task.contains("C12"), "{early_task:?}");
}

#[test]
fn what_arrives_otherwise_is_found() {
    let params = broken(|books| books.arrivals[0].params = "\"y\"".into());
    assert!(params.contains("C11"), "{params:?}");
    let step = broken(|books| books.arrivals[0].steps = vec![("s0".into(), "v9".into())]);
    assert!(step.contains("C5"), "{step:?}");
    let claim = broken(|books| books.arrivals[0].digest = "other".into());
    assert!(claim.contains("C4"), "{claim:?}");
}
