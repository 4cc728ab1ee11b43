//! The messages of a queue that nobody has: in order of priority, then of arrival.
//!
//! Each message has its position for life, so one that comes back goes where it was. Nearly all leave in the order they
//! came; those wait in a ring, and only the ones that came back are kept sorted. Of a quorum queue those that came back
//! are a line of their own, in front of all others.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use super::super::message::Message;

/// Positions of messages that have not come back, in a queue where the others stand in front of all of them.
const FIRST_FRESH: u64 = 1 << 63;

/// A message in a queue, or on its way to a consumer of it.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) message: Arc<Message>,
    /// When it expires, should it be at the head of the queue then.
    pub(crate) expires: Option<Instant>,
    /// Its place among the messages of the queue.
    pub(crate) position: u64,
    pub(crate) redelivered: bool,
    /// How often it has come back.
    pub(crate) returns: u32,
}

/// Messages of one priority.
#[derive(Debug, Default)]
struct Lane {
    fresh: VecDeque<Entry>,
    returned: BTreeMap<u64, Entry>,
}

impl Lane {
    /// Whether the head is among the returned ones.
    fn returned_first(&self) -> bool {
        match (self.returned.first_key_value(), self.fresh.front()) {
            (Some((returned, _)), Some(fresh)) => *returned < fresh.position,
            (returned, _) => returned.is_some(),
        }
    }

    fn head(&self) -> Option<&Entry> {
        match self.returned_first() {
            true => self.returned.first_key_value().map(|(_, entry)| entry),
            false => self.fresh.front(),
        }
    }

    fn pop(&mut self) -> Option<Entry> {
        match self.returned_first() {
            true => self.returned.pop_first().map(|(_, entry)| entry),
            false => self.fresh.pop_front(),
        }
    }
}

/// What is ready to be delivered.
#[derive(Debug)]
pub(in super::super) struct Ready {
    /// By priority; a queue without priorities has one lane.
    lanes: Vec<Lane>,
    len: usize,
    /// Of the bodies alone, as `x-max-length-bytes` counts.
    bytes: usize,
    next_position: u64,
    /// Where the next message stands that comes back, if not where it was.
    next_return: Option<u64>,
}

impl Ready {
    pub(in super::super) fn new(max_priority: u8) -> Ready {
        let lanes = (0..=max_priority).map(|_| Lane::default()).collect();
        Ready { lanes, len: 0, bytes: 0, next_position: 0, next_return: None }
    }

    /// Of a quorum queue: what comes back stands behind what came back before.
    pub(in super::super) fn with_line_of_returns() -> Ready {
        Ready { next_position: FIRST_FRESH, next_return: Some(0), ..Ready::new(0) }
    }

    pub(in super::super) fn len(&self) -> usize {
        self.len
    }

