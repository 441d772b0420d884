//! Events: waiting for one as a step of a run, and emitting one. The end of a task is one too, for whoever waits for it.

use std::time::Duration;

use postgres_types::ToSql;

use super::batch::RunRef;
use super::statement::{
    EVENT_AWAIT, EVENT_EMIT, EVENT_EMIT_MORE, EVENT_LIST_UNFINISHED, Statement, TASK_AWAIT, TASK_LIST_AWAITED,
    TASK_SETTLE_AWAITED,
};
use super::{Fault, Store, Wait};
use crate::domain::{CheckpointName, Digest, Error, EventName, Instant, JsonText, QueueName, TaskId};
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

impl StepWait<'_> {
    fn digest(&self) -> Option<&str> {
        self.run.digest.as_ref().map(Digest::as_str)
    }

    fn timeout_ms(&self) -> Option<i64> {
        self.timeout.map(|timeout| i64::try_from(timeout.as_millis()).unwrap_or(i64::MAX))
    }
}

impl Store {
    /// Waits for an event under the name of a step. Repeating it is harmless.
    pub async fn event_await(
        &self,
        scope: &Scope,
        wait: &StepWait<'_>,
        event: &EventName,
        lock_wait: Duration,
    ) -> Result<Awaited, Error> {
        let (digest, timeout) = (wait.digest(), wait.timeout_ms());
        let params: [&(dyn ToSql + Sync); 6] =
            [&scope.queue().as_str(), &wait.run.run_id, &digest, &wait.step.as_str(), &event.as_str(), &timeout];
        self.wait(scope, &EVENT_AWAIT, &params, lock_wait, |row| awaited(wait.run, row)).await
    }

    /// Waits for the end of a task under the name of a step; the payload is how it ended. Repeating it is harmless.
    pub async fn task_await(
        &self,
        scope: &Scope,
        wait: &StepWait<'_>,
        (awaited_queue, task_id): (&QueueName, TaskId),
        lock_wait: Duration,
    ) -> Result<Awaited, Error> {
        let (digest, timeout) = (wait.digest(), wait.timeout_ms());
        let params: [&(dyn ToSql + Sync); 7] = [
            &scope.queue().as_str(),
            &wait.run.run_id,
            &digest,
            &wait.step.as_str(),
            &awaited_queue.as_str(),
            &task_id,
            &timeout,
        ];
        self.wait(scope, &TASK_AWAIT, &params, lock_wait, |row| match row.get("found_task") {
            true => awaited(wait.run, row),
            false => Err(Error::TaskNotFound(task_id)),
        })
        .await
    }

    /// Carries out a wait in a transaction that takes effect only when the wait stands.
    async fn wait(
        &self,
        scope: &Scope,
        statement: &Statement,
        params: &[&(dyn ToSql + Sync)],
        lock_wait: Duration,
        read: impl FnOnce(&tokio_postgres::Row) -> Result<Awaited, Error>,
    ) -> Result<Awaited, Error> {
        let fail = |fault: Fault| fault.into_error(scope);
        let tx = self.begin(lock_wait).await.map_err(fail)?;
        let outcome = match tx.rows(statement, Wait::Block, None, params).await {
            Ok(rows) => rows.first().map_or_else(|| Err(Error::Internal("no answer".into())), read),
            // The only thing that these functions refuse by themselves.
            Err(Fault::Raised { message, .. }) => Err(Error::invalid("awaited_task_id", message)),
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

    /// Emits an event and wakes up to a limit of those who wait for it.
    pub async fn event_emit(
        &self,
        scope: &Scope,
        event: &EventName,
        payload: Option<&JsonText>,
        lock_wait: Duration,
    ) -> Result<Emission, Error> {
        let params: [&(dyn ToSql + Sync); 4] = [&scope.queue().as_str(), &event.as_str(), &payload, &WOKEN_MAX];
        self.emission(scope, &EVENT_EMIT, &params, lock_wait, |row| row.get("applied")).await
    }

    /// Wakes the next of those who wait for an event that was emitted.
    pub async fn event_emit_more(
        &self,
        scope: &Scope,
        event: &EventName,
        lock_wait: Duration,
    ) -> Result<Emission, Error> {
        let params: [&(dyn ToSql + Sync); 3] = [&scope.queue().as_str(), &event.as_str(), &WOKEN_MAX];
        self.emission(scope, &EVENT_EMIT_MORE, &params, lock_wait, |_| true).await
    }

    async fn emission(
        &self,
        scope: &Scope,
        statement: &Statement,
        params: &[&(dyn ToSql + Sync)],
        lock_wait: Duration,
        applied: impl FnOnce(&tokio_postgres::Row) -> bool,
    ) -> Result<Emission, Error> {
        let fail = |fault: Fault| fault.into_error(scope);
        let tx = self.begin(lock_wait).await.map_err(fail)?;
        match tx.rows(statement, Wait::Block, None, params).await {
            Ok(rows) => {
                tx.commit().await.map_err(fail)?;
                let row = rows.first().ok_or_else(|| Error::Internal("no answer".into()))?;
                Ok(Emission { applied: applied(row), woken: row.get("woken"), more: row.get("more") })
            }
            Err(fault) => {
                tx.rollback().await;
                Err(fail(fault))
            }
        }
    }

    /// Emissions that have not woken all who wait, at most 100: queues and events.
    pub async fn event_list_unfinished(&self) -> Result<Vec<(String, String)>, Fault> {
        let rows = self.rows(&EVENT_LIST_UNFINISHED, Wait::Skip, None, &[]).await?;
        Ok(rows.iter().map(|row| (row.get("queue_name"), row.get("event_name"))).collect())
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
