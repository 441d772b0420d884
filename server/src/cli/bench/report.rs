//! The result of a measurement: rates, and distributions of times (`HdrHistogram`, three digits). Two results can be
//! compared as JSON.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use hdrhistogram::Histogram;
use serde_json::{Map, Value};

use crate::cli::output::{self, Output, out};

/// Distribution of times, in microseconds.
#[derive(Debug)]
pub(super) struct Times(Histogram<u64>);

impl Default for Times {
    fn default() -> Self {
        // With two digits, differences of 1 % would not show. The range grows as needed.
        Self(Histogram::new(3).unwrap_or_else(|_| unreachable!("three digits are allowed")))
    }
}

impl Times {
    pub(super) fn note(&mut self, took: Duration) {
        // Capped at an hour, so that a broken clock does not exhaust the memory.
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).min(3_600_000_000);
        let _ = self.0.record(micros);
    }

    fn figures(&self) -> [(&'static str, f64); 4] {
        let at = |quantile: f64| Duration::from_micros(self.0.value_at_quantile(quantile)).as_secs_f64() * 1e3;
        [("p50_ms", at(0.5)), ("p90_ms", at(0.9)), ("p99_ms", at(0.99)), ("max_ms", at(1.0))]
    }
}

/// The result of one measurement.
#[derive(Debug)]
pub(super) struct Report {
    name: &'static str,
    rates: Vec<(&'static str, f64)>,
    times: Vec<(String, Times)>,
}

impl Report {
    pub(super) fn new(name: &'static str) -> Self {
        Self { name, rates: Vec::new(), times: Vec::new() }
    }

    pub(super) fn rate(mut self, what: &'static str, value: f64) -> Self {
        self.rates.push((what, value));
        self
    }

    pub(super) fn times(mut self, what: &str, times: Times) -> Self {
        self.times.push((what.to_owned(), times));
        self
    }

    fn json(&self) -> Value {
        let mut figures: Map<String, Value> =
            self.rates.iter().map(|(what, value)| ((*what).to_owned(), (*value).into())).collect();
        for (what, times) in &self.times {
            let mut object: Map<String, Value> =
                times.figures().iter().map(|(name, value)| ((*name).to_owned(), (*value).into())).collect();
            object.insert("samples".into(), times.0.len().into());
            figures.insert(what.clone(), object.into());
        }
        Map::from_iter([(self.name.to_owned(), figures.into())]).into()
    }

    pub(super) fn print(&self, how: Output) {
        if how == Output::Json {
            return output::json(&self.json());
        }
        let rates: Vec<(&str, String)> = self.rates.iter().map(|(what, value)| (*what, figure(*value))).collect();
        output::record(&rates);
        let rows: Vec<Vec<String>> = self
            .times
            .iter()
            .map(|(what, times)| {
                let cells = times.figures().map(|(_, value)| format!("{value:.2}"));
                [what.clone()].into_iter().chain(cells).chain([times.0.len().to_string()]).collect()
            })
            .collect();
        out!("");
        output::table(&["", "p50 ms", "p90 ms", "p99 ms", "max ms", "samples"], &rows);
    }
}

/// A figure with no decimals from 100 on, else with three.
fn figure(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.3}") }
}

/// Flags of `compare`.
#[derive(Debug, Args)]
pub(in crate::cli) struct CompareArgs {
    /// A result, as `-o json` printed it
    before: PathBuf,
    /// Another one
    after: PathBuf,
    /// How to print
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
}

/// Prints the figures that two results share, with their ratio.
pub(super) fn compare(args: &CompareArgs) -> anyhow::Result<()> {
    let (before, after) = (read(&args.before)?, read(&args.after)?);
    let mut rows = Vec::new();
    let mut ratios = Map::new();
    for (name, one) in &before {
        let Some((_, two)) = after.iter().find(|(known, _)| known == name) else { continue };
        let ratio = two / one;
        rows.push(vec![name.clone(), figure(*one), figure(*two), format!("{ratio:.2}")]);
        ratios.insert(name.clone(), serde_json::json!({"before": one, "after": two, "ratio": ratio}));
    }
    anyhow::ensure!(!rows.is_empty(), "the two results have no figure in common");
    match args.output {
        Output::Table => output::table(&["", "before", "after", "ratio"], &rows),
        Output::Json => output::json(&ratios.into()),
    }
    Ok(())
}

/// All figures of a result by their paths, such as `drain.complete.p50_ms`.
fn read(path: &Path) -> anyhow::Result<Vec<(String, f64)>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let value: Value = serde_json::from_str(&text)
        .with_context(|| format!("{} is no result of `absurd bench ... -o json`", path.display()))?;
    let mut figures = Vec::new();
    flatten("", &value, &mut figures);
    Ok(figures)
}

fn flatten(path: &str, value: &Value, figures: &mut Vec<(String, f64)>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                flatten(&path, value, figures);
            }
        }
        other => figures.extend(other.as_f64().map(|figure| (path.to_owned(), figure))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_compared_by_path() {
        let mut times = Times::default();
        (1..=100).for_each(|ms| times.note(Duration::from_millis(ms)));
        let report = Report::new("drain").rate("tasks_per_s", 1234.5).times("complete", times).json();
        let mut figures = Vec::new();
        flatten("", &report, &mut figures);
        let find = |name: &str| figures.iter().find(|(known, _)| known == name).map(|(_, figure)| *figure);
        assert_eq!(find("drain.tasks_per_s"), Some(1234.5));
        let p50 = find("drain.complete.p50_ms").unwrap();
        assert!((49.9..50.1).contains(&p50), "{p50}");
        assert_eq!(find("drain.complete.samples"), Some(100.0));
    }
}
