//! Page tokens: where the next page of a list begins, opaque to callers. A token that is not ours is refused.

use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use tokio_postgres::Row;

use crate::domain::{Error, Instant};
use crate::store::text::ANSWER_BYTES_MAX;

/// Room for the ids, times and numbers of a row.
const ROW_BYTES: usize = 128;

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

/// The token of a place in a list ordered by something, and then by something else.
pub(super) fn encode_pair(first: &str, then: &str) -> String {
    URL_SAFE_NO_PAD.encode(format!("{first}:{then}"))
}

/// Reads a token of two texts.
pub(super) fn parse_pair<T: FromStr, U: FromStr>(token: &str) -> Result<(T, U), Error> {
    let read = || {
        let text = String::from_utf8(URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
        let (first, then) = text.split_once(':').filter(|(_, then)| !then.contains('\0'))?;
        Some((first.parse().ok()?, then.parse().ok()?))
    };
    read().ok_or_else(wrong)
}

/// The rows of a page whose statement may have read the first row of the next one (`beyond`), and the row after which that
/// page begins, if there is one. A row that alone is more than a page holds is a page of its own, and others may follow it.
pub(super) fn cut(rows: &[Row], limit: i64) -> (&[Row], Option<&Row>) {
    let beyond = rows.last().is_some_and(|row| row.get("beyond"));
    let page = &rows[..rows.len() - usize::from(beyond && rows.len() > 1)];
    let full = beyond || i64::try_from(rows.len()).is_ok_and(|count| count == limit);
    (page, page.last().filter(|_| full))
}

/// As many of the rows as fit into an answer by the bytes of their names; at least one.
pub(super) fn fit(rows: &[Row], bytes: impl Fn(&Row) -> usize) -> &[Row] {
    let mut room = ANSWER_BYTES_MAX.unsigned_abs() as usize;
    let fits = |row: &&Row| {
        let left = room.checked_sub(bytes(row) + ROW_BYTES);
        room = left.unwrap_or(0);
        left.is_some()
    };
    let count = rows.iter().take_while(fits).count();
    &rows[..count.max(1).min(rows.len())]
}

/// What is said of a token that is not ours.
pub(super) fn wrong() -> Error {
    Error::invalid("page_token", "is not a token of this service")
}
