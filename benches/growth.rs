//! How the embedded broker grows: each operation on 10³, 10⁴ and 10⁵ of a thing, and how long others wait meanwhile.
//!
//! ```text
//! cargo bench --bench growth --features embedded            every case
//! cargo bench --bench growth --features embedded -- bind    those whose names contain that
//! ```
//!
//! A case is prepared, then one client acts. A second client on the same virtual host asks for a queue's length again and
//! again all the while; its longest wait is noted. Each case runs three times on a new broker, and the best run counts, as
//! the machine has other things to do. Prints the time for each thing in microseconds, how that has grown from the
//! smallest number to the largest, and the longest wait in milliseconds.

#[path = "../tests/raw/mod.rs"]
mod raw;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use coney::embedded::EmbeddedBroker;
use raw::{FRAME_MAX, Raw, frame, long, method, short};

const SIZES: [usize; 3] = [1_000, 10_000, 100_000];
const RUNS: usize = 3;
/// As many headers as fit in a frame.
const HEADERS_MAX: usize = 15_000;
const CHANNELS_MAX: usize = 2_000;
const PATIENCE: Duration = Duration::from_secs(300);

const DURABLE: u8 = 2;
const EXCLUSIVE: u8 = 4;
const NO_WAIT: u8 = 16;
const NO_ACK: u8 = 2;
const CONSUME_NO_WAIT: u8 = 8;

struct Case {
    name: &'static str,
    /// The largest number there can be of it.
    most: usize,
    prepare: fn(&mut Client, usize),
    act: fn(&mut Client, usize),
}

const fn case(name: &'static str, prepare: fn(&mut Client, usize), act: fn(&mut Client, usize)) -> Case {
    Case { name, most: usize::MAX, prepare, act }
}

