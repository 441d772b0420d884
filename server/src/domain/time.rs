//! Points in time as Postgres counts them. The database's clock is the only wall clock.

use std::time::Duration;

/// Microseconds since 1970-01-01 UTC, or never (`infinity` in Postgres).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(i64);

impl Instant {
    /// Later than every other instant.
    pub const NEVER: Self = Self(i64::MAX);

    /// From microseconds since 1970.
    pub const fn from_micros(micros: i64) -> Self {
        Self(micros)
    }

    /// Microseconds since 1970.
    pub fn micros(self) -> i64 {
        self.0
    }

    /// Whether this is `infinity`.
    pub fn is_never(self) -> bool {
        self == Self::NEVER
    }

    /// This instant and a bit.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)))
    }
}
