//! Tracking records of workflow runs. They belong to no queue's tables, so methods take a [`Caller`] instead of a
//! scope.

use tokio_postgres::Row;
use uuid::Uuid;

use super::statement::{WORKFLOW_CREATE, WORKFLOW_GET, WORKFLOW_GET_PART, WORKFLOW_LIST, WORKFLOW_UPDATE};
use super::text::{ANSWER_BYTES_MAX, Part, cut};
use super::{Fault, Store, Wait};
use crate::domain::{Error, Instant, JsonText, QueueName, RunId, WorkflowName, WorkflowVersion};
use crate::scope::Caller;

/// A new record of a workflow run.
#[derive(Debug, Clone)]
pub struct NewWorkflowRun {
    /// Id of the workflow run, chosen by the caller or minted.
    pub id: Uuid,
    /// Queue of its first run. It need not exist.
    pub queue: QueueName,
    /// Name of the workflow.
    pub name: WorkflowName,
    /// Version of the workflow.
    pub version: WorkflowVersion,
    /// Hash of the workflow's definition, at most 128 bytes.
    pub hash: Option<String>,
    /// First run of the workflow, if it exists already.
    pub run_id: Option<RunId>,
    /// JSON object with the inputs of the workflow run.
    pub inputs: Option<JsonText>,
    /// Name of its creator, as the caller gives it; at most 200 bytes.
    pub created_by: Option<String>,
    /// JSON object of tags, searched by [`WorkflowFilter::tags`].
    pub tags: Option<JsonText>,
}

/// Changes of a record. `None` leaves a field as it is.
#[derive(Debug, Clone, Default)]
pub struct WorkflowChange {
    /// New state, in its stored form.
    pub status: Option<&'static str>,
    /// Result of the workflow run.
    pub result: Option<JsonText>,
    /// Error of the workflow run.
    pub error: Option<JsonText>,
    /// Start of the workflow run.
    pub started_at: Option<Instant>,
    /// End of the workflow run.
    pub completed_at: Option<Instant>,
    /// Number of its tasks, as its orchestrator counts them.
    pub task_count: Option<i32>,
}

/// Filter of a list of records. `None` matches all.
#[derive(Debug, Clone, Default)]
pub struct WorkflowFilter {
    /// Exact name of the workflow.
    pub name: Option<String>,
    /// Exact version of the workflow.
    pub version: Option<String>,
    /// State, in its stored form.
    pub status: Option<&'static str>,
    /// Tags that the record must contain, by jsonb's `@>`.
    pub tags: Option<JsonText>,
    /// Earliest creation time, inclusive.
    pub from: Option<Instant>,
    /// Latest creation time, exclusive.
    pub before: Option<Instant>,
}

impl Store {
    /// Creates a record. Repeating it with the same name, version and inputs has no further effect; the id of another
    /// record is refused.
    pub async fn workflow_create(&self, _caller: &Caller, new: &NewWorkflowRun) -> Result<(), Error> {
        let (queue, name, version) = (new.queue.as_str(), new.name.as_str(), new.version.as_str());
        let params: [&(dyn postgres_types::ToSql + Sync); 9] =
            [&new.id, &name, &version, &new.hash, &new.run_id, &queue, &new.inputs, &new.created_by, &new.tags];
        let rows = self.rows(&WORKFLOW_CREATE, Wait::Skip, None, &params).await.map_err(Fault::into_database_error)?;
        if rows.first().is_some_and(|row| row.get("same")) {
            return Ok(());
        }
        Err(Error::invalid("workflow_run_id", "belongs to another workflow run"))
    }

    /// Changes a record, and returns whether it exists.
    pub async fn workflow_update(&self, _caller: &Caller, id: Uuid, change: &WorkflowChange) -> Result<bool, Error> {
        let params: [&(dyn postgres_types::ToSql + Sync); 7] = [
            &id,
            &change.status,
            &change.result,
            &change.error,
            &change.started_at,
            &change.completed_at,
            &change.task_count,
        ];
        Ok(!self
            .rows(&WORKFLOW_UPDATE, Wait::Skip, None, &params)
            .await
            .map_err(Fault::into_database_error)?
            .is_empty())
    }

    /// One record. Payloads that would take it past `bytes` are left out, in the order tags, inputs, result, error.
    pub async fn workflow_get(&self, _caller: &Caller, id: Uuid, bytes: i32) -> Result<Option<Row>, Error> {
        Ok(self
            .rows(&WORKFLOW_GET, Wait::Skip, None, &[&id, &bytes])
            .await
            .map_err(Fault::into_database_read_error)?
            .into_iter()
            .next())
    }

    /// A part of one payload of a record, and the length of the whole payload in code points. `payload` is the name of
    /// its column.
    pub async fn workflow_get_part(
        &self,
        _caller: &Caller,
        id: Uuid,
        payload: &str,
        part: Part,
    ) -> Result<(Option<String>, i64), Error> {
        let params: [&(dyn postgres_types::ToSql + Sync); 4] = [&id, &payload, &part.offset, &part.limit];
        let rows =
            self.rows(&WORKFLOW_GET_PART, Wait::Skip, None, &params).await.map_err(Fault::into_database_read_error)?;
        Ok(rows.first().map_or((None, 0), |row| {
            (row.get::<_, Option<String>>("part").map(|text| cut(text, ANSWER_BYTES_MAX)), row.get("length"))
        }))
    }

    /// A page of records, newest first, after `after`. A row marked `beyond` exceeds the byte limit and belongs to the
    /// next page, unless it is alone.
    pub async fn workflow_list(
        &self,
        _caller: &Caller,
        filter: &WorkflowFilter,
        after: (Instant, Uuid),
        limit: i64,
    ) -> Result<Vec<Row>, Error> {
        let params: [&(dyn postgres_types::ToSql + Sync); 10] = [
            &filter.name,
            &filter.version,
            &filter.status,
            &filter.tags,
            &filter.from,
            &filter.before,
            &after.0,
            &after.1,
            &limit,
            &ANSWER_BYTES_MAX,
        ];
        self.rows(&WORKFLOW_LIST, Wait::Skip, None, &params).await.map_err(Fault::into_database_read_error)
    }
}
