//! What a channel has been given and has not settled: by delivery tag, in order.

use std::collections::{BTreeMap, btree_map};
use std::time::Instant;

use super::exchange::QueueId;
use super::queue::Entry;
use super::refusal::Refusal;

/// A consumer of the vhost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct ConsumerId(pub(super) u64);

/// A message delivered and not yet settled.
#[derive(Debug)]
pub(super) struct Unacked {
    pub(super) tag: u64,
    pub(super) queue: QueueId,
    /// `None` if it was asked for with `basic.get`.
    pub(super) consumer: Option<ConsumerId>,
    pub(super) entry: Entry,
    /// It counts for the limit of the channel.
    counts: bool,
    pub(super) since: Instant,
}

/// The delivery tags of a channel.
#[derive(Debug)]
pub(super) struct Ledger {
    next_tag: u64,
    unacked: BTreeMap<u64, Unacked>,
    /// How many of them went to consumers of classic queues, which is what the channel's prefetch counts.
    volume: usize,
    /// `basic.qos` with global: of all consumers together; 0 is no limit.
    limit: usize,
}

impl Ledger {
    pub(super) fn new() -> Ledger {
        Ledger { next_tag: 1, unacked: BTreeMap::new(), volume: 0, limit: 0 }
    }

    /// The tag the next delivery will have.
    pub(super) fn next_tag(&self) -> u64 {
        self.next_tag
    }

    /// Counts a delivery that needs no ack.
    pub(super) fn pass(&mut self) -> u64 {
        self.next_tag += 1;
        self.next_tag - 1
    }

    /// Notes a delivery that waits for an ack. `counts` says whether the limit of the channel is for it.
    pub(super) fn enter(&mut self, queue: QueueId, consumer: Option<ConsumerId>, counts: bool, entry: Entry) -> u64 {
        let tag = self.pass();
        self.put_back(Unacked { tag, queue, consumer, entry, counts, since: Instant::now() });
        if counts {
            self.volume += 1;
        }
        tag
    }

    /// Takes what an ack with these arguments settles, in the order of the tags.
    ///
    /// The prefetch still counts them, until [`forget`](Ledger::forget): in a transaction that is later.
    pub(super) fn take(&mut self, tag: u64, multiple: bool) -> Result<Vec<Unacked>, Refusal> {
        if multiple && tag == 0 {
            return Ok(self.take_all());
        }
        if !multiple {
            return self.unacked.remove(&tag).map(|one| vec![one]).ok_or_else(|| unknown(tag));
        }
        if !self.unacked.contains_key(&tag) {
            return Err(unknown(tag));
        }
        let later = self.unacked.split_off(&tag.saturating_add(1));
        Ok(std::mem::replace(&mut self.unacked, later).into_values().collect())
    }

    pub(super) fn take_all(&mut self) -> Vec<Unacked> {
        std::mem::take(&mut self.unacked).into_values().collect()
    }

    /// All that is not settled when the channel ends, in the order of the tags.
    pub(super) fn into_unacked(self) -> btree_map::IntoValues<u64, Unacked> {
        self.unacked.into_values()
    }

    /// A rolled back ack: the message is unsettled again.
    pub(super) fn put_back(&mut self, unacked: Unacked) {
        self.unacked.insert(unacked.tag, unacked);
    }

    /// One taken message counts no more. True if a limit was reached until now.
    pub(super) fn forget(&mut self, unacked: &Unacked) -> bool {
        let was_full = self.is_full();
        if unacked.counts {
            self.volume = self.volume.saturating_sub(1);
        }
        was_full && !self.is_full()
    }

    /// Whether the consumers of the channel may have no more.
    pub(super) fn is_full(&self) -> bool {
        self.limit > 0 && self.volume >= self.limit
    }

    /// Sets the limit of the channel, 0 for none.
    pub(super) fn set_limit(&mut self, limit: u16) {
        self.limit = limit.into();
    }

    /// Whether there is a limit of the channel.
    pub(super) fn has_limit(&self) -> bool {
        self.limit > 0
    }

    /// Since when the oldest delivery has been waiting for its ack.
    pub(super) fn oldest(&self) -> Option<Instant> {
        self.unacked.first_key_value().map(|(_, unacked)| unacked.since)
    }
}

fn unknown(tag: u64) -> Refusal {
    Refusal::precondition_failed(format_args!("unknown delivery tag {tag}"))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::message::Message;
    use super::*;

    fn ledger(count: u64) -> Ledger {
        let mut ledger = Ledger::new();
        for position in 0..count {
            let message = Arc::new(Message::for_test());
            let entry = Entry { message, expires: None, position, redelivered: false, returns: 0, failures: 0 };
            ledger.enter(QueueId(1), Some(ConsumerId(1)), true, entry);
        }
        ledger
    }

    fn tags(taken: &[Unacked]) -> Vec<u64> {
        taken.iter().map(|unacked| unacked.tag).collect()
    }

    #[test]
    fn one_many_all_and_unknown() {
        let mut ledger = ledger(6);
        assert_eq!(tags(&ledger.take(2, false).unwrap()), [2]);
        assert_eq!(ledger.take(2, false).unwrap_err().text, "PRECONDITION_FAILED - unknown delivery tag 2");
        assert_eq!(ledger.take(2, true).unwrap_err().text, "PRECONDITION_FAILED - unknown delivery tag 2");
        assert_eq!(tags(&ledger.take(4, true).unwrap()), [1, 3, 4]);
        assert_eq!(tags(&ledger.take(0, true).unwrap()), [5, 6]);
        assert!(ledger.take(0, true).unwrap().is_empty());
        assert_eq!(ledger.take(0, false).unwrap_err().text, "PRECONDITION_FAILED - unknown delivery tag 0");
        assert_eq!(ledger.next_tag(), 7);
    }

    #[test]
    fn the_limit_counts_until_forgotten() {
        let mut ledger = ledger(2);
        ledger.set_limit(2);
        assert!(ledger.is_full());
        let taken = ledger.take(1, false).unwrap();
        assert!(ledger.is_full());
        assert!(ledger.forget(&taken[0]));
        assert!(!ledger.is_full());
    }
}
