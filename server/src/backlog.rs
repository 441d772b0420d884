//! The bound on claimable tasks per queue (`backlog_max`): spawns beyond it are refused.
//!
//! A queue is counted at most once every 2 s; in between, this replica adds its own spawns to the count. So the bound
//! costs no statement per spawn, and spawns of other replicas may exceed it meanwhile.

use std::time::Duration;

use tokio::time::Instant;

use crate::domain::Error;
use crate::per_queue::PerQueue;
use crate::scope::Scope;
use crate::store::Store;

/// Age from which a count is repeated.
const FRESH: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
struct Known {
    waiting: i64,
    counted: Option<Instant>,
}

/// The bound and the last count of each queue.
#[derive(Debug)]
pub struct Backlog {
    limit: Option<i64>,
    known: PerQueue<Known>,
}

impl Backlog {
    /// `limit` is the number of claimable tasks per queue; None: no bound.
    pub fn new(limit: Option<i64>) -> Self {
        Self { limit, known: PerQueue::default() }
    }

    /// Admits tasks, or fails with [`Error::BacklogFull`].
    pub async fn admit(&self, store: &Store, scope: &Scope, tasks: usize) -> Result<(), Error> {
        let Some(limit) = self.limit else { return Ok(()) };
        let known = self.known.of(scope.queue());
        // One caller counts; the others wait for its result.
        let mut known = known.lock().await;
        if known.counted.is_none_or(|at| at.elapsed() > FRESH) {
            known.waiting = store.queue_backlog(scope, limit).await?;
            known.counted = Some(Instant::now());
        }
        let after = known.waiting.saturating_add(i64::try_from(tasks).unwrap_or(i64::MAX));
        if after > limit {
            return Err(Error::BacklogFull { queue: scope.queue().as_str().to_owned(), limit });
        }
        known.waiting = after;
        Ok(())
    }
}
