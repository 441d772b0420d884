//! A tally of things under way. Each of them counts from its beginning until its guard is dropped, also half-way: a
//! caller that goes away at an await leaves nothing behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// See the module.
#[derive(Debug, Default)]
pub struct Tally(Arc<AtomicUsize>);

/// One thing that counts.
#[derive(Debug)]
#[must_use = "it counts until it is dropped"]
pub struct Counted(Arc<AtomicUsize>);

impl Tally {
    /// Counts one more.
    pub fn begin(&self) -> Counted {
        self.0.fetch_add(1, Ordering::SeqCst);
        Counted(Arc::clone(&self.0))
    }

    /// Counts one more, unless there are so many already.
    pub fn begin_within(&self, most: usize) -> Option<Counted> {
        let more = |now: usize| (now < most).then_some(now + 1);
        let counted = self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more);
        counted.ok().map(|_| Counted(Arc::clone(&self.0)))
    }

    /// How many there are.
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
