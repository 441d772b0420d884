//! Parses values from the command line: JSON (from an argument, a file or standard input), `key=value`, times, retry
//! strategies.

use std::io::Read as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use absurd_client::{Json, RetryStrategy};
use anyhow::Context as _;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::settings::Span;

/// Characters shown before and after a mistake.
const SHOWN: usize = 40;

/// The text of an argument: `@FILE` reads a file, `-` reads standard input, everything else is the text itself. `what`
/// names the argument in errors.
pub(super) fn text(what: &str, argument: &str) -> anyhow::Result<String> {
    if let Some(path) = argument.strip_prefix('@') {
        anyhow::ensure!(!path.is_empty(), "{what}: no file is named behind the @");
        return std::fs::read_to_string(path).with_context(|| format!("{what}: cannot read {path}"));
    }
    if argument != "-" {
        return Ok(argument.to_owned());
    }
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).with_context(|| format!("{what}: cannot read standard input"))?;
    Ok(text)
}

/// The JSON of an argument, read like [`text`].
pub(super) fn json(what: &str, argument: &str) -> anyhow::Result<Json> {
    let text = text(what, argument)?;
    check(what, &text)?;
    Ok(Json::from_text(text.trim()))
}

/// Checks the syntax of JSON; the error shows the place of the mistake.
fn check(what: &str, text: &str) -> anyhow::Result<()> {
    let Err(error) = serde_json::from_str::<&RawValue>(text) else { return Ok(()) };
    anyhow::bail!("{what}: not valid JSON: {error}\n{}{}", pointed_at(text, &error), hint(text));
}

/// The line with the mistake, and a caret below the mistake.
fn pointed_at(text: &str, error: &serde_json::Error) -> String {
    let line = text.split('\n').nth(error.line().saturating_sub(1)).unwrap_or_default();
    // Columns count bytes, from 1. A mistake at the end of the text has its caret behind the text.
    let bytes = if error.is_eof() { error.column() } else { error.column().saturating_sub(1) };
    let place = line.char_indices().take_while(|(index, _)| *index < bytes).count();
    let skipped = place.saturating_sub(SHOWN);
    let visible = |character: char| if character.is_control() { ' ' } else { character };
    let shown: String = line.chars().skip(skipped).take(2 * SHOWN).map(visible).collect();
    let (before, behind) = (if skipped > 0 { "..." } else { "" }, line.chars().count() > skipped + 2 * SHOWN);
    let caret = " ".repeat(before.len() + place - skipped);
    format!("  {before}{shown}{}\n  {caret}^", if behind { "..." } else { "" })
}

/// A hint for a mistake with a common cause; else empty.
fn hint(text: &str) -> String {
    let trimmed = text.trim();
    if trimmed.is_empty() {
        return "\n  an empty text is not JSON; write null".into();
    }
    if trimmed.len() < 256 && Path::new(trimmed).is_file() {
        return format!("\n  to send what the file holds, write @{trimmed}");
    }
    if trimmed.starts_with('\'') || trimmed.contains("{'") {
        return "\n  JSON has double quotes: '{\"name\":\"world\"}'".into();
    }
    if trimmed.chars().all(|character| character.is_alphanumeric() || " _-./:".contains(character)) {
        return format!("\n  a text stands in double quotes: '\"{trimmed}\"'; fields are easier as -P key=value");
    }
    String::new()
}

/// Builds an object from `key=value` (text) and `key:=value` (JSON). Fails if a key is given twice.
pub(super) fn object(what: &str, pairs: &[String]) -> anyhow::Result<Map<String, Value>> {
    let mut object = Map::new();
    for pair in pairs {
        let (key, value) = pair
            .split_once('=')
            .with_context(|| format!("{what}: {pair:?} has no =; write KEY=TEXT or KEY:=JSON, as in count:=42"))?;
        let (key, value) = match key.strip_suffix(':') {
            Some(key) => {
                check(&format!("{what} {key}"), value)?;
                (key, serde_json::from_str(value)?)
            }
            None => (key, Value::from(value)),
        };
        anyhow::ensure!(!key.is_empty(), "{what}: {pair:?} names no key");
        anyhow::ensure!(object.insert(key.to_owned(), value).is_none(), "{what}: the key {key:?} is given twice");
    }
    Ok(object)
}

/// Parses an RFC 3339 time with an offset, such as `date -Iseconds` prints.
pub(super) fn time(text: &str) -> Result<SystemTime, String> {
    match text.trim().parse::<jiff::Timestamp>() {
        Ok(time) => Ok(time.into()),
        Err(error) => Err(format!("{error}; write it as 2027-01-01T00:00:00Z or 2027-01-01T01:00:00+01:00")),
    }
}

/// A retry strategy in one word.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Retry(pub(super) RetryStrategy);

