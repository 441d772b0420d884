//! The tick and the doorbell's statements: one look at many queues at once.

use super::statement::{CREDIT_NOTIFY, DOORBELL_ARM, DOORBELL_DISARM, DOORBELL_RING, REPLICA_LEAVE, TICK};
use super::{Fault, Store, Wait};

/// What a look at one queue found.
#[derive(Debug, Clone)]
pub struct QueueTick {
    /// The queue.
    pub queue: String,
    /// Its tables do not exist.
    pub missing: bool,
    /// A run can be claimed.
    pub claimable: bool,
    /// A lease has run out.
    pub expired: bool,
    /// A task has a cancellation policy.
    pub cancellable: bool,
    /// Milliseconds until the next sleeping run can be claimed.
    pub next_available_ms: Option<i64>,
    /// Milliseconds until the next lease runs out.
    pub next_expiry_ms: Option<i64>,
}

impl Store {
    /// Looks at queues; says what was found, and how many other replicas are alive.
    pub async fn tick(&self, queues: &[&str], replica: &str) -> Result<(Vec<QueueTick>, i32), Fault> {
        let rows = self.rows(&TICK, Wait::Skip, None, &[&queues, &replica]).await?;
        let mut others = 0;
        let mut ticks = Vec::with_capacity(rows.len());
        for row in &rows {
            let Some(queue) = row.get::<_, Option<String>>("queue_name") else {
                others = row.get("others");
                self.note_clock(row.get("now_us"));
                continue;
            };
            ticks.push(QueueTick {
                queue,
                missing: row.get("missing"),
                claimable: row.get("claimable"),
                expired: row.get("expired"),
                cancellable: row.get("cancellable"),
                next_available_ms: row.get("next_available_ms"),
                next_expiry_ms: row.get("next_expiry_ms"),
            });
        }
        Ok((ticks, others))
    }

    /// Arms the doorbell of queues.
    pub async fn doorbell_arm(&self, queues: &[&str], replica: &str) -> Result<(), Fault> {
        self.rows(&DOORBELL_ARM, Wait::Skip, None, &[&queues, &replica]).await.map(drop)
    }

    /// Rings other replicas that armed these queues.
    pub async fn doorbell_ring(&self, queues: &[&str], replica: &str) -> Result<(), Fault> {
        self.rows(&DOORBELL_RING, Wait::Skip, None, &[&queues, &replica]).await.map(drop)
    }

    /// Takes away what this replica armed, and what dead ones left.
    pub async fn doorbell_disarm(&self, replica: &str) -> Result<(), Fault> {
        self.rows(&DOORBELL_DISARM, Wait::Skip, None, &[&replica]).await.map(drop)
    }

    /// Sends notifications, one per message.
    pub async fn credit_notify(&self, messages: &[String]) -> Result<(), Fault> {
        self.rows(&CREDIT_NOTIFY, Wait::Skip, None, &[&messages]).await.map(drop)
    }

    /// Signs this replica off.
    pub async fn replica_leave(&self, replica: &str) -> Result<(), Fault> {
        self.rows(&REPLICA_LEAVE, Wait::Skip, None, &[&replica]).await.map(drop)
    }
}
