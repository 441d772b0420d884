//! Events and time: calls by which a run waits for an event, sleeps or is moved, and calls that emit events.

use std::fmt;
use std::time::{Duration, SystemTime};

use absurd_proto::v1 as pb;
use serde::Serialize;
use uuid::Uuid;

use crate::client::rpc;
use crate::durable::{AwaitedTask, Snapshot, TaskWait, Until};
use crate::wire::Page;
use crate::{AbsurdClient, Error, Json, wire};

/// State of a wait for an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Awaited {
    /// The event was emitted with this payload.
    Payload(Json),
    /// The run sleeps, and the claim is over.
    Suspended {
        /// Time at which the run wakes without the event; `None` means never.
        wake_at: Option<SystemTime>,
    },
    /// The timeout passed before the event came. Every later call of this step returns the same.
    TimedOut,
}

/// State of a sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slept {
    /// The time of the sleep is over.
    Elapsed,
    /// The run sleeps, and the claim is over.
    Suspended {
        /// Earliest time of the next claim.
        wake_at: SystemTime,
    },
}

/// Outcome of an emission.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Emitted {
    /// False when the event had been emitted before, and keeps its first payload.
    pub applied: bool,
    /// Number of runs that this call woke.
    pub woken: i64,
}

/// The run sleeps and its claim is over: free the worker, and neither complete nor fail the run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AbsurdSleepError {
    /// Id of the run.
    pub run_id: Option<Uuid>,
    /// Event that the run waits for.
    pub event_name: Option<String>,
    /// Time at which the run wakes without the event; `None` means never.
    pub wake_at: Option<SystemTime>,
}

impl fmt::Display for AbsurdSleepError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the run sleeps")?;
        if let Some(event) = &self.event_name {
            write!(f, " until event {event:?} comes")?;
        }
        Ok(())
    }
}

impl std::error::Error for AbsurdSleepError {}

/// Reason why a wait returned no payload.
#[derive(Debug, thiserror::Error)]
pub enum WaitError {
    /// The run sleeps, and the claim is over.
    #[error(transparent)]
    Sleep(#[from] AbsurdSleepError),
    /// The timeout passed before the event came. Every later call of this step returns the same.
    #[error("the event did not come in time")]
    Timeout,
    /// The call itself failed.
    #[error(transparent)]
    Call(#[from] Error),
}

/// Filter of [`AbsurdClient::list_waits`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WaitsOf {
    /// Waits of this task.
    Task(Uuid),
    /// Waits for this event.
    Event(String),
}

/// A wait of a run for an event. The end of a task is an event too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wait {
    /// Id of the run's task.
    pub task_id: Uuid,
    /// Id of the waiting run.
    pub run_id: Uuid,
    /// Name of the step that waits.
    pub step_name: String,
    /// Name of the event.
    pub event_name: String,
    /// Time at which the wait times out; `None` means never.
    pub timeout_at: Option<SystemTime>,
    /// Time at which the wait began.
    pub created_at: Option<SystemTime>,
}

impl AbsurdClient {
    /// Lists a page of waits, ordered by run. `page_size` is 1 to 1,000; 0 means 100.
    pub async fn list_waits(&self, of: WaitsOf, page_size: i32, page_token: &str) -> Result<Page<Wait>, Error> {
        use pb::list_waits_request::Of;
        let request = pb::ListWaitsRequest {
            queue: self.queue(),
            of: Some(match of {
                WaitsOf::Task(task_id) => Of::TaskId(task_id.to_string()),
                WaitsOf::Event(name) => Of::EventName(name),
            }),
            page_size,
            page_token: page_token.to_owned(),
        };
        let response = rpc!(self.list_waits(request))?;
        let wait = |wait: pb::Wait| {
            Ok(Wait {
                task_id: wire::id(&wait.task_id)?,
                run_id: wire::id(&wait.run_id)?,
                step_name: wait.step_name,
                event_name: wait.event_name,
                timeout_at: wire::time(wait.timeout_at),
                created_at: wire::time(wait.created_at),
            })
        };
        Ok(Page {
            items: response.waits.into_iter().map(wait).collect::<Result<_, Error>>()?,
            next_page_token: response.next_page_token,
        })
    }

    /// Waits for an event, as step `step_name`. [`Awaited::Suspended`] ends the claim.
    pub async fn await_event(
        &self,
        task_id: Option<Uuid>,
        run_id: Uuid,
        step_name: &str,
        event_name: &str,
        timeout: Option<Duration>,
    ) -> Result<Awaited, Error> {
        let token = self.shared.registry.token(run_id);
        self.await_for(task_id, run_id, token, step_name, event_name, timeout).await
    }

