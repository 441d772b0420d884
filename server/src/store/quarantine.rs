//! Quarantine: tasks that Postgres refuses to process, or that fit into no message. Sweeps leave such a task out for 30
//! s at first, then twice as long each time, at most 10 minutes.

use uuid::Uuid;

use super::statement::{QUARANTINE_COUNT, QUARANTINE_FORGET, QUARANTINE_LIST, QUARANTINE_PUT};
use super::{Fault, Store, Wait};
use crate::domain::{RunId, TaskId};
use crate::scope::Scope;

/// Longest stored problem text, in characters.
const PROBLEM_MAX: usize = 500;

/// Why a task is quarantined. The constraint on `absurd_server.quarantine` lists the same reasons.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Postgres refuses its claim, or its row cannot be read.
    Claim,
    /// Its lease expired, and Postgres refuses to fail its run.
    Lease,
    /// Its cancellation policy is due, and Postgres refuses the cancellation.
    Policy,
    /// It fits into no message of the stream that claimed it.
    Size,
}

impl Reason {
    const ALL: [Self; 4] = [Self::Claim, Self::Lease, Self::Policy, Self::Size];

    /// Stored form, and label in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Claim => "claim",
            Self::Lease => "lease",
            Self::Policy => "policy",
            Self::Size => "size",
        }
    }
}

/// A quarantined task.
#[derive(Debug, Clone)]
pub struct Quarantined {
    /// Name of its queue.
    pub queue: String,
    /// Task of the quarantined run.
    pub task_id: TaskId,
    /// Stored form of its [`Reason`].
    pub reason: String,
    /// The message of Postgres, or the size of the task.
    pub problem: String,
    /// Times that the run was quarantined.
    pub times: i32,
}

impl Store {
    /// Quarantines runs, each with its problem. A repeated run doubles its pause.
    pub async fn quarantine_put(&self, scope: &Scope, reason: Reason, found: &[(RunId, String)]) -> Result<(), Fault> {
        let runs: Vec<Uuid> = found.iter().map(|(run_id, _)| *run_id).collect();
        let problems: Vec<String> =
            found.iter().map(|(_, problem)| problem.chars().take(PROBLEM_MAX).collect()).collect();
        let params: [&(dyn postgres_types::ToSql + Sync); 4] =
            [&scope.queue().as_str(), &reason.as_str(), &runs, &problems];
        self.rows(&QUARANTINE_PUT, Wait::Skip, Some(scope), &params).await.map(drop)
    }

    /// Quarantined tasks by queue, oldest first, at most `limit`.
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

    /// Number of quarantined tasks per reason, zeros included.
    pub async fn quarantine_count(&self) -> Result<[(Reason, i64); 4], Fault> {
        let rows = self.rows(&QUARANTINE_COUNT, Wait::Skip, None, &[]).await?;
        let of = |reason: Reason| rows.iter().find(|row| row.get::<_, &str>("reason") == reason.as_str());
        Ok(Reason::ALL.map(|reason| (reason, of(reason).map_or(0, |row| row.get("tasks")))))
    }

    /// Removes entries whose run has moved on, or whose queue is gone.
    pub async fn quarantine_forget(&self) -> Result<(), Fault> {
        self.rows(&QUARANTINE_FORGET, Wait::Skip, None, &[]).await.map(drop)
    }
}
