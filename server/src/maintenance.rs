//! The tick and the sweeps: what every replica does by itself, jittered, bounded, without a leader.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use crate::dispatch::random;
use crate::domain::{Error, EventName, QueueName, RunId};
use crate::doorbell;
use crate::engine::Engine;
use crate::metrics;
use crate::planted::{self, Bug};
use crate::scope::{Caller, Scope};
use crate::store::Fault;
use crate::store::batch::{RunRef, Write};
use crate::store::quarantine::Reason;
use crate::store::task::Cancellable;
use crate::store::tick::QueueTick;

/// Between looks at the queues that have streams here, less or more by a third.
const TICK: Duration = Duration::from_millis(1500);
/// Between looks at all queues.
const WIDE_TICK: Duration = Duration::from_secs(15);
/// Expired leases handled in one sweep of a queue.
const EXPIRED_MAX: i64 = 500;
/// Tasks cancelled by policy in one sweep of a queue.
const CANCELLED_MAX: usize = 200;
/// Longest wait for a task that a sweep cancels.
const CANCEL_WAIT: Duration = Duration::from_millis(100);
/// Time that one look spends on an unfinished emission.
const EMISSION_MAX: Duration = Duration::from_secs(5);
/// Queues looked at in one wide statement.
const QUEUES_MAX: i64 = 500;

/// Ticks for ever.
pub async fn tick(engine: &Arc<Engine>) {
    let mut wide_at = Instant::now() + WIDE_TICK.mul_f64(random());
    let mut cursors = std::collections::HashMap::new();
    loop {
        tokio::time::sleep(TICK.mul_f64(0.67 + 0.66 * random())).await;
        let active = engine.dispatcher.active();
        let names: Vec<&str> = active.iter().map(QueueName::as_str).collect();
        let ticks = doorbell::look(&engine.hints, &engine.store, &engine.dispatcher, &names).await;
        sweep(engine, &ticks, &mut cursors).await;
        if Instant::now() >= wide_at {
            wide_at = Instant::now() + WIDE_TICK.mul_f64(0.67 + 0.66 * random());
            wide(engine, &mut cursors).await;
        }
    }
}

/// Does at once what is due in all queues: the time has been moved.
pub async fn catch_up(engine: &Arc<Engine>) {
    wide(engine, &mut Cursors::new()).await;
}

type Cursors = std::collections::HashMap<String, Uuid>;

/// Looks at every queue of the database, so that leases also end where no stream is open.
async fn wide(engine: &Arc<Engine>, cursors: &mut Cursors) {
    if let Err(fault) = engine.store.release_forget().await {
        tracing::debug!(?fault, "could not forget old release counts");
    }
    finish_emissions(engine).await;
    look_at_quarantine(engine).await;
    match engine.store.snapshot_age().await {
        Ok(age) => metrics::snapshot_age(age),
        Err(fault) => tracing::debug!(?fault, "could not look for old transactions"),
    }
    let mut after = String::new();
    loop {
        let rows = match engine.store.queue_list(None, &after, QUEUES_MAX).await {
            Ok(rows) => rows,
            Err(fault) => {
                tracing::debug!(?fault, "could not list the queues");
                return;
            }
        };
        let names: Vec<String> = rows.iter().map(|row| row.get("queue_name")).collect();
        let Some(last) = names.last() else { return };
        after.clone_from(last);
        let refs: Vec<&str> = names.iter().map(String::as_str).collect();
        let ticks = doorbell::look(&engine.hints, &engine.store, &engine.dispatcher, &refs).await;
        sweep(engine, &ticks, cursors).await;
        // Queues made by plain SQL get their doorbell here.
        engine.hang_doorbells(&refs).await;
    }
}

/// Goes on with emissions that whoever began them did not finish.
async fn finish_emissions(engine: &Arc<Engine>) {
    let unfinished = engine.store.event_list_unfinished().await.unwrap_or_else(|fault| {
        tracing::debug!(?fault, "could not list unfinished emissions");
        Vec::new()
    });
    for (queue, event) in unfinished {
        let (Ok(queue), Ok(event)) = (QueueName::parse("queue", &queue), EventName::parse("event_name", &event)) else {
            continue;
        };
        engine.emit_more(&Caller::anonymous().scope(queue), &event, Instant::now() + EMISSION_MAX).await;
    }
}

async fn sweep(engine: &Arc<Engine>, ticks: &[QueueTick], cursors: &mut Cursors) {
    for tick in ticks {
        let Ok(name) = QueueName::parse("queue", &tick.queue) else { continue };
        let scope = Caller::anonymous().scope(name);
        if tick.expired
            && let Err(fault) = expire(engine, &scope).await
        {
            tracing::warn!(queue.name = %scope.queue(), ?fault, "could not sweep expired leases");
        }
        if tick.cancellable
            && let Err(fault) = cancel(engine, &scope, cursors).await
        {
            tracing::warn!(queue.name = %scope.queue(), ?fault, "could not sweep cancellation policies");
        }
    }
}

