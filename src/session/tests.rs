//! The heart of a connection at a socket whose other end is the test: who writes, who reads, who is woken.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::channel::Inbox;
use super::channel_state::{ChannelState, Incoming, awaited};
use super::control::Control;
use super::core::Core;
use super::handshake::Introduction;
use super::idle::IdleReader;
use super::socket::Socket;
use super::wire::Wire;
use super::writer::Flush;
use crate::amqp::frame::{self, FRAME_HEADER, FRAME_OVERHEAD, Scan, scan};
use crate::amqp::method::{BasicGet, BasicGetEmpty, ChannelCloseOk, ConnectionBlocked, Method};
use crate::settings::BrokerSettings;

const PATIENCE: Duration = Duration::from_secs(60);

/// A connection that has been opened, as far as it knows, and the socket's other end.
fn connected(idle: &IdleReader) -> (Arc<Core>, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    peer.set_nodelay(true).unwrap();
    let wire = Arc::new(Wire::new(socket.try_clone().unwrap()));
    let (control, _) = Control::new(Introduction::new("test", &BrokerSettings::default()));
    let core = Core::new(wire, Socket::plain(socket).unwrap(), control, Arc::clone(idle.shared()), 128 << 20);
    let core = Arc::new(core);
    idle.shared().join(Arc::clone(&core));
    (core, peer)
}

fn open(core: &Core, number: u16) -> (Arc<ChannelState>, Arc<Inbox>) {
    let inbox = Arc::<Inbox>::default();
    let state = Arc::new(ChannelState::new(number, Some(Arc::clone(&inbox) as _)));
    core.add_channel(Arc::clone(&state));
    (state, inbox)
}

#[track_caller]
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        thread::park_timeout(Duration::from_millis(2));
    }
}

/// Bytes of a message's body: its channel, its number, and as much more as there is.
fn body(channel: u16, number: u32, len: usize) -> Vec<u8> {
    let mut body = [&channel.to_be_bytes()[..], &number.to_be_bytes()].concat();
    body.resize(len.max(6), channel as u8);
    body
}

/// The length of a body, and what has come of it.
type Begun = (usize, Vec<u8>);

/// Reads frames by pieces of random lengths until each channel has brought so many messages; they are checked.
fn read_messages(peer: &mut TcpStream, seed: u64, channels: u16, messages: u32) {
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut bytes, mut piece) = (Vec::new(), vec![0; 300_000]);
    // For each channel the number of the next message, and what is left of the one that has begun.
    let mut expected: HashMap<u16, (u32, Option<Begun>)> = HashMap::new();
    let mut closed = HashMap::<u16, u32>::new();
    while (1..=channels).any(|channel| expected.get(&channel).map_or(0, |(next, _)| *next) < messages) {
        let len = if random.u8(..4) == 0 { random.usize(1..9) } else { random.usize(1..300_000) };
        let read = peer.read(&mut piece[..len]).unwrap();
        assert!(read > 0, "it has ended");
        bytes.extend_from_slice(&piece[..read]);
        let mut taken = 0;
        while let Scan::Whole(frame, length) = scan(&bytes[taken..], 1 << 20) {
            let (next, open) = expected.entry(frame.channel).or_default();
            match (frame.kind, &mut *open) {
                (frame::METHOD, None) if frame.payload.starts_with(&[0, 60, 0, 40]) => {}
                (frame::METHOD, None) => *closed.entry(frame.channel).or_default() += 1,
                (frame::METHOD, Some(_)) => panic!("channel {}: a method in the middle of a message", frame.channel),
                (frame::HEADER, None) => {
                    let size = u64::from_be_bytes(frame.payload[4..12].try_into().unwrap());
                    *open = Some((size as usize, Vec::new()));
                }
                (frame::BODY, Some((size, came))) => {
                    came.extend_from_slice(frame.payload);
                    if came.len() == *size {
                        assert_eq!(*came, body(frame.channel, *next, *size), "channel {}", frame.channel);
                        (*next, *open) = (*next + 1, None);
                    }
                }
                other => panic!("channel {}: {other:?}", frame.channel),
            }
            taken += length;
        }
        bytes.drain(..taken);
    }
    // What amiquip had to say is there too, and was not said in the middle of anything.
    assert!(closed.values().sum::<u32>() > 0);
}

