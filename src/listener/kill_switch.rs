//! Whether most of the messages of late have failed.
//!
//! Time is cut into slices, of which the last few are kept: a count for each, whatever the rate.

use std::collections::VecDeque;
use std::time::Instant;

use crate::pace::PauseOnFailures;

/// In how many slices the time is cut that counts.
const SLICES: u32 = 12;

#[derive(Debug)]
struct Slice {
    began: Instant,
    handled: u64,
    failed: u64,
}

/// Counts what has been handled, and what of it has failed.
#[derive(Debug)]
pub(super) struct KillSwitch {
    policy: PauseOnFailures,
    slices: VecDeque<Slice>,
}

/// Too many have failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Trip {
    pub(super) handled: u64,
    pub(super) failed: u64,
}

impl KillSwitch {
    pub(super) fn new(policy: PauseOnFailures) -> KillSwitch {
        KillSwitch { policy, slices: VecDeque::new() }
    }

    pub(super) fn policy(&self) -> &PauseOnFailures {
        &self.policy
    }

    /// Counts a message. Says so if too many have failed with it.
    pub(super) fn record(&mut self, has_failed: bool, now: Instant) -> Option<Trip> {
        let within = self.policy.within;
        while self.slices.front().is_some_and(|slice| now.saturating_duration_since(slice.began) >= within) {
            self.slices.pop_front();
        }
        let is_current = |slice: &&mut Slice| now.saturating_duration_since(slice.began) < within / SLICES;
        match self.slices.back_mut().filter(is_current) {
            Some(slice) => {
                slice.handled += 1;
                slice.failed += u64::from(has_failed);
            }
            None => self.slices.push_back(Slice { began: now, handled: 1, failed: has_failed.into() }),
        }
        if !has_failed {
            return None;
        }
        let handled: u64 = self.slices.iter().map(|slice| slice.handled).sum();
        let failed: u64 = self.slices.iter().map(|slice| slice.failed).sum();
        let has_tripped = handled >= u64::from(self.policy.min) && failed as f64 >= self.policy.ratio * handled as f64;
        has_tripped.then_some(Trip { handled, failed })
    }

    /// What was counted so far counts no more.
    pub(super) fn clear(&mut self) {
        self.slices.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn switch(min: u32, ratio: f64) -> KillSwitch {
        let minute = Duration::from_secs(60);
        KillSwitch::new(PauseOnFailures::new(min, ratio, minute, minute).unwrap())
    }

    /// Messages in a row, of which `f` fails; at which of them it trips.
    fn trips_at(switch: &mut KillSwitch, messages: &str, now: Instant) -> Option<usize> {
        messages.chars().position(|message| switch.record(message == 'f', now).is_some())
    }

    #[test]
    fn it_trips_at_the_ratio_and_not_before_the_least_number() {
        let now = Instant::now();
        assert_eq!(trips_at(&mut switch(4, 0.5), "ffff", now), Some(3));
        assert_eq!(trips_at(&mut switch(4, 0.5), "aaff", now), Some(3));
        assert_eq!(trips_at(&mut switch(4, 0.5), "aaaffaa", now), None);
        assert_eq!(trips_at(&mut switch(4, 0.5), "aaafff", now), Some(5));
        assert_eq!(trips_at(&mut switch(1, 1.0), "f", now), Some(0));
        assert_eq!(trips_at(&mut switch(1, 1.0), "affff", now), None);
    }

    #[test]
    fn success_trips_nothing() {
        let now = Instant::now();
        assert_eq!(trips_at(&mut switch(4, 0.5), "fffa", now), None);
    }

    #[test]
    fn what_is_long_ago_does_not_count() {
        let (mut switch, start) = (switch(4, 0.5), Instant::now());
        assert_eq!(trips_at(&mut switch, "fff", start), None);
        let later = start + Duration::from_secs(61);
        assert_eq!(trips_at(&mut switch, "fff", later), None);
        assert_eq!(trips_at(&mut switch, "f", later + Duration::from_secs(50)), Some(0));
    }

    #[test]
    fn after_clearing_it_counts_anew() {
        let (mut switch, now) = (switch(4, 0.5), Instant::now());
        assert_eq!(trips_at(&mut switch, "fff", now), None);
        switch.clear();
        assert_eq!(trips_at(&mut switch, "fff", now), None);
    }

    #[test]
    fn it_keeps_few_counts_whatever_the_rate() {
        let (mut switch, start) = (switch(u32::MAX, 1.0), Instant::now());
        for milliseconds in 0..200_000 {
            switch.record(true, start + Duration::from_millis(milliseconds));
        }
        assert!(switch.slices.len() <= SLICES as usize + 1, "{}", switch.slices.len());
        let kept: u64 = switch.slices.iter().map(|slice| slice.handled).sum();
        assert!((55_000..=60_000).contains(&kept), "{kept}");
    }
}
