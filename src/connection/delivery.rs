//! Messages that come from the broker, one at a time, and how they are settled.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};

use super::Connection;
use super::callback::Callback;
use crate::amqp::value::Table;
use crate::deadline;
use crate::error::{Error, Result, counted};
use crate::field::check_queue_name;
use crate::message::Message;
use crate::session::{Arrived, Channel, Consume, During, Inbox, Incoming, Session, Settlement};

/// A message as it came from the broker, with the way it took.
#[derive(Debug, Clone, PartialEq)]
pub struct Received {
    message: Message,
    exchange: Arc<str>,
    routing_key: Arc<str>,
    redelivered: bool,
    remaining: Option<u32>,
}

impl Received {
    /// The message.
    pub fn message(&self) -> &Message {
        &self.message
    }

    /// The message, by value.
    pub fn into_message(self) -> Message {
        self.message
    }

    /// The body; short for `message().body()`.
    pub fn body(&self) -> &[u8] {
        self.message.body()
    }

    /// The `traceparent` it carries; short for `message().traceparent()`.
    pub fn traceparent(&self) -> Option<&str> {
        self.message.traceparent()
    }

    /// The exchange it was published to; empty for the default exchange.
    pub fn exchange(&self) -> &str {
        &self.exchange
    }

    /// The routing key it was published with.
    pub fn routing_key(&self) -> &str {
        &self.routing_key
    }

    /// Whether it has been delivered before, to anyone, and was not acked.
    pub fn redelivered(&self) -> bool {
        self.redelivered
    }

    /// Which place it has in the stream it came from (`x-stream-offset`); `None` if it came from no stream.
    pub fn stream_offset(&self) -> Option<u64> {
        self.message().header_i64("x-stream-offset").and_then(|offset| u64::try_from(offset).ok())
    }

    /// How many messages were left in the queue, where the broker said so.
    pub fn remaining(&self) -> Option<u32> {
        self.remaining
    }

    /// The same as if it had come by another way.
    pub(crate) fn by_way_of(mut self, exchange: &str, routing_key: &str) -> Received {
        self.exchange = exchange.into();
        self.routing_key = routing_key.into();
        self
    }

    /// What is left where a message has been taken out.
    pub(crate) fn nothing() -> Received {
        let (exchange, routing_key) = (Arc::default(), Arc::default());
        Received { message: Message::new(Vec::new()), exchange, routing_key, redelivered: false, remaining: None }
    }

    #[cfg(feature = "unstable-amiquip")]
    pub(super) fn new(message: Message, exchange: &str, routing_key: &str, redelivered: bool) -> Received {
        let (exchange, routing_key) = (exchange.into(), routing_key.into());
        Received { message, exchange, routing_key, redelivered, remaining: None }
    }

    #[cfg(feature = "unstable-amiquip")]
    pub(super) fn with_remaining(self, remaining: u32) -> Received {
        Received { remaining: Some(remaining), ..self }
    }
}

/// The message; its tag is another matter.
impl From<Arrived> for Received {
    fn from(arrived: Arrived) -> Received {
        let Arrived { redelivered, exchange, routing_key, remaining, message, .. } = arrived;
        Received { message, exchange, routing_key, redelivered, remaining }
    }
}

/// A message that is the receiver's to settle: [`ack`](Delivery::ack), [`reject`](Delivery::reject) or
/// [`requeue`](Delivery::requeue).
///
/// One that is dropped unsettled goes back into its queue the first time, and is rejected, which means dead-lettered
/// where the queue says where to, if it had been redelivered already: so a message that nobody can handle does not go
/// round for ever.
///
/// Settling has no answer from the broker. A message whose ack does not get through is delivered again.
///
/// ```compile_fail
/// # fn f(pool: &coney::Pool) -> coney::Result<()> {
/// let delivery = pool.connection()?.get("queue")?.unwrap();
/// delivery.ack()?; // does not build: its connection has been given back
/// # Ok(())
/// # }
/// ```
pub struct Delivery<'c> {
    received: Received,
    /// `None` once settled, and where somebody else settles it.
    claim: Option<Claim<'c>>,
}

/// The right to settle a delivery.
struct Claim<'c> {
    connection: &'c Connection,
    /// Which of the channels that the connection has had it came on: on another one, its tag is another message's.
    generation: u64,
    /// The delivery tag.
    tag: u64,
}

