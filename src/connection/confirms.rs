//! Which message became what: the ledger of one publishing channel.
//!
//! Pure bookkeeping, no I/O and no threads. A message is entered under its tag before it is written; the broker's acks,
//! nacks and returns, a deadline, or the end of the channel settle it, once.
//!
//! A return carries no tag. It does carry the message, and on one channel the broker answers in order, so it belongs to
//! the earliest open message that is the same; the likeness of mandatory messages is kept until they are settled. Of two that
//! are the same in every property it does not matter which is said to have come back. Should none be the same, because a
//! broker changed it on the way, then every open message with its exchange and routing key is reported as returned:
//! a message too many that is sent again, rather than one that is lost.
//!
//! A message that passes its deadline is reported and stays in the ledger as nobody's, so that a late answer to it is
//! not taken for the answer to another.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::connection::callback::Callback;
use crate::connection::returns::Likeness;
use crate::error::{Error, Result};
use crate::event::{Noted, PoolEvents};
use crate::metrics::meter::Timer;

/// Exchange and routing key of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Route {
    pub(crate) exchange: Arc<str>,
    pub(crate) routing_key: Arc<str>,
}

impl Route {
    pub(crate) fn new(exchange: &str, routing_key: &str) -> Route {
        Route { exchange: exchange.into(), routing_key: routing_key.into() }
    }
}

/// A message that came back.
#[derive(Debug)]
pub(crate) struct Return {
    pub(crate) code: u16,
    pub(crate) text: String,
    pub(crate) exchange: Arc<str>,
    pub(crate) routing_key: Arc<str>,
    pub(crate) message: Likeness,
}

/// A call that waits for the messages it has published. Each call has its own, so that one made in the middle of another
/// takes none of its outcomes.
#[derive(Debug, Default)]
pub(crate) struct Call {
    open: AtomicUsize,
    failures: Mutex<Vec<(usize, Error)>>,
}

impl Call {
    /// How many of its messages are not settled.
    pub(crate) fn open(&self) -> usize {
        self.open.load(Ordering::Acquire)
    }

