//! What comes from the broker: bytes to frames, and who gets them.
//!
//! Messages and everything about them (classes `basic` and `confirm`, content, heartbeats) are ours; the rest is amiquip's
//! (see [`control`](super::control)). What no broker sends ends the connection, before room is made for the length that it
//! claims: an HTTP answer read as a frame claims 1.3 GB.

use std::sync::Arc;

use super::channel_state::{ChannelState, ChannelTable, Wrong, content_header};
use super::wire::CloseReason;
use crate::amqp::cursor::Reader;
use crate::amqp::frame::{self, FRAME_END, FRAME_HEADER, FRAME_OVERHEAD};
use crate::amqp::method::{ChannelClose, ConnectionClose, Method};
use crate::amqp::value::Value;
use crate::amqp::{Malformed, text};
use crate::message::Message;

/// The longest content header in bytes. RabbitMQ never splits one, and dead-lettering makes them longer than the frame
/// that brought them.
const HEADER_MAX: usize = 16 << 20;

/// The content types of TLS records: alert, handshake (RFC 8446, section 5.1). The version follows, beginning with 3.
const TLS_RECORDS: [[u8; 2]; 2] = [[21, 3], [22, 3]];

/// Why nothing more is read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// `connection.close`.
    Close(CloseReason),
    /// No broker sends this. For people.
    NotAcceptable(String),
}

