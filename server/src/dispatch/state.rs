//! State of one queue's dispatcher: streams, credit, runs in flight, timers. Does no I/O and never waits.
//!
//! Credit is a set of runs per stream, never a counter: credit = `max_in_flight` - |set|.

mod claims;

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::outbox::{EndReason, Message, Outbox};
use crate::domain::{Claim, ClaimToken, Digest, Error, Instant as DbTime, RunId, SessionId, Verdict, WorkerId};
use crate::store::run::{Check, Cursor};
pub use claims::{Plan, Return};

/// Bytes of tasks in a stream's outbox from which on nothing more is claimed for it; one task is always allowed. It
/// bounds the memory that a worker which does not read can cost. It is no window beside `max_in_flight`.
const OUTBOX_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Pause before the claims of a full stream are checked: first, and at most. It doubles each time.
const CHECK_FULL: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));
/// Pause before the claims of a stream that is not full are checked.
const CHECK_OPEN: Duration = Duration::from_secs(5);

/// Maximum number of remembered times at which runs become claimable; the tick finds the later ones.
const AVAILABLE_MAX: usize = 4096;

/// Time for which a run that cannot be claimed is passed over: first, and at most. It doubles each time.
const PASS_OVER: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(600));

/// Pause between a failed claim statement and the next one: first, and at most. It doubles for faults that do not pass.
const CLAIM_AGAIN: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));

/// Id of a stream or pull on this replica.
pub type StreamId = u64;

/// The options of a stream or a `ClaimTask` call, validated and clamped.
#[derive(Debug, Clone)]
pub struct StreamOptions {
    /// Worker that claims.
    pub worker_id: WorkerId,
    /// Process of the worker.
    pub session_id: SessionId,
    /// Maximum number of runs in flight.
    pub max_in_flight: usize,
    /// Lease in seconds; 0: it never ends.
    pub lease_seconds: u32,
    /// Time after delivery within which a worker must show a sign of life; else its claim is given back. None: no
    /// deadline.
    pub start_deadline: Option<Duration>,
    /// Remaining lease of delivered runs after their stream is lost. None: leases stay as they are.
    pub reconnect_grace: Option<Duration>,
    /// Task names, sorted; empty: all.
    pub names: Arc<[String]>,
    /// Largest message in bytes.
    pub max_message_bytes: usize,
    /// Whether the worker accepts tasks without params, which it then reads by a call.
    pub accepts_omitted_params: bool,
}

/// A run in flight.
#[derive(Debug, Clone)]
pub struct Held {
    token: ClaimToken,
    expires_at: Option<DbTime>,
    taken: bool,
    alive: bool,
    start_by: Option<Instant>,
}

#[derive(Debug)]
struct Stream {
    options: StreamOptions,
    outbox: Arc<Outbox>,
    runs: HashMap<RunId, Held>,
    /// Credit set aside for tasks that are being spawned.
    set_aside: usize,
    ending: bool,
    queued: bool,
    next_check: Option<Instant>,
    check_pause: Duration,
}

impl Stream {
    fn credit(&self) -> usize {
        if self.ending {
            return 0;
        }
        let free = self.options.max_in_flight.saturating_sub(self.runs.len() + self.set_aside);
        if self.outbox.task_bytes() >= OUTBOX_BYTES_MAX { 0 } else { free }
    }

    /// Credit by the worker's count: reserved places are not deducted, and the bound on the outbox does not apply.
    fn told_credit(&self) -> usize {
        if self.ending { 0 } else { self.options.max_in_flight.saturating_sub(self.runs.len()) }
    }

    fn is_full(&self) -> bool {
        self.runs.len() >= self.options.max_in_flight
    }
}

/// One `ClaimTask` call.
#[derive(Debug)]
pub struct Pull {
    /// Options of the call; `max_in_flight` is its quantity.
    pub options: StreamOptions,
    /// End of the wait for a first task.
    pub until: Instant,
    /// Whether the call does not wait: it is answered after one claim statement.
    pub once: bool,
    /// Receives the claims or the error.
    pub answer: oneshot::Sender<Result<Vec<Claim>, Error>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Heartbeat(StreamId),
    Age(StreamId),
    Check(StreamId),
    Start(RunId),
    Pull(StreamId),
}