const CASES: &[Case] = &[
    case("queues: declare", |_, _| {}, |client, n| client.declare_queues(n, 0, &[])),
    case("queues: delete", |client, n| client.declare_queues(n, 0, &[]), Client::delete_queues),
    case("queues: end of the connection they are exclusive to", exclusive_queues, |client, _| client.leave()),
    case(
        "queues: a message to all",
        |client, n| client.bind_queues(n, "fanout", |_| Vec::new()),
        |client, _| {
            client.publish("x", "", &[], b"m");
        },
    ),
    case(
        "queues: delete, each with x-expires",
        |client, n| client.declare_queues(n, 0, &long_int("x-expires", HOUR)),
        Client::delete_queues,
    ),
    case("bindings, direct: bind", |_, _| {}, |client, n| client.bind_queues(n, "direct", |_| Vec::new())),
    case(
        "bindings, direct: delete the queues",
        |client, n| client.bind_queues(n, "direct", |_| Vec::new()),
        Client::delete_queues,
    ),
    case(
        "bindings, fanout: delete the queues",
        |client, n| client.bind_queues(n, "fanout", |_| Vec::new()),
        Client::delete_queues,
    ),
    case(
        "bindings, topic: delete the queues",
        |client, n| client.bind_queues(n, "topic", |_| Vec::new()),
        Client::delete_queues,
    ),
    case("bindings, headers: bind", |_, _| {}, |client, n| client.bind_queues(n, "headers", one_field)),
    case(
        "bindings, headers: a thousand messages",
        |client, n| client.bind_queues(n, "headers", one_field),
        |client, _| {
            client.publish_many("x", 1_000, one_field);
        },
    ),
    case(
        "bindings, headers: delete the queues",
        |client, n| client.bind_queues(n, "headers", one_field),
        Client::delete_queues,
    ),
    case(
        "bindings, headers: delete the exchange",
        |client, n| client.bind_queues(n, "headers", one_field),
        |client, _| {
            client.say((40, 20), &[&[0, 0][..], &short("x"), &[0]].concat());
        },
    ),
    case("bindings of one queue under one key: bind", |client, _| client.exchange("x", "headers"), same_key),
    case("bindings of one queue under one key: delete the queue", many_bindings, |client, _| client.delete("q")),
    case("bindings of one queue under one key: unbind", many_bindings, |client, n| {
        client.many(n, |i| {
            let arguments = long(&text_field("number", &i.to_string()));
            method(1, (50, 50), &[&[0, 0][..], &short("q"), &short("x"), &short("k"), &arguments].concat())
        });
    }),
    Case {
        name: "headers: a message, ten bindings of as many fields",
        most: HEADERS_MAX,
        prepare: |client, n| ten_bindings(client, &headers(n)),
        act: |client, n| client.publish("x", "", &headers(n), b"m"),
    },
    Case {
        name: "headers: a message, ten bindings to any of as many fields",
        most: HEADERS_MAX,
        prepare: |client, n| ten_bindings(client, &[headers(n), text_field("x-match", "any")].concat()),
        act: |client, n| client.publish("x", "", &headers(n), b"m"),
    },
    Case {
        name: "x-death: a message with as many deaths dies",
        most: 3_000,
        prepare: |client, _| {
            client.declare("dead", 0, &[]);
            client.declare(
                "q",
                0,
                &[
                    text_field("x-dead-letter-exchange", ""),
                    text_field("x-dead-letter-routing-key", "dead"),
                    long_int("x-max-length", 0),
                ]
                .concat(),
            );
        },
        act: |client, n| {
            let death = |i: usize| {
                let fields = [text_field("queue", &i.to_string()), text_field("reason", "rejected")].concat();
                [&b"F"[..], &long(&fields)].concat()
            };
            let deaths: Vec<u8> = (0..n).flat_map(death).collect();
            client.publish("", "q", &[&short("x-death")[..], b"A", &long(&deaths)].concat(), b"m");
        },
    },
    case(
        "consumers of one queue: consume",
        |client, _| client.declare("q", 0, &[]),
        |client, n| client.consume(n, false),
    ),
    case("consumers of one queue: close the channel", consumers, |client, _| client.close_channel()),
    case("consumers of one queue: cancel each", consumers, |client, n| {
        client.many(n, |i| method(1, (60, 30), &[&short(&i.to_string())[..], &[1]].concat()));
    }),
    case("consumers of one queue: delete it", consumers, |client, _| client.delete("q")),
    case(
        "consumers of one queue, single active: close the channel",
        |client, n| {
            client.declare("q", 0, &bool_field("x-single-active-consumer"));
            client.consume(n, false);
        },
        |client, _| client.close_channel(),
    ),
    case(
        "consumers of one quorum queue, single active: close the channel",
        |client, n| {
            client.declare(
                "q",
                DURABLE,
                &[bool_field("x-single-active-consumer"), text_field("x-queue-type", "quorum")].concat(),
            );
            client.consume(n, false);
        },
        |client, _| client.close_channel(),
    ),
    case(
        "consumers that share a prefetch of 1: a hundred acks",
        |client, n| {
            client.declare("q", 0, &[]);
            client.say((60, 10), &[0, 0, 0, 0, 0, 1, 1]);
            client.consume(n, false);
            client.publish_many("", 200, |_| Vec::new());
        },
        |client, _| {
            // Each ack brings the next delivery, whose tag is the next number.
            (1..=100).for_each(|tag| client.raw.ack(tag));
        },
    ),
    case("unacked: ack all at once", unacked, |client, n| client.settle((60, 80), n, 1)),
    case("unacked: ack each", unacked, |client, n| {
        client.many(n, |i| method(1, (60, 80), &[&(i as u64 + 1).to_be_bytes()[..], &[0]].concat()));
    }),
    case("unacked: requeue all at once", unacked, |client, n| client.settle((60, 120), n, 3)),
    case("unacked: close the channel", unacked, |client, _| client.close_channel()),
    case("unacked: reject all at once, to a dead letter queue", dying_unacked, |client, n| {
        client.settle((60, 120), n, 1)
    }),
    case(
        "messages: purge",
        |client, n| {
            client.declare("q", 0, &[]);
            client.publish_many("", n, |_| Vec::new());
        },
        |client, _| client.say((50, 30), &[&[0, 0][..], &short("q"), &[0]].concat()),
    ),
    case(
        "messages: delete the queue",
        |client, n| {
            client.declare("q", 0, &[]);
            client.publish_many("", n, |_| Vec::new());
        },
        |client, _| client.delete("q"),
    ),
    case(
        "messages: to a consumer",
        |client, n| {
            client.declare("q", 0, &[]);
            client.publish_many("", n, |_| Vec::new());
        },
        |client, n| {
            client.consume(1, true);
            (0..n).for_each(|_| drop(client.raw.delivery()));
        },
    ),
    case(
        "timers: all messages of a queue expire at once, to a dead letter queue",
        |client, _| {
            client.declare("dead", 0, &[]);
            client.declare("q", 0, &[dead_letters(), long_int("x-message-ttl", 1)].concat());
        },
        |client, n| {
            client.publish_many("", n, |_| Vec::new());
            client.await_length("dead", n);
        },
    ),
    case(
        "timers: queues with a message that will expire, deleted",
        |client, n| {
            client.declare_queues(n, 0, &long_int("x-message-ttl", HOUR));
            client.many(n, |i| raw::publish(&name(i), 1, b"m"));
        },
        Client::delete_queues,
    ),
    case(
        "streams: publish",
        |client, _| client.declare("q", DURABLE, &stream()),
        |client, n| {
            client.publish_many("", n, |_| Vec::new());
        },
    ),
    case("streams: a filter passes over all but the last", filtered, |client, _| {
        client.read("c", &text_field("x-stream-filter", "wanted"));
        client.raw.delivery();
    }),
    case(
        "streams: a message to all consumers",
        |client, n| {
            client.declare("q", DURABLE, &stream());
            client.raw.limit(1, false);
            (0..n).for_each(|i| client.read(&i.to_string(), &[]));
        },
        |client, n| {
            client.publish("", "q", &[], b"m");
            (0..n).for_each(|_| drop(client.raw.delivery()));
        },
    ),
    case("streams: delete", filtered, |client, _| client.delete("q")),
    case(
        "bindings, hashed: a thousand messages",
        |client, n| {
            client.exchange("x", "x-consistent-hash");
            client.many(n, |i| [declare(&name(i), 0, &[]), bind(&name(i), "x", "1", &[])].concat());
        },
        |client, _| client.publish_many("x", 1_000, |_| Vec::new()),
    ),
    Case { name: "channels: open", most: CHANNELS_MAX, prepare: |_, _| {}, act: |client, n| client.open_channels(n) },
    Case {
        name: "channels: end of their connection",
        most: CHANNELS_MAX,
        prepare: |client, n| client.open_channels(n),
        act: |client, _| client.leave(),
    },
];

