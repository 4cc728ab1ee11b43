//! What a fuzzer and a benchmark feed with bytes that a broker might send. Nothing here is part of the interface.

use std::io;

use amq_protocol::frame::parsing::parse_frame;

use super::inbound::{Inbound, Step, frame_length};
use crate::transport::FRAME_MAX;

const BODY_MAX: u64 = 128 << 20;
/// As much as amiquip takes at a time.
const TAKE: usize = 4096;

/// Lets bytes through the guard as they would come from a socket. Calls `taken` with what amiquip would get; the result
/// says why the guard has ended the stream, if it has.
pub fn pass(mut bytes: &[u8], mut taken: impl FnMut(&[u8])) -> Result<(), String> {
    let mut inbound = Inbound::new(FRAME_MAX, BODY_MAX);
    let mut out = [0; TAKE];
    loop {
        match inbound.read(&mut out, &mut bytes, |_| {}) {
            Ok(Step::Bytes(read)) => taken(&out[..read]),
            Ok(Step::EndOfFile) => return Ok(()),
            Ok(Step::End(end)) => return Err(format!("{end:?}")),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// Any bytes: amiquip's parser takes every method and header that is let through, and nothing is there that had not come.
pub fn guard(bytes: &[u8]) -> Result<(), String> {
    let mut passed = Vec::new();
    // Why it has ended is no matter.
    let _ = pass(bytes, |taken| passed.extend_from_slice(taken));
    if passed.len() > bytes.len() {
        return Err("more came out than went in".to_owned());
    }
    let mut rest = passed.as_slice();
    while let Some(frame) = frame_length(rest).and_then(|length| rest.get(..length)) {
        // The end octets of others are amiquip's to check.
        if matches!(frame[0], 1 | 2) && parse_frame(frame).is_err() {
            return Err(format!("let through, but cannot be parsed: {frame:?}"));
        }
        rest = &rest[frame.len()..];
    }
    Ok(())
}
