//! Synchronous RabbitMQ for threaded programs.

mod app;
mod callback;
mod confirms;
mod connection;
mod deadline;
mod declare;
mod delivery;
mod dispatch;
mod error;
mod field;
mod greeting;
mod guard;
mod link;
mod message;
mod outbound;
mod pool;
mod publish;
pub mod settings;
mod topology;
mod transport;
mod url;
mod wire;

#[cfg(feature = "testing")]
pub mod testing;

pub use app::App;
pub use connection::Connection;
pub use declare::QueueInfo;
pub use delivery::{Delivery, Received};
pub use error::{BatchError, ConnectError, Error, Holder, Result};
pub use field::{FieldTable, FieldValue};
pub use message::Message;
pub use pool::{Pool, PoolStatus, PooledConnection};
pub use settings::{BrokerSettings, Loader, PoolSettings, Problem, Settings, SettingsError};
pub use topology::{Binding, Destination, Exchange, ExchangeKind, Overflow, Queue, Topology};
pub use url::{AmqpUrl, Endpoint, Secret, UrlError};
