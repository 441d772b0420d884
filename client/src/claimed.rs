//! `ClaimedTask`: a task whose claim this process holds, and the calls that settle or suspend its run. Each call shows
//! the token of this claim, so that it cannot act on a newer claim of the same run.

use std::time::Duration;

use absurd_proto::v1 as pb;
use absurd_proto::v1::settle_item::Action;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use uuid::Uuid;

use crate::durable::Until;
use crate::registry::Revoked;
use crate::{AbsurdClient, Awaited, Error, FailOutcome, Json, Slept, claims, wire};

/// A claimed task. A stream extends the lease of each task that it delivered until the task is settled or dropped. A
/// task that is dropped unsettled stays claimed until its lease ends, which uses up an attempt.
#[derive(Debug)]
pub struct ClaimedTask {
    client: AbsurdClient,
    token: String,
    revoked: watch::Receiver<Option<Revoked>>,
    /// Id of the claimed run.
    pub run_id: Uuid,
    /// Id of the run's task.
    pub task_id: Uuid,
    /// Number of the attempt, from 1.
    pub attempt: i32,
    /// Name of the handler.
    pub task_name: String,
    /// Input; `None` when the server left it out.
    pub params: Option<Json>,
    /// Retry strategy as stored; `None` when the task has none.
    pub retry_strategy: Option<Json>,
    /// Maximum number of attempts; `None` means unlimited.
    pub max_attempts: Option<i32>,
    /// Headers, a JSON object; `None` when there are none.
    pub headers: Option<Json>,
    /// Event that woke the run, or whose wait timed out.
    pub wake_event: Option<String>,
    /// Payload of that event; `None` when the wait timed out.
    pub event_payload: Option<Json>,
    /// End of the lease when the task was claimed; `None` means that the lease never ends.
    pub claim_expires_at: Option<std::time::SystemTime>,
    /// Checkpoints stored earlier: name and value, oldest first.
    pub checkpoints: Vec<(String, Option<Json>)>,
    /// False when the claim did not carry every checkpoint; [`AbsurdClient::get_all_checkpoints`] reads them all.
    pub checkpoints_complete: bool,
}

impl ClaimedTask {
    pub(crate) fn new(client: &AbsurdClient, task: pb::ClaimedTask, keeper: Option<u64>) -> Result<Self, Error> {
        let (run_id, task_id) = (wire::id(&task.run_id)?, wire::id(&task.task_id)?);
        let revoked = client.shared.registry.insert(run_id, task.claim_token.clone(), keeper);
        Ok(Self {
            client: client.clone(),
            token: task.claim_token,
            revoked,
            run_id,
            task_id,
            attempt: task.attempt,
            task_name: task.task_name,
            params: Json::from_wire(task.params),
            retry_strategy: Json::from_wire(task.retry_strategy),
            max_attempts: task.max_attempts,
            headers: Json::from_wire(task.headers),
            wake_event: task.wake_event,
            event_payload: Json::from_wire(task.event_payload),
            claim_expires_at: wire::time(task.claim_expires_at),
            checkpoints: task
                .checkpoints
                .into_iter()
                .map(|checkpoint| (checkpoint.checkpoint_name, Json::from_wire(checkpoint.state)))
                .collect(),
            checkpoints_complete: task.checkpoints_complete,
        })
    }

    /// Token of this claim, which every method of this type shows to the server.
    pub fn claim_token(&self) -> &str {
        &self.token
    }

