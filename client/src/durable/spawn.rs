//! Spawns of durable tasks, from outside and from inside of other tasks.

use std::fmt;
use std::future::IntoFuture;

use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use super::app::Absurd;
use super::backend::BoxFuture;
use super::context::Context;
use super::error::TaskError;
use super::task::TaskType;
use crate::{CancellationRules, Error, Json, RetryStrategy, SpawnOptions, Spawned};

/// A requested spawn, before its defaults are filled in.
#[derive(Debug, Clone)]
pub struct SpawnDraft {
    pub(super) task_name: String,
    pub(super) params: Json,
    pub(super) queue: Option<String>,
    pub(super) options: SpawnOptions,
    pub(super) attempts_given: bool,
    pub(super) cancellation_given: bool,
}

impl SpawnDraft {
    pub(crate) fn of<P, R>(task: &TaskType<P, R>) -> Self {
        Self {
            task_name: task.name().to_owned(),
            params: Json::null(),
            queue: task.queue().map(str::to_owned),
            options: SpawnOptions::default(),
            attempts_given: false,
            cancellation_given: false,
        }
    }

    pub(crate) fn params(mut self, params: Json) -> Self {
        self.params = params;
        self
    }

    pub(crate) fn key(mut self, key: String) -> Self {
        self.options.idempotency_key = Some(key);
        self
    }

    pub(crate) fn has_key(&self) -> bool {
        self.options.idempotency_key.is_some()
    }

    pub(crate) fn or_queue(mut self, queue: &str) -> Self {
        // A child whose task is not registered here stays on its parent's queue.
        self.queue = self.queue.or_else(|| Some(queue.to_owned()));
        self
    }

    /// Name of the task.
    pub fn task_name(&self) -> &str {
        &self.task_name
    }

    /// Params of the task, as JSON text.
    pub fn params_json(&self) -> &Json {
        &self.params
    }

    /// Headers that are set so far.
    pub fn headers(&self) -> &serde_json::Map<String, Value> {
        &self.options.headers
    }

    /// Sets the queue of the task.
    #[must_use]
    pub fn queue(mut self, queue: impl Into<String>) -> Self {
        self.queue = Some(queue.into());
        self
    }

    /// Sets the maximum number of attempts.
    #[must_use]
    pub fn max_attempts(mut self, attempts: i32) -> Self {
        self.options = self.options.max_attempts(attempts);
        self.attempts_given = true;
        self
    }

    /// Allows any number of attempts.
    #[must_use]
    pub fn unlimited_attempts(mut self) -> Self {
        self.options = self.options.unlimited_attempts();
        self.attempts_given = true;
        self
    }

    /// Sets the rule for the delay before a retry. Without one, retries follow at once; with unlimited attempts, after
    /// delays that grow from 1 s to 5 minutes.
    #[must_use]
    pub fn retry(mut self, strategy: RetryStrategy) -> Self {
        self.options.retry_strategy = Some(strategy);
        self
    }

    /// Sets the cancellation rules. Empty rules remove those of the registration.
    #[must_use]
    pub fn cancellation(mut self, rules: CancellationRules) -> Self {
        self.options.cancellation = rules;
        self.cancellation_given = true;
        self
    }

    /// Adds a header, or replaces the header of this name.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.options.headers.insert(name.into(), value.into());
        self
    }

    /// If a task with this key exists in the queue, the spawn makes no second one.
    #[must_use]
    pub fn idempotency_key(self, key: impl Into<String>) -> Self {
        self.key(key.into())
    }
}

/// A spawn, which starts when it is awaited; see [`Absurd::spawn`].
#[must_use = "nothing is spawned before it is awaited"]
pub struct Spawn<'a, P> {
    pub(super) absurd: &'a Absurd,
    pub(super) draft: SpawnDraft,
    pub(super) params: &'a P,
}

impl<P> fmt::Debug for Spawn<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spawn").field("draft", &self.draft).finish_non_exhaustive()
    }
}