const HOUR: u64 = 3_600_000;

fn main() {
    let wanted = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).unwrap_or_default();
    println!("{:78}{:>8}{:>8}{:>8}{:>8}{:>10}", "µs each, of", "10³", "10⁴", "10⁵", "growth", "wait, ms");
    for case in CASES.iter().filter(|case| case.name.contains(&wanted)) {
        let mut each = Vec::new();
        let mut longest = Duration::ZERO;
        for size in SIZES.map(|size| size.min(case.most)) {
            let runs: Vec<(Duration, Duration)> = (0..RUNS).map(|_| run(case, size)).collect();
            let best = runs.iter().map(|(time, _)| *time).min().unwrap_or_default();
            each.push(best.as_secs_f64() * 1e6 / size as f64);
            longest = longest.max(runs.iter().map(|(_, wait)| *wait).min().unwrap_or_default());
        }
        let growth = each[each.len() - 1] / each[0];
        println!(
            "{:78}{:8.2}{:8.2}{:8.2}{growth:8.1}{:10.1}",
            case.name,
            each[0],
            each[1],
            each[2],
            longest.as_secs_f64() * 1e3
        );
    }
}

/// How long the act took, and the longest that another client waited for an answer meanwhile.
fn run(case: &Case, size: usize) -> (Duration, Duration) {
    let broker = EmbeddedBroker::builder().quorum_queues(true).start().expect("a broker");
    let addr = broker.addr();
    let mut client = Client { raw: Raw::open(addr), addr, gone: false };
    (case.prepare)(&mut client, size);
    client.sync();
    let mut bystander = Raw::open(addr);
    bystander.declare("bystander");
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let waits = scope.spawn(|| {
            let mut longest = Duration::ZERO;
            while !done.load(Ordering::Relaxed) {
                let asked = Instant::now();
                bystander.count("bystander");
                longest = longest.max(asked.elapsed());
            }
            longest
        });
        let start = Instant::now();
        (case.act)(&mut client, size);
        client.sync();
        let time = start.elapsed();
        done.store(true, Ordering::Relaxed);
        (time, waits.join().expect("the other client"))
    })
}

struct Client {
    raw: Raw,
    addr: SocketAddr,
    gone: bool,
}

impl Client {
    /// All that was said has been done.
    fn sync(&mut self) {
        if std::mem::take(&mut self.gone) {
            self.raw = Raw::open(self.addr);
        }
        // `exchange.declare`, passive.
        self.raw.say(1, (40, 10), &[&[0, 0][..], &short("amq.direct"), &short("direct"), &[1], &long(b"")].concat());
        self.until((40, 11));
    }

