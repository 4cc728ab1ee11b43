//! What a broker does with its socket after each way of ending.

use std::io::{ErrorKind, Read};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::contract;
use crate::raw::{FRAME_MAX, Raw, frame, long, method, short};
use crate::support::{Broker, Hurt, PATIENCE};

contract! {
    after_the_clients_close_the_socket_stays_open_for_a_heartbeat,
    after_the_brokers_close_the_socket_stays_open_for_a_heartbeat,
    what_is_no_protocol_ends_the_connection_after_three_seconds,
    a_client_that_ends_its_side_or_is_silent_is_let_go,
    after_an_operators_close_it_is_the_same_for_a_client_that_says_nothing,
    at_the_end_of_the_broker_clients_are_told_and_reset,
    without_heartbeats_and_with_long_ones_the_socket_stays_open_for_thirty_seconds,
    [by release: in_the_handshake_the_socket_stays_open_for_three_seconds_and_later_for_a_heartbeat]
}

const CLOSE: (u16, u16) = (10, 50);
const CLOSE_OK: (u16, u16) = (10, 51);

/// How far a busy machine may be behind.
const LATE: Duration = Duration::from_secs(8);

/// A client, and when it has said or heard what was to end its connection.
struct Client {
    raw: Raw,
    since: Instant,
}

impl Client {
    /// With a virtual host open, and channel 1.
    fn open(addr: SocketAddr, heartbeat: u16) -> Client {
        let mut raw = Raw::greet(addr);
        raw.log_in(b"\0guest\0guest", FRAME_MAX, 2047, heartbeat, "/");
        assert_eq!(raw.method_but_heartbeats().0, (10, 41));
        raw.say(1, (20, 10), &short(""));
        assert_eq!(raw.method_but_heartbeats().0, (20, 11));
        Client { raw, since: Instant::now() }
    }

    /// One that the broker has just told `connection.close`.
    fn refused(addr: SocketAddr, heartbeat: u16) -> Client {
        let mut client = Client::open(addr, heartbeat);
        client.since = Instant::now();
        client.says(&method(7, (60, 10), &[0; 7]));
        client.hears(CLOSE);
        client
    }

    /// One that has closed, and heard that it has.
    fn closed(addr: SocketAddr, heartbeat: u16) -> Client {
        let mut client = Client::open(addr, heartbeat);
        client.since = Instant::now();
        client.says(&close());
        client.hears(CLOSE_OK);
        client
    }

    fn says(&mut self, bytes: &[u8]) {
        self.raw.send(bytes);
    }

    fn hears(&mut self, id: (u16, u16)) {
        assert_eq!(self.raw.method_but_heartbeats().0, id);
    }

    fn ends_its_side(&self) {
        self.raw.socket.shutdown(Shutdown::Write).unwrap();
    }

    /// Hears nothing more but heartbeats, until the broker resets the connection: no sooner than `after`, and hardly later.
    #[track_caller]
    fn sees_a_reset(mut self, what: &str, after: Duration) {
        let (reset, rest) = rest(&mut self.raw.socket);
        let took = self.since.elapsed();
        assert!(reset, "{what}: ended in order");
        assert_eq!(rest, Vec::<u8>::new(), "{what}");
        // The clocks of two processes and their roundings.
        let after = (after.saturating_sub(Duration::from_millis(100)), after + LATE);
        assert!(after.0 <= took && took < after.1, "{what}: {took:?}");
    }
}

