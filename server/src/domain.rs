//! Domain types of the service. They depend on no runtime, no wire types and no SQL. A value that exists is valid.

pub mod claim;
pub mod error;
pub mod id;
pub mod json;
pub mod policy;
pub mod time;
pub mod workflow;

pub use claim::{Claim, ClaimToken, Digest, Settled, Verdict};
pub use error::Error;
pub use id::{CheckpointName, EventName, QueueName, RunId, SessionId, State, TaskId, TaskName, WorkerId};
pub use json::JsonText;
pub use time::Instant;
pub use workflow::{WorkflowName, WorkflowVersion};
