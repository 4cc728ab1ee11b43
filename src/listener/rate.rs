//! At what rate a listener handles messages: whoever is to handle some is told when to begin.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How far a listener that has been late may catch up. Threads wake up some hundred microseconds after they should; without this
/// the rate would be missed by as much for every message.
const SLACK: Duration = Duration::from_millis(10);

/// A generic cell rate algorithm with a burst of [`SLACK`]: one number says when the next message is due.
///
/// In any span of time there are no more messages than the rate gives for the span and the slack together, and one.
#[derive(Debug)]
pub(super) struct RateLimit {
    interval: Duration,
    /// When the next message is due; a leaf among locks.
    next: Mutex<Option<Instant>>,
}

impl RateLimit {
    pub(super) fn new(per_second: f64) -> RateLimit {
        RateLimit { interval: Duration::from_secs_f64(1.0 / per_second), next: Mutex::default() }
    }

    /// When to begin with so many messages. They count from now on.
    pub(super) fn reserve(&self, messages: u32, now: Instant) -> Instant {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let earliest = now.checked_sub(SLACK).unwrap_or(now);
        let due = next.map_or(now, |next| next.max(earliest));
        *next = Some(due + self.interval * messages);
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_an_interval_apart() {
        let (limit, now) = (RateLimit::new(100.0), Instant::now());
        let due: Vec<u128> = (0..4).map(|_| (limit.reserve(1, now) - now).as_millis()).collect();
        assert_eq!(due, [0, 10, 20, 30]);
    }

    #[test]
    fn many_at_once_take_the_time_of_as_many() {
        let (limit, now) = (RateLimit::new(100.0), Instant::now());
        assert_eq!(limit.reserve(50, now), now);
        assert_eq!(limit.reserve(1, now) - now, Duration::from_millis(500));
    }

    #[test]
    fn idle_time_is_not_saved_up() {
        let (limit, start) = (RateLimit::new(100.0), Instant::now());
        limit.reserve(1, start);
        let later = start + Duration::from_secs(60);
        let begun = (0..100).filter(|_| limit.reserve(1, later) <= later).count();
        assert_eq!(begun, 2);
    }

    /// Whenever messages are asked for, and however late each begins.
    #[test]
    fn no_span_has_more_than_its_share() {
        for seed in 0..200 {
            let mut random = fastrand::Rng::with_seed(seed);
            let per_second = 1.0 + random.f64() * 5000.0;
            let (limit, mut now) = (RateLimit::new(per_second), Instant::now());
            let begun: Vec<Instant> = (0..100)
                .map(|_| {
                    let begins = limit.reserve(1, now).max(now);
                    now = begins + Duration::from_micros(random.u64(..30_000));
                    begins
                })
                .collect();
            for (at, first) in begun.iter().enumerate() {
                for (count, last) in (1_u32..).zip(&begun[at..]) {
                    let most = (*last - *first + SLACK).as_secs_f64() * per_second + 1.001;
                    assert!(f64::from(count) <= most, "seed {seed}: {count} in {:?}", *last - *first);
                }
            }
        }
    }
}
