//! Partitioned queues: one stream of work over several queues, in order for each key.
//!
//! This room says what they are called, which one a key belongs to, and what is declared for them. Who consumes which of them is
//! the work of [`listener`](crate::listener).

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use flate2::Crc;

use super::{
    Binding, Exchange, LeaderLocator, List, MAX_NAME, Mistake, OnConflict, QUEUE_TYPE, Queue, Topology, shown,
};
use crate::error::Error;
use crate::field::{FieldTable, FieldValue};

const SINGLE_ACTIVE: &str = "x-single-active-consumer";
const LEADER_LOCATOR: &str = "x-queue-leader-locator";

/// Between the name and the number of a partition, and between that and their count.
const SEPARATOR: char = '.';
const OF: &str = "-of-";

/// Behind the name of a partition a listener has a queue for what it gives up.
const LONGEST_SUFFIX: &str = ".dead";

/// Who computes the hash of a key, which decides on its partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum HashedBy {
    /// Who publishes, as [`Partitioned::partition_of`] does. No plugin is needed, and a key stays in its partition whatever becomes
    /// of the queues.
    #[default]
    Publisher,
    /// The broker, in an exchange of type `x-consistent-hash`: for publishers that cannot compute it. The broker needs the plugin
    /// `rabbitmq_consistent_hash_exchange`. A queue that is deleted and declared again changes where keys go.
    Broker,
}

impl HashedBy {
    pub(crate) const EXPECTED: &'static str = "expected \"publisher\" or \"broker\"";

    /// The word in settings.
    pub fn as_str(self) -> &'static str {
        match self {
            HashedBy::Publisher => "publisher",
            HashedBy::Broker => "broker",
        }
    }
}

impl fmt::Display for HashedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for HashedBy {
    type Err = Error;

    fn from_str(text: &str) -> Result<HashedBy, Error> {
        let known = [HashedBy::Publisher, HashedBy::Broker].into_iter().find(|one| one.as_str() == text);
        known.ok_or_else(|| Error::invalid("hashed_by", HashedBy::EXPECTED))
    }
}

/// One stream of work over several queues, its partitions. Messages of one key are in one partition, and are handled in order.
///
/// For `Partitioned::new("orders", 16)` there are
///
/// - 16 quorum queues `orders.0-of-16` to `orders.15-of-16`, each with a single active consumer
///   (<https://www.rabbitmq.com/docs/consumers#single-active-consumer>), their leaders spread over the nodes;
/// - a topic exchange `orders`, with a binding `3-of-16.#` for the partition 3 and one like that for each other;
/// - a queue `orders.members-of-16`, which stays empty: the number of its consumers is the number of listeners.
///
/// ```
/// # #[cfg(feature = "embedded")]
/// # fn main() -> coney::Result<()> {
/// use coney::{App, Partitioned, Settings, Topology};
///
/// let mut settings = Settings::from_url("memory://partitioned")?;
/// settings.topology = Topology::new().partitioned(Partitioned::new("orders", 4));
/// let app = App::from_settings(settings)?;
/// app.declare_topology()?;
///
/// let orders = app.partitioned("orders")?;
/// app.publish_pool().publish(&orders.exchange(), &orders.routing_key("customer-7"), "an order of customer 7")?;
///
/// let (seen, keys) = std::sync::mpsc::channel();
/// let partitioned = orders.clone();
/// let listener = app.listener_partitioned("orders").spawn(move |_context, delivery| {
///     let key = partitioned.key_of(delivery.routing_key());
///     seen.send(key.to_owned()).map_err(|_| "nobody reads the keys")
/// })?;
/// assert_eq!(keys.recv().as_deref(), Ok("customer-7"));
/// # listener.stop()
/// # }
/// # #[cfg(not(feature = "embedded"))]
/// # fn main() {}
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Partitioned {
    /// The name, from which those of the exchange and the queues are made. 1 byte at least.
    pub name: String,
    /// How many partitions there are, 1 to [`MAX_PARTITIONS`](Partitioned::MAX_PARTITIONS).
    pub partitions: u16,
    /// Who decides on the partition of a key. Defaults to [`HashedBy::Publisher`].
    pub hashed_by: HashedBy,
    /// Further arguments of the partitions. Defaults to none.
    pub arguments: FieldTable,
    /// What is done if one of the queues or the exchange is there with other properties. Defaults to what the topology says.
    pub on_conflict: Option<OnConflict>,
}

