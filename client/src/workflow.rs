//! Tracking records of workflow runs. The service stores them; it neither runs a workflow nor checks its transitions.

use std::time::SystemTime;

use absurd_proto::v1 as pb;
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::client::rpc;
use crate::wire::{Page, Parts};
use crate::{AbsurdClient, Error, Json, wire};

/// Status of a workflow run, as its orchestrator sets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WorkflowStatus {
    /// Not started.
    Pending,
    /// In progress.
    Running,
    /// Ended with a result.
    Completed,
    /// Ended with an error.
    Failed,
    /// Abandoned before its end.
    Cancelled,
}

impl WorkflowStatus {
    fn from_wire(status: i32) -> Option<Self> {
        match pb::WorkflowStatus::try_from(status).ok()? {
            pb::WorkflowStatus::Unspecified => None,
            pb::WorkflowStatus::Pending => Some(Self::Pending),
            pb::WorkflowStatus::Running => Some(Self::Running),
            pb::WorkflowStatus::Completed => Some(Self::Completed),
            pb::WorkflowStatus::Failed => Some(Self::Failed),
            pb::WorkflowStatus::Cancelled => Some(Self::Cancelled),
        }
    }

    fn to_wire(status: Option<Self>) -> i32 {
        let status = match status {
            None => pb::WorkflowStatus::Unspecified,
            Some(Self::Pending) => pb::WorkflowStatus::Pending,
            Some(Self::Running) => pb::WorkflowStatus::Running,
            Some(Self::Completed) => pb::WorkflowStatus::Completed,
            Some(Self::Failed) => pb::WorkflowStatus::Failed,
            Some(Self::Cancelled) => pb::WorkflowStatus::Cancelled,
        };
        status.into()
    }
}

/// A tracking record to create.
#[derive(Debug, Clone, Default)]
pub struct NewWorkflowRun {
    /// Name: a lower-case letter, then lower-case letters, digits and single underscores, at most 200 bytes.
    pub workflow_name: String,
    /// Version: letters, digits, dots, hyphens and single underscores, 1 to 100 bytes.
    pub workflow_version: String,
    /// Inputs, a JSON object; `None` means none.
    pub inputs: Option<Json>,
    /// Id of its first run, if there is one already.
    pub absurd_run_id: Option<Uuid>,
    /// User or system that starts the workflow, at most 200 bytes.
    pub created_by: Option<String>,
    /// Tags to filter by; an empty map means none.
    pub tags: Map<String, Value>,
    /// Hash of the workflow's definition, at most 128 bytes.
    pub workflow_hash: Option<String>,
}

impl NewWorkflowRun {
    /// A record with this name and version, and nothing else.
    pub fn new(name: impl Into<String>, version: impl Into<String>) -> Self {
        Self { workflow_name: name.into(), workflow_version: version.into(), ..Self::default() }
    }

    /// Sets the inputs.
    #[must_use]
    pub fn inputs(mut self, inputs: impl Into<Json>) -> Self {
        self.inputs = Some(inputs.into());
        self
    }

    /// Sets the user or system that starts the workflow.
    #[must_use]
    pub fn created_by(mut self, whom: impl Into<String>) -> Self {
        self.created_by = Some(whom.into());
        self
    }

    /// Adds a tag, or replaces the tag of this name.
    #[must_use]
    pub fn tag(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.tags.insert(name.into(), value.into());
        self
    }
}

/// Changes besides the status. A field that is `None` keeps its value; no field can be cleared.
#[derive(Debug, Clone, Default)]
pub struct WorkflowChange {
    /// New result.
    pub result: Option<Json>,
    /// New error, any JSON value.
    pub error: Option<Json>,
    /// Time at which the workflow started.
    pub started_at: Option<SystemTime>,
    /// Time at which the workflow ended.
    pub completed_at: Option<SystemTime>,
    /// Number of tasks that belong to the workflow, not negative.
    pub task_count: Option<i32>,
}