/// Decisions of one turn of the queue's loop.
#[derive(Debug, Default)]
pub struct Turn {
    /// Claim statements to run.
    pub plans: Vec<Plan>,
    /// Claims to give back.
    pub returns: Vec<Return>,
    /// Remains of streams that were closed because their transport is stuck.
    pub leftovers: Vec<Leftover>,
    /// Claims to check against the database.
    pub checks: Vec<(RunId, Digest)>,
    /// Claims past their start deadline, with the ends of their leases. Their workers may have used other replicas.
    pub silent: Vec<(ClaimToken, Option<DbTime>)>,
    /// Whether to arm the doorbell.
    pub arm: bool,
}

/// Remains of a closed stream.
#[derive(Debug, Default)]
pub struct Leftover {
    /// Claims that no transport took.
    pub returns: Vec<Return>,
    /// Claims of delivered runs whose leases are cut to `grace`: run, digest, end of the lease.
    pub cuts: Vec<(RunId, Digest, DbTime)>,
    /// Remaining lease after the cut.
    pub grace: Duration,
}

/// State of one queue; see the module.
#[derive(Debug, Default)]
pub struct State {
    streams: HashMap<StreamId, Stream>,
    /// The newest stream of each session.
    sessions: HashMap<SessionId, StreamId>,
    pulls: VecDeque<(StreamId, Pull)>,
    owners: HashMap<RunId, StreamId>,
    /// Runs with a start deadline whose stream or pull is gone.
    strays: HashMap<RunId, Held>,
    ready: VecDeque<StreamId>,
    timers: BinaryHeap<Reverse<(Instant, Timer)>>,
    cursors: HashMap<Arc<[String]>, Cursor>,
    /// Runs that cannot be claimed: end and length of the time for which each is passed over.
    passed_over: HashMap<RunId, (Instant, Duration)>,
    work: bool,
    /// While claim statements fail: time before which streams get no further one, and the last pause.
    claims_failing: Option<(Instant, Duration)>,
    /// Claim statements are in flight.
    claiming: bool,
    /// Work may be left that exceeded the credit, so returned credit causes a look.
    unserved: bool,
    /// Times at which runs become claimable.
    next_available: BTreeSet<Instant>,
    armed: bool,
    closing: bool,
}

/// Periods of the dispatcher.
#[derive(Debug, Clone, Copy)]
pub struct Spans {
    /// Pause between heartbeats.
    pub heartbeat: Duration,
    /// A stream whose transport takes no message for this long is closed.
    pub stall: Duration,
}

impl State {
    /// Whether there is no stream, call or start deadline, so that the loop may end.
    pub fn is_idle(&self) -> bool {
        self.streams.is_empty() && self.pulls.is_empty() && self.strays.is_empty()
    }

    /// Number of open streams.
    pub fn stream_count(&self) -> usize {
        self.streams.len()
    }

    /// The queue may have claimable work.
    pub fn note_work(&mut self) {
        self.work = true;
    }

    /// The doorbell rang, or may have rung unheard: its armed row is gone.
    pub fn note_rung(&mut self) {
        self.armed = false;
        self.work = true;
    }

    /// A run becomes claimable at this time.
    pub fn note_available(&mut self, at: Instant) {
        self.next_available.insert(at);
        if self.next_available.len() > AVAILABLE_MAX {
            self.next_available.pop_last();
        }
    }

    /// A claim statement failed: sets the time of the next one. The pause doubles unless the fault passes.
    pub fn claims_fail(&mut self, passes: bool, now: Instant) {
        let pause = match self.claims_failing {
            Some((_, pause)) if !passes => (pause * 2).min(CLAIM_AGAIN.1),
            _ => CLAIM_AGAIN.0,
        };
        self.claims_failing = Some((now + pause, pause));
        self.note_available(now + pause);
    }

    /// A claim statement succeeded: the next one needs no pause.
    pub fn claims_work(&mut self) {
        self.claims_failing = None;
    }

    /// Passes runs over: for 5 s first, twice as long each time, at most 10 minutes.
    pub fn pass_over(&mut self, runs: impl Iterator<Item = RunId>, now: Instant) {
        // Forgets runs whose time ended 10 minutes ago.
        self.passed_over.retain(|_, (until, _)| *until + PASS_OVER.1 > now);
        for run_id in runs {
            let span = self.passed_over.get(&run_id).map_or(PASS_OVER.0, |(_, span)| (*span * 2).min(PASS_OVER.1));
            self.passed_over.insert(run_id, (now + span, span));
            self.note_available(now + span);
        }
    }

