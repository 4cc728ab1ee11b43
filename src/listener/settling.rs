//! What becomes of the deliveries of one channel: acks, several in one go where that is wanted, and copies of what has failed.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;

use super::count;
use super::deferred::Deferred;
use super::retry::{self, Gone};
use super::unsettled::Settle;
use super::worker::Worker;
use crate::connection::Received;
use crate::connection::confirms::Call;
use crate::error::{Error, Result};
use crate::event::Dead;
use crate::outcome::{Outcome, RetryPolicy};
use crate::session::{Channel, Inbox, Incoming, Settlement, Waker};

/// How long a stop waits for deliveries that their handler settles by itself.
const MANUAL_GRACE: Duration = Duration::from_secs(5);

/// How long a worker waits that has nothing to look after.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// How long an ack is held back at most, beyond the handler that is running.
const LONGEST_HOLD: Duration = Duration::from_millis(100);

/// Settles deliveries of one channel, acks of several in one go where that is wanted.
pub(super) struct Settling<'a> {
    pub(super) worker: &'a Worker<'a>,
    pub(super) channel: &'a Channel,
    /// The last of the deliveries to be acked, all of which are the oldest that are not settled.
    pub(super) held: Option<u64>,
    /// When the handler of the first of them began.
    pub(super) held_since: Option<Instant>,
    pub(super) held_count: u32,
    /// How many of them count as acked; the others have been put away.
    pub(super) held_acks: u64,
    /// When the last handler began.
    pub(super) began: Instant,
    pub(super) most_held: u32,
    /// Tags of deliveries that their handler settles by itself; and their offsets, if the queue is a stream.
    pub(super) outstanding: BTreeMap<u64, Option<u64>>,
    /// The offset of the last of them that has come, if the queue is a stream.
    pub(super) last_offset: Option<u64>,
    pub(super) deferred: Deferred,
    /// The consumer is cancelled, and what has come is handled.
    pub(super) is_draining: bool,
    /// The session has failed.
    pub(super) has_failed: bool,
}

