//! How claims end: by their holder, by policy, or with the lease. C9 redelivery, C12 streams.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::{Arrival, Claim, End, Replayed, Verdict};
use crate::history::{How, Op};

/// A sign of life in this time, µs, before a deadline may cross with it.
const LAST_MOMENT: i64 = 1_000_000;

pub(super) fn check(replayed: &Replayed<'_>, verdict: &mut Verdict) {
    let delivered: HashSet<(uuid::Uuid, &str)> =
        replayed.books.arrivals.iter().map(|arrival| (arrival.run, arrival.digest.as_str())).collect();
    let cancels: HashSet<uuid::Uuid> = replayed
        .books
        .asked
        .iter()
        .filter(|asked| asked.op == Op::Cancel)
        .filter_map(|asked| asked.call.task)
        .collect();
    for claim in replayed.claims.values().flatten() {
        ended(replayed, claim, &delivered, &cancels, verdict);
    }
    first_claims(replayed, verdict);
    redelivery(replayed, verdict);
    streams(replayed, verdict);
}

/// Each end of a claim has somebody who wanted it.
fn ended(
    replayed: &Replayed<'_>,
    claim: &Claim,
    delivered: &HashSet<(uuid::Uuid, &str)>,
    cancels: &HashSet<uuid::Uuid>,
    verdict: &mut Verdict,
) {
    let empty = Vec::new();
    let calls = replayed.by_token.get(&(claim.run, claim.digest.as_str())).unwrap_or(&empty);
    let wanted = |ops: &[Op]| {
        calls.iter().any(|asked| ops.contains(&asked.op) && asked.how != How::No && asked.began <= claim.to)
    };
    match claim.end {
        End::Failed if claim.reason.as_deref() == Some("$ClaimTimeout") => {
            verdict.count("leases that ran out", 1);
            let burnt = !delivered.contains(&(claim.run, claim.digest.as_str()));
            verdict.count("attempts used up without delivery", usize::from(burnt));
            if !replayed.books.clock_moved && claim.expires.is_some_and(|expires| expires > claim.to) {
                verdict.broken(
                    "C9",
                    format!(
                        "run {} was failed {} µs before its lease ended",
                        claim.run,
                        claim.expires.unwrap_or(0) - claim.to
                    ),
                );
            }
        }
        End::Failed if !wanted(&[Op::Fail]) => verdict.broken("C4", format!("run {} was failed by nobody", claim.run)),
        // A claim whose steps could not be read reached nobody: the server gives it back, to be offered a little later.
        End::Sleeping if calls.is_empty() && !delivered.contains(&(claim.run, claim.digest.as_str())) => {
            verdict.count("claims given back", 1);
        }
        End::Sleeping if !wanted(&[Op::Sleep, Op::Await]) => {
            verdict.broken("C4", format!("run {} was put to sleep by nobody", claim.run));
        }
        End::Released => {
            verdict.count("claims given back", 1);
            // The server gives back what gave no sign of life, and nothing else. A sign in the last moment before the
            // deadline may cross with it.
            let alive = calls.iter().any(|asked| asked.how != How::Info && asked.ended <= claim.to - LAST_MOMENT);
            if alive && !wanted(&[Op::Release]) {
                verdict.broken("C9", format!("run {} was taken from a worker that was at work on it", claim.run));
            }
        }
        End::Cancelled if !cancels.contains(&claim.task) => {
            verdict.broken("C4", format!("task {} was cancelled by nobody", claim.task));
        }
        End::Open => verdict.broken("C8", format!("run {} is still claimed", claim.run)),
        _ => {}
    }
}

/// From a task's spawn to its first claim.
fn first_claims(replayed: &Replayed<'_>, verdict: &mut Verdict) {
    let spawned = replayed.books.audit.iter().filter(|row| row.kind == 't' && row.op == 'I');
    for row in spawned {
        let first = replayed.tasks.get(&row.task).and_then(|task| task.runs.get(&1));
        let claim = first.and_then(|(run, _)| replayed.claims.get(run)?.first());
        verdict.first_claim.extend(claim.map(|claim| (claim.from - row.at) / 1000));
    }
    verdict.first_claim.sort_unstable();
}

