//! Looks at queues: a look is one statement that reads the state of queues. Healthy queues share a statement; a
//! troubled queue, whose look fails or takes long, gets its own.
//!
//! Guarantee: a queue that cannot be looked at (no rights, a renamed column, a damaged page, a missing index) delays no
//! look at another queue. No fault of a queue keeps the database's clock from being read.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::dispatch::Dispatcher;
use crate::domain::QueueName;
use crate::hints::Hints;
use crate::per_queue::OneEach;
use crate::planted::{self, Bug};
use crate::store::tick::{QueueTick, Tick};
use crate::store::{Fault, Store};

/// A look at a queue that takes longer than this, and `SLOW_TIMES` as long as the median, is slow.
const SLOW: Duration = Duration::from_millis(100);
/// Factor over the median look from which a look is slow.
const SLOW_TIMES: u32 = 5;
/// Pause before the next look at a troubled queue: first, and at most. It doubles each time.
const PAUSE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(30));
/// Looks at troubled queues in flight; each holds a connection.
const APART_MAX: usize = 1;
/// Looks at single queues in flight, after one look at many queues has failed.
const ALONE_MAX: usize = 2;
/// Queues per statement.
const QUEUES_MAX: usize = 500;

/// The trouble of a queue that is looked at apart from the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The look at the queue fails.
    Unreadable,
    /// The look at the queue takes long.
    Slow,
}

impl Kind {
    /// The trouble that a fault of a look shows. None: the fault is not the queue's.
    fn of(fault: &Fault) -> Option<Self> {
        match fault {
            fault if fault.is_too_much() => Some(Self::Slow),
            fault if fault.is_passing() => None,
            _ => Some(Self::Unreadable),
        }
    }

    /// Label value in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unreadable => "unreadable",
            Self::Slow => "slow",
        }
    }
}

#[derive(Debug)]
struct Trouble {
    kind: Kind,
    pause: Duration,
    next_look: Instant,
}

/// Looks at queues, and the troubled queues.
#[derive(Debug)]
pub struct Looks {
    store: Store,
    hints: Arc<Hints>,
    dispatcher: Dispatcher,
    troubles: Mutex<HashMap<String, Trouble>>,
    apart: Arc<Semaphore>,
    looking: OneEach,
}

