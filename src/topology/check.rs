//! What can be wrong with a topology before any broker has seen it.

use std::collections::HashSet;

use super::{
    Binding, Destination, Exchange, ExchangeKind, MAX_NAME, PREDEFINED_EXCHANGES, Queue, Topology, is_custom_kind,
};
use crate::field::FieldTable;

/// Which list of a topology.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum List {
    Exchanges,
    Queues,
    Bindings,
    Partitioned,
}

impl List {
    /// Its name in a settings file.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            List::Exchanges => "exchanges",
            List::Queues => "queues",
            List::Bindings => "bindings",
            List::Partitioned => "partitioned",
        }
    }
}

/// One thing wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mistake {
    pub(crate) list: List,
    pub(crate) index: usize,
    pub(crate) field: &'static str,
    pub(crate) problem: String,
}

/// Collects the mistakes of one entry of a list.
struct Entry<'a> {
    list: List,
    index: usize,
    mistakes: &'a mut Vec<Mistake>,
}

impl Entry<'_> {
    fn mistake(&mut self, field: &'static str, problem: impl Into<String>) {
        let (list, index) = (self.list, self.index);
        self.mistakes.push(Mistake { list, index, field, problem: problem.into() });
    }

    fn length(&mut self, field: &'static str, text: &str) {
        if text.len() > MAX_NAME {
            self.mistake(field, format!("expected at most {MAX_NAME} bytes, got {}", text.len()));
        }
    }

    /// A name to declare.
    fn name(&mut self, name: &str, taken: bool) {
        self.length("name", name);
        if name.starts_with("amq.") {
            self.mistake("name", "names that begin with \"amq.\" are the broker's own and cannot be declared");
        } else if taken {
            self.mistake("name", format!("{} is declared above already", shown(name)));
        }
    }

    fn arguments(&mut self, arguments: &FieldTable) {
        for name in arguments.keys().filter(|name| name.is_empty() || name.len() > MAX_NAME) {
            self.mistake("arguments", format!("expected names of 1 to {MAX_NAME} bytes, got one of {}", name.len()));
        }
    }
}

impl Topology {
    /// What is wrong with entries by themselves and among those of their own list.
    pub(crate) fn entry_mistakes(&self) -> Vec<Mistake> {
        let mut mistakes: Vec<Mistake> = self.partitioned_mistakes().collect();
        let mut names = HashSet::new();
        for (index, exchange) in self.exchanges.iter().enumerate() {
            let taken = !names.insert(exchange.name.as_str());
            exchange.check(taken, Entry { list: List::Exchanges, index, mistakes: &mut mistakes });
        }
        let mut names = HashSet::new();
        for (index, queue) in self.queues.iter().enumerate() {
            // The broker gives every queue without a name another one.
            let taken = !names.insert(queue.name.as_str()) && !queue.name.is_empty();
            queue.check(taken, Entry { list: List::Queues, index, mistakes: &mut mistakes });
        }
        for (index, binding) in self.bindings.iter().enumerate() {
            binding.check(Entry { list: List::Bindings, index, mistakes: &mut mistakes });
        }
        mistakes
    }

    /// Bindings that name something which is not there.
    pub(crate) fn reference_mistakes(&self) -> Vec<Mistake> {
        let mut mistakes = Vec::new();
        for (index, binding) in self.bindings.iter().enumerate() {
            let mut entry = Entry { list: List::Bindings, index, mistakes: &mut mistakes };
            self.check_exchange("exchange", &binding.source, &mut entry);
            match &binding.destination {
                Destination::Exchange(name) => self.check_exchange("destination_exchange", name, &mut entry),
                Destination::Queue(name) if name.is_empty() => {
                    if self.queues.iter().filter(|queue| queue.name.is_empty()).count() != 1 {
                        entry.mistake("queue", "no name leads to the queue that the broker names; expected one such");
                    }
                }
                Destination::Queue(name) => {
                    if !self.queues.iter().any(|queue| queue.name == *name) {
                        entry.mistake("queue", format!("queue {} is not declared in this topology", shown(name)));
                    }
                }
            }
        }
        mistakes
    }

    /// The default exchange is left to [`Binding::check`].
    fn check_exchange(&self, field: &'static str, name: &str, entry: &mut Entry<'_>) {
        let is_there = name.is_empty()
            || PREDEFINED_EXCHANGES.contains(&name)
            || self.exchanges.iter().any(|exchange| exchange.name == name);
        if !is_there {
            entry.mistake(field, format!("exchange {} is not declared in this topology", shown(name)));
        }
    }
}

impl Exchange {
    fn check(&self, taken: bool, mut entry: Entry<'_>) {
        if self.name.is_empty() {
            entry.mistake("name", "expected a name; the exchange without one is always there and cannot be declared");
        }
        entry.name(&self.name, taken);
        if let ExchangeKind::Custom(kind) = &self.kind {
            if !is_custom_kind(kind) {
                entry.mistake("kind", ExchangeKind::EXPECTED);
            }
            entry.length("kind", kind);
        }
        entry.arguments(&self.arguments);
    }
}

impl Queue {
    fn check(&self, taken: bool, mut entry: Entry<'_>) {
        entry.name(&self.name, taken);
        entry.arguments(&self.arguments);
    }
}

impl Binding {
    fn check(&self, mut entry: Entry<'_>) {
        const DEFAULT_EXCHANGE: &str = "expected the name of an exchange; the default exchange, which has none, takes no \
                                        bindings: every queue is bound to it by its own name";
        if self.source.is_empty() {
            entry.mistake("exchange", DEFAULT_EXCHANGE);
        }
        match &self.destination {
            Destination::Exchange(name) if name.is_empty() => entry.mistake("destination_exchange", DEFAULT_EXCHANGE),
            Destination::Exchange(_) | Destination::Queue(_) => {}
        }
        entry.length("routing_key", &self.routing_key);
        entry.arguments(&self.arguments);
    }
}

/// A name as a mistake quotes it, unless it is a URL that landed in the wrong place: that may have a password in it.
pub(crate) fn shown(name: &str) -> String {
    if name.contains("://") || (name.contains('@') && name.contains(':')) {
        "(not shown)".to_owned()
    } else {
        format!("{name:?}")
    }
}