    /// The runs that are passed over at `now`.
    pub fn passed_over(&self, now: Instant) -> Vec<RunId> {
        self.passed_over.iter().filter(|(_, (until, _))| *until > now).map(|(run_id, _)| *run_id).collect()
    }

    /// Opens a stream that holds these claims and gets old after `age`. An older stream of the same session ends.
    pub fn open(
        &mut self,
        id: StreamId,
        options: StreamOptions,
        outbox: Arc<Outbox>,
        held: Vec<(ClaimToken, Option<DbTime>)>,
        now: Instant,
        spans: Spans,
        age: Duration,
    ) {
        if let Some(older) = self.sessions.insert(options.session_id.clone(), id) {
            self.end(older, EndReason::Superseded, Duration::ZERO);
        }
        let stream = Stream {
            options,
            outbox,
            runs: HashMap::new(),
            set_aside: 0,
            ending: false,
            queued: false,
            next_check: None,
            check_pause: CHECK_FULL.0,
        };
        self.streams.insert(id, stream);
        for (token, expires_at) in held {
            self.strays.remove(&token.run_id);
            if let Some(before) = self.owners.get(&token.run_id).copied()
                && let Some(stream) = self.streams.get_mut(&before)
            {
                stream.runs.remove(&token.run_id);
            }
            let held = Held { expires_at, taken: true, alive: true, start_by: None, token };
            self.insert(id, held, now);
        }
        self.beat(id, now, spans);
        self.timers.push(Reverse((now + age, Timer::Age(id))));
        self.work = true;
        self.requeue(id);
    }

    /// Adds a `ClaimTask` call.
    pub fn pull(&mut self, id: StreamId, pull: Pull) {
        self.timers.push(Reverse((pull.until, Timer::Pull(id))));
        self.pulls.push_back((id, pull));
        self.work = true;
    }

    fn requeue(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get_mut(&id)
            && !stream.queued
            && stream.credit() > 0
        {
            stream.queued = true;
            self.ready.push_back(id);
        }
    }

    fn credit_returned(&mut self, id: StreamId) {
        self.requeue(id);
        self.work |= std::mem::take(&mut self.unserved);
    }

    fn insert(&mut self, id: StreamId, held: Held, now: Instant) {
        let run_id = held.token.run_id;
        if let Some(start_by) = held.start_by {
            self.timers.push(Reverse((start_by, Timer::Start(run_id))));
        }
        self.owners.insert(run_id, id);
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.runs.insert(run_id, held);
        let due = now + if stream.is_full() { stream.check_pause } else { CHECK_OPEN };
        if stream.next_check.is_none_or(|at| due < at) {
            stream.next_check = Some(due);
            self.timers.push(Reverse((due, Timer::Check(id))));
        }
    }

    /// The transport took a task. Returns whether the loop must wake, for a new timer or for new room in the outbox.
    pub fn taken(&mut self, id: StreamId, run_id: RunId, now: Instant) -> bool {
        let Some(stream) = self.streams.get_mut(&id) else { return false };
        let deadline = stream.options.start_deadline;
        let mut timed = false;
        if let Some(held) = stream.runs.get_mut(&run_id) {
            held.taken = true;
            if let Some(deadline) = deadline.filter(|_| !held.alive) {
                held.start_by = Some(now + deadline);
                self.timers.push(Reverse((now + deadline, Timer::Start(run_id))));
                timed = true;
            }
        }
        // A stream with credit is queued, unless its outbox was full.
        let room = !stream.queued && stream.credit() > 0;
        if room {
            self.credit_returned(id);
        }
        timed || room
    }

    /// A worker showed a sign of life for a run: its start deadline ends. The token of another claim of the run, whose
    /// digest this is, is no sign of life.
    pub fn alive(&mut self, run_id: RunId, digest: Option<&Digest>, expires_at: Option<DbTime>) {
        let is_other = |held: &Held| digest.is_some_and(|shown| held.token.digest() != *shown);
        if self.held(run_id).is_some_and(is_other) {
            return;
        }
        self.strays.remove(&run_id);
        let Some(id) = self.owners.get(&run_id).copied() else { return };
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let Some(held) = stream.runs.get_mut(&run_id) else { return };
        if expires_at.is_some() {
            held.expires_at = expires_at;
        }
        held.start_by = None;
        if !held.alive {
            held.alive = true;
        }
    }

