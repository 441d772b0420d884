//! The RPCs about workflow runs, which are tracking records beside the engine.

use absurd_proto::v1 as pb;
use tokio_postgres::Row;
use uuid::Uuid;

use super::convert::{at, instant, json, part, stored_json};
use super::page_token;
use super::service::Service;
use crate::domain::id::{bounded, parse_uuid};
use crate::domain::{Error, Instant, JsonText, QueueName, RunId, WorkflowName, WorkflowVersion};
use crate::scope::Caller;
use crate::store::text::ANSWER_BYTES_MAX;
use crate::store::workflow::{NewWorkflowRun, WorkflowChange, WorkflowFilter};

const CREATED_BY_BYTES_MAX: usize = 200;
const HASH_BYTES_MAX: usize = 128;

impl Service {
    pub(super) async fn create_workflow(
        &self,
        request: pb::CreateWorkflowRunRequest,
    ) -> Result<pb::CreateWorkflowRunResponse, Error> {
        let id = if request.workflow_run_id.is_empty() {
            Uuid::new_v4()
        } else {
            parse_uuid("workflow_run_id", &request.workflow_run_id)?
        };
        let text = |field: &str, value: Option<String>, max: usize| -> Result<Option<String>, Error> {
            value.map(|value| bounded(field, &value, max).map(|()| value)).transpose()
        };
        let new = NewWorkflowRun {
            id,
            queue: QueueName::parse("queue", &request.queue)?,
            name: WorkflowName::parse("workflow_name", &request.workflow_name)?,
            version: WorkflowVersion::parse("workflow_version", &request.workflow_version)?,
            hash: text("workflow_hash", request.workflow_hash, HASH_BYTES_MAX)?,
            run_id: request.absurd_run_id.map(|id| parse_uuid("absurd_run_id", &id)).transpose()?,
            inputs: self.object("inputs", request.inputs)?,
            created_by: text("created_by", request.created_by, CREATED_BY_BYTES_MAX)?,
            tags: self.object("tags", request.tags)?,
        };
        self.engine.store.workflow_create(&Caller::anonymous(), &new).await?;
        Ok(pb::CreateWorkflowRunResponse { workflow_run_id: id.to_string() })
    }

    /// Parses a JSON object; an empty one counts as absent.
    fn object(&self, field: &str, value: Option<pb::Json>) -> Result<Option<JsonText>, Error> {
        let limit = self.limits.payload();
        let object = value.map(|json| JsonText::parse_object(field, json.text, limit)).transpose()?;
        let is_empty = |json: &JsonText| json.as_str().chars().filter(|c| !c.is_ascii_whitespace()).eq("{}".chars());
        Ok(object.filter(|json| !is_empty(json)))
    }

    pub(super) async fn update_workflow(
        &self,
        request: pb::UpdateWorkflowRunStatusRequest,
    ) -> Result<pb::UpdateWorkflowRunStatusResponse, Error> {
        let id = parse_uuid("workflow_run_id", &request.workflow_run_id)?;
        if request.task_count.is_some_and(|count| count < 0) {
            return Err(Error::invalid("task_count", "must not be negative"));
        }
        let limit = self.limits.payload();
        let time = |field: &str, value: Option<prost_types::Timestamp>| value.map(|at| instant(field, &at)).transpose();
        let change = WorkflowChange {
            status: status(request.status)?,
            result: json("result", request.result, limit)?,
            error: json("error", request.error, limit)?,
            started_at: time("started_at", request.started_at)?,
            completed_at: time("completed_at", request.completed_at)?,
            task_count: request.task_count,
        };
        let found = self.engine.store.workflow_update(&Caller::anonymous(), id, &change).await?;
        Ok(pb::UpdateWorkflowRunStatusResponse { found })
    }

    pub(super) async fn one_workflow(
        &self,
        request: pb::GetWorkflowRunRequest,
    ) -> Result<pb::GetWorkflowRunResponse, Error> {
        use pb::get_workflow_run_request::Part as Asked;
        let id = parse_uuid("workflow_run_id", &request.workflow_run_id)?;
        let (payload, range) = match request.part {
            None => return self.whole_workflow(id).await,
            Some(Asked::TagsRange(range)) => ("tags", range),
            Some(Asked::InputsRange(range)) => ("inputs", range),
            Some(Asked::ResultRange(range)) => ("result", range),
            Some(Asked::ErrorRange(range)) => ("error", range),
        };
        let Some(part) = part(&format!("{payload}_range"), Some(range))? else { return self.whole_workflow(id).await };
        let (store, caller) = (&self.engine.store, Caller::anonymous());
        // With 0 bytes for payloads the record has none; the requested part is added below.
        let mut record = store.workflow_get(&caller, id, 0).await?.as_ref().map(pb_workflow);
        let (text, length) = store.workflow_get_part(&caller, id, payload, part).await?;
        let json = text.map(|text| pb::Json { text });
        if let Some(record) = &mut record {
            match payload {
                "tags" => record.tags = json,
                "inputs" => record.inputs = json,
                "result" => record.result = json,
                _ => record.error = json,
            }
        }
        Ok(pb::GetWorkflowRunResponse { workflow_run: record, length })
    }

