//! Who asks, and for which queue. A store call demands a [`Scope`], so that no call can forget to ask for leave.

use crate::domain::QueueName;

/// Whose data it is. Without authentication there is one tenant, the default one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TenantId(Option<std::sync::Arc<str>>);

/// Who asks.
#[derive(Debug, Clone)]
pub struct Caller {
    tenant: TenantId,
}

impl Caller {
    /// The caller of a server without authentication, and of the server's own work.
    pub fn anonymous() -> Self {
        Self { tenant: TenantId(None) }
    }

    /// Leave to act on a queue. Every caller of the default tenant may act on every queue.
    pub fn scope(&self, queue: QueueName) -> Scope {
        Scope { tenant: self.tenant.clone(), queue }
    }
}

/// Leave to act on one queue.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Scope {
    tenant: TenantId,
    queue: QueueName,
}

impl Scope {
    /// The queue.
    pub fn queue(&self) -> &QueueName {
        &self.queue
    }
}
