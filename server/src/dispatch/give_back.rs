//! Gives claims back that no transport took, whose answer was lost, or whose worker gives no sign of life; and checks
//! whether claims still hold. All of it runs beside the queue's loop, which never waits for it.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::state::{Leftover, Return};
use super::{Dispatcher, Queue};
use crate::domain::{ClaimToken, Digest, Instant as DbTime, JsonText, RunId};
use crate::metrics;
use crate::planted::{self, Bug};
use crate::store::batch::{RunRef, Write};
use crate::store::quarantine::Reason;
use crate::store::run::Slot;
use crate::store::{Access, Fault};

/// Number of releases after delivery at which a run fails instead.
const RELEASES_MAX: i32 = 3;
/// Pause before silent claims are checked again, after a check that failed.
const LOOK_LATER: Duration = Duration::from_secs(1);
/// Deadline of the dispatcher's own writes.
const OWN_DEADLINE: Duration = Duration::from_secs(60);

impl Dispatcher {
    /// Searches for claims that a statement made although its answer was lost, and releases them. Tries for about a
    /// minute.
    pub(super) fn find_lost_claims(&self, queue: &Arc<Queue>, slots: Vec<Slot>, since: Option<DbTime>) {
        let dispatcher = self.clone();
        let queue = Arc::clone(queue);
        // The estimated database time may be off by a round trip, so the search begins 10 s earlier.
        let since = since.map_or(DbTime::from_micros(0), |at| DbTime::from_micros(at.micros() - 10_000_000));
        tokio::spawn(async move {
            let _turn = queue.searching.lock().await;
            for _ in 0..120 {
                tokio::time::sleep(Duration::from_millis(500)).await;
                match dispatcher.shared.store.run_list_claimed(&queue.scope, &slots, since).await {
                    Ok(found) => {
                        let writes = found.into_iter().map(|(run_id, digest)| {
                            let run = RunRef { run_id, digest: Some(digest) };
                            (run, Write::Release { available_at: None, delay_ms: 0, first_claim: false })
                        });
                        dispatcher.release(&queue, writes.collect()).await;
                        return;
                    }
                    Err(Fault::Missing) => return,
                    Err(_) => {}
                }
            }
        });
    }

    /// Checks claims against the database; the state revokes those that no longer hold.
    pub(super) async fn check(&self, queue: &Arc<Queue>, claims: &[(RunId, Digest)]) {
        for claims in claims.chunks(1000) {
            match self.shared.store.run_check(&queue.scope, claims).await {
                Ok(found) => {
                    queue.lock().checked(claims, &found);
                    queue.bell.notify_one();
                }
                Err(fault) => {
                    tracing::debug!(queue.name = %queue.scope.queue(), ?fault, "could not check claims");
                }
            }
        }
    }

    /// Gives back the undelivered claims of a closed stream, and cuts the leases of the delivered ones.
    pub(super) fn clear_up(&self, queue: &Arc<Queue>, leftover: Leftover) {
        self.give_back(queue, leftover.returns);
        if leftover.cuts.is_empty() {
            return;
        }
        if planted::is(Bug::ReleaseAfterDelivery) {
            let (dispatcher, queue) = (self.clone(), Arc::clone(queue));
            tokio::spawn(async move {
                let writes = leftover.cuts.into_iter().map(|(run_id, digest, _)| {
                    let write = Write::Release { available_at: None, delay_ms: 0, first_claim: false };
                    (RunRef { run_id, digest: Some(digest) }, write)
                });
                dispatcher.release(&queue, writes.collect()).await;
            });
            return;
        }
        let (dispatcher, scope) = (self.clone(), queue.scope.clone());
        let grace = i32::try_from(leftover.grace.as_millis()).unwrap_or(i32::MAX);
        tokio::spawn(async move {
            let store = &dispatcher.shared.store;
            for cuts in leftover.cuts.chunks(500) {
                let mut cut = store.run_cut_lease(&scope, cuts, grace).await;
                if matches!(cut, Err(Fault::Locked)) {
                    let free = store.wait_for(scope.queue().as_str(), Access::Free);
                    let _ = tokio::time::timeout(OWN_DEADLINE, free).await;
                    cut = store.run_cut_lease(&scope, cuts, grace).await;
                }
                if let Err(fault) = cut {
                    tracing::warn!(queue.name = %scope.queue(), ?fault, "could not cut the leases of a lost stream");
                }
            }
        });
    }

