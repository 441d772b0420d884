//! The integration tests, one module per subject. Each test has a database of its own; all run in parallel.

#![allow(clippy::unwrap_used, clippy::too_many_lines, reason = "a test tells one story and fails by panicking")]

mod abandoned;
mod adoption;
mod better;
mod checkpoints;
mod cli;
mod clients;
mod configuration;
mod contract;
mod databases;
mod doorbell;
mod durable;
mod events;
mod examples;
mod faults;
mod hand_over;
mod input;
mod isolation;
mod limits;
mod migrations;
mod mixed;
mod model;
mod plans;
mod promises;
mod queues;
mod readme;
mod reads;
mod reference;
mod repairs;
mod replicas;
mod rpcs;
mod sdk;
mod service;
mod shell;
mod starts;
mod statements;
mod steps;
mod streams;
mod tasks;
mod time;
mod tree;
mod upkeep;
mod workflows;
