//! Queues whose tables another session has locked (VACUUM FULL, ALTER TABLE, CREATE INDEX).
//!
//! Guarantees: a call on such a queue holds no connection while it waits, so it delays no other queue. One watcher per
//! locked queue asks Postgres whether the queue is free again, without waiting for the lock.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::watch;

use super::statement::QUEUE_ACCESS;
use super::{Fault, Inner, Store, Wait};
use crate::metrics;

/// First and longest pause between two checks of a locked queue.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// Statements that can run on a queue at present.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Access {
    /// None: the tables are locked.
    Closed,
    /// Reads only: another session keeps writers out.
    Reads,
    /// All: the queue is not locked.
    Free,
}

impl Access {
    fn from_stored(text: &str) -> Self {
        match text {
            "locked" => Self::Closed,
            "reads" => Self::Reads,
            // Missing tables and missing rights are no lock. Each statement fails on them at once.
            _ => Self::Free,
        }
    }
}

/// The queues known to be locked, each with its watcher's newest finding.
#[derive(Debug, Default)]
pub(super) struct LockedQueues {
    /// Number of locked queues. With none, the usual case, a check costs one atomic read.
    count: AtomicUsize,
    queues: Mutex<HashMap<String, Arc<watch::Sender<Access>>>>,
}

impl LockedQueues {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<watch::Sender<Access>>>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watched(&self, queue: &str) -> Option<watch::Receiver<Access>> {
        if self.count.load(Ordering::Relaxed) == 0 {
            return None;
        }
        self.lock().get(queue).map(|access| access.subscribe())
    }

    /// Whether a statement that needs this access may be sent.
    fn lets(&self, queue: &str, needed: Access) -> bool {
        self.watched(queue).is_none_or(|access| *access.borrow() >= needed)
    }

    /// Names of the locked queues.
    fn names(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }
}

/// Watch of one queue. Its drop removes the queue from the map, and lets its waiting calls continue.
struct Watched {
    inner: Weak<Inner>,
    queue: String,
    access: Arc<watch::Sender<Access>>,
}

impl Drop for Watched {
    fn drop(&mut self) {
        if let Some(inner) = self.inner.upgrade() {
            let mut queues = inner.locked.lock();
            queues.remove(&self.queue);
            inner.locked.count.store(queues.len(), Ordering::Relaxed);
        }
        self.access.send_replace(Access::Free);
    }
}

impl Store {
    /// Whether the tables of a queue allow this access, as far as is known.
    pub(super) fn lets(&self, queue: &str, needed: Access) -> bool {
        self.inner.locked.lets(queue, needed)
    }

    /// Waits until the tables of a queue allow this access. Holds no connection meanwhile.
    pub(crate) async fn wait_for(&self, queue: &str, needed: Access) {
        if let Some(mut access) = self.inner.locked.watched(queue) {
            // The sender sends `Access::Free` before it is dropped.
            let _ = access.wait_for(|access| *access >= needed).await;
        }
    }

    /// Whether a queue is known to be locked.
    pub(crate) fn is_locked(&self, queue: &str) -> bool {
        !self.lets(queue, Access::Free)
    }

    /// Names of the queues that are known to be locked.
    pub fn locked_queues(&self) -> Vec<String> {
        self.inner.locked.names()
    }

    /// Call this after a statement on a queue got no lock in time. Finds out whether a table is locked or only a row,
    /// and returns whether it is a table. A locked queue is watched until it is free.
    pub(crate) async fn suspect(&self, queue: &str) -> bool {
        if self.is_locked(queue) {
            return true;
        }
        let Ok(found) = self.queue_access(queue).await else { return false };
        if found == Access::Free {
            return false;
        }
        let access = {
            let mut queues = self.inner.locked.lock();
            if queues.contains_key(queue) {
                return true;
            }
            let access = Arc::new(watch::Sender::new(found));
            queues.insert(queue.to_owned(), Arc::clone(&access));
            self.inner.locked.count.store(queues.len(), Ordering::Relaxed);
            access
        };
        metrics::queue_locked();
        tracing::warn!(
            queue.name = queue,
            "another session has locked the queue's tables; its calls wait, and those of other queues do not"
        );
        tokio::spawn(watch_queue(Watched { inner: Arc::downgrade(&self.inner), queue: queue.to_owned(), access }));
        true
    }

    /// Asks Postgres which access the tables of a queue allow now.
    async fn queue_access(&self, queue: &str) -> Result<Access, Fault> {
        let rows = self.rows_now(&QUEUE_ACCESS, Wait::Skip, None, &[&queue]).await?;
        Ok(rows.first().map_or(Access::Free, |row| Access::from_stored(row.get("access"))))
    }
}

/// Checks a locked queue until it is free. Also ends when Postgres fails, or when the store is dropped.
async fn watch_queue(watched: Watched) {
    let began = tokio::time::Instant::now();
    let mut pause = PAUSE.0;
    loop {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE.1);
        let Some(inner) = watched.inner.upgrade() else { return };
        match (Store { inner }).queue_access(&watched.queue).await {
            Ok(Access::Free) => break,
            Ok(access) => {
                watched.access.send_replace(access);
            }
            // Nothing is known while Postgres fails. The calls of the queue continue and meet that fault themselves.
            Err(_) => break,
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    tracing::info!(queue.name = watched.queue, seconds, "the queue's tables are no longer locked");
}
