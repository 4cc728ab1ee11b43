//! Two lines to a message: producers and consumers of JSON, for programs that want no pools and no settings file.
//!
//! ```
//! # #[cfg(feature = "embedded")]
//! # fn main() -> coney::Result<()> {
//! use coney::ExchangeKind;
//! use coney::bus::Bus;
//!
//! let mut bus = Bus::connect("memory://greetings")?; // or amqp://localhost
//! bus.register_consumer("in2com", ExchangeKind::Direct, ["greetings"], |text: String, received| {
//!     println!("{}: {text}", received.routing_key());
//! })?;
//! let producer = bus.register_producer("in2com", ExchangeKind::Direct)?;
//! producer.publish("greetings", "hello world!")?; // confirmed
//! assert_eq!(bus.process_events(Some(1))?, 1); // runs the callback, here
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "embedded"))]
//! # fn main() {}
//! ```
//!
//! A façade: underneath are an [`App`], its pools, and a [listener](Listener) for each consumer, which
//! keeps a connection and brings it back, with its exchange, queue and bindings, whenever it is lost. Channels are not to
//! be made or shared by hand: every consumer has one of its own, and so has every publish while it lasts.
//!
//! Exchanges are transient (they end with the broker), as in the Python programs this is modelled on, so that both can
//! share them. A producer that finds its exchange gone declares it again; a consumer does so, with its bindings, whenever it
//! comes back, but is not told when somebody deletes the exchange under it. Named queues are durable, and so are the messages.
//!
//! In topic exchanges `*` stands for one word of a routing key, and `#` for none or more.
//!
//! # What was an exception elsewhere
//!
//! | there | here |
//! |---|---|
//! | ExchangeNotFound | [`Error::ChannelClosed`] with code 404, from the publish itself |
//! | BadExchange | [`Error::ChannelClosed`] with code 406, from registering: the exchange is there with another kind |
//! | ConsumerQueueNotFound | [`Error::ChannelClosed`] with code 404; a queue that goes later is declared again |
//! | ConsumeTimeout | [`Bus::process_events`] returns 0 |
//! | NothingToConsume | [`Error::NothingToConsume`], where there is no consumer at all |
//! | BrokerInternalError | [`Error::ConnectionClosed`] with code 541 |
//! | BrokerConnectionError | [`Error::Connect`] when connecting; [`Error::ConnectionLost`] or [`Error::ConnectionClosed`] later |

mod consumer;
mod producer;
mod running;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, TryRecvError, after, bounded, never, select, unbounded};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use self::consumer::ConsumerBuilder;
pub use self::producer::Producer;
pub use self::running::RunningBus;
use crate::app::App;
use crate::connection::Received;
use crate::error::{Error, Result, panic_text};
use crate::listener::{Listener, Unsettled};
use crate::message::Message;
use crate::outcome::Outcome;
use crate::settings::{BrokerSettings, LISTEN_POOL, PUBLISH_POOL, PoolSettings, Settings};
use crate::topology::{Exchange, ExchangeKind};
use crate::trace;
use crate::url::Endpoint;

/// How long one cycle of [`Bus::process_events`] waits for an event.
const CYCLE: Duration = Duration::from_millis(100);
/// How long closing may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);
/// Consumers a bus may have: as many as a pool may have connections.
const MOST_CONSUMERS: u32 = 1000;

/// Which broker [`Bus::connect_to`] connects to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broker {
    /// A RabbitMQ at that host and port, as guest with the password guest.
    Rabbit,
    /// The embedded broker of this process that goes by that host and port. It is started if there is none, and listens
    /// on a port of its own choosing.
    InMemory,
}

type Callback = Box<dyn FnMut(&Received) -> Outcome + Send>;

struct Consumer {
    listener: Listener,
    callback: Callback,
    acknowledged: bool,
}

/// A message for one of the consumers.
struct Event {
    /// Its index.
    consumer: usize,
    unsettled: Unsettled,
}

#[derive(Debug, Default)]
struct Counters {
    handled: AtomicU64,
    undecodable: AtomicU64,
    failed: AtomicU64,
}

/// What a bus has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct BusStats {
    /// Messages whose callback was run.
    pub handled: u64,
    /// Messages that were not the JSON their consumer expects; their callback was not run.
    pub undecodable: u64,
    /// Messages whose callback returned an error or panicked.
    pub failed: u64,
}

/// Producers and consumers on one broker. See the [module](self).
pub struct Bus {
    app: App,
    consumers: Vec<Consumer>,
    events: Sender<Event>,
    incoming: Receiver<Event>,
    stop: Sender<()>,
    stopped: Receiver<()>,
    counters: Arc<Counters>,
    closing: Arc<AtomicBool>,
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let consumers: Vec<&str> = self.consumers.iter().map(|consumer| consumer.listener.name()).collect();
        f.debug_struct("Bus").field("consumers", &consumers).finish_non_exhaustive()
    }
}

/// Makes [`Bus::process_events`] return. Cheap to clone, and may be called from any thread, callbacks included.
#[derive(Debug, Clone)]
pub struct StopHandle {
    stop: Sender<()>,
}

