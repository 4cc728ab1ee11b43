//! Environment variables as a tree of settings.
//!
//! `config` has a source for that, but it knows neither which variable a value came from nor that the name of a pool
//! may have characters that no variable can have.

use std::collections::{BTreeMap, BTreeSet};

use config::{Map, Value, ValueKind};

use super::reader::{Reader, origin, sorted};
use super::{LISTEN_POOL, PUBLISH_POOL, Problem};

pub(super) const PREFIX: &str = "CONEY_";
pub(super) const NOT_UTF8: &str = "the value is not UTF-8";
const SEPARATOR: &str = "__";

/// The tree that the variables make. `earlier` are the layers whose pools they may mean.
pub(super) fn tree(reader: &mut Reader, variables: &[(String, Option<String>)], earlier: &[&Value]) -> Value {
    let pools = pool_names(earlier);
    let mut broker = Map::new();
    let mut tables: BTreeMap<String, Map<String, Value>> = BTreeMap::new();
    let mut setters: BTreeMap<(String, String), &str> = BTreeMap::new();
    // Of a variable given twice the last counts, as when a caller adds to the variables of the process.
    let variables: BTreeMap<&str, Option<&str>> =
        variables.iter().map(|(name, value)| (name.as_str(), value.as_deref())).collect();
    for (variable, value) in variables {
        let Some(path) = variable.strip_prefix(PREFIX).filter(|path| path.contains(SEPARATOR)) else { continue };
        let mut mistake = |problem: String| {
            reader.add(Problem { variable: Some(variable.to_owned()), ..Problem::new("", problem) });
        };
        let path = path.to_lowercase();
        let segments: Vec<&str> = path.split(SEPARATOR).collect();
        let (pool, key) = match &segments[..] {
            ["broker", key @ ..] if is_key(key) => (None, key),
            ["pools", pool, key @ ..] if !pool.is_empty() && is_key(key) => match pool_meant(&pools, pool) {
                Ok(pool) => (Some(pool), key),
                Err(problem) => {
                    mistake(problem);
                    continue;
                }
            },
            _ => {
                mistake(format!("expected a name of the form {PREFIX}BROKER__KEY or {PREFIX}POOLS__NAME__KEY"));
                continue;
            }
        };
        let Some(value) = value else {
            mistake(NOT_UTF8.to_owned());
            continue;
        };
        if let Some(other) = setters.insert((pool.clone().unwrap_or_default(), key.join(".")), variable) {
            mistake(format!("sets the same key as {other}"));
            continue;
        }
        let value = Value::new(Some(&origin::of_variable(variable)), value);
        let table = match pool {
            None => &mut broker,
            Some(pool) => tables.entry(pool).or_default(),
        };
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
    Value::new(
        None,
        Map::from([("broker".to_owned(), Value::new(None, broker)), ("pools".to_owned(), Value::new(None, tables))]),
    )
}

/// A key of a section, or one of `tls` in it.
fn is_key(segments: &[&str]) -> bool {
    matches!(segments, [key] | ["tls", key] if !key.is_empty())
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
