//! JSON text that Postgres' jsonb is sure to accept. One pass checks it, without building a tree.

use super::Error;

/// Deepest nesting that any limit allows.
pub const DEPTH_MAX: usize = 100;
/// Most digits before the decimal point of a Postgres numeric.
const NUMERIC_DIGITS_MAX: i64 = 131_072;
/// Most digits after the decimal point of a Postgres numeric.
const NUMERIC_SCALE_MAX: i64 = 16_383;
/// Exponents of this size and larger are refused.
const NUMERIC_EXPONENT_END: i64 = i32::MAX as i64 / 2;
/// Largest stored failure reason, in bytes.
pub const REASON_BYTES_MAX: usize = 64 * 1024;

/// Limits of a JSON text.
#[derive(Debug, Clone, Copy)]
pub struct JsonBound {
    /// Largest size in bytes.
    pub bytes: usize,
    /// Deepest nesting.
    pub depth: usize,
}

/// A JSON text that was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JsonText(String);

impl JsonText {
    /// Checks a text against jsonb's rules and the limits. `field` is named in the error. Numbers count with all digits
    /// that jsonb stores: `1e100000` counts as 100,001 bytes.
    pub fn parse(field: &str, text: String, bound: JsonBound) -> Result<Self, Error> {
        let too_large = |size| Err(Error::TooLarge { field: field.into(), size, limit: bound.bytes });
        if text.len() > bound.bytes {
            return too_large(text.len());
        }
        match Guard::new(text.as_bytes(), bound.depth).check() {
            Ok(growth) if text.len().saturating_add(growth) > bound.bytes => {
                too_large(text.len().saturating_add(growth))
            }
            Ok(_) => Ok(Self(text)),
            Err(problem) => Err(Error::Json { field: field.into(), problem }),
        }
    }

    /// Like [`JsonText::parse`], but the value must be an object.
    pub fn parse_object(field: &str, text: String, bound: JsonBound) -> Result<Self, Error> {
        let json = Self::parse(field, text, bound)?;
        if json.0.trim_start().starts_with('{') {
            Ok(json)
        } else {
            Err(Error::Json { field: field.into(), problem: "must be a JSON object".into() })
        }
    }

    /// Sets a key of an object to a text, starting from `{}` without an object. jsonb keeps the last of equal keys.
    /// `key` and `text` must need no escaping.
    pub fn with_text_key(object: Option<Self>, key: &str, text: &str) -> Self {
        let object = object.map_or_else(|| "{}".to_owned(), |object| object.0);
        let inside = object.trim_end().strip_suffix('}').unwrap_or("{").trim_end();
        let comma = if inside.ends_with('{') { "" } else { "," };
        Self(format!("{inside}{comma}\"{key}\":\"{text}\"}}"))
    }

    /// Wraps a text from Postgres or from this program, without a check.
    pub fn trusted(text: String) -> Self {
        Self(text)
    }

    /// Makes a failure reason. It never fails: a text that jsonb does not accept, or that is too long, becomes a
    /// shorter object.
    pub fn reason(text: &str) -> Self {
        let fits = |growth| text.len().saturating_add(growth) <= REASON_BYTES_MAX;
        if text.len() <= REASON_BYTES_MAX && Guard::new(text.as_bytes(), DEPTH_MAX).check().is_ok_and(fits) {
            return Self(text.to_owned());
        }
        if let Ok(serde_json::Value::Object(object)) = serde_json::from_str(text) {
            let part = |key: &str, limit| object.get(key).map(|value| clean(value, limit));
            let mut kept = serde_json::Map::new();
            for (key, limit) in [("name", 512), ("message", 16 * 1024), ("traceback", 16 * 1024)] {
                if let Some(value) = part(key, limit) {
                    kept.insert(key.into(), value);
                }
            }
            if !kept.is_empty() {
                return Self(serde_json::Value::Object(kept).to_string());
            }
        }
        let message = cut(text, 16 * 1024).replace('\0', "\u{fffd}");
        Self(serde_json::json!({ "name": "Failure", "message": message }).to_string())
    }

    /// The same value in ASCII, with `?` for each character and each escape outside ASCII. A database of any encoding
    /// can store it.
    pub fn to_ascii(&self) -> Self {
        let mut out = String::with_capacity(self.0.len());
        let mut rest = self.0.chars();
        while let Some(next) = rest.next() {
            if next != '\\' {
                out.push(if next.is_ascii() { next } else { '?' });
                continue;
            }
            let Some(escaped) = rest.next() else { break };
            if escaped != 'u' {
                out.extend([next, escaped]);
                continue;
            }
            let digits: String = rest.by_ref().take(4).collect();
            match u32::from_str_radix(&digits, 16) {
                Ok(code) if code < 0x80 => out.extend(["\\u", &digits]),
                _ => out.push('?'),
            }
        }
        Self(out)
    }

