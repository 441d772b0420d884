//! The streaming RPC: renders a dispatcher's messages. It has no tokio task; the transport polls it.

use std::pin::Pin;
use std::task::{Context, Poll};

use absurd_proto::v1 as pb;
use absurd_proto::v1::claim_stream_response::Message as PbMessage;
use tonic::Status;

use super::convert::{self, pb_duration, pb_verdict, timestamp};
use super::status::status;
use crate::dispatch::outbox::{EndReason, Message};
use crate::dispatch::state::StreamOptions;
use crate::dispatch::{Opened, Stream};
use crate::scope::Scope;

/// The responses of a claim stream.
#[derive(Debug)]
pub struct Responses {
    first: Option<pb::StreamOpened>,
    stream: Stream,
    scope: Scope,
}

impl Responses {
    /// The responses of `stream`, after `opened`.
    pub fn new(scope: Scope, stream: Stream, opened: pb::StreamOpened) -> Self {
        Self { first: Some(opened), stream, scope }
    }
}

impl tokio_stream::Stream for Responses {
    type Item = Result<pb::ClaimStreamResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let wrap = |message| Ok(pb::ClaimStreamResponse { message: Some(message) });
        if let Some(opened) = self.first.take() {
            return Poll::Ready(Some(wrap(PbMessage::Opened(opened))));
        }
        self.stream.poll_next(cx).map(|message| {
            message.map(|message| match message {
                Message::Failed(error) => Err(status(&error)),
                message => wrap(render(&self.scope, message)),
            })
        })
    }
}

fn render(scope: &Scope, message: Message) -> PbMessage {
    match message {
        Message::Task(claim) => PbMessage::Task(convert::pb_claim(scope, *claim)),
        Message::Heartbeat { in_flight, credit } => PbMessage::Heartbeat(pb::StreamHeartbeat {
            in_flight: i32::try_from(in_flight).unwrap_or(i32::MAX),
            credit: i32::try_from(credit).unwrap_or(i32::MAX),
        }),
        Message::Revoked { token, run_id, verdict } => PbMessage::Revoked(pb::ClaimRevoked {
            claim_token: token,
            run_id: run_id.to_string(),
            verdict: pb_verdict(verdict),
        }),
        Message::Ending { reason, reconnect_after } => {
            let reason = match reason {
                EndReason::Shutdown => pb::EndReason::ServerShutdown,
                EndReason::MaxAge => pb::EndReason::MaxAge,
                EndReason::Superseded => pb::EndReason::Superseded,
                EndReason::Drained => pb::EndReason::Drained,
            };
            PbMessage::Ending(pb::StreamEnding {
                reason: reason.into(),
                reconnect_after: Some(pb_duration(reconnect_after)),
            })
        }
        // The caller turns it into a status.
        Message::Failed(_) => PbMessage::Ending(pb::StreamEnding::default()),
    }
}

/// The first message of a stream; asks the client to extend its leases every third of their length.
pub fn opened(
    opened: Opened,
    options: &StreamOptions,
    heartbeat: std::time::Duration,
    server_id: &str,
) -> pb::StreamOpened {
    let lease = std::time::Duration::from_secs(options.lease_seconds.into());
    pb::StreamOpened {
        stream_id: opened.stream_id.to_string(),
        session_id: opened.session_id.as_str().to_owned(),
        server_id: server_id.to_owned(),
        max_in_flight: i32::try_from(options.max_in_flight).unwrap_or(i32::MAX),
        claim_timeout: Some(pb_duration(lease)),
        extend_interval: Some(pb_duration(lease / 3)),
        heartbeat_interval: Some(pb_duration(heartbeat)),
        start_deadline: options.start_deadline.map(pb_duration),
        reconnect_grace: options.reconnect_grace.map(pb_duration),
        max_stream_age: Some(pb_duration(opened.age)),
        held: opened
            .held
            .into_iter()
            .map(|(claim_token, verdict, expires_at)| pb::ClaimVerdict {
                claim_token,
                verdict: pb_verdict(verdict),
                claim_expires_at: expires_at.and_then(timestamp),
            })
            .collect(),
    }
}
