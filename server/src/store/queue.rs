//! Queues: creating, dropping, listing and counting them, and their doorbell triggers.

use tokio_postgres::Row;

use super::statement::{
    DOORBELL_MISSING, QUEUE_BACKLOG, QUEUE_COLLISION, QUEUE_CREATE, QUEUE_DOORBELL, QUEUE_DROP, QUEUE_GET, QUEUE_LIST,
    QUEUE_LOCK, QUEUE_SET_POLICY, QUEUE_STATS,
};
use super::{Fault, Store, Tx, Wait};
use crate::domain::Error;
use crate::scope::Scope;

/// Upper bound of each count of a queue. Counting stops there.
pub const COUNT_MAX: i64 = 100_000;
/// Longest lock wait while a queue is created, such as for another creation of the same queue.
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

    /// Creates a queue and sets its policy, in one transaction. Returns whether the queue is new; of concurrent calls
    /// only one gets `true`. `policy` is the JSON argument of the contract's `set_queue_policy`.
    pub async fn queue_create(&self, scope: &Scope, mode: &str, policy: Option<&str>) -> Result<bool, Error> {
        match self.queue_create_with(scope, mode, policy).await {
            // An SQL client created the queue at the same time. The second attempt finds it.
            Err(Fault::Duplicate) => {
                self.queue_create_with(scope, mode, policy).await.unwrap_or_else(|fault| Err(fault.into_error(scope)))
            }
            created => created.unwrap_or_else(|fault| Err(fault.into_error(scope))),
        }
    }

    /// Runs the transaction of [`Store::queue_create`]. The inner error is a refusal by the rules for queues.
    async fn queue_create_with(
        &self,
        scope: &Scope,
        mode: &str,
        policy: Option<&str>,
    ) -> Result<Result<bool, Error>, Fault> {
        let tx = self.begin(LOCK_WAIT).await?;
        match create_in(scope, &tx, mode, policy).await {
            Ok(Ok(fresh)) => tx.commit().await.map(|()| Ok(fresh)),
            refused => {
                tx.rollback().await;
                refused
            }
        }
    }

    /// Those of `queues` that lack a doorbell trigger on one of their two tables.
    pub async fn doorbell_missing(&self, queues: &[&str]) -> Result<Vec<String>, Fault> {
        let rows = self.rows(&DOORBELL_MISSING, Wait::Skip, None, &[&queues]).await?;
        Ok(rows.iter().map(|row| row.get("queue_name")).collect())
    }

    /// Installs the doorbell trigger on a queue. Fails if a lock takes longer than 100 ms; a later tick retries.
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

    /// Counts the pending tasks that can be claimed now, up to `most`.
    pub async fn queue_backlog(&self, scope: &Scope, most: i64) -> Result<i64, Error> {
        let rows = self.rows(&QUEUE_BACKLOG, Wait::Skip, Some(scope), &[&most]).await;
        let rows = rows.map_err(|fault| fault.into_read_error(scope))?;
        Ok(rows.first().map_or(0, |row| row.get("waiting")))
    }

    /// Drops a queue, and returns whether it was registered.
    pub async fn queue_drop(&self, scope: &Scope) -> Result<bool, Error> {
        let (before, _) = self.queue_get(scope).await?;
        self.rows(&QUEUE_DROP, Wait::Skip, None, &[&scope.queue().as_str()])
            .await
            .map_err(|fault| fault.into_error(scope))?;
        Ok(before.is_some())
    }

    /// A page of at most `limit` queues in order of name, after `after`.
    pub async fn queue_list(&self, scope: Option<&Scope>, after: &str, limit: i64) -> Result<Vec<Row>, Fault> {
        self.rows(&QUEUE_LIST, Wait::Skip, scope, &[&after, &limit]).await
    }

    /// Counts of a queue's runs by state, each up to [`COUNT_MAX`], and the age of the oldest claimable one.
    pub async fn queue_stats(&self, scope: &Scope) -> Result<Row, Error> {
        self.rows(&QUEUE_STATS, Wait::Skip, Some(scope), &[&COUNT_MAX])
            .await
            .map_err(|fault| fault.into_read_error(scope))?
            .into_iter()
            .next()
            .ok_or_else(|| Error::Internal("queue_stats returned nothing".into()))
    }
}

async fn create_in(scope: &Scope, tx: &Tx, mode: &str, policy: Option<&str>) -> Result<Result<bool, Error>, Fault> {
    let queue = scope.queue().as_str();
    tx.rows(&QUEUE_LOCK, Wait::Skip, None, &[&queue]).await?;
    let found = tx.rows(&QUEUE_GET, Wait::Skip, None, &[&queue]).await?;
    let before: Option<&str> = found.first().and_then(|row| row.get("storage_mode"));
    let usable = found.first().is_some_and(|row| row.get("usable"));
    match before {
        Some(before) if before != mode => return Ok(Err(Error::QueueExists(queue.to_owned()))),
        Some(_) => {}
        None => {
            if let Some(row) = tx.rows(&QUEUE_COLLISION, Wait::Skip, None, &[&queue, &mode]).await?.first() {
                let problem = match row.get::<_, Option<&str>>("relation") {
                    Some(relation) => format!("has the name of a table that is {relation:?} already; choose another"),
                    None => {
                        let other: &str = row.get("queue_name");
                        format!("shares names of tables with queue {other:?}; choose another")
                    }
                };
                return Ok(Err(Error::invalid("queue", problem)));
            }
        }
    }
    match tx.rows(&QUEUE_CREATE, Wait::Skip, None, &[&queue, &mode]).await {
        Err(Fault::Raised { .. }) => return Ok(Err(Error::QueueExists(queue.to_owned()))),
        created => drop(created?),
    }
    if let Some(policy) = policy {
        match tx.rows(&QUEUE_SET_POLICY, Wait::Skip, None, &[&queue, &policy]).await {
            // A policy that was valid on its own may still not fit the queue.
            Err(Fault::Raised { message, .. }) => return Ok(Err(Error::invalid("policy", message))),
            set => drop(set?),
        }
    }
    Ok(Ok(before.is_none() || !usable))
}