    /// The JSON text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The JSON text, by value.
    pub fn into_string(self) -> String {
        self.0
    }

    /// Length of the text in bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether the text is empty. A checked text never is.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn clean(value: &serde_json::Value, limit: usize) -> serde_json::Value {
    let text = match value {
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    cut(&text, limit).replace('\0', "\u{fffd}").into()
}

fn cut(text: &str, limit: usize) -> &str {
    let mut end = text.len().min(limit);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// A recursive check of the bytes, at most `depth_max` levels deep.
struct Guard<'a> {
    bytes: &'a [u8],
    at: usize,
    depth_max: usize,
    /// Digits that jsonb stores for numbers beyond those written.
    growth: usize,
}

type Check<T = ()> = Result<T, String>;

impl<'a> Guard<'a> {
    fn new(bytes: &'a [u8], depth_max: usize) -> Self {
        Self { bytes, at: 0, depth_max, growth: 0 }
    }

    /// Checks the text. Returns the number of bytes by which it grows when it is stored.
    fn check(mut self) -> Check<usize> {
        self.value(0)?;
        self.space();
        if self.at < self.bytes.len() {
            return self.fail("text after the end of the value");
        }
        Ok(self.growth)
    }

    fn fail<T>(&self, problem: &str) -> Check<T> {
        Err(format!("{problem} at byte {}", self.at))
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn value(&mut self, depth: usize) -> Check {
        self.space();
        match self.peek() {
            Some(b'{') => self.object(depth + 1),
            Some(b'[') => self.array(depth + 1),
            Some(b'"') => self.string(),
            Some(b'-' | b'0'..=b'9') => self.number(),
            Some(b't') => self.word(b"true"),
            Some(b'f') => self.word(b"false"),
            Some(b'n') => self.word(b"null"),
            Some(_) => self.fail("not a JSON value"),
            None => self.fail("unexpected end"),
        }
    }

    fn word(&mut self, word: &[u8]) -> Check {
        if self.bytes[self.at..].starts_with(word) {
            self.at += word.len();
            return Ok(());
        }
        self.fail("not a JSON value")
    }

    fn enter(&mut self, depth: usize) -> Check {
        if depth > self.depth_max {
            return self.fail(&format!("nested deeper than {}", self.depth_max));
        }
        self.at += 1;
        self.space();
        Ok(())
    }

    fn object(&mut self, depth: usize) -> Check {
        self.enter(depth)?;
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Ok(());
        }
        loop {
            self.space();
            if self.peek() != Some(b'"') {
                return self.fail("expected a key");
            }
            self.string()?;
            self.space();
            if self.peek() != Some(b':') {
                return self.fail("expected a colon");
            }
            self.at += 1;
            self.value(depth)?;
            if self.next_or_end(b'}')? {
                return Ok(());
            }
        }
    }

    fn array(&mut self, depth: usize) -> Check {
        self.enter(depth)?;
        if self.peek() == Some(b']') {
            self.at += 1;
            return Ok(());
        }
        loop {
            self.value(depth)?;
            if self.next_or_end(b']')? {
                return Ok(());
            }
        }
    }

    fn next_or_end(&mut self, end: u8) -> Check<bool> {
        self.space();
        match self.peek() {
            Some(b',') => {
                self.at += 1;
                Ok(false)
            }
            Some(byte) if byte == end => {
                self.at += 1;
                Ok(true)
            }
            Some(_) => self.fail("expected a comma or the end"),
            None => self.fail("unexpected end"),
        }
    }

    fn string(&mut self) -> Check {
        self.at += 1;
        loop {
            match self.peek() {
                None => return self.fail("unterminated string"),
                Some(b'"') => {
                    self.at += 1;
                    return Ok(());
                }
                Some(b'\\') => self.escape()?,
                Some(0x00..=0x1f) => return self.fail("control character in a string"),
                Some(_) => self.at += 1,
            }
        }
    }

    fn escape(&mut self) -> Check {
        self.at += 1;
        match self.peek() {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => {
                self.at += 1;
                Ok(())
            }
            Some(b'u') => match self.unicode()? {
                0 => self.fail("the escape \\u0000 cannot be stored"),
                0xd800..=0xdbff => {
                    if self.bytes[self.at..].starts_with(b"\\u") {
                        self.at += 1;
                        if (0xdc00..=0xdfff).contains(&self.unicode()?) {
                            return Ok(());
                        }
                    }
                    self.fail("lone surrogate")
                }
                0xdc00..=0xdfff => self.fail("lone surrogate"),
                _ => Ok(()),
            },
            _ => self.fail("unknown escape"),
        }
    }

