//! Nodes to share, apps to talk to them, and waiting for conditions.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use coney::testing::RabbitMq;
use coney::{App, Connection, Queue, Received, Settings};

/// How long a condition may take to come true on a machine that is busy with other things.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The node that tests share. They use queues of their own and leave the node as it is.
pub fn node() -> &'static RabbitMq {
    static NODE: LazyLock<RabbitMq> = LazyLock::new(|| RabbitMq::start().expect("a RabbitMQ node"));
    &NODE
}

/// The node that tests may kill, pause and restart, one test at a time. It is whole again for the next one.
pub fn hurt_node() -> MutexGuard<'static, RabbitMq> {
    static NODE: LazyLock<Mutex<RabbitMq>> = LazyLock::new(|| Mutex::new(RabbitMq::start().expect("a RabbitMQ node")));
    // A test that failed before has left it in whatever state; `heal` below says if that is beyond use.
    let node = NODE.lock().unwrap_or_else(PoisonError::into_inner);
    node.resume().ok();
    node.start_again().ok();
    node.start_app().expect("the node is whole");
    node.unblock_publishers().expect("the node is whole");
    node
}

/// Settings for `url` with `extra` TOML after `[broker]`'s URL; may open further sections.
pub fn settings(url: &str, extra: &str) -> Settings {
    Settings::from_toml(&format!("[broker]\nurl = {url:?}\n{extra}")).expect("test settings")
}

pub fn app(url: &str, extra: &str) -> App {
    App::from_settings(settings(url, extra)).expect("an app")
}

/// An app on the shared node.
pub fn node_app(extra: &str) -> App {
    app(&node().url(), extra)
}

/// A name that no other test uses.
pub fn unique(what: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{what}-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Declares a durable queue with a name of its own.
pub fn queue(connection: &Connection, what: &str) -> String {
    let name = unique(what);
    connection.queue_declare(&Queue::new(&name)).expect("declare");
    name
}

/// Takes everything out of a queue.
pub fn drain(connection: &Connection, queue: &str) -> Vec<Received> {
    std::iter::from_fn(|| connection.get_and_ack(queue).expect("get")).collect()
}

pub fn bodies(received: &[Received]) -> Vec<String> {
    received.iter().map(|received| received.message().text().expect("UTF-8").to_owned()).collect()
}

/// Waits for `condition`; panics with `what` if it does not come true.
#[track_caller]
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not so after {PATIENCE:?}: {what}");
        thread::yield_now();
        thread::park_timeout(Duration::from_millis(10));
    }
}
