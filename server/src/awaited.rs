//! Runs that sleep until a task has ended: woken on hints of this replica, and by a look at all of them, soon while there are
//! any, seldom while there are none. Every replica looks; nobody leads.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::dispatch::random;
use crate::domain::{QueueName, TaskId};
use crate::engine::Engine;
use crate::store::Fault;

/// Between looks while runs wait.
const SOON: Duration = Duration::from_secs(2);
/// Between looks while this replica knows of none.
const SELDOM: Duration = Duration::from_secs(15);
/// A look that takes long (0.1 s for 100,000 awaited tasks, on two cores) comes less often: at most one part in so many of the
/// time is spent looking.
const LOOK_SHARE: u32 = 50;
/// Tasks whose end is told of in one statement, for each queue.
const SETTLED_MAX: i32 = 500;
/// The fewest: where wake-ups take longer than a statement may, fewer of them share one.
const SETTLED_MIN: i32 = 20;
/// A look at a queue that takes less than this may take on more wake-ups the next time.
const QUICK: Duration = Duration::from_secs(2);
/// Hints that are kept; what is beyond them waits for the next look.
const HINTS_MAX: usize = 10_000;

/// See the module.
#[derive(Debug, Default)]
pub struct AwaitedTasks {
    /// Whether a run waits for a task, as far as this replica knows.
    known: AtomicBool,
    ended: Mutex<Vec<(QueueName, TaskId)>>,
    bell: Notify,
    /// Queues whose wake-ups took longer than a statement may, and how many share one now.
    limits: Mutex<HashMap<String, i32>>,
}

impl AwaitedTasks {
    /// A run waits from now on.
    pub fn begun(&self) {
        if !self.known.swap(true, Ordering::Relaxed) {
            self.bell.notify_one();
        }
    }

    /// A task has ended here.
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

    /// Notes how a look at a queue went that had this limit.
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

/// Wakes runs for ever.
pub async fn run(engine: &Engine) {
    let awaited = &engine.awaited;
    let mut look_at = Instant::now();
    // Between looks while there is something to look at.
    let mut busy = SOON;
    loop {
        tokio::select! {
            () = awaited.bell.notified() => {}
            () = tokio::time::sleep_until(look_at) => {}
        }
        let ended = std::mem::take(&mut *awaited.ended.lock().unwrap_or_else(PoisonError::into_inner));
        let began = Instant::now();
        let looked = began >= look_at;
        let outcome = if looked { look(engine).await } else { settle(engine, ended).await };
        if let Err(fault) = outcome {
            tracing::debug!(?fault, "could not wake the runs that wait for tasks");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        if looked {
            busy = (began.elapsed() * LOOK_SHARE).clamp(SOON, SELDOM);
        }
        let pause = if awaited.known.load(Ordering::Relaxed) { busy } else { SELDOM };
        look_at = match looked {
            true => Instant::now() + pause.mul_f64(0.67 + 0.66 * random()),
            false => look_at.min(Instant::now() + pause),
        };
    }
}

/// Looks at all that is awaited.
async fn look(engine: &Engine) -> Result<(), Fault> {
    // Before the read: who begins to wait while it is under way stays known.
    let known = engine.awaited.known.swap(false, Ordering::Relaxed);
    match engine.store.task_list_awaited().await {
        Ok(false) => return Ok(()),
        Ok(true) => engine.awaited.known.store(true, Ordering::Relaxed),
        Err(fault) => {
            engine.awaited.known.fetch_or(known, Ordering::Relaxed);
            return Err(fault);
        }
    }
    if !engine.awaited.limits().is_empty() {
        return settle_apart(engine, SETTLED_MAX).await;
    }
    match settle_all(engine, None, SETTLED_MAX).await {
        Err(fault) if !fault.is_passing() || fault.is_too_much() => {
            tracing::warn!(problem = fault.problem(), "could not wake the runs that wait for tasks of many queues");
            settle_apart(engine, SETTLED_MAX / 5).await
        }
        done => done,
    }
}

/// Wakes runs until no more are found, for tasks of one queue or of all.
async fn settle_all(engine: &Engine, queue: Option<&str>, limit: i32) -> Result<(), Fault> {
    loop {
        let woken = engine.store.task_settle_awaited(queue, None, limit).await?;
        if woken.is_empty() {
            return Ok(());
        }
        offer(engine, &woken);
    }
}

/// Looks at each queue by itself, those that are not well last: a look at all of them failed, or would, because one of them takes
/// too long. A queue that takes too long has fewer wake-ups in its next statement.
async fn settle_apart(engine: &Engine, usual: i32) -> Result<(), Fault> {
    let mut queues = engine.store.task_list_awaited_queues().await?;
    engine.awaited.limits().retain(|queue, _| queues.contains(queue));
    queues.sort_by_key(|queue| engine.looks.is_troubled(queue));
    for queue in queues {
        let limit = engine.awaited.limits().get(&queue).copied().unwrap_or(usual);
        let began = Instant::now();
        let outcome = settle_all(engine, Some(&queue), limit).await;
        engine.awaited.judge(&queue, limit, &outcome, began.elapsed());
        if let Err(fault) = outcome {
            tracing::warn!(
                queue.name = queue,
                problem = fault.problem(),
                "could not wake the runs that wait for tasks of this queue"
            );
        }
    }
    Ok(())
}

/// Looks at tasks that have ended here.
async fn settle(engine: &Engine, ended: Vec<(QueueName, TaskId)>) -> Result<(), Fault> {
    let mut by_queue: HashMap<QueueName, Vec<TaskId>> = HashMap::new();
    for (queue, task_id) in ended {
        by_queue.entry(queue).or_default().push(task_id);
    }
    let mut outcome = Ok(());
    for (queue, tasks) in by_queue {
        for tasks in tasks.chunks(SETTLED_MAX.unsigned_abs() as usize) {
            match engine.store.task_settle_awaited(Some(queue.as_str()), Some(tasks), SETTLED_MAX).await {
                Ok(woken) => offer(engine, &woken),
                // What is left is found by the next look.
                Err(fault) => outcome = Err(fault),
            }
        }
    }
    outcome
}

fn offer(engine: &Engine, queues: &[String]) {
    for queue in queues {
        if let Ok(queue) = QueueName::parse("queue", queue) {
            engine.dispatcher.new_work(&queue);
        }
    }
}