#[test]
fn what_many_threads_write_arrives_whole_and_in_order_by_channel() {
    const CHANNELS: u16 = 6;
    const MESSAGES: u32 = 120;
    let idle = IdleReader::start().unwrap();
    for seed in 0..12 {
        let (core, mut peer) = connected(&idle);
        thread::scope(|scope| {
            for channel in 1..=CHANNELS {
                let core = &core;
                scope.spawn(move || {
                    let mut random = fastrand::Rng::with_seed(seed * 100 + u64::from(channel));
                    let mut close_ok = Vec::new();
                    frame::write_method(&mut close_ok, channel, &ChannelCloseOk {}.into());
                    for number in 0..MESSAGES {
                        let is_large = random.u8(..20) == 0;
                        let small = if random.bool() { 5_000 } else { 120_000 };
                        let len = if is_large { random.usize(140_000..900_000) } else { random.usize(6..small) };
                        let body = body(channel, number, len);
                        let begin = |out: &mut Vec<u8>| {
                            frame::write_publish(out, channel, "", "q", true);
                            frame::write_header(out, channel, body.len() as u64, |out| out.extend([0x10, 0, 2]));
                        };
                        let flush = if random.bool() { Flush::Now } else { Flush::Together };
                        core.wait_for_room(PATIENCE).unwrap();
                        if !is_large && random.bool() {
                            let begin = |out: &mut Vec<u8>| {
                                begin(out);
                                true
                            };
                            core.write_message(flush, channel, begin, &body);
                            continue;
                        }
                        if !is_large {
                            core.write(flush, |out| {
                                begin(out);
                                frame::body_parts(&body, 4096).for_each(|part| frame::write_body(out, channel, part));
                            });
                            continue;
                        }
                        core.begin_message(channel);
                        core.write(flush, |out| {
                            begin(out);
                        });
                        for part in frame::body_parts(&body, 131_072) {
                            core.write(Flush::Now, |out| frame::write_body(out, channel, part));
                            // In the middle of the message amiquip has something to say on this channel.
                            core.write_control(channel, &close_ok);
                            core.wait_for_room(PATIENCE).unwrap();
                        }
                        core.end_message(channel);
                    }
                    core.write_control(channel, &close_ok);
                });
            }
            read_messages(&mut peer, seed, CHANNELS, MESSAGES);
        });
        core.wire.cut("for the test");
    }
}

#[test]
fn what_waits_to_be_written_together_is_not_forgotten() {
    let idle = IdleReader::start().unwrap();
    let (core, mut peer) = connected(&idle);
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    for _ in 0..20 {
        core.write(Flush::Together, frame::write_heartbeat);
        // Nobody waits, and nobody writes more.
        peer.read_exact(&mut [0; FRAME_OVERHEAD]).unwrap();
    }
    core.wire.cut("for the test");
}

#[test]
fn a_full_socket_is_written_to_once_it_has_room_though_nobody_waits_for_it() {
    let idle = IdleReader::start().unwrap();
    let (core, mut peer) = connected(&idle);
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    let part = vec![7; 100_000];
    let mut written = 0;
    while written < 20_000_000 {
        core.write(Flush::Now, |out| frame::write_body(out, 1, &part));
        written += part.len() + FRAME_OVERHEAD;
    }
    let mut all = vec![0; written];
    peer.read_exact(&mut all).unwrap();
    assert!(all.chunks(part.len() + FRAME_OVERHEAD).all(|frame| frame[FRAME_HEADER..][..part.len()] == part));
    core.wire.cut("for the test");
}

#[test]
fn a_socket_without_a_reader_ends_a_write_by_its_patience() {
    let idle = IdleReader::start().unwrap();
    let (core, _peer) = connected(&idle);
    let part = vec![7; 100_000];
    let start = Instant::now();
    let patience = Duration::from_millis(200);
    let stuck = loop {
        core.write(Flush::Now, |out| frame::write_body(out, 1, &part));
        if let Err(after) = core.wait_for_room(patience) {
            break after;
        }
        assert!(start.elapsed() < PATIENCE);
    };
    assert_eq!(stuck, patience);
    core.wire.cut("for the test");
}

#[test]
fn after_a_read_in_passing_the_idle_reader_takes_over() {
    let idle = IdleReader::start().unwrap();
    let (core, mut peer) = connected(&idle);
    wait_until("the idle reader does not watch", || core.watched.load(Ordering::SeqCst));
    thread::scope(|scope| {
        // It holds the lead until what the leader has read is free.
        let reading = core.reading.lock().unwrap();
        let glancing = scope.spawn(|| core.read_idly());
        wait_until("nobody leads", || core.lead.look().0);
        let mut heartbeat = Vec::new();
        frame::write_heartbeat(&mut heartbeat);
        peer.write_all(&heartbeat).unwrap();
        wait_until("the idle reader does not leave it alone", || core.tell_idle.load(Ordering::SeqCst));
        assert!(!core.watched.load(Ordering::SeqCst));
        drop(reading);
        assert!(glancing.join().unwrap(), "it has read the heartbeat");
    });
    wait_until("nobody watches", || core.watched.load(Ordering::SeqCst));
}

#[test]
fn an_idle_connection_notices_blocks_and_its_end() {
    let idle = IdleReader::start().unwrap();
    let (core, mut peer) = connected(&idle);
    let mut blocked = Vec::new();
    frame::write_method(&mut blocked, 0, &ConnectionBlocked { reason: "low on memory".into() }.into());
    peer.write_all(&blocked).unwrap();
    wait_until("the block is noticed", || core.wire.blocked().as_deref() == Some("low on memory"));
    peer.shutdown(Shutdown::Both).unwrap();
    wait_until("the end is noticed", || core.wire.is_over() && core.has_ended());
}

