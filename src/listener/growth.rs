//! When a listener has one thread more, and when one less.
//!
//! The supervisor looks every [`LOOK`]. Threads note for how long they have had nothing to do.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::pace::Concurrency;

/// How often it is looked.
pub(super) const LOOK: Duration = Duration::from_millis(250);
/// How much of the time a thread handles that counts as busy. One with a prefetch of 1 also waits for the broker.
const BUSY: f64 = 0.5;
/// How much of the others' time the work may take up if one is to be given up. Less than [`BUSY`], so that the next look does not
/// bring it back.
const EASY: f64 = 0.4;
/// How long after a thread could not be started another one is tried.
const AFTER_FAILURE: Duration = Duration::from_secs(60);

/// For how long a thread has had nothing to do, in microseconds since an instant of the reader's choice.
#[derive(Debug, Default)]
pub(super) struct IdleTime {
    /// When it began to wait; 0 while it does not.
    since: AtomicU64,
    total: AtomicU64,
}

impl IdleTime {
    /// For the thread itself: it waits from now on.
    pub(super) fn begin(&self, now: u64) {
        self.since.store(now.max(1), Ordering::Relaxed);
    }

    /// For the thread itself: it does not wait any more.
    pub(super) fn end(&self, now: u64) {
        let since = self.since.swap(0, Ordering::Relaxed);
        self.total.fetch_add(now.saturating_sub(since), Ordering::Relaxed);
    }

    /// All of it, with what has not ended yet. A look in the middle of [`end`](Self::end) may find a little less.
    pub(super) fn total(&self, now: u64) -> u64 {
        let since = match self.since.load(Ordering::Relaxed) {
            0 => now,
            since => since,
        };
        self.total.load(Ordering::Relaxed) + now.saturating_sub(since)
    }
}

/// What is to be done about the number of threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Advice {
    Stay,
    OneMore,
    OneLess,
}

/// Of one queue of a listener.
#[derive(Debug)]
pub(super) struct Growth {
    concurrency: Concurrency,
    /// Since when one less would have done.
    easy_since: Option<Instant>,
    not_before: Option<Instant>,
}

impl Growth {
    pub(super) fn new(concurrency: Concurrency) -> Growth {
        Growth { concurrency, easy_since: None, not_before: None }
    }

    /// What to do, by the part of the time since the last look that each thread was busy. `messages_wait` is asked only if it
    /// matters.
    pub(super) fn advise(&mut self, now: Instant, busy: &[f64], messages_wait: impl FnOnce() -> bool) -> Advice {
        let threads = busy.len();
        let work: f64 = busy.iter().sum();
        let is_easy = threads > self.concurrency.least() && work <= EASY * (threads - 1) as f64;
        if is_easy {
            let since = *self.easy_since.get_or_insert(now);
            if now.saturating_duration_since(since) < self.concurrency.shrink_after() {
                return Advice::Stay;
            }
            self.easy_since = None;
            return Advice::OneLess;
        }
        self.easy_since = None;
        let may_grow = threads < self.concurrency.most() && self.not_before.is_none_or(|not_before| now >= not_before);
        if may_grow && busy.iter().all(|busy| *busy >= BUSY) && messages_wait() {
            Advice::OneMore
        } else {
            Advice::Stay
        }
    }

    /// A thread more could not be had.
    pub(super) fn has_failed(&mut self, now: Instant) {
        self.not_before = Some(now + AFTER_FAILURE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn growth() -> Growth {
        Growth::new(Concurrency::from(1..=3).with_shrink_after(10 * SECOND))
    }

    #[test]
    fn it_grows_while_all_are_busy_and_messages_wait() {
        let (mut growth, now) = (growth(), Instant::now());
        assert_eq!(growth.advise(now, &[1.0], || false), Advice::Stay);
        assert_eq!(growth.advise(now, &[1.0], || true), Advice::OneMore);
        assert_eq!(growth.advise(now, &[1.0, 0.2], || panic!("it is not asked")), Advice::Stay);
        assert_eq!(growth.advise(now, &[0.9, 0.8], || true), Advice::OneMore);
        assert_eq!(growth.advise(now, &[1.0, 1.0, 1.0], || panic!("there is no more")), Advice::Stay);
    }

    #[test]
    fn it_shrinks_by_one_after_a_while_in_which_one_less_would_have_done() {
        let (mut growth, now) = (growth(), Instant::now());
        let idle = [0.1, 0.1, 0.1];
        let mut at = |seconds, busy: &[f64]| growth.advise(now + seconds * SECOND, busy, || false);
        assert_eq!(at(0, &idle), Advice::Stay);
        assert_eq!(at(9, &idle), Advice::Stay);
        assert_eq!(at(10, &idle), Advice::OneLess);
        assert_eq!(at(11, &idle[1..]), Advice::Stay);
        assert_eq!(at(12, &[0.9, 0.9]), Advice::Stay, "there is work again");
        assert_eq!(at(13, &idle[1..]), Advice::Stay);
        assert_eq!(at(22, &idle[1..]), Advice::Stay);
        assert_eq!(at(23, &idle[1..]), Advice::OneLess);
        assert_eq!(at(100, &[0.0]), Advice::Stay);
        assert_eq!(at(200, &[0.0]), Advice::Stay, "the least stays");
    }

    #[test]
    fn what_is_given_up_does_not_come_back_at_once() {
        let (mut growth, now) = (growth(), Instant::now());
        // The work of 0.79 threads is too much for one of two, and too little to have more than two.
        assert_eq!(growth.advise(now, &[0.4, 0.39], || true), Advice::Stay);
        assert_eq!(growth.advise(now + 100 * SECOND, &[0.4, 0.39], || true), Advice::Stay);
    }

    #[test]
    fn after_a_failure_it_waits_a_minute() {
        let (mut growth, now) = (growth(), Instant::now());
        growth.has_failed(now);
        assert_eq!(growth.advise(now + 59 * SECOND, &[1.0], || true), Advice::Stay);
        assert_eq!(growth.advise(now + 60 * SECOND, &[1.0], || true), Advice::OneMore);
    }

    #[test]
    fn idle_time_counts_what_has_not_ended() {
        let idle = IdleTime::default();
        idle.begin(0);
        assert_eq!(idle.total(50), 49);
        idle.end(100);
        assert_eq!(idle.total(500), 99);
        idle.begin(600);
        assert_eq!(idle.total(650), 149);
    }
}
