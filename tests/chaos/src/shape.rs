//! What a task of the load does, as its params say; and the names that go with it.

use serde::{Deserialize, Serialize};

/// The queue of all tasks.
pub(crate) const QUEUE: &str = "chaos";
/// Attempts that a task may take; faults use them up.
pub(crate) const ATTEMPTS_MAX: i32 = 15;

/// Params of a task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Shape {
    /// Unique.
    pub id: String,
    /// Steps, each with a checkpoint.
    pub steps: u32,
    /// Time that a step takes, ms.
    pub work: u64,
    /// A sleep after the first step, ms; 0: none.
    pub nap: u64,
    /// An event to wait for after the steps.
    pub event: Option<String>,
    /// So many attempts fail.
    pub fails: i32,
}

impl Shape {
    /// One at random: one to five steps; some sleep, some wait for an event, 5 % fail once or twice, 2 % always.
    pub(crate) fn random(random: &mut fastrand::Rng, id: String, event: Option<String>, work: u64) -> Self {
        let fails = match random.u32(0..100) {
            0..2 => ATTEMPTS_MAX,
            2..7 => random.i32(1..3),
            _ => 0,
        };
        Self {
            id,
            steps: random.u32(1..6),
            work: random.u64(0..work),
            nap: if random.u32(0..10) == 0 { random.u64(50..1500) } else { 0 },
            event,
            fails,
        }
    }
}