    /// What went wrong, by the call's own number for the message.
    pub(crate) fn take_failures(&self) -> Vec<(usize, Error)> {
        std::mem::take(&mut *self.failures.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether `which` holds for a failure that has been told since the last look; `looked_at` is how many that had seen.
    pub(crate) fn has_failed_since(&self, looked_at: &mut usize, which: impl Fn(&Error) -> bool) -> bool {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let new = &failures[*looked_at..];
        *looked_at = failures.len();
        new.iter().any(|(_, error)| which(error))
    }

    fn tell(&self, number: usize, outcome: Result<()>) {
        if let Err(error) = outcome {
            self.failures.lock().unwrap_or_else(PoisonError::into_inner).push((number, error));
        }
        self.open.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Who wants to know.
#[derive(Debug)]
pub(crate) enum Waiting {
    /// A call, with its number for the message.
    Call(Arc<Call>, usize),
    /// A callback.
    Callback(Callback),
}

/// Callbacks whose messages are settled, to be run when no lock is held.
pub(crate) type Settled = Vec<(Callback, Result<()>)>;

#[derive(Debug)]
struct Entry {
    route: Route,
    /// Kept only while the message may come back.
    message: Option<Likeness>,
    deadline: Instant,
    /// `None` once told.
    waiting: Option<Waiting>,
    returned: Option<(u16, String)>,
    /// Neither acked nor nacked yet.
    open: bool,
    entered: Timer,
    /// What handlers of events are told if it fails.
    noted: Option<Noted>,
}

/// An entry's part of whoever waits, taken out of it so that it is told once.
struct Telling {
    waiting: Waiting,
    entered: Timer,
    /// Where it was bound for, and what handlers of events are told if it has failed.
    noted: Option<(Route, Noted)>,
}

impl Entry {
    /// Who waits for it, and what handlers of events are told. `None` after the first time.
    fn take_telling(&mut self) -> Option<Telling> {
        let waiting = self.waiting.take()?;
        let noted = self.noted.take().map(|noted| (self.route.clone(), noted));
        Some(Telling { waiting, entered: self.entered, noted })
    }

    fn outcome(&mut self, ack: bool) -> Result<()> {
        let returned = self.returned.take();
        if ack && returned.is_none() {
            return Ok(());
        }
        let exchange = self.route.exchange.to_string();
        let routing_key = self.route.routing_key.to_string();
        Err(match returned {
            Some((code, text)) => Error::Returned { code, text, exchange, routing_key },
            None => Error::Nacked { exchange, routing_key },
        })
    }
}

/// The messages of one channel that are not settled.
#[derive(Debug)]
pub(crate) struct Ledger {
    /// Tag of the first entry. Tags count from 1 since `confirm.select`.
    first: u64,
    entries: VecDeque<Entry>,
    /// Entries with somebody waiting: what counts against the in-flight limit.
    in_flight: usize,
    /// Whether the last answer was a nack.
    refused: bool,
    ended: bool,
    events: Arc<PoolEvents>,
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.events.meter.abandoned(self.in_flight);
        for entry in &mut self.entries {
            let Some((Route { exchange, routing_key }, noted)) = entry.take_telling().and_then(|telling| telling.noted)
            else {
                continue;
            };
            let during = format!("publish to exchange {exchange:?} with routing key {routing_key:?}");
            let error = Error::ConnectionLost { during, detail: "its connection was given up".to_owned() };
            self.events.publish_failed((&exchange, &routing_key), noted, &error);
        }
    }
}

impl Ledger {
    pub(crate) fn new(events: Arc<PoolEvents>) -> Ledger {
        Ledger { first: 1, entries: VecDeque::new(), in_flight: 0, refused: false, ended: false, events }
    }

    /// Enters a message that is about to be written; its tag is the next one. Not to be called once the ledger has ended.
    pub(crate) fn enter(
        &mut self,
        route: Route,
        message: Option<Likeness>,
        deadline: Instant,
        waiting: Waiting,
        noted: Option<Noted>,
    ) {
        self.in_flight += 1;
        if let Waiting::Call(call, _) = &waiting {
            call.open.fetch_add(1, Ordering::AcqRel);
        }
        let entered = self.events.meter.entered();
        let waiting = Some(waiting);
        self.entries.push_back(Entry { route, message, deadline, waiting, returned: None, open: true, entered, noted });
    }

    /// Gives the message that was entered last another deadline.
    pub(crate) fn extend_last(&mut self, deadline: Instant) {
        if let Some(entry) = self.entries.back_mut() {
            entry.deadline = deadline;
        }
    }

    /// How many messages have somebody waiting for them.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// How many messages are nobody's and have had no answer yet.
    pub(crate) fn strays(&self) -> usize {
        self.entries.len() - self.in_flight
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Whether the last answer was a nack, and none is to come.
    pub(crate) fn ends_in_refusal(&self) -> bool {
        self.refused && self.entries.is_empty()
    }

    /// The earliest deadline that somebody waits for.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.entries.iter().find(|entry| entry.waiting.is_some()).map(|entry| entry.deadline)
    }

    /// Takes note of a message that came back; its ack follows.
    pub(crate) fn returned(&mut self, back: &Return) {
        let may_be = |entry: &Entry| {
            entry.open
                && entry.returned.is_none()
                && entry.message.is_some()
                && *entry.route.exchange == *back.exchange
                && *entry.route.routing_key == *back.routing_key
        };
        let is_it = |entry: &&mut Entry| {
            may_be(entry) && entry.message.as_ref().is_some_and(|message| message.came_back_as(&back.message))
        };
        if let Some(entry) = self.entries.iter_mut().find(is_it) {
            entry.returned = Some((back.code, back.text.clone()));
            return;
        }
        let mut like_it = 0;
        for entry in self.entries.iter_mut().filter(|entry| may_be(entry)) {
            entry.returned = Some((back.code, back.text.clone()));
            like_it += 1;
        }
        log::warn!(
            exchange = &*back.exchange, routing_key = &*back.routing_key, code = back.code,
            message_id = back.message.message_id().unwrap_or_default();
            "a message came back ({} {}) to exchange {:?} with routing key {:?} that is none of those in flight; \
             {like_it} of them are bound for the same place and are reported as returned",
            back.code,
            back.text,
            back.exchange,
            back.routing_key
        );
    }

    /// Settles message `tag`, or with `multiple` every open one up to it; tag 0 with `multiple` means all.
    pub(crate) fn confirmed(&mut self, tag: u64, multiple: bool, ack: bool, settled: &mut Settled) {
        let past = match tag {
            0 if multiple => self.entries.len(),
            _ => match tag.checked_sub(self.first) {
                Some(before) => self.entries.len().min(usize::try_from(before).unwrap_or(usize::MAX).saturating_add(1)),
                None => return, // settled before
            },
        };
        let from = if multiple { 0 } else { past.saturating_sub(1) };
        if self.ended {
            return;
        }
        if !multiple && tag >= self.first + self.entries.len() as u64 {
            log::warn!("the broker confirmed message {tag}, which has not been sent");
            return;
        }
        self.refused = !ack;
        for index in from..past {
            let entry = &mut self.entries[index];
            if std::mem::replace(&mut entry.open, false) {
                entry.message = None;
                let telling = entry.take_telling();
                let outcome = entry.outcome(ack);
                self.tell(telling, outcome, settled);
            }
        }
        while self.entries.front().is_some_and(|entry| !entry.open) {
            self.entries.pop_front();
            self.first += 1;
        }
    }

    /// Reports every message whose deadline has passed; returns whether there was one.
    pub(crate) fn expire(&mut self, now: Instant, error: impl Fn(&Route) -> Error, settled: &mut Settled) -> bool {
        let before = self.in_flight;
        for index in 0..self.entries.len() {
            let entry = &mut self.entries[index];
            if entry.deadline <= now
                && let Some(telling) = entry.take_telling()
            {
                let error = error(&entry.route);
                self.tell(Some(telling), Err(error), settled);
            }
        }
        self.in_flight < before
    }

    /// Reports every message: the channel is gone. What has come back has come back all the same.
    pub(crate) fn end(&mut self, error: impl Fn(&Route) -> Error, settled: &mut Settled) {
        self.ended = true;
        for mut entry in std::mem::take(&mut self.entries) {
            if let Some(telling) = entry.take_telling() {
                let outcome = match entry.returned {
                    Some(_) => entry.outcome(true),
                    None => Err(error(&entry.route)),
                };
                self.tell(Some(telling), outcome, settled);
            }
        }
    }

    fn tell(&mut self, telling: Option<Telling>, outcome: Result<()>, settled: &mut Settled) {
        let Some(Telling { waiting, entered, noted }) = telling else { return };
        self.in_flight -= 1;
        self.events.meter.settled(entered, &outcome);
        if let (Some((route, noted)), Err(error)) = (noted, &outcome) {
            self.events.publish_failed((&route.exchange, &route.routing_key), noted, error);
        }
        match waiting {
            Waiting::Callback(callback) => settled.push((callback, outcome)),
            Waiting::Call(call, number) => call.tell(number, outcome),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::message::Message;

    /// A ledger and the call that waits for its messages.
    #[derive(Default)]
    struct Fixture {
        ledger: Ledger,
        call: Arc<Call>,
    }

    impl Default for Ledger {
        fn default() -> Ledger {
            Ledger::new(PoolEvents::of_nobody())
        }
    }

    impl Fixture {
        /// Messages 0 to `count` with routing key "k" and their number as the body.
        fn with(count: usize) -> Fixture {
            let mut fixture = Fixture::default();
            for n in 0..count {
                fixture.enter("k", n, Message::new(n.to_string()));
            }
            fixture
        }

        fn enter(&mut self, routing_key: &str, n: usize, message: Message) {
            let deadline = Instant::now() + Duration::from_secs(n as u64);
            let waiting = Waiting::Call(Arc::clone(&self.call), n);
            let likeness = Likeness::of(&Arc::new(message));
            self.ledger.enter(Route::new("", routing_key), Some(likeness), deadline, waiting, None);
        }

        fn confirm(&mut self, tag: u64, multiple: bool, ack: bool) {
            let mut settled = Settled::new();
            self.ledger.confirmed(tag, multiple, ack, &mut settled);
            assert!(settled.is_empty(), "there are no callbacks here");
            assert_eq!(self.ledger.in_flight(), self.call.open());
        }

        fn give_back(&mut self, routing_key: &str, message: Message) {
            let (exchange, routing_key) = ("".into(), routing_key.into());
            let message = Likeness::of(&Arc::new(message));
            self.ledger.returned(&Return { code: 312, text: "NO_ROUTE".to_owned(), exchange, routing_key, message });
        }

        fn failed(&mut self) -> Vec<usize> {
            let mut failed: Vec<usize> = self.call.take_failures().into_iter().map(|(n, _)| n).collect();
            failed.sort_unstable();
            failed
        }
    }

    #[test]
    fn a_nack_stays_a_nack_when_an_ack_of_all_follows() {
        let mut fixture = Fixture::with(4);
        fixture.confirm(2, false, false);
        fixture.confirm(3, true, true);
        assert_eq!(fixture.call.open(), 1);
        assert!(matches!(fixture.call.take_failures()[..], [(1, Error::Nacked { .. })]));
        fixture.confirm(0, true, true);
        assert_eq!((fixture.call.open(), fixture.failed()), (0, vec![]));
    }

    #[test]
    fn a_refusal_is_the_end_of_it_only_while_it_is_the_last_word() {
        let mut fixture = Fixture::with(3);
        assert!(!fixture.ledger.ends_in_refusal());
        fixture.confirm(2, false, false);
        assert!(!fixture.ledger.ends_in_refusal(), "two answers are to come");
        fixture.confirm(3, true, true);
        assert!(!fixture.ledger.ends_in_refusal());
        fixture.enter("k", 3, Message::new("3"));
        fixture.confirm(4, false, false);
        assert!(fixture.ledger.ends_in_refusal());
    }

    #[test]
    fn confirms_in_any_order_each_settle_their_own() {
        let mut fixture = Fixture::with(6);
        fixture.confirm(5, false, true);
        fixture.confirm(1, false, true);
        fixture.confirm(4, true, false); // 2, 3 and 4
        fixture.confirm(4, false, true); // said twice: the first counts
        fixture.confirm(1, true, false);
        fixture.confirm(99, false, true); // never sent
        assert_eq!((fixture.call.open(), fixture.failed()), (1, vec![1, 2, 3]));
        fixture.confirm(99, true, true);
        assert_eq!(fixture.call.open(), 0);
    }

    #[test]
    fn a_return_belongs_to_the_earliest_open_message_that_is_the_same() {
        let mut fixture = Fixture::with(4);
        fixture.enter("other", 4, Message::new("4"));
        fixture.give_back("k", Message::new("2"));
        fixture.give_back("other", Message::new("4"));
        fixture.confirm(5, true, true);
        let failures = fixture.call.take_failures();
        assert!(failures.iter().all(|(_, error)| matches!(error, Error::Returned { code: 312, .. })));
        assert_eq!(failures.iter().map(|(n, _)| *n).collect::<Vec<_>>(), [2, 4]);
    }

    #[test]
    fn messages_with_one_body_are_told_apart_by_their_properties() {
        let mut fixture = Fixture::default();
        let kind = |kind: &str| Message::new("same").with_header("kind", kind).with_header("BCC", "elsewhere");
        for (n, of) in ["a", "b", "a"].into_iter().enumerate() {
            fixture.enter("k", n, kind(of));
        }
        fixture.give_back("k", Message::new("same").with_header("kind", "b"));
        fixture.confirm(0, true, true);
        assert_eq!(fixture.failed(), [1]);
    }

    #[test]
    fn a_return_that_fits_none_never_leaves_the_lost_one_ok() {
        let mut fixture = Fixture::with(3);
        fixture.enter("other", 3, Message::new("3"));
        fixture.give_back("k", Message::new("changed on the way"));
        fixture.confirm(0, true, true);
        assert_eq!(fixture.failed(), [0, 1, 2]);
    }

    #[test]
    fn a_late_answer_is_not_taken_for_that_of_another_message() {
        let mut fixture = Fixture::default();
        let same = || Message::new("same");
        fixture.enter("k", 0, same());
        fixture.enter("k", 0, same());
        let error = |_: &Route| Error::StaleDelivery;
        let now = Instant::now();
        assert!(fixture.ledger.expire(now + Duration::from_secs(1), error, &mut Settled::new()));
        assert!(!fixture.ledger.expire(now + Duration::from_secs(2), error, &mut Settled::new()), "told once");
        assert_eq!((fixture.ledger.strays(), fixture.failed()), (2, vec![0, 0]));
        // The same message again; now the first two come back, late.
        fixture.enter("k", 0, same());
        fixture.give_back("k", same());
        fixture.give_back("k", same());
        fixture.confirm(3, true, true);
        assert_eq!((fixture.call.open(), fixture.ledger.strays(), fixture.failed()), (0, 0, vec![]));
    }

    #[test]
    fn the_end_of_the_channel_reports_what_is_open_and_returns_stay_returns() {
        let mut fixture = Fixture::with(3);
        fixture.confirm(1, false, true);
        fixture.give_back("k", Message::new("2"));
        fixture.ledger.end(|_| Error::StaleDelivery, &mut Settled::new());
        assert!(fixture.ledger.has_ended() && fixture.ledger.next_deadline().is_none());
        let failures = fixture.call.take_failures();
        assert!(matches!(failures[..], [(1, Error::StaleDelivery), (2, Error::Returned { .. })]));
        fixture.confirm(3, false, true); // too late, and no cause for alarm
    }

    #[test]
    fn calls_take_only_their_own_failures() {
        let mut fixture = Fixture::with(2);
        let other = Arc::new(Call::default());
        let waiting = Waiting::Call(Arc::clone(&other), 7);
        fixture.ledger.enter(Route::new("", "k"), None, Instant::now(), waiting, None);
        fixture.ledger.confirmed(0, true, false, &mut Settled::new());
        assert_eq!(fixture.failed(), [0, 1]);
        assert!(matches!(other.take_failures()[..], [(7, Error::Nacked { .. })]));
    }
}
