//! What the parts cost that do no I/O: what a client reads, codec, routing and topic patterns.
//!
//!     cargo bench --bench pure --features fuzzing
//!
//! Criterion compares with the run before, so that a regression shows. For scale: a delivery costs a consuming process
//! some 4 µs.

use std::hint::black_box;

use coney::embedded::bench::{self, Envelope, Router};
use coney::session_fuzz;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

/// Messages in a stream.
const MESSAGES: usize = 1_000;

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    [&[kind, 0, 1][..], &(payload.len() as u32).to_be_bytes(), payload, &[0xce]].concat()
}

/// Method, header and body of a delivery, as RabbitMQ sends it.
fn delivery(body: usize, headers: &[u8]) -> Vec<u8> {
    let method = [&[0, 60, 0, 60, 4][..], b"ctag", &[0; 9], b"\x06events", b"\x0dorder.created"].concat();
    let header = [&[0, 60, 0, 0][..], &(body as u64).to_be_bytes(), &properties(headers)].concat();
    [frame(1, &method), frame(2, &header), frame(3, &vec![b'x'; body])].concat()
}

/// Content type, headers if there are any, and delivery mode.
fn properties(headers: &[u8]) -> Vec<u8> {
    let flags: u16 = if headers.is_empty() { 0x9000 } else { 0xb000 };
    let table =
        if headers.is_empty() { Vec::new() } else { [&(headers.len() as u32).to_be_bytes()[..], headers].concat() };
    [&flags.to_be_bytes()[..], b"\x10application/json", &table, &[2]].concat()
}

/// Two numbers and two texts.
fn four_headers() -> Vec<u8> {
    let number = |name: &str| [&[name.len() as u8], name.as_bytes(), b"l\0\0\0\0\0\0\0\x07"].concat();
    let text = |name: &str| [&[name.len() as u8], name.as_bytes(), b"S\0\0\0\x14some text of a width"].concat();
    [number("attempts"), text("source"), text("trace"), number("version")].concat()
}

fn streams() -> [(&'static str, Vec<u8>); 4] {
    let headers = four_headers();
    [
        ("100 B", delivery(100, &[])),
        ("100 B, 4 headers", delivery(100, &headers)),
        ("1 KiB", delivery(1024, &[])),
        ("64 KiB", delivery(65_536, &[])),
    ]
}

/// The bytes of deliveries to messages, as a connection reads them; and copied in pieces unseen.
fn inbound(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("inbound");
    group.throughput(Throughput::Elements(MESSAGES as u64));
    for (name, delivery) in streams() {
        let stream = delivery.repeat(MESSAGES);
        group.bench_function(format!("read {name}"), |bencher| {
            bencher.iter(|| session_fuzz::inbound(&stream, |_| {}).expect("good frames"));
        });
        group.bench_function(format!("copy {name}"), |bencher| {
            bencher.iter(|| {
                let mut out = [0; 4096];
                for piece in stream.chunks(out.len()) {
                    out[..piece.len()].copy_from_slice(piece);
                    black_box(out[0]);
                }
            });
        });
    }
}

fn codec(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec");
    group.throughput(Throughput::Elements(MESSAGES as u64));
    let properties = properties(&four_headers());
    for (name, delivery) in streams() {
        let stream = delivery.repeat(MESSAGES);
        assert_eq!(bench::decode(&stream), MESSAGES);
        group.bench_function(format!("decode {name}"), |bencher| bencher.iter(|| bench::decode(black_box(&stream))));
    }
    for (name, size) in [("100 B", 100), ("64 KiB", 65_536)] {
        let (delivery, body) = (delivery(size, &[]), vec![b'x'; size]);
        group.bench_function(format!("encode {name}, 4 headers"), |bencher| {
            bencher.iter(|| bench::encode(black_box(&delivery), &properties, &body, MESSAGES).expect("a method"));
        });
    }
}

/// One message through an exchange with a thousand bindings, of which three are its own.
fn routing(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("routing");
    let message = Envelope::new("orders.eu.created", &[("kind", "order"), ("region", "eu")]);
    for kind in ["direct", "topic", "headers"] {
        let mut router = Router::new(kind).expect("a type of exchange");
        for n in 0..997 {
            router.bind(&format!("orders.{n}.created"), &[("x-match", "all"), ("kind", &n.to_string())]);
        }
        for _ in 0..3 {
            router.bind("orders.eu.created", &[("x-match", "any"), ("region", "eu")]);
        }
        assert_eq!(router.route(&message), 3);
        group.bench_function(kind, |bencher| bencher.iter(|| router.route(black_box(&message))));
    }
}

/// Patterns with wildcards, and the one that is worst for a matcher that tries and goes back.
fn topics(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("topic");
    let key = Envelope::new("a.b.c.d.e.f.g.h", &[]);
    let cases = [("*.b.*.d.*.f.*.h", 1), ("#.h", 1), ("#", 1), ("#.#.#.#.#.#.#.z", 0), ("a.*.c.#", 1)];
    for (pattern, found) in cases {
        let mut router = Router::new("topic").expect("a type of exchange");
        router.bind(pattern, &[]);
        assert_eq!(router.route(&key), found);
        group.bench_function(pattern, |bencher| bencher.iter(|| router.route(black_box(&key))));
    }
}

criterion_group!(benches, inbound, codec, routing, topics);
criterion_main!(benches);
