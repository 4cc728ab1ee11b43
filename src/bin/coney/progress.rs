//! How far bulk work has come, on stderr, where that is a terminal; nothing anywhere else.

use std::io::{IsTerminal, stderr, stdout};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// A bar where the amount of work is known, a count where it is not.
#[derive(Clone)]
pub struct Progress {
    bar: ProgressBar,
    since: Instant,
}

impl Progress {
    pub fn new(of: Option<u64>) -> Progress {
        let bar = match of {
            _ if !stderr().is_terminal() => ProgressBar::hidden(),
            Some(total) => ProgressBar::new(total).with_style(style("{bar:40} {pos} of {len}, {per_sec}, {eta} left")),
            None => ProgressBar::new_spinner().with_style(style("{spinner} {pos}, {per_sec}")),
        };
        Progress { bar, since: Instant::now() }
    }

    /// The same for work that prints as it goes, which on a terminal is progress to see.
    pub fn of_printing(of: Option<u64>) -> Progress {
        if !stdout().is_terminal() {
            return Progress::new(of);
        }
        Progress { bar: ProgressBar::hidden(), since: Instant::now() }
    }

    pub fn step(&self) {
        self.bar.inc(1);
    }

    /// Says something on stderr without the bar in the way.
    pub fn suspend(&self, say: impl FnOnce()) {
        self.bar.suspend(say);
    }

    /// Takes the bar away and says what has been done, and how fast.
    pub fn done(&self, what: &str) {
        if self.bar.is_hidden() {
            return;
        }
        let number = self.bar.position();
        self.bar.finish_and_clear();
        let took = self.since.elapsed();
        eprintln!("{number} {what} in {took:.1?}, {:.0}/s", rate(number, took));
    }
}

fn style(template: &str) -> ProgressStyle {
    // The templates are ours; one that is wrong is shown in another style.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// How many a second.
pub fn rate(number: u64, took: Duration) -> f64 {
    number as f64 / took.as_secs_f64().max(f64::MIN_POSITIVE)
}
