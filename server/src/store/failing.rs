//! Failure injection for tests. The nth call to the database fails before it is carried out, fails afterwards, or
//! hangs.
//!
//! Every statement counts, and so do `begin` and `commit`. Not counted are the statements in `BACKGROUND`, which the
//! server sends on its own. Only code in this process can arm it. Unarmed, it costs one atomic read per call.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;

use crate::tally::Tally;

/// Statements that the server sends on its own.
const BACKGROUND: &[&str] = &[
    "clock_get",
    "credit_notify",
    "doorbell_arm",
    "doorbell_disarm",
    "doorbell_missing",
    "doorbell_ring",
    "event_list_unfinished",
    "queue_access",
    "quarantine_count",
    "quarantine_forget",
    "quarantine_list",
    "quarantine_put",
    "release_count",
    "release_forget",
    "replica_leave",
    "run_check",
    "run_cut_lease",
    "run_list_expired",
    "run_silent",
    "snapshot_age",
    "task_list_awaited",
    "task_list_awaited_queues",
    "task_list_cancellable",
    "task_settle_awaited",
    "tick",
    "upkeep_note",
    "upkeep_run",
    "upkeep_take",
];

/// Outcome of a call under failure injection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// The call is carried out and answered.
    Lives,
    /// The call never reaches Postgres.
    FailsBefore,
    /// The call is carried out, and its answer is lost.
    FailsAfter,
    /// The call holds its connection until [`Failing::disarm`]. Then it is carried out, unless its caller has gone
    /// away.
    Hangs,
}

/// State of the failure injection of one store.
#[derive(Debug, Default)]
pub struct Failing {
    armed: AtomicBool,
    next: Mutex<Option<(u32, Fate)>>,
    /// Whether hanging calls must keep waiting.
    held: watch::Sender<bool>,
    hanging: Tally,
}

impl Failing {
    /// Gives the nth call from now on, counted from 1, this fate.
    pub fn arm(&self, nth: u32, fate: Fate) {
        self.held.send_replace(fate == Fate::Hangs);
        *self.next.lock().unwrap_or_else(PoisonError::into_inner) = Some((nth, fate));
        self.armed.store(true, Ordering::Release);
    }

    /// Lets all calls succeed again. Returns whether the armed call was reached.
    pub fn disarm(&self) -> bool {
        self.armed.store(false, Ordering::Release);
        self.held.send_replace(false);
        self.next.lock().unwrap_or_else(PoisonError::into_inner).take().is_none()
    }

    /// Number of calls that hang now.
    pub fn hanging(&self) -> usize {
        self.hanging.now()
    }

    /// Decides the fate of a call. A hanging call waits here, and lives afterwards.
    pub(super) async fn fate(&self, name: &str) -> Fate {
        let fate = self.next(name);
        if fate != Fate::Hangs {
            return fate;
        }
        let _counted = self.hanging.begin();
        let mut held = self.held.subscribe();
        // The sender is part of `self`, so it outlives this wait.
        let _ = held.wait_for(|held| !*held).await;
        Fate::Lives
    }

    fn next(&self, name: &str) -> Fate {
        if !self.armed.load(Ordering::Acquire) || BACKGROUND.contains(&name) {
            return Fate::Lives;
        }
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        match next.as_mut() {
            Some((nth, _)) if *nth > 1 => {
                *nth -= 1;
                Fate::Lives
            }
            Some((_, fate)) => {
                let fate = *fate;
                *next = None;
                fate
            }
            None => Fate::Lives,
        }
    }
}
