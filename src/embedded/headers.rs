//! Headers exchanges: which bindings the headers of a message match.
//!
//! A binding waits in the lists of fields that it asks for, each a name with a value or a name alone. A message looks only
//! at the lists of its own headers, so bindings that have nothing in common with it cost it nothing. One that wants all of
//! its fields waits in a single list, that of the field fewest others wait for; one that wants any of them in the list of
//! each. Names are compared in order, the headers sorted once for all bindings.

use std::cell::OnceCell;
use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher as _, Hash as _, Hasher as _};

use super::arguments::{hash_value, same};
use crate::amqp::ShortString;
use crate::amqp::value::{Table, Value};

/// The headers of a message by name. They are sorted when somebody asks for the first time: most exchanges do not.
pub(super) struct MessageHeaders<'a> {
    table: Option<&'a Table>,
    sorted: OnceCell<Vec<(&'a [u8], &'a Value)>>,
}

impl<'a> MessageHeaders<'a> {
    pub(super) fn new(table: Option<&'a Table>) -> MessageHeaders<'a> {
        MessageHeaders { table, sorted: OnceCell::new() }
    }

    /// The value of one header.
    pub(super) fn get(&self, name: &[u8]) -> Option<&'a Value> {
        let fields = &self.table?.0;
        fields.iter().find(|(other, _)| other.as_bytes() == name).map(|(_, value)| value)
    }

    /// One value for each name, which is the first.
    fn sorted(&self) -> &[(&'a [u8], &'a Value)] {
        self.sorted.get_or_init(|| {
            let fields = self.table.into_iter().flat_map(|table| &table.0);
            let mut sorted: Vec<_> = fields.map(|(name, value)| (name.as_bytes(), value)).collect();
            sorted.sort_by_key(|(name, _)| *name);
            sorted.dedup_by_key(|(name, _)| *name);
            sorted
        })
    }
}

/// `x-match` of a binding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    All,
    Any,
    AllWithX,
    AnyWithX,
}

impl Mode {
    pub(super) fn of_name(name: &[u8]) -> Option<Mode> {
        match name {
            b"all" => Some(Mode::All),
            b"any" => Some(Mode::Any),
            b"all-with-x" => Some(Mode::AllWithX),
            b"any-with-x" => Some(Mode::AnyWithX),
            _ => None,
        }
    }

    fn wants_all(self) -> bool {
        matches!(self, Mode::All | Mode::AllWithX)
    }
}

/// A binding: what the headers of a message must hold, and where it goes then.
#[derive(Debug)]
struct Binding<D> {
    destination: D,
    wants_all: bool,
    /// Sorted by name. A field without a value asks only that the header be there.
    fields: Vec<(ShortString, Value)>,
    /// The lists it waits in.
    lists: Vec<u64>,
}

impl<D> Binding<D> {
    fn matches(&self, headers: &[(&[u8], &Value)]) -> bool {
        let mut rest = headers;
        let mut found = self.fields.iter().map(|(name, wanted)| {
            rest = from_name(rest, name.as_bytes());
            let value = rest.first().filter(|(header, _)| *header == name.as_bytes()).map(|(_, value)| *value);
            value.is_some_and(|value| *wanted == Value::Void || same(wanted, value))
        });
        if self.wants_all { found.all(|matches| matches) } else { found.any(|matches| matches) }
    }
}

