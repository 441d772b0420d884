//! The operations of the server. Each carries out a write and its consequences: returned credit, woken dispatchers, and
//! hints to waiting calls and other replicas.

mod spawns;

use std::sync::Arc;
use std::time::Duration;

use scopeguard::{ScopeGuard, guard};
use tokio::time::Instant as Deadline;
use uuid::Uuid;

use self::spawns::Spawns;
use crate::activity::{Activity, Feed, What};
use crate::awaited::AwaitedTasks;
use crate::backlog::Backlog;
use crate::commit::{self, Committer, Emits, Settles, Suspends};
use crate::counts::Counts;
use crate::dispatch::{DispatchOptions, Dispatcher};
use crate::domain::{Digest, Error, EventName, Instant, JsonText, QueueName, Settled, State, TaskId};
use crate::hints::Hints;
use crate::hot_retries::HotRetries;
use crate::looks::Looks;
use crate::maintenance::{self, Emissions, InUse};
use crate::planted::{self, Bug};
use crate::scope::{Caller, Scope};
use crate::store::batch::{Kind, RunRef, Write};
use crate::store::event::StepWait;
use crate::store::pool::{Role, connections};
use crate::store::suspend::{Awaited, Suspend};
use crate::store::task::{NewTask, Slotted, Spawned};
use crate::store::turns::Turns;
use crate::store::{Fault, LOCK_WAIT_PATIENT, Store};
use crate::sweeps::Sweeps;
use crate::wait::Waits;

/// The parts of a server that requests use.
#[derive(Debug)]
pub struct Engine {
    /// Access to the database.
    pub store: Store,
    /// Claim streams and `ClaimTask` calls.
    pub dispatcher: Dispatcher,
    /// Calls that wait for the end of a task.
    pub waits: Arc<Waits>,
    /// Runs that wait for tasks.
    pub awaited: AwaitedTasks,
    /// Hints to other replicas.
    pub hints: Arc<Hints>,
    /// Looks at queues, with troubled queues apart.
    pub looks: Arc<Looks>,
    /// Sweeps of expired leases and cancellation policies.
    pub sweeps: Sweeps,
    /// Queues without a stream here that are looked at as often as those with one.
    pub in_use: InUse,
    /// Unfinished emissions that this replica continues.
    pub emissions: Emissions,
    /// Mean pause between looks at the queues in use.
    pub(crate) tick: Duration,
    /// Held while a round installs missing doorbells.
    pub(crate) hanging: tokio::sync::Mutex<()>,
    /// Shared counts of queues.
    pub counts: Counts,
    /// Activities for the live lines of `absurd dev`.
    pub feed: Feed,
    spawns: Spawns,
    spawner: Committer<Spawns>,
    /// Lets callers' own batches use at most half of the work connections.
    bulk: Turns,
    settles: Committer<Settles>,
    suspends: Committer<Suspends>,
    emits: Committer<Emits>,
    backlog: Backlog,
    hot_retries: HotRetries,
}

/// Bounds on waiting writes and tasks, and the pace of looks.
#[derive(Debug, Clone, Copy)]
pub struct EngineOptions {
    /// Maximum number of writes of each kind that wait for their batch.
    pub waiting_max: usize,
    /// Maximum number of claimable tasks in one queue; None: no bound.
    pub backlog_max: Option<i64>,
    /// Mean pause between looks at the queues in use, jittered by a third; all queues are looked at a tenth as often.
    /// No setting changes it. Tests of hints make it so long that no look stands in for a hint.
    pub tick: Duration,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { waiting_max: 50_000, backlog_max: None, tick: maintenance::TICK }
    }
}

impl Engine {
    /// Builds all parts on one store; starts no background task.
    pub fn new(store: Store, hints: Arc<Hints>, options: DispatchOptions, bounds: EngineOptions) -> Self {
        let most = bounds.waiting_max;
        let settles = Committer::new(Settles { store: store.clone() }, most);
        let feed = Feed::default();
        let dispatcher = Dispatcher::new(store.clone(), settles.clone(), Arc::clone(&hints), feed.clone(), options);
        let looks = Arc::new(Looks::new(store.clone(), Arc::clone(&hints), dispatcher.clone()));
        let spawns = Spawns { store: store.clone(), dispatcher: dispatcher.clone() };
        Self {
            dispatcher,
            waits: Arc::default(),
            awaited: AwaitedTasks::default(),
            looks,
            sweeps: Sweeps::default(),
            in_use: InUse::default(),
            emissions: Emissions::default(),
            tick: bounds.tick,
            hanging: tokio::sync::Mutex::default(),
            counts: Counts::default(),
            spawner: Committer::new(spawns.clone(), most),
            bulk: Turns::new(connections(Role::Work, store.options().connections_max) / 2),
            spawns,
            settles,
            suspends: Committer::new(Suspends { store: store.clone() }, most),
            emits: Committer::new(Emits { store: store.clone() }, most),
            backlog: Backlog::new(bounds.backlog_max),
            hot_retries: HotRetries::default(),
            hints,
            feed,
            store,
        }
    }

