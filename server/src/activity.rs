//! Task activity for the live lines of `absurd dev`. An activity is only built while a receiver exists.

use tokio::sync::broadcast;
use uuid::Uuid;

use crate::domain::{Claim, State};
use crate::scope::Scope;

/// A change of one task's state.
#[derive(Debug, Clone)]
pub struct Activity {
    /// Queue of the task.
    pub queue: String,
    /// Task that changed.
    pub task_id: Uuid,
    /// The change itself.
    pub what: What,
}

/// The kinds of change that `absurd dev` shows.
#[derive(Debug, Clone)]
pub enum What {
    /// The task was spawned through this replica.
    Spawned {
        /// Name of the task's handler.
        name: String,
    },
    /// A claimed run was handed to a stream or a `ClaimTask` call.
    Pushed {
        /// Name of the task's handler.
        name: String,
        /// Number of the attempt, from 1.
        attempt: i32,
    },
    /// An attempt or the task ended.
    Ended {
        /// State of the task after the change.
        state: State,
    },
}

impl Activity {
    pub(crate) fn pushed(scope: &Scope, claim: &Claim) -> Self {
        Self {
            queue: scope.queue().as_str().to_owned(),
            task_id: claim.task_id,
            what: What::Pushed { name: claim.task_name.clone(), attempt: claim.attempt },
        }
    }

    pub(crate) fn ended(scope: &Scope, task_id: Uuid, state: State) -> Self {
        Self { queue: scope.queue().as_str().to_owned(), task_id, what: What::Ended { state } }
    }
}

/// Broadcasts activities. A receiver that falls more than 1,024 behind loses the oldest.
#[derive(Debug, Clone)]
pub struct Feed {
    sender: broadcast::Sender<Activity>,
}

impl Default for Feed {
    fn default() -> Self {
        Self { sender: broadcast::Sender::new(1024) }
    }
}

impl Feed {
    /// Receives the activities from this call on.
    pub fn watch(&self) -> broadcast::Receiver<Activity> {
        self.sender.subscribe()
    }

    pub(crate) fn tell(&self, activity: impl FnOnce() -> Activity) {
        if self.sender.receiver_count() > 0 {
            let _ = self.sender.send(activity());
        }
    }
}
