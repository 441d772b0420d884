//! The ticks: periodic work of every replica, with jitter and bounds and without a leader.
//!
//! Three independent loops: looks at the queues in use, looks at all queues, and chores.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::domain::{EventName, QueueName};
use crate::engine::Engine;
use crate::jitter::random;
use crate::metrics;
use crate::per_queue::OneEach;
use crate::scope::Caller;
use crate::store::tick::QueueTick;
use crate::sweeps;

/// Mean pause between looks at the queues in use here, jittered by a third. [`crate::engine::EngineOptions`] may set
/// another.
pub(crate) const TICK: Duration = Duration::from_millis(1500);
/// Ticks between looks at all queues, and between rounds of chores.
const WIDE_TICKS: u32 = 10;
/// A queue stays in use for this long after its last `ClaimTask` call.
const IN_USE: Duration = Duration::from_secs(60);
/// A lease that ends within this time keeps its queue in use until then. Longer than any pause between wide looks (20
/// s).
const EXPIRY_SEEN: Duration = Duration::from_secs(25);
/// Maximum number of queues remembered as in use.
const IN_USE_MAX: usize = 10_000;
/// Longest time that one round spends on one unfinished emission.
const EMISSION_MAX: Duration = Duration::from_secs(5);
/// Queues whose unfinished emissions are continued at the same time.
const EMISSIONS_MAX: usize = 4;
/// Queues per page of a wide look.
const QUEUES_MAX: i64 = 500;

/// Queues without a stream here that are looked at nevertheless, so that sweeps find their expired leases in time.
#[derive(Debug, Default)]
pub struct InUse(Mutex<HashMap<QueueName, Instant>>);

impl InUse {
    /// Keeps a queue in use until `until`, or longer if it already was.
    fn note(&self, queue: &QueueName, until: Instant) {
        let mut queues = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if queues.len() < IN_USE_MAX || queues.contains_key(queue) {
            let known = queues.entry(queue.clone()).or_insert(until);
            *known = until.max(*known);
        }
    }

    /// A worker has asked for tasks of a queue by `ClaimTask`.
    pub fn polled(&self, queue: &QueueName) {
        self.note(queue, Instant::now() + IN_USE);
    }

    /// The queues in use now; forgets the others.
    fn now(&self) -> Vec<QueueName> {
        let mut queues = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        queues.retain(|_, until| *until > now);
        queues.keys().cloned().collect()
    }
}

/// Mean pause between looks at all queues, and between rounds of chores.
fn wide_tick_of(engine: &Engine) -> Duration {
    engine.tick * WIDE_TICKS
}

/// Looks forever at the queues with a dispatcher here and at those in use.
pub async fn tick(engine: &Arc<Engine>) {
    loop {
        tokio::time::sleep(engine.tick.mul_f64(0.67 + 0.66 * random())).await;
        let mut queues = engine.dispatcher.active();
        queues.extend(engine.in_use.now());
        queues.sort_unstable();
        queues.dedup();
        let names: Vec<&str> = queues.iter().map(QueueName::as_str).collect();
        look(engine, &names).await.detach_all();
    }
}

/// Looks forever at every queue of the database, so that leases also end where no stream is open.
pub async fn wide_tick(engine: &Arc<Engine>) {
    tokio::time::sleep(wide_tick_of(engine).mul_f64(random())).await;
    loop {
        wide(engine).await.detach_all();
        tokio::time::sleep(wide_tick_of(engine).mul_f64(0.67 + 0.66 * random())).await;
    }
}

/// Does the chores forever: forgets old release counts, continues emissions, counts quarantined tasks, measures the
/// oldest transaction.
pub async fn chores(engine: &Arc<Engine>) {
    loop {
        tokio::time::sleep(wide_tick_of(engine).mul_f64(0.67 + 0.66 * random())).await;
        if let Err(fault) = engine.store.release_forget().await {
            tracing::debug!(?fault, "could not forget old release counts");
        }
        finish_emissions(engine).await.detach_all();
        look_at_quarantine(engine).await;
        match engine.store.snapshot_age().await {
            Ok(age) => metrics::snapshot_age(age),
            Err(fault) => tracing::debug!(?fault, "could not look for old transactions"),
        }
    }
}

/// Does everything that is due in all queues and waits until it is done; used after the test clock has moved.
pub async fn catch_up(engine: &Arc<Engine>) {
    finish_emissions(engine).await.join_all().await;
    wide(engine).await.join_all().await;
}

/// Looks at queues and begins the sweeps that are due; troubled queues are looked at in the background.
async fn look(engine: &Arc<Engine>, queues: &[&str]) -> tokio::task::JoinSet<()> {
    let for_troubled = {
        let engine = Arc::clone(engine);
        move |ticks: Vec<QueueTick>| {
            let engine = Arc::clone(&engine);
            async move { drop(sweeps::begin(&engine, &ticks).join_all().await) }
        }
    };
    engine.looks.apart(queues, for_troubled);
    match engine.looks.at(queues).await {
        Ok(ticks) => {
            note_expiries(engine, &ticks);
            sweeps::begin(engine, &ticks)
        }
        Err(fault) => {
            tracing::debug!(?fault, "could not look at the queues");
            tokio::task::JoinSet::new()
        }
    }
}

