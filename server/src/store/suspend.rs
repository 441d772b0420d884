//! Writes after which a run waits: until a time, with or without a step, or for an event. One statement carries out
//! many writes of one kind.

use std::time::Duration;

use postgres_types::ToSql;
use tokio_postgres::Row;

use super::batch::RunRef;
use super::statement::{EVENT_AWAIT, RUN_SCHEDULE, RUN_SET_SLEEPING, RUN_SLEEP};
use super::{Fault, Store, Wait};
use crate::domain::{CheckpointName, Digest, Error, EventName, Instant, JsonText, State};
use crate::scope::Scope;

/// Earliest time at which a run can be claimed.
#[derive(Debug, Clone, Copy)]
pub enum When {
    /// At this time; a past time means at once.
    At(Instant),
    /// This long from now, by the database's clock.
    After(Duration),
}

impl When {
    pub(super) fn at(self) -> Option<Instant> {
        match self {
            Self::At(at) => Some(at),
            Self::After(_) => None,
        }
    }

    /// The delay in microseconds; `None` for a fixed time.
    pub(super) fn after_us(self) -> Option<i64> {
        match self {
            Self::At(_) => None,
            Self::After(delay) => Some(i64::try_from(delay.as_micros()).unwrap_or(i64::MAX)),
        }
    }

    /// Duration from `now`; zero for a past time.
    pub fn delay_from(self, now: Instant) -> Duration {
        match self {
            Self::At(at) => Duration::from_micros(at.micros().saturating_sub(now.micros()).max(0).unsigned_abs()),
            Self::After(delay) => delay,
        }
    }
}

pub(super) fn millis(span: Duration) -> i64 {
    i64::try_from(span.as_millis()).unwrap_or(i64::MAX)
}

/// Result of a wait or sleep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Awaited {
    /// The event was emitted, or the awaited task ended. Holds the payload.
    Payload(JsonText),
    /// The run sleeps and its claim is over. Holds the time at which it wakes without an event; `None` means never.
    Suspended(Option<Instant>),
    /// The timeout passed before the event, or the sleep is over.
    TimedOut,
}

/// One kind of wait, with its parameters.
#[derive(Debug, Clone)]
pub enum Suspend {
    /// Until a time, without a step (`ScheduleTask`).
    Schedule {
        /// End of the wait.
        when: When,
    },
    /// Until a time, as a step. The first call of the step decides the time.
    Sleep {
        /// Name of the step.
        step: CheckpointName,
        /// End of the sleep.
        when: When,
    },
    /// For an event, as a step.
    Event {
        /// Name of the step, under which the payload is stored.
        step: CheckpointName,
        /// Name of the event.
        event: EventName,
        /// Longest wait; `None` means no limit.
        timeout: Option<Duration>,
    },
    /// For an event, without a step (`SetRunSleeping`). An orchestrator has registered the wait before.
    SetSleeping {
        /// Name of the event.
        event: EventName,
    },
}

/// Kinds of waits, one per statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SuspendKind {
    /// `run_schedule`
    Schedule,
    /// `run_sleep`
    Sleep,
    /// `event_await`
    Event,
    /// `run_set_sleeping`
    SetSleeping,
}

impl Suspend {
    /// The statement that carries out this wait.
    pub fn kind(&self) -> SuspendKind {
        match self {
            Self::Schedule { .. } => SuspendKind::Schedule,
            Self::Sleep { .. } => SuspendKind::Sleep,
            Self::Event { .. } => SuspendKind::Event,
            Self::SetSleeping { .. } => SuspendKind::SetSleeping,
        }
    }

    fn when(&self) -> Option<When> {
        match self {
            Self::Schedule { when } | Self::Sleep { when, .. } => Some(*when),
            Self::Event { .. } | Self::SetSleeping { .. } => None,
        }
    }

    fn step(&self) -> Option<&str> {
        match self {
            Self::Sleep { step, .. } | Self::Event { step, .. } => Some(step.as_str()),
            Self::Schedule { .. } | Self::SetSleeping { .. } => None,
        }
    }

