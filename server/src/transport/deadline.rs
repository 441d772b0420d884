//! By when a call must be answered, from its `grpc-timeout`. Whatever the header says, the time is one that exists.

use std::time::Duration;

use tokio::time::Instant;
use tonic::Request;

/// Time of a call that names no deadline.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);

/// When a call must be answered: a little before the transport would cut it off, which it does with another code.
pub(super) fn deadline<T>(request: &Request<T>) -> Instant {
    let asked = request.metadata().get("grpc-timeout").and_then(|value| value.to_str().ok()).and_then(timeout);
    Instant::now() + asked.map_or(DEADLINE, |asked| asked.saturating_sub((asked / 10).min(Duration::from_millis(100))))
}

/// What is left until then; never more than [`DEADLINE`].
pub(super) fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).min(DEADLINE)
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
