//! Conversions between wire messages and the types of this crate: ids, times, states, and texts that are read in parts.

use std::time::{Duration, SystemTime};

use absurd_proto::v1 as pb;
use uuid::Uuid;

use crate::{Error, Json, Reason};

/// Code points in one part of a long text: the largest part that the server returns.
const PART: i32 = 1_000_000;

pub(crate) fn id(text: &str) -> Result<Uuid, Error> {
    Uuid::try_parse(text).map_err(|_| unclear())
}

pub(crate) fn maybe_id(text: Option<String>) -> Result<Option<Uuid>, Error> {
    text.map(|text| id(&text)).transpose()
}

pub(crate) fn unclear() -> Error {
    Error::new(Reason::Other, tonic::Code::Internal, "the server's answer lacks a field that it must have")
}

pub(crate) fn duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    }
}

pub(crate) fn span(duration: Option<&prost_types::Duration>) -> Option<Duration> {
    let duration = duration?;
    Some(Duration::new(u64::try_from(duration.seconds).ok()?, u32::try_from(duration.nanos).ok()?))
}

pub(crate) fn time(at: Option<prost_types::Timestamp>) -> Option<SystemTime> {
    at?.try_into().ok()
}

/// A text that did not fit into one answer and is read in parts.
#[derive(Debug)]
pub(crate) struct Parts {
    length: i64,
    text: String,
    read: i64,
}

impl Parts {
    pub(crate) fn of(length: i64) -> Self {
        Self { length, text: String::new(), read: 0 }
    }

    /// The next range to request; `None` when the text is complete.
    pub(crate) fn wanted(&self) -> Option<pb::TextRange> {
        let offset = i32::try_from(self.read).ok().filter(|_| self.read < self.length)?;
        Some(pb::TextRange { offset, limit: PART })
    }

    /// Appends a part. An empty part is an error, because it would be requested again forever.
    pub(crate) fn push(&mut self, part: Option<pb::Json>) -> Result<(), Error> {
        let part = part.filter(|part| !part.text.is_empty()).ok_or_else(unclear)?;
        self.read += i64::try_from(part.text.chars().count()).unwrap_or(i64::MAX);
        self.text.push_str(&part.text);
        Ok(())
    }

    pub(crate) fn whole(self) -> Json {
        Json::from_text(self.text)
    }
}

/// One page of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<T> {
    /// Items of the page, in the order of the list.
    pub items: Vec<T>,
    /// Requests the next page; empty on the last page.
    pub next_page_token: String,
}

/// State of a task or run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// Waiting to be claimed.
    Pending,
    /// Held by a worker.
    Running,
    /// Waiting for a time or an event.
    Sleeping,
    /// Ended with a result.
    Completed,
    /// Run: the attempt failed. Task: its last attempt failed, and no further one follows.
    Failed,
    /// Cancelled by a call or by a cancellation rule.
    Cancelled,
}

impl State {
    /// Whether the task or run has ended: completed, failed or cancelled.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }

    /// Name of the state in the database, in lower case.
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

    pub(crate) fn from_wire(state: i32) -> Option<Self> {
        match pb::State::try_from(state).ok()? {
            pb::State::Unspecified => None,
            pb::State::Pending => Some(Self::Pending),
            pb::State::Running => Some(Self::Running),
            pb::State::Sleeping => Some(Self::Sleeping),
            pb::State::Completed => Some(Self::Completed),
            pb::State::Failed => Some(Self::Failed),
            pb::State::Cancelled => Some(Self::Cancelled),
        }
    }

    pub(crate) fn to_wire(self) -> pb::State {
        match self {
            Self::Pending => pb::State::Pending,
            Self::Running => pb::State::Running,
            Self::Sleeping => pb::State::Sleeping,
            Self::Completed => pb::State::Completed,
            Self::Failed => pb::State::Failed,
            Self::Cancelled => pb::State::Cancelled,
        }
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_is_asked_for_until_it_is_whole() {
        let part = |text: &str| Some(pb::Json { text: text.into() });
        let mut parts = Parts::of(4);
        assert_eq!(parts.wanted().map(|range| range.offset), Some(0));
        parts.push(part("[\u{e9}")).expect("a part");
        assert_eq!(parts.wanted().map(|range| range.offset), Some(2), "code points are counted, not bytes");
        parts.push(part("1]")).expect("a part");
        assert_eq!(parts.wanted(), None);
        assert_eq!(parts.whole().as_str(), "[\u{e9}1]");
        assert!(Parts::of(3).push(part("")).is_err(), "an empty part would be asked for for ever");
    }

    /// A text that lacks one code point is not complete yet.
    #[test]
    fn the_last_code_point_of_a_long_text_is_asked_for() {
        let part = |text: &str| Some(pb::Json { text: text.into() });
        let mut parts = Parts::of(3);
        parts.push(part("\"x")).expect("a part");
        assert_eq!(parts.wanted().map(|range| range.offset), Some(2));
        parts.push(part("\"")).expect("a part");
        assert_eq!(parts.wanted(), None);
    }
}
