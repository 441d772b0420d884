//! C4 the fence: each accepted effect came from the claim's holder; each acknowledged call had its effect. C7 events.

use std::collections::{BTreeMap, HashMap};

use super::{Asked, Claim, End, Replayed, Verdict};
use crate::history::{How, Op};

pub(super) fn check(replayed: &Replayed<'_>, verdict: &mut Verdict) {
    for asked in &replayed.books.asked {
        late(asked, verdict);
        match asked.op {
            Op::Step => step(replayed, asked, verdict),
            Op::Complete | Op::Fail => ending(replayed, asked, verdict),
            _ => {}
        }
    }
    written(replayed, verdict);
    events(replayed, verdict);
}

/// Counts what came too late and was refused.
fn late(asked: &Asked, verdict: &mut Verdict) {
    // Our client tells reasons, Python's worker codes.
    let lost = ["CLAIM_LOST", "CLAIM_EXPIRED", "ABORTED"];
    let refused =
        matches!(asked.how, How::No | How::Over) && asked.why.as_deref().is_some_and(|why| lost.contains(&why));
    verdict.count("late writes refused", usize::from(refused));
}

fn claim<'a>(replayed: &'a Replayed<'_>, asked: &Asked) -> Option<&'a Claim> {
    let (run, digest) = (asked.call.run?, asked.digest.as_deref()?);
    replayed.claims.get(&run)?.iter().find(|claim| claim.digest == digest)
}

fn story(asked: &Asked) -> String {
    let call = &asked.call;
    format!(
        "{:?} {:?} of run {:?} by {:?}, asked {} to {}, {:?} {:?}",
        asked.op, call.name, call.run, call.value, asked.began, asked.ended, asked.how, asked.why
    )
}

/// No other try of the same call may have had the effect.
fn is_alone(replayed: &Replayed<'_>, asked: &Asked) -> bool {
    let value = asked.call.value.as_deref().unwrap_or_default();
    replayed.by_value.get(value).is_none_or(|tries| tries.len() < 2)
}

fn step(replayed: &Replayed<'_>, asked: &Asked, verdict: &mut Verdict) {
    let (Some(task), Some(name), Some(value)) = (asked.call.task, &asked.call.name, &asked.call.value) else { return };
    let writes = replayed.tasks.get(&task).and_then(|task| task.steps.get(name));
    let write = writes.into_iter().flatten().find(|(_, _, stored)| stored == value);
    match (asked.how, write) {
        (How::Ok, None) => verdict.broken("C5", format!("acknowledged and not stored: {}", story(asked))),
        (How::Ok, Some((at, _, _))) if *at > asked.ended => {
            verdict.broken("C5", format!("acknowledged before it was stored: {}", story(asked)));
        }
        (How::No, Some(_)) if is_alone(replayed, asked) => {
            verdict.broken("C4", format!("refused and stored all the same: {}", story(asked)));
        }
        _ => {}
    }
}

fn ending(replayed: &Replayed<'_>, asked: &Asked, verdict: &mut Verdict) {
    let claim = claim(replayed, asked);
    let wanted = if asked.op == Op::Complete { End::Completed } else { End::Failed };
    let done = claim.filter(|claim| claim.end == wanted && claim.reason.as_deref() != Some("$ClaimTimeout"));
    match (asked.how, done) {
        (How::Ok, None) => verdict.broken(
            "C6",
            format!("acknowledged without effect: {}; the claim {:?}", story(asked), claim.map(|claim| claim.end)),
        ),
        (How::Ok, Some(claim)) if claim.to > asked.ended => {
            verdict.broken("C6", format!("acknowledged before it was done: {}", story(asked)));
        }
        (How::Ok, Some(claim)) if asked.op == Op::Complete && claim.value != asked.call.value => {
            verdict.broken("C6", format!("acknowledged with another result {:?}: {}", claim.value, story(asked)));
        }
        (How::No, Some(_)) if is_alone(replayed, asked) => {
            verdict.broken("C4", format!("refused and done all the same: {}", story(asked)));
        }
        _ => {}
    }
}

