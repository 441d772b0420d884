//! Events: emitting them, and waking those who wait. The end of a task is one too, for whoever waits for it.

use std::collections::HashMap;
use std::time::Duration;

use postgres_types::ToSql;
use tokio_postgres::Row;

use super::batch::RunRef;
use super::statement::{
    EVENT_EMIT, EVENT_EMIT_MORE, EVENT_LIST_UNFINISHED, TASK_AWAIT, TASK_LIST_AWAITED, TASK_LIST_AWAITED_QUEUES,
    TASK_SETTLE_AWAITED, WAIT_LIST_EVENT, WAIT_LIST_TASK,
};
use super::suspend::{Awaited, awaited, millis};
use super::text::ANSWER_BYTES_MAX;
use super::{Fault, Store, Wait};
use crate::domain::{CheckpointName, Digest, Error, EventName, JsonText, QueueName, RunId, TaskId};
use crate::scope::Scope;

/// Runs that one transaction wakes at most.
const WOKEN_MAX: i32 = 1000;

/// What a batch of an emission did.
#[derive(Debug, Clone, Copy)]
pub struct Emission {
    /// False when the event had been emitted before.
    pub applied: bool,
    /// Runs that were woken.
    pub woken: i64,
    /// More of them wait.
    pub more: bool,
}

/// A run that waits, as a step.
#[derive(Debug, Clone, Copy)]
pub struct StepWait<'a> {
    /// The run.
    pub run: &'a RunRef,
    /// Name of the step.
    pub step: &'a CheckpointName,
    /// Longest wait.
    pub timeout: Option<Duration>,
}

/// Which waits.
#[derive(Debug, Clone)]
pub enum WaitsOf {
    /// Those of a task.
    Task(TaskId),
    /// Those for an event.
    Event(EventName),
}

impl Store {
    /// A page of waits after a run and a step; the last row may be the first of the next page (`beyond`).
    pub async fn wait_list(
        &self,
        scope: &Scope,
        of: &WaitsOf,
        after: (RunId, &str),
        limit: i64,
    ) -> Result<Vec<Row>, Error> {
        let name;
        let (statement, of): (_, &(dyn ToSql + Sync)) = match of {
            WaitsOf::Task(task_id) => (&WAIT_LIST_TASK, task_id),
            WaitsOf::Event(event) => {
                name = event.as_str();
                (&WAIT_LIST_EVENT, &name)
            }
        };
        let params: [&(dyn ToSql + Sync); 5] = [of, &after.0, &after.1, &limit, &ANSWER_BYTES_MAX];
        let rows = self.rows(statement, Wait::Skip, Some(scope), &params).await;
        rows.map_err(|fault| fault.into_read_error(scope))
    }

    /// Waits for the end of a task under the name of a step; the payload is how it ended. Repeating it is harmless.
    pub async fn task_await(
        &self,
        scope: &Scope,
        wait: &StepWait<'_>,
        (awaited_queue, task_id): (&QueueName, TaskId),
        lock_wait: Duration,
    ) -> Result<Result<Awaited, Error>, Fault> {
        let (digest, timeout) = (wait.run.digest.as_ref().map(Digest::as_str), wait.timeout.map(millis));
        let params: [&(dyn ToSql + Sync); 7] = [
            &scope.queue().as_str(),
            &wait.run.run_id,
            &digest,
            &wait.step.as_str(),
            &awaited_queue.as_str(),
            &task_id,
            &timeout,
        ];
        // The other queue too may be locked; no connection is held meanwhile.
        self.admit(awaited_queue.as_str())?;
        let tx = self.begin(lock_wait).await?;
        let outcome = match tx.rows(&TASK_AWAIT, Wait::Block, Some(scope), &params).await {
            Ok(rows) => match rows.first() {
                Some(row) if row.get("found_task") => Ok(awaited(wait.run, row)),
                Some(_) => Ok(Err(Error::TaskNotFound(task_id))),
                None => Err(Fault::Bug("no answer".into())),
            },
            // The only thing that this function refuses by itself.
            Err(Fault::Raised { message, .. }) => Ok(Err(Error::invalid("awaited_task_id", message))),
            Err(fault) => Err(fault),
        };
        match outcome {
            Ok(Ok(awaited)) => tx.commit().await.map(|()| Ok(awaited)),
            refused => {
                tx.rollback().await;
                if matches!(refused, Err(Fault::Locked)) {
                    self.suspect(awaited_queue.as_str()).await;
                }
                refused
            }
        }
    }

