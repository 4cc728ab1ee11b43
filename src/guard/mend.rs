//! Checks a whole method or header frame and changes in place what amiquip cannot take.
//!
//! amiquip reads strings as UTF-8 and tables by recursion. A string property that is not UTF-8 ends its connection, one in
//! the headers makes it drop the headers behind without a word, and a table nested some thousand levels deep overflows the
//! stack of its I/O thread, which aborts the process. RabbitMQ passes all three on from any publisher. So:
//!
//! | what came | what amiquip gets |
//! |---|---|
//! | a field value `S` that is not UTF-8 | the same bytes as a byte array, `x` |
//! | a table or array below level [`DEPTH_MAX`] | its encoded content as a byte array, `x` |
//! | any other string that is not UTF-8 (properties, names of headers, exchange, routing key, reply text) | the same with `?` for each byte that is not |
//!
//! `S`, `F`, `A` and `x` are all a tag, a length of four bytes and that many bytes, so one byte changes and no length does.
//! What does not parse at all is refused; RabbitMQ closes the channel of a publisher who sends such a thing.

use std::str;

use crate::field::DEPTH_MAX;

/// Class, weight, body size, property flags (AMQP 0-9-1, section 4.2.6.1).
const CONTENT_HEADER_LEN: usize = 14;
/// In `property-flags`: more flags follow, which no class has, and a bit that means nothing.
const UNKNOWN_FLAGS: u16 = 0b11;

/// What is wrong with a frame, for people.
pub(super) type Verdict = Result<(), String>;

#[derive(Debug, Clone, Copy)]
enum Field {
    /// So many bytes that may be anything.
    Fixed(usize),
    ShortString,
    LongString,
    Table,
}

use Field::{Fixed, LongString, ShortString, Table};

/// The properties of class `basic`, from the highest flag down (AMQP 0-9-1, section 1.8).
const PROPERTIES: [Field; 14] = [
    ShortString, // content-type
    ShortString, // content-encoding
    Table,       // headers
    Fixed(1),    // delivery-mode
    Fixed(1),    // priority
    ShortString, // correlation-id
    ShortString, // reply-to
    ShortString, // expiration
    ShortString, // message-id
    Fixed(8),    // timestamp
    ShortString, // type
    ShortString, // user-id
    ShortString, // app-id
    ShortString, // reserved, once cluster-id
];

/// The arguments of each method that a server sends. `None` for what only clients send, and for what is in no protocol.
fn arguments(class: u16, method: u16) -> Option<&'static [Field]> {
    Some(match (class, method) {
        // connection
        (10, 10) => &[Fixed(2), Table, LongString, LongString], // start
        (10, 20) => &[LongString],                              // secure
        (10, 30) => &[Fixed(8)],                                // tune
        (10, 41) => &[ShortString],                             // open-ok
        (10, 50) => &[Fixed(2), ShortString, Fixed(4)],         // close
        (10, 51) => &[],                                        // close-ok
        (10, 60) => &[ShortString],                             // blocked
        (10, 61) => &[],                                        // unblocked
        // channel
        (20, 11) => &[LongString],                      // open-ok
        (20, 20) | (20, 21) => &[Fixed(1)],             // flow, flow-ok
        (20, 40) => &[Fixed(2), ShortString, Fixed(4)], // close
        (20, 41) => &[],                                // close-ok
        // exchange: declare-ok, delete-ok, bind-ok, unbind-ok
        (40, 11) | (40, 21) | (40, 31) | (40, 51) => &[],
        // queue
        (50, 11) => &[ShortString, Fixed(8)], // declare-ok
        (50, 21) | (50, 51) => &[],           // bind-ok, unbind-ok
        (50, 31) | (50, 41) => &[Fixed(4)],   // purge-ok, delete-ok
        // basic
        (60, 11) => &[],                                                    // qos-ok
        (60, 21) | (60, 31) => &[ShortString],                              // consume-ok, cancel-ok
        (60, 30) => &[ShortString, Fixed(1)],                               // cancel
        (60, 50) => &[Fixed(2), ShortString, ShortString, ShortString],     // return
        (60, 60) => &[ShortString, Fixed(8 + 1), ShortString, ShortString], // deliver
        (60, 71) => &[Fixed(8 + 1), ShortString, ShortString, Fixed(4)],    // get-ok
        (60, 72) => &[ShortString],                                         // get-empty
        (60, 80) | (60, 120) => &[Fixed(8 + 1)],                            // ack, nack
        (60, 111) => &[],                                                   // recover-ok
        // confirm: select-ok; tx: select-ok, commit-ok, rollback-ok
        (85, 11) | (90, 11) | (90, 21) | (90, 31) => &[],
        _ => return None,
    })
}

/// The payload of a method frame.
pub(super) fn method(payload: &mut [u8]) -> Verdict {
    let Some((&mut [c1, c0, m1, m0], rest)) = payload.split_first_chunk_mut::<4>() else {
        return Err("a method frame too short for a method".to_owned());
    };
    let (class, method) = (u16::from_be_bytes([c1, c0]), u16::from_be_bytes([m1, m0]));
    let Some(fields) = arguments(class, method) else {
        return Err(format!("a method that no server sends (class {class}, method {method})"));
    };
    let mut cursor = Cursor { bytes: rest, at: 0 };
    fields
        .iter()
        .try_for_each(|field| cursor.field(*field))
        .map_err(|Malformed| format!("a malformed method (class {class}, method {method})"))
}

