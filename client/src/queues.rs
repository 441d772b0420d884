//! Queues: creating them, counting what they hold, how they are kept.

use std::time::{Duration, SystemTime};

use absurd_proto::v1 as pb;

use crate::client::rpc;
use crate::{AbsurdClient, Error, wire};

/// Tasks or events that one cleanup deletes when nothing else is said.
pub const CLEANUP_LIMIT: i32 = 1000;

/// How the tables of a queue are laid out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum StorageMode {
    /// One table of each kind.
    #[default]
    Unpartitioned,
    /// Weekly partitions.
    Partitioned,
}

impl StorageMode {
    fn from_wire(mode: i32) -> Self {
        if mode == i32::from(pb::StorageMode::Partitioned) { Self::Partitioned } else { Self::Unpartitioned }
    }
}

/// How to create a queue.
#[derive(Debug, Clone, Copy, Default)]
pub struct QueueOptions {
    /// Layout; cannot be changed later.
    pub storage_mode: StorageMode,
    /// How it is kept; what is None stays as it is.
    pub policy: PolicyChanges,
}

/// A queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queue {
    /// Its name.
    pub name: String,
    /// Its layout.
    pub storage_mode: StorageMode,
    /// When it was created.
    pub created_at: Option<SystemTime>,
}

/// What a queue holds. Counts stop at 100,000 each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueStats {
    /// Runs that wait to be claimed.
    pub pending: i64,
    /// Runs that sleep until a time or an event.
    pub sleeping: i64,
    /// Runs that a worker holds.
    pub running: i64,
    /// Failed attempts.
    pub failed_runs: i64,
    /// Completed tasks.
    pub completed: i64,
    /// Cancelled runs.
    pub cancelled: i64,
    /// Whether a count stopped at its cap.
    pub capped: bool,
    /// How long the oldest claimable run has been waiting; None: there is none.
    pub oldest_claimable_age: Option<Duration>,
    /// Claim streams on this queue at the replica that answered.
    pub streams: i32,
}

/// What happens to old, empty partitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DetachMode {
    /// They stay.
    None,
    /// They are detached and dropped when they are old enough.
    Empty,
}

/// How a queue is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueuePolicy {
    /// Layout.
    pub storage_mode: StorageMode,
    /// Whether rows outside all weeks have a place.
    pub default_partition: bool,
    /// Partitions are made this far ahead.
    pub partition_lookahead: Duration,
    /// And this far back.
    pub partition_lookback: Duration,
    /// Tasks and events that ended longer ago are deleted.
    pub cleanup_ttl: Duration,
    /// Tasks and events deleted in one transaction at most.
    pub cleanup_limit: i32,
    /// What happens to old partitions.
    pub detach_mode: DetachMode,
    /// How old they must be.
    pub detach_min_age: Duration,
}

impl QueuePolicy {
    fn from_wire(policy: Option<pb::QueuePolicy>) -> Result<Self, Error> {
        let policy = policy.ok_or_else(wire::unclear)?;
        let span = |span: Option<prost_types::Duration>| wire::span(span.as_ref()).ok_or_else(wire::unclear);
        Ok(Self {
            storage_mode: StorageMode::from_wire(policy.storage_mode),
            default_partition: policy.default_partition() == pb::DefaultPartition::Enabled,
            partition_lookahead: span(policy.partition_lookahead)?,
            partition_lookback: span(policy.partition_lookback)?,
            cleanup_ttl: span(policy.cleanup_ttl)?,
            cleanup_limit: policy.cleanup_limit,
            detach_mode: match policy.detach_mode() {
                pb::DetachMode::Empty => DetachMode::Empty,
                pb::DetachMode::None | pb::DetachMode::Unspecified => DetachMode::None,
            },
            detach_min_age: span(policy.detach_min_age)?,
        })
    }
}

/// Changes of a policy; None stays. Spans are whole seconds, at most 100 years.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PolicyChanges {
    /// Whether rows outside all weeks have a place; only for partitioned queues.
    pub default_partition: Option<bool>,
    /// Partitions are made this far ahead.
    pub partition_lookahead: Option<Duration>,
    /// And this far back.
    pub partition_lookback: Option<Duration>,
    /// Tasks and events that ended longer ago are deleted.
    pub cleanup_ttl: Option<Duration>,
    /// Tasks and events deleted in one transaction, at least 1.
    pub cleanup_limit: Option<i32>,
    /// What happens to old partitions.
    pub detach_mode: Option<DetachMode>,
    /// How old they must be.
    pub detach_min_age: Option<Duration>,
}

impl PolicyChanges {
    fn default_partition(self) -> pb::DefaultPartition {
        match self.default_partition {
            None => pb::DefaultPartition::Unspecified,
            Some(true) => pb::DefaultPartition::Enabled,
            Some(false) => pb::DefaultPartition::Disabled,
        }
    }

    fn detach_mode(self) -> pb::DetachMode {
        match self.detach_mode {
            None => pb::DetachMode::Unspecified,
            Some(DetachMode::None) => pb::DetachMode::None,
            Some(DetachMode::Empty) => pb::DetachMode::Empty,
        }
    }

