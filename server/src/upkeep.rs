//! Upkeep: the queues' policies (cleanup, partitions ahead, detaching), carried out by whichever replica comes first.
//!
//! Every batch is a transaction of its own and bounded by the queue's `cleanup_limit`; no queue is worked on twice at once,
//! and none is starved by another one's backlog.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::dispatch::random;
use crate::domain::QueueName;
use crate::engine::Engine;
use crate::scope::{Caller, Scope};
use crate::store::upkeep::Round;

/// Queues taken at once.
const QUEUES_MAX: i64 = 20;
/// Longest time for one queue in a round, where the interval is longer; what is left is for the next round.
const QUEUE_MAX: Duration = Duration::from_secs(30);

/// Works for ever; each queue gets a round this often.
pub async fn run(engine: &Arc<Engine>, every: Duration) {
    loop {
        // Often enough that a round is late by a small part of its interval only.
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
    // Longer than the interval, it would keep every other queue from its rounds.
    let until = Instant::now() + QUEUE_MAX.min(every);
    let mut round = Round::default();
    // A locked queue would take a connection for as long as each of its parts waits.
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

/// Carries out batches until nothing is left to do, or until the time is over.
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
