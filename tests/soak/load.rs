//! The load: publishers of two kinds, a listener of each kind, callers and the worker that answers them, at a steady pace.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use coney::rpc::{RpcClient, RpcWorker};
use coney::{App, Batch, Concurrency, Listener, Outcome, Pool, Queue, Received, Settings, Topology};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use crate::ledger::{Ledger, MARGIN, Way};

pub const QUEUE: &str = "soak";
const CALLS: &str = "soak-calls";

/// Consumers on the two queues together, when nothing rests and nothing is to be done: two of the plain listener, one of each
/// other listener, one of the worker.
pub const CONSUMERS: usize = 8;

/// How many messages are sent ahead to each consumer, and how many are in a batch.
const PREFETCH: u16 = 20;
/// How long a batch waits for more.
const BATCH_WAIT: Duration = Duration::from_millis(50);
/// How long one listener rests, and the database of another is away; and how long they are well in between.
const REST: Duration = Duration::from_millis(700);

const PUBLISHERS: usize = 2;
const CALLERS: usize = 2;

const CHECKOUT: Duration = Duration::from_secs(2);
const CONFIRM: Duration = Duration::from_secs(2);
/// Shorter than a restart of the node may take, so that some publishes outlive one and some do not.
const PUBLISH: Duration = Duration::from_secs(4);
const CALL: Duration = Duration::from_secs(3);
/// What giving back a guard adds to its callbacks' time.
const GIVE_BACK: Duration = Duration::from_millis(500);

/// Between the end of one publish or call and the next: enough of them to be in the way of every fault, few enough to leave
/// the machine to others.
const PACE: Duration = Duration::from_millis(5);
/// Between guards, of [`PER_GUARD`] messages at most.
const GUARD_PACE: Duration = Duration::from_millis(200);
const PER_GUARD: usize = 100;

/// More messages than there are in a second.
pub const MESSAGES_PER_SECOND: usize = PUBLISHERS * 200 + PER_GUARD * 5;

/// The largest body, in bytes: more than one segment on the wire, less than a frame.
const LARGEST: usize = 8 << 10;

/// Heartbeats of 2 s: a silent broker is noticed after 4 to 5 s.
fn settings(broker: &str) -> coney::Result<Settings> {
    Settings::from_toml(&format!(
        r#"
        [broker]
        {broker}
        heartbeat = "2s"
        connect_timeout = "2s"
        operation_timeout = "2s"
        [pools.publish]
        size = 4
        checkout_timeout = "{CHECKOUT:?}"
        confirm_timeout = "{CONFIRM:?}"
        publish_timeout = "{PUBLISH:?}"
        [pools.listen]
        size = 7
        prefetch = {PREFETCH}
        confirm_timeout = "{CONFIRM:?}"
        "#
    ))
}

/// Everything that runs.
pub struct Load {
    app: App,
    listeners: Vec<Listener>,
    worker: Listener,
    client: RpcClient,
    ledger: Arc<Ledger>,
    threads: Vec<JoinHandle<()>>,
    /// Nothing is sent; dropping it is the sign to stop.
    stop: Sender<()>,
    /// Nothing is sent; it ends when every thread has.
    ended: Receiver<()>,
}

/// What each thread has.
#[derive(Clone)]
struct Hand {
    ledger: Arc<Ledger>,
    stop: Receiver<()>,
    _running: Sender<()>,
}

impl Hand {
    /// Paces the load; whether to go on.
    fn goes_on_after(&self, pace: Duration) -> bool {
        self.stop.recv_timeout(pace) == Err(RecvTimeoutError::Timeout)
    }
}

