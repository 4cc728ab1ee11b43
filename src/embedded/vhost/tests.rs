//! The engine without sockets: methods in, frames out.

mod bench;
mod delivering;
mod failing;
mod many;
mod publishing;
mod settling;
mod streams;
