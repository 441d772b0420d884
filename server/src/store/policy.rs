//! How queues are kept: policies, and cleanup by hand.

use tokio_postgres::Row;

use super::statement::{EVENT_CLEANUP, QUEUE_POLICY, QUEUE_SET_POLICY, TASK_CLEANUP};
use super::{Fault, Store, Wait};
use crate::domain::Error;
use crate::scope::Scope;

/// What a cleanup deletes.
#[derive(Debug, Clone, Copy)]
pub enum Old {
    /// Tasks that have ended.
    Tasks,
    /// Events.
    Events,
}

impl Store {
    /// The policy of a queue.
    pub async fn queue_policy(&self, scope: &Scope) -> Result<Row, Error> {
        let rows = self.rows(&QUEUE_POLICY, Wait::Skip, None, &[&scope.queue().as_str()]).await;
        let row = rows.map_err(|fault| fault.into_read_error(scope))?.into_iter().next();
        row.ok_or_else(|| Error::QueueNotFound(scope.queue().as_str().to_owned()))
    }

    /// Changes the policy of a queue that exists; `policy` is what the contract's function takes.
    pub async fn queue_set_policy(&self, scope: &Scope, policy: &str) -> Result<(), Error> {
        let changed = self.rows(&QUEUE_SET_POLICY, Wait::Skip, None, &[&scope.queue().as_str(), &policy]).await;
        match changed {
            Ok(_) => Ok(()),
            // What it refuses was not refused at the edge: it depends on the queue.
            Err(Fault::Raised { message, .. }) => Err(Error::invalid("policy", message)),
            Err(fault) => Err(fault.into_error(scope)),
        }
    }

    /// Deletes a batch of what is old; says how many.
    pub async fn cleanup(&self, scope: &Scope, what: Old, seconds: i32, limit: i32) -> Result<i32, Error> {
        let statement = match what {
            Old::Tasks => &TASK_CLEANUP,
            Old::Events => &EVENT_CLEANUP,
        };
        let rows = self.rows(statement, Wait::Skip, None, &[&scope.queue().as_str(), &seconds, &limit]).await;
        Ok(rows.map_err(|fault| fault.into_error(scope))?.first().map_or(0, |row| row.get("deleted")))
    }
}
