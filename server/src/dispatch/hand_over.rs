//! Direct hand-over: a task spawned while a worker has credit is spawned already claimed, and pushed after the commit.
//! The statement first looks for older work, so that no task overtakes it (`task_spawn_claimed.sql`).

use std::sync::Arc;

use tokio::time::Instant;

use super::state::StreamId;
use super::{Dispatcher, Queue, put_off};
use crate::domain::{Claim, Instant as DbTime};
use crate::scope::Scope;
use crate::store::run::Slot;
use crate::store::task::{NewTask, Slotted};
use crate::tally::Counted;

/// Credit set aside for tasks that are being spawned. Unused credit is freed when this is dropped; a stopping server
/// waits for that. A future that owns one must run to its end: otherwise tasks that it has spawned stay claimed for no
/// worker.
#[derive(Debug)]
pub(crate) struct HandOver {
    dispatcher: Dispatcher,
    /// None: the queue has no streams here.
    queue: Option<Arc<Queue>>,
    /// The stream and the slot of each task; None: the task is spawned unclaimed.
    taken: Vec<Option<(StreamId, Slot)>>,
    since: Option<DbTime>,
    _counted: Counted,
}

impl Dispatcher {
    /// Sets credit of idle streams aside for tasks that are about to be spawned.
    pub(crate) fn hand_over(&self, scope: &Scope, tasks: &[&NewTask]) -> HandOver {
        let queue = self.find(scope.queue());
        // A cancellation policy may be due at once, and only a claim checks it. A task with a start time is claimable
        // from then on.
        let at_once = |task: &NewTask| task.cancellation.is_none() && task.start.is_none();
        let mut names = tasks.iter().map(|task| at_once(task).then(|| task.name.as_str()));
        let taken = queue.as_ref().map_or_else(Vec::new, |queue| queue.lock().set_aside(&mut names));
        let counted = self.shared.releasing.begin();
        HandOver { dispatcher: self.clone(), queue, taken, since: self.shared.store.now(), _counted: counted }
    }
}

impl HandOver {
    /// The tasks, each with its slot.
    pub(crate) fn slotted<'a>(&'a self, tasks: &[&'a NewTask]) -> Vec<Slotted<'a>> {
        let slot = |index| self.taken.get(index).and_then(|taken: &Option<(StreamId, Slot)>| taken.as_ref());
        tasks.iter().enumerate().map(|(index, task)| (*task, slot(index).map(|(_, slot)| slot))).collect()
    }

    /// Pushes the claims to their streams; each comes with the index of its task.
    pub(crate) fn deliver(mut self, claims: Vec<(usize, Claim)>) {
        let Some(queue) = &self.queue else { return };
        let mut returns = Vec::new();
        let mut state = queue.lock();
        for (index, claim) in claims {
            let Some((id, _)) = self.taken.get_mut(index).and_then(Option::take) else { continue };
            state.put_back(id);
            state.send(id, claim, Instant::now(), &mut put_off, &mut returns);
        }
        drop(state);
        queue.bell.notify_one();
        self.dispatcher.give_back(queue, returns);
    }

    /// The statement's answer was lost: searches for its claims and gives them back.
    pub(crate) fn lost(self) {
        let slots: Vec<Slot> = self.taken.iter().flatten().map(|(_, slot)| slot.clone()).collect();
        if let Some(queue) = self.queue.as_ref().filter(|_| !slots.is_empty()) {
            self.dispatcher.find_lost_claims(queue, slots, self.since);
        }
    }
}

impl HandOver {
    /// Frees all credit; returns whether any was set aside.
    pub(crate) fn put_back(&mut self) -> bool {
        let Some(queue) = self.queue.as_ref().filter(|_| self.taken.iter().any(Option::is_some)) else { return false };
        let mut state = queue.lock();
        for (id, _) in self.taken.drain(..).flatten() {
            state.put_back(id);
        }
        drop(state);
        queue.bell.notify_one();
        true
    }
}

impl Drop for HandOver {
    fn drop(&mut self) {
        self.put_back();
    }
}
