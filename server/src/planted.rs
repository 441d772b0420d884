//! Deliberate bugs that test the chaos checker: each is a mistake that a server like this is prone to.
//!
//! They exist only in builds with the feature `planted-bugs`, where the environment variable `ABSURD_PLANTED_BUG`
//! selects one. In any other build [`is`] is constantly false.

/// The bugs; `ABSURD_PLANTED_BUG` holds the name of a variant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bug {
    /// A write about a run is accepted with any token.
    NoTokenCheck,
    /// Completions are acknowledged before they are committed.
    EarlyAck,
    /// Claims that a lost stream had delivered are released as if no worker ran them.
    ReleaseAfterDelivery,
    /// A sweep of expired leases stops at its first error.
    FaintSweep,
    /// A look at many queues fails as a whole if one of them cannot be looked at.
    OneForAll,
}

/// Whether `ABSURD_PLANTED_BUG` names this bug.
#[cfg(feature = "planted-bugs")]
pub(crate) fn is(bug: Bug) -> bool {
    static CHOSEN: std::sync::LazyLock<Option<Bug>> = std::sync::LazyLock::new(|| {
        let name = std::env::var("ABSURD_PLANTED_BUG").ok()?;
        let bugs = [Bug::NoTokenCheck, Bug::EarlyAck, Bug::ReleaseAfterDelivery, Bug::FaintSweep, Bug::OneForAll];
        bugs.into_iter().find(|bug| format!("{bug:?}") == name)
    });
    *CHOSEN == Some(bug)
}

/// Always false: this build has no planted bugs.
#[cfg(not(feature = "planted-bugs"))]
pub(crate) const fn is(_: Bug) -> bool {
    false
}
