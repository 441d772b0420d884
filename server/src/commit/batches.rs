//! The kinds of items that are committed in batches: outcomes and steps; sleeps and waits; emissions. Each kind defines
//! the identity of an item and the statement of a batch. Spawns, the remaining kind, are in `engine/spawns.rs`.

use std::time::Duration;

use uuid::Uuid;

use super::{Batch, Outcomes};
use crate::domain::{EventName, JsonText, Settled};
use crate::scope::Scope;
use crate::store::batch::{Answer, Kind, RunRef, Via, Write};
use crate::store::event::Emission;
use crate::store::suspend::{Awaited, Suspend, SuspendKind};
use crate::store::{Fault, Store, Wait, batch};

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
