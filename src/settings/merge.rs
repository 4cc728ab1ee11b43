//! A profile's topology laid over that of the file: queues and exchanges of the same name are merged key by key, others are
//! added, as are bindings, and `remove = true` takes one out.
//!
//! `config` replaces a list as a whole. So the lists are merged here, before it sees them.

use std::borrow::Cow;

use config::{Map, Value, ValueKind};

use super::lists::{BINDING_KEYS, EXCHANGE_KEYS, LISTS, PARTITIONED_KEYS, QUEUE_KEYS};
use super::reader::{Reader, child, item};

type Table = Map<String, Value>;

/// The key of an entry by which a profile takes it out of the file's list.
const REMOVE: &str = "remove";
/// The key of an entry in a merged list under which it says where it is written. TOML has no such key.
const WRITTEN_AT: &str = "\0written at";

/// A profile that has been laid over the file.
pub(super) struct Laid {
    /// The profile with whole lists, which replace those of the file.
    pub(super) whole: Value,
    /// The profile with the entries alone that it has something to say of, to look for mistakes in.
    pub(super) own: Value,
}

/// What an entry of a list is, to tell it from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Exchange,
    Queue,
    Binding,
    Partitioned,
}

/// An entry of a merged list.
#[derive(Debug)]
struct Entry {
    table: Table,
    written_at: String,
    /// Some of it is the profile's.
    is_own: bool,
}

/// Lays the topology of a profile, which is written at `key`, over that of the file.
pub(super) fn profile_over(reader: &mut Reader, file: &Value, profile: &Value, key: &str) -> Laid {
    let Some(topology) = table_in(profile, "topology") else {
        return Laid { whole: profile.clone(), own: profile.clone() };
    };
    let nothing = Table::new();
    let below = table_in(file, "topology").unwrap_or(&nothing);
    let mut lists = Vec::new();
    let mut removed = Vec::new();
    for (name, kind) in LISTS.into_iter().zip([Kind::Exchange, Kind::Queue, Kind::Binding, Kind::Partitioned]) {
        let key = child(&child(key, "topology"), name);
        // Whatever is no list of tables is told as a mistake by those who read it. Nothing else is to follow from it.
        let (Some(below), Some(own)) = (tables(below.get(name)), tables(topology.get(name))) else {
            return Laid { whole: Value::new(None, Table::new()), own: profile.clone() };
        };
        let mut entries: Vec<Entry> = (0..)
            .zip(below)
            .map(|(index, table)| {
                let written_at = item(&child("topology", name), index);
                Entry { table: table.clone(), written_at, is_own: false }
            })
            .collect();
        for (index, table) in own.into_iter().enumerate() {
            lay(reader, kind, &mut entries, table, item(&key, index), &mut removed);
        }
        if kind == Kind::Binding {
            // A queue or an exchange that is taken out takes its bindings along.
            entries.retain(|entry| entry.is_own || !removed.iter().any(|gone| names(&entry.table, gone)));
        }
        lists.push((name, entries));
    }
    let with = |is_wanted: fn(&Entry) -> bool| {
        let mut topology = topology.clone();
        for (name, entries) in &lists {
            let wanted = entries.iter().filter(|entry| is_wanted(entry));
            topology.insert((*name).to_owned(), Value::new(None, wanted.map(Entry::value).collect::<Vec<Value>>()));
        }
        match &profile.kind {
            ValueKind::Table(sections) => {
                let mut sections = sections.clone();
                sections.insert("topology".to_owned(), Value::new(None, topology));
                Value::new(None, sections)
            }
            _ => profile.clone(),
        }
    };
    Laid { whole: with(|_| true), own: with(|entry| entry.is_own) }
}

/// An entry of a list, and the key it is written at if the list has been merged.
pub(super) fn unmarked(entry: &Value) -> (Cow<'_, Value>, Option<String>) {
    let ValueKind::Table(table) = &entry.kind else { return (Cow::Borrowed(entry), None) };
    let Some(Value { kind: ValueKind::String(written_at), .. }) = table.get(WRITTEN_AT) else {
        return (Cow::Borrowed(entry), None);
    };
    let mut table = table.clone();
    table.remove(WRITTEN_AT);
    (Cow::Owned(Value::new(None, table)), Some(written_at.clone()))
}

