//! Pauses between repeated calls: doubling, jittered, bounded. A longer pause that the server asks for is used, up to
//! the bound.

use std::time::Duration;

use crate::Error;

/// The next pause, which doubles from `first` up to `max`.
#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    next: Duration,
    first: Duration,
    max: Duration,
}

impl Backoff {
    pub(crate) fn new(first: Duration, max: Duration) -> Self {
        Self { next: first, first, max }
    }

    /// The backoff of calls: from 50 ms to 2 s.
    pub(crate) fn call() -> Self {
        Self::new(Duration::from_millis(50), Duration::from_secs(2))
    }

    /// The pause after this failure: 50 to 100 % of the next step, or the server's `retry_after` if that is longer, at
    /// most `max`.
    pub(crate) fn after(&mut self, error: &Error) -> Duration {
        let wait = self.next.mul_f64(0.5 + random() / 2.0);
        self.next = (self.next * 2).min(self.max);
        wait.max(error.retry_after().unwrap_or_default().min(self.max))
    }

    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }
}

/// A random number from 0 to 1; 0.5 when the system provides no randomness.
pub(crate) fn random() -> f64 {
    let mut bytes = [0_u8; 4];
    if getrandom::fill(&mut bytes).is_err() {
        return 0.5;
    }
    f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use tonic::{Code, Status};
    use tonic_types::{ErrorDetails, StatusExt as _};

    use super::*;

    fn backoff() -> Backoff {
        Backoff::new(Duration::from_millis(100), Duration::from_secs(1))
    }

    /// Each pause is random, between 50 and 100 % of a bound that doubles from 100 ms to 1 s.
    #[test]
    fn waits_are_spread_over_half_of_their_bound() {
        let mut first = HashSet::new();
        for _ in 0..100 {
            let mut backoff = backoff();
            for bound in [100, 200, 400, 800, 1000, 1000] {
                let (bound, wait) = (Duration::from_millis(bound), backoff.after(&Error::deadline()));
                assert!(wait >= bound / 2 && wait <= bound, "{wait:?} of {bound:?}");
                if bound == Duration::from_millis(100) {
                    first.insert(wait);
                }
            }
        }
        assert!(first.len() > 50, "{} different waits of 100", first.len());
    }

    /// A longer pause that the server asks for is used, up to the bound; a shorter one changes nothing.
    #[test]
    fn a_server_may_ask_for_a_longer_wait() {
        let busy = |ms| {
            let mut details = ErrorDetails::new();
            details.set_retry_info(Some(Duration::from_millis(ms)));
            Error::from(Status::with_error_details(Code::Unavailable, "busy", details))
        };
        assert_eq!(backoff().after(&busy(400)), Duration::from_millis(400));
        assert_eq!(backoff().after(&busy(60_000)), Duration::from_secs(1));
        assert!(backoff().after(&busy(1)) >= Duration::from_millis(50));
    }

    #[test]
    fn waits_grow_to_a_bound_and_start_anew() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        let error = Error::deadline();
        let waits: Vec<Duration> = (0..8).map(|_| backoff.after(&error)).collect();
        assert!(waits[0] <= Duration::from_millis(100), "{waits:?}");
        assert!(waits[7] >= Duration::from_millis(500) && waits[7] <= Duration::from_secs(1), "{waits:?}");
        backoff.reset();
        assert!(backoff.after(&error) <= Duration::from_millis(100));
    }
}
