//! Binary forms of our types on the wire to Postgres: JSON as the text inside jsonb, times as microseconds.

use bytes::{BufMut as _, BytesMut};
use postgres_types::{FromSql, IsNull, ToSql, Type, to_sql_checked};
use std::error::Error as StdError;

use crate::domain::{Instant, JsonText};

/// Microseconds from 1970 to Postgres' epoch, 2000-01-01.
const EPOCH: i64 = 946_684_800_000_000;
/// Upper bound of the JSON bytes in an answer. gRPC clients accept 4 MiB unless told otherwise.
pub const ANSWER_BYTES_MAX: i32 = 3 * 1024 * 1024;
/// Upper bound of the bytes of each JSON field, in an answer with up to three of them.
pub const FIELD_BYTES_MAX: i32 = 1_310_720;

/// Upper bound of the bytes of a task's headers, in an answer that also holds its params and its result.
pub const HEADERS_BYTES_MAX: i32 = 1024 * 1024;

/// Cuts a text to at most `bytes` bytes, at a character boundary. A part is requested in code points, which may need
/// four times as many bytes.
pub fn cut(mut text: String, bytes: i32) -> String {
    let mut end = text.len().min(bytes.unsigned_abs() as usize);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}

/// Part of a long text, in code points.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    /// First code point, counted from 0.
    pub offset: i32,
    /// Most code points to return.
    pub limit: i32,
}

impl Part {
    /// Offset and limit as statement parameters; both are NULL without a part.
    pub(super) fn params(part: Option<Self>) -> (Option<i32>, Option<i32>) {
        part.map(|part| (part.offset, part.limit)).unzip()
    }
}

impl ToSql for JsonText {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        out.put_u8(1);
        out.extend_from_slice(self.as_str().as_bytes());
        Ok(IsNull::No)
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::JSONB
    }

    to_sql_checked!();
}

impl<'a> FromSql<'a> for JsonText {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn StdError + Sync + Send>> {
        match raw.split_first() {
            Some((1, text)) => Ok(Self::trusted(std::str::from_utf8(text)?.to_owned())),
            _ => Err("unknown jsonb version".into()),
        }
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::JSONB
    }
}

impl ToSql for Instant {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        out.put_i64(if self.is_never() { i64::MAX } else { self.micros().saturating_sub(EPOCH) });
        Ok(IsNull::No)
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::TIMESTAMPTZ
    }

    to_sql_checked!();
}

impl<'a> FromSql<'a> for Instant {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn StdError + Sync + Send>> {
        let micros = i64::from_be_bytes(raw.try_into()?);
        Ok(if micros == i64::MAX { Self::NEVER } else { Self::from_micros(micros.saturating_add(EPOCH)) })
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::TIMESTAMPTZ
    }
}
