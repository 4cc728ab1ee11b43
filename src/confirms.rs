//! Which message became what: the ledger of one publishing channel.
//!
//! Pure bookkeeping, no I/O and no threads. A message is entered under its tag before it is written; the broker's acks,
//! nacks and returns, a deadline, or the end of the channel settle it, once.
//!
//! A return carries no tag. It does carry what was sent, and on one channel the broker answers in order, so it belongs
//! to the earliest open message with its exchange, routing key and body. The bodies of mandatory messages are kept for
//! that until they are settled.
//!
//! A message that passes its deadline is reported and stays in the ledger as nobody's, so that a late answer to it is
//! not taken for the answer to another.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use crate::callback::Callback;
use crate::error::{Error, Result};

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
pub(crate) struct Return<'a> {
    pub(crate) code: u16,
    pub(crate) text: &'a str,
    pub(crate) exchange: &'a str,
    pub(crate) routing_key: &'a str,
    pub(crate) body: &'a [u8],
}

/// Who wants to know.
#[derive(Debug)]
pub(crate) enum Waiting {
    /// The thread that publishes, which looks into [`Ledger::take_failures`] once [`Ledger::awaited`] is 0. The number
    /// is its own name for the message.
    Publisher(usize),
    /// A callback.
    Callback(Callback),
}

/// Callbacks whose messages are settled, to be run when no lock is held.
pub(crate) type Settled = Vec<(Callback, Result<()>)>;

#[derive(Debug)]
struct Entry {
    route: Route,
    /// Kept only while the message may come back.
    body: Option<Arc<Vec<u8>>>,
    deadline: Instant,
    /// `None` once told.
    waiting: Option<Waiting>,
    returned: Option<(u16, String)>,
    /// Neither acked nor nacked yet.
    open: bool,
}

impl Entry {
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
    /// Those among them that the publishing thread waits for.
    awaited: usize,
    failures: Vec<(usize, Error)>,
    ended: bool,
}

impl Ledger {
    pub(crate) fn new() -> Ledger {
        Ledger { first: 1, entries: VecDeque::new(), in_flight: 0, awaited: 0, failures: Vec::new(), ended: false }
    }

    /// Enters a message that is about to be written. Its tag is the next one.
    pub(crate) fn enter(&mut self, route: Route, body: Option<Arc<Vec<u8>>>, deadline: Instant, waiting: Waiting) {
        self.in_flight += 1;
        if matches!(waiting, Waiting::Publisher(_)) {
            self.awaited += 1;
        }
        self.entries.push_back(Entry { route, body, deadline, waiting: Some(waiting), returned: None, open: true });
    }

    /// How many messages have somebody waiting for them.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// How many messages the publishing thread waits for.
    pub(crate) fn awaited(&self) -> usize {
        self.awaited
    }

    /// What went wrong with messages the publishing thread waits for.
    pub(crate) fn take_failures(&mut self) -> Vec<(usize, Error)> {
        std::mem::take(&mut self.failures)
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended
    }

