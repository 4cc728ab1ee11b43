//! The broker from outside, as raw bytes on a socket: what a client sees that does not keep to the rules.

mod connecting;
mod content;
mod hostile;
mod lifetime;
mod raw;
