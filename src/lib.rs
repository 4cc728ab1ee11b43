//! Synchronous RabbitMQ (AMQP 0-9-1) for threaded programs.
//!
//! Named pools of connections, configured in TOML and lent out through guards; publishing where `Ok` means that the
//! broker has confirmed; getting messages one by one, and listening for them. Blocking throughout, and every call ends: there is no async
//! runtime in here, and none is needed around it.
//!
//! # Publish
//!
//! ```no_run
//! use coney::{App, Message};
//!
//! fn main() -> coney::Result<()> {
//!     let app = App::from_file("app.toml")?;
//!     app.declare_topology()?;
//!     let connection = app.publish_pool().connection()?;
//!     connection.publish("unit_test_room", "user1", "hello")?; // Ok: the broker has it
//!     connection.publish("unit_test_room", "user1", Message::json(&[1, 2, 3])?)?;
//!     connection.publish_async("unit_test_room", "user1", "hello", |outcome| {
//!         if let Err(error) = outcome {
//!             eprintln!("not sent: {error}");
//!         }
//!     });
//!     Ok(()) // giving the connection back waits for the callback
//! }
//! ```
//!
//! One message that is to get there even if the broker is restarted meanwhile, from a thread that keeps no connection:
//! [`app.publish_pool().publish(…)`](Pool::publish).
//!
//! # Get and ack
//!
//! ```no_run
//! # fn main() -> coney::Result<()> {
//! # let app = coney::App::from_file("app.toml")?;
//! let connection = app.listen_pool().connection()?;
//! while let Some(delivery) = connection.get("listener1")? {
//!     match delivery.message().text() {
//!         Some(text) => println!("{}: {text}", delivery.routing_key()),
//!         None => {
//!             delivery.reject()?; // dead-lettered, if the queue says where to
//!             continue;
//!         }
//!     }
//!     delivery.ack()?;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Listen
//!
//! ```no_run
//! use coney::App;
//!
//! fn main() -> coney::Result<()> {
//!     let app = App::from_file("app.toml")?;
//!     app.on_start(|app| {
//!         let listener = app.spawn_listener("listener1", |context, delivery| -> coney::Result<()> {
//!             let numbers: Vec<i32> = delivery.message().decode_json()?;
//!             context.publish("", "listener2", format!("{} numbers", numbers.len()))
//!         })?;
//!         listener.detach(); // the app stops it
//!         Ok(())
//!     });
//!     app.run() // until SIGINT, SIGTERM or App::shutdown_handle
//! }
//! ```
//!
//! `Ok` acks; an error or a panic has the message tried again by the listener's [`RetryPolicy`]. A handler that returns an
//! [`Outcome`], or a `Result<Outcome, E>`, can also reject a message or put it back.
//!
//! For typed functions behind queues, see [`worker`], and for calls [`rpc`]. For two lines and no pools, see [`bus`].
//!
//! # Without a settings file
//!
//! ```no_run
//! use coney::{App, Binding, Exchange, Queue, Settings, Topology};
//!
//! # fn main() -> coney::Result<()> {
//! let app = App::from_settings(Settings::from_url("amqp://guest:guest@localhost:5672/%2f")?)?;
//! let topology = Topology::new()
//!     .exchange(Exchange::topic("events"))
//!     .queue(Queue::new("audit").quorum())
//!     .bind(Binding::queue("audit").to("events").routing_key("#"));
//! app.publish_pool().connection()?.declare(&topology)?;
//! # Ok(())
//! # }
//! ```
//!
//! # Test without a broker
//!
//! [`embedded::EmbeddedBroker`] is a broker in this process, for clients in any language. It can be looked into, and made
//! to lose connections, refuse messages and withhold confirms: see [`embedded::control`]. The URL `memory://NAME` starts,
//! or finds, the one of that name.
//!
//! ```
//! # #[cfg(feature = "embedded")]
//! # fn main() -> coney::Result<()> {
//! use std::time::Duration;
//!
//! use coney::embedded::EmbeddedBroker;
//! use coney::{App, Queue, Settings};
//!
//! let broker = EmbeddedBroker::start()?;
//! let app = App::from_settings(Settings::from_url(&broker.url())?)?;
//! let connection = app.publish_pool().connection()?;
//! connection.queue_declare(&Queue::new("orders"))?;
//! broker.control().nack_next(1);
//! assert!(connection.publish("", "orders", "refused").is_err());
//! connection.publish("", "orders", "one")?;
//! broker.control().wait_for_queue_len("orders", 1, Duration::from_secs(5))?;
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "embedded"))]
//! # fn main() {}
//! ```
//!
//! With the feature `testing`, `testing::RabbitMq` runs the installed `rabbitmq-server` as a private node that can be
//! killed, paused and asked questions, and leaves nothing behind.
//!
//! # Features
//!
//! - `embedded` (default): the embedded broker and `memory://` URLs.
//! - `tls` (default): `amqps://`, by rustls.
//! - `metrics`: counters, gauges and histograms by the facade of that name; see the module `metrics`.
//! - `testing`: private RabbitMQ nodes for tests.
//! - `unstable-amiquip`: `Connection::raw`, the conversions between [`Message`] and amiquip's types, and `coney::amiquip`
//!   itself. With it amiquip's version is part of the interface, which the version number of this crate does not cover.
//! - `cli`: the program `coney`.
//!
//! # Design
//!
//! - A [`Pool`] bounds the connections to one broker. A connection is opened by the thread that needs it, so an [`App`]
//!   can be made while the broker is down, and who cannot connect is told why. A dead connection is never lent.
//! - A [`Connection`] runs declarations, publishing and getting on channels of their own. The broker answers a mistake
//!   by closing a channel; it is opened anew for the next call, and nothing beside it is touched.
//! - Publishing is confirmed, persistent and, in pools, `mandatory`: a message is either in every queue it belongs to,
//!   or its publisher has an [`Error`] that says what became of it.
//! - A [`Delivery`] is its receiver's to settle. It cannot outlive its connection, and never settles another message.
//! - A [`Listener`] keeps its place in the pool, and comes back by itself after whatever happens to its connection or its
//!   queue. What its handler returns settles the message: none is forgotten.
//! - Whatever waits for the broker has a deadline from the settings, destructors included.
//! - In a process that was forked from the one that made them, apps, pools and guards say so and do nothing.
//! - All mistakes in a settings file are reported at once, and no text that this crate produces holds a password.
//!
//! # Seeing it run
//!
//! - [`App::health`] and [`App::check`] tell how the pools and listeners stand, to people and to the probes of Kubernetes.
//! - [`App::on_event`] tells a program what happens: connections that are lost, listeners that come back, messages that are given
//!   up.
//! - With the feature `metrics`, everything is counted: the module `metrics` has the names.
//! - A message that is handled lends its W3C trace context, [`traceparent`](Message::traceparent), to those that its handler
//!   publishes and to the calls it makes.
//!
//! # Ways in
//!
//! - [`Pool::before_publish`] and [`App::before_publish`]: a hook that sees each message before it is written, and may change
//!   or refuse it.
//! - [`ListenerBuilder::around`] and [`App::around_handlers`]: what is called in the place of a handler, and calls it.
//! - `Connection::raw` (feature `unstable-amiquip`): a channel of the client underneath, for what is not wrapped.
//!
//! # Logging
//!
//! Through [`log`], under the target `coney`. Beside its text a line has what it is about as keys and values
//! ([`log::kv`]), for loggers that keep them: `pool` and `connection`; `listener`, `queue` and `attempt`; `message_id`
//! (empty if there is none), `exchange` and `routing_key`; `outcome`, which is `retried`, `dead`, `rejected`, `requeued`
//! or, of a message in an outbox, `refused`; `outbox`; `reason` of a broker that takes no messages.
//!
//! | event | level | keys |
//! |---|---|---|
//! | a connection is opened, lost, given up or closed, or cannot be opened | debug | `pool`, `connection` |
//! | the broker takes no messages; takes them again | warn; info | `pool`, `connection`, `reason` |
//! | a listener listens; is back | info | `listener`, `pool` |
//! | a listener has lost its consumers | warn, or error where it takes a person to mend | `listener`, `pool`, `attempt` |
//! | a listener tries one message after a pause; goes on | info | `listener`, `pool` |
//! | a listener pauses by hand; because most messages fail | info; error | `listener`, `pool` |
//! | a listener can have no thread more | warn | `listener` |
//! | a listener has ended | debug, or error if nobody has stopped it | `listener`, `pool` |
//! | a handler failed: the message is tried again, requeued | warn | `listener`, `queue`, `message_id`, `outcome` |
//! | a handler failed: the message is dead, rejected | error | `listener`, `queue`, `message_id`, `outcome` |
//! | no route matches the routing key: the message is rejected | error | `listener`, `queue`, `message_id`, `outcome` |
//! | a message of a quorum queue has nearly come back too often | warn | `listener`, `queue`, `message_id` |
//! | an outbox cannot forward; forwards again | warn; info | `outbox` |
//! | an ordering key of an outbox waits, for the broker nacks its message | warn | `outbox`, `message_id` |
//! | the broker has refused a message of an outbox | error | `outbox`, `message_id`, `outcome` |
//! | a handler panicked | error | `listener`, `queue`, `message_id` |
//! | events were left out, for the handlers of [`App::on_event`] were too slow | warn | |
//! | [`Pool::publish`] publishes again | debug | `pool`, `exchange`, `routing_key`, `message_id` |
//!
//! The client underneath logs under `amiquip`. It is not told the password.
//!
//! # Not supported
//!
//! Transactions (confirms are faster and say more), `basic.recover`, and changing credentials on an open connection.

