//! The embedded broker beside RabbitMQ, with the same client program.
//!
//! ```text
//! cargo bench --bench embedded --features testing
//! ```
//!
//! Starts a private RabbitMQ node and an embedded broker, and runs each case on both in turn, five rounds, with 100-byte
//! messages. Prints medians, and the ratio embedded : RabbitMQ of each round as min, median and max. Then fills a queue of
//! the embedded broker with a million messages and prints what each costs beyond its body.

use std::error::Error;
use std::fs;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use coney::embedded::EmbeddedBroker;
use coney::testing::RabbitMq;
use coney::{App, Queue, Settings};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const ROUNDS: usize = 5;
const PIPELINED: usize = 50_000;
const SYNC: usize = 2_000;
const HELD: usize = 1_000_000;
const BODY: [u8; 100] = [b'x'; 100];
const QUEUE: &str = "bench";

/// What is measured of an app in one round, in messages per second.
type Case = (&'static str, fn(&App) -> Result<f64>);

const CASES: [Case; 3] = [
    ("publish, confirmed, pipelined", publish_pipelined),
    ("consume, acked", consume),
    ("publish, sync", publish_sync),
];

fn main() -> Result<()> {
    let node = RabbitMq::start()?;
    let broker = EmbeddedBroker::start()?;
    let (rabbitmq, embedded) = (app(&node.url())?, app(&broker.url())?);
    let mut rates = vec![(Vec::new(), Vec::new()); CASES.len()];
    for round in 1..=ROUNDS {
        eprintln!("round {round} of {ROUNDS}");
        for ((_, case), (embedded_rates, rabbitmq_rates)) in CASES.iter().zip(&mut rates) {
            embedded_rates.push(case(&embedded)?);
            rabbitmq_rates.push(case(&rabbitmq)?);
        }
    }
    println!("{:32}{:>12}{:>12}   ratio min / median / max", "messages per second, medians", "embedded", "RabbitMQ");
    for ((name, _), (embedded, rabbitmq)) in CASES.iter().zip(rates) {
        let ratios = sorted(embedded.iter().zip(&rabbitmq).map(|(ours, theirs)| ours / theirs).collect());
        let (embedded, rabbitmq) = (sorted(embedded), sorted(rabbitmq));
        println!(
            "{name:32}{:>12.0}{:>12.0}   {:.1} / {:.1} / {:.1}",
            embedded[ROUNDS / 2],
            rabbitmq[ROUNDS / 2],
            ratios[0],
            ratios[ROUNDS / 2],
            ratios[ROUNDS - 1]
        );
    }
    let before = resident()?;
    let connection = embedded.publish_pool().connection()?;
    connection.queue_purge(QUEUE)?;
    for _ in 0..HELD / PIPELINED {
        connection.publish_batch((0..PIPELINED).map(|_| ("", QUEUE, BODY.to_vec())))?;
    }
    assert_eq!(broker.control().queue_len(QUEUE), HELD);
    let each = (resident()?.saturating_sub(before)) as f64 / HELD as f64 - BODY.len() as f64;
    println!("{HELD} messages in one queue of the embedded broker: {each:.0} bytes each beyond the body");
    Ok(())
}

fn app(url: &str) -> Result<App> {
    let text = format!("[broker]\nurl = {url:?}\n[pools.listen]\nprefetch = 500");
    let app = App::from_settings(Settings::from_toml(&text)?)?;
    app.publish_pool().connection()?.queue_declare(&Queue::new(QUEUE))?;
    Ok(app)
}

fn rate(messages: usize, start: Instant) -> f64 {
    messages as f64 / start.elapsed().as_secs_f64()
}

fn publish_pipelined(app: &App) -> Result<f64> {
    let connection = app.publish_pool().connection()?;
    connection.queue_purge(QUEUE)?;
    let start = Instant::now();
    connection.publish_batch((0..PIPELINED).map(|_| ("", QUEUE, BODY.to_vec())))?;
    Ok(rate(PIPELINED, start))
}

/// Takes what `publish_pipelined` has left.
fn consume(app: &App) -> Result<f64> {
    let (seen, got) = mpsc::channel();
    let start = Instant::now();
    let listener = app.spawn_listener(QUEUE, move |_, _| seen.send(()).map_err(|gone| gone.to_string()))?;
    for _ in 0..PIPELINED {
        got.recv_timeout(Duration::from_secs(60))?;
    }
    let rate = rate(PIPELINED, start);
    listener.stop()?;
    Ok(rate)
}

fn publish_sync(app: &App) -> Result<f64> {
    let connection = app.publish_pool().connection()?;
    let start = Instant::now();
    for _ in 0..SYNC {
        connection.publish("", QUEUE, BODY.to_vec())?;
    }
    Ok(rate(SYNC, start))
}

fn sorted(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values
}

/// Resident memory of this process in bytes.
fn resident() -> Result<usize> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<usize>()? * 1024)
}
