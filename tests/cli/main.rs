//! The program `coney`, run as people run it.
//!
//! Tests marked `ignore` need RabbitMQ; `scripts/test` installs it and runs them. What is asked of both brokers is a
//! `contract!`, as in `tests/it`.

mod bench;
mod broker;
mod dead;
mod doctor;
mod get;
mod help;
mod listen;
#[cfg(feature = "outbox-sqlite")]
mod outbox;
mod partitions;
mod program;
mod publish;
mod queue;
#[path = "../raw/mod.rs"]
mod raw;
#[path = "../it/support.rs"]
mod support;
mod topology;
