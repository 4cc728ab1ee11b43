//! Who writes to a connection's socket: amiquip's I/O thread, and beside it the threads that publish and settle.
//!
//! A message handed to amiquip is three requests to its I/O thread, which has to be woken, and needs half a dozen system
//! calls to get it out. Where one message is waited for that is most of its cost. So the thread that has it writes the frames
//! itself, whole and in one call, in between two writes of amiquip's. So does one that settles deliveries.
//! amiquip keeps no count of what is published or settled; the answers come in by way of it as ever.
//!
//! What is done behind amiquip's back must not go wrong: nothing is written into the middle of a frame, nor before something
//! that amiquip has been given earlier for the same channel, nor to a channel that is being closed. Whoever may not write
//! here, or finds no room in the socket, hands it to amiquip. Nobody waits here: should the socket take a part of a frame only,
//! a thread that is started for it writes the rest, unless amiquip comes first.
//!
//! Lock order: the lock of the [`Writer`] is a leaf. Under it the socket is written to, which does not wait.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::Duration;

use mio::{Events, Poll, PollOpt, Ready, Token};

use crate::greeting::Greeting;
use crate::outbound::Outbound;
use crate::wire::Wire;

/// How long the thread that finishes a write sleeps at most before it looks whether the connection is still there.
const LOOK: Duration = Duration::from_secs(1);

/// The outgoing half of a connection.
#[derive(Debug)]
pub(crate) struct Writer {
    state: Mutex<State>,
    wire: Arc<Wire>,
    /// It carries no TLS, which only one thread can write.
    is_plain: bool,
}

#[derive(Debug)]
struct State {
    greeting: Greeting,
    outbound: Outbound,
    /// amiquip's last frame is out to its end.
    whole: bool,
    /// Of what the socket has taken a part of: what is to go out before anything else.
    rest: Vec<u8>,
    /// A thread is there that sees to the rest.
    finishing: bool,
}

impl Writer {
    pub(crate) fn new(greeting: Greeting, wire: Arc<Wire>, is_plain: bool) -> Writer {
        Writer { state: Mutex::new(State::new(greeting)), wire, is_plain }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the beginning of what amiquip has to write; returns how much of it.
    pub(crate) fn write(&self, buffer: &[u8], socket: &mut impl Write) -> io::Result<usize> {
        self.state().write(buffer, socket)
    }

    /// Writes the last frame of the connection, if it can be done at once.
    pub(crate) fn write_last(&self, frame: &[u8], socket: &mut impl Write) {
        let mut state = self.state();
        if std::mem::replace(&mut state.whole, false) && state.write_rest(socket).is_ok() {
            let _ = socket.write(frame);
        }
    }

    /// The number of what goes out next on a channel that has just been opened: see [`Outbound::sent`].
    pub(crate) fn first_of(&self, channel: u16) -> Option<u64> {
        self.state().outbound.sent(channel)
    }

    /// Whether anything can be written here. A socket whose other end has closed it would take it, to no purpose.
    pub(crate) fn is_open(&self) -> bool {
        self.is_plain && !self.wire.is_over()
    }

    /// Writes a message or a settlement to a channel on which `number` is the next, with what amiquip has been given. Of which
    /// the socket takes only a part, the rest follows. False if nothing has been written: amiquip is to do it.
    pub(crate) fn write_beside(self: &Arc<Self>, channel: u16, number: u64, frames: &[u8]) -> bool {
        if !self.is_open() {
            return false;
        }
        let mut state = self.state();
        let written = state.write_beside(channel, number, frames, &mut self.wire.socket());
        if written == Written::Part && !std::mem::replace(&mut state.finishing, true) {
            drop(state);
            self.finish();
        }
        written != Written::Nothing
    }

    /// Sees to it that the rest goes out. amiquip waits for room in the socket only while it has something to write itself.
    fn finish(self: &Arc<Self>) {
        let writer = Arc::clone(self);
        let finishing = Builder::new().name("coney-writer".to_owned()).spawn(move || {
            if let Err(error) = writer.wait_for_rest() {
                writer.wire.cut(format!("a frame could not be written whole: {error}"));
            }
        });
        if let Err(error) = finishing {
            self.wire.cut(format!("a frame could not be written whole: no thread for it: {error}"));
        }
    }

    fn wait_for_rest(&self) -> io::Result<()> {
        let (poll, mut events) = (Poll::new()?, Events::with_capacity(1));
        let polled = mio::net::TcpStream::from_stream(self.wire.socket().try_clone()?)?;
        poll.register(&polled, Token(0), Ready::writable(), PollOpt::level())?;
        loop {
            {
                let mut state = self.state();
                match state.write_rest(&mut self.wire.socket()) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock && !self.wire.is_over() => {}
                    done => {
                        state.finishing = false;
                        return done;
                    }
                }
            }
            poll.poll(&mut events, Some(LOOK))?;
        }
    }
}

