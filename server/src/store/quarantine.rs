//! Tasks that cannot be moved on: set aside with a reason.

use uuid::Uuid;

use super::statement::{QUARANTINE_COUNT, QUARANTINE_FORGET, QUARANTINE_LIST, QUARANTINE_PUT};
use super::{Fault, Store, Wait};
use crate::domain::{RunId, TaskId};
use crate::scope::Scope;

/// Longest text of a problem that is kept, in characters.
const PROBLEM_MAX: usize = 500;

/// Why a task is set aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Postgres refuses to have it claimed, or it cannot be read.
    Claim,
    /// Its lease ran out, and Postgres refuses to fail its run.
    Lease,
    /// Its policy cancels it, and Postgres refuses that.
    Policy,
    /// It fits into no message of the stream that it was claimed for.
    Size,
}

impl Reason {
    const ALL: [Self; 4] = [Self::Claim, Self::Lease, Self::Policy, Self::Size];

    /// As stored, and as the label of a metric.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Claim => "claim",
            Self::Lease => "lease",
            Self::Policy => "policy",
            Self::Size => "size",
        }
    }
}

/// A task that is set aside.
#[derive(Debug, Clone)]
pub struct Quarantined {
    /// Its queue.
    pub queue: String,
    /// The task.
    pub task_id: TaskId,
    /// As stored.
    pub reason: String,
    /// What Postgres said, or how large it is.
    pub problem: String,
    /// How often it was tried.
    pub times: i32,
}

impl Store {
    /// Sets runs aside, each with its problem.
    pub async fn quarantine_put(&self, scope: &Scope, reason: Reason, found: &[(RunId, String)]) -> Result<(), Fault> {
        let runs: Vec<Uuid> = found.iter().map(|(run_id, _)| *run_id).collect();
        let problems: Vec<String> =
            found.iter().map(|(_, problem)| problem.chars().take(PROBLEM_MAX).collect()).collect();
        let params: [&(dyn postgres_types::ToSql + Sync); 4] =
            [&scope.queue().as_str(), &reason.as_str(), &runs, &problems];
        self.rows(&QUARANTINE_PUT, Wait::Skip, Some(scope), &params).await.map(drop)
    }

    /// What is set aside, so many at most.
    pub async fn quarantine_list(&self, limit: i64) -> Result<Vec<Quarantined>, Fault> {
        let rows = self.rows(&QUARANTINE_LIST, Wait::Skip, None, &[&limit]).await?;
        let read = |row: &tokio_postgres::Row| Quarantined {
            queue: row.get("queue_name"),
            task_id: row.get("task_id"),
            reason: row.get("reason"),
            problem: row.get("problem"),
            times: row.get("times"),
        };
        Ok(rows.iter().map(read).collect())
    }

    /// How many are set aside, by reason.
    pub async fn quarantine_count(&self) -> Result<[(Reason, i64); 4], Fault> {
        let rows = self.rows(&QUARANTINE_COUNT, Wait::Skip, None, &[]).await?;
        let of = |reason: Reason| rows.iter().find(|row| row.get::<_, &str>("reason") == reason.as_str());
        Ok(Reason::ALL.map(|reason| (reason, of(reason).map_or(0, |row| row.get("tasks")))))
    }

    /// Forgets what has moved on.
    pub async fn quarantine_forget(&self) -> Result<(), Fault> {
        self.rows(&QUARANTINE_FORGET, Wait::Skip, None, &[]).await.map(drop)
    }
}
