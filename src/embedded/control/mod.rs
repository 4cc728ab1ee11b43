//! What tests ask of a broker and do to it. This file is about connections, `host` about
//! exchanges, queues and messages.
//!
//! ```
//! use std::time::Duration;
//! use coney::embedded::EmbeddedBroker;
//! use coney::{App, Queue, Settings};
//!
//! # fn main() -> coney::Result<()> {
//! let broker = EmbeddedBroker::start()?;
//! let control = broker.control();
//! let app = App::from_settings(Settings::from_url(&broker.url())?)?;
//! let connection = app.publish_pool().connection()?;
//! connection.queue_declare(&Queue::new("orders"))?;
//!
//! control.nack_next(1);
//! assert!(connection.publish("", "orders", "refused").is_err());
//! connection.publish("", "orders", "taken")?;
//! control.wait_for_queue_len("orders", 1, Duration::from_secs(5))?;
//!
//! control.drop_connections();
//! assert!(connection.publish("", "orders", "lost on the way").is_err());
//! # Ok(())
//! # }
//! ```

mod host;

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

pub use self::host::{BindingFacts, ConsumerFacts, ExchangeFacts, QueueFacts};
use super::refusal::{Refusal, Scope};
use super::server::Broker;
use super::session::Session;
use crate::amqp::value::{Table, Value};
use crate::error::{Error, Result, counted};
use crate::field::{FieldTable, FieldValue};

/// Looks into an [`EmbeddedBroker`](super::EmbeddedBroker), hurts it, and waits for what happens in it.
///
/// Cheap to clone. What it shows is as of the moment it is asked, and what it does is done when it returns. It does not
/// keep the broker running.
#[derive(Clone)]
pub struct Control {
    pub(super) broker: Arc<Broker>,
    /// The virtual host that is meant where none is named.
    pub(super) vhost: String,
}

/// A connection, as the broker sees it.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ConnectionFacts {
    /// The client's `connection_name`; if it has none, the two ends of its socket.
    pub name: String,
    /// The client's end of the socket.
    pub peer: SocketAddr,
    /// Who is logged in.
    pub user: String,
    /// The virtual host.
    pub vhost: String,
    /// How many channels are open.
    pub channels: usize,
    /// What the client has said of itself. Text that is no UTF-8 is shown as bytes.
    pub client_properties: FieldTable,
}

impl Control {
    pub(super) fn new(broker: Arc<Broker>) -> Control {
        Control { broker, vhost: "/".to_owned() }
    }

    fn sessions_named(&self, name: &str) -> Vec<Arc<Session>> {
        let mut sessions = self.broker.sessions();
        sessions.retain(|session| session.name == name);
        sessions
    }

    /// Every open connection, the oldest first.
    pub fn connections(&self) -> Vec<ConnectionFacts> {
        let facts = |session: &Arc<Session>| ConnectionFacts {
            name: session.name.clone(),
            peer: session.peer,
            user: session.user.name.clone(),
            vhost: session.host.name().to_owned(),
            channels: session.channel_count(),
            client_properties: public_table(&session.properties),
        };
        self.broker.sessions().iter().map(facts).collect()
    }

    /// Breaks the connections of this name off without a word. Returns how many there were.
    ///
    /// What they had not acknowledged is back in its queues when this returns.
    pub fn drop_connection(&self, name: &str) -> usize {
        self.cut(&self.sessions_named(name))
    }

    /// Breaks every connection off without a word. Returns how many there were. See
    /// [`drop_connection`](Control::drop_connection).
    pub fn drop_connections(&self) -> usize {
        self.broker.shut_lingering();
        self.cut(&self.broker.sessions())
    }

    fn cut(&self, sessions: &[Arc<Session>]) -> usize {
        for session in sessions {
            session.cut();
            self.broker.leave(session.id);
        }
        self.broker.wake_held_up();
        sessions.len()
    }

    /// Closes the connections of this name with `connection.close`. Returns how many there were.
    ///
    /// RabbitMQ's own is 320 with the text `CONNECTION_FORCED - ` and a reason.
    pub fn close_connection(&self, name: &str, code: u16, text: &str) -> usize {
        self.close(&self.sessions_named(name), code, text)
    }

    /// Closes every connection with `connection.close`. Returns how many there were.
    ///
    /// A client that does not answer stays connected for a heartbeat interval, 30 s at most and without heartbeats.
    pub fn close_connections(&self, code: u16, text: &str) -> usize {
        self.close(&self.broker.sessions(), code, text)
    }

