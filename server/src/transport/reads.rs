//! The RPCs that only read: the runs of a task, waits, and tasks by a part of their ids.

use std::time::Duration;

use absurd_proto::v1 as pb;
use futures_util::StreamExt as _;
use tokio::time::Instant as Deadline;
use tokio_postgres::Row;
use uuid::Uuid;

use super::convert::{self, at, pb_run, scope};
use super::deadline::left;
use super::page_token;
use super::service::Service;
use crate::domain::id::{IdPart, parse_uuid};
use crate::domain::{Error, EventName, QueueName, RunId};
use crate::scope::{Caller, Scope};
use crate::store::event::WaitsOf;
use crate::store::task::TaskSearch;
use crate::store::{Fault, LOCK_WAIT_PATIENT};

/// Longest search through all queues.
const FIND_MAX: Duration = Duration::from_secs(5);
/// Part of the caller's time kept for the answer.
const ANSWERING: Duration = Duration::from_millis(100);
/// Longest wait for a locked queue in a search through all queues.
const LOCK_WAIT: Duration = Duration::from_millis(200);
/// Queues searched at the same time.
const FIND_WIDTH: usize = 4;
/// Queue names read per statement.
const QUEUES_PAGE: i64 = 1000;

impl Service {
    pub(super) async fn list_runs_page(&self, request: pb::ListRunsRequest) -> Result<pb::ListRunsResponse, Error> {
        let scope = scope(&request.queue)?;
        let task_id = parse_uuid("task_id", &request.task_id)?;
        let limit = self.limits.page(request.page_size)?;
        let after = match request.page_token.as_str() {
            "" => (i32::MIN, Uuid::nil()),
            token => page_token::parse_pair(token)?,
        };
        let rows = self.engine.store.run_list(&scope, task_id, after, limit).await?;
        if rows.is_empty() {
            self.engine.store.task_exists(&scope, task_id).await?;
        }
        let (page, last) = page_token::cut(&rows, limit);
        let token_of = |row: &Row| {
            page_token::encode_pair(
                &row.get::<_, i32>("attempt").to_string(),
                &row.get::<_, RunId>("run_id").to_string(),
            )
        };
        Ok(pb::ListRunsResponse {
            runs: page.iter().map(pb_run).collect(),
            next_page_token: last.map(token_of).unwrap_or_default(),
        })
    }

    pub(super) async fn list_waits_page(&self, request: pb::ListWaitsRequest) -> Result<pb::ListWaitsResponse, Error> {
        use pb::list_waits_request::Of;
        let scope = scope(&request.queue)?;
        let of = match &request.of {
            Some(Of::TaskId(id)) => WaitsOf::Task(parse_uuid("task_id", id)?),
            Some(Of::EventName(name)) => WaitsOf::Event(EventName::parse("event_name", name)?),
            None => return Err(Error::invalid("of", "task_id or event_name must be set")),
        };
        let limit = self.limits.page(request.page_size)?;
        let (run_id, step): (RunId, String) = match request.page_token.as_str() {
            "" => (Uuid::nil(), String::new()),
            token => page_token::parse_pair(token)?,
        };
        let rows = self.engine.store.wait_list(&scope, &of, (run_id, &step), limit).await?;
        if let (WaitsOf::Task(task_id), true) = (&of, rows.is_empty()) {
            self.engine.store.task_exists(&scope, *task_id).await?;
        }
        let (page, last) = page_token::cut(&rows, limit);
        let token_of =
            |row: &Row| page_token::encode_pair(&row.get::<_, RunId>("run_id").to_string(), row.get("step_name"));
        Ok(pb::ListWaitsResponse {
            waits: page.iter().map(pb_wait).collect(),
            next_page_token: last.map(token_of).unwrap_or_default(),
        })
    }

