//! A queue: its settings, its messages, its consumers and whose turn it is. What a message means to channels and
//! exchanges is the vhost's business.

mod ready;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use super::arguments::{Overflow, QueueArguments};
use super::exchange::ExchangeId;
use super::ledger::ConsumerId;
use super::message::Message;
use super::outbox::SessionId;
use super::queue_type::QueueType;
use crate::amqp::ShortString;
use crate::amqp::value::Table;

pub(crate) use self::ready::Entry;
use self::ready::Ready;

/// Deliveries held down to one per `every`, as a test may ask.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    pub(super) every: Duration,
    pub(super) next: Instant,
}

#[derive(Debug)]
pub(super) struct Queue {
    pub(super) name: ShortString,
    pub(super) durable: bool,
    pub(super) auto_delete: bool,
    /// The connection an exclusive queue belongs to, and dies with.
    pub(super) owner: Option<SessionId>,
    pub(super) table: Table,
    pub(super) arguments: QueueArguments,
    pub(super) ready: Ready,
    /// Delivered and not settled, by whomever.
    pub(super) unacked: usize,
    /// Highest priority first, then who came first.
    pub(super) consumers: BTreeSet<(Reverse<i64>, ConsumerId)>,
    /// The consumers that may have room for a message, in turn. Who was found to have none is not in here.
    turns: BTreeMap<Reverse<i64>, VecDeque<ConsumerId>>,
    /// The exclusive consumer, or the single active one.
    pub(super) active: Option<ConsumerId>,
    pub(super) had_consumers: bool,
    /// The exchanges bound to it.
    pub(super) sources: BTreeSet<ExchangeId>,
    /// When it was last of use to somebody, for `x-expires`.
    pub(super) last_used: Instant,
    /// The timer that is set for the head of the queue, and whether one is for its end.
    pub(super) head_timer: Option<Instant>,
    pub(super) end_timer: bool,
    pub(super) pace: Option<Pace>,
    /// A quorum queue that was too long refuses messages until it is shorter by a fifth.
    is_refusing: bool,
}

impl Queue {
    pub(super) fn new(name: ShortString, table: Table, arguments: QueueArguments) -> Queue {
        Queue {
            name,
            durable: false,
            auto_delete: false,
            owner: None,
            table,
            ready: match arguments.kind {
                QueueType::Classic => Ready::new(arguments.max_priority),
                QueueType::Quorum => Ready::with_line_of_returns(),
            },
            arguments,
            unacked: 0,
            consumers: BTreeSet::new(),
            turns: BTreeMap::new(),
            active: None,
            had_consumers: false,
            sources: BTreeSet::new(),
            last_used: Instant::now(),
            head_timer: None,
            end_timer: false,
            pace: None,
            is_refusing: false,
        }
    }

    pub(super) fn is_quorum(&self) -> bool {
        self.arguments.kind == QueueType::Quorum
    }

    /// Whether one more message is refused. A quorum queue takes one too many, and then none for a while.
    pub(super) fn refuses(&mut self, message: &Message) -> bool {
        match self.arguments.overflow {
            Overflow::DropHead => false,
            _ if self.is_quorum() => {
                self.note_length();
                self.is_refusing
            }
            _ => self.exceeds(1, message.body.len()),
        }
    }

    /// Notes whether a quorum queue is too long, or short enough again.
    pub(super) fn note_length(&mut self) {
        let most = |max: usize| max / 5 * 4 + max % 5 * 4 / 5;
        let is_short = self.arguments.max_length.is_none_or(|max| self.ready.len() <= most(max))
            && self.arguments.max_bytes.is_none_or(|max| self.ready.bytes() <= most(max));
        self.is_refusing = self.exceeds(0, 0) || self.is_refusing && !is_short;
    }

    /// Takes a message back that was delivered and not acked, or hands it out if that has happened too often. `requeued`
    /// if the client says so, and has not simply gone.
    pub(super) fn take_back(&mut self, mut entry: Entry, requeued: bool) -> Option<Entry> {
        entry.redelivered = true;
        entry.returns = entry.returns.saturating_add(1);
        match self.arguments.delivery_limit {
            Some(limit) if i64::from(entry.returns) > limit => return Some(entry),
            // RabbitMQ writes the message to the log of the queue once more, behind all others.
            None if requeued && self.is_quorum() => self.ready.put_last(entry),
            _ => self.ready.put_back(entry),
        }
        None
    }

    /// What the header `x-delivery-count` says of a message, if it is there. `asked_for` by `basic.get`.
    pub(super) fn delivery_count(&self, entry: &Entry, asked_for: bool) -> Option<u32> {
        (self.is_quorum() && (asked_for || entry.returns > 0)).then_some(entry.returns)
    }

    /// Whether the head has to go.
    pub(super) fn overflows(&self) -> bool {
        self.arguments.overflow == Overflow::DropHead && self.exceeds(0, 0)
    }

