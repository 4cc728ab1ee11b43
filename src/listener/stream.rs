//! Listeners on a stream: where they begin to read, and how far they have come.
//!
//! A stream keeps its messages. A consumer says at which offset it begins, and settling only asks for more. So the listener itself
//! keeps the offset of the last message that was handled, and begins behind it after whatever ended its consumer.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::ListenerBuilder;
use crate::error::{Error, Result};
use crate::field::FieldValue;

/// The argument of a consumer that says where it begins.
const ARGUMENT: &str = "x-stream-offset";

/// How often a stored offset is replaced at most: storing may take as long as a disk does.
const STORE_EVERY: Duration = Duration::from_secs(1);

/// Where a listener begins to read a stream (`x-stream-offset`, <https://www.rabbitmq.com/docs/streams#consuming>).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Offset {
    /// With the first message that the stream still has.
    First,
    /// With the last chunk of messages. A chunk is what the broker has written in one go: one message, or many.
    Last,
    /// With what is published from then on.
    Next,
    /// With the message that has this offset. Offsets count from 0.
    At(u64),
    /// With the chunk that was written at this time or later; whole seconds. It may begin with messages that are older.
    Since(SystemTime),
    /// With what was published within this time before now, in the broker's words: a number and one of the units `Y`, `M`, `D`,
    /// `h`, `m` and `s`, such as `"7D"`.
    Interval(String),
}

impl Offset {
    /// As the argument of a consumer.
    fn value(&self) -> FieldValue {
        match self {
            Offset::First => "first".into(),
            Offset::Last => "last".into(),
            Offset::Next => "next".into(),
            Offset::At(offset) => i64::try_from(*offset).unwrap_or(i64::MAX).into(),
            Offset::Since(time) => {
                FieldValue::Timestamp(time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
            }
            Offset::Interval(interval) => interval.as_str().into(),
        }
    }

    fn check(&self) -> Result<()> {
        let Offset::Interval(interval) = self else { return Ok(()) };
        let is_unit = |unit: char| "YMDhms".contains(unit);
        let number = interval.strip_suffix(is_unit).unwrap_or_default();
        if number.parse::<u32>().is_ok() && number.bytes().all(|byte| byte.is_ascii_digit()) {
            return Ok(());
        }
        let problem =
            format!("the interval is {interval:?}, expected a number and one of Y, M, D, h, m and s, such as \"7D\"");
        Err(Error::invalid("offset", problem))
    }
}

/// Keeps the offset of the last message of a stream that was handled, so that the next start of the program goes on behind it.
/// See [`ListenerBuilder::offset_store`] and [`OffsetFile`].
pub trait OffsetStore: Send + Sync {
    /// The offset that was stored last; `None` if there is none yet.
    ///
    /// # Errors
    ///
    /// Whatever is in the way. The listener does not begin then, and tries again.
    fn load(&self) -> io::Result<Option<u64>>;

    /// Stores an offset in the place of the one before. Called on a thread of the listener, once a second at most and when its
    /// session ends.
    ///
    /// # Errors
    ///
    /// Whatever is in the way. It is logged, and stored again later.
    fn store(&self, offset: u64) -> io::Result<()>;
}

/// An offset in a file of its own, as decimal digits. A new one replaces the file in one step, so that there is always a whole one.
#[derive(Debug, Clone)]
pub struct OffsetFile {
    path: PathBuf,
}

impl OffsetFile {
    /// The file at `path`, which need not be there; its directory must. Beside it there is `PATH.new` while one is stored.
    pub fn new(path: impl Into<PathBuf>) -> OffsetFile {
        OffsetFile { path: path.into() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl OffsetStore for OffsetFile {
    fn load(&self) -> io::Result<Option<u64>> {
        let text = match fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let offset = text.trim().parse().map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidData, "there is no offset in it, expected decimal digits")
        })?;
        Ok(Some(offset))
    }

