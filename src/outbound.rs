//! Follows what amiquip writes: keeps it well-formed when the broker closes a channel in the middle of a message, and counts
//! what has gone out on each channel.
//!
//! A message goes out as a method, a header and body frames. amiquip hands them to its I/O thread one by one, and when
//! the broker's `channel.close` comes in between, the rest is dropped and `channel.close-ok` follows half a message.
//! RabbitMQ calls that an unexpected frame (505) and closes the whole connection, which is more than a channel error
//! may cost. So the frames are followed on their way out, and a half-sent message is completed, with an empty header or
//! with zeros, before the next method of its channel. The broker ignores everything on a channel that it has closed
//! until it sees the close-ok (AMQP 0-9-1, section 1.5.2.5), so nobody ever gets such a message.

use std::collections::VecDeque;
use std::io::{self, Write};

const FRAME_HEADER_LEN: usize = 7;
const FRAME_METHOD: u8 = 1;
const FRAME_HEADER: u8 = 2;
const FRAME_BODY: u8 = 3;
const FRAME_END: u8 = 0xCE;
/// Class 60, method 40.
const BASIC_PUBLISH: [u8; 4] = [0, 60, 0, 40];
/// Class 10, method 50.
const CONNECTION_CLOSE: [u8; 4] = [0, 10, 0, 50];
/// `ack` and `reject`: class 60, methods 80 and 90.
const SETTLEMENTS: [[u8; 4]; 2] = [[0, 60, 0, 80], [0, 60, 0, 90]];
/// Class 20, methods 10, 40 and 41.
const CHANNEL_OPEN: [u8; 4] = [0, 20, 0, 10];
const CHANNEL_CLOSE: [u8; 4] = [0, 20, 0, 40];
const CHANNEL_CLOSE_OK: [u8; 4] = [0, 20, 0, 41];
/// Zeros go out in frames no larger than every peer takes (AMQP 0-9-1, frame-min-size).
const PADDING: usize = 4096 - FRAME_HEADER_LEN - 1;

#[derive(Debug, Clone, Copy)]
enum Missing {
    Header,
    Body(u64),
}

/// What has gone out on a channel since it was opened.
#[derive(Debug)]
struct Channel {
    number: u16,
    /// Counts messages that are whole, and settlements. Begins with another number each time that a channel is opened, so
    /// that what was meant for an earlier channel of this number is not taken for what comes next.
    sent: u64,
    /// It is in the middle of a message.
    missing: Option<Missing>,
}

/// Follows the frames that are written and fills in what is missing of a message.
#[derive(Debug, Default)]
pub(crate) struct Outbound {
    /// The channels that are open. Seldom more than a few.
    open: Vec<Channel>,
    /// Bytes from the next one to be written that have been looked at already.
    seen: usize,
    /// What is to go out before which of them, in order.
    insertions: VecDeque<(usize, Vec<u8>)>,
    /// How much of the first insertion has gone out.
    inserted: usize,
    /// How many channels have been opened.
    opened: u32,
}

impl Outbound {
    /// Writes `buffer` or the beginning of it. What is not written is offered again, with more behind it; a call always
    /// begins where the last one got to.
    pub(crate) fn write(&mut self, buffer: &[u8], socket: &mut impl Write) -> io::Result<usize> {
        self.look_at(buffer);
        while let Some((0, insertion)) = self.insertions.front() {
            while self.inserted < insertion.len() {
                match socket.write(&insertion[self.inserted..])? {
                    0 => return Err(io::ErrorKind::WriteZero.into()),
                    step => self.inserted += step,
                }
            }
            self.inserted = 0;
            self.insertions.pop_front();
        }
        let until = self.insertions.front().map_or(buffer.len(), |(at, _)| *at);
        let written = socket.write(&buffer[..until])?;
        self.seen = self.seen.saturating_sub(written);
        for (at, _) in &mut self.insertions {
            *at -= written;
        }
        Ok(written)
    }

    /// The number of the next message or settlement on a channel, by what has been looked at; `None` if it is not open, or is
    /// in the middle of a message.
    pub(crate) fn sent(&self, channel: u16) -> Option<u64> {
        self.open.iter().find(|open| open.number == channel && open.missing.is_none()).map(|open| open.sent)
    }

    /// Looks at the frames that have come since the last call. amiquip appends whole frames only.
    fn look_at(&mut self, buffer: &[u8]) {
        while let Some(frame) = buffer.get(self.seen..).and_then(whole_frame) {
            let channel = u16::from_be_bytes([frame[1], frame[2]]);
            let payload = &frame[FRAME_HEADER_LEN..frame.len() - 1];
            if frame[0] == FRAME_METHOD && payload.starts_with(&CHANNEL_OPEN) {
                self.open.retain(|open| open.number != channel);
                self.opened = self.opened.wrapping_add(1);
                self.open.push(Channel { number: channel, sent: u64::from(self.opened) << 32, missing: None });
            } else if frame[0] == FRAME_METHOD && payload.starts_with(&CONNECTION_CLOSE) {
                self.open.clear();
            } else if let Some(index) = self.open.iter().position(|open| open.number == channel) {
                self.look_at_frame(index, frame[0], payload);
            }
            self.seen += frame.len();
        }
    }

