//! Converts wire messages to valid values, and values to wire messages. No later layer checks a value again.

use std::sync::LazyLock;
use std::time::Duration;

use absurd_proto::v1 as pb;
use prost_types::{Duration as PbDuration, Timestamp};
use tokio_postgres::Row;
use uuid::Uuid;

use crate::domain::claim::Checkpoint;
use crate::domain::id::{parse_idempotency_key, parse_uuid};
use crate::domain::json::JsonBound;
use crate::domain::policy::{CancellationPolicy, RetryStrategy};
use crate::domain::{
    CheckpointName, Claim, ClaimToken, Error, Instant, JsonText, QueueName, RunId, Settled, State, TaskName, Verdict,
};
use crate::scope::{Caller, Scope};
use crate::store::Store;
use crate::store::batch::{RunRef, Write};
use crate::store::suspend::When;
use crate::store::task::{NewTask, Spawned, TaskEnd};
use crate::store::text::{FIELD_BYTES_MAX, Part, cut};
use crate::transport::limits::Limits;
use crate::transport::status;
use crate::transport::time::SPAN_MAX;

/// Longest lease, and longest extension of one.
pub const LEASE_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// Longest delay of a release.
const DELAY_MAX: Duration = Duration::from_secs(60 * 60);
/// Years 1 to 9999, the range of the wire format, in seconds since 1970.
const SECONDS: std::ops::RangeInclusive<i64> = -62_135_596_800..=253_402_300_799;
/// Largest difference between the time in a chosen id and the database's time, in microseconds.
const ID_SKEW_MAX: i64 = 24 * 60 * 60 * 1_000_000;

/// The scope of a request's queue, for the anonymous caller.
pub fn scope(queue: &str) -> Result<Scope, Error> {
    Ok(Caller::anonymous().scope(QueueName::parse("queue", queue)?))
}

/// Parses a duration from 0 to `max`.
pub fn duration(field: &str, value: PbDuration, max: Duration) -> Result<Duration, Error> {
    let wrong = |problem: String| Error::invalid(field, problem);
    if value.seconds < 0 || value.nanos < 0 {
        return Err(wrong("must not be negative".into()));
    }
    if value.nanos > 999_999_999 {
        return Err(wrong("nanos must be below 1,000,000,000".into()));
    }
    let duration = Duration::new(value.seconds.unsigned_abs(), value.nanos.unsigned_abs());
    if duration > max {
        return Err(wrong(format!("must be at most {}", humantime::format_duration(max))));
    }
    Ok(duration)
}

/// Parses a duration from `min` to `max`; absent stays `None`.
pub fn duration_between(
    field: &str,
    value: Option<PbDuration>,
    min: Duration,
    max: Duration,
) -> Result<Option<Duration>, Error> {
    let Some(value) = value else { return Ok(None) };
    let duration = duration(field, value, max)?;
    if duration < min {
        return Err(Error::invalid(field, format!("must be at least {}", humantime::format_duration(min))));
    }
    Ok(Some(duration))
}

/// Parses an extension of a lease: whole seconds, from 1 s to a day.
fn extension(field: &str, value: Option<PbDuration>) -> Result<i32, Error> {
    let Some(value) = value else { return Err(Error::invalid(field, "must be set")) };
    let duration = duration(field, value, LEASE_MAX)?;
    if duration.subsec_nanos() != 0 {
        return Err(Error::invalid(field, "must be whole seconds"));
    }
    if duration.is_zero() {
        return Err(Error::invalid(field, "must be > 0"));
    }
    Ok(i32::try_from(duration.as_secs()).unwrap_or(i32::MAX))
}

/// Parses an optional extension of a lease in seconds; absent is 0.
pub fn extension_or_none(field: &str, value: Option<PbDuration>) -> Result<i32, Error> {
    value.map_or(Ok(0), |value| extension(field, Some(value)))
}

