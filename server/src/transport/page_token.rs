//! Page tokens: where the next page of a list begins, opaque to callers. A token that is not ours is refused.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::domain::{Error, Instant};

/// The token of a place in a list ordered by time, and at equal times by something else.
pub(super) fn encode(at: Instant, then: &str) -> String {
    URL_SAFE_NO_PAD.encode(format!("{}:{then}", at.micros()))
}

/// Reads a token; the text has no NUL, as Postgres would not take it.
pub fn parse(token: &str) -> Result<(Instant, String), Error> {
    let read = || {
        let text = String::from_utf8(URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
        let (micros, then) = text.split_once(':').filter(|(_, then)| !then.contains('\0'))?;
        Some((Instant::from_micros(micros.parse().ok()?), then.to_owned()))
    };
    read().ok_or_else(wrong)
}

/// What is said of a token that is not ours.
pub(super) fn wrong() -> Error {
    Error::invalid("page_token", "is not a token of this service")
}
