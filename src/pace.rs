//! How fast a listener works: with how many threads, at what rate, and when it rests.
//!
//! Values only; carrying them out is the work of [`listener`](crate::listener).

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use crate::error::{Error, Result};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// The most threads that settings let a listener have. RabbitMQ lets a connection have 2047 channels by default, and each thread
/// has two at most (<https://www.rabbitmq.com/docs/channels#channel-max>).
pub(crate) const MOST_THREADS: usize = 1000;

/// How many threads handle the messages of a listener: always the same number, or more of them while there is more to do.
///
/// A number turns into one, and a range: `4`, `1..=8`. In settings `4` or `"1-8"`. 0 counts as 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Concurrency {
    least: usize,
    most: usize,
    shrink_after: Duration,
}

impl Concurrency {
    pub(crate) const EXPECTED: &'static str =
        "expected a number of threads or a range, such as 4 or \"1-8\", from 1 to 1000";

    /// What counts as a while of idleness, if nothing else is said.
    const SHRINK_AFTER: Duration = Duration::from_secs(30);

    /// The threads a listener starts with, and never goes below.
    pub fn least(&self) -> usize {
        self.least
    }

    /// The threads it grows to at most.
    pub fn most(&self) -> usize {
        self.most
    }

    /// How long one thread fewer would have done before there is one fewer; at most a day. Defaults to 30 s.
    pub fn with_shrink_after(self, shrink_after: Duration) -> Concurrency {
        Concurrency { shrink_after, ..self }
    }

    /// How long one thread fewer would have done before there is one fewer.
    pub fn shrink_after(&self) -> Duration {
        self.shrink_after
    }

    /// Whether it is a range.
    pub(crate) fn varies(&self) -> bool {
        self.most > self.least
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        if self.most < self.least {
            return Err(format!("it is {self}, expected a range that begins with the smaller number"));
        }
        if self.shrink_after > DAY {
            let got = humantime::format_duration(self.shrink_after);
            return Err(format!("shrink_after is {got}, expected at most 1 day"));
        }
        Ok(())
    }
}

impl Default for Concurrency {
    /// One thread.
    fn default() -> Concurrency {
        Concurrency::from(1)
    }
}

impl From<usize> for Concurrency {
    fn from(threads: usize) -> Concurrency {
        Concurrency::from(threads..=threads)
    }
}

impl From<RangeInclusive<usize>> for Concurrency {
    fn from(threads: RangeInclusive<usize>) -> Concurrency {
        let [least, most] = [*threads.start(), *threads.end()].map(|threads| threads.max(1));
        Concurrency { least, most, shrink_after: Concurrency::SHRINK_AFTER }
    }
}

impl fmt::Display for Concurrency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.least == self.most { self.least.fmt(f) } else { write!(f, "{}-{}", self.least, self.most) }
    }
}

impl FromStr for Concurrency {
    type Err = Error;

    /// Reads `4` or `1-8`, from 1 to 1000.
    fn from_str(text: &str) -> Result<Concurrency> {
        let number = |text: &str| {
            let digits = text.bytes().all(|byte| byte.is_ascii_digit()).then_some(text)?;
            digits.parse().ok().filter(|threads| (1..=MOST_THREADS).contains(threads))
        };
        let (least, most) = text.split_once('-').unwrap_or((text, text));
        match (number(least.trim()), number(most.trim())) {
            (Some(least), Some(most)) if least <= most => Ok(Concurrency::from(least..=most)),
            _ => Err(Error::invalid("concurrency", Concurrency::EXPECTED)),
        }
    }
}

/// When a listener rests because most of its messages fail: see
/// [`ListenerBuilder::pause_on_failures`](crate::ListenerBuilder::pause_on_failures).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PauseOnFailures {
    pub(crate) min: u32,
    pub(crate) ratio: f64,
    pub(crate) within: Duration,
    pub(crate) pause: Duration,
}

impl PauseOnFailures {
    /// Pauses for `pause` when, of at least `min` messages that were handled `within` the last while, that `ratio` has failed.
    ///
    /// `min` is 1 at least, `ratio` above 0 and at most 1, `within` and `pause` more than zero and at most a day.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] for what is out of its range.
    pub fn new(min: u32, ratio: f64, within: Duration, pause: Duration) -> Result<PauseOnFailures> {
        let new = PauseOnFailures { min, ratio, within, pause };
        new.check_as_argument().map(|()| new)
    }

