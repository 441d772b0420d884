//! Claiming tasks, and the calls about a claim that name its run by id. These calls show the token that the registry
//! remembers for the run.

use std::time::{Duration, SystemTime};

use absurd_proto::v1 as pb;
use absurd_proto::v1::settle_item::Action;
use serde::Serialize;
use serde_json::Value;
use tonic::Request;
use uuid::Uuid;

use crate::connect::MESSAGE_BYTES_MAX;
use crate::stream::{ClaimStream, StreamOptions};
use crate::{AbsurdClient, ClaimedTask, Error, Json, State, wire};

/// Options of one claim call.
#[derive(Debug, Clone)]
pub struct ClaimOptions {
    /// Worker id to store with the claim; `None` means the client's worker id.
    pub worker_id: Option<String>,
    /// Lease in whole seconds, at most 24 h; zero means that it never ends.
    pub claim_timeout: Duration,
    /// Maximum number of tasks, 1 to 1,000.
    pub qty: i32,
    /// Longest wait for a first task, at most 60 s; zero means no wait.
    pub wait: Duration,
    /// Claims only tasks of these names, at most 100; empty means all.
    pub task_names: Vec<String>,
}

impl Default for ClaimOptions {
    fn default() -> Self {
        Self {
            worker_id: None,
            claim_timeout: Duration::from_secs(30),
            qty: 1,
            wait: Duration::ZERO,
            task_names: Vec::new(),
        }
    }
}

impl ClaimOptions {
    /// Sets the lease of the claims.
    #[must_use]
    pub fn claim_timeout(mut self, lease: Duration) -> Self {
        self.claim_timeout = lease;
        self
    }

    /// Sets the maximum number of tasks.
    #[must_use]
    pub fn qty(mut self, qty: i32) -> Self {
        self.qty = qty;
        self
    }

    /// Sets the longest wait for a first task.
    #[must_use]
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }
}

/// Outcome of failing a run: the state of the task, and its next attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailOutcome {
    /// State of the task after the failure.
    pub task_state: Option<State>,
    /// The next attempt; `None` when no further one follows.
    pub next: Option<NextAttempt>,
}

/// The attempt that follows a failed one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NextAttempt {
    /// Id of its run.
    pub run_id: Uuid,
    /// Attempt number, from 2.
    pub attempt: i32,
    /// Earliest time at which it can be claimed.
    pub available_at: Option<SystemTime>,
}

impl FailOutcome {
    pub(crate) fn from_wire(outcome: Option<pb::FailOutcome>) -> Result<Self, Error> {
        let outcome = outcome.unwrap_or_default();
        let next = match (outcome.next_run_id, outcome.next_attempt) {
            (Some(run), Some(attempt)) => Some(NextAttempt {
                run_id: wire::id(&run)?,
                attempt,
                available_at: wire::time(outcome.next_available_at),
            }),
            _ => None,
        };
        Ok(Self { task_state: State::from_wire(outcome.task_state), next })
    }
}

/// The reason as stored: a text becomes the object that the original client makes of it, other JSON stays.
pub(crate) fn reason<R: Serialize + ?Sized>(reason: &R) -> Result<pb::Json, Error> {
    let json = Json::of(reason)?;
    let Ok(Value::String(message)) = json.to() else { return Ok(json.into_wire()) };
    let now = humantime::format_rfc3339_micros(SystemTime::now()).to_string();
    let object = serde_json::json!({ "name": "TaskExecutionError", "message": message, "timestamp": now });
    Ok(Json::from(object).into_wire())
}

impl AbsurdClient {
    /// Claims once. The caller extends the leases, with [`AbsurdClient::extend_claim`]. A failed call is not repeated:
    /// tasks whose claim was lost with the answer stay claimed until their leases end.
    pub async fn claim_task(&self, options: ClaimOptions) -> Result<Vec<ClaimedTask>, Error> {
        let mut request = Request::new(pb::ClaimTaskRequest {
            queue: self.queue(),
            worker_id: options.worker_id.unwrap_or_else(|| self.worker_id().to_owned()),
            qty: options.qty,
            claim_timeout: Some(wire::duration(options.claim_timeout)),
            wait: Some(wire::duration(options.wait)),
            start_deadline: None,
            task_names: options.task_names,
            max_message_bytes: i32::try_from(MESSAGE_BYTES_MAX).unwrap_or(i32::MAX),
            accepts_omitted_params: false,
        });
        request.set_timeout(options.wait + self.limit());
        let asked = self.shared.replicas.ask();
        let response = asked.grpc().claim_task(request).await.map_err(|status| {
            let error = Error::from(status);
            asked.failed(&error);
            error
        })?;
        asked.worked();
        let response = response.into_inner();
        response.tasks.into_iter().map(|task| ClaimedTask::new(self, task, None)).collect()
    }

