//! Queues: create, drop, list, count.

use tokio_postgres::Row;

use super::statement::{
    DOORBELL_MISSING, QUEUE_BACKLOG, QUEUE_COLLISION, QUEUE_CREATE, QUEUE_DOORBELL, QUEUE_DROP, QUEUE_GET, QUEUE_LIST,
    QUEUE_SET_POLICY, QUEUE_STATS,
};
use super::{Fault, Store, Wait};
use crate::domain::Error;
use crate::scope::Scope;

/// How far counts go.
pub const COUNT_MAX: i64 = 100_000;
/// Longest wait for others who create queues.
const LOCK_WAIT: std::time::Duration = std::time::Duration::from_secs(10);

impl Store {
    /// Storage mode of a queue, and whether its tables exist. A queue works without a registry row.
    pub async fn queue_get(&self, scope: &Scope) -> Result<(Option<String>, bool), Error> {
        let rows = self
            .rows(&QUEUE_GET, Wait::Skip, None, &[&scope.queue().as_str()])
            .await
            .map_err(|fault| fault.into_read_error(scope))?;
        Ok(rows.first().map_or((None, false), |row| (row.get("storage_mode"), row.get("usable"))))
    }

    /// Creates a queue, and sets a policy in the same transaction; says whether it is new. `policy` is what the contract's
    /// function takes.
    pub async fn queue_create(&self, scope: &Scope, mode: &str, policy: Option<&str>) -> Result<bool, Error> {
        let (before, usable) = self.queue_get(scope).await?;
        if before.as_deref().is_some_and(|before| before != mode) {
            return Err(Error::QueueExists(scope.queue().as_str().to_owned()));
        }
        if before.is_none() {
            let queue = scope.queue().as_str();
            let found = self.rows(&QUEUE_COLLISION, Wait::Skip, None, &[&queue, &mode]).await;
            if let Some(row) = found.map_err(|fault| fault.into_read_error(scope))?.first() {
                let other: &str = row.get("queue_name");
                return Err(Error::invalid(
                    "queue",
                    format!("shares names of tables with queue {other:?}; choose another"),
                ));
            }
        }
        let fresh = !(before.is_some() && usable);
        match self.queue_create_with(scope, mode, policy).await {
            Ok(created) => created.map(|()| fresh),
            // Two creators at once: the other one made it.
            Err(Fault::Duplicate) => match self.queue_create_with(scope, mode, policy).await {
                Ok(created) => created.map(|()| false),
                Err(fault) => Err(fault.into_error(scope)),
            },
            Err(fault) => Err(fault.into_error(scope)),
        }
    }

    /// The transaction of it; inside, what the two functions refuse by their own rules.
    async fn queue_create_with(
        &self,
        scope: &Scope,
        mode: &str,
        policy: Option<&str>,
    ) -> Result<Result<(), Error>, Fault> {
        let queue = scope.queue().as_str();
        let tx = self.begin(LOCK_WAIT).await?;
        let mut refused = None;
        match tx.rows(&QUEUE_CREATE, Wait::Skip, None, &[&queue, &mode]).await {
            Ok(_) => {}
            Err(Fault::Raised { .. }) => refused = Some(Error::QueueExists(queue.to_owned())),
            Err(fault) => {
                tx.rollback().await;
                return Err(fault);
            }
        }
        if let Some(policy) = policy.filter(|_| refused.is_none()) {
            match tx.rows(&QUEUE_SET_POLICY, Wait::Skip, None, &[&queue, &policy]).await {
                Ok(_) => {}
                // What was in order at the edge may still not fit the queue.
                Err(Fault::Raised { message, .. }) => refused = Some(Error::invalid("policy", message)),
                Err(fault) => {
                    tx.rollback().await;
                    return Err(fault);
                }
            }
        }
        if let Some(error) = refused {
            tx.rollback().await;
            return Ok(Err(error));
        }
        tx.commit().await.map(Ok)
    }

    /// Those of these queues on which no doorbell hangs.
    pub async fn doorbell_missing(&self, queues: &[&str]) -> Result<Vec<String>, Fault> {
        let rows = self.rows(&DOORBELL_MISSING, Wait::Skip, None, &[&queues]).await?;
        Ok(rows.iter().map(|row| row.get("queue_name")).collect())
    }

    /// Hangs the doorbell on a queue. May fail for want of a lock; it is tried again later.
    pub async fn queue_doorbell(&self, scope: &Scope) -> Result<(), Fault> {
        let tx = self.begin(std::time::Duration::from_millis(100)).await?;
        match tx.rows(&QUEUE_DOORBELL, Wait::Skip, None, &[&scope.queue().as_str()]).await {
            Ok(_) => tx.commit().await,
            Err(fault) => {
                tx.rollback().await;
                Err(fault)
            }
        }
    }

    /// How many of its tasks can be claimed and wait, up to a bound.
    pub async fn queue_backlog(&self, scope: &Scope, most: i64) -> Result<i64, Error> {
        let rows = self.rows(&QUEUE_BACKLOG, Wait::Skip, Some(scope), &[&most]).await;
        let rows = rows.map_err(|fault| fault.into_read_error(scope))?;
        Ok(rows.first().map_or(0, |row| row.get("waiting")))
    }

    /// Drops a queue; says whether there was one.
    pub async fn queue_drop(&self, scope: &Scope) -> Result<bool, Error> {
        let (before, _) = self.queue_get(scope).await?;
        self.rows(&QUEUE_DROP, Wait::Skip, None, &[&scope.queue().as_str()])
            .await
            .map_err(|fault| fault.into_error(scope))?;
        Ok(before.is_some())
    }

    /// A page of queues after a name.
    pub async fn queue_list(&self, scope: Option<&Scope>, after: &str, limit: i64) -> Result<Vec<Row>, Fault> {
        self.rows(&QUEUE_LIST, Wait::Skip, scope, &[&after, &limit]).await
    }

    /// Counts of a queue.
    pub async fn queue_stats(&self, scope: &Scope) -> Result<Row, Error> {
        self.rows(&QUEUE_STATS, Wait::Skip, Some(scope), &[&COUNT_MAX])
            .await
            .map_err(|fault| fault.into_read_error(scope))?
            .into_iter()
            .next()
            .ok_or_else(|| Error::Internal("queue_stats returned nothing".into()))
    }
}
