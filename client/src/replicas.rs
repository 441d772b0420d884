//! The replicas that a client may call. Each call goes to a replica with the fewest unanswered calls; ties rotate. A
//! replica that failed lately rests: it gets no calls for a while.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use absurd_proto::v1::absurd_service_client::AbsurdServiceClient;
use tokio::time::Instant;
use tonic::transport::Channel;

use crate::backoff::random;
use crate::budget::Budget;
use crate::{Error, Reason};

/// First and longest rest of a replica that failed. The span doubles with each consecutive failure; the rest lasts 50
/// to 100 % of it.
const REST: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(10));

/// All replicas. Clones share the counts of calls, the rests and the budget.
#[derive(Debug, Clone)]
pub(crate) struct Replicas(Arc<Inside>);

#[derive(Debug)]
struct Inside {
    replicas: Vec<Replica>,
    next: AtomicUsize,
    budget: Budget,
}

#[derive(Debug)]
struct Replica {
    grpc: AbsurdServiceClient<Channel>,
    /// Calls sent to it that have no answer yet.
    owes: AtomicUsize,
    rest: Mutex<Option<Rest>>,
}

#[derive(Debug, Clone, Copy)]
struct Rest {
    until: Instant,
    span: Duration,
}

/// The replica chosen for one call, which counts as unanswered until this is dropped. The caller reports the outcome
/// with `worked` or `failed`.
#[derive(Debug)]
pub(crate) struct Asked {
    all: Replicas,
    index: usize,
}

impl Replicas {
    /// `clients` must not be empty. The first choice is random; otherwise all workers with one stream each would use
    /// the same replica.
    pub(crate) fn new(clients: Vec<AbsurdServiceClient<Channel>>) -> Self {
        let first = usize::from(uuid::Uuid::new_v4().as_bytes()[0]);
        let replicas = clients
            .into_iter()
            .map(|grpc| Replica { grpc, owes: AtomicUsize::new(0), rest: Mutex::new(None) })
            .collect();
        Self(Arc::new(Inside { replicas, next: AtomicUsize::new(first), budget: Budget::default() }))
    }

    /// The budget for repeated calls, which all replicas share.
    pub(crate) fn budget(&self) -> &Budget {
        &self.0.budget
    }

    /// Chooses, among the replicas that do not rest, one with the fewest unanswered calls, in rotation. If all rest,
    /// chooses the one whose rest ends first.
    pub(crate) fn ask(&self) -> Asked {
        let now = Instant::now();
        let count = self.0.replicas.len();
        let start = self.0.next.fetch_add(1, Ordering::Relaxed);
        let turn = (0..count).map(|step| start.wrapping_add(step) % count);
        let index = turn
            .min_by_key(|index| {
                let replica = &self.0.replicas[*index];
                let rested = replica.rest().map_or(now, |rest| rest.until.max(now));
                (rested, replica.owes.load(Ordering::Relaxed))
            })
            .unwrap_or_default();
        self.0.replicas[index].owes.fetch_add(1, Ordering::Relaxed);
        if let Some(rest) = self.0.replicas[index].rest().as_mut() {
            // This call probes whether the replica is back; the others avoid it meanwhile.
            rest.until = rest.until.max(now + rest.span);
        }
        Asked { all: self.clone(), index }
    }

    fn any_rested(&self) -> bool {
        let now = Instant::now();
        self.0.replicas.iter().any(|replica| replica.rest().is_none_or(|rest| rest.until <= now))
    }
}

impl Replica {
    fn rest(&self) -> MutexGuard<'_, Option<Rest>> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.all.0.replicas[self.index].owes.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Asked {
    /// The generated client of the chosen replica.
    pub(crate) fn grpc(&self) -> AbsurdServiceClient<Channel> {
        self.all.0.replicas[self.index].grpc.clone()
    }

    /// Reports that the replica answered, which ends its rest.
    pub(crate) fn worked(&self) {
        *self.all.0.replicas[self.index].rest() = None;
    }

