//! A client of so few words that it can say wrong ones: AMQP frames by hand, through the public face of a broker.

// Each test binary uses some of it.
#![allow(dead_code)]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

/// No answer of a broker takes this long.
const PATIENCE: Duration = Duration::from_secs(30);

pub const FRAME_MAX: u32 = 131_072;

pub struct Raw {
    pub socket: TcpStream,
}

impl Raw {
    /// The protocol header is said, and `connection.start` has come.
    pub fn greet(addr: SocketAddr) -> Raw {
        let socket = TcpStream::connect(addr).unwrap();
        socket.set_nodelay(true).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut raw = Raw { socket };
        raw.send(b"AMQP\x00\x00\x09\x01");
        assert_eq!(raw.method().0, (10, 10));
        raw
    }

    /// With a virtual host and channel 1 open.
    pub fn open(addr: SocketAddr) -> Raw {
        let mut raw = Raw::greet(addr);
        raw.open_with(FRAME_MAX, 2047);
        raw
    }

    /// Logs in, agrees to frames of this size and so many channels, and opens the virtual host and channel 1.
    pub fn open_with(&mut self, frame_max: u32, channel_max: u16) {
        let raw = self;
        raw.log_in(b"\0guest\0guest", frame_max, channel_max, 0, "/");
        assert_eq!(raw.method().0, (10, 41));
        raw.say(1, (20, 10), &short(""));
        assert_eq!(raw.method().0, (20, 11));
    }

    /// Logs in and asks for a virtual host. What becomes of it is still to be read.
    pub fn log_in(&mut self, login: &[u8], frame_max: u32, channel_max: u16, heartbeat: u16, vhost: &str) {
        self.log_in_as(b"", login, frame_max, channel_max, heartbeat, vhost);
    }

    /// Opens the virtual host `/` under this `connection_name`.
    pub fn open_named(addr: SocketAddr, name: &str) -> Raw {
        let mut raw = Raw::greet(addr);
        let properties = [&short("connection_name")[..], b"S", &long(name.as_bytes())].concat();
        raw.log_in_as(&properties, b"\0guest\0guest", FRAME_MAX, 2047, 0, "/");
        assert_eq!(raw.method().0, (10, 41));
        raw
    }

