//! The error a timed-out call returns: the cause of its last failed attempt.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::domain::Error;
use crate::scope::Scope;
use crate::store::{Access, Fault, LOCK_WAIT, LOCK_WAIT_PATIENT, Store};

/// Faults of the attempts of one call so far. Shared by the waiting call and its attempts.
#[derive(Debug, Default)]
pub(crate) struct Late(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    last: Option<Error>,
    /// An attempt lost its answer: it may have taken effect, whatever the outcome of later attempts.
    unknown: bool,
}

impl Late {
    /// Notes the fault of an attempt that may be repeated.
    pub(crate) fn note(&self, fault: &Fault, scope: &Scope) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.unknown |= matches!(fault, Fault::Unknown(_));
        state.last = Some(fault.clone().into_error(scope));
    }

    /// An attempt met locks: waits until the queue is unlocked if one of these queues is locked, else for `PAUSE`.
    pub(crate) async fn wait_for_locks(&self, store: &Store, scopes: &[&Scope]) {
        match scopes.iter().find(|scope| store.is_locked(scope.queue().as_str())) {
            Some(scope) => {
                self.note(&Fault::Locked, scope);
                store.wait_for(scope.queue().as_str(), Access::Free).await;
            }
            None => tokio::time::sleep(PAUSE).await,
        }
    }

    /// Whether an attempt may have taken effect.
    pub(crate) fn is_unknown(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).unknown
    }

    /// The error of the call when its deadline has passed.
    pub(crate) fn error(&self) -> Error {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.unknown { Error::OutcomeUnknown } else { state.last.clone().unwrap_or(Error::DeadlineExceeded) }
    }
}

/// Pause between attempts.
const PAUSE: Duration = Duration::from_millis(50);

/// Repeats an attempt until the deadline, as long as its fault passes or is a lock. The attempt's argument is its
/// longest lock wait: short at first, to free the connection soon, longer once rows are held. Returns the first
/// success, or the first fault that does not pass.
pub(crate) async fn until<T, F: Future<Output = Result<T, Fault>>>(
    store: &Store,
    deadline: Instant,
    scope: &Scope,
    attempt: impl Fn(Duration) -> F,
) -> Result<Result<T, Fault>, Error> {
    retry(store, deadline, &[scope], Fault::is_passing, attempt).await
}

/// Like [`until`], for work that may be done only once, on one or several queues: repeats only after a lock, because
/// then nothing was done.
pub(crate) async fn until_free<T, F: Future<Output = Result<T, Fault>>>(
    store: &Store,
    deadline: Instant,
    scopes: &[&Scope],
    attempt: impl Fn(Duration) -> F,
) -> Result<Result<T, Fault>, Error> {
    retry(store, deadline, scopes, |_| false, attempt).await
}

async fn retry<T, F: Future<Output = Result<T, Fault>>>(
    store: &Store,
    deadline: Instant,
    scopes: &[&Scope],
    passes: impl Fn(&Fault) -> bool,
    attempt: impl Fn(Duration) -> F,
) -> Result<Result<T, Fault>, Error> {
    let late = Late::default();
    let trying = async {
        let mut lock_wait = LOCK_WAIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match attempt(left.min(lock_wait)).await {
                Err(Fault::Locked) => {
                    lock_wait = LOCK_WAIT_PATIENT;
                    late.wait_for_locks(store, scopes).await;
                }
                Err(fault) if passes(&fault) => {
                    scopes.first().iter().for_each(|scope| late.note(&fault, scope));
                    tokio::time::sleep(PAUSE).await;
                }
                done => return done,
            }
        }
    };
    tokio::time::timeout_at(deadline, trying).await.map_err(|_| late.error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::QueueName;
    use crate::scope::Caller;

    #[test]
    fn the_last_trouble_is_told_and_a_lost_answer_outlives_it() {
        let scope = Caller::anonymous().scope(QueueName::parse("queue", "q").unwrap());
        let late = Late::default();
        assert_eq!(late.error(), Error::DeadlineExceeded);
        late.note(&Fault::Full, &scope);
        late.note(&Fault::Gone("away".into()), &scope);
        assert_eq!((late.error(), late.is_unknown()), (Error::DatabaseUnreachable("away".into()), false));
        late.note(&Fault::Unknown("lost".into()), &scope);
        late.note(&Fault::Gone("away".into()), &scope);
        assert_eq!((late.error(), late.is_unknown()), (Error::OutcomeUnknown, true));
    }

    #[tokio::test(start_paused = true)]
    async fn whenever_the_deadline_comes_it_is_told_what_kept_the_call() {
        let store = crate::store::tests::nowhere();
        let scope = Caller::anonymous().scope(QueueName::parse("queue", "q").unwrap());
        for ms in 10..300 {
            let told = until(&store, Instant::now() + Duration::from_millis(ms), &scope, |_| async {
                tokio::time::sleep(Duration::from_millis(7)).await;
                Err::<(), _>(Fault::Gone("away".into()))
            });
            assert_eq!(told.await.unwrap_err(), Error::DatabaseUnreachable("away".into()), "{ms} ms");
        }
    }
}