/// How much has been written.
#[derive(Debug, PartialEq, Eq)]
enum Written {
    Nothing,
    Part,
    All,
}

impl State {
    fn new(greeting: Greeting) -> State {
        State { greeting, outbound: Outbound::default(), whole: false, rest: Vec::new(), finishing: false }
    }

    fn write(&mut self, buffer: &[u8], socket: &mut impl Write) -> io::Result<usize> {
        self.write_rest(socket)?;
        let written = match self.greeting.write(buffer, socket) {
            Some(written) => written,
            None => self.outbound.write(buffer, socket),
        };
        self.whole = matches!(written, Ok(written) if written == buffer.len());
        written
    }

    fn write_beside(&mut self, channel: u16, number: u64, frames: &[u8], socket: &mut impl Write) -> Written {
        if !self.whole || self.outbound.sent(channel) != Some(number) || self.write_rest(socket).is_err() {
            return Written::Nothing;
        }
        match socket.write(frames) {
            // What went wrong, amiquip is told too.
            Ok(0) | Err(_) => Written::Nothing,
            Ok(written) if written == frames.len() => Written::All,
            Ok(written) => {
                self.rest.extend_from_slice(&frames[written..]);
                Written::Part
            }
        }
    }

    fn write_rest(&mut self, socket: &mut impl Write) -> io::Result<()> {
        while !self.rest.is_empty() {
            match socket.write(&self.rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => drop(self.rest.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{Ipv4Addr, TcpListener, TcpStream};
    use std::thread;
    use std::time::Instant;

    use super::*;
    use crate::outbound::push_frame;

    const METHOD: u8 = 1;
    const HEADER: u8 = 2;
    const BODY: u8 = 3;
    const OPEN: [u8; 4] = [0, 20, 0, 10];
    const CLOSE_OK: [u8; 4] = [0, 20, 0, 41];
    const PUBLISH: [u8; 4] = [0, 60, 0, 40];
    const ACK: [u8; 4] = [0, 60, 0, 80];
    const REJECT: [u8; 4] = [0, 60, 0, 90];
    /// What the numbers of the first and the second channel begin with that are opened.
    const FIRST: u64 = 1 << 32;
    const SECOND: u64 = 2 << 32;

    fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        push_frame(&mut frame, kind, channel, payload);
        frame
    }

    /// A message on a channel: three frames.
    fn message(channel: u16, body: &[u8]) -> Vec<u8> {
        let size = (body.len() as u64).to_be_bytes();
        let header = [&[0, 60, 0, 0][..], &size, &[0, 0]].concat();
        [frame(METHOD, channel, &PUBLISH), frame(HEADER, channel, &header), frame(BODY, channel, body)].concat()
    }

    fn state() -> State {
        let mut greeting = Greeting::new("test");
        // What is not a start-ok goes out as it is.
        greeting.write(b"AMQP\0\0\x09\x01", &mut io::sink()).unwrap().unwrap();
        State { whole: true, ..State::new(greeting) }
    }

    /// Takes as much as there is room for.
    #[derive(Default)]
    struct Narrow {
        taken: Vec<u8>,
        room: usize,
    }

    impl Write for Narrow {
        fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
            if self.room == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let step = buffer.len().min(self.room);
            self.room -= step;
            self.taken.extend_from_slice(&buffer[..step]);
            Ok(step)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn nothing_is_written_beside_amiquip_where_it_would_come_amiss() {
        let mut socket = Narrow { taken: Vec::new(), room: usize::MAX };
        let mut state = state();
        let ours = message(1, b"ours");
        assert_eq!(state.write_beside(1, FIRST, &ours, &mut socket), Written::Nothing, "the channel is not open");
        state.write(&frame(METHOD, 1, &OPEN), &mut socket).unwrap();
        assert_eq!(state.write_beside(2, FIRST, &ours, &mut socket), Written::Nothing, "the channel is another");
        assert_eq!(
            state.write_beside(1, FIRST + 1, &ours, &mut socket),
            Written::Nothing,
            "amiquip has one still to write"
        );
        assert_eq!(state.write_beside(1, FIRST, &ours, &mut socket), Written::All);

        // amiquip writes a message of its own, frame by frame.
        let theirs = message(1, b"theirs");
        let method = frame(METHOD, 1, &PUBLISH).len();
        state.write(&theirs[..method], &mut socket).unwrap();
        assert_eq!(state.write_beside(1, FIRST, &ours, &mut socket), Written::Nothing, "in the middle of a message");
        assert_eq!(
            state.write_beside(1, FIRST + 1, &ours, &mut socket),
            Written::Nothing,
            "in the middle of a message"
        );
        socket.room = 3;
        assert_eq!(state.write(&theirs[method..], &mut socket).unwrap(), 3);
        socket.room = usize::MAX;
        assert_eq!(state.write_beside(1, FIRST + 1, &ours, &mut socket), Written::Nothing, "in the middle of a frame");
        state.write(&theirs[method + 3..], &mut socket).unwrap();
        assert_eq!(state.write_beside(1, FIRST + 1, &ours, &mut socket), Written::All);

        let settled = [frame(METHOD, 1, &ACK), frame(METHOD, 1, &REJECT)].concat();
        state.write(&settled, &mut socket).unwrap();
        assert_eq!(
            state.write_beside(1, FIRST + 1, &ours, &mut socket),
            Written::Nothing,
            "more was written than given"
        );
        assert_eq!(
            state.write_beside(1, FIRST + 4, &ours, &mut socket),
            Written::Nothing,
            "less was written than given"
        );
        assert_eq!(state.write_beside(1, FIRST + 3, &ours, &mut socket), Written::All);

        socket.room = 0;
        assert_eq!(state.write_beside(1, FIRST + 3, &ours, &mut socket), Written::Nothing, "there is no room");
        socket.room = usize::MAX;
        state.write(&frame(METHOD, 1, &CLOSE_OK), &mut socket).unwrap();
        assert_eq!(state.write_beside(1, FIRST + 3, &ours, &mut socket), Written::Nothing, "the channel is closed");
        state.write(&frame(METHOD, 1, &OPEN), &mut socket).unwrap();
        assert_eq!(
            state.write_beside(1, FIRST, &ours, &mut socket),
            Written::Nothing,
            "it was meant for an earlier one"
        );
        assert_eq!(state.write_beside(1, SECOND, &ours, &mut socket), Written::All, "and open again");
        state.write(&frame(METHOD, 0, &[0, 10, 0, 50]), &mut socket).unwrap();
        assert_eq!(state.write_beside(1, SECOND, &ours, &mut socket), Written::Nothing, "the connection is closed");
        let frames = [
            frame(METHOD, 1, &OPEN),
            ours.clone(),
            theirs,
            ours.clone(),
            settled,
            ours.clone(),
            frame(METHOD, 1, &CLOSE_OK),
            frame(METHOD, 1, &OPEN),
            ours,
            frame(METHOD, 0, &[0, 10, 0, 50]),
        ];
        assert_eq!(socket.taken, frames.concat());
    }

    #[test]
    fn whatever_the_socket_takes_at_a_time_frames_stay_whole_and_messages_in_order() {
        for seed in 0..200 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (mut state, mut socket) = (state(), Narrow::default());
            // What amiquip has still to write, and how many messages it has been given for our channel.
            let (mut waiting, mut given) = ([frame(METHOD, 1, &OPEN), frame(METHOD, 2, &OPEN)].concat(), 0);
            let mut sent = Vec::new();
            for n in 0..200_u8 {
                socket.room += random.usize(..80);
                let ours = message(1, &[n]);
                let is_out =
                    random.bool() && state.write_beside(1, FIRST + given, &ours, &mut socket) != Written::Nothing;
                if !is_out {
                    given += 1;
                    waiting.extend(ours);
                }
                sent.push(n);
                waiting.extend(frame(BODY, 2, &vec![n; random.usize(..60)]));
                if random.bool()
                    && let Ok(written) = state.write(&waiting, &mut socket)
                {
                    waiting.drain(..written);
                }
            }
            socket.room = usize::MAX;
            while !waiting.is_empty() {
                let written = state.write(&waiting, &mut socket).unwrap();
                waiting.drain(..written);
            }
            state.write_rest(&mut socket).unwrap();

            let (mut rest, mut arrived, mut kinds) = (&socket.taken[..], Vec::new(), Vec::new());
            while let Some((header, payload)) = rest.split_first_chunk::<7>() {
                let size = u32::from_be_bytes([header[3], header[4], header[5], header[6]]) as usize;
                assert_eq!(payload[size], 0xCE, "seed {seed}");
                if header[2] == 1 && payload[..4] != OPEN {
                    kinds.push(header[0]);
                    arrived.extend((header[0] == BODY).then(|| payload[0]));
                }
                rest = &payload[size + 1..];
            }
            assert_eq!(arrived, sent, "seed {seed}");
            assert_eq!(kinds, [METHOD, HEADER, BODY].repeat(200), "seed {seed}");
        }
    }

    /// A writer with open channel 1, and the other end of its socket.
    fn connected() -> (Arc<Writer>, TcpStream) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        socket.set_nonblocking(true).unwrap();
        let wire = Arc::new(Wire::new(socket));
        let writer = Arc::new(Writer { state: Mutex::new(state()), wire, is_plain: true });
        writer.write(&frame(METHOD, 1, &OPEN), &mut io::sink()).unwrap();
        (writer, listener.accept().unwrap().0)
    }

    /// Writes messages until the socket takes nothing more, and returns how many bytes they are.
    fn fill(writer: &Arc<Writer>, message: &[u8]) -> usize {
        let mut filled = 0;
        while writer.write_beside(1, FIRST, message) {
            filled += message.len();
            assert!(filled < 1 << 30, "it takes everything");
        }
        filled
    }

    fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !done() {
            assert!(Instant::now() < deadline, "{what}");
            thread::yield_now();
        }
    }

    #[test]
    fn what_the_socket_does_not_take_arrives_once_the_peer_reads() {
        let (writer, mut peer) = connected();
        let message = message(1, &[7; 14_321]);
        let mut all = vec![0; 3_000 * message.len()];
        thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..3_000 {
                    // Where there is no room at all, it is amiquip that waits.
                    wait_until("the message is written", || writer.write_beside(1, FIRST, &message));
                }
            });
            peer.read_exact(&mut all).unwrap();
        });
        assert!(all.chunks(message.len()).all(|chunk| chunk == message));
        wait_until("nobody is left to finish it", || Arc::strong_count(&writer) == 1);
    }

    #[test]
    fn a_part_that_is_left_goes_out_before_anything_else() {
        let (writer, mut peer) = connected();
        let message = message(1, &[7; 14_321]);
        let filled = fill(&writer, &message);
        let amiquips = frame(8, 0, &[]);
        let mut socket = writer.wire.socket();
        assert_eq!(writer.write(&amiquips, &mut socket).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let mut all = vec![0; filled + amiquips.len()];
        thread::scope(|scope| {
            scope.spawn(|| wait_until("amiquip's is written", || writer.write(&amiquips, &mut socket).is_ok()));
            peer.read_exact(&mut all).unwrap();
        });
        let (ours, theirs) = all.split_at(filled);
        assert!(ours.chunks(message.len()).all(|chunk| chunk == message));
        assert_eq!(theirs, amiquips);
    }

    #[test]
    fn the_end_of_the_connection_is_the_end_of_what_is_left() {
        let (writer, _peer) = connected();
        let message = message(1, &[7; 14_321]);
        fill(&writer, &message);
        writer.wire.cut("for the test");
        assert!(!writer.write_beside(1, FIRST, &message));
        wait_until("nobody is left to finish it", || Arc::strong_count(&writer) == 1);
    }
}