    fn log_in_as(
        &mut self,
        properties: &[u8],
        login: &[u8],
        frame_max: u32,
        channel_max: u16,
        heartbeat: u16,
        vhost: &str,
    ) {
        let start_ok = [&long(properties)[..], &short("PLAIN"), &long(login), &short("en_US")].concat();
        self.say(0, (10, 11), &start_ok);
        assert_eq!(self.method().0, (10, 30));
        let tune_ok = [&channel_max.to_be_bytes()[..], &frame_max.to_be_bytes(), &heartbeat.to_be_bytes()].concat();
        self.say(0, (10, 31), &tune_ok);
        self.say(0, (10, 40), &[&short(vhost)[..], &short(""), &[0]].concat());
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    pub fn say(&mut self, channel: u16, id: (u16, u16), arguments: &[u8]) {
        self.send(&method(channel, id, arguments));
    }

    /// Type, channel and payload of the next frame; `None` at the end of the stream.
    pub fn frame(&mut self) -> Option<(u8, u16, Vec<u8>)> {
        let mut header = [0; 7];
        // An end, orderly or not.
        self.socket.read_exact(&mut header).ok()?;
        let [kind, c1, c0, l3, l2, l1, l0] = header;
        let mut payload = vec![0; u32::from_be_bytes([l3, l2, l1, l0]) as usize + 1];
        self.socket.read_exact(&mut payload).unwrap();
        assert_eq!(payload.pop(), Some(0xce));
        Some((kind, u16::from_be_bytes([c1, c0]), payload))
    }

    /// Class, method and arguments of the next frame, which must be a method.
    pub fn method(&mut self) -> ((u16, u16), Vec<u8>) {
        as_method(self.frame().expect("the connection has ended"))
    }

    /// The same of the next frame that is no heartbeat.
    pub fn method_but_heartbeats(&mut self) -> ((u16, u16), Vec<u8>) {
        loop {
            let frame = self.frame().expect("the connection has ended");
            if frame.0 != 8 {
                return as_method(frame);
            }
        }
    }

    /// The code of the `connection.close` or `channel.close` that must come next.
    pub fn refused(&mut self) -> u16 {
        let (id, arguments) = self.method();
        assert!(id == (10, 50) || id == (20, 40), "{id:?}");
        u16::from_be_bytes([arguments[0], arguments[1]])
    }

    /// Which method closes the channel or the connection, as must come next, its code and its text.
    pub fn refusal(&mut self) -> ((u16, u16), u16, String) {
        let (id, arguments) = self.method();
        assert!(id == (10, 50) || id == (20, 40), "{id:?}");
        let text = String::from_utf8_lossy(&arguments[3..3 + usize::from(arguments[2])]).into_owned();
        (id, u16::from_be_bytes([arguments[0], arguments[1]]), text)
    }

    pub fn declare(&mut self, queue: &str) {
        self.say(1, (50, 10), &[&[0, 0][..], &short(queue), &[0], &long(b"")].concat());
        assert_eq!(self.method().0, (50, 11));
    }

    /// The same with what follows the reserved bytes and the name: a byte of flags, and arguments as [`long`] has them.
    pub fn declare_with(&mut self, queue: &str, flags: u8, arguments: &[u8]) {
        self.say(1, (50, 10), &[&[0, 0][..], &short(queue), &[flags], &long(arguments)].concat());
    }

    /// Sets the prefetch of channel 1.
    pub fn limit(&mut self, prefetch: u16, global: bool) {
        self.say(1, (60, 10), &[&[0; 4][..], &prefetch.to_be_bytes(), &[u8::from(global)]].concat());
        assert_eq!(self.method().0, (60, 11));
    }

    /// Consumes from a queue under this tag. The answer is still to be read.
    pub fn consume(&mut self, queue: &str, tag: &str) {
        self.say(1, (60, 20), &[&[0, 0][..], &short(queue), &short(tag), &[0], &long(b"")].concat());
    }

    pub fn ack(&mut self, delivery: u64) {
        self.say(1, (60, 80), &[&delivery.to_be_bytes()[..], &[0]].concat());
    }

    pub fn nack(&mut self, delivery: u64, requeue: bool) {
        self.say(1, (60, 120), &[&delivery.to_be_bytes()[..], &[u8::from(requeue) << 1]].concat());
    }

    /// The consumer tag and the delivery tag of the delivery that must come next, once what else comes has been skipped.
    pub fn delivery(&mut self) -> (String, u64) {
        loop {
            let (kind, _, payload) = self.frame().expect("the connection has ended");
            if kind == 1 && payload.starts_with(&[0, 60, 0, 60]) {
                let (tag, rest) = payload[5..].split_at(usize::from(payload[4]));
                return (String::from_utf8(tag.to_vec()).unwrap(), u64::from_be_bytes(*rest.first_chunk().unwrap()));
            }
            assert!(kind != 1 || payload[..2] != [0, 20] && payload[..2] != [0, 10], "{payload:?}");
        }
    }

    /// How many messages wait in a queue.
    pub fn count(&mut self, queue: &str) -> u32 {
        self.say(1, (50, 10), &[&[0, 0][..], &short(queue), &[1], &long(b"")].concat());
        let (id, arguments) = self.method();
        assert_eq!(id, (50, 11));
        let at = 1 + usize::from(arguments[0]);
        u32::from_be_bytes(*arguments[at..].first_chunk().unwrap())
    }

    /// Consumes without acknowledging.
    pub fn consume_no_ack(&mut self, queue: &str) {
        self.say(1, (60, 20), &[&[0, 0][..], &short(queue), &short("deaf"), &[2], &long(b"")].concat());
        assert_eq!(self.method().0, (60, 21));
    }

    /// Ends the connection while deliveries may still be on their way.
    pub fn close_at_once(self) {
        drop(self);
    }

    pub fn close(mut self) {
        self.say(0, (10, 50), &[&200_u16.to_be_bytes()[..], &short(""), &[0; 4]].concat());
        assert_eq!(self.method().0, (10, 51));
        // RabbitMQ leaves it to the client to end the stream, for 30 s.
        self.socket.shutdown(Shutdown::Write).unwrap();
        assert_eq!(self.frame(), None);
    }
}

fn as_method((kind, _, payload): (u8, u16, Vec<u8>)) -> ((u16, u16), Vec<u8>) {
    assert_eq!(kind, 1, "no method: {payload:?}");
    let (&[c1, c0, m1, m0], arguments) = payload.split_first_chunk::<4>().unwrap();
    ((u16::from_be_bytes([c1, c0]), u16::from_be_bytes([m1, m0])), arguments.to_vec())
}

pub fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
    let len = (payload.len() as u32).to_be_bytes();
    [&[kind][..], &channel.to_be_bytes(), &len, payload, &[0xce]].concat()
}

pub fn method(channel: u16, (class, id): (u16, u16), arguments: &[u8]) -> Vec<u8> {
    frame(1, channel, &[&class.to_be_bytes()[..], &id.to_be_bytes(), arguments].concat())
}

/// Method and header of a message to a queue, on channel 1, and as much of its body as is given.
pub fn publish(queue: &str, claimed: u64, body: &[u8]) -> Vec<u8> {
    publish_with(queue, 0, claimed, body)
}

/// A message that is to come back if it cannot be routed.
pub fn publish_mandatory(queue: &str, body: &[u8]) -> Vec<u8> {
    publish_with(queue, 1, body.len() as u64, body)
}

fn publish_with(queue: &str, flags: u8, claimed: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = method(1, (60, 40), &[&[0, 0][..], &short(""), &short(queue), &[flags]].concat());
    bytes.extend(frame(2, 1, &[&[0, 60, 0, 0][..], &claimed.to_be_bytes(), &[0, 0]].concat()));
    if !body.is_empty() {
        bytes.extend(frame(3, 1, body));
    }
    bytes
}

pub fn short(text: &str) -> Vec<u8> {
    [&[text.len() as u8][..], text.as_bytes()].concat()
}

/// Also a table, of its inside.
pub fn long(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_be_bytes()[..], bytes].concat()
}
