//! Connections by role, so that no kind of work starves another: while spawns wait, leases are extended and reads answered.
//!
//! Each role has its own time limit, in Postgres (`statement_timeout`) and here: a connection that stays silent past it is
//! given up, whatever TCP says of it. What the peer does not acknowledge at all is noticed within ten seconds.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use deadpool_postgres::{Manager, ManagerConfig, Object, Pool, RecyclingMethod, Runtime, Timeouts};
use tokio::runtime::Handle;
use tokio::time::Instant;
use tokio_postgres::NoTls;

use super::{Fault, LOCK_WAIT, LOCK_WAIT_UPKEEP, StoreOptions, session_config};
use crate::domain::Error;

/// Below so many connections all roles share them.
const SHARED_BELOW: usize = 5;
/// After Postgres should have ended a statement, so long until its connection is given up.
pub(super) const SILENCE: Duration = Duration::from_secs(2);

/// Longest time to end what an abandoned caller left running; after that its connection is given up.
const QUIET_MAX: Duration = Duration::from_secs(2);

/// After Postgres refused a connection, so long until one call tries to open the next one.
const CROWD_PAUSE: Duration = Duration::from_secs(1);
/// Between looks for an open connection that nobody uses, while Postgres takes no further one.
const CROWD_LOOK: Duration = Duration::from_millis(5);
/// Between log lines about that.
const CROWD_TOLD_EVERY: Duration = Duration::from_secs(60);

/// What a statement is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Spawns, claims, outcomes, steps, waits, events.
    Work,
    /// Extensions and looks at leases, the tick.
    Lease,
    /// Reads of callers.
    Read,
    /// Cleanup, partitions, queues made and dropped, doctor: may take long.
    Upkeep,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Work, Self::Lease, Self::Read, Self::Upkeep];

    /// For logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Work => "work",
            Self::Lease => "lease",
            Self::Read => "read",
            Self::Upkeep => "upkeep",
        }
    }

    /// `statement_timeout`.
    pub fn statement_timeout(self) -> Duration {
        match self {
            Self::Work | Self::Read => Duration::from_secs(8),
            Self::Lease => Duration::from_secs(5),
            Self::Upkeep => Duration::from_secs(60),
        }
    }

    /// After so long without an answer the connection is given up.
    pub fn silence_max(self) -> Duration {
        self.statement_timeout() + SILENCE
    }

    /// Connections of so many.
    fn share(self, of: usize) -> usize {
        let lease = (of / 8).clamp(1, 4);
        let read = (of / 4).clamp(1, 8);
        let upkeep = if of < 16 { 1 } else { 2 };
        match self {
            Self::Work => of.saturating_sub(lease + read + upkeep).max(1),
            Self::Lease => lease,
            Self::Read => read,
            Self::Upkeep => upkeep,
        }
    }
}

/// Connections that a role takes at most, of so many in all; where all share them, reads leave half.
pub fn connections(role: Role, of: usize) -> usize {
    match role {
        _ if of >= SHARED_BELOW => role.share(of),
        Role::Read => (of / 2).max(1),
        Role::Work | Role::Lease | Role::Upkeep => of,
    }
}

/// One pool per role, or one for all where there are few connections.
#[derive(Debug)]
pub struct Pools {
    pools: Vec<Pool>,
    wait_max: Duration,
    crowd: Mutex<Crowd>,
}

/// Takes back a connection whose caller went away. Whatever still runs on it is cancelled; the connection, and so `held`, which
/// was taken for it, come free once nothing runs any more.
pub(super) fn take_back(client: Object, last_words: &'static str, held: impl Send + 'static) {
    let Ok(runtime) = Handle::try_current() else {
        drop(Object::take(client));
        return;
    };
    runtime.spawn(async move {
        let _held = held;
        let cancel = client.cancel_token();
        let quiet = async {
            cancel.cancel_query(NoTls).await?;
            client.batch_execute(last_words).await
        };
        let quiet = tokio::time::timeout(QUIET_MAX, quiet).await;
        if !matches!(quiet, Ok(Ok(()))) {
            drop(Object::take(client));
        }
    });
}

/// Whether Postgres takes further connections.
#[derive(Debug, Default)]
struct Crowd {
    /// It refused one; until then nobody tries again.
    until: Option<Instant>,
    told_at: Option<Instant>,
}

