//! Puts file, profile and environment on top of each other and makes [`Settings`] of the result.
//!
//! `config` parses the TOML and merges the layers. Reading each layer by itself finds the mistakes in it under the
//! keys they are written at, also where a later layer would hide them; the merged tree then gives the values.

use std::fmt;
use std::path::{Path, PathBuf};

use config::{Config, ConfigError, Map, Source, Value, ValueKind};

use super::lists::TopologySection;
use super::merge::{self, Laid};
use super::outbox::OutboxSection;
use super::reader::{Reader, child, sorted};
use super::sections::{AppSection, BrokerSection, PoolSections};
use super::{AppSettings, BrokerSettings, Problem, Settings, SettingsError, environment, toml};
use crate::error::Result;

const SECTIONS: [&str; 5] = ["app", "broker", "pools", "topology", "outbox"];
const SECTIONS_OF_FILE: [&str; 6] = ["app", "broker", "pools", "topology", "outbox", "profiles"];
/// The variable that names the profile.
pub(super) const PROFILE_VARIABLE: &str = "CONEY_PROFILE";

/// Loads [`Settings`] from a file or a text, a profile and an environment, any of which may be left out.
///
/// Of several layers that set the same key the last wins: file, profile, environment. Tables are merged key by key; lists, such
/// as `hosts`, are replaced as a whole. The topology of a profile is laid over that of the file: a queue or an exchange of the
/// same name is merged key by key, others and bindings are added, and `remove = true` in an entry takes it out.
///
/// A profile is a table `[profiles.NAME]` in the file with sections of its own. The variable `CONEY_PROFILE` names
/// the one to use; unset or empty it is none.
///
/// A variable `CONEY_BROKER__KEY` sets `KEY` of `[broker]`, `CONEY_APP__KEY` that of `[app]`, `CONEY_OUTBOX__KEY` that of `[outbox]`, and `CONEY_POOLS__NAME__KEY` that
/// of `[pools.NAME]`; case does not count, and a character that no variable can have in its name, as in
/// `[pools."eu.orders"]`, is written `_`. Its text is read as the type that the key wants; `hosts` are separated by commas. A line
/// break at its end is left out. Other variables are left alone, but for one that would be ours with two underscores, such as
/// `CONEY_BROKER_URL`: that is a mistake.
///
/// ```
/// use coney::Settings;
///
/// let settings = Settings::loader()
///     .text("[pools.publish]\nsize = 2\n[profiles.test.pools.publish]\nsize = 1")
///     .profile("test")
///     .environment([("CONEY_BROKER__PASSWORD", "s3cret")])
///     .load()?;
/// assert_eq!(settings.pools["publish"].size, 1);
/// assert_eq!(settings.pools["listen"].broker.password.expose(), "s3cret");
/// # Ok::<(), coney::Error>(())
/// ```
#[derive(Clone, Default)]
#[must_use = "nothing is read before `load`"]
pub struct Loader {
    text: Text,
    profile: Profile,
    /// No value: it is not UTF-8.
    environment: Vec<(String, Option<String>)>,
}

#[derive(Clone, Default)]
enum Text {
    #[default]
    None,
    File(PathBuf),
    Toml(String),
}

#[derive(Debug, Clone, Default)]
enum Profile {
    #[default]
    FromEnvironment,
    Named(String),
    None,
}

impl Loader {
    pub(super) fn new() -> Loader {
        Loader::default()
    }

    /// Reads this file, in place of any file or text set before. Defaults to none: every key is at its default.
    pub fn file(mut self, path: impl AsRef<Path>) -> Loader {
        self.text = Text::File(path.as_ref().to_owned());
        self
    }

    /// Reads this text, in place of any file or text set before. Defaults to none.
    pub fn text(mut self, toml: impl Into<String>) -> Loader {
        self.text = Text::Toml(toml.into());
        self
    }

    /// Lays this profile over the file, whatever `CONEY_PROFILE` says. Defaults to what `CONEY_PROFILE` says in the
    /// environment that was given.
    pub fn profile(mut self, name: impl Into<String>) -> Loader {
        self.profile = Profile::Named(name.into());
        self
    }

    /// Uses no profile, whatever `CONEY_PROFILE` says.
    pub fn no_profile(mut self) -> Loader {
        self.profile = Profile::None;
        self
    }

