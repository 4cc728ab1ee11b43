//! The report: a line of progress now and then, and the table at the end.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::faults::Fault;
use crate::ledger::{Ledger, Recovery, Sums};

pub const MIB: u64 = 1 << 20;

/// What the process has.
#[derive(Debug, Clone, Copy)]
pub struct Held {
    pub threads: usize,
    pub descriptors: usize,
    /// In bytes.
    pub memory: u64,
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} threads, {} descriptors, {:.1} MiB", self.threads, self.descriptors, mib(self.memory))
    }
}

/// A number of bytes as people read it.
pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB as f64
}

/// What is printed at the end.
#[derive(Debug)]
pub struct Report {
    pub seed: u64,
    pub ran: Duration,
    /// How long each fault lasted, and what it took to recover from it.
    pub faults: BTreeMap<Fault, Vec<(Duration, Recovery)>>,
    pub sums: Sums,
    pub errors: BTreeMap<(&'static str, String), u64>,
    pub longest: BTreeMap<&'static str, Duration>,
    /// How often the listener and the worker have come back, together.
    pub recoveries: u64,
    /// Connections opened.
    pub opened: u64,
    pub before: Held,
    pub warm: Held,
    /// Memory since `warm`.
    pub peak: u64,
    pub after: Held,
}

impl Report {
    pub fn new(seed: u64, before: Held) -> Report {
        Report {
            seed,
            ran: Duration::ZERO,
            faults: BTreeMap::new(),
            sums: Sums::default(),
            errors: BTreeMap::new(),
            longest: BTreeMap::new(),
            recoveries: 0,
            opened: 0,
            before,
            warm: before,
            peak: 0,
            after: before,
        }
    }

    pub fn count(&self) -> usize {
        self.faults.values().map(Vec::len).sum()
    }

    pub fn add(&mut self, fault: Fault, lasted: Duration, recovery: Recovery) {
        self.faults.entry(fault).or_default().push((lasted, recovery));
    }
}

/// The median and the largest, in seconds.
fn spread(durations: impl Iterator<Item = Duration>) -> String {
    let mut all: Vec<f64> = durations.map(|duration| duration.as_secs_f64()).collect();
    all.sort_unstable_by(f64::total_cmp);
    match (all.get(all.len().saturating_sub(1) / 2), all.get(all.len() / 2), all.last()) {
        (Some(below), Some(above), Some(worst)) => format!("{:.2} / {worst:.2}", (below + above) / 2.0),
        _ => "-".to_owned(),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, kinds) = (self.count(), self.faults.len());
        writeln!(f, "soak: {:.0} s, seed {}: {count} faults of {kinds} kinds", self.ran.as_secs_f64(), self.seed)?;
        writeln!(
            f,
            "\nMedian / worst, in seconds; what came first after the fault was lifted and had begun after it."
        )?;
        let columns = ["lasted", "confirm", "handled", "answer"];
        writeln!(
            f,
            "{:26}{:>5}{:>16}{:>16}{:>16}{:>16}",
            "fault", "times", columns[0], columns[1], columns[2], columns[3]
        )?;
        let line = |f: &mut fmt::Formatter<'_>, name: &str, faults: &[(Duration, Recovery)]| {
            write!(f, "{name:26}{:>5}{:>16}", faults.len(), spread(faults.iter().map(|(lasted, _)| *lasted)))?;
            for which in 0..3 {
                write!(f, "{:>16}", spread(faults.iter().map(|(_, recovery)| recovery[which])))?;
            }
            writeln!(f)
        };
        for (fault, faults) in &self.faults {
            line(f, &fault.to_string(), faults)?;
        }
        let all: Vec<_> = self.faults.values().flatten().copied().collect();
        line(f, "all", &all)?;

        let Sums { attempted, confirmed, not_taken, unknown, handled, redelivered, repeated, calls, answered } =
            self.sums;
        writeln!(
            f,
            "\nmessages: {attempted} attempted: {confirmed} confirmed, {not_taken} failed, {unknown} unknown; \
             {handled} handled; {redelivered} deliveries marked redelivered, {repeated} repetitions"
        )?;
        writeln!(f, "calls: {calls}: {answered} answered, {} failed", calls - answered)?;
        writeln!(f, "connections opened: {}; the listeners came back {} times", self.opened, self.recoveries)?;
        for ((what, error), count) in &self.errors {
            writeln!(f, "  {what:16}{error:20}{count:>8}")?;
        }
        let longest: Vec<_> =
            self.longest.iter().map(|(what, took)| format!("{what} {:.2} s", took.as_secs_f64())).collect();
        writeln!(f, "longest: {}", longest.join(", "))?;
        writeln!(f, "before: {}", self.before)?;
        writeln!(f, "warm:   {}, at most {:.1} MiB since", self.warm, mib(self.peak))?;
        write!(f, "after:  {}", self.after)
    }
}

/// A line for people who wait.
pub fn progress(ran: Duration, length: Duration, doing: &str, ledger: &Ledger, held: Held) -> String {
    let sums = ledger.sums();
    format!(
        "soak: {:3.0} of {:.0} s: {doing}; {} attempted, {} handled, {} of {} calls answered; {held}",
        ran.as_secs_f64(),
        length.as_secs_f64(),
        ledger.attempted(),
        sums.handled,
        sums.answered,
        sums.calls
    )
}
