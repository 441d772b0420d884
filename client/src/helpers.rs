//! The original client's helpers, under their names.

use std::fmt;
use std::time::{Duration, SystemTime};

use serde::Serialize;
use uuid::Uuid;

use crate::{AbsurdClient, Awaited, Error, Json, RetryStrategy, SpawnOptions, Spawned};

/// The run sleeps and its claim is over: free the worker, neither complete nor fail the run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AbsurdSleepError {
    /// The run.
    pub run_id: Option<Uuid>,
    /// What it waits for.
    pub event_name: Option<String>,
    /// When it wakes by itself; None: only the event wakes it.
    pub wake_at: Option<SystemTime>,
}

impl fmt::Display for AbsurdSleepError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the run sleeps")?;
        if let Some(event) = &self.event_name {
            write!(f, " until event {event:?} comes")?;
        }
        Ok(())
    }
}

impl std::error::Error for AbsurdSleepError {}

/// Why a wait has brought no payload.
#[derive(Debug, thiserror::Error)]
pub enum WaitError {
    /// The run sleeps now.
    #[error(transparent)]
    Sleep(#[from] AbsurdSleepError),
    /// The time was over before the event came; every later call of this step says the same.
    #[error("the event did not come in time")]
    Timeout,
    /// The call failed.
    #[error(transparent)]
    Call(#[from] Error),
}

impl AbsurdClient {
    /// Waits for an event, as a step with the name `step_name`: its payload, or the reason why there is none (yet).
    pub async fn wait_for_event(
        &self,
        run_id: Uuid,
        event_name: &str,
        timeout: Duration,
        step_name: &str,
    ) -> Result<Json, WaitError> {
        match self.await_event(run_id, step_name, event_name, Some(timeout)).await? {
            Awaited::Payload(payload) => Ok(payload),
            Awaited::Suspended { wake_at } => {
                Err(AbsurdSleepError { run_id: Some(run_id), event_name: Some(event_name.to_owned()), wake_at }.into())
            }
            Awaited::TimedOut => Err(WaitError::Timeout),
        }
    }
}

/// How often and how a task is retried.
#[derive(Debug, Clone)]
pub struct Retries {
    /// Attempts at most.
    pub max_attempts: i32,
    /// Delays between them.
    pub strategy: RetryStrategy,
}

impl Default for Retries {
    /// Three attempts, 30 s and 60 s apart.
    fn default() -> Self {
        let strategy = RetryStrategy::Exponential { base: Duration::from_secs(30), factor: 2.0, max: None };
        Self { max_attempts: 3, strategy }
    }
}

/// Spawns a task that is retried.
pub async fn spawn_retry_task<P: Serialize + ?Sized>(
    client: &AbsurdClient,
    task_name: &str,
    params: &P,
    retries: Retries,
) -> Result<Spawned, Error> {
    let options = SpawnOptions {
        max_attempts: Some(retries.max_attempts),
        retry_strategy: Some(retries.strategy),
        ..SpawnOptions::default()
    };
    client.spawn_task(task_name, params, options).await
}

/// Spawns a task with one attempt that is cancelled when nobody claims it in time, or when it takes too long.
pub async fn spawn_cancellable_task<P: Serialize + ?Sized>(
    client: &AbsurdClient,
    task_name: &str,
    params: &P,
    max_delay: Option<Duration>,
    max_duration: Option<Duration>,
) -> Result<Spawned, Error> {
    client.spawn_task(task_name, params, SpawnOptions { max_delay, max_duration, ..SpawnOptions::default() }).await
}
