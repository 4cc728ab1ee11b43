//! What an outbox in SQLite costs, beside publishing to the broker.
//!
//! ```text
//! cargo bench --bench outbox --features testing,outbox-sqlite
//! ```
//!
//! On a private RabbitMQ node, messages of 100 bytes, three rounds of each case in turn. Stored: by 1 and by 16 threads, until
//! `publish` has returned. Forwarded: from the first to the last of what was stored. Beside it `Pool::publish`, which waits for the
//! broker's confirm. Prints medians, in messages per second, and the size of the row of a message.

use std::error::Error;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use coney::outbox::Outbox;
use coney::testing::RabbitMq;
use coney::{App, Queue, Settings};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const ROUNDS: usize = 3;
const THREADS: [usize; 2] = [1, 16];
const MESSAGES: usize = 3_200;

fn main() -> Result<()> {
    let node = RabbitMq::start()?;
    let app = App::from_settings(Settings::from_toml(&format!(
        "[broker]\nurl = {:?}\n[pools.publish]\nsize = 4\n",
        node.url()
    ))?)?;
    app.publish_pool().connection()?.queue_declare(&Queue::new("stored").max_length(1000))?;
    let directory = tempfile::tempdir()?;
    let mut rates: Vec<(String, Vec<f64>)> = Vec::new();
    let mut note = |case: String, rate: f64| match rates.iter_mut().find(|(known, _)| *known == case) {
        Some((_, all)) => all.push(rate),
        None => rates.push((case, vec![rate])),
    };
    let mut bytes = 0;
    for round in 1..=ROUNDS {
        eprintln!("round {round} of {ROUNDS}");
        for threads in THREADS {
            let path = directory.path().join(format!("{round}-{threads}.db"));
            let outbox = Outbox::sqlite(&path)?;
            let body = "x".repeat(100);
            let stored = each(threads, || outbox.publish("", "stored", body.as_str()))?;
            note(format!("stored, {threads} threads"), stored);
            bytes = size(&path)? / MESSAGES as u64;
            note(format!("forwarded, after {threads} threads"), forwarded(&app, &outbox)?);
            let published = each(threads, || app.publish_pool().publish("", "stored", body.as_str()))?;
            note(format!("Pool::publish, {threads} threads"), published);
        }
        app.publish_pool().connection()?.queue_purge("stored")?;
    }
    for (case, mut all) in rates {
        all.sort_by(f64::total_cmp);
        println!("{case:32}{:>10.0}", all[ROUNDS / 2]);
    }
    println!("{:32}{bytes:>10} bytes", "on disk, for each message");
    Ok(())
}

fn size(path: &Path) -> Result<u64> {
    let wal = path.with_extension("db-wal");
    Ok(path.metadata()?.len() + wal.metadata().map_or(0, |wal| wal.len()))
}

/// Messages per second of so many threads.
fn each(threads: usize, publish: impl Fn() -> coney::Result<()> + Sync) -> Result<f64> {
    let begun = Instant::now();
    thread::scope(|scope| {
        let all: Vec<_> =
            (0..threads).map(|_| scope.spawn(|| (0..MESSAGES / threads).try_for_each(|_| publish()))).collect();
        all.into_iter().try_for_each(|thread| thread.join().unwrap_or(Ok(())))
    })?;
    Ok(MESSAGES as f64 / begun.elapsed().as_secs_f64())
}

/// Messages per second, until nothing waits. An app of its own, which lets go of the outbox in the end.
fn forwarded(app: &App, outbox: &Outbox) -> Result<f64> {
    let own = App::from_settings({
        let mut settings = Settings::from_url("amqp://localhost")?;
        settings.pools.values_mut().for_each(|pool| pool.broker = app.publish_pool().settings().broker.clone());
        settings
    })?;
    let begun = Instant::now();
    outbox.forward(&own)?;
    while outbox.status()?.pending > 0 {
        thread::yield_now();
    }
    let rate = MESSAGES as f64 / begun.elapsed().as_secs_f64();
    own.shutdown(Duration::from_secs(10))?;
    Ok(rate)
}
