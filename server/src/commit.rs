//! Group commit: while one batch is in flight, the next one gathers; no timer delays an item.
//!
//! Each item gets its own outcome. A bad item is found by halving and never fails its neighbours. An item whose row is
//! locked leaves the batch and is retried alone until its caller's deadline. Work runs on tokio tasks of its own: a
//! caller that goes away cancels nothing half-way, and a batch that panics ends only itself.

mod batches;
mod late;
mod sequence;

use std::collections::{HashMap, HashSet, VecDeque};
use std::future::Future;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot};
use tokio::time::Instant;

use crate::domain::{Error, QueueName};
use crate::metrics;
use crate::scope::Scope;
use crate::store::{Access, Fault, LOCK_WAIT_PATIENT, Store};
pub(crate) use batches::{Emits, Settles, Suspends};
use late::Late;
pub(crate) use late::{until, until_free};
pub(crate) use sequence::sequence;

/// Longest expected wait; a lane that exceeds it refuses new items.
const WAIT_MAX: Duration = Duration::from_secs(2);
/// Weight of the newest batch in the moving average of a lane's pace.
const PACE_WEIGHT: f64 = 0.3;
/// Number of waiting items from which on a lane may have a second batch in flight.
const CROWD: usize = 250;
/// Items that wait for locks at the same time; each holds a connection.
const SLOW_MAX: usize = 6;
/// Longest pause between attempts of an item whose rows are held.
const SLOW_PAUSE_MAX: Duration = Duration::from_millis(200);
/// While a queue is locked: pause between checks for items whose callers have left.
const PURGE: Duration = Duration::from_millis(250);

/// One kind of items, and the way to execute a batch of them.
pub(crate) trait Batch: Send + Sync + 'static {
    /// Items with different keys share no statement.
    type Key: Clone + Eq + Hash + Send + Sync + 'static;
    /// Request of one caller.
    type Item: Send + Sync + 'static;
    /// Answer to one caller.
    type Out: Send + 'static;
    /// Identity of an item within a lane.
    type Id: Eq + Hash + Send;
    /// Name of the batch in logs and metrics.
    const NAME: &'static str;
    /// Maximum number of items per statement.
    const ITEMS_MAX: usize;
    /// Maximum number of batches of one key in flight. A single one gathers larger batches; of two, one executes while
    /// the other's commit is flushed.
    const DRIVERS_MAX: usize = 1;
    /// Whether a lane with a long expected wait refuses new items. Outcomes of finished work are never refused, because
    /// the work would be done again.
    const SHEDS: bool;

    /// Identity of an item. Items of one identity share no statement.
    fn identity(item: &Self::Item) -> Self::Id;
    /// Whether a retried item recognizes its own earlier effect. If not, an item that is refused after a lost answer
    /// may have taken effect nevertheless.
    fn knows_itself(item: &Self::Item) -> bool;
    /// Queue and tenant of a key.
    fn scope(key: &Self::Key) -> &Scope;
    /// Store on which batches are executed.
    fn store(&self) -> &Store;
    /// Executes a batch; the outcome of an item whose rows are locked is `None`.
    fn execute(
        &self,
        key: &Self::Key,
        items: &[&Self::Item],
        lock_wait: Option<Duration>,
    ) -> impl Future<Output = Result<Outcomes<Self>, Fault>> + Send
    where
        Self: Sized;
}

/// One answer per item of a batch, in order; `None` for an item whose row is locked.
pub(crate) type Outcomes<B> = Vec<Option<Result<<B as Batch>::Out, Error>>>;

struct Entry<B: Batch> {
    item: B::Item,
    deadline: Instant,
    late: Arc<Late>,
    answer: oneshot::Sender<Result<B::Out, Error>>,
}

/// The items of one key that wait, and their pace.
struct Lane<B: Batch> {
    waiting: VecDeque<Entry<B>>,
    /// Batches in flight.
    drivers: usize,
    /// Average seconds per item; 0: not known yet.
    pace: f64,
}

impl<B: Batch> Lane<B> {
    /// Expected wait of a new item.
    fn wait(&self) -> Duration {
        Duration::from_secs_f64(self.pace * self.waiting.len() as f64)
    }

    fn ran(&mut self, items: usize, took: Duration) {
        let pace = took.as_secs_f64() / items.max(1) as f64;
        self.pace = if self.pace == 0.0 { pace } else { self.pace + (pace - self.pace) * PACE_WEIGHT };
    }
}