    /// Opens a stream on which tasks arrive. Waits for the first answer of the server, and returns its refusal as an
    /// error, for example of a wrong option or an unknown queue. Afterwards the stream reconnects by itself until it is
    /// closed.
    pub async fn claim_stream(&self, options: StreamOptions) -> Result<ClaimStream, Error> {
        ClaimStream::open(self, options).await
    }

    pub(crate) async fn settle(
        &self,
        run_id: Uuid,
        token: Option<String>,
        action: Action,
    ) -> Result<pb::SettleResult, Error> {
        let ends = matches!(action, Action::Complete(_) | Action::Fail(_) | Action::Release(_));
        let token = token.or_else(|| self.shared.registry.token(run_id));
        let item = pb::SettleItem { run_id: run_id.to_string(), claim_token: token.clone(), action: Some(action) };
        let outcome = self.shared.settler.submit(self.queue_name(), item, self.deadline()).await;
        self.over_when(run_id, token.as_deref(), &outcome, |_| ends);
        outcome
    }

    pub(crate) async fn checkpoint_of(
        &self,
        run_id: Uuid,
        token: &str,
        name: String,
        state: Json,
        extend_by: Duration,
    ) -> Result<(), Error> {
        let action = Action::Checkpoint(pb::CheckpointAction {
            checkpoint_name: name,
            state: Some(state.into_wire()),
            extend_by: Some(wire::duration(extend_by)),
        });
        self.settle(run_id, Some(token.to_owned()), action).await.map(drop)
    }

    pub(crate) async fn extend_held(&self, run_id: Uuid, token: String, extend_by: Duration) -> Result<(), Error> {
        let extend_by = Some(wire::duration(extend_by));
        self.settle(run_id, Some(token), Action::Extend(pb::ExtendAction { extend_by })).await.map(drop)
    }

    /// Completes a run; repeating the call is harmless. JSON null, as of `&()`, means no result and is stored as `{}`,
    /// as the original client does. [`ClaimedTask::complete`] stores JSON null as it is.
    pub async fn complete_task<T: Serialize + ?Sized>(&self, run_id: Uuid, result: &T) -> Result<(), Error> {
        let result = Some(Json::of(result)?.or_object().into_wire());
        self.settle(run_id, None, Action::Complete(pb::CompleteAction { result })).await.map(drop)
    }

    /// Fails a run. A further attempt, if the limit allows one, follows after the delay of the retry strategy, or at
    /// `retry_at`. `reason` is a text or an object, by convention with `name`, `message` and `traceback`.
    pub async fn fail_task<R: Serialize + ?Sized>(
        &self,
        run_id: Uuid,
        reason: &R,
        retry_at: Option<SystemTime>,
    ) -> Result<FailOutcome, Error> {
        let reason = Some(self::reason(reason)?);
        let action = Action::Fail(pb::FailAction { reason, retry_at: retry_at.map(Into::into), no_retry: false });
        FailOutcome::from_wire(self.settle(run_id, None, action).await?.fail)
    }

    /// Moves the end of a lease to now + `extend_by`, in whole seconds, at most one day. Returns that end; `None` means
    /// never.
    pub async fn extend_claim(&self, run_id: Uuid, extend_by: Duration) -> Result<Option<SystemTime>, Error> {
        let extend_by = Some(wire::duration(extend_by));
        let settled = self.settle(run_id, None, Action::Extend(pb::ExtendAction { extend_by })).await?;
        Ok(wire::time(settled.claim_expires_at))
    }

    /// Gives a claim back without using up an attempt. The run can be claimed again after `delay`, at most 1 h.
    pub async fn release_claim(&self, run_id: Uuid, delay: Duration) -> Result<(), Error> {
        let delay = Some(wire::duration(delay));
        self.settle(run_id, None, Action::Release(pb::ReleaseAction { delay })).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_becomes_a_reason_and_an_object_stays() {
        let made: Value = serde_json::from_str(&reason("boom").expect("JSON").text).expect("JSON");
        assert_eq!((&made["name"], &made["message"]), (&"TaskExecutionError".into(), &"boom".into()));
        let stamp = made["timestamp"].as_str().expect("a time");
        assert!(stamp.ends_with('Z') && humantime::parse_rfc3339(stamp).is_ok(), "{stamp}");
        let object = serde_json::json!({ "name": "Mine", "is_retryable": false });
        assert_eq!(reason(&object).expect("JSON").text, object.to_string());
    }
}
