//! Retry strategies and cancellation policies, and the JSON form that the storage contract stores.

use std::time::Duration;

use super::{Error, JsonText};

/// Longest delay of a retry strategy: one day. `absurd.retry_delay_seconds` refuses longer ones.
pub const RETRY_DELAY_MAX: Duration = Duration::from_secs(86_400);
/// Longest span of a cancellation policy: 100 years of 366 days.
pub const CANCELLATION_MAX: Duration = Duration::from_secs(100 * 366 * 86_400);

/// Delay from a failed attempt to the next one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RetryStrategy {
    /// No delay.
    None,
    /// A fixed delay.
    Fixed {
        /// Delay before each further attempt; `None` means 60 s.
        base: Option<Duration>,
    },
    /// `base * factor ^ (attempt - 1)`, at most `max`.
    Exponential {
        /// First delay; `None` means 30 s.
        base: Option<Duration>,
        /// Growth per attempt; `None` means 2.
        factor: Option<f64>,
        /// Longest delay; `None` means one day.
        max: Option<Duration>,
    },
}

impl RetryStrategy {
    /// Checks the bounds. Errors name fields of `retry_strategy`.
    pub fn checked(self) -> Result<Self, Error> {
        let delay = |field: &str, value: Option<Duration>| match value {
            Some(value) if value > RETRY_DELAY_MAX => {
                Err(Error::invalid(format!("retry_strategy.{field}"), "must be at most one day"))
            }
            _ => Ok(()),
        };
        match self {
            Self::None => {}
            Self::Fixed { base } => delay("base", base)?,
            Self::Exponential { base, factor, max } => {
                delay("base", base)?;
                delay("max", max)?;
                if factor.is_some_and(|factor| !factor.is_finite() || factor < 0.0) {
                    return Err(Error::invalid("retry_strategy.factor", "must be finite and not negative"));
                }
            }
        }
        Ok(self)
    }

    /// The form that the storage contract stores.
    pub fn to_json(self) -> JsonText {
        let mut object = serde_json::Map::new();
        let mut put = |key: &str, value: Option<f64>| {
            if let Some(value) = value {
                object.insert(key.into(), number(value));
            }
        };
        let kind = match self {
            Self::None => "none",
            Self::Fixed { base } => {
                put("base_seconds", base.map(|base| base.as_secs_f64()));
                "fixed"
            }
            Self::Exponential { base, factor, max } => {
                put("base_seconds", base.map(|base| base.as_secs_f64()));
                put("factor", factor);
                put("max_seconds", max.map(|max| max.as_secs_f64()));
                "exponential"
            }
        };
        object.insert("kind".into(), kind.into());
        JsonText::trusted(serde_json::Value::Object(object).to_string())
    }
}

#[allow(clippy::cast_possible_truncation, reason = "the branch is only taken for small whole numbers")]
fn number(value: f64) -> serde_json::Value {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        (value as i64).into()
    } else {
        serde_json::Number::from_f64(value).map_or(serde_json::Value::Null, serde_json::Value::Number)
    }
}

/// Limits after which a task is cancelled automatically.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CancellationPolicy {
    /// Longest time from the spawn to the first claim.
    pub max_delay: Option<Duration>,
    /// Longest time from the first claim to the end of the task.
    pub max_duration: Option<Duration>,
}

impl CancellationPolicy {
    /// Checks that both are whole seconds within the bound. Errors name fields of `cancellation`.
    pub fn checked(self) -> Result<Self, Error> {
        for (field, value) in [("max_delay", self.max_delay), ("max_duration", self.max_duration)] {
            let Some(value) = value else { continue };
            if value.subsec_nanos() != 0 {
                return Err(Error::invalid(format!("cancellation.{field}"), "must be whole seconds"));
            }
            if value > CANCELLATION_MAX {
                return Err(Error::invalid(format!("cancellation.{field}"), "must be at most 100 years"));
            }
        }
        Ok(self)
    }

    /// The form that the storage contract stores.
    pub fn to_json(self) -> JsonText {
        let mut object = serde_json::Map::new();
        for (key, value) in [("max_delay", self.max_delay), ("max_duration", self.max_duration)] {
            if let Some(value) = value {
                object.insert(key.into(), value.as_secs().into());
            }
        }
        JsonText::trusted(serde_json::Value::Object(object).to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strategies_become_the_contracts_keys() {
        let strategy = RetryStrategy::Exponential {
            base: Some(Duration::from_millis(1500)),
            factor: Some(2.0),
            max: Some(Duration::from_secs(60)),
        };
        let json: serde_json::Value = serde_json::from_str(strategy.to_json().as_str()).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"kind": "exponential", "base_seconds": 1.5, "factor": 2, "max_seconds": 60})
        );
    }

    #[test]
    fn bounds_are_checked() {
        let long = Some(Duration::from_secs(86_401));
        assert!(RetryStrategy::Fixed { base: long }.checked().is_err());
        let nan = RetryStrategy::Exponential { base: None, factor: Some(f64::NAN), max: None };
        assert!(nan.checked().is_err());
        let fraction = CancellationPolicy { max_delay: Some(Duration::from_millis(1500)), max_duration: None };
        assert!(fraction.checked().is_err());
    }
}
