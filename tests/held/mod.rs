//! What a whole process has: its threads, its file descriptors, its memory. For test binaries with a single test.

// Each test binary uses some of it.
#![allow(dead_code)]

use std::time::{Duration, Instant};
use std::{fs, thread};

/// Threads and file descriptors of this process.
pub fn held() -> (usize, usize) {
    let count = |dir| fs::read_dir(dir).expect("a Linux /proc").count();
    (count("/proc/self/task"), count("/proc/self/fd"))
}

/// The same, once it has not changed for a while: some threads end shortly after their owner.
pub fn settled() -> (usize, usize) {
    let (mut last, mut same) = (held(), 0);
    while same < 20 {
        thread::park_timeout(Duration::from_millis(20));
        let now = held();
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
    last
}

/// Waits until the process has what it had, and `also` holds.
#[track_caller]
pub fn back_to(what: &str, baseline: (usize, usize), within: Duration, also: impl Fn() -> bool) {
    let deadline = Instant::now() + within;
    while held() != baseline || !also() {
        assert!(
            Instant::now() < deadline,
            "after {what}: {:?} threads and descriptors instead of {baseline:?}; the rest is as it was: {}",
            held(),
            also()
        );
        thread::park_timeout(Duration::from_millis(5));
    }
}

/// Memory of this process, in bytes.
pub fn memory() -> u64 {
    status("VmRSS:")
}

/// The most it has been since [`forget_peak`], in bytes.
pub fn peak() -> u64 {
    status("VmHWM:")
}

/// See `clear_refs` in proc(5).
pub fn forget_peak() {
    fs::write("/proc/self/clear_refs", "5").expect("a Linux /proc");
}

fn status(key: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("a Linux /proc");
    let kib = status.lines().find_map(|line| line.strip_prefix(key)?.split_whitespace().next()?.parse::<u64>().ok());
    kib.expect("a number of KiB") * 1024
}