    /// Adds environment variables, names and values. Those that do not begin with `CONEY_` are left alone. Defaults
    /// to none.
    pub fn environment<N, V>(mut self, variables: impl IntoIterator<Item = (N, V)>) -> Loader
    where
        N: Into<String>,
        V: Into<String>,
    {
        self.environment.extend(variables.into_iter().map(|(name, value)| (name.into(), Some(value.into()))));
        self
    }

    /// Adds the environment variables of this process, as they are now.
    pub fn process_environment(mut self) -> Loader {
        let named = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
        let ours = named.filter(|(name, _)| environment::is_ours(name));
        self.environment.extend(ours.map(|(name, value)| (name, value.into_string().ok())));
        self
    }

    /// Reads everything and checks it as a whole.
    ///
    /// # Errors
    ///
    /// [`Error::Settings`](crate::Error::Settings), listing every mistake; or the one that keeps the file from being
    /// read: it is not there, it is not UTF-8, it is not TOML.
    pub fn load(self) -> Result<Settings> {
        let file = match &self.text {
            Text::File(path) => Some(path.clone()),
            Text::None | Text::Toml(_) => None,
        };
        self.load_all().map_err(|problems| SettingsError::new(file, problems).into())
    }

    fn load_all(&self) -> Result<Settings, Vec<Problem>> {
        let mut base = match &self.text {
            Text::None => Map::new(),
            Text::File(path) => toml::parse(&toml::read(path).map_err(|problem| vec![problem])?)?,
            Text::Toml(text) => toml::parse(text)?,
        };
        let profiles = base.remove("profiles");

        let mut reader = Reader::default();
        let base = Value::new(None, base);
        read_layer(&mut reader, &base, "", &SECTIONS_OF_FILE);
        let profiles = read_profiles(&mut reader, &base, profiles);
        let overlay = self.chosen_profile(&mut reader, &profiles);
        let overlay = overlay.unwrap_or_else(|| Value::new(None, Map::<String, Value>::new()));
        let environment = environment::tree(&mut reader, &self.environment, &[&base, &overlay]);
        read_layer(&mut reader, &environment, "", &SECTIONS);

        let settings = merge([base, overlay, environment]).map(|merged| settle(&mut reader, &merged));
        let problems = reader.into_problems();
        match settings {
            Ok(settings) if problems.is_empty() => Ok(settings),
            Ok(_) => Err(problems),
            // Layers of our own making always merge. If ever not, no text of config's gets out: it quotes values.
            Err(_) => Err(vec![Problem::new("", "file, profile and environment cannot be merged")]),
        }
    }

    fn chosen_profile(&self, reader: &mut Reader, profiles: &[(String, Value)]) -> Option<Value> {
        let variable = self.environment.iter().rev().find(|(name, _)| name.eq_ignore_ascii_case(PROFILE_VARIABLE));
        let (name, variable) = match (&self.profile, variable) {
            (Profile::None, _) | (Profile::FromEnvironment, None) => return None,
            (Profile::Named(name), _) => (name.as_str(), None),
            (Profile::FromEnvironment, Some((_, Some(name)))) => match environment::without_line_break(name) {
                "" => return None,
                name => (name, Some(PROFILE_VARIABLE.to_owned())),
            },
            (Profile::FromEnvironment, Some((_, None))) => {
                let variable = Some(PROFILE_VARIABLE.to_owned());
                reader.add(Problem { variable, ..Problem::new("profile", environment::NOT_UTF8) });
                return None;
            }
        };
        if let Some((_, overlay)) = profiles.iter().find(|(known, _)| known == name) {
            return Some(overlay.clone());
        }
        let known: Vec<String> = profiles.iter().map(|(known, _)| child("", known)).collect();
        let known =
            if known.is_empty() { "there are none".to_owned() } else { format!("there are: {}", known.join(", ")) };
        let problem = format!("no profile is named {}; {known}", child("", name));
        reader.add(Problem { variable, ..Problem::new("profile", problem) });
        None
    }
}

impl fmt::Debug for Loader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&String> = self.environment.iter().map(|(name, _)| name).collect();
        f.debug_struct("Loader")
            .field("text", &self.text)
            .field("profile", &self.profile)
            .field("environment", &names)
            .finish()
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Text::None => f.write_str("None"),
            Text::File(path) => f.debug_tuple("File").field(path).finish(),
            Text::Toml(_) => f.write_str("Toml(..)"),
        }
    }
}

