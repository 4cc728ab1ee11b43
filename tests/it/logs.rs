//! What the library logs, kept, so that tests can count lines and look for what must not be in them.

use std::collections::BTreeMap;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Instant;

use log::kv::{Key, Value, VisitSource};
use log::{Level, LevelFilter, Log, Metadata, Record};

#[derive(Debug, Clone)]
pub struct Line {
    pub at: Instant,
    pub level: Level,
    /// Who logged it.
    pub thread: ThreadId,
    pub text: String,
    /// What it is about.
    pub keys: BTreeMap<String, String>,
}

/// Collects keys and values.
struct Keys(BTreeMap<String, String>);

impl<'kvs> VisitSource<'kvs> for Keys {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), log::kv::Error> {
        self.0.insert(key.to_string(), value.to_string());
        Ok(())
    }
}

struct Keeper(Mutex<Vec<Line>>);

impl Keeper {
    fn lines(&self) -> MutexGuard<'_, Vec<Line>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Log for Keeper {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("coney")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let (at, thread, text) = (Instant::now(), thread::current().id(), record.args().to_string());
            let mut keys = Keys(BTreeMap::new());
            record.key_values().visit(&mut keys).expect("the keys are there to be read");
            self.lines().push(Line { at, level: record.level(), thread, text, keys: keys.0 });
        }
    }

    fn flush(&self) {}
}

/// Keeps what is logged, from the first use on. All tests share it: ask for lines by a name that is the test's own.
static KEEPER: LazyLock<&'static Keeper> = LazyLock::new(|| {
    static KEEPER: Keeper = Keeper(Mutex::new(Vec::new()));
    log::set_logger(&KEEPER).expect("nobody else logs here");
    log::set_max_level(LevelFilter::Debug);
    &KEEPER
});

/// To be called before what is to be looked at.
pub fn keep() {
    LazyLock::force(&KEEPER);
}

/// The lines, of every level, that contain `what`.
pub fn lines_with(what: &str) -> Vec<Line> {
    KEEPER.lines().iter().filter(|line| line.text.contains(what)).cloned().collect()
}

/// What a listener has said that is of concern to an operator.
pub fn of_listener(name: &str) -> Vec<Line> {
    let mut lines = lines_with(&format!("listener {name:?}: "));
    lines.retain(|line| line.level <= Level::Info);
    lines
}
