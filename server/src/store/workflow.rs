//! Tracking records of workflow runs.

use tokio_postgres::Row;
use uuid::Uuid;

use super::statement::{WORKFLOW_CREATE, WORKFLOW_GET, WORKFLOW_GET_PART, WORKFLOW_LIST, WORKFLOW_UPDATE};
use super::text::{ANSWER_BYTES_MAX, Part, cut};
use super::{Fault, Store, Wait};
use crate::domain::{Error, Instant, JsonText, QueueName, RunId, WorkflowName, WorkflowVersion};
use crate::scope::Caller;

/// A record to be made.
#[derive(Debug, Clone)]
pub struct NewWorkflowRun {
    /// Id.
    pub id: Uuid,
    /// Queue.
    pub queue: QueueName,
    /// Name.
    pub name: WorkflowName,
    /// Version.
    pub version: WorkflowVersion,
    /// Hash of the definition.
    pub hash: Option<String>,
    /// First run.
    pub run_id: Option<RunId>,
    /// Inputs.
    pub inputs: Option<JsonText>,
    /// Who.
    pub created_by: Option<String>,
    /// Tags.
    pub tags: Option<JsonText>,
}

/// What changes; None stays.
#[derive(Debug, Clone, Default)]
pub struct WorkflowChange {
    /// State, as stored.
    pub status: Option<&'static str>,
    /// Result.
    pub result: Option<JsonText>,
    /// Error.
    pub error: Option<JsonText>,
    /// Beginning.
    pub started_at: Option<Instant>,
    /// End.
    pub completed_at: Option<Instant>,
    /// Tasks.
    pub task_count: Option<i32>,
}

/// Which records.
#[derive(Debug, Clone, Default)]
pub struct WorkflowFilter {
    /// Of this name.
    pub name: Option<String>,
    /// Of this version.
    pub version: Option<String>,
    /// In this state.
    pub status: Option<&'static str>,
    /// With at least these tags.
    pub tags: Option<JsonText>,
    /// Made then or later.
    pub from: Option<Instant>,
    /// Made before then.
    pub before: Option<Instant>,
}

impl Store {
    /// Makes a record; repeating it is harmless.
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

    /// Changes a record; says whether there is one.
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

    /// One record, with as many of its payloads as fit into so many bytes.
    pub async fn workflow_get(&self, _caller: &Caller, id: Uuid, bytes: i32) -> Result<Option<Row>, Error> {
        Ok(self
            .rows(&WORKFLOW_GET, Wait::Skip, None, &[&id, &bytes])
            .await
            .map_err(Fault::into_database_read_error)?
            .into_iter()
            .next())
    }

    /// A part of one payload of a record, by the name of its column; and the length of the whole in code points.
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

    /// A page of records, newest first, after a place; the last row may be the first of the next page (`beyond`).
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
