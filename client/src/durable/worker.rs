//! Workers: they claim the tasks of a queue and execute the handlers that are registered for them.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Map;
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;
use tracing::Instrument as _;
use uuid::Uuid;

use super::app::Absurd;
use super::backend::Remote;
use super::context::{Context, Facts, Place};
use super::drive::{Outcome, drive};
use super::error::{Signal, reason};
use super::task::Registered;
use super::trace;
use crate::{ClaimOptions, ClaimStream, ClaimedTask, Error, Json, Reason, Revoked, StreamOptions};

/// Shortest deferral of a task that has no handler here. The deferral uses up no attempt.
const DEFER_MIN: Duration = Duration::from_secs(15);
/// Longest addition to the deferral, which the run's id determines.
const DEFER_SPREAD_MS: u64 = 15_000;

/// Longest time to give back the tasks that did not end within the grace.
const GIVE_BACK_MAX: Duration = Duration::from_secs(2);

type OnError = Arc<dyn Fn(&WorkerError) + Send + Sync>;

/// An error outside of a handler.
#[derive(Debug)]
pub struct WorkerError {
    /// Id of the task that the error is about, if there is one.
    pub task_id: Option<Uuid>,
    /// The operation that failed, such as `completing a task`.
    pub doing: &'static str,
    /// The error of that operation.
    pub error: Error,
}

impl fmt::Display for WorkerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.doing, self.error)
    }
}

/// Options of a worker.
#[derive(Clone)]
pub struct WorkerOptions {
    /// Worker id to store with each claim; `None` means the client's worker id.
    pub worker_id: Option<String>,
    /// Lease of each claim. The stream extends it while the task is worked on, and each checkpoint extends it too.
    pub claim_timeout: Duration,
    /// Maximum number of tasks executed at once.
    pub concurrency: usize,
    /// Number of claimed tasks that wait here for a free slot, so that no slot idles for a round trip.
    pub prefetch: usize,
    /// Longest wait for running tasks when the worker is stopped.
    pub grace: Duration,
    on_error: OnError,
}

impl fmt::Debug for WorkerOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerOptions")
            .field("worker_id", &self.worker_id)
            .field("claim_timeout", &self.claim_timeout)
            .field("concurrency", &self.concurrency)
            .field("prefetch", &self.prefetch)
            .field("grace", &self.grace)
            .finish_non_exhaustive()
    }
}

impl Default for WorkerOptions {
    fn default() -> Self {
        Self {
            worker_id: None,
            claim_timeout: Duration::from_secs(120),
            concurrency: 1,
            prefetch: 0,
            grace: Duration::from_secs(30),
            on_error: Arc::new(|error| tracing::error!(task.id = ?error.task_id, %error, "a worker's call failed")),
        }
    }
}

impl WorkerOptions {
    /// Sets the maximum number of tasks executed at once.
    #[must_use]
    pub fn concurrency(mut self, tasks: usize) -> Self {
        self.concurrency = tasks;
        self
    }

    /// Sets the lease of each claim.
    #[must_use]
    pub fn claim_timeout(mut self, lease: Duration) -> Self {
        self.claim_timeout = lease;
        self
    }

    /// Sets the number of claimed tasks that wait here for a free slot.
    #[must_use]
    pub fn prefetch(mut self, tasks: usize) -> Self {
        self.prefetch = tasks;
        self
    }

    /// Sets the longest wait for running tasks when the worker is stopped.
    #[must_use]
    pub fn grace(mut self, limit: Duration) -> Self {
        self.grace = limit;
        self
    }

    /// Sets the function that is called on an error outside of a handler; the default logs it.
    #[must_use]
    pub fn on_error(mut self, on_error: impl Fn(&WorkerError) + Send + Sync + 'static) -> Self {
        self.on_error = Arc::new(on_error);
        self
    }
}

/// A running worker. If it is dropped, it stops as after [`Worker::begin_stop`].
#[derive(Debug)]
pub struct Worker {
    stop: watch::Sender<bool>,
    ended: JoinHandle<()>,
}

