//! The RPCs about the policies of queues.

use std::time::Duration;

use absurd_proto::v1 as pb;
use prost_types::Duration as PbDuration;
use serde_json::{Map, Value};
use tokio_postgres::Row;

use super::convert::{self, duration, scope};
use super::service::Service;
use crate::domain::Error;
use crate::store::policy::Old;

/// Longest span in a policy: 100 years.
const SPAN_MAX: Duration = Duration::from_secs(100 * 366 * 24 * 3600);
/// Longest time to live of a cleanup; the contract's function takes an `i32` of seconds.
const TTL_MAX: Duration = Duration::from_secs(i32::MAX as u64);

impl Service {
    pub(super) async fn policy(&self, queue: &str) -> Result<pb::QueuePolicy, Error> {
        Ok(pb_policy(&self.engine.store.queue_policy(&scope(queue)?).await?))
    }

    pub(super) async fn change_policy(&self, request: pb::SetQueuePolicyRequest) -> Result<pb::QueuePolicy, Error> {
        let scope = scope(&request.queue)?;
        let policy = Value::Object(changes(&request)?).to_string();
        self.engine.store.queue_policy(&scope).await?;
        self.engine.store.queue_set_policy(&scope, &policy).await?;
        self.policy(&request.queue).await
    }

    pub(super) async fn cleanup(
        &self,
        queue: &str,
        what: Old,
        ttl: Option<PbDuration>,
        limit: i32,
    ) -> Result<i32, Error> {
        let scope = self.existing(queue).await?;
        let ttl = seconds("ttl", ttl.ok_or_else(|| Error::invalid("ttl", "must be set"))?, TTL_MAX)?;
        let limit = match limit {
            0 => 1000,
            1..=10_000 => limit,
            _ => return Err(Error::invalid("limit", "must be 0 to 10,000")),
        };
        self.engine.store.cleanup(&scope, what, i32::try_from(ttl).unwrap_or(i32::MAX), limit).await
    }
}

fn seconds(field: &str, value: PbDuration, max: Duration) -> Result<u64, Error> {
    let span = duration(field, value, max)?;
    if span.subsec_nanos() != 0 {
        return Err(Error::invalid(field, "must be whole seconds"));
    }
    Ok(span.as_secs())
}

/// The changes in the form that the contract's function takes, with only the fields that the request sets.
fn changes(request: &pb::SetQueuePolicyRequest) -> Result<Map<String, Value>, Error> {
    let mut policy = Map::new();
    for (field, value) in [
        ("partition_lookahead", request.partition_lookahead),
        ("partition_lookback", request.partition_lookback),
        ("cleanup_ttl", request.cleanup_ttl),
        ("detach_min_age", request.detach_min_age),
    ] {
        if let Some(value) = value {
            policy.insert(field.into(), format!("{} seconds", seconds(field, value, SPAN_MAX)?).into());
        }
    }
    if let Some(limit) = request.cleanup_limit {
        if limit < 1 {
            return Err(Error::invalid("cleanup_limit", "must be at least 1"));
        }
        policy.insert("cleanup_limit".into(), limit.into());
    }
    match pb::DetachMode::try_from(request.detach_mode) {
        Ok(pb::DetachMode::Unspecified) => {}
        Ok(pb::DetachMode::None) => drop(policy.insert("detach_mode".into(), "none".into())),
        Ok(pb::DetachMode::Empty) => drop(policy.insert("detach_mode".into(), "empty".into())),
        Err(_) => return Err(Error::invalid("detach_mode", "is not a known mode")),
    }
    match pb::DefaultPartition::try_from(request.default_partition) {
        Ok(pb::DefaultPartition::Unspecified) => {}
        Ok(pb::DefaultPartition::Enabled) => drop(policy.insert("default_partition".into(), "enabled".into())),
        Ok(pb::DefaultPartition::Disabled) => drop(policy.insert("default_partition".into(), "disabled".into())),
        Err(_) => return Err(Error::invalid("default_partition", "is not a known value")),
    }
    Ok(policy)
}

/// The policy of a new queue, in the form that the contract's function takes.
pub(super) fn policy_of(policy: pb::QueuePolicy) -> Result<String, Error> {
    if policy.storage_mode != 0 {
        return Err(Error::invalid("policy.storage_mode", "must not be set; the request has it"));
    }
    let request = pb::SetQueuePolicyRequest {
        queue: String::new(),
        default_partition: policy.default_partition,
        partition_lookahead: policy.partition_lookahead,
        partition_lookback: policy.partition_lookback,
        cleanup_ttl: policy.cleanup_ttl,
        cleanup_limit: (policy.cleanup_limit != 0).then_some(policy.cleanup_limit),
        detach_mode: policy.detach_mode,
        detach_min_age: policy.detach_min_age,
    };
    Ok(Value::Object(changes(&request).map_err(|error| error.within("policy"))?).to_string())
}

fn pb_policy(row: &Row) -> pb::QueuePolicy {
    let span = |column: &str| {
        let seconds: f64 = row.get(column);
        Duration::try_from_secs_f64(seconds).ok().map(convert::pb_duration)
    };
    let is = |column: &str, text: &str| row.get::<_, &str>(column) == text;
    let storage_mode =
        if is("storage_mode", "partitioned") { pb::StorageMode::Partitioned } else { pb::StorageMode::Unpartitioned };
    let detach_mode = if is("detach_mode", "empty") { pb::DetachMode::Empty } else { pb::DetachMode::None };
    let default_partition =
        if is("default_partition", "enabled") { pb::DefaultPartition::Enabled } else { pb::DefaultPartition::Disabled };
    pb::QueuePolicy {
        storage_mode: storage_mode.into(),
        default_partition: default_partition.into(),
        partition_lookahead: span("partition_lookahead"),
        partition_lookback: span("partition_lookback"),
        cleanup_ttl: span("cleanup_ttl"),
        cleanup_limit: row.get("cleanup_limit"),
        detach_mode: detach_mode.into(),
        detach_min_age: span("detach_min_age"),
    }
}