    pub(crate) async fn await_for(
        &self,
        task_id: Option<Uuid>,
        run_id: Uuid,
        claim_token: Option<String>,
        step_name: &str,
        event_name: &str,
        timeout: Option<Duration>,
    ) -> Result<Awaited, Error> {
        use pb::await_event_response::Outcome;
        let request = pb::AwaitEventRequest {
            queue: self.queue(),
            run_id: run_id.to_string(),
            claim_token: claim_token.clone(),
            step_name: step_name.to_owned(),
            event_name: event_name.to_owned(),
            timeout: timeout.map(wire::duration),
            task_id: task_id.map(|id| id.to_string()).unwrap_or_default(),
        };
        let outcome = rpc!(self.await_event(request));
        self.over_when(run_id, claim_token.as_deref(), &outcome, |response| {
            matches!(response.outcome, Some(Outcome::Suspended(_)))
        });
        match outcome?.outcome.ok_or_else(wire::unclear)? {
            Outcome::Payload(json) => Ok(Awaited::Payload(Json::from_text(json.text))),
            Outcome::Suspended(suspended) => Ok(Awaited::Suspended { wake_at: wire::time(suspended.wake_at) }),
            Outcome::TimedOut(_) => Ok(Awaited::TimedOut),
            Outcome::PayloadOmitted(_) => {
                let task_id = match task_id {
                    Some(task_id) => task_id,
                    None => self.get_run_status(run_id).await?.ok_or_else(wire::unclear)?.task_id,
                };
                let step = self.get_checkpoint(task_id, step_name, false).await?;
                step.and_then(|step| step.state).map(Awaited::Payload).ok_or_else(wire::unclear)
            }
        }
    }

    /// Waits for an event, as step `step_name`. Returns the payload, or an error that says why there is none yet. With
    /// [`WaitError::Sleep`] the run sleeps already; a call of [`AbsurdClient::set_run_sleeping`] is then harmless but
    /// not needed.
    pub async fn wait_for_event(
        &self,
        run_id: Uuid,
        event_name: &str,
        timeout: Duration,
        task_id: Option<Uuid>,
        step_name: &str,
    ) -> Result<Json, WaitError> {
        match self.await_event(task_id, run_id, step_name, event_name, Some(timeout)).await? {
            Awaited::Payload(payload) => Ok(payload),
            Awaited::Suspended { wake_at } => {
                Err(AbsurdSleepError { run_id: Some(run_id), event_name: Some(event_name.to_owned()), wake_at }.into())
            }
            Awaited::TimedOut => Err(WaitError::Timeout),
        }
    }

    /// Sleeps, as step `step_name`; `None` means `sleep_` followed by the seconds. Two sleeps of the same length need
    /// two names. The first call suspends the run; the worker that claims the run next repeats the call and gets
    /// [`Slept::Elapsed`].
    pub async fn sleep(&self, run_id: Uuid, duration: Duration, step_name: Option<&str>) -> Result<Slept, Error> {
        let token = self.shared.registry.token(run_id);
        self.sleep_until(run_id, token, Until::After(duration), step_name.unwrap_or_default()).await
    }

    pub(crate) async fn sleep_until(
        &self,
        run_id: Uuid,
        claim_token: Option<String>,
        until: Until,
        step_name: &str,
    ) -> Result<Slept, Error> {
        use pb::sleep_request::Until as Wire;
        use pb::sleep_response::Outcome;
        let request = pb::SleepRequest {
            queue: self.queue(),
            run_id: run_id.to_string(),
            claim_token: claim_token.clone(),
            step_name: step_name.to_owned(),
            until: Some(match until {
                Until::After(duration) => Wire::Duration(wire::duration(duration)),
                Until::At(at) => Wire::WakeAt(at.into()),
            }),
        };
        let outcome = rpc!(self.sleep(request));
        self.over_when(run_id, claim_token.as_deref(), &outcome, |response| {
            matches!(response.outcome, Some(Outcome::Suspended(_)))
        });
        match outcome?.outcome.ok_or_else(wire::unclear)? {
            Outcome::Suspended(suspended) => {
                Ok(Slept::Suspended { wake_at: wire::time(suspended.wake_at).ok_or_else(wire::unclear)? })
            }
            Outcome::Elapsed(_) => Ok(Slept::Elapsed),
        }
    }

    /// Moves a run to a time: a run that this process holds, whose claim ends by it, a pending run, or one that sleeps
    /// until a time.
    pub async fn schedule_task(&self, run_id: Uuid, wake_at: SystemTime) -> Result<(), Error> {
        self.schedule(run_id, pb::schedule_task_request::When::WakeAt(wake_at.into())).await
    }

    /// As [`AbsurdClient::schedule_task`], `delay` after now by the database's clock.
    pub async fn schedule_task_after(&self, run_id: Uuid, delay: Duration) -> Result<(), Error> {
        self.schedule(run_id, pb::schedule_task_request::When::Delay(wire::duration(delay))).await
    }

