//! Names and ids. Each is parsed once, when a request arrives, and needs no check afterwards.

use std::fmt;
use std::sync::Arc;

use uuid::Uuid;

use super::Error;

/// Longest queue name in bytes: the 63 bytes of a Postgres name, less the longest prefix (`t_`) and suffix (`_sai`).
pub const QUEUE_NAME_BYTES_MAX: usize = 57;
/// Longest task name in bytes.
pub const TASK_NAME_BYTES_MAX: usize = 512;
/// Longest checkpoint name in bytes; it is part of an index key.
pub const CHECKPOINT_NAME_BYTES_MAX: usize = 1024;
/// Longest event name in bytes. A checkpoint's name has room for it with `$awaitEvent:` and a number around it.
pub const EVENT_NAME_BYTES_MAX: usize = 512;
/// Longest idempotency key in bytes; it is an index key.
pub const IDEMPOTENCY_KEY_BYTES_MAX: usize = 1024;
/// Longest worker id in bytes.
pub const WORKER_ID_BYTES_MAX: usize = 200;
/// Longest session id in bytes.
pub const SESSION_ID_BYTES_MAX: usize = 64;

/// Checks that a text has at most `max` bytes and no NUL. `field` is named in the error.
pub fn bounded(field: &str, value: &str, max: usize) -> Result<(), Error> {
    if value.len() > max {
        return Err(Error::invalid(field, format!("{} bytes, at most {max} are allowed", value.len())));
    }
    if value.contains('\0') {
        return Err(Error::invalid(field, "must not contain the character U+0000"));
    }
    Ok(())
}

/// Name of a queue: 1 to 57 bytes, any characters but NUL.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueueName(Arc<str>);

