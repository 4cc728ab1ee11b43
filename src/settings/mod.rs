//! `app.toml`, the overlay of a profile and the environment, read into one checked [`Settings`].
//!
//! Nothing here opens a connection. A mistake anywhere makes the whole of it an error, and the error lists every
//! mistake there is, each with its key. No text that could hold a password gets into an error.
//!
//! ```toml
//! [broker]                    # what every pool starts from
//! url = "amqp://guest:guest@localhost:5672/%2f"
//!
//! [pools.publish]             # the pools publish and listen exist even if they are not written down
//! size = 4
//!
//! [[topology.queues]]
//! name = "jobs"
//!
//! [profiles.test.broker]      # laid over the above when CONEY_PROFILE=test
//! url = "amqp://guest:guest@localhost:5673/%2f"
//! ```
//!
//! The environment comes last: `CONEY_BROKER__PASSWORD`, `CONEY_POOLS__PUBLISH__SIZE`. See [`Loader`] for its rules.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::Result;
use crate::outcome::RetryPolicy;
use crate::pace::{Concurrency, PauseOnFailures};
use crate::topology::{QueueType, Topology};
pub use crate::url::AuthMechanism;
use crate::url::{AmqpUrl, Endpoint, Secret};

mod check;
mod environment;
mod error;
mod lists;
mod loader;
mod merge;
mod outbox;
mod pace;
mod password_file;
mod reader;
mod sections;
#[cfg(test)]
mod tests;
mod tls;
mod toml;

pub use error::{Problem, SettingsError};
pub use loader::Loader;
pub use outbox::OutboxSettings;
pub use tls::TlsSettings;

/// The name of the pool that messages are published from.
pub const PUBLISH_POOL: &str = "publish";
/// The name of the pool that listeners borrow from.
pub const LISTEN_POOL: &str = "listen";

/// Everything a program says about its brokers, pools and topology.
///
/// Defaults to a publish and a listen pool at `amqp://guest:guest@localhost:5672/%2f` and no topology.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Settings {
    /// The pools by name. `publish` and `listen` are always there.
    pub pools: BTreeMap<String, PoolSettings>,
    /// What is to exist on the broker. Defaults to nothing.
    pub topology: Topology,
    /// How the program begins and ends.
    pub app: AppSettings,
    /// The program's outbox. Defaults to none.
    pub outbox: Option<OutboxSettings>,
}

/// How a program begins and ends.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct AppSettings {
    /// How long a shutdown may take, with all that it waits for; more than zero and at most a day. Defaults to 10 s.
    pub shutdown_timeout: Duration,
    /// How long to wait at the start for a broker that is not there yet; more than zero and at most a day. Defaults to not
    /// waiting.
    ///
    /// It is waited for before the topology is declared, before the hooks of [`App::start`](crate::App::start) are run, and
    /// before a listener is spawned that is not in the background.
    pub wait_for_broker: Option<Duration>,
}

impl Default for AppSettings {
    fn default() -> AppSettings {
        AppSettings { shutdown_timeout: Duration::from_secs(10), wait_for_broker: None }
    }
}

