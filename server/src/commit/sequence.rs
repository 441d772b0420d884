//! Several writes about one run, in order and in one transaction of their own. A lost answer is read back.

use std::time::Duration;

use tokio::time::Instant;

use super::Late;
use crate::domain::{Error, Settled};
use crate::scope::Scope;
use crate::store::batch::{Answer, RunRef, Via, Write};
use crate::store::{Fault, LOCK_WAIT, LOCK_WAIT_PATIENT, Store, Wait, batch};

/// Carries out several writes about one run, in order and in one transaction. The first that fails stops the later
/// ones; those before it are committed.
pub(crate) async fn sequence(
    store: &Store,
    scope: &Scope,
    run: &RunRef,
    writes: &[Write],
    deadline: Instant,
) -> Vec<Result<Settled, Error>> {
    let mut writes = writes.to_vec();
    let total = writes.len();
    let mut refused = None;
    let late = Late::default();
    let mut lock_wait = LOCK_WAIT;
    let mut outcomes = loop {
        let left = deadline.saturating_duration_since(Instant::now()).min(lock_wait);
        if left.is_zero() {
            break vec![Err(late.error())];
        }
        match sequence_once(store, scope, run, &writes, left).await {
            Ok(outcomes)
                if late.is_unknown() && outcomes.iter().any(|done| done.as_ref().is_err_and(Error::is_claim_over)) =>
            {
                break read_back(store, scope, run, &writes, left).await;
            }
            Ok(outcomes) => break outcomes,
            Err((_, Fault::Locked)) => {
                lock_wait = LOCK_WAIT_PATIENT;
                let _ = tokio::time::timeout_at(deadline, late.wait_for_locks(store, &[scope])).await;
            }
            Err((_, fault)) if fault.is_passing() => {
                late.note(&fault, scope);
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err((index, Fault::Data(_))) if writes[index].in_ascii().is_some() => {
                writes[index] = writes[index].in_ascii().unwrap_or_else(|| writes[index].clone());
            }
            Err((index, fault)) => {
                // The transaction is rolled back, so the writes before the refused one are repeated without it.
                refused = Some(fault.into_error(scope));
                writes.truncate(index);
                if writes.is_empty() {
                    break Vec::new();
                }
            }
        }
    };
    if outcomes.iter().all(Result::is_ok) {
        outcomes.extend(refused.map(Err));
    }
    while outcomes.len() < total {
        outcomes.push(Err(Error::ItemSkipped));
    }
    outcomes
}

/// A commit lost its answer, and the claim is over now, perhaps because of that commit. All writes were one
/// transaction, so a replay of the last one tells whether they took effect.
async fn read_back(
    store: &Store,
    scope: &Scope,
    run: &RunRef,
    writes: &[Write],
    lock_wait: Duration,
) -> Vec<Result<Settled, Error>> {
    let last = writes.last().filter(|write| matches!(write, Write::Complete { .. } | Write::Fail { .. }));
    if let Some(last) = last
        && let Ok(mut outcomes) = sequence_once(store, scope, run, std::slice::from_ref(last), lock_wait).await
        && let Some(Ok(settled)) = outcomes.pop()
        && settled.replayed
    {
        let before = Settled { failed: None, applied: true, ..settled };
        return writes.iter().skip(1).map(|_| Ok(before.clone())).chain([Ok(settled)]).collect();
    }
    writes.iter().map(|_| Err(Error::OutcomeUnknown)).collect()
}

async fn sequence_once(
    store: &Store,
    scope: &Scope,
    run: &RunRef,
    writes: &[Write],
    lock_wait: Duration,
) -> Result<Vec<Result<Settled, Error>>, (usize, Fault)> {
    let tx = store.begin(lock_wait).await.map_err(|fault| (0, fault))?;
    let mut outcomes = Vec::new();
    for (index, write) in writes.iter().enumerate() {
        let answers = batch::write(store, Via::Tx(&tx), scope, Wait::Block, &[(run, write)]).await;
        let outcome = match answers.map(|mut answers| answers.pop()) {
            Ok(Some(Answer::Settled(outcome))) => outcome,
            Ok(Some(Answer::Busy) | None) => Err(Error::QueueLocked { queue: scope.queue().as_str().to_owned() }),
            Err(fault) => {
                tx.rollback().await;
                return Err((index, fault));
            }
        };
        let stop = outcome.is_err();
        outcomes.push(outcome);
        if stop {
            break;
        }
    }
    tx.commit().await.map_err(|fault| (0, fault))?;
    Ok(outcomes)
}
