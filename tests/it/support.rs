//! Nodes to share, apps to talk to them, and waiting for conditions.

// Each test binary uses some of it.
#![allow(dead_code)]

use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use coney::embedded::{EmbeddedBroker, Release};
use coney::testing::RabbitMq;
use coney::worker::ConnectionParameters;
use coney::{App, Connection, Queue, Received, Settings};

/// How long a condition may take to come true on a machine that is busy with other things.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// An example program, which `cargo test` builds unless it is told otherwise.
pub fn example(name: &str) -> std::process::Command {
    // target/PROFILE/deps/this-test → target/PROFILE/examples/NAME
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    path.extend(["examples", name]);
    assert!(path.exists(), "{} is not built; run cargo build --all-features --examples", path.display());
    let mut command = std::process::Command::new(path);
    command.env_remove("CONEY_PROFILE").env("RUST_LOG", "off");
    command
}

/// The brokers that the contract holds for. Tests use queues of their own and leave the broker as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broker {
    /// A node that all tests share.
    RabbitMq,
    /// One in this process that all tests share.
    Embedded,
    /// The same, which is RabbitMQ 3.10 to its clients.
    Embedded3,
}

/// A consumer, as either broker tells of it.
#[derive(Debug)]
pub struct Consumer {
    pub queue: String,
    pub prefetch: usize,
    pub ack_required: bool,
}

pub fn node() -> &'static RabbitMq {
    static NODE: LazyLock<RabbitMq> = LazyLock::new(|| RabbitMq::start().expect("a RabbitMQ node"));
    &NODE
}

fn embedded(release: Release) -> EmbeddedBroker {
    let builder = EmbeddedBroker::builder().user("reader", "reader-pw").permissions("reader", "/", "", "", ".*");
    builder.quorum_queues(true).release(release).start().expect("an embedded broker")
}

