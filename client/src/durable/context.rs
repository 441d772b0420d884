//! The context of one execution: steps, sleeps, waits, spawns.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::Instant;
use tracing::Instrument as _;
use uuid::Uuid;

use super::backend::{self, Backend, Until};
use super::error::{BoxError, Signal, TaskError};
use super::handlers::Handlers;
use super::spawn::{ChildSpawn, SpawnDraft};
use super::task::TaskType;
use super::wait::{EventWait, ResultWait};
use crate::{Emitted, Json, NewTask, Slept};

tokio::task_local! {
    static CURRENT: Context;
}

/// One slot of a worker, which is free again when its last holder is dropped.
pub(crate) type Place = Arc<OwnedSemaphorePermit>;

/// Data of an execution that do not change.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    pub(crate) task_id: Uuid,
    pub(crate) run_id: Uuid,
    pub(crate) attempt: i32,
    pub(crate) task_name: String,
    pub(crate) queue: String,
    pub(crate) params: Json,
    pub(crate) headers: Map<String, Value>,
    pub(crate) max_attempts: Option<i32>,
    /// Time of the claim by the database's clock; `None` when the lease never ends.
    pub(crate) claimed_at: Option<SystemTime>,
    /// Time at which this process ends the execution; `None` means never.
    pub(crate) deadline: Option<Instant>,
    pub(crate) lease: Duration,
    pub(crate) place: Option<Place>,
}

#[derive(Debug)]
struct Inside {
    facts: Facts,
    handlers: Arc<Handlers>,
    backend: Arc<dyn Backend>,
    /// Stored values by checkpoint name.
    stored: Mutex<HashMap<String, Json>>,
    /// Number of uses of each step name in this execution.
    uses: Mutex<HashMap<String, u32>>,
    signal: watch::Sender<Option<Signal>>,
}

/// One execution of a task, passed to its handler. Cheap to clone; all clones are the same execution.
///
/// The handler runs from its beginning each time: after a crash, a failure or a sleep. A step whose value is stored is
/// not executed again; code outside of steps is. Code that has an effect, or whose result varies (the clock, random
/// numbers, other services), therefore belongs into a step. Steps are identified by their names; the n-th use of a name
/// is `name#n`. Keep the names, and the order of equal names, while tasks are in progress.
#[derive(Debug, Clone)]
pub struct Context {
    inside: Arc<Inside>,
}

/// A step that was begun: done already, or to be completed.
#[derive(Debug, Clone)]
pub struct Step {
    /// Name that was given to [`Context::begin_step`].
    pub name: String,
    /// Name of its checkpoint: the name itself, or `name#n` for its n-th use.
    pub checkpoint_name: String,
    /// The stored value; `None` while the step is not done.
    pub state: Option<Json>,
}

impl Step {
    /// Whether a value is stored, so that the action must not be executed again.
    pub fn is_done(&self) -> bool {
        self.state.is_some()
    }

    pub(super) fn span(&self) -> tracing::Span {
        tracing::info_span!("absurd.step", step.name = self.checkpoint_name)
    }
}

impl Context {
    pub(crate) fn new(
        facts: Facts,
        handlers: Arc<Handlers>,
        backend: Arc<dyn Backend>,
        stored: impl IntoIterator<Item = (String, Json)>,
    ) -> Self {
        let inside = Inside {
            facts,
            handlers,
            backend,
            stored: Mutex::new(stored.into_iter().collect()),
            uses: Mutex::new(HashMap::new()),
            signal: watch::Sender::new(None),
        };
        Self { inside: Arc::new(inside) }
    }

    /// The context of the handler that runs in this Tokio task. `None` outside of handlers, and in Tokio tasks that a
    /// handler spawned.
    pub fn current() -> Option<Self> {
        CURRENT.try_with(Clone::clone).ok()
    }

    pub(crate) async fn scope<T>(self, work: impl Future<Output = T>) -> T {
        CURRENT.scope(self, work).await
    }

    /// Runs `work` on this thread with this as the current context.
    pub(super) fn scope_thread<T>(self, work: impl FnOnce() -> T) -> T {
        CURRENT.sync_scope(self, work)
    }

    /// The worker's slot, which stays taken while this is held.
    pub(super) fn place(&self) -> Option<Place> {
        self.facts().place.clone()
    }

