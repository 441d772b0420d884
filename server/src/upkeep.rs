//! Upkeep: carries out the queues' policies (cleanup, partitions ahead, detaching). The first replica to take a queue
//! in an interval works on it.
//!
//! Every batch is a transaction of its own, bounded by the queue's `cleanup_limit`. A round of one queue is bounded in
//! time, so its backlog does not starve other queues.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::domain::QueueName;
use crate::engine::Engine;
use crate::jitter::random;
use crate::scope::{Caller, Scope};
use crate::store::upkeep::Round;

/// Queues taken per statement.
const QUEUES_MAX: i64 = 20;
/// Longest round of one queue, also bounded by the interval; the next round does the rest.
const QUEUE_MAX: Duration = Duration::from_secs(30);

/// Runs forever; each queue gets a round once per interval `every`.
pub async fn run(engine: &Arc<Engine>, every: Duration) {
    loop {
        // Checks 10 to 20 times per interval, so a round is late by at most a tenth of it.
        tokio::time::sleep(every.mul_f64(0.05 + 0.05 * random())).await;
        loop {
            match engine.store.upkeep_take(every.as_secs_f64(), QUEUES_MAX).await {
                Ok(queues) if queues.is_empty() => break,
                Ok(queues) => {
                    for queue in queues {
                        round(engine, &queue, every).await;
                    }
                }
                Err(fault) => {
                    tracing::debug!(?fault, "could not see which queues need upkeep");
                    break;
                }
            }
        }
    }
}

async fn round(engine: &Arc<Engine>, queue: &str, every: Duration) {
    let Ok(name) = QueueName::parse("queue", queue) else { return };
    let scope = Caller::anonymous().scope(name);
    // Bounded by the interval too, so that one queue does not keep all others from their rounds.
    let until = Instant::now() + QUEUE_MAX.min(every);
    let mut round = Round::default();
    // On a locked queue, each statement of the round would hold a connection until its lock wait ends.
    if engine.store.suspect(queue).await {
        round.problem = Some("another session has locked the queue's tables".to_owned());
    } else {
        carry_out(engine, &scope, &mut round, until).await;
    }
    if round.tasks + round.events + i64::from(round.partitions) > 0 {
        tracing::info!(
            queue.name = queue,
            tasks = round.tasks,
            events = round.events,
            partitions = round.partitions,
            "cleaned up"
        );
    }
    if let Some(problem) = &round.problem {
        tracing::warn!(queue.name = queue, problem, "upkeep could not do everything; see `absurd doctor`");
    }
    if let Err(fault) = engine.store.upkeep_note(&scope, &round).await {
        tracing::debug!(queue.name = queue, ?fault, "could not note how the upkeep went");
    }
}

/// Runs batches until nothing is left to do or `until` has passed.
async fn carry_out(engine: &Arc<Engine>, scope: &Scope, round: &mut Round, until: Instant) {
    loop {
        match engine.store.upkeep_run(scope, round).await {
            Ok(true) if Instant::now() < until => {}
            Ok(_) => break,
            Err(fault) => {
                round.problem = Some(fault.into_error(scope).to_string());
                break;
            }
        }
    }
}