mod amqp;
mod app;
pub mod bus;
mod connection;
mod deadline;
mod encoding;
mod error;
mod event;
mod field;
mod fork;
mod health;
#[cfg(any(feature = "outbox-postgres", feature = "outbox-sqlite"))]
pub mod inbox;
mod listener;
mod message;
#[cfg(feature = "metrics")]
pub mod metrics;
#[cfg(not(feature = "metrics"))]
mod metrics;
#[cfg(feature = "outbox")]
pub mod outbox;
mod outcome;
mod pace;
mod pool;
pub mod rpc;
mod session;
pub mod settings;
mod signals;
mod topic;
mod topology;
mod trace;
mod url;
pub mod worker;

#[cfg(feature = "embedded")]
pub mod embedded;
#[cfg(feature = "testing")]
pub mod testing;

// Pages and no code.
#[cfg(doc)]
pub mod guide;

#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub use session::fuzz as session_fuzz;

#[cfg(feature = "unstable-amiquip")]
pub use amiquip;
pub use app::{App, ShutdownHandle};
pub use connection::{Connection, Delivery, Outgoing, QueueInfo, Received};
pub use encoding::Encoding;
pub use error::{BatchError, ConnectError, EncodingError, Error, Holder, Result, StoreError};
pub use event::Event;
pub use field::{FieldTable, FieldValue};
pub use health::{Health, ListenerHealth, OutboxHealth, PoolHealth};
pub use listener::{
    Batch, BatchItem, Batches, Context, Listener, ListenerBuilder, ListenerState, ListenerStats, Offset, OffsetFile,
    OffsetStore, PartitionedListenerBuilder, PauseReason, Routes, Unsettled,
};
pub use message::Message;
pub use outcome::{Outcome, RetryPolicy};
pub use pace::{Concurrency, PauseOnFailures};
pub use pool::{Pool, PoolStatus, PooledConnection};
pub use settings::{
    AppSettings, AuthMechanism, BrokerSettings, Loader, OutboxSettings, PoolSettings, Problem, Settings, SettingsError,
    TlsSettings,
};
pub use topology::{
    Binding, DeadLetterStrategy, Destination, Exchange, ExchangeKind, HashedBy, LeaderLocator, OnConflict, Overflow,
    Partitioned, Queue, QueueType, Topology,
};
pub use url::{AmqpUrl, Endpoint, Secret, UrlError};

