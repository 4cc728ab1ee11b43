//! Deliveries that their handler settles by itself, whenever and wherever it likes.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Weak};

use crossbeam_channel::Sender;

use crate::connection::Received;
use crate::error::{Error, Result};
use crate::session::{Settlement, Waker};

/// What the worker is asked to settle.
pub(super) struct Settle {
    pub(super) how: Settlement,
    pub(super) tag: u64,
}

/// A message that is its holder's to settle, now or later, here or on another thread.
///
/// Dropped unsettled, it goes back into its queue the first time, and is rejected if it had been redelivered already.
///
/// It knows the session it came in. Once that has ended, by a reconnect for example, the broker has requeued the
/// message, settling it is [`Error::StaleDelivery`], and no other message is ever settled in its place.
pub struct Unsettled {
    received: Received,
    /// To the worker it came from; `None` once settled.
    claim: Option<(Sender<Settle>, Arc<Waker>)>,
    tag: u64,
    /// Ends with the session.
    session: Weak<()>,
}

impl fmt::Debug for Unsettled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unsettled").field("received", &self.received).finish_non_exhaustive()
    }
}

impl Deref for Unsettled {
    type Target = Received;

    fn deref(&self) -> &Received {
        &self.received
    }
}

impl Unsettled {
    pub(super) fn new(
        received: Received,
        worker: (Sender<Settle>, Arc<Waker>),
        session: Weak<()>,
        tag: u64,
    ) -> Unsettled {
        Unsettled { received, claim: Some(worker), tag, session }
    }

    /// Whether the session it came in has ended, so that settling it would be [`Error::StaleDelivery`]. The message is back
    /// in its queue, or with somebody else.
    pub fn is_stale(&self) -> bool {
        self.session.strong_count() == 0
    }

    /// Tells the broker that the message has been dealt with, and gives back what was received.
    ///
    /// # Errors
    ///
    /// [`Error::StaleDelivery`] if the session it came in has ended.
    pub fn ack(mut self) -> Result<Received> {
        self.settle(Settlement::Ack)?;
        Ok(std::mem::replace(&mut self.received, Received::nothing()))
    }

    /// Acks this message and all that came before it to the same thread of the listener, in one go.
    ///
    /// # Errors
    ///
    /// [`Error::StaleDelivery`] if the session it came in has ended.
    pub fn ack_up_to(mut self) -> Result<()> {
        self.settle(Settlement::AckUpTo)
    }

    /// Gives the message up: dead-lettered where the queue says where to, dropped otherwise.
    ///
    /// # Errors
    ///
    /// [`Error::StaleDelivery`] if the session it came in has ended.
    pub fn reject(mut self) -> Result<()> {
        self.settle(Settlement::Reject)
    }

    /// Puts the message back into its queue.
    ///
    /// # Errors
    ///
    /// [`Error::StaleDelivery`] if the session it came in has ended; the broker has requeued it by itself.
    pub fn requeue(mut self) -> Result<()> {
        self.settle(Settlement::Requeue)
    }

    fn settle(&mut self, how: Settlement) -> Result<()> {
        let Some((worker, waker)) = self.claim.take() else { return Ok(()) };
        waker.check_process()?;
        worker.send(Settle { how, tag: self.tag }).map_err(|_| Error::StaleDelivery)?;
        waker.wake();
        Ok(())
    }
}

impl Drop for Unsettled {
    fn drop(&mut self) {
        let how = if self.received.redelivered() { Settlement::Reject } else { Settlement::Requeue };
        // If the session has ended the message is back in its queue.
        let _ = self.settle(how);
    }
}