/// Answers every `basic.get` with `get-empty`, by pieces of random lengths, until the client goes.
fn answer_gets(mut peer: TcpStream, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut bytes, mut piece, mut answers) = (Vec::new(), vec![0; 65_536], Vec::new());
    loop {
        match peer.read(&mut piece) {
            Ok(read @ 1..) => bytes.extend_from_slice(&piece[..read]),
            _ => return,
        }
        let mut taken = 0;
        while let Scan::Whole(frame, length) = scan(&bytes[taken..], 1 << 20) {
            if frame.payload.starts_with(&[0, 60, 0, 70]) {
                frame::write_method(&mut answers, frame.channel, &BasicGetEmpty::default().into());
            }
            taken += length;
        }
        bytes.drain(..taken);
        while !answers.is_empty() {
            let some = if random.bool() { answers.len() } else { random.usize(1..=answers.len().min(50)) };
            if peer.write_all(&answers[..some]).is_err() {
                return;
            }
            answers.drain(..some);
        }
    }
}

/// Asks again and again, with a time-out now and then that is too short, and now and then a look that panics.
fn ask(core: &Core, number: u16, seed: u64, until: Instant, answered: &AtomicU64) {
    let (state, inbox) = open(core, number);
    let mut random = fastrand::Rng::with_seed(seed + u64::from(number));
    let get: Method = BasicGet { queue: "q".into(), ..BasicGet::default() }.into();
    // Answers that are still to come of requests that were given up.
    let mut late = 0;
    while Instant::now() < until && !core.has_ended() {
        state.ask_for(awaited::GET);
        core.write(Flush::Now, |out| frame::write_method(out, number, &get));
        let patience = if random.u8(..10) == 0 { Duration::from_micros(random.u64(..200)) } else { PATIENCE };
        let panics = random.u8(..20) == 0;
        let start = Instant::now();
        let wait = catch_unwind(AssertUnwindSafe(|| {
            core.wait(&[inbox.waiters()], None, start + patience, || {
                if panics && start.elapsed() > Duration::from_micros(20) {
                    panic!("this panic is part of the test");
                }
                if inbox.has_ended() {
                    return Some(false);
                }
                inbox.next().map(|incoming| matches!(incoming, Incoming::Got(None)))
            })
        }));
        match wait {
            Ok(Some(true)) => drop(answered.fetch_add(1, Ordering::Relaxed)),
            Ok(Some(false)) => return,
            Ok(None) if core.wire.is_over() => return,
            Ok(None) => {
                assert!(patience < PATIENCE, "channel {number}: the answer was not told for {:?}", start.elapsed());
                late += 1;
            }
            Err(_) => late += 1,
        }
        // One request at a time: what is late is waited for.
        while late > 0 {
            let next = core.wait(&[inbox.waiters()], None, Instant::now() + PATIENCE, || {
                inbox.next().map(|_| true).or_else(|| inbox.has_ended().then_some(false))
            });
            match next {
                Some(true) => late -= 1,
                Some(false) => return,
                None if core.wire.is_over() => return,
                None => panic!("channel {number}: a late answer was not told"),
            }
        }
    }
}

/// Each round is a connection of its own, which is cut in the middle of everything.
fn hand_over(seed: u64, round: Duration) -> u64 {
    const THREADS: u16 = 32;
    let idle = IdleReader::start().unwrap();
    let (core, peer) = connected(&idle);
    let answered = AtomicU64::new(0);
    let until = Instant::now() + round;
    let is_cut = AtomicBool::new(false);
    let (done, is_done) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let answering = scope.spawn(move || answer_gets(peer, seed));
        for number in 1..=THREADS {
            let (core, answered, done) = (&core, &answered, done.clone());
            scope.spawn(move || {
                let _done = done;
                ask(core, number, seed * 1000, until + round, answered);
            });
        }
        drop(done);
        assert!(is_done.recv_timeout(round).is_err(), "a thread has ended by itself");
        core.wire.cut("for the test");
        is_cut.store(true, Ordering::SeqCst);
        answering.join().unwrap();
    });
    wait_until("the end is known", || core.has_ended());
    answered.into_inner()
}

/// For longer: `CONEY_STRESS_SECONDS=600 cargo test --lib hand_over`.
#[test]
fn the_lead_is_handed_over_among_many_threads_and_no_wake_up_is_lost() {
    let seconds = std::env::var("CONEY_STRESS_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(4);
    let (end, mut seed, mut answered) = (Instant::now() + Duration::from_secs(seconds), 1, 0);
    while Instant::now() < end {
        answered += hand_over(seed, Duration::from_millis(300 + seed % 7 * 100));
        seed += 1;
    }
    println!("{answered} answers on {} connections", seed - 1);
    assert!(answered > 1000, "{answered}");
}