impl fmt::Debug for Delivery<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery").field("received", &self.received).finish_non_exhaustive()
    }
}

impl Deref for Delivery<'_> {
    type Target = Received;

    fn deref(&self) -> &Received {
        &self.received
    }
}

impl<'c> Delivery<'c> {
    fn new(connection: &'c Connection, arrived: Arrived) -> Delivery<'c> {
        let tag = arrived.tag;
        let received = Received::from(arrived);
        connection.state().unsettled.set(connection.state().unsettled.get() + 1);
        let generation = connection.state().gets_generation.get();
        Delivery { received, claim: Some(Claim { connection, generation, tag }) }
    }

    /// A delivery that is settled by whoever shows it.
    pub(crate) fn shown(received: Received) -> Delivery<'c> {
        Delivery { received, claim: None }
    }

    /// What was received, of a delivery that somebody else settles.
    pub(crate) fn into_received(mut self) -> Received {
        std::mem::replace(&mut self.received, Received::nothing())
    }

    /// Tells the broker that the message has been dealt with; returns it.
    ///
    /// # Errors
    ///
    /// [`Error::StaleDelivery`] if the channel it came on is gone; the broker has requeued the message.
    pub fn ack(mut self) -> Result<Received> {
        self.settle("ack", Settlement::Ack)?;
        Ok(std::mem::replace(&mut self.received, Received::nothing()))
    }

    /// Gives the message up: dead-lettered where the queue says where to, dropped otherwise.
    ///
    /// # Errors
    ///
    /// [`Error::StaleDelivery`] if the channel it came on is gone; the broker has requeued the message.
    pub fn reject(mut self) -> Result<()> {
        self.settle("reject", Settlement::Reject)
    }

    /// Puts the message back into its queue, to its old place if possible.
    ///
    /// # Errors
    ///
    /// [`Error::StaleDelivery`] if the channel it came on is gone; the broker has requeued the message by itself.
    pub fn requeue(mut self) -> Result<()> {
        self.settle("requeue", Settlement::Requeue)
    }

    fn settle(&mut self, how: &str, settlement: Settlement) -> Result<()> {
        let Some(Claim { connection, generation, tag }) = self.claim.take() else { return Ok(()) };
        if generation != connection.state().gets_generation.get() {
            return Err(Error::StaleDelivery);
        }
        connection.state().unsettled.set(connection.state().unsettled.get().saturating_sub(1));
        let during = || format!("{how} of a message with routing key {:?}", self.received.routing_key);
        connection.settle(&during, tag, settlement)
    }
}

impl Drop for Delivery<'_> {
    fn drop(&mut self) {
        let settlement = if self.received.redelivered { Settlement::Reject } else { Settlement::Requeue };
        // Whatever hinders this also makes the broker requeue the message.
        let _ = self.settle("return", settlement);
    }
}

