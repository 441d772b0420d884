//! Generated code of the `absurd.v1` protobuf package, and its descriptors.
//!
//! Nothing here is written by hand: the `.proto` files beside this one are the source, and their
//! comments are the reference of the API.

#![allow(clippy::all, missing_docs, rustdoc::all, reason = "generated code")]

/// The protobuf packages, nested as their names are.
pub mod absurd {
    /// Version 1 of the API.
    pub mod v1 {
        tonic::include_proto!("absurd.v1");
    }
}

pub use absurd::v1;

/// The encoded `FileDescriptorSet` of the API and of all that it imports; gRPC reflection serves it.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor.bin"));
