//! What is said of a listener's pace: its threads, its rate, and when it rests.

use std::time::Duration;

use super::ListenerBuilder;
use super::route::Handler;
use crate::error::{Error, Result};
use crate::pace::{Concurrency, PauseOnFailures, check_rate};

/// What the pool's prefetch counts up to where the number of threads varies: what is sent ahead to one is nothing for another.
const MOST_AHEAD_OF_A_RANGE: u16 = 8;

impl ListenerBuilder {
    /// How many threads handle messages, each with a channel and a consumer of its own: a number, or a range within which it
    /// varies; 0 counts as 1. With more than one, messages are handled in no particular order. Defaults to the pool's
    /// `concurrency`, which is 1 unless the settings say otherwise.
    ///
    /// With a range such as `1..=8` it begins with the smaller number. It has one more while messages wait and every thread is
    /// busy, which it looks at four times a second. It has one less when one less would have done for 30 s, or for
    /// [`shrink_after`](Concurrency::with_shrink_after). One that is given up handles what had been sent to it before it ends.
    ///
    /// Messages that have been sent ahead to one thread are not handled by another. So the pool's `prefetch` counts up to 8 for a
    /// range; [`prefetch`](Self::prefetch) sets what it is to be.
    pub fn concurrency(mut self, threads: impl Into<Concurrency>) -> Self {
        self.concurrency = threads.into();
        self
    }

    /// How many messages are handled in a second at most, from one a day to a million, by all threads together. Defaults to the
    /// pool's `max_rate`, which is none unless the settings say otherwise.
    ///
    /// They are handled at even distances. A listener that was late may catch up for 10 ms; time in which there was nothing to do
    /// is not saved up. A message that waits for its time counts as held by this consumer, so a slow rate wants a small
    /// [`prefetch`](Self::prefetch). A batch is handed out whole, and the next one when its messages' time has passed.
    pub fn max_rate(mut self, per_second: impl Into<f64>) -> Self {
        self.max_rate = Some(per_second.into());
        self
    }

    /// Has it rest for `pause` when most messages fail, as they do while a database is down: when of at least `min` messages that
    /// were handled `within` the last while that `ratio` has failed. Defaults to the pool's `pause_on_failures`, which is none
    /// unless the settings say otherwise.
    ///
    /// ```no_run
    /// # fn main() -> coney::Result<()> {
    /// # let app = coney::App::from_file("app.toml")?;
    /// use std::time::Duration;
    ///
    /// app.listener("orders")
    ///     .pause_on_failures(20, 0.5, Duration::from_secs(60), Duration::from_secs(30))
    ///     .spawn(|_context, delivery| store(delivery.body()))?
    ///     .detach();
    /// # fn store(_: &[u8]) -> std::io::Result<()> { Ok(()) }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// While it rests it has no consumer, and its [state](crate::Listener::state) is
    /// [`Paused`](crate::ListenerState::Paused). After the pause it tries one message, of each queue if it has several. If that one
    /// is dealt with, it goes on; if it fails, it rests again.
    ///
    /// From the failure that makes it rest until it goes on, a message that fails goes back into its queue: it is not put away,
    /// and not moved to the dead. A quorum queue counts that as a delivery, though
    /// ([`Queue::delivery_limit`](crate::Queue::delivery_limit)).
    ///
    /// An error, a panic, [`Outcome::Retry`](crate::Outcome::Retry) and [`Outcome::Requeue`](crate::Outcome::Requeue) are failures.
    /// A message that cannot be decoded or is rejected is not: it says nothing about the next one. `min` is 1 at least, `ratio`
    /// above 0 and at most 1, `within` and `pause` more than zero and at most a day; [`spawn`](Self::spawn) checks that.
    pub fn pause_on_failures(mut self, min: u32, ratio: f64, within: Duration, pause: Duration) -> Self {
        self.pause_on_failures = Some(PauseOnFailures { min, ratio, within, pause });
        self.pause_of_pool = false;
        self
    }

    /// Never rests by itself, whatever the pool has.
    pub fn without_pause_on_failures(mut self) -> Self {
        self.pause_on_failures = None;
        self.pause_of_pool = false;
        self
    }

    /// Checks how it is paced, and fits the prefetch to it.
    pub(super) fn check_pace(&mut self, handler: &Handler) -> Result<()> {
        self.concurrency.check().map_err(|problem| Error::invalid("concurrency", problem))?;
        self.max_rate.map_or(Ok(()), check_rate).map_err(|problem| Error::invalid("max_rate", problem))?;
        if let Some(policy) = &self.pause_on_failures {
            policy.check_as_argument()?;
        }
        if self.pause_on_failures.is_some() && !self.pause_of_pool && !handler.has_outcomes() {
            let problem =
                "the handler of spawn_manual has no outcomes that could be counted; expected pause() and resume()";
            return Err(Error::invalid("pause_on_failures", problem));
        }
        if self.concurrency.varies() && self.prefetch_of_pool {
            self.prefetch = self.prefetch.min(MOST_AHEAD_OF_A_RANGE.max(handler.batch_size()));
        }
        Ok(())
    }
}