/// Fails runs whose lease has run out. Each is decided by itself; one that is locked is passed over.
async fn expire(engine: &Arc<Engine>, scope: &Scope) -> Result<(), Fault> {
    let runs = engine.store.run_list_expired(scope, EXPIRED_MAX).await?;
    // A locked row must not hold up the sweep: it is left to its holder after this long.
    let deadline = Instant::now() + Duration::from_secs(2);
    let writes =
        runs.iter().map(|id| engine.settle(scope, RunRef { run_id: *id, digest: None }, Write::Expire, deadline));
    if planted::is(Bug::FaintSweep) {
        for write in writes {
            write.await.map_err(|error| Fault::Bug(error.to_string()))?;
        }
        return Ok(());
    }
    let outcomes = futures_util::future::join_all(writes).await;
    let swept = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    let errors = outcomes.iter().map(|outcome| outcome.as_ref().err());
    set_aside(engine, scope, Reason::Lease, runs.iter().copied().zip(errors)).await;
    if swept > 0 {
        metrics::leases_expired(swept);
        tracing::info!(queue.name = %scope.queue(), runs = swept, "failed runs whose lease had run out");
    }
    Ok(())
}

/// Sets those aside that Postgres refuses to move on: tried again with the next sweep, they would only hold it up.
async fn set_aside<'a>(
    engine: &Arc<Engine>,
    scope: &Scope,
    reason: Reason,
    tried: impl Iterator<Item = (RunId, Option<&'a Error>)>,
) {
    let refused = |(run_id, error): (RunId, Option<&Error>)| match error? {
        Error::Internal(problem) | Error::Json { problem, .. } => Some((run_id, problem.clone())),
        _ => None,
    };
    let found: Vec<_> = tried.filter_map(refused).collect();
    let Some((run_id, problem)) = found.first() else { return };
    tracing::warn!(
        queue.name = %scope.queue(), tasks = found.len(), reason = reason.as_str(), run.id = %run_id, problem,
        "set tasks aside that cannot be moved on; see `absurd doctor`"
    );
    if let Err(fault) = engine.store.quarantine_put(scope, reason, &found).await {
        tracing::warn!(queue.name = %scope.queue(), ?fault, "could not note which tasks cannot be moved on");
    }
}

/// Forgets what has moved on, and counts the rest.
async fn look_at_quarantine(engine: &Arc<Engine>) {
    if let Err(fault) = engine.store.quarantine_forget().await {
        tracing::debug!(?fault, "could not forget what was set aside");
    }
    match engine.store.quarantine_count().await {
        Ok(counts) => counts.iter().for_each(|(reason, count)| metrics::quarantined(reason.as_str(), *count)),
        Err(fault) => tracing::debug!(?fault, "could not count what was set aside"),
    }
}

/// Cancels tasks by their policies, walking on by a cursor from sweep to sweep.
async fn cancel(engine: &Arc<Engine>, scope: &Scope, cursors: &mut Cursors) -> Result<(), Fault> {
    let key = scope.queue().as_str().to_owned();
    let after = cursors.get(&key).copied().unwrap_or(Uuid::nil());
    let page = engine.store.task_list_cancellable(scope, after).await?;
    let due: Vec<Cancellable> = page.iter().filter(|task| task.due).copied().collect();
    // So many at once; the next sweep goes on after them, whatever became of them.
    let next = match due.get(CANCELLED_MAX - 1).filter(|_| due.len() > CANCELLED_MAX) {
        Some(last) => Some(last.task_id),
        None if page.len() < 1000 => None,
        None => page.last().map(|task| task.task_id),
    };
    let mut refused = Vec::new();
    for task in due.iter().take(CANCELLED_MAX) {
        match engine.cancel_task(scope, task.task_id, Instant::now() + CANCEL_WAIT).await {
            Ok(_) | Err(Error::TaskNotFound(_) | Error::DeadlineExceeded | Error::QueueLocked { .. }) => {}
            Err(error) => {
                tracing::debug!(task.id = %task.task_id, %error, "could not cancel a task by its policy");
                refused.extend(task.run_id.map(|run_id| (run_id, error)));
            }
        }
    }
    set_aside(engine, scope, Reason::Policy, refused.iter().map(|(run_id, error)| (*run_id, Some(error)))).await;
    match next {
        Some(next) => cursors.insert(key, next),
        None => cursors.remove(&key),
    };
    Ok(())
}
