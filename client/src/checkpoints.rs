//! Checkpoints: calls that store and read the results of steps.

use std::time::{Duration, SystemTime};

use absurd_proto::v1 as pb;
use serde::Serialize;
use uuid::Uuid;

use crate::client::rpc;
use crate::wire::Parts;
use crate::{AbsurdClient, Error, Json, wire};

/// The stored result of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Name of the step.
    pub checkpoint_name: String,
    /// Value; `None` is SQL NULL.
    pub state: Option<Json>,
    /// `committed`, or another text that a client of the database has written.
    pub status: String,
    /// Id of the run that wrote it.
    pub owner_run_id: Option<Uuid>,
    /// Time of the last write.
    pub updated_at: Option<SystemTime>,
}

impl AbsurdClient {
    /// Stores the result of a step. Returns false when a newer attempt has stored this step: its value stays.
    /// `extend_claim_by` extends the lease too.
    pub async fn set_checkpoint<T: Serialize + ?Sized>(
        &self,
        task_id: Uuid,
        step_name: &str,
        state: &T,
        owner_run: Uuid,
        extend_claim_by: Option<Duration>,
    ) -> Result<bool, Error> {
        let request = pb::SetCheckpointRequest {
            queue: self.queue(),
            run_id: owner_run.to_string(),
            claim_token: self.shared.registry.token(owner_run),
            task_id: task_id.to_string(),
            checkpoint_name: step_name.to_owned(),
            state: Some(Json::of(state)?.into_wire()),
            extend_by: extend_claim_by.map(wire::duration),
        };
        Ok(rpc!(self.set_checkpoint(request))?.applied)
    }

    /// Stores the result of a step of a run. Returns false when a newer attempt has stored this step. The task of the
    /// run is looked up when `task_id` is `None`.
    pub async fn save_checkpoint_for_run<T: Serialize + ?Sized>(
        &self,
        run_id: Uuid,
        step_name: &str,
        data: &T,
        task_id: Option<Uuid>,
    ) -> Result<bool, Error> {
        let request = pb::SaveCheckpointForRunRequest {
            queue: self.queue(),
            run_id: run_id.to_string(),
            claim_token: self.shared.registry.token(run_id),
            checkpoint_name: step_name.to_owned(),
            data: Some(Json::of(data)?.into_wire()),
            task_id: task_id.map(|id| id.to_string()).unwrap_or_default(),
        };
        Ok(rpc!(self.save_checkpoint_for_run(request))?.applied)
    }

    /// Reads one checkpoint of a task, whichever run wrote it; `include_pending` includes one that is not committed.
    pub async fn get_checkpoint(
        &self,
        task_id: Uuid,
        step_name: &str,
        include_pending: bool,
    ) -> Result<Option<Checkpoint>, Error> {
        let ask = |state_range| pb::GetCheckpointRequest {
            queue: self.queue(),
            task_id: task_id.to_string(),
            checkpoint_name: step_name.to_owned(),
            include_pending,
            state_range,
        };
        let request = ask(None);
        let Some(mut stored) = rpc!(self.get_checkpoint(request))?.checkpoint else { return Ok(None) };
        if stored.state_omitted {
            let mut parts = Parts::of(stored.state_length);
            while let Some(range) = parts.wanted() {
                let request = ask(Some(range));
                parts.push(rpc!(self.get_checkpoint(request))?.checkpoint.and_then(|stored| stored.state))?;
            }
            stored.state = Some(parts.whole().into_wire());
        }
        Checkpoint::from_wire(stored).map(Some)
    }

    /// Reads all checkpoints that a run may see, oldest first: its own and those of earlier attempts. Resume from
    /// these.
    pub async fn get_all_checkpoints(&self, task_id: Uuid, run_id: Uuid) -> Result<Vec<Checkpoint>, Error> {
        let mut all = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = pb::GetAllCheckpointsRequest {
                queue: self.queue(),
                task_id: task_id.to_string(),
                run_id: run_id.to_string(),
                page_size: 1000,
                page_token,
            };
            let page = rpc!(self.get_all_checkpoints(request))?;
            for stored in page.checkpoints {
                all.push(self.whole(task_id, stored).await?);
            }
            if page.next_page_token.is_empty() {
                return Ok(all);
            }
            page_token = page.next_page_token;
        }
    }

    /// Reads all checkpoints that this very run has written, oldest first. Do not resume from these: those of earlier
    /// attempts are missing.
    pub async fn get_checkpoints_for_run(&self, run_id: Uuid) -> Result<Vec<Checkpoint>, Error> {
        let mut all = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = pb::GetCheckpointsForRunRequest {
                queue: self.queue(),
                run_id: run_id.to_string(),
                page_size: 1000,
                page_token,
            };
            let page = rpc!(self.get_checkpoints_for_run(request))?;
            for stored in page.checkpoints {
                all.push(self.whole_of_run(run_id, stored).await?);
            }
            if page.next_page_token.is_empty() {
                return Ok(all);
            }
            page_token = page.next_page_token;
        }
    }

    /// Reads one checkpoint that this very run has written.
    pub async fn get_run_checkpoint(&self, run_id: Uuid, step_name: &str) -> Result<Option<Checkpoint>, Error> {
        let request = pb::GetRunCheckpointRequest {
            queue: self.queue(),
            run_id: run_id.to_string(),
            checkpoint_name: step_name.to_owned(),
            state_range: None,
        };
        match rpc!(self.get_run_checkpoint(request))?.checkpoint {
            Some(stored) => self.whole_of_run(run_id, stored).await.map(Some),
            None => Ok(None),
        }
    }

    async fn whole(&self, task_id: Uuid, stored: pb::StoredCheckpoint) -> Result<Checkpoint, Error> {
        if stored.state_omitted {
            let whole = self.get_checkpoint(task_id, &stored.checkpoint_name, false).await?;
            return whole.ok_or_else(wire::unclear);
        }
        Checkpoint::from_wire(stored)
    }

    async fn whole_of_run(&self, run_id: Uuid, mut stored: pb::StoredCheckpoint) -> Result<Checkpoint, Error> {
        let mut parts = Parts::of(if stored.state_omitted { stored.state_length } else { 0 });
        while let Some(range) = parts.wanted() {
            let request = pb::GetRunCheckpointRequest {
                queue: self.queue(),
                run_id: run_id.to_string(),
                checkpoint_name: stored.checkpoint_name.clone(),
                state_range: Some(range),
            };
            parts.push(rpc!(self.get_run_checkpoint(request))?.checkpoint.and_then(|part| part.state))?;
        }
        if stored.state_omitted {
            stored.state = Some(parts.whole().into_wire());
        }
        Checkpoint::from_wire(stored)
    }
}

impl Checkpoint {
    fn from_wire(stored: pb::StoredCheckpoint) -> Result<Self, Error> {
        Ok(Self {
            checkpoint_name: stored.checkpoint_name,
            state: Json::from_wire(stored.state),
            status: stored.status,
            owner_run_id: wire::maybe_id(stored.owner_run_id)?,
            updated_at: wire::time(stored.updated_at),
        })
    }
}