/// A tracking record, as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkflowRun {
    /// Id of the record.
    pub workflow_run_id: Uuid,
    /// Name of the workflow.
    pub workflow_name: String,
    /// Version of the workflow.
    pub workflow_version: String,
    /// Hash of the workflow's definition.
    pub workflow_hash: Option<String>,
    /// Status when the record was read.
    pub status: WorkflowStatus,
    /// Id of its first run.
    pub absurd_run_id: Option<Uuid>,
    /// Name of the queue that the workflow runs on.
    pub absurd_queue: String,
    /// Inputs, a JSON object.
    pub inputs: Option<Json>,
    /// Result; `None` until one is set.
    pub result: Option<Json>,
    /// Error; `None` until one is set.
    pub error: Option<Json>,
    /// User or system that started the workflow.
    pub created_by: Option<String>,
    /// Tags, a JSON object.
    pub tags: Option<Json>,
    /// Number of tasks that belong to the workflow, as its orchestrator counts them.
    pub task_count: Option<i32>,
    /// Time at which the record was created.
    pub created_at: Option<SystemTime>,
    /// Time at which the workflow started, as its orchestrator set it.
    pub started_at: Option<SystemTime>,
    /// Time at which the workflow ended, as its orchestrator set it.
    pub completed_at: Option<SystemTime>,
    /// Whether payloads are left out, as a list may do; [`AbsurdClient::get_workflow_run`] reads them.
    pub payloads_omitted: bool,
}

impl WorkflowRun {
    fn from_wire(record: pb::WorkflowRun) -> Result<Self, Error> {
        Ok(Self {
            workflow_run_id: wire::id(&record.workflow_run_id)?,
            status: WorkflowStatus::from_wire(record.status).ok_or_else(wire::unclear)?,
            absurd_run_id: wire::maybe_id(record.absurd_run_id)?,
            payloads_omitted: record.payloads_omitted,
            workflow_name: record.workflow_name,
            workflow_version: record.workflow_version,
            workflow_hash: record.workflow_hash,
            absurd_queue: record.absurd_queue,
            inputs: Json::from_wire(record.inputs),
            result: Json::from_wire(record.result),
            error: Json::from_wire(record.error),
            created_by: record.created_by,
            tags: Json::from_wire(record.tags),
            task_count: record.task_count,
            created_at: wire::time(record.created_at),
            started_at: wire::time(record.started_at),
            completed_at: wire::time(record.completed_at),
        })
    }
}

/// Filter and page of [`AbsurdClient::list_workflow_runs`]; the default lists all records.
#[derive(Debug, Clone, Default)]
pub struct WorkflowFilter {
    /// Lists only records of this workflow.
    pub workflow_name: Option<String>,
    /// Lists only records of this version.
    pub workflow_version: Option<String>,
    /// Lists only records with this status.
    pub status: Option<WorkflowStatus>,
    /// Lists only records that have all these tags.
    pub tags: Map<String, Value>,
    /// Lists only records created at this time or later.
    pub created_from: Option<SystemTime>,
    /// Lists only records created before this time.
    pub created_before: Option<SystemTime>,
    /// Longest page, 1 to 1,000 records; 0 means 100.
    pub page_size: i32,
    /// Token of the page before; empty for the first page.
    pub page_token: String,
}

fn object(map: Map<String, Value>) -> Option<pb::Json> {
    (!map.is_empty()).then(|| Json::from(Value::Object(map)).into_wire())
}

impl AbsurdClient {
    /// Creates a record with status pending for the client's queue. Returns its id. Tasks are linked to it with
    /// [`SpawnOptions::workflow_run_id`](crate::SpawnOptions::workflow_run_id).
    pub async fn create_workflow_run(&self, new: NewWorkflowRun) -> Result<Uuid, Error> {
        let request = pb::CreateWorkflowRunRequest {
            queue: self.queue(),
            // The client chooses the id, so that the call can be repeated.
            workflow_run_id: Uuid::new_v4().to_string(),
            workflow_name: new.workflow_name,
            workflow_version: new.workflow_version,
            inputs: new.inputs.map(Json::into_wire),
            absurd_run_id: new.absurd_run_id.map(|id| id.to_string()),
            created_by: new.created_by,
            tags: object(new.tags),
            workflow_hash: new.workflow_hash,
        };
        wire::id(&rpc!(self.create_workflow_run(request))?.workflow_run_id)
    }

