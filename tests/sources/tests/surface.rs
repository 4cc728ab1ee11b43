//! Whose types the interface is made of: our own, the standard library's, and those of few others.
//!
//! What a dependency calls its next version is no business of who uses this crate, unless its types are in our signatures.
//! So this reads our own sources, with `syn`, and looks at everything that is `pub`: signatures, fields, variants, aliases,
//! re-exports, and the traits that public types implement, by whatever name a foreign type has been imported. It does not
//! ask whether an item can be reached from outside, for what is `pub` in a private room may be by tomorrow. What is only there
//! with a feature that says so is let by.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Attribute, File, ImplItem, Item, TraitItem, Type, UseTree, Visibility};

/// Dependencies whose types are meant to be in the interface: serde's traits are what bodies have to implement, and
/// serde_json's error says what is wrong with one. Both have been at 1.0 for years.
const WELCOME: [&str; 2] = ["serde", "serde_json"];
/// Whose macros are called by macros of ours, where a mention is no more than that.
const CALLED: [&str; 1] = ["metrics"];
/// Features with which foreign types are in the interface, and say so; and one that is none of the interface.
const FEATURES: [&str; 4] = ["unstable-amiquip", "fuzzing", "outbox-sqlite", "outbox-postgres"];

/// The dependencies in Cargo.toml, but for those that are welcome, as they are called in the sources.
fn foreign_crates() -> BTreeSet<String> {
    let manifest = fs::read_to_string(coney_sources::path("Cargo.toml")).unwrap();
    let dependencies = manifest.split("\n[dependencies]\n").nth(1).unwrap().split("\n[").next().unwrap();
    let names = dependencies.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once(" = "));
    let names = names.map(|(name, _)| name.replace('-', "_"));
    names.filter(|name| !WELCOME.contains(&name.as_str())).collect()
}

/// Whether something is there only with one of the features, or only for our own tests.
fn is_let_by(attributes: &[Attribute]) -> bool {
    attributes.iter().filter(|attribute| attribute.path().is_ident("cfg")).any(|attribute| {
        let condition = attribute.meta.require_list().unwrap().tokens.to_string().replace(' ', "");
        condition == "test" || FEATURES.iter().any(|feature| condition == format!("feature=\"{feature}\""))
    })
}

fn is_public(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Public(_))
}

/// Looks through one file for what is public and foreign.
struct Look<'a> {
    /// Names that stand for something foreign here, and what that is.
    foreign: BTreeMap<String, String>,
    /// Where it is looking, for the findings.
    place: String,
    public_types: &'a BTreeSet<String>,
    findings: &'a mut Vec<String>,
}

