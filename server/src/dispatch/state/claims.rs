//! Plans claims, one slot per unit of free credit, and hands claimed runs to streams and `ClaimTask` calls.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{Held, Pull, State, StreamId, StreamOptions, Timer};
use crate::dispatch::outbox::Message;
use crate::domain::claim::Secret;
use crate::domain::{Claim, ClaimToken, Error};
use crate::store::run::{Cursor, Slot};

/// Maximum number of runs that the claim statements of one turn take.
const CLAIM_MAX: usize = 500;
/// Maximum number of streams considered for a task that is being spawned.
const ASKED_MAX: usize = 64;

/// Destination of a claimed run.
#[derive(Debug, Clone, Copy)]
enum Target {
    Stream(StreamId),
    Pull(StreamId),
}

/// A claim statement to run.
#[derive(Debug)]
pub struct Plan {
    /// Task names to claim; empty: all.
    pub names: Arc<[String]>,
    /// Start of the filtered walk over claimable runs.
    pub cursor: Cursor,
    /// Slots, one per unit of credit.
    pub slots: Vec<Slot>,
    targets: Vec<Target>,
}

/// A claim to be given back.
#[derive(Debug, Clone)]
pub struct Return {
    /// The claim.
    pub token: ClaimToken,
    /// Time until the run is offered again.
    pub delay: Duration,
    /// Whether a transport took the run.
    pub delivered: bool,
    /// Size in bytes of a task that fits into no message of its stream; None: it fits.
    pub too_large: Option<usize>,
}

impl Return {
    /// A claim that reached no worker; its run is offered again at once.
    pub fn undelivered(token: ClaimToken) -> Self {
        Self { token, delay: Duration::ZERO, delivered: false, too_large: None }
    }
}

impl State {
    /// Reserves one slot per unit of free credit, for calls first, then for streams in turn. Makes one plan per filter.
    pub(super) fn reserve(&mut self) -> Vec<Plan> {
        let mut room = CLAIM_MAX;
        let mut wishes: Vec<(Target, &StreamOptions, usize)> = Vec::new();
        self.pulls.retain(|(_, pull)| !pull.answer.is_closed());
        for (id, pull) in &self.pulls {
            let count = pull.options.max_in_flight.min(room);
            room -= count;
            wishes.push((Target::Pull(*id), &pull.options, count));
        }
        let mut chosen = Vec::new();
        while chosen.len() < room {
            let Some(id) = self.ready.pop_front() else { break };
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            stream.queued = false;
            let credit = stream.credit();
            if credit > 0 {
                chosen.push((id, credit, 0_usize));
            }
        }
        // Round robin, one unit each, until the room or the credit is used up.
        while room > 0 {
            let before = room;
            for (_, credit, taken) in &mut chosen {
                if room > 0 && taken < credit {
                    *taken += 1;
                    room -= 1;
                }
            }
            if room == before {
                break;
            }
        }
        for (id, _, taken) in &chosen {
            if let Some(stream) = self.streams.get(id) {
                wishes.push((Target::Stream(*id), &stream.options, *taken));
            }
        }
        let plans = plans(wishes, &self.cursors);
        for (id, _, _) in chosen {
            self.requeue(id);
        }
        plans
    }

    /// Sets credit of idle streams aside for tasks that are about to be spawned. Returns the stream of each task; None:
    /// no idle stream takes it, or other work may wait.
    pub fn set_aside(&mut self, names: &mut dyn Iterator<Item = Option<&str>>) -> Vec<Option<(StreamId, Slot)>> {
        let busy = self.work || self.claiming || self.closing || !self.pulls.is_empty();
        let mut taken = Vec::new();
        for name in names {
            taken.push(name.filter(|_| !busy).and_then(|name| self.set_aside_one(name)));
        }
        taken
    }

