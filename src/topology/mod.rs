//! Exchanges, queues and bindings as values: what a program wants to exist on the broker.
//!
//! This room describes and checks. It talks to no broker, and it reads no files: the TOML form is read by
//! `settings`.

use std::fmt;
use std::str::FromStr;

use crate::error::Error;
use crate::field::{FieldTable, FieldValue};

mod arguments;
mod check;
mod conflict;
mod delivery_limit;
mod partitioned;
mod queue_type;

pub use self::arguments::{DeadLetterStrategy, LeaderLocator, Overflow};
pub(crate) use self::check::{List, Mistake, shown};
pub use self::conflict::OnConflict;
pub(crate) use self::delivery_limit::DeliveryLimit;
pub use self::partitioned::{HashedBy, Partitioned};
pub(crate) use self::queue_type::QUEUE_TYPE;
pub use self::queue_type::QueueType;

/// Names, routing keys and argument names travel as AMQP short strings, whose length is one octet
/// (AMQP 0-9-1, section 4.2.5.3).
const MAX_NAME: usize = 255;

/// Exchanges that every virtual host has from the start, so that they can be bound to without being declared.
/// The last one carries RabbitMQ's message tracing (<https://www.rabbitmq.com/docs/firehose>).
const PREDEFINED_EXCHANGES: [&str; 6] =
    ["amq.direct", "amq.fanout", "amq.topic", "amq.headers", "amq.match", "amq.rabbitmq.trace"];

/// A set of exchanges, queues and bindings, in the order in which they were added.
///
/// ```
/// use coney::{Binding, Exchange, Queue, Topology};
///
/// let topology = Topology::new()
///     .exchange(Exchange::direct("room"))
///     .queue(Queue::new("listener1"))
///     .bind(Binding::queue("listener1").to("room").routing_key("user1"));
/// topology.check()?;
/// # Ok::<(), coney::SettingsError>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct Topology {
    /// The exchanges to declare.
    pub exchanges: Vec<Exchange>,
    /// The queues to declare.
    pub queues: Vec<Queue>,
    /// The bindings to make, between what is declared here and the `amq.` exchanges that are always there.
    pub bindings: Vec<Binding>,
    /// The partitioned queues. What each of them is made of is among the exchanges, queues and bindings too:
    /// [`Topology::partitioned`] adds both.
    pub partitioned: Vec<Partitioned>,
    /// What is done about what is there with other properties. Defaults to nothing said.
    pub on_conflict: Option<OnConflict>,
    /// Whether what the broker refuses is left out. Defaults to nothing said.
    pub skip_failed: Option<bool>,
}

impl Topology {
    /// A topology with nothing in it.
    pub fn new() -> Topology {
        Topology::default()
    }

    /// Adds an exchange.
    #[must_use]
    pub fn exchange(mut self, exchange: Exchange) -> Topology {
        self.exchanges.push(exchange);
        self
    }

    /// Adds a queue.
    #[must_use]
    pub fn queue(mut self, queue: Queue) -> Topology {
        self.queues.push(queue);
        self
    }

    /// Adds a binding. Its exchange and its destination must be in the same topology, or be one of the `amq.`
    /// exchanges of the broker; they may be added later.
    #[must_use]
    pub fn bind(mut self, binding: Binding) -> Topology {
        self.bindings.push(binding);
        self
    }

    /// Whether there is nothing to declare.
    pub fn is_empty(&self) -> bool {
        self.exchanges.is_empty() && self.queues.is_empty() && self.bindings.is_empty() && self.partitioned.is_empty()
    }
}

/// How an exchange chooses the queues of a message (AMQP 0-9-1, section 3.1.3).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ExchangeKind {
    /// To the bindings whose routing key is that of the message.
    Direct,
    /// To every binding.
    Fanout,
    /// To the bindings whose pattern matches the routing key: words between dots, `*` for one, `#` for any number.
    Topic,
    /// To the bindings whose arguments match the headers of the message.
    Headers,
    /// By the rules of a broker plugin. The name begins with `x-`, as in `x-consistent-hash`.
    Custom(String),
}

impl ExchangeKind {
    pub(crate) const EXPECTED: &str =
        "expected \"direct\", \"fanout\", \"topic\", \"headers\", or a plugin's kind, which begins with \"x-\"";