    pub(super) async fn find_tasks(
        &self,
        request: pb::FindRequest,
        deadline: Deadline,
    ) -> Result<pb::FindResponse, Error> {
        let part = IdPart::parse("text", &request.text)?;
        let limit = match request.limit {
            0 => 20,
            limit @ 1..=100 => limit.unsigned_abs() as usize,
            _ => return Err(Error::invalid("limit", "must be 0 to 100")),
        };
        let mut found = Found { limit, tasks: Vec::new(), complete: true };
        if request.queue.is_empty() {
            let until = deadline.min(Deadline::now() + FIND_MAX) - ANSWERING;
            self.find_everywhere(&part, until, &mut found).await?;
        } else {
            let scope = scope(&request.queue)?;
            let search = self
                .search(&scope, &part, limit, left(deadline).min(LOCK_WAIT_PATIENT))
                .await
                .map_err(|fault| fault.into_read_error(&scope))?;
            found.add(&scope, &search);
        }
        Ok(found.answer())
    }

    async fn search(
        &self,
        scope: &Scope,
        part: &IdPart,
        limit: usize,
        lock_wait: Duration,
    ) -> Result<TaskSearch, Fault> {
        // One row beyond the limit shows that there are more.
        let limit = i64::try_from(limit + 1).unwrap_or(i64::MAX);
        self.engine.store.task_search(scope, part, limit, lock_wait).await
    }

    /// Searches all queues, `FIND_WIDTH` at a time. A queue that cannot be read makes the answer incomplete, and stops
    /// no other search.
    async fn find_everywhere(&self, part: &IdPart, until: Deadline, found: &mut Found) -> Result<(), Error> {
        let (mut after, limit) = (String::new(), found.limit);
        loop {
            let page = self.engine.store.queue_list(None, &after, QUEUES_PAGE).await;
            let page = page.map_err(Fault::into_database_read_error)?;
            let names: Vec<String> = page.iter().map(|row| row.get("queue_name")).collect();
            let searches = names.clone().into_iter().map(|name| async move {
                let scope = Caller::anonymous().scope(QueueName::parse("queue", &name).ok()?);
                let search = self.search(&scope, part, limit, LOCK_WAIT).await.ok()?;
                Some((scope, search))
            });
            let mut searches = futures_util::stream::iter(searches).buffer_unordered(FIND_WIDTH);
            loop {
                match tokio::time::timeout_at(until, searches.next()).await {
                    Ok(Some(Some((scope, search)))) => found.add(&scope, &search),
                    Ok(Some(None)) => found.complete = false,
                    Ok(None) => break,
                    Err(_) => {
                        found.complete = false;
                        return Ok(());
                    }
                }
            }
            match names.last() {
                Some(last) if i64::try_from(names.len()).is_ok_and(|count| count == QUEUES_PAGE) => {
                    after.clone_from(last);
                }
                _ => return Ok(()),
            }
        }
    }
}

/// The tasks that a search has found so far.
struct Found {
    limit: usize,
    tasks: Vec<pb::TaskMatch>,
    complete: bool,
}

impl Found {
    fn add(&mut self, scope: &Scope, search: &TaskSearch) {
        self.complete &= !search.partial;
        self.tasks.extend(search.rows.iter().map(|row| pb_match(scope, row)));
        // Task ids begin with their time, so the newest tasks come first.
        self.tasks.sort_by(|a, b| b.task_id.cmp(&a.task_id).then_with(|| a.queue.cmp(&b.queue)));
        if self.tasks.len() > self.limit {
            self.tasks.truncate(self.limit);
            self.complete = false;
        }
    }

    fn answer(self) -> pb::FindResponse {
        pb::FindResponse { tasks: self.tasks, complete: self.complete }
    }
}

fn pb_match(scope: &Scope, row: &Row) -> pb::TaskMatch {
    pb::TaskMatch {
        queue: scope.queue().as_str().to_owned(),
        task_id: row.get::<_, Uuid>("task_id").to_string(),
        task_name: row.get("task_name"),
        state: convert::stored_state(row),
        enqueue_at: at(row, "enqueue_at"),
    }
}

fn pb_wait(row: &Row) -> pb::Wait {
    pb::Wait {
        task_id: row.get::<_, Uuid>("task_id").to_string(),
        run_id: row.get::<_, RunId>("run_id").to_string(),
        step_name: row.get("step_name"),
        event_name: row.get("event_name"),
        timeout_at: at(row, "timeout_at"),
        created_at: at(row, "created_at"),
    }
}
