//! What is due when. A timer cannot be taken back: who set it looks, when it goes off, whether it still matters.

use std::collections::BTreeMap;
use std::time::Instant;

use super::super::exchange::QueueId;
use super::channel::ChannelKey;

/// What to look at when the time has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    /// Messages may have expired.
    Head(QueueId),
    /// The queue may have been of no use for long enough.
    End(QueueId),
    /// The next slow delivery.
    Delivery(QueueId),
    /// Delayed confirms.
    Confirms(ChannelKey),
    /// A delivery may be unacked for too long.
    Ack(ChannelKey),
}

#[derive(Debug, Default)]
pub(super) struct Timers {
    due: BTreeMap<(Instant, u64), Due>,
    set: u64,
    /// What the clock has been told.
    told: Option<Instant>,
}

impl Timers {
    pub(super) fn set(&mut self, at: Instant, due: Due) {
        self.set += 1;
        self.due.insert((at, self.set), due);
    }

    /// What has come due by `now`, the earliest first.
    pub(super) fn pop(&mut self, now: Instant) -> Option<Due> {
        let first = self.due.first_entry().filter(|first| first.key().0 <= now)?;
        Some(first.remove())
    }

    /// When something is due next; the clock knows from here on.
    pub(super) fn next(&mut self) -> Option<Instant> {
        self.told = self.due.first_key_value().map(|(&(at, _), _)| at);
        self.told
    }

    /// As [`next`](Timers::next), if it is sooner than the clock knows of.
    pub(super) fn sooner(&mut self) -> Option<Instant> {
        let (&(at, _), _) = self.due.first_key_value()?;
        if self.told.is_some_and(|told| told <= at) {
            return None;
        }
        self.told = Some(at);
        self.told
    }
}