impl Worker {
    /// Takes no more tasks, waits for running tasks at most for the grace, and ends. Leases are extended until then. A
    /// handler that has not ended by then is dropped, and its task is given back without using up the attempt. A
    /// blocking handler cannot be stopped: its task can be claimed again when its lease ends.
    pub async fn stop(self) {
        self.stop.send_replace(true);
        let _ = self.ended.await;
    }

    /// Asks the worker to stop as [`Worker::stop`] does, without waiting.
    pub fn begin_stop(&self) {
        self.stop.send_replace(true);
    }
}

impl Absurd {
    /// Starts a worker on the client's queue. It reconnects by itself, and runs until it is stopped.
    pub async fn start_worker(&self, options: WorkerOptions) -> Result<Worker, Error> {
        let client = self.client_for(options.worker_id.as_deref());
        let in_flight = options.concurrency.max(1).saturating_add(options.prefetch);
        let stream = client
            .claim_stream(StreamOptions {
                max_in_flight: i32::try_from(in_flight).unwrap_or(i32::MAX),
                claim_timeout: options.claim_timeout,
                ..StreamOptions::default()
            })
            .await?;
        let stop = watch::Sender::new(false);
        let ended = tokio::spawn(work(self.clone(), options, stream, stop.subscribe()));
        Ok(Worker { stop, ended })
    }

    /// Runs a worker until the process is asked to end (SIGINT, SIGTERM), and then stops it as [`Worker::stop`] does.
    pub async fn run_worker(&self, options: WorkerOptions) -> Result<(), Error> {
        // Listens before anything is claimed: a worker with a claimed task must be ready to be stopped.
        let told = told_to_end();
        let worker = self.start_worker(options).await?;
        told.await;
        worker.stop().await;
        Ok(())
    }

    /// Claims once, and executes the claimed tasks one after the other. Returns their number.
    pub async fn work_batch(&self, options: WorkerOptions, batch_size: i32) -> Result<usize, Error> {
        let client = self.client_for(options.worker_id.as_deref());
        let claim = ClaimOptions::default().claim_timeout(options.claim_timeout).qty(batch_size);
        let claimed = client.claim_task(claim).await?;
        let count = claimed.len();
        let never = watch::Sender::new(false);
        for task in claimed {
            execute(self, &options, task, None, never.subscribe()).await;
        }
        Ok(count)
    }

    /// The context of a task that the program claimed itself, for programs that execute tasks in their own way. Its
    /// steps, sleeps and waits are those of handlers. The caller completes or fails the task, unless [`Context::over`]
    /// has resolved. `lease` is that of the claim; each checkpoint extends it.
    pub async fn context_of(&self, task: &ClaimedTask, lease: Duration) -> Result<Context, Error> {
        let headers = headers(task).map_err(|error| Error::argument("headers", error))?;
        context(self, task, headers, lease, None, None).await
    }

    fn client_for(&self, worker_id: Option<&str>) -> crate::AbsurdClient {
        let client = self.client();
        worker_id.map_or_else(|| client.clone(), |worker_id| client.with_worker_id(worker_id))
    }
}

/// Resolves when the process is asked to end. It listens from this call on, not from the first poll.
#[cfg(unix)]
fn told_to_end() -> impl Future<Output = ()> {
    use tokio::signal::unix::{SignalKind, signal};
    let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    async move {
        let (Ok(mut terminate), Ok(mut interrupt)) = signals else { return std::future::pending().await };
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
}

#[cfg(not(unix))]
async fn told_to_end() {
    let _ = tokio::signal::ctrl_c().await;
}

/// The worker's loop: one task per free slot.
async fn work(absurd: Absurd, options: WorkerOptions, mut stream: ClaimStream, mut stop: watch::Receiver<bool>) {
    let concurrency = u32::try_from(options.concurrency.max(1)).unwrap_or(u32::MAX);
    let places = Arc::new(Semaphore::new(options.concurrency.max(1)));
    let mut running = JoinSet::new();
    // True once executions that still run must be ended.
    let over = watch::Sender::new(false);
    loop {
        let place = tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop) => break,
            place = Arc::clone(&places).acquire_owned() => place,
        };
        let Ok(place) = place else { break };
        let task = tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop) => break,
            task = stream.next() => task,
        };
        let Some(task) = task else { break };
        let (absurd, options) = (absurd.clone(), options.clone());
        let over = over.subscribe();
        running.spawn(async move { execute(&absurd, &options, task, Some(Arc::new(place)), over).await });
        while running.try_join_next().is_some() {}
    }
    // The stream extends the leases of running tasks until they are settled.
    let (grace, on_error) = (options.grace, Arc::clone(&options.on_error));
    let drained = async {
        let finished = async {
            while running.join_next().await.is_some() {}
            // Threads of blocking handlers may hold a slot longer than their executions.
            let _ = places.acquire_many(concurrency).await;
        };
        if tokio::time::timeout(grace, finished).await.is_err() {
            over.send_replace(true);
            let _ = tokio::time::timeout(GIVE_BACK_MAX, async { while running.join_next().await.is_some() {} }).await;
        }
    };
    let (closed, ()) = tokio::join!(stream.close(grace + GIVE_BACK_MAX), drained);
    if let Err(error) = closed {
        on_error(&WorkerError { task_id: None, doing: "ending the stream", error });
    }
}

