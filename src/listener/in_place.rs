//! A message of a partition that has failed: it is tried again before any other of its partition.

use std::time::{Duration, Instant};

use super::count;
use super::settling::Settling;
use super::worker::Worker;
use crate::connection::Received;
use crate::error::Result;
use crate::outcome::Outcome;

/// How long the only other attempt waits where there is no policy.
const ONCE_MORE_AFTER: Duration = Duration::from_millis(100);

/// A failed message, which is handled again.
pub(super) struct Again {
    pub(super) tag: u64,
    pub(super) received: Received,
    /// How often it has failed.
    pub(super) failures: u32,
    /// When it is handled next.
    pub(super) due: Instant,
}

impl Worker<'_> {
    /// Decides what becomes of a message that has failed so many times now, with a failure for its outcome.
    pub(super) fn failed_in_place(
        &self,
        tag: u64,
        received: Received,
        failures: u32,
        outcome: &Outcome,
        settling: &mut Settling<'_>,
    ) -> Result<Option<Again>> {
        let now = Instant::now();
        let reason = outcome.failure().unwrap_or_default().to_owned();
        let pauses = &self.shared.pauses;
        if pauses.counts_failures() && pauses.record(Some(&reason), now) {
            return settling.give_back(tag, &received, outcome).map(|()| None);
        }
        let delay = match &self.route().spec.retry {
            Some(policy) => policy.delay_after(failures),
            None => (failures == 1).then_some(ONCE_MORE_AFTER),
        };
        let Some(delay) = delay else {
            return settling.give_up(tag, &received, failures, reason).map(|()| None);
        };
        let (listener, queue, id) = (self.shared.name.as_str(), self.queue(), received.message().message_id());
        let message_id = id.unwrap_or_default();
        log::warn!(
            listener, queue, message_id, outcome = "retried";
            "listener {listener:?}: message from queue {queue:?}, id {id:?}: {reason}; its partition waits, and it is tried \
             again in {delay:?}"
        );
        count(&self.shared.counters.retried);
        self.meter().retried.one();
        Ok(Some(Again { tag, received, failures, due: now + delay }))
    }
}
