//! Sweeps: fail runs whose lease has expired, and cancel tasks by their cancellation policies. Each queue is swept by
//! itself, so a slow sweep delays no other queue.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;
use uuid::Uuid;

use crate::domain::{Error, QueueName, RunId};
use crate::engine::Engine;
use crate::metrics;
use crate::per_queue::OneEach;
use crate::planted::{self, Bug};
use crate::scope::{Caller, Scope};
use crate::store::Fault;
use crate::store::batch::{RunRef, Write};
use crate::store::quarantine::Reason;
use crate::store::task::Cancellable;
use crate::store::tick::QueueTick;

/// Expired leases per sweep of a queue.
const EXPIRED_MAX: i64 = 500;
/// Tasks cancelled by policy per sweep of a queue.
const CANCELLED_MAX: usize = 200;
/// Deadline of each cancellation.
const CANCEL_WAIT: Duration = Duration::from_millis(100);
/// Deadline of the writes that fail runs. A locked row must not hold up the sweep; the next sweep tries it again.
const WRITE_MAX: Duration = Duration::from_secs(2);
/// Sweeps of healthy queues at the same time.
const QUEUES_MAX: usize = 16;
/// Sweeps of troubled queues at the same time.
const TROUBLED_MAX: usize = 1;

/// State of the sweeps of one replica.
#[derive(Debug)]
pub struct Sweeps {
    under_way: OneEach,
    places: Semaphore,
    troubled_places: Semaphore,
    /// The task id after which the next sweep of a queue's policies begins.
    cursors: Mutex<HashMap<QueueName, Uuid>>,
}

impl Default for Sweeps {
    fn default() -> Self {
        Self {
            under_way: OneEach::default(),
            places: Semaphore::new(QUEUES_MAX),
            troubled_places: Semaphore::new(TROUBLED_MAX),
            cursors: Mutex::default(),
        }
    }
}

impl Sweeps {
    /// Number of queues with a sweep in flight or waiting for a place.
    pub(crate) fn under_way(&self) -> usize {
        self.under_way.count()
    }
}

/// Begins the sweeps that a look has found due. They run in the background; after [`JoinSet::detach_all`] they outlive
/// the returned set.
pub fn begin(engine: &Arc<Engine>, ticks: &[QueueTick]) -> JoinSet<()> {
    let mut begun = JoinSet::new();
    for tick in ticks.iter().filter(|tick| tick.expired || tick.cancellable) {
        let Ok(name) = QueueName::parse("queue", &tick.queue) else { continue };
        let Some(under_way) = engine.sweeps.under_way.begin(&name) else { continue };
        let (engine, expired, cancellable) = (Arc::clone(engine), tick.expired, tick.cancellable);
        begun.spawn(async move {
            let _under_way = under_way;
            let troubled = engine.looks.is_troubled(name.as_str());
            let places = if troubled { &engine.sweeps.troubled_places } else { &engine.sweeps.places };
            let Ok(_place) = places.acquire().await else { return };
            sweep(&engine, &Caller::anonymous().scope(name), expired, cancellable).await;
        });
    }
    begun
}

async fn sweep(engine: &Arc<Engine>, scope: &Scope, expired: bool, cancellable: bool) {
    if expired {
        tell(scope, "expired leases", expire(engine, scope).await);
    }
    if cancellable {
        tell(scope, "cancellation policies", cancel(engine, scope).await);
    }
}

fn tell(scope: &Scope, of: &str, outcome: Result<(), Fault>) {
    match outcome {
        // The store logs a locked queue where it finds the lock.
        Ok(()) | Err(Fault::Locked | Fault::Missing) => {}
        Err(fault) => tracing::warn!(queue.name = %scope.queue(), problem = fault.problem(), "could not sweep {of}"),
    }
}

/// Fails runs whose lease has expired. Each run has its own outcome; a run whose row is locked is passed over.
async fn expire(engine: &Arc<Engine>, scope: &Scope) -> Result<(), Fault> {
    let runs = engine.store.run_list_expired(scope, EXPIRED_MAX).await?;
    let deadline = Instant::now() + WRITE_MAX;
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

/// Quarantines runs whose write Postgres refuses, because each further sweep would only fail on them again.
async fn set_aside<'a>(
    engine: &Arc<Engine>,
    scope: &Scope,
    reason: Reason,
    tried: impl Iterator<Item = (RunId, Option<&'a Error>)>,
) {
    let refused = |(run_id, error): (RunId, Option<&Error>)| match error? {
        Error::Internal(problem)
        | Error::DatabaseRefused(problem)
        | Error::DatabaseBroken(problem)
        | Error::QueueDamaged { problem, .. }
        | Error::Json { problem, .. } => Some((run_id, problem.clone())),
        _ => None,
    };
    let found: Vec<_> = tried.filter_map(refused).collect();
    let Some((run_id, problem)) = found.first() else { return };
    tracing::warn!(
        queue.name = %scope.queue(), tasks = found.len(), reason = reason.as_str(), run.id = %run_id, problem,
        "set tasks aside that cannot be moved on; see `absurd doctor`"
    );
    if let Err(fault) = engine.store.quarantine_put(scope, reason, &found).await {
        tracing::warn!(
            queue.name = %scope.queue(), problem = fault.problem(), "could not note which tasks cannot be moved on"
        );
    }
}

/// Cancels tasks by their policies. A cursor moves on from sweep to sweep.
async fn cancel(engine: &Arc<Engine>, scope: &Scope) -> Result<(), Fault> {
    let cursors = || engine.sweeps.cursors.lock().unwrap_or_else(PoisonError::into_inner);
    let after = cursors().get(scope.queue()).copied().unwrap_or(Uuid::nil());
    let page = engine.store.task_list_cancellable(scope, after).await?;
    let due: Vec<Cancellable> = page.iter().filter(|task| task.due).copied().collect();
    // At most `CANCELLED_MAX` per sweep. The next sweep continues after them, whatever their outcome.
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
        Some(next) => cursors().insert(scope.queue().clone(), next),
        None => cursors().remove(scope.queue()),
    };
    Ok(())
}