    async fn schedule(&self, run_id: Uuid, when: pb::schedule_task_request::When) -> Result<(), Error> {
        let claim_token = self.shared.registry.token(run_id);
        let request = pb::ScheduleTaskRequest {
            queue: self.queue(),
            run_id: run_id.to_string(),
            claim_token: claim_token.clone(),
            when: Some(when),
        };
        let outcome = rpc!(self.schedule_task(request));
        self.over_when(run_id, claim_token.as_deref(), &outcome, |_| true);
        outcome.map(drop)
    }

    /// Puts a run to sleep until an event for which a wait is registered. Returns the time at which the run wakes
    /// without the event; `None` means never. Harmless when the run sleeps for this event already.
    pub async fn set_run_sleeping(&self, run_id: Uuid, event_name: &str) -> Result<Option<SystemTime>, Error> {
        let claim_token = self.shared.registry.token(run_id);
        let request = pb::SetRunSleepingRequest {
            queue: self.queue(),
            run_id: run_id.to_string(),
            claim_token: claim_token.clone(),
            event_name: event_name.to_owned(),
        };
        let outcome = rpc!(self.set_run_sleeping(request));
        self.over_when(run_id, claim_token.as_deref(), &outcome, |_| true);
        Ok(wire::time(outcome?.wake_at))
    }

    /// Waits for the end of a task, as a step.
    pub(crate) async fn await_task_as_step(
        &self,
        run_id: Uuid,
        claim_token: String,
        wait: TaskWait,
    ) -> Result<AwaitedTask, Error> {
        use pb::await_task_response::Outcome;
        let token = Some(claim_token);
        let request = pb::AwaitTaskRequest {
            queue: self.queue(),
            run_id: run_id.to_string(),
            claim_token: token.clone(),
            step_name: wait.step.clone(),
            awaited_queue: wait.queue,
            awaited_task_id: wait.task_id.to_string(),
            timeout: wait.timeout.map(wire::duration),
        };
        let outcome = rpc!(self.await_task(request));
        self.over_when(run_id, token.as_deref(), &outcome, |response| {
            matches!(response.outcome, Some(Outcome::Suspended(_)))
        });
        let snapshot = match outcome?.outcome.ok_or_else(wire::unclear)? {
            Outcome::Snapshot(json) => Json::from_text(json.text),
            Outcome::Suspended(suspended) => {
                return Ok(AwaitedTask::Suspended { wake_at: wire::time(suspended.wake_at) });
            }
            Outcome::TimedOut(_) => return Ok(AwaitedTask::TimedOut),
            Outcome::SnapshotOmitted(_) => {
                let task_id = self.get_run_status(run_id).await?.ok_or_else(wire::unclear)?.task_id;
                let step = self.get_checkpoint(task_id, &wait.step, false).await?;
                step.and_then(|step| step.state).ok_or_else(wire::unclear)?
            }
        };
        let snapshot: Snapshot = snapshot.to().map_err(|_| wire::unclear())?;
        snapshot.into_result(wait.task_id).map(AwaitedTask::Ended).ok_or_else(wire::unclear)
    }

    /// Forgets a claim that this call has ended. If the server reports that the claim is over, only its lease is no
    /// longer extended; the token stays known.
    pub(crate) fn over_when<R>(
        &self,
        run_id: Uuid,
        token: Option<&str>,
        outcome: &Result<R, Error>,
        ends: impl Fn(&R) -> bool,
    ) {
        match (outcome, token) {
            (Ok(answer), _) if ends(answer) => self.shared.registry.remove(run_id, token),
            (Err(error), Some(token)) if error.is_claim_over() => self.shared.registry.abandon(run_id, token),
            _ => {}
        }
    }

    /// Emits an event and wakes the runs that wait for it. The first emission of a name wins. JSON null, as of `&()`,
    /// means no payload and is stored as `{}`, as the original client does; [`AbsurdClient::emit_event_json`] stores
    /// JSON null as it is.
    pub async fn emit_event<P: Serialize + ?Sized>(&self, event_name: &str, payload: &P) -> Result<Emitted, Error> {
        self.emit_event_json(event_name, Json::of(payload)?.or_object()).await
    }

    /// Emits an event with a payload that is JSON text already.
    pub async fn emit_event_json(&self, event_name: &str, payload: Json) -> Result<Emitted, Error> {
        let payload = Some(payload.into_wire());
        let request = pb::EmitEventRequest { queue: self.queue(), event_name: event_name.to_owned(), payload };
        let response = rpc!(self.emit_event(request))?;
        Ok(Emitted { applied: response.applied, woken: response.woken })
    }
}
