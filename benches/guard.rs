//! What the frame guard costs per message: `cargo bench --bench guard --features fuzzing`.
//!
//! The bytes of many deliveries are let through the guard as amiquip would read them, and for comparison copied in pieces
//! of the same size without looking at them. What a delivery costs a consuming process as a whole is some microseconds.

use std::hint::black_box;
use std::time::{Duration, Instant};

use coney::guard_fuzz;

const MESSAGES: usize = 100_000;
const ROUNDS: usize = 9;

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    [&[kind, 0, 1][..], &(payload.len() as u32).to_be_bytes(), payload, &[0xce]].concat()
}

/// Method, header and body of a delivery, as RabbitMQ sends it.
fn delivery(body: usize, headers: &[u8]) -> Vec<u8> {
    let method = [&[0, 60, 0, 60, 4][..], b"ctag", &[0; 9], b"\x06events", b"\x0dorder.created"].concat();
    let flags: u16 = if headers.is_empty() { 0x9000 } else { 0xb000 };
    let table =
        if headers.is_empty() { Vec::new() } else { [&(headers.len() as u32).to_be_bytes()[..], headers].concat() };
    let header =
        [&[0, 60, 0, 0][..], &(body as u64).to_be_bytes(), &flags.to_be_bytes(), b"\x10application/json", &table, &[2]];
    [frame(1, &method), frame(2, &header.concat()), frame(3, &vec![b'x'; body])].concat()
}

fn median(mut call: impl FnMut()) -> Duration {
    let mut rounds: Vec<Duration> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            call();
            start.elapsed()
        })
        .collect();
    rounds.sort();
    rounds[ROUNDS / 2]
}

fn main() {
    let number = |name: &str| [&[name.len() as u8], name.as_bytes(), b"l\0\0\0\0\0\0\0\x07"].concat();
    let text = |name: &str| [&[name.len() as u8], name.as_bytes(), b"S\0\0\0\x14some text of a width"].concat();
    let headers = [number("attempts"), text("source"), text("trace"), number("version")].concat();
    println!("{:<24} {:>12} {:>12} {:>12}", "ns per delivery", "guard", "copy", "difference");
    for (name, body, headers) in
        [("100 B", 100, &[][..]), ("100 B, 4 headers", 100, &headers), ("1 KiB", 1024, &[]), ("64 KiB", 65_536, &[])]
    {
        let messages = MESSAGES.min((256 << 20) / body);
        let stream = delivery(body, headers).repeat(messages);
        let per_message = |time: Duration| time.as_nanos() as f64 / messages as f64;
        let guarded = per_message(median(|| {
            guard_fuzz::pass(&stream, |taken| {
                black_box(taken[0]);
            })
            .expect("good frames");
        }));
        let copied = per_message(median(|| {
            let mut out = [0; 4096];
            for piece in stream.chunks(out.len()) {
                out[..piece.len()].copy_from_slice(piece);
                black_box(&out);
            }
        }));
        println!("{name:<24} {guarded:>12.0} {copied:>12.0} {:>12.0}", guarded - copied);
    }
}