    fn store(&self, offset: u64) -> io::Result<()> {
        let mut new = self.path.clone().into_os_string();
        new.push(".new");
        let mut file = File::create(&new)?;
        writeln!(file, "{offset}")?;
        file.sync_data()?;
        fs::rename(&new, &self.path)
    }
}

/// What the program keeps offsets in.
#[derive(Clone)]
pub(super) struct Store(Arc<dyn OffsetStore>);

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Store")
    }
}

/// How far a listener has come in a stream.
#[derive(Debug)]
pub(super) struct Position {
    begin: Offset,
    store: Option<Store>,
    /// A leaf among locks.
    progress: Mutex<Progress>,
}

#[derive(Debug, Default)]
struct Progress {
    /// The last message that was handled, with all before it.
    handled: Option<u64>,
    /// A message has not been handled: what comes after it does not count in this run.
    is_held: bool,
    stored: Option<u64>,
    stored_at: Option<Instant>,
}

impl Position {
    pub(super) fn new(begin: Offset, store: Option<Store>) -> Position {
        Position { begin, store, progress: Mutex::default() }
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The argument of a consumer that begins now: its name and its value.
    pub(super) fn argument(&self) -> Result<(&'static str, FieldValue)> {
        let known = self.progress().handled;
        let handled = match (known, &self.store) {
            (Some(handled), _) => Some(handled),
            (None, Some(Store(store))) => {
                store.load().map_err(|source| Error::OffsetStore { source: Arc::new(source) })?
            }
            (None, None) => None,
        };
        let mut progress = self.progress();
        progress.is_held = false;
        progress.handled = handled;
        // What was loaded is stored.
        progress.stored = progress.stored.or(handled.filter(|_| known.is_none()));
        let begin = handled.map(|handled| Offset::At(handled.saturating_add(1)));
        Ok((ARGUMENT, begin.as_ref().unwrap_or(&self.begin).value()))
    }

    /// A message has been handled, and all before it.
    pub(super) fn handled(&self, offset: Option<u64>) {
        let mut progress = self.progress();
        if !progress.is_held && offset > progress.handled {
            progress.handled = offset;
        }
    }

    /// A message has not been handled. It is to come again, and those behind it with it.
    pub(super) fn hold(&self) {
        self.progress().is_held = true;
    }

    /// By when the offset is to be stored, if it has changed.
    pub(super) fn due(&self) -> Option<Instant> {
        self.store.as_ref()?;
        let progress = self.progress();
        (progress.handled != progress.stored)
            .then(|| progress.stored_at.map_or_else(Instant::now, |at| at + STORE_EVERY))
    }

    /// Stores the offset if that is due, or if nothing comes after. What is in the way is returned.
    pub(super) fn store(&self, is_last: bool) -> io::Result<()> {
        let Some(Store(store)) = &self.store else { return Ok(()) };
        if self.due().is_none_or(|due| !is_last && due > Instant::now()) {
            return Ok(());
        }
        let Some(handled) = self.progress().handled else { return Ok(()) };
        let result = store.store(handled);
        let mut progress = self.progress();
        progress.stored_at = Some(Instant::now());
        if result.is_ok() {
            progress.stored = Some(handled);
        }
        result
    }
}

impl ListenerBuilder {
    /// Reads the queue as a stream, from this offset on. After a lost connection it goes on behind the last message that was
    /// handled, and so does the next start of the program with an [`offset_store`](Self::offset_store).
    ///
    /// ```no_run
    /// # fn main() -> coney::Result<()> {
    /// # let app = coney::App::from_file("app.toml")?;
    /// use coney::{Offset, OffsetFile, Queue, Topology};
    ///
    /// app.listener("orders-log")
    ///     .topology(Topology::new().queue(Queue::new("orders-log").stream()))
    ///     .offset(Offset::First)
    ///     .offset_store(OffsetFile::new("orders-log.offset"))
    ///     .spawn(|_context, delivery| println!("{:?}: {:?}", delivery.stream_offset(), delivery.message().text()))?
    ///     .detach();
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// A stream gives no message twice to one consumer. So a message that fails, is rejected or requeued is passed over, and the log
    /// says so; one that cannot be decoded goes to the dead where that is wanted. There is no retry policy, and every thread would
    /// be given all messages, so there is one.
    pub fn offset(mut self, offset: Offset) -> Self {
        self.offset = Some(offset);
        self
    }