    /// Writes of all kinds that wait for their batch.
    pub fn waiting(&self) -> usize {
        self.spawner.waiting() + self.settles.waiting() + self.suspends.waiting() + self.emits.waiting()
    }

    /// Work in flight: non-zero counts by kind. Empty soon after the last caller has gone, also when callers abandoned
    /// their calls.
    pub fn under_way(&self) -> Vec<(&'static str, usize)> {
        let lanes = self.spawner.lanes() + self.settles.lanes() + self.suspends.lanes() + self.emits.lanes();
        let queues =
            [self.sweeps.under_way(), self.emissions.under_way(), self.looks.under_way(), self.waits.under_way()];
        let mut all = vec![
            ("waits", self.waits.count()),
            ("awaited tasks", self.waits.tasks()),
            ("streams", self.dispatcher.streams()),
            ("releases", self.dispatcher.releasing()),
            ("writes", self.waiting()),
            ("lanes", lanes),
            ("turns", self.bulk.held()),
            ("store", self.store.held()),
            ("queues", queues.iter().sum()),
        ];
        all.retain(|(_, count)| *count > 0);
        all
    }

    /// Installs the doorbell on those of these queues that lack it. The wide tick retries failures.
    pub async fn hang_doorbells(&self, queues: &[&str]) {
        if !self.hints.doorbell() {
            return;
        }
        let missing = self.store.doorbell_missing(queues).await.unwrap_or_else(|fault| {
            tracing::debug!(?fault, "could not see which queues have a doorbell");
            Vec::new()
        });
        for queue in missing.iter().filter(|queue| !self.store.is_locked(queue)) {
            let Ok(name) = QueueName::parse("queue", queue) else { continue };
            if let Err(fault) = self.store.queue_doorbell(&Caller::anonymous().scope(name)).await {
                tracing::debug!(queue.name = queue, ?fault, "could not hang the doorbell; will try again");
            }
        }
    }

    /// Spawns one task, in a batch with other callers' spawns.
    pub async fn spawn(&self, scope: &Scope, task: NewTask, deadline: Deadline) -> Result<Spawned, Error> {
        let name = task.name.as_str().to_owned();
        let keyed = task.idempotency_key.is_some();
        self.admit(scope, usize::from(task.start.is_none()), deadline).await?;
        let spawned = self.spawner.submit((scope.clone(), keyed), task, deadline).await?;
        self.spawned(scope, &spawned, name);
        Ok(spawned)
    }

    /// Spawns all tasks or none, in one transaction.
    pub async fn spawn_all(
        &self,
        scope: &Scope,
        tasks: Vec<NewTask>,
        deadline: Deadline,
    ) -> Result<Vec<Spawned>, Error> {
        let tasks: Arc<[NewTask]> = tasks.into();
        // A task with a start time does not count as backlog.
        let at_once = tasks.iter().filter(|task| task.start.is_none()).count();
        self.admit(scope, at_once, deadline).await?;
        let left = deadline.saturating_duration_since(Deadline::now());
        let turn = self.bulk.take(tasks.len(), left).await.map_err(|after| match deadline > Deadline::now() {
            true => Error::TooManyRequests { after },
            false => Error::DeadlineExceeded,
        })?;
        let attempt = |left| self.spawn_once(scope, &tasks, left);
        let outcomes = match commit::until(&self.store, deadline, scope, attempt).await? {
            Ok(outcomes) => outcomes,
            Err(Fault::Data(_)) => return Err(self.find_bad_task(scope, &tasks).await),
            Err(fault) => return Err(fault.into_error(scope)),
        };
        drop(turn);
        let mut spawned = Vec::with_capacity(outcomes.len());
        for (index, outcome) in outcomes.into_iter().enumerate() {
            spawned.push(outcome.map_err(|error| error.within(&format!("tasks[{index}]")))?);
        }
        for (task, spawned) in tasks.iter().zip(&spawned) {
            self.spawned(scope, spawned, task.name.as_str().to_owned());
        }
        Ok(spawned)
    }

