//! What comes in headers and as opaque texts: deadlines and page tokens. A deadline is a time that exists.
#![no_main]

use std::time::{Duration, Instant};

use absurd_server::transport::{deadline, page_token};
use libfuzzer_sys::fuzz_target;
use postgres_types::{ToSql as _, Type};

/// A hundred million hours: the longest that eight digits say.
const LONGEST: Duration = Duration::from_secs(100_000_000 * 3600);

fuzz_target!(|text: &str| {
    if let Some(asked) = deadline::timeout(text) {
        assert!(asked < LONGEST);
        assert!(Instant::now().checked_add(asked).is_some());
    }
    if let Ok((at, then)) = page_token::parse(text) {
        at.to_sql(&Type::TIMESTAMPTZ, &mut bytes::BytesMut::new()).expect("a time that Postgres is told");
        assert!(!then.contains('\0'));
    }
});