    /// Whether the run is in flight here.
    pub fn holds(&self, run_id: RunId) -> bool {
        self.owners.contains_key(&run_id) || self.strays.contains_key(&run_id)
    }

    /// A run left its claim; returns whether it was in flight here.
    pub fn left(&mut self, run_id: RunId) -> bool {
        if self.strays.remove(&run_id).is_some() {
            return true;
        }
        let Some(id) = self.owners.remove(&run_id) else { return false };
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.runs.remove(&run_id);
            stream.check_pause = CHECK_FULL.0;
            self.credit_returned(id);
        }
        true
    }

    /// A claim of a run has ended, and the run may be claimed again since, so only that claim leaves. Returns whether
    /// any claim of the run was in flight here.
    pub fn left_claim(&mut self, run_id: RunId, digest: uuid::Uuid) -> bool {
        let ended = |held: &Held| held.token.digest().to_uuid() == digest;
        let stray = self.strays.get(&run_id);
        let streamed = self.owners.get(&run_id).and_then(|id| self.streams.get(id)?.runs.get(&run_id));
        let here = stray.or(streamed).is_some();
        if stray.is_some_and(ended) {
            self.strays.remove(&run_id);
        } else if streamed.is_some_and(ended) {
            self.left(run_id);
        }
        here
    }

    /// Removes a stream, after the transport dropped it or got stuck.
    pub fn close(&mut self, id: StreamId) -> Leftover {
        let mut leftover = Leftover::default();
        let Some(stream) = self.streams.remove(&id) else { return leftover };
        if self.sessions.get(&stream.options.session_id) == Some(&id) {
            self.sessions.remove(&stream.options.session_id);
        }
        if stream.queued {
            self.ready.retain(|ready| *ready != id);
        }
        for claim in stream.outbox.take_tasks(true) {
            self.owners.remove(&claim.run_id);
            leftover.returns.push(Return::undelivered(claim.token));
        }
        for (run_id, held) in stream.runs {
            if self.owners.get(&run_id) != Some(&id) {
                continue;
            }
            self.owners.remove(&run_id);
            if !held.taken {
                continue;
            }
            if let (Some(grace), false, Some(seen)) = (stream.options.reconnect_grace, stream.ending, held.expires_at) {
                leftover.grace = grace;
                leftover.cuts.push((run_id, held.token.digest(), seen));
            }
            if !held.alive && held.start_by.is_some() {
                self.strays.insert(run_id, held);
            }
        }
        leftover
    }

    /// Ends the stream of a session that wants no more tasks; returns the claims that no transport took. None: no such
    /// stream.
    pub fn drain(&mut self, session: &SessionId) -> Option<Vec<Return>> {
        let id = self.sessions.get(session).copied()?;
        let stream = self.streams.get_mut(&id)?;
        let mut returns = Vec::new();
        for claim in stream.outbox.take_tasks(false) {
            stream.runs.remove(&claim.run_id);
            self.owners.remove(&claim.run_id);
            returns.push(Return::undelivered(claim.token));
        }
        self.end(id, EndReason::Drained, Duration::ZERO);
        Some(returns)
    }

    fn end(&mut self, id: StreamId, reason: EndReason, reconnect_after: Duration) {
        if let Some(stream) = self.streams.get_mut(&id).filter(|stream| !stream.ending) {
            stream.ending = true;
            let _ = stream.outbox.push(Message::Ending { reason, reconnect_after });
        }
    }

    /// Ends all streams and calls with an error: the queue no longer exists.
    pub fn fail_all(&mut self, error: &Error) {
        for stream in self.streams.values_mut() {
            stream.ending = true;
            stream.outbox.take_tasks(false);
            let _ = stream.outbox.push(Message::Failed(error.clone()));
        }
        for (_, pull) in self.pulls.drain(..) {
            let _ = pull.answer.send(Err(error.clone()));
        }
    }

    /// Stops claiming and ends all streams and calls. Returns the claims that no transport took.
    pub fn shut_down(&mut self, mut reconnect_after: impl FnMut() -> Duration) -> Vec<Return> {
        self.closing = true;
        let mut returns = Vec::new();
        let ids: Vec<StreamId> = self.streams.keys().copied().collect();
        for id in ids {
            if let Some(stream) = self.streams.get_mut(&id) {
                for claim in stream.outbox.take_tasks(false) {
                    stream.runs.remove(&claim.run_id);
                    self.owners.remove(&claim.run_id);
                    returns.push(Return::undelivered(claim.token));
                }
            }
            self.end(id, EndReason::Shutdown, reconnect_after());
        }
        for (_, pull) in self.pulls.drain(..) {
            let _ = pull.answer.send(Err(Error::ShuttingDown));
        }
        returns
    }

    /// Fires due timers and returns the decisions of this turn.
    pub fn turn(&mut self, now: Instant, spans: Spans) -> Turn {
        let mut turn = Turn::default();
        while self.timers.peek().is_some_and(|Reverse((at, _))| *at <= now) {
            if let Some(Reverse((_, timer))) = self.timers.pop() {
                self.fire(timer, now, spans, &mut turn);
            }
        }
        while self.next_available.first().is_some_and(|at| *at <= now) {
            self.next_available.pop_first();
            self.work = true;
        }
        // A `ClaimTask` call is answered at once, even by an error; streams wait until the pause is over.
        let failing = self.claims_failing.filter(|(until, _)| *until > now && self.pulls.is_empty());
        if let Some((until, _)) = failing.filter(|_| self.work) {
            self.note_available(until);
        } else if self.work && !self.closing {
            self.work = false;
            turn.plans = self.reserve();
            self.unserved = self.streams.len() > self.ready.len();
        }
        self.claiming = !turn.plans.is_empty();
        turn.arm = !self.armed && !self.work && !self.closing && turn.plans.is_empty() && self.wants();
        self.armed |= turn.arm;
        turn
    }

    /// Whether a stream or a call wants a task.
    fn wants(&self) -> bool {
        !self.pulls.is_empty() || !self.ready.is_empty()
    }

    /// Time of the next timer that needs [`State::turn`].
    pub fn next_turn(&self) -> Option<Instant> {
        let timer = self.timers.peek().map(|Reverse((at, _))| *at);
        let available = self.next_available.first().copied().filter(|_| self.wants());
        timer.into_iter().chain(available).min()
    }

    /// Sends a heartbeat and sets the timer of the next one. The first is sent as the stream opens, so that the client
    /// learns its credit at once.
    fn beat(&mut self, id: StreamId, now: Instant, spans: Spans) {
        if let Some(stream) = self.streams.get(&id) {
            let heartbeat = Message::Heartbeat { in_flight: stream.runs.len(), credit: stream.told_credit() };
            let _ = stream.outbox.push(heartbeat);
            self.timers.push(Reverse((now + spans.heartbeat, Timer::Heartbeat(id))));
        }
    }

    fn fire(&mut self, timer: Timer, now: Instant, spans: Spans, turn: &mut Turn) {
        match timer {
            Timer::Heartbeat(id) => {
                if let Some(stream) = self.streams.get(&id) {
                    if stream.outbox.stuck() > spans.stall {
                        turn.leftovers.push(self.close(id));
                        return;
                    }
                    self.beat(id, now, spans);
                }
            }
            Timer::Age(id) => self.end(id, EndReason::MaxAge, Duration::ZERO),
            Timer::Check(id) => {
                let Some(stream) = self.streams.get_mut(&id) else { return };
                if stream.next_check.is_none_or(|at| at > now) {
                    return;
                }
                stream.next_check = None;
                if stream.runs.is_empty() {
                    return;
                }
                let pause = if stream.is_full() { stream.check_pause } else { CHECK_OPEN };
                stream.check_pause = (stream.check_pause * 2).min(CHECK_FULL.1);
                stream.next_check = Some(now + pause);
                self.timers.push(Reverse((now + pause, Timer::Check(id))));
                turn.checks.extend(stream.runs.iter().map(|(run, held)| (*run, held.token.digest())));
            }
            Timer::Start(run_id) => self.start_is_due(run_id, now, turn),
            Timer::Pull(id) => {
                if let Some(index) = self.pulls.iter().position(|(pull, _)| *pull == id)
                    && let Some((_, pull)) = self.pulls.remove(index)
                {
                    let _ = pull.answer.send(Ok(Vec::new()));
                }
            }
        }
    }

    fn start_is_due(&mut self, run_id: RunId, now: Instant, turn: &mut Turn) {
        if let Some(held) = self.unproven(run_id)
            && held.start_by.is_some_and(|at| at <= now)
        {
            turn.silent.push((held.token.clone(), held.expires_at));
        }
    }

    /// A delivered claim with a start deadline and no sign of life here.
    fn unproven(&self, run_id: RunId) -> Option<&Held> {
        self.held(run_id).filter(|held| !held.alive && held.start_by.is_some())
    }

    /// The claim of a run that is in flight here.
    fn held(&self, run_id: RunId) -> Option<&Held> {
        let streamed = || self.streams.get(self.owners.get(&run_id)?)?.runs.get(&run_id);
        self.strays.get(&run_id).or_else(streamed)
    }

    /// Silent claims could not be checked: they are due again at this time.
    pub fn look_later(&mut self, claims: &[(ClaimToken, Option<DbTime>)], at: Instant) {
        self.timers.extend(claims.iter().map(|(token, _)| Reverse((at, Timer::Start(token.run_id)))));
    }

    /// Applies the check of a claim that was silent here. Returns the claim to give back if it was silent `everywhere`.
    pub fn silence(&mut self, token: &ClaimToken, everywhere: bool) -> Option<Return> {
        let held = self.unproven(token.run_id).filter(|held| held.token.digest() == token.digest())?;
        let expires_at = held.expires_at;
        if !everywhere {
            self.alive(token.run_id, None, expires_at);
            return None;
        }
        self.left(token.run_id);
        Some(Return { token: token.clone(), delay: Duration::ZERO, delivered: true, too_large: None })
    }

    /// Applies a check of claims: frees the credit of those that no longer hold, and revokes them on their streams.
    pub fn checked(&mut self, looked: &[(RunId, Digest)], found: &[Check]) {
        use crate::domain::State as RunState;
        for ((run_id, digest), check) in looked.iter().zip(found) {
            let Some(id) = self.owners.get(run_id).copied() else { continue };
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            let Some(held) = stream.runs.get_mut(run_id) else { continue };
            if held.token.digest() != *digest {
                continue;
            }
            if check.owned && check.state == Some(RunState::Running) {
                if held.expires_at != check.claim_expires_at {
                    held.expires_at = check.claim_expires_at;
                    // A lease extended through another replica is a sign of life.
                    held.alive = true;
                    held.start_by = None;
                }
                continue;
            }
            let verdict = match check.state {
                Some(RunState::Cancelled) => Verdict::Cancelled,
                Some(RunState::Completed | RunState::Failed) if check.owned && !check.expired => Verdict::Finished,
                Some(RunState::Failed) if check.owned => Verdict::Expired,
                _ => Verdict::Lost,
            };
            if verdict != Verdict::Finished {
                let token = held.token.encode();
                let _ = stream.outbox.push(Message::Revoked { token, run_id: *run_id, verdict });
            }
            self.left(*run_id);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Poll, Waker};

    use super::*;
    use crate::domain::State as RunState;
    use crate::domain::claim::Secret;

    /// Longer than any other time in these tests.
    const HOUR: Duration = Duration::from_secs(3600);
    const SPANS: Spans = Spans { heartbeat: HOUR, stall: HOUR };

    /// Opens a stream for one task, which holds these claims, and takes one turn.
    fn open(state: &mut State, held: Vec<ClaimToken>, now: Instant) -> Arc<Outbox> {
        let options = StreamOptions {
            worker_id: WorkerId::parse("worker_id", "w").unwrap(),
            session_id: SessionId::parse("session_id", "s").unwrap(),
            max_in_flight: 1,
            lease_seconds: 30,
            start_deadline: None,
            reconnect_grace: None,
            names: Arc::from([]),
            max_message_bytes: 1024 * 1024,
            accepts_omitted_params: false,
        };
        let outbox = Arc::new(Outbox::default());
        let held = held.into_iter().map(|token| (token, None)).collect();
        state.open(1, options, Arc::clone(&outbox), held, now, SPANS, HOUR);
        state.turn(now, SPANS);
        outbox
    }

    /// A check of a claim that is answered after its run was claimed again says nothing about the newer claim.
    #[test]
    fn a_late_look_revokes_no_newer_claim() {
        let (mut state, now, run_id) = (State::default(), Instant::now(), RunId::new_v4());
        let token = || ClaimToken::new(run_id, Secret::new().unwrap(), 30, DbTime::from_micros(0), true);
        let (older, newer) = (token(), token());
        let outbox = open(&mut state, vec![newer.clone()], now);
        let revoked = || {
            let mut revoked = Vec::new();
            while let Poll::Ready(Some(message)) = outbox.poll_next(&Context::from_waker(Waker::noop())) {
                if let Message::Revoked { token, .. } = message {
                    revoked.push(token);
                }
            }
            revoked
        };
        let lost = Check { state: Some(RunState::Running), owned: false, claim_expires_at: None, expired: false };
        state.checked(&[(run_id, older.digest())], &[lost]);
        assert!(state.holds(run_id) && revoked().is_empty());
        state.checked(&[(run_id, newer.digest())], &[lost]);
        assert!(!state.holds(run_id));
        assert_eq!(revoked(), [newer.encode()]);
    }

    /// A late write by the holder of an older claim is no sign of life of the newer holder.
    #[test]
    fn a_late_word_about_an_older_claim_is_no_sign_of_life() {
        let (mut state, now, run_id) = (State::default(), Instant::now(), RunId::new_v4());
        let token = || ClaimToken::new(run_id, Secret::new().unwrap(), 30, DbTime::from_micros(0), true);
        let (older, newer) = (token(), token());
        let held = Held { token: newer.clone(), expires_at: None, taken: true, alive: false, start_by: Some(now) };
        state.strays.insert(run_id, held);
        state.alive(run_id, Some(&older.digest()), None);
        assert!(state.unproven(run_id).is_some());
        state.alive(run_id, Some(&newer.digest()), None);
        assert!(state.unproven(run_id).is_none());
    }

    /// Failed claims are tried again after pauses that double up to 15 s, even if runs become claimable meanwhile. A
    /// fault that passes, and a claim that succeeds, reset the pause.
    #[test]
    fn claims_that_fail_are_tried_again_less_and_less_often() {
        let (mut state, mut now) = (State::default(), Instant::now());
        open(&mut state, Vec::new(), now);
        let failures = [500, 1000, 2000, 4000, 8000, 15_000, 15_000].map(|millis| (false, millis));
        for (passes, millis) in failures.into_iter().chain([(true, 500), (false, 1000)]) {
            let pause = Duration::from_millis(millis);
            state.claims_fail(passes, now);
            state.note_work();
            assert!(state.turn(now + pause - Duration::from_millis(1), SPANS).plans.is_empty(), "{pause:?}");
            now += pause;
            assert_eq!(state.turn(now, SPANS).plans.len(), 1, "{pause:?}");
        }
        state.claims_work();
        state.note_work();
        assert_eq!(state.turn(now, SPANS).plans.len(), 1);
    }

    /// If runs become claimable at more times than are remembered, the earliest times are kept.
    #[test]
    fn the_next_times_are_remembered() {
        let (mut state, now) = (State::default(), Instant::now());
        open(&mut state, Vec::new(), now);
        let at = |index: usize| now + Duration::from_millis(u64::try_from(index).unwrap());
        for index in 1..=AVAILABLE_MAX + 10 {
            state.note_available(at(index));
        }
        assert_eq!(state.next_turn(), Some(at(1)));
    }

    #[test]
    fn a_run_is_passed_over_longer_each_time() {
        let (mut state, run_id, mut now) = (State::default(), RunId::new_v4(), Instant::now());
        for seconds in [5, 10, 20, 40, 80, 160, 320, 600, 600] {
            state.pass_over([run_id].into_iter(), now);
            let span = Duration::from_secs(seconds);
            assert_eq!(state.passed_over(now + span - Duration::from_millis(1)), [run_id]);
            assert!(state.passed_over(now + span).is_empty());
            now += span;
            assert!(state.turn(now, Spans { heartbeat: span, stall: span }).plans.is_empty());
        }
        state.pass_over(std::iter::empty(), now + PASS_OVER.1);
        assert!(state.passed_over.is_empty(), "forgotten");
    }
}
