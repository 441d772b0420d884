//! The batched writes about runs. Each kind is one set-based statement over arrays, and every item gets an answer of
//! its own.

use postgres_types::ToSql;
use tokio_postgres::Row;
use uuid::Uuid;

use super::statement::{CHECKPOINT_PUT, RUN_COMPLETE, RUN_EXTEND, RUN_FAIL, RUN_RELEASE, Statement};
use super::{Fault, Store, Tx, Wait};
use crate::domain::claim::Failed;
use crate::domain::{CheckpointName, Digest, Error, Instant, JsonText, RunId, Settled, State};
use crate::planted::{self, Bug};
use crate::scope::Scope;

/// A run, and its claim if the caller showed a token.
#[derive(Debug, Clone)]
pub struct RunRef {
    /// The run to write about.
    pub run_id: RunId,
    /// Digest of the shown token; `None` if no token was shown.
    pub digest: Option<Digest>,
}

/// One write about a run.
#[derive(Debug, Clone)]
pub enum Write {
    /// Completes the run and its task.
    Complete {
        /// Result; `None` is stored as SQL NULL.
        result: Option<JsonText>,
    },
    /// Fails the run. The next attempt follows the task's retry strategy.
    Fail {
        /// Failure reason; `None` is stored as SQL NULL.
        reason: Option<JsonText>,
        /// Time of the next attempt; overrides the retry strategy.
        retry_at: Option<Instant>,
        /// Whether to make no further attempt, even if `max_attempts` allows one.
        no_retry: bool,
    },
    /// Fails the run if its lease has expired.
    Expire,
    /// Extends the lease of the run.
    Extend {
        /// New end of the lease, in seconds from now. It may be earlier than the old end.
        seconds: i32,
    },
    /// Releases the claim without using up an attempt.
    Release {
        /// Place of the run in the queue before the claim. `None` places it at the time of the claim.
        available_at: Option<Instant>,
        /// Milliseconds until the run can be claimed again; 0 means at once.
        delay_ms: i32,
        /// Whether the claim was the first of its task.
        first_claim: bool,
    },
    /// Stores the result of a step.
    Checkpoint {
        /// Name of the step.
        name: CheckpointName,
        /// Result of the step; `None` is stored as SQL NULL.
        state: Option<JsonText>,
        /// New end of the lease, in seconds from now; 0 leaves the lease alone.
        seconds: i32,
    },
}

/// Kinds of writes, one per statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// `run_complete`
    Complete,
    /// `run_fail`
    Fail,
    /// `run_extend`
    Extend,
    /// `run_release`
    Release,
    /// `checkpoint_put`
    Checkpoint,
}

impl Write {
    /// The same failure with its reason in ASCII, which a database of any encoding can store. `None` if nothing would
    /// change. A failure must be recorded whatever its reason holds.
    pub(crate) fn in_ascii(&self) -> Option<Self> {
        let Self::Fail { reason: Some(reason), retry_at, no_retry } = self else { return None };
        let ascii = reason.to_ascii();
        (ascii != *reason).then_some(Self::Fail { reason: Some(ascii), retry_at: *retry_at, no_retry: *no_retry })
    }

    /// The statement that carries out this write. [`Write::Expire`] shares that of [`Write::Fail`].
    pub fn kind(&self) -> Kind {
        match self {
            Self::Complete { .. } => Kind::Complete,
            Self::Fail { .. } | Self::Expire => Kind::Fail,
            Self::Extend { .. } => Kind::Extend,
            Self::Release { .. } => Kind::Release,
            Self::Checkpoint { .. } => Kind::Checkpoint,
        }
    }
}

/// Answer to one item of a batch.
#[derive(Debug, Clone)]
pub enum Answer {
    /// The write was done, or refused for good.
    Settled(Result<Settled, Error>),
    /// Not decided: another transaction holds the run or its task, or a lease to expire has not expired.
    Busy,
}

