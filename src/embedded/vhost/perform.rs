//! Which method is performed where.

use super::super::confirm::Confirms;
use super::super::refusal::Refusal;
use super::super::transaction::Settlement;
use super::channel::{ChannelKey, Mode};
use super::state::State;
use crate::amqp::method::*;

impl State {
    pub(super) fn perform(&mut self, key: ChannelKey, method: Method) -> Result<(), Refusal> {
        match method {
            Method::AccessRequest(_) => {
                self.tell(key, AccessRequestOk { ticket: 1 });
                Ok(())
            }
            Method::ExchangeDeclare(declare) => self.declare_exchange(key, &declare),
            Method::ExchangeDelete(delete) => self.delete_exchange(key, &delete),
            Method::ExchangeBind(bind) => self.bind_exchange(key, &bind),
            Method::ExchangeUnbind(unbind) => self.unbind_exchange(key, &unbind),
            Method::QueueDeclare(declare) => self.declare_queue(key, declare),
            Method::QueueBind(bind) => self.bind_queue(key, &bind),
            Method::QueueUnbind(unbind) => self.unbind_queue(key, &unbind),
            Method::QueuePurge(purge) => self.purge_queue(key, &purge),
            Method::QueueDelete(delete) => self.delete_queue(key, &delete),
            Method::BasicQos(qos) => self.set_prefetch(key, &qos),
            Method::BasicConsume(consume) => self.consume(key, &consume),
            Method::BasicCancel(cancel) => self.cancel(key, &cancel),
            Method::BasicGet(get) => self.get(key, &get),
            Method::BasicAck(ack) => self.settle(key, ack.delivery_tag, ack.multiple, Settlement::Ack),
            Method::BasicReject(reject) => self.settle(key, reject.delivery_tag, false, unwanted(reject.requeue)),
            Method::BasicNack(nack) => self.settle(key, nack.delivery_tag, nack.multiple, unwanted(nack.requeue)),
            Method::BasicRecoverAsync(recover) => self.recover(key, recover.requeue, false),
            Method::BasicRecover(recover) => self.recover(key, recover.requeue, true),
            Method::TxSelect(_) => self.select_tx(key),
            Method::TxCommit(_) => self.commit(key),
            Method::TxRollback(_) => self.roll_back(key),
            Method::ConfirmSelect(select) => self.select_confirm(key, &select),
            _ => Err(Refusal::command_invalid("unimplemented method")),
        }
    }

    fn select_confirm(&mut self, key: ChannelKey, select: &ConfirmSelect) -> Result<(), Refusal> {
        let channel = self.channel_mut(key)?;
        match channel.mode {
            Mode::Tx(_) => return Err(Refusal::precondition_failed("cannot switch from tx to confirm mode")),
            Mode::Confirm(_) => {}
            Mode::Plain => channel.mode = Mode::Confirm(Confirms::new()),
        }
        self.answer(key, select.no_wait, ConfirmSelectOk {});
        Ok(())
    }
}

fn unwanted(requeue: bool) -> Settlement {
    if requeue { Settlement::Requeue } else { Settlement::Discard }
}
