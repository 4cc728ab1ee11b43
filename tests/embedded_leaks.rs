//! An embedded broker leaves nothing behind in its process: threads and file descriptors return to where they were.
//!
//! A test binary of its own with one test, since it counts what the whole process has.

mod held;
mod raw;

use std::net::TcpListener;
use std::time::{Duration, Instant};

use coney::embedded::EmbeddedBroker;
use held::{back_to, held};
use raw::Raw;

/// How long what ends may take to be gone.
const QUIET: Duration = Duration::from_secs(5);

#[test]
fn threads_and_descriptors_return_to_where_they_were() {
    let baseline = held();
    let broker = EmbeddedBroker::start().unwrap();
    let addr = broker.addr();
    let running = held();
    assert!(running > baseline, "{running:?} says nothing");
    for n in 0..500 {
        let mut raw = Raw::open(addr);
        raw.declare("q");
        match n % 3 {
            0 => raw.close(),
            // Without a word, in the middle of a message.
            1 => raw.send(&raw::publish("q", 10, b"half")),
            _ => drop(raw),
        }
    }
    back_to("500 connections", running, QUIET, || true);

    // Connections that are over, whose clients leave the socket open: for 30 s, were it not for what comes next.
    let lingering = || -> Vec<Raw> {
        let closed = (0..20).map(|_| {
            let mut raw = Raw::open(addr);
            raw.say(0, (10, 50), &[&200_u16.to_be_bytes()[..], &raw::short(""), &[0; 4]].concat());
            assert_eq!(raw.method().0, (10, 51));
            raw
        });
        let refused = (0..20).map(|_| {
            let mut raw = Raw::open(addr);
            raw.say(7, (60, 10), &[0; 7]);
            assert_eq!(raw.refused(), 504);
            raw
        });
        let closed_by_control = (0..20).map(|_| Raw::open(addr)).collect::<Vec<_>>();
        let lingering = closed.chain(refused).collect::<Vec<_>>();
        let control = broker.control();
        assert_eq!(control.close_connections(320, "CONNECTION_FORCED - enough"), 20);
        closed_by_control.into_iter().chain(lingering).collect()
    };
    let clients = lingering();
    drop(clients);
    back_to("60 clients that have ended their sockets", running, QUIET, || true);
    let clients = lingering();
    let began = Instant::now();
    broker.control().restart();
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    // What is left is the clients' own ends.
    let own = (running.0, running.1 + clients.len());
    back_to("a restart with 60 sockets that lingered", own, QUIET, || true);
    drop(clients);

    let left_open = lingering();
    let silent: Vec<Raw> = (0..10).map(|_| Raw::greet(addr)).collect();
    let mut clients: Vec<Raw> = (0..50).map(|_| Raw::open(addr)).collect();
    let began = Instant::now();
    broker.stop();
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    drop(TcpListener::bind(addr).expect("the port is free at once"));
    for client in &mut clients {
        assert_eq!(client.refused(), 320);
    }
    drop((silent, clients, left_open));
    back_to("the end of a broker with 60 clients", baseline, QUIET, || true);

    // Stopped by its end.
    drop(broker);
    for _ in 0..20 {
        let broker = EmbeddedBroker::start().unwrap();
        Raw::open(broker.addr()).declare("q");
    }
    back_to("20 brokers", baseline, QUIET, || true);
}
