//! The messages of a queue that nobody has: in order of priority, then of arrival.
//!
//! Each message has its position for life, so one that comes back goes where it was. Nearly all leave in the order they
//! came; those wait in a ring, and only the ones that came back are kept sorted. Of a quorum queue those that came back
//! are a line of their own, in front of all others, and messages of two priorities take turns.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use super::super::message::Message;

/// Positions of messages that have not come back, in a queue where the others stand in front of all of them.
const FIRST_FRESH: u64 = 1 << 63;

/// Of a quorum queue with priorities: what is above this goes before the rest.
const LOW_MOST: u8 = 4;

/// So many messages of the high priority leave in front of one of the low.
const HIGH_IN_A_ROW: u8 = 2;

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
    /// How often that was not of a client's free will, in this queue and those before it, as far as the release counts it.
    pub(crate) failures: u32,
}

impl Entry {
    /// Whether it stands in the line of those that came back to a quorum queue.
    fn has_come_back(&self) -> bool {
        self.position < FIRST_FRESH
    }
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

    fn iter(&self) -> impl Iterator<Item = &Entry> {
        let mut returned = self.returned.values().peekable();
        let mut fresh = self.fresh.iter().peekable();
        std::iter::from_fn(move || match (returned.peek(), fresh.peek()) {
            (Some(back), Some(new)) if new.position < back.position => fresh.next(),
            (Some(_), _) => returned.next(),
            (None, _) => fresh.next(),
        })
    }
}

/// Which of two lanes that take turns is next, by what is at their heads. What came back goes first, in its order; of the
/// others the high ones, and in every third place whichever came first.
fn next_in_turn(low: Option<&Entry>, high: Option<&Entry>, turn: u8) -> Option<usize> {
    let (low, high) = match (low, high) {
        (Some(low), Some(high)) => (low, high),
        (Some(_), None) => return Some(0),
        (None, Some(_)) => return Some(1),
        (None, None) => return None,
    };
    let by_position = turn >= HIGH_IN_A_ROW || low.has_come_back() || high.has_come_back();
    Some(usize::from(!by_position || high.position < low.position))
}

/// The turn when this message has left.
fn turn_after(turn: u8, left: &Entry) -> u8 {
    match turn {
        turn if left.has_come_back() => turn,
        HIGH_IN_A_ROW => 0,
        turn => turn + 1,
    }
}