impl Looks {
    /// `hints` learns the number of other replicas from each look, `dispatcher` the state of each queue.
    pub(crate) fn new(store: Store, hints: Arc<Hints>, dispatcher: Dispatcher) -> Self {
        Self {
            store,
            hints,
            dispatcher,
            troubles: Mutex::default(),
            apart: Arc::new(Semaphore::new(APART_MAX)),
            looking: OneEach::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Trouble>> {
        self.troubles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The troubled queues, with the kind of trouble.
    pub fn troubles(&self) -> Vec<(String, Kind)> {
        self.lock().iter().map(|(queue, trouble)| (queue.clone(), trouble.kind)).collect()
    }

    /// Number of troubled queues whose look is in flight or waits for a place.
    pub(crate) fn under_way(&self) -> usize {
        self.looking.count()
    }

    /// Whether the queue is looked at apart from the others.
    pub fn is_troubled(&self, queue: &str) -> bool {
        self.lock().contains_key(queue)
    }

    /// Looks at those of these queues that are not troubled, and passes the results to the dispatcher.
    pub(crate) async fn at(&self, queues: &[&str]) -> Result<Vec<QueueTick>, Fault> {
        let well: Vec<&str> = {
            let troubles = self.lock();
            queues.iter().copied().filter(|queue| !troubles.contains_key(*queue)).collect()
        };
        let mut ticks = Vec::with_capacity(well.len());
        // A look at no queues reads the clock, too.
        for part in well.chunks(QUEUES_MAX).chain(well.is_empty().then_some(&[][..])) {
            match self.at_well(part).await {
                Ok(found) => ticks.extend(found),
                // Keeps the results of the parts before.
                Err(fault) if !ticks.is_empty() => {
                    tracing::debug!(?fault, "could not look at a part of the queues");
                    break;
                }
                Err(fault) => return Err(fault),
            }
        }
        Ok(ticks)
    }

    async fn at_well(&self, queues: &[&str]) -> Result<Vec<QueueTick>, Fault> {
        match self.tick(queues).await {
            Ok(found)
                if planted::is(Bug::OneForAll) && found.iter().any(|tick| tick.locked || tick.problem.is_some()) =>
            {
                Err(Fault::Locked)
            }
            Ok(found) => {
                self.judge(&found);
                Ok(found)
            }
            // A passing fault, such as a lost connection, says nothing about the queues.
            Err(fault) if Kind::of(&fault).is_none() => Err(fault),
            Err(fault) if queues.len() < 2 => {
                for queue in queues {
                    self.mark_fault(queue, &fault);
                }
                self.tick(&[]).await?;
                Err(fault)
            }
            Err(fault) => {
                tracing::warn!(
                    problem = fault.problem(),
                    queues = queues.len(),
                    "a look at many queues failed; looking at each alone"
                );
                self.tick(&[]).await?;
                let mut found = Vec::new();
                for some in queues.chunks(ALONE_MAX) {
                    let looks = futures_util::future::join_all(some.iter().map(|queue| self.at_alone(queue))).await;
                    found.extend(looks.into_iter().flatten());
                }
                Ok(found)
            }
        }
    }

    async fn at_alone(&self, queue: &str) -> Vec<QueueTick> {
        let found = self.tick(&[queue]).await;
        match &found {
            Ok(found) => self.judge(found),
            Err(fault) => self.mark_fault(queue, fault),
        }
        found.unwrap_or_default()
    }

    async fn tick(&self, queues: &[&str]) -> Result<Vec<QueueTick>, Fault> {
        let Tick { queues: found, others, .. } = self.store.tick(queues, self.hints.replica_id()).await?;
        self.hints.note_others(others);
        for tick in &found {
            self.dispatcher.observe(tick);
            if tick.locked {
                self.store.suspect(&tick.queue).await;
            }
        }
        Ok(found)
    }

    /// Marks queues as troubled whose look failed, or took far longer than the median.
    fn judge(&self, ticks: &[QueueTick]) {
        let mut times: Vec<Duration> = ticks.iter().map(|tick| tick.took).collect();
        times.sort_unstable();
        // The lower median: of two queues, the faster one is the measure.
        let usual = times.get(times.len().saturating_sub(1) / 2).copied().unwrap_or_default();
        for tick in ticks {
            if let Some(problem) = &tick.problem {
                self.mark(&tick.queue, Kind::Unreadable, problem);
            } else if ticks.len() > 1 && tick.took > SLOW && tick.took > usual * SLOW_TIMES {
                self.mark(&tick.queue, Kind::Slow, &format!("its look took {:?}", tick.took));
            }
        }
    }

    /// Marks a queue as troubled after a fault of its look, unless the fault is not the queue's.
    fn mark_fault(&self, queue: &str, fault: &Fault) {
        if let Some(kind) = Kind::of(fault) {
            self.mark(queue, kind, &fault.problem());
        }
    }

    fn mark(&self, queue: &str, kind: Kind, problem: &str) {
        let mut troubles = self.lock();
        let known = troubles.get(queue);
        if known.is_none_or(|known| known.kind != kind) {
            tracing::warn!(
                queue.name = queue,
                problem,
                kind = kind.as_str(),
                "the queue is looked at apart from the others; see `absurd doctor`"
            );
        }
        let pause = known.map_or(PAUSE.0, |known| (known.pause * 2).min(PAUSE.1));
        troubles.insert(queue.to_owned(), Trouble { kind, pause, next_look: Instant::now() + pause });
    }

    /// Looks in the background at those of these queues that are troubled and due; `then` receives the results.
    pub(crate) fn apart<F: Future<Output = ()> + Send>(
        self: &Arc<Self>,
        queues: &[&str],
        then: impl Fn(Vec<QueueTick>) -> F + Clone + Send + Sync + 'static,
    ) {
        let now = Instant::now();
        let due: Vec<String> = {
            let troubles = self.lock();
            let is_due = |queue: &&&str| troubles.get(**queue).is_some_and(|trouble| trouble.next_look <= now);
            queues.iter().filter(is_due).map(|queue| (*queue).to_owned()).collect()
        };
        for queue in due {
            let Some(begun) = QueueName::parse("queue", &queue).ok().and_then(|name| self.looking.begin(&name)) else {
                continue;
            };
            let (looks, then) = (Arc::clone(self), then.clone());
            tokio::spawn(async move {
                let _begun = begun;
                let Ok(_place) = looks.apart.acquire().await else { return };
                let found = looks.tick(&[&queue]).await;
                looks.judge_alone(&queue, &found);
                then(found.unwrap_or_default()).await;
            });
        }
    }

    /// Judges a look at a troubled queue; a queue that is well again joins the others.
    fn judge_alone(&self, queue: &str, found: &Result<Vec<QueueTick>, Fault>) {
        match found.as_ref().map(|ticks| ticks.first()) {
            Ok(Some(tick)) if tick.problem.is_some() => {
                self.mark(queue, Kind::Unreadable, tick.problem.as_deref().unwrap_or_default());
            }
            Ok(Some(tick)) if tick.took > SLOW => self.mark(queue, Kind::Slow, "its look takes long"),
            Ok(_) => {
                self.lock().remove(queue);
                tracing::info!(queue.name = queue, "the queue can be looked at again");
            }
            Err(fault) => self.mark_fault(queue, fault),
        }
    }
}
