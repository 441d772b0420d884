//! Writes that let a run sleep: until a time, as a step, or until an event that an orchestrator waits for.

use std::time::Duration;

use postgres_types::ToSql;
use tokio_postgres::Row;

use super::batch::RunRef;
use super::statement::{RUN_SCHEDULE, RUN_SET_SLEEPING, RUN_SLEEP, Statement};
use super::{Fault, Store, Wait};
use crate::domain::{CheckpointName, Digest, Error, EventName, Instant, State};
use crate::scope::Scope;

/// When a run can be claimed.
#[derive(Debug, Clone, Copy)]
pub enum When {
    /// At a time.
    At(Instant),
    /// After so long by the database's clock.
    After(Duration),
}

impl When {
    /// The time, or the milliseconds.
    fn params(self) -> (Option<Instant>, Option<i64>) {
        match self {
            Self::At(at) => (Some(at), None),
            Self::After(delay) => (None, Some(i64::try_from(delay.as_millis()).unwrap_or(i64::MAX))),
        }
    }
}

impl Store {
    /// Moves a run to a time; returns it.
    pub async fn run_schedule(
        &self,
        scope: &Scope,
        run: &RunRef,
        when: When,
        lock_wait: Duration,
    ) -> Result<Option<Instant>, Error> {
        let (at, after) = when.params();
        self.let_sleep(scope, run, &RUN_SCHEDULE, &[&at, &after], lock_wait).await
    }

    /// Sleeps as a step of a run; None: the time is over.
    pub async fn run_sleep(
        &self,
        scope: &Scope,
        run: &RunRef,
        step: &CheckpointName,
        when: When,
        lock_wait: Duration,
    ) -> Result<Option<Instant>, Error> {
        let (at, after) = when.params();
        self.let_sleep(scope, run, &RUN_SLEEP, &[&step.as_str(), &after, &at], lock_wait).await
    }

    /// Puts a run to sleep until an event; returns when it wakes all the same.
    pub async fn run_set_sleeping(
        &self,
        scope: &Scope,
        run: &RunRef,
        event: &EventName,
        lock_wait: Duration,
    ) -> Result<Option<Instant>, Error> {
        self.let_sleep(scope, run, &RUN_SET_SLEEPING, &[&event.as_str()], lock_wait).await
    }

    async fn let_sleep(
        &self,
        scope: &Scope,
        run: &RunRef,
        statement: &Statement,
        more: &[&(dyn ToSql + Sync)],
        lock_wait: Duration,
    ) -> Result<Option<Instant>, Error> {
        let fail = |fault: Fault| fault.into_error(scope);
        let digest = run.digest.as_ref().map(Digest::as_str);
        let queue = scope.queue().as_str();
        let mut params: Vec<&(dyn ToSql + Sync)> = vec![&queue, &run.run_id, &digest];
        params.extend_from_slice(more);
        let tx = self.begin(lock_wait).await.map_err(fail)?;
        let outcome = match tx.rows(statement, Wait::Block, None, &params).await {
            Ok(rows) => rows.first().map_or_else(|| Err(Error::Internal("no answer".into())), |row| slept(run, row)),
            // The only thing that these functions refuse by themselves.
            Err(Fault::Raised { message, .. }) => Err(Error::invalid("step_name", message)),
            Err(fault) => Err(fail(fault)),
        };
        if outcome.is_ok() {
            tx.commit().await.map_err(fail)?;
        } else {
            tx.rollback().await;
        }
        outcome
    }
}

fn slept(run: &RunRef, row: &Row) -> Result<Option<Instant>, Error> {
    if !row.get::<_, bool>("known") {
        return Err(Error::RunNotFound(run.run_id));
    }
    if row.get::<_, Option<bool>>("done") == Some(true) {
        return Ok(row.get("wake_at"));
    }
    Err(refused(run, row))
}

/// Why a write about a run was not carried out, from the columns that such statements share.
pub(super) fn refused(run: &RunRef, row: &Row) -> Error {
    let run_id = run.run_id;
    let state = State::from_stored(row.get("state")).unwrap_or(State::Failed);
    let wrong_state = || Error::RunNotRunning { run: run_id, state: state.as_str().to_owned() };
    match state {
        State::Cancelled => Error::TaskCancelled(run_id),
        State::Failed if row.get("expired") => Error::ClaimExpired(run_id),
        State::Completed | State::Failed => wrong_state(),
        _ if run.digest.is_some() => Error::ClaimLost(run_id),
        _ => wrong_state(),
    }
}