    async fn whole_workflow(&self, id: Uuid) -> Result<pb::GetWorkflowRunResponse, Error> {
        let row = self.engine.store.workflow_get(&Caller::anonymous(), id, ANSWER_BYTES_MAX).await?;
        Ok(pb::GetWorkflowRunResponse { workflow_run: row.as_ref().map(pb_workflow), length: 0 })
    }

    pub(super) async fn workflows(
        &self,
        request: pb::ListWorkflowRunsRequest,
    ) -> Result<pb::ListWorkflowRunsResponse, Error> {
        let limit = self.limits.page(request.page_size)?;
        let after = parse_token(&request.page_token)?;
        let named = |text: String| Some(text).filter(|text| !text.is_empty());
        let name = named(request.workflow_name).map(|name| WorkflowName::parse("workflow_name", &name)).transpose()?;
        let version = named(request.workflow_version)
            .map(|text| WorkflowVersion::parse("workflow_version", &text))
            .transpose()?;
        let filter = WorkflowFilter {
            name: name.map(|name| name.as_str().to_owned()),
            version: version.map(|version| version.as_str().to_owned()),
            status: status(request.status)?,
            tags: self.object("tags", request.tags)?,
            from: request.created_from.map(|at| instant("created_from", &at)).transpose()?,
            before: request.created_before.map(|at| instant("created_before", &at)).transpose()?,
        };
        let rows = self.engine.store.workflow_list(&Caller::anonymous(), &filter, after, limit).await?;
        let (page, last) = page_token::cut(&rows, limit);
        Ok(pb::ListWorkflowRunsResponse {
            workflow_runs: page.iter().map(pb_workflow).collect(),
            next_page_token: last.map(token_of).unwrap_or_default(),
        })
    }
}

/// The stored name of a status; `None`: unspecified.
fn status(value: i32) -> Result<Option<&'static str>, Error> {
    Ok(match pb::WorkflowStatus::try_from(value) {
        Ok(pb::WorkflowStatus::Unspecified) => None,
        Ok(pb::WorkflowStatus::Pending) => Some("pending"),
        Ok(pb::WorkflowStatus::Running) => Some("running"),
        Ok(pb::WorkflowStatus::Completed) => Some("completed"),
        Ok(pb::WorkflowStatus::Failed) => Some("failed"),
        Ok(pb::WorkflowStatus::Cancelled) => Some("cancelled"),
        Err(_) => return Err(Error::invalid("status", "is not a known status")),
    })
}

fn pb_workflow(row: &Row) -> pb::WorkflowRun {
    let status = match row.get::<_, &str>("status") {
        "running" => pb::WorkflowStatus::Running,
        "completed" => pb::WorkflowStatus::Completed,
        "failed" => pb::WorkflowStatus::Failed,
        "cancelled" => pb::WorkflowStatus::Cancelled,
        _ => pb::WorkflowStatus::Pending,
    };
    pb::WorkflowRun {
        workflow_run_id: row.get::<_, Uuid>("workflow_run_id").to_string(),
        workflow_name: row.get("workflow_name"),
        workflow_version: row.get("workflow_version"),
        workflow_hash: row.get("workflow_hash"),
        status: status.into(),
        absurd_run_id: row.get::<_, Option<RunId>>("absurd_run_id").map(|id| id.to_string()),
        absurd_queue: row.get("absurd_queue"),
        inputs: stored_json(row, "inputs"),
        result: stored_json(row, "result"),
        error: stored_json(row, "error"),
        created_by: row.get("created_by"),
        tags: stored_json(row, "tags"),
        task_count: row.get("task_count"),
        created_at: at(row, "created_at"),
        started_at: at(row, "started_at"),
        completed_at: at(row, "completed_at"),
        payloads_omitted: row.get("omitted"),
    }
}

fn token_of(row: &Row) -> String {
    page_token::encode(row.get("created_at"), &row.get::<_, Uuid>("workflow_run_id").to_string())
}

fn parse_token(token: &str) -> Result<(Instant, Uuid), Error> {
    if token.is_empty() {
        return Ok((Instant::NEVER, Uuid::max()));
    }
    let (created_at, id) = page_token::parse(token)?;
    Ok((created_at, Uuid::parse_str(&id).map_err(|_| page_token::wrong())?))
}
