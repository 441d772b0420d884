//! The RPCs about events and time: waits, sleeps, schedules and emissions.

use std::time::Duration;

use absurd_proto::v1 as pb;
use tokio::time::Instant as Deadline;

use super::convert::{self, duration, duration_between, run_ref, scope, timestamp};
use super::service::Service;
use crate::domain::id::parse_uuid;
use crate::domain::{CheckpointName, Error, EventName, Instant, JsonText, QueueName};
use crate::store::event::StepWait;
use crate::store::suspend::{Awaited, Suspend, When};
use crate::store::text::ANSWER_BYTES_MAX;

/// Longest wait, sleep and delay: ten years.
pub(super) const SPAN_MAX: Duration = Duration::from_secs(10 * 366 * 24 * 3600);

fn wake_at(slept: &Awaited) -> Option<Instant> {
    match slept {
        Awaited::Suspended(wake_at) => *wake_at,
        Awaited::Payload(_) | Awaited::TimedOut => None,
    }
}

/// Replaces a payload that is too large for an answer by its length in characters.
fn omitted(json: &JsonText) -> Option<pb::PayloadOmitted> {
    let large = json.len() > ANSWER_BYTES_MAX.unsigned_abs() as usize;
    let length = || i64::try_from(json.as_str().chars().count()).unwrap_or(i64::MAX);
    large.then(|| pb::PayloadOmitted { length: length() })
}

impl Service {
    pub(super) async fn await_one(
        &self,
        request: pb::AwaitEventRequest,
        deadline: Deadline,
    ) -> Result<pb::AwaitEventResponse, Error> {
        use pb::await_event_response::Outcome;
        let scope = scope(&request.queue)?;
        let (run, _) = run_ref(&request.run_id, request.claim_token.as_deref(), &self.limits)?;
        let step = CheckpointName::parse("step_name", &request.step_name)?;
        let event = EventName::parse("event_name", &request.event_name)?;
        let timeout = duration_between("timeout", request.timeout, Duration::ZERO, SPAN_MAX)?;
        self.same_task(&scope, run.run_id, &request.task_id).await?;
        let wait = Suspend::Event { step, event, timeout };
        let outcome = match self.engine.suspend(&scope, run, wait, deadline).await? {
            Awaited::Payload(json) => match omitted(&json) {
                Some(omitted) => Outcome::PayloadOmitted(omitted),
                None => Outcome::Payload(pb::Json { text: json.into_string() }),
            },
            Awaited::Suspended(wake_at) => Outcome::Suspended(pb::Suspended { wake_at: wake_at.and_then(timestamp) }),
            Awaited::TimedOut => Outcome::TimedOut(pb::TimedOut {}),
        };
        Ok(pb::AwaitEventResponse { outcome: Some(outcome) })
    }

    pub(super) async fn await_end(
        &self,
        request: pb::AwaitTaskRequest,
        deadline: Deadline,
    ) -> Result<pb::AwaitTaskResponse, Error> {
        use pb::await_task_response::Outcome;
        let scope = scope(&request.queue)?;
        let (run, _) = run_ref(&request.run_id, request.claim_token.as_deref(), &self.limits)?;
        let step = CheckpointName::parse("step_name", &request.step_name)?;
        let awaited_id = parse_uuid("awaited_task_id", &request.awaited_task_id)?;
        let timeout = duration_between("timeout", request.timeout, Duration::ZERO, SPAN_MAX)?;
        let awaited_queue = match request.awaited_queue.as_str() {
            "" => scope.queue().clone(),
            other => QueueName::parse("awaited_queue", other)?,
        };
        let (wait, awaited) = (StepWait { run: &run, step: &step, timeout }, (&awaited_queue, awaited_id));
        let awaited = self.engine.await_task(&scope, &wait, awaited, deadline).await;
        if matches!(awaited, Err(Error::TaskNotFound(_))) {
            // Checked only now, because a step with a stored result needs neither the task nor its queue.
            self.existing(awaited_queue.as_str()).await?;
        }
        let outcome = match awaited? {
            Awaited::Payload(json) => match omitted(&json) {
                Some(omitted) => Outcome::SnapshotOmitted(omitted),
                None => Outcome::Snapshot(pb::Json { text: json.into_string() }),
            },
            Awaited::Suspended(wake_at) => Outcome::Suspended(pb::Suspended { wake_at: wake_at.and_then(timestamp) }),
            Awaited::TimedOut => Outcome::TimedOut(pb::TimedOut {}),
        };
        Ok(pb::AwaitTaskResponse { outcome: Some(outcome) })
    }

