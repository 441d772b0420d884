//! How our types travel: JSON as text in jsonb's binary form, times as microseconds.

use bytes::{BufMut as _, BytesMut};
use postgres_types::{FromSql, IsNull, ToSql, Type, to_sql_checked};
use std::error::Error as StdError;

use crate::domain::{Instant, JsonText};

/// Microseconds between Postgres' epoch (2000) and 1970.
const EPOCH: i64 = 946_684_800_000_000;
/// Bytes of JSON that an answer holds at most; gRPC clients take 4 MiB without being told.
pub const ANSWER_BYTES_MAX: i32 = 3 * 1024 * 1024;
/// Bytes of each of up to three JSON fields of an answer.
pub const FIELD_BYTES_MAX: i32 = 1_310_720;

/// Bytes of the headers of a task in an answer that holds its params and its result too.
pub const HEADERS_BYTES_MAX: i32 = 1024 * 1024;

/// The beginning of a text, at most so many bytes of it. A part that was asked for in code points may take four times as many.
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
    /// First one, from 0.
    pub offset: i32,
    /// How many at most.
    pub limit: i32,
}

impl Part {
    /// The two parameters of a statement.
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