impl Partitioned {
    /// The most partitions. A listener has a channel for each of them on one connection, and RabbitMQ allows 2047
    /// (`channel_max`, <https://www.rabbitmq.com/docs/channels#channel-max>).
    pub const MAX_PARTITIONS: u16 = 1024;

    /// So many partitions, whose keys are hashed by who publishes.
    pub fn new(name: impl Into<String>, partitions: u16) -> Partitioned {
        Partitioned {
            name: name.into(),
            partitions,
            hashed_by: HashedBy::default(),
            arguments: FieldTable::new(),
            on_conflict: None,
        }
    }

    /// Who decides on the partition of a key. Defaults to [`HashedBy::Publisher`].
    #[must_use]
    pub fn hashed_by(mut self, hashed_by: HashedBy) -> Partitioned {
        self.hashed_by = hashed_by;
        self
    }

    /// Sets an optional argument of every partition; a second value for the same name replaces the first. Defaults to none. See
    /// [`queues`](Self::queues) for the usual ones by name.
    #[must_use]
    pub fn argument(mut self, name: impl Into<String>, value: impl Into<FieldValue>) -> Partitioned {
        self.arguments.insert(name.into(), value.into());
        self
    }

    /// Sets arguments of every partition by the methods of [`Queue`]. Whatever else is set on that queue is left out.
    ///
    /// ```
    /// use coney::Partitioned;
    ///
    /// let orders = Partitioned::new("orders", 16).queues(|queue| queue.max_length(100_000).delivery_limit(50));
    /// assert_eq!(orders.arguments["x-delivery-limit"], 50_i64.into());
    /// ```
    #[must_use]
    pub fn queues(mut self, with: impl FnOnce(Queue) -> Queue) -> Partitioned {
        let mut queue = Queue::new("");
        queue.arguments = self.arguments;
        self.arguments = with(queue).arguments;
        self
    }

    /// What is done if one of the queues or the exchange is there with other properties. Defaults to what the topology says.
    #[must_use]
    pub fn on_conflict(mut self, on_conflict: OnConflict) -> Partitioned {
        self.on_conflict = Some(on_conflict);
        self
    }

    /// The partition of a key, from 0 on: the CRC-32 of its bytes, modulo the number of partitions.
    ///
    /// It is the CRC-32 of gzip, zlib and PNG (ISO-HDLC, polynomial 0x04C11DB7), which every language has: `zlib.crc32(key) % 16`
    /// in Python, `crc32.ChecksumIEEE(key) % 16` in Go. Of 16 partitions `"123456789"` has 6, because its CRC-32 is 0xCBF43926.
    ///
    /// What an exchange of the broker decides ([`HashedBy::Broker`]) is not known here.
    pub fn partition_of(&self, key: impl AsRef<[u8]>) -> u16 {
        let mut crc = Crc::new();
        crc.update(key.as_ref());
        // What is left of a division by a u16 is one.
        (crc.sum() % u32::from(self.partitions.max(1))) as u16
    }

    /// The exchange to publish to: the name, or `orders.of-16` where the broker hashes.
    pub fn exchange(&self) -> String {
        match self.hashed_by {
            HashedBy::Publisher => self.name.clone(),
            HashedBy::Broker => format!("{}{SEPARATOR}of-{}", self.name, self.partitions),
        }
    }

    /// The routing key to publish a message of this key with: `3-of-16.KEY`, or the key itself where the broker hashes.
    ///
    /// Such a routing key has 255 bytes at most, which publishing checks. So a key has 242 bytes at least.
    pub fn routing_key(&self, key: &str) -> String {
        match self.hashed_by {
            HashedBy::Publisher => format!("{}{SEPARATOR}{key}", self.label(self.partition_of(key))),
            HashedBy::Broker => key.to_owned(),
        }
    }

