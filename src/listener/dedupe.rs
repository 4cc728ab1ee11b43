//! Listeners that leave out messages they have handled before, as far as their memory goes.

use std::collections::{HashSet, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::ListenerBuilder;
use crate::outcome::Outcome;

/// How many ids are kept at most.
const MOST: usize = 100_000;

/// The ids of messages that were handled, for a while.
#[derive(Debug)]
struct Seen {
    window: Duration,
    ids: HashSet<String>,
    /// In the order in which they were noted.
    order: VecDeque<(Instant, String)>,
}

impl Seen {
    fn new(window: Duration) -> Seen {
        Seen { window, ids: HashSet::new(), order: VecDeque::new() }
    }

    fn contains(&mut self, id: &str, now: Instant) -> bool {
        while let Some((at, _)) = self.order.front()
            && now.saturating_duration_since(*at) >= self.window
        {
            self.forget_oldest();
        }
        self.ids.contains(id)
    }

    fn note(&mut self, id: &str, now: Instant) {
        if !self.ids.insert(id.to_owned()) {
            return;
        }
        self.order.push_back((now, id.to_owned()));
        if self.order.len() > MOST {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some((_, id)) = self.order.pop_front() {
            self.ids.remove(&id);
        }
    }
}

impl ListenerBuilder {
    /// Acks a message without calling the handler if one of the same `message_id` was handled by this listener within the last
    /// `window`. Defaults to calling it for every message.
    ///
    /// The ids are kept in memory, the last 100,000 of them. They are gone when the program ends, other programs do not have them, and
    /// a message that two threads of this listener have at the same time is handled twice. So it spares work, and promises nothing: what
    /// must happen once needs an [inbox](crate::inbox). A message without an id is always handled. Only what was acked counts as
    /// handled.
    pub fn dedupe(self, window: Duration) -> Self {
        let seen = Mutex::new(Seen::new(window));
        self.around(move |context, delivery, handler| {
            let Some(id) = delivery.message().message_id() else { return handler() };
            let lock = || seen.lock().unwrap_or_else(PoisonError::into_inner);
            if lock().contains(id, Instant::now()) {
                let (listener, queue, message_id) = (context.listener(), context.queue(), id);
                log::debug!(
                    listener, queue, message_id;
                    "listener {listener:?}: message from queue {queue:?}, id {id:?}, was handled before"
                );
                return Outcome::Ack;
            }
            let outcome = handler();
            if outcome == Outcome::Ack {
                lock().note(id, Instant::now());
            }
            outcome
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_known_for_the_window_and_no_longer() {
        let (mut seen, start) = (Seen::new(Duration::from_secs(10)), Instant::now());
        seen.note("a", start);
        seen.note("b", start + Duration::from_secs(5));
        assert!(seen.contains("a", start + Duration::from_secs(9)));
        assert!(!seen.contains("a", start + Duration::from_secs(10)));
        assert!(seen.contains("b", start + Duration::from_secs(10)));
        assert_eq!((seen.ids.len(), seen.order.len()), (1, 1));
    }

    #[test]
    fn no_more_than_the_limit_are_kept() {
        let (mut seen, now) = (Seen::new(Duration::from_secs(10)), Instant::now());
        (0..=MOST).for_each(|id| seen.note(&id.to_string(), now));
        assert_eq!((seen.ids.len(), seen.order.len()), (MOST, MOST));
        assert!(!seen.contains("0", now) && seen.contains("1", now));
    }
}
