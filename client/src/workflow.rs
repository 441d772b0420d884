//! Tracking records of workflow runs.

use std::time::SystemTime;

use absurd_proto::v1 as pb;
use uuid::Uuid;

use crate::client::rpc;
use crate::{AbsurdClient, Error, Json, task};

/// A record to be made.
#[derive(Debug, Clone, Default)]
pub struct NewWorkflowRun {
    /// Name: a lower-case letter, then lower-case letters, digits, single underscores.
    pub workflow_name: String,
    /// Version: letters, digits, dots, hyphens, single underscores.
    pub workflow_version: String,
    /// A JSON object.
    pub inputs: Option<Json>,
    /// Its first run, when there is one already.
    pub absurd_run_id: Option<Uuid>,
    /// Who begins it.
    pub created_by: Option<String>,
    /// A JSON object.
    pub tags: Option<Json>,
    /// Hash of the definition.
    pub workflow_hash: Option<String>,
}

/// What changes; None stays.
#[derive(Debug, Clone, Default)]
pub struct WorkflowChange {
    /// Where it stands.
    pub status: Option<pb::WorkflowStatus>,
    /// Result.
    pub result: Option<Json>,
    /// Error.
    pub error: Option<Json>,
    /// When it began.
    pub started_at: Option<SystemTime>,
    /// When it ended.
    pub completed_at: Option<SystemTime>,
    /// Tasks that belong to it.
    pub task_count: Option<i32>,
}

impl AbsurdClient {
    /// Makes a record with status pending; returns its id. Tasks are linked to it by the header `workflow_run_id`.
    pub async fn create_workflow_run(&self, new: NewWorkflowRun) -> Result<Uuid, Error> {
        let request = pb::CreateWorkflowRunRequest {
            queue: self.queue_name().to_owned(),
            // Chosen here, so that the call may be repeated.
            workflow_run_id: Uuid::new_v4().to_string(),
            workflow_name: new.workflow_name,
            workflow_version: new.workflow_version,
            inputs: new.inputs.map(Json::into_wire),
            absurd_run_id: new.absurd_run_id.map(|id| id.to_string()),
            created_by: new.created_by,
            tags: new.tags.map(Json::into_wire),
            workflow_hash: new.workflow_hash,
        };
        task::id(&rpc!(self.create_workflow_run(request))?.workflow_run_id)
    }

    /// Changes a record; says whether there is one.
    pub async fn update_workflow_run_status(&self, id: Uuid, change: WorkflowChange) -> Result<bool, Error> {
        let request = pb::UpdateWorkflowRunStatusRequest {
            workflow_run_id: id.to_string(),
            status: change.status.unwrap_or_default().into(),
            result: change.result.map(Json::into_wire),
            error: change.error.map(Json::into_wire),
            started_at: change.started_at.map(Into::into),
            completed_at: change.completed_at.map(Into::into),
            task_count: change.task_count,
        };
        let found = rpc!(self.update_workflow_run_status(request))?.found;
        if !found {
            tracing::warn!(workflow_run.id = %id, "there is no such workflow run; nothing was changed");
        }
        Ok(found)
    }

    /// Reads a record.
    pub async fn get_workflow_run(&self, id: Uuid) -> Result<Option<pb::WorkflowRun>, Error> {
        let request = pb::GetWorkflowRunRequest { workflow_run_id: id.to_string() };
        Ok(rpc!(self.get_workflow_run(request))?.workflow_run)
    }

    /// Lists records, newest first; with the token of the next page, empty after the last.
    pub async fn list_workflow_runs(
        &self,
        request: pb::ListWorkflowRunsRequest,
    ) -> Result<(Vec<pb::WorkflowRun>, String), Error> {
        let page = rpc!(self.list_workflow_runs(request))?;
        Ok((page.workflow_runs, page.next_page_token))
    }
}