impl Load {
    pub fn start(broker: &str, seed: u64, ledger: &Arc<Ledger>) -> Result<Load, Box<dyn std::error::Error>> {
        let app = App::from_settings(settings(broker)?)?;
        let database = Arc::new(AtomicBool::new(true));
        let (listeners, resting) = start_listeners(&app, ledger, &database)?;
        let worker = RpcWorker::new(&app).route(CALLS, |n: u64| Ok::<u64, String>(answer(n))).run()?;
        let client = RpcClient::new(&app)?.with_timeout(CALL);
        let (stop, stopped) = bounded(0);
        let (running, ended) = bounded(0);
        let hand = Hand { ledger: Arc::clone(ledger), stop: stopped, _running: running };
        let mut threads = Vec::new();
        let mut start = |name: String, run: Box<dyn FnOnce() + Send>| -> std::io::Result<()> {
            threads.push(Builder::new().name(name).spawn(run)?);
            Ok(())
        };
        for n in 0..PUBLISHERS {
            let (hand, pool, rng) = (hand.clone(), app.publish_pool().clone(), rng(seed, n));
            start(format!("publisher-{n}"), Box::new(move || publish(&hand, &pool, rng)))?;
        }
        let (publisher, pool, rng) = (hand.clone(), app.publish_pool().clone(), rng(seed, PUBLISHERS));
        start("publisher-async".to_owned(), Box::new(move || publish_async(&publisher, &pool, rng)))?;
        for n in 0..CALLERS {
            let (hand, client) = (hand.clone(), client.clone());
            start(format!("caller-{n}"), Box::new(move || call(&hand, &client)))?;
        }
        start("rest".to_owned(), Box::new(move || rest(&hand, resting, &database)))?;
        Ok(Load { app, listeners, worker, client, ledger: Arc::clone(ledger), threads, stop, ended })
    }

    /// How often the listeners and the worker have come back.
    pub fn recoveries(&self) -> u64 {
        self.listeners.iter().chain([&self.worker]).map(|listener| listener.stats().recoveries).sum()
    }

    /// Connections that the pools have opened so far; and those they have.
    pub fn connections(&self) -> (u64, usize) {
        let (publish, listen) = (self.app.publish_pool().status(), self.app.listen_pool().status());
        let open = publish.idle + publish.in_use + listen.idle + listen.in_use;
        (publish.created + listen.created, open as usize)
    }

    /// How the pools stand, for people.
    pub fn pools(&self) -> String {
        format!("{:?}, {:?}", self.app.publish_pool().status(), self.app.listen_pool().status())
    }

    /// Ends the publishers and callers, each of which has a deadline; the listeners and the worker go on.
    pub fn cease(&mut self) {
        drop(std::mem::replace(&mut self.stop, bounded(0).0));
        let limit = PUBLISH + CONFIRM + CONFIRM + MARGIN;
        if self.ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            let left: Vec<_> = self.threads.iter().filter(|thread| !thread.is_finished()).collect();
            let names: Vec<_> = left.iter().filter_map(|thread| thread.thread().name()).collect();
            self.ledger.violated("a call never ended", || format!("{names:?} still run after {limit:?}"));
            return self.threads.clear();
        }
        for thread in self.threads.drain(..) {
            let name = thread.thread().name().unwrap_or_default().to_owned();
            if thread.join().is_err() {
                self.ledger.violated("a thread of the load panicked", || name);
            }
        }
    }

    /// Ends all the rest.
    pub fn end(self) {
        self.client.close();
        for listener in self.listeners.into_iter().chain([self.worker]) {
            if let Err(error) = listener.stop() {
                self.ledger.violated("a listener did not stop", || error.to_string());
            }
        }
        if let Err(error) = self.app.shutdown(Duration::from_secs(10)) {
            self.ledger.violated("the app did not shut down", || error.to_string());
        }
    }
}

/// Starts one listener of each kind on the queue. The last one is to be paused and resumed.
fn start_listeners(
    app: &App,
    ledger: &Arc<Ledger>,
    database: &Arc<AtomicBool>,
) -> coney::Result<(Vec<Listener>, Listener)> {
    let named = |name: &str| app.listener(QUEUE).name(name).topology(Topology::new().queue(Queue::new(QUEUE)));
    let handler = || {
        let ledger = Arc::clone(ledger);
        move |_: &coney::Context<'_>, delivery: &coney::Delivery<'_>| handle(&ledger, delivery)
    };
    let (of_batches, of_database, is_there) = (Arc::clone(ledger), Arc::clone(ledger), Arc::clone(database));
    let listeners = vec![
        named("plain").concurrency(2).spawn(handler())?,
        named("batches").batch(PREFETCH, BATCH_WAIT).spawn_batch(move |_, batch: &mut Batch| {
            batch.iter().for_each(|item| handle(&of_batches, item));
        })?,
        named("growing").concurrency(Concurrency::from(1..=3).with_shrink_after(REST)).prefetch(2).spawn(handler())?,
        named("paced").max_rate(50).prefetch(2).route(QUEUE, handler()).spawn()?,
        // What fails goes back into the queue, so it is not lost.
        named("failing").pause_on_failures(5, 0.5, REST, REST).spawn(move |_, delivery| {
            if !is_there.load(Ordering::SeqCst) {
                return Outcome::Requeue;
            }
            handle(&of_database, delivery);
            Outcome::Ack
        })?,
    ];
    Ok((listeners, named("resting").spawn(handler())?))
}

