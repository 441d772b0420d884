//! Claims: a claim gives a worker a run for the time of a lease, and its token proves that.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::{Error, Instant, JsonText, RunId, State, TaskId};

/// Bytes of a token before encoding: version, run id, secret, lease, place in the queue, flags.
const TOKEN_BYTES: usize = 1 + 16 + 16 + 4 + 8 + 1;
const TOKEN_VERSION: u8 = 1;
const FLAG_FIRST_CLAIM: u8 = 1;

/// Stored part of a claim: a truncated SHA-256 of its secret, 22 base64url characters. Postgres keeps it behind the
/// worker id.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Digest(String);

impl Digest {
    /// The 22 characters.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The 16 bytes of the digest, in the form in which replicas notify each other of claims.
    pub fn to_uuid(&self) -> Uuid {
        let bytes = URL_SAFE_NO_PAD.decode(&self.0).ok().and_then(|bytes| <[u8; 16]>::try_from(bytes).ok());
        bytes.map_or(Uuid::nil(), Uuid::from_bytes)
    }
}

/// Random part of a token, 16 bytes. It is never stored and never logged.
#[derive(Clone, Copy)]
pub struct Secret([u8; 16]);

impl Secret {
    /// Draws a new secret from the system's random source.
    pub fn new() -> Result<Self, Error> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(|error| Error::Internal(error.to_string()))?;
        Ok(Self(bytes))
    }

    /// The digest that Postgres stores.
    pub fn digest(&self) -> Digest {
        Digest(URL_SAFE_NO_PAD.encode(&Sha256::digest(self.0)[..16]))
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Claim token: proof of a claim. It carries everything that any replica needs to extend or release the claim.
#[derive(Debug, Clone)]
pub struct ClaimToken {
    /// Run that is claimed.
    pub run_id: RunId,
    secret: Secret,
    /// Lease of the claim in seconds; 0 never expires.
    pub lease_seconds: u32,
    /// Place of the run in the queue before the claim.
    pub was_available_at: Instant,
    /// Whether this claim was the first of its task.
    pub first_claim: bool,
}

impl ClaimToken {
    /// Makes the token of a new claim.
    pub fn new(
        run_id: RunId,
        secret: Secret,
        lease_seconds: u32,
        was_available_at: Instant,
        first_claim: bool,
    ) -> Self {
        Self { run_id, secret, lease_seconds, was_available_at, first_claim }
    }

    /// Parses a token. Any malformed text fails with [`Error::TokenInvalid`].
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

    /// Encodes the token as base64url.
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

    /// The digest that Postgres stores.
    pub fn digest(&self) -> Digest {
        self.secret.digest()
    }
}

/// A claimed run, with everything that its worker needs.
#[derive(Debug, Clone)]
pub struct Claim {
    /// Token that proves the claim.
    pub token: ClaimToken,
    /// Run that is claimed.
    pub run_id: RunId,
    /// Task of the run.
    pub task_id: TaskId,
    /// Number of the attempt, counted from 1.
    pub attempt: i32,
    /// Name of the handler.
    pub task_name: String,
    /// Input of the task.
    pub params: JsonText,
    /// Retry strategy in its stored form.
    pub retry_strategy: Option<JsonText>,
    /// Upper bound of attempts; `None` means no limit.
    pub max_attempts: Option<i32>,
    /// Headers in their stored form; JSON null means none.
    pub headers: Option<JsonText>,
    /// Event for which the run waited.
    pub wake_event: Option<String>,
    /// Payload of that event.
    pub event_payload: Option<JsonText>,
    /// End of the lease; `None` means never.
    pub claim_expires_at: Option<Instant>,
    /// Whether an earlier claim of the task may have left checkpoints.
    pub resumed: bool,
    /// Checkpoints visible to the run, oldest first.
    pub checkpoints: Vec<Checkpoint>,
    /// Whether `checkpoints` holds all of them.
    pub checkpoints_complete: bool,
    /// Whether the params are left out of the message, for lack of room.
    pub params_omitted: bool,
}

/// Bytes reserved for ids, token, times and field tags of a task message.
const MESSAGE_OVERHEAD: usize = 1024;

impl Claim {
    /// Upper bound of the size of the encoded message, in bytes.
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

/// Stored result of a step.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// Name of the step.
    pub name: String,
    /// Result of the step; `None` is SQL NULL.
    pub state: Option<JsonText>,
    /// Run that wrote the checkpoint.
    pub owner_run_id: Option<RunId>,
    /// Time of the newest write.
    pub updated_at: Instant,
}

impl Checkpoint {
    fn message_bytes(&self) -> usize {
        128 + self.name.len() + self.state.as_ref().map_or(0, JsonText::len)
    }
}

/// Current standing of a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The claim holds.
    Held,
    /// Another claim owns the run, or the run left this claim.
    Lost,
    /// The run failed with `$ClaimTimeout`, usually because its lease expired.
    Expired,
    /// The task was cancelled.
    Cancelled,
    /// This claim has already completed or failed the run.
    Finished,
    /// The token is malformed, or its run or queue does not exist.
    Invalid,
    /// The state could not be determined in time. Ask again.
    Busy,
    /// The claim was released.
    Released,
}

/// Outcome of one write of a batch about runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Settled {
    /// Task of the run.
    pub task_id: TaskId,
    /// Whether an earlier call had done the write already.
    pub replayed: bool,
    /// End of the lease after an extension or a checkpoint; `None` means never.
    pub claim_expires_at: Option<Instant>,
    /// Whether the checkpoint was stored. One of a later attempt is kept.
    pub applied: bool,
    /// State of the task after a failure.
    pub failed: Option<Failed>,
}

/// State of a task after one of its runs failed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Failed {
    /// New state of the task.
    pub task_state: State,
    /// Next attempt: its run, its number, and the time at which it can be claimed. `None` if there is none.
    pub next: Option<(RunId, i32, Instant)>,
    /// Milliseconds until then by the database's clock; 0 for a repeated call.
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
