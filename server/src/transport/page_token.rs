//! Page tokens: the place at which the next page of a list begins, opaque to callers. Other tokens are refused.

use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use tokio_postgres::Row;

use crate::domain::{Error, Instant};
use crate::store::text::ANSWER_BYTES_MAX;

/// Bytes allowed for the ids, times and numbers of a row.
const ROW_BYTES: usize = 128;

/// Encodes a place in a list that is ordered by time and then by `then`.
pub(super) fn encode(at: Instant, then: &str) -> String {
    URL_SAFE_NO_PAD.encode(format!("{}:{then}", at.micros()))
}

/// Parses a token of `encode`. Text with NUL is refused, because Postgres cannot take it.
pub fn parse(token: &str) -> Result<(Instant, String), Error> {
    let read = || {
        let text = String::from_utf8(URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
        let (micros, then) = text.split_once(':').filter(|(_, then)| !then.contains('\0'))?;
        Some((Instant::from_micros(micros.parse().ok()?), then.to_owned()))
    };
    read().ok_or_else(wrong)
}

/// Encodes a place in a list that is ordered by `first` and then by `then`; `first` contains no colon.
pub(super) fn encode_pair(first: &str, then: &str) -> String {
    URL_SAFE_NO_PAD.encode(format!("{first}:{then}"))
}

/// Parses a token of [`encode_pair`].
pub(super) fn parse_pair<T: FromStr, U: FromStr>(token: &str) -> Result<(T, U), Error> {
    let read = || {
        let text = String::from_utf8(URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
        let (first, then) = text.split_once(':').filter(|(_, then)| !then.contains('\0'))?;
        Some((first.parse().ok()?, then.parse().ok()?))
    };
    read().ok_or_else(wrong)
}

/// Splits off the first row of the next page, which the statement may have read (`beyond`). Returns the page, and its
/// last row if another page follows. A row that alone exceeds a page is a page of its own.
pub(super) fn cut(rows: &[Row], limit: i64) -> (&[Row], Option<&Row>) {
    let beyond = rows.last().is_some_and(|row| row.get("beyond"));
    let page = &rows[..rows.len() - usize::from(beyond && rows.len() > 1)];
    let full = beyond || i64::try_from(rows.len()).is_ok_and(|count| count == limit);
    (page, page.last().filter(|_| full))
}

/// The first rows that fit into an answer, each counted as `bytes` and `ROW_BYTES`; at least one.
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

/// The error for a token of another service.
pub(super) fn wrong() -> Error {
    Error::invalid("page_token", "is not a token of this service")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_leads_to_its_place() {
        let at = Instant::from_micros(-1);
        assert_eq!(parse(&encode(at, "a:b")).unwrap(), (at, "a:b".to_owned()));
        assert_eq!(parse_pair::<i32, String>(&encode_pair("7", "")).unwrap(), (7, String::new()));
    }

    #[test]
    fn other_tokens_are_refused() {
        let of = |text: &str| URL_SAFE_NO_PAD.encode(text);
        for token in
            [String::new(), "?".into(), of("1"), of("x:a"), of(":a"), of("1:a\0b"), of("99999999999999999999:a")]
        {
            assert!(parse(&token).is_err(), "{token}");
            assert!(parse_pair::<i64, String>(&token).is_err(), "{token}");
        }
    }
}