    fn policy(self) -> Result<pb::QueuePolicy, Error> {
        if self.cleanup_limit == Some(0) {
            return Err(Error::argument("policy.cleanup_limit", "must be at least 1"));
        }
        Ok(pb::QueuePolicy {
            storage_mode: pb::StorageMode::Unspecified.into(),
            default_partition: self.default_partition().into(),
            partition_lookahead: self.partition_lookahead.map(wire::duration),
            partition_lookback: self.partition_lookback.map(wire::duration),
            cleanup_ttl: self.cleanup_ttl.map(wire::duration),
            cleanup_limit: self.cleanup_limit.unwrap_or(0),
            detach_mode: self.detach_mode().into(),
            detach_min_age: self.detach_min_age.map(wire::duration),
        })
    }
}

impl AbsurdClient {
    /// Creates the queue if it is missing; says whether it was.
    pub async fn create_queue(&self) -> Result<bool, Error> {
        self.create_queue_with(QueueOptions::default()).await
    }

    /// Creates the queue if it is missing, with a layout, and sets its policy in any case; says whether it was missing.
    pub async fn create_queue_with(&self, options: QueueOptions) -> Result<bool, Error> {
        let mut request = pb::CreateQueueRequest { queue: self.queue(), ..Default::default() };
        if options.storage_mode == StorageMode::Partitioned {
            request.set_storage_mode(pb::StorageMode::Partitioned);
        }
        if options.policy != PolicyChanges::default() {
            request.policy = Some(options.policy.policy()?);
        }
        Ok(rpc!(self.create_queue(request))?.created)
    }

    /// Drops the queue with all its tasks; says whether there was one.
    pub async fn drop_queue(&self) -> Result<bool, Error> {
        let request = pb::DropQueueRequest { queue: self.queue() };
        Ok(rpc!(self.drop_queue(request))?.dropped)
    }

    /// All queues, by name.
    pub async fn list_queues(&self) -> Result<Vec<Queue>, Error> {
        let mut queues = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = pb::ListQueuesRequest { page_size: 1000, page_token };
            let page = rpc!(self.list_queues(request))?;
            queues.extend(page.queues.into_iter().map(|queue| Queue {
                storage_mode: StorageMode::from_wire(queue.storage_mode),
                created_at: wire::time(queue.created_at),
                name: queue.name,
            }));
            if page.next_page_token.is_empty() {
                return Ok(queues);
            }
            page_token = page.next_page_token;
        }
    }

    /// Counts of the queue.
    pub async fn get_queue_stats(&self) -> Result<QueueStats, Error> {
        let request = pb::GetQueueStatsRequest { queue: self.queue() };
        let stats = rpc!(self.get_queue_stats(request))?;
        Ok(QueueStats {
            pending: stats.pending,
            sleeping: stats.sleeping,
            running: stats.running,
            failed_runs: stats.failed_runs,
            completed: stats.completed,
            cancelled: stats.cancelled,
            capped: stats.capped,
            oldest_claimable_age: wire::span(stats.oldest_claimable_age.as_ref()),
            streams: stats.streams,
        })
    }

    /// Reads how the queue is kept.
    pub async fn get_queue_policy(&self) -> Result<QueuePolicy, Error> {
        let request = pb::GetQueuePolicyRequest { queue: self.queue() };
        QueuePolicy::from_wire(rpc!(self.get_queue_policy(request))?.policy)
    }

    /// Changes how the queue is kept; returns the whole policy.
    pub async fn set_queue_policy(&self, changes: PolicyChanges) -> Result<QueuePolicy, Error> {
        let request = pb::SetQueuePolicyRequest {
            queue: self.queue(),
            default_partition: changes.default_partition().into(),
            partition_lookahead: changes.partition_lookahead.map(wire::duration),
            partition_lookback: changes.partition_lookback.map(wire::duration),
            cleanup_ttl: changes.cleanup_ttl.map(wire::duration),
            cleanup_limit: changes.cleanup_limit,
            detach_mode: changes.detach_mode().into(),
            detach_min_age: changes.detach_min_age.map(wire::duration),
        };
        QueuePolicy::from_wire(rpc!(self.set_queue_policy(request))?.policy)
    }

    /// Deletes up to `limit` tasks ([`CLEANUP_LIMIT`] when None) that ended longer ago than `ttl`, the oldest first; says
    /// how many.
    pub async fn cleanup_tasks(&self, ttl: Duration, limit: Option<i32>) -> Result<i32, Error> {
        let limit = limit.unwrap_or(CLEANUP_LIMIT);
        let request = pb::CleanupTasksRequest { queue: self.queue(), ttl: Some(wire::duration(ttl)), limit };
        Ok(rpc!(self.cleanup_tasks(request))?.deleted)
    }

    /// Deletes up to `limit` events ([`CLEANUP_LIMIT`] when None) that were emitted longer ago than `ttl`, the oldest
    /// first; says how many.
    pub async fn cleanup_events(&self, ttl: Duration, limit: Option<i32>) -> Result<i32, Error> {
        let limit = limit.unwrap_or(CLEANUP_LIMIT);
        let request = pb::CleanupEventsRequest { queue: self.queue(), ttl: Some(wire::duration(ttl)), limit };
        Ok(rpc!(self.cleanup_events(request))?.deleted)
    }
}