    pub(super) async fn emit(
        &self,
        request: pb::EmitEventRequest,
        deadline: Deadline,
    ) -> Result<pb::EmitEventResponse, Error> {
        let scope = scope(&request.queue)?;
        let event = EventName::parse("event_name", &request.event_name)?;
        let payload = convert::json("payload", request.payload, self.limits.payload())?;
        let (applied, woken) = self.engine.emit_event(&scope, event, payload, deadline).await?;
        Ok(pb::EmitEventResponse { applied, woken })
    }

    pub(super) async fn schedule(
        &self,
        request: pb::ScheduleTaskRequest,
        deadline: Deadline,
    ) -> Result<pb::ScheduleTaskResponse, Error> {
        use pb::schedule_task_request::When as Asked;
        let scope = scope(&request.queue)?;
        let (run, _) = run_ref(&request.run_id, request.claim_token.as_deref(), &self.limits)?;
        let when = match request.when {
            Some(Asked::WakeAt(at)) => When::At(convert::instant("wake_at", &at)?),
            Some(Asked::Delay(delay)) => When::After(duration("delay", delay, SPAN_MAX)?),
            None => return Err(Error::invalid("when", "wake_at or delay must be set")),
        };
        let slept = self.engine.suspend(&scope, run, Suspend::Schedule { when }, deadline).await?;
        Ok(pb::ScheduleTaskResponse { wake_at: wake_at(&slept).and_then(timestamp) })
    }

    pub(super) async fn sleep_step(
        &self,
        request: pb::SleepRequest,
        deadline: Deadline,
    ) -> Result<pb::SleepResponse, Error> {
        use pb::sleep_request::Until;
        use pb::sleep_response::Outcome;
        let scope = scope(&request.queue)?;
        let (run, _) = run_ref(&request.run_id, request.claim_token.as_deref(), &self.limits)?;
        let (when, default_name) = match request.until {
            Some(Until::Duration(span)) => {
                let span = duration("duration", span, SPAN_MAX)?;
                (When::After(span), format!("sleep_{}", span.as_secs()))
            }
            Some(Until::WakeAt(at)) => (When::At(convert::instant("wake_at", &at)?), String::new()),
            None => return Err(Error::invalid("duration", "duration or wake_at must be set")),
        };
        let name = if request.step_name.is_empty() { &default_name } else { &request.step_name };
        let step = CheckpointName::parse("step_name", name)?;
        let slept = self.engine.suspend(&scope, run, Suspend::Sleep { step, when }, deadline).await?;
        let outcome = match wake_at(&slept) {
            Some(wake_at) => Outcome::Suspended(pb::Suspended { wake_at: timestamp(wake_at) }),
            None => Outcome::Elapsed(pb::Elapsed {}),
        };
        Ok(pb::SleepResponse { outcome: Some(outcome) })
    }

    pub(super) async fn put_to_sleep(
        &self,
        request: pb::SetRunSleepingRequest,
        deadline: Deadline,
    ) -> Result<pb::SetRunSleepingResponse, Error> {
        let scope = scope(&request.queue)?;
        let (run, _) = run_ref(&request.run_id, request.claim_token.as_deref(), &self.limits)?;
        let event = EventName::parse("event_name", &request.event_name)?;
        let slept = self.engine.suspend(&scope, run, Suspend::SetSleeping { event }, deadline).await?;
        Ok(pb::SetRunSleepingResponse { wake_at: wake_at(&slept).and_then(timestamp) })
    }
}
