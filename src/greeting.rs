//! How a connection introduces itself: the client properties in `connection.start-ok`.
//!
//! amiquip announces itself and two capabilities. A pool wants its connections to be told apart in the broker's
//! listings (`connection_name`) and wants a refused login to be answered with a reason instead of a closed socket
//! (`authentication_failure_close`), so the properties are replaced on their way out. Everything else amiquip says
//! goes out as it is.

use std::io::{self, Write};

const PROTOCOL_HEADER_LEN: usize = 8;
const FRAME_HEADER_LEN: usize = 7;
/// Class 10, method 11.
const START_OK: [u8; 4] = [0, 10, 0, 11];

/// What this client can do, each with the RabbitMQ extension it names
/// (<https://www.rabbitmq.com/docs/consumer-cancel#capabilities> and the pages beside it).
const CAPABILITIES: [&str; 6] = [
    "authentication_failure_close",
    "basic.nack",
    "connection.blocked",
    "consumer_cancel_notify",
    "exchange_exchange_bindings",
    "publisher_confirms",
];

#[derive(Debug)]
enum State {
    /// Bytes of the protocol header that amiquip has still to write.
    ProtocolHeader(usize),
    StartOk,
    /// The replaced frame: what is left of it to write, and how long the original was.
    Replacing {
        frame: Vec<u8>,
        written: usize,
        original: usize,
    },
    Said,
}

#[derive(Debug)]
pub(crate) struct Greeting {
    name: String,
    state: State,
}

impl Greeting {
    /// A greeting by the connection name `name`.
    pub(crate) fn new(name: impl Into<String>) -> Greeting {
        Greeting { name: name.into(), state: State::ProtocolHeader(PROTOCOL_HEADER_LEN) }
    }

    /// Writes the beginning of `buffer` with the properties replaced, and returns how much of `buffer` is dealt with; a
    /// replaced frame counts as written only once all of it is. `None` once the greeting has been said.
    pub(crate) fn write(&mut self, buffer: &[u8], socket: &mut impl Write) -> Option<io::Result<usize>> {
        match self.state {
            State::Said => None,
            _ => self.say(buffer, socket).transpose(),
        }
    }

    fn say(&mut self, buffer: &[u8], socket: &mut impl Write) -> io::Result<Option<usize>> {
        loop {
            match &mut self.state {
                State::ProtocolHeader(left) => {
                    let written = socket.write(&buffer[..buffer.len().min(*left)])?;
                    *left -= written;
                    if *left == 0 {
                        self.state = State::StartOk;
                    }
                    return Ok(Some(written));
                }
                State::StartOk => match introduce(buffer, &self.name) {
                    Some((frame, original)) => self.state = State::Replacing { frame, written: 0, original },
                    None => self.state = State::Said,
                },
                State::Replacing { frame, written, original } => {
                    while *written < frame.len() {
                        match socket.write(&frame[*written..])? {
                            0 => return Err(io::ErrorKind::WriteZero.into()),
                            step => *written += step,
                        }
                    }
                    let original = *original;
                    self.state = State::Said;
                    return Ok(Some(original));
                }
                State::Said => return Ok(None),
            }
        }
    }
}

/// The `start-ok` frame at the beginning of `buffer` with our client properties, and the length of the original.
/// `None` if there is no whole `start-ok` there; it then goes out as amiquip wrote it.
fn introduce(buffer: &[u8], name: &str) -> Option<(Vec<u8>, usize)> {
    let size = u32::from_be_bytes(*buffer.get(3..)?.first_chunk::<4>()?) as usize;
    let original = FRAME_HEADER_LEN + size + 1;
    let payload = buffer.get(FRAME_HEADER_LEN..FRAME_HEADER_LEN + size)?;
    buffer.get(original - 1)?;
    let after_method = payload.strip_prefix(&START_OK)?;
    let table = u32::from_be_bytes(*after_method.first_chunk::<4>()?) as usize;
    let rest = after_method.get(4 + table..)?;

    let mut payload = START_OK.to_vec();
    long_block(&mut payload, &client_properties(name));
    payload.extend_from_slice(rest);
    let mut frame = buffer[..3].to_vec();
    long_block(&mut frame, &payload);
    frame.push(0xCE);
    Some((frame, original))
}

