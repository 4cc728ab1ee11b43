//! `coney bench`: how fast a broker takes messages from here, and gives them.
//!
//! A look, not a measurement: one publisher, one consumer, one queue. What coney is measured with is `benches/`.

use std::time::{Duration, Instant};

use coney::{App, Outcome, Queue, Topology};
use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use serde_json::json;

use crate::exit::{CODES, Exit, Failure, Result};
use crate::output;
use crate::progress::{Progress, rate};
use crate::source::{SETTINGS, Source};

/// How many messages are published one by one, each waiting for its confirm.
const ONE_BY_ONE: u64 = 500;
/// How long the consumer may wait for a message that is on its way.
const PATIENCE: Duration = Duration::from_secs(30);

/// Publishes and consumes messages on a queue of its own, and says how fast that was.
///
/// First some messages are published one by one, each waiting for its confirm; then all of them without waiting, while
/// another connection consumes. The queue is exclusive and not durable: nothing is written to disk, and nothing is left.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("Examples:
  coney bench
  coney bench --count 100000 --size 1000 --url amqp://guest@rabbit.example
  coney bench --url memory://bench          # the embedded broker, in this process

{SETTINGS}

{CODES}"))]
pub struct Arguments {
    /// How many messages.
    #[arg(long, value_name = "NUMBER", default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..))]
    count: u64,
    /// How long their bodies are, in bytes; at least 8, for the time they carry.
    #[arg(long, value_name = "BYTES", default_value_t = 100, value_parser = clap::value_parser!(u32).range(8..=16 << 20))]
    size: u32,
    /// Prints one JSON object, with times in microseconds.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    pub source: Source,
}

pub fn run(arguments: &Arguments) -> Result {
    let app = arguments.source.app_listening_on_pool(|pool| pool.retry = None)?;
    let queue = format!("coney.bench.{:016x}", fastrand::u64(..));
    let start = Instant::now();
    let (came, comes) = bounded(usize::from(u16::MAX));
    let own = Topology::new().queue(Queue::new(&queue).durable(false).exclusive(true));
    let listener = app.listener(&queue).topology(own).spawn(move |_context, delivery| {
        // The receiver goes when the bench is given up.
        let _ = came.send(start.elapsed().saturating_sub(sent_at(delivery.body())));
        Outcome::Ack
    })?;
    let result = measure(arguments, &app, &queue, start, &comes);
    drop(comes);
    listener.stop()?;
    result
}

fn measure(arguments: &Arguments, app: &App, queue: &str, start: Instant, comes: &Receiver<Duration>) -> Result {
    let connection = arguments.source.any_pool(app, app.publish_pool())?.connection_or_cause()?;
    let body = || {
        let mut body = vec![b'.'; arguments.size as usize];
        let now = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        body[..8].copy_from_slice(&now.to_be_bytes());
        body
    };
    let one_by_one = arguments.count.min(ONE_BY_ONE);
    let mut confirmed = Vec::new();
    for _ in 0..one_by_one {
        let since = Instant::now();
        connection.publish("", queue, body())?;
        confirmed.push(since.elapsed());
        receive(comes)?;
    }

    let progress = Progress::new(Some(arguments.count));
    let since = Instant::now();
    let receive_all = || -> Result<(Vec<Duration>, Duration)> {
        let mut under_way = Vec::new();
        for _ in 0..arguments.count {
            under_way.push(receive(comes)?);
            progress.step();
        }
        Ok((under_way, since.elapsed()))
    };
    let (published, received) = std::thread::scope(|scope| {
        let receiving = scope.spawn(receive_all);
        let published = connection.publish_batch((0..arguments.count).map(|_| ("", queue, body())));
        let took = since.elapsed();
        (published.map(|_| took), receiving.join())
    });
    let published = published?;
    let (under_way, consumed) = received.map_err(|_| Failure::failed("the consumer has panicked"))??;
    progress.done("consumed");

    let [confirm, delivery] = [confirmed, under_way].map(Latency::of);
    let rates = [published, consumed].map(|took| rate(arguments.count, took).round());
    let (count, size) = (arguments.count, arguments.size);
    if arguments.json {
        let result = json!({
            "messages": count, "bytes": size, "published_per_second": rates[0], "consumed_per_second": rates[1],
            "confirm_us": confirm.to_json(), "delivery_us": delivery.to_json(),
        });
        output::line(&output::json(&result)?)?;
    } else {
        output::line(&format!("{} of {size} bytes, to {}", output::count(count, "message"), connection.name()))?;
        output::line(&format!("published  {:>9}/s, confirmed, without waiting for each", rates[0]))?;
        output::line(&format!("consumed   {:>9}/s, acked, meanwhile", rates[1]))?;
        output::line(&format!("confirm    {}, one message at a time, of {one_by_one}", confirm.to_words()))?;
        output::line(&format!("delivery   {}, from publish to handler, under that load", delivery.to_words()))?;
    }
    Ok(Exit::Done)
}

fn sent_at(body: &[u8]) -> Duration {
    let nanos = body.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
    Duration::from_nanos(nanos)
}

fn receive(comes: &Receiver<Duration>) -> Result<Duration> {
    comes.recv_timeout(PATIENCE).map_err(|error| {
        Failure::failed(match error {
            RecvTimeoutError::Timeout => format!("no message came within {PATIENCE:?}"),
            RecvTimeoutError::Disconnected => "the consumer has ended".to_owned(),
        })
    })
}

/// How long things took.
struct Latency([Duration; 4]);

impl Latency {
    const NAMES: [&str; 4] = ["p50", "p95", "p99", "max"];

    /// Of at least one.
    fn of(mut times: Vec<Duration>) -> Latency {
        times.sort_unstable();
        let last = times.len().saturating_sub(1);
        Latency([50, 95, 99, 100].map(|percent| times.get(last * percent / 100).copied().unwrap_or_default()))
    }

    fn to_words(&self) -> String {
        let each = Latency::NAMES.iter().zip(self.0).map(|(name, time)| format!("{name} {time:.1?}"));
        each.collect::<Vec<_>>().join("  ")
    }

    fn to_json(&self) -> serde_json::Value {
        Latency::NAMES
            .iter()
            .zip(self.0)
            .map(|(name, time)| ((*name).to_owned(), json!(time.as_micros() as u64)))
            .collect()
    }
}
