//! Reads of checkpoints. Writes are in `batch`, `suspend` and `event`.

use tokio_postgres::Row;

use super::statement::{CHECKPOINT_GET, CHECKPOINT_PAGE, RUN_FIND};
use super::text::{ANSWER_BYTES_MAX, Part};
use super::{Store, Wait};
use crate::domain::{CheckpointName, Error, Instant, RunId, TaskId};
use crate::scope::Scope;

/// Filter of a list of a task's checkpoints.
#[derive(Debug, Clone, Copy)]
pub enum Seen {
    /// Checkpoints visible to this attempt: those that later attempts wrote are left out.
    ByAttempt(i32),
    /// Checkpoints that this run wrote.
    OwnedBy(RunId),
}

/// Position of a page: the last checkpoint before it.
#[derive(Debug, Clone)]
pub struct After {
    /// Time of that checkpoint.
    pub updated_at: Instant,
    /// Name of that checkpoint.
    pub name: String,
}

impl Store {
    /// Task and attempt of a run. Fails with [`Error::RunNotFound`].
    pub async fn run_find(&self, scope: &Scope, run_id: RunId) -> Result<(TaskId, i32), Error> {
        let rows = self.rows(&RUN_FIND, Wait::Skip, Some(scope), &[&run_id]).await;
        let rows = rows.map_err(|fault| fault.into_read_error(scope))?;
        rows.first().map(|row| (row.get("task_id"), row.get("attempt"))).ok_or(Error::RunNotFound(run_id))
    }

    /// One checkpoint of a task, or a part of its value. `pending` includes checkpoints that are not committed.
    pub async fn checkpoint_get(
        &self,
        scope: &Scope,
        task_id: TaskId,
        name: &CheckpointName,
        pending: bool,
        part: Option<Part>,
    ) -> Result<Option<Row>, Error> {
        let (offset, limit) = Part::params(part);
        let params: [&(dyn postgres_types::ToSql + Sync); 6] =
            [&task_id, &name.as_str(), &pending, &offset, &limit, &ANSWER_BYTES_MAX];
        let rows = self.rows(&CHECKPOINT_GET, Wait::Skip, Some(scope), &params).await;
        Ok(rows.map_err(|fault| fault.into_read_error(scope))?.into_iter().next())
    }

    /// A page of a task's checkpoints, oldest first, after `after`. A row marked `beyond` exceeds the byte limit and
    /// belongs to the next page, unless it is alone.
    pub async fn checkpoint_page(
        &self,
        scope: &Scope,
        task_id: TaskId,
        seen: Seen,
        after: &After,
        limit: i64,
    ) -> Result<Vec<Row>, Error> {
        let (attempt, owner) = match seen {
            Seen::ByAttempt(attempt) => (Some(attempt), None),
            Seen::OwnedBy(run) => (None, Some(run)),
        };
        let params: [&(dyn postgres_types::ToSql + Sync); 7] =
            [&task_id, &attempt, &owner, &after.updated_at, &after.name, &limit, &ANSWER_BYTES_MAX];
        let rows = self.rows(&CHECKPOINT_PAGE, Wait::Skip, Some(scope), &params).await;
        rows.map_err(|fault| fault.into_read_error(scope))
    }
}