impl Broker {
    /// The one in this process.
    fn embedded(self) -> &'static EmbeddedBroker {
        static EMBEDDED: LazyLock<EmbeddedBroker> = LazyLock::new(|| embedded(Release::V4_0));
        static EMBEDDED_3: LazyLock<EmbeddedBroker> = LazyLock::new(|| embedded(Release::V3_10));
        if self == Broker::Embedded3 { &EMBEDDED_3 } else { &EMBEDDED }
    }

    pub fn is_embedded(self) -> bool {
        self != Broker::RabbitMq
    }

    /// Whether it is RabbitMQ 4, or to its clients what RabbitMQ 4 is; else it is 3.10. Tests ask this where the two answer
    /// differently, and say what each of them answers.
    pub fn is_4(self) -> bool {
        match self {
            Broker::RabbitMq => node().version().major >= 4,
            Broker::Embedded => true,
            Broker::Embedded3 => false,
        }
    }

    fn release(self) -> Release {
        if self.is_4() { Release::V4_0 } else { Release::V3_10 }
    }

    pub fn url(self) -> String {
        match self {
            Broker::RabbitMq => node().url(),
            Broker::Embedded | Broker::Embedded3 => self.embedded().url(),
        }
    }

    pub fn addr(self) -> SocketAddr {
        match self {
            Broker::RabbitMq => ([127, 0, 0, 1], node().port()).into(),
            Broker::Embedded | Broker::Embedded3 => self.embedded().addr(),
        }
    }

    /// The URL for another user or virtual host, given as a URL has them.
    pub fn url_with(self, user_and_password: &str, vhost: &str) -> String {
        format!("amqp://{user_and_password}@{}/{vhost}", self.addr())
    }

    pub fn parameters(self) -> ConnectionParameters {
        let port = self.addr().port();
        ConnectionParameters { host: "127.0.0.1".to_owned(), port, ..ConnectionParameters::default() }
    }

    /// The URL for a user who may read everything, and nothing else.
    pub fn reader_url(self) -> String {
        static READER: LazyLock<()> = LazyLock::new(|| {
            node().add_user("reader", "reader-pw").expect("a user");
            node().set_permissions("/", "reader", "", "", ".*").expect("permissions");
        });
        if self == Broker::RabbitMq {
            LazyLock::force(&READER);
        }
        self.url_with("reader:reader-pw", "%2f")
    }

    /// An app on this broker. See [`settings`] for `extra`.
    pub fn app(self, extra: &str) -> App {
        app(&self.url(), extra)
    }

    /// Messages ready in a queue.
    pub fn queue_len(self, queue: &str) -> u64 {
        match self {
            Broker::RabbitMq => node().queue_len(queue).expect("the queue"),
            Broker::Embedded | Broker::Embedded3 => self.embedded().control().queue_len(queue) as u64,
        }
    }

    /// Messages of a queue that are delivered and not settled.
    pub fn queue_unacked(self, queue: &str) -> u64 {
        match self {
            Broker::RabbitMq => node().queue_unacked(queue).expect("the queue"),
            Broker::Embedded | Broker::Embedded3 => self.embedded().control().queue_unacked(queue) as u64,
        }
    }

    pub fn consumers_of(self, queue: &str) -> Vec<Consumer> {
        let mut consumers: Vec<Consumer> = match self {
            Broker::RabbitMq => {
                let all = node().consumers().expect("the consumers").into_iter();
                all.map(|one| Consumer {
                    queue: one.queue,
                    prefetch: one.prefetch.into(),
                    ack_required: one.ack_required,
                })
                .collect()
            }
            Broker::Embedded | Broker::Embedded3 => {
                let all = self.embedded().control().consumers().into_iter();
                all.map(|one| Consumer { queue: one.queue, prefetch: one.prefetch, ack_required: !one.no_ack })
                    .collect()
            }
        };
        consumers.retain(|consumer| consumer.queue == queue);
        consumers
    }

    /// Whether every message published so far has been confirmed.
    pub fn all_confirmed(self) -> bool {
        match self {
            Broker::RabbitMq => node().channels().expect("the channels").iter().all(|channel| channel.unconfirmed == 0),
            // It confirms in the order of what it does: a later mistake cannot overtake.
            Broker::Embedded | Broker::Embedded3 => true,
        }
    }

    /// What connections call themselves.
    pub fn connection_names(self) -> Vec<String> {
        match self {
            Broker::RabbitMq => {
                let all = node().connections().expect("the connections").into_iter();
                all.filter_map(|connection| connection.connection_name).collect()
            }
            Broker::Embedded | Broker::Embedded3 => {
                self.embedded().control().connections().into_iter().map(|connection| connection.name).collect()
            }
        }
    }
}

/// A broker that a test may hurt, alone with it.
pub enum Hurt {
    RabbitMq(Box<dyn Deref<Target = RabbitMq>>),
    Embedded(EmbeddedBroker),
}

impl Broker {
    pub fn hurt(self) -> Hurt {
        match self {
            Broker::RabbitMq => Hurt::RabbitMq(Box::new(hurt_node())),
            Broker::Embedded | Broker::Embedded3 => {
                let builder = EmbeddedBroker::builder().quorum_queues(true).release(self.release());
                Hurt::Embedded(builder.start().expect("an embedded broker"))
            }
        }
    }
}

impl Broker {
    /// A broker of its own that closes the channel of a consumer that has not acked for so long.
    pub fn with_ack_timeout(self, timeout: Duration) -> Hurt {
        match self {
            Broker::RabbitMq => {
                let builder = RabbitMq::builder().conf(format!("consumer_timeout = {}", timeout.as_millis()));
                let node = builder.advanced("rabbit", "channel_tick_interval", 500).start();
                Hurt::RabbitMq(Box::new(Box::new(node.expect("a RabbitMQ node"))))
            }
            Broker::Embedded | Broker::Embedded3 => {
                let builder = EmbeddedBroker::builder().release(self.release()).consumer_timeout(timeout);
                Hurt::Embedded(builder.start().expect("an embedded broker"))
            }
        }
    }
}

