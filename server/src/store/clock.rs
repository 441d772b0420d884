//! The database's clock, and the time that tests set in its place (`--test-clock`). Every connection taken from a pool
//! uses the set time.

use std::sync::{Mutex, PoisonError};

use deadpool_postgres::Object;

use super::pool::Role;
use super::statement::{CLOCK_GET, CLOCK_SET};
use super::{Fault, Store, Wait, query};
use crate::domain::Instant;

/// The time set by a test; `None` means the database's real time.
#[derive(Debug, Default)]
pub(super) struct TestClock(Mutex<Option<Instant>>);

impl TestClock {
    fn get(&self) -> Option<Instant> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store {
    /// The time set by a test, if any.
    pub fn test_time(&self) -> Option<Instant> {
        self.inner.test_clock.as_ref().and_then(TestClock::get)
    }

    /// Sets the time for tests; `None` restores the real time. Does nothing without `--test-clock`.
    pub fn set_test_time(&self, time: Option<Instant>) {
        if let Some(clock) = &self.inner.test_clock {
            *clock.0.lock().unwrap_or_else(PoisonError::into_inner) = time;
        }
    }

    /// Reads the database's clock, and records the reading for [`Store::now`].
    pub async fn clock(&self) -> Result<Instant, Fault> {
        let rows = self.rows(&CLOCK_GET, Wait::Skip, None, &[]).await?;
        let micros: i64 = rows.first().ok_or_else(|| Fault::Gone("the clock answered nothing".into()))?.get("now_us");
        self.note_clock(micros);
        Ok(Instant::from_micros(micros))
    }

    pub(super) async fn apply(&self, clock: &TestClock, client: &Object) -> Result<(), Fault> {
        let micros = clock.get().map(Instant::micros);
        let text = self.text(&CLOCK_SET, Wait::Skip, None);
        query(client, &text, &[&micros], Role::Work.silence_max()).await.map(drop)
    }
}