/// What is not about messages.
#[derive(Debug, PartialEq)]
pub(super) enum ForControl<'a> {
    /// `connection.start`. The mechanisms of authentication and the version of the broker are all that is read in it.
    Start { mechanisms: &'a [u8], version: Option<String> },
    /// Another method of class `connection`.
    Connection(Method),
    /// A frame that amiquip takes as it is.
    Frame(&'a [u8]),
    /// The broker has closed a channel; the frame says so in text that amiquip can read.
    ChannelClose { channel: u16, reason: CloseReason, frame: Vec<u8> },
    /// The broker has answered that a channel is closed.
    ChannelCloseOk { channel: u16, frame: &'a [u8] },
}

/// Tells frames apart. Keeps no bytes.
#[derive(Debug)]
pub(super) struct Inbound {
    /// The longest frame in bytes, all included.
    frame_max: usize,
    /// The longest body in bytes.
    body_max: u64,
    /// The channel that was last spoken on, as of so many changes of the channels that are open.
    last: Option<(u16, u64, Arc<ChannelState>)>,
}

impl Inbound {
    pub(super) fn new(frame_max: u32, body_max: u64) -> Inbound {
        Inbound { frame_max: frame_max as usize, body_max, last: None }
    }

    pub(super) fn set_frame_max(&mut self, frame_max: u32) {
        self.frame_max = frame_max as usize;
    }

    /// Takes the whole frame at the front of `bytes`, and returns its length; `None` if it is not all there yet.
    pub(super) fn take(
        &mut self,
        bytes: &[u8],
        channels: &ChannelTable,
        control: impl FnOnce(ForControl<'_>) -> Result<(), End>,
    ) -> Result<Option<usize>, End> {
        if bytes.is_empty() {
            return Ok(None);
        }
        let Some(&[kind, c1, c0, l3, l2, l1, l0]) = bytes.first_chunk::<FRAME_HEADER>() else {
            return self.objection(bytes).map_or(Ok(None), |why| Err(End::NotAcceptable(why)));
        };
        let length = u32::from_be_bytes([l3, l2, l1, l0]) as usize + FRAME_OVERHEAD;
        let max = if kind == frame::HEADER { HEADER_MAX } else { self.frame_max };
        let is_known = matches!(kind, frame::METHOD | frame::HEADER | frame::BODY | frame::HEARTBEAT);
        if !is_known || length > max {
            let why = self.objection(bytes).unwrap_or_default();
            return Err(End::NotAcceptable(why));
        }
        let channel = u16::from_be_bytes([c1, c0]);
        let Some(whole) = bytes.get(..length) else { return Ok(None) };
        let wrong = |what: String| End::NotAcceptable(format!("the broker sent {what} on channel {channel}"));
        let [.., FRAME_END] = whole else {
            return Err(wrong(format!("a frame of type {kind} without the end octet")));
        };
        let payload = &whole[FRAME_HEADER..length - 1];
        let body_max = self.body_max;
        match kind {
            frame::METHOD => self.method(channel, whole, payload, channels, control)?,
            frame::HEADER => match self.state(channel, channels) {
                Some(state) if state.is_amiquips() => {
                    let frame = for_amiquip(channel, payload, body_max).map_err(wrong)?;
                    control(ForControl::Frame(&frame))?;
                }
                Some(state) => state.header(payload, body_max).map_err(wrong)?,
                None => return Err(wrong("a content header, and the channel is not open".to_owned())),
            },
            frame::BODY => match self.state(channel, channels) {
                Some(state) if state.is_amiquips() => control(ForControl::Frame(whole))?,
                Some(state) => state.body(payload).map_err(wrong)?,
                None => return Err(wrong("a body frame, and the channel is not open".to_owned())),
            },
            // A heartbeat: that something came is all it says.
            _ => {}
        }
        Ok(Some(length))
    }

    fn state(&mut self, number: u16, channels: &ChannelTable) -> Option<&Arc<ChannelState>> {
        let changes = channels.changes();
        if !matches!(&self.last, Some((last, as_of, _)) if *last == number && *as_of == changes) {
            self.last = Some((number, changes, channels.get(number)?));
        }
        self.last.as_ref().map(|(.., state)| state)
    }

    fn method(
        &mut self,
        channel: u16,
        whole: &[u8],
        payload: &[u8],
        channels: &ChannelTable,
        control: impl FnOnce(ForControl<'_>) -> Result<(), End>,
    ) -> Result<(), End> {
        let wrong = |what: String| End::NotAcceptable(format!("the broker sent {what} on channel {channel}"));
        let Some((&[c1, c0, m1, m0], arguments)) = payload.split_first_chunk::<4>() else {
            return Err(wrong("a method frame too short for a method".to_owned()));
        };
        let id @ (class, method) = (u16::from_be_bytes([c1, c0]), u16::from_be_bytes([m1, m0]));
        let malformed = |_: Malformed| wrong(format!("a malformed method (class {class}, method {method})"));
        if matches!(class, 60 | 85) && channel > 0 {
            return match self.state(channel, channels) {
                Some(state) if state.is_amiquips() => control(ForControl::Frame(whole)),
                Some(state) => state.method(class, method, arguments).map_err(wrong),
                None => Err(wrong(format!("method {method} of class {class}, and the channel is not open"))),
            };
        }
        match id {
            (ConnectionClose::CLASS_ID, ConnectionClose::METHOD_ID) if channel == 0 => {
                Err(End::Close(close_reason(arguments).map_err(malformed)?))
            }
            (ChannelClose::CLASS_ID, ChannelClose::METHOD_ID) if channel > 0 => {
                let reason = close_reason(arguments).map_err(malformed)?;
                let mut frame = Vec::new();
                let close = ChannelClose {
                    reply_code: reason.code,
                    reply_text: reason.text.as_str().into(),
                    ..ChannelClose::default()
                };
                frame::write_method(&mut frame, channel, &close.into());
                control(ForControl::ChannelClose { channel, reason, frame })
            }
            (20, 41) if channel > 0 => control(ForControl::ChannelCloseOk { channel, frame: whole }),
            (10, 10) if channel == 0 => {
                let mut reader = Reader::new(arguments);
                let mut mechanisms = || {
                    reader.u16()?; // the version
                    reader.long()?; // server-properties
                    let mechanisms = reader.long()?;
                    reader.long()?; // locales
                    Ok(mechanisms)
                };
                let mechanisms = mechanisms().map_err(malformed)?;
                control(ForControl::Start { mechanisms, version: server_version(arguments) })
            }
            (10, 20 | 30 | 41 | 51 | 60 | 61 | 71) if channel == 0 => {
                let method = Method::decode(class, method, arguments).unwrap_or(Err(Malformed("unknown")));
                control(ForControl::Connection(method.map_err(malformed)?))
            }
            (20, 11 | 20 | 21) | (40, 11 | 21 | 31 | 51) | (50, 11 | 21 | 31 | 41 | 51) if channel > 0 => {
                Method::decode(class, method, arguments).unwrap_or(Err(Malformed("unknown"))).map_err(malformed)?;
                control(ForControl::Frame(whole))
            }
            _ => Err(wrong(format!("a method that no server sends (class {class}, method {method})"))),
        }
    }

    /// What is wrong with the beginning of a frame, as far as it is there.
    fn objection(&self, bytes: &[u8]) -> Option<String> {
        let kind = *bytes.first()?;
        if matches!(kind, frame::METHOD | frame::HEADER | frame::BODY | frame::HEARTBEAT) {
            let size = u32::from_be_bytes(*bytes.get(3..)?.first_chunk()?);
            let length = size as usize + FRAME_OVERHEAD;
            return Some(match kind {
                frame::HEADER => format!(
                    "the broker sent a message whose content header has {length} bytes, where at most {HEADER_MAX} are read"
                ),
                _ => format!(
                    "what came is not AMQP: a frame of {length} bytes, where at most {} are agreed",
                    self.frame_max
                ),
            })
            .filter(|_| length > if kind == frame::HEADER { HEADER_MAX } else { self.frame_max });
        }
        if bytes.starts_with(b"AMQP") {
            // Which one, is behind the word.
            let &[_, _, _, _, id, major, minor, ..] = bytes else { return None };
            return Some(format!("the broker offers AMQP {id}-{major}-{minor} instead of 0-0-9-1"));
        }
        if TLS_RECORDS.iter().any(|record| bytes.starts_with(record)) {
            return Some(
                "what came is not AMQP but TLS; expected a port without TLS, or a URL with amqps://".to_owned(),
            );
        }
        // Both may turn out to be one of the above.
        let may_be_amqp = kind == b'A' && bytes.len() < 4;
        let may_be_tls = bytes.len() == 1 && TLS_RECORDS.iter().any(|record| record[0] == kind);
        if may_be_amqp || may_be_tls {
            return None;
        }
        let beginning = String::from_utf8_lossy(&bytes[..bytes.len().min(8)]).into_owned();
        Some(format!("what came is not AMQP: frame type {kind} (it begins with {beginning:?})"))
    }
}

/// What the server properties call `version`, if they can be read.
fn server_version(arguments: &[u8]) -> Option<String> {
    let Some(Ok(Method::ConnectionStart(start))) = Method::decode(10, 10, arguments) else { return None };
    match start.server_properties.get("version") {
        Some(Value::LongString(version)) => Some(String::from_utf8_lossy(version).into_owned()),
        _ => None,
    }
}

/// `reply-code` (short) and `reply-text` (short string) at the beginning of the arguments.
fn close_reason(arguments: &[u8]) -> Result<CloseReason, Malformed> {
    let mut reader = Reader::new(arguments);
    Ok(CloseReason { code: reader.u16()?, text: text(reader.short()?) })
}

/// A content header as amiquip can take it, for a channel that is all its own. Its parser ends the connection at a text
/// that is not UTF-8, and overflows its stack on tables that are nested too deep.
fn for_amiquip(channel: u16, payload: &[u8], body_max: u64) -> Result<Vec<u8>, Wrong> {
    let (size, properties) = content_header(payload, body_max)?;
    let message =
        Message::read_properties(properties).map_err(|Malformed(_)| "a malformed content header".to_owned())?;
    let mut frame = Vec::new();
    frame::write_header(&mut frame, channel, size, |into| message.write_properties(into));
    Ok(frame)
}
