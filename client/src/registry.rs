//! The claims that this process holds: their tokens, whether somebody keeps the lease, whether they were revoked.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use uuid::Uuid;

/// Tokens remembered at most; claims beyond it are written about without a token.
const CLAIMS_MAX: usize = 100_000;

/// Why a claim does not hold any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Revoked {
    /// Another claim owns the run.
    Lost,
    /// The lease ran out.
    Expired,
    /// The task was cancelled.
    Cancelled,
}

#[derive(Debug)]
struct Held {
    token: String,
    /// The stream that keeps the lease; none for unary claims and abandoned tasks.
    keeper: Option<u64>,
    revoked: watch::Sender<Option<Revoked>>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    claims: Mutex<HashMap<Uuid, Held>>,
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, Held>> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers a claim; `keeper` is the stream that keeps its lease.
    pub(crate) fn insert(&self, run_id: Uuid, token: String, keeper: Option<u64>) -> watch::Receiver<Option<Revoked>> {
        let (revoked, watched) = watch::channel(None);
        let mut claims = self.lock();
        if claims.len() >= CLAIMS_MAX
            && let Some(old) = claims.iter().find(|(_, held)| held.keeper.is_none()).map(|(run, _)| *run)
        {
            claims.remove(&old);
        }
        claims.insert(run_id, Held { token, keeper, revoked });
        watched
    }

    /// The token of a run, if this process claimed it.
    pub(crate) fn token(&self, run_id: Uuid) -> Option<String> {
        self.lock().get(&run_id).map(|held| held.token.clone())
    }

    /// Tokens of the runs whose lease a stream keeps.
    pub(crate) fn kept_by(&self, keeper: u64) -> Vec<(Uuid, String)> {
        let claims = self.lock();
        claims
            .iter()
            .filter(|(_, held)| held.keeper == Some(keeper))
            .map(|(run, held)| (*run, held.token.clone()))
            .collect()
    }

    /// Nobody keeps the lease of this claim any more; its token stays known.
    pub(crate) fn abandon(&self, run_id: Uuid, token: &str) {
        if let Some(held) = self.lock().get_mut(&run_id).filter(|held| held.token == token) {
            held.keeper = None;
        }
    }

    /// The claim is over, as its owner wanted.
    pub(crate) fn remove(&self, run_id: Uuid, token: Option<&str>) {
        let mut claims = self.lock();
        if claims.get(&run_id).is_some_and(|held| token.is_none_or(|token| held.token == token)) {
            claims.remove(&run_id);
        }
    }

    /// The claim does not hold any more; whoever works on the run hears of it.
    pub(crate) fn revoke(&self, run_id: Uuid, token: &str, why: Revoked) {
        let mut claims = self.lock();
        if claims.get(&run_id).is_some_and(|held| held.token == token)
            && let Some(held) = claims.remove(&run_id)
        {
            held.revoked.send_replace(Some(why));
        }
    }
}
