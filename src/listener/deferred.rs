//! Deliveries that wait for the confirm of what their handler has published, and those that came after them: they are
//! settled in order, for one ack may speak for all before it.
//!
//! So a worker that answers goes on with the next request while the broker confirms the answer to the last. For the thread
//! that handles and publishes; no locks.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::connection::confirms::Call;
use crate::connection::{Connection, Received};
use crate::error::Result;
use crate::outcome::Outcome;

/// Told what became of the message, says what becomes of the delivery.
type Then = Box<dyn FnOnce(&Connection, Result<()>) -> Outcome>;

/// What becomes of a delivery once a message is confirmed or is not.
pub(crate) struct AfterConfirm {
    pub(crate) call: Arc<Call>,
    pub(crate) then: Then,
}

enum Fate {
    Known(Outcome),
    After(AfterConfirm),
}

/// A delivery that is not settled.
struct Entry {
    tag: u64,
    received: Received,
    fate: Fate,
}

/// See the [module](self).
#[derive(Default)]
pub(super) struct Deferred(VecDeque<Entry>);

impl Deferred {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A delivery whose fate depends on a confirm.
    pub(super) fn push(&mut self, tag: u64, received: Received, after: AfterConfirm) {
        self.0.push_back(Entry { tag, received, fate: Fate::After(after) });
    }

    /// A delivery whose fate is known, behind others whose is not.
    pub(super) fn push_known(&mut self, tag: u64, received: Received, outcome: Outcome) {
        self.0.push_back(Entry { tag, received, fate: Fate::Known(outcome) });
    }

    /// What the oldest one waits for, if it does.
    pub(super) fn first(&self) -> Option<&Arc<Call>> {
        match &self.0.front()?.fate {
            Fate::After(after) => Some(&after.call),
            Fate::Known(_) => None,
        }
    }

    /// The oldest one, if its fate is known by now.
    pub(super) fn pop(&mut self, connection: &Connection) -> Option<(u64, Received, Outcome)> {
        if self.first().is_some_and(|call| call.open() > 0) {
            return None;
        }
        let Entry { tag, received, fate } = self.0.pop_front()?;
        let outcome = match fate {
            Fate::Known(outcome) => outcome,
            Fate::After(AfterConfirm { call, then }) => {
                let confirmed = call.take_failures().pop().map_or(Ok(()), |(_, error)| Err(error));
                then(connection, confirmed)
            }
        };
        Some((tag, received, outcome))
    }
}
