//! Counts of queues: who asks while they are being counted waits for the next count, together with all others who do.
//!
//! Guarantees: nobody gets what was counted before they asked; at most one count of a queue at a time, so that many who look
//! at a long queue cost as much as one.

use std::sync::Arc;

use tokio::time::Instant;
use tokio_postgres::Row;

use crate::domain::Error;
use crate::per_queue::PerQueue;
use crate::scope::Scope;
use crate::store::Store;

/// A count, and when it began.
#[derive(Debug)]
struct Count {
    began: Instant,
    outcome: Result<Arc<Row>, Error>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Counts {
    last: PerQueue<Option<Count>>,
}

impl Counts {
    /// Counts a queue, or shares a count that begins after this.
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