impl Look<'_> {
    /// Notes what a `use` brings in under which name.
    fn import(&mut self, tree: &UseTree, path: &mut Vec<String>) {
        match tree {
            UseTree::Path(further) => {
                path.push(further.ident.to_string());
                self.import(&further.tree, path);
                path.pop();
            }
            UseTree::Name(name) if name.ident == "self" => {
                let own = path.last().cloned().unwrap_or_default();
                self.note(own, path);
            }
            UseTree::Name(name) => {
                path.push(name.ident.to_string());
                self.note(name.ident.to_string(), path);
                path.pop();
            }
            UseTree::Rename(renamed) => {
                path.push(renamed.ident.to_string());
                self.note(renamed.rename.to_string(), path);
                path.pop();
            }
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.import(tree, path)),
            UseTree::Glob(_) => {
                if let Some(root) = path.first().filter(|root| self.foreign.contains_key(*root)) {
                    self.findings.push(format!("{}: use {root}::*, behind which nothing can be told", self.place));
                }
            }
        }
    }

    fn note(&mut self, name: String, path: &[String]) {
        if self.foreign.contains_key(&path[0]) {
            self.foreign.insert(name, path.join("::"));
        } else {
            // One of our own by the name of a crate.
            self.foreign.remove(&name);
        }
    }

    fn with_place(&mut self, what: impl AsRef<str>, look: impl FnOnce(&mut Self)) {
        let before = self.place.clone();
        self.place = format!("{before} {}", what.as_ref());
        look(self);
        self.place = before;
    }

    fn found(&mut self, path: String) {
        self.findings.push(format!("{}: {path}", self.place));
    }

    /// What macros are made of cannot be parsed, so any mention of a foreign crate's path counts.
    fn tokens(&mut self, tokens: TokenStream) {
        let mut tokens = tokens.into_iter().peekable();
        while let Some(token) = tokens.next() {
            match token {
                TokenTree::Group(group) => self.tokens(group.stream()),
                TokenTree::Ident(name) if self.foreign.contains_key(&name.to_string()) => {
                    let is_called = CALLED.iter().any(|called| name == called);
                    if !is_called && matches!(tokens.peek(), Some(TokenTree::Punct(next)) if next.as_char() == ':') {
                        self.found(format!("{name} in a macro"));
                    }
                }
                _ => {}
            }
        }
    }

    fn items(&mut self, items: &[Item]) {
        for item in items {
            if let Item::Use(used) = item
                && !is_let_by(&used.attrs)
            {
                self.import(&used.tree, &mut Vec::new());
            }
        }
        // An alias of something foreign is something foreign.
        for item in items {
            if let Item::Type(alias) = item {
                let mut mentions = Mentions { foreign: &self.foreign, found: None };
                mentions.visit_type(&alias.ty);
                if let Some(path) = mentions.found {
                    self.foreign.insert(alias.ident.to_string(), path);
                }
            }
        }
        items.iter().for_each(|item| self.item(item));
    }

    fn item(&mut self, item: &Item) {
        match item {
            Item::Const(one) if is_public(&one.vis) => {
                self.with_place(one.ident.to_string(), |look| look.visit_type(&one.ty))
            }
            Item::Static(one) if is_public(&one.vis) => {
                self.with_place(one.ident.to_string(), |look| look.visit_type(&one.ty))
            }
            Item::Fn(one) if is_public(&one.vis) && !is_let_by(&one.attrs) => {
                self.with_place(one.sig.ident.to_string(), |look| look.visit_signature(&one.sig));
            }
            Item::Type(one) if is_public(&one.vis) => {
                self.with_place(one.ident.to_string(), |look| look.visit_type(&one.ty))
            }
            Item::Struct(one) if is_public(&one.vis) && !is_let_by(&one.attrs) => {
                self.with_place(one.ident.to_string(), |look| {
                    look.visit_generics(&one.generics);
                    one.fields
                        .iter()
                        .filter(|field| is_public(&field.vis))
                        .for_each(|field| look.visit_type(&field.ty));
                });
            }
            Item::Enum(one) if is_public(&one.vis) && !is_let_by(&one.attrs) => {
                self.with_place(one.ident.to_string(), |look| {
                    look.visit_generics(&one.generics);
                    let fields = one.variants.iter().flat_map(|variant| &variant.fields);
                    fields.for_each(|field| look.visit_type(&field.ty));
                });
            }
            Item::Trait(one) if is_public(&one.vis) && !is_let_by(&one.attrs) => {
                self.with_place(one.ident.to_string(), |look| {
                    one.supertraits.iter().for_each(|bound| look.visit_type_param_bound(bound));
                    one.items.iter().for_each(|item| match item {
                        TraitItem::Fn(one) => look.visit_signature(&one.sig),
                        other => look.visit_trait_item(other),
                    });
                });
            }
            Item::Impl(one) if !is_let_by(&one.attrs) => {
                let name = type_name(&one.self_ty);
                let is_private = name.as_ref().is_some_and(|name| !self.public_types.contains(name));
                if is_private && !is_foreign(&one.self_ty, &self.foreign) {
                    return;
                }
                self.with_place(format!("impl {}", name.unwrap_or_default()), |look| {
                    if let Some((_, path, _)) = &one.trait_ {
                        look.visit_path(path);
                        look.visit_type(&one.self_ty);
                    }
                    let is_trait = one.trait_.is_some();
                    for item in &one.items {
                        match item {
                            ImplItem::Fn(one) if (is_trait || is_public(&one.vis)) && !is_let_by(&one.attrs) => {
                                look.with_place(one.sig.ident.to_string(), |look| look.visit_signature(&one.sig));
                            }
                            ImplItem::Const(one) if is_trait || is_public(&one.vis) => look.visit_type(&one.ty),
                            ImplItem::Type(one) => look.visit_type(&one.ty),
                            _ => {}
                        }
                    }
                });
            }
            Item::Use(one) if is_public(&one.vis) && !is_let_by(&one.attrs) => {
                let mut names = Vec::new();
                leaves(&one.tree, &mut names);
                for name in names {
                    if let Some(path) = self.foreign.get(&name).cloned() {
                        self.found(format!("pub use {path}"));
                    }
                }
            }
            Item::Mod(one) if !is_let_by(&one.attrs) => {
                if let Some((_, items)) = &one.content {
                    // What is imported outside is not there inside, unless it is imported again.
                    let outside = self.foreign.clone();
                    self.items(items);
                    self.foreign = outside;
                }
            }
            Item::Macro(one) if !is_let_by(&one.attrs) => self.tokens(one.mac.tokens.clone()),
            _ => {}
        }
    }
}

