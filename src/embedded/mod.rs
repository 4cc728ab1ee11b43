//! A broker in this process: real AMQP 0-9-1 on a loopback port, for tests and programs that want no server installed.
//!
//! It answers as RabbitMQ 3.10 does, down to reply codes and texts. It keeps nothing on disk, has no cluster and no
//! management API, and is not meant for production.

mod outbox;
mod refusal;
mod users;
mod wire;
