//! What the parts cost that do no I/O: what a client reads, codec, routing and topic patterns.
//!
//!     cargo bench -p coney-pure
//!
//! Criterion compares with the run before, so that a regression shows. For scale: a delivery costs a consuming process
//! some 4 µs.

use std::hint::black_box;

use coney::embedded::bench::{self, Envelope, Router};
use coney::session_fuzz;
use coney_pure::{delivery, four_headers, properties, streams};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

/// Messages in a stream.
const MESSAGES: usize = 1_000;

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