/// Parses a lease in whole seconds, at most a day; absent is 30 s. 0 (no end) is refused unless `zero`.
pub fn lease(field: &str, value: Option<PbDuration>, zero: bool) -> Result<u32, Error> {
    let Some(value) = value else { return Ok(30) };
    let duration = duration(field, value, LEASE_MAX)?;
    if duration.subsec_nanos() != 0 {
        return Err(Error::invalid(field, "must be whole seconds"));
    }
    if duration.is_zero() && !zero {
        return Err(Error::invalid(field, "must be at least 1 s; a lease that never ends is only for ClaimTask"));
    }
    Ok(u32::try_from(duration.as_secs()).unwrap_or(u32::MAX))
}

/// Parses a time between the years 1 and 9999; truncates it to microseconds.
pub fn instant(field: &str, value: &Timestamp) -> Result<Instant, Error> {
    if !SECONDS.contains(&value.seconds) || !(0..1_000_000_000).contains(&value.nanos) {
        return Err(Error::invalid(field, "must be a time between the years 1 and 9999"));
    }
    Ok(Instant::from_micros(value.seconds * 1_000_000 + i64::from(value.nanos / 1000)))
}

/// Parses JSON within a bound; absent stays `None`.
pub fn json(field: &str, value: Option<pb::Json>, bound: JsonBound) -> Result<Option<JsonText>, Error> {
    value.map(|json| JsonText::parse(field, json.text, bound)).transpose()
}

/// Parses a range of a long text: up to 1,000,000 code points from an offset.
pub fn part(field: &str, range: Option<pb::TextRange>) -> Result<Option<Part>, Error> {
    match range {
        Some(range) if range.offset < 0 || !(1..=1_000_000).contains(&range.limit) => {
            Err(Error::invalid(field, "offset must be 0 or more, limit must be 1 to 1,000,000"))
        }
        range => Ok(range.map(|range| Part { offset: range.offset, limit: range.limit })),
    }
}

/// The run of a request, named by token or by id. Without a token it fails if the server requires one.
pub fn run_ref(run_id: &str, token: Option<&str>, limits: &Limits) -> Result<(RunRef, Option<ClaimToken>), Error> {
    let Some(token) = token.filter(|token| !token.is_empty()) else {
        if limits.require_claim_token {
            return Err(Error::TokenRequired);
        }
        return Ok((RunRef { run_id: parse_uuid("run_id", run_id)?, digest: None }, None));
    };
    let token = ClaimToken::parse(token)?;
    if !run_id.is_empty() && parse_uuid("run_id", run_id)? != token.run_id {
        return Err(Error::invalid("run_id", "is not the run of claim_token"));
    }
    Ok((RunRef { run_id: token.run_id, digest: Some(token.digest()) }, Some(token)))
}

/// The write that completes a run.
pub fn complete(result: Option<pb::Json>, limits: &Limits) -> Result<Write, Error> {
    Ok(Write::Complete { result: json("result", result, limits.payload())? })
}

/// The write that fails a run. An invalid reason is repaired, never refused.
pub fn fail(reason: Option<pb::Json>, retry_at: Option<&Timestamp>, no_retry: bool) -> Result<Write, Error> {
    if no_retry && retry_at.is_some() {
        return Err(Error::invalid("retry_at", "must be absent beside no_retry"));
    }
    Ok(Write::Fail {
        no_retry,
        reason: reason.map(|json| JsonText::reason(&json.text)),
        retry_at: retry_at.map(|at| instant("retry_at", at)).transpose()?,
    })
}

/// The write that extends a lease.
pub fn extend(extend_by: Option<PbDuration>) -> Result<Write, Error> {
    Ok(Write::Extend { seconds: extension("extend_by", extend_by)? })
}

/// The write that releases a claim. A token tells where the run stood in its queue, and whether the claim was the
/// task's first.
pub fn release(delay: Option<PbDuration>, token: Option<&ClaimToken>) -> Result<Write, Error> {
    let delay = delay.map(|delay| duration("delay", delay, DELAY_MAX)).transpose()?.unwrap_or_default();
    Ok(Write::Release {
        available_at: token.map(|token| token.was_available_at),
        delay_ms: i32::try_from(delay.as_millis()).unwrap_or(i32::MAX),
        first_claim: token.is_some_and(|token| token.first_claim),
    })
}