struct Shared<B: Batch> {
    batch: B,
    /// Lanes by key. A lane exists while a driver serves it.
    lanes: Mutex<HashMap<B::Key, Lane<B>>>,
    slow: Semaphore,
    /// Per queue, half of the places in `slow`: held rows of one queue must not keep another queue's items waiting.
    slow_of: Mutex<HashMap<QueueName, Arc<Semaphore>>>,
    room: Arc<Semaphore>,
    room_max: usize,
}

impl<B: Batch> Shared<B> {
    /// The slow places of a queue. Forgets those of queues without slow items.
    fn slow_of(&self, queue: &QueueName) -> Arc<Semaphore> {
        let mut all = self.slow_of.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, places| Arc::strong_count(places) > 1);
        Arc::clone(all.entry(queue.clone()).or_insert_with(|| Arc::new(Semaphore::new(SLOW_MAX / 2))))
    }
}

/// Gathers items into batches per key; see [`Batch::DRIVERS_MAX`] for the batches in flight.
pub(crate) struct Committer<B: Batch> {
    shared: Arc<Shared<B>>,
}

impl<B: Batch> std::fmt::Debug for Committer<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Committer(..)")
    }
}

impl<B: Batch> Clone for Committer<B> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<B: Batch> Committer<B> {
    /// `waiting_max` bounds the items without an outcome.
    pub(crate) fn new(batch: B, waiting_max: usize) -> Self {
        Self {
            shared: Arc::new(Shared {
                batch,
                lanes: Mutex::new(HashMap::new()),
                slow: Semaphore::new(SLOW_MAX),
                slow_of: Mutex::default(),
                room: Arc::new(Semaphore::new(waiting_max)),
                room_max: waiting_max,
            }),
        }
    }

    /// Number of items without an outcome, in flight or waiting.
    pub(crate) fn waiting(&self) -> usize {
        self.shared.room_max - self.shared.room.available_permits()
    }

    /// Number of lanes with a driver.
    pub(crate) fn lanes(&self) -> usize {
        self.shared.lanes.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Executes one item in the next batch of its key, and returns its outcome.
    pub(crate) async fn submit(&self, key: B::Key, item: B::Item, deadline: Instant) -> Result<B::Out, Error> {
        let Ok(_room) = Arc::clone(&self.shared.room).try_acquire_owned() else {
            return Err(Error::TooManyRequests { after: WAIT_MAX });
        };
        let (answer, answered) = oneshot::channel();
        let late = Arc::new(Late::default());
        let entry = Entry { item, deadline, late: Arc::clone(&late), answer };
        enqueue(&self.shared, key, entry, B::SHEDS)?;
        match tokio::time::timeout_at(deadline, answered).await {
            Ok(Ok(outcome)) => outcome,
            // The batch ended without an answer, perhaps after its commit.
            Ok(Err(_)) => Err(Error::OutcomeUnknown),
            Err(_) => Err(late.error()),
        }
    }
}

/// Adds an item to its lane, and starts a driver if needed. `Err` refuses it, because its expected wait is too long.
fn enqueue<B: Batch>(shared: &Arc<Shared<B>>, key: B::Key, entry: Entry<B>, sheds: bool) -> Result<(), Error> {
    let mut lanes = shared.lanes.lock().unwrap_or_else(PoisonError::into_inner);
    let lane = lanes.entry(key.clone()).or_insert_with(|| Lane { waiting: VecDeque::new(), drivers: 0, pace: 0.0 });
    let wait = lane.wait();
    let left = entry.deadline.saturating_duration_since(Instant::now());
    if sheds && lane.waiting.len() >= B::ITEMS_MAX && wait > WAIT_MAX.min(left) {
        return Err(Error::TooManyRequests { after: wait });
    }
    lane.waiting.push_back(entry);
    if lane.drivers == 0 || lane.drivers < B::DRIVERS_MAX && lane.waiting.len() >= CROWD {
        lane.drivers += 1;
        tokio::spawn(drive(Arc::clone(shared), key));
    }
    Ok(())
}

/// Waits while the queue of a lane is locked. Items whose callers have left are removed meanwhile.
async fn wait_until_free<B: Batch>(shared: &Arc<Shared<B>>, key: &B::Key) {
    let (store, scope) = (shared.batch.store(), B::scope(key));
    while store.is_locked(scope.queue().as_str()) {
        {
            let mut lanes = shared.lanes.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(lane) = lanes.get_mut(key) else { return };
            lane.waiting.retain(|entry| !entry.answer.is_closed());
            if lane.waiting.is_empty() {
                return;
            }
            lane.waiting.iter().for_each(|entry| entry.late.note(&Fault::Locked, scope));
        }
        let _ = tokio::time::timeout(PURGE, store.wait_for(scope.queue().as_str(), Access::Free)).await;
    }
}

/// Drives one lane: runs batches until no item waits.
async fn drive<B: Batch>(shared: Arc<Shared<B>>, key: B::Key) {
    loop {
        wait_until_free(&shared, &key).await;
        let entries = {
            let mut lanes = shared.lanes.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(lane) = lanes.get_mut(&key) else { return };
            if lane.waiting.is_empty() {
                lane.drivers -= 1;
                if lane.drivers == 0 {
                    lanes.remove(&key);
                }
                return;
            }
            take::<B>(&mut lane.waiting)
        };
        let (items, began) = (entries.len(), Instant::now());
        let batch = {
            let (shared, key) = (Arc::clone(&shared), key.clone());
            async move { run(&shared, &key, entries).await }
        };
        if let Err(error) = tokio::spawn(batch).await {
            tracing::error!(batch = B::NAME, %error, "a batch ended in a bug; its callers are told to try again");
        }
        let took = began.elapsed();
        metrics::batch(B::NAME, items, took);
        let mut lanes = shared.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lane) = lanes.get_mut(&key) {
            lane.ran(items, took);
        }
    }
}

