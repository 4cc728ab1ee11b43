//! The fuzzers of `fuzz/` without a fuzzer: all their seeds, and mutations of them for as long as there is time.
//!
//! `CONEY_FUZZ_SECONDS` gives each target more time than it has by default, and `CONEY_FUZZ_SEED` other mutations.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, Once};
use std::time::{Duration, Instant};

use coney::embedded::fuzz::{self, Verdict};

/// By default.
const SECONDS: u64 = 2;
/// Longer inputs find nothing that shorter ones do not.
const LENGTH_MAX: usize = 8192;

/// The same each time by default: what passes for one change must not fail for the next that has nothing to do with it.
static SEED: LazyLock<u64> = LazyLock::new(|| from_environment("CONEY_FUZZ_SEED").unwrap_or(1));

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Panics of any thread; those of a broker end its client and no test.
static PANICS: AtomicUsize = AtomicUsize::new(0);

fn count_panics() {
    static SET: Once = Once::new();
    SET.call_once(|| {
        let inner = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.fetch_add(1, Ordering::SeqCst);
            inner(info);
        }));
    });
}

fn seeds(target: &str) -> Vec<(String, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let files = fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut seeds: Vec<_> = files
        .map(|file| file.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap()))
        .collect();
    seeds.sort();
    seeds
}

/// Changes some bytes the way fuzzers do.
fn mutate(random: &mut fastrand::Rng, bytes: &mut Vec<u8>, others: &[(String, Vec<u8>)]) {
    for _ in 0..random.usize(1..=4) {
        let at = random.usize(..=bytes.len());
        let len = random.usize(..=(bytes.len() - at).min(32));
        match random.u8(..8) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.u8(..8),
            1 if at < bytes.len() => bytes[at] = *random.choice(&[0, 1, 0x7f, 0x80, 0xce, 0xff]).unwrap(),
            2 => drop(bytes.drain(at..at + len)),
            3 => bytes.truncate(at),
            4 => {
                let copy = bytes[at..at + len].to_vec();
                bytes.splice(at..at, copy);
            }
            5 => {
                // A piece of another seed, often a whole frame.
                let (_, other) = random.choice(others).unwrap();
                let ends: Vec<usize> = (0..other.len()).filter(|&at| other[at] == 0xce).map(|at| at + 1).collect();
                if let (Some(&from), Some(&to)) = (random.choice(&ends), random.choice(&ends)) {
                    bytes.splice(at..at, other[from.min(to)..from.max(to)].iter().copied());
                }
            }
            6 if bytes.len() >= at + 4 => {
                let small = random.u32(..300);
                let number = *random.choice(&[0, 1, u32::MAX, 1 << 31, small]).unwrap();
                bytes[at..at + 4].copy_from_slice(&number.to_be_bytes());
            }
            _ => bytes.insert(at, random.u8(..)),
        }
    }
    bytes.truncate(LENGTH_MAX);
}

fn replay(target: &str, check: fn(&[u8]) -> Verdict) {
    count_panics();
    let seeds = seeds(target);
    assert!(!seeds.is_empty(), "no seeds of {target}");
    let tried = |what: &str, bytes: &[u8]| {
        let verdict = check(bytes);
        let panics = PANICS.load(Ordering::SeqCst);
        assert!(panics == 0, "{target}: {panics} panics, last in {what}: {bytes:?}");
        verdict.unwrap_or_else(|problem| panic!("{target}: {what}: {problem}\nof {bytes:?}"));
    };
    for (name, bytes) in &seeds {
        tried(name, bytes);
    }
    let mut random = fastrand::Rng::with_seed(*SEED);
    let end = Instant::now() + Duration::from_secs(from_environment("CONEY_FUZZ_SECONDS").unwrap_or(SECONDS));
    let mut count = 0_u64;
    while Instant::now() < end {
        let (name, bytes) = random.choice(&seeds).unwrap();
        let mut bytes = bytes.clone();
        mutate(&mut random, &mut bytes, &seeds);
        tried(&format!("{name}, mutation {count} of seed {}", *SEED), &bytes);
        count += 1;
    }
    println!("{target}: {} seeds and {count} mutations from {}", seeds.len(), *SEED);
}

#[test]
fn frames() {
    replay("frame", fuzz::frame);
}

#[test]
fn tables() {
    replay("table", fuzz::table);
}

#[test]
fn methods() {
    replay("method", fuzz::method);
}

#[test]
fn properties() {
    replay("properties", fuzz::properties);
}

#[test]
fn what_a_broker_sends() {
    replay("inbound", inbound);
}

/// Whatever comes, what amiquip gets of it is a frame that its parser takes.
fn inbound(bytes: &[u8]) -> Verdict {
    let mut problem = None;
    // Why the connection would end is no matter.
    let _ = coney::session_fuzz::inbound(bytes, |frame| {
        let is_whole = matches!(amq_protocol::frame::parsing::parse_frame(frame), Ok((rest, _)) if rest.is_empty());
        if !is_whole && matches!(frame[0], 1 | 2) {
            problem = Some(format!("amiquip cannot parse what it is given: {frame:?}"));
        }
    });
    problem.map_or(Ok(()), Err)
}

#[test]
fn sessions() {
    replay("session", fuzz::session);
}
