//! A connection through the proxy: two sockets, and what is on its way between them.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::net::sockopt::set_socket_linger;

use super::{Cut, Direction, Flow, Limit, Traffic};

/// What one lane reads at a time, and holds at most.
const CHUNK: usize = 64 << 10;

/// A throttled lane writes this often in a second, if it may write that many bytes.
const BEATS: u32 = 20;

/// The next close of the socket tells its peer with a reset.
pub(super) fn reset(socket: &TcpStream) {
    // It fails for a socket that is broken already.
    let _ = set_socket_linger(socket, Some(Duration::ZERO));
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    Silent,
    /// Both sides have been told; what they still send is read, for unread bytes would turn the close into a reset.
    Ending,
    Over,
}

/// A connection: two sockets.
pub(super) struct Link {
    pub(super) number: u64,
    client: TcpStream,
    broker: TcpStream,
    up: Lane,
    down: Lane,
    state: State,
}

impl Link {
    pub(super) fn new(number: u64, client: TcpStream, broker: TcpStream) -> Link {
        Link { number, client, broker, up: Lane::new(), down: Lane::new(), state: State::Open }
    }

    pub(super) fn is_over(&self) -> bool {
        self.state == State::Over || self.state == State::Ending && self.up.has_ended && self.down.has_ended
    }

    fn flow(&self, flows: [Flow; 2], direction: Direction) -> Flow {
        match self.state {
            State::Open => flows[direction as usize],
            State::Silent | State::Ending | State::Over => Flow::Swallow,
        }
    }

    /// Whether it has not been ended.
    pub(super) fn is_open(&self) -> bool {
        matches!(self.state, State::Open | State::Silent)
    }

    /// What its sockets are to be polled for; and for how long at most.
    pub(super) fn wants<'a>(&'a self, flows: [Flow; 2], now: Instant, fds: &mut Vec<PollFd<'a>>) -> Option<Duration> {
        let up = self.up.wants(self.flow(flows, Direction::Up), now);
        let down = self.down.wants(self.flow(flows, Direction::Down), now);
        for (socket, wanted) in [(&self.client, up.read | down.write), (&self.broker, down.read | up.write)] {
            // One that is wanted for nothing would still tell of its end, again and again.
            fds.extend((!wanted.is_empty()).then(|| PollFd::new(socket, wanted)));
        }
        [up.timeout, down.timeout].into_iter().flatten().min()
    }

    pub(super) fn limit(&mut self, limit: Limit) {
        let lane = match limit.direction {
            Direction::Up => &mut self.up,
            Direction::Down => &mut self.down,
        };
        lane.limit = Some((lane.passed + limit.bytes, limit.cut));
        if limit.bytes == 0 {
            self.end(limit.cut);
        }
    }

    pub(super) fn end(&mut self, cut: Cut) {
        match (self.state, cut) {
            (State::Ending | State::Over, _) => {}
            (_, Cut::Silence) => self.state = State::Silent,
            (_, Cut::Fin) => {
                self.state = State::Ending;
                // One that is broken already cannot be shut and need not be.
                let _ = (self.client.shutdown(Shutdown::Write), self.broker.shutdown(Shutdown::Write));
            }
            (_, Cut::Reset) => {
                self.state = State::Over;
                reset(&self.client);
                reset(&self.broker);
            }
        }
    }

    /// Moves what can be moved without waiting.
    pub(super) fn step(&mut self, flows: [Flow; 2], now: Instant, traffic: &mut Traffic) {
        for direction in [Direction::Up, Direction::Down] {
            let flow = self.flow(flows, direction);
            let (lane, from, to) = match direction {
                Direction::Up => (&mut self.up, &self.client, &self.broker),
                Direction::Down => (&mut self.down, &self.broker, &self.client),
            };
            let before = (lane.passed, lane.swallowed);
            let moved = lane.step(from, to, flow, now);
            let (passed, swallowed) = match direction {
                Direction::Up => (&mut traffic.up, &mut traffic.swallowed_up),
                Direction::Down => (&mut traffic.down, &mut traffic.swallowed_down),
            };
            *passed += lane.passed - before.0;
            *swallowed += lane.swallowed - before.1;
            match moved {
                Ok(None) => {}
                Ok(Some(cut)) => self.end(cut),
                // What has happened to one side happens to the other.
                Err(_) => self.end(Cut::Reset),
            }
        }
        if self.up.has_passed_end && self.down.has_passed_end {
            self.state = State::Over;
        }
    }
}