impl StopHandle {
    /// Tells the bus to stop processing: now, or as soon as it begins to. Saying it twice is saying it once.
    pub fn stop(&self) {
        // Full: it has been told already. No receiver: the bus is gone.
        let _ = self.stop.try_send(());
    }
}

impl Bus {
    /// Connects to the broker of a URL, such as `amqp://localhost:5672` or `memory://NAME`.
    ///
    /// # Errors
    ///
    /// [`Error::Settings`] if that is no such URL; [`Error::Connect`] if the broker is not there, at once.
    pub fn connect(url: &str) -> Result<Bus> {
        let settings = Settings::from_url(url)?;
        let broker = settings.pools.get(PUBLISH_POOL).map(|pool| pool.broker.clone()).unwrap_or_default();
        Bus::on(broker)
    }

    /// Connects to a broker by host and port.
    ///
    /// # Errors
    ///
    /// [`Error::Connect`] if the broker is not there, at once.
    pub fn connect_to(host: &str, port: u16, broker: Broker) -> Result<Bus> {
        let endpoint = match broker {
            Broker::Rabbit => Endpoint::new(host, port),
            Broker::InMemory => Endpoint::memory(format!("{host}:{port}")),
        };
        Bus::on(BrokerSettings { endpoints: vec![endpoint], ..BrokerSettings::default() })
    }

    fn on(broker: BrokerSettings) -> Result<Bus> {
        // Where nobody listens, messages go nowhere, which is in the nature of a bus.
        let publish = PoolSettings { mandatory: false, ..PoolSettings::new(broker.clone()) };
        let listen = PoolSettings { size: MOST_CONSUMERS, ..PoolSettings::new(broker) };
        let pools = [(PUBLISH_POOL.to_owned(), publish), (LISTEN_POOL.to_owned(), listen)];
        let app = App::from_settings(Settings { pools: pools.into(), ..Settings::default() })?;
        // Who connects wants to know now.
        drop(app.publish_pool().connection_or_cause()?);
        let (events, incoming) = unbounded();
        let (stop, stopped) = bounded(1);
        Ok(Bus {
            app,
            consumers: Vec::new(),
            events,
            incoming,
            stop,
            stopped,
            counters: Arc::default(),
            closing: Arc::default(),
        })
    }

    /// Declares an exchange and gives what publishes to it.
    ///
    /// # Errors
    ///
    /// [`Error::ChannelClosed`] with code 406 if the exchange is there with another kind; otherwise those of
    /// [`Pool::connection`](crate::Pool::connection).
    pub fn register_producer(&self, exchange: &str, kind: ExchangeKind) -> Result<Producer> {
        Producer::register(self.app.publish_pool().clone(), transient(exchange, kind))
    }

    /// Publishes to an exchange by name, without having registered a producer for it.
    ///
    /// # Errors
    ///
    /// [`Error::ChannelClosed`] with code 404 if there is no such exchange; otherwise those of [`Producer::publish`].
    pub fn publish<T: Serialize + ?Sized>(&self, exchange: &str, routing_key: &str, value: &T) -> Result<()> {
        let message = Message::json(value)?;
        self.app.publish_pool().connection()?.publish(exchange, routing_key, message)
    }

    /// Has `callback` run for each message that an exchange routes by one of these keys, in a queue of this consumer's
    /// own that ends with it. A message counts as dealt with when its callback begins.
    ///
    /// `callback` gets the decoded JSON, as any type that can be deserialized, [`serde_json::Value`] included, and the
    /// message as it was [received](Received): routing key, exchange, headers, whether it is redelivered. It is run by
    /// [`process_events`](Bus::process_events). For a named queue, or for acknowledging, see [`consumer`](Bus::consumer).
    ///
    /// # Errors
    ///
    /// [`Error::ChannelClosed`] with code 406 if the exchange is there with another kind; otherwise those of
    /// [`ListenerBuilder::spawn`](crate::ListenerBuilder::spawn).
    pub fn register_consumer<T, O, F, K>(
        &mut self,
        exchange: &str,
        kind: ExchangeKind,
        routing_keys: K,
        callback: F,
    ) -> Result<()>
    where
        T: DeserializeOwned,
        O: Into<Outcome>,
        F: FnMut(T, &Received) -> O + Send + 'static,
        K: IntoIterator,
        K::Item: Into<String>,
    {
        self.consumer(exchange, kind).routing_keys(routing_keys).register(callback)
    }