    fn event(&self) -> Option<&str> {
        match self {
            Self::Event { event, .. } | Self::SetSleeping { event } => Some(event.as_str()),
            Self::Schedule { .. } | Self::Sleep { .. } => None,
        }
    }

    fn timeout_ms(&self) -> Option<i64> {
        match self {
            Self::Event { timeout, .. } => timeout.map(millis),
            _ => None,
        }
    }
}

impl Store {
    /// Suspends different runs, all with the same kind of wait. Returns one answer per item, in order; `None` if
    /// another transaction holds the run, its task or the event. Skips locked rows, because waiting with an event
    /// locked would block every other wait for that event. Repeating the call has no further effect.
    pub async fn suspend(
        &self,
        scope: &Scope,
        kind: SuspendKind,
        items: &[(&RunRef, &Suspend)],
    ) -> Result<Vec<Option<Result<Awaited, Error>>>, Fault> {
        let runs: Vec<_> = items.iter().map(|(run, _)| run.run_id).collect();
        let digests: Vec<_> = items.iter().map(|(run, _)| run.digest.as_ref().map(Digest::as_str)).collect();
        let steps: Vec<_> = items.iter().map(|(_, what)| what.step()).collect();
        let events: Vec<_> = items.iter().map(|(_, what)| what.event()).collect();
        let timeouts: Vec<_> = items.iter().map(|(_, what)| what.timeout_ms()).collect();
        let at: Vec<_> = items.iter().map(|(_, what)| what.when().and_then(When::at)).collect();
        let after: Vec<_> = items.iter().map(|(_, what)| what.when().and_then(When::after_us)).collect();
        let queue = scope.queue().as_str();
        let (statement, more): (_, &[&(dyn ToSql + Sync)]) = match kind {
            SuspendKind::Schedule => (&RUN_SCHEDULE, &[&at, &after]),
            SuspendKind::Sleep => (&RUN_SLEEP, &[&steps, &after, &at]),
            SuspendKind::Event => (&EVENT_AWAIT, &[&steps, &events, &timeouts]),
            SuspendKind::SetSleeping => (&RUN_SET_SLEEPING, &[&events]),
        };
        let mut params: Vec<&(dyn ToSql + Sync)> = vec![&queue, &runs, &digests];
        params.extend_from_slice(more);
        let rows = match kind {
            // This statement may wait for a transaction that inserts the event.
            SuspendKind::Event => {
                self.rows_within(Duration::from_millis(50), statement, Wait::Skip, Some(scope), &params).await
            }
            _ => self.rows(statement, Wait::Skip, Some(scope), &params).await,
        };
        let mut answers: Vec<_> = items.iter().map(|_| None).collect();
        match rows {
            Ok(rows) => {
                for row in rows {
                    let place: i64 = row.get("place");
                    let Some(index) = usize::try_from(place).ok().and_then(|place| place.checked_sub(1)) else {
                        continue;
                    };
                    answers[index] = Some(awaited(items[index].0, &row));
                }
                Ok(answers)
            }
            // The functions raise only if the step's name belongs to another step.
            Err(Fault::Raised { message, .. }) if items.len() == 1 => {
                Ok(vec![Some(Err(Error::invalid("step_name", message)))])
            }
            Err(fault) => Err(fault),
        }
    }
}

/// Reads the result of a wait from the columns that these statements share.
pub(super) fn awaited(run: &RunRef, row: &Row) -> Result<Awaited, Error> {
    if !row.get::<_, bool>("known") {
        return Err(Error::RunNotFound(run.run_id));
    }
    match row.get::<_, Option<&str>>("outcome") {
        Some("payload") => Ok(Awaited::Payload(row.get("payload"))),
        Some("suspended") => Ok(Awaited::Suspended(row.get("wake_at"))),
        Some(_) => Ok(Awaited::TimedOut),
        None => Err(refused(run, row)),
    }
}

/// The reason why a write about a run was refused.
fn refused(run: &RunRef, row: &Row) -> Error {
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