    /// The earliest deadline that somebody waits for.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.entries.iter().find(|entry| entry.waiting.is_some()).map(|entry| entry.deadline)
    }

    /// Takes note of a message that came back; its ack follows.
    pub(crate) fn returned(&mut self, back: &Return<'_>) {
        let fits = |exactly: bool| {
            self.entries.iter().position(|entry| {
                entry.open
                    && entry.returned.is_none()
                    && *entry.route.exchange == *back.exchange
                    && *entry.route.routing_key == *back.routing_key
                    && entry.body.as_ref().is_some_and(|body| !exactly || body.as_slice() == back.body)
            })
        };
        match fits(true).or_else(|| fits(false)) {
            Some(index) => self.entries[index].returned = Some((back.code, back.text.to_owned())),
            None => log::warn!(
                "a message came back that is not in flight: exchange {:?}, routing key {:?}, {} {}",
                back.exchange,
                back.routing_key,
                back.code,
                back.text
            ),
        }
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
        if !multiple && tag >= self.first + self.entries.len() as u64 {
            log::warn!("the broker confirmed message {tag}, which has not been sent");
            return;
        }
        for index in from..past {
            let entry = &mut self.entries[index];
            if std::mem::replace(&mut entry.open, false) {
                entry.body = None;
                let waiting = entry.waiting.take();
                let outcome = entry.outcome(ack);
                self.tell(waiting, outcome, settled);
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
                && let Some(waiting) = entry.waiting.take()
            {
                let error = error(&entry.route);
                self.tell(Some(waiting), Err(error), settled);
            }
        }
        self.in_flight < before
    }

    /// Reports every message: the channel is gone. What has come back has come back all the same.
    pub(crate) fn end(&mut self, error: impl Fn(&Route) -> Error, settled: &mut Settled) {
        self.ended = true;
        for mut entry in std::mem::take(&mut self.entries) {
            if let Some(waiting) = entry.waiting.take() {
                let outcome = match entry.returned {
                    Some(_) => entry.outcome(true),
                    None => Err(error(&entry.route)),
                };
                self.tell(Some(waiting), outcome, settled);
            }
        }
    }

    fn tell(&mut self, waiting: Option<Waiting>, outcome: Result<()>, settled: &mut Settled) {
        let Some(waiting) = waiting else { return };
        self.in_flight -= 1;
        match waiting {
            Waiting::Callback(callback) => settled.push((callback, outcome)),
            Waiting::Publisher(number) => {
                self.awaited -= 1;
                if let Err(error) = outcome {
                    self.failures.push((number, error));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// A ledger with `count` messages the publisher waits for, numbered from 0; message n is body n to route "k".
    fn ledger(count: usize) -> Ledger {
        let mut ledger = Ledger::new();
        for n in 0..count {
            enter(&mut ledger, "k", n);
        }
        ledger
    }

    fn enter(ledger: &mut Ledger, routing_key: &str, n: usize) {
        let body = Some(Arc::new(n.to_string().into_bytes()));
        let deadline = Instant::now() + Duration::from_secs(n as u64);
        ledger.enter(Route::new("", routing_key), body, deadline, Waiting::Publisher(n));
    }

    fn confirm(ledger: &mut Ledger, tag: u64, multiple: bool, ack: bool) {
        let mut settled = Settled::new();
        ledger.confirmed(tag, multiple, ack, &mut settled);
        assert!(settled.is_empty(), "there are no callbacks here");
    }

    fn give_back(ledger: &mut Ledger, routing_key: &str, body: &str) {
        let body = body.as_bytes();
        ledger.returned(&Return { code: 312, text: "NO_ROUTE", exchange: "", routing_key, body });
    }

    fn failed(ledger: &mut Ledger) -> Vec<usize> {
        let mut failed: Vec<usize> = ledger.take_failures().into_iter().map(|(n, _)| n).collect();
        failed.sort_unstable();
        failed
    }

    #[test]
    fn a_nack_stays_a_nack_when_an_ack_of_all_follows() {
        let mut ledger = ledger(4);
        confirm(&mut ledger, 2, false, false);
        confirm(&mut ledger, 3, true, true);
        assert_eq!((ledger.awaited(), ledger.in_flight()), (1, 1));
        assert!(matches!(ledger.take_failures()[..], [(1, Error::Nacked { .. })]));
        confirm(&mut ledger, 0, true, true);
        assert_eq!((ledger.awaited(), failed(&mut ledger)), (0, vec![]));
    }

    #[test]
    fn confirms_in_any_order_each_settle_their_own() {
        let mut ledger = ledger(6);
        confirm(&mut ledger, 5, false, true);
        confirm(&mut ledger, 1, false, true);
        confirm(&mut ledger, 4, true, false); // 2, 3 and 4
        confirm(&mut ledger, 4, false, true); // said twice: the first counts
        confirm(&mut ledger, 1, true, false);
        confirm(&mut ledger, 99, false, true); // never sent
        assert_eq!((ledger.in_flight(), failed(&mut ledger)), (1, vec![1, 2, 3]));
        confirm(&mut ledger, 99, true, true);
        assert_eq!(ledger.in_flight(), 0);
    }

    #[test]
    fn a_return_belongs_to_the_earliest_open_message_that_it_fits() {
        let mut ledger = ledger(4);
        enter(&mut ledger, "other", 4);
        give_back(&mut ledger, "k", "2");
        give_back(&mut ledger, "other", "4");
        give_back(&mut ledger, "unknown", "2");
        confirm(&mut ledger, 5, true, true);
        let failures = ledger.take_failures();
        assert!(failures.iter().all(|(_, error)| matches!(error, Error::Returned { code: 312, .. })));
        assert_eq!(failures.iter().map(|(n, _)| *n).collect::<Vec<_>>(), [2, 4]);
    }

    #[test]
    fn a_late_answer_is_not_taken_for_that_of_another_message() {
        let mut ledger = ledger(0);
        enter(&mut ledger, "k", 0);
        enter(&mut ledger, "k", 0);
        let error = |_: &Route| Error::StaleDelivery;
        let now = Instant::now();
        assert!(ledger.expire(now + Duration::from_secs(1), error, &mut Settled::new()));
        assert!(!ledger.expire(now + Duration::from_secs(2), error, &mut Settled::new()), "told once");
        assert_eq!((ledger.in_flight(), failed(&mut ledger)), (0, vec![0, 0]));
        // The same message again; now the first two come back, late.
        enter(&mut ledger, "k", 0);
        give_back(&mut ledger, "k", "0");
        give_back(&mut ledger, "k", "0");
        confirm(&mut ledger, 3, true, true);
        assert_eq!((ledger.in_flight(), failed(&mut ledger)), (0, vec![]));
    }

    #[test]
    fn the_end_of_the_channel_reports_what_is_open_and_returns_stay_returns() {
        let mut ledger = ledger(3);
        confirm(&mut ledger, 1, false, true);
        give_back(&mut ledger, "k", "2");
        ledger.end(|_| Error::StaleDelivery, &mut Settled::new());
        assert!(ledger.has_ended() && ledger.next_deadline().is_none());
        let failures = ledger.take_failures();
        assert!(matches!(failures[..], [(1, Error::StaleDelivery), (2, Error::Returned { .. })]));
    }
}
