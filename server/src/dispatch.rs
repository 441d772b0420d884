//! The dispatcher assigns claimed runs to streams. One loop per queue that has streams or `ClaimTask` calls on this
//! replica.
//!
//! Nothing is claimed without credit reserved before. A claim that no transport took is given back.

mod give_back;
mod hand_over;
pub mod outbox;
pub mod state;

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use crate::activity::{Activity, Feed};
use crate::commit::{Committer, Settles};
use crate::domain::{Claim, ClaimToken, Digest, Error, Instant as DbTime, QueueName, RunId, SessionId, Verdict};
use crate::hints::Hints;
use crate::jitter::random;
use crate::metrics;
use crate::scope::Scope;
use crate::store::batch::{RunRef, Write};
use crate::store::quarantine::Reason;
use crate::store::run::Claimed;
use crate::store::tick::QueueTick;
use crate::store::{Fault, Store};
use crate::tally::{Counted, Tally};
use outbox::{Message, Outbox};
use state::{Plan, Pull, Return, Spans, State, StreamId, StreamOptions, Turn};

/// Bytes of checkpoints sent along with each resumed task.
const CHECKPOINT_BUDGET: i64 = 512 * 1024;

/// Bounds and periods of claim streams.
#[derive(Debug, Clone, Copy)]
pub struct DispatchOptions {
    /// Pause between heartbeats.
    pub heartbeat: Duration,
    /// Mean age at which a stream ends as planned; each stream's own differs by up to a fifth.
    pub stream_age: Duration,
    /// Maximum number of streams on this replica.
    pub streams_max: usize,
    /// A stream whose peer takes no message for this long is closed; its undelivered claims are given back.
    pub stall_max: Duration,
}

impl Default for DispatchOptions {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(15),
            stream_age: Duration::from_secs(30 * 60),
            streams_max: 20_000,
            stall_max: Duration::from_secs(30),
        }
    }
}

