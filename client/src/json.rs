//! JSON as text: numbers keep their digits, and a value is parsed only on request.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Error;
use absurd_proto::v1 as pb;

/// A JSON value as text; the server checks its syntax.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Json(String);

impl Json {
    /// Serializes a value; errors when serde cannot write it as JSON.
    pub fn of<T: Serialize + ?Sized>(value: &T) -> Result<Self, Error> {
        serde_json::to_string(value).map(Self).map_err(|error| Error::argument("json", error))
    }

    /// Takes a text that is JSON already; the server checks it.
    pub fn from_text(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// JSON null.
    pub fn null() -> Self {
        Self("null".into())
    }

    /// The text as it was given or received.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Deserializes the text.
    pub fn to<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_str(&self.0)
    }

    /// Replaces JSON null by an empty object.
    pub(crate) fn or_object(self) -> Self {
        if self.0 == "null" { Self("{}".into()) } else { self }
    }

    pub(crate) fn into_wire(self) -> pb::Json {
        pb::Json { text: self.0 }
    }

    pub(crate) fn from_wire(json: Option<pb::Json>) -> Option<Self> {
        json.map(|json| Self(json.text))
    }
}

impl std::fmt::Display for Json {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<serde_json::Value> for Json {
    fn from(value: serde_json::Value) -> Self {
        Self(value.to_string())
    }
}