    fn set_aside_one(&mut self, name: &str) -> Option<(StreamId, Slot)> {
        let takes = |id: &StreamId| {
            let Some(stream) = self.streams.get(id) else { return false };
            let names = &stream.options.names;
            stream.credit() > 0
                && (names.is_empty() || names.binary_search_by(|known| known.as_str().cmp(name)).is_ok())
        };
        let index = self.ready.iter().take(ASKED_MAX).position(takes)?;
        let secret = Secret::new().ok()?;
        let id = self.ready.remove(index)?;
        let stream = self.streams.get_mut(&id)?;
        stream.queued = false;
        stream.set_aside += 1;
        let slot =
            Slot { worker_id: stream.options.worker_id.clone(), secret, lease_seconds: stream.options.lease_seconds };
        self.requeue(id);
        Some((id, slot))
    }

    /// Frees one unit of credit that was set aside.
    pub fn put_back(&mut self, id: StreamId) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.set_aside = stream.set_aside.saturating_sub(1);
            self.credit_returned(id);
        }
    }

    /// Hands claimed runs to their streams and calls. Returns the claims to give back.
    pub fn deliver(
        &mut self,
        plan: Plan,
        claimed: Vec<(usize, Claim)>,
        cursor: Cursor,
        more: bool,
        now: Instant,
        mut jitter: impl FnMut() -> Duration,
    ) -> Vec<Return> {
        if claimed.len() == plan.slots.len() || more {
            self.work = true;
        }
        if !plan.names.is_empty() {
            self.cursors.insert(Arc::clone(&plan.names), cursor);
        }
        let mut returns = Vec::new();
        let mut pulled: HashMap<StreamId, Vec<Claim>> = HashMap::new();
        for (slot, claim) in claimed {
            match plan.targets[slot] {
                Target::Stream(id) => self.send(id, claim, now, &mut jitter, &mut returns),
                Target::Pull(id) => pulled.entry(id).or_default().push(claim),
            }
        }
        for (id, claims) in pulled {
            self.answer(id, claims, now, &mut jitter, &mut returns);
        }
        for target in plan.targets {
            if let Target::Pull(id) = target {
                self.answer_empty(id, more);
            }
        }
        returns
    }

    /// Hands a claimed run to a stream, or adds it to `returns`.
    pub fn send(
        &mut self,
        id: StreamId,
        claim: Claim,
        now: Instant,
        jitter: &mut impl FnMut() -> Duration,
        returns: &mut Vec<Return>,
    ) {
        let Some(stream) = self.streams.get(&id) else {
            returns.push(Return::undelivered(claim.token));
            return;
        };
        let claim = match fit(claim, &stream.options, stream.options.max_message_bytes) {
            Ok(claim) => claim,
            Err((token, bytes)) => {
                returns.push(Return { token, delay: jitter(), delivered: false, too_large: Some(bytes) });
                return;
            }
        };
        let held = Held {
            token: claim.token.clone(),
            expires_at: claim.claim_expires_at,
            taken: false,
            alive: false,
            start_by: None,
        };
        let outbox = Arc::clone(&stream.outbox);
        self.insert(id, held, now);
        if let Err(Message::Task(claim)) = outbox.push(Message::Task(Box::new(claim))) {
            self.left(claim.run_id);
            returns.push(Return::undelivered(claim.token));
        }
    }

    /// A claim statement failed: calls that do not wait get the error; other calls and streams wait on.
    pub fn fail_pulls(&mut self, plan: &Plan, error: &Error) {
        for target in &plan.targets {
            let Target::Pull(id) = target else { continue };
            let Some(index) = self.pulls.iter().position(|(pull, entry)| pull == id && entry.once) else { continue };
            if let Some((_, pull)) = self.pulls.remove(index) {
                let _ = pull.answer.send(Err(error.clone()));
            }
        }
        for target in &plan.targets {
            if let Target::Stream(id) = target {
                self.requeue(*id);
            }
        }
    }

    /// Answers a call that does not wait without tasks, unless a filtered walk has more to look at.
    fn answer_empty(&mut self, id: StreamId, more: bool) {
        let once = |(pull, entry): &(StreamId, Pull)| *pull == id && entry.once && !more;
        if let Some(index) = self.pulls.iter().position(once)
            && let Some((_, pull)) = self.pulls.remove(index)
        {
            let _ = pull.answer.send(Ok(Vec::new()));
        }
    }

    fn answer(
        &mut self,
        id: StreamId,
        claims: Vec<Claim>,
        now: Instant,
        jitter: &mut impl FnMut() -> Duration,
        returns: &mut Vec<Return>,
    ) {
        let Some(index) = self.pulls.iter().position(|(pull, _)| *pull == id) else {
            returns.extend(claims.into_iter().map(|claim| Return::undelivered(claim.token)));
            return;
        };
        let mut room = self.pulls[index].1.options.max_message_bytes;
        let whole = room;
        let mut kept = Vec::new();
        for claim in claims {
            match fit(claim, &self.pulls[index].1.options, room) {
                Ok(claim) => {
                    room -= claim.message_bytes().min(room);
                    kept.push(claim);
                }
                // A task that fits into a message of its own is for the next call; one that fits into none is put off.
                Err((token, bytes)) if bytes <= whole => returns.push(Return::undelivered(token)),
                Err((token, bytes)) => {
                    returns.push(Return { token, delay: jitter(), delivered: false, too_large: Some(bytes) });
                }
            }
        }
        if kept.is_empty() {
            return;
        }
        let Some((_, pull)) = self.pulls.remove(index) else { return };
        for claim in &kept {
            let Some(deadline) = pull.options.start_deadline else { break };
            let start_by = Some(now + deadline);
            self.timers.push(Reverse((now + deadline, Timer::Start(claim.run_id))));
            self.strays.insert(
                claim.run_id,
                Held {
                    token: claim.token.clone(),
                    expires_at: claim.claim_expires_at,
                    taken: true,
                    alive: false,
                    start_by,
                },
            );
        }
        if let Err(Ok(claims)) = pull.answer.send(Ok(kept)) {
            for claim in claims {
                self.strays.remove(&claim.run_id);
                returns.push(Return::undelivered(claim.token));
            }
        }
    }
}