    /// Admits tasks, or fails with [`Error::BacklogFull`]. While the queue is locked, the count waits until the
    /// deadline.
    async fn admit(&self, scope: &Scope, tasks: usize, deadline: Deadline) -> Result<(), Error> {
        let queue = scope.queue().as_str();
        let late = |_| match self.store.is_locked(queue) {
            true => Error::QueueLocked { queue: queue.to_owned() },
            false => Error::DeadlineExceeded,
        };
        tokio::time::timeout_at(deadline, self.backlog.admit(&self.store, scope, tasks)).await.map_err(late)?
    }

    /// Runs as a tokio task: a caller that goes away must not leave tasks claimed for workers that never receive them.
    async fn spawn_once(
        &self,
        scope: &Scope,
        tasks: &Arc<[NewTask]>,
        lock_wait: Duration,
    ) -> Result<Vec<Result<Spawned, Error>>, Fault> {
        let (spawns, scope, tasks) = (self.spawns.clone(), scope.clone(), Arc::clone(tasks));
        let work = tokio::spawn(async move {
            let all: Vec<&NewTask> = tasks.iter().collect();
            spawns.spawn(&scope, &all, lock_wait, true).await
        });
        work.await.unwrap_or_else(|error| Err(Fault::Bug(error.to_string())))
    }

    /// Finds the task whose value Postgres refused although the server's own check accepted it. Halves the list, with
    /// one rolled back spawn per step.
    async fn find_bad_task(&self, scope: &Scope, tasks: &[NewTask]) -> Error {
        let (mut from, mut to) = (0, tasks.len());
        while to - from > 1 {
            let middle = from.midpoint(to);
            let half: Vec<Slotted<'_>> = tasks[from..middle].iter().map(|task| (task, None)).collect();
            match self.store.task_spawn_all(scope, &half, Duration::from_secs(1), false).await {
                Ok(_) => from = middle,
                Err(Fault::Data(_)) => to = middle,
                Err(fault) => return fault.into_error(scope),
            }
        }
        Error::Json { field: format!("tasks[{from}]"), problem: "holds a value that Postgres cannot store".into() }
    }

    fn spawned(&self, scope: &Scope, spawned: &Spawned, name: String) {
        if spawned.fresh {
            self.feed.tell(|| Activity {
                queue: scope.queue().as_str().to_owned(),
                task_id: spawned.task_id,
                what: What::Spawned { name },
            });
        }
    }

    /// Carries out one write about a run, in a batch with other callers' writes.
    pub async fn settle(&self, scope: &Scope, run: RunRef, write: Write, deadline: Deadline) -> Result<Settled, Error> {
        let run_id = run.run_id;
        let kind = write.kind();
        self.dispatcher.alive(scope.queue(), run_id, run.digest.as_ref(), None);
        if planted::is(Bug::EarlyAck) && kind == Kind::Complete {
            return Ok(self.forget(scope, run, write));
        }
        let digest = run.digest.clone();
        let outcome = self.settles.submit((scope.clone(), kind), (run, write), deadline).await;
        self.settled(scope, (run_id, digest.as_ref()), kind, &outcome);
        outcome
    }

    /// The planted bug [`Bug::EarlyAck`]: acknowledges a completion before its commit.
    fn forget(&self, scope: &Scope, run: RunRef, write: Write) -> Settled {
        let (settles, key) = (self.settles.clone(), (scope.clone(), write.kind()));
        self.dispatcher.left(scope.queue(), run.run_id);
        tokio::spawn(async move {
            let soon = Deadline::now() + Duration::from_millis(300);
            let _ = settles.submit(key, (run, write), soon).await;
        });
        Settled { task_id: Uuid::nil(), replayed: false, claim_expires_at: None, applied: true, failed: None }
    }

    /// Carries out writes about one run, in order and in one transaction. The first that fails stops the later ones.
    pub async fn settle_in_order(
        &self,
        scope: &Scope,
        run: RunRef,
        writes: Vec<Write>,
        deadline: Deadline,
    ) -> Vec<Result<Settled, Error>> {
        self.dispatcher.alive(scope.queue(), run.run_id, run.digest.as_ref(), None);
        let kinds: Vec<Kind> = writes.iter().map(Write::kind).collect();
        let (run_id, digest) = (run.run_id, run.digest.clone());
        let (store, scope_) = (self.store.clone(), scope.clone());
        // A tokio task, so that a caller that goes away does not stop the sequence half-way.
        let work = tokio::spawn(async move { commit::sequence(&store, &scope_, &run, &writes, deadline).await });
        let outcomes =
            work.await.unwrap_or_else(|error| kinds.iter().map(|_| Err(Error::Internal(error.to_string()))).collect());
        for (kind, outcome) in kinds.iter().zip(&outcomes) {
            self.settled(scope, (run_id, digest.as_ref()), *kind, outcome);
        }
        outcomes
    }

