//! Points in time as Postgres stores them. They come from the database's clock, the only wall clock of the service.

use std::time::Duration;

/// Microseconds since 1970-01-01 UTC, or never (`infinity` in Postgres).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(i64);

impl Instant {
    /// An instant later than all others: `infinity` in Postgres.
    pub const NEVER: Self = Self(i64::MAX);

    /// The instant this many microseconds after 1970-01-01 UTC.
    pub const fn from_micros(micros: i64) -> Self {
        Self(micros)
    }

    /// Microseconds since 1970-01-01 UTC.
    pub fn micros(self) -> i64 {
        self.0
    }

    /// Whether this is [`Instant::NEVER`].
    pub fn is_never(self) -> bool {
        self == Self::NEVER
    }

    /// This instant plus a duration, at most [`Instant::NEVER`].
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)))
    }
}
