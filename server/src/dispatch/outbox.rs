//! A stream's outbox: messages that the transport has yet to take. The stream's credit bounds its tasks.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::task::AtomicWaker;
use tokio::time::Instant;

use crate::domain::{Claim, Error, RunId, Verdict};

/// A message of a stream.
#[derive(Debug)]
pub enum Message {
    /// A claimed task.
    Task(Box<Claim>),
    /// Sent periodically, as a sign of life.
    Heartbeat {
        /// Number of runs in flight on the stream.
        in_flight: usize,
        /// Runs that the stream may still receive.
        credit: usize,
    },
    /// A claim of the stream no longer holds.
    Revoked {
        /// Encoded claim token.
        token: String,
        /// Run of the claim.
        run_id: RunId,
        /// Reason of the revocation.
        verdict: Verdict,
    },
    /// The last message of a planned end.
    Ending {
        /// Reason of the end.
        reason: EndReason,
        /// Pause that the client should make before it connects again.
        reconnect_after: Duration,
    },
    /// The last message of a stream that ends by an error.
    Failed(Error),
}

/// The reason of a planned end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndReason {
    /// The replica shuts down.
    Shutdown,
    /// The stream has reached its age.
    MaxAge,
    /// The session opened a newer stream.
    Superseded,
    /// The worker asked for no more tasks.
    Drained,
}

#[derive(Debug, Default)]
struct Inside {
    messages: VecDeque<Message>,
    /// Bytes of the tasks in `messages`.
    task_bytes: usize,
    /// No message may be added: the end is queued, or the stream is gone.
    closed: bool,
    /// The transport has taken the end.
    over: bool,
    /// Start of the time in which messages wait and the transport takes none.
    stuck_since: Option<Instant>,
}

/// Shared by the dispatcher, which adds messages, and the transport, which takes them.
#[derive(Debug, Default)]
pub struct Outbox {
    inside: Mutex<Inside>,
    waker: AtomicWaker,
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a message; a heartbeat only if none waits. `Err` returns the message, because the outbox is closed.
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

    /// Time for which messages have waited while the transport took none.
    pub fn stuck(&self) -> Duration {
        self.lock().stuck_since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// The next message; `None` after the end.
    pub fn poll_next(&self, cx: &Context<'_>) -> Poll<Option<Message>> {
        self.waker.register(cx.waker());
        let mut inside = self.lock();
        // The transport asks, so it is not stuck; the time of the messages left begins now.
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

    /// Bytes of the tasks that wait for the transport.
    pub fn task_bytes(&self) -> usize {
        self.lock().task_bytes
    }

    /// Removes and returns the tasks that wait. `close` also closes the outbox.
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

    /// A transport that takes one of several messages every twenty seconds is slow, not stuck. The stuck time restarts
    /// with each message that it takes, and ends with the last one.
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
