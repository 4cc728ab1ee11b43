//! The ledger: what was published and called, what was said of it and what came of it; and whether the two agree.
//!
//! It knows nothing of brokers and faults. Whatever does not agree becomes a sentence in its list of violations.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use coney::Error;

/// What a call may take beyond its deadline on a machine that is busy with other things. With the deadlines of the load it is
/// shorter than the longest faults, so that a call that waits for the end of one is seen.
pub const MARGIN: Duration = Duration::from_secs(3);

/// How many violations of a rule are told in full.
const TOLD: usize = 5;

/// How a message was published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// By `Pool::publish`, which may publish it again under the same id.
    Pool,
    /// By `Connection::publish_async`, once.
    Async,
}

/// What the publisher was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Confirmed,
    /// The broker has not taken it, or has never seen it.
    NotTaken,
    /// It may be there or not.
    Unknown,
}

/// One message. Small, for there are many.
#[derive(Debug, Clone, Copy)]
struct Entry {
    way: Way,
    told: Option<Verdict>,
    /// How often it was handled; and how often of these it was not marked as redelivered.
    handled: u8,
    fresh: u8,
    /// Of its `message_id`, as it was handled first.
    id: u32,
}

/// What has to happen for a fault to be over: each with a message or call that was begun after it was lifted.
#[derive(Debug, Clone, Copy)]
struct Watch {
    lifted: Instant,
    first_message: usize,
    first_call: u64,
    seen: [Option<Duration>; 3],
}

/// How long after a fault was lifted the first confirm came, the first message was handled, the first call answered.
pub type Recovery = [Duration; 3];

/// Sums.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sums {
    pub attempted: u64,
    pub confirmed: u64,
    pub not_taken: u64,
    pub unknown: u64,
    /// Distinct messages.
    pub handled: u64,
    /// Times that a message was handled and had been delivered before.
    pub redelivered: u64,
    /// Times that a message was handled again and was not marked: another copy of it.
    pub repeated: u64,
    pub calls: u64,
    pub answered: u64,
}

