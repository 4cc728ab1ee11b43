//! The settings reference, docs/settings.md: it has every key, and what it says of defaults and ranges is so.

use std::collections::BTreeMap;

use super::super::{Settings, lists, outbox, pace, sections, tls};

const REFERENCE: &str = include_str!("../../../docs/settings.md");

/// A row of a table: default and range as they are written, without backticks.
struct Row {
    key: String,
    kind: String,
    default: String,
    range: String,
}

/// The rows under each heading.
fn tables() -> BTreeMap<String, Vec<Row>> {
    let mut tables: BTreeMap<String, Vec<Row>> = BTreeMap::new();
    let mut heading = "";
    for line in REFERENCE.lines() {
        if let Some(name) = line.strip_prefix("## `") {
            heading = name.trim_end_matches('`');
        } else if line.starts_with("| `") {
            let cells: Vec<String> = line.split('|').map(|cell| cell.trim().replace('`', "")).collect();
            let [_, key, kind, default, range, ..] = &cells[..] else { panic!("{line}") };
            let [key, kind, default, range] = [key, kind, default, range].map(Clone::clone);
            tables.entry(heading.to_owned()).or_default().push(Row { key, kind, default, range });
        }
    }
    tables
}

/// A file with one line in the section.
fn file(section: &str, line: &str) -> String {
    match section {
        "[app]" | "[broker]" | "[broker.tls]" | "[topology]" => format!("{section}\n{line}"),
        "[outbox]" if line.starts_with("store") => format!("{section}\n{line}"),
        "[outbox]" => format!("{section}\nstore = \"sqlite:x.db\"\n{line}"),
        "[pools.NAME]" => format!("[pools.publish]\n{line}"),
        "[pools.NAME.pause_on_failures]" => format!("[pools.publish.pause_on_failures]\n{line}"),
        "[[topology.exchanges]]" => format!("{section}\nname = \"x\"\nkind = \"direct\"\n{line}"),
        "[[topology.queues]]" => format!("{section}\nname = \"x\"\n{line}"),
        "[[topology.bindings]]" => {
            let queue = "[[topology.queues]]\nname = \"x\"";
            format!("{queue}\n{section}\nexchange = \"amq.direct\"\nqueue = \"x\"\n{line}")
        }
        "[[topology.partitioned]]" if line.starts_with("partitions") => format!("{section}\nname = \"x\"\n{line}"),
        "[[topology.partitioned]]" => format!("{section}\nname = \"x\"\npartitions = 2\n{line}"),
        other => panic!("{other}"),
    }
}

fn read(section: &str, line: &str) -> Result<Settings, String> {
    Settings::loader().text(file(section, line)).no_profile().load().map_err(|error| error.to_string())
}

#[test]
fn the_reference_has_every_key_and_no_other() {
    let known: [(&str, &[&str]); 11] = [
        ("[app]", &sections::APP_KEYS),
        ("[broker]", &sections::BROKER_KEYS),
        ("[broker.tls]", &tls::TLS_KEYS),
        ("[pools.NAME]", &sections::POOL_KEYS),
        ("[pools.NAME.pause_on_failures]", &pace::PAUSE_KEYS),
        ("[outbox]", &outbox::OUTBOX_KEYS),
        ("[topology]", &lists::TOPOLOGY_KEYS),
        ("[[topology.exchanges]]", &lists::EXCHANGE_KEYS),
        ("[[topology.queues]]", &lists::QUEUE_KEYS),
        ("[[topology.bindings]]", &lists::BINDING_KEYS),
        ("[[topology.partitioned]]", &lists::PARTITIONED_KEYS),
    ];
    let tables = tables();
    assert_eq!(tables.len(), known.len());
    for (section, keys) in known {
        let written: Vec<&str> = tables[section].iter().map(|row| row.key.as_str()).collect();
        assert_eq!(written, keys, "{section}");
    }
}

#[test]
fn what_the_reference_calls_a_default_is_one() {
    let mut checked = 0;
    for (section, rows) in tables() {
        let nothing = read(&section, "").unwrap();
        for row in rows.iter().filter(|row| !row.default.is_empty()) {
            // A table of TLS settings is TLS, which goes with an amqps URL only.
            // What an outbox does not say is left to its builder.
            if section == "[broker.tls]" || section == "[outbox]" {
                continue;
            }
            let line = format!("{} = {}", row.key, row.default);
            assert_eq!(read(&section, &line).as_ref(), Ok(&nothing), "{section} {line}");
            checked += 1;
        }
    }
    assert_eq!(checked, 38, "rows with a default");
}

#[test]
fn what_the_reference_calls_a_range_is_one() {
    let mut checked = 0;
    for (section, rows) in tables() {
        for row in &rows {
            let Some((lowest, highest)) = row.range.trim_end_matches(" each").split_once(" to ") else { continue };
            let (below, above) = match row.kind.as_str() {
                "number" | "number or text" => ("0".to_owned(), (highest.parse::<i64>().unwrap() + 1).to_string()),
                "duration" | "list of durations" => {
                    ("\"0s\"".to_owned(), format!("{} 1s\"", highest.trim_end_matches('"')))
                }
                _ => continue,
            };
            let line = |value: &str| match row.key.as_str() {
                "retry" => format!("retry = [{value}]"),
                "max_attempts" => format!("retry = [\"1s\"]\nmax_attempts = {value}"),
                key => format!("{key} = {value}"),
            };
            for good in [lowest, highest] {
                assert!(read(&section, &line(good)).is_ok(), "{section} {}", line(good));
            }
            for bad in [&*below, &*above] {
                let error = read(&section, &line(bad)).expect_err(&line(bad));
                assert!(error.contains(&row.key), "{error}");
            }
            checked += 1;
        }
    }
    assert_eq!(checked, 19, "rows with a range of numbers or durations");
}
