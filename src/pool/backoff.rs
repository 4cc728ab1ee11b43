//! How long to wait between attempts: each time twice as long, up to a limit, and less up to a quarter at random, so that many
//! who have lost the same broker do not come back to it at the same moment.

use std::time::Duration;

#[derive(Debug)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    pub(crate) const fn new(first: Duration, longest: Duration) -> Backoff {
        Backoff { first, longest, next: first }
    }

    /// Between attempts to connect: 50 ms at first, 1 s at most.
    pub(crate) const fn of_connecting() -> Backoff {
        Backoff::new(Duration::from_millis(50), Duration::from_secs(1))
    }

    /// How long to wait before the next attempt.
    pub(crate) fn next(&mut self) -> Duration {
        let wait = self.next.mul_f64(1.0 - fastrand::f64() / 4.0);
        self.next = (self.next * 2).min(self.longest);
        wait
    }

    /// The next wait is a first one again.
    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_wait_is_twice_the_one_before_less_a_quarter_at_most_until_it_is_reset() {
        let mut backoff = Backoff::of_connecting();
        for full in [50, 100, 200, 400, 800, 1000, 1000] {
            let (wait, full) = (backoff.next(), Duration::from_millis(full));
            assert!(wait <= full && wait >= full * 3 / 4, "{wait:?} of {full:?}");
        }
        backoff.reset();
        assert!(backoff.next() <= Duration::from_millis(50));
    }
}