#[derive(Debug)]
struct State {
    entries: Vec<Entry>,
    sums: Sums,
    /// By what was done, and how it ended.
    errors: BTreeMap<(&'static str, String), u64>,
    longest: BTreeMap<&'static str, Duration>,
    violations: BTreeMap<&'static str, Vec<String>>,
    watch: Option<Watch>,
}

#[derive(Debug)]
pub struct Ledger {
    state: Mutex<State>,
    changed: Condvar,
}

impl Ledger {
    /// With room for so many messages, taken now, so that memory can be watched for other growth.
    pub fn new(messages: usize) -> Ledger {
        let unused = Entry { way: Way::Pool, told: None, handled: 0, fresh: 0, id: 1 };
        let mut entries = vec![unused; messages];
        entries.clear();
        let state = State {
            entries,
            sums: Sums::default(),
            errors: BTreeMap::new(),
            longest: BTreeMap::new(),
            violations: BTreeMap::new(),
            watch: None,
        };
        Ledger { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a message is about to be published; gives its number.
    pub fn attempt(&self, way: Way) -> usize {
        let mut state = self.state();
        state.entries.push(Entry { way, told: None, handled: 0, fresh: 0, id: 0 });
        state.entries.len() - 1
    }

    /// Notes what the publisher was told.
    pub fn told(&self, number: usize, outcome: &Result<(), Error>) {
        let mut state = self.state();
        let Some(Entry { way, told, .. }) = state.entries.get_mut(number) else { return };
        let (way, twice) = (*way, told.is_some());
        let verdict = verdict(way, outcome);
        *told = Some(verdict.unwrap_or(Verdict::Unknown));
        if twice {
            state.violated("an outcome was told twice", || format!("of message {number}"));
        }
        if let Err(error) = outcome {
            let what = if way == Way::Pool { "pool.publish" } else { "publish_async" };
            state.count_error(what, error);
            if verdict.is_none() {
                state.violated("a publish ended in an error that no fault explains", || error.to_string());
            }
        } else if state.watch.is_some_and(|watch| number >= watch.first_message) {
            self.see(&mut state, 0);
        }
    }

    /// Notes that the listener has been given a message.
    pub fn handled(&self, number: usize, redelivered: bool, id: Option<&str>) {
        let mut hasher = DefaultHasher::new();
        id.hash(&mut hasher);
        let id = hasher.finish() as u32;
        let mut state = self.state();
        let Some(entry) = state.entries.get_mut(number) else {
            return state.violated("a message was handled that nobody published", || format!("number {number}"));
        };
        let same = entry.handled == 0 || entry.id == id;
        entry.handled = entry.handled.saturating_add(1);
        entry.fresh = entry.fresh.saturating_add(u8::from(!redelivered));
        entry.id = id;
        let (first, repeated) = (entry.handled == 1, !redelivered && entry.fresh > 1);
        state.sums.handled += u64::from(first);
        state.sums.redelivered += u64::from(redelivered);
        state.sums.repeated += u64::from(repeated);
        if !same {
            state.violated("a message was repeated under another message_id", || format!("message {number}"));
        }
        if state.watch.is_some_and(|watch| number >= watch.first_message) {
            self.see(&mut state, 1);
        }
    }

    /// Notes that a call is about to be made; gives its number.
    pub fn call(&self) -> u64 {
        let mut state = self.state();
        state.sums.calls += 1;
        state.sums.calls
    }

    /// Notes how a call has ended, to which `right` would have been the answer.
    pub fn answered(&self, number: u64, outcome: &Result<u64, Error>, right: u64) {
        let mut state = self.state();
        match outcome {
            Ok(answer) if *answer == right => {
                state.sums.answered += 1;
                if state.watch.is_some_and(|watch| number >= watch.first_call) {
                    self.see(&mut state, 2);
                }
            }
            Ok(answer) => state.violated("a call got the answer to another", || {
                format!("call {number} got {answer} instead of {right}")
            }),
            Err(error) => {
                state.count_error("call", error);
                // While the broker ends, the queue's process may be gone before the connection is.
                if !error.is_transient() && error.code() != Some(312) {
                    state.violated("a call ended in an error that no fault explains", || error.to_string());
                }
            }
        }
    }

    /// Notes how long something took, which had `limit` for it.
    pub fn took(&self, what: &'static str, took: Duration, limit: Duration) {
        let mut state = self.state();
        let longest = state.longest.entry(what).or_default();
        *longest = took.max(*longest);
        if took > limit + MARGIN {
            state
                .violated("something overstayed its deadline", || format!("{what} took {took:?} instead of {limit:?}"));
        }
    }

    /// Notes a violation that was seen elsewhere.
    pub fn violated(&self, rule: &'static str, what: impl FnOnce() -> String) {
        self.state().violated(rule, what);
    }

    /// A fault has been lifted: from now on recovery is waited for.
    pub fn lifted(&self) {
        let mut state = self.state();
        let (first_message, first_call) = (state.entries.len(), state.sums.calls + 1);
        state.watch = Some(Watch { lifted: Instant::now(), first_message, first_call, seen: [None; 3] });
    }

    /// Waits until a message that was published since [`lifted`](Ledger::lifted) is confirmed, one is handled, and a call is
    /// answered.
    pub fn recovered(&self, timeout: Duration) -> Option<Recovery> {
        let seen = |state: &State| match state.watch.map(|watch| watch.seen) {
            Some([Some(confirm), Some(handled), Some(answer)]) => Some([confirm, handled, answer]),
            _ => None,
        };
        let waited = self.changed.wait_timeout_while(self.state(), timeout, |state| seen(state).is_none());
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        seen(&state)
    }

    fn see(&self, state: &mut State, which: usize) {
        if let Some(Watch { lifted, seen, .. }) = &mut state.watch
            && seen[which].is_none()
        {
            seen[which] = Some(lifted.elapsed());
            self.changed.notify_all();
        }
    }

    /// Whether everything that was confirmed has been handled.
    pub fn is_caught_up(&self) -> bool {
        let lost = |entry: &Entry| entry.told == Some(Verdict::Confirmed) && entry.handled == 0;
        !self.state().entries.iter().any(lost)
    }

    /// Balances the books. Nothing may be under way any more.
    pub fn balance(&self) {
        let mut state = self.state();
        for (number, entry) in std::mem::take(&mut state.entries).into_iter().enumerate() {
            let Entry { way, told, handled, fresh, .. } = entry;
            let sums = &mut state.sums;
            sums.attempted += 1;
            match told {
                Some(Verdict::Confirmed) => sums.confirmed += 1,
                Some(Verdict::NotTaken) => sums.not_taken += 1,
                Some(Verdict::Unknown) => sums.unknown += 1,
                None => {}
            }
            let rule = match (told, handled) {
                (None, _) => "an outcome was never told",
                (Some(Verdict::Confirmed), 0) => "a confirmed message was never handled",
                (Some(Verdict::NotTaken), 1..) => "a message was handled that was said not to be taken",
                _ if way == Way::Async && fresh > 1 => "a message that was published once was handled twice as new",
                _ => continue,
            };
            let what = || format!("message {number} ({way:?}, {told:?}, handled {handled} times, {fresh} as new)");
            state.violated(rule, what);
        }
    }

    pub fn sums(&self) -> Sums {
        self.state().sums
    }

    /// Messages attempted so far.
    pub fn attempted(&self) -> usize {
        self.state().entries.len()
    }

    /// How often what ended in which error.
    pub fn errors(&self) -> BTreeMap<(&'static str, String), u64> {
        self.state().errors.clone()
    }

    pub fn longest(&self) -> BTreeMap<&'static str, Duration> {
        self.state().longest.clone()
    }

    /// Sentences, one for each rule that was violated.
    pub fn violations(&self) -> Vec<String> {
        let told = |(rule, cases): (&&str, &Vec<String>)| {
            let more = if cases.len() > TOLD { format!(" and {} more", cases.len() - TOLD) } else { String::new() };
            format!("{rule}: {}{more}", cases[..cases.len().min(TOLD)].join("; "))
        };
        self.state().violations.iter().map(told).collect()
    }
}

impl State {
    fn violated(&mut self, rule: &'static str, what: impl FnOnce() -> String) {
        self.violations.entry(rule).or_default().push(what());
    }

    fn count_error(&mut self, what: &'static str, error: &Error) {
        // The variant's name.
        let name: String = format!("{error:?}").chars().take_while(|c| c.is_alphanumeric()).collect();
        *self.errors.entry((what, name)).or_default() += 1;
    }
}

/// What an outcome says of its message; `None` for an error that no fault explains.
fn verdict(way: Way, outcome: &Result<(), Error>) -> Option<Verdict> {
    match outcome {
        Ok(()) => Some(Verdict::Confirmed),
        Err(Error::Connect { .. } | Error::PoolExhausted { .. } | Error::Blocked { written: false, .. }) => {
            Some(Verdict::NotTaken)
        }
        // What had been written is `OutcomeUnknown` there.
        Err(error @ (Error::Timeout { .. } | Error::ConnectionLost { .. } | Error::ConnectionClosed { .. }))
            if way == Way::Pool && error.is_transient() =>
        {
            Some(Verdict::NotTaken)
        }
        // A nack says that the broker could not take responsibility, not that the message is nowhere: the queue's process
        // may have ended under it.
        Err(error) => error.is_transient().then_some(Verdict::Unknown),
    }
}
