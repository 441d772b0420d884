//! Tasks: spawns, reads, lists, cancellations and retries.

use std::collections::HashMap;
use std::time::Duration;

use tokio_postgres::Row;
use uuid::Uuid;

use super::run::Slot;
use super::statement::{
    KEY_RESERVE, QUEUE_GET, RUN_LOCK, Statement, TASK_CANCEL, TASK_CANCELLED, TASK_ENDED, TASK_FIND, TASK_FIND_KEYED,
    TASK_GET, TASK_LIST, TASK_LIST_CANCELLABLE, TASK_LIST_EDGE, TASK_RESPAWN, TASK_RESULT, TASK_RETRY, TASK_SEARCH,
    TASK_SPAWN, TASK_SPAWN_CLAIMED, TASK_SPAWN_LATER,
};
use super::suspend::When;
use super::text::{ANSWER_BYTES_MAX, FIELD_BYTES_MAX, HEADERS_BYTES_MAX, Part, cut};
use super::{Fault, Store, Tx, Wait};
use crate::domain::id::IdPart;
use crate::domain::{Claim, ClaimToken, Error, Instant, JsonText, QueueName, RunId, State, TaskId, TaskName};
use crate::scope::Scope;

/// A validated task to be spawned.
#[derive(Debug, Clone)]
pub struct NewTask {
    /// Id of the task, chosen by the caller or minted.
    pub task_id: TaskId,
    /// Id of its first run.
    pub run_id: RunId,
    /// Name of the handler that runs it.
    pub name: TaskName,
    /// Input; `None` is stored as JSON null.
    pub params: Option<JsonText>,
    /// JSON object of headers; `None` is stored as SQL NULL.
    pub headers: Option<JsonText>,
    /// Retry strategy in its stored form; `None` retries at once.
    pub retry_strategy: Option<JsonText>,
    /// Upper bound of attempts; `None` means no limit.
    pub max_attempts: Option<i32>,
    /// Cancellation policy in its stored form; `None` never cancels.
    pub cancellation: Option<JsonText>,
    /// Idempotency key. A second spawn with the same key returns the first task.
    pub idempotency_key: Option<String>,
    /// Earliest time of the first claim; `None` means at once.
    pub start: Option<When>,
}

/// Answer to a spawn or a retry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spawned {
    /// Task of the answer: the new one, or the owner of the idempotency key.
    pub task_id: TaskId,
    /// First run of a spawned task, newest run of a task found by its key, or new run of a retry.
    pub run_id: RunId,
    /// Attempt of that run, counted from 1.
    pub attempt: i32,
    /// Whether the request created the task, now or in an earlier call. False for the older owner of an idempotency
    /// key, and for a retry.
    pub created: bool,
    /// Whether this call created the run, and no earlier one did.
    pub fresh: bool,
    /// Whether the run was claimed in the same statement. A fresh run that was not claimed is new work for the queue.
    pub claimed: bool,
}

/// Result of a batch of spawns.
#[derive(Debug)]
pub struct Spawning {
    /// One answer per task, in order.
    pub answers: Vec<Result<Spawned, Error>>,
    /// Claims of the tasks that were claimed at once, with their index in the batch. Empty unless the transaction was
    /// committed.
    pub claims: Vec<(usize, Claim)>,
}

/// A task to be spawned, and the credit for it, if any. The credit is used only if no older run of the queue can be
/// claimed.
pub type Slotted<'a> = (&'a NewTask, Option<&'a Slot>);

/// State and result of a task.
#[derive(Debug, Clone)]
pub struct TaskEnd {
    /// Task that was asked about.
    pub task_id: TaskId,
    /// State of the task; `None` means that it does not exist.
    pub state: Option<State>,
    /// Result of a completed task, or failure reason of a failed one. `None` for other states, and for a text above
    /// [`ANSWER_BYTES_MAX`].
    pub text: Option<String>,
    /// Length of the whole text in code points, even if `text` is left out or only a part.
    pub length: i64,
}

/// A task with a cancellation policy.
#[derive(Debug, Clone, Copy)]
pub struct Cancellable {
    /// Task that has the policy.
    pub task_id: TaskId,
    /// Newest run of the task.
    pub run_id: Option<RunId>,
    /// Whether the policy cancels the task now, and its run is not quarantined.
    pub due: bool,
}

/// Result of a search in one queue.
#[derive(Debug)]
pub struct TaskSearch {
    /// Matching tasks, newest first.
    pub rows: Vec<Row>,
    /// Whether the queue has tasks beyond the newest 10,000, which were not compared by the end of their ids.
    pub partial: bool,
}