/// One direction of a connection.
struct Lane {
    /// Read and not passed on.
    held: Vec<u8>,
    passed: u64,
    swallowed: u64,
    limit: Option<(u64, Cut)>,
    /// Nothing is passed on before that; for a throttled lane.
    not_before: Option<Instant>,
    /// There is nothing more to read.
    has_ended: bool,
    /// The receiver has been told so.
    has_passed_end: bool,
}

/// What to poll for: the lane's source to be read, its destination to be written, or only time.
struct Wants {
    read: PollFlags,
    write: PollFlags,
    timeout: Option<Duration>,
}

impl Wants {
    const NOTHING: Wants = Wants { read: PollFlags::empty(), write: PollFlags::empty(), timeout: None };
}

impl Lane {
    fn new() -> Lane {
        Lane {
            held: Vec::new(),
            passed: 0,
            swallowed: 0,
            limit: None,
            not_before: None,
            has_ended: false,
            has_passed_end: false,
        }
    }

    fn wants(&self, flow: Flow, now: Instant) -> Wants {
        let read = if self.has_ended { PollFlags::empty() } else { PollFlags::IN };
        let left = self.not_before.and_then(|then| then.checked_duration_since(now)).filter(|left| !left.is_zero());
        match flow {
            Flow::Stall => Wants::NOTHING,
            Flow::Swallow => Wants { read, ..Wants::NOTHING },
            Flow::Pass | Flow::Throttle(_) if self.held.is_empty() => Wants { read, ..Wants::NOTHING },
            Flow::Throttle(_) if left.is_some() => Wants { timeout: left, ..Wants::NOTHING },
            Flow::Pass | Flow::Throttle(_) => Wants { write: PollFlags::OUT, ..Wants::NOTHING },
        }
    }

    /// Reads and writes once at most; says what the link has come to.
    fn step(&mut self, from: &TcpStream, to: &TcpStream, flow: Flow, now: Instant) -> io::Result<Option<Cut>> {
        if flow == Flow::Stall {
            return Ok(None);
        }
        if self.held.is_empty() && !self.has_ended {
            match self.read(from) {
                // Nobody is told of anything.
                Err(_) if flow == Flow::Swallow => self.has_ended = true,
                result => result?,
            }
        }
        if flow == Flow::Swallow {
            self.swallowed += self.held.len() as u64;
            self.held.clear();
            return Ok(None);
        }
        if self.swallowed > 0 {
            return Ok(Some(Cut::Reset));
        }
        if !self.held.is_empty() {
            return self.write(to, flow, now);
        }
        if self.has_ended && !self.has_passed_end {
            self.has_passed_end = true;
            to.shutdown(Shutdown::Write)?;
        }
        Ok(None)
    }

    fn read(&mut self, mut from: &TcpStream) -> io::Result<()> {
        let mut chunk = [0; CHUNK];
        match from.read(&mut chunk) {
            Ok(0) => self.has_ended = true,
            Ok(read) => self.held.extend_from_slice(&chunk[..read]),
            Err(error) if is_nothing(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn write(&mut self, mut to: &TcpStream, flow: Flow, now: Instant) -> io::Result<Option<Cut>> {
        let room = self.limit.map_or(u64::MAX, |(limit, _)| limit.saturating_sub(self.passed));
        let mut most = self.held.len().min(usize::try_from(room).unwrap_or(usize::MAX));
        if let Flow::Throttle(rate) = flow {
            if self.not_before.is_some_and(|then| now < then) {
                return Ok(None);
            }
            most = most.min((rate / BEATS).max(1) as usize);
        }
        let written = match to.write(&self.held[..most]) {
            Ok(written) => written,
            Err(error) if is_nothing(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        self.held.drain(..written);
        self.passed += written as u64;
        if let Flow::Throttle(rate) = flow {
            self.not_before = Some(now + Duration::from_secs(written as u64) / rate.max(1));
        }
        Ok(self.limit.filter(|(limit, _)| self.passed >= *limit).map(|(_, cut)| cut))
    }
}

/// Whether there is just nothing to be done at the moment.
fn is_nothing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