    fn until(&mut self, wanted: (u16, u16)) {
        loop {
            let (kind, _, payload) = self.raw.frame().expect("the connection has ended");
            if kind == 1 && payload[..4] == [wanted.0.to_be_bytes(), wanted.1.to_be_bytes()].concat() {
                return;
            }
            let is_close = kind == 1 && (payload.starts_with(&[0, 10, 0, 50]) || payload.starts_with(&[0, 20, 0, 40]));
            assert!(!is_close, "{}", String::from_utf8_lossy(&payload));
        }
    }

    fn many(&mut self, n: usize, mut bytes: impl FnMut(usize) -> Vec<u8>) {
        let mut batch = Vec::new();
        for i in 0..n {
            batch.extend(bytes(i));
            if batch.len() > 1 << 18 {
                self.raw.send(&batch);
                batch.clear();
            }
        }
        self.raw.send(&batch);
    }

    /// Says something that is answered, and waits for the answer.
    fn say(&mut self, id: (u16, u16), arguments: &[u8]) {
        self.raw.say(1, id, arguments);
        self.until((id.0, id.1 + 1));
    }

    fn declare(&mut self, queue: &str, flags: u8, arguments: &[u8]) {
        self.raw.declare_with(queue, flags, arguments);
        self.until((50, 11));
    }

    fn declare_queues(&mut self, n: usize, flags: u8, arguments: &[u8]) {
        self.many(n, |i| declare(&name(i), flags, arguments));
    }

    fn delete_queues(&mut self, n: usize) {
        self.many(n, |i| method(1, (50, 40), &[&[0, 0][..], &short(&name(i)), &[4]].concat()));
    }

    fn delete(&mut self, queue: &str) {
        self.say((50, 40), &[&[0, 0][..], &short(queue), &[0]].concat());
    }

    fn exchange(&mut self, name: &str, kind: &str) {
        self.say((40, 10), &[&[0, 0][..], &short(name), &short(kind), &[0], &long(b"")].concat());
    }

    fn bind(&mut self, queue: &str, exchange: &str, key: &str, arguments: &[u8]) {
        self.raw.send(&bind(queue, exchange, key, arguments));
        self.sync();
    }

    /// As many queues, each bound to an exchange by a key and arguments of its own.
    fn bind_queues(&mut self, n: usize, kind: &str, arguments: impl Fn(usize) -> Vec<u8>) {
        self.exchange("x", kind);
        self.many(n, |i| [declare(&name(i), 0, &[]), bind(&name(i), "x", &name(i), &arguments(i))].concat());
    }

    fn consume(&mut self, n: usize, no_ack: bool) {
        let flags = CONSUME_NO_WAIT | if no_ack { NO_ACK } else { 0 };
        self.many(n, |i| {
            method(1, (60, 20), &[&[0, 0][..], &short("q"), &short(&i.to_string()), &[flags], &long(b"")].concat())
        });
    }

    /// A consumer of the stream `q`, from its first message on.
    fn read(&mut self, tag: &str, arguments: &[u8]) {
        let arguments = [&text_field("x-stream-offset", "first"), arguments].concat();
        let names = [short("q"), short(tag)].concat();
        self.raw.say(1, (60, 20), &[&[0, 0][..], &names, &[CONSUME_NO_WAIT], &long(&arguments)].concat());
    }

    fn publish(&mut self, exchange: &str, key: &str, headers: &[u8], body: &[u8]) {
        self.raw.send(&message(exchange, key, headers, body));
    }

    /// To the queue `q` by way of the default exchange, or to another exchange.
    fn publish_many(&mut self, exchange: &str, n: usize, headers: impl Fn(usize) -> Vec<u8>) {
        self.many(n, |i| message(exchange, "q", &headers(i), b"m"));
    }

    fn settle(&mut self, id: (u16, u16), through: usize, flags: u8) {
        self.raw.say(1, id, &[&(through as u64).to_be_bytes()[..], &[flags]].concat());
    }

    fn close_channel(&mut self) {
        self.raw.say(1, (20, 40), &[&200_u16.to_be_bytes()[..], &short(""), &[0; 4]].concat());
        self.until((20, 41));
        self.raw.say(1, (20, 10), &short(""));
        self.until((20, 11));
    }

    fn open_channels(&mut self, n: usize) {
        for number in 2..=n {
            self.raw.say(number as u16, (20, 10), &short(""));
        }
        (2..=n).for_each(|_| self.until((20, 11)));
    }

