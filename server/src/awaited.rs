//! Runs that sleep until a task has ended: the hints of this replica and the pace of wake-ups. The loop in `look` wakes
//! the runs.

pub mod look;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use crate::domain::{QueueName, TaskId};
use crate::store::Fault;

/// Wake-ups per statement and awaited queue.
const SETTLED_MAX: i32 = 500;
/// Lower bound of the wake-ups per statement: a queue whose wake-ups exceed the statement's time gets fewer per
/// statement.
const SETTLED_MIN: i32 = 20;
/// A queue whose look takes less than this gets more wake-ups in its next statement.
const QUICK: Duration = Duration::from_secs(2);
/// Ended tasks that are remembered for the next wake-up; the next look finds any others.
const HINTS_MAX: usize = 10_000;

/// Hints that tasks have ended, and the pace of each queue's wake-ups.
#[derive(Debug, Default)]
pub struct AwaitedTasks {
    /// Whether a run waits for a task, to this replica's knowledge.
    known: AtomicBool,
    ended: Mutex<Vec<(QueueName, TaskId)>>,
    bell: Notify,
    /// Wake-ups per statement, for queues whose wake-ups exceeded the statement's time.
    limits: Mutex<HashMap<String, i32>>,
}

impl AwaitedTasks {
    /// A run has begun to wait for a task.
    pub fn begun(&self) {
        if !self.known.swap(true, Ordering::Relaxed) {
            self.bell.notify_one();
        }
    }

    /// Hint that a task has ended on this replica. Kept only while a run is known to wait.
    pub fn ended(&self, queue: &QueueName, task_id: TaskId) {
        if self.known.load(Ordering::Relaxed) {
            let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
            if ended.len() < HINTS_MAX {
                ended.push((queue.clone(), task_id));
            }
            drop(ended);
            self.bell.notify_one();
        }
    }

    fn limits(&self) -> MutexGuard<'_, HashMap<String, i32>> {
        self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adapts a queue's limit to the outcome of a look: a fifth after a timeout, five times as many after a quick one.
    fn judge(&self, queue: &str, limit: i32, outcome: &Result<(), Fault>, took: Duration) {
        let next = match outcome {
            Err(fault) if fault.is_too_much() => limit / 5,
            Ok(()) if took < QUICK => limit.saturating_mul(5),
            _ => limit,
        };
        if next < SETTLED_MAX {
            self.limits().insert(queue.to_owned(), next.max(SETTLED_MIN));
        } else {
            self.limits().remove(queue);
        }
    }
}
