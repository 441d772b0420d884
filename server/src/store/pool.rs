//! Connections by role, so that no kind of work starves another: while spawns wait, leases are extended and reads answered.
//!
//! Each role has its own time limit, in Postgres (`statement_timeout`) and here: a connection that stays silent past it is
//! given up, whatever TCP says of it. What the peer does not acknowledge at all is noticed within ten seconds.

use std::time::Duration;

use deadpool_postgres::{Manager, ManagerConfig, Object, Pool, RecyclingMethod, Runtime};
use tokio_postgres::NoTls;

use super::{Fault, LOCK_WAIT, LOCK_WAIT_UPKEEP, StoreOptions, session_config};
use crate::domain::Error;

/// Below so many connections all roles share them.
const SHARED_BELOW: usize = 5;
/// After Postgres should have ended a statement, so long until its connection is given up.
pub(super) const SILENCE: Duration = Duration::from_secs(2);

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
        Ok(Self { pools })
    }

    fn of(&self, role: Role) -> &Pool {
        let index = Role::ALL.iter().position(|known| *known == role).unwrap_or(0);
        self.pools.get(index).unwrap_or(&self.pools[0])
    }

    /// A connection of a role; waits for a free one as long as the options say.
    pub async fn get(&self, role: Role) -> Result<Object, Fault> {
        self.of(role).get().await.map_err(Fault::from_pool)
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
