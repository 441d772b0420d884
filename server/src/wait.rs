//! Waiting for tasks to end: on hints, and on one batched read per second for all waiters of this replica.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use crate::domain::{Error, QueueName, TaskId};
use crate::store::Store;
use crate::store::task::TaskEnd;

/// Between reads.
const PERIOD: Duration = Duration::from_secs(1);
/// Waiters of one replica at most.
const WAITERS_MAX: usize = 50_000;
/// Tasks asked about in one statement.
const READ_MAX: usize = 5_000;

type Key = (QueueName, TaskId);

#[derive(Debug, Default)]
struct Inside {
    waiters: HashMap<Key, Vec<oneshot::Sender<TaskEnd>>>,
    count: usize,
    /// Tasks said to have ended.
    ended: Vec<Key>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Waits {
    inside: Mutex<Inside>,
    bell: Notify,
}

impl Waits {
    /// Waits until the task has ended; `None` when the time is up first.
    pub async fn wait(&self, queue: &QueueName, task_id: TaskId, until: Instant) -> Result<Option<TaskEnd>, Error> {
        let (tell, told) = oneshot::channel();
        {
            let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
            if inside.count >= WAITERS_MAX {
                return Err(Error::TooManyRequests { after: Duration::from_secs(1) });
            }
            inside.count += 1;
            inside.waiters.entry((queue.clone(), task_id)).or_default().push(tell);
        }
        self.bell.notify_one();
        let told = tokio::time::timeout_at(until, told).await;
        let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        inside.count = inside.count.saturating_sub(1);
        match told {
            Ok(Ok(end)) => Ok(Some(end)),
            Ok(Err(_)) => Err(Error::ShuttingDown),
            Err(_) => {
                let key = (queue.clone(), task_id);
                if let Some(waiters) = inside.waiters.get_mut(&key) {
                    waiters.retain(|waiter| !waiter.is_closed());
                    if waiters.is_empty() {
                        inside.waiters.remove(&key);
                    }
                }
                Ok(None)
            }
        }
    }

    /// A task has ended here.
    pub fn ended(&self, queue: &QueueName, task_id: TaskId) {
        let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (queue.clone(), task_id);
        if inside.waiters.contains_key(&key) {
            inside.ended.push(key);
            drop(inside);
            self.bell.notify_one();
        }
    }

    /// Ends all waits, because the server stops.
    pub fn close(&self) {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner).waiters.clear();
    }

    /// Reads for ever.
    pub async fn run(&self, store: &Store) {
        let mut read_at = Instant::now();
        loop {
            let waiting = !self.inside.lock().unwrap_or_else(PoisonError::into_inner).waiters.is_empty();
            if waiting {
                tokio::select! {
                    () = self.bell.notified() => {}
                    () = tokio::time::sleep_until(read_at) => {}
                }
            } else {
                self.bell.notified().await;
            }
            let keys: Vec<Key> = {
                let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
                if Instant::now() >= read_at {
                    read_at = Instant::now() + PERIOD;
                    inside.ended.clear();
                    inside.waiters.keys().cloned().collect()
                } else {
                    std::mem::take(&mut inside.ended)
                }
            };
            for keys in keys.chunks(READ_MAX) {
                match store.task_ended(keys).await {
                    Ok(ends) => self.tell(ends),
                    Err(fault) => tracing::debug!(?fault, "could not read the ends of awaited tasks"),
                }
            }
        }
    }

    fn tell(&self, ends: Vec<(String, TaskEnd)>) {
        let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        for (queue, end) in ends {
            let Ok(queue) = QueueName::parse("queue", &queue) else { continue };
            for waiter in inside.waiters.remove(&(queue, end.task_id)).unwrap_or_default() {
                let _ = waiter.send(end.clone());
            }
        }
    }
}
