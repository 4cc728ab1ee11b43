//! Frames: type, channel, length, payload, end octet.

use super::cursor::Writer;
use super::method::Method;

/// The frame types there are.
pub(crate) const METHOD: u8 = 1;
pub(crate) const HEADER: u8 = 2;
pub(crate) const BODY: u8 = 3;
pub(crate) const HEARTBEAT: u8 = 8;

/// Type, channel and length before the payload.
pub(crate) const FRAME_HEADER: usize = 7;
pub(crate) const FRAME_END: u8 = 0xCE;
/// What a frame has around its payload.
pub(crate) const FRAME_OVERHEAD: usize = FRAME_HEADER + 1;

/// The class of basic methods, which is the class of every content header.
pub(crate) const BASIC: u16 = 60;

/// The first thing a client says; a broker says it to clients that say something else.
pub(crate) const PROTOCOL_HEADER: [u8; 8] = *b"AMQP\x00\x00\x09\x01";

/// A frame as it stands in the bytes read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Frame<'a> {
    pub(crate) kind: u8,
    pub(crate) channel: u16,
    pub(crate) payload: &'a [u8],
}

/// What the front of some bytes is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Scan<'a> {
    /// A whole frame, and how many bytes it takes.
    Whole(Frame<'a>, usize),
    /// The beginning of a frame.
    Partial,
    /// A frame that claims more payload than it may have.
    TooLarge { kind: u8, channel: u16, claimed: u32 },
    /// A frame with something else where its end octet should be.
    BadEnd { frame: Frame<'a>, end: u8 },
}

/// Looks at the front of `bytes` for a frame with a payload of at most `payload_max` bytes.
pub(crate) fn scan(bytes: &[u8], payload_max: usize) -> Scan<'_> {
    let Some(&[kind, c1, c0, l3, l2, l1, l0]) = bytes.first_chunk::<FRAME_HEADER>() else { return Scan::Partial };
    let channel = u16::from_be_bytes([c1, c0]);
    let claimed = u32::from_be_bytes([l3, l2, l1, l0]);
    let len = match usize::try_from(claimed) {
        Ok(len) if len <= payload_max => len,
        _ => return Scan::TooLarge { kind, channel, claimed },
    };
    let behind = &bytes[FRAME_HEADER..];
    let (Some(payload), Some(&end)) = (behind.get(..len), behind.get(len)) else { return Scan::Partial };
    let frame = Frame { kind, channel, payload };
    if end == FRAME_END { Scan::Whole(frame, len + FRAME_OVERHEAD) } else { Scan::BadEnd { frame, end } }
}

/// Writes a frame whose payload `inside` writes. It must stay below the negotiated maximum.
fn framed(into: &mut Vec<u8>, kind: u8, channel: u16, inside: impl FnOnce(&mut Vec<u8>)) {
    let [c1, c0] = channel.to_be_bytes();
    let start = into.len();
    into.extend_from_slice(&[kind, c1, c0, 0, 0, 0, 0]);
    inside(into);
    // A payload of 4 GiB would need a table of that size, which no frame could have brought here.
    let len = (into.len() - start - FRAME_HEADER) as u32;
    into[start + 3..start + FRAME_HEADER].copy_from_slice(&len.to_be_bytes());
    into.push(FRAME_END);
}

pub(crate) fn write_method(into: &mut Vec<u8>, channel: u16, method: &Method) {
    framed(into, METHOD, channel, |into| method.encode(into));
}

/// Writes a content header for a body of `size` bytes; `properties` writes flags and values.
pub(crate) fn write_header(into: &mut Vec<u8>, channel: u16, size: u64, properties: impl FnOnce(&mut Vec<u8>)) {
    framed(into, HEADER, channel, |into| {
        into.extend_from_slice(&BASIC.to_be_bytes());
        into.extend_from_slice(&[0, 0]); // weight: not used by anybody
        into.extend_from_slice(&size.to_be_bytes());
        properties(into);
    });
}

/// The parts of a body that have a frame each; one that is empty has none.
pub(crate) fn body_parts(body: &[u8], frame_max: usize) -> impl Iterator<Item = &[u8]> {
    body.chunks(frame_max.saturating_sub(FRAME_OVERHEAD).max(1))
}

pub(crate) fn write_body(into: &mut Vec<u8>, channel: u16, part: &[u8]) {
    framed(into, BODY, channel, |into| into.extend_from_slice(part));
}

/// Writes the beginning of a body frame: what comes before its payload of `len` bytes.
pub(crate) fn write_body_head(into: &mut Vec<u8>, channel: u16, len: usize) {
    let ([c1, c0], [l3, l2, l1, l0]) = (channel.to_be_bytes(), (len as u32).to_be_bytes());
    into.extend_from_slice(&[BODY, c1, c0, l3, l2, l1, l0]);
}

/// Writes header and body of a content. `properties` are flags and values.
pub(crate) fn write_content(into: &mut Vec<u8>, channel: u16, properties: &[u8], body: &[u8], frame_max: usize) {
    write_header(into, channel, body.len() as u64, |into| into.extend_from_slice(properties));
    body_parts(body, frame_max).for_each(|part| write_body(into, channel, part));
}

/// Writes the method that begins a message.
pub(crate) fn write_publish(into: &mut Vec<u8>, channel: u16, exchange: &str, routing_key: &str, mandatory: bool) {
    framed(into, METHOD, channel, |into| {
        let mut writer = Writer::new(into);
        writer.put(&[0, 60, 0, 40, 0, 0]); // basic.publish, and a ticket that nobody reads
        writer.short(exchange.as_bytes());
        writer.short(routing_key.as_bytes());
        writer.bit(mandatory);
    });
}

/// Writes `basic.ack`.
pub(crate) fn write_ack(into: &mut Vec<u8>, channel: u16, tag: u64, multiple: bool) {
    settlement(into, channel, 80, tag, multiple);
}

/// Writes `basic.reject`.
pub(crate) fn write_reject(into: &mut Vec<u8>, channel: u16, tag: u64, requeue: bool) {
    settlement(into, channel, 90, tag, requeue);
}

fn settlement(into: &mut Vec<u8>, channel: u16, method: u8, tag: u64, flag: bool) {
    framed(into, METHOD, channel, |into| {
        into.extend_from_slice(&[0, 60, 0, method]);
        into.extend_from_slice(&tag.to_be_bytes());
        into.push(u8::from(flag));
    });
}

pub(crate) fn write_heartbeat(into: &mut Vec<u8>) {
    framed(into, HEARTBEAT, 0, |_| ());
}
