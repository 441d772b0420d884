//! Writes after which a run waits: for a time, as a step or not, or for an event. Many of one kind are one statement.

use std::time::Duration;

use postgres_types::ToSql;
use tokio_postgres::Row;

use super::batch::RunRef;
use super::statement::{EVENT_AWAIT, RUN_SCHEDULE, RUN_SET_SLEEPING, RUN_SLEEP};
use super::{Fault, Store, Wait};
use crate::domain::{CheckpointName, Digest, Error, EventName, Instant, JsonText, State};
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
    pub(super) fn at(self) -> Option<Instant> {
        match self {
            Self::At(at) => Some(at),
            Self::After(_) => None,
        }
    }

    /// Microseconds.
    pub(super) fn after_us(self) -> Option<i64> {
        match self {
            Self::At(_) => None,
            Self::After(delay) => Some(i64::try_from(delay.as_micros()).unwrap_or(i64::MAX)),
        }
    }

    /// How long that is from `now`.
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

/// How a wait stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Awaited {
    /// The event was emitted.
    Payload(JsonText),
    /// The run sleeps, until then at most.
    Suspended(Option<Instant>),
    /// The time was over first.
    TimedOut,
}

/// What a run waits for.
#[derive(Debug, Clone)]
pub enum Suspend {
    /// A time.
    Schedule {
        /// When.
        when: When,
    },
    /// A time, as a step.
    Sleep {
        /// Name of the step.
        step: CheckpointName,
        /// When.
        when: When,
    },
    /// An event, as a step.
    Event {
        /// Name of the step.
        step: CheckpointName,
        /// What.
        event: EventName,
        /// Longest wait.
        timeout: Option<Duration>,
    },
    /// An event, as an orchestrator says it.
    SetSleeping {
        /// What.
        event: EventName,
    },
}

/// Kinds of waits; one statement each.
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
    /// Which statement carries it out.
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
    /// Lets different runs wait, all in one way; one answer each, in order, `None` where somebody holds the run or the event:
    /// nothing is waited for with an event in hand, which would hold up all others that wait for it. Repeating it is harmless.
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
            // It may have to wait for a transaction that is just making the event.
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
            // The only thing that these functions refuse by themselves.
            Err(Fault::Raised { message, .. }) if items.len() == 1 => {
                Ok(vec![Some(Err(Error::invalid("step_name", message)))])
            }
            Err(fault) => Err(fault),
        }
    }
}

/// How a wait stands, from the columns that such statements share.
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

/// Why a write about a run was not carried out.
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
