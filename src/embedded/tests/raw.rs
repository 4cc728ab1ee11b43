//! A client that says what it is told to, right or wrong.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::amqp::frame::{self, FRAME_HEADER, PROTOCOL_HEADER};
use crate::amqp::method::*;
use crate::amqp::value::{Table, Value};

/// No answer of the broker takes this long.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

pub(super) struct Raw {
    pub(super) socket: TcpStream,
}

/// A frame that came.
#[derive(Debug, PartialEq)]
pub(super) struct Came {
    pub(super) kind: u8,
    pub(super) channel: u16,
    pub(super) payload: Vec<u8>,
}

impl Raw {
    pub(super) fn connect(addr: SocketAddr) -> Raw {
        let socket = TcpStream::connect(addr).unwrap();
        socket.set_nodelay(true).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Raw { socket }
    }

    /// Up to `connection.tune`, which is returned.
    pub(super) fn log_in(addr: SocketAddr) -> (Raw, ConnectionTune) {
        let mut raw = Raw::connect(addr);
        raw.send(&PROTOCOL_HEADER);
        assert!(matches!(raw.method(0), Method::ConnectionStart(_)));
        raw.say(0, start_ok("PLAIN", b"\0guest\0guest", true));
        match raw.method(0) {
            Method::ConnectionTune(tune) => (raw, tune),
            other => panic!("{other:?}"),
        }
    }

    /// Up to `connection.open-ok`, with this heartbeat.
    pub(super) fn open_with(addr: SocketAddr, channel_max: u16, heartbeat: u16) -> Raw {
        let (mut raw, tune) = Raw::log_in(addr);
        raw.say(0, ConnectionTuneOk { channel_max, frame_max: tune.frame_max, heartbeat });
        raw.say(0, ConnectionOpen { virtual_host: "/".into(), ..Default::default() });
        assert_eq!(raw.method(0), ConnectionOpenOk::default().into());
        raw
    }

    pub(super) fn open(addr: SocketAddr) -> Raw {
        Raw::open_with(addr, 2047, 0)
    }

    /// With channel 1 open.
    pub(super) fn channel(addr: SocketAddr) -> Raw {
        let mut raw = Raw::open(addr);
        raw.open_channel(1);
        raw
    }

    pub(super) fn open_channel(&mut self, number: u16) {
        self.say(number, ChannelOpen::default());
        assert_eq!(self.method(number), ChannelOpenOk::default().into());
    }

    pub(super) fn declare(&mut self, queue: &str) {
        self.say(1, QueueDeclare { queue: queue.into(), ..Default::default() });
        assert!(matches!(self.method(1), Method::QueueDeclareOk(_)));
    }

    pub(super) fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    pub(super) fn say(&mut self, channel: u16, method: impl Into<Method>) {
        let mut bytes = Vec::new();
        frame::write_method(&mut bytes, channel, &method.into());
        self.send(&bytes);
    }

    pub(super) fn frame(&mut self, kind: u8, channel: u16, payload: &[u8]) {
        self.send(&framed(kind, channel, payload));
    }

    /// Method, header and body, as a client should send them.
    pub(super) fn publish(&mut self, queue: &str, properties: &[u8], body: &[u8]) {
        let publish = BasicPublish { routing_key: queue.into(), ..Default::default() };
        let mut bytes = Vec::new();
        frame::write_method(&mut bytes, 1, &publish.into());
        frame::write_content(&mut bytes, 1, properties, body, 131_072);
        self.send(&bytes);
    }

    /// The next frame; `None` at the end of the stream.
    pub(super) fn next(&mut self) -> Option<Came> {
        let mut header = [0; FRAME_HEADER];
        let mut read = 0;
        while read < header.len() {
            match self.socket.read(&mut header[read..]) {
                Ok(0) if read == 0 => return None,
                Ok(0) => panic!("the stream ends in a frame"),
                Ok(len) => read += len,
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset && read == 0 => return None,
                Err(error) => panic!("no frame: {error}"),
            }
        }
        let [kind, c1, c0, l3, l2, l1, l0] = header;
        let mut payload = vec![0; u32::from_be_bytes([l3, l2, l1, l0]) as usize + 1];
        self.socket.read_exact(&mut payload).unwrap();
        assert_eq!(payload.pop(), Some(frame::FRAME_END));
        Some(Came { kind, channel: u16::from_be_bytes([c1, c0]), payload })
    }

    /// The next frame that is no heartbeat, which must be a method on this channel.
    pub(super) fn method(&mut self, channel: u16) -> Method {
        loop {
            let came = self.next().expect("the connection has ended");
            if came.kind == frame::HEARTBEAT {
                continue;
            }
            assert_eq!((came.kind, came.channel), (frame::METHOD, channel), "{came:?}");
            let [c1, c0, m1, m0] = *came.payload.first_chunk().unwrap();
            let (class, method) = (u16::from_be_bytes([c1, c0]), u16::from_be_bytes([m1, m0]));
            return Method::decode(class, method, &came.payload[4..]).unwrap().unwrap();
        }
    }

    /// The code, text, class and method of a `connection.close`, which is what must come next.
    pub(super) fn refused(&mut self) -> (u16, String, (u16, u16)) {
        match self.method(0) {
            Method::ConnectionClose(close) => {
                (close.reply_code, close.reply_text.to_string(), (close.class_id, close.method_id))
            }
            other => panic!("{other:?}"),
        }
    }

    /// The same of a `channel.close` on channel 1.
    pub(super) fn channel_refused(&mut self) -> (u16, String, (u16, u16)) {
        match self.method(1) {
            Method::ChannelClose(close) => {
                (close.reply_code, close.reply_text.to_string(), (close.class_id, close.method_id))
            }
            other => panic!("{other:?}"),
        }
    }

    /// The stream must end here.
    pub(super) fn ended(&mut self) {
        assert_eq!(self.next(), None);
    }

    /// Answers a `connection.close`; the broker must then close.
    pub(super) fn close_ok(&mut self) {
        self.say(0, ConnectionCloseOk {});
        self.ended();
    }

    /// Shows that the connection is well.
    pub(super) fn close(mut self) {
        self.say(0, ConnectionClose { reply_code: 200, ..Default::default() });
        assert_eq!(self.method(0), ConnectionCloseOk {}.into());
        // If the client leaves it open, it stays open for another 30 s.
        self.socket.shutdown(std::net::Shutdown::Write).unwrap();
        self.ended();
    }
}

pub(super) fn framed(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend_from_slice(&channel.to_be_bytes());
    bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes.push(frame::FRAME_END);
    bytes
}

/// The payload of a content header.
pub(super) fn header(class: u16, size: u64, properties: &[u8]) -> Vec<u8> {
    let mut payload = class.to_be_bytes().to_vec();
    payload.extend_from_slice(&[0, 0]);
    payload.extend_from_slice(&size.to_be_bytes());
    payload.extend_from_slice(properties);
    payload
}

/// `told` says whether the client can be told of a failed login.
pub(super) fn start_ok(mechanism: &str, response: &[u8], told: bool) -> ConnectionStartOk {
    let capabilities = Table::default()
        .with("authentication_failure_close", Value::Bool(told))
        .with("connection.blocked", Value::Bool(true))
        .with("consumer_cancel_notify", Value::Bool(true));
    ConnectionStartOk {
        client_properties: Table::default().with("capabilities", Value::Table(capabilities)),
        mechanism: mechanism.into(),
        response: response.to_vec(),
        locale: "en_US".into(),
    }
}