/// What is left of sorted headers from a name on. Looks near the beginning first, since the next name is mostly there.
fn from_name<'h, 'a>(headers: &'h [(&'a [u8], &'a Value)], name: &[u8]) -> &'h [(&'a [u8], &'a Value)] {
    let mut end = 1;
    while end < headers.len() && headers[end - 1].0 < name {
        end *= 2;
    }
    let end = end.min(headers.len());
    let at = headers[..end].partition_point(|(header, _)| *header < name);
    &headers[at..]
}

/// The bindings of a headers exchange.
#[derive(Debug)]
pub(super) struct HeaderBindings<D> {
    /// By the place that each has for as long as it is there.
    bindings: Vec<Option<Binding<D>>>,
    vacant: Vec<usize>,
    /// The bindings that wait for a field, by the hash of its name and value. Two fields may have one hash, so a binding that is
    /// found here is compared.
    waiting: BTreeMap<u64, BTreeSet<usize>>,
    /// Those that want all of nothing, and get every message.
    unconditional: BTreeSet<usize>,
    hasher: RandomState,
}

impl<D: Copy> HeaderBindings<D> {
    pub(super) fn new() -> HeaderBindings<D> {
        HeaderBindings {
            bindings: Vec::new(),
            vacant: Vec::new(),
            waiting: BTreeMap::new(),
            unconditional: BTreeSet::new(),
            hasher: RandomState::new(),
        }
    }

    /// Adds a binding with these arguments, sorted by name. Returns the place to [`remove`](HeaderBindings::remove).
    pub(super) fn insert(&mut self, arguments: &Table, destination: D) -> usize {
        let mode = match arguments.get("x-match") {
            Some(Value::LongString(name)) => Mode::of_name(name).unwrap_or(Mode::All),
            _ => Mode::All,
        };
        let with_x = matches!(mode, Mode::AllWithX | Mode::AnyWithX);
        let counts = |name: &ShortString| name != "x-match" && (with_x || !name.as_bytes().starts_with(b"x-"));
        let fields: Vec<_> = arguments.0.iter().filter(|(name, _)| counts(name)).cloned().collect();
        let place = self.vacant.pop().unwrap_or_else(|| {
            self.bindings.push(None);
            self.bindings.len() - 1
        });
        let of_fields = fields
            .iter()
            .map(|(name, wanted)| self.list_of(name.as_bytes(), Some(wanted).filter(|wanted| **wanted != Value::Void)));
        let lists: Vec<u64> = if mode.wants_all() {
            of_fields.min_by_key(|list| self.waiting.get(list).map_or(0, BTreeSet::len)).into_iter().collect()
        } else {
            of_fields.collect()
        };
        for list in &lists {
            self.waiting.entry(*list).or_default().insert(place);
        }
        if mode.wants_all() && fields.is_empty() {
            self.unconditional.insert(place);
        }
        self.bindings[place] = Some(Binding { destination, wants_all: mode.wants_all(), fields, lists });
        place
    }

    /// Takes the binding in this place away; without one, does nothing.
    pub(super) fn remove(&mut self, place: usize) {
        let Some(binding) = self.bindings.get_mut(place).and_then(Option::take) else { return };
        for list in binding.lists {
            if let Some(waiting) = self.waiting.get_mut(&list) {
                waiting.remove(&place);
                if waiting.is_empty() {
                    self.waiting.remove(&list);
                }
            }
        }
        self.unconditional.remove(&place);
        self.vacant.push(place);
    }

    /// Adds the destinations of the bindings that these headers match, once for each.
    pub(super) fn route(&self, headers: &MessageHeaders<'_>, found: &mut Vec<D>) {
        let headers = headers.sorted();
        found.extend(
            self.unconditional.iter().filter_map(|&place| self.bindings[place].as_ref()).map(|b| b.destination),
        );
        // A binding that wants any of many fields may be met at many headers.
        let mut seen = BTreeSet::new();
        for (name, value) in headers {
            for list in [self.list_of(name, Some(value)), self.list_of(name, None)] {
                for &place in self.waiting.get(&list).into_iter().flatten() {
                    let Some(binding) = &self.bindings[place] else { continue };
                    if !binding.wants_all && !seen.insert(place) {
                        continue;
                    }
                    if binding.matches(headers) {
                        found.push(binding.destination);
                    }
                }
            }
        }
    }

    /// The list of those who wait for a field of this name, with this value or with any.
    fn list_of(&self, name: &[u8], value: Option<&Value>) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        name.hash(&mut hasher);
        if let Some(value) = value {
            hash_value(value, &mut hasher);
        }
        hasher.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, field by field.
    fn matches(arguments: &Table, headers: &Table) -> bool {
        let all = arguments.get("x-match").is_none_or(|mode| *mode == Value::text("all"));
        let mut fields = arguments.0.iter().filter(|(name, _)| !name.as_bytes().starts_with(b"x-"));
        let holds = |(name, wanted): &(ShortString, Value)| {
            let header = headers.0.iter().find(|(header, _)| header == name);
            header.is_some_and(|(_, value)| *wanted == Value::Void || same(wanted, value))
        };
        if all { fields.all(holds) } else { fields.any(holds) }
    }

    #[test]
    fn like_the_definition_for_random_tables() {
        let mut random = fastrand::Rng::with_seed(11);
        let values = [Value::I32(1), Value::I64(1), Value::F64(1.0), Value::F32(0.0), Value::F64(-0.0), Value::Void]
            .into_iter()
            .chain([Value::text("1"), Value::Bytes(b"1".to_vec()), Value::Timestamp(1), Value::Bool(true)])
            .chain([Value::Array(vec![Value::I8(1)]), Value::Decimal { scale: 0, value: 1 }])
            .collect::<Vec<_>>();
        let mut table = |duplicates: bool| {
            let mut table = Table::default();
            for name in ["a", "b", "c", "dd", "e"] {
                for _ in 0..random.usize(0..if duplicates { 3 } else { 2 }) {
                    table = table.with(name, values[random.usize(0..values.len())].clone());
                }
            }
            match random.u8(0..3) {
                0 => table.with("x-match", Value::text("any")),
                1 => table.with("x-match", Value::text("all")),
                _ => table,
            }
        };
        let mut found_at_all = 0;
        for _ in 0..500 {
            let mut bindings = HeaderBindings::new();
            let bound: Vec<Table> = (0..20).map(|_| table(false)).collect();
            let places: Vec<usize> =
                bound.iter().enumerate().map(|(number, arguments)| bindings.insert(arguments, number)).collect();
            // Some go, and their places to others.
            for gone in (0..20).step_by(4) {
                bindings.remove(places[gone]);
            }
            let late = table(false);
            bindings.insert(&late, 20);
            for _ in 0..10 {
                let headers = table(true);
                let mut found = Vec::new();
                bindings.route(&MessageHeaders::new(Some(&headers)), &mut found);
                found.sort_unstable();
                let wanted: Vec<usize> = (0..21)
                    .filter(|number| number % 4 != 0 || *number == 20)
                    .filter(|number| matches(bound.get(*number).unwrap_or(&late), &headers))
                    .collect();
                assert_eq!(found, wanted, "headers {headers:?}, bindings {bound:?}, {late:?}");
                found_at_all += found.len();
            }
        }
        assert!(found_at_all > 10_000, "{found_at_all} matches are too few to show anything");
    }

    #[test]
    fn nothing_is_left_of_bindings_that_have_gone() {
        let mut bindings = HeaderBindings::new();
        let any = Table::default().with("a", Value::Void).with("b", Value::I8(1)).with("x-match", Value::text("any"));
        let places = [any, Table::default()].map(|arguments| bindings.insert(&arguments, 1));
        places.into_iter().for_each(|place| bindings.remove(place));
        assert!(bindings.waiting.is_empty() && bindings.unconditional.is_empty());
        assert!(bindings.bindings.iter().all(Option::is_none));
    }

    #[test]
    fn one_that_wants_all_waits_where_fewest_do() {
        let mut bindings = HeaderBindings::new();
        for number in 0..100 {
            bindings.insert(&Table::default().with("kind", Value::text("order")).with("n", Value::I32(number)), number);
        }
        let longest = bindings.waiting.values().map(BTreeSet::len).max();
        assert_eq!(longest, Some(1));
    }
}