impl Pools {
    /// Pools whose connections are opened when they are first needed.
    pub fn new(options: &StoreOptions) -> Result<Self, Error> {
        let shared = options.connections_max < SHARED_BELOW;
        let pool = |role: Role, count: usize, limit: Duration| {
            let lock_wait = if role == Role::Upkeep { LOCK_WAIT_UPKEEP } else { LOCK_WAIT };
            let name = if shared { "absurd server".to_owned() } else { format!("absurd server ({})", role.as_str()) };
            let config = session_config(&options.database, &name, limit, lock_wait);
            let recycling = ManagerConfig { recycling_method: RecyclingMethod::Fast };
            Pool::builder(Manager::from_config(config, NoTls, recycling))
                .max_size(count)
                .runtime(Runtime::Tokio1)
                .wait_timeout(Some(options.wait_max))
                .create_timeout(Some(Duration::from_secs(10)))
                .build()
                .map_err(|error| Error::Internal(error.to_string()))
        };
        let pools = if shared {
            vec![pool(Role::Work, options.connections_max, Role::Upkeep.statement_timeout())?]
        } else {
            let one = |role: Role| pool(role, role.share(options.connections_max), role.statement_timeout());
            Role::ALL.into_iter().map(one).collect::<Result<_, _>>()?
        };
        Ok(Self { pools, wait_max: options.wait_max, crowd: Mutex::default() })
    }

    fn of(&self, role: Role) -> &Pool {
        let index = Role::ALL.iter().position(|known| *known == role).unwrap_or(0);
        self.pools.get(index).unwrap_or(&self.pools[0])
    }

    /// A connection of a role; waits for a free one as long as the options say. Where Postgres takes no further connection, one
    /// of those that are open serves, whatever its role.
    pub async fn get(&self, role: Role) -> Result<Object, Fault> {
        let own = self.of(role);
        if self.may_open() {
            match self.open(own).await {
                Err(Fault::Crowded(_)) => {}
                done => return done,
            }
        }
        let until = Instant::now() + self.wait_max;
        loop {
            let mut pools = std::iter::once(own).chain(&self.pools);
            if let Some(pool) = pools.find(|pool| pool.status().available > 0) {
                let now = Timeouts { wait: Some(Duration::ZERO), ..pool.timeouts() };
                match pool.timeout_get(&now).await.map_err(Fault::from_pool) {
                    Err(Fault::Crowded(text)) => self.note_crowd(&text),
                    Err(Fault::Busy { .. }) => {}
                    done => return done,
                }
            } else if self.open_count() == 0 || self.may_open() {
                match self.open(own).await {
                    Err(Fault::Crowded(text)) if self.open_count() == 0 => return Err(Fault::Gone(text)),
                    Err(Fault::Crowded(_)) => {}
                    done => return done,
                }
            }
            if Instant::now() >= until {
                return Err(Fault::Busy { after: CROWD_PAUSE });
            }
            tokio::time::sleep(CROWD_LOOK).await;
        }
    }

    async fn open(&self, pool: &Pool) -> Result<Object, Fault> {
        let before = pool.status().size;
        let got = pool.get().await.map_err(Fault::from_pool);
        match &got {
            Ok(_) if pool.status().size > before => self.crowd().until = None,
            Ok(_) => {}
            Err(Fault::Crowded(text)) => self.note_crowd(text),
            Err(_) => {}
        }
        got
    }

    fn crowd(&self) -> std::sync::MutexGuard<'_, Crowd> {
        self.crowd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_count(&self) -> usize {
        self.pools.iter().map(|pool| pool.status().size).sum()
    }

    /// Whether to try to open a connection. While Postgres refuses them, one caller at a time finds out whether it still does.
    fn may_open(&self) -> bool {
        let now = Instant::now();
        let mut crowd = self.crowd();
        match crowd.until {
            Some(until) if now < until => false,
            Some(_) => {
                crowd.until = Some(now + CROWD_PAUSE);
                true
            }
            None => true,
        }
    }

    fn note_crowd(&self, text: &str) {
        let now = Instant::now();
        let mut crowd = self.crowd();
        crowd.until = Some(now + CROWD_PAUSE);
        if crowd.told_at.is_none_or(|at| now.duration_since(at) >= CROWD_TOLD_EVERY) {
            crowd.told_at = Some(now);
            drop(crowd);
            tracing::warn!(
                open = self.open_count(),
                "Postgres takes no further connection ({text}); the server goes on with those that are open: raise the limit of \
                 the role or of Postgres, or lower --max-connections"
            );
        }
    }

    /// By role, or `all`: connections at most, open, and callers that wait for one.
    pub fn state(&self) -> Vec<(&'static str, usize, usize, usize)> {
        let names = if self.pools.len() == 1 { vec!["all"] } else { Role::ALL.map(Role::as_str).to_vec() };
        let each = names.into_iter().zip(&self.pools);
        each.map(|(name, pool)| {
            let status = pool.status();
            (name, status.max_size, status.size, status.waiting)
        })
        .collect()
    }

    /// Connections that are in use.
    pub fn in_use(&self) -> usize {
        let statuses = self.pools.iter().map(Pool::status);
        statuses.map(|status| status.size - status.available.min(status.size)).sum()
    }

    /// Closes all connections.
    pub fn close(&self) {
        self.pools.iter().for_each(Pool::close);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up() {
        for count in SHARED_BELOW..200 {
            assert_eq!(Role::ALL.iter().map(|role| role.share(count)).sum::<usize>(), count);
        }
    }
}
