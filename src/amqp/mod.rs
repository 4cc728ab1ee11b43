//! AMQP 0-9-1 as bytes: values, properties, methods, frames. The client, the embedded broker and the fuzzers use it. It does
//! no I/O and knows neither of them: what a method means is decided elsewhere.
//!
//! Reading takes bytes that a stranger sent. A length is believed only as far as bytes have arrived for it, nesting has
//! a bound, and what cannot be read is a [`Malformed`], never a panic.

#![cfg_attr(
    not(feature = "embedded"),
    allow(dead_code, unused_imports, reason = "a client does not say what a broker says")
)]

pub(crate) mod cursor;
pub(crate) mod frame;
pub(crate) mod item;
pub(crate) mod method;
pub(crate) mod properties;
pub(crate) mod short_string;
pub(crate) mod value;

#[cfg(test)]
mod tests;

pub(crate) use cursor::Malformed;
pub(crate) use short_string::ShortString;

/// The bytes as text, with `?` for each byte that is not UTF-8.
pub(crate) fn text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.utf8_chunks().fold(String::with_capacity(bytes.len()), |mut text, chunk| {
            text.push_str(chunk.valid());
            text.extend(chunk.invalid().iter().map(|_| '?'));
            text
        }),
    }
}
