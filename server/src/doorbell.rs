//! Hints between replicas, and from direct SQL writers. Any hint may be lost; the tick makes that a delay, not a loss.

pub mod note;

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

use self::note::Note;
use crate::dispatch::Dispatcher;
use crate::domain::{QueueName, RunId, SessionId};
use crate::jitter::random;
use crate::looks::Looks;
use crate::metrics;
use crate::store::listen::{Heard, listen};
use crate::store::{Fault, Store};

/// Time that hints gather before they are sent together.
const GATHER: Duration = Duration::from_millis(15);
/// Looks after arming, in milliseconds: a spawn that saw no armed row may commit after the first look.
const PROBES: [u64; 5] = [0, 5, 20, 80, 320];
/// Maximum number of waiting hints of one kind; further hints are dropped. The periodic check of claims makes up for
/// lost credit.
const CREDIT_MAX: usize = 20_000;

#[derive(Debug, Default)]
struct Inside {
    arm: HashSet<QueueName>,
    dirty: HashSet<QueueName>,
    credit: Vec<RunId>,
    alive: Vec<RunId>,
    /// Claims that ended while their runs go on: run, digest of the claim.
    claims: Vec<(RunId, Uuid)>,
    drained: Vec<(QueueName, SessionId)>,
}

/// Gathers hints for other replicas until [`send`] sends them.
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
}

/// Sends hints forever: arms at once; rings and notes gather first, and go out in statements of their own.
pub async fn send(hints: &Hints, store: &Store, looks: &Looks) {
    let mut probes: Vec<(Instant, Vec<QueueName>)> = Vec::new();
    let mut send_at: Option<Instant> = None;
    loop {
        let bell = hints.bell.notified();
        let next = probes.iter().map(|(at, _)| *at).chain(send_at).min();
        match next {
            Some(at) => tokio::select! {
                () = bell => {}
                () = tokio::time::sleep_until(at) => {}
            },
            None => bell.await,
        }
        let arm: Vec<QueueName> = hints.lock().arm.drain().collect();
        if !arm.is_empty() {
            if hints.doorbell {
                let names: Vec<&str> = arm.iter().map(QueueName::as_str).collect();
                if let Err(fault) = store.doorbell_arm(&names, &hints.replica_id).await {
                    tracing::debug!(?fault, "could not arm the doorbell");
                }
            }
            let now = Instant::now();
            probes.extend(PROBES.map(|ms| (now + Duration::from_millis(ms), arm.clone())));
        }
        probe(looks, &mut probes).await;
        let waiting = {
            let inside = hints.lock();
            !inside.dirty.is_empty()
                || !inside.credit.is_empty()
                || !inside.alive.is_empty()
                || !inside.claims.is_empty()
                || !inside.drained.is_empty()
        };
        if !waiting {
            send_at = None;
        } else if send_at.is_some_and(|at| at <= Instant::now()) {
            send_at = None;
            flush(hints, store).await;
        } else if send_at.is_none() {
            send_at = Some(Instant::now() + GATHER);
        }
    }
}

async fn probe(looks: &Looks, probes: &mut Vec<(Instant, Vec<QueueName>)>) {
    let now = Instant::now();
    let mut due: HashSet<QueueName> = HashSet::new();
    probes.retain(|(at, queues)| {
        if *at <= now {
            due.extend(queues.iter().cloned());
        }
        *at > now
    });
    if !due.is_empty() {
        let names: Vec<&str> = due.iter().map(QueueName::as_str).collect();
        if let Err(fault) = looks.at(&names).await {
            tracing::debug!(?fault, "could not look at the queues");
        }
    }
}

async fn flush(hints: &Hints, store: &Store) {
    let Inside { dirty, credit, alive, claims, drained, .. } = {
        let mut inside = hints.lock();
        let arm = std::mem::take(&mut inside.arm);
        std::mem::replace(&mut *inside, Inside { arm, ..Inside::default() })
    };
    let names: Vec<&str> = dirty.iter().map(QueueName::as_str).collect();
    let mut outcome: Result<(), Fault> = Ok(());
    if !names.is_empty() {
        outcome = store.doorbell_ring(&names, &hints.replica_id).await;
    }
    let drains = drained.into_iter().map(|(queue, session)| Note::Drain(queue, session));
    let notes = Note::left(&credit).chain(Note::alive(&alive)).chain(Note::claims_left(&claims)).chain(drains);
    let messages: Vec<String> = notes.map(|note| note.encode()).collect();
    if !messages.is_empty() {
        outcome = outcome.and(store.credit_notify(&messages).await);
    }
    if let Err(fault) = outcome {
        tracing::debug!(?fault, "could not send hints to other replicas");
    }
}

/// Listens forever. After each LISTEN it disarms this replica's doorbells, then looks at all queues and arms them
/// again, because notifications may have been lost.
pub async fn hear(hints: &Hints, store: &Store, database: &tokio_postgres::Config, dispatcher: &Dispatcher) {
    let mut pause = Duration::from_millis(100);
    loop {
        match listen(database).await {
            Ok((client, mut heard)) => {
                hints.listening.store(true, Ordering::Relaxed);
                if let Err(fault) = store.doorbell_disarm(&hints.replica_id).await {
                    tracing::debug!(?fault, "could not disarm the doorbell");
                }
                dispatcher.note_unheard();
                pause = Duration::from_millis(100);
                while let Some(said) = heard.recv().await {
                    match said {
                        Heard::Payload(payload) => act(&payload, dispatcher),
                        Heard::Lost(error) => {
                            metrics::listener_lost();
                            tracing::warn!(
                                error,
                                "lost the LISTEN connection; tasks are found by the tick until it is back"
                            );
                        }
                    }
                }
                drop(client);
                hints.listening.store(false, Ordering::Relaxed);
            }
            Err(fault) => tracing::warn!(?fault, "could not listen; will try again"),
        }
        tokio::time::sleep(pause.mul_f64(0.5 + random())).await;
        pause = (pause * 2).min(Duration::from_secs(5));
    }
}

/// Carries out a notification; one that does not parse is ignored.
fn act(payload: &str, dispatcher: &Dispatcher) {
    match Note::parse(payload) {
        Some(Note::Rung(queue)) => dispatcher.note_rung(&queue),
        Some(Note::Drain(queue, session)) => {
            dispatcher.drain(&queue, &session);
        }
        Some(Note::Left(runs)) => dispatcher.left_elsewhere(&runs),
        Some(Note::Alive(runs)) => dispatcher.alive_elsewhere(&runs),
        Some(Note::ClaimsLeft(claims)) => dispatcher.claims_left_elsewhere(&claims),
        None => {}
    }
}
