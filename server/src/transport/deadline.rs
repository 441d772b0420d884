//! By when a call must be answered, from its `grpc-timeout`. Whatever the header says, the time is one that exists.

use std::time::Duration;

use tokio::time::Instant;
use tonic::Request;

use crate::domain::Error;

/// Time of a call that names no deadline.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);

/// Longest time that an answer needs to reach a caller before its deadline, on a busy machine and network.
const MARGIN_MAX: Duration = Duration::from_millis(250);

/// When a call must be answered: a little before the transport would cut it off, which it does with another code.
pub(super) fn deadline<T>(request: &Request<T>) -> Instant {
    let asked = request.metadata().get("grpc-timeout").and_then(|value| value.to_str().ok()).and_then(timeout);
    Instant::now() + asked.map_or(DEADLINE, |asked| asked.saturating_sub((asked / 10).min(MARGIN_MAX)))
}

/// What is left until then; never more than [`DEADLINE`].
pub(super) fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).min(DEADLINE)
}

/// Between tries of a call that met a lock or a busy database, at first and at most.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));

/// Repeats work that a lock or a busy database kept from being done, until the deadline; such an attempt has left nothing
/// behind. Each attempt waits for its lock for a few seconds only, so that calls behind it in Postgres' queue get their turn.
pub(super) async fn patient<T, F>(deadline: Instant, work: impl Fn() -> F) -> Result<T, Error>
where
    F: Future<Output = Result<T, Error>>,
{
    let mut last = Error::DeadlineExceeded;
    let mut pause = PAUSES.0;
    let trying = async {
        loop {
            match work().await {
                Err(error @ (Error::QueueLocked { .. } | Error::DatabaseBusy(_))) => last = error,
                done => return done,
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    };
    let done = tokio::time::timeout_at(deadline, trying).await;
    done.unwrap_or(Err(last))
}

/// Reads a `grpc-timeout`: one to eight digits and a unit, so at most 11,416 years (gRPC over HTTP/2, Requests).
pub fn timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(amount * 3600),
        "M" => Duration::from_secs(amount * 60),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return None,
    })
}