    /// Ends the connection; [`sync`](Client::sync) is another.
    fn leave(&mut self) {
        self.raw.say(0, (10, 50), &[&200_u16.to_be_bytes()[..], &short(""), &[0; 4]].concat());
        self.until((10, 51));
        self.gone = true;
    }

    fn await_length(&mut self, queue: &str, n: usize) {
        let start = Instant::now();
        while self.raw.count(queue) as usize != n {
            assert!(start.elapsed() < PATIENCE, "{queue} never had {n} messages");
        }
    }
}

fn name(i: usize) -> String {
    format!("queue-{i}")
}

fn declare(queue: &str, flags: u8, arguments: &[u8]) -> Vec<u8> {
    method(1, (50, 10), &[&[0, 0][..], &short(queue), &[flags | NO_WAIT], &long(arguments)].concat())
}

fn bind(queue: &str, exchange: &str, key: &str, arguments: &[u8]) -> Vec<u8> {
    let names = [short(queue), short(exchange), short(key)].concat();
    method(1, (50, 20), &[&[0, 0][..], &names, &[1], &long(arguments)].concat())
}

fn message(exchange: &str, key: &str, headers: &[u8], body: &[u8]) -> Vec<u8> {
    let publish = method(1, (60, 40), &[&[0, 0][..], &short(exchange), &short(key), &[0]].concat());
    let properties = if headers.is_empty() { vec![0, 0] } else { [&[0x20, 0][..], &long(headers)].concat() };
    let header = [&[0, 60, 0, 0][..], &(body.len() as u64).to_be_bytes(), &properties].concat();
    assert!(header.len() < FRAME_MAX as usize, "headers fit in a frame");
    [publish, frame(2, 1, &header), frame(3, 1, body)].concat()
}

fn text_field(name: &str, text: &str) -> Vec<u8> {
    [&short(name)[..], b"S", &long(text.as_bytes())].concat()
}

fn bool_field(name: &str) -> Vec<u8> {
    [&short(name)[..], b"t", &[1]].concat()
}

fn long_int(name: &str, value: u64) -> Vec<u8> {
    [&short(name)[..], b"l", &value.to_be_bytes()].concat()
}

fn one_field(i: usize) -> Vec<u8> {
    text_field("number", &i.to_string())
}

fn stream() -> Vec<u8> {
    text_field("x-queue-type", "stream")
}

/// A stream of so many messages that nobody wants, and one behind them.
fn filtered(client: &mut Client, n: usize) {
    client.declare("q", DURABLE, &stream());
    client.publish_many("", n, |_| Vec::new());
    client.publish("", "q", &text_field("x-stream-filter-value", "wanted"), b"m");
    client.raw.limit(1, false);
}

/// So many headers, each of a few bytes.
fn headers(n: usize) -> Vec<u8> {
    (0..n).flat_map(|i| [&short(&format!("{i:x}"))[..], b"t", &[1]].concat()).collect()
}

fn dead_letters() -> Vec<u8> {
    [text_field("x-dead-letter-exchange", ""), text_field("x-dead-letter-routing-key", "dead")].concat()
}

fn exclusive_queues(client: &mut Client, n: usize) {
    client.declare_queues(n, EXCLUSIVE, &[]);
}

fn same_key(client: &mut Client, n: usize) {
    client.declare("q", 0, &[]);
    client.many(n, |i| bind("q", "x", "k", &text_field("number", &i.to_string())));
}

fn many_bindings(client: &mut Client, n: usize) {
    client.exchange("x", "headers");
    same_key(client, n);
}

/// Ten bindings that ask for these fields, and each for one more that no message has.
fn ten_bindings(client: &mut Client, fields: &[u8]) {
    client.exchange("x", "headers");
    client.declare("q", 0, &[]);
    for binding in 0..10 {
        client.bind("q", "x", "", &[fields, &text_field("~", &binding.to_string())].concat());
    }
}

fn consumers(client: &mut Client, n: usize) {
    client.declare("q", 0, &[]);
    client.consume(n, false);
}

/// A consumer that has so many messages and has acked none.
fn unacked(client: &mut Client, n: usize) {
    client.declare("q", 0, &[]);
    hold(client, n);
}

fn dying_unacked(client: &mut Client, n: usize) {
    client.declare("dead", 0, &[]);
    client.declare("q", 0, &dead_letters());
    hold(client, n);
}

fn hold(client: &mut Client, n: usize) {
    client.publish_many("", n, |_| Vec::new());
    client.consume(1, false);
    (0..n).for_each(|_| drop(client.raw.delivery()));
}
