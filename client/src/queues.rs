//! Queues: creating, dropping and listing them, their counts, and the policy by which they are maintained.

use std::time::{Duration, SystemTime};

use absurd_proto::v1 as pb;

use crate::client::rpc;
use crate::{AbsurdClient, Error, wire};

/// Number of tasks or events that one cleanup deletes unless the caller sets a limit.
pub const CLEANUP_LIMIT: i32 = 1000;

/// Layout of a queue's tables.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum StorageMode {
    /// One table of each kind.
    #[default]
    Unpartitioned,
    /// Weekly partitions by id.
    Partitioned,
}

impl StorageMode {
    fn from_wire(mode: i32) -> Self {
        if mode == i32::from(pb::StorageMode::Partitioned) { Self::Partitioned } else { Self::Unpartitioned }
    }
}

/// Options of a new queue.
#[derive(Debug, Clone, Copy, Default)]
pub struct QueueOptions {
    /// Layout of the tables; it cannot be changed later.
    pub storage_mode: StorageMode,
    /// Policy to set, also when the queue exists; a field that is `None` keeps its value.
    pub policy: PolicyChanges,
}

/// A queue in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queue {
    /// Name of the queue.
    pub name: String,
    /// Layout of its tables.
    pub storage_mode: StorageMode,
    /// Time of its creation.
    pub created_at: Option<SystemTime>,
}

/// Counts of a queue, each at most 100,000.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueStats {
    /// Runs that wait to be claimed.
    pub pending: i64,
    /// Runs that sleep until a time or an event.
    pub sleeping: i64,
    /// Runs that a worker holds.
    pub running: i64,
    /// Failed runs: attempts, not tasks.
    pub failed_runs: i64,
    /// Completed runs; each completed task has one.
    pub completed: i64,
    /// Cancelled runs.
    pub cancelled: i64,
    /// Whether a count reached 100,000, and may be too low.
    pub capped: bool,
    /// Time for which the oldest claimable run has been waiting; `None` when none is claimable.
    pub oldest_claimable_age: Option<Duration>,
    /// Claim streams on this queue at the replica that answered.
    pub streams: i32,
}

/// Treatment of old, empty partitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DetachMode {
    /// Old partitions stay attached.
    None,
    /// A partition is detached and dropped when it is empty and old enough.
    Empty,
}

/// Policy by which a queue is maintained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueuePolicy {
    /// Layout of the tables.
    pub storage_mode: StorageMode,
    /// Whether a default partition takes the rows outside all weekly partitions.
    pub default_partition: bool,
    /// Partitions are created this far ahead of the present.
    pub partition_lookahead: Duration,
    /// Partitions are created this far back from the present.
    pub partition_lookback: Duration,
    /// Tasks that ended, and events that were emitted, longer ago than this are deleted.
    pub cleanup_ttl: Duration,
    /// Maximum number of tasks or events deleted in one transaction.
    pub cleanup_limit: i32,
    /// Treatment of old, empty partitions.
    pub detach_mode: DetachMode,
    /// Age from which on a partition counts as old.
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

/// Changes to a policy; a field that is `None` keeps its value. Durations are whole seconds, at most 100 years.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PolicyChanges {
    /// Whether a default partition takes the rows outside all weekly partitions; for partitioned queues only.
    pub default_partition: Option<bool>,
    /// Partitions are created this far ahead of the present.
    pub partition_lookahead: Option<Duration>,
    /// Partitions are created this far back from the present.
    pub partition_lookback: Option<Duration>,
    /// Tasks that ended, and events that were emitted, longer ago than this are deleted.
    pub cleanup_ttl: Option<Duration>,
    /// Maximum number of tasks or events deleted in one transaction, at least 1.
    pub cleanup_limit: Option<i32>,
    /// Treatment of old, empty partitions.
    pub detach_mode: Option<DetachMode>,
    /// Age from which on a partition counts as old.
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
    /// Creates the queue if it is missing. Returns whether it was missing.
    pub async fn create_queue(&self) -> Result<bool, Error> {
        self.create_queue_with(QueueOptions::default()).await
    }

    /// Creates the queue, with this layout, if it is missing; sets the given policy even if the queue exists. Returns
    /// whether the queue was missing.
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

    /// Drops the queue with all its tasks. Returns whether there was one.
    pub async fn drop_queue(&self) -> Result<bool, Error> {
        let request = pb::DropQueueRequest { queue: self.queue() };
        Ok(rpc!(self.drop_queue(request))?.dropped)
    }

    /// Lists all queues, by name.
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

    /// Counts the runs and streams of the queue; a count stops at 100,000.
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

    /// Reads the policy of the queue.
    pub async fn get_queue_policy(&self) -> Result<QueuePolicy, Error> {
        let request = pb::GetQueuePolicyRequest { queue: self.queue() };
        QueuePolicy::from_wire(rpc!(self.get_queue_policy(request))?.policy)
    }

    /// Changes the policy of the queue. Returns the whole policy.
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

    /// Deletes up to `limit` tasks ([`CLEANUP_LIMIT`] when `None`) that ended longer ago than `ttl`, the oldest first.
    /// Returns their number.
    pub async fn cleanup_tasks(&self, ttl: Duration, limit: Option<i32>) -> Result<i32, Error> {
        let limit = limit.unwrap_or(CLEANUP_LIMIT);
        let request = pb::CleanupTasksRequest { queue: self.queue(), ttl: Some(wire::duration(ttl)), limit };
        Ok(rpc!(self.cleanup_tasks(request))?.deleted)
    }

    /// Deletes up to `limit` events ([`CLEANUP_LIMIT`] when `None`), the oldest first: those emitted longer ago than
    /// `ttl`, and those awaited but never emitted. Returns their number.
    pub async fn cleanup_events(&self, ttl: Duration, limit: Option<i32>) -> Result<i32, Error> {
        let limit = limit.unwrap_or(CLEANUP_LIMIT);
        let request = pb::CleanupEventsRequest { queue: self.queue(), ttl: Some(wire::duration(ttl)), limit };
        Ok(rpc!(self.cleanup_events(request))?.deleted)
    }
}