fn client_properties(name: &str) -> Vec<u8> {
    let mut capabilities = Vec::new();
    for capability in CAPABILITIES {
        short_string(&mut capabilities, capability);
        capabilities.extend([b't', 1]);
    }
    let mut table = Vec::new();
    short_string(&mut table, "capabilities");
    table.push(b'F');
    long_block(&mut table, &capabilities);
    let platform = format!("Rust on {}", std::env::consts::OS);
    for (key, value) in [
        ("connection_name", name),
        ("information", env!("CARGO_PKG_DESCRIPTION")),
        ("platform", platform.as_str()),
        ("product", env!("CARGO_PKG_NAME")),
        ("version", env!("CARGO_PKG_VERSION")),
    ] {
        short_string(&mut table, key);
        table.push(b'S');
        long_block(&mut table, value.as_bytes());
    }
    table
}

/// Length as one byte, then the text. Only for the short constants of this file.
fn short_string(into: &mut Vec<u8>, text: &str) {
    into.push(text.len() as u8);
    into.extend_from_slice(text.as_bytes());
}

/// Length as four bytes, then the bytes: a long string, a table, a frame's payload.
fn long_block(into: &mut Vec<u8>, bytes: &[u8]) {
    into.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
    into.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes at most `room` bytes in all, a few at a time, then would block.
    struct Narrow {
        taken: Vec<u8>,
        room: usize,
    }

    impl Write for Narrow {
        fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
            let step = buffer.len().min(5).min(self.room);
            if step == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            self.room -= step;
            self.taken.extend_from_slice(&buffer[..step]);
            Ok(step)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn start_ok() -> Vec<u8> {
        let mut payload = START_OK.to_vec();
        long_block(&mut payload, b"\x07productS\x00\x00\x00\x07amiquip");
        short_string(&mut payload, "PLAIN");
        long_block(&mut payload, b"\0guest\0guest");
        short_string(&mut payload, "en_US");
        let mut frame = vec![1, 0, 0];
        long_block(&mut frame, &payload);
        frame.push(0xCE);
        frame
    }

    #[test]
    fn the_properties_are_replaced_and_the_rest_is_kept_whatever_the_socket_takes() {
        let start_ok = start_ok();
        let mut said = b"AMQP\x00\x00\x09\x01".to_vec();
        said.extend_from_slice(&start_ok);
        said.extend_from_slice(b"what follows");
        let mut whole = None;
        for room in [1, 7, 9, 40, 10_000] {
            let mut greeting = Greeting::new("coney publish #3");
            let mut socket = Narrow { taken: Vec::new(), room };
            // As amiquip does: write until all is taken, from where the last write got to.
            let (mut at, mut part) = (0, 8);
            while at < said.len() {
                match greeting.write(&said[at..part], &mut socket) {
                    None => match socket.write(&said[at..part]) {
                        Ok(step) => at += step,
                        Err(_) => socket.room = room,
                    },
                    Some(Ok(step)) => at += step,
                    Some(Err(error)) => {
                        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                        socket.room = room;
                    }
                }
                if at == part {
                    part = said.len();
                }
            }
            assert!(matches!(greeting.state, State::Said));
            let taken = socket.taken;
            assert!(taken.starts_with(b"AMQP\x00\x00\x09\x01\x01\x00\x00"));
            assert!(taken.ends_with(b"\x05PLAIN\x00\x00\x00\x0c\0guest\0guest\x05en_US\xCEwhat follows"));
            let text = String::from_utf8_lossy(&taken);
            assert!(text.contains("coney publish #3") && text.contains("authentication_failure_close"));
            assert!(!text.contains("amiquip"));
            assert_eq!(whole.get_or_insert(taken.clone()), &taken, "room {room}");
        }
    }

    #[test]
    fn what_is_no_start_ok_is_left_to_be_written_as_it_is() {
        let mut greeting = Greeting::new("x");
        let mut socket = Vec::new();
        assert_eq!(greeting.write(b"AMQP\x00\x00\x09\x01", &mut socket).unwrap().unwrap(), 8);
        let heartbeat = [8, 0, 0, 0, 0, 0, 0, 0xCE];
        assert!(greeting.write(&heartbeat, &mut socket).is_none());
        assert_eq!(socket.len(), 8);
    }
}
