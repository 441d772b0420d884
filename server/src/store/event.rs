//! Events: emissions, waits, and wakes. The end of a task is an event too, for the runs that wait for it.

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

/// Upper bound of runs that one transaction wakes.
const WOKEN_MAX: i32 = 1000;

/// Outcome of one transaction of an emission.
#[derive(Debug, Clone, Copy)]
pub struct Emission {
    /// False if an earlier call had emitted the event. A continuation reports true.
    pub applied: bool,
    /// Number of runs woken in this transaction.
    pub woken: i64,
    /// Whether further runs wait for the event.
    pub more: bool,
}

/// A run that starts to wait, as a step.
#[derive(Debug, Clone, Copy)]
pub struct StepWait<'a> {
    /// Run that waits, with the claim that it shows.
    pub run: &'a RunRef,
    /// Name of the step, under which the result is stored.
    pub step: &'a CheckpointName,
    /// Longest wait; `None` means no limit.
    pub timeout: Option<Duration>,
}

/// Filter of a list of waits.
#[derive(Debug, Clone)]
pub enum WaitsOf {
    /// Waits of the runs of this task.
    Task(TaskId),
    /// Waits for this event.
    Event(EventName),
}

impl Store {
    /// A page of waits in order of run and step, after `after`. A row marked `beyond` exceeds the byte limit and
    /// belongs to the next page, unless it is alone.
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

    /// Makes a run wait for the end of a task, as a step. The payload describes how the task ended. Repeating the call
    /// has no further effect.
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
        // The awaited queue may be locked too. This check needs no connection.
        self.admit(awaited_queue.as_str())?;
        let tx = self.begin(lock_wait).await?;
        let outcome = match tx.rows(&TASK_AWAIT, Wait::Block, Some(scope), &params).await {
            Ok(rows) => match rows.first() {
                Some(row) if row.get("found_task") => Ok(awaited(wait.run, row)),
                Some(_) => Ok(Err(Error::TaskNotFound(task_id))),
                None => Err(Fault::Bug("no answer".into())),
            },
            // The function raises only for a wait that it refuses: a task cannot wait for its own end.
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

    /// Whether any run waits for the end of a task.
    pub async fn task_list_awaited(&self) -> Result<bool, Fault> {
        let rows = self.rows(&TASK_LIST_AWAITED, Wait::Skip, None, &[]).await?;
        Ok(rows.first().is_some_and(|row| row.get("awaited")))
    }

    /// Queues whose tasks are awaited, at most 1,000.
    pub async fn task_list_awaited_queues(&self) -> Result<Vec<String>, Fault> {
        let rows = self.rows(&TASK_LIST_AWAITED_QUEUES, Wait::Skip, None, &[]).await?;
        Ok(rows.iter().map(|row| row.get("queue_name")).collect())
    }

    /// Wakes runs whose awaited tasks have ended or are gone, and returns the queues of the woken runs. `queue` and
    /// `tasks` restrict the awaited tasks. `limit` holds per awaited queue and is shared by the waiting queues, with at
    /// least 20 waits for each.
    pub async fn task_settle_awaited(
        &self,
        queue: Option<&str>,
        tasks: Option<&[TaskId]>,
        limit: i32,
    ) -> Result<Vec<String>, Fault> {
        let rows = self.rows(&TASK_SETTLE_AWAITED, Wait::Skip, None, &[&queue, &tasks, &limit]).await?;
        Ok(rows.iter().map(|row| row.get("waiting_queue")).collect())
    }

    /// Emits events of different names, and wakes up to 1,000 of the runs that wait for them. Returns one answer per
    /// item, in order; `None` if another transaction holds the event. Waits for locked runs at most `lock_wait`, and
    /// for locked events only with [`Wait::Block`].
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

    /// Wakes further runs that wait for an event emitted before.
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

    /// Emissions that have not yet woken all waiting runs, as pairs of queue and event. At most 10 per queue, and 1,000
    /// in all.
    pub async fn event_list_unfinished(&self) -> Result<Vec<(String, String)>, Fault> {
        let rows = self.rows(&EVENT_LIST_UNFINISHED, Wait::Skip, None, &[]).await?;
        Ok(rows.iter().map(|row| (row.get("queue_name"), row.get("event_name"))).collect())
    }
}

fn emission(row: &Row, applied: bool) -> Emission {
    Emission { applied, woken: row.get("woken"), more: row.get("more") }
}
