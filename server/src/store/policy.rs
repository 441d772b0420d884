//! Policies of queues, and cleanups that a caller requests.

use tokio_postgres::Row;

use super::statement::{EVENT_CLEANUP, QUEUE_POLICY, QUEUE_SET_POLICY, TASK_CLEANUP};
use super::{Fault, Store, Wait};
use crate::domain::Error;
use crate::scope::Scope;

/// Kind of rows that a cleanup deletes.
#[derive(Debug, Clone, Copy)]
pub enum Old {
    /// Tasks that ended more than `seconds` ago.
    Tasks,
    /// Events emitted more than `seconds` ago.
    Events,
}

impl Store {
    /// Reads the policy of a queue. Fails with [`Error::QueueNotFound`] if the queue is not registered.
    pub async fn queue_policy(&self, scope: &Scope) -> Result<Row, Error> {
        let rows = self.rows(&QUEUE_POLICY, Wait::Skip, None, &[&scope.queue().as_str()]).await;
        let row = rows.map_err(|fault| fault.into_read_error(scope))?.into_iter().next();
        row.ok_or_else(|| Error::QueueNotFound(scope.queue().as_str().to_owned()))
    }

    /// Changes the policy of a registered queue. `policy` is the JSON argument of the contract's `set_queue_policy`.
    pub async fn queue_set_policy(&self, scope: &Scope, policy: &str) -> Result<(), Error> {
        let changed = self.rows(&QUEUE_SET_POLICY, Wait::Skip, None, &[&scope.queue().as_str(), &policy]).await;
        match changed {
            Ok(_) => Ok(()),
            // The request was validated before, so this refusal depends on the queue.
            Err(Fault::Raised { message, .. }) => Err(Error::invalid("policy", message)),
            Err(fault) => Err(fault.into_error(scope)),
        }
    }

    /// Deletes up to `limit` tasks or events older than `seconds`. Returns how many were deleted.
    pub async fn cleanup(&self, scope: &Scope, what: Old, seconds: i32, limit: i32) -> Result<i32, Error> {
        let statement = match what {
            Old::Tasks => &TASK_CLEANUP,
            Old::Events => &EVENT_CLEANUP,
        };
        let rows = self.rows(statement, Wait::Skip, None, &[&scope.queue().as_str(), &seconds, &limit]).await;
        Ok(rows.map_err(|fault| fault.into_error(scope))?.first().map_or(0, |row| row.get("deleted")))
    }
}