/// Keeps queues in use whose next lease ends before the next wide look, until three ticks after that end.
fn note_expiries(engine: &Arc<Engine>, ticks: &[QueueTick]) {
    for tick in ticks {
        let next = tick.next_expiry_ms.and_then(|ms| u64::try_from(ms).ok()).map(Duration::from_millis);
        if let (Some(next), Ok(queue)) =
            (next.filter(|next| *next < EXPIRY_SEEN), QueueName::parse("queue", &tick.queue))
        {
            engine.in_use.note(&queue, Instant::now() + next + 3 * engine.tick);
        }
    }
}

async fn wide(engine: &Arc<Engine>) -> tokio::task::JoinSet<()> {
    let mut begun = tokio::task::JoinSet::new();
    let mut after = String::new();
    loop {
        let rows = match engine.store.queue_list(None, &after, QUEUES_MAX).await {
            Ok(rows) => rows,
            Err(fault) => {
                tracing::debug!(?fault, "could not list the queues");
                return begun;
            }
        };
        let names: Vec<String> = rows.iter().map(|row| row.get("queue_name")).collect();
        let Some(last) = names.last() else { return begun };
        after.clone_from(last);
        let refs: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut sweeps = look(engine, &refs).await;
        begun.spawn(async move { while sweeps.join_next().await.is_some() {} });
        // Queues created by plain SQL get their doorbell here.
        let engine = Arc::clone(engine);
        begun.spawn(async move {
            // One round at a time: with many locked queues a round may outlast the tick.
            let Ok(_round) = engine.hanging.try_lock() else { return };
            engine.hang_doorbells(&names.iter().map(String::as_str).collect::<Vec<_>>()).await;
        });
    }
}

/// Unfinished emissions that this replica continues. Each queue has its own work, so a locked queue delays no other.
#[derive(Debug)]
pub struct Emissions {
    under_way: OneEach,
    places: Semaphore,
}

impl Default for Emissions {
    fn default() -> Self {
        Self { under_way: OneEach::default(), places: Semaphore::new(EMISSIONS_MAX) }
    }
}

impl Emissions {
    /// Number of queues whose emissions are being continued.
    pub(crate) fn under_way(&self) -> usize {
        self.under_way.count()
    }
}

/// Continues emissions whose call ended before all waiting runs were woken.
async fn finish_emissions(engine: &Arc<Engine>) -> tokio::task::JoinSet<()> {
    let mut begun = tokio::task::JoinSet::new();
    let unfinished = engine.store.event_list_unfinished().await.unwrap_or_else(|fault| {
        tracing::debug!(?fault, "could not list unfinished emissions");
        Vec::new()
    });
    let mut by_queue: HashMap<QueueName, Vec<EventName>> = HashMap::new();
    for (queue, event) in unfinished {
        if let (Ok(queue), Ok(event)) = (QueueName::parse("queue", &queue), EventName::parse("event_name", &event)) {
            by_queue.entry(queue).or_default().push(event);
        }
    }
    for (queue, events) in by_queue {
        let Some(under_way) = engine.emissions.under_way.begin(&queue) else { continue };
        let engine = Arc::clone(engine);
        begun.spawn(async move {
            let _under_way = under_way;
            let Ok(_place) = engine.emissions.places.acquire().await else { return };
            let scope = Caller::anonymous().scope(queue);
            for event in events {
                engine.emit_more(&scope, &event, Instant::now() + EMISSION_MAX).await;
            }
        });
    }
    begun
}

/// Forgets quarantined tasks that have moved on, and counts the others for the metric.
async fn look_at_quarantine(engine: &Arc<Engine>) {
    if let Err(fault) = engine.store.quarantine_forget().await {
        tracing::debug!(?fault, "could not forget what was set aside");
    }
    match engine.store.quarantine_count().await {
        Ok(counts) => counts.iter().for_each(|(reason, count)| metrics::quarantined(reason.as_str(), *count)),
        Err(fault) => tracing::debug!(?fault, "could not count what was set aside"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::DispatchOptions;
    use crate::engine::EngineOptions;
    use crate::hints::Hints;
    use crate::store::tests::nowhere;

    /// No tick falls on the moment at which a lease ends, so the queue is looked at until some time after it.
    #[tokio::test(start_paused = true)]
    async fn a_queue_is_looked_at_until_after_the_end_of_its_lease() {
        let hints = Arc::new(Hints::new("replica".into(), false));
        let engine = Engine::new(nowhere(), hints, DispatchOptions::default(), EngineOptions::default());
        let engine = Arc::new(engine);
        let tick = QueueTick {
            queue: "q".into(),
            missing: false,
            locked: false,
            problem: None,
            claimable: false,
            expired: false,
            cancellable: false,
            next_available_ms: None,
            next_expiry_ms: Some(20_000),
            took: Duration::ZERO,
        };
        note_expiries(&engine, &[tick]);
        // Longer than the longest pause between two looks.
        tokio::time::advance(Duration::from_secs(20) + engine.tick.mul_f64(1.5)).await;
        assert_eq!(engine.in_use.now(), [QueueName::parse("queue", "q").unwrap()]);
        tokio::time::advance(IN_USE).await;
        assert!(engine.in_use.now().is_empty(), "nobody has polled it");
    }
}
