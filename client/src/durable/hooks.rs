//! Hooks: functions of the program that are called around spawns and executions.

use std::fmt;
use std::future::Future;
use std::sync::Arc;

use super::backend::BoxFuture;
use super::context::Context;
use super::error::BoxError;
use super::spawn::SpawnDraft;
use super::task::Handler;
use crate::Json;

pub(crate) type BeforeSpawn = Arc<dyn Fn(SpawnDraft) -> BoxFuture<'static, Result<SpawnDraft, BoxError>> + Send + Sync>;
pub(crate) type WrapExecution =
    Arc<dyn Fn(Context, Execution) -> BoxFuture<'static, Result<Json, BoxError>> + Send + Sync>;

/// Functions that are called around spawns and executions; see [`Absurd::with_hooks`](super::Absurd::with_hooks).
#[derive(Clone, Default)]
pub struct Hooks {
    pub(super) before_spawn: Option<BeforeSpawn>,
    pub(super) wrap_task_execution: Option<WrapExecution>,
}

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hooks")
            .field("before_spawn", &self.before_spawn.is_some())
            .field("wrap_task_execution", &self.wrap_task_execution.is_some())
            .finish()
    }
}

impl Hooks {
    /// Sets the function that is called with each spawn before its defaults are filled in. It may change headers,
    /// options and the queue.
    #[must_use]
    pub fn before_spawn<F, Fut, E>(mut self, hook: F) -> Self
    where
        F: Fn(SpawnDraft) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<SpawnDraft, E>> + Send + 'static,
        E: Into<BoxError> + 'static,
    {
        self.before_spawn = Some(Arc::new(move |draft| {
            let changed = hook(draft);
            Box::pin(async move { changed.await.map_err(Into::into) })
        }));
        self
    }

    /// Sets the function that is called in place of each execution. It must call [`Execution::run`] and return the
    /// result, which becomes that of the task.
    #[must_use]
    pub fn wrap_task_execution<F, Fut>(mut self, hook: F) -> Self
    where
        F: Fn(Context, Execution) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Json, BoxError>> + Send + 'static,
    {
        self.wrap_task_execution = Some(Arc::new(move |context, execution| Box::pin(hook(context, execution))));
        self
    }
}

/// The handler of one execution, ready to run; see [`Hooks::wrap_task_execution`].
pub struct Execution {
    pub(super) context: Context,
    pub(super) handler: Handler,
}

impl fmt::Debug for Execution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Execution").field("context", &self.context).finish_non_exhaustive()
    }
}

impl Execution {
    /// Runs the handler.
    pub async fn run(self) -> Result<Json, BoxError> {
        (self.handler)(self.context).await
    }
}