    fn facts(&self) -> &Facts {
        &self.inside.facts
    }

    pub(super) fn backend(&self) -> &dyn Backend {
        &*self.inside.backend
    }

    /// Id of the task.
    pub fn task_id(&self) -> Uuid {
        self.facts().task_id
    }

    /// Id of the run, which is one attempt of the task.
    pub fn run_id(&self) -> Uuid {
        self.facts().run_id
    }

    /// Number of the attempt, from 1.
    pub fn attempt(&self) -> i32 {
        self.facts().attempt
    }

    /// Maximum number of attempts; `None` means no limit.
    pub fn max_attempts(&self) -> Option<i32> {
        self.facts().max_attempts
    }

    /// Name of the task.
    pub fn task_name(&self) -> &str {
        &self.facts().task_name
    }

    /// Name of the task's queue.
    pub fn queue_name(&self) -> &str {
        &self.facts().queue
    }

    /// Headers of the task; an empty map when there are none.
    pub fn headers(&self) -> &Map<String, Value> {
        &self.facts().headers
    }

    /// Time at which this process ends the execution; `None` means never.
    pub fn deadline(&self) -> Option<Instant> {
        self.facts().deadline
    }

    /// Input, deserialized.
    pub fn params<P: DeserializeOwned>(&self) -> Result<P, TaskError> {
        self.facts().params.to().map_err(|error| TaskError::json("the task's params", error))
    }

    /// Input as JSON text.
    pub fn params_json(&self) -> &Json {
        &self.facts().params
    }

    /// The signal that ended the execution; `None` while it goes on.
    pub fn signal(&self) -> Option<Signal> {
        *self.inside.signal.borrow()
    }