    fn close(&self, sessions: &[Arc<Session>], code: u16, text: &str) -> usize {
        let refusal = Refusal::custom(Scope::Connection, code, text);
        let closed = sessions.iter().filter(|session| session.close(&refusal)).count();
        self.broker.wake_held_up();
        closed
    }

    /// Closes channels of the connections of this name with `channel.close`: the one of this number, or all. Returns
    /// how many there were.
    pub fn close_channels(&self, connection: &str, number: Option<u16>, code: u16, text: &str) -> usize {
        let refusal = Refusal::custom(Scope::Channel, code, text);
        self.sessions_named(connection).iter().map(|session| session.close_channels(number, &refusal)).sum()
    }

    /// Whether new connections are closed as soon as they are accepted. Those that are open stay.
    pub fn refuse_connections(&self, refuse: bool) {
        self.broker.set_refusing(refuse);
    }

    /// Closes the next `count` new connections with `connection.close` in answer to their `connection.open`, as a broker
    /// does that is on its way up or down. With 0 no more are.
    pub fn refuse_next_opens(&self, count: usize, code: u16, text: &str) {
        self.broker.refuse_opens(count, Refusal::custom(Scope::Connection, code, text));
    }

    /// Takes no messages from any connection, as RabbitMQ does when it is `low on memory`, and tells the clients
    /// (`connection.blocked`).
    ///
    /// From a connection that publishes nevertheless nothing more is read until
    /// [`unblock_publishers`](Control::unblock_publishers).
    pub fn block_publishers(&self, reason: &str) {
        self.broker.set_blocked(Some(reason));
    }

    /// Takes messages again, and tells the clients (`connection.unblocked`).
    pub fn unblock_publishers(&self) {
        self.broker.set_blocked(None);
    }

    /// Waits until there are exactly `count` connections.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] with what there was instead.
    pub fn wait_for_connections(&self, count: usize, timeout: Duration) -> Result<()> {
        self.wait_until(
            timeout,
            |control| control.broker.sessions().len() == count,
            |control| {
                let names: Vec<_> = control.broker.sessions().iter().map(|session| session.name.clone()).collect();
                format!("wait for {} (there are {}: {names:?})", counted(count, "connection"), names.len())
            },
        )
    }

    /// Waits until `holds` says so; it is asked again after each change in the broker. `what` is for the error.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] that says what was waited for.
    pub fn wait_for(&self, what: &str, timeout: Duration, holds: impl FnMut(&Control) -> bool) -> Result<()> {
        self.wait_until(timeout, holds, |_| format!("wait for {what}"))
    }

    pub(super) fn wait_until(
        &self,
        timeout: Duration,
        mut holds: impl FnMut(&Control) -> bool,
        during: impl Fn(&Control) -> String,
    ) -> Result<()> {
        let deadline = crate::deadline::after(timeout);
        self.broker
            .news
            .wait_until(deadline, || holds(self).then_some(()))
            .ok_or_else(|| Error::Timeout { during: during(self), after: timeout })
    }
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").field("connections", &self.broker.sessions().len()).finish_non_exhaustive()
    }
}

/// A table as the rest of the crate has it: by name, of two of the same name the first.
pub(super) fn public_table(table: &Table) -> FieldTable {
    let mut public = FieldTable::new();
    for (name, value) in &table.0 {
        public.entry(name.to_string()).or_insert_with(|| public_value(value));
    }
    public
}

fn public_value(value: &Value) -> FieldValue {
    match value {
        Value::Bool(value) => FieldValue::Bool(*value),
        Value::I8(value) => FieldValue::I8(*value),
        Value::U8(value) => FieldValue::U8(*value),
        Value::I16(value) => FieldValue::I16(*value),
        Value::U16(value) => FieldValue::U16(*value),
        Value::I32(value) => FieldValue::I32(*value),
        Value::U32(value) => FieldValue::U32(*value),
        Value::I64(value) => FieldValue::I64(*value),
        Value::F32(value) => FieldValue::F32(*value),
        Value::F64(value) => FieldValue::F64(*value),
        // The bits that a client of this crate would see: its decimals have no sign.
        Value::Decimal { scale, value } => FieldValue::Decimal { scale: *scale, value: *value as u32 },
        Value::LongString(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => FieldValue::String(text.to_owned()),
            Err(_) => FieldValue::Bytes(bytes.clone()),
        },
        Value::Array(values) => FieldValue::Array(values.iter().map(public_value).collect()),
        Value::Timestamp(value) => FieldValue::Timestamp(*value),
        Value::Table(table) => FieldValue::Table(public_table(table)),
        Value::Void => FieldValue::Void,
        Value::Bytes(bytes) => FieldValue::Bytes(bytes.clone()),
    }
}
