//! The backend of a task in memory: checkpoints, events, ends of tasks, and a clock that the test moves.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use serde_json::{Map, Value};
use tonic::Code;
use uuid::Uuid;

use super::Wake;
use crate::durable::backend::{AwaitedTask, Backend, BoxFuture, TaskWait, Until};
use crate::durable::context::parse_time;
use crate::{Awaited, Emitted, Error, Json, NewTask, Reason, Slept, Spawned, State};

/// Start of a task's time: 2000-01-01T00:00:00Z, in seconds since 1970.
const START: u64 = 946_684_800;

/// A task that the task under test has spawned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpawnedTask {
    /// Id of the task, for [`super::TestTask::complete`].
    pub task_id: Uuid,
    /// Queue of the task.
    pub queue: String,
    /// Name of the task.
    pub task_name: String,
    /// Params of the task.
    pub params: Json,
    /// Headers of the task; empty when there are none.
    pub headers: Map<String, Value>,
    /// Maximum number of attempts; `None` means no limit.
    pub max_attempts: Option<i32>,
    key: Option<String>,
}

/// State of the task under test.
#[derive(Debug)]
pub(super) struct Inside {
    pub(super) task_id: Uuid,
    pub(super) now: SystemTime,
    pub(super) checkpoints: Vec<(String, Json)>,
    pub(super) events: HashMap<String, Json>,
    pub(super) emitted: Vec<(String, Json)>,
    pub(super) ended: HashMap<Uuid, crate::TaskResult>,
    pub(super) spawned: Vec<SpawnedTask>,
    pub(super) wake: Option<Wake>,
    pub(super) cancelled: bool,
    pub(super) crash: Option<String>,
    /// Deadlines of waits that have begun, by checkpoint; `None` means no timeout.
    deadlines: HashMap<String, Option<SystemTime>>,
    timed_out: HashSet<String>,
}

/// The state of the task, shared by the test and the context.
#[derive(Debug)]
pub(super) struct Memory(Mutex<Inside>);