impl QueueName {
    /// Parses a queue name. `field` is named in the error.
    pub fn parse(field: &str, name: &str) -> Result<Self, Error> {
        if name.is_empty() {
            return Err(Error::invalid(field, "must not be empty"));
        }
        bounded(field, name, QUEUE_NAME_BYTES_MAX)?;
        Ok(Self(name.into()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for QueueName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for QueueName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $max:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash)]
        pub struct $type(String);

        impl $type {
            /// Parses a name, which must not be empty or only spaces. `field` is named in the error.
            pub fn parse(field: &str, name: &str) -> Result<Self, Error> {
                if name.trim_matches(' ').is_empty() {
                    return Err(Error::invalid(field, "must not be blank"));
                }
                bounded(field, name, $max)?;
                Ok(Self(name.to_owned()))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
    };
}

name!(
    /// Name of a task's handler, at most 512 bytes.
    TaskName,
    TASK_NAME_BYTES_MAX
);
name!(
    /// Name of an event, at most 512 bytes.
    EventName,
    EVENT_NAME_BYTES_MAX
);
name!(
    /// Name of a checkpoint, at most 1,024 bytes.
    CheckpointName,
    CHECKPOINT_NAME_BYTES_MAX
);

/// Id that a worker chooses for itself. It is neither unique nor trusted.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct WorkerId(Arc<str>);

impl WorkerId {
    /// Parses an id. An empty one becomes `worker`, as in the contract's claim function.
    pub fn parse(field: &str, id: &str) -> Result<Self, Error> {
        bounded(field, id, WORKER_ID_BYTES_MAX)?;
        Ok(Self(if id.is_empty() { "worker".into() } else { id.into() }))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Id of a worker process, unchanged across its reconnects.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SessionId(Arc<str>);

impl SessionId {
    /// Parses an id. An empty one becomes a new random id.
    pub fn parse(field: &str, id: &str) -> Result<Self, Error> {
        bounded(field, id, SESSION_ID_BYTES_MAX)?;
        Ok(Self(if id.is_empty() { Uuid::new_v4().to_string().into() } else { id.into() }))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Checks an idempotency key. The empty key is valid.
pub fn parse_idempotency_key(field: &str, key: &str) -> Result<String, Error> {
    bounded(field, key, IDEMPOTENCY_KEY_BYTES_MAX)?;
    Ok(key.to_owned())
}

/// Id of a task: a UUID, unique within its queue.
pub type TaskId = Uuid;
/// Id of a run: a UUID, unique within its queue.
pub type RunId = Uuid;

/// Parses a UUID in its canonical form of 36 characters.
pub fn parse_uuid(field: &str, id: &str) -> Result<Uuid, Error> {
    if id.len() != 36 {
        return Err(Error::invalid(field, "must be a UUID such as 0190f4c8-5d1a-7c3e-9b1a-2f60c1d5e8aa"));
    }
    Uuid::try_parse(id).map_err(|error| Error::invalid(field, error.to_string()))
}

/// Fewest hexadecimal digits that a search by id accepts.
const ID_DIGITS_MIN: usize = 6;
/// Hexadecimal digits of a complete id.
const ID_DIGITS: usize = 32;

/// Beginning or end of an id, or a complete id, for a search.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdPart(String);

impl IdPart {
    /// Parses 6 to 32 hexadecimal digits. Dashes and letter case do not matter.
    pub fn parse(field: &str, text: &str) -> Result<Self, Error> {
        let digits: String = text.chars().filter(|c| *c != '-').map(|c| c.to_ascii_lowercase()).collect();
        if !digits.chars().all(|c| c.is_ascii_hexdigit()) {
            return Err(Error::invalid(field, "must be hexadecimal digits of an id, with or without dashes"));
        }
        if !(ID_DIGITS_MIN..=ID_DIGITS).contains(&digits.len()) {
            let problem = format!("must be {ID_DIGITS_MIN} to {ID_DIGITS} hexadecimal digits, not {}", digits.len());
            return Err(Error::invalid(field, problem));
        }
        Ok(Self(digits))
    }

    /// First and last id that begin with these digits.
    pub fn range(&self) -> (Uuid, Uuid) {
        let padded = |digit: char| {
            let text: String = self.0.chars().chain(std::iter::repeat(digit)).take(ID_DIGITS).collect();
            Uuid::try_parse(&text).unwrap_or_default()
        };
        (padded('0'), padded('f'))
    }

    /// The id, if all its digits are given.
    pub fn whole(&self) -> Option<Uuid> {
        (self.0.len() == ID_DIGITS).then(|| self.range().0)
    }

    /// Digits with which an id may end; `None` for a complete id.
    pub fn end(&self) -> Option<&str> {
        (self.0.len() < ID_DIGITS).then_some(self.0.as_str())
    }
}

/// State of a task or a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// Waits to be claimed.
    Pending,
    /// Claimed by a worker.
    Running,
    /// Waits for a time or an event.
    Sleeping,
    /// Ended with a result.
    Completed,
    /// Ended with a failure.
    Failed,
    /// Cancelled by a caller or by its cancellation policy.
    Cancelled,
}

impl State {
    /// Stored form of the state.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Sleeping => "sleeping",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Parses the stored form. A check constraint admits no other text.
    pub fn from_stored(text: &str) -> Option<Self> {
        Some(match text {
            "pending" => Self::Pending,
            "running" => Self::Running,
            "sleeping" => Self::Sleeping,
            "completed" => Self::Completed,
            "failed" => Self::Failed,
            "cancelled" => Self::Cancelled,
            _ => return None,
        })
    }

    /// Whether the state is final.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_an_id_is_a_range_an_end_or_an_id() {
        let part = IdPart::parse("text", "0190F4-c8").unwrap();
        let (from, to) = part.range();
        assert_eq!(from.to_string(), "0190f4c8-0000-0000-0000-000000000000");
        assert_eq!(to.to_string(), "0190f4c8-ffff-ffff-ffff-ffffffffffff");
        assert_eq!((part.whole(), part.end()), (None, Some("0190f4c8")));
        let id = Uuid::now_v7();
        let whole = IdPart::parse("text", &id.to_string()).unwrap();
        assert_eq!((whole.range(), whole.whole(), whole.end()), ((id, id), Some(id), None));
        for wrong in ["", "-", "0190f", "0190fg", "0190f4 ", "\0\0\0\0\0\0", &"0".repeat(33)] {
            assert!(IdPart::parse("text", wrong).is_err(), "{wrong:?}");
        }
    }
}