#[derive(Debug)]
struct Queue {
    scope: Scope,
    state: Mutex<State>,
    bell: Notify,
    /// Held by a search for claims whose answer was lost, so that such searches use one connection at a time.
    searching: tokio::sync::Mutex<()>,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct Shared {
    store: Store,
    settles: Committer<Settles>,
    hints: Arc<Hints>,
    feed: Feed,
    options: DispatchOptions,
    queues: Mutex<HashMap<QueueName, Arc<Queue>>>,
    next_id: AtomicU64,
    streams: Tally,
    /// Releases and hand-overs in flight; a stopping server waits for them.
    releasing: Tally,
    closing: AtomicBool,
}

/// Handle to the dispatchers of all queues; clones share them.
#[derive(Debug, Clone)]
pub struct Dispatcher {
    shared: Arc<Shared>,
}

/// The facts that a new stream sends first.
#[derive(Debug)]
pub struct Opened {
    /// Id of the stream on this replica.
    pub stream_id: StreamId,
    /// Session that opened the stream.
    pub session_id: SessionId,
    /// Time after which the stream ends as planned.
    pub age: Duration,
    /// Each held token with its verdict and the end of its lease, in the order of the request.
    pub held: Vec<(String, Verdict, Option<DbTime>)>,
}

/// The transport's end of a stream. Dropping it closes the stream.
#[derive(Debug)]
pub struct Stream {
    id: StreamId,
    queue: Arc<Queue>,
    outbox: Arc<Outbox>,
    shared: Arc<Shared>,
    _counted: Counted,
}

impl Stream {
    /// The next message; `None` after the end of the stream.
    pub fn poll_next(&mut self, cx: &Context<'_>) -> Poll<Option<Message>> {
        let next = self.outbox.poll_next(cx);
        if let Poll::Ready(Some(Message::Task(claim))) = &next {
            let mut state = self.queue.lock();
            let timed = state.taken(self.id, claim.run_id, Instant::now());
            drop(state);
            if timed {
                self.queue.bell.notify_one();
            }
            self.shared.feed.tell(|| Activity::pushed(&self.queue.scope, claim));
        }
        next
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let leftover = self.queue.lock().close(self.id);
        self.queue.bell.notify_one();
        Dispatcher { shared: Arc::clone(&self.shared) }.clear_up(&self.queue, leftover);
    }
}

impl Dispatcher {
    /// A dispatcher without queues; the loop of a queue starts with its first stream or call.
    pub(crate) fn new(
        store: Store,
        settles: Committer<Settles>,
        hints: Arc<Hints>,
        feed: Feed,
        options: DispatchOptions,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                store,
                settles,
                hints,
                feed,
                options,
                queues: Mutex::new(HashMap::new()),
                next_id: AtomicU64::new(1),
                streams: Tally::default(),
                releasing: Tally::default(),
                closing: AtomicBool::new(false),
            }),
        }
    }

    /// The options given to this dispatcher.
    pub fn options(&self) -> DispatchOptions {
        self.shared.options
    }

    fn spans(&self) -> Spans {
        Spans { heartbeat: self.shared.options.heartbeat, stall: self.shared.options.stall_max }
    }

    fn queues(&self) -> MutexGuard<'_, HashMap<QueueName, Arc<Queue>>> {
        self.shared.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `act` on a queue's state, and starts the queue's loop if there is none. The lock of the map is held
    /// meanwhile, so that an idle loop cannot end in between.
    fn with_queue<T>(&self, scope: &Scope, act: impl FnOnce(&mut State) -> T) -> (Arc<Queue>, T) {
        let mut queues = self.queues();
        let queue = queues.entry(scope.queue().clone()).or_insert_with(|| {
            let queue = Arc::new(Queue {
                scope: scope.clone(),
                state: Mutex::new(State::default()),
                bell: Notify::new(),
                searching: tokio::sync::Mutex::default(),
            });
            tokio::spawn(self.clone().run(Arc::clone(&queue)));
            queue
        });
        let result = act(&mut queue.lock());
        queue.bell.notify_one();
        (Arc::clone(queue), result)
    }

    fn find(&self, queue: &QueueName) -> Option<Arc<Queue>> {
        self.queues().get(queue).cloned()
    }

    /// Whether a queue has a loop here. Such a queue exists, or news of its drop is on the way.
    pub fn knows(&self, queue: &QueueName) -> bool {
        self.find(queue).is_some()
    }

    /// Opens a stream. The caller has checked the options and that the queue exists.
    pub async fn open(
        &self,
        scope: &Scope,
        options: StreamOptions,
        held: Vec<String>,
    ) -> Result<(Stream, Opened), Error> {
        if self.shared.closing.load(Ordering::Relaxed) {
            return Err(Error::ShuttingDown);
        }
        let limit = self.shared.options.streams_max;
        let counted = self.shared.streams.begin_within(limit);
        let refused = || Error::StreamLimit { whose: "this replica has", limit, flag: "--max-streams" };
        let counted = counted.ok_or_else(refused)?;
        let verdicts = self.take_over(scope, &held).await;
        let kept: Vec<(ClaimToken, Option<DbTime>)> = held
            .iter()
            .zip(&verdicts)
            .filter(|(_, (verdict, _))| *verdict == Verdict::Held)
            .filter_map(|(token, (_, expires_at))| Some((ClaimToken::parse(token).ok()?, *expires_at)))
            .collect();
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let outbox = Arc::new(Outbox::default());
        let session_id = options.session_id.clone();
        let age = self.shared.options.stream_age.mul_f64(0.8 + 0.4 * random());
        let spans = self.spans();
        let (queue, ()) = self.with_queue(scope, |state| {
            state.open(id, options, Arc::clone(&outbox), kept, Instant::now(), spans, age);
        });
        let stream = Stream { id, queue, outbox, shared: Arc::clone(&self.shared), _counted: counted };
        // A shutdown that began in the meantime may not have seen this stream.
        if self.shared.closing.load(Ordering::SeqCst) {
            return Err(Error::ShuttingDown);
        }
        let held =
            held.into_iter().zip(verdicts).map(|(token, (verdict, expires_at))| (token, verdict, expires_at)).collect();
        Ok((stream, Opened { stream_id: id, session_id, age, held }))
    }

    /// Extends the leases of claims that a worker still holds. Returns the verdict and the lease's end for each.
    async fn take_over(&self, scope: &Scope, held: &[String]) -> Vec<(Verdict, Option<DbTime>)> {
        let deadline = Instant::now() + Duration::from_secs(10);
        let checks = held.iter().map(|text| async move {
            let Ok(token) = ClaimToken::parse(text) else { return (Verdict::Invalid, None) };
            let run = RunRef { run_id: token.run_id, digest: Some(token.digest()) };
            let seconds = i32::try_from(token.lease_seconds.max(1)).unwrap_or(i32::MAX);
            let write = Write::Extend { seconds };
            let key = (scope.clone(), write.kind());
            match self.shared.settles.submit(key, (run, write), deadline).await {
                Ok(settled) => (Verdict::Held, settled.claim_expires_at),
                Err(error) => (verdict(&error), None),
            }
        });
        futures_util::future::join_all(checks).await
    }

    /// Claims tasks once, for a `ClaimTask` call; waits up to `wait` for a first task.
    pub async fn pull(&self, scope: &Scope, options: StreamOptions, wait: Duration) -> Result<Vec<Claim>, Error> {
        if self.shared.closing.load(Ordering::Relaxed) {
            return Err(Error::ShuttingDown);
        }
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        // Without a wait, the call is answered after one claim statement, or after `LOOK`.
        let once = wait.is_zero();
        let until = Instant::now() + if once { LOOK } else { wait };
        let (_queue, ()) = self.with_queue(scope, |state| {
            state.pull(id, Pull { options, until, once, answer });
        });
        if self.shared.closing.load(Ordering::SeqCst) {
            return Err(Error::ShuttingDown);
        }
        match answered.await {
            Ok(Ok(claims)) => {
                for claim in &claims {
                    self.shared.feed.tell(|| Activity::pushed(scope, claim));
                }
                Ok(claims)
            }
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::ShuttingDown),
        }
    }

    /// This replica wrote claimable work: wakes the queue's loop, and tells other replicas.
    pub fn new_work(&self, queue: &QueueName) {
        self.note_work(queue);
        self.shared.hints.dirty(queue);
    }

    /// A queue may have claimable work: wakes its loop.
    pub fn note_work(&self, queue: &QueueName) {
        if let Some(queue) = self.find(queue) {
            queue.lock().note_work();
            queue.bell.notify_one();
        }
    }

    /// A run of a queue becomes claimable after this time: sets a timer.
    pub fn note_available(&self, queue: &QueueName, after: Duration) {
        if let Some(queue) = self.find(queue) {
            queue.lock().note_available(Instant::now() + after);
            queue.bell.notify_one();
        }
    }

    /// The doorbell of a queue rang: wakes its loop, which arms it again.
    pub fn note_rung(&self, queue: &QueueName) {
        if let Some(queue) = self.find(queue) {
            queue.lock().note_rung();
            queue.bell.notify_one();
        }
    }

    /// Notifications may have been lost: wakes all loops, which look and arm again.
    pub fn note_unheard(&self) {
        let queues: Vec<Arc<Queue>> = self.queues().values().cloned().collect();
        for queue in queues {
            queue.lock().note_rung();
            queue.bell.notify_one();
        }
    }

    /// A worker showed a sign of life for a run; `expires_at` is the new end of its lease, if it has one.
    pub fn alive(&self, queue: &QueueName, run_id: RunId, digest: Option<&Digest>, expires_at: Option<DbTime>) {
        if let Some(queue) = self.find(queue) {
            queue.lock().alive(run_id, digest, expires_at);
            queue.bell.notify_one();
        }
    }

    /// A worker showed a sign of life without a write to the database. If the run is not in flight here, tells other
    /// replicas.
    pub fn spoke(&self, queue: &QueueName, run_id: RunId) {
        let here = self.find(queue).is_some_and(|queue| queue.lock().holds(run_id));
        if !here {
            self.shared.hints.alive(run_id);
        }
    }

    /// Another replica saw signs of life for these runs.
    pub fn alive_elsewhere(&self, runs: &[RunId]) {
        let queues: Vec<Arc<Queue>> = self.queues().values().cloned().collect();
        for queue in queues {
            let mut state = queue.lock();
            runs.iter().for_each(|run| state.alive(*run, None, None));
            drop(state);
            queue.bell.notify_one();
        }
    }

    /// A run left its claim. If it was not in flight here, tells other replicas.
    pub fn left(&self, queue: &QueueName, run_id: RunId) {
        if !self.here(queue, |state| state.left(run_id)) {
            self.shared.hints.credit(run_id);
        }
    }

    /// Applies `left` to a queue's state; returns whether the run was in flight here.
    fn here(&self, queue: &QueueName, left: impl FnOnce(&mut State) -> bool) -> bool {
        let Some(queue) = self.find(queue) else { return false };
        let here = left(&mut queue.lock());
        if here {
            queue.bell.notify_one();
        }
        here
    }

    /// A claim ended while its run goes on. The run may be claimed again before this call, so only this claim leaves.
    pub fn left_claim(&self, queue: &QueueName, run_id: RunId, digest: Option<&Digest>) {
        let Some(digest) = digest.map(Digest::to_uuid) else { return self.left(queue, run_id) };
        if !self.here(queue, |state| state.left_claim(run_id, digest)) {
            self.shared.hints.credit_of_claim(run_id, digest);
        }
    }

    /// Another replica ended these claims while their runs go on.
    pub fn claims_left_elsewhere(&self, claims: &[(RunId, uuid::Uuid)]) {
        let queues: Vec<Arc<Queue>> = self.queues().values().cloned().collect();
        for queue in queues {
            let mut state = queue.lock();
            let here = claims.iter().filter(|(run, digest)| state.left_claim(*run, *digest)).count();
            drop(state);
            if here > 0 {
                queue.bell.notify_one();
            }
        }
    }

    /// Another replica took these runs from their claims.
    pub fn left_elsewhere(&self, runs: &[RunId]) {
        let queues: Vec<Arc<Queue>> = self.queues().values().cloned().collect();
        for queue in queues {
            let mut state = queue.lock();
            let here = runs.iter().filter(|run| state.left(**run)).count();
            drop(state);
            if here > 0 {
                queue.bell.notify_one();
            }
        }
    }

    /// Names of the queues that have a loop here.
    pub fn active(&self) -> Vec<QueueName> {
        self.queues().keys().cloned().collect()
    }

    /// Number of streams on this replica.
    pub fn streams(&self) -> usize {
        self.shared.streams.now()
    }

    /// Number of releases and hand-overs in flight.
    pub fn releasing(&self) -> usize {
        self.shared.releasing.now()
    }

    /// Number of streams on a queue here.
    pub fn stream_count(&self, queue: &QueueName) -> usize {
        self.find(queue).map_or(0, |queue| queue.lock().stream_count())
    }

    /// Applies the result of a look at a queue.
    pub fn observe(&self, tick: &QueueTick) {
        let Ok(name) = QueueName::parse("queue", &tick.queue) else { return };
        let Some(queue) = self.find(&name) else { return };
        if tick.missing {
            self.drop_queue(&name);
            return;
        }
        let mut state = queue.lock();
        if tick.claimable {
            state.note_work();
        }
        if let Some(ms) = tick.next_available_ms {
            state.note_available(Instant::now() + Duration::from_millis(ms.max(0).unsigned_abs()));
        }
        drop(state);
        queue.bell.notify_one();
    }

    /// Ends the stream of a session if it is on this replica; returns whether it was.
    pub fn drain(&self, queue: &QueueName, session: &SessionId) -> bool {
        let Some(queue) = self.find(queue) else { return false };
        let returns = queue.lock().drain(session);
        queue.bell.notify_one();
        let ended = returns.is_some();
        self.give_back(&queue, returns.unwrap_or_default());
        ended
    }

    /// Ends the streams and calls of a queue that was dropped.
    pub fn drop_queue(&self, name: &QueueName) {
        if let Some(queue) = self.find(name) {
            queue.lock().fail_all(&Error::QueueNotFound(name.as_str().to_owned()));
            queue.bell.notify_one();
        }
    }

    /// Stops claiming, ends all streams with a reason, and gives back the claims that no transport took. Waits at most
    /// `limit`.
    pub async fn shut_down(&self, limit: Duration) {
        self.shared.closing.store(true, Ordering::SeqCst);
        let queues: Vec<Arc<Queue>> = self.queues().values().cloned().collect();
        for queue in &queues {
            let returns = queue.lock().shut_down(|| Duration::from_secs(1).mul_f64(random()));
            queue.bell.notify_one();
            self.give_back(queue, returns);
        }
        let until = Instant::now() + limit;
        while Instant::now() < until && (self.shared.releasing.now() > 0 || self.shared.streams.now() > 0) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The loop of one queue, with all control flow of claiming. Ends when nothing needs it.
    async fn run(self, queue: Arc<Queue>) {
        loop {
            // Registered before the look at the state, so that a notification in between is not lost.
            let mut bell = std::pin::pin!(queue.bell.notified());
            bell.as_mut().enable();
            let turn = queue.lock().turn(Instant::now(), self.spans());
            if self.run_once(&queue, turn).await {
                continue;
            }
            if queue.lock().is_idle() && self.retire(&queue) {
                return;
            }
            let next = queue.lock().next_turn();
            match next {
                Some(at) => tokio::select! {
                    () = bell => {}
                    () = tokio::time::sleep_until(at) => {}
                },
                None => bell.await,
            }
        }
    }

    /// Forgets a queue that nothing needs. A stream that opens at the same time creates it again.
    fn retire(&self, queue: &Arc<Queue>) -> bool {
        let mut queues = self.queues();
        let idle = queue.lock().is_idle();
        if idle {
            queues.remove(queue.scope.queue());
        }
        idle
    }

    /// Carries out the decisions of a turn; returns whether to take the next turn at once.
    async fn run_once(&self, queue: &Arc<Queue>, turn: Turn) -> bool {
        if turn.arm {
            self.shared.hints.arm(queue.scope.queue());
        }
        self.give_back(queue, turn.returns);
        for leftover in turn.leftovers {
            metrics::stream_ended("stalled");
            tracing::warn!(queue.name = %queue.scope.queue(), "a stream whose worker reads nothing is given up");
            self.clear_up(queue, leftover);
        }
        if !turn.checks.is_empty() {
            let dispatcher = self.clone();
            let queue = Arc::clone(queue);
            tokio::spawn(async move { dispatcher.check(&queue, &turn.checks).await });
        }
        if !turn.silent.is_empty() {
            let dispatcher = self.clone();
            let queue = Arc::clone(queue);
            tokio::spawn(async move { dispatcher.check_silent(&queue, &turn.silent).await });
        }
        let again = !turn.plans.is_empty();
        for plan in turn.plans {
            self.claim(queue, plan).await;
        }
        again
    }

    async fn claim(&self, queue: &Arc<Queue>, plan: Plan) {
        let scope = &queue.scope;
        let since = self.shared.store.now();
        let claimed = readable(self.take(queue, &plan)).await;
        let (mut claims, cursor, more) = match claimed {
            Ok(claimed) => {
                self.put_aside(queue, claimed.unreadable).await;
                (claimed.claims, claimed.cursor, claimed.more)
            }
            Err(Fault::Missing) => {
                self.drop_queue(scope.queue());
                return;
            }
            Err(fault) => {
                self.claim_failed(queue, plan, since, fault);
                return;
            }
        };
        let loaded = readable(self.shared.store.run_load_checkpoints(scope, &mut claims, CHECKPOINT_BUDGET)).await;
        if let Err(fault) = loaded {
            tracing::warn!(
                queue.name = %scope.queue(), problem = fault.problem(),
                "could not read checkpoints; giving the claims of resumed tasks back"
            );
            // With a delay: claimed again at once they would meet the same fault.
            let resumed = claims.extract_if(.., |(_, claim)| claim.resumed);
            let returns = resumed.map(|(_, claim)| Return { delay: UNREAD_DELAY, ..Return::undelivered(claim.token) });
            let returns = returns.collect();
            self.give_back(queue, returns);
        }
        metrics::claimed(claims.len());
        queue.lock().claims_work();
        let returns = queue.lock().deliver(plan, claims, cursor, more, Instant::now(), put_off);
        self.give_back(queue, returns);
    }
}