fn checkpoint(action: pb::CheckpointAction, limits: &Limits) -> Result<Write, Error> {
    Ok(Write::Checkpoint {
        name: CheckpointName::parse("checkpoint_name", &action.checkpoint_name)?,
        state: json("state", action.state, limits.payload())?,
        seconds: extension_or_none("extend_by", action.extend_by)?,
    })
}

/// The run and the write of one item of `SettleTasks`.
pub fn settle_item(item: pb::SettleItem, limits: &Limits) -> Result<(RunRef, Write), Error> {
    use pb::settle_item::Action;
    let (run, token) = run_ref(&item.run_id, item.claim_token.as_deref(), limits)?;
    let write = match item.action {
        Some(Action::Complete(action)) => complete(action.result, limits),
        Some(Action::Fail(action)) => fail(action.reason, action.retry_at.as_ref(), action.no_retry),
        Some(Action::Checkpoint(action)) => checkpoint(action, limits),
        Some(Action::Extend(action)) => extend(action.extend_by),
        Some(Action::Release(action)) => release(action.delay, token.as_ref()),
        None => return Err(Error::invalid("action", "must be set")),
    };
    Ok((run, write?))
}

fn strategy(value: pb::RetryStrategy) -> Result<RetryStrategy, Error> {
    let delay = |field: &str, value: Option<PbDuration>| {
        value.map(|value| duration(&format!("retry_strategy.{field}"), value, Duration::from_secs(86_400))).transpose()
    };
    let (base, max) = (delay("base", value.base)?, delay("max", value.max)?);
    match pb::RetryKind::try_from(value.kind) {
        Ok(pb::RetryKind::Unspecified | pb::RetryKind::None) => Ok(RetryStrategy::None),
        Ok(pb::RetryKind::Fixed) => RetryStrategy::Fixed { base }.checked(),
        Ok(pb::RetryKind::Exponential) => RetryStrategy::Exponential { base, factor: value.factor, max }.checked(),
        Err(_) => Err(Error::invalid("retry_strategy.kind", "is not a known kind")),
    }
}

fn cancellation(value: pb::CancellationPolicy) -> Result<CancellationPolicy, Error> {
    let span = |field: &str, value: Option<PbDuration>| {
        value
            .map(|value| duration(&format!("cancellation.{field}"), value, Duration::from_secs(u64::MAX / 4)))
            .transpose()
    };
    CancellationPolicy {
        max_delay: span("max_delay", value.max_delay)?,
        max_duration: span("max_duration", value.max_duration)?,
    }
    .checked()
}

/// Parses an id chosen by the caller: a version 7 UUID whose time is within a day of the database's. A server whose
/// test clock is set accepts any time.
pub fn chosen_id(field: &str, text: &str, store: &Store) -> Result<Uuid, Error> {
    let id = parse_uuid(field, text)?;
    let Some((seconds, nanos)) = id.get_timestamp().filter(|_| id.get_version_num() == 7).map(|stamp| stamp.to_unix())
    else {
        return Err(Error::invalid(field, "must be a UUID of version 7"));
    };
    let micros = i64::try_from(seconds).unwrap_or(i64::MAX / 2_000_000) * 1_000_000 + i64::from(nanos / 1000);
    let skewed = store.now().is_some_and(|now| now.micros().abs_diff(micros) > ID_SKEW_MAX.unsigned_abs());
    if skewed && store.test_time().is_none() {
        return Err(Error::invalid(field, "its time must be within a day of the database's"));
    }
    Ok(id)
}

/// The retry strategy, as stored, of a task whose spawn sets neither a strategy nor `max_attempts`.
static DEFAULT_PAUSES: LazyLock<JsonText> = LazyLock::new(|| {
    let (base, max) = (Some(Duration::from_secs(1)), Some(Duration::from_secs(5 * 60)));
    RetryStrategy::Exponential { base, factor: Some(2.0), max }.to_json()
});