impl Broker {
    /// A broker with frames of 1 MiB, no heartbeats, and three channels for each connection. All tests share it.
    pub fn tuned(self) -> Tuned {
        static NODE: LazyLock<RabbitMq> = LazyLock::new(|| {
            let builder = RabbitMq::builder().conf("frame_max = 1048576").conf("heartbeat = 0").conf("channel_max = 3");
            builder.start().expect("a RabbitMQ node")
        });
        static EMBEDDED: LazyLock<EmbeddedBroker> = LazyLock::new(|| {
            let builder = EmbeddedBroker::builder().frame_max(1 << 20).heartbeat(Duration::ZERO).channel_max(3);
            builder.start().expect("an embedded broker")
        });
        match self {
            Broker::RabbitMq => Tuned::RabbitMq(&NODE),
            Broker::Embedded | Broker::Embedded3 => Tuned::Embedded(&EMBEDDED),
        }
    }
}

impl Broker {
    /// A broker with exchanges of the type `x-consistent-hash`, which takes a plugin of RabbitMQ. All tests share it.
    pub fn hashing(self) -> Tuned {
        static NODE: LazyLock<RabbitMq> = LazyLock::new(|| {
            let builder = RabbitMq::builder().plugin("rabbitmq_consistent_hash_exchange");
            builder.start().expect("a RabbitMQ node")
        });
        match self {
            Broker::RabbitMq => Tuned::RabbitMq(&NODE),
            Broker::Embedded | Broker::Embedded3 => Tuned::Embedded(self.embedded()),
        }
    }
}

