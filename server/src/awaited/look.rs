//! Wakes runs that sleep until a task has ended.
//!
//! A task that ends on this replica wakes its waiting runs at once. A periodic look at all awaited tasks finds the
//! others: about every 2 s while runs wait, else about every 15 s. Every replica looks; there is no leader.

use std::collections::HashMap;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::Instant;

use super::SETTLED_MAX;
use crate::domain::{QueueName, TaskId};
use crate::engine::Engine;
use crate::jitter::random;
use crate::store::Fault;

/// Pause between looks while runs wait.
const SOON: Duration = Duration::from_secs(2);
/// Pause between looks while this replica knows of no waiting run.
const SELDOM: Duration = Duration::from_secs(15);
/// At most one part in this many of the time is spent on looks, so slow looks come less often. A look at 100,000
/// awaited tasks takes 0.1 s on two cores.
const LOOK_SHARE: u32 = 50;

/// Runs the wake-ups and the looks forever.
pub async fn run(engine: &Engine) {
    let awaited = &engine.awaited;
    let mut look_at = Instant::now();
    // Pause between looks while runs wait.
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

/// Wakes the runs of all awaited tasks that have ended, unless no task is awaited.
async fn look(engine: &Engine) -> Result<(), Fault> {
    // Cleared before the read, so that a run which begins to wait during the read stays known.
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

/// Wakes runs until no more are found, for the tasks of one queue, or of all (None).
async fn settle_all(engine: &Engine, queue: Option<&str>, limit: i32) -> Result<(), Fault> {
    loop {
        let woken = engine.store.task_settle_awaited(queue, None, limit).await?;
        if woken.is_empty() {
            return Ok(());
        }
        offer(engine, &woken);
    }
}

/// Settles each queue by itself, troubled queues last. Used when one statement for all queues failed or would fail
/// because one queue takes too long. A queue that takes too long gets fewer wake-ups in its next statement.
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

/// Wakes the runs that wait for these tasks, which ended on this replica.
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
                // The next look finds the rest.
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
