//! Failure on purpose, for tests: the nth call to the database fails, before it is carried out or after, or hangs.
//!
//! Only calls that a request makes are counted; what a server does by itself goes on. Nothing outside of this process can
//! arm it, and unarmed it costs one read of a flag per call.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;

use crate::tally::Tally;

/// Statements that a server sends by itself.
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

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It is carried out and answered.
    Lives,
    /// It never reaches Postgres.
    FailsBefore,
    /// It is carried out, and its answer is lost.
    FailsAfter,
    /// It holds its connection and waits for [`Failing::disarm`]. Then it is carried out, unless its caller has gone away.
    Hangs,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Failing {
    armed: AtomicBool,
    next: Mutex<Option<(u32, Fate)>>,
    /// Whether calls that hang go on hanging.
    held: watch::Sender<bool>,
    hanging: Tally,
}

impl Failing {
    /// The nth call from now on, counted from 1, has this fate.
    pub fn arm(&self, nth: u32, fate: Fate) {
        self.held.send_replace(fate == Fate::Hangs);
        *self.next.lock().unwrap_or_else(PoisonError::into_inner) = Some((nth, fate));
        self.armed.store(true, Ordering::Release);
    }

    /// Lets all live again; says whether a call has failed, or hung.
    pub fn disarm(&self) -> bool {
        self.armed.store(false, Ordering::Release);
        self.held.send_replace(false);
        self.next.lock().unwrap_or_else(PoisonError::into_inner).take().is_none()
    }

    /// Calls that hang now.
    pub fn hanging(&self) -> usize {
        self.hanging.now()
    }

    /// The fate of a call. One that hangs does so in here, and lives afterwards.
    pub(super) async fn fate(&self, name: &str) -> Fate {
        let fate = self.next(name);
        if fate != Fate::Hangs {
            return fate;
        }
        let _counted = self.hanging.begin();
        let mut held = self.held.subscribe();
        // The sender lives as long as this does.
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