    /// Gives back the claims that show no sign of life in the database either. A run's third release fails it.
    pub(super) async fn check_silent(&self, queue: &Arc<Queue>, claims: &[(ClaimToken, Option<DbTime>)]) {
        for claims in claims.chunks(1000) {
            let silent = match self.shared.store.run_silent(&queue.scope, claims).await {
                Ok(silent) => silent,
                Err(fault) => {
                    tracing::debug!(queue.name = %queue.scope.queue(), ?fault, "could not look at silent claims");
                    queue.lock().look_later(claims, Instant::now() + LOOK_LATER);
                    queue.bell.notify_one();
                    continue;
                }
            };
            let mut state = queue.lock();
            let pairs = claims.iter().zip(silent);
            let returns = pairs.filter_map(|((token, _), silent)| state.silence(token, silent)).collect();
            drop(state);
            queue.bell.notify_one();
            self.give_back(queue, returns);
        }
    }

    /// Gives claims back in the background; each run is offered again after its delay.
    pub(super) fn give_back(&self, queue: &Arc<Queue>, returns: Vec<Return>) {
        if returns.is_empty() {
            return;
        }
        let dispatcher = self.clone();
        let queue = Arc::clone(queue);
        let counted = self.shared.releasing.begin();
        tokio::spawn(async move {
            dispatcher.give_back_now(&queue, returns).await;
            drop(counted);
        });
    }

    async fn give_back_now(&self, queue: &Arc<Queue>, returns: Vec<Return>) {
        let scope = &queue.scope;
        for back in &returns {
            let why = if back.too_large.is_some() {
                "too_large"
            } else if back.delivered {
                "silent"
            } else {
                "undelivered"
            };
            metrics::released(why);
            if let Some(bytes) = back.too_large {
                tracing::warn!(
                    queue.name = %scope.queue(), run.id = %back.token.run_id, bytes,
                    "the task fits into no message of the stream that it was claimed for; it is put off"
                );
            }
        }
        let large = |back: &Return| {
            back.too_large.map(|bytes| (back.token.run_id, format!("{bytes} bytes are more than the stream takes")))
        };
        let large: Vec<_> = returns.iter().filter_map(large).collect();
        if !large.is_empty()
            && let Err(fault) = self.shared.store.quarantine_put(scope, Reason::Size, &large).await
        {
            tracing::warn!(queue.name = %scope.queue(), ?fault, "could not note which tasks are too large");
        }
        let delivered: Vec<RunId> =
            returns.iter().filter(|back| back.delivered).map(|back| back.token.run_id).collect();
        let spent: Vec<RunId> = if delivered.is_empty() {
            Vec::new()
        } else {
            match self.shared.store.release_count(scope, &delivered).await {
                Ok(counts) => {
                    counts.into_iter().filter(|(_, count)| *count >= RELEASES_MAX).map(|(run, _)| run).collect()
                }
                Err(fault) => {
                    tracing::warn!(queue.name = %scope.queue(), ?fault, "could not count releases");
                    Vec::new()
                }
            }
        };
        let writes = returns.into_iter().map(|back| {
            let run = RunRef { run_id: back.token.run_id, digest: Some(back.token.digest()) };
            if spent.contains(&back.token.run_id) {
                return (run, Write::Fail { reason: Some(no_sign_of_life()), retry_at: None, no_retry: false });
            }
            let write = Write::Release {
                available_at: Some(back.token.was_available_at),
                delay_ms: i32::try_from(back.delay.as_millis()).unwrap_or(i32::MAX),
                first_claim: back.token.first_claim,
            };
            (run, write)
        });
        self.release(queue, writes.collect()).await;
    }

    async fn release(&self, queue: &Arc<Queue>, writes: Vec<(RunRef, Write)>) {
        let deadline = Instant::now() + OWN_DEADLINE;
        let submitted = writes.into_iter().map(|(run, write)| async move {
            let run_id = run.run_id;
            let key = (queue.scope.clone(), write.kind());
            if let Err(error) = self.shared.settles.submit(key, (run, write), deadline).await {
                tracing::debug!(run.id = %run_id, %error, "a claim could not be given back");
            }
        });
        futures_util::future::join_all(submitted).await;
        self.new_work(queue.scope.queue());
    }
}

fn no_sign_of_life() -> JsonText {
    JsonText::trusted(
        serde_json::json!({
            "name": "$ClaimTimeout",
            "message": "three workers took the run and gave no sign of life",
        })
        .to_string(),
    )
}
