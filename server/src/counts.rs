//! Shared counts of queues: a call that arrives during a count waits for the next one and shares it with all calls that
//! wait.
//!
//! Guarantees: no call receives a count that began before the call. At most one count per queue runs at a time, so many
//! callers of a long queue cost as much as one.

use std::sync::Arc;

use tokio::time::Instant;
use tokio_postgres::Row;

use crate::domain::Error;
use crate::per_queue::PerQueue;
use crate::scope::Scope;
use crate::store::Store;

/// A count with its start time.
#[derive(Debug)]
struct Count {
    began: Instant,
    outcome: Result<Arc<Row>, Error>,
}

/// The last count of each queue.
#[derive(Debug, Default)]
pub struct Counts {
    last: PerQueue<Option<Count>>,
}

impl Counts {
    /// Counts a queue, or shares a count that begins after this call.
    pub async fn of(&self, store: &Store, scope: &Scope) -> Result<Arc<Row>, Error> {
        let asked = Instant::now();
        let last = self.last.of(scope.queue());
        let mut last = last.lock().await;
        if let Some(count) = last.as_ref().filter(|count| count.began >= asked) {
            return count.outcome.clone();
        }
        let began = Instant::now();
        let outcome = store.queue_stats(scope).await.map(Arc::new);
        *last = Some(Count { began, outcome: outcome.clone() });
        outcome
    }
}