/// Takes the next batch: items in order, each identity once.
fn take<B: Batch>(lane: &mut VecDeque<Entry<B>>) -> Vec<Entry<B>> {
    let mut seen = HashSet::new();
    let mut later = VecDeque::new();
    let mut batch = Vec::new();
    while batch.len() < B::ITEMS_MAX {
        let Some(entry) = lane.pop_front() else { break };
        if seen.insert(B::identity(&entry.item)) {
            batch.push(entry);
        } else {
            later.push_back(entry);
        }
    }
    while let Some(entry) = later.pop_back() {
        lane.push_front(entry);
    }
    batch
}

async fn run<B: Batch>(shared: &Arc<Shared<B>>, key: &B::Key, entries: Vec<Entry<B>>) {
    let mut parts = vec![entries];
    let mut pause = Duration::from_millis(20);
    while let Some(mut part) = parts.pop() {
        part.retain(|entry| !entry.answer.is_closed());
        if part.is_empty() {
            continue;
        }
        let items: Vec<&B::Item> = part.iter().map(|entry| &entry.item).collect();
        let began = Instant::now();
        let executed = shared.batch.execute(key, &items, None).await;
        tracing::debug!(
            batch = B::NAME, queue.name = %B::scope(key).queue(), items = items.len(), took_us = began.elapsed().as_micros(),
            ok = executed.is_ok(), "a batch has run"
        );
        match executed {
            Ok(outcomes) => settle(shared, key, part, outcomes),
            Err(fault) if (fault.is_refusal() || fault.is_too_much()) && part.len() > 1 => {
                let second = part.split_off(part.len() / 2);
                parts.push(second);
                parts.push(part);
            }
            // A slow item must not hold up those behind it.
            Err(fault) if matches!(fault, Fault::Locked) || fault.is_too_much() => {
                for entry in part {
                    if fault.is_too_much() {
                        entry.late.note(&fault, B::scope(key));
                    }
                    slow_lane(shared, key, entry);
                }
            }
            Err(fault) if fault.is_passing() => {
                part.iter().for_each(|entry| entry.late.note(&fault, B::scope(key)));
                let now = Instant::now();
                let (over, left): (Vec<_>, Vec<_>) = part.into_iter().partition(|entry| entry.deadline <= now + pause);
                for entry in over {
                    let _ = entry.answer.send(Err(entry.late.error()));
                }
                if !left.is_empty() {
                    parts.push(left);
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(1));
                }
            }
            Err(fault) => {
                for entry in part {
                    let _ = entry.answer.send(Err(fault.clone().into_error(B::scope(key))));
                }
            }
        }
    }
}