    /// Keeps the offset of the last message that was handled where the next start of the program finds it, in the place of the one
    /// that [`offset`](Self::offset) says. It is stored once a second at most, so after a crash up to a second's messages come again.
    pub fn offset_store(mut self, store: impl OffsetStore + 'static) -> Self {
        self.offset_store = Some(Store(Arc::new(store)));
        self
    }

    /// How far it has come, if it reads a stream.
    pub(super) fn position(&self) -> Result<Option<Position>> {
        let Some(offset) = &self.offset else {
            if self.offset_store.is_some() {
                return Err(Error::invalid(
                    "offset_store",
                    "expected offset beside it: where to begin without a stored one",
                ));
            }
            return Ok(None);
        };
        offset.check()?;
        if self.concurrency.most() > 1 {
            let problem = format!(
                "it is {}, expected 1: each thread would be given all messages of the stream",
                self.concurrency
            );
            return Err(Error::invalid("concurrency", problem));
        }
        Ok(Some(Position::new(offset.clone(), self.offset_store.clone())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position(store: Option<OffsetFile>) -> Position {
        Position::new(Offset::First, store.map(|store| Store(Arc::new(store))))
    }

    fn begins(position: &Position) -> FieldValue {
        position.argument().unwrap().1
    }

    #[test]
    fn it_goes_on_behind_the_last_message_that_was_handled() {
        let position = position(None);
        assert_eq!(begins(&position), "first".into());
        position.handled(Some(7));
        position.handled(Some(3));
        assert_eq!(begins(&position), 8_i64.into());
    }

    #[test]
    fn what_comes_behind_a_message_that_is_to_come_again_does_not_count() {
        let position = position(None);
        position.handled(Some(7));
        position.hold();
        position.handled(Some(9));
        assert_eq!(begins(&position), 8_i64.into());
        position.handled(Some(9));
        assert_eq!(begins(&position), 10_i64.into(), "in the next run it does");
    }

    #[test]
    fn a_stored_offset_is_found_by_the_next_start() {
        let directory = tempfile::tempdir().unwrap();
        let file = OffsetFile::new(directory.path().join("offset"));
        let first = position(Some(file.clone()));
        assert_eq!(begins(&first), "first".into());
        assert_eq!(first.due(), None);
        first.handled(Some(41));
        first.store(false).unwrap();
        assert_eq!(fs::read_to_string(file.path()).unwrap(), "41\n");
        first.handled(Some(42));
        first.store(false).unwrap();
        assert_eq!(file.load().unwrap(), Some(41), "a second has not passed");
        assert!(first.due().is_some_and(|due| due > Instant::now()));
        first.store(true).unwrap();
        assert_eq!(first.due(), None);
        assert_eq!(begins(&position(Some(file))), 43_i64.into());
    }

    #[test]
    fn a_file_that_holds_no_offset_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let file = OffsetFile::new(directory.path().join("offset"));
        for text in ["", "first", "-1", "1 2"] {
            fs::write(file.path(), text).unwrap();
            let error = position(Some(file.clone())).argument().unwrap_err();
            assert!(error.to_string().contains("expected decimal digits"), "{error}");
        }
        let missing = OffsetFile::new(directory.path().join("missing").join("offset"));
        assert_eq!(missing.load().unwrap(), None);
        missing.store(1).unwrap_err();
    }

    #[test]
    fn intervals_are_numbers_with_a_unit() {
        for right in ["7D", "1Y", "30s", "0m"] {
            Offset::Interval(right.to_owned()).check().unwrap();
        }
        for wrong in ["", "D", "7", "7d", "7 D", "-7D", "+7D", "1.5h"] {
            Offset::Interval(wrong.to_owned()).check().unwrap_err();
        }
    }
}