/// Lays one entry of a profile over those there are.
fn lay(
    reader: &mut Reader,
    kind: Kind,
    entries: &mut Vec<Entry>,
    own: &Table,
    key: String,
    removed: &mut Vec<(Kind, Value)>,
) {
    let allowed: Vec<&str> = kind.keys().iter().copied().chain([REMOVE]).collect();
    let whole = Value::new(None, own.clone());
    let section = reader.section(&whole, key.clone(), &allowed);
    let removes = section.is_some_and(|section| reader.boolean(&section, REMOVE).is_some_and(|given| given.value));
    let mut own = own.clone();
    own.remove(REMOVE);
    if removes {
        let before = entries.len();
        entries.retain(|entry| !kind.is_same(&entry.table, &own, false));
        if entries.len() == before {
            reader.mistake(child(&key, REMOVE), format!("there is no such {} above to take out", kind.noun()));
        }
        removed.extend(own.get("name").map(|name| (kind, name.clone())));
        return;
    }
    match entries.iter_mut().find(|entry| kind.is_same(&entry.table, &own, true)) {
        Some(entry) => {
            entry.is_own = true;
            entry.written_at = key;
            merge(&mut entry.table, own);
        }
        None => entries.push(Entry { table: own, written_at: key, is_own: true }),
    }
}

/// Puts the keys of `over` into `table`, those of tables in it one by one.
fn merge(table: &mut Table, over: Table) {
    for (name, value) in over {
        match (table.get_mut(&name).map(|below| &mut below.kind), value.kind) {
            (Some(ValueKind::Table(below)), ValueKind::Table(over)) => merge(below, over),
            (_, kind) => drop(table.insert(name, Value::new(None, kind))),
        }
    }
}

impl Kind {
    fn keys(self) -> &'static [&'static str] {
        match self {
            Kind::Exchange => &EXCHANGE_KEYS,
            Kind::Queue => &QUEUE_KEYS,
            Kind::Binding => &BINDING_KEYS,
            Kind::Partitioned => &PARTITIONED_KEYS,
        }
    }

    fn noun(self) -> &'static str {
        match self {
            Kind::Exchange => "exchange",
            Kind::Queue => "queue",
            Kind::Binding => "binding",
            Kind::Partitioned => "partitioned queue",
        }
    }

    /// Whether two entries are the same thing. Bindings are different ones if their arguments are, which may be left out.
    fn is_same(self, one: &Table, other: &Table, with_arguments: bool) -> bool {
        let same = |name: &str| text(one, name) == text(other, name);
        match self {
            Kind::Exchange | Kind::Queue | Kind::Partitioned => one.contains_key("name") && same("name"),
            Kind::Binding => {
                let is_asked = with_arguments || other.contains_key("arguments");
                ["exchange", "queue", "destination_exchange", "routing_key"].into_iter().all(same)
                    && (!is_asked || arguments(one) == arguments(other))
            }
        }
    }
}

/// Whether a binding is one of this queue or exchange.
fn names(binding: &Table, (kind, name): &(Kind, Value)) -> bool {
    let ends: &[&str] = match kind {
        Kind::Queue => &["queue"],
        Kind::Partitioned => return false,
        Kind::Exchange | Kind::Binding => &["exchange", "destination_exchange"],
    };
    ends.iter().filter_map(|end| binding.get(*end)).any(|end| end.kind == name.kind)
}

/// A text, or what else is in its place; nothing counts as empty.
fn text<'t>(table: &'t Table, name: &str) -> Cow<'t, ValueKind> {
    table.get(name).map_or_else(|| Cow::Owned(ValueKind::String(String::new())), |value| Cow::Borrowed(&value.kind))
}

fn arguments(table: &Table) -> Cow<'_, ValueKind> {
    table
        .get("arguments")
        .map_or_else(|| Cow::Owned(ValueKind::Table(Table::new())), |value| Cow::Borrowed(&value.kind))
}

impl Entry {
    fn value(&self) -> Value {
        let mut table = self.table.clone();
        table.insert(WRITTEN_AT.to_owned(), Value::new(None, self.written_at.clone()));
        Value::new(None, table)
    }
}

fn table_in<'v>(value: &'v Value, name: &str) -> Option<&'v Table> {
    let ValueKind::Table(table) = &value.kind else { return None };
    match &table.get(name)?.kind {
        ValueKind::Table(table) => Some(table),
        _ => None,
    }
}

/// The entries of a list; none if there is no list, `None` if it is something else.
fn tables(list: Option<&Value>) -> Option<Vec<&Table>> {
    let Some(list) = list else { return Some(Vec::new()) };
    let ValueKind::Array(entries) = &list.kind else { return None };
    let tables = entries.iter().map(|entry| match &entry.kind {
        ValueKind::Table(table) => Some(table),
        _ => None,
    });
    tables.collect()
}
