//! The counters, gauges and histograms of a pool and of a listener. Without the feature `metrics` everything in here is
//! empty and compiles to nothing.
//!
//! What they are called, and what they mean, is in [`crate::metrics`].

use std::fmt;

use super as names;
use crate::error::{Error, Result};

type Labels<'a> = &'a [(&'static str, &'a str)];

/// One handle to what a recorder keeps, made once.
macro_rules! handle {
    ($(#[$doc:meta])* $handle:ident, $make:ident) => {
        $(#[$doc])*
        #[derive(Clone)]
        pub(crate) struct $handle {
            #[cfg(feature = "metrics")]
            inner: ::metrics::$handle,
        }

        impl fmt::Debug for $handle {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(stringify!($handle))
            }
        }

        impl $handle {
            #[cfg(feature = "metrics")]
            fn new(name: &'static str, labels: Labels<'_>) -> $handle {
                let labels: Vec<::metrics::Label> =
                    labels.iter().map(|(name, value)| ::metrics::Label::new(*name, (*value).to_owned())).collect();
                $handle { inner: ::metrics::$make!(name, labels) }
            }

            #[cfg(not(feature = "metrics"))]
            fn new(_: &'static str, _: Labels<'_>) -> $handle {
                $handle {}
            }
        }
    };
}

handle!(Counter, counter);
handle!(Gauge, gauge);
handle!(Histogram, histogram);

impl Counter {
    #[inline]
    pub(crate) fn one(&self) {
        self.add(1);
    }

    #[inline]
    #[cfg_attr(not(feature = "metrics"), expect(unused_variables, reason = "nothing is counted"))]
    pub(crate) fn add(&self, count: u64) {
        #[cfg(feature = "metrics")]
        self.inner.increment(count);
    }
}

impl Gauge {
    #[inline]
    #[cfg_attr(not(feature = "metrics"), expect(unused_variables, reason = "nothing is counted"))]
    fn change(&self, by: f64) {
        #[cfg(feature = "metrics")]
        self.inner.increment(by);
    }

    /// It is so much.
    #[cfg(feature = "outbox")]
    #[cfg_attr(not(feature = "metrics"), expect(unused_variables, reason = "nothing is counted"))]
    fn set(&self, to: f64) {
        #[cfg(feature = "metrics")]
        self.inner.set(to);
    }

    /// One more, for as long as the level lives.
    #[inline]
    pub(crate) fn one(&self) -> Level {
        self.raise(1)
    }

    /// That many more, for as long as the level lives.
    #[inline]
    fn raise(&self, by: u32) -> Level {
        self.change(by.into());
        Level {
            #[cfg(feature = "metrics")]
            gauge: self.inner.clone(),
            #[cfg(feature = "metrics")]
            by: by.into(),
        }
    }
}

/// What something adds to a gauge while it lives.
#[must_use]
pub(crate) struct Level {
    #[cfg(feature = "metrics")]
    gauge: ::metrics::Gauge,
    #[cfg(feature = "metrics")]
    by: f64,
}

impl fmt::Debug for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Level")
    }
}

#[cfg(feature = "metrics")]
impl Drop for Level {
    fn drop(&mut self) {
        self.gauge.decrement(self.by);
    }
}

impl Histogram {
    #[inline]
    #[cfg_attr(not(feature = "metrics"), expect(unused_variables, reason = "nothing is measured"))]
    pub(crate) fn record(&self, since: Timer) {
        #[cfg(feature = "metrics")]
        self.inner.record(since.start.elapsed());
    }
}

/// When something began. Looks at no clock if nobody asks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timer {
    #[cfg(feature = "metrics")]
    start: std::time::Instant,
}

impl Timer {
    #[inline]
    pub(crate) fn start() -> Timer {
        Timer {
            #[cfg(feature = "metrics")]
            start: std::time::Instant::now(),
        }
    }
}

/// What may become of a message that is published, in the words of [`names::PUBLISH_TOTAL`].
const PUBLISHED: [&str; 8] = ["confirmed", "returned", "nacked", "refused", "blocked", "timeout", "lost", "failed"];

/// Where in [`PUBLISHED`] an outcome is.
fn published(outcome: Result<(), &Error>) -> usize {
    match outcome {
        Ok(()) => 0,
        Err(Error::Returned { .. }) => 1,
        Err(Error::Nacked { .. }) => 2,
        Err(Error::ChannelClosed { .. } | Error::Refused { .. }) => 3,
        Err(Error::Blocked { .. }) => 4,
        Err(Error::Timeout { .. }) => 5,
        Err(Error::ConnectionLost { .. } | Error::ConnectionClosed { .. }) => LOST,
        Err(_) => 7,
    }
}

const LOST: usize = 6;

/// Of one pool.
pub(crate) struct PoolMeter {
    published: [Counter; PUBLISHED.len()],
    pub(crate) retries: Counter,
    confirm: Histogram,
    in_flight: Gauge,
    pub(crate) in_use: Gauge,
    pub(crate) waiting: Gauge,
    pub(crate) wait: Histogram,
    pub(crate) checkout_failures: Counter,
    pub(crate) open: Gauge,
    pub(crate) opened: Counter,
    pub(crate) discarded: Counter,
    pub(crate) connect_failures: Counter,
    pub(crate) blocked: Gauge,
    _size: Level,
}

impl fmt::Debug for PoolMeter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PoolMeter").finish_non_exhaustive()
    }
}

