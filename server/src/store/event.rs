//! Events: waiting for one as a step of a run, and emitting one. The end of a task is one too, for whoever waits for it.

use std::time::Duration;

use super::batch::RunRef;
use super::statement::{EVENT_AWAIT, EVENT_EMIT, TASK_AWAIT, TASK_LIST_AWAITED, TASK_SETTLE_AWAITED};
use super::{Fault, Store, Wait};
use crate::domain::{CheckpointName, Error, EventName, Instant, JsonText, QueueName, TaskId};
use crate::scope::Scope;

/// How a wait stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Awaited {
    /// The event was emitted.
    Payload(JsonText),
    /// The run sleeps, until then at most.
    Suspended(Option<Instant>),
    /// The time was over first.
    TimedOut,
}

impl Store {
    /// Waits for an event under the name of a step. Repeating it is harmless.
    pub async fn event_await(
        &self,
        scope: &Scope,
        run: &RunRef,
        step: &CheckpointName,
        event: &EventName,
        timeout: Option<Duration>,
        lock_wait: Duration,
    ) -> Result<Awaited, Error> {
        let fail = |fault: Fault| fault.into_error(scope);
        let tx = self.begin(lock_wait).await.map_err(fail)?;
        let digest = run.digest.as_ref().map(crate::domain::Digest::as_str);
        let timeout = timeout.map(|timeout| i64::try_from(timeout.as_millis()).unwrap_or(i64::MAX));
        let queue = scope.queue().as_str();
        let params: [&(dyn postgres_types::ToSql + Sync); 6] =
            [&queue, &run.run_id, &digest, &step.as_str(), &event.as_str(), &timeout];
        let outcome = match tx.rows(&EVENT_AWAIT, Wait::Block, None, &params).await {
            Ok(rows) => rows.first().map_or_else(|| Err(Error::Internal("no answer".into())), |row| awaited(run, row)),
            Err(fault) => Err(fail(fault)),
        };
        if outcome.is_ok() {
            tx.commit().await.map_err(fail)?;
        } else {
            tx.rollback().await;
        }
        outcome
    }

    /// Waits for the end of a task under the name of a step; the payload is how it ended. Repeating it is harmless.
    pub async fn task_await(
        &self,
        scope: &Scope,
        run: &RunRef,
        step: &CheckpointName,
        awaited: (&QueueName, TaskId),
        timeout: Option<Duration>,
        lock_wait: Duration,
    ) -> Result<Awaited, Error> {
        let fail = |fault: Fault| fault.into_error(scope);
        let tx = self.begin(lock_wait).await.map_err(fail)?;
        let digest = run.digest.as_ref().map(crate::domain::Digest::as_str);
        let timeout = timeout.map(|timeout| i64::try_from(timeout.as_millis()).unwrap_or(i64::MAX));
        let (queue, (awaited_queue, task_id)) = (scope.queue().as_str(), awaited);
        let params: [&(dyn postgres_types::ToSql + Sync); 7] =
            [&queue, &run.run_id, &digest, &step.as_str(), &awaited_queue.as_str(), &task_id, &timeout];
        let outcome = match tx.rows(&TASK_AWAIT, Wait::Block, None, &params).await {
            Ok(rows) => match rows.first() {
                Some(row) if !row.get::<_, bool>("found_task") => Err(Error::TaskNotFound(task_id)),
                Some(row) => self::awaited(run, row),
                None => Err(Error::Internal("no answer".into())),
            },
            Err(fault) => Err(fail(fault)),
        };
        if outcome.is_ok() {
            tx.commit().await.map_err(fail)?;
        } else {
            tx.rollback().await;
        }
        outcome
    }

    /// Whether a run waits for a task at all.
    pub async fn task_list_awaited(&self) -> Result<bool, Fault> {
        let rows = self.rows(&TASK_LIST_AWAITED, Wait::Skip, None, &[]).await?;
        Ok(rows.first().is_some_and(|row| row.get("awaited")))
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

    /// Emits an event; says whether this was the first time, and how many runs it woke.
    pub async fn event_emit(
        &self,
        scope: &Scope,
        event: &EventName,
        payload: Option<&JsonText>,
        lock_wait: Duration,
    ) -> Result<(bool, i64), Error> {
        let fail = |fault: Fault| fault.into_error(scope);
        let tx = self.begin(lock_wait).await.map_err(fail)?;
        let params: [&(dyn postgres_types::ToSql + Sync); 3] = [&scope.queue().as_str(), &event.as_str(), &payload];
        match tx.rows(&EVENT_EMIT, Wait::Block, None, &params).await {
            Ok(rows) => {
                tx.commit().await.map_err(fail)?;
                Ok(rows.first().map_or((false, 0), |row| (row.get("applied"), row.get("woken"))))
            }
            Err(fault) => {
                tx.rollback().await;
                Err(fail(fault))
            }
        }
    }
}

fn awaited(run: &RunRef, row: &tokio_postgres::Row) -> Result<Awaited, Error> {
    let run_id = run.run_id;
    if !row.get::<_, bool>("known") {
        return Err(Error::RunNotFound(run_id));
    }
    match row.get::<_, Option<&str>>("outcome") {
        Some("payload") => return Ok(Awaited::Payload(row.get("payload"))),
        Some("suspended") => return Ok(Awaited::Suspended(row.get("wake_at"))),
        Some(_) => return Ok(Awaited::TimedOut),
        None => {}
    }
    Err(super::time::refused(run, row))
}
