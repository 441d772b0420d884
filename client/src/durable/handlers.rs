//! The registrations of a program: handlers with their defaults, and hooks. They complete each spawn with its defaults.

use std::collections::HashMap;
use std::fmt;
use std::sync::{PoisonError, RwLock};

use super::backend::BoxFuture;
use super::context::Context;
use super::error::BoxError;
use super::hooks::{Execution, Hooks};
use super::spawn::SpawnDraft;
use super::task::{Handler, Registered};
use super::trace;
use crate::{Error, Json, NewTask};

/// Maximum number of attempts of a spawn that names none.
pub(crate) const DEFAULT_MAX_ATTEMPTS: i32 = 5;

/// The handlers by task name, the defaults and the hooks.
pub(crate) struct Handlers {
    queue: String,
    by_name: RwLock<HashMap<String, Registered>>,
    default_max_attempts: i32,
    hooks: Hooks,
}

impl fmt::Debug for Handlers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handlers").field("queue", &self.queue).finish_non_exhaustive()
    }
}

impl Handlers {
    pub(crate) fn new(queue: &str, default_max_attempts: i32, hooks: Hooks) -> Self {
        Self { queue: queue.to_owned(), by_name: RwLock::default(), default_max_attempts, hooks }
    }

    /// The queue of tasks and registrations that name none.
    pub(crate) fn queue(&self) -> &str {
        &self.queue
    }

    pub(crate) fn register(&self, name: &str, registered: Registered) {
        self.by_name.write().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), registered);
    }

    pub(crate) fn find(&self, name: &str) -> Option<Registered> {
        self.by_name.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// Queue of the tasks of this name: that of their registration, else the default queue.
    pub(crate) fn queue_of(&self, name: &str) -> String {
        self.find(name).map_or_else(|| self.queue.clone(), |task| task.queue)
    }

    /// Runs a handler, inside the hook if there is one.
    pub(crate) fn execute(&self, context: Context, handler: Handler) -> BoxFuture<'static, Result<Json, BoxError>> {
        match &self.hooks.wrap_task_execution {
            Some(hook) => hook(context.clone(), Execution { context, handler }),
            None => handler(context),
        }
    }

    /// Calls the hook `before_spawn`, then takes the unset options of the spawn from its registration. Returns the
    /// queue too. `parent` is the spawning task.
    pub(crate) async fn resolve(
        &self,
        draft: SpawnDraft,
        parent: Option<&Context>,
    ) -> Result<(String, NewTask), Error> {
        let draft = match &self.hooks.before_spawn {
            Some(hook) => hook(draft).await.map_err(|error| Error::argument("before_spawn", error))?,
            None => draft,
        };
        let registered = self.find(&draft.task_name);
        let queue = match (&registered, draft.queue) {
            (Some(task), Some(asked)) if asked != task.queue => {
                let problem = format!(
                    "{:?} is registered for queue {:?} but spawn requested queue {asked:?}",
                    draft.task_name, task.queue
                );
                return Err(Error::argument("queue", problem));
            }
            (Some(task), _) => task.queue.clone(),
            (None, Some(asked)) => asked,
            (None, None) => {
                let problem = format!("{:?} is not registered: say which queue it belongs to", draft.task_name);
                return Err(Error::argument("queue", problem));
            }
        };
        let mut options = draft.options;
        let default = |registered: &Registered| registered.default_max_attempts;
        if !draft.attempts_given {
            let registered = registered.as_ref().and_then(default);
            options.max_attempts = Some(registered.unwrap_or(self.default_max_attempts));
        }
        if !draft.cancellation_given
            && let Some(rules) = registered.and_then(|task| task.default_cancellation)
        {
            options.cancellation = rules;
        }
        trace::inject(&mut options.headers, parent.map(Context::headers));
        Ok((queue, NewTask::with_json(&draft.task_name, draft.params, options)))
    }
}
