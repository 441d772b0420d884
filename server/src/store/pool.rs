//! Connection pools, one per role, so that no kind of work starves another. Below five connections all roles share one
//! pool.
//!
//! Each role has a time limit. Postgres enforces it with `statement_timeout`; a shared pool has the limit of upkeep.
//! Two seconds after the limit of its role, the server closes a silent connection, whatever TCP reports. A peer that
//! acknowledges nothing is detected within ten seconds.

use std::pin::pin;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use deadpool_postgres::{Manager, ManagerConfig, Object, Pool, RecyclingMethod, Runtime, Timeouts};
use tokio::runtime::Handle;
use tokio::time::{Instant, timeout};
use tokio_postgres::NoTls;

use super::{Fault, LOCK_WAIT, LOCK_WAIT_UPKEEP, StoreOptions, session_config};
use crate::domain::Error;

/// Below this number of connections all roles share one pool.
const SHARED_BELOW: usize = 5;
/// Grace after the time limit of a statement. Past it, a connection without an answer is closed.
pub(super) const SILENCE: Duration = Duration::from_secs(2);

/// Time for the statement of an abandoned caller to end by itself. Past it, the statement is cancelled.
const ENDS_SOON: Duration = Duration::from_millis(250);
/// Longest time until a cancelled statement ends. Past it, its connection is closed all the same.
const QUIET_MAX: Duration = Duration::from_secs(2);

/// Pause after Postgres refused a connection, until one caller tries again to open one.
const CROWD_PAUSE: Duration = Duration::from_secs(1);
/// Pause between two searches for an idle open connection, while Postgres refuses further ones.
const CROWD_LOOK: Duration = Duration::from_millis(5);
/// Shortest time between two log lines about refused connections.
const CROWD_TOLD_EVERY: Duration = Duration::from_secs(60);

/// Kind of work of a statement. It selects the pool and the time limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Spawns, claims, outcomes, steps, waits, events, and everything not listed below.
    Work,
    /// Extensions and checks of leases, the search for expired ones, and the tick.
    Lease,
    /// Statements that only read, most of them for callers.
    Read,
    /// Cleanup, partitions, drops of queues, counts of a queue, and `doctor`: statements that may take long.
    Upkeep,
}

impl Role {
    /// All roles, in the order of the pools.
    pub const ALL: [Self; 4] = [Self::Work, Self::Lease, Self::Read, Self::Upkeep];

    /// Label in metrics and in `application_name`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Work => "work",
            Self::Lease => "lease",
            Self::Read => "read",
            Self::Upkeep => "upkeep",
        }
    }

    /// The `statement_timeout` of the role's pool. A shared pool has that of [`Role::Upkeep`].
    pub fn statement_timeout(self) -> Duration {
        match self {
            Self::Work | Self::Read => Duration::from_secs(8),
            Self::Lease => Duration::from_secs(5),
            Self::Upkeep => Duration::from_secs(60),
        }
    }

    /// Longest wait for an answer. Past it, the connection is closed.
    pub fn silence_max(self) -> Duration {
        self.statement_timeout() + SILENCE
    }

    /// Connections of this role out of `of`. From [`SHARED_BELOW`] on, the shares of all roles add up to `of`.
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

/// Upper bound of connections that a role uses, out of `of`. In a shared pool reads use at most half of them.
pub fn connections(role: Role, of: usize) -> usize {
    match role {
        _ if of >= SHARED_BELOW => role.share(of),
        Role::Read => (of / 2).max(1),
        Role::Work | Role::Lease | Role::Upkeep => of,
    }
}

/// One pool per role, or one for all roles below five connections.
#[derive(Debug)]
pub struct Pools {
    pools: Vec<Pool>,
    wait_max: Duration,
    crowd: Mutex<Crowd>,
}

/// Takes back the connection of an abandoned caller. `last_words` follow the statement that may still run. A statement
/// that ends soon leaves its connection to the pool. A longer one is cancelled, and its connection is closed: a request
/// to cancel is not answered, so it may come late and would end a statement of the next caller. `held` is dropped only
/// after that, so it bounds the statements that still run.
pub(super) fn take_back(client: Object, last_words: &'static str, held: impl Send + 'static) {
    let Ok(runtime) = Handle::try_current() else {
        drop(Object::take(client));
        return;
    };
    runtime.spawn(async move {
        let _held = held;
        if !ends(&client, last_words).await {
            drop(Object::take(client));
        }
    });
}

/// Waits until an abandoned statement has ended, and returns true if it did so by itself.
async fn ends(client: &Object, last_words: &str) -> bool {
    let mut ended = pin!(client.batch_execute(last_words));
    if let Ok(ended) = timeout(ENDS_SOON, &mut ended).await {
        return ended.is_ok();
    }
    let cancelled = async {
        client.cancel_token().cancel_query(NoTls).await?;
        ended.await
    };
    if let Ok(Err(error)) = timeout(QUIET_MAX, cancelled).await {
        tracing::debug!(%error, "the statement of an abandoned caller was not cancelled");
    }
    false
}

/// Whether Postgres accepts further connections.
#[derive(Debug, Default)]
struct Crowd {
    /// Postgres refused a connection. Until this time no caller tries again.
    until: Option<Instant>,
    told_at: Option<Instant>,
}

impl Pools {
    /// Creates the pools. A connection is opened only when a statement needs it.
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

    /// Takes a connection of the role's pool, waiting at most `wait_max` for a free one. While Postgres refuses further
    /// connections, any idle open connection serves, whatever its role.
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

    /// Whether the caller should try to open a connection. While Postgres refuses them, one caller per [`CROWD_PAUSE`]
    /// tries.
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

    /// Per role, or once for `all`: upper bound of connections, open connections, and callers waiting for one.
    pub fn state(&self) -> Vec<(&'static str, usize, usize, usize)> {
        let names = if self.pools.len() == 1 { vec!["all"] } else { Role::ALL.map(Role::as_str).to_vec() };
        let each = names.into_iter().zip(&self.pools);
        each.map(|(name, pool)| {
            let status = pool.status();
            (name, status.max_size, status.size, status.waiting)
        })
        .collect()
    }

    /// Number of connections in use.
    pub fn in_use(&self) -> usize {
        let statuses = self.pools.iter().map(Pool::status);
        statuses.map(|status| status.size - status.available.min(status.size)).sum()
    }

    /// Closes all pools. Later calls fail.
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