/// Notes every mistake in a layer that can be seen without the others.
fn read_layer(reader: &mut Reader, layer: &Value, key: &str, allowed: &[&str]) {
    let topology = read_sections(reader, layer, key, allowed).topology;
    for mistake in topology.topology.entry_mistakes() {
        reader.add(topology.problem(&mistake));
    }
}

/// The profiles in the file, each with the mark on every value that it came from there, and with its topology laid over that
/// of the file.
fn read_profiles(reader: &mut Reader, base: &Value, profiles: Option<Value>) -> Vec<(String, Value)> {
    let Some(profiles) = profiles else { return Vec::new() };
    let mut marked = Vec::new();
    for (name, profile) in reader.table(&profiles, "profiles").map(sorted).unwrap_or_default() {
        let key = child("profiles", name);
        let Laid { whole, own } = merge::profile_over(reader, base, &mark(profile, &key), &key);
        read_layer(reader, &own, &key, &SECTIONS);
        marked.push((name.to_owned(), whole));
    }
    marked
}

fn mark(value: &Value, origin: &String) -> Value {
    let kind = match &value.kind {
        ValueKind::Table(table) => {
            ValueKind::Table(table.iter().map(|(name, value)| (name.clone(), mark(value, origin))).collect())
        }
        ValueKind::Array(values) => ValueKind::Array(values.iter().map(|value| mark(value, origin)).collect()),
        leaf => leaf.clone(),
    };
    Value::new(Some(origin), kind)
}

/// What a tree says, before defaults and inheritance.
#[derive(Debug, Default)]
struct Sections {
    app: AppSection,
    broker: BrokerSection,
    pools: PoolSections,
    topology: TopologySection,
    outbox: OutboxSection,
}

fn read_sections(reader: &mut Reader, tree: &Value, key: &str, allowed: &[&str]) -> Sections {
    let Some(root) = reader.section(tree, key.to_owned(), allowed) else { return Sections::default() };
    let mut sections = Sections::default();
    if let Some(app) = root.value("app") {
        sections.app = AppSection::read(reader, app, root.key_of("app"));
    }
    if let Some(broker) = root.value("broker") {
        sections.broker = BrokerSection::read(reader, broker, root.key_of("broker"));
    }
    if let Some(pools) = root.value("pools") {
        sections.pools = PoolSections::read(reader, pools, &root.key_of("pools"));
    }
    if let Some(topology) = root.value("topology") {
        sections.topology = TopologySection::read(reader, topology, root.key_of("topology"));
    }
    if let Some(outbox) = root.value("outbox") {
        sections.outbox = OutboxSection::read(reader, outbox, root.key_of("outbox"));
    }
    sections
}

/// Makes settings of the merged layers. What can be wrong with one layer has been noted before; what is noted here is
/// what can only be wrong with all of them together.
fn settle(reader: &mut Reader, merged: &Value) -> Settings {
    let mut noted_before = Reader::default();
    let Sections { app, broker, pools, topology, outbox } = read_sections(&mut noted_before, merged, "", &SECTIONS);
    for mistake in topology.topology.reference_mistakes() {
        reader.add(topology.problem(&mistake));
    }
    let broker = broker.over(&BrokerSettings::default());
    let app = app.over(AppSettings::default());
    let outbox = outbox.settle(reader);
    Settings { pools: pools.over(&broker), topology: topology.topology, app, outbox }
}

/// One layer as a source for `config`.
///
/// `config` takes the keys at the top of a source for paths and splits them at dots and brackets; further down it
/// leaves them alone. So everything goes one level down, under [`Overlay::ROOT`].
#[derive(Debug, Clone)]
struct Overlay(Value);

impl Overlay {
    const ROOT: &str = "settings";
}

impl Source for Overlay {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, ConfigError> {
        Ok(Map::from([(Overlay::ROOT.to_owned(), self.0.clone())]))
    }
}

/// Takes the tree as `config` keeps it: its `get` would make every value anew, without its origin.
fn merge(layers: [Value; 3]) -> Result<Value, ConfigError> {
    let builder = layers.into_iter().fold(Config::builder(), |builder, layer| builder.add_source(Overlay(layer)));
    let mut tree = builder.build()?.cache.into_table()?;
    tree.remove(Overlay::ROOT).ok_or_else(|| ConfigError::NotFound(Overlay::ROOT.to_owned()))
}