/// What comes until the end of the stream, without heartbeats, and whether that is a reset.
fn rest(socket: &mut TcpStream) -> (bool, Vec<u8>) {
    let mut rest = Vec::new();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let reset = loop {
        let mut bytes = [0; 1024];
        match socket.read(&mut bytes) {
            Ok(0) => break false,
            Ok(len) => rest.extend_from_slice(&bytes[..len]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => break true,
            Err(error) => panic!("{error}"),
        }
    };
    let heartbeat = frame(8, 0, b"");
    while rest.starts_with(&heartbeat) {
        rest.drain(..heartbeat.len());
    }
    (reset, rest)
}

fn close() -> Vec<u8> {
    method(0, CLOSE, &[&200_u16.to_be_bytes()[..], &short(""), &[0; 4]].concat())
}

/// Frames that are right in an open connection and not heard in one that is closing.
fn frames() -> Vec<u8> {
    [method(1, (60, 10), &[0; 7]), method(3, (20, 10), &short("")), frame(8, 0, b"")].concat()
}

/// Sees all of these through at once.
fn all_at_once(ways: Vec<Box<dyn FnOnce() + Send + '_>>) {
    thread::scope(|scope| ways.into_iter().for_each(|way| drop(scope.spawn(way))));
}

const AT_ONCE: Duration = Duration::ZERO;
const HEARTBEAT: Duration = Duration::from_secs(2);
/// So long that nothing happens by it.
const LONG: u16 = 20;

fn after_the_clients_close_the_socket_stays_open_for_a_heartbeat(broker: Broker) {
    let addr = broker.addr();
    all_at_once(vec![
        Box::new(|| Client::closed(addr, 2).sees_a_reset("close", HEARTBEAT)),
        Box::new(|| {
            let mut client = Client::open(addr, 2);
            client.since = Instant::now();
            client.says(&close().repeat(3));
            (0..3).for_each(|_| client.hears(CLOSE_OK));
            client.sees_a_reset("three closes in one write", HEARTBEAT);
        }),
        Box::new(|| {
            let mut client = Client::closed(addr, 2);
            client.says(&close());
            client.hears(CLOSE_OK);
            client.sees_a_reset("another close", HEARTBEAT);
        }),
        Box::new(|| {
            let mut client = Client::closed(addr, 2);
            client.says(&frames());
            client.sees_a_reset("frames after the close", HEARTBEAT);
        }),
        Box::new(|| {
            let mut client = Client::closed(addr, LONG);
            client.says(&method(0, CLOSE_OK, b""));
            client.sees_a_reset("close-ok after the close", AT_ONCE);
        }),
        Box::new(|| {
            let client = Client::closed(addr, LONG);
            client.ends_its_side();
            client.sees_a_reset("close, then the end of the client's side", AT_ONCE);
        }),
    ]);
}

fn after_the_brokers_close_the_socket_stays_open_for_a_heartbeat(broker: Broker) {
    let addr = broker.addr();
    all_at_once(vec![
        Box::new(|| Client::refused(addr, 2).sees_a_reset("silence", HEARTBEAT)),
        Box::new(|| {
            let mut client = Client::refused(addr, 2);
            client.says(&frames());
            client.sees_a_reset("frames", HEARTBEAT);
        }),
        Box::new(|| {
            let mut client = Client::refused(addr, 2);
            client.says(&close().repeat(2));
            (0..2).for_each(|_| client.hears(CLOSE_OK));
            client.sees_a_reset("two closes", HEARTBEAT);
        }),
        Box::new(|| {
            let mut client = Client::refused(addr, LONG);
            client.says(&close());
            client.hears(CLOSE_OK);
            client.says(&method(0, CLOSE_OK, b""));
            client.sees_a_reset("close and close-ok", AT_ONCE);
        }),
        Box::new(|| {
            let mut client = Client::refused(addr, LONG);
            client.says(&method(0, CLOSE_OK, b""));
            client.sees_a_reset("close-ok", AT_ONCE);
        }),
        Box::new(|| {
            let client = Client::refused(addr, LONG);
            client.ends_its_side();
            client.sees_a_reset("the end of the client's side", AT_ONCE);
        }),
        Box::new(|| {
            let mut client = Client::open(addr, 2);
            client.since = Instant::now();
            client.says(&frame(5, 0, b"abc"));
            client.hears(CLOSE);
            client.sees_a_reset("a frame of an unknown type", HEARTBEAT);
        }),
    ]);
}

fn after_an_operators_close_it_is_the_same_for_a_client_that_says_nothing(broker: Broker) {
    let broker = broker.hurt();
    let mut clients: Vec<Client> = [2, LONG].map(|heartbeat| Client::open(broker.addr(), heartbeat)).into();
    broker.close_all_connections("for the test");
    let since = Instant::now();
    for client in &mut clients {
        client.since = since;
        client.hears(CLOSE);
    }
    let mut answers = clients.pop().unwrap();
    answers.says(&method(0, CLOSE_OK, b""));
    answers.sees_a_reset("close-ok", AT_ONCE);
    // Its reader is asleep, and was so before the close.
    clients.pop().unwrap().sees_a_reset("silence", HEARTBEAT);
}

fn at_the_end_of_the_broker_clients_are_told_and_reset(broker: Broker) {
    let broker = broker.hurt();
    let clients = [0, 2, LONG].map(|heartbeat| Client::open(broker.addr(), heartbeat));
    match &broker {
        Hurt::RabbitMq(node) => node.stop_app().unwrap(),
        Hurt::Embedded(broker) => broker.stop(),
    }
    for mut client in clients {
        client.since = Instant::now();
        client.hears(CLOSE);
        client.sees_a_reset("the end of the broker", AT_ONCE);
    }
}

fn what_is_no_protocol_ends_the_connection_after_three_seconds(broker: Broker) {
    let addr = broker.addr();
    let after = Duration::from_secs(3);
    let bad_end = b"\x01\0\0\0\0\0\x04abcd\0";
    all_at_once(vec![
        Box::new(|| {
            let mut client = Client::open(addr, LONG);
            client.since = Instant::now();
            client.says(bad_end);
            client.hears(CLOSE);
            // It is not heard.
            client.says(&method(0, CLOSE_OK, b""));
            client.sees_a_reset("a frame with a wrong end", after);
        }),
        Box::new(|| {
            let mut client = Client::open(addr, LONG);
            client.since = Instant::now();
            client.says(b"\x01\0\0\x7f\xff\xff\xff");
            client.hears(CLOSE);
            client.sees_a_reset("a frame that is too large", after);
        }),
        Box::new(|| {
            let mut client = Client::refused(addr, LONG);
            client.says(bad_end);
            client.sees_a_reset("after the broker's close", after);
        }),
        Box::new(|| {
            let mut client = Client::closed(addr, LONG);
            client.says(bad_end);
            client.sees_a_reset("after the client's close", after);
        }),
        Box::new(|| {
            let mut client = Client::open(addr, LONG);
            client.since = Instant::now();
            client.says(bad_end);
            client.hears(CLOSE);
            client.ends_its_side();
            client.sees_a_reset("and the end of the client's side", AT_ONCE);
        }),
    ]);
}

fn a_client_that_ends_its_side_or_is_silent_is_let_go(broker: Broker) {
    let addr = broker.addr();
    all_at_once(vec![
        Box::new(|| {
            let client = Client::open(addr, LONG);
            client.ends_its_side();
            client.sees_a_reset("the end of the client's side", AT_ONCE);
        }),
        // Two intervals, and up to one more until the broker looks.
        Box::new(|| Client::open(addr, 1).sees_a_reset("no heartbeats", Duration::from_millis(1800))),
    ]);
}

fn without_heartbeats_and_with_long_ones_the_socket_stays_open_for_thirty_seconds(broker: Broker) {
    let addr = broker.addr();
    let after = Duration::from_secs(30);
    all_at_once(vec![
        Box::new(|| Client::closed(addr, 0).sees_a_reset("close, no heartbeats", after)),
        Box::new(|| Client::closed(addr, 600).sees_a_reset("close, long ones", after)),
        Box::new(|| Client::refused(addr, 0).sees_a_reset("the broker's close, no heartbeats", after)),
        Box::new(|| Client::refused(addr, 600).sees_a_reset("the broker's close, long ones", after)),
    ]);
}

fn in_the_handshake_the_socket_stays_open_for_three_seconds_and_later_for_a_heartbeat(broker: Broker) {
    let addr = broker.addr();
    let after = Duration::from_secs(3);
    let greeted = || Client { raw: Raw::greet(addr), since: Instant::now() };
    let connected = || Client { raw: Raw { socket: TcpStream::connect(addr).unwrap() }, since: Instant::now() };
    let able = [&short("authentication_failure_close")[..], b"t\x01"].concat();
    let able = [&short("capabilities")[..], b"F", &long(&able)].concat();
    let wrong = |properties: &[u8]| {
        let start_ok = [&long(properties)[..], &short("PLAIN"), &long(b"\0guest\0wrong"), &short("en_US")].concat();
        method(0, (10, 11), &start_ok)
    };
    all_at_once(vec![
        Box::new(|| {
            let mut client = connected();
            client.says(b"HTTP/1.1");
            let (reset, rest) = rest(&mut client.raw.socket);
            // RabbitMQ 4 speaks AMQP 1.0 first of all, to be had by its SASL.
            let speaks = if broker.is_4() { b"AMQP\x03\x01\0\0" } else { b"AMQP\0\0\x09\x01" };
            assert_eq!((reset, rest), (true, speaks.to_vec()));
            assert!(client.since.elapsed() < after, "{:?}", client.since.elapsed());
        }),
        Box::new(|| {
            let mut client = connected();
            client.says(b"AMQP");
            client.ends_its_side();
            client.sees_a_reset("half a header", AT_ONCE);
        }),
        Box::new(|| {
            let client = greeted();
            client.ends_its_side();
            client.sees_a_reset("the end of the client's side", AT_ONCE);
        }),
        Box::new(|| greeted().sees_a_reset("silence", Duration::from_millis(9500))),
        Box::new(|| {
            let mut client = greeted();
            client.says(&wrong(b""));
            client.sees_a_reset("a wrong password, and no word about it", after);
        }),
        Box::new(|| {
            let mut client = greeted();
            client.says(&wrong(&able));
            client.hears(CLOSE);
            client.sees_a_reset("a wrong password", after);
        }),
        Box::new(|| {
            let mut client = greeted();
            client.raw.log_in(b"\0guest\0guest", FRAME_MAX, 2047, 2, "nowhere");
            client.hears(CLOSE);
            client.sees_a_reset("no such virtual host", HEARTBEAT);
        }),
        Box::new(|| {
            let mut client = greeted();
            client.raw.log_in(b"\0guest\0guest", FRAME_MAX, 2047, LONG, "nowhere");
            client.hears(CLOSE);
            client.says(&method(0, CLOSE_OK, b""));
            client.sees_a_reset("no such virtual host, and close-ok", AT_ONCE);
        }),
    ]);
}