impl Dispatcher {
    /// Handles a failed claim statement. The next one comes after a pause, which doubles for faults that do not pass.
    fn claim_failed(&self, queue: &Arc<Queue>, plan: Plan, since: Option<DbTime>, fault: Fault) {
        let scope = &queue.scope;
        // The store logs a locked queue where it finds the lock.
        if !matches!(fault, Fault::Locked) {
            tracing::warn!(queue.name = %scope.queue(), problem = fault.problem(), "could not claim; will try again");
        }
        // The claims may have been committed. After a timeout they were not: Postgres rolled the statement back.
        if matches!(fault, Fault::Unknown(_)) {
            self.find_lost_claims(queue, plan.slots.clone(), since);
        }
        let passes = fault.is_passing() && !fault.is_too_much();
        let mut state = queue.lock();
        state.claims_fail(passes, Instant::now());
        state.fail_pulls(&plan, &fault.into_read_error(scope));
    }

    /// Claims for a plan. If Postgres refuses the statement because of some run, smaller and smaller parts are claimed
    /// until one run alone is refused. Then the next runs are tried one by one; refused runs are passed over from then
    /// on, and the others are claimed.
    async fn take(&self, queue: &Arc<Queue>, plan: &Plan) -> Result<Claimed, Fault> {
        let (store, scope) = (&self.shared.store, &queue.scope);
        let mut passed_over = queue.lock().passed_over(Instant::now());
        let mut all = Claimed::NONE;
        let mut part = plan.slots.len();
        let mut tries = 0;
        while all.claims.len() < plan.slots.len() {
            let done = all.claims.len() + all.unreadable.len();
            let slots = plan.slots[done.min(plan.slots.len())..].chunks(part).next().unwrap_or_default();
            if slots.is_empty() {
                break;
            }
            tries += 1;
            match store.run_claim(scope, slots, &plan.names, plan.cursor, &passed_over).await {
                Ok(claimed) => {
                    let full = claimed.claims.len() + claimed.unreadable.len() == slots.len();
                    all.claims.extend(claimed.claims.into_iter().map(|(slot, claim)| (done + slot, claim)));
                    all.unreadable.extend(claimed.unreadable);
                    (all.cursor, all.more) = (claimed.cursor, claimed.more);
                    if !full {
                        break;
                    }
                    part *= 2;
                }
                Err(fault) if fault.is_refusal() && tries < TRIES_MAX && part > 1 => part /= 2,
                Err(fault) if fault.is_refusal() && tries < TRIES_MAX && passed_over.len() < PASSED_OVER_MAX => {
                    let worker = &slots[0].worker_id;
                    let refused = store.run_refused(scope, worker, &plan.names, plan.cursor, &passed_over).await;
                    let refused = match refused {
                        Ok(refused) => refused,
                        Err(fault) if all.is_empty() => return Err(fault),
                        Err(_) => break,
                    };
                    passed_over.extend(refused.iter().map(|(run_id, _)| *run_id));
                    self.pass_over(queue, refused).await;
                }
                // Keeps the claims that were made before the fault.
                Err(fault) if all.is_empty() => return Err(fault),
                Err(_) => break,
            }
        }
        Ok(all)
    }