    /// Params, deserialized; absent params are read as JSON null.
    pub fn params<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        self.params.as_ref().map_or_else(|| serde_json::from_str("null"), Json::to)
    }

    /// The stored value of a step. The outer `None` means that no such checkpoint came with the claim, the inner one
    /// SQL NULL.
    pub fn checkpoint(&self, name: &str) -> Option<Option<&Json>> {
        self.checkpoints.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_ref())
    }

    /// Reason why the claim is over; `None` while this process knows of none.
    pub fn is_revoked(&self) -> Option<Revoked> {
        *self.revoked.borrow()
    }

    /// Resolves when the claim is revoked, and never otherwise. Stop working on the run then.
    pub async fn revoked(&self) -> Revoked {
        let mut revoked = self.revoked.clone();
        loop {
            if let Some(why) = *revoked.borrow_and_update() {
                return why;
            }
            if revoked.changed().await.is_err() {
                // The registry dropped the claim, as it does when this process settles it: no revocation can follow.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Waits for an event, as step `step`. [`Awaited::Suspended`] ends the claim: stop working on the run. The worker
    /// that claims the run next repeats this call, and gets the payload or [`Awaited::TimedOut`].
    pub async fn await_event(&self, step: &str, event: &str, timeout: Option<Duration>) -> Result<Awaited, Error> {
        let (task_id, token) = (Some(self.task_id), Some(self.token.clone()));
        self.client.await_for(task_id, self.run_id, token, step, event, timeout).await
    }

    /// Sleeps, as step `step`. The first call suspends the run and ends the claim: stop working on the run. The worker
    /// that claims the run next repeats this call, and gets [`Slept::Elapsed`].
    pub async fn sleep(&self, step: &str, duration: Duration) -> Result<Slept, Error> {
        self.client.sleep_until(self.run_id, Some(self.token.clone()), Until::After(duration), step).await
    }

    async fn settle(&self, action: Action) -> Result<pb::SettleResult, Error> {
        self.client.settle(self.run_id, Some(self.token.clone()), action).await
    }

    /// Completes the run and its task. The result is stored as it is, JSON null included.
    pub async fn complete<T: Serialize + ?Sized>(&self, result: &T) -> Result<(), Error> {
        self.complete_json(Json::of(result)?).await
    }

    /// Completes the run with a result that is JSON text already.
    pub async fn complete_json(&self, result: Json) -> Result<(), Error> {
        let result = Some(result.into_wire());
        self.settle(Action::Complete(pb::CompleteAction { result })).await.map(drop)
    }

    /// Fails the run; see [`AbsurdClient::fail_task`].
    pub async fn fail<T: Serialize + ?Sized>(&self, reason: &T) -> Result<FailOutcome, Error> {
        self.fail_json(Json::from_text(claims::reason(reason)?.text)).await
    }

    /// Fails the run with a reason that is JSON text already.
    pub async fn fail_json(&self, reason: Json) -> Result<FailOutcome, Error> {
        self.fail_with(reason, false).await
    }

    /// Fails the task with this attempt, even if its limit allows more: for failures that a retry cannot mend.
    pub async fn fail_for_good<T: Serialize + ?Sized>(&self, reason: &T) -> Result<FailOutcome, Error> {
        self.fail_with(Json::from_text(claims::reason(reason)?.text), true).await
    }

    pub(crate) async fn fail_with(&self, reason: Json, no_retry: bool) -> Result<FailOutcome, Error> {
        let action = pb::FailAction { reason: Some(reason.into_wire()), retry_at: None, no_retry };
        FailOutcome::from_wire(self.settle(Action::Fail(action)).await?.fail)
    }

    /// Stores the result of a step as checkpoint `name`. Later claims of the task carry the checkpoint or can read it.
    pub async fn set_checkpoint<T: Serialize + ?Sized>(&self, name: &str, state: &T) -> Result<(), Error> {
        let state = Some(Json::of(state)?.into_wire());
        let action = pb::CheckpointAction { checkpoint_name: name.to_owned(), state, extend_by: None };
        self.settle(Action::Checkpoint(action)).await.map(drop)
    }

    /// Gives the claim back without using up an attempt. The run can be claimed again after `delay`, at most 1 h.
    pub async fn release(&self, delay: Duration) -> Result<(), Error> {
        self.settle(Action::Release(pb::ReleaseAction { delay: Some(wire::duration(delay)) })).await.map(drop)
    }
}

impl Drop for ClaimedTask {
    fn drop(&mut self) {
        self.client.shared.registry.abandon(self.run_id, &self.token);
    }
}