    fn unicode(&mut self) -> Check<u32> {
        let digits = self.bytes.get(self.at + 1..self.at + 5);
        let value = digits
            .filter(|digits| digits.iter().all(u8::is_ascii_hexdigit))
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u32::from_str_radix(digits, 16).ok());
        match value {
            Some(value) => {
                self.at += 5;
                Ok(value)
            }
            None => self.fail("\\u needs four hex digits"),
        }
    }

    fn digits(&mut self) -> usize {
        let start = self.at;
        while matches!(self.peek(), Some(b'0'..=b'9')) {
            self.at += 1;
        }
        self.at - start
    }

    /// Checks that a Postgres numeric can hold the number. The place of its first nonzero digit and the digits after
    /// the point are bounded.
    fn number(&mut self) -> Check {
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        let start = self.at;
        let whole = self.digits();
        if whole == 0 || (self.bytes[start] == b'0' && whole > 1) {
            return self.fail("not a number");
        }
        let mut fraction = 0;
        if self.peek() == Some(b'.') {
            self.at += 1;
            fraction = self.digits();
            if fraction == 0 {
                return self.fail("digits missing after the point");
            }
        }
        let digits = self.bytes[start..self.at].iter().filter(|byte| **byte != b'.');
        let zeros = digits.take_while(|byte| **byte == b'0').count();
        let exponent = self.exponent()?;
        let signed = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let too_large = zeros < whole + fraction && signed(whole) - signed(zeros) + exponent > NUMERIC_DIGITS_MAX;
        if too_large || signed(fraction) - exponent > NUMERIC_SCALE_MAX || exponent.abs() >= NUMERIC_EXPONENT_END {
            return self.fail("number out of range");
        }
        if exponent != 0 {
            let before = if zeros < whole + fraction { signed(whole) - signed(zeros) + exponent } else { 1 };
            let behind = (signed(fraction) - exponent).max(0);
            let stored = before.max(1) + behind + i64::from(behind > 0);
            let growth = usize::try_from(stored - signed(self.at - start)).unwrap_or(0);
            self.growth = self.growth.saturating_add(growth);
        }
        Ok(())
    }