    /// Whether a run waits for a task at all.
    pub async fn task_list_awaited(&self) -> Result<bool, Fault> {
        let rows = self.rows(&TASK_LIST_AWAITED, Wait::Skip, None, &[]).await?;
        Ok(rows.first().is_some_and(|row| row.get("awaited")))
    }

    /// Queues of which tasks are awaited, at most 1,000.
    pub async fn task_list_awaited_queues(&self) -> Result<Vec<String>, Fault> {
        let rows = self.rows(&TASK_LIST_AWAITED_QUEUES, Wait::Skip, None, &[]).await?;
        Ok(rows.iter().map(|row| row.get("queue_name")).collect())
    }

    /// Wakes runs whose awaited tasks have ended, those of a queue or all; says which queues have woken runs.
    pub async fn task_settle_awaited(
        &self,
        queue: Option<&str>,
        tasks: Option<&[TaskId]>,
        limit: i32,
    ) -> Result<Vec<String>, Fault> {
        let rows = self.rows(&TASK_SETTLE_AWAITED, Wait::Skip, None, &[&queue, &tasks, &limit]).await?;
        Ok(rows.iter().map(|row| row.get("waiting_queue")).collect())
    }

    /// Emits events of different names and wakes up to a limit of those who wait for them; one answer each, in order, `None`
    /// where somebody holds the event. Rows are waited for at most `lock_wait`; an event that another transaction has
    /// emitted, only if `wait` says so.
    pub async fn event_emit(
        &self,
        scope: &Scope,
        items: &[(&EventName, Option<&JsonText>)],
        wait: Wait,
        lock_wait: Duration,
    ) -> Result<Vec<Option<Emission>>, Fault> {
        let names: Vec<&str> = items.iter().map(|(event, _)| event.as_str()).collect();
        let payloads: Vec<Option<&JsonText>> = items.iter().map(|(_, payload)| *payload).collect();
        let params: [&(dyn ToSql + Sync); 4] = [&scope.queue().as_str(), &names, &payloads, &WOKEN_MAX];
        let rows = self.rows_within(lock_wait, &EVENT_EMIT, wait, Some(scope), &params).await?;
        let found: HashMap<&str, Emission> =
            rows.iter().map(|row| (row.get("event_name"), emission(row, row.get("applied")))).collect();
        Ok(names.iter().map(|name| found.get(name).copied()).collect())
    }

    /// Wakes the next of those who wait for an event that was emitted.
    pub async fn event_emit_more(
        &self,
        scope: &Scope,
        event: &EventName,
        lock_wait: Duration,
    ) -> Result<Emission, Fault> {
        let params: [&(dyn ToSql + Sync); 3] = [&scope.queue().as_str(), &event.as_str(), &WOKEN_MAX];
        let rows = self.rows_within(lock_wait, &EVENT_EMIT_MORE, Wait::Block, Some(scope), &params).await?;
        rows.first().map(|row| emission(row, true)).ok_or_else(|| Fault::Bug("no answer".into()))
    }

    /// Emissions that have not woken all who wait, at most 100: queues and events.
    pub async fn event_list_unfinished(&self) -> Result<Vec<(String, String)>, Fault> {
        let rows = self.rows(&EVENT_LIST_UNFINISHED, Wait::Skip, None, &[]).await?;
        Ok(rows.iter().map(|row| (row.get("queue_name"), row.get("event_name"))).collect())
    }
}

fn emission(row: &Row, applied: bool) -> Emission {
    Emission { applied, woken: row.get("woken"), more: row.get("more") }
}