/// Attempts and retry strategy of a new task. A spawn that sets no `max_attempts` gets pauses by default, so that it
/// cannot fail forever without a pause.
fn retries(task: &pb::NewTask, limits: &Limits) -> Result<(Option<i32>, Option<JsonText>), Error> {
    let asked = task.retry_strategy.map(strategy).transpose()?.map(RetryStrategy::to_json);
    match task.max_attempts {
        Some(attempts) if attempts < 1 => Err(Error::invalid("max_attempts", "must be at least 1")),
        Some(_) if task.unlimited_attempts => {
            Err(Error::invalid("unlimited_attempts", "contradicts max_attempts: set one of the two"))
        }
        Some(attempts) => Ok((Some(attempts), asked)),
        None => {
            let attempts = (!task.unlimited_attempts).then_some(limits.default_max_attempts);
            Ok((attempts, Some(asked.unwrap_or_else(|| DEFAULT_PAUSES.clone()))))
        }
    }
}

/// The time from which a new task is claimable; None: at once.
fn start(value: Option<pb::new_task::Start>, now: Option<Instant>) -> Result<Option<When>, Error> {
    use pb::new_task::Start;
    Ok(match value {
        None => None,
        Some(Start::StartAt(at)) => {
            let at = instant("start_at", &at)?;
            now.is_none_or(|now| at > now).then_some(When::At(at))
        }
        Some(Start::Delay(delay)) => {
            let delay = duration("delay", delay, SPAN_MAX)?;
            (delay.as_micros() > 0).then_some(When::After(delay))
        }
    })
}

/// Refuses a cancellation policy that would cancel a task before its start.
fn outlasts(policy: CancellationPolicy, start: When, now: Instant) -> Result<(), Error> {
    let delay = start.delay_from(now);
    match policy.max_delay {
        Some(max_delay) if max_delay <= delay => Err(Error::invalid(
            "cancellation.max_delay",
            format!(
                "must be longer than the delay of the start ({}), or the task is cancelled before a worker may claim it",
                humantime::format_duration(Duration::from_secs(delay.as_secs()))
            ),
        )),
        _ => Ok(()),
    }
}

/// Parses a task to be spawned, and gives it a task id and a run id.
pub fn new_task(task: pb::NewTask, limits: &Limits, store: &Store) -> Result<NewTask, Error> {
    let (max_attempts, retry_strategy) = retries(&task, limits)?;
    let headers =
        task.headers.map(|json| JsonText::parse_object("headers", json.text, limits.headers())).transpose()?;
    let workflow_run_id = task.workflow_run_id.map(|id| parse_uuid("workflow_run_id", &id)).transpose()?;
    let headers = match workflow_run_id {
        Some(id) => Some(JsonText::with_text_key(headers, "workflow_run_id", &id.to_string())),
        None => headers,
    };
    let cancellation = task.cancellation.map(cancellation).transpose()?;
    let now = store.now();
    let start = start(task.start, now)?;
    if let (Some(policy), Some(start), Some(now)) = (cancellation, start, now) {
        outlasts(policy, start, now)?;
    }
    Ok(NewTask {
        task_id: match &task.task_id {
            Some(id) => chosen_id("task_id", id, store)?,
            None => store.mint_id(),
        },
        run_id: store.mint_id(),
        name: TaskName::parse("task_name", &task.task_name)?,
        params: json("params", task.params, limits.payload())?,
        headers,
        retry_strategy,
        max_attempts,
        cancellation: cancellation.map(CancellationPolicy::to_json),
        idempotency_key: task.idempotency_key.map(|key| parse_idempotency_key("idempotency_key", &key)).transpose()?,
        start,
    })
}

// Below: values to wire messages.

/// A timestamp; `None` for a time that never comes. SQL may write times outside the years 1 to 9999. They become the
/// nearest time within these years, because clients refuse other timestamps.
pub fn timestamp(at: Instant) -> Option<Timestamp> {
    if at.is_never() {
        return None;
    }
    let micros = at.micros().clamp(*SECONDS.start() * 1_000_000, *SECONDS.end() * 1_000_000 + 999_999);
    let nanos = i32::try_from(micros.rem_euclid(1_000_000)).unwrap_or(0) * 1000;
    Some(Timestamp { seconds: micros.div_euclid(1_000_000), nanos })
}

/// A wire duration, with the seconds capped at `i64::MAX`.
pub fn pb_duration(duration: Duration) -> PbDuration {
    PbDuration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    }
}

