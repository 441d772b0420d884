//! The bounds that settings put on requests, and the checks of counts against them.

use crate::domain::Error;
use crate::domain::json::{DEPTH_MAX, JsonBound};

/// Bounds on requests.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Maximum size of a JSON payload (params, a result, a checkpoint) in bytes.
    pub payload_bytes_max: usize,
    /// Maximum size of a task's headers in bytes.
    pub headers_bytes_max: usize,
    /// Maximum nesting depth of JSON.
    pub json_depth_max: usize,
    /// Maximum number of items in one batch.
    pub batch_max: usize,
    /// Maximum number of items on one page.
    pub page_max: i64,
    /// Maximum size of a request in bytes.
    pub request_bytes_max: usize,
    /// Maximum size of a request's HTTP/2 header block in bytes.
    pub header_list_bytes_max: u32,
    /// Whether calls about a run are refused without a claim token.
    pub require_claim_token: bool,
    /// `max_attempts` of a task whose spawn sets none.
    pub default_max_attempts: i32,
}

impl Limits {
    /// Bound of a JSON payload.
    pub fn payload(&self) -> JsonBound {
        JsonBound { bytes: self.payload_bytes_max, depth: self.json_depth_max }
    }

    /// Bound of a task's headers.
    pub fn headers(&self) -> JsonBound {
        JsonBound { bytes: self.headers_bytes_max, depth: self.json_depth_max }
    }

    /// Refuses a batch that is empty or too large.
    pub(super) fn batch(&self, field: &str, size: usize) -> Result<(), Error> {
        if size == 0 || size > self.batch_max {
            return Err(Error::invalid(field, format!("must hold 1 to {} items, not {size}", self.batch_max)));
        }
        Ok(())
    }

    /// The size of a page; by default 100, or `page_max` if that is less.
    pub(super) fn page(&self, asked: i32) -> Result<i64, Error> {
        match i64::from(asked) {
            0 => Ok(self.page_max.min(100)),
            asked if (1..=self.page_max).contains(&asked) => Ok(asked),
            _ => Err(Error::invalid("page_size", format!("must be 0 to {}", grouped(self.page_max)))),
        }
    }
}

/// The number with a comma before the last three digits; for numbers below a million.
fn grouped(number: i64) -> String {
    if number < 1000 { number.to_string() } else { format!("{},{:03}", number / 1000, number % 1000) }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            payload_bytes_max: 1024 * 1024,
            headers_bytes_max: 64 * 1024,
            json_depth_max: DEPTH_MAX,
            batch_max: 1000,
            page_max: 1000,
            request_bytes_max: 16 * 1024 * 1024,
            header_list_bytes_max: 64 * 1024,
            require_claim_token: false,
            default_max_attempts: 5,
        }
    }
}