/// Getting messages one by one.
///
/// For a steady stream a consumer is cheaper than getting (<https://www.rabbitmq.com/docs/consumers#polling>).
impl Connection {
    /// Takes one message from a queue, if there is one; the broker keeps it until it is settled.
    ///
    /// # Errors
    ///
    /// [`Error::ChannelClosed`]: 404 for a queue that does not exist, 403 where reading is not allowed, 405 for another
    /// connection's exclusive queue. [`Error::Timeout`] after `operation_timeout`, and the connection is given up.
    pub fn get(&self, queue: &str) -> Result<Option<Delivery<'_>>> {
        check_queue_name(queue)?;
        let limit = self.settings.broker.operation_timeout;
        let during = || format!("get from queue {queue:?}");
        let got = self.on_gets(&during, |gets| gets.channel.get(&gets.inbox, queue, limit, &during))?;
        Ok(got.map(|arrived| Delivery::new(self, arrived)))
    }

    /// Takes one message from a queue, if there is one, and acks it.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Connection::get).
    pub fn get_and_ack(&self, queue: &str) -> Result<Option<Received>> {
        self.get(queue)?.map(Delivery::ack).transpose()
    }

    /// Takes one message from a queue, and waits up to `timeout` for one to arrive.
    ///
    /// Waits as a consumer with a prefetch of one, so it is told the moment there is a message.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Connection::get), and [`Error::ConsumerCancelled`] if the queue is deleted meanwhile. No
    /// message within `timeout` is no error but `None`.
    pub fn get_timeout(&self, queue: &str, timeout: Duration) -> Result<Option<Delivery<'_>>> {
        let deadline = deadline::after(timeout);
        if let Some(delivery) = self.get(queue)? {
            return Ok(Some(delivery));
        }
        if timeout.is_zero() {
            return Ok(None);
        }
        let during = || format!("wait for a message in queue {queue:?}");
        let limit = self.settings.broker.operation_timeout;
        let consumed = self.on_gets(&during, |gets| gets.consume_one(queue, deadline, limit, &during))?;
        match consumed {
            Consumed::Message(arrived) => Ok(Some(Delivery::new(self, arrived))),
            Consumed::Nothing => Ok(None),
            Consumed::Cancelled => Err(Error::ConsumerCancelled { queue: queue.to_owned() }),
        }
    }

    /// Takes one message from a queue and acks it, on another thread, which runs `callback` with the message, with
    /// `None` if there is none, or with the error that [`get_and_ack`](Connection::get_and_ack) would return.
    ///
    /// The callback is run exactly once, whatever happens. Requests are carried out one after another, in order; with
    /// the pool's `max_in_flight` callbacks outstanding the call waits until there is room.
    /// Giving the connection back to the pool waits for the callbacks; so does [`flush`](Connection::flush).
    pub fn get_and_ack_async<F>(&self, queue: &str, callback: F)
    where
        F: FnOnce(Result<Option<Received>>) + Send + 'static,
    {
        if let Err(forked) = self.session.check_process() {
            return callback(Err(forked));
        }
        let callback = Callback::new("get_and_ack_async", &self.outstanding, callback);
        let limit = self.settings.broker.operation_timeout;
        let room = self.outstanding.wait_for(Instant::now() + limit, self.settings.max_in_flight);
        let mut fetcher = self.state().fetcher.borrow_mut();
        let fetcher = match &mut *fetcher {
            Some(fetcher) => fetcher,
            empty => match Fetcher::start(Arc::clone(&self.session), limit) {
                Ok(started) => empty.insert(started),
                Err(no_thread) => {
                    log::error!("get_and_ack_async: {no_thread}; the callback is run on the calling thread");
                    return callback.run(Err(no_thread));
                }
            },
        };
        match room {
            Ok(()) => fetcher.send(Fetch::Get(queue.to_owned(), callback)),
            Err(count) => {
                let during = format!("wait with {} outstanding", counted(count, "callback"));
                fetcher.send(Fetch::Fail(callback, Error::Timeout { during, after: limit }));
            }
        }
    }

    /// Runs one step on the channel for deliveries, which is opened if there is none. If the step fails the channel goes, and
    /// with it the claim on everything that was delivered on it.
    fn on_gets<T>(&self, during: During<'_>, step: impl FnOnce(&Gets) -> Result<T>) -> Result<T> {
        self.session.check_process()?;
        let limit = self.settings.broker.operation_timeout;
        let mut slot = self.state().gets.borrow_mut();
        let gets = match &mut *slot {
            Some(gets) => gets,
            empty => empty.insert(Gets::open(&self.session, limit, during)?),
        };
        let result = step(gets);
        if result.is_err()
            && let Some(gets) = slot.take()
        {
            gets.channel.close(limit);
        }
        drop(slot);
        self.forget_claims_if_gone();
        result
    }

    fn settle(&self, during: During<'_>, tag: u64, settlement: Settlement) -> Result<()> {
        self.on_gets(during, |gets| gets.channel.settle(tag, settlement, true, during))
    }

    fn forget_claims_if_gone(&self) {
        if self.state().gets.borrow().is_none() {
            self.state().gets_generation.set(self.state().gets_generation.get() + 1);
            self.state().unsettled.set(0);
        }
    }
}

/// The channel for deliveries that are settled one by one.
pub(super) struct Gets {
    pub(super) channel: Channel,
    inbox: Arc<Inbox>,
}

enum Consumed {
    Message(Arrived),
    Nothing,
    Cancelled,
}

impl Gets {
    fn open(session: &Arc<Session>, limit: Duration, during: During<'_>) -> Result<Gets> {
        let inbox = Arc::<Inbox>::default();
        let sink = Arc::clone(&inbox);
        Ok(Gets { channel: session.open_channel(limit, during, Some(sink))?, inbox })
    }