    /// Waits until there is a signal: the run sleeps, or this worker no longer holds it. A handler need not call this,
    /// because it is dropped then.
    pub async fn over(&self) -> Signal {
        let mut signals = self.inside.signal.subscribe();
        loop {
            if let Some(signal) = *signals.borrow_and_update() {
                return signal;
            }
            if signals.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Ends the execution with a signal and returns that as an error. A later signal does not replace the first.
    pub(crate) fn end(&self, signal: Signal) -> TaskError {
        self.inside.signal.send_if_modified(|known| {
            let first = known.is_none();
            *known = known.or(Some(signal));
            first
        });
        TaskError::Signal(self.signal().unwrap_or(signal))
    }

    pub(super) fn check(&self) -> Result<(), TaskError> {
        self.signal().map_or(Ok(()), |signal| Err(TaskError::Signal(signal)))
    }

    /// Error of a failed call; a signal also ends the execution.
    pub(super) fn failed(&self, error: crate::Error) -> TaskError {
        match backend::failed(error) {
            TaskError::Signal(signal) => self.end(signal),
            other => other,
        }
    }

    pub(super) fn stored(&self, checkpoint: &str) -> Option<Json> {
        self.inside.stored.lock().unwrap_or_else(PoisonError::into_inner).get(checkpoint).cloned()
    }

    pub(super) fn remember(&self, checkpoint: String, value: Json) {
        self.inside.stored.lock().unwrap_or_else(PoisonError::into_inner).insert(checkpoint, value);
    }

    /// The next checkpoint of a name: `name`, `name#2`, `name#3`, ...
    pub(super) fn next_name(&self, name: &str) -> Result<String, TaskError> {
        if name.trim().is_empty() {
            return Err(TaskError::failure("InvalidStepName", "a step's name must not be blank"));
        }
        let mut uses = self.inside.uses.lock().unwrap_or_else(PoisonError::into_inner);
        let count = uses.entry(name.to_owned()).or_insert(0);
        *count += 1;
        Ok(if *count == 1 { name.to_owned() } else { format!("{name}#{count}") })
    }

    /// Executes an action once. The first time its value is stored under the step's name; later the stored value is
    /// returned and `action` is not called. If `action` fails, nothing is stored, and the next attempt calls it again.
    ///
    /// An action that took effect, but crashed before its value was stored, is called again too. Give the other side a
    /// key to recognise it by, such as the task's id and the step's name.
    pub async fn step<T, E, F, Fut>(&self, name: &str, action: F) -> Result<T, TaskError>
    where
        T: Serialize + DeserializeOwned,
        E: Into<BoxError>,
        F: FnOnce() -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        let step = self.begin_step(name)?;
        if let Some(value) = &step.state {
            return value.to().map_err(|error| TaskError::json(&step.checkpoint_name, error));
        }
        let value = action().instrument(step.span()).await.map_err(|error| TaskError::of_step(error.into()))?;
        self.complete_step(step, &value).await?;
        Ok(value)
    }

    /// Begins a step that [`Context::complete_step`] completes, for code that cannot be one closure.
    pub fn begin_step(&self, name: &str) -> Result<Step, TaskError> {
        self.check()?;
        let checkpoint_name = self.next_name(name)?;
        let state = self.stored(&checkpoint_name);
        Ok(Step { name: name.to_owned(), checkpoint_name, state })
    }

    /// Stores the value of a begun step, and extends the lease. A step that was done already keeps its value. Returns
    /// the stored value.
    pub async fn complete_step<T: Serialize + ?Sized>(&self, step: Step, value: &T) -> Result<Json, TaskError> {
        self.check()?;
        if let Some(state) = step.state {
            return Ok(state);
        }
        let text = serde_json::to_string(value).map_err(|error| TaskError::json(&step.checkpoint_name, error))?;
        let state = Json::from_text(text);
        let stored = self.backend().set_checkpoint(step.checkpoint_name.clone(), state.clone()).await;
        stored.map_err(|error| self.failed(error))?;
        self.remember(step.checkpoint_name, state.clone());
        Ok(state)
    }

    /// Sleeps, as step `name`. The time counts from the first call, by the database's clock; the run holds no slot
    /// meanwhile.
    pub async fn sleep_for(&self, name: &str, duration: Duration) -> Result<(), TaskError> {
        self.sleep(name, Until::After(duration)).await
    }

    /// Sleeps until a time of the database's clock, as step `name`.
    pub async fn sleep_until(&self, name: &str, at: SystemTime) -> Result<(), TaskError> {
        self.sleep(name, Until::At(at)).await
    }

    async fn sleep(&self, name: &str, until: Until) -> Result<(), TaskError> {
        self.check()?;
        let checkpoint = self.next_name(name)?;
        if let Some(stored) = self.stored(&checkpoint) {
            // A sleep that was over when the run was claimed needs no call.
            let wake_at = stored.to::<String>().ok().and_then(|text| parse_time(&text));
            if let (Some(wake_at), Some(claimed_at)) = (wake_at, self.facts().claimed_at)
                && wake_at <= claimed_at
            {
                return Ok(());
            }
        }
        match self.backend().sleep(checkpoint, until).await {
            Ok(Slept::Elapsed) => Ok(()),
            Ok(Slept::Suspended { .. }) => Err(self.end(Signal::Suspended)),
            Err(error) => Err(self.failed(error)),
        }
    }

    /// Waits for an event, as a step: `ctx.await_event::<Shipment>("shipment.packed:42").timeout(day).await?`. The run
    /// holds no slot meanwhile. A timeout is remembered: the step times out in every later execution.
    pub fn await_event<T: DeserializeOwned>(&self, event: &str) -> EventWait<T> {
        let step = format!("$awaitEvent:{event}");
        EventWait {
            context: self.clone(),
            event: event.to_owned(),
            step,
            timeout: None,
            payload: std::marker::PhantomData,
        }
    }

    /// Waits for the end of a task, as a step: `ctx.await_task_result(&CHILD, id).await?`. The run holds no slot
    /// meanwhile, so that it may wait for tasks of its own queue. If the task did not complete, the error is a failure
    /// named `TaskFailed` or `TaskCancelled`.
    pub fn await_task_result<P, R: DeserializeOwned>(&self, task: &TaskType<P, R>, task_id: Uuid) -> ResultWait<R> {
        let queue = task.queue().map_or_else(|| self.inside.handlers.queue_of(task.name()), str::to_owned);
        let step = format!("$awaitTaskResult:{task_id}");
        ResultWait { context: self.clone(), task_id, queue, step, timeout: None, result: std::marker::PhantomData }
    }

    /// Emits an event on the task's queue. This is no step: the first emission of a name wins, so that repeating it is
    /// harmless.
    pub async fn emit_event<T: Serialize + ?Sized>(&self, event: &str, payload: &T) -> Result<Emitted, TaskError> {
        self.check()?;
        let payload = serde_json::to_string(payload).map_err(|error| TaskError::json(event, error))?;
        let emitted = self.backend().emit_event(event.to_owned(), Json::from_text(payload)).await;
        emitted.map_err(TaskError::Call)
    }

    /// Extends the lease to the worker's full claim timeout from now on. No handler needs this, because the worker
    /// extends leases by itself. The call finds out whether this worker still holds the run.
    pub async fn heartbeat(&self) -> Result<(), TaskError> {
        self.heartbeat_for(self.facts().lease).await
    }

    /// Extends the lease to `extend_by` from now on, in whole seconds.
    pub async fn heartbeat_for(&self, extend_by: Duration) -> Result<(), TaskError> {
        self.check()?;
        self.backend().heartbeat(extend_by).await.map_err(|error| self.failed(error))
    }

    /// Spawns a task from inside this one, once: a replay gets the same task.
    pub fn spawn<'a, P: Serialize, R>(&'a self, task: &TaskType<P, R>, params: &'a P) -> ChildSpawn<'a, P> {
        ChildSpawn { context: self, draft: SpawnDraft::of(task), params }
    }

    /// Spawns many tasks of one type, once. Each call spawns up to 1,000 of them, all or none. After a crash between
    /// two calls a replay repeats all calls, which makes no task twice.
    pub async fn spawn_all<P: Serialize, R>(
        &self,
        task: &TaskType<P, R>,
        params: impl IntoIterator<Item = P>,
    ) -> Result<Vec<Uuid>, TaskError> {
        let step = self.begin_step(&format!("$spawn:{}", task.name()))?;
        if let Some(done) = &step.state {
            return done.to().map_err(|error| TaskError::json(&step.checkpoint_name, error));
        }
        let mut drafts = Vec::new();
        for (index, params) in params.into_iter().enumerate() {
            let params = Json::of(&params).map_err(TaskError::Call)?;
            let key = self.key(&format!("{}:{index}", step.checkpoint_name));
            drafts.push(self.resolve(SpawnDraft::of(task).params(params).key(key)).await?);
        }
        let mut ids = Vec::with_capacity(drafts.len());
        // A hook may have changed the queues of some tasks.
        for part in drafts.chunk_by(|one, next| one.0 == next.0).flat_map(|same| same.chunks(1000)) {
            let tasks = part.iter().map(|(_, task)| task.clone()).collect();
            let spawned = self.backend().spawn(part[0].0.clone(), tasks).await.map_err(TaskError::Call)?;
            ids.extend(spawned.into_iter().map(|spawned| spawned.task_id));
        }
        self.complete_step(step, &ids).await?;
        Ok(ids)
    }

    pub(super) fn key(&self, checkpoint: &str) -> String {
        format!("{}:{checkpoint}", self.facts().task_id)
    }

    pub(super) async fn resolve(&self, draft: SpawnDraft) -> Result<(String, NewTask), TaskError> {
        let draft = draft.or_queue(&self.facts().queue);
        self.inside.handlers.resolve(draft, Some(self)).await.map_err(TaskError::Call)
    }
}

/// Parses RFC 3339 with `Z` or an offset of zero, with or without a fraction, as the SDKs store times.
pub(super) fn parse_time(text: &str) -> Option<SystemTime> {
    let text = text.strip_suffix("+00:00").map_or_else(|| text.to_owned(), |time| format!("{time}Z"));
    humantime::parse_rfc3339_weak(&text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_times_are_read_in_every_spelling() {
        let expected = humantime::parse_rfc3339("2026-11-26T04:00:00Z").expect("a time");
        for text in ["2026-11-26T04:00:00Z", "2026-11-26T04:00:00+00:00", "2026-11-26T04:00:00.000Z"] {
            assert_eq!(parse_time(text), Some(expected), "{text}");
        }
        let fraction = parse_time("2026-11-26T04:00:00.250000+00:00");
        assert_eq!(fraction, Some(expected + Duration::from_millis(250)));
        assert_eq!(parse_time("tomorrow"), None);
    }
}
