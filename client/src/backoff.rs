//! Waits between tries: doubling, jittered, bounded; what the server asks for counts.

use std::time::Duration;

use crate::Error;

/// The next wait, and how it grows.
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

    /// For calls.
    pub(crate) fn call() -> Self {
        Self::new(Duration::from_millis(50), Duration::from_secs(2))
    }

    /// How long to wait after this failure.
    pub(crate) fn after(&mut self, error: &Error) -> Duration {
        let wait = self.next.mul_f64(0.5 + random() / 2.0);
        self.next = (self.next * 2).min(self.max);
        wait.max(error.retry_after().unwrap_or_default().min(self.max))
    }

    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }
}

/// A random number in 0..1.
pub(crate) fn random() -> f64 {
    let mut bytes = [0_u8; 4];
    if getrandom::fill(&mut bytes).is_err() {
        return 0.5;
    }
    f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

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
