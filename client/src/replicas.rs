//! The replicas that a client may ask: those that owe fewest answers, in turn; those that failed lately are left out for a
//! while.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use absurd_proto::v1::absurd_service_client::AbsurdServiceClient;
use tokio::time::Instant;
use tonic::transport::Channel;

use crate::backoff::random;
use crate::budget::Budget;
use crate::{Error, Reason};

/// A replica that failed is left out this long at first, doubling with each failure that follows.
const REST: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(10));

/// All replicas. Clones share what is known of them.
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
    /// Calls that wait for its answer.
    owes: AtomicUsize,
    rest: Mutex<Option<Rest>>,
}

#[derive(Debug, Clone, Copy)]
struct Rest {
    until: Instant,
    span: Duration,
}

/// The replica that is asked; what came of it is to be told.
#[derive(Debug)]
pub(crate) struct Asked {
    all: Replicas,
    index: usize,
}

impl Replicas {
    /// At least one. The first one asked is any of them: or all workers of one stream would be on the same replica.
    pub(crate) fn new(clients: Vec<AbsurdServiceClient<Channel>>) -> Self {
        let first = usize::from(uuid::Uuid::new_v4().as_bytes()[0]);
        let replicas = clients
            .into_iter()
            .map(|grpc| Replica { grpc, owes: AtomicUsize::new(0), rest: Mutex::new(None) })
            .collect();
        Self(Arc::new(Inside { replicas, next: AtomicUsize::new(first), budget: Budget::default() }))
    }

    /// How often calls to them are repeated.
    pub(crate) fn budget(&self) -> &Budget {
        &self.0.budget
    }

    /// Of those that do not rest the one that owes fewest answers, in turn where several do; when all rest, the one whose
    /// rest ends first.
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
            // One caller finds out whether it is back; the others go on leaving it out.
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
    /// Its client.
    pub(crate) fn grpc(&self) -> AbsurdServiceClient<Channel> {
        self.all.0.replicas[self.index].grpc.clone()
    }

    /// It answered.
    pub(crate) fn worked(&self) {
        *self.all.0.replicas[self.index].rest() = None;
    }

    /// It failed; says whether another replica may be asked at once.
    pub(crate) fn failed(&self, error: &Error) -> bool {
        match error.reason() {
            Reason::Transport | Reason::ShuttingDown => {}
            // Nobody knows what became of it.
            Reason::DeadlineExceeded => return false,
            _ => {
                // Whoever refuses is there.
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
        // Many ask at once, and are refused by the one that is back.
        let busy = Error::new(Reason::TooManyRequests, Code::ResourceExhausted, "busy");
        let asked: Vec<Asked> = (0..100).map(|_| all.ask()).collect();
        for asked in asked {
            let error = if asked.index == back.index { busy.clone() } else { refused() };
            asked.failed(&error);
        }
        let asked: Vec<usize> = (0..10).map(|_| all.ask().index).collect();
        assert!(!asked.contains(&dead.index), "{asked:?}");
    }

    /// A replica that fails time and again is left out ever longer: at least half of a span that doubles from 250 ms to 10 s.
    /// Once it has answered, the spans begin anew.
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