impl std::str::FromStr for Retry {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is no retry strategy; write none (at once), fixed:10s, exponential:1s, exponential:1s..5m, or \
                 exponential:1s..5mx3 to grow threefold"
            )
        };
        let span = |text: &str| text.trim().parse::<Span>().map(|span| span.0);
        let strategy = match text.split_once(':') {
            None if text == "none" => RetryStrategy::Immediate,
            Some(("fixed", base)) => RetryStrategy::Fixed(span(base)?),
            Some(("exponential", spans)) => {
                let (spans, factor) = match spans.rsplit_once('x') {
                    Some((spans, factor)) => (spans, factor.trim().parse::<f64>().map_err(|_| wrong())?),
                    None => (spans, 2.0),
                };
                let (base, max) = match spans.split_once("..") {
                    Some((base, max)) => (span(base)?, Some(span(max)?)),
                    None => (span(spans)?, None::<Duration>),
                };
                RetryStrategy::Exponential { base, factor, max }
            }
            _ => return Err(wrong()),
        };
        Ok(Self(strategy))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mistake_in_json_is_pointed_at() {
        for (text, shown) in [
            ("{bad", "  {bad\n   ^"),
            ("{", "  {\n   ^"),
            ("[1,\n 2,, 3]", "   2,, 3]\n     ^"),
            ("[\"\u{e9}\u{e9}\" x]", "  [\"\u{e9}\u{e9}\" x]\n        ^"),
            ("", "  \n  ^"),
        ] {
            let error = json("params", text).unwrap_err().to_string();
            assert!(error.starts_with("params: not valid JSON: ") && error.contains(shown), "{error}");
        }
        let long = format!("[{}x]", "1,".repeat(200));
        let error = json("params", &long).unwrap_err().to_string();
        let lines: Vec<&str> = error.lines().collect();
        let caret = lines[2].find('^').unwrap();
        assert_eq!(lines[1].as_bytes()[caret], b'x', "{error}");
        assert!(lines[1].len() < 100, "{error}");
    }

    #[test]
    fn a_usual_mistake_gets_a_hint() {
        let error = |text: &str| json("params", text).unwrap_err().to_string();
        assert!(error("world").contains("'\"world\"'"));
        assert!(error("{'name': 1}").contains("double quotes"));
        assert!(error("  ").contains("write null"));
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(error(file.path().to_str().unwrap()).contains("write @/"));
    }

    #[test]
    fn pairs_make_an_object() {
        let pairs = |pairs: &[&str]| object("-P", &pairs.iter().map(ToString::to_string).collect::<Vec<_>>());
        let made = pairs(&["name=a=b", "count:=42", "deep:={\"x\": [1]}", "empty="]).unwrap();
        let expected = serde_json::json!({"name": "a=b", "count": 42, "deep": {"x": [1]}, "empty": ""});
        assert_eq!(Value::from(made), expected);
        for (wrong, part) in [("name", "no ="), ("=1", "no key"), ("a:=b", "not valid JSON")] {
            assert!(pairs(&[wrong]).unwrap_err().to_string().contains(part), "{wrong}");
        }
        assert!(pairs(&["a=1", "a=2"]).unwrap_err().to_string().contains("twice"));
    }

    #[test]
    fn times_have_offsets() {
        let expected = SystemTime::UNIX_EPOCH + Duration::from_secs(1_577_836_800);
        for text in [
            "2020-01-01T00:00:00Z",
            "2020-01-01T05:30:00+05:30",
            "2019-12-31T19:00:00-05:00",
            "2020-01-01t00:00:00z",
            "2020-01-01 00:00:00.000Z",
            "2020-01-01T00:00:00.000000+00:00",
            "2020-01-01T01:00+01",
        ] {
            assert_eq!(time(text), Ok(expected), "{text}");
        }
        for text in ["2020-01-01", "2020-01-01T00:00:00", "tomorrow", "2020-13-01T00:00:00Z", ""] {
            assert!(time(text).unwrap_err().contains("write it as"), "{text}");
        }
    }

    #[test]
    fn retry_strategies_are_one_word() {
        let seconds = Duration::from_secs;
        let exponential = |base, factor, max| RetryStrategy::Exponential { base, factor, max };
        for (text, strategy) in [
            ("none", RetryStrategy::Immediate),
            ("fixed:10s", RetryStrategy::Fixed(seconds(10))),
            ("exponential:1s", exponential(seconds(1), 2.0, None)),
            ("exponential:1s..5m", exponential(seconds(1), 2.0, Some(seconds(300)))),
            ("exponential:500ms..1hx1.5", exponential(Duration::from_millis(500), 1.5, Some(seconds(3600)))),
        ] {
            assert_eq!(text.parse(), Ok(Retry(strategy)), "{text}");
        }
        for text in ["", "fixed", "fixed:", "linear:1s", "exponential:1s..", "exponential:1sx", "none:1s"] {
            assert!(text.parse::<Retry>().is_err(), "{text}");
        }
    }
}
