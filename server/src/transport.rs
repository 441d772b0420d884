//! The gRPC side: parse at the edge, call the engine, render. The only layer that knows wire types.

mod checkpoints;
pub mod claim_stream;
pub mod convert;
mod policies;
pub mod service;
pub mod status;
mod time;
mod workflows;

pub use service::{Limits, Service};