    fn look_at_frame(&mut self, index: usize, kind: u8, payload: &[u8]) {
        let Channel { number, missing, .. } = &mut self.open[index];
        let missing = missing.take();
        match kind {
            FRAME_METHOD => {
                if let Some(missing) = missing {
                    self.insertions.push_back((self.seen, filling(*number, missing)));
                }
                if payload.starts_with(&BASIC_PUBLISH) {
                    self.open[index].missing = Some(Missing::Header);
                } else if SETTLEMENTS.iter().any(|method| payload.starts_with(method)) {
                    self.open[index].sent += 1;
                } else if payload.starts_with(&CHANNEL_CLOSE) || payload.starts_with(&CHANNEL_CLOSE_OK) {
                    self.open.swap_remove(index);
                }
            }
            FRAME_HEADER => {
                // Class (2 bytes), weight (2), body size (8).
                let size = payload.get(4..).and_then(|rest| rest.first_chunk()).map_or(0, |&b| u64::from_be_bytes(b));
                self.expect_body(index, size);
            }
            FRAME_BODY => {
                if let Some(Missing::Body(left)) = missing {
                    self.expect_body(index, left.saturating_sub(payload.len() as u64));
                }
            }
            _ => {}
        }
    }

    fn expect_body(&mut self, index: usize, size: u64) {
        let channel = &mut self.open[index];
        match size {
            0 => channel.sent += 1,
            _ => channel.missing = Some(Missing::Body(size)),
        }
    }
}

fn whole_frame(bytes: &[u8]) -> Option<&[u8]> {
    let size: &[u8; 4] = bytes.get(3..FRAME_HEADER_LEN)?.first_chunk()?;
    bytes.get(..FRAME_HEADER_LEN + u32::from_be_bytes(*size) as usize + 1)
}

fn filling(channel: u16, missing: Missing) -> Vec<u8> {
    let mut frames = Vec::new();
    match missing {
        // Class 60, weight 0, body size 0, no properties.
        Missing::Header => push_frame(&mut frames, FRAME_HEADER, channel, &[0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        Missing::Body(mut left) => {
            while left > 0 {
                let step = usize::try_from(left).unwrap_or(PADDING).min(PADDING);
                push_frame(&mut frames, FRAME_BODY, channel, &[0; PADDING][..step]);
                left -= step as u64;
            }
        }
    }
    frames
}

pub(crate) fn push_frame(frames: &mut Vec<u8>, kind: u8, channel: u16, payload: &[u8]) {
    frames.push(kind);
    frames.extend(channel.to_be_bytes());
    frames.extend((payload.len() as u32).to_be_bytes());
    frames.extend_from_slice(payload);
    frames.push(FRAME_END);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes as much at a time as it is told, then would block once.
    struct Narrow {
        taken: Vec<u8>,
        step: usize,
        blocked: bool,
    }

    impl Write for Narrow {
        fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
            self.blocked = !self.blocked;
            if self.blocked {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let step = buffer.len().min(self.step);
            self.taken.extend_from_slice(&buffer[..step]);
            Ok(step)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
        let mut frames = Vec::new();
        push_frame(&mut frames, kind, channel, payload);
        frames
    }

    fn open(channel: u16) -> Vec<u8> {
        frame(FRAME_METHOD, channel, &CHANNEL_OPEN)
    }

    fn header(channel: u16, size: u64) -> Vec<u8> {
        let mut payload = vec![0, 60, 0, 0];
        payload.extend(size.to_be_bytes());
        payload.extend([0, 0]);
        frame(FRAME_HEADER, channel, &payload)
    }

    /// Writes as amiquip does: offers what is there, one frame after another joining it.
    fn written(frames: &[Vec<u8>], step: usize) -> Vec<u8> {
        let mut outbound = Outbound::default();
        let mut socket = Narrow { taken: Vec::new(), step, blocked: false };
        let mut waiting = Vec::new();
        for frame in frames {
            waiting.extend_from_slice(frame);
            if let Ok(taken) = outbound.write(&waiting, &mut socket) {
                waiting.drain(..taken);
            }
        }
        while !waiting.is_empty() {
            if let Ok(taken) = outbound.write(&waiting, &mut socket) {
                waiting.drain(..taken);
            }
        }
        socket.taken
    }

    #[test]
    fn whole_messages_pass_unchanged() {
        let frames = [
            open(1),
            open(2),
            frame(FRAME_METHOD, 1, &BASIC_PUBLISH),
            header(1, 5),
            frame(FRAME_METHOD, 2, &BASIC_PUBLISH), // two channels take turns
            frame(FRAME_BODY, 1, b"abc"),
            header(2, 0),
            frame(8, 0, &[]),
            frame(FRAME_BODY, 1, b"de"),
            frame(FRAME_METHOD, 1, &CHANNEL_CLOSE_OK),
            frame(FRAME_METHOD, 2, &CHANNEL_CLOSE_OK),
        ];
        for step in [1, 2, 7, 11, 1000] {
            assert_eq!(written(&frames, step), frames.concat(), "steps of {step}");
        }
    }

    #[test]
    fn half_a_message_is_completed_before_the_next_method_of_its_channel() {
        let publish = [open(7), frame(FRAME_METHOD, 7, &BASIC_PUBLISH)].concat();
        let close_ok = frame(FRAME_METHOD, 7, &CHANNEL_CLOSE_OK);
        let other = frame(FRAME_METHOD, 8, &[0, 60, 0, 80]);
        for step in [1, 3, 12, 10_000] {
            let no_header = written(&[publish.clone(), other.clone(), close_ok.clone()], step);
            assert_eq!(no_header, [publish.clone(), other.clone(), header(7, 0), close_ok.clone()].concat());

            let part = frame(FRAME_BODY, 7, &[1; 100]);
            let no_rest = written(&[publish.clone(), header(7, 6000), part.clone(), close_ok.clone()], step);
            let zeros = [frame(FRAME_BODY, 7, &[0; PADDING]), frame(FRAME_BODY, 7, &vec![0; 5900 - PADDING])].concat();
            assert_eq!(no_rest, [publish.clone(), header(7, 6000), part, zeros, close_ok.clone()].concat());
        }
    }
}
