//! Statements of upkeep and of `absurd doctor`.

use std::time::Duration;

use tokio_postgres::Row;

use super::statement::{
    DOCTOR_ACCESS, DOCTOR_DATABASE, DOCTOR_INDEXES, DOCTOR_QUEUE, DOCTOR_REGISTRY, DOCTOR_UPKEEP, SNAPSHOT_AGE,
    UPKEEP_NOTE, UPKEEP_RUN, UPKEEP_TAKE,
};
use super::{Fault, Store, Wait};
use crate::scope::Scope;

/// Result of one round of upkeep of a queue.
#[derive(Debug, Clone, Default)]
pub struct Round {
    /// Number of tasks deleted.
    pub tasks: i64,
    /// Number of events deleted.
    pub events: i64,
    /// Number of partitions dropped.
    pub partitions: i32,
    /// Parts of the newest batch that failed, with their errors.
    pub problem: Option<String>,
}

impl Store {
    /// Takes up to `limit` queues whose last round began at least `seconds` ago, the oldest first. No two replicas take
    /// the same queue.
    pub async fn upkeep_take(&self, seconds: f64, limit: i64) -> Result<Vec<String>, Fault> {
        let rows = self.rows(&UPKEEP_TAKE, Wait::Skip, None, &[&seconds, &limit]).await?;
        Ok(rows.iter().map(|row| row.get("queue_name")).collect())
    }

    /// Carries out one batch of a queue's policies and adds it to the round. Returns whether more is left.
    pub async fn upkeep_run(&self, scope: &Scope, round: &mut Round) -> Result<bool, Fault> {
        let rows = self.rows(&UPKEEP_RUN, Wait::Skip, None, &[&scope.queue().as_str()]).await?;
        let Some(row) = rows.first() else { return Ok(false) };
        round.tasks += i64::from(row.get::<_, i32>("tasks_deleted"));
        round.events += i64::from(row.get::<_, i32>("events_deleted"));
        round.partitions += row.get::<_, i32>("partitions_dropped");
        round.problem = row.get("problem");
        Ok(row.get("more"))
    }

    /// Stores the result of a round, and deletes results of queues that are gone.
    pub async fn upkeep_note(&self, scope: &Scope, round: &Round) -> Result<(), Fault> {
        let queue = scope.queue().as_str();
        let params: [&(dyn postgres_types::ToSql + Sync); 5] =
            [&queue, &round.tasks, &round.events, &round.partitions, &round.problem];
        self.rows(&UPKEEP_NOTE, Wait::Skip, None, &params).await.map(drop)
    }

    /// One row of settings and states of the database.
    pub async fn doctor_database(&self) -> Result<Vec<Row>, Fault> {
        self.rows(&DOCTOR_DATABASE, Wait::Skip, None, &[]).await
    }

    /// Time for which the oldest transaction has kept dead rows from being removed.
    pub async fn snapshot_age(&self) -> Result<Duration, Fault> {
        let rows = self.rows(&SNAPSHOT_AGE, Wait::Skip, None, &[]).await?;
        let seconds = rows.first().map_or(0.0, |row| row.get::<_, f64>("seconds"));
        Ok(Duration::try_from_secs_f64(seconds).unwrap_or_default())
    }

    /// One row per table of a queue: missing columns, rights that the server's role lacks, row security, and triggers
    /// of others.
    pub async fn doctor_access(&self) -> Result<Vec<Row>, Fault> {
        self.rows(&DOCTOR_ACCESS, Wait::Skip, None, &[]).await
    }

    /// Keys and indexes that a queue lacks, or has only in part.
    pub async fn doctor_indexes(&self) -> Result<Vec<Row>, Fault> {
        self.rows(&DOCTOR_INDEXES, Wait::Skip, None, &[]).await
    }

    /// Registered queues without tables, and tables without a registered queue.
    pub async fn doctor_registry(&self) -> Result<Vec<Row>, Fault> {
        self.rows(&DOCTOR_REGISTRY, Wait::Skip, None, &[]).await
    }

    /// Every registered queue with its last round of upkeep.
    pub async fn doctor_upkeep(&self) -> Result<Vec<Row>, Fault> {
        self.rows(&DOCTOR_UPKEEP, Wait::Skip, None, &[]).await
    }

    /// Counts of inconsistent rows in a queue, each up to `bound`.
    pub async fn doctor_queue(&self, scope: &Scope, bound: i64) -> Result<Vec<Row>, Fault> {
        self.rows(&DOCTOR_QUEUE, Wait::Skip, Some(scope), &[&bound, &scope.queue().as_str()]).await
    }
}
