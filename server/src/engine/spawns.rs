//! Spawns of tasks, committed in batches. Hands tasks to idle workers as they are spawned, and wakes the dispatcher for
//! the others.

use std::time::Duration;

use uuid::Uuid;

use crate::commit::{Batch, Outcomes};
use crate::dispatch::Dispatcher;
use crate::domain::Error;
use crate::scope::Scope;
use crate::store::task::{NewTask, Slotted, Spawned, Spawning};
use crate::store::{Fault, Store};

/// Spawns. Those with an idempotency key have batches of their own, because they may wait for another spawn of the key.
#[derive(Debug, Clone)]
pub(crate) struct Spawns {
    pub(crate) store: Store,
    pub(crate) dispatcher: Dispatcher,
}

impl Spawns {
    /// Spawns tasks, each on its own or all or none. Tasks for which an idle worker has credit are handed to it
    /// directly.
    pub(crate) async fn spawn(
        &self,
        scope: &Scope,
        tasks: &[&NewTask],
        lock_wait: Duration,
        all: bool,
    ) -> Result<Vec<Result<Spawned, Error>>, Fault> {
        let mut hand_over = self.dispatcher.hand_over(scope, tasks);
        let mut spawning = self.try_spawn(scope, &hand_over.slotted(tasks), lock_wait, all).await;
        // Postgres may refuse the claim rather than the task, so the task is spawned unclaimed. The dispatcher handles
        // its claim.
        if spawning.as_ref().is_err_and(Fault::is_refusal) && hand_over.put_back() {
            spawning = self.try_spawn(scope, &hand_over.slotted(tasks), lock_wait, all).await;
        }
        match spawning {
            Ok(spawning) => {
                hand_over.deliver(spawning.claims);
                self.note_work(scope, tasks, &spawning.answers);
                Ok(spawning.answers)
            }
            Err(fault) => {
                if matches!(fault, Fault::Unknown(_) | Fault::Timeout) {
                    hand_over.lost();
                }
                Err(fault)
            }
        }
    }

    /// Wakes the dispatcher for tasks that are claimable now, and sets its timer for those that become claimable later.
    fn note_work(&self, scope: &Scope, tasks: &[&NewTask], answers: &[Result<Spawned, Error>]) {
        let now = self.store.now();
        let mut at_once = false;
        for (task, spawned) in tasks.iter().zip(answers) {
            if !spawned.as_ref().is_ok_and(|spawned| spawned.fresh && !spawned.claimed) {
                continue;
            }
            match task.start.zip(now).map(|(start, now)| start.delay_from(now)).filter(|wait| !wait.is_zero()) {
                Some(wait) => self.dispatcher.note_available(scope.queue(), wait),
                None => at_once = true,
            }
        }
        if at_once {
            self.dispatcher.new_work(scope.queue());
        }
    }

    async fn try_spawn(
        &self,
        scope: &Scope,
        slotted: &[Slotted<'_>],
        lock_wait: Duration,
        all: bool,
    ) -> Result<Spawning, Fault> {
        match all {
            true => self.store.task_spawn_all(scope, slotted, lock_wait, true).await,
            false => self.store.task_spawn(scope, slotted, lock_wait).await,
        }
    }
}

impl Batch for Spawns {
    type Key = (Scope, bool);
    type Item = NewTask;
    type Out = Spawned;
    type Id = Uuid;
    const NAME: &'static str = "spawn";
    const SHEDS: bool = true;
    const ITEMS_MAX: usize = 500;

    fn identity(item: &NewTask) -> Uuid {
        item.task_id
    }

    fn knows_itself(_: &NewTask) -> bool {
        true
    }

    fn scope(key: &Self::Key) -> &Scope {
        &key.0
    }

    fn store(&self) -> &Store {
        &self.store
    }

    async fn execute(
        &self,
        (scope, _): &Self::Key,
        items: &[&NewTask],
        lock_wait: Option<Duration>,
    ) -> Result<Outcomes<Self>, Fault> {
        let wait = lock_wait.unwrap_or(Duration::from_millis(50));
        let spawned = self.spawn(scope, items, wait, false).await?;
        Ok(spawned.into_iter().map(Some).collect())
    }
}
