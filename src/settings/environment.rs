//! Environment variables as a tree of settings.
//!
//! `config` has a source for that, but it knows neither which variable a value came from nor that the name of a pool
//! may have characters that no variable can have.

use std::collections::{BTreeMap, BTreeSet};

use config::{Map, Value, ValueKind};

use super::outbox::OUTBOX_KEYS;
use super::pace::PAUSE_KEYS;
use super::reader::{Reader, origin, sorted};
use super::sections::{APP_KEYS, BROKER_KEYS, POOL_KEYS};
use super::tls::TLS_KEYS;
use super::{LISTEN_POOL, PUBLISH_POOL, Problem};

const PREFIX: &str = "CONEY_";
pub(super) const NOT_UTF8: &str = "the value is not UTF-8";
const SEPARATOR: &str = "__";
const EXPECTED: &str = "expected a name of the form CONEY_APP__KEY, CONEY_BROKER__KEY, CONEY_OUTBOX__KEY or CONEY_POOLS__NAME__KEY, with two \
     underscores";

/// What a variable's name has behind our prefix, in whatever case it is written.
fn without_prefix(variable: &str) -> Option<&str> {
    let (prefix, rest) = variable.split_at_checked(PREFIX.len())?;
    prefix.eq_ignore_ascii_case(PREFIX).then_some(rest)
}

/// Whether a variable has a name like ours.
pub(super) fn is_ours(variable: &str) -> bool {
    without_prefix(variable).is_some()
}

/// The value without the line break at its end that a file or a shell has left there.
pub(super) fn without_line_break(value: &str) -> &str {
    let value = value.strip_suffix('\n').unwrap_or(value);
    value.strip_suffix('\r').unwrap_or(value)
}

/// The section that a variable sets a key of.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Section {
    App,
    Broker,
    Outbox,
    Pool(String),
}

/// The tree that the variables make. `earlier` are the layers whose pools they may mean.
pub(super) fn tree(reader: &mut Reader, variables: &[(String, Option<String>)], earlier: &[&Value]) -> Value {
    let pools = pool_names(earlier);
    let (mut app, mut broker, mut outbox) = (Map::new(), Map::new(), Map::new());
    let mut tables: BTreeMap<String, Map<String, Value>> = BTreeMap::new();
    let mut setters: BTreeMap<(Section, String), &str> = BTreeMap::new();
    // Of a variable given twice the last counts, as when a caller adds to the variables of the process.
    let variables: BTreeMap<&str, Option<&str>> =
        variables.iter().map(|(name, value)| (name.as_str(), value.as_deref())).collect();
    for (variable, value) in variables {
        let Some(path) = without_prefix(variable).map(str::to_lowercase) else { continue };
        let mut mistake = |problem: String| {
            reader.add(Problem { variable: Some(variable.to_owned()), ..Problem::new("", problem) });
        };
        let segments: Vec<&str> = path.split(SEPARATOR).collect();
        let (section, key) = match &segments[..] {
            [name] => {
                if let Some(meant) = meant_by(name) {
                    mistake(format!("{EXPECTED}; did you mean {meant}?"));
                }
                continue;
            }
            ["app", key] if !key.is_empty() => (Section::App, &segments[1..]),
            ["outbox", key] if !key.is_empty() => (Section::Outbox, &segments[1..]),
            ["broker", key @ ..] if is_key(key) => (Section::Broker, key),
            ["pools", pool, key @ ..] if !pool.is_empty() && is_key(key) => match pool_meant(&pools, pool) {
                Ok(pool) => (Section::Pool(pool), key),
                Err(problem) => {
                    mistake(problem);
                    continue;
                }
            },
            _ => {
                let meant = meant_by(&path.replace(SEPARATOR, "_"));
                let guess = meant.map(|meant| format!("; did you mean {meant}?")).unwrap_or_default();
                mistake(format!("{EXPECTED}{guess}"));
                continue;
            }
        };
        let Some(value) = value else {
            mistake(NOT_UTF8.to_owned());
            continue;
        };
        let value = Value::new(Some(&origin::of_variable(variable)), without_line_break(value));
        let table = match &section {
            Section::App => &mut app,
            Section::Broker => &mut broker,
            Section::Outbox => &mut outbox,
            Section::Pool(pool) => tables.entry(pool.clone()).or_default(),
        };
        if let Some(other) = setters.insert((section, key.join(".")), variable) {
            mistake(format!("sets the same key as {other}"));
            continue;
        }
        match key {
            [section, key] => {
                let inner =
                    table.entry((*section).to_owned()).or_insert_with(|| Value::new(None, Map::<String, Value>::new()));
                match &mut inner.kind {
                    // CONEY_BROKER__TLS has come before CONEY_BROKER__TLS__CA_FILE.
                    ValueKind::Table(inner) => drop(inner.insert((*key).to_owned(), value)),
                    _ => mistake(format!("{section} is set as a whole by another variable")),
                }
            }
            key => drop(table.insert(key.concat(), value)),
        }
    }
    let tables: Map<String, Value> = tables.into_iter().map(|(name, table)| (name, Value::new(None, table))).collect();
    // An empty [outbox] would be one that says nothing of where it is.
    let outbox = Some(("outbox", outbox)).filter(|(_, outbox)| !outbox.is_empty());
    let sections = [("app", app), ("broker", broker), ("pools", tables)].into_iter().chain(outbox);
    let tree: Map<String, Value> = sections.map(|(name, table)| (name.to_owned(), Value::new(None, table))).collect();
    Value::new(None, tree)
}

