//! Names and versions of workflows. The display form `name__version__step` must stay unambiguous, so neither contains
//! two underscores together.

use super::Error;

/// Longest name and longest version, in bytes.
const NAME_BYTES_MAX: usize = 200;
const VERSION_BYTES_MAX: usize = 100;

/// Name of a workflow, at most 200 bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkflowName(String);

/// Version of a workflow, at most 100 bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkflowVersion(String);

impl WorkflowName {
    /// Parses a name: a lower-case letter, then lower-case letters, digits and single underscores.
    pub fn parse(field: &str, text: &str) -> Result<Self, Error> {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        let good = text.starts_with(|c: char| c.is_ascii_lowercase()) && text.chars().all(allowed);
        if !good || text.contains("__") || text.len() > NAME_BYTES_MAX {
            return Err(Error::invalid(
                field,
                "must be a lower-case letter, then lower-case letters, digits and single underscores, at most 200",
            ));
        }
        Ok(Self(text.to_owned()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl WorkflowVersion {
    /// Parses a version: letters, digits, dots, hyphens and single underscores.
    pub fn parse(field: &str, text: &str) -> Result<Self, Error> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if text.is_empty() || !text.chars().all(allowed) || text.contains("__") || text.len() > VERSION_BYTES_MAX {
            return Err(Error::invalid(
                field,
                "must be letters, digits, dots, hyphens and single underscores, at most 100",
            ));
        }
        Ok(Self(text.to_owned()))
    }

    /// The version as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_versions_are_what_the_contract_says() {
        for good in ["a", "order_fulfillment", "x2_y3"] {
            assert!(WorkflowName::parse("n", good).is_ok(), "{good}");
        }
        for bad in ["", "A", "1a", "_a", "a-b", "a__b", "a b", "é", "a\n", &"a".repeat(201)] {
            assert!(WorkflowName::parse("n", bad).is_err(), "{bad}");
        }
        for good in ["1", "v1.2.3-rc_1", "A"] {
            assert!(WorkflowVersion::parse("v", good).is_ok(), "{good}");
        }
        for bad in ["", "1 2", "1__2", "1/2", "1\n"] {
            assert!(WorkflowVersion::parse("v", bad).is_err(), "{bad}");
        }
    }
}
