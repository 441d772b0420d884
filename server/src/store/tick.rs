//! Statements of the tick, which examines many queues at once, of the doorbell, and of notifications between replicas.

use std::time::Duration;

use tokio_postgres::Row;

use super::statement::{CREDIT_NOTIFY, DOORBELL_ARM, DOORBELL_DISARM, DOORBELL_RING, REPLICA_LEAVE, TICK};
use super::{Fault, Store, Wait};

/// Result of one tick.
#[derive(Debug, Clone)]
pub struct Tick {
    /// One entry per queue asked about.
    pub queues: Vec<QueueTick>,
    /// Other replicas seen within the last 20 seconds.
    pub others: i32,
}

/// State of one queue at a tick.
#[derive(Debug, Clone)]
pub struct QueueTick {
    /// Name of the queue, as asked.
    pub queue: String,
    /// Whether its tables do not exist.
    pub missing: bool,
    /// Whether another session has locked its tables.
    pub locked: bool,
    /// Why its tables cannot be read: the SQLSTATE and the message of Postgres.
    pub problem: Option<String>,
    /// Whether a run is available now. Its task may still be locked, quarantined or about to be cancelled.
    pub claimable: bool,
    /// Whether the lease of a run has expired.
    pub expired: bool,
    /// Whether a task has a cancellation policy.
    pub cancellable: bool,
    /// Milliseconds until the first pending or the first sleeping run becomes available. Runs that are available
    /// already do not count.
    pub next_available_ms: Option<i64>,
    /// Milliseconds until the first lease expires. Negative once it has.
    pub next_expiry_ms: Option<i64>,
    /// Time that Postgres spent on this queue.
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
    /// Reads the state of `queues`, and counts the other replicas. It also records the database's clock and the oldest
    /// server generation allowed.
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

    /// Arms the doorbell for `queues`: the next write to one of them, by direct SQL or another replica, notifies the
    /// replicas.
    pub async fn doorbell_arm(&self, queues: &[&str], replica: &str) -> Result<(), Fault> {
        self.rows(&DOORBELL_ARM, Wait::Skip, None, &[&queues, &replica]).await.map(drop)
    }

    /// Notifies the other replicas about `queues`, where one of them has armed the doorbell.
    pub async fn doorbell_ring(&self, queues: &[&str], replica: &str) -> Result<(), Fault> {
        self.rows(&DOORBELL_RING, Wait::Skip, None, &[&queues, &replica]).await.map(drop)
    }

    /// Disarms the doorbell for this replica, and for replicas not seen within the last minute.
    pub async fn doorbell_disarm(&self, replica: &str) -> Result<(), Fault> {
        self.rows(&DOORBELL_DISARM, Wait::Skip, None, &[&replica]).await.map(drop)
    }

    /// Sends one notification per message, to every replica.
    pub async fn credit_notify(&self, messages: &[String]) -> Result<(), Fault> {
        self.rows(&CREDIT_NOTIFY, Wait::Skip, None, &[&messages]).await.map(drop)
    }

    /// Removes this replica from the list of live replicas, so that the others no longer count it.
    pub async fn replica_leave(&self, replica: &str) -> Result<(), Fault> {
        self.rows(&REPLICA_LEAVE, Wait::Skip, None, &[&replica]).await.map(drop)
    }
}
