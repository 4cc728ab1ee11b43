//! `[[topology.exchanges]]`, `[[topology.queues]]`, `[[topology.bindings]]` and `[[topology.partitioned]]`.

use std::str::FromStr;

use config::{Value, ValueKind};

use super::Problem;
use super::merge;
use super::reader::{Reader, Section, child, item, kind, text};
use crate::topology::{
    Binding, Destination, Exchange, ExchangeKind, HashedBy, List, Mistake, OnConflict, Partitioned, Queue, Topology,
};

/// The lists of a topology.
pub(super) const LISTS: [&str; 4] = ["exchanges", "queues", "bindings", "partitioned"];
/// What is said of all that is in them.
pub(super) const TOPOLOGY_KEYS: [&str; 2] = ["on_conflict", "skip_failed"];
pub(super) const EXCHANGE_KEYS: [&str; 7] =
    ["name", "kind", "durable", "auto_delete", "internal", "arguments", "on_conflict"];
pub(super) const QUEUE_KEYS: [&str; 6] = ["name", "durable", "exclusive", "auto_delete", "arguments", "on_conflict"];
pub(super) const BINDING_KEYS: [&str; 5] = ["exchange", "queue", "destination_exchange", "routing_key", "arguments"];
pub(super) const PARTITIONED_KEYS: [&str; 5] = ["name", "partitions", "hashed_by", "arguments", "on_conflict"];

/// A topology, and for each of its entries the key under which it is written down: entries that cannot be read are
/// left out, so that positions shift.
#[derive(Debug, Default)]
pub(super) struct TopologySection {
    pub(super) topology: Topology,
    exchange_keys: Vec<String>,
    queue_keys: Vec<String>,
    binding_keys: Vec<String>,
    partitioned_keys: Vec<String>,
}

impl TopologySection {
    pub(super) fn read(reader: &mut Reader, value: &Value, key: String) -> TopologySection {
        let allowed: Vec<&str> = LISTS.into_iter().chain(TOPOLOGY_KEYS).collect();
        let Some(section) = reader.section(value, key, &allowed) else { return TopologySection::default() };
        let (exchanges, exchange_keys) = read_list(reader, &section, "exchanges", &EXCHANGE_KEYS, read_exchange);
        let (queues, queue_keys) = read_list(reader, &section, "queues", &QUEUE_KEYS, read_queue);
        let (bindings, binding_keys) = read_list(reader, &section, "bindings", &BINDING_KEYS, read_binding);
        let on_conflict = on_conflict(reader, &section);
        let skip_failed = reader.boolean(&section, "skip_failed").map(|given| given.value);
        let topology = Topology { exchanges, queues, bindings, on_conflict, skip_failed, ..Topology::new() };
        let mut whole =
            TopologySection { topology, exchange_keys, queue_keys, binding_keys, partitioned_keys: Vec::new() };
        let (partitioned, keys) = read_list(reader, &section, "partitioned", &PARTITIONED_KEYS, read_partitioned);
        partitioned.into_iter().zip(keys).for_each(|(partitioned, key)| whole.add(partitioned, key));
        whole
    }

    /// Adds a partitioned queue, and what it is made of under its key.
    fn add(&mut self, partitioned: Partitioned, key: String) {
        let topology = std::mem::take(&mut self.topology).partitioned(partitioned);
        self.exchange_keys.resize(topology.exchanges.len(), key.clone());
        self.queue_keys.resize(topology.queues.len(), key.clone());
        self.binding_keys.resize(topology.bindings.len(), key.clone());
        self.partitioned_keys.push(key);
        self.topology = topology;
    }

    /// The mistake under the key of the file it is in.
    pub(super) fn problem(&self, mistake: &Mistake) -> Problem {
        let keys = match mistake.list {
            List::Exchanges => &self.exchange_keys,
            List::Queues => &self.queue_keys,
            List::Bindings => &self.binding_keys,
            List::Partitioned => &self.partitioned_keys,
        };
        Problem::new(child(&keys[mistake.index], mistake.field), mistake.problem.clone())
    }
}

