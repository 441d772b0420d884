//! A claim: a run lent to a worker, and the token that proves it.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::{Error, Instant, JsonText, RunId, State, TaskId};

/// Bytes of a token before encoding: version, run, secret, lease, place in the queue, flags.
const TOKEN_BYTES: usize = 1 + 16 + 16 + 4 + 8 + 1;
const TOKEN_VERSION: u8 = 1;
const FLAG_FIRST_CLAIM: u8 = 1;

/// What Postgres keeps of a claim's secret: 22 base64url characters behind the worker id.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Digest(String);

impl Digest {
    /// The characters.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its 16 bytes, in the form in which replicas tell each other of claims.
    pub fn to_uuid(&self) -> Uuid {
        let bytes = URL_SAFE_NO_PAD.decode(&self.0).ok().and_then(|bytes| <[u8; 16]>::try_from(bytes).ok());
        bytes.map_or(Uuid::nil(), Uuid::from_bytes)
    }
}

/// The random part of a token; never stored, never logged.
#[derive(Clone, Copy)]
pub struct Secret([u8; 16]);

impl Secret {
    /// A new secret.
    pub fn new() -> Result<Self, Error> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(|error| Error::Internal(error.to_string()))?;
        Ok(Self(bytes))
    }

    /// What is stored.
    pub fn digest(&self) -> Digest {
        Digest(URL_SAFE_NO_PAD.encode(&Sha256::digest(self.0)[..16]))
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Proof of a claim. Carries what any replica needs to extend or release it.
#[derive(Debug, Clone)]
pub struct ClaimToken {
    /// The run.
    pub run_id: RunId,
    secret: Secret,
    /// Lease that the claim was made with, in seconds; 0 never ends.
    pub lease_seconds: u32,
    /// Where the run stood in the queue.
    pub was_available_at: Instant,
    /// Whether this claim was the task's first.
    pub first_claim: bool,
}

impl ClaimToken {
    /// The token of a claim just made.
    pub fn new(
        run_id: RunId,
        secret: Secret,
        lease_seconds: u32,
        was_available_at: Instant,
        first_claim: bool,
    ) -> Self {
        Self { run_id, secret, lease_seconds, was_available_at, first_claim }
    }

    /// Reads a token.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| Error::TokenInvalid)?;
        let bytes: [u8; TOKEN_BYTES] = bytes.try_into().map_err(|_| Error::TokenInvalid)?;
        let (head, rest) = bytes.split_at(1);
        let (run, rest) = rest.split_at(16);
        let (secret, rest) = rest.split_at(16);
        let (lease, rest) = rest.split_at(4);
        let (available, flags) = rest.split_at(8);
        if head[0] != TOKEN_VERSION {
            return Err(Error::TokenInvalid);
        }
        let bad = |_| Error::TokenInvalid;
        Ok(Self {
            run_id: Uuid::from_slice(run).map_err(|_| Error::TokenInvalid)?,
            secret: Secret(secret.try_into().map_err(bad)?),
            lease_seconds: u32::from_be_bytes(lease.try_into().map_err(bad)?).min(86_400),
            was_available_at: Instant::from_micros(i64::from_be_bytes(available.try_into().map_err(bad)?)),
            first_claim: flags[0] & FLAG_FIRST_CLAIM != 0,
        })
    }

    /// Writes the token.
    pub fn encode(&self) -> String {
        let mut bytes = Vec::with_capacity(TOKEN_BYTES);
        bytes.push(TOKEN_VERSION);
        bytes.extend_from_slice(self.run_id.as_bytes());
        bytes.extend_from_slice(&self.secret.0);
        bytes.extend_from_slice(&self.lease_seconds.to_be_bytes());
        bytes.extend_from_slice(&self.was_available_at.micros().to_be_bytes());
        bytes.push(u8::from(self.first_claim) * FLAG_FIRST_CLAIM);
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// What Postgres keeps of it.
    pub fn digest(&self) -> Digest {
        self.secret.digest()
    }
}

/// A claimed run, with all that its worker needs.
#[derive(Debug, Clone)]
pub struct Claim {
    /// Proof.
    pub token: ClaimToken,
    /// The run.
    pub run_id: RunId,
    /// Its task.
    pub task_id: TaskId,
    /// 1 for the first.
    pub attempt: i32,
    /// Handler.
    pub task_name: String,
    /// Input.
    pub params: JsonText,
    /// As stored.
    pub retry_strategy: Option<JsonText>,
    /// None: unlimited.
    pub max_attempts: Option<i32>,
    /// As stored; JSON null means none.
    pub headers: Option<JsonText>,
    /// Event that it waited for.
    pub wake_event: Option<String>,
    /// Payload of that event.
    pub event_payload: Option<JsonText>,
    /// End of the lease; None: never.
    pub claim_expires_at: Option<Instant>,
    /// Whether an earlier claim may have left checkpoints.
    pub resumed: bool,
    /// Checkpoints that the run may see, oldest first.
    pub checkpoints: Vec<Checkpoint>,
    /// Whether those are all.
    pub checkpoints_complete: bool,
    /// Whether params were left out of the message.
    pub params_omitted: bool,
}

/// Room for ids, token, times and field tags of a task message.
const MESSAGE_OVERHEAD: usize = 1024;

impl Claim {
    /// Upper bound of the encoded message's size in bytes.
    pub fn message_bytes(&self) -> usize {
        let checkpoints: usize = self.checkpoints.iter().map(Checkpoint::message_bytes).sum();
        let text = |json: &Option<JsonText>| json.as_ref().map_or(0, JsonText::len);
        let params = if self.params_omitted { 0 } else { self.params.len() };
        MESSAGE_OVERHEAD
            + self.task_name.len()
            + params
            + text(&self.headers)
            + text(&self.retry_strategy)
            + text(&self.event_payload)
            + self.wake_event.as_ref().map_or(0, String::len)
            + checkpoints
    }
}

/// The stored result of a step.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// Name of the step.
    pub name: String,
    /// Value; None is SQL NULL.
    pub state: Option<JsonText>,
    /// Run that wrote it.
    pub owner_run_id: Option<RunId>,
    /// When.
    pub updated_at: Instant,
}