/// Every type and every bound in a public place.
impl<'ast> Visit<'ast> for Look<'_> {
    fn visit_path(&mut self, path: &'ast syn::Path) {
        let first = path.segments[0].ident.to_string();
        if let Some(foreign) = self.foreign.get(&first).cloned() {
            self.found(foreign);
        }
        visit::visit_path(self, path);
    }
}

/// Whether a type mentions something foreign.
struct Mentions<'a> {
    foreign: &'a BTreeMap<String, String>,
    found: Option<String>,
}

impl<'ast> Visit<'ast> for Mentions<'_> {
    fn visit_path(&mut self, path: &'ast syn::Path) {
        if let Some(foreign) = self.foreign.get(&path.segments[0].ident.to_string()) {
            self.found.get_or_insert_with(|| foreign.clone());
        }
        visit::visit_path(self, path);
    }
}

fn leaves(tree: &UseTree, names: &mut Vec<String>) {
    match tree {
        UseTree::Path(further) => leaves(&further.tree, names),
        UseTree::Name(name) => names.push(name.ident.to_string()),
        UseTree::Rename(renamed) => names.push(renamed.rename.to_string()),
        UseTree::Group(group) => group.items.iter().for_each(|tree| leaves(tree, names)),
        UseTree::Glob(_) => {}
    }
}

/// Whether this is the path of a type that is not ours.
fn is_foreign(of: &Type, foreign: &BTreeMap<String, String>) -> bool {
    matches!(of, Type::Path(path) if foreign.contains_key(&path.path.segments[0].ident.to_string()))
}

fn type_name(of: &Type) -> Option<String> {
    match of {
        Type::Path(path) => path.path.segments.last().map(|segment| segment.ident.to_string()),
        Type::Reference(reference) => type_name(&reference.elem),
        _ => None,
    }
}

/// A file of the library, and the rooms it opens.
fn read(path: &Path, files: &mut Vec<(PathBuf, File)>) {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file = syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let stem = path.file_stem().unwrap();
    let folder = path.parent().unwrap();
    let folder = if stem == "lib" || stem == "mod" { folder.to_owned() } else { folder.join(stem) };
    let rooms: Vec<String> = file
        .items
        .iter()
        .filter_map(|item| match item {
            Item::Mod(one) if one.content.is_none() && !is_let_by(&one.attrs) => Some(one.ident.to_string()),
            _ => None,
        })
        .collect();
    files.push((path.to_owned(), file));
    for room in rooms {
        let own = folder.join(format!("{room}.rs"));
        read(&if own.exists() { own } else { folder.join(room).join("mod.rs") }, files);
    }
}

