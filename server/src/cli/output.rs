//! Prints the output of commands: tables for people, JSON for programs. Every line of every command is written here, so
//! that a closed pipe or a full disk never makes a command panic.

use std::fmt::{self, Write as _};
use std::io::{self, ErrorKind, IsTerminal as _, Write as _};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Context as _;

/// Format of a command's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Output {
    /// Aligned columns.
    Table,
    /// One JSON value.
    Json,
}

/// Prints a line to standard output, with the syntax of `println!`.
macro_rules! out {
    ($($text:tt)*) => { $crate::cli::output::line(format_args!($($text)*)) };
}
/// Prints a line to standard error, with the syntax of `eprintln!`.
macro_rules! note {
    ($($text:tt)*) => { $crate::cli::output::remark(format_args!($($text)*)) };
}
pub(super) use {note, out};

/// The first failed write to standard output. Later lines are dropped, and the command runs to its end.
static FAILURE: Mutex<Option<io::Error>> = Mutex::new(None);

fn failure() -> MutexGuard<'static, Option<io::Error>> {
    FAILURE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Prints a line to standard output.
pub(super) fn line(text: fmt::Arguments<'_>) {
    let mut failure = failure();
    if failure.is_none() {
        *failure = writeln!(io::stdout().lock(), "{text}").err();
    }
}

/// Prints a line to standard error; ignores a failure, because there is no other place to report it.
pub(super) fn remark(text: fmt::Arguments<'_>) {
    let _ = io::stderr().write_all(format!("{text}\n").as_bytes());
}

/// Whether a write to standard output has failed.
pub(super) fn is_closed() -> bool {
    failure().is_some()
}

/// Flushes standard output. A closed pipe is no error, because the reader chose to stop; any other failure is.
pub(super) fn finish() -> anyhow::Result<()> {
    let failed = failure().take();
    match failed.map_or_else(|| io::stdout().flush(), Err) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error).context("cannot write to standard output"),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Asks a question on the terminal; only `y` or `Y` confirms. Fails without a terminal.
pub(super) fn confirm(question: &str) -> anyhow::Result<bool> {
    anyhow::ensure!(io::stdin().is_terminal(), "this cannot be undone: say --yes");
    let _ = io::stderr().write_all(format!("{question} [y/N] ").as_bytes());
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    Ok(answer.trim().eq_ignore_ascii_case("y"))
}

/// Whether standard error gets colours: if it is a terminal or `CLICOLOR_FORCE` is set, unless `NO_COLOR` is set.
pub(super) fn has_colours() -> bool {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty() && value != "0");
    if std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()) {
        return false;
    }
    set("CLICOLOR_FORCE") || io::stderr().is_terminal()
}

/// Prints rows in aligned columns, below a head.
pub(super) fn table(head: &[&str], rows: &[Vec<String>]) {
    let head = head.iter().map(|cell| (*cell).to_owned()).collect();
    self::rows(&[&[head], rows].concat());
}

/// Prints rows in aligned columns.
pub(super) fn rows(rows: &[Vec<String>]) {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    for row in rows {
        let mut text = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(text, "{cell:width$}  ");
        }
        out!("{}", text.trim_end());
    }
}

/// Prints names and values in two columns.
pub(super) fn record(fields: &[(&str, String)]) {
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, value) in fields {
        out!("{}", format!("{name:width$}  {value}").trim_end());
    }
}

/// Prints a JSON value, indented.
pub(super) fn json(value: &serde_json::Value) {
    out!("{value:#}");
}

/// A time in RFC 3339; empty for `None`.
pub(super) fn time(at: Option<std::time::SystemTime>) -> String {
    at.map(|at| humantime::format_rfc3339_millis(at).to_string()).unwrap_or_default()
}

/// A time in RFC 3339; null for `None`.
pub(super) fn json_time(at: Option<std::time::SystemTime>) -> serde_json::Value {
    at.map_or(serde_json::Value::Null, |at| time(Some(at)).into())
}

/// A JSON text as a value, for embedding; a text that does not parse stays text.
pub(super) fn value(json: Option<&absurd_client::Json>) -> serde_json::Value {
    json.map_or(serde_json::Value::Null, |json| json.to().unwrap_or_else(|_| json.as_str().into()))
}

/// A span for people: at most two units, coarser for longer spans.
pub(super) fn span(span: std::time::Duration) -> String {
    let (millis, seconds) = (span.as_millis(), span.as_secs());
    match seconds {
        0 => format!("{millis} ms"),
        1..10 => format!("{:.1} s", span.as_secs_f64()),
        10..60 => format!("{seconds} s"),
        60..3600 => format!("{}m {:02}s", seconds / 60, seconds % 60),
        3600..86400 => format!("{}h {:02}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d {:02}h", seconds / 86400, seconds % 86400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_span_is_as_fine_as_it_matters() {
        let said = [0, 999, 1_000, 9_940, 59_999, 60_000, 627_751, 3_600_000, 90_000_000]
            .map(|millis| span(Duration::from_millis(millis)));
        let expected = ["0 ms", "999 ms", "1.0 s", "9.9 s", "59 s", "1m 00s", "10m 27s", "1h 00m", "1d 01h"];
        assert_eq!(said, expected);
    }
}
