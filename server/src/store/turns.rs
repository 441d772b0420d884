//! Turns at the connections of one kind of work. A caller is rejected up front when its expected wait exceeds
//! [`WAIT_MAX`] or the time it has left. Otherwise it would be served after it has stopped waiting.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Longest expected wait of a caller that is admitted.
pub const WAIT_MAX: Duration = Duration::from_secs(2);
/// Weight of the newest turn in the moving average of the pace.
const PACE_WEIGHT: f64 = 0.1;

/// A bounded number of turns. Clones share them.
#[derive(Debug, Clone)]
pub struct Turns(Arc<Inside>);

#[derive(Debug)]
struct Inside {
    places: Arc<Semaphore>,
    count: usize,
    /// Items of the callers that wait for a turn.
    waiting: AtomicUsize,
    /// Moving average of seconds per item; 0 until the first turn ends.
    pace: Mutex<f64>,
}

/// A turn. The time until its drop counts into the pace.
#[derive(Debug)]
pub struct Turn {
    inside: Arc<Inside>,
    items: usize,
    began: Instant,
    _place: OwnedSemaphorePermit,
}

/// Items counted as waiting. The drop subtracts them, also when their caller goes away.
struct Waiting<'a>(&'a Inside, usize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(self.1, Ordering::Relaxed);
    }
}

impl Turns {
    /// Allows `count` turns at the same time, at least one.
    pub fn new(count: usize) -> Self {
        let count = count.max(1);
        let places = Arc::new(Semaphore::new(count));
        Self(Arc::new(Inside { places, count, waiting: AtomicUsize::new(0), pace: Mutex::new(0.0) }))
    }

    /// Turns that are held, plus items of the callers that wait for one.
    pub(crate) fn held(&self) -> usize {
        let inside = &*self.0;
        inside.count - inside.places.available_permits() + inside.waiting.load(Ordering::Relaxed)
    }

    /// Waits for a turn, for work of `items` items. Fails at once with the expected wait if that exceeds [`WAIT_MAX`]
    /// or `left`. Fails after `left` with at least 100 ms if no turn came free.
    pub async fn take(&self, items: usize, left: Duration) -> Result<Turn, Duration> {
        let inside = &*self.0;
        let pace = *inside.pace.lock().unwrap_or_else(PoisonError::into_inner);
        let ahead = inside.waiting.load(Ordering::Relaxed);
        let wait = Duration::from_secs_f64(pace * ahead as f64 / inside.count as f64);
        if wait > WAIT_MAX.min(left) {
            return Err(wait);
        }
        inside.waiting.fetch_add(items, Ordering::Relaxed);
        let waiting = Waiting(inside, items);
        let place = tokio::time::timeout(left, Arc::clone(&inside.places).acquire_owned()).await;
        drop(waiting);
        match place {
            Ok(Ok(place)) => Ok(Turn { inside: Arc::clone(&self.0), items, began: Instant::now(), _place: place }),
            Ok(Err(_)) | Err(_) => Err(wait.max(Duration::from_millis(100))),
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let latest = self.began.elapsed().as_secs_f64() / self.items.max(1) as f64;
        let mut pace = self.inside.pace.lock().unwrap_or_else(PoisonError::into_inner);
        *pace = if *pace == 0.0 { latest } else { *pace + (latest - *pace) * PACE_WEIGHT };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_would_wait_too_long_is_turned_away_at_once() {
        let turns = Turns::new(1);
        let first = turns.take(1, WAIT_MAX).await.unwrap();
        *turns.0.pace.lock().unwrap() = 1.0;
        let patient = {
            let turns = turns.clone();
            tokio::spawn(async move { turns.take(3, Duration::from_secs(60)).await })
        };
        while turns.0.waiting.load(Ordering::Relaxed) < 3 {
            tokio::task::yield_now().await;
        }
        assert_eq!(turns.take(1, Duration::from_secs(60)).await.unwrap_err(), Duration::from_secs(3));
        drop(first);
        let second = patient.await.unwrap().unwrap();
        assert_eq!(turns.0.waiting.load(Ordering::Relaxed), 0);
        // With no caller waiting, the pace does not matter: the next one is admitted.
        let next = turns.take(1, Duration::from_millis(10)).await;
        assert!(next.is_err(), "its time is over");
        assert_eq!(turns.0.waiting.load(Ordering::Relaxed), 0, "who went away waits no more");
        drop(second);
        turns.take(1, WAIT_MAX).await.unwrap();
    }

    /// One call of a thousand items takes long. A thousand items ahead of the next call weigh no more than that one
    /// call.
    #[tokio::test]
    async fn the_pace_is_that_of_items_and_not_of_calls() {
        let turns = Turns::new(1);
        let first = turns.take(1000, WAIT_MAX).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(first);
        let _second = turns.take(1000, WAIT_MAX).await.unwrap();
        let ahead = {
            let turns = turns.clone();
            tokio::spawn(async move { turns.take(1000, Duration::from_secs(60)).await })
        };
        while turns.0.waiting.load(Ordering::Relaxed) < 1000 {
            tokio::task::yield_now().await;
        }
        let next = tokio::time::timeout(Duration::from_millis(10), turns.take(1, Duration::from_secs(60))).await;
        assert!(next.is_err(), "it is not turned away, and waits: {next:?}");
        ahead.abort();
    }
}