    /// Waits for one message as a consumer.
    fn consume_one(&self, queue: &str, deadline: Instant, limit: Duration, during: During<'_>) -> Result<Consumed> {
        let Gets { channel, inbox } = self;
        // Before the consumer, so that the broker sends it one message and no more.
        channel.qos(inbox, 1, limit, during)?;
        let consume = Consume { queue, exclusive: false, no_ack: false, arguments: Table::default() };
        channel.consume(inbox, consume, limit, during)?;
        let mut events = VecDeque::new();
        channel.listen(inbox, None, &[], deadline, &mut events, || None::<()>);
        let is_cancelled = events.iter().any(|event| matches!(event, Incoming::Cancelled));
        if !is_cancelled {
            if inbox.has_ended() {
                return Err(channel.ending(&during()));
            }
            // A message that crosses the cancel on its way is ours all the same.
            channel.cancel(inbox, limit, during)?;
            inbox.take_all(&mut events);
        }
        let message = events.into_iter().find_map(|event| match event {
            Incoming::Delivered(arrived) => Some(arrived),
            _ => None,
        });
        Ok(match message {
            Some(arrived) => Consumed::Message(arrived),
            None if is_cancelled => Consumed::Cancelled,
            None => Consumed::Nothing,
        })
    }
}

enum Fetch {
    Get(String, Callback<Option<Received>>),
    /// Only the callback is to be run.
    Fail(Callback<Option<Received>>, Error),
}

/// The thread behind [`Connection::get_and_ack_async`], with a channel of its own.
pub(crate) struct Fetcher {
    jobs: Sender<Fetch>,
    /// Nothing is sent; its end is the sign that the thread is done.
    done: Receiver<()>,
    thread: JoinHandle<()>,
}

impl fmt::Debug for Fetcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fetcher").field("thread", &self.thread).finish_non_exhaustive()
    }
}

impl Fetcher {
    fn start(session: Arc<Session>, limit: Duration) -> Result<Fetcher> {
        let name = "coney-gets".to_owned();
        let (jobs, work) = unbounded();
        let (alive, done) = bounded(0);
        let thread = Builder::new()
            .name(name.clone())
            .spawn(move || {
                let _alive: Sender<()> = alive;
                fetch_all(&work, &session, limit);
            })
            .map_err(|source| Error::Thread { name, source: Arc::new(source) })?;
        Ok(Fetcher { jobs, done, thread })
    }

    fn send(&self, fetch: Fetch) {
        // The thread lives as long as this sender. Were it gone, the callback inside would run on being dropped.
        let _ = self.jobs.send(fetch);
    }

    /// Ends the thread once its requests are done, waiting until `deadline`. Returns whether it has ended.
    pub(crate) fn stop(self, deadline: Instant, is_own: bool) -> bool {
        let Fetcher { jobs, done, thread } = self;
        drop(jobs);
        if is_own {
            // It ends when the callback that it runs has returned.
            return true;
        }
        if let Err(RecvTimeoutError::Timeout) = done.recv_deadline(deadline) {
            log::error!("get_and_ack_async: a callback or the broker keeps the thread, which is left to it");
            return false;
        }
        // Callbacks are run with their panics caught, so there is nothing to learn from the result.
        let _ = thread.join();
        true
    }
}

fn fetch_all(work: &Receiver<Fetch>, session: &Arc<Session>, limit: Duration) {
    let mut gets = None;
    for fetch in work {
        match fetch {
            Fetch::Get(queue, callback) => callback.run(fetch_one(&mut gets, &queue, session, limit)),
            Fetch::Fail(callback, error) => callback.run(Err(error)),
        }
    }
    // Closing the channel makes sure that its acks have left.
    if let Some(Gets { channel, .. }) = gets {
        channel.close(limit);
    }
}

fn fetch_one(
    slot: &mut Option<Gets>,
    queue: &str,
    session: &Arc<Session>,
    limit: Duration,
) -> Result<Option<Received>> {
    check_queue_name(queue)?;
    let during = || format!("get from queue {queue:?}");
    let Gets { channel, inbox } = match &mut *slot {
        Some(gets) => gets,
        empty => empty.insert(Gets::open(session, limit, &during)?),
    };
    let got = channel.get(inbox, queue, limit, &during).and_then(|got| {
        let Some(arrived) = got else { return Ok(None) };
        channel.settle(arrived.tag, Settlement::Ack, true, &during)?;
        Ok(Some(Received::from(arrived)))
    });
    if got.is_err()
        && let Some(gets) = slot.take()
    {
        gets.channel.close(limit);
    }
    got
}