impl Settings {
    /// Reads a file, lays the profile named by `CONEY_PROFILE` over it if there is one, and the environment over
    /// that.
    ///
    /// # Errors
    ///
    /// [`Error::Settings`](crate::Error::Settings), listing every mistake in the file and the environment, or that
    /// the file cannot be read.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Settings> {
        Settings::loader().file(path.as_ref()).process_environment().load()
    }

    /// Reads settings from a text in the form of `app.toml`. No profile and no environment variable counts.
    ///
    /// # Errors
    ///
    /// [`Error::Settings`](crate::Error::Settings), listing every mistake in the text.
    pub fn from_toml(text: &str) -> Result<Settings> {
        Settings::loader().text(text).load()
    }

    /// A publish and a listen pool at one URL, everything else at its default.
    ///
    /// # Errors
    ///
    /// [`Error::Settings`](crate::Error::Settings) if the URL is not one. The error does not quote it.
    pub fn from_url(url: &str) -> Result<Settings> {
        let url = AmqpUrl::parse(url)
            .map_err(|error| SettingsError::new(None, vec![Problem::new("url", error.to_string())]))?;
        Ok(Settings::for_broker(BrokerSettings::from(url)))
    }

    /// Chooses file, profile and environment one by one.
    pub fn loader() -> Loader {
        Loader::new()
    }

    fn for_broker(broker: BrokerSettings) -> Settings {
        let pools = [PUBLISH_POOL, LISTEN_POOL].map(|name| (name.to_owned(), PoolSettings::new(broker.clone())));
        Settings { pools: BTreeMap::from(pools), topology: Topology::new(), app: AppSettings::default(), outbox: None }
    }
}

impl Default for Settings {
    fn default() -> Settings {
        Settings::for_broker(BrokerSettings::default())
    }
}

/// One pool of connections.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct PoolSettings {
    /// The broker its connections go to.
    pub broker: BrokerSettings,
    /// How many connections it may hold, 1 to 1000. Defaults to 4.
    pub size: u32,
    /// How long a checkout waits for a connection, more than zero and at most a day. Defaults to 10 s.
    pub checkout_timeout: Duration,
    /// How long a publish waits for the broker's confirm, more than zero and at most a day. Defaults to 10 s.
    pub confirm_timeout: Duration,
    /// How long [`Pool::publish`](crate::Pool::publish) goes on trying, through lost connections too, more than zero and
    /// at most a day. Defaults to 30 s.
    pub publish_timeout: Duration,
    /// Whether a message that matches no queue comes back as an error. Defaults to true.
    pub mandatory: bool,
    /// How many messages of one connection may wait for their confirms, and how many callbacks of one
    /// [`RpcClient`](crate::rpc::RpcClient) for their answers, at least 1. Defaults to 1000.
    pub max_in_flight: usize,
    /// How many deliveries the broker sends ahead of their acks, 1 to 65535. Defaults to 64.
    pub prefetch: u16,
    /// When messages that a listener could not handle are tried again, if at all: `retry`, a list of delays, and
    /// `max_attempts`. Defaults to none: such a message is requeued, and rejected if it had been redelivered already.
    pub retry: Option<RetryPolicy>,
    /// The type of the queues that `retry` needs, classic or quorum. Defaults to that of the queue whose messages wait in them.
    pub retry_queue_type: Option<QueueType>,
    /// The type of the queues in which messages of [`publish_after`](crate::Pool::publish_after) wait, classic or quorum. Defaults
    /// to classic.
    pub delay_queue_type: QueueType,
    /// Whether listeners ack many messages at once while more are waiting. Defaults to true.
    pub ack_batch: bool,
    /// How many threads a listener has: a number, or a range within which it varies, from 1 to 1000. Defaults to 1.
    pub concurrency: Concurrency,
    /// How many messages a listener handles in a second at most, from one a day to a million. Defaults to none: as many as it can.
    pub max_rate: Option<f64>,
    /// When a listener rests because most messages fail. Defaults to none: never.
    pub pause_on_failures: Option<PauseOnFailures>,
}

impl PoolSettings {
    /// A pool at the given broker, everything else at its default.
    pub fn new(broker: BrokerSettings) -> PoolSettings {
        PoolSettings {
            broker,
            size: 4,
            checkout_timeout: Duration::from_secs(10),
            confirm_timeout: Duration::from_secs(10),
            publish_timeout: Duration::from_secs(30),
            mandatory: true,
            max_in_flight: 1000,
            prefetch: 64,
            retry: None,
            retry_queue_type: None,
            delay_queue_type: QueueType::Classic,
            ack_batch: true,
            concurrency: Concurrency::default(),
            max_rate: None,
            pause_on_failures: None,
        }
    }
}