    fn exceeds(&self, more: usize, bytes: usize) -> bool {
        self.arguments.max_length.is_some_and(|max| self.ready.len() + more > max)
            || self.arguments.max_bytes.is_some_and(|max| self.ready.bytes() + bytes > max)
    }

    /// When a message arriving now expires: the queue and the message each have a say.
    pub(super) fn expiry(&self, ttl: Option<Duration>) -> Option<Instant> {
        let ttl = match (self.arguments.ttl, ttl) {
            (Some(one), Some(other)) => one.min(other),
            (one, other) => one.or(other)?,
        };
        Instant::now().checked_add(ttl)
    }

    /// Whether nobody but the single active consumer gets messages.
    pub(super) fn is_single(&self) -> bool {
        self.arguments.single_active
    }

    /// Adds a consumer, last in turn of its priority.
    pub(super) fn add_consumer(&mut self, consumer: ConsumerId, priority: i64) {
        self.consumers.insert((Reverse(priority), consumer));
        self.had_consumers = true;
        self.last_used = Instant::now();
        if self.is_single() {
            self.active.get_or_insert(consumer);
        }
        self.line_up(consumer, priority);
    }

    /// Takes a consumer away. Of a single active one the next in line takes the place.
    pub(super) fn remove_consumer(&mut self, consumer: ConsumerId, priority: i64) {
        self.consumers.remove(&(Reverse(priority), consumer));
        self.last_used = Instant::now();
        if let Some(line) = self.turns.get_mut(&Reverse(priority)) {
            line.retain(|&other| other != consumer);
        }
        if self.active == Some(consumer) {
            let next = match self.arguments.kind {
                QueueType::Classic => self.consumers.first().map(|&(_, next)| next),
                QueueType::Quorum => self.consumers.iter().map(|&(_, next)| next).min(),
            };
            self.active = next.filter(|_| self.is_single());
        }
    }

    /// Lets a consumer stand in line again.
    pub(super) fn line_up(&mut self, consumer: ConsumerId, priority: i64) {
        if !self.is_single() {
            self.turns.entry(Reverse(priority)).or_default().push_back(consumer);
        }
    }

    /// The consumer whose turn it is, of those of whom `can_take` says so. It goes to the end of its line; those in
    /// front of it that could take nothing are handed to `passed_over` and leave the line.
    pub(super) fn next_consumer(
        &mut self,
        mut can_take: impl FnMut(ConsumerId) -> bool,
        mut passed_over: impl FnMut(ConsumerId),
    ) -> Option<ConsumerId> {
        if self.is_single() {
            let active = self.active?;
            if can_take(active) {
                return Some(active);
            }
            passed_over(active);
            return None;
        }
        for line in self.turns.values_mut() {
            while let Some(consumer) = line.pop_front() {
                if can_take(consumer) {
                    line.push_back(consumer);
                    return Some(consumer);
                }
                passed_over(consumer);
            }
        }
        None
    }

    /// Whether its last consumer has gone, and it is to go with it.
    pub(super) fn is_done(&self) -> bool {
        self.auto_delete && self.had_consumers && self.consumers.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(single_active: bool) -> Queue {
        let arguments = QueueArguments { single_active, ..QueueArguments::default() };
        let mut queue = Queue::new("q".into(), Table::default(), arguments);
        for (consumer, priority) in [(1, 0), (2, 0), (3, 5)] {
            queue.add_consumer(ConsumerId(consumer), priority);
        }
        queue
    }

    fn next(queue: &mut Queue, full: &[u64]) -> Option<u64> {
        queue.next_consumer(|consumer| !full.contains(&consumer.0), |_| {}).map(|consumer| consumer.0)
    }

    #[test]
    fn in_turn_among_those_of_the_highest_priority_with_room() {
        let mut queue = queue(false);
        assert_eq!([next(&mut queue, &[]), next(&mut queue, &[])], [Some(3), Some(3)]);
        assert_eq!([next(&mut queue, &[3]), next(&mut queue, &[]), next(&mut queue, &[])], [Some(1), Some(2), Some(1)]);
        queue.line_up(ConsumerId(3), 5);
        assert_eq!(next(&mut queue, &[]), Some(3));
        assert_eq!(next(&mut queue, &[1, 2, 3]), None);
    }

    #[test]
    fn a_single_active_consumer_is_followed_by_the_next() {
        let mut queue = queue(true);
        assert_eq!([next(&mut queue, &[]), next(&mut queue, &[])], [Some(1), Some(1)]);
        assert_eq!(next(&mut queue, &[1]), None, "the others wait even so");
        queue.remove_consumer(ConsumerId(1), 0);
        assert_eq!(next(&mut queue, &[]), Some(3), "the highest priority first");
        queue.remove_consumer(ConsumerId(3), 5);
        queue.remove_consumer(ConsumerId(2), 0);
        assert_eq!(queue.active, None);
    }
}
