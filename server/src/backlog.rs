//! The bound of tasks that wait in a queue, for those who ask for one: spawns beyond it are refused.
//!
//! What waits is counted every other second at most and reckoned in between, so that the bound costs nothing per spawn and
//! may be missed by what other replicas spawn meanwhile.

use std::time::Duration;

use tokio::time::Instant;

use crate::domain::Error;
use crate::per_queue::PerQueue;
use crate::scope::Scope;
use crate::store::Store;

/// A count is good for this long.
const FRESH: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
struct Known {
    waiting: i64,
    counted: Option<Instant>,
}

/// See the module.
#[derive(Debug)]
pub struct Backlog {
    limit: Option<i64>,
    known: PerQueue<Known>,
}

impl Backlog {
    /// At most so many tasks may wait in each queue.
    pub fn new(limit: Option<i64>) -> Self {
        Self { limit, known: PerQueue::default() }
    }

    /// Lets tasks in, or says that the queue is full.
    pub async fn admit(&self, store: &Store, scope: &Scope, tasks: usize) -> Result<(), Error> {
        let Some(limit) = self.limit else { return Ok(()) };
        let known = self.known.of(scope.queue());
        // One of those who ask counts; the others wait for what it finds.
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
