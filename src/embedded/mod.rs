//! A broker in this process: real AMQP 0-9-1 on a loopback port, for tests and programs that want no server installed.
//!
//! It answers as RabbitMQ 4.0 does, or as 3.10 if it is told to be that [`Release`], down to reply codes and texts, so that a
//! client in any language can talk to it. It keeps nothing on disk, has no cluster, no TLS and no
//! management API, and is not meant for production. Streams are in memory as well. Queues that are to be quorum queues are refused
//! unless [`Builder::quorum_queues`] allows them.
//!
//! ```
//! use coney::embedded::EmbeddedBroker;
//! use coney::{App, Queue, Settings};
//!
//! # fn main() -> coney::Result<()> {
//! let broker = EmbeddedBroker::start()?;
//! let app = App::from_settings(Settings::from_url(&broker.url())?)?;
//! let connection = app.publish_pool().connection()?;
//! connection.queue_declare(&Queue::new("orders"))?;
//! connection.publish("", "orders", "one")?;
//! # Ok(())
//! # }
//! ```

mod arguments;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod bench;
mod builder;
mod channel;
mod clock;
mod confirm;
mod consumer_arguments;
pub mod control;
mod dead_letter;
mod exchange;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzz;
mod handshake;
mod hashed;
mod headers;
mod inbound;
mod ledger;
mod limits;
mod message;
mod named;
mod news;
mod outbox;
mod queue;
mod queue_type;
mod refusal;
mod release;
mod reply_to;
mod server;
mod session;
mod stream;
mod transaction;
mod users;
mod vhost;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

pub use self::builder::Builder;
pub use self::control::Control;
pub use self::named::named;
pub use self::release::{Release, UnknownRelease};
use self::server::Server;
use crate::error::Result;

/// A running broker. Dropping it stops it.
///
/// All methods take `&self`, so that threads may share one broker.
pub struct EmbeddedBroker {
    server: Server,
    /// Passwords by user, for the URLs.
    logins: HashMap<String, String>,
}

impl EmbeddedBroker {
    /// Starts a broker on a free port of `127.0.0.1`, with the user `guest`, password `guest`, and the virtual host `/`.
    /// Clients can connect when this returns.
    ///
    /// # Errors
    ///
    /// As [`Builder::start`].
    pub fn start() -> Result<EmbeddedBroker> {
        EmbeddedBroker::builder().start()
    }

    /// A broker with other settings.
    pub fn builder() -> Builder {
        Builder::new()
    }

    /// The URL of the virtual host `/`, for the user `guest`.
    pub fn url(&self) -> String {
        self.url_for("/")
    }

    /// The URL of a virtual host, for the user `guest`.
    pub fn url_for(&self, vhost: &str) -> String {
        self.url_as("guest", vhost)
    }

    /// The URL of a virtual host, for `user`; one the broker does not know gets an empty password.
    pub fn url_as(&self, user: &str, vhost: &str) -> String {
        let encoded = |text| utf8_percent_encode(text, NON_ALPHANUMERIC);
        let password = self.logins.get(user).map(String::as_str).unwrap_or_default();
        format!("amqp://{}:{}@{}/{}", encoded(user), encoded(password), self.addr(), encoded(vhost))
    }

    /// The first address the broker listens on.
    pub fn addr(&self) -> SocketAddr {
        self.addrs()[0]
    }

    /// Every address the broker listens on. There is at least one.
    pub fn addrs(&self) -> &[SocketAddr] {
        self.server.addrs()
    }

    /// Looks into the broker, hurts it, and waits for what happens in it.
    pub fn control(&self) -> Control {
        Control::new(self.server.broker.clone())
    }

    /// Closes every connection (320, as RabbitMQ does when it is shut down) and ends the broker, within two seconds.
    ///
    /// Its threads have ended and its ports are free when this returns. A broker that has been stopped stays so.
    pub fn stop(&self) {
        self.server.stop();
    }
}

// Without passwords.
impl fmt::Debug for EmbeddedBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedBroker").field("addrs", &self.addrs()).finish_non_exhaustive()
    }
}