    fn settled(
        &self,
        scope: &Scope,
        (run_id, digest): (Uuid, Option<&Digest>),
        kind: Kind,
        outcome: &Result<Settled, Error>,
    ) {
        let queue = scope.queue();
        match (kind, outcome) {
            (Kind::Extend | Kind::Checkpoint, Ok(settled)) => {
                self.dispatcher.alive(queue, run_id, digest, settled.claim_expires_at);
            }
            (Kind::Complete, Ok(settled)) => {
                self.dispatcher.left(queue, run_id);
                self.ended(scope, settled.task_id, State::Completed);
            }
            (Kind::Release, Ok(_)) => {
                self.dispatcher.left_claim(queue, run_id, digest);
                self.dispatcher.new_work(scope.queue());
            }
            (Kind::Fail, Ok(settled)) => {
                self.dispatcher.left(queue, run_id);
                let Some(failed) = settled.failed else { return };
                match failed.task_state {
                    State::Pending => {
                        self.dispatcher.new_work(scope.queue());
                        if let Some((_, attempt, _)) = failed.next.filter(|_| !settled.replayed) {
                            self.hot_retries.note(&self.store, scope, settled.task_id, attempt);
                        }
                    }
                    State::Sleeping => {
                        let ms = failed.next_in_ms.max(0).unsigned_abs();
                        self.dispatcher.note_available(queue, Duration::from_millis(ms));
                    }
                    State::Running | State::Completed | State::Failed | State::Cancelled => {}
                }
                self.ended(scope, settled.task_id, failed.task_state);
            }
            (
                _,
                Err(
                    Error::ClaimLost(_)
                    | Error::ClaimExpired(_)
                    | Error::TaskCancelled(_)
                    | Error::RunNotRunning { .. },
                ),
            ) => {
                // The claim is over. A stale token must not free a newer claim's credit, so the periodic check of
                // claims decides. Only cancelled tasks and expired claims free it now.
                if matches!(outcome, Err(Error::TaskCancelled(_) | Error::ClaimExpired(_))) {
                    self.dispatcher.left(queue, run_id);
                }
            }
            (_, Err(_)) => {}
        }
    }

    fn ended(&self, scope: &Scope, task_id: TaskId, state: State) {
        if state.is_terminal() {
            self.waits.ended(scope.queue(), task_id);
            self.awaited.ended(scope.queue(), task_id);
        }
        self.feed.tell(|| Activity::ended(scope, task_id, state));
    }

    /// Suspends a run for a sleep or a wait, in a batch with others. A run that sleeps is no longer in flight.
    pub async fn suspend(
        &self,
        scope: &Scope,
        run: RunRef,
        what: Suspend,
        deadline: Deadline,
    ) -> Result<Awaited, Error> {
        let run_id = run.run_id;
        self.dispatcher.alive(scope.queue(), run_id, run.digest.as_ref(), None);
        let digest = run.digest.clone();
        let outcome = self.suspends.submit((scope.clone(), what.kind()), (run, what), deadline).await;
        self.waited(scope, (run_id, digest.as_ref()), outcome)
    }

    /// Waits for the end of a task, as a step of a run.
    pub async fn await_task(
        &self,
        scope: &Scope,
        wait: &StepWait<'_>,
        awaited: (&QueueName, TaskId),
        deadline: Deadline,
    ) -> Result<Awaited, Error> {
        self.dispatcher.alive(scope.queue(), wait.run.run_id, wait.run.digest.as_ref(), None);
        // Runs also when the caller goes away or the answer is lost, because the run may sleep by then. The task may
        // have ended between the statement's look at it and now.
        let waits = guard((), |()| {
            self.awaited.begun();
            self.awaited.ended(awaited.0, awaited.1);
        });
        let attempt = |lock_wait| self.store.task_await(scope, wait, awaited, lock_wait);
        let other = Caller::anonymous().scope(awaited.0.clone());
        let outcome = commit::until_free(&self.store, deadline, &[scope, &other], attempt).await;
        let outcome = outcome.and_then(|done| done.unwrap_or_else(|fault| Err(fault.into_error(scope))));
        if matches!(outcome, Ok(Awaited::Payload(_) | Awaited::TimedOut)) {
            ScopeGuard::into_inner(waits);
        }
        self.waited(scope, (wait.run.run_id, wait.run.digest.as_ref()), outcome)
    }