/// Where a statement runs.
pub(crate) enum Via<'a> {
    /// In a transaction of its own.
    Store(&'a Store),
    /// In an open transaction.
    Tx(&'a Tx),
}

impl Via<'_> {
    async fn rows(
        &self,
        statement: &Statement,
        wait: Wait,
        scope: &Scope,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Fault> {
        match self {
            Self::Store(store) => store.rows(statement, wait, Some(scope), params).await,
            Self::Tx(tx) => tx.rows(statement, wait, Some(scope), params).await,
        }
    }
}

impl Store {
    /// Carries out writes of one kind about different runs, in one transaction. Returns one answer per item, in order.
    /// Skips locked rows and answers [`Answer::Busy`] for them.
    pub async fn settle(&self, scope: &Scope, items: &[(&RunRef, &Write)]) -> Result<Vec<Answer>, Fault> {
        write(self, Via::Store(self), scope, Wait::Skip, items).await
    }
}

/// Carries out writes of one kind about different runs. Returns one answer per item, in order.
pub(crate) async fn write(
    store: &Store,
    via: Via<'_>,
    scope: &Scope,
    wait: Wait,
    items: &[(&RunRef, &Write)],
) -> Result<Vec<Answer>, Fault> {
    let Some(kind) = items.first().map(|(_, write)| write.kind()) else { return Ok(Vec::new()) };
    let runs: Vec<Uuid> = items.iter().map(|(run, _)| run.run_id).collect();
    let digests: Vec<Option<&str>> = if planted::is(Bug::NoTokenCheck) {
        vec![None; items.len()]
    } else {
        items.iter().map(|(run, _)| run.digest.as_ref().map(Digest::as_str)).collect()
    };
    let rows = match kind {
        Kind::Complete => {
            let results: Vec<Option<&JsonText>> = items.iter().map(|(_, write)| json(write)).collect();
            via.rows(&RUN_COMPLETE, wait, scope, &[&runs, &digests, &results]).await?
        }
        Kind::Fail => fail(store, &via, scope, wait, items, &runs, &digests).await?,
        Kind::Extend => {
            let seconds: Vec<i32> = items.iter().map(|(_, write)| seconds(write)).collect();
            via.rows(&RUN_EXTEND, wait, scope, &[&runs, &digests, &seconds]).await?
        }
        Kind::Release => release(&via, scope, wait, items, &runs, &digests).await?,
        Kind::Checkpoint => {
            let names: Vec<&str> = items
                .iter()
                .map(|(_, write)| match write {
                    Write::Checkpoint { name, .. } => name.as_str(),
                    _ => "",
                })
                .collect();
            let states: Vec<Option<&JsonText>> = items.iter().map(|(_, write)| json(write)).collect();
            let seconds: Vec<i32> = items.iter().map(|(_, write)| seconds(write)).collect();
            via.rows(&CHECKPOINT_PUT, wait, scope, &[&runs, &digests, &names, &states, &seconds]).await?
        }
    };
    Ok(items.iter().zip(&rows).map(|((run, _), row)| answer(kind, run, row)).collect())
}

async fn fail(
    store: &Store,
    via: &Via<'_>,
    scope: &Scope,
    wait: Wait,
    items: &[(&RunRef, &Write)],
    runs: &[Uuid],
    digests: &[Option<&str>],
) -> Result<Vec<Row>, Fault> {
    let reasons: Vec<Option<&JsonText>> = items.iter().map(|(_, write)| json(write)).collect();
    let retry_at: Vec<Option<Instant>> = items
        .iter()
        .map(|(_, write)| match write {
            Write::Fail { retry_at, .. } => *retry_at,
            _ => None,
        })
        .collect();
    let next: Vec<Uuid> = items.iter().map(|_| store.mint_id()).collect();
    let sweep: Vec<bool> = items.iter().map(|(_, write)| matches!(write, Write::Expire)).collect();
    let no_retry: Vec<bool> =
        items.iter().map(|(_, write)| matches!(write, Write::Fail { no_retry: true, .. })).collect();
    via.rows(&RUN_FAIL, wait, scope, &[&runs, &digests, &reasons, &retry_at, &next, &sweep, &no_retry]).await
}

async fn release(
    via: &Via<'_>,
    scope: &Scope,
    wait: Wait,
    items: &[(&RunRef, &Write)],
    runs: &[Uuid],
    digests: &[Option<&str>],
) -> Result<Vec<Row>, Fault> {
    let mut places = Vec::with_capacity(items.len());
    let mut delays = Vec::with_capacity(items.len());
    let mut firsts = Vec::with_capacity(items.len());
    for (_, write) in items {
        let Write::Release { available_at, delay_ms, first_claim } = write else { continue };
        places.push(*available_at);
        delays.push(*delay_ms);
        firsts.push(*first_claim);
    }
    via.rows(&RUN_RELEASE, wait, scope, &[&runs, &digests, &places, &delays, &firsts]).await
}

fn json(write: &Write) -> Option<&JsonText> {
    match write {
        Write::Complete { result: json } | Write::Fail { reason: json, .. } | Write::Checkpoint { state: json, .. } => {
            json.as_ref()
        }
        Write::Expire | Write::Extend { .. } | Write::Release { .. } => None,
    }
}

fn seconds(write: &Write) -> i32 {
    match write {
        Write::Extend { seconds } | Write::Checkpoint { seconds, .. } => *seconds,
        _ => 0,
    }
}

/// Reads one row of a batched write. All of these statements share their leading columns.
fn answer(kind: Kind, run: &RunRef, row: &Row) -> Answer {
    let run_id = run.run_id;
    let found: bool = row.get("found");
    if !found {
        return Answer::Settled(Err(Error::RunNotFound(run_id)));
    }
    if row.get("skipped") {
        return Answer::Busy;
    }
    let state: String = row.get("state");
    let state = State::from_stored(&state).unwrap_or(State::Failed);
    let owned: bool = row.get("owned");
    let done: bool = row.get("done");
    let same: bool = row.get::<_, Option<bool>>("same").unwrap_or(false);
    let task_id: Uuid = row.get("task_id");
    let shown = run.digest.is_some();
    if done {
        return Answer::Settled(Ok(settled(kind, task_id, false, row)));
    }
    if state == State::Running && owned {
        // The claim holds, but the task's row was locked, or the lease to expire has not expired.
        return Answer::Busy;
    }
    let replayed = match kind {
        Kind::Complete => state == State::Completed && owned && (shown || same),
        Kind::Fail => state == State::Failed && owned && !row.get::<_, bool>("expired") && (shown || same),
        Kind::Release => same,
        Kind::Extend | Kind::Checkpoint => false,
    };
    if replayed {
        return Answer::Settled(Ok(settled(kind, task_id, true, row)));
    }
    let wrong_state = || Error::RunNotRunning { run: run_id, state: state.as_str().to_owned() };
    Answer::Settled(Err(match state {
        State::Cancelled => Error::TaskCancelled(run_id),
        State::Failed if owned && row.get("expired") => Error::ClaimExpired(run_id),
        State::Completed | State::Failed if owned => wrong_state(),
        _ if shown => Error::ClaimLost(run_id),
        _ => wrong_state(),
    }))
}

fn settled(kind: Kind, task_id: Uuid, replayed: bool, row: &Row) -> Settled {
    let mut settled = Settled { task_id, replayed, claim_expires_at: None, applied: false, failed: None };
    match kind {
        Kind::Extend => settled.claim_expires_at = row.get("claim_expires_at"),
        Kind::Checkpoint => {
            settled.claim_expires_at = row.get("claim_expires_at");
            settled.applied = row.get("applied");
        }
        Kind::Fail => {
            let state: Option<String> = row.get("task_state");
            let next: Option<Uuid> = row.get("next_run_id");
            let attempt: Option<i32> = row.get("next_attempt");
            let at: Option<Instant> = row.get("next_available_at");
            settled.failed = Some(Failed {
                task_state: state.as_deref().and_then(State::from_stored).unwrap_or(State::Failed),
                next: next.zip(attempt).zip(at).map(|((run, attempt), at)| (run, attempt, at)),
                next_in_ms: row.get("next_in_ms"),
            });
        }
        Kind::Complete | Kind::Release => {}
    }
    settled
}