/// See [`Broker::tuned`] and [`Broker::hashing`].
pub enum Tuned {
    RabbitMq(&'static RabbitMq),
    Embedded(&'static EmbeddedBroker),
}

impl Tuned {
    pub fn addr(&self) -> SocketAddr {
        match self {
            Tuned::RabbitMq(node) => ([127, 0, 0, 1], node.port()).into(),
            Tuned::Embedded(broker) => broker.addr(),
        }
    }

    pub fn app(&self, extra: &str) -> App {
        match self {
            Tuned::RabbitMq(node) => app(&node.url(), extra),
            Tuned::Embedded(broker) => app(&broker.url(), extra),
        }
    }

    pub fn queue_len(&self, queue: &str) -> u64 {
        match self {
            Tuned::RabbitMq(node) => node.queue_len(queue).expect("the queue"),
            Tuned::Embedded(broker) => broker.control().queue_len(queue) as u64,
        }
    }
}

impl Hurt {
    pub fn addr(&self) -> SocketAddr {
        match self {
            Hurt::RabbitMq(node) => ([127, 0, 0, 1], node.port()).into(),
            Hurt::Embedded(broker) => broker.addr(),
        }
    }

    pub fn url(&self) -> String {
        match self {
            Hurt::RabbitMq(node) => node.url(),
            Hurt::Embedded(broker) => broker.url(),
        }
    }

    pub fn app(&self, extra: &str) -> App {
        app(&self.url(), extra)
    }

    pub fn queue_len(&self, queue: &str) -> u64 {
        match self {
            Hurt::RabbitMq(node) => node.queue_len(queue).expect("the queue"),
            Hurt::Embedded(broker) => broker.control().queue_len(queue) as u64,
        }
    }

    pub fn queue_unacked(&self, queue: &str) -> u64 {
        match self {
            Hurt::RabbitMq(node) => node.queue_unacked(queue).expect("the queue"),
            Hurt::Embedded(broker) => broker.control().queue_unacked(queue) as u64,
        }
    }

    /// The queue of each consumer. None if the broker is not in a state to tell.
    pub fn consumers(&self) -> Vec<String> {
        match self {
            Hurt::RabbitMq(node) => {
                node.consumers().map_or(Vec::new(), |all| all.into_iter().map(|consumer| consumer.queue).collect())
            }
            Hurt::Embedded(broker) => broker.control().consumers().into_iter().map(|consumer| consumer.queue).collect(),
        }
    }

    pub fn connections(&self) -> usize {
        match self {
            Hurt::RabbitMq(node) => node.connections().expect("the connections").len(),
            Hurt::Embedded(broker) => broker.control().connections().len(),
        }
    }

    /// Closes every connection, as an operator does.
    pub fn close_all_connections(&self, reason: &str) {
        match self {
            Hurt::RabbitMq(node) => drop(node.close_all_connections(reason).expect("to close connections")),
            Hurt::Embedded(broker) => {
                broker.control().close_connections(320, &format!("CONNECTION_FORCED - {reason}"));
            }
        }
    }

    /// An orderly shutdown. What is durable is there again after [`Hurt::start_app`].
    pub fn stop_app(&self) {
        match self {
            Hurt::RabbitMq(node) => node.stop_app().expect("to stop"),
            Hurt::Embedded(broker) => {
                let control = broker.control();
                control.refuse_connections(true);
                control.close_connections(
                    320,
                    "CONNECTION_FORCED - broker forced connection closure with reason 'shutdown'",
                );
                control.restart();
            }
        }
    }

    pub fn start_app(&self) {
        match self {
            Hurt::RabbitMq(node) => node.start_app().expect("to start"),
            Hurt::Embedded(broker) => broker.control().refuse_connections(false),
        }
    }

    /// The end without a word. What is durable is there again after [`Hurt::start_again`].
    pub fn kill(&self) {
        match self {
            Hurt::RabbitMq(node) => node.kill().expect("to kill"),
            Hurt::Embedded(broker) => {
                let control = broker.control();
                control.refuse_connections(true);
                control.drop_connections();
                control.restart();
            }
        }
    }

    pub fn start_again(&self) {
        match self {
            Hurt::RabbitMq(node) => node.start_again().expect("to start"),
            Hurt::Embedded(broker) => broker.control().refuse_connections(false),
        }
    }

    pub fn block_publishers(&self) {
        match self {
            Hurt::RabbitMq(node) => node.block_publishers().expect("to block"),
            Hurt::Embedded(broker) => broker.control().block_publishers("low on memory"),
        }
    }

    /// Whether a publisher has come up against the block.
    pub fn has_blocked_a_publisher(&self) -> bool {
        match self {
            Hurt::RabbitMq(node) => {
                node.connections().expect("the connections").iter().any(|connection| connection.state == "blocked")
            }
            // It tells every client at once.
            Hurt::Embedded(_) => true,
        }
    }

    pub fn unblock_publishers(&self) {
        match self {
            Hurt::RabbitMq(node) => node.unblock_publishers().expect("to unblock"),
            Hurt::Embedded(broker) => broker.control().unblock_publishers(),
        }
    }
}

/// Has each of the functions named run twice: as a test of the embedded broker, and as one of RabbitMQ. Those in
/// brackets are about what releases differ in, and run on the embedded broker as RabbitMQ 3.10 as well.
#[macro_export]
macro_rules! contract {
    ($($name:ident,)* [by release: $($differs:ident),+ $(,)?]) => {
        $crate::contract! { $($name,)* $($differs,)+ }

        mod embedded_3_10 {
            $(#[test]
            fn $differs() {
                super::$differs($crate::support::Broker::Embedded3);
            })+
        }
    };
    ($($name:ident),* $(,)?) => {
        mod embedded {
            $(#[test]
            fn $name() {
                super::$name($crate::support::Broker::Embedded);
            })*
        }

        mod rabbitmq {
            $(#[test]
            #[ignore = "needs RabbitMQ: scripts/test"]
            fn $name() {
                super::$name($crate::support::Broker::RabbitMq);
            })*
        }
    };
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
