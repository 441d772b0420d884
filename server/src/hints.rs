//! The hints that wait to be sent to other replicas. Any hint may be lost; the tick makes that a delay, not a loss.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use uuid::Uuid;

use crate::domain::{QueueName, RunId, SessionId};

/// Maximum number of waiting hints of one kind; further hints are dropped. The periodic check of claims makes up for
/// lost credit.
const CREDIT_MAX: usize = 20_000;

/// Hints that wait to be sent.
#[derive(Debug, Default)]
pub(crate) struct Inside {
    arm: HashSet<QueueName>,
    /// Queues to which this replica wrote claimable work.
    pub(crate) dirty: HashSet<QueueName>,
    /// Runs that left their claims.
    pub(crate) credit: Vec<RunId>,
    /// Runs whose claims a worker used.
    pub(crate) alive: Vec<RunId>,
    /// Claims that ended while their runs go on: run, digest of the claim.
    pub(crate) claims: Vec<(RunId, Uuid)>,
    /// Sessions that want no more tasks.
    pub(crate) drained: Vec<(QueueName, SessionId)>,
}

/// Gathers hints for other replicas until [`crate::doorbell::send`] sends them.
#[derive(Debug)]
pub struct Hints {
    replica_id: String,
    /// Number of other replicas that are alive; without any, most hints are not kept.
    others: AtomicI32,
    doorbell: bool,
    listening: AtomicBool,
    inside: Mutex<Inside>,
    bell: Notify,
}

impl Hints {
    /// Hints of one replica; `doorbell` says whether the database has the triggers by which SQL writers notify.
    pub fn new(replica_id: String, doorbell: bool) -> Self {
        Self {
            replica_id,
            others: AtomicI32::new(0),
            doorbell,
            listening: AtomicBool::new(false),
            inside: Mutex::new(Inside::default()),
            bell: Notify::new(),
        }
    }

    /// Id of this replica, unique per process.
    pub fn replica_id(&self) -> &str {
        &self.replica_id
    }

    /// Whether direct SQL writers notify.
    pub fn doorbell(&self) -> bool {
        self.doorbell
    }

    /// Whether the LISTEN connection is up.
    pub fn listening(&self) -> bool {
        self.listening.load(Ordering::Relaxed)
    }

    /// Notes whether the LISTEN connection is up.
    pub(crate) fn note_listening(&self, listening: bool) {
        self.listening.store(listening, Ordering::Relaxed);
    }

    /// Sets the number of other replicas that are alive.
    pub fn note_others(&self, others: i32) {
        self.others.store(others, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Arms the doorbell of a queue whose dispatcher is idle, so that writers notify.
    pub fn arm(&self, queue: &QueueName) {
        self.lock().arm.insert(queue.clone());
        self.bell.notify_one();
    }

    /// Tells other replicas that this one wrote claimable work to a queue.
    pub fn dirty(&self, queue: &QueueName) {
        if self.others.load(Ordering::Relaxed) > 0 && self.lock().dirty.insert(queue.clone()) {
            self.bell.notify_one();
        }
    }

    /// Tells other replicas that a session wants no more tasks, because its stream may be on one of them.
    pub fn drain(&self, queue: &QueueName, session: &SessionId) {
        // Sent without a look at `others`: drains are rare, and a replica that has just started may not know of the
        // others yet.
        let mut inside = self.lock();
        if inside.drained.len() < CREDIT_MAX {
            inside.drained.push((queue.clone(), session.clone()));
        }
        drop(inside);
        self.bell.notify_one();
    }

    /// Tells other replicas that a run left its claim; it was not in flight here.
    pub fn credit(&self, run_id: RunId) {
        self.tell(run_id, |inside| &mut inside.credit);
    }

    /// Tells other replicas that a claim ended while its run goes on; it was not in flight here.
    pub fn credit_of_claim(&self, run_id: RunId, digest: Uuid) {
        self.tell((run_id, digest), |inside| &mut inside.claims);
    }

    /// Tells other replicas that a worker used a run's claim here without a write to the database.
    pub fn alive(&self, run_id: RunId) {
        self.tell(run_id, |inside| &mut inside.alive);
    }

    fn tell<T>(&self, what: T, of: impl FnOnce(&mut Inside) -> &mut Vec<T>) {
        if self.others.load(Ordering::Relaxed) > 0 {
            let mut inside = self.lock();
            let list = of(&mut inside);
            if list.len() < CREDIT_MAX {
                list.push(what);
            }
            drop(inside);
            self.bell.notify_one();
        }
    }

    /// Resolves at the next hint; at once if one has come since this last resolved.
    pub(crate) fn notified(&self) -> impl Future<Output = ()> {
        self.bell.notified()
    }

    /// Takes the queues whose doorbells are to be armed.
    pub(crate) fn take_arm(&self) -> Vec<QueueName> {
        self.lock().arm.drain().collect()
    }

    /// Whether hints wait that [`Self::take`] would return.
    pub(crate) fn is_waiting(&self) -> bool {
        let inside = self.lock();
        !inside.dirty.is_empty()
            || !inside.credit.is_empty()
            || !inside.alive.is_empty()
            || !inside.claims.is_empty()
            || !inside.drained.is_empty()
    }

    /// Takes all hints but the queues to arm.
    pub(crate) fn take(&self) -> Inside {
        let mut inside = self.lock();
        let arm = std::mem::take(&mut inside.arm);
        std::mem::replace(&mut *inside, Inside { arm, ..Inside::default() })
    }
}