/// The programs in the README, built with the documentation tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// Which of the public types may cross threads, checked when the crate is built.
#[cfg(test)]
mod crossing_threads {
    use super::*;

    fn send<T: Send>() {}
    fn send_and_sync<T: Send + Sync>() {}

    #[test]
    fn what_may_cross_threads() {
        send_and_sync::<App>();
        send_and_sync::<Pool>();
        send_and_sync::<Error>();
        send_and_sync::<Event>();
        send_and_sync::<Message>();
        send_and_sync::<Received>();
        send_and_sync::<Settings>();
        send_and_sync::<Topology>();
        send_and_sync::<rpc::RpcClient>();
        send::<rpc::RpcWorker>();
        send::<worker::QueueWorker>();
        send::<bus::Bus>();
        send_and_sync::<bus::Producer>();
        send_and_sync::<Listener>();
        send_and_sync::<ListenerBuilder>();
        send_and_sync::<PartitionedListenerBuilder>();
        send_and_sync::<Partitioned>();
        send_and_sync::<ShutdownHandle>();
        send_and_sync::<Outcome>();
        send_and_sync::<Health>();
        send_and_sync::<Outgoing<'_>>();
        send::<Unsettled>();
        send_and_sync::<Batch>();
        send_and_sync::<Batches>();
        #[cfg(feature = "embedded")]
        send_and_sync::<embedded::EmbeddedBroker>();
        #[cfg(feature = "embedded")]
        send_and_sync::<embedded::Control>();
        send::<PooledConnection>();
        send::<Connection>();
    }
}
