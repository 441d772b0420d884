//! The RPCs about checkpoints. A write takes the path of all writes about a run; reads are paged.

use absurd_proto::v1 as pb;
use tokio::time::Instant as Deadline;
use tokio_postgres::Row;

use super::convert::{self, run_ref, scope};
use super::page_token;
use super::service::Service;
use crate::domain::id::parse_uuid;
use crate::domain::{CheckpointName, Error, Instant, RunId, TaskId};
use crate::scope::Scope;
use crate::store::batch::Write;
use crate::store::checkpoint::{After, Seen};
use crate::store::text::{ANSWER_BYTES_MAX, cut};

impl Service {
    pub(super) async fn put_checkpoint(
        &self,
        request: pb::SetCheckpointRequest,
        state_field: &str,
        deadline: Deadline,
    ) -> Result<pb::SetCheckpointResponse, Error> {
        let scope = scope(&request.queue)?;
        let (run, _) = run_ref(&request.run_id, request.claim_token.as_deref(), &self.limits)?;
        let name = CheckpointName::parse("checkpoint_name", &request.checkpoint_name)?;
        let state = convert::json(state_field, request.state, self.limits.payload())?;
        let seconds = convert::extension_or_none("extend_by", request.extend_by)?;
        self.same_task(&scope, run.run_id, &request.task_id).await?;
        let write = Write::Checkpoint { name, state, seconds };
        let settled = self.engine.settle(&scope, run, write, deadline).await?;
        Ok(pb::SetCheckpointResponse {
            applied: settled.applied,
            claim_expires_at: settled.claim_expires_at.and_then(convert::timestamp),
        })
    }

    /// Refuses a task that is not the run's. `absurd.set_task_checkpoint_state` accepts any task id, and leaves a row
    /// that no cleanup finds.
    pub(super) async fn same_task(&self, scope: &Scope, run_id: RunId, task_id: &str) -> Result<(), Error> {
        if task_id.is_empty() {
            return Ok(());
        }
        let given = parse_uuid("task_id", task_id)?;
        let (owner, _) = self.engine.store.run_find(scope, run_id).await?;
        if owner == given { Ok(()) } else { Err(Error::invalid("task_id", format!("is not the task of run {run_id}"))) }
    }

    pub(super) async fn one_checkpoint(
        &self,
        request: pb::GetCheckpointRequest,
    ) -> Result<pb::GetCheckpointResponse, Error> {
        let scope = scope(&request.queue)?;
        let task_id = parse_uuid("task_id", &request.task_id)?;
        let name = CheckpointName::parse("checkpoint_name", &request.checkpoint_name)?;
        let part = convert::part("state_range", request.state_range)?;
        let row = self.engine.store.checkpoint_get(&scope, task_id, &name, request.include_pending, part).await?;
        Ok(pb::GetCheckpointResponse { checkpoint: row.as_ref().map(stored) })
    }

    pub(super) async fn one_checkpoint_of_run(
        &self,
        request: pb::GetRunCheckpointRequest,
    ) -> Result<pb::GetRunCheckpointResponse, Error> {
        let scope = scope(&request.queue)?;
        let run_id = parse_uuid("run_id", &request.run_id)?;
        let name = CheckpointName::parse("checkpoint_name", &request.checkpoint_name)?;
        let part = convert::part("state_range", request.state_range)?;
        let (task_id, _) = self.engine.store.run_find(&scope, run_id).await?;
        let row = self.engine.store.checkpoint_get(&scope, task_id, &name, false, part).await?;
        let own = row.filter(|row| row.get::<_, Option<RunId>>("owner_run_id") == Some(run_id));
        Ok(pb::GetRunCheckpointResponse { checkpoint: own.as_ref().map(stored) })
    }

    pub(super) async fn all_checkpoints(
        &self,
        request: pb::GetAllCheckpointsRequest,
    ) -> Result<pb::GetAllCheckpointsResponse, Error> {
        let scope = scope(&request.queue)?;
        let run_id = parse_uuid("run_id", &request.run_id)?;
        let (task_id, attempt) = self.engine.store.run_find(&scope, run_id).await?;
        if !request.task_id.is_empty() && parse_uuid("task_id", &request.task_id)? != task_id {
            return Err(Error::invalid("task_id", format!("is not the task of run {run_id}")));
        }
        let seen = Seen::ByAttempt(attempt);
        let (checkpoints, next_page_token) =
            self.checkpoints(&scope, task_id, seen, request.page_size, &request.page_token).await?;
        Ok(pb::GetAllCheckpointsResponse { checkpoints, next_page_token })
    }

    pub(super) async fn checkpoints_of_run(
        &self,
        request: pb::GetCheckpointsForRunRequest,
    ) -> Result<pb::GetCheckpointsForRunResponse, Error> {
        let scope = scope(&request.queue)?;
        let run_id = parse_uuid("run_id", &request.run_id)?;
        let (task_id, _) = self.engine.store.run_find(&scope, run_id).await?;
        let seen = Seen::OwnedBy(run_id);
        let (checkpoints, next_page_token) =
            self.checkpoints(&scope, task_id, seen, request.page_size, &request.page_token).await?;
        Ok(pb::GetCheckpointsForRunResponse { checkpoints, next_page_token })
    }

    async fn checkpoints(
        &self,
        scope: &Scope,
        task_id: TaskId,
        seen: Seen,
        size: i32,
        token: &str,
    ) -> Result<(Vec<pb::StoredCheckpoint>, String), Error> {
        let limit = self.limits.page(size)?;
        let rows = self.engine.store.checkpoint_page(scope, task_id, seen, &parse_token(token)?, limit).await?;
        let (page, last) = page_token::cut(&rows, limit);
        Ok((page.iter().map(stored).collect(), last.map(token_of).unwrap_or_default()))
    }
}

fn stored(row: &Row) -> pb::StoredCheckpoint {
    pb::StoredCheckpoint {
        checkpoint_name: row.get("checkpoint_name"),
        state: row.get::<_, Option<String>>("state").map(|text| pb::Json { text: cut(text, ANSWER_BYTES_MAX) }),
        status: row.get("status"),
        owner_run_id: row.get::<_, Option<RunId>>("owner_run_id").map(|id| id.to_string()),
        updated_at: convert::timestamp(row.get("updated_at")),
        state_omitted: row.get("omitted"),
        state_length: row.get("length"),
    }
}

fn token_of(row: &Row) -> String {
    page_token::encode(row.get("updated_at"), row.get("checkpoint_name"))
}

fn parse_token(token: &str) -> Result<After, Error> {
    if token.is_empty() {
        return Ok(After { updated_at: Instant::from_micros(0), name: String::new() });
    }
    let (updated_at, name) = page_token::parse(token)?;
    Ok(After { updated_at, name })
}