impl Memory {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Inside {
            task_id: Uuid::now_v7(),
            now: SystemTime::UNIX_EPOCH + Duration::from_secs(START),
            checkpoints: Vec::new(),
            events: HashMap::new(),
            emitted: Vec::new(),
            ended: HashMap::new(),
            spawned: Vec::new(),
            wake: None,
            cancelled: false,
            crash: None,
            deadlines: HashMap::new(),
            timed_out: HashSet::new(),
        }))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inside {
    pub(super) fn checkpoint(&self, name: &str) -> Option<&Json> {
        self.checkpoints.iter().find(|(stored, _)| stored == name).map(|(_, value)| value)
    }

    pub(super) fn store(&mut self, name: String, value: Json) {
        match self.checkpoints.iter_mut().find(|(stored, _)| *stored == name) {
            Some((_, stored)) => *stored = value,
            None => self.checkpoints.push((name, value)),
        }
    }

    /// The condition that the task still sleeps on. If it is met, wakes the task and returns `None`.
    pub(super) fn sleeping(&mut self) -> Option<Wake> {
        let late = |until: &Option<SystemTime>| until.is_some_and(|until| until <= self.now);
        let awake = match self.wake.as_ref()? {
            Wake::At(at) => *at <= self.now,
            Wake::Event { name, until } => self.events.contains_key(name) || late(until),
            Wake::Task { task_id, until } => self.ended.contains_key(task_id) || late(until),
        };
        if awake {
            self.wake = None;
        }
        self.wake.clone()
    }

    fn check(&self) -> Result<(), Error> {
        if self.cancelled {
            return Err(Error::new(Reason::TaskCancelled, Code::FailedPrecondition, "the task was cancelled"));
        }
        Ok(())
    }

    /// Stores a checkpoint, or fails once if the test asked for a crash before it.
    fn write(&mut self, name: String, value: Json) -> Result<(), Error> {
        if self.crash.as_deref() == Some(name.as_str()) {
            self.crash = None;
            return Err(Error::new(Reason::ClaimLost, Code::FailedPrecondition, "the test wanted a crash here"));
        }
        self.store(name, value);
        Ok(())
    }

    /// Deadline of a wait, counted from its first call; `Err` when the wait has timed out.
    fn deadline(&mut self, step: &str, timeout: Option<Duration>) -> Result<Option<SystemTime>, ()> {
        let now = self.now;
        let until = *self.deadlines.entry(step.to_owned()).or_insert_with(|| timeout.map(|timeout| now + timeout));
        if self.timed_out.contains(step) || until.is_some_and(|until| until <= now) {
            self.timed_out.insert(step.to_owned());
            return Err(());
        }
        Ok(until)
    }

    fn sleep(&mut self, step: String, until: Until) -> Result<Slept, Error> {
        self.check()?;
        let stored = self.checkpoint(&step).and_then(|value| value.to::<String>().ok());
        let wake_at = match stored.as_deref().and_then(parse_time) {
            Some(wake_at) => wake_at,
            None => {
                let wake_at = match until {
                    Until::After(duration) => self.now + duration,
                    Until::At(at) => at,
                };
                self.write(step, Value::from(humantime::format_rfc3339_micros(wake_at).to_string()).into())?;
                wake_at
            }
        };
        if wake_at <= self.now {
            return Ok(Slept::Elapsed);
        }
        self.wake = Some(Wake::At(wake_at));
        Ok(Slept::Suspended { wake_at })
    }

    fn await_event(&mut self, step: String, name: String, timeout: Option<Duration>) -> Result<Awaited, Error> {
        self.check()?;
        if self.timed_out.contains(&step) {
            return Ok(Awaited::TimedOut);
        }
        if let Some(payload) = self.events.get(&name).cloned() {
            self.write(step, payload.clone())?;
            return Ok(Awaited::Payload(payload));
        }
        let Ok(until) = self.deadline(&step, timeout) else { return Ok(Awaited::TimedOut) };
        self.wake = Some(Wake::Event { name, until });
        Ok(Awaited::Suspended { wake_at: until })
    }

    fn await_task(&mut self, wait: TaskWait) -> Result<AwaitedTask, Error> {
        self.check()?;
        if wait.task_id == self.task_id {
            return Err(Error::argument("task_id", "a task cannot wait for its own end"));
        }
        if self.timed_out.contains(&wait.step) {
            return Ok(AwaitedTask::TimedOut);
        }
        if let Some(end) = self.ended.get(&wait.task_id).cloned() {
            let with = match (&end.state, &end.result, &end.failure) {
                (State::Completed, result, _) => {
                    format!(",\"result\":{}", result.as_ref().map_or("null", Json::as_str))
                }
                (State::Failed, _, Some(failure)) => format!(",\"failure\":{failure}"),
                _ => String::new(),
            };
            self.write(wait.step, Json::from_text(format!("{{\"state\":\"{}\"{with}}}", end.state)))?;
            return Ok(AwaitedTask::Ended(end));
        }
        let Ok(until) = self.deadline(&wait.step, wait.timeout) else { return Ok(AwaitedTask::TimedOut) };
        self.wake = Some(Wake::Task { task_id: wait.task_id, until });
        Ok(AwaitedTask::Suspended { wake_at: until })
    }

    fn spawn(&mut self, queue: &str, task: NewTask) -> Spawned {
        let task = task.wire;
        let key = task.idempotency_key;
        let known =
            key.is_some().then(|| self.spawned.iter().find(|spawned| spawned.queue == queue && spawned.key == key));
        if let Some(known) = known.flatten() {
            let task_id = known.task_id;
            return Spawned { task_id, run_id: task_id, workflow_run_id: task_id, attempt: 1, created: false };
        }
        let task_id = Uuid::now_v7();
        let headers = Json::from_wire(task.headers).and_then(|headers| headers.to().ok()).unwrap_or_default();
        self.spawned.push(SpawnedTask {
            task_id,
            queue: queue.to_owned(),
            task_name: task.task_name,
            params: Json::from_wire(task.params).unwrap_or_else(Json::null),
            headers,
            max_attempts: task.max_attempts,
            key,
        });
        Spawned { task_id, run_id: task_id, workflow_run_id: task_id, attempt: 1, created: true }
    }
}

/// A future that is ready with this answer.
fn now<'a, T: Send + 'a>(answer: T) -> BoxFuture<'a, T> {
    Box::pin(std::future::ready(answer))
}

impl Backend for Memory {
    fn set_checkpoint(&self, name: String, state: Json) -> BoxFuture<'_, Result<(), Error>> {
        let mut inside = self.lock();
        now(inside.check().and_then(|()| inside.write(name, state)))
    }

    fn sleep(&self, step: String, until: Until) -> BoxFuture<'_, Result<Slept, Error>> {
        now(self.lock().sleep(step, until))
    }

    fn await_event(
        &self,
        step: String,
        event: String,
        timeout: Option<Duration>,
    ) -> BoxFuture<'_, Result<Awaited, Error>> {
        now(self.lock().await_event(step, event, timeout))
    }

    fn await_task(&self, wait: TaskWait) -> BoxFuture<'_, Result<AwaitedTask, Error>> {
        now(self.lock().await_task(wait))
    }

    fn emit_event(&self, event: String, payload: Json) -> BoxFuture<'_, Result<Emitted, Error>> {
        let mut inside = self.lock();
        inside.emitted.push((event.clone(), payload.clone()));
        let applied = !inside.events.contains_key(&event);
        inside.events.entry(event).or_insert(payload);
        now(Ok(Emitted { applied, woken: 0 }))
    }

    fn heartbeat(&self, _: Duration) -> BoxFuture<'_, Result<(), Error>> {
        now(self.lock().check())
    }

    fn spawn(&self, queue: String, tasks: Vec<NewTask>) -> BoxFuture<'_, Result<Vec<Spawned>, Error>> {
        let mut inside = self.lock();
        now(Ok(tasks.into_iter().map(|task| inside.spawn(&queue, task)).collect()))
    }
}
