//! Lines that were not published, told together where the reason is the same: a queue that is not there is one mistake, not
//! a thousand.

use std::time::{Duration, Instant};

use crate::exit::complain;
use crate::progress::Progress;

/// How long a reason waits for further lines before it is told, at first and at most, for input that is not typed.
const FIRST_WAIT: Duration = Duration::from_secs(3);
const LAST_WAIT: Duration = Duration::from_secs(60);
/// The same for whoever types the lines.
const TYPED_WAIT: Duration = Duration::from_millis(300);
/// How many different reasons are kept at most.
const REASONS: usize = 100;

/// What has failed, and what of it is not told yet.
pub struct Failures {
    pending: Vec<(String, Vec<u64>)>,
    /// The pending failures are told at this moment.
    due: Option<Instant>,
    wait: Duration,
    longest_wait: Duration,
    total: u64,
    told: u64,
}

impl Failures {
    pub fn new(typed: bool) -> Failures {
        let (wait, longest_wait) = if typed { (TYPED_WAIT, TYPED_WAIT) } else { (FIRST_WAIT, LAST_WAIT) };
        Failures { pending: Vec::new(), due: None, wait, longest_wait, total: 0, told: 0 }
    }

    pub fn add(&mut self, line: u64, problem: String) {
        self.total += 1;
        self.due.get_or_insert_with(|| Instant::now() + self.wait);
        match self.pending.iter_mut().find(|(known, _)| *known == problem) {
            Some((_, lines)) => lines.push(line),
            None => self.pending.push((problem, vec![line])),
        }
    }

    pub fn total(&self) -> u64 {
        self.total
    }

    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Tells what has waited for long enough, or has become too much to keep.
    pub fn tell_due(&mut self, progress: &Progress) {
        if self.pending.len() >= REASONS || self.due.is_some_and(|due| due <= Instant::now()) {
            self.tell(progress);
            self.wait = self.longest_wait.min(self.wait * 2);
        }
    }

    /// Tells everything.
    pub fn tell(&mut self, progress: &Progress) {
        self.due = None;
        self.told = self.total;
        for (problem, lines) in self.pending.drain(..) {
            progress.suspend(|| complain(format_args!("{}: {problem}", in_words(lines))));
        }
    }

    /// The only reason there was, with its lines in words, if it has not been told yet. It is then the caller's to tell.
    pub fn take_only(&mut self) -> Option<String> {
        if self.pending.len() != 1 || self.told > 0 {
            return None;
        }
        let (problem, lines) = self.pending.pop()?;
        Some(format!("{}: {problem}", in_words(lines)))
    }
}

/// `line 3`, or `lines 1-5, 8`. Answers of the broker come in any order.
fn in_words(mut lines: Vec<u64>) -> String {
    lines.sort_unstable();
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for line in lines {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == line => *last = line,
            _ => ranges.push((line, line)),
        }
    }
    let one = ranges.len() == 1 && ranges[0].0 == ranges[0].1;
    let shown: Vec<String> = ranges
        .into_iter()
        .map(|(first, last)| if first == last { first.to_string() } else { format!("{first}-{last}") })
        .collect();
    format!("{} {}", if one { "line" } else { "lines" }, shown.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_named_by_their_ranges() {
        assert_eq!(in_words(vec![3]), "line 3");
        assert_eq!(in_words(vec![8, 2, 1, 3, 10, 9]), "lines 1-3, 8-10");
        assert_eq!(in_words(vec![5, 1]), "lines 1, 5");
    }
}