impl Settling<'_> {
    pub(super) fn ending(&self, during: &str) -> Error {
        self.channel.ending(during)
    }

    pub(super) fn send(&mut self, tag: u64, settlement: Settlement) -> Result<()> {
        let worker = self.worker;
        let during = || worker.during("settling for");
        // In a slow handler the channel may have ended, and nobody has looked. In a handler that ends its own connection it has,
        // and the first that is settled is what tells a good session from a bad one.
        let is_first = worker.post.settlements.load(Ordering::Relaxed) == 0;
        let is_hurried = is_first || self.began.elapsed() >= LONGEST_HOLD;
        // All that a stream is told is that it may send more; for anything else RabbitMQ closes the connection (540).
        let settlement = match settlement {
            Settlement::Reject | Settlement::Requeue if worker.route().position.is_some() => Settlement::Ack,
            other => other,
        };
        self.channel.settle(tag, settlement, is_hurried, &during)?;
        worker.post.settlements.fetch_add(1, Ordering::Relaxed);
        if is_first {
            worker.post.settled.store(worker.since_epoch(Instant::now()), Ordering::Relaxed);
        }
        Ok(())
    }

    pub(super) fn settle(&mut self, tag: u64, received: &Received, outcome: Outcome) -> Result<()> {
        let worker = self.worker;
        let pauses = &worker.shared.pauses;
        // What fails with its session says nothing about messages.
        if pauses.counts_failures() && !self.has_failed && pauses.record(outcome.failure(), Instant::now()) {
            return self.give_back(tag, received, &outcome);
        }
        let position = worker.route().position.as_ref();
        match (position, outcome.failure()) {
            (Some(_), Some(reason)) => self.pass_over(tag, received, reason)?,
            _ => self.carry_out(tag, received, outcome)?,
        }
        if let Some(position) = position {
            position.handled(received.stream_offset());
        }
        Ok(())
    }

    fn carry_out(&mut self, tag: u64, received: &Received, outcome: Outcome) -> Result<()> {
        let worker = self.worker;
        let (reason, try_again) = match outcome {
            Outcome::Ack => return self.ack(tag),
            Outcome::Reject => return self.reject(tag),
            Outcome::Requeue => return self.requeue(tag),
            Outcome::Retry => ("the handler asked for another attempt".to_owned(), true),
            Outcome::Failed(reason) => (reason, true),
            Outcome::Undecodable(reason) => (reason, false),
        };
        let (listener, queue, id) = (worker.shared.name.as_str(), worker.queue(), received.message().message_id());
        let message_id = id.unwrap_or_default();
        let spec = &worker.route().spec;
        let policy = match &spec.retry {
            Some(policy) => try_again.then_some(policy),
            None if !try_again && spec.keeps_undecodable => None,
            None if try_again && !received.redelivered() => {
                log::warn!(
                    listener, queue, message_id, outcome = "requeued";
                    "listener {listener:?}: message from queue {queue:?}, id {id:?}: {reason}; it is requeued once"
                );
                return self.requeue(tag);
            }
            None => return self.reject_failed(tag, received, &reason),
        };
        let attempts = retry::failures_of(received, queue).saturating_add(1);
        self.put_away(tag, received, policy, attempts, reason)
    }

    /// Gives a message up that has been handled so many times, in place: to the dead if there is a policy, else to the broker.
    pub(super) fn give_up(&mut self, tag: u64, received: &Received, attempts: u32, reason: String) -> Result<()> {
        match self.worker.route().spec.retry {
            Some(_) => self.put_away(tag, received, None, attempts, reason),
            None => self.reject_failed(tag, received, &reason),
        }
    }

    /// Gives a message that has failed to the broker, which dead-letters or drops it.
    fn reject_failed(&mut self, tag: u64, received: &Received, reason: &str) -> Result<()> {
        let worker = self.worker;
        let (listener, queue, id) = (worker.shared.name.as_str(), worker.queue(), received.message().message_id());
        let message_id = id.unwrap_or_default();
        log::error!(
            listener, queue, message_id, outcome = "rejected";
            "listener {listener:?}: message from queue {queue:?}, id {id:?}: {reason}; it is rejected"
        );
        self.reject(tag)
    }

    /// Puts a copy where it is to wait, or to the dead, and acks the original.
    fn put_away(
        &mut self,
        tag: u64,
        received: &Received,
        policy: Option<&RetryPolicy>,
        attempts: u32,
        reason: String,
    ) -> Result<()> {
        let worker = self.worker;
        let (listener, queue, id) = (worker.shared.name.as_str(), worker.queue(), received.message().message_id());
        let message_id = id.unwrap_or_default();
        let gone = retry::put_away(worker.side, queue, policy, received, attempts, &reason)?;
        match gone {
            Gone::ToWait => {
                log::warn!(
                    listener, queue, message_id, outcome = "retried";
                    "listener {listener:?}: message from queue {queue:?}, id {id:?}: {reason}; it is tried again later"
                );
                count(&worker.shared.counters.retried);
                worker.meter().retried.one();
            }
            Gone::ToTheDead | Gone::BareToTheDead => {
                count(&worker.shared.counters.dead);
                let (dead_queue, is_bare) = (retry::dead_queue(queue), matches!(gone, Gone::BareToTheDead));
                let dead = Dead { queue, dead_queue, message_id: id, reason, is_bare };
                worker.shared.events.dead(worker.meter(), dead);
            }
        }
        self.hold(tag)
    }

    /// Gives a message of a stream up that has failed: the stream gives it to this consumer only once.
    fn pass_over(&mut self, tag: u64, received: &Received, reason: &str) -> Result<()> {
        let worker = self.worker;
        let (listener, queue, id) = (worker.shared.name.as_str(), worker.queue(), received.message().message_id());
        let (message_id, offset) = (id.unwrap_or_default(), received.stream_offset().unwrap_or_default());
        log::error!(
            listener, queue, message_id, outcome = "rejected";
            "listener {listener:?}: message from stream {queue:?}, offset {offset}, id {id:?}: {reason}; it is passed over"
        );
        self.reject(tag)
    }

    /// Stores how far a stream was read, if that is due, or if nothing comes after.
    pub(super) fn store_offset(&self, is_last: bool) {
        let worker = self.worker;
        let result = worker.route().position.as_ref().map_or(Ok(()), |position| position.store(is_last));
        if let Err(error) = result {
            let (listener, queue) = (worker.shared.name.as_str(), worker.queue());
            log::error!(listener, queue; "listener {listener:?}: the offset in stream {queue:?} is not stored: {error}");
        }
    }

    /// Puts a message back that has failed while the listener pauses: whatever is wrong, it is not the message.
    pub(super) fn give_back(&mut self, tag: u64, received: &Received, outcome: &Outcome) -> Result<()> {
        let worker = self.worker;
        let (listener, queue, id) = (worker.shared.name.as_str(), worker.queue(), received.message().message_id());
        let (message_id, reason) = (id.unwrap_or_default(), outcome.failure().unwrap_or_default());
        log::warn!(
            listener, queue, message_id, outcome = "requeued";
            "listener {listener:?}: message from queue {queue:?}, id {id:?}: {reason}; it goes back, for the listener pauses"
        );
        if let Some(position) = &worker.route().position {
            // It stays unsettled, and the next run begins with it.
            position.hold();
            return Ok(());
        }
        if worker.is_partition() {
            // So does this one, and what was sent ahead of it goes back with it when the channel is closed.
            return Ok(());
        }
        self.requeue(tag)
    }

    pub(super) fn ack(&mut self, tag: u64) -> Result<()> {
        self.held_acks += 1;
        self.hold(tag)
    }

    pub(super) fn hold(&mut self, tag: u64) -> Result<()> {
        let since = *self.held_since.get_or_insert(self.began);
        self.held = Some(tag);
        self.held_count += 1;
        // A slow handler must not keep acks until the broker takes their messages back.
        if self.held_count >= self.most_held || since.elapsed() >= LONGEST_HOLD { self.flush() } else { Ok(()) }
    }

    // What follows is counted once it is sent: on a channel that has ended, the broker delivers the message again.

    pub(super) fn reject(&mut self, tag: u64) -> Result<()> {
        self.send(tag, Settlement::Reject)?;
        count(&self.worker.shared.counters.rejected);
        self.worker.meter().rejected.one();
        Ok(())
    }

    pub(super) fn requeue(&mut self, tag: u64) -> Result<()> {
        self.send(tag, Settlement::Requeue)?;
        count(&self.worker.shared.counters.requeued);
        self.worker.meter().requeued.one();
        Ok(())
    }

    pub(super) fn has_acked(&self, deliveries: u64) {
        self.worker.shared.counters.acked.fetch_add(deliveries, Ordering::Relaxed);
        self.worker.meter().acked.add(deliveries);
    }

    /// Sends the acks that are held back.
    pub(super) fn flush(&mut self) -> Result<()> {
        let several = std::mem::take(&mut self.held_count) > 1;
        let acks = std::mem::take(&mut self.held_acks);
        self.held_since = None;
        match self.held.take() {
            Some(tag) if several => self.send(tag, Settlement::AckUpTo)?,
            Some(tag) => self.send(tag, Settlement::Ack)?,
            None => {}
        }
        self.has_acked(acks);
        Ok(())
    }

    /// Settles a delivery at its handler's request. One that an `ack_up_to` has covered is settled already.
    pub(super) fn settle_later(&mut self, Settle { how, tag }: Settle) -> Result<()> {
        if self.outstanding.remove(&tag).is_none() {
            return Ok(());
        }
        self.settle_now(how, tag)?;
        if let Some(position) = &self.worker.route().position {
            // All before the first that is left.
            position.handled(match self.outstanding.values().next() {
                Some(first) => first.and_then(|offset| offset.checked_sub(1)),
                None => self.last_offset,
            });
        }
        Ok(())
    }

    fn settle_now(&mut self, how: Settlement, tag: u64) -> Result<()> {
        match how {
            Settlement::Ack => {
                self.send(tag, Settlement::Ack)?;
                self.has_acked(1);
                Ok(())
            }
            Settlement::AckUpTo => {
                let later = self.outstanding.split_off(&tag);
                let covered = std::mem::replace(&mut self.outstanding, later).len() as u64 + 1;
                self.send(tag, Settlement::AckUpTo)?;
                self.has_acked(covered);
                Ok(())
            }
            Settlement::Reject => self.reject(tag),
            Settlement::Requeue => self.requeue(tag),
        }
    }

    /// Waits for something to do, in `events` or elsewhere; false if the connection has ended.
    pub(super) fn wait(
        &self,
        inbox: &Inbox,
        waker: &Waker,
        look: Option<Instant>,
        settles: &Receiver<Settle>,
        events: &mut VecDeque<Incoming>,
    ) -> bool {
        let worker = self.worker;
        let until = look.unwrap_or_else(|| Instant::now() + LONGEST_WAIT);
        let awaited = self.deferred.first().cloned();
        let is_due = || {
            let is_confirmed = awaited.as_ref().is_some_and(|call| call.open() == 0);
            let is_told = worker.is_stopped() || worker.post.is_retiring() && !self.is_draining;
            (is_confirmed || is_told || !settles.is_empty()).then_some(())
        };
        worker.side.with_publish_waiters(|waiters| {
            let others: Vec<_> = waiters.filter(|_| awaited.is_some()).into_iter().collect();
            self.channel.listen(inbox, Some(waker), &others, until, events, is_due);
        });
        worker.side.is_alive() || !events.is_empty()
    }

    /// Whether everything that was handed out is settled.
    pub(super) fn is_done(&self) -> bool {
        self.outstanding.is_empty() && self.deferred.is_empty()
    }

    /// Settles what waited for confirms that are there. Returns by when to look again, if something still waits.
    pub(super) fn settle_confirmed(&mut self) -> Result<Option<Instant>> {
        if self.deferred.is_empty() {
            return Ok(None);
        }
        let look = self.worker.side.look_after_publishes();
        self.settle_known()?;
        Ok(self.deferred.first().map(|_| look))
    }

    pub(super) fn settle_known(&mut self) -> Result<()> {
        while let Some((tag, received, outcome)) = self.deferred.pop(self.worker.side) {
            self.settle(tag, &received, outcome)?;
        }
        Ok(())
    }

    /// The session has failed. Settles what it can, and tells who waited for a confirm that will not come: it may be why.
    pub(super) fn tell_of_the_end(&mut self) {
        self.has_failed = true;
        let side = self.worker.side;
        side.look_after_publishes();
        while let Some((tag, received, outcome)) = self.deferred.pop(side) {
            // On a channel that is gone this does nothing, and the broker delivers it again.
            let _ = self.settle(tag, &received, outcome);
        }
    }

    /// Waits for the confirms that deliveries wait for, each until its deadline.
    pub(super) fn wait_for_confirms(&mut self) -> Result<()> {
        while let Some(call) = self.deferred.first().cloned() {
            self.wait_for_confirm(&call)?;
        }
        Ok(())
    }

    pub(super) fn wait_for_confirm(&mut self, call: &Call) -> Result<()> {
        let side = self.worker.side;
        side.wait_for(call, Instant::now() + side.settings.confirm_timeout);
        self.settle_known()
    }

    /// Waits a while for deliveries that their handlers have not settled.
    pub(super) fn wait_for_rest(&mut self, settles: &Receiver<Settle>) -> Result<()> {
        let deadline = Instant::now() + MANUAL_GRACE;
        while !self.outstanding.is_empty() {
            match settles.recv_deadline(deadline) {
                Ok(request) => self.settle_later(request)?,
                Err(_) => break,
            }
        }
        Ok(())
    }
}