    /// The key in a routing key that [`routing_key`](Self::routing_key) has made. Any other is returned as it is.
    pub fn key_of<'k>(&self, routing_key: &'k str) -> &'k str {
        let HashedBy::Publisher = self.hashed_by else { return routing_key };
        let Some((label, key)) = routing_key.split_once(SEPARATOR) else { return routing_key };
        let is_ours = label.split_once(OF).is_some_and(|(number, count)| {
            let number = number.parse().is_ok_and(|number: u16| number < self.partitions);
            number && count.parse() == Ok(self.partitions)
        });
        if is_ours { key } else { routing_key }
    }

    /// The name of the queue of a partition: `orders.3-of-16`.
    ///
    /// The number of partitions is part of it. So two numbers of partitions never share a queue, and a message is in a queue of its
    /// own number or nowhere.
    pub fn queue_name(&self, partition: u16) -> String {
        format!("{}{SEPARATOR}{}", self.name, self.label(partition))
    }

    /// The names of all partitions, in order.
    pub fn queue_names(&self) -> impl Iterator<Item = String> + '_ {
        self.numbers().map(|partition| self.queue_name(partition))
    }

    /// The queue whose consumers are counted, to know how many listeners share the partitions: `orders.members-of-16`.
    pub fn members_queue(&self) -> String {
        format!("{}{SEPARATOR}members{OF}{}", self.name, self.partitions)
    }

    fn numbers(&self) -> Range<u16> {
        0..self.partitions
    }

    fn label(&self, partition: u16) -> String {
        format!("{partition}{OF}{}", self.partitions)
    }

    /// The exchange, the queues and the bindings.
    pub fn topology(&self) -> Topology {
        let mut topology = Topology::new();
        let mut exchange = match self.hashed_by {
            HashedBy::Publisher => Exchange::topic(self.exchange()),
            HashedBy::Broker => Exchange::consistent_hash(self.exchange()),
        };
        exchange.on_conflict = self.on_conflict;
        topology.exchanges.push(exchange);
        let declared = |name, arguments: &FieldTable| {
            let mut queue = Queue::new(name).quorum();
            queue.on_conflict = self.on_conflict;
            queue.arguments.extend(arguments.clone());
            queue
        };
        topology.queues.push(declared(self.members_queue(), &FieldTable::new()));
        for partition in self.numbers() {
            let name = self.queue_name(partition);
            let mut queue = declared(name.clone(), &self.arguments).single_active_consumer();
            if !queue.arguments.contains_key(LEADER_LOCATOR) {
                queue = queue.leader_locator(LeaderLocator::Balanced);
            }
            topology.queues.push(queue);
            let key = match self.hashed_by {
                HashedBy::Publisher => format!("{}{SEPARATOR}#", self.label(partition)),
                // The weight: all have the same.
                HashedBy::Broker => "1".to_owned(),
            };
            topology.bindings.push(Binding::queue(name).to(self.exchange()).routing_key(key));
        }
        topology
    }

    /// What is wrong with it, and in which field.
    fn mistakes(&self) -> Vec<(&'static str, String)> {
        let mut mistakes = Vec::new();
        let last = self.queue_name(self.partitions.saturating_sub(1)).len() + LONGEST_SUFFIX.len();
        let longest = last.max(self.members_queue().len());
        if self.name.is_empty() {
            mistakes
                .push(("name", "expected a name, from which those of the exchange and the queues are made".to_owned()));
        } else if self.name.starts_with("amq.") {
            let problem = "names that begin with \"amq.\" are the broker's own and cannot be declared";
            mistakes.push(("name", problem.to_owned()));
        } else if longest > MAX_NAME {
            let most = MAX_NAME - (longest - self.name.len());
            mistakes.push(("name", format!("expected at most {most} bytes, got {}", self.name.len())));
        }
        if !(1..=Partitioned::MAX_PARTITIONS).contains(&self.partitions) {
            let problem = format!("expected 1 to {}, got {}", Partitioned::MAX_PARTITIONS, self.partitions);
            mistakes.push(("partitions", problem));
        }
        let own = [(QUEUE_TYPE, FieldValue::from("quorum")), (SINGLE_ACTIVE, FieldValue::from(true))];
        for (name, value) in own {
            if self.arguments.get(name).is_some_and(|given| *given != value) {
                mistakes.push(("arguments", format!("{name} cannot be another: partitions need it as it is")));
            }
        }
        mistakes
    }
}

impl Topology {
    /// Adds a partitioned queue: its exchange, its queues and its bindings. What cannot be one is told by
    /// [`check`](Topology::check), and by whatever declares the topology.
    #[must_use]
    pub fn partitioned(mut self, partitioned: Partitioned) -> Topology {
        let is_first = !self.partitioned.iter().any(|other| other.name == partitioned.name);
        if is_first && partitioned.mistakes().is_empty() {
            let Topology { exchanges, queues, bindings, .. } = partitioned.topology();
            self.exchanges.extend(exchanges);
            self.queues.extend(queues);
            self.bindings.extend(bindings);
        }
        self.partitioned.push(partitioned);
        self
    }

