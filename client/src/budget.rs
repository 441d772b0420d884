//! How often calls are repeated: a tenth as often as calls succeed, and a few more; beyond that one call at a time finds
//! out, ever slower, and the others wait. So an outage is not answered with a multiple of the calls (the rule of gRPC's retry
//! throttling, which gives calls up where these wait for their deadline).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Mutex as Turns, OwnedMutexGuard};

/// Repetitions that need no success before them.
const TOKENS_MAX: f64 = 20.0;
/// What a success adds.
const TOKENS_PER_SUCCESS: f64 = 0.1;
/// Waits of the one that finds out.
const PACE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// See the module.
#[derive(Debug)]
pub(crate) struct Budget {
    tokens: Mutex<f64>,
    probe: Arc<Turns<Duration>>,
}

/// The right to repeat a call once. Unless that is told to have worked, the next one that finds out waits longer.
#[derive(Debug)]
pub(crate) struct Turn(Option<OwnedMutexGuard<Duration>>);

impl Default for Budget {
    fn default() -> Self {
        Self { tokens: Mutex::new(TOKENS_MAX), probe: Arc::new(Turns::new(Duration::ZERO)) }
    }
}

impl Budget {
    fn tokens(&self) -> MutexGuard<'_, f64> {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spend(&self) -> bool {
        let mut tokens = self.tokens();
        let may = *tokens >= 1.0;
        if may {
            *tokens -= 1.0;
        }
        may
    }

    /// Waits until a call may be repeated.
    pub(crate) async fn repeat(&self) -> Turn {
        if self.spend() {
            return Turn(None);
        }
        let mut pace = Arc::clone(&self.probe).lock_owned().await;
        if !self.spend() {
            tokio::time::sleep(*pace).await;
        }
        *pace = (*pace * 2).clamp(PACE.0, PACE.1);
        Turn(Some(pace))
    }

    /// A call was answered.
    pub(crate) fn worked(&self, turn: Option<Turn>) {
        let mut tokens = self.tokens();
        *tokens = (*tokens + TOKENS_PER_SUCCESS).min(TOKENS_MAX);
        if let Some(Turn(Some(mut pace))) = turn {
            *pace = Duration::ZERO;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{Instant, timeout};

    use super::*;

    async fn spend_all(budget: &Budget) {
        while timeout(Duration::ZERO, budget.repeat()).await.is_ok_and(|turn| turn.0.is_none()) {}
    }

    #[tokio::test(start_paused = true)]
    async fn without_successes_one_at_a_time_finds_out_ever_slower() {
        let budget = Budget::default();
        spend_all(&budget).await;
        let began = Instant::now();
        let mut held = budget.repeat().await;
        let other = timeout(Duration::from_secs(60), budget.repeat()).await;
        assert!(other.is_err(), "another one repeats while somebody finds out");
        let before = began.elapsed();
        for _ in 0..10 {
            drop(held);
            held = budget.repeat().await;
        }
        let took = began.elapsed() - before;
        assert!(took > Duration::from_secs(8) && took < Duration::from_secs(20), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn once_it_works_the_others_follow_without_a_wait() {
        let budget = Budget::default();
        spend_all(&budget).await;
        for _ in 0..5 {
            drop(budget.repeat().await);
        }
        let turn = budget.repeat().await;
        budget.worked(Some(turn));
        let began = Instant::now();
        for _ in 0..100 {
            let turn = budget.repeat().await;
            budget.worked(Some(turn));
        }
        assert_eq!(began.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn ten_successes_pay_for_a_repetition() {
        let budget = Budget::default();
        spend_all(&budget).await;
        for _ in 0..31 {
            budget.worked(None);
        }
        let free = [budget.repeat().await, budget.repeat().await, budget.repeat().await];
        assert!(free.iter().all(|turn| turn.0.is_none()), "{free:?}");
        assert!(budget.repeat().await.0.is_some());
    }
}