/// From the end of a lease, or the time that the retry waits for, to the next claim.
fn redelivery(replayed: &Replayed<'_>, verdict: &mut Verdict) {
    let down = &replayed.books.down;
    let mut available: HashMap<uuid::Uuid, i64> = HashMap::new();
    for row in replayed.books.audit.iter().filter(|row| row.kind == 'r' && row.op == 'I') {
        available.insert(row.run, row.available.unwrap_or(0));
    }
    for task in replayed.tasks.values() {
        for ((_, (run, _)), (_, (next, _))) in task.runs.iter().zip(task.runs.iter().skip(1)) {
            let Some(claim) = replayed.claims.get(run).and_then(|claims| claims.last()) else { continue };
            let Some(again) = replayed.claims.get(next).and_then(|claims| claims.first()) else { continue };
            let (Some(expires), Some("$ClaimTimeout")) = (claim.expires, claim.reason.as_deref()) else { continue };
            // The retry may have to wait on purpose: from the failure to the time that the next run is available at.
            let delay = (available.get(next).copied().unwrap_or(0) - claim.to).max(0);
            let due = expires + delay;
            let waited = again.from - due;
            // Not while there was nobody to do it, nor in the moment after.
            let hindered = down.iter().any(|(from, to)| *from <= again.from && due <= to + 5_000_000);
            if hindered || replayed.books.clock_moved {
                continue;
            }
            verdict.redelivery.push((waited / 1000).max(0));
            if waited > replayed.books.redelivery_max {
                verdict.broken(
                    "C9",
                    format!("run {next} was claimed {} ms after the lease before it had ended", waited / 1000),
                );
            }
        }
    }
    verdict.redelivery.sort_unstable();
    verdict.count("redeliveries", verdict.redelivery.len());
}

/// What a worker saw of each stream: opened first, nothing after its end, no claim twice, never over the credit.
fn streams(replayed: &Replayed<'_>, verdict: &mut Verdict) {
    let mut arrivals: BTreeMap<(&str, u64), Vec<&Arrival>> = BTreeMap::new();
    for arrival in replayed.books.arrivals.iter().filter(|arrival| arrival.stream > 0) {
        arrivals.entry((&arrival.process, arrival.stream)).or_default().push(arrival);
    }
    let mut opened: HashMap<(&str, u64), (i64, u32)> = HashMap::new();
    let mut ending: HashMap<(&str, u64), i64> = HashMap::new();
    for seen in &replayed.books.seen {
        let stream = (seen.process.as_str(), seen.stream);
        match seen.what.as_str() {
            "opened" => drop(opened.insert(stream, (seen.at, seen.credit))),
            "ending" => drop(ending.insert(stream, seen.at)),
            _ => {}
        }
    }
    verdict.count("streams watched", opened.len());
    for (stream, arrivals) in &arrivals {
        let Some((at, credit)) = opened.get(stream) else {
            verdict.broken("C12", format!("stream {stream:?} brought tasks before it was opened"));
            continue;
        };
        let mut known = HashSet::new();
        for (place, arrival) in arrivals.iter().enumerate() {
            // One thread reads the stream and another one writes the arrival down: a moment lies between.
            if arrival.at + 1_000 < *at {
                verdict.broken("C12", format!("stream {stream:?} brought a task before it was opened"));
            }
            if ending.get(stream).is_some_and(|end| arrival.at > end + 1_000_000) {
                verdict.broken("C12", format!("stream {stream:?} brought run {} after its end", arrival.run));
            }
            if !known.insert(&arrival.digest) {
                verdict.broken("C12", format!("stream {stream:?} brought run {} twice under one claim", arrival.run));
            }
            let held = arrivals[..=place].iter().filter(|other| {
                let claims = replayed.claims.get(&other.run).into_iter().flatten();
                claims
                    .filter(|claim| claim.digest == other.digest)
                    .any(|claim| claim.from <= arrival.at && arrival.at <= claim.to)
            });
            if held.count() > *credit as usize {
                verdict.broken("C12", format!("stream {stream:?} brought more than its credit of {credit}"));
            }
        }
    }
}