    /// Passes runs over for a while, and notes the reason in the quarantine.
    async fn pass_over(&self, queue: &Arc<Queue>, found: Vec<(RunId, String)>) {
        let scope = &queue.scope;
        let Some((run_id, problem)) = found.first() else { return };
        tracing::warn!(
            queue.name = %scope.queue(), runs = found.len(), run.id = %run_id, problem,
            "runs cannot be claimed and are passed over; see `absurd doctor`"
        );
        queue.lock().pass_over(found.iter().map(|(run_id, _)| *run_id), Instant::now());
        if let Err(fault) = self.shared.store.quarantine_put(scope, Reason::Claim, &found).await {
            tracing::warn!(queue.name = %scope.queue(), ?fault, "could not note which runs cannot be claimed");
        }
    }

    /// Passes over and gives back claimed runs whose rows cannot be decoded.
    async fn put_aside(&self, queue: &Arc<Queue>, unreadable: Vec<(ClaimToken, String)>) {
        if unreadable.is_empty() {
            return;
        }
        let (tokens, found): (Vec<ClaimToken>, Vec<(RunId, String)>) =
            unreadable.into_iter().map(|(token, problem)| (token.clone(), (token.run_id, problem))).unzip();
        self.pass_over(queue, found).await;
        self.give_back(queue, tokens.into_iter().map(Return::undelivered).collect());
    }
}

