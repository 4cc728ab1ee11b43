//! What is measured: each case as a job for coney and one for its peers, with sizes and counts.

use std::time::Duration;

use clap::ValueEnum;

/// Deliveries that a broker may send ahead of their acks.
pub const PREFETCH: u16 = 500;
/// Messages that may wait for their confirms.
pub const WINDOW: usize = 1_000;
/// A full window is waited for until it is down to this, as coney does.
pub const WINDOW_LOW: usize = WINDOW - WINDOW / 4;
/// Connections of a pool, and the threads or tasks that share them.
pub const POOL: usize = 4;
pub const SHARERS: usize = 8;
/// Calls at a time, where it is not one.
pub const IN_FLIGHT: usize = 32;
/// How long an answer may take before the run is given up.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// What a measured process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Job {
    /// Confirmed publishing with a window. coney: `publish_async`.
    PublishAsync,
    /// The same with coney's `publish_batch`.
    PublishBatch,
    /// Publish, wait for the confirm, and again.
    PublishSync,
    /// The same by eight threads that share four connections.
    PublishPool,
    /// A consumer that acks.
    Consume,
    /// `basic.get` and ack.
    Get,
    /// Calls one after another. coney: `call`.
    RpcSequential,
    /// 32 calls at a time by one thread. coney: `call_async`.
    RpcAsync,
    /// 32 calls at a time by coney's `call` on 32 threads.
    RpcThreads,
    /// Taking a connection out of a pool and giving it back.
    Checkout,
}

impl Job {
    /// The name in the arguments of measured processes.
    pub fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// Whether the queue holds all messages at the start, and none at the end.
    pub fn drains(self) -> bool {
        matches!(self, Job::Consume | Job::Get)
    }

    /// Whether the queue holds all messages at the end.
    pub fn fills(self) -> bool {
        matches!(self, Job::PublishAsync | Job::PublishBatch | Job::PublishSync | Job::PublishPool)
    }

    pub fn calls(self) -> bool {
        matches!(self, Job::RpcSequential | Job::RpcAsync | Job::RpcThreads)
    }
}

/// One line of the results.
#[derive(Debug, Clone)]
pub struct Case {
    pub name: String,
    /// What coney does.
    pub ours: Job,
    /// What it is compared with.
    pub theirs: Job,
    /// Bytes of a body.
    pub size: usize,
    /// Messages of a run, at most.
    pub count: usize,
    /// After this a run of calls ends, be there so many or not.
    pub limit: Duration,
}

const SIZES: [(usize, &str); 3] = [(100, "100B"), (1024, "1KiB"), (65_536, "64KiB")];

/// How many messages there are in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// A tenth of the usual.
    Quick,
    Usual,
    /// More of them, for a broker that takes ten times as many in a second.
    Fast,
}

/// All cases whose names contain `wanted`.
pub fn cases(wanted: &str, scale: Scale) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |name: &str, ours, theirs, (size, size_name): (usize, &str), count: usize| {
        let name = format!("{name} {size_name}").trim_end().to_owned();
        let (count, limit) = if scale == Scale::Quick { (count / 10, 100) } else { (count, 250) };
        if name.contains(wanted) {
            cases.push(Case { name, ours, theirs, size, count, limit: Duration::from_millis(limit) });
        }
    };
    // As many as take some 0.3 seconds: a run is to be longer than the hiccups of the machine, and all of them shorter
    // than five minutes.
    let (streams, calls) = match scale {
        Scale::Fast => ([100_000, 60_000, 3_000], [8_000, 8_000, 4_000]),
        Scale::Usual | Scale::Quick => ([10_000, 8_000, 600], [4_000, 4_000, 1_000]),
    };
    for (size, count) in SIZES.into_iter().zip(streams) {
        add("publish async", Job::PublishAsync, Job::PublishAsync, size, count);
        add("publish batch", Job::PublishBatch, Job::PublishAsync, size, count);
    }
    for (size, count) in SIZES.into_iter().zip(calls) {
        add("publish sync", Job::PublishSync, Job::PublishSync, size, count);
    }
    for (size, count) in SIZES.into_iter().zip(calls) {
        add("publish pool", Job::PublishPool, Job::PublishPool, size, count);
    }
    for (size, count) in SIZES.into_iter().zip(streams) {
        add("consume", Job::Consume, Job::Consume, size, count);
    }
    for (size, count) in SIZES.into_iter().zip(calls) {
        add("get", Job::Get, Job::Get, size, count);
    }
    add("rpc sequential", Job::RpcSequential, Job::RpcSequential, SIZES[0], 2_000);
    add("rpc 32 in flight", Job::RpcAsync, Job::RpcAsync, SIZES[0], 4_000);
    add("rpc 32 threads", Job::RpcThreads, Job::RpcAsync, SIZES[0], 4_000);
    add("checkout", Job::Checkout, Job::Checkout, (0, ""), 200_000);
    cases
}