/// The keys that may be tables, and what is in those.
const TABLES: [(&str, &[&str]); 2] = [("tls", &TLS_KEYS), ("pause_on_failures", &PAUSE_KEYS)];

/// The variable that was meant by a name whose underscores are all single ones: one that would set a key of ours.
fn meant_by(name: &str) -> Option<String> {
    let (section, rest) = name.split_once('_')?;
    let section_key = |rest: &str, keys: &[&str]| {
        let plain = keys.contains(&rest).then(|| rest.to_owned());
        let of_table = |(table, of_table): &(&str, &[&str])| {
            let key = rest.strip_prefix(table)?.strip_prefix('_')?;
            (keys.contains(table) && of_table.contains(&key)).then(|| format!("{table}{SEPARATOR}{key}"))
        };
        plain.or_else(|| TABLES.iter().find_map(of_table))
    };
    let meant = match section {
        "app" => format!("app{SEPARATOR}{}", section_key(rest, &APP_KEYS)?),
        "outbox" => format!("outbox{SEPARATOR}{}", section_key(rest, &OUTBOX_KEYS)?),
        "broker" => format!("broker{SEPARATOR}{}", section_key(rest, &BROKER_KEYS)?),
        "pool" | "pools" => {
            let keys: Vec<&str> = POOL_KEYS.into_iter().chain(BROKER_KEYS).collect();
            // The name of a pool may have underscores too, and so may a key: the longest key counts.
            let splits = rest.match_indices('_').map(|(at, _)| (&rest[..at], &rest[at + 1..]));
            let mut found = splits.filter_map(|(pool, key)| Some((pool, section_key(key, &keys)?)));
            let (pool, key) = found.find(|(pool, _)| !pool.is_empty())?;
            format!("pools{SEPARATOR}{pool}{SEPARATOR}{key}")
        }
        _ => return None,
    };
    Some(format!("{PREFIX}{}", meant.to_uppercase()))
}

/// A key of a section, or one of a table in it.
fn is_key(segments: &[&str]) -> bool {
    match segments {
        [key] => !key.is_empty(),
        [table, key] => !key.is_empty() && TABLES.iter().any(|(name, _)| name == table),
        _ => false,
    }
}

fn pool_names(layers: &[&Value]) -> BTreeSet<String> {
    let mut names = BTreeSet::from([PUBLISH_POOL.to_owned(), LISTEN_POOL.to_owned()]);
    for layer in layers {
        if let ValueKind::Table(sections) = &layer.kind
            && let Some(Value { kind: ValueKind::Table(pools), .. }) = sections.get("pools")
        {
            names.extend(sorted(pools).into_keys().map(str::to_owned));
        }
    }
    names
}

/// The pool that a segment of a variable's name means: that of the same name; else the one whose name a variable
/// would spell like that; else a new one.
fn pool_meant(pools: &BTreeSet<String>, segment: &str) -> Result<String, String> {
    if pools.contains(segment) {
        return Ok(segment.to_owned());
    }
    let meant: Vec<&String> = pools.iter().filter(|name| spelled(name) == segment).collect();
    match meant[..] {
        [] => Ok(segment.to_owned()),
        [name] => Ok(name.clone()),
        _ => {
            let names: Vec<String> = meant.iter().map(|name| super::reader::child("", name)).collect();
            Err(format!("may mean any of the pools {}", names.join(", ")))
        }
    }
}

fn spelled(name: &str) -> String {
    name.to_lowercase().chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
}