    /// Updates the dispatcher after a wait or a sleep, and returns the outcome unchanged.
    fn waited(
        &self,
        scope: &Scope,
        (run_id, digest): (Uuid, Option<&Digest>),
        outcome: Result<Awaited, Error>,
    ) -> Result<Awaited, Error> {
        match &outcome {
            Ok(Awaited::Suspended(wake_at)) => self.sleeps(scope, (run_id, digest), *wake_at),
            Err(Error::TaskCancelled(_) | Error::ClaimExpired(_)) => self.dispatcher.left(scope.queue(), run_id),
            Ok(Awaited::Payload(_) | Awaited::TimedOut) => self.dispatcher.spoke(scope.queue(), run_id),
            Err(_) => {}
        }
        outcome
    }

    fn sleeps(&self, scope: &Scope, (run_id, digest): (Uuid, Option<&Digest>), wake_at: Option<Instant>) {
        self.dispatcher.left_claim(scope.queue(), run_id, digest);
        let wait = wake_at.zip(self.store.now()).map(|(at, now)| at.micros().saturating_sub(now.micros()).max(0));
        if let Some(wait) = wait {
            self.dispatcher.note_available(scope.queue(), Duration::from_micros(wait.unsigned_abs()));
        }
    }

    /// Emits an event; returns whether this call set the payload, and how many runs it woke. Runs are woken batch by
    /// batch and offered at once. Those that still wait at the deadline are woken by a replica's next chores.
    pub async fn emit_event(
        &self,
        scope: &Scope,
        event: EventName,
        payload: Option<JsonText>,
        deadline: Deadline,
    ) -> Result<(bool, i64), Error> {
        let first = self.emits.submit(scope.clone(), (event.clone(), payload), deadline).await?;
        if first.woken > 0 {
            self.dispatcher.new_work(scope.queue());
        }
        let mut woken = first.woken;
        if first.more {
            woken += self.emit_more(scope, &event, deadline).await;
        }
        Ok((first.applied, woken))
    }

    /// Continues to wake the runs that wait for an emitted event, until `until`; returns how many it woke.
    pub async fn emit_more(&self, scope: &Scope, event: &EventName, until: Deadline) -> i64 {
        let mut woken = 0;
        while let Some(left) = until.checked_duration_since(Deadline::now()).filter(|left| !left.is_zero()) {
            match self.store.event_emit_more(scope, event, left.min(LOCK_WAIT_PATIENT)).await {
                Ok(batch) => {
                    woken += batch.woken;
                    if batch.woken > 0 {
                        self.dispatcher.new_work(scope.queue());
                    }
                    if !batch.more {
                        break;
                    }
                }
                Err(fault) => {
                    // The event is stored, so the caller gets no error.
                    tracing::debug!(queue.name = %scope.queue(), ?fault, "could not wake all that wait for an event yet");
                    break;
                }
            }
        }
        woken
    }

    /// Cancels a task. Returns whether this call cancelled it, and its state now.
    pub async fn cancel_task(
        &self,
        scope: &Scope,
        task_id: TaskId,
        deadline: Deadline,
    ) -> Result<(bool, State), Error> {
        let attempt = |lock_wait| self.store.task_cancel(scope, task_id, lock_wait);
        let done = commit::until_free(&self.store, deadline, &[scope], attempt).await?;
        let (done, state) = done.map_err(|fault| fault.into_error(scope))??;
        if done {
            self.ended(scope, task_id, state);
        }
        Ok((done, state))
    }

    /// Cancels the task of a pending or sleeping run. Returns whether this call cancelled it, its state now, and its
    /// id.
    pub async fn cancel_run(
        &self,
        scope: &Scope,
        run_id: Uuid,
        deadline: Deadline,
    ) -> Result<(bool, State, TaskId), Error> {
        let attempt = |lock_wait| self.store.task_cancel_by_run(scope, run_id, lock_wait);
        let done = commit::until_free(&self.store, deadline, &[scope], attempt).await?;
        let (done, state, task_id) = done.map_err(|fault| fault.into_error(scope))??;
        if done {
            self.ended(scope, task_id, state);
        }
        Ok((done, state, task_id))
    }
}
