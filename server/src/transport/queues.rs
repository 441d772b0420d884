//! The RPCs about queues: create, list, count.

use std::time::Duration;

use absurd_proto::v1 as pb;

use super::convert::{self, scope};
use super::page_token;
use super::policies;
use super::service::Service;
use crate::domain::Error;
use crate::store::Fault;
use crate::store::queue::COUNT_MAX;

/// Longest page token. The token is a queue's name; only SQL can create names near this length.
const TOKEN_BYTES_MAX: usize = 16 * 1024;

impl Service {
    pub(super) async fn stats(&self, queue: &str) -> Result<pb::GetQueueStatsResponse, Error> {
        let scope = scope(queue)?;
        let row = self.engine.counts.of(&self.engine.store, &scope).await?;
        let count = |column: &str| row.get::<_, i64>(column);
        let counts = ["pending", "sleeping", "running", "failed", "completed", "cancelled"].map(count);
        let oldest: Option<i64> = row.get("oldest_ms");
        Ok(pb::GetQueueStatsResponse {
            pending: counts[0],
            sleeping: counts[1],
            running: counts[2],
            failed_runs: counts[3],
            completed: counts[4],
            cancelled: counts[5],
            capped: counts.iter().any(|count| *count >= COUNT_MAX),
            oldest_claimable_age: oldest
                .map(|ms| convert::pb_duration(Duration::from_millis(ms.max(0).unsigned_abs()))),
            streams: i32::try_from(self.engine.dispatcher.stream_count(scope.queue())).unwrap_or(i32::MAX),
        })
    }

    pub(super) async fn list_queues_page(
        &self,
        request: pb::ListQueuesRequest,
    ) -> Result<pb::ListQueuesResponse, Error> {
        let limit = self.limits.page(request.page_size)?;
        if request.page_token.contains('\0') || request.page_token.len() > TOKEN_BYTES_MAX {
            return Err(Error::invalid("page_token", "is not a token of this service"));
        }
        let rows = self
            .engine
            .store
            .queue_list(None, &request.page_token, limit)
            .await
            .map_err(Fault::into_database_read_error)?;
        let page = page_token::fit(&rows, |row| row.get::<_, &str>("queue_name").len());
        let queues: Vec<pb::Queue> = page.iter().map(convert::pb_queue).collect();
        let full = page.len() < rows.len() || i64::try_from(rows.len()).is_ok_and(|count| count == limit);
        let next_page_token = queues.last().filter(|_| full).map(|queue| queue.name.clone()).unwrap_or_default();
        Ok(pb::ListQueuesResponse { queues, next_page_token })
    }

    pub(super) async fn create(&self, request: pb::CreateQueueRequest) -> Result<pb::CreateQueueResponse, Error> {
        let scope = scope(&request.queue)?;
        let mode = match pb::StorageMode::try_from(request.storage_mode) {
            Ok(pb::StorageMode::Unspecified | pb::StorageMode::Unpartitioned) => "unpartitioned",
            Ok(pb::StorageMode::Partitioned) => "partitioned",
            Err(_) => return Err(Error::invalid("storage_mode", "is not a known mode")),
        };
        let policy = request.policy.map(policies::policy_of).transpose()?;
        let created = self.engine.store.queue_create(&scope, mode, policy.as_deref()).await?;
        self.engine.hang_doorbells(&[scope.queue().as_str()]).await;
        Ok(pb::CreateQueueResponse { created })
    }
}