/// Turns a panic while rows are decoded into [`Fault::Unknown`], as if the answer had been lost, so that the claims are
/// given back. Plain SQL can write rows that break the schema's rules, and they must not end the queue's loop.
async fn readable<T>(reading: impl Future<Output = Result<T, Fault>>) -> Result<T, Fault> {
    let read = AssertUnwindSafe(reading).catch_unwind().await;
    read.unwrap_or_else(|_| Err(Fault::Unknown("a row could not be read".into())))
}

/// Delay of a task that fits into no message of its stream: 15 to 30 s.
fn put_off() -> Duration {
    Duration::from_secs(15).mul_f64(1.0 + random())
}

/// Delay of a resumed task whose checkpoints could not be read.
const UNREAD_DELAY: Duration = Duration::from_secs(5);
/// Maximum number of claim statements for one plan in which runs are refused.
const TRIES_MAX: usize = 64;
/// Maximum number of runs of a queue that are passed over at the same time.
const PASSED_OVER_MAX: usize = 1000;

/// Longest time for the one claim statement of a call that does not wait.
const LOOK: Duration = Duration::from_secs(10);

/// The verdict about a claim that follows from the error of a write about its run.
pub fn verdict(error: &Error) -> Verdict {
    match error {
        Error::ClaimExpired(_) => Verdict::Expired,
        Error::TaskCancelled(_) => Verdict::Cancelled,
        Error::RunNotRunning { state, .. } if state == "completed" || state == "failed" => Verdict::Finished,
        Error::ClaimLost(_) | Error::RunNotRunning { .. } => Verdict::Lost,
        Error::RunNotFound(_)
        | Error::TokenInvalid
        | Error::TokenRequired
        | Error::Invalid { .. }
        | Error::QueueNotFound(_) => Verdict::Invalid,
        _ => Verdict::Busy,
    }
}
