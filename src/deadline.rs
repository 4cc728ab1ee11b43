//! Moments by which something is to be done.

use std::time::{Duration, Instant};

/// The longest wait that is told from waiting for ever.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// The moment `timeout` from now, also for a time-out that is beyond what a clock can count.
pub(crate) fn after(timeout: Duration) -> Instant {
    Instant::now() + timeout.min(LONGEST)
}
