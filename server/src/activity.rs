//! What happens, as it happens: the live lines of `absurd dev`. Costs nothing while nobody watches.

use tokio::sync::broadcast;
use uuid::Uuid;

use crate::domain::{Claim, State};
use crate::scope::Scope;

/// Something happened to a task.
#[derive(Debug, Clone)]
pub struct Activity {
    /// Its queue.
    pub queue: String,
    /// The task.
    pub task_id: Uuid,
    /// What happened.
    pub what: What,
}

/// What happened.
#[derive(Debug, Clone)]
pub enum What {
    /// It was spawned here.
    Spawned {
        /// Handler.
        name: String,
    },
    /// It was pushed to a worker.
    Pushed {
        /// Handler.
        name: String,
        /// 1 for the first.
        attempt: i32,
    },
    /// An attempt or the task ended.
    Ended {
        /// State of the task now.
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

/// Where activities go.
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
    /// Watches from now on.
    pub fn watch(&self) -> broadcast::Receiver<Activity> {
        self.sender.subscribe()
    }

    pub(crate) fn tell(&self, activity: impl FnOnce() -> Activity) {
        if self.sender.receiver_count() > 0 {
            let _ = self.sender.send(activity());
        }
    }
}
