//! How commands print: tables for people, JSON for programs.

use std::fmt::Write as _;

/// Format of a command's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Output {
    /// Aligned columns.
    Table,
    /// One JSON value.
    Json,
}

/// Prints rows under a head.
pub(super) fn table(head: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([head[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (cell, width) in cells.zip(&widths) {
            let _ = write!(text, "{cell:width$}  ");
        }
        println!("{}", text.trim_end());
    };
    line(&mut head.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
}

/// Prints names with values.
pub(super) fn record(fields: &[(&str, String)]) {
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, value) in fields {
        println!("{name:width$}  {value}");
    }
}

/// Prints a JSON value.
pub(super) fn json(value: &serde_json::Value) {
    println!("{value:#}");
}

/// A time as RFC 3339, or nothing.
pub(super) fn time(at: Option<std::time::SystemTime>) -> String {
    at.map(|at| humantime::format_rfc3339_millis(at).to_string()).unwrap_or_default()
}

/// A JSON text as a value, for embedding; what does not parse stays text.
pub(super) fn value(json: Option<&absurd_client::Json>) -> serde_json::Value {
    json.map_or(serde_json::Value::Null, |json| json.to().unwrap_or_else(|_| json.as_str().into()))
}