    pub(super) fn partitioned_mistakes(&self) -> impl Iterator<Item = Mistake> + '_ {
        self.partitioned.iter().enumerate().flat_map(|(index, partitioned)| {
            let taken = self.partitioned[..index].iter().any(|other| other.name == partitioned.name);
            let taken = taken.then(|| ("name", format!("{} is declared above already", shown(&partitioned.name))));
            let mistakes = partitioned.mistakes().into_iter().chain(taken);
            mistakes.map(move |(field, problem)| Mistake { list: List::Partitioned, index, field, problem })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Computed with Python: `zlib.crc32(key.encode()) % n`.
    #[test]
    fn keys_have_the_partitions_that_every_language_computes() {
        for (key, of_16, of_12) in VECTORS {
            assert_eq!(Partitioned::new("orders", 16).partition_of(key), of_16, "{key}");
            assert_eq!(Partitioned::new("orders", 12).partition_of(key), of_12, "{key}");
        }
        assert_eq!(Partitioned::new("orders", 1).partition_of("any"), 0);
    }

    #[test]
    fn a_thousand_keys_are_spread_evenly() {
        let orders = Partitioned::new("orders", 16);
        let mut counts = [0; 16];
        (0..1000).for_each(|n| counts[usize::from(orders.partition_of(format!("customer-{n}")))] += 1);
        assert!(counts.iter().all(|count| (35..=95).contains(count)), "{counts:?}");
    }

    #[test]
    fn a_key_is_found_in_its_routing_key() {
        let orders = Partitioned::new("orders", 16);
        for key in ["customer-7", "", "a.b.c", "3-of-16.x"] {
            assert_eq!(orders.key_of(&orders.routing_key(key)), key);
        }
        for foreign in ["customer.7", "99-of-16.x", "3-of-8.x", "x"] {
            assert_eq!(orders.key_of(foreign), foreign);
        }
        let by_broker = orders.hashed_by(HashedBy::Broker);
        assert_eq!(by_broker.routing_key("a.b"), "a.b");
        assert_eq!(by_broker.key_of("a.b"), "a.b");
    }

    #[test]
    fn its_topology_is_whole() {
        for hashed_by in [HashedBy::Publisher, HashedBy::Broker] {
            let orders = Partitioned::new("orders", 3).hashed_by(hashed_by).queues(|queue| queue.max_length(5));
            let topology = Topology::new().partitioned(orders);
            topology.check().unwrap();
            let names: Vec<&str> = topology.queues.iter().map(|queue| queue.name.as_str()).collect();
            assert_eq!(names, ["orders.members-of-3", "orders.0-of-3", "orders.1-of-3", "orders.2-of-3"]);
            assert_eq!(topology.queues[1].arguments["x-max-length"], 5_i64.into());
            assert!(!topology.queues[0].arguments.contains_key("x-max-length"));
            assert_eq!((topology.exchanges.len(), topology.bindings.len()), (1, 3));
        }
    }

    #[test]
    fn mistakes_are_told_once_each() {
        let long = "n".repeat(250);
        for (partitioned, key, problem) in [
            (Partitioned::new("orders", 0), "partitions", "expected 1 to 1024, got 0"),
            (Partitioned::new("orders", 1025), "partitions", "expected 1 to 1024, got 1025"),
            (Partitioned::new("", 2), "name", "expected a name"),
            (Partitioned::new("amq.x", 2), "name", "broker's own"),
            (Partitioned::new(long, 10), "name", "expected at most 241 bytes, got 250"),
            (Partitioned::new("orders", 2).argument("x-queue-type", "classic"), "arguments", "x-queue-type"),
        ] {
            let error = Topology::new().partitioned(partitioned).check().unwrap_err();
            let problems: Vec<String> = error.problems.iter().map(ToString::to_string).collect();
            assert_eq!(problems.len(), 1, "{problems:?}");
            assert!(problems[0].contains(&format!("topology.partitioned[0].{key}")), "{problems:?}");
            assert!(problems[0].contains(problem), "{problems:?}");
        }
        let twice = Topology::new().partitioned(Partitioned::new("a", 2)).partitioned(Partitioned::new("a", 3));
        let error = twice.check().unwrap_err().to_string();
        assert!(error.contains("topology.partitioned[1].name: \"a\" is declared above already"), "{error}");
    }

    const VECTORS: [(&str, u16, u16); 7] = [
        ("123456789", 6, 2),
        ("", 0, 0),
        ("a", 3, 3),
        ("customer-7", 8, 8),
        ("customer-8", 9, 1),
        ("Ünïcödé", 11, 3),
        ("order.2026.11", 4, 8),
    ];
}
