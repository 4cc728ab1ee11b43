//! What a run costs its process: time, CPU, memory, and how long each call took.

use std::error::Error;
use std::fs;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// One run, as the measured process tells it in one line of JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Measure {
    pub messages: usize,
    pub seconds: f64,
    /// User and system time of all threads, the ended ones too.
    pub cpu_us: f64,
    /// Most that was resident since the process began (`VmHWM`).
    pub peak_kib: u64,
    pub p50_us: Option<f64>,
    pub p99_us: Option<f64>,
}

impl Measure {
    pub fn rate(&self) -> f64 {
        self.messages as f64 / self.seconds
    }

    pub fn cpu_us_each(&self) -> f64 {
        self.cpu_us / self.messages as f64
    }
}

/// Runs from when everything is connected until the last message is settled.
#[derive(Debug)]
pub struct Meter {
    start: Instant,
    cpu: Duration,
}

impl Meter {
    pub fn start() -> Meter {
        Meter { cpu: cpu_time(), start: Instant::now() }
    }

    pub fn stop(self, messages: usize, mut latencies: Vec<Duration>) -> Result<Measure> {
        let (seconds, cpu) = (self.start.elapsed().as_secs_f64(), cpu_time() - self.cpu);
        latencies.sort_unstable();
        // Nearest rank.
        let percentile = |percent: usize| {
            let rank = (latencies.len() * percent).div_ceil(100).max(1);
            latencies.get(rank - 1).map(|latency| latency.as_secs_f64() * 1e6)
        };
        let (p50_us, p99_us) = (percentile(50), percentile(99));
        Ok(Measure { messages, seconds, cpu_us: cpu.as_secs_f64() * 1e6, peak_kib: peak_kib()?, p50_us, p99_us })
    }
}

/// A loop of calls one after another: until there have been enough, or the time is up.
#[derive(Debug)]
pub struct Pace {
    left: usize,
    until: Instant,
    pub latencies: Vec<Duration>,
}

impl Pace {
    pub fn new(count: usize, limit: Duration) -> Pace {
        Pace { left: count, until: Instant::now() + limit, latencies: Vec::with_capacity(count) }
    }

    /// When the next call begins, if there is to be one.
    pub fn next(&mut self) -> Option<Instant> {
        let now = Instant::now();
        self.left = self.left.checked_sub(1)?;
        (now < self.until).then_some(now)
    }

    /// The call that began then has ended.
    pub fn took(&mut self, begin: Instant) {
        self.latencies.push(begin.elapsed());
    }
}

fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or_default())
}

fn peak_kib() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_the_nearest_ranks() {
        let latencies = (1..=200).rev().map(Duration::from_micros).collect();
        let measure = Meter::start().stop(200, latencies).unwrap();
        let close = |value: Option<f64>, to: f64| (value.unwrap() - to).abs() < 1e-6;
        assert!(close(measure.p50_us, 100.0) && close(measure.p99_us, 198.0), "{measure:?}");
        assert_eq!(Meter::start().stop(1, Vec::new()).unwrap().p50_us, None);
    }

    #[test]
    fn a_pace_ends_with_its_count_or_its_time() {
        let mut pace = Pace::new(2, Duration::from_secs(60));
        assert!(pace.next().is_some() && pace.next().is_some() && pace.next().is_none());
        assert!(Pace::new(2, Duration::ZERO).next().is_none());
    }
}