impl PoolMeter {
    pub(crate) fn new(pool: &str, size: u32) -> PoolMeter {
        let labels: Labels<'_> = &[("pool", pool)];
        PoolMeter {
            published: PUBLISHED
                .map(|outcome| Counter::new(names::PUBLISH_TOTAL, &[("pool", pool), ("outcome", outcome)])),
            retries: Counter::new(names::PUBLISH_RETRIES_TOTAL, labels),
            confirm: Histogram::new(names::CONFIRM_SECONDS, labels),
            in_flight: Gauge::new(names::PUBLISH_IN_FLIGHT, labels),
            in_use: Gauge::new(names::POOL_IN_USE, labels),
            waiting: Gauge::new(names::POOL_WAITING, labels),
            wait: Histogram::new(names::POOL_WAIT_SECONDS, labels),
            checkout_failures: Counter::new(names::POOL_CHECKOUT_FAILURES_TOTAL, labels),
            open: Gauge::new(names::CONNECTIONS_OPEN, labels),
            opened: Counter::new(names::CONNECTIONS_OPENED_TOTAL, labels),
            discarded: Counter::new(names::CONNECTIONS_DISCARDED_TOTAL, labels),
            connect_failures: Counter::new(names::CONNECT_FAILURES_TOTAL, labels),
            blocked: Gauge::new(names::CONNECTIONS_BLOCKED, labels),
            _size: Gauge::new(names::POOL_SIZE, labels).raise(size),
        }
    }

    /// A message is about to be written.
    #[inline]
    pub(crate) fn entered(&self) -> Timer {
        self.in_flight.change(1.0);
        Timer::start()
    }

    /// A message that was entered has been settled.
    #[inline]
    pub(crate) fn settled(&self, since: Timer, outcome: &Result<()>) {
        self.in_flight.change(-1.0);
        self.count(outcome.as_ref().map(|&()| ()));
        if let Ok(()) | Err(Error::Returned { .. } | Error::Nacked { .. }) = outcome {
            self.confirm.record(since);
        }
    }

    /// A message was not written at all.
    #[inline]
    pub(crate) fn not_entered(&self, error: &Error) {
        self.count(Err(error));
    }

    #[inline]
    fn count(&self, outcome: Result<(), &Error>) {
        if cfg!(feature = "metrics") {
            self.published[published(outcome)].one();
        }
    }

    /// Messages that were entered are not waited for any more.
    pub(crate) fn abandoned(&self, count: usize) {
        self.in_flight.change(-(count as f64));
        self.published[LOST].add(count as u64);
    }
}

/// Of one queue of a listener.
pub(crate) struct RouteMeter {
    pub(crate) deliveries: Counter,
    pub(crate) acked: Counter,
    pub(crate) rejected: Counter,
    pub(crate) requeued: Counter,
    pub(crate) retried: Counter,
    pub(crate) dead: Counter,
    pub(crate) panics: Counter,
    pub(crate) handler: Histogram,
    pub(crate) running: Gauge,
    pub(crate) workers: Gauge,
    pub(crate) active: Gauge,
}

impl RouteMeter {
    pub(crate) fn new(listener: &str, queue: &str) -> RouteMeter {
        let labels: Labels<'_> = &[("listener", listener), ("queue", queue)];
        let outcome = |outcome| {
            Counter::new(names::OUTCOMES_TOTAL, &[("listener", listener), ("queue", queue), ("outcome", outcome)])
        };
        RouteMeter {
            deliveries: Counter::new(names::DELIVERIES_TOTAL, labels),
            acked: outcome("acked"),
            rejected: outcome("rejected"),
            requeued: outcome("requeued"),
            retried: outcome("retried"),
            dead: outcome("dead"),
            panics: Counter::new(names::HANDLER_PANICS_TOTAL, labels),
            handler: Histogram::new(names::HANDLER_SECONDS, labels),
            running: Gauge::new(names::HANDLERS_RUNNING, labels),
            workers: Gauge::new(names::LISTENER_WORKERS, labels),
            active: Gauge::new(names::LISTENER_PARTITION_ACTIVE, labels),
        }
    }
}

/// Of one listener.
pub(crate) struct ListenerMeter {
    pub(crate) consuming: Gauge,
    pub(crate) recoveries: Counter,
    pub(crate) paused: Gauge,
    pub(crate) pauses: Counter,
}

impl ListenerMeter {
    pub(crate) fn new(listener: &str) -> ListenerMeter {
        let labels: Labels<'_> = &[("listener", listener)];
        ListenerMeter {
            consuming: Gauge::new(names::LISTENER_CONSUMING, labels),
            recoveries: Counter::new(names::LISTENER_RECOVERIES_TOTAL, labels),
            paused: Gauge::new(names::LISTENER_PAUSED, labels),
            pauses: Counter::new(names::LISTENER_PAUSES_TOTAL, labels),
        }
    }
}

/// Of one outbox.
#[cfg(feature = "outbox")]
pub(crate) struct OutboxMeter {
    pub(crate) forwarded: Counter,
    pub(crate) refused: Counter,
    pending: Gauge,
    oldest: Gauge,
}

#[cfg(feature = "outbox")]
impl OutboxMeter {
    pub(crate) fn new(outbox: &str) -> OutboxMeter {
        let labels: Labels<'_> = &[("outbox", outbox)];
        OutboxMeter {
            forwarded: Counter::new(names::OUTBOX_FORWARDED_TOTAL, labels),
            refused: Counter::new(names::OUTBOX_REFUSED_TOTAL, labels),
            pending: Gauge::new(names::OUTBOX_PENDING, labels),
            oldest: Gauge::new(names::OUTBOX_OLDEST_SECONDS, labels),
        }
    }

    /// So many messages wait, the oldest for so long.
    pub(crate) fn counted(&self, pending: u64, oldest: Option<std::time::Duration>) {
        self.pending.set(pending as f64);
        self.oldest.set(oldest.unwrap_or_default().as_secs_f64());
    }
}
