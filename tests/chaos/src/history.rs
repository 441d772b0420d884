//! The clients' book: what each process asked for and heard, a line each, written before the call and after the answer.
//!
//! A process that is killed leaves a call without an end: its outcome is unknown. All processes of a run share one machine
//! and so one clock; times are microseconds since 1970.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use absurd_client::{Error, Reason};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// What every process of the load is told.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Who {
    /// URLs of the replicas, with commas between
    #[arg(long)]
    pub urls: String,
    /// Its book
    #[arg(long)]
    pub history: PathBuf,
    /// Its name, which no other process of the run has
    #[arg(long)]
    pub name: String,
}

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Op {
    Spawn,
    Cancel,
    Emit,
    Step,
    Complete,
    Fail,
    Release,
    Sleep,
    Await,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum How {
    /// Acknowledged.
    Ok,
    /// Refused, and asked only once: it has had no effect.
    No,
    /// Refused by the last of several tries: an earlier one may have had its effect.
    Over,
    /// Nobody can tell.
    Info,
}

/// A call, as it begins.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Call {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// Of the step, the event or the idempotency key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What is to be stored; unique, so that who reads it knows who wrote it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// Attempts that a spawn allows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_attempts: Option<i32>,
}

/// One line.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "k", rename_all = "snake_case")]
pub(crate) enum Line {
    /// A call begins.
    Begin {
        n: u64,
        t: i64,
        op: Op,
        #[serde(flatten)]
        call: Call,
    },
    /// A call ends.
    End {
        n: u64,
        t: i64,
        how: How,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        why: Option<String>,
        /// What was read: a payload, or the id of the task that a key stands for.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        value: Option<String>,
        /// Whether the call made the task, or emitted the event.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        first: Option<bool>,
    },
    /// A task arrived at a worker.
    Delivered {
        t: i64,
        /// Stream on which it came, where the worker sees streams.
        #[serde(default)]
        stream: u64,
        task: Uuid,
        run: Uuid,
        token: String,
        attempt: i32,
        params: String,
        /// Steps that came along.
        steps: Vec<(String, String)>,
        /// Whether all of them came along.
        complete: bool,
        /// Payload of the event that woke it: event, payload.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        woken: Option<(String, String)>,
    },
    /// Something about a stream: `opened` with its credit, `ending`, `closed`.
    Stream {
        t: i64,
        stream: u64,
        what: String,
        #[serde(default)]
        credit: u32,
    },
}

/// Now, in microseconds.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

/// The book of one process.
#[derive(Debug)]
pub(crate) struct History {
    file: File,
    next: AtomicU64,
}

impl History {
    /// Opens a new book.
    pub(crate) fn create(path: &Path) -> anyhow::Result<Self> {
        Ok(Self { file: File::options().create(true).append(true).open(path)?, next: AtomicU64::new(0) })
    }

    /// Writes a line, in one piece: what is killed later has written it.
    pub(crate) fn write(&self, line: &Line) {
        let mut text = serde_json::to_vec(line).unwrap_or_default();
        text.push(b'\n');
        if let Err(error) = (&self.file).write_all(&text) {
            eprintln!("chaos: the history cannot be written: {error}");
            std::process::exit(3);
        }
    }

    /// A call begins; its number.
    pub(crate) fn begin(&self, op: Op, call: Call) -> u64 {
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        self.write(&Line::Begin { n, t: now(), op, call });
        n
    }

    /// A call ended well.
    pub(crate) fn ok(&self, n: u64, value: Option<String>, first: Option<bool>) {
        self.write(&Line::End { n, t: now(), how: How::Ok, why: None, value, first });
    }

    /// A call failed. Our client has tried several times.
    pub(crate) fn failed(&self, n: u64, error: &Error) {
        let why = Some(error.reason().as_str().to_owned());
        self.write(&Line::End { n, t: now(), how: how(error), why, value: None, first: None });
    }
}

fn how(error: &Error) -> How {
    match error.reason() {
        Reason::Transport
        | Reason::Unavailable
        | Reason::DatabaseBusy
        | Reason::QueueLocked
        | Reason::ShuttingDown
        | Reason::DeadlineExceeded
        | Reason::OutcomeUnknown
        | Reason::Internal
        | Reason::Other => How::Info,
        _ => How::Over,
    }
}