fn read_list<T>(
    reader: &mut Reader,
    section: &Section<'_>,
    name: &str,
    allowed: &[&str],
    read: fn(&mut Reader, &Section<'_>) -> Option<T>,
) -> (Vec<T>, Vec<String>) {
    let Some(value) = section.value(name) else { return (Vec::new(), Vec::new()) };
    let ValueKind::Array(entries) = &value.kind else {
        let problem = format!("expected a list of tables, written [[topology.{name}]], got {}", kind(&value.kind));
        reader.mistake_in(value, section.key_of(name), problem);
        return (Vec::new(), Vec::new());
    };
    let mut list = (Vec::new(), Vec::new());
    for (index, entry) in entries.iter().enumerate() {
        // In a list that has been merged each entry says where it is written.
        let (entry, written_at) = merge::unmarked(entry);
        let key = written_at.unwrap_or_else(|| item(&section.key_of(name), index));
        let read = reader.section(&entry, key.clone(), allowed).and_then(|section| read(reader, &section));
        if let Some(read) = read {
            list.0.push(read);
            list.1.push(key);
        }
    }
    list
}

fn read_exchange(reader: &mut Reader, section: &Section<'_>) -> Option<Exchange> {
    let name = required_text(reader, section, "name", "expected the name of the exchange");
    let kind = match section.value("kind") {
        Some(_) => reader.read(section, "kind", |value| {
            ExchangeKind::from_str(text(value)?).map_err(|_| ExchangeKind::EXPECTED.to_owned())
        }),
        None => {
            reader.mistake(section.key_of("kind"), format!("missing; {}", ExchangeKind::EXPECTED));
            None
        }
    };
    // An exchange of an unknown kind is still one that bindings may name.
    let mut exchange = Exchange::new(name?, kind.map_or(ExchangeKind::Direct, |kind| kind.value));
    exchange.durable = flag(reader, section, "durable", exchange.durable);
    exchange.auto_delete = flag(reader, section, "auto_delete", exchange.auto_delete);
    exchange.internal = flag(reader, section, "internal", exchange.internal);
    exchange.arguments = reader.arguments(section, "arguments");
    exchange.on_conflict = on_conflict(reader, section);
    Some(exchange)
}

fn read_queue(reader: &mut Reader, section: &Section<'_>) -> Option<Queue> {
    let name = required_text(reader, section, "name", "expected the name of the queue");
    let mut queue = Queue::new(name?);
    queue.durable = flag(reader, section, "durable", queue.durable);
    queue.exclusive = flag(reader, section, "exclusive", queue.exclusive);
    queue.auto_delete = flag(reader, section, "auto_delete", queue.auto_delete);
    queue.arguments = reader.arguments(section, "arguments");
    queue.on_conflict = on_conflict(reader, section);
    Some(queue)
}

fn read_binding(reader: &mut Reader, section: &Section<'_>) -> Option<Binding> {
    let source = match section.value("exchange") {
        Some(_) => reader.text(section, "exchange").map(|exchange| exchange.value),
        None => {
            reader.mistake(section.key_of("exchange"), "missing; expected the exchange that messages come from");
            None
        }
    };
    let destination = match (section.value("queue"), section.value("destination_exchange")) {
        (Some(_), None) => {
            required_text(reader, section, "queue", "expected the name of a queue").map(Destination::Queue)
        }
        (None, Some(_)) => {
            reader.text(section, "destination_exchange").map(|exchange| Destination::Exchange(exchange.value))
        }
        (both, _) => {
            let number = if both.is_some() { "both are there" } else { "neither is" };
            let problem = format!("expected one of queue and destination_exchange; {number}");
            reader.mistake(section.key.clone(), problem);
            None
        }
    };
    let routing_key = reader.text(section, "routing_key").map(|key| key.value).unwrap_or_default();
    let arguments = reader.arguments(section, "arguments");
    Some(Binding { source: source?, destination: destination?, routing_key, arguments })
}

fn read_partitioned(reader: &mut Reader, section: &Section<'_>) -> Option<Partitioned> {
    let name = required_text(reader, section, "name", "expected the name of the partitioned queue");
    let range = 1..=i64::from(Partitioned::MAX_PARTITIONS);
    let partitions = match section.value("partitions") {
        Some(_) => reader.number(section, "partitions", range),
        None => {
            reader.mistake(section.key_of("partitions"), "missing; expected how many partitions there are");
            None
        }
    };
    let hashed_by =
        reader.read(section, "hashed_by", |value| text(value)?.parse().map_err(|_| HashedBy::EXPECTED.to_owned()));
    let mut partitioned = Partitioned::new(name?, partitions?);
    partitioned.hashed_by = hashed_by.map(|given| given.value).unwrap_or_default();
    partitioned.arguments = reader.arguments(section, "arguments");
    partitioned.on_conflict = on_conflict(reader, section);
    Some(partitioned)
}

fn on_conflict(reader: &mut Reader, section: &Section<'_>) -> Option<OnConflict> {
    let read = |value: &Value| text(value)?.parse().map_err(|_| OnConflict::EXPECTED.to_owned());
    reader.read(section, "on_conflict", read).map(|given| given.value)
}

/// A name that must be there and must not be empty.
fn required_text(reader: &mut Reader, section: &Section<'_>, name: &str, expected: &str) -> Option<String> {
    if section.value(name).is_none() {
        reader.mistake(section.key_of(name), format!("missing; {expected}"));
        return None;
    }
    let read = reader.read(section, name, |value| match text(value)? {
        "" => Err(format!("{expected}, which must not be empty")),
        text => Ok(text.to_owned()),
    });
    read.map(|text| text.value)
}

fn flag(reader: &mut Reader, section: &Section<'_>, name: &str, default: bool) -> bool {
    reader.boolean(section, name).map_or(default, |given| given.value)
}