fn pb_json(json: JsonText) -> pb::Json {
    pb::Json { text: json.into_string() }
}

/// Headers of JSON null count as absent.
fn pb_object(json: Option<JsonText>) -> Option<pb::Json> {
    json.filter(|json| json.as_str() != "null").map(pb_json)
}

/// The wire value of a state.
pub fn pb_state(state: State) -> i32 {
    let state = match state {
        State::Pending => pb::State::Pending,
        State::Running => pb::State::Running,
        State::Sleeping => pb::State::Sleeping,
        State::Completed => pb::State::Completed,
        State::Failed => pb::State::Failed,
        State::Cancelled => pb::State::Cancelled,
    };
    state.into()
}

/// Parses the state of a filter; unspecified is `None`.
pub fn state_filter(state: i32) -> Result<Option<State>, Error> {
    Ok(match pb::State::try_from(state) {
        Ok(pb::State::Unspecified) => None,
        Ok(pb::State::Pending) => Some(State::Pending),
        Ok(pb::State::Running) => Some(State::Running),
        Ok(pb::State::Sleeping) => Some(State::Sleeping),
        Ok(pb::State::Completed) => Some(State::Completed),
        Ok(pb::State::Failed) => Some(State::Failed),
        Ok(pb::State::Cancelled) => Some(State::Cancelled),
        Err(_) => return Err(Error::invalid("state", "is not a known state")),
    })
}

/// The wire value of a verdict.
pub fn pb_verdict(verdict: Verdict) -> i32 {
    let verdict = match verdict {
        Verdict::Held => pb::Verdict::Held,
        Verdict::Lost => pb::Verdict::Lost,
        Verdict::Expired => pb::Verdict::Expired,
        Verdict::Cancelled => pb::Verdict::Cancelled,
        Verdict::Finished => pb::Verdict::Finished,
        Verdict::Invalid => pb::Verdict::Invalid,
        Verdict::Busy => pb::Verdict::Busy,
        Verdict::Released => pb::Verdict::Released,
    };
    verdict.into()
}

/// A claimed task, with its encoded claim token.
pub fn pb_claim(scope: &Scope, claim: Claim) -> pb::ClaimedTask {
    pb::ClaimedTask {
        claim_token: claim.token.encode(),
        queue: scope.queue().as_str().to_owned(),
        run_id: claim.run_id.to_string(),
        task_id: claim.task_id.to_string(),
        attempt: claim.attempt,
        task_name: claim.task_name,
        params_bytes: i64::try_from(claim.params.len()).unwrap_or(i64::MAX),
        params: (!claim.params_omitted).then(|| pb_json(claim.params)),
        retry_strategy: claim.retry_strategy.map(pb_json),
        max_attempts: claim.max_attempts,
        headers: pb_object(claim.headers),
        wake_event: claim.wake_event,
        event_payload: claim.event_payload.map(pb_json),
        claim_expires_at: claim.claim_expires_at.and_then(timestamp),
        checkpoints: claim.checkpoints.into_iter().map(pb_checkpoint).collect(),
        checkpoints_complete: claim.checkpoints_complete,
        params_omitted: claim.params_omitted,
    }
}

fn pb_checkpoint(checkpoint: Checkpoint) -> pb::Checkpoint {
    pb::Checkpoint {
        checkpoint_name: checkpoint.name,
        state: checkpoint.state.map(pb_json),
        owner_run_id: checkpoint.owner_run_id.map(|id| id.to_string()),
        updated_at: timestamp(checkpoint.updated_at),
    }
}

/// The ids of a spawned task. Without a workflow run, its workflow run id is its run id.
pub fn pb_spawned(spawned: &Spawned, workflow_run_id: Option<&str>) -> pb::SpawnedTask {
    pb::SpawnedTask {
        task_id: spawned.task_id.to_string(),
        run_id: spawned.run_id.to_string(),
        attempt: spawned.attempt,
        created: spawned.created,
        workflow_run_id: workflow_run_id.map_or_else(|| spawned.run_id.to_string(), str::to_owned),
    }
}

