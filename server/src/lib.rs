//! The Absurd server: hands durable tasks that live in Postgres to workers over gRPC.
//!
//! Layers point down: `transport` -> `engine` -> `dispatch` -> `commit` -> `store` -> `scope`, `domain`. Only
//! `transport` knows wire types and only `store` knows SQL. `app` alone puts all parts together.

pub mod activity;
pub mod address;
pub mod app;
pub mod awaited;
pub mod backlog;
pub mod cli;
pub mod commit;
pub mod counts;
pub mod dispatch;
pub mod domain;
pub mod doorbell;
pub mod engine;
pub mod gate;
pub mod hints;
mod hot_retries;
pub mod http;
pub mod jitter;
pub mod libpq;
pub mod looks;
pub mod maintenance;
pub mod metrics;
pub mod per_queue;
mod planted;
pub mod postgres;
pub mod scope;
pub mod settings;
pub mod store;
pub mod sweeps;
pub mod tally;
pub mod transport;
pub mod upkeep;
pub mod wait;
