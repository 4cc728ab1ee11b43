//! Acks, rejections, recovery, transactions.

use super::super::dead_letter::Reason;
use super::super::exchange::QueueId;
use super::super::ledger::{ConsumerId, Unacked};
use super::super::refusal::{Refusal, Scope};
use super::super::transaction::{Settlement, Transaction};
use super::channel::{ChannelKey, Mode};
use super::rest::{Rest, SLICE};
use super::state::State;
use crate::amqp::method::{BasicRecoverOk, TxCommitOk, TxRollbackOk, TxSelectOk};

impl State {
    pub(super) fn settle(
        &mut self,
        key: ChannelKey,
        tag: u64,
        multiple: bool,
        settlement: Settlement,
    ) -> Result<(), Refusal> {
        let release = self.limits.release;
        let channel = self.channel_mut(key)?;
        let taken = channel.ledger.take(tag, multiple)?;
        if settlement != Settlement::Ack
            && !release.stream_takes_rejections()
            && let Some(name) = self.stream_of(&taken)
        {
            return Err(Refusal::not_implemented(format_args!(
                "basic.nack and basic.reject not supported by stream queues {}",
                self.queue_named(&name)
            )));
        }
        let channel = self.channel_mut(key)?;
        if let Mode::Tx(transaction) = &mut channel.mode {
            transaction.settlements.push((settlement, taken));
            return Ok(());
        }
        self.settle_all(key, settlement, taken);
        Ok(())
    }

    /// Settles what has been taken from the ledger, in slices.
    pub(super) fn settle_all(&mut self, key: ChannelKey, settlement: Settlement, taken: Vec<Unacked>) {
        if taken.len() <= SLICE {
            self.settle_some(key, settlement, taken);
        } else {
            self.rest.push_back(Rest::Settle { channel: key, settlement, taken: taken.into_iter() });
        }
    }

    /// Settles some of it, then delivers what there is room for now.
    pub(super) fn settle_some(
        &mut self,
        key: ChannelKey,
        settlement: Settlement,
        taken: impl IntoIterator<Item = Unacked>,
    ) {
        let mut stirred = Vec::new();
        let mut with_room = Vec::new();
        let mut channel_has_room = false;
        for unacked in taken {
            channel_has_room |= self.make_room(key, &unacked, &mut with_room);
            if self.is_idle(unacked.consumer) && self.change_places(unacked.queue) {
                stirred.push(unacked.queue);
            }
            self.settle_one(settlement, unacked, &mut stirred);
        }
        let mut queues = if channel_has_room { self.fill_channel(key, with_room) } else { self.unpark(with_room) };
        queues.extend(stirred);
        self.dispatch_all(queues);
    }

    /// The consumer that had the message may have another. True if all of its channel may, which was full until now.
    fn make_room(&mut self, key: ChannelKey, unacked: &Unacked, with_room: &mut Vec<ConsumerId>) -> bool {
        if let Some(id) = unacked.consumer
            && let Some(consumer) = self.consumers.get_mut(&id)
        {
            consumer.unacked = consumer.unacked.saturating_sub(1);
            with_room.push(id);
        }
        self.channels.get_mut(&key).is_some_and(|channel| channel.ledger.forget(unacked))
    }

    /// Whether a consumer has nothing unsettled.
    fn is_idle(&self, consumer: Option<ConsumerId>) -> bool {
        consumer.and_then(|id| self.consumers.get(&id)).is_some_and(|consumer| consumer.unacked == 0)
    }

    /// Settles a message with its queue. If the queue is gone, there is nothing left to settle.
    pub(super) fn settle_one(&mut self, settlement: Settlement, unacked: Unacked, stirred: &mut impl Extend<QueueId>) {
        let Some(queue) = self.queues.get_mut(&unacked.queue) else { return };
        queue.unacked = queue.unacked.saturating_sub(1);
        match settlement {
            // A stream has it still.
            _ if queue.log.is_some() => {}
            Settlement::Ack => {}
            Settlement::Requeue | Settlement::Return => {
                match queue.take_back(unacked.entry, settlement == Settlement::Requeue) {
                    Some(poison) => self.die(unacked.queue, poison.message, poison.failures, Reason::DeliveryLimit),
                    None => {
                        self.trim(unacked.queue);
                        stirred.extend(Some(unacked.queue));
                    }
                }
            }
            Settlement::Discard => {
                let mut entry = unacked.entry;
                queue.count_failure(&mut entry);
                self.die(unacked.queue, entry.message, entry.failures, Reason::Rejected);
            }
        }
    }

    /// Delivers again what is not acked. If the client waits for `recover-ok`, that goes first.
    pub(super) fn recover(&mut self, key: ChannelKey, requeue: bool, answers: bool) -> Result<(), Refusal> {
        if !requeue {
            return Err(Refusal::not_implemented("requeue=false"));
        }
        let taken = self.channel_mut(key)?.ledger.take_all();
        if !self.limits.release.stream_takes_rejections() && self.stream_of(&taken).is_some() {
            return Err(Refusal::custom(Scope::Connection, 541, "INTERNAL_ERROR"));
        }
        self.answer(key, !answers, BasicRecoverOk {});
        self.settle_all(key, Settlement::Requeue, taken);
        Ok(())
    }

    pub(super) fn select_tx(&mut self, key: ChannelKey) -> Result<(), Refusal> {
        let channel = self.channel_mut(key)?;
        match channel.mode {
            Mode::Confirm(_) => return Err(Refusal::precondition_failed("cannot switch from confirm to tx mode")),
            Mode::Tx(_) => {}
            Mode::Plain => channel.mode = Mode::Tx(Transaction::default()),
        }
        self.tell(key, TxSelectOk {});
        Ok(())
    }

    /// What the transaction holds; it begins anew.
    fn take_transaction(&mut self, key: ChannelKey) -> Result<Transaction, Refusal> {
        match &mut self.channel_mut(key)?.mode {
            Mode::Tx(transaction) => Ok(std::mem::take(transaction)),
            Mode::Plain | Mode::Confirm(_) => Err(Refusal::precondition_failed("channel is not transactional")),
        }
    }

    pub(super) fn commit(&mut self, key: ChannelKey) -> Result<(), Refusal> {
        let transaction = self.take_transaction(key)?;
        let mut complete = true;
        for routed in &transaction.publishes {
            let queues = self.or_return(key, routed);
            complete &= self.distribute(routed, queues);
        }
        if complete {
            // Before what the settlements give back is delivered again.
            self.tell(key, TxCommitOk {});
        }
        for (settlement, taken) in transaction.settlements {
            self.settle_all(key, settlement, taken);
        }
        if complete { Ok(()) } else { Err(Refusal::precondition_failed("partial tx completion")) }
    }

    pub(super) fn roll_back(&mut self, key: ChannelKey) -> Result<(), Refusal> {
        let transaction = self.take_transaction(key)?;
        transaction.roll_back(&mut self.channel_mut(key)?.ledger);
        self.tell(key, TxRollbackOk {});
        Ok(())
    }
}
