//! A counter of work in flight. Each piece of work counts until its guard is dropped, so a future that is dropped at an
//! await stays in no count.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Number of guards alive.
#[derive(Debug, Default)]
pub struct Tally(Arc<AtomicUsize>);

/// Guard of one unit in a [`Tally`].
#[derive(Debug)]
#[must_use = "it counts until it is dropped"]
pub struct Counted(Arc<AtomicUsize>);

impl Tally {
    /// Adds one.
    pub fn begin(&self) -> Counted {
        self.0.fetch_add(1, Ordering::SeqCst);
        Counted(Arc::clone(&self.0))
    }

    /// Adds one, unless the count has reached `most`.
    pub fn begin_within(&self, most: usize) -> Option<Counted> {
        let more = |now: usize| (now < most).then_some(now + 1);
        let counted = self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more);
        counted.ok().map(|_| Counted(Arc::clone(&self.0)))
    }

    /// The current count.
    pub fn now(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_counts_no_more() {
        let tally = Tally::default();
        let first = tally.begin();
        let second = tally.begin_within(2);
        assert!(second.is_some() && tally.begin_within(2).is_none());
        drop(first);
        assert_eq!(tally.now(), 1);
        assert!(tally.begin_within(2).is_some());
        drop(second);
        assert_eq!(tally.now(), 0);
    }
}
