//! How often calls are repeated: a tenth as often as calls succeed, and a few more; beyond that one call at a time finds
//! out, ever slower, and the others wait. So an outage is not answered with a multiple of the calls. (gRPC's retry throttling
//! has the same tenth, and gives up the calls that wait here for their deadline.)

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Mutex as Turns, OwnedMutexGuard, Semaphore};

/// Repetitions that need no success before them.
const REPEATS_MAX: usize = 20;
/// What a call that works at once pays for, in tenths of a repetition.
const AT_ONCE: usize = 1;
/// What a repetition that works pays for: the next one, and a tenth, so that those who waited for the end of an outage come
/// back soon and not all in the same moment; where one in ten is refused, they become fewer.
const REPEATED: usize = 11;
/// Waits of the call that finds out.
const PACE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// See the module.
#[derive(Debug)]
pub(crate) struct Budget {
    repeats: Semaphore,
    tenths: Mutex<usize>,
    probe: Arc<Turns<Duration>>,
}

/// The right to repeat a call once. Unless that is told to have worked, the next one that finds out waits longer.
#[derive(Debug)]
pub(crate) struct Turn(Option<OwnedMutexGuard<Duration>>);

impl Default for Budget {
    fn default() -> Self {
        let (repeats, probe) = (Semaphore::new(REPEATS_MAX), Arc::new(Turns::new(Duration::ZERO)));
        Self { repeats, tenths: Mutex::new(0), probe }
    }
}

impl Budget {
    /// Waits until one may be spent.
    async fn spend(&self) {
        // It is never closed.
        if let Ok(repeat) = self.repeats.acquire().await {
            repeat.forget();
        }
    }

    /// Waits until a call may be repeated.
    pub(crate) async fn repeat(&self) -> Turn {
        let find_out = async {
            let mut pace = Arc::clone(&self.probe).lock_owned().await;
            tokio::time::sleep(*pace).await;
            *pace = (*pace * 2).clamp(PACE.0, PACE.1);
            pace
        };
        tokio::select! {
            biased;
            () = self.spend() => Turn(None),
            pace = find_out => Turn(Some(pace)),
        }
    }

    /// A call was answered, at once or when it was repeated.
    pub(crate) fn worked(&self, turn: Option<Turn>) {
        {
            let mut tenths = self.tenths.lock().unwrap_or_else(PoisonError::into_inner);
            *tenths += if turn.is_some() { REPEATED } else { AT_ONCE };
            let room = REPEATS_MAX.saturating_sub(self.repeats.available_permits());
            self.repeats.add_permits((*tenths / 10).min(room));
            *tenths %= 10;
        }
        if let Some(Turn(Some(mut pace))) = turn {
            *pace = Duration::ZERO;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::JoinSet;
    use tokio::time::{Instant, timeout};

    use super::*;

    /// Longest wait by the paused clock: a budget that lets nobody through fails its test, and does not hang it.
    const LIMIT: Duration = Duration::from_secs(3600);

    async fn in_time<T>(work: impl Future<Output = T>) -> T {
        timeout(LIMIT, work).await.expect("the budget lets calls through")
    }

    async fn spend_all(budget: &Budget) {
        for _ in 0..REPEATS_MAX {
            in_time(budget.spend()).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn without_successes_one_at_a_time_finds_out_ever_slower() {
        let budget = Budget::default();
        spend_all(&budget).await;
        let began = Instant::now();
        let mut held = in_time(budget.repeat()).await;
        assert!(held.0.is_some(), "nothing is left to spend");
        let other = timeout(Duration::from_secs(60), budget.repeat()).await;
        assert!(other.is_err(), "another one repeats while somebody finds out");
        let before = began.elapsed();
        for _ in 0..10 {
            drop(held);
            held = in_time(budget.repeat()).await;
        }
        let took = began.elapsed() - before;
        assert!(took > Duration::from_secs(8) && took < Duration::from_secs(20), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn once_it_works_those_who_waited_follow_soon() {
        let budget = Arc::new(Budget::default());
        spend_all(&budget).await;
        for _ in 0..8 {
            drop(in_time(budget.repeat()).await);
        }
        let mut waiting = JoinSet::new();
        let began = Instant::now();
        for _ in 0..1000 {
            let budget = Arc::clone(&budget);
            waiting.spawn(async move {
                let turn = budget.repeat().await;
                tokio::time::sleep(Duration::from_millis(3)).await;
                budget.worked(Some(turn));
            });
        }
        in_time(waiting.join_all()).await;
        let took = began.elapsed();
        assert!(took > Duration::from_secs(2) && took < Duration::from_millis(2500), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn ten_successes_pay_for_a_repetition() {
        let budget = Budget::default();
        spend_all(&budget).await;
        for _ in 0..39 {
            budget.worked(None);
        }
        for _ in 0..3 {
            assert!(in_time(budget.repeat()).await.0.is_none(), "thirty successes pay for three repetitions");
        }
        assert!(in_time(budget.repeat()).await.0.is_some());
        for _ in 0..10_000 {
            budget.worked(None);
        }
        assert_eq!(budget.repeats.available_permits(), REPEATS_MAX, "they are not saved up");
    }

    /// A budget that is used up fills again: nine successes pay for nothing, the tenth pays for one repetition, and each
    /// repetition that works pays for the next one.
    #[tokio::test(start_paused = true)]
    async fn a_budget_that_is_used_up_fills_again() {
        let budget = Budget::default();
        spend_all(&budget).await;
        for _ in 0..3 {
            for _ in 0..9 {
                budget.worked(None);
            }
            assert!(timeout(LIMIT, budget.spend()).await.is_err(), "nine successes pay for nothing");
            budget.worked(None);
            in_time(budget.spend()).await;
        }
        let finds_out = in_time(budget.repeat()).await;
        assert!(finds_out.0.is_some(), "all is spent");
        budget.worked(Some(finds_out));
        for _ in 0..3 {
            let paid = in_time(budget.repeat()).await;
            assert!(paid.0.is_none(), "the repetition before it has paid");
            budget.worked(Some(paid));
        }
    }
}
