//! The budget for repeated calls: one repetition for every ten calls that succeed, and a reserve of 20. When it is
//! spent, one call at a time repeats as a probe, at a falling rate, and the others wait. An outage therefore does not
//! multiply the calls. gRPC's retry throttling has the same ratio, but fails the calls that wait here until their
//! deadline.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Mutex as Turns, OwnedMutexGuard, Semaphore};

/// Largest reserve: repetitions that need no earlier success.
const REPEATS_MAX: usize = 20;
/// Earned by a call that succeeds without repetition, in tenths of a repetition.
const AT_ONCE: usize = 1;
/// Earned by a repetition that succeeds, in tenths: the next repetition and a tenth. After an outage the waiting calls
/// therefore return soon, yet not all at once. Where one repetition in ten fails, their rate falls.
const REPEATED: usize = 11;
/// First and longest pause before a probe that follows a failed one; the first probe of all has no pause.
const PACE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// The repetitions that are left, and the lock of the probing call with its pause.
#[derive(Debug)]
pub(crate) struct Budget {
    repeats: Semaphore,
    tenths: Mutex<usize>,
    probe: Arc<Turns<Duration>>,
}

/// The right to repeat a call once. A probe whose success is not reported makes the next probe wait longer.
#[derive(Debug)]
pub(crate) struct Turn(Option<OwnedMutexGuard<Duration>>);

impl Default for Budget {
    fn default() -> Self {
        let (repeats, probe) = (Semaphore::new(REPEATS_MAX), Arc::new(Turns::new(Duration::ZERO)));
        Self { repeats, tenths: Mutex::new(0), probe }
    }
}

impl Budget {
    /// Waits until the reserve holds a repetition, and takes it.
    async fn spend(&self) {
        // The semaphore is never closed.
        if let Ok(repeat) = self.repeats.acquire().await {
            repeat.forget();
        }
    }

    /// Waits until a call may be repeated, from the reserve or as the probe.
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

    /// Reports that a call was answered; `turn` is set if it was a repetition.
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

    /// Longest wait by the paused clock: a budget that blocks every call fails the test instead of stalling it.
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

    /// A spent budget refills. Nine successes earn nothing, the tenth earns one repetition, and each repetition that
    /// succeeds earns the next one.
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
