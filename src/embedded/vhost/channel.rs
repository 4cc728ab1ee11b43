//! A channel and a consumer as the engine knows them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::super::confirm::Confirms;
use super::super::exchange::QueueId;
use super::super::ledger::{ConsumerId, Ledger};
use super::super::outbox::Outbox;
use super::super::queue_type::QueueType;
use super::super::stream::Reading;
use super::super::transaction::Transaction;
use super::super::users::User;
use crate::amqp::ShortString;

/// How many messages a consumer of a quorum queue may have that has set no limit.
const QUORUM_PREFETCH: usize = 2000;

/// An open channel; unlike its number, never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ChannelKey(pub(super) u64);

/// What a publish brings about.
#[derive(Debug)]
pub(super) enum Mode {
    Plain,
    Confirm(Confirms),
    Tx(Transaction),
}

/// The consumer of direct reply-to.
#[derive(Debug)]
pub(super) struct ReplyConsumer {
    pub(super) tag: ShortString,
    pub(super) suffix: ShortString,
}

#[derive(Debug)]
pub(super) struct Channel {
    pub(super) outbox: Arc<Outbox>,
    pub(super) user: Arc<User>,
    pub(super) number: u16,
    /// The client has the capability `consumer_cancel_notify`.
    pub(super) wants_cancel: bool,
    /// What an empty queue name stands for.
    pub(super) last_queue: Option<ShortString>,
    pub(super) consumers: BTreeMap<ShortString, ConsumerId>,
    /// Of the consumers to come; 0 is no limit.
    pub(super) prefetch: u16,
    pub(super) ledger: Ledger,
    pub(super) mode: Mode,
    pub(super) reply: Option<ReplyConsumer>,
    /// The consumers that were passed over because the channel or the connection had no room. The one that was served the longest
    /// time ago comes first.
    pub(super) parked: BTreeSet<(u64, ConsumerId)>,
}

impl Channel {
    pub(super) fn new(outbox: Arc<Outbox>, user: Arc<User>, number: u16, wants_cancel: bool) -> Channel {
        Channel {
            outbox,
            user,
            number,
            wants_cancel,
            last_queue: None,
            consumers: BTreeMap::new(),
            prefetch: 0,
            ledger: Ledger::new(),
            mode: Mode::Plain,
            reply: None,
            parked: BTreeSet::new(),
        }
    }
}

/// Why a consumer was passed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Parked {
    /// It has as many messages as it may: since when, as a number that grows.
    ByItself(u64),
    /// Its channel has, or its connection is slow.
    ByChannel,
    /// It has read all of its stream.
    AtEnd,
}

#[derive(Debug)]
pub(super) struct Consumer {
    pub(super) channel: ChannelKey,
    pub(super) tag: ShortString,
    pub(super) queue: QueueId,
    /// Of its queue. A limit of the whole channel is for classic queues alone.
    pub(super) kind: QueueType,
    /// Of a stream: how far it has come.
    pub(super) reading: Option<Box<Reading>>,
    pub(super) no_ack: bool,
    pub(super) priority: i64,
    /// 0 is no limit.
    pub(super) prefetch: usize,
    pub(super) unacked: usize,
    /// It was passed over for want of room and is out of the line.
    pub(super) parked: Option<Parked>,
    /// When it was last given a message, as a number that grows; 0 for never.
    pub(super) served: u64,
}

impl Consumer {
    /// Whether its own prefetch lets it have one more message.
    pub(super) fn has_credit(&self) -> bool {
        let is_quorum = self.kind == QueueType::Quorum;
        let prefetch = if is_quorum && self.prefetch == 0 { QUORUM_PREFETCH } else { self.prefetch };
        self.no_ack || prefetch == 0 || self.unacked < prefetch
    }

    /// Whether it reads a stream that ends here and has no message for it.
    pub(super) fn has_read_to(&self, end: Option<u64>) -> bool {
        self.reading.as_ref().is_some_and(|reading| end.is_none_or(|end| reading.next >= end))
    }

    /// Whether it may be given one more message.
    pub(super) fn can_take(&self, channel: &Channel) -> bool {
        self.has_credit() && (self.kind != QueueType::Classic || !channel.ledger.is_full()) && channel.outbox.has_room()
    }
}