impl Checkpoint {
    fn message_bytes(&self) -> usize {
        128 + self.name.len() + self.state.as_ref().map_or(0, JsonText::len)
    }
}

/// What a claim is worth now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It holds.
    Held,
    /// Another claim owns the run, or it was given back.
    Lost,
    /// The lease ran out.
    Expired,
    /// The task was cancelled.
    Cancelled,
    /// This claim has ended the run.
    Finished,
    /// Not a token, or an unknown run.
    Invalid,
    /// Could not be told in time.
    Busy,
    /// Given back.
    Released,
}

/// What became of one item of a settling batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Settled {
    /// Task of the run.
    pub task_id: TaskId,
    /// Whether an earlier call had done it already.
    pub replayed: bool,
    /// End of the lease after an extension or a checkpoint.
    pub claim_expires_at: Option<Instant>,
    /// Whether a checkpoint was stored.
    pub applied: bool,
    /// What follows a failure.
    pub failed: Option<Failed>,
}

/// What follows a failure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Failed {
    /// State of the task.
    pub task_state: State,
    /// The next attempt's run, its number, and when it may be claimed.
    pub next: Option<(RunId, i32, Instant)>,
    /// Milliseconds until then, by the database's clock.
    pub next_in_ms: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_the_wire() {
        let secret = Secret::new().unwrap();
        let token = ClaimToken::new(Uuid::now_v7(), secret, 30, Instant::from_micros(1_700_000_000), true);
        let read = ClaimToken::parse(&token.encode()).unwrap();
        assert_eq!(read.run_id, token.run_id);
        assert_eq!(read.digest(), token.digest());
        assert_eq!(read.lease_seconds, 30);
        assert_eq!(read.was_available_at, token.was_available_at);
        assert!(read.first_claim);
        assert_eq!(token.digest().as_str().len(), 22);
        assert!(token.encode().len() <= 128);
    }

    #[test]
    fn garbage_is_no_token() {
        for text in ["", "x", "AAAA", &"A".repeat(62), &"A".repeat(10_000), "not base64 at all!"] {
            assert_eq!(ClaimToken::parse(text).unwrap_err(), Error::TokenInvalid, "{text:.20}");
        }
    }
}
