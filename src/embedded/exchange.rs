//! Exchanges: their kinds, their bindings, and where a message goes from one of them. Nothing here touches a queue.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;

use super::arguments::{quoted, type_name, whole_name};
use super::hashed::{HashBindings, HashOn, weight};
use super::headers::{HeaderBindings, MessageHeaders, Mode};
use super::refusal::Refusal;
use crate::amqp::ShortString;
use crate::amqp::value::{Table, Value};
use crate::topic::{Patterns, take_one};

/// A queue of the vhost, for as long as it lives; a queue declared anew under the same name is another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct QueueId(pub(super) u64);

/// An exchange of the vhost, likewise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct ExchangeId(pub(super) u64);

/// What an exchange is bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Destination {
    Queue(QueueId),
    Exchange(ExchangeId),
}

/// How an exchange routes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Direct,
    Fanout,
    Topic,
    Headers,
    /// By a hash, as RabbitMQ's plugin `rabbitmq_consistent_hash_exchange` does it.
    Hashed,
}

impl Kind {
    pub(super) fn of_name(name: &ShortString) -> Option<Kind> {
        let all = [Kind::Direct, Kind::Fanout, Kind::Topic, Kind::Headers, Kind::Hashed];
        all.into_iter().find(|kind| name == kind.name())
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Direct => "direct",
            Kind::Fanout => "fanout",
            Kind::Topic => "topic",
            Kind::Headers => "headers",
            Kind::Hashed => "x-consistent-hash",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // As Erlang prints a word with a dash in it.
            Kind::Hashed => write!(f, "'{}'", self.name()),
            kind => f.write_str(kind.name()),
        }
    }
}

/// Destinations, and how many bindings lead to each.
type Tally = BTreeMap<Destination, usize>;

/// The bindings as routing wants them.
#[derive(Debug)]
enum Index {
    Direct(BTreeMap<ShortString, Tally>),
    Fanout(Tally),
    Topic(Patterns<Destination>),
    Headers(HeaderBindings<Destination>),
    Hashed(HashBindings<Destination>),
}

/// What tells the bindings to one destination from each other. Arguments count as a set, and are compared as bytes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct BindingKey {
    key: ShortString,
    arguments: Box<[u8]>,
}

impl BindingKey {
    fn new(key: &ShortString, sorted: &Table) -> BindingKey {
        BindingKey { key: key.clone(), arguments: sorted.encode_inside().into() }
    }
}

#[derive(Debug)]
struct Binding {
    /// Sorted by name.
    arguments: Table,
    /// Its place among the bindings of a headers exchange.
    place: Option<usize>,
}

/// An exchange with its bindings.
#[derive(Debug)]
pub(super) struct Exchange {
    pub(super) name: ShortString,
    pub(super) kind: Kind,
    pub(super) durable: bool,
    pub(super) auto_delete: bool,
    pub(super) internal: bool,
    pub(super) arguments: Table,
    index: Index,
    /// The bindings as they were made, by destination.
    bindings: BTreeMap<Destination, BTreeMap<BindingKey, Binding>>,
}

impl Exchange {
    pub(super) fn new(name: ShortString, kind: Kind) -> Exchange {
        let index = match kind {
            Kind::Direct => Index::Direct(BTreeMap::new()),
            Kind::Fanout => Index::Fanout(Tally::new()),
            Kind::Topic => Index::Topic(Patterns::new()),
            Kind::Headers => Index::Headers(HeaderBindings::new()),
            Kind::Hashed => Index::Hashed(HashBindings::new(HashOn::RoutingKey)),
        };
        Exchange {
            name,
            kind,
            durable: false,
            auto_delete: false,
            internal: false,
            arguments: Table::default(),
            index,
            bindings: BTreeMap::new(),
        }
    }

    /// Says what an exchange hashes that does so.
    pub(super) fn hash_on(&mut self, on: HashOn) {
        self.index = Index::Hashed(HashBindings::new(on));
    }

    /// Where what this exchange cannot route goes.
    pub(super) fn alternate(&self) -> Option<ShortString> {
        match self.arguments.get("alternate-exchange") {
            Some(Value::LongString(name)) => whole_name(name),
            _ => None,
        }
    }