/// Deferral of a task that has no handler here: 15 to 30 s, the same for the same run.
fn deferral(run_id: Uuid) -> Duration {
    let spread = run_id.as_u128() % u128::from(DEFER_SPREAD_MS);
    DEFER_MIN + Duration::from_millis(u64::try_from(spread).unwrap_or(0))
}

/// Executes one claimed task, from its claim to its end in this process.
async fn execute(
    absurd: &Absurd,
    options: &WorkerOptions,
    task: ClaimedTask,
    place: Option<Place>,
    over: watch::Receiver<bool>,
) {
    let span = tracing::info_span!(
        "absurd.task",
        task.name = task.task_name,
        task.id = %task.task_id,
        run.id = %task.run_id,
        run.attempt = task.attempt,
        trace.parent = tracing::field::Empty,
    );
    trace::go_on(&span, &headers(&task).unwrap_or_default());
    let report = |doing, error: Error| {
        // A claim that is over needs no report: the run is another worker's, has ended or is gone.
        if !error.is_claim_over() {
            (options.on_error)(&WorkerError { task_id: Some(task.task_id), doing, error });
        }
    };
    let Some(registered) = absurd.handlers().find(&task.task_name) else {
        let delay = deferral(task.run_id);
        tracing::warn!(task.name = task.task_name, task.id = %task.task_id, ?delay, "nobody here knows this task: deferred");
        let Err(error) = task.release(delay).await else { return };
        if !error.is_claim_over() {
            // Fails the run with the reason, instead of holding it until its lease ends.
            let _ = task.fail_json(reason("DeferralFailed", error.message(), None)).await;
        }
        report("deferring an unknown task", error);
        return;
    };
    let outcome = run(absurd, options, &task, &registered, place, over).instrument(span).await;
    let (doing, settled) = match outcome {
        Outcome::Completed(result) => match task.complete_json(result).await {
            Err(error) if is_refused(&error) => {
                let refused = reason("ResultRefused", error.message(), None);
                ("failing a task", task.fail_json(refused).await.map(drop))
            }
            completed => ("completing a task", completed),
        },
        Outcome::Failed(reason) => ("failing a task", task.fail_json(reason).await.map(drop)),
        Outcome::FailedForGood(reason) => ("failing a task", task.fail_with(reason, true).await.map(drop)),
        Outcome::Over(signal) => {
            tracing::debug!(task.id = %task.task_id, %signal, "the execution is over");
            return;
        }
        Outcome::Unread(error) => ("reading checkpoints", Err(error)),
        // The handler's thread goes on: the lease must end before another worker begins.
        Outcome::LeftOff if registered.is_blocking => return,
        Outcome::LeftOff => ("giving a task back", task.release(Duration::ZERO).await),
    };
    if let Err(error) = settled {
        report(doing, error);
    }
}

/// Whether the server will refuse this result however often it is sent.
fn is_refused(error: &Error) -> bool {
    use Reason::{DatabaseRefused, InvalidArgument, JsonInvalid, PayloadTooLarge};
    matches!(error.reason(), JsonInvalid | PayloadTooLarge | InvalidArgument | DatabaseRefused)
}

