//! Promises that small mistakes in the program could break unnoticed, each held by a test (docs/mutants.md).

mod client;
mod dispatch;
mod durable;
mod serving;
mod sql;
mod statements;
mod store;
