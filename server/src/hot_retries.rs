//! Finds hot retries: tasks that fail attempt after attempt without a pause.
//!
//! Each attempt costs the database a claim, a failure and a new run, as fast as workers can go. So a metric counts them
//! and the log names one task per queue and minute.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::domain::{QueueName, TaskId};
use crate::metrics;
use crate::scope::Scope;
use crate::store::Store;
use crate::store::text::Part;

/// A retry without a pause is hot after more than this many failed attempts.
const HOT: i32 = 5;
/// Pause between log lines about one queue.
const QUIET: Duration = Duration::from_secs(60);
/// Maximum number of remembered queues. Beyond it all are forgotten, at the cost of an early log line per queue.
const QUEUES_MAX: usize = 10_000;

/// When the log last named a task of each queue.
#[derive(Debug, Default)]
pub(crate) struct HotRetries {
    /// Time of the last log line per queue.
    named: Mutex<HashMap<QueueName, Instant>>,
}

impl HotRetries {
    /// Notes that an attempt failed and that the task is claimable at once as attempt `next`.
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
    // Read only for the task's name. A missing queue and an unreachable database have log lines of their own.
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
