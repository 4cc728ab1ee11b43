//! The guide is complete where it says so: docs/errors.md has every error.

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

#[test]
fn each_error_has_a_row_that_says_what_to_do() {
    let page = fs::read_to_string(coney_sources::path("docs/errors.md")).unwrap();
    let mut rows: Vec<String> = Vec::new();
    for line in page.lines().filter(|line| line.starts_with("| `")) {
        let first = line.split('|').nth(1).unwrap_or_default();
        rows.extend(first.split('`').skip(1).step_by(2).map(str::to_owned));
    }
    let mut errors = variants("src/error/mod.rs", "Error");
    errors.extend(variants("src/error/connect.rs", "ConnectError"));
    rows.sort();
    errors.sort();
    assert_eq!(rows, errors);
}
