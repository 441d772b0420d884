//! The claims that a client holds: their tokens, the stream that extends each lease, and whether each was revoked.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use uuid::Uuid;

/// Number of remembered claims from which on each new one displaces a claim that no stream keeps. Calls about a
/// displaced claim by the id of its run show no token.
const CLAIMS_MAX: usize = 100_000;

/// Reason why a claim is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Revoked {
    /// Another claim owns the run.
    Lost,
    /// The lease ran out, and the attempt was failed.
    Expired,
    /// The task was cancelled.
    Cancelled,
}

#[derive(Debug)]
struct Held {
    token: String,
    /// The stream that keeps the lease; `None` for unary claims, and for tasks that were dropped or revoked.
    keeper: Option<u64>,
    revoked: watch::Sender<Option<Revoked>>,
}

impl Held {
    /// Records the reason why the claim is over. A later reason does not replace the first.
    fn tell(&self, why: Revoked) {
        self.revoked.send_if_modified(|told| {
            let first = told.is_none();
            told.get_or_insert(why);
            first
        });
    }
}

/// The claims by run; the newest claim of a run replaces an older one.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    claims: Mutex<HashMap<Uuid, Held>>,
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, Held>> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers a claim whose lease the stream `keeper` extends. The holder of an older claim of the run learns that
    /// it is lost.
    pub(crate) fn insert(&self, run_id: Uuid, token: String, keeper: Option<u64>) -> watch::Receiver<Option<Revoked>> {
        let mut claims = self.lock();
        if let Some(known) = claims.get_mut(&run_id).filter(|known| known.token == token) {
            known.keeper = keeper;
            return known.revoked.subscribe();
        }
        let (revoked, watched) = watch::channel(None);
        if claims.len() >= CLAIMS_MAX
            && let Some(old) = claims.iter().find(|(_, held)| held.keeper.is_none()).map(|(run, _)| *run)
        {
            claims.remove(&old);
        }
        if let Some(older) = claims.insert(run_id, Held { token, keeper, revoked }) {
            older.tell(Revoked::Lost);
        }
        watched
    }

    /// The token of the remembered claim of a run.
    pub(crate) fn token(&self, run_id: Uuid) -> Option<String> {
        self.lock().get(&run_id).map(|held| held.token.clone())
    }

    /// Runs and tokens of the claims whose leases this stream keeps.
    pub(crate) fn kept_by(&self, keeper: u64) -> Vec<(Uuid, String)> {
        let claims = self.lock();
        claims
            .iter()
            .filter(|(_, held)| held.keeper == Some(keeper))
            .map(|(run, held)| (*run, held.token.clone()))
            .collect()
    }

    /// Stops the extension of this claim's lease; its token stays known.
    pub(crate) fn abandon(&self, run_id: Uuid, token: &str) {
        if let Some(held) = self.lock().get_mut(&run_id).filter(|held| held.token == token) {
            held.keeper = None;
        }
    }

    /// Forgets a claim that its owner has ended.
    pub(crate) fn remove(&self, run_id: Uuid, token: Option<&str>) {
        let mut claims = self.lock();
        if claims.get(&run_id).is_some_and(|held| token.is_none_or(|token| held.token == token)) {
            claims.remove(&run_id);
        }
    }

    /// Records that a claim is over, and tells its holder. The token stays known: a late call without it would act on a
    /// newer claim of the run.
    pub(crate) fn revoke(&self, run_id: Uuid, token: &str, why: Revoked) {
        if let Some(held) = self.lock().get_mut(&run_id).filter(|held| held.token == token) {
            held.keeper = None;
            held.tell(why);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A verdict on an older claim of a run does not change a newer claim of that run.
    #[test]
    fn a_verdict_on_an_older_claim_leaves_the_newer_one_alone() {
        let (registry, run_id) = (Registry::default(), Uuid::now_v7());
        registry.insert(run_id, "older".into(), Some(1));
        let newer = registry.insert(run_id, "newer".into(), Some(1));
        registry.abandon(run_id, "older");
        registry.remove(run_id, Some("older"));
        registry.revoke(run_id, "older", Revoked::Lost);
        assert_eq!(registry.kept_by(1), [(run_id, "newer".to_owned())]);
        assert_eq!(*newer.borrow(), None);
        registry.revoke(run_id, "newer", Revoked::Expired);
        registry.revoke(run_id, "newer", Revoked::Lost);
        assert_eq!(*newer.borrow(), Some(Revoked::Expired), "the first word counts");
        assert!(registry.kept_by(1).is_empty());
        assert_eq!(registry.token(run_id).as_deref(), Some("newer"), "a late word about the run shows it");
    }

    /// No stream keeps the lease of an abandoned claim; its token stays known until the claim is removed.
    #[test]
    fn an_abandoned_claim_keeps_its_token() {
        let (registry, run_id) = (Registry::default(), Uuid::now_v7());
        registry.insert(run_id, "token".into(), Some(1));
        registry.abandon(run_id, "token");
        assert!(registry.kept_by(1).is_empty());
        assert_eq!(registry.token(run_id).as_deref(), Some("token"));
        registry.remove(run_id, Some("token"));
        assert_eq!(registry.token(run_id), None);
    }

    /// Claims beyond the bound displace only claims that no stream keeps; the newest claim is remembered.
    #[test]
    fn too_many_claims_push_out_none_that_is_kept() {
        let registry = Registry::default();
        let insert = |keeper| {
            let run_id = Uuid::now_v7();
            registry.insert(run_id, String::new(), keeper);
            run_id
        };
        for _ in 0..CLAIMS_MAX / 2 {
            insert(Some(1));
            insert(None);
        }
        for _ in 0..100 {
            let newest = insert(None);
            assert!(registry.token(newest).is_some());
        }
        assert_eq!(registry.lock().len(), CLAIMS_MAX);
        assert_eq!(registry.kept_by(1).len(), CLAIMS_MAX / 2);
    }

    /// When a run is claimed again, the holder of its older claim learns that the older claim is lost.
    #[test]
    fn a_claim_that_another_one_replaces_is_lost() {
        let (registry, run_id) = (Registry::default(), Uuid::now_v7());
        let older = registry.insert(run_id, "older".into(), Some(1));
        registry.insert(run_id, "newer".into(), Some(1));
        assert_eq!(*older.borrow(), Some(Revoked::Lost));
    }

    /// A claim that arrives twice is one claim: its holder is told of no loss, and the lease is kept as before.
    #[test]
    fn a_claim_that_arrives_twice_is_not_lost() {
        let (registry, run_id) = (Registry::default(), Uuid::now_v7());
        let first = registry.insert(run_id, "token".into(), Some(1));
        registry.insert(run_id, "token".into(), Some(1));
        assert_eq!(*first.borrow(), None);
        assert_eq!(registry.kept_by(1), [(run_id, "token".to_owned())]);
        registry.revoke(run_id, "token", Revoked::Lost);
        assert_eq!(*first.borrow(), Some(Revoked::Lost), "whoever took it first hears of its end");
    }
}
