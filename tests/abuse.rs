//! Clients that want to do harm to a broker: it says no, goes on serving the others, and does not grow.
//!
//! The broker is the program `coney broker`, whose memory can be looked at from outside.

mod raw;

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use coney::{App, Queue, Settings};
use raw::{FRAME_MAX, Raw, frame, publish};

const MIB: u64 = 1 << 20;

/// How much larger the process may be for all that is claimed to it.
const GROWTH: u64 = 8 * MIB;

/// A broker that ends with its test.
struct Broker {
    child: Child,
    addr: SocketAddr,
}

impl Broker {
    fn start() -> Broker {
        let mut child = Command::new(env!("CARGO_BIN_EXE_coney"))
            .args(["broker", "--listen", "127.0.0.1:0", "--log", "error"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let addr = line.trim_end().rsplit(' ').next().unwrap().parse().unwrap();
        Broker { child, addr }
    }

    /// Memory that the process has, in bytes.
    fn rss(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("a Linux /proc");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }

    /// Serves some clients, so that what is allocated once is there, and says how large the process is.
    fn settled(&self) -> u64 {
        let clients: Vec<Raw> = (0..20).map(|_| Raw::open(self.addr)).collect();
        clients.into_iter().for_each(Raw::close);
        self.rss()
    }

    #[track_caller]
    fn has_not_grown(&self, before: u64, what: &str) {
        let now = self.rss();
        println!("{what}: {} KiB more than {} KiB", now.saturating_sub(before) / 1024, before / 1024);
        assert!(now < before + GROWTH, "{what}: from {before} to {now} bytes");
    }

    fn serves(&self) {
        let mut raw = Raw::open(self.addr);
        raw.declare("well");
        raw.send(&publish("well", 4, b"well"));
        assert!(raw.count("well") > 0);
        raw.close();
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn frames_that_claim_more_than_comes_cost_nothing() {
    let broker = Broker::start();
    let before = broker.settled();

    // Before the login, 4 GiB.
    let clients = (0..20).map(|_| {
        let mut raw = Raw::greet(broker.addr);
        let began = Instant::now();
        raw.send(&[1, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(raw.refused(), 501);
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        raw
    });
    let mut clients: Vec<Raw> = clients.collect();

    // After it, a little more than agreed, and a bad end.
    let too_large = [&[3, 0, 1][..], &(FRAME_MAX + 9).to_be_bytes()].concat();
    let bad_end = [&frame(1, 1, &[0, 90, 0, 10])[..11], &[0]].concat();
    for bytes in [too_large, bad_end] {
        clients.extend((0..20).map(|_| {
            let mut raw = Raw::open(broker.addr);
            let began = Instant::now();
            raw.send(&bytes);
            assert_eq!(raw.refused(), 501);
            assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
            raw
        }));
    }

    // Within bounds, and never coming.
    clients.extend((0..20).map(|_| {
        let mut raw = Raw::open(broker.addr);
        raw.send(&[&[3, 0, 1][..], &(FRAME_MAX - 8).to_be_bytes()].concat());
        raw
    }));
    broker.has_not_grown(before, "80 frames");
    clients.drain(..60).for_each(|mut raw| assert_eq!(raw.frame(), None));
    broker.serves();
}

#[test]
fn bodies_that_claim_more_than_comes_cost_nothing() {
    let broker = Broker::start();
    let before = broker.settled();
    let max: u64 = 128 * MIB;
    let mut clients = Vec::new();
    for claimed in [u64::MAX, 1 << 63, max + 1] {
        clients.extend((0..10).map(|_| {
            let mut raw = Raw::open(broker.addr);
            raw.send(&publish("q", claimed, b"x"));
            assert_eq!(raw.refused(), 406);
            raw
        }));
    }
    // As much as is allowed, of which one byte comes.
    for _ in 0..30 {
        let mut raw = Raw::open(broker.addr);
        raw.declare("q");
        raw.send(&publish("q", max, b"x"));
        clients.push(raw);
    }
    // More than announced.
    for _ in 0..10 {
        let mut raw = Raw::open(broker.addr);
        raw.send(&publish("q", 1, &vec![0; 100_000]));
        assert_eq!(raw.refused(), 501);
        clients.push(raw);
    }
    broker.serves();
    broker.has_not_grown(before, "70 bodies");
}

#[test]
fn a_consumer_that_does_not_read_costs_the_others_nothing() {
    const FLOOD: usize = 100_000;
    let broker = Broker::start();
    let before = broker.settled();
    let mut deaf = Raw::open(broker.addr);
    deaf.declare("deaf");
    deaf.consume_no_ack("deaf");

    let app = App::from_settings(Settings::from_url(&format!("amqp://{}", broker.addr)).unwrap()).unwrap();
    let connection = app.publish_pool().connection().unwrap();
    connection.queue_declare(&Queue::new("others")).unwrap();
    let over = AtomicBool::new(false);
    let mut times = thread::scope(|scope| {
        scope.spawn(|| {
            let mut flood = Raw::open(broker.addr);
            let hundred = publish("deaf", 200, &[7; 200]).repeat(100);
            (0..FLOOD / 100).for_each(|_| flood.send(&hundred));
            // The broker answers when it has taken them all. 4 MiB wait for the deaf, and what his socket holds.
            let waiting = flood.count("deaf") as usize;
            over.store(true, Ordering::SeqCst);
            assert!((FLOOD / 4..FLOOD).contains(&waiting), "{waiting} messages wait in the queue");
            flood.close();
        });
        let mut times = Vec::new();
        while !over.load(Ordering::SeqCst) || times.len() < 200 {
            let began = Instant::now();
            connection.publish("", "others", "x").unwrap();
            times.push(began.elapsed());
        }
        times
    });
    times.sort();
    let p99 = times[times.len() * 99 / 100];
    let growth = broker.rss().saturating_sub(before) / MIB;
    println!("{} publishes beside the flood, 99 of 100 within {p99:?}; {growth} MiB more", times.len());
    // On a quiet machine it is some milliseconds; a client that had to wait for the deaf one would wait for ever.
    assert!(p99 < Duration::from_secs(1), "{p99:?}");
    // What waits in the queue is 20 MB of bodies.
    assert!(growth < 128, "{growth} MiB");

    // Whom nobody listens to is gone like anybody else, and the messages he was sent with him.
    drop(deaf);
    let deadline = Instant::now() + Duration::from_secs(30);
    while connection.queue_declare_passive("deaf").unwrap().consumer_count > 0 {
        assert!(Instant::now() < deadline, "the deaf consumer stays");
        thread::park_timeout(Duration::from_millis(10));
    }
    broker.serves();
}
