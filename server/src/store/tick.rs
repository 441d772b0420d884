//! The tick and the doorbell's statements: one look at many queues at once.

use std::time::Duration;

use tokio_postgres::Row;

use super::statement::{CREDIT_NOTIFY, DOORBELL_ARM, DOORBELL_DISARM, DOORBELL_RING, REPLICA_LEAVE, TICK};
use super::{Fault, Store, Wait};

/// What one look found.
#[derive(Debug, Clone)]
pub struct Tick {
    /// Of each queue.
    pub queues: Vec<QueueTick>,
    /// Other replicas that are alive.
    pub others: i32,
}

/// What a look at one queue found.
#[derive(Debug, Clone)]
pub struct QueueTick {
    /// The queue.
    pub queue: String,
    /// Its tables do not exist.
    pub missing: bool,
    /// Another session has locked its tables.
    pub locked: bool,
    /// Why its tables cannot be read: a SQLSTATE, and what Postgres said.
    pub problem: Option<String>,
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
    /// How long the look took.
    pub took: Duration,
}

fn queue_tick(queue: String, row: &Row) -> QueueTick {
    QueueTick {
        queue,
        missing: row.get("missing"),
        locked: row.get("locked"),
        problem: row.get("problem"),
        claimable: row.get("claimable"),
        expired: row.get("expired"),
        cancellable: row.get("cancellable"),
        next_available_ms: row.get("next_available_ms"),
        next_expiry_ms: row.get("next_expiry_ms"),
        took: Duration::from_micros(row.get::<_, i64>("took_us").max(0).unsigned_abs()),
    }
}

impl Store {
    /// Looks at queues; says what was found, and how many other replicas are alive. Reads the clock, and which server may run.
    pub async fn tick(&self, queues: &[&str], replica: &str) -> Result<Tick, Fault> {
        let rows = self.rows(&TICK, Wait::Skip, None, &[&queues, &replica]).await?;
        let mut tick = Tick { queues: Vec::with_capacity(rows.len()), others: 0 };
        for row in &rows {
            match row.get::<_, Option<String>>("queue_name") {
                Some(queue) => tick.queues.push(queue_tick(queue, row)),
                None => {
                    tick.others = row.get("others");
                    self.note_clock(row.get("now_us"));
                    self.note_min_server(row.get("min_server"));
                }
            }
        }
        Ok(tick)
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
