//! Task types: a name with the types of params and result; and the registration under that name.

use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::backend::BoxFuture;
use super::context::Context;
use super::error::{BoxError, TaskError};
use crate::{CancellationRules, Json};

/// A type of task: its name, and the types of its params and its result. Spawners and workers share it.
///
/// ```
/// use absurd_client::durable::TaskType;
/// # #[derive(serde::Serialize, serde::Deserialize)] struct Order;
/// # #[derive(serde::Serialize, serde::Deserialize)] struct Receipt;
/// const FULFIL: TaskType<Order, Receipt> = TaskType::new("order-fulfillment");
/// # assert_eq!(FULFIL.name(), "order-fulfillment");
/// ```
pub struct TaskType<P, R> {
    name: &'static str,
    queue: Option<&'static str>,
    types: PhantomData<fn(P) -> R>,
}

impl<P, R> TaskType<P, R> {
    /// The type of the tasks with this name.
    pub const fn new(name: &'static str) -> Self {
        Self { name, queue: None, types: PhantomData }
    }

    /// Sets the queue of these tasks, for every spawn and every registration.
    #[must_use]
    pub const fn on_queue(self, queue: &'static str) -> Self {
        Self { queue: Some(queue), ..self }
    }

    /// Name of the tasks.
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// Queue of the tasks; `None` when this type sets none.
    pub const fn queue(&self) -> Option<&'static str> {
        self.queue
    }
}

impl<P, R> Clone for TaskType<P, R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P, R> Copy for TaskType<P, R> {}

impl<P, R> fmt::Debug for TaskType<P, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TaskType").field("name", &self.name).field("queue", &self.queue).finish()
    }
}

impl<P, R> From<&'static str> for TaskType<P, R> {
    fn from(name: &'static str) -> Self {
        Self::new(name)
    }
}

/// Options of a registration.
#[derive(Debug, Clone, Default)]
pub struct TaskOptions {
    /// Queue of these tasks; `None` means that of the [`TaskType`], else the client's.
    pub queue: Option<String>,
    /// Maximum number of attempts of a spawn that names none; `None` means the default of the program's `Absurd`.
    pub default_max_attempts: Option<i32>,
    /// Cancellation rules of a spawn that names none.
    pub default_cancellation: Option<CancellationRules>,
    /// Longest duration of one execution in this process; an attempt that takes longer fails. `None` means no limit.
    pub timeout: Option<Duration>,
}

/// A handler that reads its params from the context and returns its result as JSON.
pub(crate) type Handler = Arc<dyn Fn(Context) -> BoxFuture<'static, Result<Json, BoxError>> + Send + Sync>;

/// The registration of a task.
#[derive(Clone)]
pub(crate) struct Registered {
    pub(crate) queue: String,
    pub(crate) default_max_attempts: Option<i32>,
    pub(crate) default_cancellation: Option<CancellationRules>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) handler: Handler,
    /// The handler runs on a thread, which goes on after its execution is over.
    pub(crate) is_blocking: bool,
}

impl fmt::Debug for Registered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registered").field("queue", &self.queue).finish_non_exhaustive()
    }
}

/// Wraps a typed handler: params are deserialized before the call, and the result is serialized after it.
pub(crate) fn erased<P, R, E, F, Fut>(handler: F) -> Handler
where
    P: DeserializeOwned + Send + 'static,
    R: Serialize + Send + 'static,
    E: Into<BoxError> + 'static,
    F: Fn(Context, P) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<R, E>> + Send + 'static,
{
    let handler = Arc::new(handler);
    Arc::new(move |context| {
        let handler = Arc::clone(&handler);
        Box::pin(async move {
            let params = context.params::<P>()?;
            let result = handler(context, params).await.map_err(Into::into)?;
            result_json(&result)
        })
    })
}

pub(crate) fn result_json<R: Serialize>(result: &R) -> Result<Json, BoxError> {
    let text = serde_json::to_string(result).map_err(|error| TaskError::json("the task's result", error))?;
    Ok(Json::from_text(text))
}
