//! State per queue, each behind an async mutex of its own, so queues never block each other.
//!
//! Bounded: when `QUEUES_MAX` is reached, all state is forgotten, and each queue's next call reads the database again.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use crate::domain::QueueName;

/// Maximum number of queues with state.
const QUEUES_MAX: usize = 10_000;

/// One `T` per queue.
#[derive(Debug, Default)]
pub struct PerQueue<T>(Mutex<HashMap<QueueName, Arc<tokio::sync::Mutex<T>>>>);

impl<T: Default> PerQueue<T> {
    /// The state of a queue, created if missing.
    pub fn of(&self, queue: &QueueName) -> Arc<tokio::sync::Mutex<T>> {
        let mut queues = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if queues.len() >= QUEUES_MAX && !queues.contains_key(queue) {
            queues.clear();
        }
        Arc::clone(queues.entry(queue.clone()).or_default())
    }
}

/// Allows one piece of work in flight per queue. Holds an entry only for queues with work in flight.
#[derive(Debug, Default)]
pub struct OneEach(Arc<Mutex<HashSet<QueueName>>>);

/// Guard of work in flight; dropping it ends the work.
#[derive(Debug)]
pub struct Begun {
    all: Arc<Mutex<HashSet<QueueName>>>,
    queue: QueueName,
}

impl OneEach {
    /// Begins work for a queue; None: work for it is in flight already.
    pub fn begin(&self, queue: &QueueName) -> Option<Begun> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(queue.clone()).then(|| Begun { all: Arc::clone(&self.0), queue: queue.clone() })
    }

    /// Queues with work under way.
    pub fn count(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.queue);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_has_one_piece_of_work_under_way() {
        let queue = |name| QueueName::parse("queue", name).unwrap();
        let all = OneEach::default();
        let begun = all.begin(&queue("a"));
        assert!(begun.is_some());
        assert!(all.begin(&queue("a")).is_none(), "one is under way");
        assert!(all.begin(&queue("b")).is_some(), "each queue for itself");
        drop(begun);
        assert!(all.begin(&queue("a")).is_some(), "it is over");
        assert_eq!(all.count(), 0);
    }
}