fn settle<B: Batch>(shared: &Arc<Shared<B>>, key: &B::Key, part: Vec<Entry<B>>, outcomes: Outcomes<B>) {
    for (entry, outcome) in part.into_iter().zip(outcomes) {
        match outcome {
            Some(outcome) => {
                let outcome = honest(&entry, outcome);
                let _ = entry.answer.send(outcome);
            }
            None => slow_lane(shared, key, entry),
        }
    }
}

/// Turns a refusal into [`Error::OutcomeUnknown`] if an earlier attempt lost its answer: that attempt may have carried
/// the item out.
fn honest<B: Batch>(entry: &Entry<B>, outcome: Result<B::Out, Error>) -> Result<B::Out, Error> {
    match outcome {
        Err(error) if error.is_claim_over() && !B::knows_itself(&entry.item) && entry.late.is_unknown() => {
            Err(Error::OutcomeUnknown)
        }
        outcome => outcome,
    }
}

/// Retries one item alone, waiting for its locks, until its deadline.
fn slow_lane<B: Batch>(shared: &Arc<Shared<B>>, key: &B::Key, mut entry: Entry<B>) {
    let shared = Arc::clone(shared);
    let key = key.clone();
    tokio::spawn(async move {
        let mut pause = Duration::from_millis(10);
        loop {
            if shared.batch.store().is_locked(B::scope(&key).queue().as_str()) {
                // The whole queue is locked: the item waits with all others of its lane.
                entry.late.note(&Fault::Locked, B::scope(&key));
                let _ = enqueue(&shared, key, entry, false);
                return;
            }
            let of_queue = shared.slow_of(B::scope(&key).queue());
            let permit = tokio::select! {
                permits = async { (of_queue.acquire().await, shared.slow.acquire().await) } => permits,
                () = entry.answer.closed() => return,
                () = tokio::time::sleep_until(entry.deadline) => {
                    let _ = entry.answer.send(Err(entry.late.error()));
                    return;
                }
            };
            let left = entry.deadline.saturating_duration_since(Instant::now()).min(LOCK_WAIT_PATIENT);
            let outcome = match shared.batch.execute(&key, &[&entry.item], Some(left)).await {
                Ok(mut outcomes) => outcomes.pop().flatten(),
                Err(Fault::Locked) => None,
                Err(fault) if fault.is_passing() => {
                    entry.late.note(&fault, B::scope(&key));
                    None
                }
                Err(fault) => Some(Err(fault.into_error(B::scope(&key)))),
            };
            drop(permit);
            if let Some(outcome) = outcome {
                let outcome = honest(&entry, outcome);
                let _ = entry.answer.send(outcome);
                return;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(SLOW_PAUSE_MAX);
        }
    });
}

#[cfg(test)]
mod tests {
    use futures_util::future::join_all;
    use uuid::Uuid;

    use super::*;
    use crate::scope::Caller;
    use crate::store::tests::nowhere;

    const BUG: u32 = 0;
    /// Finds after 7 ms that Postgres is unreachable.
    const AWAY: u32 = 1;

    /// Executes a batch as its items ask: a bug, an unreachable database, or success.
    struct Scripted(Store);

    impl Batch for Scripted {
        type Key = Scope;
        type Item = u32;
        type Out = u32;
        type Id = u32;
        const SHEDS: bool = false;
        const NAME: &'static str = "scripted";
        const ITEMS_MAX: usize = 10;

        fn identity(item: &u32) -> u32 {
            *item
        }

        fn knows_itself(_: &Self::Item) -> bool {
            true
        }

        fn scope(key: &Scope) -> &Scope {
            key
        }

        fn store(&self) -> &Store {
            &self.0
        }

        async fn execute(&self, _: &Scope, items: &[&u32], _: Option<Duration>) -> Result<Outcomes<Self>, Fault> {
            assert!(!items.contains(&&BUG), "a bug");
            if items.contains(&&AWAY) {
                tokio::time::sleep(Duration::from_millis(7)).await;
                return Err(Fault::Gone("away".into()));
            }
            Ok(items.iter().map(|item| Some(Ok(**item))).collect())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn whenever_the_deadline_comes_it_is_told_what_kept_the_call() {
        let scope = Caller::anonymous().scope(QueueName::parse("queue", "q").unwrap());
        for ms in 10..300 {
            let deadline = Instant::now() + Duration::from_millis(ms);
            let told = Committer::new(Scripted(nowhere()), 10).submit(scope.clone(), AWAY, deadline).await;
            assert_eq!(told, Err(Error::DatabaseUnreachable("away".into())), "{ms} ms");
        }
    }

    #[tokio::test]
    async fn a_batch_that_panics_ends_only_itself() {
        let scope = Caller::anonymous().scope(QueueName::parse("queue", "q").unwrap());
        let committer = Committer::new(Scripted(nowhere()), 10);
        let deadline = || Instant::now() + Duration::from_secs(30);
        let failed = committer.submit(scope.clone(), BUG, deadline()).await;
        assert_eq!(failed, Err(Error::OutcomeUnknown));
        assert_eq!(committer.submit(scope, 2, deadline()).await.unwrap(), 2);
    }

    /// State of an item's rows in the database.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Met {
        /// Free: the item is carried out.
        Nothing,
        /// Held for longer than any attempt waits.
        HeldRows,
        /// Held until the item waits for them alone.
        RowsHeldBriefly,
        /// Held like that, and the answer is lost; at the next attempt the claim is over.
        LostAnswer,
    }

    /// Executes numbered items as each asks, and records the numbers of each attempt.
    #[derive(Clone)]
    struct Rows {
        store: Store,
        tries: Arc<Mutex<Vec<Vec<u32>>>>,
    }

    impl Rows {
        fn new() -> Self {
            Self { store: nowhere(), tries: Arc::default() }
        }
    }

    impl Batch for Rows {
        type Key = Scope;
        type Item = (u32, Met);
        type Out = ();
        type Id = u32;
        const SHEDS: bool = false;
        const NAME: &'static str = "rows";
        const ITEMS_MAX: usize = 10;

        fn identity(item: &Self::Item) -> u32 {
            item.0
        }

        fn knows_itself(_: &Self::Item) -> bool {
            false
        }

        fn scope(key: &Scope) -> &Scope {
            key
        }

        fn store(&self) -> &Store {
            &self.store
        }

        async fn execute(
            &self,
            _: &Scope,
            items: &[&Self::Item],
            lock_wait: Option<Duration>,
        ) -> Result<Outcomes<Self>, Fault> {
            let numbers: Vec<u32> = items.iter().map(|item| item.0).collect();
            let tried = {
                let mut tries = self.tries.lock().unwrap();
                tries.push(numbers);
                tries.len()
            };
            let Some(lock_wait) = lock_wait else {
                return Ok(items.iter().map(|item| (item.1 == Met::Nothing).then_some(Ok(()))).collect());
            };
            match items[0].1 {
                Met::HeldRows => {
                    tokio::time::sleep(lock_wait).await;
                    Err(Fault::Locked)
                }
                Met::LostAnswer if tried == 2 => Err(Fault::Unknown("the answer was lost".into())),
                Met::LostAnswer => Ok(vec![Some(Err(Error::ClaimLost(Uuid::nil())))]),
                Met::Nothing | Met::RowsHeldBriefly => Ok(vec![Some(Ok(()))]),
            }
        }
    }

    fn scope(queue: &str) -> Scope {
        Caller::anonymous().scope(QueueName::parse("queue", queue).unwrap())
    }

    fn later() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_answer_is_remembered_while_rows_are_waited_for() {
        let committer = Committer::new(Rows::new(), 10);
        let told = committer.submit(scope("q"), (1, Met::LostAnswer), later()).await;
        assert_eq!(told, Err(Error::OutcomeUnknown));
    }

    #[tokio::test(start_paused = true)]
    async fn held_rows_of_one_queue_leave_places_to_another() {
        let committer = Committer::new(Rows::new(), 100);
        let mut held = tokio::task::JoinSet::new();
        for number in 0..12 {
            let committer = committer.clone();
            held.spawn(async move { committer.submit(scope("held"), (number, Met::HeldRows), later()).await });
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        let began = Instant::now();
        committer.submit(scope("other"), (1, Met::RowsHeldBriefly), later()).await.unwrap();
        // Each item of the other queue waits a second for its rows.
        assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn items_of_one_identity_share_no_statement() {
        let rows = Rows::new();
        let committer = Committer::new(rows.clone(), 10);
        let items = [1, 1, 2, 1].map(|number| committer.submit(scope("q"), (number, Met::Nothing), later()));
        assert!(join_all(items).await.iter().all(Result::is_ok));
        assert_eq!(*rows.tries.lock().unwrap(), [vec![1, 2], vec![1], vec![1]]);
    }
}
