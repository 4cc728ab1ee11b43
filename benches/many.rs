//! Many connections and many threads: what each costs.
//!
//! ```text
//! cargo bench --bench many --features cli
//! ```
//!
//! Starts `coney broker` in a process of its own. Opens 400 connections of one pool, lets them rest for five seconds and closes
//! them; prints what each costs in milliseconds, memory and threads, and the CPU time of the rest. Then drains a queue by
//! listeners of 1, 4, 16 and 64 threads, five rounds in turn, and prints the medians and their ratio to one thread.

#[path = "../tests/held/mod.rs"]
mod held;

use std::error::Error;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use coney::{App, Delivery, Queue, Settings};
use rustix::time::{ClockId, clock_gettime};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const CONNECTIONS: usize = 400;
const REST: Duration = Duration::from_secs(5);
const THREADS: [usize; 4] = [1, 4, 16, 64];
const MESSAGES: usize = 100_000;
const ROUNDS: usize = 5;
const QUEUE: &str = "many";

/// `coney broker`, until it is dropped.
struct Broker {
    child: Child,
    url: String,
}

impl Broker {
    fn start() -> Result<Broker> {
        let mut child = Command::new(env!("CARGO_BIN_EXE_coney"))
            .args(["broker", "--listen", "127.0.0.1:0"])
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().ok_or("no output")?).read_line(&mut line)?;
        let address = line.trim().strip_prefix("coney: broker ready on ").ok_or("coney broker did not begin")?;
        Ok(Broker { url: format!("amqp://guest:guest@{address}/%2f"), child })
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // It keeps nothing, so there is nothing to end in order.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn main() -> Result<()> {
    let broker = Broker::start()?;
    let settings = format!("[broker]\nurl = {:?}\n[pools.publish]\nsize = {CONNECTIONS}", broker.url);
    let app = App::from_settings(Settings::from_toml(&settings)?)?;
    connections(&app)?;
    listeners(&app)
}

fn connections(app: &App) -> Result<()> {
    let pool = app.publish_pool();
    drop(pool.connection()?);
    let (threads_before, _) = held::settled();
    let memory_before = held::memory();
    let start = Instant::now();
    let open = (1..CONNECTIONS).map(|_| pool.connection()).collect::<coney::Result<Vec<_>>>()?;
    let opening = start.elapsed();
    let (threads, _) = held::settled();
    let memory = held::memory();
    let cpu = cpu_time();
    thread::sleep(REST);
    let rest = cpu_time() - cpu;
    let count = open.len() as u32;
    drop(open);
    let start = Instant::now();
    pool.close();
    let closing = start.elapsed();
    println!("{count} connections, each:");
    println!("  {:.2} ms to open, {:.2} ms to close", milliseconds(opening / count), milliseconds(closing / count));
    println!("  {:.2} threads", (threads - threads_before) as f64 / f64::from(count));
    println!("  {:.0} KiB", memory.saturating_sub(memory_before) as f64 / 1024.0 / f64::from(count));
    println!("  {:.1} ms of CPU time in {REST:?} of rest, for all together", milliseconds(rest));
    Ok(())
}

fn listeners(app: &App) -> Result<()> {
    let mut rates = vec![Vec::new(); THREADS.len()];
    for _ in 0..ROUNDS {
        for (threads, rates) in THREADS.iter().zip(&mut rates) {
            rates.push(drain(app, *threads)?);
        }
    }
    let mut one = 0.0;
    println!("listeners, messages of 100 B a second, medians of {ROUNDS} rounds:");
    for (threads, mut rates) in THREADS.iter().zip(rates) {
        rates.sort_by(f64::total_cmp);
        let rate = rates[ROUNDS / 2];
        one = if *threads == 1 { rate } else { one };
        println!("  {threads:2} threads {rate:>10.0}   {:.2} of one", rate / one);
    }
    Ok(())
}

/// Messages per second from the first to the last.
fn drain(app: &App, threads: usize) -> Result<f64> {
    let connection = app.pool("listen")?.connection()?;
    connection.queue_declare(&Queue::new(QUEUE))?;
    connection.publish_batch((0..MESSAGES).map(|_| ("", QUEUE, [b'x'; 100].as_slice())))?;
    let handled = Arc::new(AtomicUsize::new(0));
    let (done, all) = mpsc::sync_channel(1);
    let start = Instant::now();
    let listener = app.listener(QUEUE).concurrency(threads).spawn({
        let handled = Arc::clone(&handled);
        move |_, _: &Delivery| {
            if handled.fetch_add(1, Ordering::Relaxed) + 1 == MESSAGES {
                // Nobody waits any more after the first.
                let _ = done.try_send(Instant::now());
            }
        }
    })?;
    let end = all.recv_timeout(Duration::from_secs(60))?;
    listener.stop()?;
    connection.queue_delete(QUEUE)?;
    Ok(MESSAGES as f64 / (end - start).as_secs_f64())
}

/// User and system time of this process.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or_default())
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
