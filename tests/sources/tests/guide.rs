//! The guide is complete where it says so: docs/errors.md has every error, and docs/operating.md every event.

use std::fs;

use syn::{Item, ItemEnum};

fn variants(file: &str, name: &str) -> Vec<String> {
    let parsed = syn::parse_file(&fs::read_to_string(coney_sources::path(file)).unwrap()).unwrap();
    let is_it = |item: Item| match item {
        Item::Enum(ItemEnum { ident, variants, .. }) if ident == name => Some(variants),
        _ => None,
    };
    let variants = parsed.items.into_iter().find_map(is_it).unwrap_or_else(|| panic!("{name} is in {file}"));
    variants.iter().map(|variant| variant.ident.to_string()).collect()
}

/// What the rows of the tables in `text` are about.
fn rows(text: &str) -> Vec<String> {
    let mut rows: Vec<String> = Vec::new();
    for line in text.lines().filter(|line| line.starts_with("| `")) {
        let first = line.split('|').nth(1).unwrap_or_default();
        rows.extend(first.split('`').skip(1).step_by(2).map(str::to_owned));
    }
    rows
}

#[test]
fn each_event_has_a_row_in_the_order_of_the_sources() {
    let page = fs::read_to_string(coney_sources::path("docs/operating.md")).unwrap();
    let (_, section) = page.split_once("\n## What happens\n").unwrap();
    assert_eq!(rows(section.split("\n## ").next().unwrap()), variants("src/event/mod.rs", "Event"));
}

#[test]
fn each_error_has_a_row_that_says_what_to_do() {
    let mut rows = rows(&fs::read_to_string(coney_sources::path("docs/errors.md")).unwrap());
    let mut errors = variants("src/error/mod.rs", "Error");
    errors.extend(variants("src/error/connect.rs", "ConnectError"));
    rows.sort();
    errors.sort();
    assert_eq!(rows, errors);
}
