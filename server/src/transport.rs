//! The gRPC layer: parses requests, calls the engine and renders answers. It alone knows wire types.

pub mod admission;
mod checkpoints;
pub mod claim_stream;
mod claims;
pub mod compression;
pub mod convert;
pub mod deadline;
mod limits;
pub mod page_token;
mod policies;
mod queues;
mod reads;
pub mod refusal;
pub mod service;
mod settling;
pub mod status;
mod tasks;
pub mod test_clock;
mod time;
mod workflows;

pub use limits::Limits;
pub use service::Service;