    /// Changes a record. Returns false, and changes nothing, when there is no such record.
    pub async fn update_workflow_run_status(
        &self,
        id: Uuid,
        status: WorkflowStatus,
        change: WorkflowChange,
    ) -> Result<bool, Error> {
        let request = pb::UpdateWorkflowRunStatusRequest {
            workflow_run_id: id.to_string(),
            status: WorkflowStatus::to_wire(Some(status)),
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

    /// Reads a record with all its payloads; `None` when there is no such record.
    pub async fn get_workflow_run(&self, id: Uuid) -> Result<Option<WorkflowRun>, Error> {
        let request = pb::GetWorkflowRunRequest { workflow_run_id: id.to_string(), part: None };
        let Some(mut run) = rpc!(self.get_workflow_run(request))?.workflow_run else { return Ok(None) };
        if run.payloads_omitted {
            use pb::get_workflow_run_request::Part;
            let (tags, inputs) = (run.tags.take(), run.inputs.take());
            let (result, error) = (run.result.take(), run.error.take());
            run.payloads_omitted = false;
            run.tags = self.payload(id, tags, Part::TagsRange, |run| run.tags).await?;
            run.inputs = self.payload(id, inputs, Part::InputsRange, |run| run.inputs).await?;
            run.result = self.payload(id, result, Part::ResultRange, |run| run.result).await?;
            run.error = self.payload(id, error, Part::ErrorRange, |run| run.error).await?;
        }
        WorkflowRun::from_wire(run).map(Some)
    }

    /// A payload of a record: the known one, or else the one read in parts, because it did not fit into the answer.
    async fn payload(
        &self,
        id: Uuid,
        known: Option<pb::Json>,
        part: impl Fn(pb::TextRange) -> pb::get_workflow_run_request::Part,
        of: impl Fn(pb::WorkflowRun) -> Option<pb::Json>,
    ) -> Result<Option<pb::Json>, Error> {
        if known.is_some() {
            return Ok(known);
        }
        let ask = |range| pb::GetWorkflowRunRequest { workflow_run_id: id.to_string(), part: Some(part(range)) };
        let request = ask(pb::TextRange { offset: 0, limit: 1 });
        let length = rpc!(self.get_workflow_run(request))?.length;
        if length == 0 {
            return Ok(None);
        }
        let mut parts = Parts::of(length);
        while let Some(range) = parts.wanted() {
            let request = ask(range);
            parts.push(rpc!(self.get_workflow_run(request))?.workflow_run.and_then(&of))?;
        }
        Ok(Some(parts.whole().into_wire()))
    }

    /// Lists a page of records of all queues, newest first. Payloads that would take a record past 3 MiB are left out.
    pub async fn list_workflow_runs(&self, filter: WorkflowFilter) -> Result<Page<WorkflowRun>, Error> {
        let request = pb::ListWorkflowRunsRequest {
            page_size: filter.page_size,
            page_token: filter.page_token,
            workflow_name: filter.workflow_name.unwrap_or_default(),
            workflow_version: filter.workflow_version.unwrap_or_default(),
            status: WorkflowStatus::to_wire(filter.status),
            tags: object(filter.tags),
            created_from: filter.created_from.map(Into::into),
            created_before: filter.created_before.map(Into::into),
        };
        let page = rpc!(self.list_workflow_runs(request))?;
        Ok(Page {
            items: page.workflow_runs.into_iter().map(WorkflowRun::from_wire).collect::<Result<_, _>>()?,
            next_page_token: page.next_page_token,
        })
    }
}