    /// Reports that the call failed. Returns true if another replica may be called at once.
    pub(crate) fn failed(&self, error: &Error) -> bool {
        match error.reason() {
            Reason::Transport | Reason::ShuttingDown => {}
            // A passed deadline says neither that the replica works nor that it failed.
            Reason::DeadlineExceeded => return false,
            _ => {
                // A replica that refuses a call is reachable.
                self.worked();
                return false;
            }
        }
        {
            let mut rest = self.all.0.replicas[self.index].rest();
            let span = rest.map_or(REST.0, |rest| (rest.span * 2).min(REST.1));
            *rest = Some(Rest { until: Instant::now() + span.mul_f64(0.5 + random() / 2.0), span });
        }
        error.is_passing() && self.all.any_rested()
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;
    use tonic::transport::Endpoint;

    use super::*;

    fn replicas(count: usize) -> Replicas {
        let lazy = || Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
        Replicas::new((0..count).map(|_| AbsurdServiceClient::new(lazy())).collect())
    }

    fn refused() -> Error {
        Error::new(Reason::Transport, Code::Unavailable, "refused")
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_failed_is_left_out_and_asked_again_by_one_caller() {
        let all = replicas(3);
        let lost = all.ask();
        let index = lost.index;
        assert!(lost.failed(&refused()), "the others may be asked at once");
        drop(lost);
        let asked: Vec<usize> = (0..10).map(|_| all.ask().index).collect();
        assert!(!asked.contains(&index), "{asked:?}");
        tokio::time::advance(REST.0).await;
        let asked: Vec<Asked> = (0..10).map(|_| all.ask()).collect();
        let again: Vec<&Asked> = asked.iter().filter(|asked| asked.index == index).collect();
        assert_eq!(again.len(), 1, "{asked:?}");
        again[0].worked();
        drop(asked);
        let asked: Vec<usize> = (0..9).map(|_| all.ask().index).collect();
        assert_eq!(asked.iter().filter(|asked| **asked == index).count(), 3, "{asked:?}");
    }

    #[tokio::test]
    async fn clients_begin_with_different_ones() {
        let first: std::collections::HashSet<usize> = (0..100).map(|_| replicas(3).ask().index).collect();
        assert_eq!(first.len(), 3);
    }

    #[tokio::test]
    async fn one_that_does_not_answer_is_asked_less() {
        let all = replicas(3);
        let silent = [all.ask(), all.ask(), all.ask(), all.ask()];
        let owes_two = silent[3].index;
        let asked: Vec<usize> = (0..10).map(|_| all.ask().index).collect();
        assert!(!asked.contains(&owes_two), "{asked:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_refuses_is_there() {
        let all = replicas(2);
        let (back, dead) = (all.ask(), all.ask());
        back.failed(&refused());
        dead.failed(&refused());
        // Many callers ask at once; the replica that is back refuses them as busy.
        let busy = Error::new(Reason::TooManyRequests, Code::ResourceExhausted, "busy");
        let asked: Vec<Asked> = (0..100).map(|_| all.ask()).collect();
        for asked in asked {
            let error = if asked.index == back.index { busy.clone() } else { refused() };
            asked.failed(&error);
        }
        let asked: Vec<usize> = (0..10).map(|_| all.ask().index).collect();
        assert!(!asked.contains(&dead.index), "{asked:?}");
    }

    /// A replica that keeps failing rests longer each time: 50 to 100 % of a span that doubles from 250 ms to 10 s. An
    /// answer resets the span.
    #[tokio::test(start_paused = true)]
    async fn one_that_fails_time_and_again_is_left_out_ever_longer() {
        let all = replicas(1);
        let left_out = || {
            all.ask().failed(&refused());
            let rest = *all.0.replicas[0].rest();
            rest.map(|rest| rest.until - Instant::now()).expect("it rests")
        };
        for ms in [250, 500, 1000, 2000, 4000, 8000, 10_000, 10_000] {
            let (bound, left) = (Duration::from_millis(ms), left_out());
            assert!(left >= bound / 2 && left <= bound, "{left:?} of {bound:?}");
        }
        all.ask().worked();
        let left = left_out();
        assert!(left <= REST.0, "{left:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn when_all_failed_one_is_asked_all_the_same() {
        let all = replicas(2);
        assert!(all.ask().failed(&refused()));
        assert!(!all.ask().failed(&refused()), "nobody is left to be asked at once");
        all.ask().worked();
    }
}