impl Default for PoolSettings {
    fn default() -> PoolSettings {
        PoolSettings::new(BrokerSettings::default())
    }
}

/// Where a broker is and how to talk to it.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct BrokerSettings {
    /// The nodes to try, at least one. Defaults to `localhost:5672`.
    pub endpoints: Vec<Endpoint>,
    /// How to speak TLS, if at all. Defaults to no TLS.
    pub tls: Option<TlsSettings>,
    /// The user. Defaults to `guest`.
    pub user: String,
    /// The password. Defaults to `guest`.
    pub password: Secret,
    /// A file with the password, in place of `password`, as Docker and Kubernetes hand out secrets. It is read at each connect,
    /// so a password that is changed is used without a restart; a line break at its end is left out. Its path is relative to the
    /// working directory of the program. Defaults to none.
    pub password_file: Option<PathBuf>,
    /// How the user is shown to be who it is. Defaults to [`AuthMechanism::Plain`].
    pub auth: AuthMechanism,
    /// The virtual host, 1 to 255 bytes. Defaults to `/`.
    pub vhost: String,
    /// The heartbeat offered to the broker, in whole seconds from 1 to 65535. Defaults to 10 s.
    ///
    /// It cannot be switched off: a call on a connection that has gone silent would then never end. See
    /// <https://www.rabbitmq.com/docs/heartbeats>.
    pub heartbeat: Duration,
    /// How long connecting may take, TCP and AMQP handshake together; more than zero and at most a day.
    /// Defaults to 5 s.
    pub connect_timeout: Duration,
    /// How long a call to the broker may take that has no time-out of its own, such as a declare or a get; more
    /// than zero and at most a day. Defaults to 15 s.
    pub operation_timeout: Duration,
    /// The largest message body that is accepted from the broker, in bytes, from 1 to 536,870,912 (512 MiB). Defaults to
    /// 134,217,728 (128 MiB), which is what RabbitMQ 3.8 to 3.13 let in by default; RabbitMQ 4 lets in 16 MiB
    /// (<https://www.rabbitmq.com/docs/configure>, `max_message_size`).
    ///
    /// A larger one ends the connection before there is room made for it, and stays in its queue.
    pub max_message_size: u64,
}

impl BrokerSettings {
    /// The broker as a URL to show to people: `amqp://user:***@a:5672,b:5672/%2f`.
    pub fn masked_url(&self) -> String {
        crate::url::masked(self.tls.is_some(), &self.user, &self.endpoints, &self.vhost)
    }
}

impl Default for BrokerSettings {
    fn default() -> BrokerSettings {
        BrokerSettings {
            endpoints: vec![Endpoint::default()],
            tls: None,
            user: "guest".to_owned(),
            password: Secret::new("guest"),
            password_file: None,
            auth: AuthMechanism::Plain,
            vhost: "/".to_owned(),
            heartbeat: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(5),
            operation_timeout: Duration::from_secs(15),
            max_message_size: 128 << 20,
        }
    }
}

impl From<AmqpUrl> for BrokerSettings {
    /// What the URL says; what it cannot say, or does not, is at its default.
    fn from(url: AmqpUrl) -> BrokerSettings {
        let default = BrokerSettings::default();
        BrokerSettings {
            endpoints: vec![url.endpoint().clone()],
            tls: url.is_tls().then(TlsSettings::default),
            user: url.user().to_owned(),
            password: url.password().clone(),
            password_file: None,
            auth: url.auth().unwrap_or(default.auth),
            vhost: url.vhost().to_owned(),
            heartbeat: url.heartbeat().unwrap_or(default.heartbeat),
            connect_timeout: url.connect_timeout().unwrap_or(default.connect_timeout),
            operation_timeout: default.operation_timeout,
            max_message_size: default.max_message_size,
        }
    }
}