    /// Refuses what a headers exchange cannot match by, and what is no weight.
    pub(super) fn check_binding(&self, key: &ShortString, arguments: &Table) -> Result<(), Refusal> {
        if self.kind == Kind::Hashed {
            return weight(key).map(drop);
        }
        if self.kind != Kind::Headers {
            return Ok(());
        }
        match arguments.get("x-match") {
            None => Ok(()),
            Some(Value::LongString(mode)) if Mode::of_name(mode).is_some() => Ok(()),
            Some(Value::LongString(mode)) => Err(Refusal::precondition_failed(format_args!(
                "Invalid x-match field value <<\"{}\">>; expected all, any, all-with-x, or any-with-x",
                String::from_utf8_lossy(mode)
            ))),
            Some(other) => Err(Refusal::precondition_failed(format_args!(
                "Invalid x-match field type {} (value {}); expected longstr",
                type_name(other),
                quoted(other)
            ))),
        }
    }

    /// Adds a binding, unless there is the same already.
    pub(super) fn bind(&mut self, destination: Destination, key: &ShortString, arguments: &Table) {
        let arguments = sorted(arguments);
        let Entry::Vacant(new) = self.bindings.entry(destination).or_default().entry(BindingKey::new(key, &arguments))
        else {
            return;
        };
        let mut place = None;
        match &mut self.index {
            Index::Direct(keys) => *keys.entry(key.clone()).or_default().entry(destination).or_insert(0) += 1,
            Index::Fanout(tally) => *tally.entry(destination).or_insert(0) += 1,
            Index::Topic(patterns) => patterns.insert(key.as_bytes(), destination),
            Index::Headers(bindings) => place = Some(bindings.insert(&arguments, destination)),
            // It was checked.
            Index::Hashed(bindings) => bindings.insert(destination, weight(key).unwrap_or(1.0)),
        }
        new.insert(Binding { arguments, place });
    }

    /// Takes a binding away; `false` if there is none such.
    pub(super) fn unbind(&mut self, destination: Destination, key: &ShortString, arguments: &Table) -> bool {
        let Some(bindings) = self.bindings.get_mut(&destination) else { return false };
        let Some(binding) = bindings.remove(&BindingKey::new(key, &sorted(arguments))) else { return false };
        if bindings.is_empty() {
            self.bindings.remove(&destination);
        }
        self.forget(destination, key, &binding);
        true
    }

    /// Takes bindings to a destination away, as many as the budget is for. True if there are no more.
    pub(super) fn unbind_some(&mut self, destination: Destination, budget: &mut usize) -> bool {
        loop {
            let Some(bindings) = self.bindings.get_mut(&destination) else { return true };
            let Some((BindingKey { key, .. }, binding)) = bindings.pop_first() else {
                self.bindings.remove(&destination);
                return true;
            };
            self.forget(destination, &key, &binding);
            *budget = budget.saturating_sub(1);
            if *budget == 0 {
                return false;
            }
        }
    }

    fn forget(&mut self, destination: Destination, key: &ShortString, binding: &Binding) {
        match &mut self.index {
            Index::Direct(keys) => {
                if let Some(tally) = keys.get_mut(key) {
                    take_one(tally, &destination);
                    if tally.is_empty() {
                        keys.remove(key);
                    }
                }
            }
            Index::Fanout(tally) => take_one(tally, &destination),
            Index::Topic(patterns) => patterns.remove(key.as_bytes(), destination),
            Index::Headers(bindings) => binding.place.into_iter().for_each(|place| bindings.remove(place)),
            Index::Hashed(bindings) => bindings.remove(destination),
        }
    }

    /// Whether nothing is bound to it.
    pub(super) fn is_unused(&self) -> bool {
        self.bindings.is_empty()
    }

    /// Whether there is exactly this binding.
    pub(super) fn has_binding(&self, destination: Destination, key: &ShortString, arguments: &Table) -> bool {
        let bindings = self.bindings.get(&destination);
        bindings.is_some_and(|bindings| bindings.contains_key(&BindingKey::new(key, &sorted(arguments))))
    }

    /// Whether there is any binding to it.
    pub(super) fn is_bound_to(&self, destination: Destination) -> bool {
        self.bindings.contains_key(&destination)
    }

    /// All that it is bound to.
    pub(super) fn destinations(&self) -> impl Iterator<Item = Destination> {
        self.bindings.keys().copied()
    }

    /// Every binding: where to, by which key, with which arguments.
    pub(super) fn bindings(&self) -> impl Iterator<Item = (Destination, &ShortString, &Table)> {
        self.bindings.iter().flat_map(|(&destination, bindings)| {
            bindings.iter().map(move |(BindingKey { key, .. }, binding)| (destination, key, &binding.arguments))
        })
    }