    pub(in super::super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(in super::super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// A new message with the position that is its own, not yet in the queue.
    pub(in super::super) fn arrive(&mut self, message: Arc<Message>, expires: Option<Instant>) -> Entry {
        let position = self.next_position;
        self.next_position += 1;
        Entry { message, expires, position, redelivered: false, returns: 0 }
    }

    fn lane(&mut self, message: &Message) -> &mut Lane {
        let top = self.lanes.len() - 1;
        &mut self.lanes[usize::from(message.priority).min(top)]
    }

    /// Puts it at the end of those of its priority.
    pub(in super::super) fn push(&mut self, entry: Entry) {
        self.count_in(&entry);
        self.lane(&entry.message).fresh.push_back(entry);
    }

    /// Puts it at the end, although it has been in the queue before.
    pub(in super::super) fn put_last(&mut self, mut entry: Entry) {
        entry.position = self.next_position;
        self.next_position += 1;
        self.push(entry);
    }

    /// Puts it where it was, or behind the others that came back.
    pub(in super::super) fn put_back(&mut self, mut entry: Entry) {
        if let Some(next) = &mut self.next_return {
            entry.position = *next;
            *next += 1;
        }
        self.count_in(&entry);
        self.lane(&entry.message).returned.insert(entry.position, entry);
    }

    /// The message to be delivered next.
    pub(in super::super) fn pop(&mut self) -> Option<Entry> {
        let entry = self.lanes.iter_mut().rev().find_map(Lane::pop)?;
        self.count_out(&entry);
        Some(entry)
    }

    /// Takes a message that has expired from the head of a lane.
    pub(in super::super) fn pop_expired(&mut self, now: Instant) -> Option<Entry> {
        let is_over = |entry: &Entry| entry.expires.is_some_and(|at| at <= now);
        let lane = self.lanes.iter_mut().rev().find(|lane| lane.head().is_some_and(is_over))?;
        let entry = lane.pop()?;
        self.count_out(&entry);
        Some(entry)
    }

    /// Whether a message at the head of a lane expires some time, so that it is worth looking at the clock.
    pub(in super::super) fn has_expiring_head(&self) -> bool {
        self.lanes.iter().filter_map(Lane::head).any(|entry| entry.expires.is_some())
    }

    /// When the first head of a lane expires.
    pub(in super::super) fn next_expiry(&self) -> Option<Instant> {
        self.lanes.iter().filter_map(|lane| lane.head()?.expires).min()
    }

    /// Takes them all.
    pub(in super::super) fn take(&mut self) -> Ready {
        let lanes = self.lanes.iter_mut().map(std::mem::take).collect();
        Ready { lanes, len: std::mem::take(&mut self.len), bytes: std::mem::take(&mut self.bytes), ..*self }
    }

    /// Keeps the messages of which `keep` says so, in place.
    pub(in super::super) fn retain(&mut self, keep: impl Fn(&Entry) -> bool) {
        for lane in &mut self.lanes {
            lane.fresh.retain(&keep);
            lane.returned.retain(|_, entry| keep(entry));
        }
        self.len = self.iter().count();
        self.bytes = self.iter().map(|entry| entry.message.body.len()).sum();
    }

    /// In the order in which they would be delivered.
    pub(in super::super) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.lanes.iter().rev().flat_map(|lane| {
            let mut returned = lane.returned.values().peekable();
            let mut fresh = lane.fresh.iter().peekable();
            std::iter::from_fn(move || match (returned.peek(), fresh.peek()) {
                (Some(back), Some(new)) if new.position < back.position => fresh.next(),
                (Some(_), _) => returned.next(),
                (None, _) => fresh.next(),
            })
        })
    }

    fn count_in(&mut self, entry: &Entry) {
        self.len += 1;
        self.bytes += entry.message.body.len();
    }

    fn count_out(&mut self, entry: &Entry) {
        self.len -= 1;
        self.bytes -= entry.message.body.len();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::super::message::{Body, Message};
    use super::*;

    fn message(body: &str, priority: u8) -> Arc<Message> {
        Arc::new(Message { body: Body::Own(body.as_bytes().into()), priority, ..Message::for_test() })
    }

    fn fill(ready: &mut Ready, bodies: &str) {
        for body in bodies.chars() {
            let entry = ready.arrive(message(&body.to_string(), 0), None);
            ready.push(entry);
        }
    }

    fn drain(ready: &mut Ready) -> String {
        std::iter::from_fn(|| ready.pop())
            .map(|entry| String::from_utf8_lossy(&entry.message.body).into_owned())
            .collect()
    }

    #[test]
    fn what_comes_back_goes_where_it_was() {
        let mut ready = Ready::new(0);
        fill(&mut ready, "abcdef");
        let mut taken: Vec<Entry> = (0..4).filter_map(|_| ready.pop()).collect();
        fill(&mut ready, "g");
        for at in [2, 0] {
            ready.put_back(taken.remove(at));
        }
        assert_eq!(ready.len(), 5);
        assert_eq!(ready.iter().map(|entry| entry.position).collect::<Vec<_>>(), [0, 2, 4, 5, 6]);
        assert_eq!(drain(&mut ready), "acefg");
        assert_eq!((ready.len(), ready.bytes()), (0, 0));
    }

    #[test]
    fn like_a_sorted_list_whatever_comes_and_goes() {
        let mut random = fastrand::Rng::with_seed(3);
        let mut ready = Ready::new(0);
        let mut model: BTreeMap<u64, ()> = BTreeMap::new();
        let mut out: Vec<Entry> = Vec::new();
        for _ in 0..5_000 {
            match random.u8(0..3) {
                0 => {
                    let entry = ready.arrive(message("x", 0), None);
                    model.insert(entry.position, ());
                    ready.push(entry);
                }
                1 => {
                    let popped = ready.pop();
                    assert_eq!(popped.as_ref().map(|entry| entry.position), model.pop_first().map(|(at, ())| at));
                    out.extend(popped);
                }
                _ if !out.is_empty() => {
                    let entry = out.swap_remove(random.usize(0..out.len()));
                    model.insert(entry.position, ());
                    ready.put_back(entry);
                }
                _ => {}
            }
            assert_eq!(ready.len(), model.len());
        }
    }

    #[test]
    fn higher_priorities_first_and_too_high_ones_count_as_the_highest() {
        let mut ready = Ready::new(5);
        for (body, priority) in [("a", 0), ("b", 5), ("c", 200), ("d", 3)] {
            let entry = ready.arrive(message(body, priority), None);
            ready.push(entry);
        }
        assert_eq!(drain(&mut ready), "bcda");
    }

    #[test]
    fn only_the_head_expires() {
        let mut ready = Ready::new(0);
        let now = Instant::now();
        let soon = now + Duration::from_secs(1);
        for (body, expires) in [("a", Some(soon)), ("b", None), ("c", Some(soon))] {
            let entry = ready.arrive(message(body, 0), expires);
            ready.push(entry);
        }
        assert_eq!(ready.next_expiry(), Some(soon));
        assert!(ready.pop_expired(now).is_none());
        assert!(ready.pop_expired(soon).is_some());
        assert!(ready.pop_expired(soon).is_none(), "b does not expire, and c is behind it");
        assert_eq!(ready.next_expiry(), None);
        assert_eq!(drain(&mut ready), "bc");
    }
}
