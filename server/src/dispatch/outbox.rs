//! A stream's outbox: what waits to be taken by the transport. Bounded by what the stream's credit reserved.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::task::AtomicWaker;
use tokio::time::Instant;

use crate::domain::{Claim, Error, RunId, Verdict};

/// What a stream says.
#[derive(Debug)]
pub enum Message {
    /// A claimed task.
    Task(Box<Claim>),
    /// A sign of life.
    Heartbeat {
        /// Runs in flight.
        in_flight: usize,
        /// Free credit.
        credit: usize,
    },
    /// A claim does not hold any more.
    Revoked {
        /// Encoded token.
        token: String,
        /// Its run.
        run_id: RunId,
        /// Why.
        verdict: Verdict,
    },
    /// The last message of a planned end.
    Ending {
        /// Why.
        reason: EndReason,
        /// Connect again after this long.
        reconnect_after: Duration,
    },
    /// The end by an error.
    Failed(Error),
}

/// Why a stream ends as planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndReason {
    /// The replica stops.
    Shutdown,
    /// The stream is old.
    MaxAge,
    /// The session opened a newer stream.
    Superseded,
    /// The worker wants no more.
    Drained,
}

#[derive(Debug, Default)]
struct Inside {
    messages: VecDeque<Message>,
    /// Bytes of the tasks that wait.
    task_bytes: usize,
    /// Nothing may be added: the end is queued, or the stream is gone.
    closed: bool,
    /// The end has been taken.
    over: bool,
    /// Since when messages wait that the transport does not take.
    stuck_since: Option<Instant>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Outbox {
    inside: Mutex<Inside>,
    waker: AtomicWaker,
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a message; gives a task back when the stream takes no more.
    pub fn push(&self, message: Message) -> Result<(), Message> {
        let mut inside = self.lock();
        if inside.closed {
            return Err(message);
        }
        match &message {
            Message::Task(claim) => inside.task_bytes += claim.message_bytes(),
            Message::Heartbeat { .. }
                if inside.messages.iter().any(|queued| matches!(queued, Message::Heartbeat { .. })) =>
            {
                return Ok(());
            }
            Message::Ending { .. } | Message::Failed(_) => inside.closed = true,
            Message::Heartbeat { .. } | Message::Revoked { .. } => {}
        }
        inside.messages.push_back(message);
        inside.stuck_since.get_or_insert_with(Instant::now);
        drop(inside);
        self.waker.wake();
        Ok(())
    }

    /// How long messages have waited for a transport that takes none.
    pub fn stuck(&self) -> Duration {
        self.lock().stuck_since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// The next message; `None` after the end.
    pub fn poll_next(&self, cx: &Context<'_>) -> Poll<Option<Message>> {
        self.waker.register(cx.waker());
        let mut inside = self.lock();
        // Whoever asks is not stuck; what is left waits from now on.
        inside.stuck_since = (inside.messages.len() > 1).then(Instant::now);
        if inside.over {
            return Poll::Ready(None);
        }
        match inside.messages.pop_front() {
            Some(message) => {
                match &message {
                    Message::Task(claim) => {
                        inside.task_bytes = inside.task_bytes.saturating_sub(claim.message_bytes());
                    }
                    Message::Ending { .. } | Message::Failed(_) => inside.over = true,
                    Message::Heartbeat { .. } | Message::Revoked { .. } => {}
                }
                Poll::Ready(Some(message))
            }
            None if inside.closed => Poll::Ready(None),
            None => Poll::Pending,
        }
    }

    /// Bytes of the tasks that wait.
    pub fn task_bytes(&self) -> usize {
        self.lock().task_bytes
    }

    /// Takes the tasks out that nobody took, and lets nothing more in when `close` is set.
    pub fn take_tasks(&self, close: bool) -> Vec<Box<Claim>> {
        let mut inside = self.lock();
        inside.closed |= close;
        inside.task_bytes = 0;
        let mut tasks = Vec::new();
        let mut rest = VecDeque::new();
        for message in inside.messages.drain(..) {
            match message {
                Message::Task(claim) => tasks.push(claim),
                other => rest.push_back(other),
            }
        }
        inside.messages = rest;
        drop(inside);
        self.waker.wake();
        tasks
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    /// A transport that takes one of several messages every twenty seconds is slow, not stuck. The time of its silence begins
    /// anew with each message that it takes, and ends with the last one.
    #[tokio::test(start_paused = true)]
    async fn a_slow_reader_is_not_stuck() {
        let outbox = Outbox::default();
        let context = Context::from_waker(Waker::noop());
        let pause = Duration::from_secs(20);
        for number in 0..3 {
            let revoked = Message::Revoked { token: number.to_string(), run_id: RunId::nil(), verdict: Verdict::Lost };
            outbox.push(revoked).unwrap();
        }
        for _ in 0..3 {
            tokio::time::advance(pause).await;
            assert_eq!(outbox.stuck(), pause);
            assert!(matches!(outbox.poll_next(&context), Poll::Ready(Some(_))));
        }
        tokio::time::advance(pause).await;
        assert_eq!(outbox.stuck(), Duration::ZERO);
        assert!(outbox.poll_next(&context).is_pending());
    }
}
