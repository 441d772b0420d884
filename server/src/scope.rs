//! Callers and their permission to act on a queue. A store method that acts on one queue for a caller takes a
//! [`Scope`], so none can skip the permission check.

use crate::domain::QueueName;

/// Tenant that owns the data. Without authentication there is only the default tenant.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TenantId(Option<std::sync::Arc<str>>);

/// Caller of the service, known by its tenant.
#[derive(Debug, Clone)]
pub struct Caller {
    tenant: TenantId,
}

impl Caller {
    /// The caller of a server without authentication, and of the server's own background work.
    pub fn anonymous() -> Self {
        Self { tenant: TenantId(None) }
    }

    /// Permission to act on `queue`. Every caller of the default tenant may act on every queue.
    pub fn scope(&self, queue: QueueName) -> Scope {
        Scope { tenant: self.tenant.clone(), queue }
    }
}

/// Permission of a tenant to act on one queue.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Scope {
    tenant: TenantId,
    queue: QueueName,
}

impl Scope {
    /// Queue that the permission is for.
    pub fn queue(&self) -> &QueueName {
        &self.queue
    }
}