/// Each stored step and each result was asked for by the holder of the run, while it held it.
fn written(replayed: &Replayed<'_>, verdict: &mut Verdict) {
    for (id, task) in &replayed.tasks {
        for (name, writes) in &task.steps {
            for (at, run, value) in writes.iter().filter(|(_, _, value)| !value.is_empty()) {
                // Waits and sleeps store steps of their own.
                if !name.starts_with('s') {
                    continue;
                }
                let holds = |asked: &&&Asked| {
                    claim(replayed, asked)
                        .is_some_and(|claim| claim.from <= *at && *at <= claim.to && claim.run == *run)
                };
                let by: Vec<_> = replayed.by_value.get(value.as_str()).into_iter().flatten().collect();
                if by.is_empty() {
                    verdict.broken("C4", format!("step {name} of task {id} was written by nobody: {value}"));
                } else if !by.iter().any(holds) {
                    verdict.broken(
                        "C4",
                        format!("step {name} of task {id} was written by a late worker: {}", story(by[0])),
                    );
                }
            }
        }
    }
    for claim in replayed.claims.values().flatten().filter(|claim| claim.end == End::Completed) {
        let value = claim.value.as_deref().unwrap_or_default();
        let mut by = replayed.by_value.get(value).into_iter().flatten();
        if !by.any(|asked| asked.digest.as_deref() == Some(&claim.digest) && asked.call.run == Some(claim.run)) {
            verdict.broken("C4", format!("run {} was completed by a late worker with {value}", claim.run));
        }
    }
}

/// The first emission wins, everybody sees it.
fn events(replayed: &Replayed<'_>, verdict: &mut Verdict) {
    let mut stored: BTreeMap<&str, Vec<(i64, &str)>> = BTreeMap::new();
    for row in replayed.books.audit.iter().filter(|row| row.kind == 'e') {
        let (Some(name), Some(value)) = (&row.name, &row.value) else { continue };
        stored.entry(name).or_default().push((row.at, value));
    }
    let mut emitted: HashMap<&str, Vec<&Asked>> = HashMap::new();
    for asked in replayed.books.asked.iter().filter(|asked| asked.op == Op::Emit) {
        emitted.entry(asked.call.name.as_deref().unwrap_or_default()).or_default().push(asked);
    }
    verdict.count("events", stored.len());
    for (event, values) in &stored {
        if values.iter().any(|(_, value)| *value != values[0].1) {
            verdict.broken("C7", format!("event {event} was emitted twice: {values:?}"));
        }
        let winner = values[0].1;
        let mine = |asked: &&&Asked| asked.call.value.as_deref() == Some(winner);
        let all = emitted.get(event).map(Vec::as_slice).unwrap_or_default();
        let Some(began) = all.iter().filter(mine).map(|asked| asked.began).min() else {
            verdict.broken("C7", format!("event {event} has a payload that nobody emitted: {winner}"));
            continue;
        };
        let earlier = all.iter().filter(|asked| !mine(asked) && asked.how == How::Ok).find(|asked| asked.ended < began);
        if let Some(earlier) = earlier {
            verdict
                .broken("C7", format!("event {event}: {winner} won, and {} was acknowledged before", story(earlier)));
        }
    }
    for (event, all) in &emitted {
        if !stored.contains_key(event) && all.iter().any(|asked| asked.how == How::Ok) {
            verdict.broken("C7", format!("event {event} was acknowledged and is lost"));
        }
    }
    let heard = replayed.books.asked.iter().filter(|asked| asked.op == Op::Await);
    let heard = heard.filter_map(|asked| Some((asked.call.name.as_deref()?, asked.value.as_deref()?)));
    let woken = replayed.books.arrivals.iter().filter_map(|arrival| arrival.woken.as_ref());
    let woken = woken.map(|(event, value)| (event.as_str(), value.as_str()));
    for (event, value) in heard.chain(woken) {
        if stored.get(event).is_none_or(|values| values[0].1 != value) {
            verdict.broken(
                "C7",
                format!("a worker heard {value} as the payload of event {event}: {:?}", stored.get(event)),
            );
        }
    }
}