/// Has one listener rest now and then, and takes the database of another away. All are well at the end.
fn rest(hand: &Hand, resting: Listener, database: &AtomicBool) {
    while hand.goes_on_after(REST) {
        resting.pause();
        database.store(false, Ordering::SeqCst);
        let goes_on = hand.goes_on_after(REST);
        database.store(true, Ordering::SeqCst);
        resting.resume();
        if !goes_on {
            break;
        }
    }
    // The app stops it.
    resting.detach();
}

/// Chances of its own for each thread, all from one seed.
fn rng(seed: u64, thread: usize) -> fastrand::Rng {
    fastrand::Rng::with_seed(seed.wrapping_add(1 + thread as u64))
}

/// A body from which its number can be read, and that it is whole.
fn body(number: usize, len: usize) -> Vec<u8> {
    let mut body = format!("{number} ").into_bytes();
    let padded = body.len() + len;
    body.resize(padded, number as u8);
    body
}

fn number(body: &[u8]) -> Option<usize> {
    let digits = body.split(|&byte| byte == b' ').next()?;
    let number = std::str::from_utf8(digits).ok()?.parse().ok()?;
    let padding = body.get(digits.len() + 1..)?;
    padding.iter().all(|&byte| byte == number as u8).then_some(number)
}

fn handle(ledger: &Ledger, delivery: &Received) {
    match number(delivery.body()) {
        Some(number) => ledger.handled(number, delivery.redelivered(), delivery.message().message_id()),
        None => ledger.violated("a body arrived damaged", || format!("{} bytes", delivery.body().len())),
    }
}

fn answer(n: u64) -> u64 {
    n.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ n
}

fn publish(hand: &Hand, pool: &Pool, mut rng: fastrand::Rng) {
    while hand.goes_on_after(PACE) {
        let number = hand.ledger.attempt(Way::Pool);
        let body = body(number, rng.usize(..LARGEST));
        let start = Instant::now();
        let outcome = pool.publish("", QUEUE, body);
        hand.ledger.took("pool.publish", start.elapsed(), PUBLISH);
        hand.ledger.told(number, &outcome);
    }
}

/// Borrows one guard after another. A guard that has died is used for a while like any other.
fn publish_async(hand: &Hand, pool: &Pool, mut rng: fastrand::Rng) {
    while hand.goes_on_after(GUARD_PACE) {
        let start = Instant::now();
        let guard = pool.connection();
        hand.ledger.took("checkout", start.elapsed(), CHECKOUT);
        let Ok(guard) = guard else { continue };
        for _ in 0..rng.usize(1..=PER_GUARD) {
            let number = hand.ledger.attempt(Way::Async);
            let (ledger, start) = (Arc::clone(&hand.ledger), Instant::now());
            guard.publish_async("", QUEUE, body(number, rng.usize(..LARGEST)), move |outcome| {
                ledger.took("publish_async until its callback", start.elapsed(), CONFIRM);
                ledger.told(number, &outcome);
            });
            hand.ledger.took("publish_async", start.elapsed(), CONFIRM);
        }
        let start = Instant::now();
        drop(guard);
        hand.ledger.took("giving a guard back", start.elapsed(), CONFIRM + GIVE_BACK);
    }
}

fn call(hand: &Hand, client: &RpcClient) {
    while hand.goes_on_after(PACE) {
        let number = hand.ledger.call();
        let start = Instant::now();
        let outcome = client.call::<_, u64>(CALLS, &number);
        hand.ledger.took("call", start.elapsed(), CALL);
        hand.ledger.answered(number, &outcome, answer(number));
    }
}