/// Methods of a spawn that call those of its draft.
macro_rules! as_on_the_draft {
    ($($(#[$doc:meta])* $name:ident($($argument:ident: $type:ty),*);)*) => {
        $(
            $(#[$doc])*
            pub fn $name(mut self, $($argument: $type),*) -> Self {
                self.draft = self.draft.$name($($argument),*);
                self
            }
        )*
    };
}

impl<P> Spawn<'_, P> {
    as_on_the_draft! {
        /// Sets the queue of the task.
        queue(queue: impl Into<String>);
        /// Sets the maximum number of attempts.
        max_attempts(attempts: i32);
        /// Allows any number of attempts.
        unlimited_attempts();
        /// Sets the rule for the delay before a retry. Without one, retries follow at once; with unlimited attempts,
        /// after delays that grow from 1 s to 5 minutes.
        retry(strategy: RetryStrategy);
        /// Sets the cancellation rules. Empty rules remove those of the registration.
        cancellation(rules: CancellationRules);
        /// Adds a header, or replaces the header of this name.
        header(name: impl Into<String>, value: impl Into<Value>);
        /// If a task with this key exists in the queue, the spawn makes no second one.
        idempotency_key(key: impl Into<String>);
    }
}

impl<'a, P: Serialize + Sync> IntoFuture for Spawn<'a, P> {
    type Output = Result<Spawned, Error>;
    type IntoFuture = BoxFuture<'a, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let draft = self.draft.params(Json::of(self.params)?);
            let (queue, task) = self.absurd.handlers().resolve(draft, None).await?;
            self.absurd.client().with_queue(queue).spawn_new_task(task).await
        })
    }
}

/// A spawn from inside a task, which starts when it is awaited; see [`Context::spawn`].
#[must_use = "nothing is spawned before it is awaited"]
pub struct ChildSpawn<'a, P> {
    pub(super) context: &'a Context,
    pub(super) draft: SpawnDraft,
    pub(super) params: &'a P,
}

impl<P> fmt::Debug for ChildSpawn<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChildSpawn").field("draft", &self.draft).finish_non_exhaustive()
    }
}

impl<P> ChildSpawn<'_, P> {
    /// Sets options of the spawn; the registration supplies the others.
    pub fn options(mut self, options: impl FnOnce(SpawnDraft) -> SpawnDraft) -> Self {
        self.draft = options(self.draft);
        self
    }
}

impl<'a, P: Serialize + Sync> IntoFuture for ChildSpawn<'a, P> {
    type Output = Result<Spawned, TaskError>;
    type IntoFuture = BoxFuture<'a, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let context = self.context;
            let step = context.begin_step(&format!("$spawn:{}", self.draft.task_name()))?;
            if let Some(done) = &step.state {
                let known: Known = done.to().map_err(|error| TaskError::json(&step.checkpoint_name, error))?;
                return Ok(known.spawned());
            }
            let mut draft = self.draft.params(Json::of(self.params).map_err(TaskError::Call)?);
            if !draft.has_key() {
                draft = draft.key(context.key(&step.checkpoint_name));
            }
            let (queue, task) = context.resolve(draft).await?;
            let spawned = context.backend().spawn(queue, vec![task]).await.map_err(TaskError::Call)?;
            let spawned = spawned.into_iter().next().ok_or_else(|| TaskError::Call(crate::wire::unclear()))?;
            context.complete_step(step, &Known::of(&spawned)).await?;
            Ok(spawned)
        })
    }
}

/// Value of a spawn's checkpoint.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Known {
    pub(super) task_id: Uuid,
    run_id: Uuid,
    attempt: i32,
    created: bool,
}

impl Known {
    fn of(spawned: &Spawned) -> Self {
        let Spawned { task_id, run_id, attempt, created, .. } = *spawned;
        Self { task_id, run_id, attempt, created }
    }

    fn spawned(self) -> Spawned {
        let Self { task_id, run_id, attempt, created } = self;
        Spawned { task_id, run_id, workflow_run_id: run_id, attempt, created }
    }
}
