//! AMQP 0-9-1 as bytes: values, properties, methods, frames. Knows no broker: what a method means is decided elsewhere.
//!
//! Reading takes bytes that a stranger sent. A length is believed only as far as bytes have arrived for it, nesting has
//! a bound, and what cannot be read is a [`Malformed`], never a panic.

pub(crate) mod cursor;
pub(crate) mod frame;
pub(crate) mod method;
pub(crate) mod properties;
pub(crate) mod short_string;
pub(crate) mod value;

#[cfg(test)]
mod tests;

pub(crate) use cursor::Malformed;
pub(crate) use short_string::ShortString;
