//! What a transactional channel has done since its last commit: nothing of it has happened yet.

use std::sync::Arc;
use std::time::Duration;

use super::exchange::QueueId;
use super::ledger::{Ledger, Unacked};
use super::message::Message;

/// How a delivery is settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Settlement {
    Ack,
    Requeue,
    /// Its channel has gone, so it goes back.
    Return,
    /// Dead-letters or drops it.
    Discard,
}

/// A message that has been routed.
#[derive(Debug)]
pub(super) struct Routed {
    pub(super) message: Arc<Message>,
    /// Of the message itself; a queue may have a shorter one.
    pub(super) ttl: Option<Duration>,
    pub(super) mandatory: bool,
    pub(super) queues: Vec<QueueId>,
}

#[derive(Debug, Default)]
pub(super) struct Transaction {
    pub(super) publishes: Vec<Routed>,
    pub(super) settlements: Vec<(Settlement, Vec<Unacked>)>,
}

impl Transaction {
    /// Ends without a commit: what was settled in it is unsettled again.
    pub(super) fn roll_back(self, ledger: &mut Ledger) {
        self.settlements.into_iter().flat_map(|(_, taken)| taken).for_each(|unacked| ledger.put_back(unacked));
    }
}
