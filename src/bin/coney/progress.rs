//! How far bulk work has come, on stderr, where that is a terminal; nothing anywhere else.

use std::io::{self, IsTerminal, Write, stderr, stdout};
use std::time::{Duration, Instant};
use std::{fmt, fs};

use indicatif::{ProgressBar, ProgressState, ProgressStyle};

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
            Some(total) => ProgressBar::new(total).with_style(style("{bar:40} {pos} of {len}, {rate}, {eta} left")),
            None => ProgressBar::new_spinner().with_style(style("{spinner} {pos}, {rate}")),
        };
        Progress { bar, since: Instant::now() }
    }

    /// The same for work that prints as it goes. Only where that goes into a file: on a terminal it is progress to see, and
    /// what reads a pipe may print on the same terminal.
    pub fn of_printing(of: Option<u64>) -> Progress {
        if is_file_or_nothing() {
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
        // Whoever read stderr may have gone.
        let _ = writeln!(io::stderr(), "{number} {what} in {took:.1?}, {:.0}/s", rate(number, took));
    }
}

fn style(template: &str) -> ProgressStyle {
    // The templates are ours; one that is wrong is shown in another style.
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    style.with_key("rate", |state: &ProgressState, to: &mut dyn fmt::Write| {
        // Nothing can be done about a bar that cannot be drawn.
        let _ = write!(to, "{:.0}/s", state.per_sec());
    })
}

/// Whether stdout is a file, or /dev/null.
fn is_file_or_nothing() -> bool {
    !stdout().is_terminal() && fs::metadata("/dev/stdout").is_ok_and(|of| of.is_file() || is_device(&of))
}

#[cfg(unix)]
fn is_device(of: &fs::Metadata) -> bool {
    std::os::unix::fs::FileTypeExt::is_char_device(&of.file_type())
}

#[cfg(not(unix))]
fn is_device(_of: &fs::Metadata) -> bool {
    false
}

/// How many a second.
pub fn rate(number: u64, took: Duration) -> f64 {
    number as f64 / took.as_secs_f64().max(f64::MIN_POSITIVE)
}
