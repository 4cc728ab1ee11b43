//! How the throughput of one listener grows with the number of partitions.
//!
//! ```text
//! cargo bench --bench partitions --features testing
//! ```
//!
//! On a private RabbitMQ node: 1, 2, 4 and 8 partitions, three rounds of each in turn, messages of 100 bytes and 1,000 keys. First
//! all are published, in one pipeline, then one listener consumes them, with a handler that does nothing and with one that waits
//! 1 ms, as for a database. Prints medians, in messages per second.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use coney::testing::RabbitMq;
use coney::{App, Partitioned, Settings, Topology};
use crossbeam_channel::{bounded, never};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const ROUNDS: usize = 3;
const PARTITIONS: [u16; 4] = [1, 2, 4, 8];
const KEYS: usize = 1_000;
/// How long the handler of each case waits, and how many messages it has.
const CASES: [(Duration, usize); 2] = [(Duration::ZERO, 50_000), (Duration::from_millis(1), 4_000)];

/// What was measured of one number of partitions.
#[derive(Default)]
struct Rates {
    published: Vec<f64>,
    consumed: [Vec<f64>; CASES.len()],
}

fn main() -> Result<()> {
    let node = RabbitMq::start()?;
    let mut all: Vec<Rates> = PARTITIONS.iter().map(|_| Rates::default()).collect();
    for round in 1..=ROUNDS {
        for (&partitions, rates) in PARTITIONS.iter().zip(&mut all) {
            eprintln!("round {round} of {ROUNDS}, {partitions} partitions");
            for (case, (wait, messages)) in CASES.into_iter().enumerate() {
                let name = format!("orders-{round}-{case}");
                let (published, consumed) = run(&node, Partitioned::new(name, partitions), messages, wait)?;
                rates.consumed[case].push(consumed);
                if case == 0 {
                    rates.published.push(published);
                }
            }
        }
    }
    println!("{:>10}{:>12}{:>16}{:>18}", "partitions", "published", "consumed, 0 ms", "consumed, 1 ms");
    for (partitions, mut rates) in PARTITIONS.iter().zip(all) {
        let [nothing, waits] = &mut rates.consumed;
        println!(
            "{partitions:>10}{:>12.0}{:>16.0}{:>18.0}",
            median(&mut rates.published),
            median(nothing),
            median(waits)
        );
    }
    Ok(())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Messages per second: published, and consumed.
fn run(node: &RabbitMq, partitioned: Partitioned, messages: usize, wait: Duration) -> Result<(f64, f64)> {
    let mut settings = Settings::from_url(&node.url())?;
    settings.topology = Topology::new().partitioned(partitioned.clone());
    let app = App::from_settings(settings)?;
    app.declare_topology()?;
    let connection = app.publish_pool().connection()?;
    let (exchange, body) = (partitioned.exchange(), vec![b'x'; 100]);
    let keys: Vec<String> = (0..KEYS).map(|key| partitioned.routing_key(&format!("customer-{key}"))).collect();
    let begun = Instant::now();
    connection.publish_batch((0..messages).map(|n| (exchange.as_str(), keys[n % KEYS].as_str(), body.clone())))?;
    let published = messages as f64 / begun.elapsed().as_secs_f64();

    let left = Arc::new(AtomicUsize::new(messages));
    let (done, all_done) = bounded(1);
    let begun = Instant::now();
    let listener = app.listener_partitioned(&partitioned.name).prefetch(100).spawn(move |_, _| {
        if !wait.is_zero() {
            let _ = never::<()>().recv_timeout(wait);
        }
        if left.fetch_sub(1, Ordering::Relaxed) == 1 {
            // One message of room, and one message.
            let _ = done.send(Instant::now());
        }
    })?;
    let ended = all_done.recv()?;
    let consumed = messages as f64 / (ended - begun).as_secs_f64();
    listener.stop()?;
    for queue in partitioned.queue_names().chain([partitioned.members_queue()]) {
        connection.queue_delete(&queue)?;
    }
    Ok((published, consumed))
}