fn public_types(items: &[Item], names: &mut BTreeSet<String>) {
    for item in items {
        match item {
            Item::Struct(one) if is_public(&one.vis) => _ = names.insert(one.ident.to_string()),
            Item::Enum(one) if is_public(&one.vis) => _ = names.insert(one.ident.to_string()),
            Item::Type(one) if is_public(&one.vis) => _ = names.insert(one.ident.to_string()),
            Item::Mod(one) => one.content.iter().for_each(|(_, items)| public_types(items, names)),
            _ => {}
        }
    }
}

fn look_through(files: &[(PathBuf, File)]) -> Vec<String> {
    let crates: BTreeMap<String, String> = foreign_crates().into_iter().map(|name| (name.clone(), name)).collect();
    let mut types = BTreeSet::new();
    files.iter().for_each(|(_, file)| public_types(&file.items, &mut types));
    let mut findings = Vec::new();
    for (path, file) in files {
        let place = path.strip_prefix(coney_sources::path(".")).unwrap_or(path).display().to_string();
        let mut look = Look { foreign: crates.clone(), place, public_types: &types, findings: &mut findings };
        look.items(&file.items);
    }
    findings
}

#[test]
fn no_type_of_a_dependency_is_in_the_interface() {
    let mut files = Vec::new();
    read(&coney_sources::path("src/lib.rs"), &mut files);
    assert!(files.len() > 100, "only {} files", files.len());
    let findings = look_through(&files);
    assert!(findings.is_empty(), "{findings:#?}");
}

/// So that the test above is known to see what it is to see.
#[test]
fn whatever_way_a_foreign_type_gets_into_the_interface_it_is_found() {
    let finds = |source: &str| look_through(&[(PathBuf::from("sample.rs"), syn::parse_file(source).unwrap())]);
    for leak in [
        "pub fn f(_: amiquip::Channel) {}",
        "pub fn f() -> Vec<Option<amiquip::Channel>> {}",
        "use amiquip::Channel as Line; pub fn f(_: &Line) {}",
        "use amiquip::{self as client}; pub fn f(_: client::Channel) {}",
        "use crossbeam_channel::Receiver; pub struct S { pub r: Receiver<()> }",
        "use r2d2::Pool; pub struct S; impl S { pub fn f(&self) -> Pool<()> {} }",
        "pub enum E { A(#[from] amiquip::Error) }",
        "pub struct E; impl From<amiquip::Error> for E { fn from(_: amiquip::Error) -> E { E } }",
        "pub struct E; impl From<E> for amiquip::Error { fn from(_: E) -> amiquip::Error { todo!() } }",
        "type Line = amiquip::Channel; pub fn f(_: Line) {}",
        "pub use amiquip::Channel;",
        "pub use amiquip;",
        "pub type Line = amiquip::Channel;",
        "pub trait T { fn f(&self, _: mio::Token); }",
        "pub fn f<T: r2d2::ManageConnection>(_: T) {}",
        "pub fn f<T>(_: T) where T: Into<amiquip::Error> {}",
        "pub fn f(_: impl Fn(&amiquip::Channel)) {}",
        "use amiquip::*;",
        "mod m { use amiquip::Channel; pub fn f(_: Channel) {} }",
        "m! { pub fn f(_: amiquip::Channel) {} }",
        "#[cfg(feature = \"tls\")] pub fn f(_: rustls::ServerName) {}",
    ] {
        assert!(!finds(leak).is_empty(), "not found: {leak}");
    }
    for fine in [
        "pub(crate) fn f(_: amiquip::Channel) {}",
        "pub struct S { inner: amiquip::Channel }",
        "pub fn f() { let _: amiquip::Channel; }",
        "struct S; impl From<amiquip::Error> for S { fn from(_: amiquip::Error) -> S { S } }",
        "use crate::message::Message; pub fn f(_: Message) {}",
        "use amiquip::Error; mod m { use crate::error::Error; pub fn f(_: Error) {} }",
        "pub fn f<T: serde::Serialize>(_: T) {}",
        "#[cfg(feature = \"unstable-amiquip\")] pub use amiquip;",
        "#[cfg(test)] pub fn f(_: amiquip::Channel) {}",
    ] {
        assert_eq!(finds(fine), Vec::<String>::new(), "{fine}");
    }
}