    pub(crate) fn check_as_argument(&self) -> Result<()> {
        self.check().map_err(|(key, problem)| Error::invalid(format!("pause_on_failures, {key}"), problem))
    }

    /// How many messages are to have been handled before anything is concluded from them.
    pub fn min(&self) -> u32 {
        self.min
    }

    /// The part of them that is to have failed.
    pub fn ratio(&self) -> f64 {
        self.ratio
    }

    /// How far back messages count.
    pub fn within(&self) -> Duration {
        self.within
    }

    /// How long the pause is.
    pub fn pause(&self) -> Duration {
        self.pause
    }

    /// What is wrong, and with what.
    pub(crate) fn check(&self) -> Result<(), (&'static str, String)> {
        if self.min == 0 {
            return Err(("min", "expected 1 message at least, got 0".to_owned()));
        }
        if !(self.ratio > 0.0 && self.ratio <= 1.0) {
            return Err(("ratio", format!("expected a number above 0 and at most 1, got {}", self.ratio)));
        }
        for (key, duration) in [("within", self.within), ("pause", self.pause)] {
            if duration.is_zero() || duration > DAY {
                let got = humantime::format_duration(duration);
                return Err((key, format!("expected more than zero and at most 1 day, got {got}")));
            }
        }
        Ok(())
    }
}

impl Default for PauseOnFailures {
    /// 30 s, when half of at least 20 messages within the last minute have failed.
    fn default() -> PauseOnFailures {
        PauseOnFailures { min: 20, ratio: 0.5, within: Duration::from_secs(60), pause: Duration::from_secs(30) }
    }
}

/// Checks a rate in messages per second.
pub(crate) fn check_rate(per_second: f64) -> Result<(), String> {
    // A day for each message is the slowest; beyond a million nothing is held up that a clock could tell.
    const RANGE: RangeInclusive<f64> = 1.0 / 86_400.0..=1e6;
    if RANGE.contains(&per_second) {
        return Ok(());
    }
    Err(format!("expected messages per second, from 1 a day (0.0000116) to 1000000, got {per_second}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_concurrency_is_a_number_or_a_range() {
        let read = |text: &str| text.parse::<Concurrency>().ok().map(|read| (read.least(), read.most()));
        assert_eq!(read("4"), Some((4, 4)));
        assert_eq!(read("1-8"), Some((1, 8)));
        assert_eq!(read(" 2 - 2 "), Some((2, 2)));
        for wrong in ["", "0", "0-8", "8-1", "1001", "-1", "1-", "+1", "1..8", "1-2-3", "many"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_concurrency_is_shown_as_it_is_read() {
        for text in ["4", "1-8"] {
            assert_eq!(text.parse::<Concurrency>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn no_thread_counts_as_one() {
        assert_eq!(Concurrency::from(0), Concurrency::from(1));
        assert_eq!(Concurrency::from(0..=0), Concurrency::default());
    }

    #[test]
    fn each_part_of_a_pause_has_its_range() {
        let (second, long) = (Duration::from_secs(1), Duration::from_secs(100_000));
        assert!(PauseOnFailures::new(1, 1.0, second, second).is_ok());
        let wrong =
            |min, ratio, within, pause| PauseOnFailures::new(min, ratio, within, pause).unwrap_err().to_string();
        assert!(wrong(0, 0.5, second, second).contains("min"));
        for ratio in [0.0, -1.0, 1.1, f64::NAN, f64::INFINITY] {
            assert!(wrong(1, ratio, second, second).contains("ratio"));
        }
        assert!(wrong(1, 0.5, Duration::ZERO, second).contains("within"));
        assert!(wrong(1, 0.5, second, long).contains("pause"));
    }

    #[test]
    fn a_rate_is_from_one_a_day_to_a_million_a_second() {
        for right in [1.0 / 86_400.0, 0.5, 100.0, 1e6] {
            assert_eq!(check_rate(right), Ok(()));
        }
        for wrong in [0.0, -1.0, 1e-9, 2e6, f64::NAN, f64::INFINITY] {
            assert!(check_rate(wrong).is_err(), "{wrong}");
        }
    }
}
