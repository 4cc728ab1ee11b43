//! The promises of the crate, shown through its public API.
//!
//! Tests marked `ignore` need RabbitMQ; `scripts/test` installs it and runs them. They share one node where they only
//! use it (`support::node`) and another one, one at a time, where they hurt it (`support::hurt_node`).

#[cfg(feature = "own-tests")]
mod authority;
mod batches;
mod broker_down;
mod bus;
#[path = "../closed/mod.rs"]
mod closed;
mod cluster;
mod confirms;
mod conflicts;
mod dead_letters;
mod declare;
mod delays;
mod ends;
mod events;
mod faults;
mod foreign;
mod get;
mod hashed;
mod health;
mod hooks;
#[cfg(feature = "outbox-sqlite")]
mod inbox;
mod lifetime;
mod limits;
mod listener;
mod listener_faults;
mod log_keys;
mod logs;
mod long_names;
mod network;
mod node;
#[cfg(feature = "outbox-sqlite")]
mod outbox;
#[cfg(feature = "outbox-sqlite")]
mod outbox_kills;
#[cfg(feature = "outbox-postgres")]
mod outbox_postgres;
mod pace;
mod partitions;
mod partitions_cluster;
mod pauses;
mod pool;
mod pool_publish;
#[cfg(feature = "outbox-postgres")]
mod postgres;
mod proxy;
mod publish;
mod publish_async;
mod qos;
mod quorum;
#[path = "../raw/mod.rs"]
mod raw;
#[cfg(feature = "unstable-amiquip")]
mod raw_channel;
mod releases;
mod replies;
mod retry;
mod retry_queues;
mod routes;
mod rpc;
mod stream_queues;
mod streams;
mod support;
#[cfg(feature = "own-tests")]
mod tls;
#[cfg(feature = "own-tests")]
mod tls_files;
mod trace;
mod wire;
mod worker;