    fn exponent(&mut self) -> Check<i64> {
        if !matches!(self.peek(), Some(b'e' | b'E')) {
            return Ok(0);
        }
        self.at += 1;
        let negative = self.peek() == Some(b'-');
        if matches!(self.peek(), Some(b'+' | b'-')) {
            self.at += 1;
        }
        let start = self.at;
        if self.digits() == 0 {
            return self.fail("digits missing in the exponent");
        }
        let text = std::str::from_utf8(&self.bytes[start..self.at]).unwrap_or_default();
        let exponent = text.parse::<i64>().unwrap_or(NUMERIC_EXPONENT_END).min(NUMERIC_EXPONENT_END);
        Ok(if negative { -exponent } else { exponent })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(text: &str) -> Option<String> {
        Guard::new(text.as_bytes(), DEPTH_MAX).check().err()
    }

    #[test]
    fn takes_what_jsonb_takes() {
        for text in [
            "null",
            " true ",
            "-0.5e+10",
            "[]",
            "{}",
            "[1,[2,{\"a\":\"\\u00e9\\n\"}]]",
            "\"\\ud83d\\ude00\"",
            "123456789012345678901234567890",
            "0e400000",
            "0.001e131074",
            "1e100000",
            "{\"a\":1,\"a\":2}",
        ] {
            assert_eq!(problem(text), None, "{text}");
        }
    }

    #[test]
    fn refuses_what_jsonb_refuses() {
        for text in [
            "",
            "nul",
            "{",
            "[1,]",
            "{\"a\" 1}",
            "{a:1}",
            "01",
            "1.",
            "1e",
            "+1",
            "\"a",
            "\"\\x\"",
            "\"\\u12\"",
            "\"\\u0000\"",
            "\"\\ud800\"",
            "\"\\ud800\\u0041\"",
            "\"\\udc00\"",
            "\"\u{1}\"",
            "1 2",
            "1e200000",
            "1e-20000",
            "0e-20000",
            "0e2000000000",
            "0.001e131076",
            "NaN",
            "Infinity",
            "'a'",
        ] {
            assert!(problem(text).is_some(), "{text}");
        }
    }

    /// The stored digits of a number count, not the written ones. `tests/it/input.rs` compares this with Postgres.
    #[test]
    fn numbers_count_with_the_digits_that_are_stored() {
        let growth = |text: &str| Guard::new(text.as_bytes(), DEPTH_MAX).check().unwrap();
        assert_eq!(growth("[1, -2.5, 12345678901234567890]"), 0);
        assert_eq!(growth("1e9"), "1000000000".len() - "1e9".len());
        assert_eq!(growth("-1E+9"), "-1000000000".len() - "-1E+9".len());
        assert_eq!(growth("[1e100000, 1e100000]"), 2 * (100_001 - "1e100000".len()));
        assert_eq!(growth("0.001e131074"), 131_072 - "0.001e131074".len());
        assert_eq!(growth("1e-10000"), "0.".len() + 10_000 - "1e-10000".len());
        assert_eq!(growth("0e-10000"), "0.".len() + 10_000 - "0e-10000".len());
        assert_eq!(growth("12.5e-10000"), "0.".len() + 10_001 - "12.5e-10000".len());
        assert_eq!(growth("0e100000"), 0);
        let bound = JsonBound { bytes: 1024 * 1024, depth: DEPTH_MAX };
        let many = |count: usize| format!("[{}]", vec!["1e100000"; count].join(","));
        assert!(JsonText::parse("params", many(10), bound).is_ok());
        let refused = JsonText::parse("params", many(3000), bound);
        let Err(Error::TooLarge { field, size, limit }) = refused else { panic!("{refused:?}") };
        assert_eq!((field.as_str(), limit), ("params", bound.bytes));
        assert!(size > 300_000_000, "{size}");
    }

    #[test]
    fn bounds_the_depth() {
        assert_eq!(problem(&("[".repeat(100) + &"]".repeat(100))), None);
        assert!(problem(&("[".repeat(101) + &"]".repeat(101))).is_some());
        assert!(problem(&"[".repeat(1_000_000)).is_some());
    }

    #[test]
    fn any_encoding_takes_the_ascii_form() {
        let ascii = |text: &str| JsonText::trusted(text.into()).to_ascii().into_string();
        assert_eq!(ascii(r#"{"é":"a\u00e9\ud83d\ude00\u0041\n\\u00e9"}"#), r#"{"?":"a???\u0041\n\\u00e9"}"#);
        assert_eq!(ascii("[1,null,\"x\"]"), "[1,null,\"x\"]");
    }

    /// A reason that is cut keeps as much of each part as its limit allows.
    #[test]
    fn a_long_reason_keeps_the_beginnings_of_its_parts() {
        let limit = 16 * 1024;
        let long = "x".repeat(REASON_BYTES_MAX);
        for (text, limits) in [
            (
                serde_json::json!({"name": long, "message": long, "traceback": long, "more": long}).to_string(),
                vec![("name", 512), ("message", limit), ("traceback", limit)],
            ),
            (long, vec![("message", limit)]),
        ] {
            let kept: serde_json::Value = serde_json::from_str(JsonText::reason(&text).as_str()).unwrap();
            for (part, limit) in limits {
                assert_eq!(kept[part].as_str().unwrap().len(), limit, "{part}");
            }
            assert_eq!(kept["more"], serde_json::Value::Null);
        }
    }

    #[test]
    fn a_reason_is_cut_between_characters() {
        let long = "é".repeat(REASON_BYTES_MAX);
        for (start, bytes) in [("", 16 * 1024), ("x", 16 * 1024 - 1)] {
            let kept: serde_json::Value =
                serde_json::from_str(JsonText::reason(&format!("{start}{long}")).as_str()).unwrap();
            assert_eq!(kept["message"].as_str().unwrap().len(), bytes);
        }
    }

    #[test]
    fn a_reason_is_never_refused() {
        assert_eq!(JsonText::reason("{\"message\":\"x\"}").as_str(), "{\"message\":\"x\"}");
        for text in ["not json", "{\"message\":\"a\\u0000b\"}", "\0", &"x".repeat(1_000_000)] {
            let reason = JsonText::reason(text);
            assert_eq!(problem(reason.as_str()), None, "{text:.20}");
            assert!(reason.len() < REASON_BYTES_MAX);
        }
        for text in ["1e100000", "{\"message\": 1e100000}", "[1e-9999, 1e70000]"] {
            let reason = JsonText::reason(text);
            let growth = Guard::new(reason.as_str().as_bytes(), DEPTH_MAX).check().unwrap();
            assert!(reason.len() + growth < REASON_BYTES_MAX, "{text}: {}", reason.as_str());
        }
        let kept = JsonText::reason("{\"name\":\"E\",\"message\":\"a\\u0000b\"}");
        assert!(kept.as_str().contains("\"name\":\"E\""), "{}", kept.as_str());
    }
}
