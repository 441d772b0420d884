//! The checker: two books, the clients' history and the database's audit, must tell one story.
//!
//! The audit is replayed against the legal transitions; each acknowledged call is matched with its effect, each effect with
//! a call; what was read is compared with what was written. Sorting aside, each check walks its book once.

mod claims;
mod effects;
mod load;
mod tasks;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};

use uuid::Uuid;

use crate::history::{Call, How, Op};
pub(crate) use load::{read_audit, read_histories};

/// A call of the history.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub op: Op,
    pub call: Call,
    /// Digest of the token that was shown, as the database keeps it.
    pub digest: Option<String>,
    pub began: i64,
    /// The end of time, when there was no answer.
    pub ended: i64,
    pub how: How,
    pub why: Option<String>,
    pub value: Option<String>,
    pub first: Option<bool>,
}

/// A task as it arrived.
#[derive(Debug, Clone)]
pub(crate) struct Arrival {
    pub process: String,
    pub at: i64,
    pub stream: u64,
    pub task: Uuid,
    pub run: Uuid,
    pub digest: String,
    pub params: String,
    pub steps: Vec<(String, String)>,
    pub complete: bool,
    pub woken: Option<(String, String)>,
}

/// What a worker saw of a stream.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub process: String,
    pub at: i64,
    pub stream: u64,
    pub what: String,
    pub credit: u32,
}

/// A row of the audit.
#[derive(Debug, Clone, Default)]
pub(crate) struct Row {
    pub at: i64,
    pub kind: char,
    pub op: char,
    pub task: Uuid,
    pub run: Uuid,
    pub attempt: i32,
    pub old_state: String,
    pub state: String,
    pub old_owner: String,
    pub owner: String,
    pub expires: Option<i64>,
    pub available: Option<i64>,
    pub name: Option<String>,
    pub value: Option<String>,
}

/// Both books, and what the supervisor knows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Books {
    pub asked: Vec<Asked>,
    pub arrivals: Vec<Arrival>,
    pub seen: Vec<Seen>,
    pub audit: Vec<Row>,
    /// When nothing could be done: from, to.
    pub down: Vec<(i64, i64)>,
    /// Whether the database's clock was moved: leases may end early then.
    pub clock_moved: bool,
    /// Longest time from the end of a lease to the next claim, µs, while everything runs.
    pub redelivery_max: i64,
}

/// Why a claim ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Open,
    Completed,
    Failed,
    Sleeping,
    Released,
    Cancelled,
}

/// A run lent to a worker, as the audit has it.
#[derive(Debug, Clone)]
pub(crate) struct Claim {
    pub task: Uuid,
    pub run: Uuid,
    pub digest: String,
    pub from: i64,
    pub to: i64,
    pub end: End,
    pub expires: Option<i64>,
    /// Name of the failure.
    pub reason: Option<String>,
    /// Result.
    pub value: Option<String>,
}

/// A broken promise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    /// Which check, as `C1`.
    pub check: &'static str,
    pub story: String,
}

/// What a run of the checker says.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    pub findings: Vec<Finding>,
    pub figures: BTreeMap<&'static str, i64>,
    /// Times from the end of a lease to the next claim, ms, sorted.
    pub redelivery: Vec<i64>,
    /// Times from spawns to first claims, ms, sorted.
    pub first_claim: Vec<i64>,
}

impl Verdict {
    fn broken(&mut self, check: &'static str, story: impl Into<String>) {
        self.findings.push(Finding { check, story: story.into() });
    }

    fn count(&mut self, what: &'static str, by: usize) {
        *self.figures.entry(what).or_default() += i64::try_from(by).unwrap_or(i64::MAX);
    }
}

/// A quantile of sorted times.
pub(crate) fn quantile(times: &[i64], quantile: f64) -> i64 {
    let last = times.len().saturating_sub(1);
    let place = (last as f64 * quantile).round() as usize;
    times.get(place).copied().unwrap_or(0)
}

/// Tasks, runs and claims as the audit has them, and the calls by what finds them.
struct Replayed<'a> {
    books: &'a Books,
    /// By task.
    tasks: HashMap<Uuid, TaskBook>,
    /// By run, in order.
    claims: HashMap<Uuid, Vec<Claim>>,
    /// By run and digest.
    by_token: HashMap<(Uuid, &'a str), Vec<&'a Asked>>,
    /// Calls that were to store something, by what.
    by_value: HashMap<&'a str, Vec<&'a Asked>>,
}

#[derive(Debug, Default)]
struct TaskBook {
    made: bool,
    removed: bool,
    params: String,
    key: Option<String>,
    max_attempts: i32,
    state: String,
    completions: Vec<String>,
    /// By attempt: the run and its state.
    runs: BTreeMap<i32, (Uuid, String)>,
    /// By step: when, by which run, what.
    steps: HashMap<String, Vec<(i64, Uuid, String)>>,
}

