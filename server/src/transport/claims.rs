//! The RPCs that hand tasks to workers: parses and bounds their options.

use std::sync::Arc;
use std::time::Duration;

use absurd_proto::v1 as pb;

use super::claim_stream::{self, Responses};
use super::convert::{self, duration_between, scope};
use super::service::{AWAIT_MAX, Service};
use crate::dispatch::state::StreamOptions;
use crate::domain::{Error, SessionId, WorkerId};

/// Maximum number of claim tokens that a reconnecting stream may name.
const HELD_MAX: usize = 10_000;
/// Maximum number of task names in a filter.
const NAMES_MAX: usize = 100;
/// Longest wait of a `ClaimTask` call.
const CLAIM_WAIT_MAX: Duration = Duration::from_secs(60);
/// Largest message that gRPC clients decode by default.
const MESSAGE_DEFAULT: usize = 4 * 1024 * 1024;

impl Service {
    pub(super) async fn open_stream(&self, request: pb::ClaimStreamRequest) -> Result<Responses, Error> {
        let options = stream_options(&request)?;
        // A queue with a dispatcher here exists, so of ten thousand streams at once only the first reads the database.
        let scope = match scope(&request.queue)? {
            known if self.engine.dispatcher.knows(known.queue()) => known,
            _ => self.existing(&request.queue).await?,
        };
        self.engine.hang_doorbells(&[scope.queue().as_str()]).await;
        let (stream, opened) = self.engine.dispatcher.open(&scope, options.clone(), request.held_claim_tokens).await?;
        let heartbeat = self.engine.dispatcher.options().heartbeat;
        let opened = claim_stream::opened(opened, &options, heartbeat, self.engine.hints.replica_id());
        Ok(Responses::new(scope, stream, opened))
    }
}

fn names(asked: Vec<String>) -> Result<Arc<[String]>, Error> {
    if asked.len() > NAMES_MAX {
        return Err(Error::invalid("task_names", format!("must hold at most {NAMES_MAX} names")));
    }
    let mut names = Vec::with_capacity(asked.len());
    for (index, name) in asked.into_iter().enumerate() {
        crate::domain::TaskName::parse(&format!("task_names[{index}]"), &name)?;
        names.push(name);
    }
    names.sort();
    names.dedup();
    Ok(names.into())
}

fn message_bytes(asked: i32) -> Result<usize, Error> {
    match usize::try_from(asked) {
        Ok(0) => Ok(MESSAGE_DEFAULT),
        Ok(bytes) if bytes >= 16 * 1024 => Ok(bytes.min(64 * 1024 * 1024)),
        _ => Err(Error::invalid("max_message_bytes", "must be 0 or at least 16384")),
    }
}

fn stream_options(request: &pb::ClaimStreamRequest) -> Result<StreamOptions, Error> {
    let max_in_flight = match request.max_in_flight {
        0 => 1,
        asked @ 1..=10_000 => usize::try_from(asked).unwrap_or(1),
        _ => return Err(Error::invalid("max_in_flight", "must be 0 to 10,000")),
    };
    if request.worker_id.is_empty() {
        return Err(Error::invalid("worker_id", "must not be empty"));
    }
    if request.held_claim_tokens.len() > HELD_MAX {
        return Err(Error::invalid("held_claim_tokens", format!("must hold at most {HELD_MAX} tokens")));
    }
    let lease_seconds = convert::lease("claim_timeout", request.claim_timeout, false)?;
    let second = Duration::from_secs(1);
    let lease = Duration::from_secs(lease_seconds.into());
    Ok(StreamOptions {
        worker_id: WorkerId::parse("worker_id", &request.worker_id)?,
        session_id: SessionId::parse("session_id", &request.session_id)?,
        max_in_flight,
        lease_seconds,
        start_deadline: duration_between("start_deadline", request.start_deadline, second, lease)?,
        reconnect_grace: duration_between("reconnect_grace", request.reconnect_grace, second, AWAIT_MAX)?,
        names: names(request.task_names.clone())?,
        max_message_bytes: message_bytes(request.max_message_bytes)?,
        accepts_omitted_params: request.accepts_omitted_params,
    })
}

pub(super) fn pull_options(request: pb::ClaimTaskRequest) -> Result<(StreamOptions, Duration), Error> {
    let quantity = match request.qty {
        0 => 1,
        asked @ 1..=1000 => usize::try_from(asked).unwrap_or(1),
        _ => return Err(Error::invalid("qty", "must be 0 to 1,000")),
    };
    let lease_seconds = convert::lease("claim_timeout", request.claim_timeout, true)?;
    let lease = if lease_seconds == 0 { convert::LEASE_MAX } else { Duration::from_secs(lease_seconds.into()) };
    let wait = duration_between("wait", request.wait, Duration::ZERO, CLAIM_WAIT_MAX)?.unwrap_or_default();
    let options = StreamOptions {
        worker_id: WorkerId::parse("worker_id", &request.worker_id)?,
        session_id: SessionId::parse("session_id", "")?,
        max_in_flight: quantity,
        lease_seconds,
        start_deadline: duration_between("start_deadline", request.start_deadline, Duration::from_secs(1), lease)?,
        reconnect_grace: None,
        names: names(request.task_names)?,
        max_message_bytes: message_bytes(request.max_message_bytes)?,
        accepts_omitted_params: request.accepts_omitted_params,
    };
    Ok((options, wait))
}
