//! Waiting for a broker that is not there yet.

use std::panic::Location;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};

use super::{Backoff, Pool, Tries};
use crate::error::{Error, Result};

/// The first wait between two attempts, and the longest.
const FIRST: Duration = Duration::from_millis(250);
const LONGEST: Duration = Duration::from_secs(5);

/// What ends such a wait before its time.
#[derive(Debug, Clone)]
pub(crate) struct Patience {
    /// The app has been told to shut down.
    pub(crate) told_to_end: Receiver<()>,
    /// To pass that on to whoever else waits for it.
    pub(crate) end: Sender<()>,
}

impl Patience {
    /// Waits; returns whether the app has been told to shut down.
    fn wait(&self, wait: Duration) -> bool {
        let told = self.told_to_end.recv_timeout(wait).is_ok();
        if told {
            // Full: it has been told again.
            let _ = self.end.try_send(());
        }
        told
    }
}

impl Pool {
    /// Waits until a connection can be had, at most until `deadline`. Logs a line for each attempt that fails.
    #[track_caller]
    pub(crate) fn wait_for_broker(&self, deadline: Instant, patience: &Patience) -> Result<()> {
        let (pool, location) = (self.name(), Location::caller());
        let mut backoff = Backoff::new(FIRST, LONGEST);
        let mut attempt = 0_u32;
        loop {
            attempt = attempt.saturating_add(1);
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = left.min(self.settings().checkout_timeout);
            let error = match self.checkout(timeout, Tries::One, location) {
                Ok(_) => return Ok(()),
                // Whoever has them all has reached the broker.
                Err(Error::PoolExhausted { .. }) => return Ok(()),
                Err(error) => error,
            };
            let wait = backoff.next();
            let left = deadline.saturating_duration_since(Instant::now());
            if !error.is_transient() || wait >= left {
                return Err(error);
            }
            log::warn!(pool, attempt; "waiting for the broker: {error}; the next attempt in {wait:.1?}, {left:.0?} are left");
            if patience.wait(wait) {
                return Err(error);
            }
        }
    }
}
