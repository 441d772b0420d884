//! The kinds of items that are committed in batches: spawns; outcomes and steps; sleeps and waits; emissions. Each kind
//! defines the identity of an item and the statement of a batch.

use std::time::Duration;

use uuid::Uuid;

use super::{Batch, Outcomes};
use crate::dispatch::Dispatcher;
use crate::domain::{Error, EventName, JsonText, Settled};
use crate::scope::Scope;
use crate::store::batch::{Answer, Kind, RunRef, Via, Write};
use crate::store::event::Emission;
use crate::store::suspend::{Awaited, Suspend, SuspendKind};
use crate::store::task::{NewTask, Slotted, Spawned, Spawning};
use crate::store::{Fault, Store, Wait, batch};

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

/// Completions, failures, expirations, extensions, releases and checkpoints.
#[derive(Debug)]
pub(crate) struct Settles {
    pub(crate) store: Store,
}

impl Settles {
    async fn write(
        &self,
        scope: &Scope,
        items: &[(&RunRef, &Write)],
        lock_wait: Option<Duration>,
    ) -> Result<Vec<Answer>, Fault> {
        let Some(lock_wait) = lock_wait else { return self.store.settle(scope, items).await };
        let tx = self.store.begin(lock_wait).await?;
        match batch::write(&self.store, Via::Tx(&tx), scope, Wait::Block, items).await {
            Ok(answers) => {
                tx.commit().await?;
                Ok(answers)
            }
            Err(fault) => {
                tx.rollback().await;
                Err(fault)
            }
        }
    }
}

impl Batch for Settles {
    type Key = (Scope, Kind);
    type Item = (RunRef, Write);
    type Out = Settled;
    type Id = Uuid;
    const NAME: &'static str = "settle";
    const SHEDS: bool = false;
    const ITEMS_MAX: usize = 500;
    const DRIVERS_MAX: usize = 2;

    fn identity(item: &Self::Item) -> Uuid {
        item.0.run_id
    }

    fn knows_itself((_, write): &Self::Item) -> bool {
        matches!(write, Write::Complete { .. } | Write::Fail { .. } | Write::Expire | Write::Extend { .. })
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
        items: &[&Self::Item],
        lock_wait: Option<Duration>,
    ) -> Result<Outcomes<Self>, Fault> {
        let refs: Vec<(&RunRef, &Write)> = items.iter().map(|(run, write)| (run, write)).collect();
        let mut answers = self.write(scope, &refs, lock_wait).await;
        if let (Err(Fault::Data(_)), [(run, write)]) = (&answers, refs.as_slice())
            && let Some(write) = write.in_ascii()
        {
            answers = self.write(scope, &[(run, &write)], lock_wait).await;
        }
        let settled = |answer| match answer {
            Answer::Settled(outcome) => Some(outcome),
            Answer::Busy => None,
        };
        Ok(answers?.into_iter().map(settled).collect())
    }
}

/// Sleeps, and waits for events.
#[derive(Debug)]
pub(crate) struct Suspends {
    pub(crate) store: Store,
}

impl Batch for Suspends {
    type Key = (Scope, SuspendKind);
    type Item = (RunRef, Suspend);
    type Out = Awaited;
    type Id = Uuid;
    const NAME: &'static str = "suspend";
    const SHEDS: bool = false;
    // Each item is a function call, and the batch holds the events of all its items until its end.
    const ITEMS_MAX: usize = 100;

    fn identity(item: &Self::Item) -> Uuid {
        item.0.run_id
    }

    fn knows_itself(_: &Self::Item) -> bool {
        false
    }

    fn scope(key: &Self::Key) -> &Scope {
        &key.0
    }

    fn store(&self) -> &Store {
        &self.store
    }

    async fn execute(
        &self,
        (scope, kind): &Self::Key,
        items: &[&Self::Item],
        _: Option<Duration>,
    ) -> Result<Outcomes<Self>, Fault> {
        let items: Vec<(&RunRef, &Suspend)> = items.iter().map(|(run, what)| (run, what)).collect();
        self.store.suspend(scope, *kind, &items).await
    }
}

/// Emissions of events.
#[derive(Debug)]
pub(crate) struct Emits {
    pub(crate) store: Store,
}

impl Batch for Emits {
    type Key = Scope;
    type Item = (EventName, Option<JsonText>);
    type Out = Emission;
    type Id = String;
    const NAME: &'static str = "emit";
    const SHEDS: bool = true;
    const ITEMS_MAX: usize = 500;

    fn identity(item: &Self::Item) -> String {
        item.0.as_str().to_owned()
    }

    fn knows_itself(_: &Self::Item) -> bool {
        true
    }

    fn scope(key: &Self::Key) -> &Scope {
        key
    }

    fn store(&self) -> &Store {
        &self.store
    }

    async fn execute(
        &self,
        scope: &Scope,
        items: &[&Self::Item],
        lock_wait: Option<Duration>,
    ) -> Result<Outcomes<Self>, Fault> {
        let items: Vec<(&EventName, Option<&JsonText>)> =
            items.iter().map(|(event, payload)| (event, payload.as_ref())).collect();
        let wait = if lock_wait.is_some() { Wait::Block } else { Wait::Skip };
        let lock_wait = lock_wait.unwrap_or(Duration::from_millis(50));
        let emitted = self.store.event_emit(scope, &items, wait, lock_wait).await?;
        Ok(emitted.into_iter().map(|emission| emission.map(Ok)).collect())
    }
}