/// What is ready to be delivered.
#[derive(Debug)]
pub(in super::super) struct Ready {
    /// By priority; a queue without priorities has one lane.
    lanes: Vec<Lane>,
    /// The two lanes of a quorum queue take turns, and this many have left since it was the lower one's.
    turn: Option<u8>,
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
        Ready { lanes, turn: None, len: 0, bytes: 0, next_position: 0, next_return: None }
    }

    /// Of a quorum queue: what comes back stands behind what came back before.
    pub(in super::super) fn of_quorum(has_priorities: bool) -> Ready {
        let turn = has_priorities.then_some(0);
        Ready { turn, next_position: FIRST_FRESH, next_return: Some(0), ..Ready::new(has_priorities.into()) }
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
        let failures = message.failures;
        // Of a message that comes from another quorum queue.
        let redelivered = self.next_return.is_some() && failures > 0;
        Entry { message, expires, position, redelivered, returns: 0, failures }
    }

    fn lane(&mut self, message: &Message) -> &mut Lane {
        let top = self.lanes.len() - 1;
        let lane = match self.turn {
            None => usize::from(message.priority).min(top),
            Some(_) => usize::from(message.priority > LOW_MOST),
        };
        &mut self.lanes[lane]
    }

    /// Puts it at the end of those of its priority.
    pub(in super::super) fn push(&mut self, entry: Entry) {
        self.count_in(&entry);
        self.lane(&entry.message).fresh.push_back(entry);
    }

    /// Puts it at the end, although it has been in the queue before. In a queue whose priorities take turns, its own counts no
    /// more.
    pub(in super::super) fn put_last(&mut self, mut entry: Entry) {
        entry.position = self.next_position;
        self.next_position += 1;
        self.count_in(&entry);
        let lane = if self.turn.is_some() { &mut self.lanes[0] } else { self.lane(&entry.message) };
        lane.fresh.push_back(entry);
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
        let lane = match self.turn {
            None => (0..self.lanes.len()).rev().find(|lane| self.lanes[*lane].head().is_some())?,
            Some(turn) => next_in_turn(self.lanes[0].head(), self.lanes[1].head(), turn)?,
        };
        self.pop_from(lane)
    }

    fn pop_from(&mut self, lane: usize) -> Option<Entry> {
        let entry = self.lanes[lane].pop()?;
        self.turn = self.turn.map(|turn| turn_after(turn, &entry));
        self.count_out(&entry);
        Some(entry)
    }

    /// Takes a message that has expired and that no other of its priority, or where priorities take turns no other at all, is in
    /// front of.
    pub(in super::super) fn pop_expired(&mut self, now: Instant) -> Option<Entry> {
        let is_over = |(_, entry): &(usize, &Entry)| entry.expires.is_some_and(|at| at <= now);
        let (lane, _) = self.heads().find(is_over)?;
        self.pop_from(lane)
    }

    /// Whether a message that may be the next to expire does so some time, so that it is worth looking at the clock.
    pub(in super::super) fn has_expiring_head(&self) -> bool {
        self.heads().any(|(_, entry)| entry.expires.is_some())
    }

    /// When the first of them expires.
    pub(in super::super) fn next_expiry(&self) -> Option<Instant> {
        self.heads().filter_map(|(_, entry)| entry.expires).min()
    }

    /// The messages that expire as soon as they may, with their lanes, the highest first.
    fn heads(&self) -> impl Iterator<Item = (usize, &Entry)> {
        let next = self.turn.map(|turn| next_in_turn(self.lanes[0].head(), self.lanes[1].head(), turn));
        let lanes = self.lanes.iter().enumerate().rev();
        let lanes = lanes.filter(move |(at, _)| next.is_none_or(|next| next == Some(*at)));
        lanes.filter_map(|(at, lane)| Some((at, lane.head()?)))
    }

    /// Takes them all.
    pub(in super::super) fn take(&mut self) -> Ready {
        let lanes = self.lanes.iter_mut().map(std::mem::take).collect();
        let taken =
            Ready { lanes, len: std::mem::take(&mut self.len), bytes: std::mem::take(&mut self.bytes), ..*self };
        self.turn = self.turn.map(|_| 0);
        taken
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
        let mut lanes: Vec<_> = self.lanes.iter().map(|lane| lane.iter().peekable()).collect();
        let mut turn = self.turn;
        std::iter::from_fn(move || {
            let next = match (turn, &mut lanes[..]) {
                (Some(turn), [low, high]) => next_in_turn(low.peek().copied(), high.peek().copied(), turn)?,
                (_, lanes) => (0..lanes.len()).rev().find(|lane| lanes[*lane].peek().is_some())?,
            };
            let entry = lanes[next].next()?;
            turn = turn.map(|turn| turn_after(turn, entry));
            Some(entry)
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
    fn two_of_the_high_priority_go_in_front_of_one_of_the_low_and_what_came_back_in_front_of_all() {
        let mut ready = Ready::of_quorum(true);
        for (body, priority) in
            [("a", 0), ("b", 4), ("c", 0), ("d", 4), ("v", 5), ("w", 9), ("x", 255), ("y", 5), ("z", 5)]
        {
            let entry = ready.arrive(message(body, priority), None);
            ready.push(entry);
        }
        let bodies = |ready: &Ready| ready.iter().map(|entry| entry.message.body[0] as char).collect::<String>();
        assert_eq!(bodies(&ready), "vwaxybzcd");
        let taken: Vec<Entry> = (0..4).filter_map(|_| ready.pop()).collect();
        taken.into_iter().rev().for_each(|entry| ready.put_back(entry));
        assert_eq!(bodies(&ready), "xawvybzcd");
        assert_eq!(drain(&mut ready), "xawvybzcd");
        // The low one was there first, in the third place; elsewhere it would not help it.
        for (body, priority) in [("a", 5), ("b", 5), ("c", 5), ("d", 0)] {
            let entry = ready.arrive(message(body, priority), None);
            ready.push(entry);
        }
        assert_eq!(drain(&mut ready), "abcd");
    }

    #[test]
    fn where_priorities_take_turns_only_what_is_next_expires() {
        let mut ready = Ready::of_quorum(true);
        let now = Instant::now();
        for (body, priority, expires) in [("a", 0, Some(now)), ("b", 9, None), ("c", 9, Some(now))] {
            let entry = ready.arrive(message(body, priority), expires);
            ready.push(entry);
        }
        assert!(!ready.has_expiring_head() && ready.pop_expired(now).is_none());
        assert_eq!(ready.pop().map(|entry| entry.message.body[0]), Some(b'b'));
        let expired: Vec<u8> =
            std::iter::from_fn(|| ready.pop_expired(now)).map(|entry| entry.message.body[0]).collect();
        assert_eq!(expired, b"ca");
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
