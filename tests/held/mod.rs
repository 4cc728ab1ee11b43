//! What a whole process has: its threads and its file descriptors. For test binaries with a single test.

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
