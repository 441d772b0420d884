//! A task that this process holds, and what may be said about it.

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

/// A claimed task. From a stream, its lease is kept until it is settled or dropped; a task that is dropped unsettled
/// runs into the end of its lease, which uses up an attempt.
#[derive(Debug)]
pub struct ClaimedTask {
    client: AbsurdClient,
    token: String,
    revoked: watch::Receiver<Option<Revoked>>,
    /// The run.
    pub run_id: Uuid,
    /// The task.
    pub task_id: Uuid,
    /// 1 for the first.
    pub attempt: i32,
    /// Name of the handler.
    pub task_name: String,
    /// Input; None when the server left it out.
    pub params: Option<Json>,
    /// As stored.
    pub retry_strategy: Option<Json>,
    /// None: unlimited.
    pub max_attempts: Option<i32>,
    /// Headers.
    pub headers: Option<Json>,
    /// Event that woke the run, or that it waited for in vain.
    pub wake_event: Option<String>,
    /// Payload of that event.
    pub event_payload: Option<Json>,
    /// End of the lease, as of the claim; None: never.
    pub claim_expires_at: Option<std::time::SystemTime>,
    /// Steps done earlier: name and value, oldest first.
    pub checkpoints: Vec<(String, Option<Json>)>,
    /// False: there are more checkpoints than came along.
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

    /// The claim's token.
    pub fn claim_token(&self) -> &str {
        &self.token
    }

    /// Params as a type.
    pub fn params<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        self.params.as_ref().map_or_else(|| serde_json::from_str("null"), Json::to)
    }

    /// The stored value of a step, if it is done.
    pub fn checkpoint(&self, name: &str) -> Option<Option<&Json>> {
        self.checkpoints.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_ref())
    }

    /// Why the claim does not hold any more, as far as this process has heard.
    pub fn is_revoked(&self) -> Option<Revoked> {
        *self.revoked.borrow()
    }

    /// Ends when the claim is revoked; never, as long as it holds. Stop working on the run then.
    pub async fn revoked(&self) -> Revoked {
        let mut revoked = self.revoked.clone();
        loop {
            if let Some(why) = *revoked.borrow_and_update() {
                return why;
            }
            if revoked.changed().await.is_err() {
                // Settled by its owner: there is nothing to revoke.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Waits for an event, as a step with the name `step`. When the run is put to sleep the claim is over: stop working on
    /// it; whoever claims it next calls this again and gets the payload, or hears that the time is over.
    pub async fn await_event(&self, step: &str, event: &str, timeout: Option<Duration>) -> Result<Awaited, Error> {
        let (task_id, token) = (Some(self.task_id), Some(self.token.clone()));
        self.client.await_for(task_id, self.run_id, token, step, event, timeout).await
    }

    /// Sleeps, as a step with the name `step`. The first call puts the run to sleep and the claim is over: stop working on
    /// it; whoever claims it next calls this again and hears that the time is over.
    pub async fn sleep(&self, step: &str, duration: Duration) -> Result<Slept, Error> {
        self.client.sleep_until(self.run_id, Some(self.token.clone()), Until::After(duration), step).await
    }

    async fn settle(&self, action: Action) -> Result<pb::SettleResult, Error> {
        self.client.settle(self.run_id, Some(self.token.clone()), action).await
    }

    /// Completes the run.
    pub async fn complete<T: Serialize + ?Sized>(&self, result: &T) -> Result<(), Error> {
        self.complete_json(Json::of(result)?).await
    }

    /// Completes the run with a result that is JSON already.
    pub async fn complete_json(&self, result: Json) -> Result<(), Error> {
        let result = Some(result.into_wire());
        self.settle(Action::Complete(pb::CompleteAction { result })).await.map(drop)
    }

    /// Fails the run; see [`AbsurdClient::fail_task`].
    pub async fn fail<T: Serialize + ?Sized>(&self, reason: &T) -> Result<FailOutcome, Error> {
        self.fail_json(Json::from_text(claims::reason(reason)?.text)).await
    }

    /// Fails the run with a reason that is JSON already.
    pub async fn fail_json(&self, reason: Json) -> Result<FailOutcome, Error> {
        self.fail_with(reason, false).await
    }

    /// Fails the task with this attempt, whatever its limit of attempts says: trying again would change nothing.
    pub async fn fail_for_good<T: Serialize + ?Sized>(&self, reason: &T) -> Result<FailOutcome, Error> {
        self.fail_with(Json::from_text(claims::reason(reason)?.text), true).await
    }

    pub(crate) async fn fail_with(&self, reason: Json, no_retry: bool) -> Result<FailOutcome, Error> {
        let action = pb::FailAction { reason: Some(reason.into_wire()), retry_at: None, no_retry };
        FailOutcome::from_wire(self.settle(Action::Fail(action)).await?.fail)
    }

    /// Stores the result of a step; it comes along when the task is claimed again.
    pub async fn set_checkpoint<T: Serialize + ?Sized>(&self, name: &str, state: &T) -> Result<(), Error> {
        let state = Some(Json::of(state)?.into_wire());
        let action = pb::CheckpointAction { checkpoint_name: name.to_owned(), state, extend_by: None };
        self.settle(Action::Checkpoint(action)).await.map(drop)
    }

    /// Gives the claim back without using up an attempt; the run is offered again after `delay`.
    pub async fn release(&self, delay: Duration) -> Result<(), Error> {
        self.settle(Action::Release(pb::ReleaseAction { delay: Some(wire::duration(delay)) })).await.map(drop)
    }
}

impl Drop for ClaimedTask {
    fn drop(&mut self) {
        self.client.shared.registry.abandon(self.run_id, &self.token);
    }
}