    /// Adds where a message with these properties goes from here; a destination may be added more than once.
    pub(super) fn route<'a>(
        &self,
        mut keys: impl Iterator<Item = &'a [u8]>,
        headers: &MessageHeaders<'_>,
        properties: &[u8],
        found: &mut Vec<Destination>,
    ) {
        match &self.index {
            Index::Direct(bound) => {
                for key in keys {
                    found.extend(bound.get(key).into_iter().flat_map(Tally::keys));
                }
            }
            Index::Fanout(tally) => found.extend(tally.keys()),
            Index::Topic(patterns) => keys.for_each(|key| patterns.route(key, found)),
            Index::Headers(bindings) => bindings.route(headers, found),
            // Its own key, not those of `CC`.
            Index::Hashed(bindings) => {
                found.extend(keys.next().and_then(|key| bindings.route(key, headers, properties)));
            }
        }
    }
}

fn sorted(table: &Table) -> Table {
    let mut table = table.clone();
    table.0.sort_by(|(one, _), (other, _)| one.cmp(other));
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Destination = Destination::Queue(QueueId(1));
    const TWO: Destination = Destination::Queue(QueueId(2));

    fn routed(exchange: &Exchange, key: &str, headers: &Table) -> Vec<Destination> {
        let mut found = Vec::new();
        exchange.route([key.as_bytes()].into_iter(), &MessageHeaders::new(Some(headers)), &[0, 0], &mut found);
        found.sort_unstable();
        found.dedup();
        found
    }

    fn headers_match(arguments: Table, headers: &Table) -> bool {
        let mut exchange = Exchange::new("h".into(), Kind::Headers);
        exchange.bind(ONE, &"".into(), &arguments);
        !routed(&exchange, "", headers).is_empty()
    }

    #[test]
    fn direct_by_key_and_fanout_whatever_the_key() {
        for (kind, wanted) in [(Kind::Direct, vec![ONE]), (Kind::Fanout, vec![ONE, TWO])] {
            let mut exchange = Exchange::new("x".into(), kind);
            exchange.bind(ONE, &"a".into(), &Table::default());
            exchange.bind(TWO, &"b".into(), &Table::default());
            assert_eq!(routed(&exchange, "a", &Table::default()), wanted);
        }
    }

    #[test]
    fn bindings_that_differ_in_arguments_only_are_two() {
        let mut exchange = Exchange::new("x".into(), Kind::Direct);
        let other = Table::default().with("a", Value::I32(1));
        for arguments in [&Table::default(), &other, &other] {
            exchange.bind(ONE, &"k".into(), arguments);
        }
        assert_eq!(exchange.bindings().count(), 2);
        assert!(exchange.unbind(ONE, &"k".into(), &other));
        assert!(!exchange.unbind(ONE, &"k".into(), &other));
        assert_eq!(routed(&exchange, "k", &Table::default()), [ONE]);
        exchange.bind(ONE, &"k".into(), &other);
        assert!(!exchange.unbind_some(ONE, &mut 1) && !exchange.is_unused());
        assert!(exchange.unbind_some(ONE, &mut 2) && exchange.is_unused());
        assert!(routed(&exchange, "k", &Table::default()).is_empty());
    }

    #[test]
    fn headers_all_any_and_those_that_begin_with_x() {
        let arguments = |mode: &str| {
            Table::default()
                .with("x-match", Value::text(mode))
                .with("a", Value::I32(1))
                .with("b", Value::Void)
                .with("x-c", Value::text("c"))
        };
        let one = Table::default().with("a", Value::I64(1));
        let two = one.clone().with("b", Value::text("whatever"));
        let three = two.clone().with("x-c", Value::text("c"));
        let only_x = Table::default().with("x-c", Value::text("c"));
        for (mode, headers, wanted) in [
            ("all", &one, false),
            ("all", &two, true),
            ("all-with-x", &two, false),
            ("all-with-x", &three, true),
            ("any", &one, true),
            ("any", &only_x, false),
            ("any-with-x", &only_x, true),
        ] {
            assert_eq!(headers_match(arguments(mode), headers), wanted, "{mode} {headers:?}");
        }
        assert!(headers_match(Table::default(), &Table::default()), "all of nothing");
        let any = Table::default().with("x-match", Value::text("any"));
        assert!(!headers_match(any, &one), "any of nothing");
    }
}
