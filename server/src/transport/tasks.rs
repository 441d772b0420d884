//! The RPCs about tasks: cancel, retry, read, wait, list.

use std::time::Duration;

use absurd_proto::v1 as pb;
use tokio::time::Instant;
use uuid::Uuid;

use super::convert::{self, chosen_id, duration_between, pb_spawned, pb_state, scope, state_filter};
use super::deadline::DEADLINE;
use super::page_token;
use super::service::{AWAIT_MAX, Service, in_time};
use crate::domain::Error;
use crate::domain::id::parse_uuid;

impl Service {
    pub(super) async fn cancel(
        &self,
        request: pb::CancelTaskRequest,
        deadline: Instant,
    ) -> Result<pb::CancelTaskResponse, Error> {
        use pb::cancel_task_request::Target;
        let scope = scope(&request.queue)?;
        let (cancelled, state, task_id) = match &request.target {
            Some(Target::TaskId(id)) => {
                let task_id = parse_uuid("task_id", id)?;
                let (cancelled, state) = self.engine.cancel_task(&scope, task_id, deadline).await?;
                (cancelled, state, task_id)
            }
            Some(Target::RunId(id)) => self.engine.cancel_run(&scope, parse_uuid("run_id", id)?, deadline).await?,
            None => return Err(Error::invalid("target", "task_id or run_id must be set")),
        };
        Ok(pb::CancelTaskResponse { cancelled, state: pb_state(state), task_id: task_id.to_string() })
    }

    pub(super) async fn retry(&self, request: pb::RetryTaskRequest) -> Result<pb::RetryTaskResponse, Error> {
        let scope = scope(&request.queue)?;
        let task_id = parse_uuid("task_id", &request.task_id)?;
        if request.max_attempts.is_some_and(|attempts| attempts < 1) {
            return Err(Error::invalid("max_attempts", "must be at least 1"));
        }
        let store = &self.engine.store;
        let id = match &request.request_id {
            Some(id) => chosen_id("request_id", id, store)?,
            None => store.mint_id(),
        };
        let spawned = if request.spawn_new {
            store.task_respawn(&scope, task_id, id, store.mint_id(), request.max_attempts).await?
        } else {
            store.task_retry(&scope, task_id, id, request.max_attempts).await?
        };
        if spawned.fresh {
            self.engine.dispatcher.new_work(scope.queue());
        }
        Ok(pb::RetryTaskResponse { task: Some(pb_spawned(&spawned, None)) })
    }

    pub(super) async fn await_result(
        &self,
        request: pb::AwaitTaskResultRequest,
        deadline: Instant,
    ) -> Result<pb::AwaitTaskResultResponse, Error> {
        let scope = scope(&request.queue)?;
        let task_id = parse_uuid("task_id", &request.task_id)?;
        let timeout = duration_between("timeout", request.timeout, Duration::ZERO, AWAIT_MAX)?.unwrap_or(DEADLINE);
        // The read waits for a locked queue: at most for the timeout or `DEADLINE`, whichever is longer, and not past
        // the deadline.
        let bound = deadline.min(Instant::now() + timeout.max(DEADLINE));
        let now = in_time(bound, self.engine.store.task_result(&scope, task_id, None)).await?;
        if now.state.is_some_and(crate::domain::State::is_terminal) || timeout.is_zero() {
            let done = now.state.is_some_and(crate::domain::State::is_terminal);
            return Ok(pb::AwaitTaskResultResponse { done, result: Some(convert::pb_task_end(now)) });
        }
        let until = (Instant::now() + timeout).min(deadline);
        match self.engine.waits.wait(scope.queue(), task_id, until).await? {
            Some(end) if end.state.is_some() => {
                Ok(pb::AwaitTaskResultResponse { done: true, result: Some(convert::pb_task_end(end)) })
            }
            Some(_) => Err(Error::TaskNotFound(task_id)),
            None => {
                let bound = deadline.min(Instant::now() + DEADLINE);
                let read = in_time(bound, self.engine.store.task_result(&scope, task_id, None)).await;
                let end = match read {
                    Err(Error::DeadlineExceeded) => now,
                    read => read?,
                };
                let done = end.state.is_some_and(crate::domain::State::is_terminal);
                Ok(pb::AwaitTaskResultResponse { done, result: Some(convert::pb_task_end(end)) })
            }
        }
    }

    pub(super) async fn list_tasks_page(&self, request: pb::ListTasksRequest) -> Result<pb::ListTasksResponse, Error> {
        let scope = scope(&request.queue)?;
        let limit = self.limits.page(request.page_size)?;
        let before =
            if request.page_token.is_empty() { Uuid::max() } else { parse_uuid("page_token", &request.page_token)? };
        let state = state_filter(request.state)?;
        let (rows, next) =
            self.engine.store.task_list(&scope, before, state, request.task_name.as_deref(), limit).await?;
        let page = page_token::fit(&rows, |row| row.get::<_, &str>("task_name").len());
        let next = match page.last().filter(|_| page.len() < rows.len()) {
            Some(row) => Some(row.get("task_id")),
            None => next,
        };
        Ok(pb::ListTasksResponse {
            tasks: page.iter().map(convert::pb_task_summary).collect(),
            next_page_token: next.map(|id| id.to_string()).unwrap_or_default(),
        })
    }

    pub(super) async fn task_status(
        &self,
        request: pb::GetTaskStatusRequest,
    ) -> Result<pb::GetTaskStatusResponse, Error> {
        let scope = scope(&request.queue)?;
        let task_id = parse_uuid("task_id", &request.task_id)?;
        let params = convert::part("params_range", request.params_range)?;
        let result = convert::part("result_range", request.result_range)?;
        let row = self.engine.store.task_get(&scope, task_id, params, result).await?;
        Ok(pb::GetTaskStatusResponse {
            task: Some(convert::pb_task(&row)),
            params_length: row.get("params_length"),
            result_length: row.get("result_length"),
        })
    }
}