/// Fits a claim into `room` bytes: leaves out checkpoints, then params. `Err`: the token, and the size that is still
/// too large.
fn fit(mut claim: Claim, options: &StreamOptions, room: usize) -> Result<Claim, (ClaimToken, usize)> {
    if claim.message_bytes() <= room {
        return Ok(claim);
    }
    // The worker can read checkpoints by a call; params too, if it accepts tasks without them.
    if !claim.checkpoints.is_empty() {
        claim.checkpoints.clear();
        claim.checkpoints_complete = false;
        if claim.message_bytes() <= room {
            return Ok(claim);
        }
    }
    if options.accepts_omitted_params {
        claim.params_omitted = true;
        if claim.message_bytes() <= room {
            return Ok(claim);
        }
    }
    let bytes = claim.message_bytes();
    Err((claim.token, bytes))
}

fn plans(wishes: Vec<(Target, &StreamOptions, usize)>, cursors: &HashMap<Arc<[String]>, Cursor>) -> Vec<Plan> {
    let mut plans: Vec<Plan> = Vec::new();
    for (target, options, count) in wishes {
        let index = plans.iter().position(|plan| plan.names == options.names).unwrap_or_else(|| {
            plans.push(Plan {
                names: Arc::clone(&options.names),
                cursor: cursors.get(&options.names).copied().unwrap_or(Cursor::HEAD),
                slots: Vec::new(),
                targets: Vec::new(),
            });
            plans.len() - 1
        });
        for _ in 0..count {
            let Ok(secret) = Secret::new() else { continue };
            plans[index].slots.push(Slot {
                worker_id: options.worker_id.clone(),
                secret,
                lease_seconds: options.lease_seconds,
            });
            plans[index].targets.push(target);
        }
    }
    plans.retain(|plan| !plan.slots.is_empty());
    plans
}
