//! A queue or a stream: its settings, its messages and its consumers. What a message means to channels and
//! exchanges is the vhost's business.

mod consumers;
mod log;
mod ready;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::arguments::{Overflow, QueueArguments};
use super::exchange::ExchangeId;
use super::ledger::ConsumerId;
use super::message::Message;
use super::outbox::SessionId;
use super::queue_type::QueueType;
use super::release::Release;
use crate::amqp::ShortString;
use crate::amqp::value::Table;

use self::consumers::{Consumers, Sharing};
use self::log::Log;
pub(crate) use self::ready::Entry;
pub(super) use self::ready::Ready;

/// Deliveries held down to one per `every`, as a test may ask.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    pub(super) every: Duration,
    pub(super) next: Instant,
}

#[derive(Debug)]
pub(super) struct Queue {
    release: Release,
    pub(super) name: ShortString,
    pub(super) durable: bool,
    pub(super) auto_delete: bool,
    /// The connection an exclusive queue belongs to, and dies with.
    pub(super) owner: Option<SessionId>,
    pub(super) table: Table,
    pub(super) arguments: QueueArguments,
    pub(super) ready: Ready,
    /// The messages of a stream. It has none that are ready.
    pub(super) log: Option<Box<Log>>,
    /// Delivered and not settled, by whomever.
    pub(super) unacked: usize,
    pub(super) consumers: Consumers,
    pub(super) had_consumers: bool,
    /// The exchanges bound to it.
    pub(super) sources: BTreeSet<ExchangeId>,
    /// When it was last of use to somebody, for `x-expires`.
    pub(super) last_used: Instant,
    pub(super) pace: Option<Pace>,
    /// A quorum queue that was too long refuses messages until it is shorter by a fifth.
    is_refusing: bool,
}

impl Queue {
    pub(super) fn new(name: ShortString, table: Table, arguments: QueueArguments, release: Release) -> Queue {
        let sharing = match arguments.kind {
            _ if !arguments.single_active => Sharing::InTurn,
            QueueType::Classic | QueueType::Stream => Sharing::OneByPriority,
            QueueType::Quorum if release.single_active_makes_way() => Sharing::OneMakesWay,
            QueueType::Quorum => Sharing::OneByArrival,
        };
        Queue {
            release,
            name,
            durable: false,
            auto_delete: false,
            owner: None,
            table,
            ready: match arguments.kind {
                QueueType::Classic | QueueType::Stream => Ready::new(arguments.max_priority),
                QueueType::Quorum => Ready::of_quorum(release.quorum_has_priorities()),
            },
            log: (arguments.kind == QueueType::Stream).then(|| Box::new(Log::new(&arguments))),
            arguments,
            unacked: 0,
            consumers: Consumers::new(sharing),
            had_consumers: false,
            sources: BTreeSet::new(),
            last_used: Instant::now(),
            pace: None,
            is_refusing: false,
        }
    }

    pub(super) fn is_quorum(&self) -> bool {
        self.arguments.kind == QueueType::Quorum
    }

    /// How many messages it has that are not out for somebody. A stream has all of them, always.
    pub(super) fn len(&self) -> usize {
        self.log.as_ref().map_or(self.ready.len(), |log| log.len())
    }

    /// Its messages, the next first.
    pub(super) fn messages(&self) -> impl Iterator<Item = &Arc<Message>> {
        let log = self.log.iter().flat_map(|log| log.iter());
        self.ready.iter().map(|entry| &entry.message).chain(log)
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
        if !requeued {
            self.count_failure(&mut entry);
        }
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
        // Of a message that is new to this queue, what it brings along.
        let count = if entry.returns > 0 { entry.returns } else { entry.failures };
        let shown = count > 0 || asked_for && self.release.get_shows_no_returns();
        (self.is_quorum() && shown).then_some(count)
    }

    /// Counts that a client has rejected a message, or gone with it.
    pub(super) fn count_failure(&self, entry: &mut Entry) {
        if self.is_quorum() && self.release.failures_go_along() {
            entry.failures = entry.failures.saturating_add(1);
        }
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

    /// Adds a consumer, last in turn of its priority.
    pub(super) fn add_consumer(&mut self, consumer: ConsumerId, priority: i64) {
        self.consumers.add(consumer, priority);
        self.had_consumers = true;
        self.last_used = Instant::now();
    }

    /// How many consumers a declaration tells of. RabbitMQ counts those of a stream not at all, and of a quorum queue with a single
    /// active consumer that one.
    pub(super) fn counted_consumers(&self) -> usize {
        match self.consumers.len() {
            _ if self.log.is_some() => 0,
            consumers if self.is_quorum() && self.consumers.is_single() => consumers.min(1),
            consumers => consumers,
        }
    }

    /// Takes a consumer away. Of a single active one the next takes the place.
    pub(super) fn remove_consumer(&mut self, consumer: ConsumerId, priority: i64) {
        self.consumers.remove(consumer, priority);
        self.last_used = Instant::now();
    }

    /// Whether its last consumer has gone, and it is to go with it.
    pub(super) fn is_done(&self) -> bool {
        self.auto_delete && self.had_consumers && self.consumers.is_empty()
    }
}
