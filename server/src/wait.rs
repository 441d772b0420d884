//! Calls that wait for tasks to end. One batched read per second serves all waiting calls of this replica; hints bring
//! a read forward.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, oneshot};
use tokio::time::Instant;

use crate::domain::{Error, QueueName, TaskId};
use crate::looks::Looks;
use crate::per_queue::OneEach;
use crate::store::Store;
use crate::store::task::TaskEnd;
use crate::tally::Tally;

/// Pause between reads of all awaited tasks.
const PERIOD: Duration = Duration::from_secs(1);
/// Maximum number of waiting calls on one replica.
const WAITERS_MAX: usize = 50_000;
/// Queues that are read apart from the others at the same time.
const APART_MAX: usize = 1;
/// Tasks per statement.
const READ_MAX: usize = 5_000;

type Key = (QueueName, TaskId);

#[derive(Debug, Default)]
struct Inside {
    waiters: HashMap<Key, Vec<oneshot::Sender<TaskEnd>>>,
    /// Tasks that have ended, according to hints.
    ended: Vec<Key>,
}

/// The waiting calls, by task.
#[derive(Debug)]
pub struct Waits {
    inside: Mutex<Inside>,
    count: Tally,
    bell: Notify,
    /// Queues with a read apart from the others in flight.
    reading: OneEach,
    apart: Semaphore,
}

impl Default for Waits {
    fn default() -> Self {
        Self {
            inside: Mutex::default(),
            count: Tally::default(),
            bell: Notify::default(),
            reading: OneEach::default(),
            apart: Semaphore::new(APART_MAX),
        }
    }
}

/// A waiting call. Its drop removes it from the list, also when the caller abandons the call.
struct Waiter<'a> {
    waits: &'a Waits,
    key: Key,
    told: oneshot::Receiver<TaskEnd>,
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.told.close();
        let mut inside = self.waits.lock();
        if let Some(waiters) = inside.waiters.get_mut(&self.key) {
            waiters.retain(|waiter| !waiter.is_closed());
            if waiters.is_empty() {
                inside.waiters.remove(&self.key);
            }
        }
    }
}

impl Waits {
    /// Waits until the task has ended; `None`: `until` came first.
    pub async fn wait(&self, queue: &QueueName, task_id: TaskId, until: Instant) -> Result<Option<TaskEnd>, Error> {
        let busy = || Error::TooManyRequests { after: Duration::from_secs(1) };
        let _counted = self.count.begin_within(WAITERS_MAX).ok_or_else(busy)?;
        let (tell, told) = oneshot::channel();
        let mut waiter = Waiter { waits: self, key: (queue.clone(), task_id), told };
        self.lock().waiters.entry(waiter.key.clone()).or_default().push(tell);
        self.bell.notify_one();
        match tokio::time::timeout_at(until, &mut waiter.told).await {
            Ok(Ok(end)) => Ok(Some(end)),
            Ok(Err(_)) => Err(Error::ShuttingDown),
            Err(_) => Ok(None),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of waiting calls.
    pub fn count(&self) -> usize {
        self.count.now()
    }

    /// Number of tasks with a waiting call.
    pub(crate) fn tasks(&self) -> usize {
        self.lock().waiters.len()
    }

    /// Number of queues that are being read apart from the others.
    pub(crate) fn under_way(&self) -> usize {
        self.reading.count()
    }

    /// Hint that a task has ended on this replica.
    pub fn ended(&self, queue: &QueueName, task_id: TaskId) {
        let mut inside = self.lock();
        let key = (queue.clone(), task_id);
        if inside.waiters.contains_key(&key) {
            inside.ended.push(key);
            drop(inside);
            self.bell.notify_one();
        }
    }

    /// Ends all waits with [`Error::ShuttingDown`].
    pub fn close(&self) {
        self.lock().waiters.clear();
    }

    /// Reads forever. Troubled queues are read apart from the others.
    pub async fn run(self: &Arc<Self>, store: &Store, looks: &Looks) {
        let mut read_at = Instant::now();
        loop {
            let waiting = !self.lock().waiters.is_empty();
            if waiting {
                tokio::select! {
                    () = self.bell.notified() => {}
                    () = tokio::time::sleep_until(read_at) => {}
                }
            } else {
                self.bell.notified().await;
            }
            let keys: Vec<Key> = {
                let mut inside = self.lock();
                if Instant::now() >= read_at {
                    read_at = Instant::now() + PERIOD;
                    inside.ended.clear();
                    inside.waiters.keys().cloned().collect()
                } else {
                    std::mem::take(&mut inside.ended)
                }
            };
            let (apart, together): (Vec<Key>, Vec<Key>) =
                keys.into_iter().partition(|(queue, _)| looks.is_troubled(queue.as_str()));
            for keys in together.chunks(READ_MAX) {
                match store.task_ended(keys).await {
                    Ok(ends) => self.tell(ends),
                    Err(fault) if fault.is_passing() && !fault.is_too_much() => {
                        tracing::debug!(?fault, "could not read the ends of awaited tasks");
                    }
                    // Some queue takes too long, so each is read by itself.
                    Err(fault) => {
                        tracing::warn!(problem = fault.problem(), "could not read the ends of tasks of many queues");
                        self.read_apart(store, keys);
                    }
                }
            }
            self.read_apart(store, &apart);
        }
    }

    /// Reads the ends of tasks in the background, each queue in a statement of its own.
    fn read_apart(self: &Arc<Self>, store: &Store, keys: &[Key]) {
        let mut by_queue: HashMap<&QueueName, Vec<Key>> = HashMap::new();
        for key in keys {
            by_queue.entry(&key.0).or_default().push(key.clone());
        }
        for (queue, mut keys) in by_queue {
            let Some(reading) = self.reading.begin(queue) else { continue };
            keys.truncate(READ_MAX);
            let (waits, store) = (Arc::clone(self), store.clone());
            tokio::spawn(async move {
                let _reading = reading;
                let Ok(_place) = waits.apart.acquire().await else { return };
                match store.task_ended(&keys).await {
                    Ok(ends) => waits.tell(ends),
                    Err(fault) => tracing::debug!(?fault, "could not read the ends of awaited tasks"),
                }
            });
        }
    }

    fn tell(&self, ends: Vec<(String, TaskEnd)>) {
        let mut inside = self.lock();
        for (queue, end) in ends {
            let Ok(queue) = QueueName::parse("queue", &queue) else { continue };
            for waiter in inside.waiters.remove(&(queue, end.task_id)).unwrap_or_default() {
                let _ = waiter.send(end.clone());
            }
        }
    }
}