    /// The name on the wire.
    pub fn as_str(&self) -> &str {
        match self {
            ExchangeKind::Direct => "direct",
            ExchangeKind::Fanout => "fanout",
            ExchangeKind::Topic => "topic",
            ExchangeKind::Headers => "headers",
            ExchangeKind::Custom(name) => name,
        }
    }
}

impl fmt::Display for ExchangeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for ExchangeKind {
    type Err = Error;

    fn from_str(text: &str) -> Result<ExchangeKind, Error> {
        match text {
            "direct" => Ok(ExchangeKind::Direct),
            "fanout" => Ok(ExchangeKind::Fanout),
            "topic" => Ok(ExchangeKind::Topic),
            "headers" => Ok(ExchangeKind::Headers),
            custom if is_custom_kind(custom) => Ok(ExchangeKind::Custom(custom.to_owned())),
            _ => Err(Error::invalid("exchange kind", ExchangeKind::EXPECTED)),
        }
    }
}

fn is_custom_kind(name: &str) -> bool {
    name.starts_with("x-") && name.len() > "x-".len()
}

/// An exchange to declare.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Exchange {
    /// The name, 1 to 255 bytes. Names that begin with `amq.` are the broker's own.
    pub name: String,
    /// How it routes.
    pub kind: ExchangeKind,
    /// Whether it survives a restart of the broker. Defaults to true.
    pub durable: bool,
    /// Whether it goes when its last binding goes. Defaults to false.
    pub auto_delete: bool,
    /// Whether only other exchanges may put messages in, and clients may not. Defaults to false.
    pub internal: bool,
    /// Optional arguments, `x-…` and `alternate-exchange`. Defaults to none.
    pub arguments: FieldTable,
    /// What is done if it is there with other properties. Defaults to what the topology says.
    pub on_conflict: Option<OnConflict>,
}

impl Exchange {
    /// A durable exchange of the given kind.
    pub fn new(name: impl Into<String>, kind: ExchangeKind) -> Exchange {
        Exchange {
            name: name.into(),
            kind,
            durable: true,
            auto_delete: false,
            internal: false,
            arguments: FieldTable::new(),
            on_conflict: None,
        }
    }

    /// A durable direct exchange.
    pub fn direct(name: impl Into<String>) -> Exchange {
        Exchange::new(name, ExchangeKind::Direct)
    }

    /// A durable fanout exchange.
    pub fn fanout(name: impl Into<String>) -> Exchange {
        Exchange::new(name, ExchangeKind::Fanout)
    }

    /// A durable topic exchange.
    pub fn topic(name: impl Into<String>) -> Exchange {
        Exchange::new(name, ExchangeKind::Topic)
    }

    /// A durable headers exchange.
    pub fn headers(name: impl Into<String>) -> Exchange {
        Exchange::new(name, ExchangeKind::Headers)
    }

    /// Whether the exchange survives a restart of the broker. Defaults to true.
    #[must_use]
    pub fn durable(mut self, durable: bool) -> Exchange {
        self.durable = durable;
        self
    }

    /// Whether the broker deletes the exchange once its last binding is gone. Defaults to false.
    #[must_use]
    pub fn auto_delete(mut self, auto_delete: bool) -> Exchange {
        self.auto_delete = auto_delete;
        self
    }

    /// Whether the exchange takes messages from other exchanges only. Defaults to false.
    #[must_use]
    pub fn internal(mut self, internal: bool) -> Exchange {
        self.internal = internal;
        self
    }

    /// Sets an optional argument; a second value for the same name replaces the first. Defaults to none.
    #[must_use]
    pub fn argument(mut self, name: impl Into<String>, value: impl Into<FieldValue>) -> Exchange {
        self.arguments.insert(name.into(), value.into());
        self
    }

    /// The exchange that gets the messages this one cannot route (`alternate-exchange`,
    /// <https://www.rabbitmq.com/docs/ae>). Defaults to none.
    #[must_use]
    pub fn alternate_exchange(self, name: impl Into<String>) -> Exchange {
        self.argument("alternate-exchange", name.into())
    }
}