    /// A consumer of which more is to be said.
    pub fn consumer(&mut self, exchange: &str, kind: ExchangeKind) -> ConsumerBuilder<'_> {
        ConsumerBuilder::new(self, transient(exchange, kind))
    }

    /// Runs callbacks for what has come in, on this thread, and says for how many messages.
    ///
    /// A cycle waits for an event, at most 100 ms, and runs the callbacks of all that are ready. With `Some(n)` there are
    /// `n` cycles; with `None` there is no end until the [`stop_handle`](Bus::stop_handle) is used, which ends `Some(n)`
    /// early as well. A lost connection is waited for.
    ///
    /// A panic in a callback goes through. Its message, if it is to be acknowledged, goes back to its queue the first time
    /// and is rejected the second.
    ///
    /// # Errors
    ///
    /// [`Error::NothingToConsume`] if there is no consumer.
    pub fn process_events(&mut self, cycles: Option<u32>) -> Result<usize> {
        self.process(cycles, Bus::handle)
    }

    /// `handle` says whether it has run the callback.
    fn process(&mut self, cycles: Option<u32>, handle: fn(&mut Bus, Event) -> bool) -> Result<usize> {
        if self.consumers.is_empty() {
            return Err(Error::NothingToConsume);
        }
        let mut processed = 0;
        let mut left = cycles;
        while left != Some(0) {
            left = left.map(|cycles| cycles - 1);
            let nothing_came = if cycles.is_some() { after(CYCLE) } else { never() };
            let first = select! {
                recv(self.stopped) -> _ => return Ok(processed),
                recv(self.incoming) -> event => event.ok(),
                recv(nothing_came) -> _ => None,
            };
            // As many as there are now: what callbacks bring about is for the next cycle.
            let ready = self.incoming.len();
            for event in first.into_iter().chain(self.incoming.clone().try_iter().take(ready)) {
                processed += usize::from(handle(self, event));
                if self.stopped.try_recv() != Err(TryRecvError::Empty) {
                    return Ok(processed);
                }
            }
        }
        Ok(processed)
    }

    fn handle(&mut self, Event { consumer, unsettled }: Event) -> bool {
        // Its session is over and the broker has it back: it comes again.
        if unsettled.is_stale() {
            return false;
        }
        let _trace = trace::handling(unsettled.message());
        let consumer = &mut self.consumers[consumer];
        let outcome = if consumer.acknowledged {
            let outcome = (consumer.callback)(&unsettled);
            let settled = match &outcome {
                Outcome::Ack => unsettled.ack().map(drop),
                Outcome::Reject | Outcome::Undecodable(_) => unsettled.reject(),
                Outcome::Requeue => unsettled.requeue(),
                Outcome::Retry | Outcome::Failed(_) if unsettled.redelivered() => unsettled.reject(),
                Outcome::Retry | Outcome::Failed(_) => unsettled.requeue(),
            };
            if let Err(error) = settled {
                log::warn!("bus, queue {:?}: {error}; the message will come again", consumer.listener.name());
            }
            outcome
        } else {
            match unsettled.ack() {
                Ok(received) => (consumer.callback)(&received),
                Err(_) => return false,
            }
        };
        let (counter, problem) = match outcome {
            Outcome::Undecodable(problem) => (&self.counters.undecodable, Some(problem)),
            Outcome::Failed(problem) => (&self.counters.failed, Some(problem)),
            _ => (&self.counters.handled, None),
        };
        counter.fetch_add(1, Ordering::Relaxed);
        if let Some(problem) = problem {
            log::error!("bus, queue {:?}: {problem}", consumer.listener.name());
        }
        true
    }

    /// Like `handle`, for a thread of ours.
    fn handle_and_catch(&mut self, event: Event) -> bool {
        catch_unwind(AssertUnwindSafe(|| self.handle(event))).unwrap_or_else(|panic| {
            self.counters.failed.fetch_add(1, Ordering::Relaxed);
            log::error!("bus: a callback panicked: {}", panic_text(&*panic));
            // What was thrown may throw again when it is dropped.
            let _ = catch_unwind(AssertUnwindSafe(|| drop(panic)));
            true
        })
    }

    /// What the bus has done so far.
    pub fn stats(&self) -> BusStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BusStats {
            handled: read(&self.counters.handled),
            undecodable: read(&self.counters.undecodable),
            failed: read(&self.counters.failed),
        }
    }

    /// A handle that makes [`process_events`](Bus::process_events) return.
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle { stop: self.stop.clone() }
    }

    /// Processes events on a thread of its own from now on. A panic in a callback is caught and logged there.
    ///
    /// # Errors
    ///
    /// [`Error::NothingToConsume`] if there is no consumer; [`Error::Thread`] if there can be no thread.
    pub fn spawn(self) -> Result<RunningBus> {
        if self.consumers.is_empty() {
            return Err(Error::NothingToConsume);
        }
        RunningBus::start(self)
    }

    /// Ends the consumers and closes all connections. What has come in and was not processed goes back to its queue.
    /// Dropping the bus does the same.
    ///
    /// # Errors
    ///
    /// [`Error::NotEnded`] with what has not ended after 10 s.
    pub fn close(self) -> Result<()> {
        self.end()
    }

    fn end(&self) -> Result<()> {
        // From here on listeners put back what comes. What slips in behind this goes back with the end of its channel.
        self.closing.store(true, Ordering::SeqCst);
        for event in self.incoming.try_iter() {
            // If its session has ended, the broker has it back.
            let _ = event.unsettled.requeue();
        }
        self.app.shutdown(CLOSE_TIMEOUT)
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            log::error!("{error}");
        }
    }
}

fn transient(exchange: &str, kind: ExchangeKind) -> Exchange {
    Exchange::new(exchange, kind).durable(false)
}