fn headers(task: &ClaimedTask) -> Result<Map<String, serde_json::Value>, serde_json::Error> {
    let headers: Option<Map<String, serde_json::Value>> = task.headers.as_ref().map(Json::to).transpose()?.flatten();
    Ok(headers.unwrap_or_default())
}

async fn run(
    absurd: &Absurd,
    options: &WorkerOptions,
    task: &ClaimedTask,
    registered: &Registered,
    place: Option<Place>,
    mut over: watch::Receiver<bool>,
) -> Outcome {
    let queue = absurd.client().queue_name();
    if registered.queue != queue {
        let message = format!(
            "queue mismatch: {:?} is registered for queue {:?}, not {queue:?}",
            task.task_name, registered.queue
        );
        return Outcome::Failed(reason("QueueMismatch", &message, None));
    }
    let Ok(headers) = headers(task) else {
        return Outcome::Failed(reason("InvalidHeaders", "invalid task headers: they are not a JSON object", None));
    };
    let deadline = registered.timeout.map(|timeout| Instant::now() + timeout);
    let context = match context(absurd, task, headers, options.claim_timeout, deadline, place).await {
        Ok(context) => context,
        Err(error) => return Outcome::Unread(error),
    };
    let left_off = async {
        if over.wait_for(|over| *over).await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    drive(absurd.handlers(), context, Arc::clone(&registered.handler), revoked(task), left_off).await
}

async fn revoked(task: &ClaimedTask) -> Signal {
    match task.revoked().await {
        Revoked::Lost => Signal::Lost,
        Revoked::Expired => Signal::Failed,
        Revoked::Cancelled => Signal::Cancelled,
    }
}

async fn context(
    absurd: &Absurd,
    task: &ClaimedTask,
    headers: Map<String, serde_json::Value>,
    lease: Duration,
    deadline: Option<Instant>,
    place: Option<Place>,
) -> Result<Context, Error> {
    let stored = checkpoints(absurd, task).await?;
    let facts = Facts {
        task_id: task.task_id,
        run_id: task.run_id,
        attempt: task.attempt,
        task_name: task.task_name.clone(),
        queue: absurd.client().queue_name().to_owned(),
        params: task.params.clone().unwrap_or_else(Json::null),
        headers,
        max_attempts: task.max_attempts,
        claimed_at: task.claim_expires_at.and_then(|end| end.checked_sub(lease)),
        deadline,
        lease,
        place,
    };
    let backend = Remote::of(task, absurd.client(), lease);
    Ok(Context::new(facts, Arc::clone(absurd.handlers()), Arc::new(backend), stored))
}

/// Checkpoints that the run may see: those of the claim if they are complete, else those read from the server.
async fn checkpoints(absurd: &Absurd, task: &ClaimedTask) -> Result<Vec<(String, Json)>, Error> {
    let value = |state: Option<Json>| state.unwrap_or_else(Json::null);
    if task.checkpoints_complete {
        return Ok(task.checkpoints.iter().map(|(name, state)| (name.clone(), value(state.clone()))).collect());
    }
    let all = absurd.client().get_all_checkpoints(task.task_id, task.run_id).await?;
    Ok(all.into_iter().map(|stored| (stored.checkpoint_name, value(stored.state))).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn an_unknown_task_is_deferred_by_its_run() {
        for _ in 0..100 {
            let run = Uuid::now_v7();
            let delay = deferral(run);
            assert!(delay >= DEFER_MIN && delay < DEFER_MIN * 2, "{delay:?}");
            assert_eq!(delay, deferral(run));
        }
    }

    /// The deferrals of many runs differ, and spread over seconds.
    #[test]
    fn deferrals_are_spread() {
        let delays: HashSet<Duration> = (0..100).map(|_| deferral(Uuid::now_v7())).collect();
        assert!(delays.len() > 50, "{} different deferrals of 100", delays.len());
        let (first, last) = (delays.iter().min(), delays.iter().max());
        assert!(last > first.map(|first| *first + DEFER_MIN / 3).as_ref(), "{first:?} to {last:?}");
    }
}
