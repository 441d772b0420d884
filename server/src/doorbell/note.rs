//! The messages that replicas and direct SQL writers send over NOTIFY. Anyone may notify, so a payload that does not
//! parse is ignored.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use uuid::Uuid;

use crate::domain::{QueueName, RunId, SessionId};

/// Ids per note: 6,400 bytes in base64. Postgres limits a payload to less than 8,000 bytes.
const IDS_MAX: usize = 300;

/// The payload of a notification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    /// A queue may have new work.
    Rung(QueueName),
    /// A session wants no more tasks.
    Drain(QueueName, SessionId),
    /// Runs that left their claims.
    Left(Vec<RunId>),
    /// Runs for which a worker showed a sign of life.
    Alive(Vec<RunId>),
    /// Claims ended while their runs go on: run, and digest of the claim.
    ClaimsLeft(Vec<(RunId, Uuid)>),
}

impl Note {
    /// Splits runs that left their claims into notes of at most `IDS_MAX` ids.
    pub fn left(runs: &[RunId]) -> impl Iterator<Item = Self> {
        runs.chunks(IDS_MAX).map(|runs| Self::Left(runs.to_vec()))
    }

    /// Splits runs that showed a sign of life into notes of at most `IDS_MAX` ids.
    pub fn alive(runs: &[RunId]) -> impl Iterator<Item = Self> {
        runs.chunks(IDS_MAX).map(|runs| Self::Alive(runs.to_vec()))
    }

    /// Splits ended claims into notes of at most `IDS_MAX` ids; a claim takes two.
    pub fn claims_left(claims: &[(RunId, Uuid)]) -> impl Iterator<Item = Self> {
        claims.chunks(IDS_MAX / 2).map(|claims| Self::ClaimsLeft(claims.to_vec()))
    }

    /// Parses a payload; None: it is no note of this server.
    pub fn parse(payload: &str) -> Option<Self> {
        let (kind, rest) = payload.split_at_checked(1)?;
        match kind {
            "q" => QueueName::parse("queue", rest).ok().map(Self::Rung),
            "d" => {
                let [queue, session]: [String; 2] = serde_json::from_str(rest).ok()?;
                let queue = QueueName::parse("queue", &queue).ok()?;
                Some(Self::Drain(queue, SessionId::parse("session_id", &session).ok()?))
            }
            "c" => decode(rest).map(Self::Left),
            "a" => decode(rest).map(Self::Alive),
            "l" => {
                let ids = decode(rest)?;
                Some(Self::ClaimsLeft(ids.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect()))
            }
            _ => None,
        }
    }

    /// The payload; [`Self::parse`] reads it back.
    pub fn encode(&self) -> String {
        match self {
            Self::Rung(queue) => format!("q{}", queue.as_str()),
            Self::Drain(queue, session) => format!("d{}", serde_json::json!([queue.as_str(), session.as_str()])),
            Self::Left(runs) => format!("c{}", encode(runs)),
            Self::Alive(runs) => format!("a{}", encode(runs)),
            Self::ClaimsLeft(claims) => {
                let ids: Vec<Uuid> = claims.iter().flat_map(|(run, digest)| [*run, *digest]).collect();
                format!("l{}", encode(&ids))
            }
        }
    }
}

fn encode(ids: &[Uuid]) -> String {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| *id.as_bytes()).collect();
    URL_SAFE_NO_PAD.encode(bytes)
}

fn decode(text: &str) -> Option<Vec<Uuid>> {
    let bytes = URL_SAFE_NO_PAD.decode(text).ok()?;
    bytes.chunks(16).map(|chunk| Uuid::from_slice(chunk).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_fit_into_a_notification_and_come_back() {
        let ids: Vec<Uuid> = (0..2 * IDS_MAX).map(|_| Uuid::new_v4()).collect();
        let claims: Vec<(Uuid, Uuid)> = ids.iter().map(|id| (*id, Uuid::new_v4())).collect();
        let queue = || QueueName::parse("q", "it's \"q\"").unwrap();
        let mut notes = vec![Note::Rung(queue()), Note::Drain(queue(), SessionId::parse("s", "a-b").unwrap())];
        notes.extend(Note::left(&ids).chain(Note::alive(&ids)).chain(Note::claims_left(&claims)));
        assert_eq!(notes.len(), 2 + 2 + 2 + 4);
        for note in notes {
            let text = note.encode();
            assert!(text.len() < 8000, "{}", text.len());
            assert_eq!(Note::parse(&text), Some(note));
        }
        for nobodys in ["", "x", "é", "q", "d[]", "cAAAA", "l@@@"] {
            assert_eq!(Note::parse(nobodys), None, "{nobodys}");
        }
    }
}