/// Checks both books.
pub(crate) fn check(books: &Books) -> Verdict {
    let mut verdict = Verdict::default();
    let replayed = replay(books, &mut verdict);
    tasks::check(&replayed, &mut verdict);
    effects::check(&replayed, &mut verdict);
    claims::check(&replayed, &mut verdict);
    let unknown = books.asked.iter().filter(|asked| asked.how == How::Info).count();
    verdict.count("calls", books.asked.len());
    verdict.count("acknowledged", books.asked.iter().filter(|asked| asked.how == How::Ok).count());
    verdict.count("unknown", unknown);
    verdict
}

/// The digest behind a worker's id.
fn digest_of(owner: &str) -> &str {
    owner.rsplit_once('#').map_or("", |(_, digest)| digest)
}

const LEGAL: &[(&str, &[&str])] = &[
    ("pending", &["pending", "running", "cancelled"]),
    ("sleeping", &["sleeping", "running", "pending", "cancelled"]),
    ("running", &["running", "sleeping", "completed", "failed", "cancelled", "pending"]),
    ("completed", &["completed"]),
    ("failed", &["failed"]),
    ("cancelled", &["cancelled"]),
];

fn is_legal(from: &str, to: &str) -> bool {
    LEGAL.iter().any(|(state, next)| *state == from && next.contains(&to))
}

/// A task follows its latest run, and begins anew when that is failed and another attempt is made.
fn is_legal_task(from: &str, to: &str) -> bool {
    is_legal(from, to) || from == "running" && to == "pending" || from == "pending" && to == "sleeping"
}

fn replay<'a>(books: &'a Books, verdict: &mut Verdict) -> Replayed<'a> {
    let mut replayed = Replayed {
        books,
        tasks: HashMap::new(),
        claims: HashMap::new(),
        by_token: HashMap::new(),
        by_value: HashMap::new(),
    };
    for row in &books.audit {
        match row.kind {
            't' => replay_task(row, &mut replayed, verdict),
            'r' => replay_run(row, &mut replayed, verdict),
            'c' => {
                let steps = &mut replayed.tasks.entry(row.task).or_default().steps;
                let step = steps.entry(row.name.clone().unwrap_or_default()).or_default();
                step.push((row.at, row.run, row.value.clone().unwrap_or_default()));
            }
            _ => {}
        }
    }
    for asked in &books.asked {
        if let (Some(run), Some(digest)) = (asked.call.run, &asked.digest) {
            replayed.by_token.entry((run, digest)).or_default().push(asked);
        }
        if let Some(value) = &asked.call.value {
            replayed.by_value.entry(value).or_default().push(asked);
        }
    }
    replayed
}

fn replay_task(row: &Row, replayed: &mut Replayed<'_>, verdict: &mut Verdict) {
    let task = replayed.tasks.entry(row.task).or_default();
    match row.op {
        'I' => {
            task.made = true;
            task.params = row.value.clone().unwrap_or_default();
            task.key.clone_from(&row.name);
            task.max_attempts = row.attempt;
        }
        'D' => task.removed = true,
        _ => {
            if !is_legal_task(&row.old_state, &row.state) {
                verdict.broken("C3", format!("task {} went from {} to {}", row.task, row.old_state, row.state));
            }
            if row.state == "completed" && row.old_state != "completed" {
                task.completions.push(row.value.clone().unwrap_or_default());
            }
        }
    }
    if row.op != 'D' {
        task.state.clone_from(&row.state);
    }
}

fn replay_run(row: &Row, replayed: &mut Replayed<'_>, verdict: &mut Verdict) {
    if row.op == 'D' {
        return;
    }
    let task = replayed.tasks.entry(row.task).or_default();
    if row.op == 'I' && task.runs.contains_key(&row.attempt) {
        verdict.broken("C3", format!("task {} has two runs for attempt {}", row.task, row.attempt));
    }
    task.runs.insert(row.attempt, (row.run, row.state.clone()));
    if row.op == 'U' && !is_legal(&row.old_state, &row.state) {
        verdict.broken("C3", format!("run {} went from {} to {}", row.run, row.old_state, row.state));
    }
    let claims = replayed.claims.entry(row.run).or_default();
    let (was, is) = (row.op == 'U' && row.old_state == "running", row.state == "running");
    if was && is && row.old_owner != row.owner {
        verdict.broken("C4", format!("run {} changed hands from {} to {}", row.run, row.old_owner, row.owner));
    }
    if was && is {
        if let Some(claim) = claims.last_mut() {
            claim.expires = row.expires;
        }
    } else if is {
        claims.push(Claim {
            task: row.task,
            run: row.run,
            digest: digest_of(&row.owner).to_owned(),
            from: row.at,
            to: i64::MAX,
            end: End::Open,
            expires: row.expires,
            reason: None,
            value: None,
        });
    } else if was && let Some(claim) = claims.last_mut() {
        claim.to = row.at;
        claim.reason.clone_from(&row.name);
        claim.value.clone_from(&row.value);
        claim.end = match row.state.as_str() {
            "completed" => End::Completed,
            "failed" => End::Failed,
            "sleeping" => End::Sleeping,
            "cancelled" => End::Cancelled,
            _ => End::Released,
        };
    }
}