/// The consequence of a failure: the task's state, and the next run if there is one.
pub fn pb_fail_outcome(settled: &Settled) -> Option<pb::FailOutcome> {
    settled.failed.map(|failed| pb::FailOutcome {
        replayed: settled.replayed,
        task_state: pb_state(failed.task_state),
        next_run_id: failed.next.map(|(run, _, _)| run.to_string()),
        next_attempt: failed.next.map(|(_, attempt, _)| attempt),
        next_available_at: failed.next.and_then(|(_, _, at)| timestamp(at)),
    })
}

/// The answer to one item of `SettleTasks`.
pub fn pb_settle_result(outcome: &Result<Settled, Error>) -> pb::SettleResult {
    match outcome {
        Ok(settled) => pb::SettleResult {
            error: None,
            replayed: settled.replayed,
            claim_expires_at: settled.claim_expires_at.and_then(timestamp),
            fail: pb_fail_outcome(settled),
            applied: settled.applied,
        },
        Err(error) => pb::SettleResult {
            error: Some(pb::SettleError {
                code: status::code(error).into(),
                reason: error.reason().to_owned(),
                message: status::status(error).message().to_owned(),
                field: error.field().unwrap_or_default().to_owned(),
            }),
            ..pb::SettleResult::default()
        },
    }
}

/// State and result of a task; a failed task has a failure reason instead of a result.
pub fn pb_task_end(end: TaskEnd) -> pb::TaskResult {
    let omitted = end.text.is_none() && end.length > 0;
    let json = end.text.map(|text| pb::Json { text });
    let (result, failure_reason) = if end.state == Some(State::Failed) { (None, json) } else { (json, None) };
    pb::TaskResult {
        task_id: end.task_id.to_string(),
        state: end.state.map_or(0, pb_state),
        result,
        failure_reason,
        omitted,
        length: end.length,
    }
}

/// The wire value of a row's `state`; 0 if it is unknown.
pub fn stored_state(row: &Row) -> i32 {
    State::from_stored(row.get("state")).map_or(0, pb_state)
}

/// The time in a column; `None` if it is null or never comes.
pub fn at(row: &Row, column: &str) -> Option<Timestamp> {
    row.get::<_, Option<Instant>>(column).and_then(timestamp)
}

/// The JSON in a column.
pub fn stored_json(row: &Row, column: &str) -> Option<pb::Json> {
    row.get::<_, Option<JsonText>>(column).map(pb_json)
}

/// JSON that the statement has read as text, cut to `FIELD_BYTES_MAX`.
fn text_json(row: &Row, column: &str) -> Option<pb::Json> {
    row.get::<_, Option<String>>(column).map(|text| pb::Json { text: cut(text, FIELD_BYTES_MAX) })
}

/// Whether the statement left a text out because of its size: it is null, but its length is not 0.
fn omitted(row: &Row, column: &str, length: &str) -> bool {
    row.get::<_, Option<&str>>(column).is_none() && row.get::<_, i64>(length) > 0
}

/// A task, from a row of `task_get.sql`.
pub fn pb_task(row: &Row) -> pb::Task {
    pb::Task {
        task_id: row.get::<_, Uuid>("task_id").to_string(),
        task_name: row.get("task_name"),
        params: text_json(row, "params"),
        headers: pb_object(row.get("headers")),
        retry_strategy: stored_json(row, "retry_strategy"),
        max_attempts: row.get("max_attempts"),
        cancellation: stored_json(row, "cancellation"),
        enqueue_at: at(row, "enqueue_at"),
        first_started_at: at(row, "first_started_at"),
        state: stored_state(row),
        attempts: row.get("attempts"),
        last_attempt_run: row.get::<_, Option<Uuid>>("last_attempt_run").map(|id| id.to_string()),
        completed_payload: text_json(row, "completed_payload"),
        cancelled_at: at(row, "cancelled_at"),
        idempotency_key: row.get("idempotency_key"),
        tenant_id: None,
        params_omitted: omitted(row, "params", "params_length"),
        completed_payload_omitted: omitted(row, "completed_payload", "result_length"),
        details_omitted: row.get("details_omitted"),
    }
}

