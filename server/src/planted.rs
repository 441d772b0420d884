//! Bugs on purpose, for the test of the chaos checker: each is a mistake that a server like this is prone to.
//!
//! They exist in builds with the feature `planted-bugs` only, where the variable `ABSURD_PLANTED_BUG` chooses one; in any
//! other build none can be switched on, and the question costs nothing.

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bug {
    /// Whoever shows any token writes about the run.
    NoTokenCheck,
    /// Completions are acknowledged before they are committed.
    EarlyAck,
    /// A lost stream's delivered claims are given back as if nobody worked on them.
    ReleaseAfterDelivery,
    /// A sweep of expired leases stops at its first error.
    FaintSweep,
    /// A look at many queues fails as a whole where one of them cannot be looked at.
    OneForAll,
}

/// Whether a bug is on.
#[cfg(feature = "planted-bugs")]
pub(crate) fn is(bug: Bug) -> bool {
    static CHOSEN: std::sync::LazyLock<Option<Bug>> = std::sync::LazyLock::new(|| {
        let name = std::env::var("ABSURD_PLANTED_BUG").ok()?;
        let bugs = [Bug::NoTokenCheck, Bug::EarlyAck, Bug::ReleaseAfterDelivery, Bug::FaintSweep, Bug::OneForAll];
        bugs.into_iter().find(|bug| format!("{bug:?}") == name)
    });
    *CHOSEN == Some(bug)
}

/// Whether a bug is on: never.
#[cfg(not(feature = "planted-bugs"))]
pub(crate) const fn is(_: Bug) -> bool {
    false
}