/// The payload of a content header frame, for a body of at most `body_max` bytes.
pub(super) fn header(payload: &mut [u8], body_max: u64) -> Verdict {
    let Some((fixed, properties)) = payload.split_first_chunk_mut::<CONTENT_HEADER_LEN>() else {
        return Err("a content header too short for one".to_owned());
    };
    let &mut [_, _, _, _, size @ .., f1, f0] = fixed;
    let (size, flags) = (u64::from_be_bytes(size), u16::from_be_bytes([f1, f0]));
    if size > body_max {
        return Err(format!("a message of {size} bytes, where at most {body_max} are accepted (max_message_size)"));
    }
    if flags & UNKNOWN_FLAGS != 0 {
        return Err(format!("a content header with unknown properties (flags {flags:#018b})"));
    }
    let mut cursor = Cursor { bytes: properties, at: 0 };
    let mut present = PROPERTIES.iter().enumerate().filter(|(bit, _)| flags & (0x8000 >> bit) != 0);
    present.try_for_each(|(_, field)| cursor.field(*field)).map_err(|Malformed| "a malformed content header".to_owned())
}

#[derive(Debug)]
struct Malformed;

/// Goes over the fields of a frame once, from the front.
struct Cursor<'a> {
    bytes: &'a mut [u8],
    at: usize,
}

/// A table or an array that the cursor is in.
#[derive(Clone, Copy)]
struct Level {
    end: usize,
    /// Values have names in a table, and none in an array.
    is_table: bool,
}

impl Cursor<'_> {
    #[inline]
    fn field(&mut self, field: Field) -> Result<(), Malformed> {
        match field {
            Fixed(length) => self.skip(length, self.bytes.len()).map(drop),
            ShortString => self.short_string(self.bytes.len()),
            LongString => {
                let text = self.long(self.bytes.len())?;
                replace_invalid(text);
                Ok(())
            }
            Table => self.table(),
        }
    }

    /// The next `length` bytes, which must end by `end`.
    #[inline]
    fn skip(&mut self, length: usize, end: usize) -> Result<&mut [u8], Malformed> {
        if length > end - self.at {
            return Err(Malformed);
        }
        let start = self.at;
        self.at += length;
        Ok(&mut self.bytes[start..self.at])
    }

    fn octet(&mut self, end: usize) -> Result<u8, Malformed> {
        self.skip(1, end).map(|octet| octet[0])
    }

    fn length(&mut self, end: usize) -> Result<usize, Malformed> {
        let length = self.skip(4, end)?;
        Ok(u32::from_be_bytes([length[0], length[1], length[2], length[3]]) as usize)
    }

    /// The content of anything with a length of four bytes before it.
    fn long(&mut self, end: usize) -> Result<&mut [u8], Malformed> {
        let length = self.length(end)?;
        self.skip(length, end)
    }

    #[inline]
    fn short_string(&mut self, end: usize) -> Result<(), Malformed> {
        let length = self.octet(end)?;
        replace_invalid(self.skip(length.into(), end)?);
        Ok(())
    }

    /// A table and all that is in it, without recursion.
    fn table(&mut self) -> Result<(), Malformed> {
        let mut levels = [Level { end: 0, is_table: true }; DEPTH_MAX];
        let mut depth = 0;
        self.enter(&mut levels, &mut depth, self.bytes.len(), true)?;
        while depth > 0 {
            let Level { end, is_table } = levels[depth - 1];
            if self.at == end {
                depth -= 1;
                continue;
            }
            if is_table {
                self.short_string(end)?;
            }
            let tag_at = self.at;
            match self.octet(end)? {
                b'V' => {}
                b't' | b'b' | b'B' => drop(self.skip(1, end)?),
                b's' | b'U' | b'u' => drop(self.skip(2, end)?),
                b'I' | b'i' | b'f' => drop(self.skip(4, end)?),
                b'D' => drop(self.skip(5, end)?),
                b'l' | b'L' | b'T' | b'd' => drop(self.skip(8, end)?),
                b'x' => drop(self.long(end)?),
                b'S' => {
                    let text = self.long(end)?;
                    if !text.is_ascii() && str::from_utf8(text).is_err() {
                        self.bytes[tag_at] = b'x';
                    }
                }
                tag @ (b'F' | b'A') if depth < DEPTH_MAX => self.enter(&mut levels, &mut depth, end, tag == b'F')?,
                b'F' | b'A' => {
                    self.long(end)?;
                    self.bytes[tag_at] = b'x';
                }
                _ => return Err(Malformed),
            }
        }
        Ok(())
    }

    fn enter(
        &mut self,
        levels: &mut [Level; DEPTH_MAX],
        depth: &mut usize,
        outer_end: usize,
        is_table: bool,
    ) -> Result<(), Malformed> {
        let length = self.length(outer_end)?;
        if length > outer_end - self.at {
            return Err(Malformed);
        }
        levels[*depth] = Level { end: self.at + length, is_table };
        *depth += 1;
        Ok(())
    }
}

/// Puts `?` for each byte that keeps the text from being UTF-8.
#[inline]
fn replace_invalid(text: &mut [u8]) {
    // What most text is, and what costs least to find out.
    if !text.is_ascii() {
        replace_what_is_invalid(text);
    }
}

#[cold]
fn replace_what_is_invalid(text: &mut [u8]) {
    let mut valid = 0;
    while let Err(error) = str::from_utf8(&text[valid..]) {
        let from = valid + error.valid_up_to();
        let to = error.error_len().map_or(text.len(), |length| from + length);
        text[from..to].fill(b'?');
        valid = to;
    }
}
