//! The bound of tasks that wait in a queue, for those who ask for one: spawns beyond it are refused.
//!
//! What waits is counted every other second at most and reckoned in between, so that the bound costs nothing per spawn and
//! may be missed by what other replicas spawn meanwhile.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::domain::{Error, QueueName};
use crate::scope::Scope;
use crate::store::Store;

/// A count is good for this long.
const FRESH: Duration = Duration::from_secs(2);
/// Queues that are remembered.
const QUEUES_MAX: usize = 10_000;

#[derive(Debug, Default)]
struct Known {
    waiting: i64,
    counted: Option<Instant>,
}

/// See the module.
#[derive(Debug)]
pub struct Backlog {
    limit: Option<i64>,
    queues: Mutex<HashMap<QueueName, Arc<tokio::sync::Mutex<Known>>>>,
}

impl Backlog {
    /// At most so many tasks may wait in each queue.
    pub fn new(limit: Option<i64>) -> Self {
        Self { limit, queues: Mutex::new(HashMap::new()) }
    }

    /// Lets tasks in, or says that the queue is full.
    pub async fn admit(&self, store: &Store, scope: &Scope, tasks: usize) -> Result<(), Error> {
        let Some(limit) = self.limit else { return Ok(()) };
        let known = {
            let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
            if queues.len() >= QUEUES_MAX {
                queues.clear();
            }
            Arc::clone(queues.entry(scope.queue().clone()).or_default())
        };
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