/// A task in a list, from its row.
pub fn pb_task_summary(row: &Row) -> pb::TaskSummary {
    pb::TaskSummary {
        task_id: row.get::<_, Uuid>("task_id").to_string(),
        task_name: row.get("task_name"),
        state: stored_state(row),
        attempts: row.get("attempts"),
        max_attempts: row.get("max_attempts"),
        enqueue_at: at(row, "enqueue_at"),
        first_started_at: at(row, "first_started_at"),
    }
}

/// A run, from its row.
pub fn pb_run(row: &Row) -> pb::Run {
    let available_at: Instant = row.get("available_at");
    pb::Run {
        run_id: row.get::<_, RunId>("run_id").to_string(),
        task_id: row.get::<_, Uuid>("task_id").to_string(),
        attempt: row.get("attempt"),
        state: stored_state(row),
        claimed_by: row.get("claimed_by"),
        claim_expires_at: at(row, "claim_expires_at"),
        available_at: timestamp(available_at),
        available_never: available_at.is_never(),
        wake_event: row.get("wake_event"),
        event_payload: text_json(row, "event_payload"),
        started_at: at(row, "started_at"),
        completed_at: at(row, "completed_at"),
        failed_at: at(row, "failed_at"),
        result: text_json(row, "result"),
        failure_reason: text_json(row, "failure_reason"),
        created_at: at(row, "created_at"),
        tenant_id: None,
        last_heartbeat: at(row, "last_heartbeat"),
        payloads_omitted: row.get::<_, Option<bool>>("omitted").unwrap_or(false),
    }
}

/// A queue, from its row.
pub fn pb_queue(row: &Row) -> pb::Queue {
    let mode: String = row.get("storage_mode");
    let mode = if mode == "partitioned" { pb::StorageMode::Partitioned } else { pb::StorageMode::Unpartitioned };
    pb::Queue { name: row.get("queue_name"), storage_mode: mode.into(), created_at: at(row, "created_at") }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::domain::claim::Secret;

    /// A claim with texts of so many bytes, and so many checkpoints.
    fn claim(bytes: usize, checkpoints: usize) -> Claim {
        let (run_id, task_id) = (Uuid::now_v7(), Uuid::now_v7());
        let now = Instant::from_micros(1_700_000_000_000_000);
        let text = |field: &str| {
            let json = format!("{{\"{}\": {field:?}}}", "x".repeat(bytes));
            JsonText::parse(field, json, JsonBound { bytes: usize::MAX, depth: 2 }).unwrap()
        };
        let checkpoint = |number: usize| Checkpoint {
            name: format!("{}{number}", "c".repeat(bytes)),
            state: Some(text("state")),
            owner_run_id: Some(run_id),
            updated_at: now,
        };
        Claim {
            token: ClaimToken::new(run_id, Secret::new().unwrap(), u32::MAX, now, true),
            run_id,
            task_id,
            attempt: i32::MAX,
            task_name: "n".repeat(bytes),
            params: text("params"),
            retry_strategy: Some(text("retry_strategy")),
            max_attempts: Some(i32::MAX),
            headers: Some(text("headers")),
            wake_event: Some("e".repeat(bytes)),
            event_payload: Some(text("event_payload")),
            claim_expires_at: Some(now),
            resumed: true,
            checkpoints: (0..checkpoints).map(checkpoint).collect(),
            checkpoints_complete: true,
            params_omitted: false,
        }
    }

    /// Streams have room for messages, so the bound of a claim holds, and is no more than its spare bytes above the size.
    #[test]
    fn the_bound_of_a_claim_is_just_above_its_size() {
        let queue = QueueName::parse("queue", &"q".repeat(57)).unwrap();
        let scope = Caller::anonymous().scope(queue);
        for (bytes, checkpoints) in [(1, 0), (1, 1), (300, 0), (300, 7), (100_000, 0), (100_000, 3), (2, 500)] {
            for params_omitted in [false, true] {
                let claim = Claim { params_omitted, ..claim(bytes, checkpoints) };
                let bound = claim.message_bytes();
                let size = pb_claim(&scope, claim).encoded_len();
                let spare = 1024 + 128 * checkpoints;
                assert!(size <= bound && bound <= size + spare, "{bytes}, {checkpoints}: {size} bytes, bound {bound}");
            }
        }
    }
}
