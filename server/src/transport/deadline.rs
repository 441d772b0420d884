//! The deadline of a call, from its `grpc-timeout` header. Any header yields a time that can be represented.

use std::time::Duration;

use tokio::time::Instant;
use tonic::Request;

use crate::domain::Error;

/// Time for a call without a deadline.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);

/// Longest time kept for an answer to reach its caller, on a busy machine and network.
const MARGIN_MAX: Duration = Duration::from_millis(250);

/// The time by which a call must be answered. It lies before the transport's own deadline, which ends a call with
/// another code.
pub(super) fn deadline<T>(request: &Request<T>) -> Instant {
    let asked = request.metadata().get("grpc-timeout").and_then(|value| value.to_str().ok()).and_then(timeout);
    Instant::now() + asked.map_or(DEADLINE, |asked| asked.saturating_sub((asked / 10).min(MARGIN_MAX)))
}

/// The deadline of a call that itself waits up to `longest`; without a header, `longest` is added to [`DEADLINE`].
pub(super) fn deadline_of_wait<T>(request: &Request<T>, longest: Duration) -> Instant {
    match request.metadata().contains_key("grpc-timeout") {
        true => deadline(request),
        false => Instant::now() + longest + DEADLINE,
    }
}

/// The time left until the deadline, at most [`DEADLINE`].
pub(super) fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).min(DEADLINE)
}

/// Pause before a repeated attempt that met a lock or a busy database: first, and at most. It doubles each time.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));

/// Repeats work until the deadline while a lock or a busy database prevents it; such an attempt has no effect. Each
/// attempt waits for its lock for a few seconds only, so that calls behind it in Postgres' queue get their turn.
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

/// Parses a `grpc-timeout`: one to eight digits and a unit, so at most 11,416 years (gRPC over HTTP/2, Requests).
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

#[cfg(test)]
mod tests {
    use super::*;

    fn request(timeout: Option<&str>) -> Request<()> {
        let mut request = Request::new(());
        if let Some(timeout) = timeout {
            request.metadata_mut().insert("grpc-timeout", timeout.parse().unwrap());
        }
        request
    }

    /// A timeout is one to eight digits and a unit; any other text is refused.
    #[test]
    fn a_timeout_has_one_to_eight_digits_and_a_unit() {
        for (text, read) in [
            ("2H", Duration::from_secs(7200)),
            ("3M", Duration::from_secs(180)),
            ("0S", Duration::ZERO),
            ("12345678S", Duration::from_secs(12_345_678)),
            ("00000300m", Duration::from_millis(300)),
            ("20000000u", Duration::from_secs(20)),
            ("99999999n", Duration::from_nanos(99_999_999)),
        ] {
            assert_eq!(timeout(text), Some(read), "{text}");
        }
        for text in ["", "S", "123456789S", "1", "1s", "-1S", "+1S", "1 S", "1.5S", "é"] {
            assert_eq!(timeout(text), None, "{text}");
        }
    }

    /// A call is answered before its deadline by a tenth of its time, at most 250 ms. A call without a deadline has 30
    /// s. If it waits by itself, its longest wait is added.
    #[tokio::test(start_paused = true)]
    async fn a_call_is_answered_before_its_deadline() {
        let longest = Duration::from_secs(600);
        let now = Instant::now();
        for (timeout, millis) in [("1S", 900), ("10S", 9750), ("3600S", 3_599_750)] {
            let request = request(Some(timeout));
            assert_eq!(deadline(&request) - now, Duration::from_millis(millis), "{timeout}");
            assert_eq!(deadline_of_wait(&request, longest) - now, Duration::from_millis(millis), "{timeout}");
        }
        assert_eq!(deadline(&request(None)) - now, DEADLINE);
        assert_eq!(deadline_of_wait(&request(None), longest) - now, longest + DEADLINE);
    }
}
