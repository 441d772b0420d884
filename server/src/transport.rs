//! The gRPC side: parse at the edge, call the engine, render. The only layer that knows wire types.

pub mod admission;
mod checkpoints;
pub mod claim_stream;
mod claims;
pub mod compression;
pub mod convert;
pub mod deadline;
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

pub use service::{Limits, Service};