impl Store {
    /// Spawns tasks. An id or key that exists does not stop the others. With keys, waits for other spawns of the same
    /// key at most `lock_wait`.
    pub async fn task_spawn(
        &self,
        scope: &Scope,
        tasks: &[Slotted<'_>],
        lock_wait: Duration,
    ) -> Result<Spawning, Fault> {
        if tasks.iter().all(|(task, _)| task.idempotency_key.is_none()) {
            let params = Columns::of(tasks);
            let made = self.rows(params.statement(), Wait::Skip, Some(scope), &params.as_sql()).await?;
            let old =
                if made.len() == tasks.len() { vec![] } else { self.task_find(scope, None, tasks, false).await? };
            return Ok(spawning(tasks, &made, &old));
        }
        let tx = self.begin(lock_wait).await?;
        match self.task_spawn_in(scope, &tx, tasks).await {
            Ok(spawning) => {
                tx.commit().await?;
                Ok(spawning)
            }
            Err(fault) => {
                tx.rollback().await;
                Err(fault)
            }
        }
    }

    /// Spawns tasks in one transaction. Commits only if all of them can be spawned and `keep` is set.
    pub async fn task_spawn_all(
        &self,
        scope: &Scope,
        tasks: &[Slotted<'_>],
        lock_wait: Duration,
        keep: bool,
    ) -> Result<Spawning, Fault> {
        let tx = self.begin(lock_wait).await?;
        let mut spawning = self.task_spawn_in(scope, &tx, tasks).await;
        match &mut spawning {
            Ok(made) if keep && made.answers.iter().all(Result::is_ok) => tx.commit().await?,
            Ok(made) => {
                tx.rollback().await;
                made.claims.clear();
            }
            Err(_) => tx.rollback().await,
        }
        spawning
    }

    async fn task_spawn_in(&self, scope: &Scope, tx: &Tx, tasks: &[Slotted<'_>]) -> Result<Spawning, Fault> {
        let queue = tx.rows(&QUEUE_GET, Wait::Skip, None, &[&scope.queue().as_str()]).await?;
        let parted = queue.first().is_some_and(|row| row.get("keyed"));
        let mut wanted = tasks.to_vec();
        if parted {
            let keyed: Vec<&NewTask> =
                tasks.iter().map(|(task, _)| *task).filter(|task| task.idempotency_key.is_some()).collect();
            let keys: Vec<&str> = keyed.iter().filter_map(|task| task.idempotency_key.as_deref()).collect();
            let ids: Vec<Uuid> = keyed.iter().map(|task| task.task_id).collect();
            let reserved: Vec<String> = tx
                .rows(&KEY_RESERVE, Wait::Skip, Some(scope), &[&keys, &ids])
                .await?
                .iter()
                .map(|row| row.get("idempotency_key"))
                .collect();
            // Of several items with one key, only the first may be inserted.
            let mut open: std::collections::HashSet<String> = reserved.into_iter().collect();
            wanted.retain(|(task, _)| task.idempotency_key.as_ref().is_none_or(|key| open.remove(key)));
        }
        let params = Columns::of(&wanted);
        let made = tx.rows(params.statement(), Wait::Skip, Some(scope), &params.as_sql()).await?;
        let mut old = Vec::new();
        if made.len() < tasks.len() {
            old = self.task_find(scope, Some(tx), tasks, parted).await?;
            if old.iter().any(|row| row.get::<_, Option<Uuid>>("task_id").is_none()) {
                // The owner of a key was removed in the meantime.
                return Err(Fault::Conflict);
            }
        }
        Ok(spawning(tasks, &made, &old))
    }

    async fn task_find(
        &self,
        scope: &Scope,
        tx: Option<&Tx>,
        tasks: &[Slotted<'_>],
        parted: bool,
    ) -> Result<Vec<Row>, Fault> {
        let tasks = || tasks.iter().map(|(task, _)| *task);
        let ids: Vec<Uuid> = tasks().map(|task| task.task_id).collect();
        let keys: Vec<Option<&str>> = tasks().map(|task| task.idempotency_key.as_deref()).collect();
        let names: Vec<&str> = tasks().map(|task| task.name.as_str()).collect();
        let params: Vec<Option<&JsonText>> = tasks().map(|task| task.params.as_ref()).collect();
        let statement = if parted { &TASK_FIND_KEYED } else { &TASK_FIND };
        match tx {
            Some(tx) => tx.rows(statement, Wait::Skip, Some(scope), &[&ids, &keys, &names, &params]).await,
            None => self.rows(statement, Wait::Skip, Some(scope), &[&ids, &keys, &names, &params]).await,
        }
    }

    /// Reads a task, or parts of its params and its result. Without a part, a text above [`FIELD_BYTES_MAX`] is left
    /// out.
    pub async fn task_get(
        &self,
        scope: &Scope,
        task_id: TaskId,
        params: Option<Part>,
        result: Option<Part>,
    ) -> Result<Row, Error> {
        let (params, result) = (Part::params(params), Part::params(result));
        let values: [&(dyn postgres_types::ToSql + Sync); 7] =
            [&task_id, &params.0, &params.1, &result.0, &result.1, &FIELD_BYTES_MAX, &HEADERS_BYTES_MAX];
        self.rows(&TASK_GET, Wait::Skip, Some(scope), &values)
            .await
            .map_err(|fault| fault.into_read_error(scope))?
            .into_iter()
            .next()
            .ok_or(Error::TaskNotFound(task_id))
    }

    /// Reads state and result of a task, or a part of the result.
    pub async fn task_result(&self, scope: &Scope, task_id: TaskId, part: Option<Part>) -> Result<TaskEnd, Error> {
        let (offset, limit) = Part::params(part);
        let rows =
            self.rows(&TASK_RESULT, Wait::Skip, Some(scope), &[&task_id, &offset, &limit, &ANSWER_BYTES_MAX]).await;
        let rows = rows.map_err(|fault| fault.into_read_error(scope))?;
        rows.first()
            .map(|row| TaskEnd {
                task_id,
                state: State::from_stored(row.get("state")),
                text: row.get::<_, Option<String>>("text").map(|text| cut(text, ANSWER_BYTES_MAX)),
                length: row.get("length"),
            })
            .ok_or(Error::TaskNotFound(task_id))
    }

    /// Those of the awaited tasks that have ended or do not exist, over all queues. Queues that cannot be read are left
    /// out.
    pub async fn task_ended(&self, waits: &[(QueueName, TaskId)]) -> Result<Vec<(String, TaskEnd)>, Fault> {
        let queues: Vec<&str> = waits.iter().map(|(queue, _)| queue.as_str()).collect();
        let ids: Vec<Uuid> = waits.iter().map(|(_, id)| *id).collect();
        let rows = self.rows(&TASK_ENDED, Wait::Skip, None, &[&queues, &ids]).await?;
        Ok(rows.iter().map(|row| (row.get("queue_name"), end(row))).collect())
    }

    /// A page of tasks with ids below `before`, newest first, and the cursor of the next page. Each page examines
    /// 10,000 tasks at most.
    pub async fn task_list(
        &self,
        scope: &Scope,
        before: TaskId,
        state: Option<State>,
        name: Option<&str>,
        limit: i64,
    ) -> Result<(Vec<Row>, Option<TaskId>), Error> {
        let fail = |fault: Fault| fault.into_read_error(scope);
        let state = state.map(State::as_str);
        let rows =
            self.rows(&TASK_LIST, Wait::Skip, Some(scope), &[&before, &state, &name, &limit]).await.map_err(fail)?;
        if i64::try_from(rows.len()).is_ok_and(|count| count == limit) {
            let next = rows.last().map(|row| row.get("task_id"));
            return Ok((rows, next));
        }
        if state.is_none() && name.is_none() {
            return Ok((rows, None));
        }
        let edge = self.rows(&TASK_LIST_EDGE, Wait::Skip, Some(scope), &[&before]).await.map_err(fail)?;
        let next = edge
            .first()
            .filter(|row| row.get::<_, i64>("seen") == 10_000)
            .and_then(|row| row.get::<_, Option<String>>("edge").and_then(|edge| Uuid::try_parse(&edge).ok()));
        Ok((rows, next))
    }

    /// Fails with [`Error::TaskNotFound`] unless the task exists.
    pub async fn task_exists(&self, scope: &Scope, task_id: TaskId) -> Result<(), Error> {
        let little = Some(Part { offset: 0, limit: 1 });
        self.task_get(scope, task_id, little, little).await.map(drop)
    }

    /// Tasks whose ids begin with the part or, among the newest 10,000, end with it; newest first. A whole id also
    /// finds the task of a run. Waits for a locked queue at most `lock_wait`.
    pub async fn task_search(
        &self,
        scope: &Scope,
        part: &IdPart,
        limit: i64,
        lock_wait: Duration,
    ) -> Result<TaskSearch, Fault> {
        let (from, to) = part.range();
        let params: [&(dyn postgres_types::ToSql + Sync); 5] = [&from, &to, &part.whole(), &part.end(), &limit];
        let rows = self.rows_within(lock_wait, &TASK_SEARCH, Wait::Skip, Some(scope), &params).await?;
        let partial = rows.first().is_some_and(|row| row.get("partial"));
        let rows = rows.into_iter().filter(|row| row.get::<_, Option<Uuid>>("task_id").is_some()).collect();
        Ok(TaskSearch { rows, partial })
    }

    /// Cancels a task. Returns whether this call cancelled it, and its state now.
    pub async fn task_cancel(
        &self,
        scope: &Scope,
        task_id: TaskId,
        lock_wait: Duration,
    ) -> Result<Result<(bool, State), Error>, Fault> {
        let tx = self.begin(lock_wait).await?;
        let done = self.task_cancel_in(scope, &tx, task_id).await;
        ended(tx, done).await
    }

    /// Cancels the task of a run, but only while the run is pending or sleeping.
    pub async fn task_cancel_by_run(
        &self,
        scope: &Scope,
        run_id: RunId,
        lock_wait: Duration,
    ) -> Result<Result<(bool, State, TaskId), Error>, Fault> {
        let tx = self.begin(lock_wait).await?;
        let done = async {
            let rows = tx.rows(&RUN_LOCK, Wait::Block, Some(scope), &[&run_id]).await?;
            let Some(row) = rows.first() else { return Ok(Err(Error::RunNotFound(run_id))) };
            let task_id: Uuid = row.get("task_id");
            let state = State::from_stored(row.get("state")).unwrap_or(State::Failed);
            if !matches!(state, State::Pending | State::Sleeping) {
                return Ok(Ok((false, state, task_id)));
            }
            let cancelled = self.task_cancel_in(scope, &tx, task_id).await?;
            Ok(cancelled.map(|(done, state)| (done, state, task_id)))
        };
        let done = done.await;
        ended(tx, done).await
    }

    async fn task_cancel_in(
        &self,
        scope: &Scope,
        tx: &Tx,
        task_id: TaskId,
    ) -> Result<Result<(bool, State), Error>, Fault> {
        let cancelled = tx.rows(&TASK_CANCEL, Wait::Block, Some(scope), &[&scope.queue().as_str(), &task_id]).await;
        match cancelled {
            // `absurd.cancel_task` raises a plain exception (P0001) only for a task that does not exist.
            Err(Fault::Raised { code, .. }) if code == "P0001" => return Ok(Err(Error::TaskNotFound(task_id))),
            cancelled => drop(cancelled?),
        }
        let rows = tx.rows(&TASK_CANCELLED, Wait::Block, Some(scope), &[&task_id]).await?;
        let Some(row) = rows.first() else { return Ok(Err(Error::TaskNotFound(task_id))) };
        Ok(Ok((row.get("mine"), State::from_stored(row.get("state")).unwrap_or(State::Cancelled))))
    }

    /// Gives a failed task another attempt, with the run id `run_id`. Repeating the call with the same run id has no
    /// further effect.
    pub async fn task_retry(
        &self,
        scope: &Scope,
        task_id: TaskId,
        run_id: RunId,
        max_attempts: Option<i32>,
    ) -> Result<Spawned, Error> {
        let rows = self
            .rows(&TASK_RETRY, Wait::Block, Some(scope), &[&task_id, &run_id, &max_attempts])
            .await
            .map_err(|fault| fault.into_error(scope))?;
        let row = rows.first().ok_or(Error::TaskNotFound(task_id))?;
        let spawned = |attempt, fresh| Spawned { task_id, run_id, attempt, created: false, fresh, claimed: false };
        if let Some(attempt) = row.get::<_, Option<i32>>("made") {
            return Ok(spawned(attempt, true));
        }
        if let Some(attempt) = row.get::<_, Option<i32>>("before") {
            return Ok(spawned(attempt, false));
        }
        let state: String = row.get("state");
        if state != "failed" {
            return Err(Error::TaskNotFailed { task: task_id, state });
        }
        Err(Error::MaxAttemptsTooLow { allowed: row.get("allowed"), made: row.get("attempts") })
    }

    /// Spawns a copy of a failed task, with the given ids. Repeating the call with the same ids has no further effect.
    pub async fn task_respawn(
        &self,
        scope: &Scope,
        task_id: TaskId,
        new_task_id: TaskId,
        run_id: RunId,
        max_attempts: Option<i32>,
    ) -> Result<Spawned, Error> {
        let rows = self
            .rows(&TASK_RESPAWN, Wait::Block, Some(scope), &[&task_id, &new_task_id, &run_id, &max_attempts])
            .await
            .map_err(|fault| fault.into_error(scope))?;
        let row = rows.first().ok_or(Error::TaskNotFound(task_id))?;
        let made: Option<Uuid> = row.get("made");
        let before: Option<Uuid> = row.get("before");
        if let Some(run_id) = made.or(before) {
            let fresh = made.is_some();
            return Ok(Spawned { task_id: new_task_id, run_id, attempt: 1, created: true, fresh, claimed: false });
        }
        let state: String = row.get("state");
        if state == "failed" {
            return Err(Error::TaskIdConflict(new_task_id));
        }
        Err(Error::TaskNotFailed { task: task_id, state })
    }

    /// A page of up to 1,000 tasks with a cancellation policy, in order of id, after `after`.
    pub async fn task_list_cancellable(&self, scope: &Scope, after: TaskId) -> Result<Vec<Cancellable>, Fault> {
        let params: [&(dyn postgres_types::ToSql + Sync); 2] = [&after, &scope.queue().as_str()];
        let rows = self.rows(&TASK_LIST_CANCELLABLE, Wait::Skip, Some(scope), &params).await?;
        let read =
            |row: &Row| Cancellable { task_id: row.get("task_id"), run_id: row.get("run_id"), due: row.get("due") };
        Ok(rows.iter().map(read).collect())
    }
}

/// Commits a success, and rolls back after a refusal or a fault.
async fn ended<T>(tx: Tx, done: Result<Result<T, Error>, Fault>) -> Result<Result<T, Error>, Fault> {
    match done {
        Ok(Ok(done)) => tx.commit().await.map(|()| Ok(done)),
        refused => {
            tx.rollback().await;
            refused
        }
    }
}

fn end(row: &Row) -> TaskEnd {
    let text =
        row.get::<_, Option<JsonText>>("result").or_else(|| row.get("failure_reason")).map(JsonText::into_string);
    TaskEnd {
        task_id: row.get("task_id"),
        state: State::from_stored(row.get("state")),
        length: text.as_ref().map_or(0, |text| i64::try_from(text.chars().count()).unwrap_or(i64::MAX)),
        text: text.filter(|text| i32::try_from(text.len()).is_ok_and(|length| length <= ANSWER_BYTES_MAX)),
    }
}

/// Joins the runs that were inserted with the tasks that existed before. One answer per task, in order.
fn spawning(tasks: &[Slotted<'_>], made: &[Row], old: &[Row]) -> Spawning {
    let mut made: HashMap<Uuid, &Row> = made.iter().map(|row| (row.get("run_id"), row)).collect();
    let mut claims = Vec::new();
    let mut answers = Vec::with_capacity(tasks.len());
    for (index, (task, slot)) in tasks.iter().enumerate() {
        let Some(row) = made.remove(&task.run_id) else {
            answers.push(old.get(index).map_or_else(|| Err(Error::Internal("no answer".into())), found));
            continue;
        };
        let claimed: bool = row.get("claimed");
        let NewTask { task_id, run_id, .. } = **task;
        answers.push(Ok(Spawned { task_id, run_id, attempt: 1, created: true, fresh: true, claimed }));
        if let Some(slot) = slot.filter(|_| claimed) {
            claims.push((index, claim(task, slot, row)));
        }
    }
    Spawning { answers, claims }
}

/// Answer for a task that existed before.
fn found(row: &Row) -> Result<Spawned, Error> {
    let Some(task_id) = row.get::<_, Option<Uuid>>("task_id") else {
        return Err(Error::DatabaseBusy("the task was removed at the same time".into()));
    };
    let first: Option<Uuid> = row.get("first_run_id");
    if row.get::<_, bool>("same_id") {
        // A repeated request gets the answer of the first one.
        return match first {
            Some(run_id) if row.get::<_, bool>("same_task") => {
                Ok(Spawned { task_id, run_id, attempt: 1, created: true, fresh: false, claimed: false })
            }
            _ => Err(Error::TaskIdConflict(task_id)),
        };
    }
    let run_id = row.get::<_, Option<Uuid>>("last_attempt_run").or(first).unwrap_or_default();
    Ok(Spawned { task_id, run_id, attempt: row.get("attempts"), created: false, fresh: false, claimed: false })
}

/// The claim of a task that was claimed when it was spawned.
fn claim(task: &NewTask, slot: &Slot, row: &Row) -> Claim {
    let now: Instant = row.get("now");
    let lease = Duration::from_secs(slot.lease_seconds.into());
    Claim {
        token: ClaimToken::new(task.run_id, slot.secret, slot.lease_seconds, now, true),
        run_id: task.run_id,
        task_id: task.task_id,
        attempt: 1,
        task_name: task.name.as_str().to_owned(),
        params: row.get("params"),
        retry_strategy: row.get("retry_strategy"),
        max_attempts: task.max_attempts,
        headers: row.get("headers"),
        wake_event: None,
        event_payload: None,
        claim_expires_at: (!lease.is_zero()).then(|| now.plus(lease)),
        resumed: false,
        checkpoints: Vec::new(),
        checkpoints_complete: true,
        params_omitted: false,
    }
}

/// Parameters of the spawn statements, column by column.
struct Columns<'a> {
    task_ids: Vec<Uuid>,
    run_ids: Vec<Uuid>,
    names: Vec<&'a str>,
    params: Vec<Option<&'a JsonText>>,
    headers: Vec<Option<&'a JsonText>>,
    strategies: Vec<Option<&'a JsonText>>,
    max_attempts: Vec<Option<i32>>,
    cancellations: Vec<Option<&'a JsonText>>,
    keys: Vec<Option<&'a str>>,
    starts: Vec<Option<Instant>>,
    delays: Vec<Option<i64>>,
    workers: Vec<Option<&'a str>>,
    digests: Vec<Option<String>>,
    leases: Vec<Option<i32>>,
}

impl<'a> Columns<'a> {
    fn of(tasks: &[Slotted<'a>]) -> Self {
        let mut columns = Self {
            task_ids: Vec::new(),
            run_ids: Vec::new(),
            names: Vec::new(),
            params: Vec::new(),
            headers: Vec::new(),
            strategies: Vec::new(),
            max_attempts: Vec::new(),
            cancellations: Vec::new(),
            keys: Vec::new(),
            starts: Vec::new(),
            delays: Vec::new(),
            workers: Vec::new(),
            digests: Vec::new(),
            leases: Vec::new(),
        };
        for (task, slot) in tasks {
            columns.task_ids.push(task.task_id);
            columns.run_ids.push(task.run_id);
            columns.names.push(task.name.as_str());
            columns.params.push(task.params.as_ref());
            columns.headers.push(task.headers.as_ref());
            columns.strategies.push(task.retry_strategy.as_ref());
            columns.max_attempts.push(task.max_attempts);
            columns.cancellations.push(task.cancellation.as_ref());
            columns.keys.push(task.idempotency_key.as_deref());
            columns.starts.push(task.start.and_then(When::at));
            columns.delays.push(task.start.and_then(When::after_us));
            columns.workers.push(slot.map(|slot| slot.worker_id.as_str()));
            columns.digests.push(slot.map(|slot| slot.secret.digest().as_str().to_owned()));
            columns.leases.push(slot.map(Slot::lease));
        }
        columns
    }

    /// A slot costs a search for older runs, and a start time costs a comparison per task. Batches without them use a
    /// cheaper statement. A batch with a start time uses no slots.
    fn statement(&self) -> &'static Statement {
        match (self.has_starts(), self.has_slots()) {
            (true, _) => &TASK_SPAWN_LATER,
            (false, true) => &TASK_SPAWN_CLAIMED,
            (false, false) => &TASK_SPAWN,
        }
    }

    fn has_starts(&self) -> bool {
        self.starts.iter().any(Option::is_some) || self.delays.iter().any(Option::is_some)
    }

    fn has_slots(&self) -> bool {
        self.workers.iter().any(Option::is_some)
    }

    fn as_sql(&self) -> Vec<&(dyn postgres_types::ToSql + Sync)> {
        let mut params: Vec<&(dyn postgres_types::ToSql + Sync)> = vec![
            &self.task_ids,
            &self.run_ids,
            &self.names,
            &self.params,
            &self.headers,
            &self.strategies,
            &self.max_attempts,
            &self.cancellations,
            &self.keys,
        ];
        if self.has_starts() {
            params.extend([&self.starts as &(dyn postgres_types::ToSql + Sync), &self.delays]);
        } else if self.has_slots() {
            params.extend([&self.workers as &(dyn postgres_types::ToSql + Sync), &self.digests, &self.leases]);
        }
        params
    }
}
