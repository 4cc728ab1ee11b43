//! What is due when. Each thing has one time at most, and none once what it is about has gone.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use super::super::exchange::QueueId;
use super::channel::ChannelKey;

/// What to look at when the time has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
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
    due: BTreeSet<(Instant, Due)>,
    /// When each of them is due.
    times: BTreeMap<Due, Instant>,
    /// What the clock has been told.
    told: Option<Instant>,
}

impl Timers {
    /// Sets the time for something, instead of any that it had.
    pub(super) fn set(&mut self, at: Instant, due: Due) {
        if let Some(before) = self.times.insert(due, at) {
            self.due.remove(&(before, due));
        }
        self.due.insert((at, due));
    }

    /// As [`set`](Timers::set), unless it is due earlier anyhow.
    pub(super) fn set_if_sooner(&mut self, at: Instant, due: Due) {
        if self.times.get(&due).is_none_or(|set| at < *set) {
            self.set(at, due);
        }
    }

    pub(super) fn is_set(&self, due: Due) -> bool {
        self.times.contains_key(&due)
    }

    pub(super) fn cancel(&mut self, due: Due) {
        if let Some(at) = self.times.remove(&due) {
            self.due.remove(&(at, due));
        }
    }

    /// A queue has gone.
    pub(super) fn forget_queue(&mut self, queue: QueueId) {
        [Due::Head(queue), Due::End(queue), Due::Delivery(queue)].into_iter().for_each(|due| self.cancel(due));
    }

    /// A channel has gone.
    pub(super) fn forget_channel(&mut self, channel: ChannelKey) {
        [Due::Confirms(channel), Due::Ack(channel)].into_iter().for_each(|due| self.cancel(due));
    }

    /// What has come due by `now`, the earliest first.
    pub(super) fn pop(&mut self, now: Instant) -> Option<Due> {
        let &(at, due) = self.due.first().filter(|(at, _)| *at <= now)?;
        self.due.remove(&(at, due));
        self.times.remove(&due);
        Some(due)
    }

    /// When something is due next; the clock knows from here on.
    pub(super) fn next(&mut self) -> Option<Instant> {
        self.told = self.due.first().map(|&(at, _)| at);
        self.told
    }

    /// As [`next`](Timers::next), if it is sooner than the clock knows of.
    pub(super) fn sooner(&mut self) -> Option<Instant> {
        let &(at, _) = self.due.first()?;
        if self.told.is_some_and(|told| told <= at) {
            return None;
        }
        self.told = Some(at);
        self.told
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn each_thing_has_one_time_and_none_when_it_has_gone() {
        let mut timers = Timers::default();
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        let (one, other) = (QueueId(1), QueueId(2));
        timers.set(at(3), Due::Head(one));
        timers.set_if_sooner(at(4), Due::Head(one));
        timers.set(at(2), Due::End(one));
        timers.set(at(1), Due::Head(other));
        timers.set(at(5), Due::Head(other));
        timers.set_if_sooner(at(4), Due::Head(other));
        timers.set(at(1), Due::Ack(ChannelKey(1)));
        timers.forget_channel(ChannelKey(1));
        assert_eq!(timers.next(), Some(at(2)));
        assert_eq!(timers.pop(at(2)), Some(Due::End(one)));
        assert_eq!(timers.pop(at(2)), None);
        timers.forget_queue(one);
        assert_eq!([timers.pop(at(9)), timers.pop(at(9))], [Some(Due::Head(other)), None]);
        assert!(timers.times.is_empty());
    }
}
