//! C1 no loss, C2 keys, C3 attempts, C5 steps, C6 completions, C11 params.

use std::collections::{HashMap, HashSet};

use uuid::Uuid;

use super::{Asked, Replayed, TaskBook, Verdict};
use crate::history::{How, Op};

pub(super) fn check(replayed: &Replayed<'_>, verdict: &mut Verdict) {
    let spawns: Vec<&Asked> = replayed.books.asked.iter().filter(|asked| asked.op == Op::Spawn).collect();
    verdict.count("spawn calls", spawns.len());
    loss(replayed, &spawns, verdict);
    keys(replayed, &spawns, verdict);
    for (id, task) in &replayed.tasks {
        attempts(*id, task, verdict);
        completions(replayed, *id, task, verdict);
        for (name, writes) in &task.steps {
            let values: HashSet<&str> = writes.iter().map(|(_, _, value)| value.as_str()).collect();
            if values.len() > 1 {
                verdict.broken("C5", format!("step {name} of task {id} was changed: {writes:?}"));
            }
        }
    }
    arrivals(replayed, verdict);
}

fn loss(replayed: &Replayed<'_>, spawns: &[&Asked], verdict: &mut Verdict) {
    let mut asked_for = HashSet::new();
    for spawn in spawns {
        asked_for.extend(spawn.call.task);
        if spawn.how != How::Ok {
            continue;
        }
        let answered = spawn.value.as_deref().and_then(|id| id.parse().ok()).or(spawn.call.task).unwrap_or_default();
        if !replayed.tasks.get(&answered).is_some_and(|task| task.made) {
            verdict.broken("C1", format!("task {answered} was acknowledged at {} and is lost", spawn.ended));
        }
    }
    let made: Vec<&Uuid> = replayed.tasks.iter().filter(|(_, task)| task.made).map(|(id, _)| id).collect();
    verdict.count("tasks", made.len());
    for (id, task) in &replayed.tasks {
        if task.made && !asked_for.contains(id) {
            verdict.broken("C1", format!("nobody asked for task {id}"));
        }
        if !task.removed && !["completed", "failed", "cancelled"].contains(&task.state.as_str()) {
            verdict.broken("C1", format!("task {id} never ended: it is {}, runs {:?}", task.state, task.runs));
        }
    }
    let acknowledged: HashSet<Option<Uuid>> =
        spawns.iter().filter(|spawn| spawn.how == How::Ok).map(|spawn| spawn.call.task).collect();
    let unknown: HashSet<Option<Uuid>> =
        spawns.iter().filter(|spawn| spawn.how == How::Info).map(|spawn| spawn.call.task).collect();
    verdict.count("spawns unknown at first", unknown.len());
    verdict.count("spawns never resolved", unknown.difference(&acknowledged).count());
}

fn keys(replayed: &Replayed<'_>, spawns: &[&Asked], verdict: &mut Verdict) {
    let mut answers: HashMap<&str, HashSet<&str>> = HashMap::new();
    let mut makers: HashMap<&str, HashSet<Uuid>> = HashMap::new();
    for spawn in spawns.iter().filter(|spawn| spawn.how == How::Ok) {
        let Some(key) = &spawn.call.name else { continue };
        answers.entry(key).or_default().extend(spawn.value.as_deref());
        if spawn.first == Some(true) {
            makers.entry(key).or_default().extend(spawn.call.task);
        }
    }
    for (key, tasks) in answers.iter().filter(|(_, tasks)| tasks.len() > 1) {
        verdict.broken("C2", format!("key {key} stands for several tasks: {tasks:?}"));
    }
    for (key, makers) in makers.iter().filter(|(_, makers)| makers.len() > 1) {
        verdict.broken("C2", format!("key {key} was first taken several times: {makers:?}"));
    }
    let mut same: HashMap<&str, Vec<&Uuid>> = HashMap::new();
    for (id, task) in replayed.tasks.iter().filter(|(_, task)| task.made) {
        same.entry(&task.params).or_default().push(id);
    }
    for (params, tasks) in same.iter().filter(|(_, tasks)| tasks.len() > 1) {
        verdict.broken("C2", format!("one spawn made several tasks: {tasks:?} with {params}"));
    }
}

fn attempts(id: Uuid, task: &TaskBook, verdict: &mut Verdict) {
    verdict.count("attempts", task.runs.len());
    let Some(last) = task.runs.keys().last() else { return };
    let count = i32::try_from(task.runs.len()).unwrap_or(i32::MAX);
    if *last != count || task.runs.keys().next() != Some(&1) {
        verdict.broken("C3", format!("attempts of task {id} are not 1 to n: {:?}", task.runs.keys()));
    }
    if count > task.max_attempts {
        verdict.broken("C3", format!("task {id} took {count} attempts, {} were allowed", task.max_attempts));
    }
    for (attempt, (run, state)) in task.runs.iter().filter(|(attempt, _)| *attempt < last) {
        if state != "failed" {
            verdict
                .broken("C3", format!("attempt {attempt} of task {id} (run {run}) is {state}, and a later one exists"));
        }
    }
}

fn completions(replayed: &Replayed<'_>, id: Uuid, task: &TaskBook, verdict: &mut Verdict) {
    verdict.count("completed", task.completions.len());
    if task.completions.len() > 1 {
        verdict.broken("C6", format!("task {id} was completed {} times", task.completions.len()));
    }
    for value in &task.completions {
        let by = replayed.by_value.get(value.as_str()).into_iter().flatten();
        if !by.clone().any(|asked| asked.op == Op::Complete && asked.call.task == Some(id) && asked.how != How::No) {
            verdict.broken("C6", format!("task {id} has the result {value}, which nobody gave it"));
        }
    }
}

fn arrivals(replayed: &Replayed<'_>, verdict: &mut Verdict) {
    verdict.count("deliveries", replayed.books.arrivals.len());
    for arrival in &replayed.books.arrivals {
        let Some(task) = replayed.tasks.get(&arrival.task) else {
            verdict.broken("C11", format!("task {} was delivered, and there is no such task", arrival.task));
            continue;
        };
        let parse = |text: &str| serde_json::from_str::<serde_json::Value>(text).ok();
        if parse(&arrival.params).is_none() || parse(&arrival.params) != parse(&task.params) {
            verdict.broken("C11", format!("task {} arrived with the params {}", arrival.task, arrival.params));
        }
        let claim =
            replayed.claims.get(&arrival.run).into_iter().flatten().find(|claim| claim.digest == arrival.digest);
        let Some(claim) = claim else {
            verdict.broken("C4", format!("run {} was delivered under a claim that never was", arrival.run));
            continue;
        };
        for (name, writes) in &task.steps {
            let known = arrival.steps.iter().find(|(step, _)| step == name).map(|(_, value)| value);
            let Some((at, _, value)) = writes.first() else { continue };
            match known {
                Some(known) if known != value => verdict
                    .broken("C5", format!("step {name} of task {} was {value} and arrived as {known}", arrival.task)),
                None if *at < claim.from && arrival.complete => {
                    verdict.broken("C5", format!("step {name} of task {} was forgotten", arrival.task));
                }
                _ => {}
            }
        }
    }
}