/// A queue to declare.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Queue {
    /// The name, 1 to 255 bytes, or empty to let the broker choose one. Names that begin with `amq.` are the
    /// broker's own.
    pub name: String,
    /// Whether it survives a restart of the broker. Defaults to true.
    pub durable: bool,
    /// Whether it belongs to the connection that declares it and goes with it. Defaults to false.
    pub exclusive: bool,
    /// Whether it goes when its last consumer goes. Defaults to false.
    pub auto_delete: bool,
    /// Optional arguments, `x-…`. Defaults to none.
    pub arguments: FieldTable,
    /// What is done if it is there with other properties. Defaults to what the topology says.
    pub on_conflict: Option<OnConflict>,
}

impl Queue {
    /// A durable queue that any connection may use.
    pub fn new(name: impl Into<String>) -> Queue {
        Queue {
            name: name.into(),
            durable: true,
            exclusive: false,
            auto_delete: false,
            arguments: FieldTable::new(),
            on_conflict: None,
        }
    }

    /// A queue with a name of the broker's choosing, for the declaring connection alone. It ends with that
    /// connection.
    ///
    /// A connection of a pool outlives the guard that it is lent by, and so does the queue: delete it by its name before the
    /// guard is given back, or let a listener on the queue `""` declare it.
    pub fn server_named() -> Queue {
        Queue::new("").durable(false).exclusive(true)
    }

    /// Whether the queue survives a restart of the broker. Defaults to true.
    #[must_use]
    pub fn durable(mut self, durable: bool) -> Queue {
        self.durable = durable;
        self
    }

    /// Whether the queue is for the declaring connection alone and ends with it. Defaults to false.
    #[must_use]
    pub fn exclusive(mut self, exclusive: bool) -> Queue {
        self.exclusive = exclusive;
        self
    }

    /// Whether the broker deletes the queue once its last consumer is gone. Defaults to false.
    #[must_use]
    pub fn auto_delete(mut self, auto_delete: bool) -> Queue {
        self.auto_delete = auto_delete;
        self
    }

    /// Sets an optional argument; a second value for the same name replaces the first. Defaults to none.
    #[must_use]
    pub fn argument(mut self, name: impl Into<String>, value: impl Into<FieldValue>) -> Queue {
        self.arguments.insert(name.into(), value.into());
        self
    }
}

/// Where a binding leads.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Destination {
    /// To the queue of that name. The empty name is the queue of this topology that the broker names.
    Queue(String),
    /// To the exchange of that name (<https://www.rabbitmq.com/docs/e2e>).
    Exchange(String),
}

/// A rule by which an exchange passes messages on to a queue or to another exchange.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Binding {
    /// The exchange that messages come from.
    pub source: String,
    /// Where they go.
    pub destination: Destination,
    /// The routing key, or for a topic exchange the pattern; at most 255 bytes. Defaults to empty.
    pub routing_key: String,
    /// Optional arguments: what a headers exchange compares. Defaults to none.
    pub arguments: FieldTable,
}

impl Binding {
    /// A binding that leads to a queue. Say where from with [`to`](Binding::to).
    pub fn queue(queue: impl Into<String>) -> Binding {
        Binding::leading_to(Destination::Queue(queue.into()))
    }

    /// A binding that leads to an exchange. Say where from with [`to`](Binding::to).
    pub fn exchange(exchange: impl Into<String>) -> Binding {
        Binding::leading_to(Destination::Exchange(exchange.into()))
    }

    fn leading_to(destination: Destination) -> Binding {
        Binding { source: String::new(), destination, routing_key: String::new(), arguments: FieldTable::new() }
    }

    /// The exchange it is bound to, from which messages come. Has no default.
    #[must_use]
    pub fn to(mut self, source: impl Into<String>) -> Binding {
        self.source = source.into();
        self
    }

    /// The routing key, or for a topic exchange the pattern; at most 255 bytes. Defaults to empty.
    #[must_use]
    pub fn routing_key(mut self, routing_key: impl Into<String>) -> Binding {
        self.routing_key = routing_key.into();
        self
    }

    /// Sets an optional argument; a second value for the same name replaces the first. Defaults to none.
    #[must_use]
    pub fn argument(mut self, name: impl Into<String>, value: impl Into<FieldValue>) -> Binding {
        self.arguments.insert(name.into(), value.into());
        self
    }
}
