//! Tasks that fail hot: attempt after attempt, without a pause in between. Each costs the database a claim, a failure and a
//! new run, as fast as the workers go, so that a metric and a line in the log name them.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::domain::{QueueName, TaskId};
use crate::metrics;
use crate::scope::Scope;
use crate::store::Store;
use crate::store::text::Part;

/// A task fails hot when a failed attempt beyond this one is tried again without a pause.
const HOT: i32 = 5;
/// Between lines in the log about one queue.
const QUIET: Duration = Duration::from_secs(60);
/// Queues that are remembered; beyond it all of them are forgotten, which costs a line in the log.
const QUEUES_MAX: usize = 10_000;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct HotRetries {
    /// When the log named a task of a queue last.
    named: Mutex<HashMap<QueueName, Instant>>,
}

impl HotRetries {
    /// An attempt failed, and the task can be claimed again at once as attempt `next`.
    pub(crate) fn note(&self, store: &Store, scope: &Scope, task_id: TaskId, next: i32) {
        let failed = next - 1;
        if failed <= HOT {
            return;
        }
        metrics::hot_retry(scope.queue().as_str());
        if self.is_due(scope.queue(), Instant::now()) {
            let (store, scope) = (store.clone(), scope.clone());
            tokio::spawn(async move { warn(&store, &scope, task_id, failed).await });
        }
    }

    fn is_due(&self, queue: &QueueName, now: Instant) -> bool {
        let mut named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
        if named.get(queue).is_some_and(|last| now.duration_since(*last) < QUIET) {
            return false;
        }
        if named.len() >= QUEUES_MAX {
            named.clear();
        }
        named.insert(queue.clone(), now);
        true
    }
}

async fn warn(store: &Store, scope: &Scope, task_id: TaskId, failed: i32) {
    let little = Some(Part { offset: 0, limit: 1 });
    // The name helps; a queue that is gone, or a database that is away, has other lines in the log.
    let Ok(row) = store.task_get(scope, task_id, little, little).await else { return };
    tracing::warn!(
        queue.name = %scope.queue(), task.name = row.get::<_, &str>("task_name"), task.id = %task_id, attempt = failed,
        "a task fails again and again without a pause; give it a retry strategy"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_names_a_queue_once_a_minute() {
        let (hot, now) = (HotRetries::default(), Instant::now());
        let queue = |name| QueueName::parse("queue", name).unwrap();
        assert!(hot.is_due(&queue("a"), now));
        assert!(!hot.is_due(&queue("a"), now + QUIET - Duration::from_millis(1)));
        assert!(hot.is_due(&queue("b"), now), "each queue for itself");
        assert!(hot.is_due(&queue("a"), now + QUIET));
    }
}
