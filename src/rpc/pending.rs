//! Calls with a callback that wait for a channel: in the order in which they came, each with its deadline.
//!
//! No I/O and no lock. Nothing here looks at all of them for the sake of one.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use super::flight::{Answered, Asker, Call, during};
use crate::error::Error;
use crate::message::Message;

/// A call that waits for a channel.
pub(super) struct Pending {
    pub(super) message: Message,
    pub(super) call: Call,
}

impl Pending {
    /// The callback, and the answer that it gets.
    fn answered(self, error: impl FnOnce(&Call) -> Error) -> Option<Answered> {
        let error = error(&self.call);
        match self.call.asker {
            Asker::Callback(callback) => Some(Answered { callback, result: Err(error) }),
            Asker::Thread(_) => None,
        }
    }
}

/// See the [module](self).
#[derive(Default)]
pub(super) struct Waiting {
    last: u64,
    calls: BTreeMap<u64, Pending>,
    deadlines: BTreeSet<(Instant, u64)>,
}

impl Waiting {
    pub(super) fn push(&mut self, pending: Pending) {
        self.last += 1;
        self.deadlines.insert((pending.call.deadline, self.last));
        self.calls.insert(self.last, pending);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// When the first deadline is.
    pub(super) fn due(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// All of them, the first one first.
    pub(super) fn take(&mut self) -> impl Iterator<Item = Pending> + use<> {
        self.deadlines.clear();
        std::mem::take(&mut self.calls).into_values()
    }

    /// Calls whose time is over get the cause, or are told so.
    pub(super) fn expire(&mut self, now: Instant, reason: Option<&Error>, answered: &mut Vec<Answered>) {
        while let Some((deadline, number)) = self.deadlines.first().copied()
            && deadline <= now
        {
            self.deadlines.pop_first();
            let timed_out = |call: &Call| match reason {
                Some(reason) => reason.clone(),
                None => Error::Timeout { during: during(&call.queue), after: call.timeout },
            };
            answered.extend(self.calls.remove(&number).and_then(|pending| pending.answered(timed_out)));
        }
    }

    /// All of them get this error.
    pub(super) fn fail(&mut self, error: &Error, answered: &mut Vec<Answered>) {
        answered.extend(self.take().filter_map(|pending| pending.answered(|_| error.clone())));
    }
}
