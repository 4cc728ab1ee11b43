//! Publishing: one message, many in a pipeline, or a batch; each with the broker's word on what became of it.

use std::cell::RefMut;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use amiquip::{Confirm, Publish};
use crossbeam_channel::Receiver;

use crate::callback::Callback;
use crate::confirms::{Call, Ledger, Route, Waiting};
use crate::connection::Connection;
use crate::dispatch::{Dispatcher, Feed, SharedLedger, publish_to, run};
use crate::error::{BatchError, Error, Result};
use crate::field::check_short_string;
use crate::likeness::Likeness;
use crate::link::OpenChannel;
use crate::message::Message;

/// The time a write has when waiting for room has used up all but a moment of the message's deadline.
const WRITE_GRACE: Duration = Duration::from_millis(200);

/// How soon answers are looked at again where no deadline says when.
const LOOK: Duration = Duration::from_secs(1);

/// How long a channel that ends in a refusal is used at least.
const REFUSED_AGE: Duration = Duration::from_secs(1);

/// A channel in confirm mode.
pub(crate) struct Publisher {
    open: OpenChannel,
    since: Instant,
    feed: Feed,
    /// The dispatcher reads the feed, so the publishing thread must not.
    dispatched: bool,
    /// Of the last message; the next one is often bound for the same place and then shares it.
    route: Route,
}

impl fmt::Debug for Publisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publisher").field("channel", &self.open.id).finish_non_exhaustive()
    }
}

impl Publisher {
    fn route(&mut self, exchange: &str, routing_key: &str) -> Route {
        if *self.route.exchange != *exchange || *self.route.routing_key != *routing_key {
            self.route = Route::new(exchange, routing_key);
        }
        self.route.clone()
    }

    /// From now on the publishing thread reads the feed: there is no dispatcher any more.
    pub(crate) fn take_back_feed(&mut self) {
        self.dispatched = false;
    }

    pub(crate) fn into_channel(self) -> OpenChannel {
        self.open
    }

    fn ledger(&self) -> std::sync::MutexGuard<'_, Ledger> {
        self.feed.ledger.lock()
    }

    /// Whether the next message is to have another channel: this one has ended, or refuses.
    ///
    /// A channel that first reached for a quorum queue while it had no leader gets nothing but nacks from RabbitMQ (3.10)
    /// until the node that led before is up again: the channel has noted that node as the one to ask and asks no other.
    /// On another channel the queue takes messages as soon as it has a leader. Where it is the queue that is full, this
    /// costs a channel for every second of refusals.
    fn is_spent(&self) -> bool {
        let ledger = self.ledger();
        ledger.has_ended() || (ledger.ends_in_refusal() && self.since.elapsed() >= REFUSED_AGE)
    }

    /// Waits until `done` holds for the ledger, at most until `deadline`; returns whether it does.
    fn wait(&self, deadline: Instant, done: impl Fn(&Ledger) -> bool) -> bool {
        if self.dispatched {
            return self.feed.ledger.wait(deadline, done);
        }
        loop {
            let due = {
                let ledger = self.ledger();
                if done(&ledger) {
                    return true;
                }
                ledger.next_deadline()
            };
            // Without a dispatcher nothing in the ledger has a callback.
            run(self.feed.pump(due.map_or(deadline, |due| due.min(deadline))));
            // After the look: what had come by the deadline counts.
            if Instant::now() >= deadline {
                return done(&self.ledger());
            }
        }
    }
}

/// A message that has been published, of which the broker's word may be still to come.
pub(crate) struct Begun {
    call: Arc<Call>,
    sent: Result<()>,
    written: bool,
}

impl Begun {
    /// Whether there is nothing more to wait for.
    pub(crate) fn is_settled(&self) -> bool {
        self.call.open() == 0
    }

    /// What has come of it. To be asked once it is settled.
    pub(crate) fn end(self) -> Attempt {
        let outcome = match (self.sent, self.call.take_failures().pop()) {
            (Err(error), _) | (Ok(()), Some((_, error))) => Err(error),
            (Ok(()), None) => Ok(()),
        };
        Attempt { outcome, written: self.written }
    }
}

/// What one attempt to publish has come to.
pub(crate) struct Attempt {
    pub(crate) outcome: Result<()>,
    /// It was entered in the ledger and its writing begun, so that the broker may have it.
    pub(crate) written: bool,
}

/// Publishing.
///
/// All messages of one connection go through one channel and reach the broker in the order of the calls.
impl Connection {
    /// Publishes a message and waits for the broker to confirm it.
    ///
    /// `Ok` means that the broker has taken responsibility: the message is in every queue it was routed to, and on
    /// disk where message and queue are to survive a restart
    /// (<https://www.rabbitmq.com/docs/confirms#when-publishes-are-confirmed>). The empty exchange name is the default
    /// exchange, which routes to the queue named by the routing key.
    ///
    /// # Errors
    ///
    /// - [`Error::Returned`]: no queue took it, and the pool publishes `mandatory` (the default).
    /// - [`Error::Nacked`]: the broker refused it.
    /// - [`Error::ChannelClosed`]: 404 for an exchange that does not exist, 403 where writing is not allowed.
    /// - [`Error::Blocked`], [`Error::Timeout`]: no confirm within the pool's `confirm_timeout`. The broker may have
    ///   the message all the same.
    /// - [`Error::ConnectionLost`], [`Error::ConnectionClosed`]: likewise unknown, if it happens while waiting.
    /// - [`Error::InvalidArgument`]: it cannot be put on the wire; nothing was sent.
    /// - [`Error::Refused`], or what else a [hook](crate::Pool::before_publish) returns; nothing was sent.
    pub fn publish(&self, exchange: &str, routing_key: &str, message: impl Into<Message>) -> Result<()> {
        let message = self.outlet.prepare(exchange, routing_key, message.into())?;
        let deadline = Instant::now() + self.settings.confirm_timeout;
        self.attempt(exchange, routing_key, Arc::new(message), self.settings.mandatory, deadline).outcome
    }

    /// Publishes a message once more that has been received: as it is, and not to be dropped for want of a queue.
    pub(crate) fn publish_copy(&self, exchange: &str, routing_key: &str, message: Message) -> Result<()> {
        let deadline = Instant::now() + self.settings.confirm_timeout;
        self.attempt(exchange, routing_key, Arc::new(message), true, deadline).outcome
    }

    /// Publishes a message without waiting. What becomes of it is to be asked of the call, by this thread, which meanwhile
    /// hands in the [answers](Connection::answers).
    pub(crate) fn publish_later(
        &self,
        exchange: &str,
        routing_key: &str,
        message: Arc<Message>,
        mandatory: bool,
    ) -> Result<Arc<Call>> {
        let deadline = Instant::now() + self.settings.confirm_timeout;
        let begun = self.begin(exchange, routing_key, message, mandatory, deadline);
        // What has been entered in the ledger is told by the ledger, failed or not.
        if begun.written { Ok(begun.call) } else { begun.sent.map(|()| begun.call) }
    }

    /// Takes in the answers that are there, and what is past its deadline. Returns where more of them come in, and by when
    /// to look again; `None` if they are not this thread's to read.
    pub(crate) fn answers(&self) -> Option<(Receiver<Confirm>, Instant)> {
        let publisher = self.publisher.borrow();
        let publisher = publisher.as_ref().filter(|publisher| !publisher.dispatched)?;
        // Without a dispatcher nothing in the ledger has a callback.
        run(publisher.feed.pump(Instant::now()));
        let deadline = publisher.ledger().next_deadline();
        Some((publisher.feed.confirms.clone(), deadline.unwrap_or_else(|| Instant::now() + LOOK)))
    }

    /// Takes in an answer, or with `None` the end of all answers.
    pub(crate) fn answered(&self, confirm: Option<Confirm>) {
        if let Some(publisher) = &*self.publisher.borrow() {
            run(match confirm {
                Some(confirm) => publisher.feed.absorb(confirm),
                None => publisher.feed.end(),
            });
        }
    }

    /// Waits until everything that was published is settled, or past its deadline.
    pub(crate) fn wait_for_answers(&self) {
        let deadline = Instant::now() + self.settings.confirm_timeout;
        if let Some(publisher) = &*self.publisher.borrow() {
            publisher.wait(deadline, |ledger| ledger.in_flight() == 0);
        }
    }

    /// Publishes a message and waits for its confirm until `deadline`.
    pub(crate) fn attempt(
        &self,
        exchange: &str,
        routing_key: &str,
        message: Arc<Message>,
        mandatory: bool,
        deadline: Instant,
    ) -> Attempt {
        let begun = self.begin(exchange, routing_key, message, mandatory, deadline);
        self.wait_for(&begun.call, deadline);
        begun.end()
    }

    /// Publishes a message without waiting for its confirm.
    pub(crate) fn begin(
        &self,
        exchange: &str,
        routing_key: &str,
        message: Arc<Message>,
        mandatory: bool,
        deadline: Instant,
    ) -> Begun {
        let call = Arc::new(Call::default());
        let mut waiting = Some(Waiting::Call(Arc::clone(&call), 0));
        let sent = self.send(exchange, routing_key, message, mandatory, &mut waiting, deadline);
        Begun { call, sent, written: waiting.is_none() }
    }

    /// Publishes a message without waiting; `callback` is run with the outcome, which is that of
    /// [`publish`](Connection::publish).
    ///
    /// The callback is run exactly once, whatever happens, on a thread that belongs to this connection, one after
    /// another. It may take another connection from a pool. A panic in it is caught and logged.
    ///
    /// Messages are pipelined: up to the pool's `max_in_flight` callbacks may be outstanding, then the call waits until
    /// there is room. Should the broker close the channel (a missing exchange), every message in flight gets that error.
    ///
    /// Giving the connection back to the pool waits for the callbacks; so does [`flush`](Connection::flush).
    pub fn publish_async<F>(&self, exchange: &str, routing_key: &str, message: impl Into<Message>, callback: F)
    where
        F: FnOnce(Result<()>) + Send + 'static,
    {
        let callback = Callback::new("publish_async", &self.outstanding, callback);
        let deadline = Instant::now() + self.settings.confirm_timeout;
        let mut waiting = Some(Waiting::Callback(callback));
        let sent = self.outlet.prepare(exchange, routing_key, message.into()).and_then(|message| {
            self.send(exchange, routing_key, Arc::new(message), self.settings.mandatory, &mut waiting, deadline)
        });
        // What has been entered in the ledger is told by the ledger, failed or not.
        let (Err(error), Some(Waiting::Callback(callback))) = (sent, waiting) else { return };
        let mut dispatcher = self.dispatcher.borrow_mut();
        match dispatcher_in(&mut dispatcher) {
            Ok(dispatcher) => dispatcher.run(callback, Err(error)),
            Err(no_thread) => {
                log::error!("publish_async: {no_thread}; the callback is run on the calling thread");
                drop(dispatcher);
                callback.run(Err(error));
            }
        }
    }

    /// Publishes messages in a pipeline and returns how many there were, once all are confirmed.
    ///
    /// Each item is exchange, routing key and message. They are sent in order, at most the pool's `max_in_flight` of
    /// them unconfirmed at a time, each with `confirm_timeout` of its own.
    ///
    /// # Errors
    ///
    /// [`Error::Batch`] names every message that was not confirmed, by its position, with the reason. After a lost
    /// connection or a time-out the rest is not sent and fails with that reason too.
    ///
    /// ```no_run
    /// # fn main() -> coney::Result<()> {
    /// # let app = coney::App::from_file("app.toml")?;
    /// let connection = app.publish_pool().connection()?;
    /// let sent = connection.publish_batch((0..1000).map(|n| ("", "numbers", n.to_string())))?;
    /// assert_eq!(sent, 1000);
    /// # Ok(())
    /// # }
    /// ```
    pub fn publish_batch<I, E, K, M>(&self, messages: I) -> Result<usize>
    where
        I: IntoIterator<Item = (E, K, M)>,
        E: AsRef<str>,
        K: AsRef<str>,
        M: Into<Message>,
    {
        let call = Arc::new(Call::default());
        let mut len = 0;
        let mut failed = Vec::new();
        let mut hopeless: Option<Error> = None;
        let mut looked_at = 0;
        for (position, (exchange, routing_key, message)) in messages.into_iter().enumerate() {
            len += 1;
            // Also what became of a message that had been sent: each window would wait for a time-out of its own.
            hopeless = hopeless.or_else(|| call.failure_since(&mut looked_at, ends_batch));
            if let Some(error) = &hopeless {
                self.outlet.meter.not_entered(error);
                failed.push((position, error.clone()));
                continue;
            }
            let deadline = Instant::now() + self.settings.confirm_timeout;
            let mut waiting = Some(Waiting::Call(Arc::clone(&call), position));
            let (exchange, routing_key) = (exchange.as_ref(), routing_key.as_ref());
            let mandatory = self.settings.mandatory;
            let sent = self.outlet.prepare(exchange, routing_key, message.into()).and_then(|message| {
                self.send(exchange, routing_key, Arc::new(message), mandatory, &mut waiting, deadline)
            });
            if let Err(error) = sent {
                hopeless = ends_batch(&error).then(|| error.clone());
                if waiting.is_some() {
                    failed.push((position, error));
                }
            }
        }
        self.wait_for(&call, Instant::now() + self.settings.confirm_timeout);
        failed.append(&mut call.take_failures());
        if failed.is_empty() {
            return Ok(len);
        }
        failed.sort_by_key(|(position, _)| *position);
        Err(Error::Batch(BatchError { confirmed: len - failed.len(), failed }))
    }

    /// Sends one message. Takes `waiting` when it enters the message in the ledger, which tells it from then on; what is
    /// left there after a failure has not been told.
    fn send(
        &self,
        exchange: &str,
        routing_key: &str,
        message: Arc<Message>,
        mandatory: bool,
        waiting: &mut Option<Waiting>,
        deadline: Instant,
    ) -> Result<()> {
        let sent = self.enter_and_write(exchange, routing_key, message, mandatory, waiting, deadline);
        // The ledger counts the others.
        if let (Some(_), Err(error)) = (&waiting, &sent) {
            self.outlet.meter.not_entered(error);
        }
        sent
    }

    fn enter_and_write(
        &self,
        exchange: &str,
        routing_key: &str,
        message: Arc<Message>,
        mandatory: bool,
        waiting: &mut Option<Waiting>,
        deadline: Instant,
    ) -> Result<()> {
        check(exchange, routing_key, &message, self.frame_max())?;
        let is_async = matches!(waiting, Some(Waiting::Callback(_)));
        self.wait_for_permission(is_async, deadline)?;
        let mut publisher = self.publisher(exchange, routing_key, is_async, deadline)?;
        let publisher = &mut *publisher;
        let route = publisher.route(exchange, routing_key);
        let during = || publish_to(&route);

        if Instant::now() >= deadline {
            return Err(self.too_late(during()));
        }
        let kept = mandatory.then(|| Likeness::of(&message));
        let mut ledger = publisher.ledger();
        if ledger.has_ended() {
            // Between opening and here; the next message gets a new channel.
            return Err(self.link.channel_ending(publisher.open.id, &during()));
        }
        if let Some(waiting) = waiting.take() {
            ledger.enter(route.clone(), kept, deadline, waiting);
        }
        let first = ledger.in_flight() == 1;
        drop(ledger);
        if first
            && publisher.dispatched
            && let Some(dispatcher) = &*self.dispatcher.borrow()
        {
            dispatcher.look();
        }

        let limit = deadline.saturating_duration_since(Instant::now()).max(WRITE_GRACE);
        let open = &publisher.open;
        let sent = self.link.call(limit, &during, Some(open.id), || {
            let mut publish = Publish::with_properties(message.body(), routing_key, message.amqp_properties());
            publish.mandatory = mandatory;
            open.channel.basic_publish(exchange, publish)
        });
        if sent.is_err() && !publisher.dispatched {
            // The channel is gone, and this thread is the one that reads its last answers. A dispatcher sees it by itself.
            run(publisher.feed.end());
        }
        sent
    }

    /// Waits until the broker takes messages and the in-flight limit leaves room for one more callback.
    fn wait_for_permission(&self, is_async: bool, deadline: Instant) -> Result<()> {
        let limit = self.settings.confirm_timeout;
        if let Err(reason) = self.link.wire.wait_unblocked(deadline) {
            return Err(Error::Blocked { reason, waited: limit, written: false });
        }
        let max = self.settings.max_in_flight;
        // The callback in question counts already.
        if is_async && self.outstanding.wait_for(Instant::now(), max).is_err() {
            let enough = after_a_wait(max);
            if let Err(count) = self.outstanding.wait_for(deadline, enough) {
                return Err(self.too_late(format!("wait with {count} callbacks outstanding")));
            }
        }
        Ok(())
    }

    /// The publisher, opened anew if there is none or its channel is spent, with room for one more message.
    fn publisher(
        &self,
        exchange: &str,
        routing_key: &str,
        is_async: bool,
        deadline: Instant,
    ) -> Result<RefMut<'_, Publisher>> {
        let mut slot = self.publisher.borrow_mut();
        if let Some(publisher) = &*slot {
            let max = self.settings.max_in_flight;
            let full = publisher.ledger().in_flight() >= max;
            let has_room = |ledger: &Ledger| ledger.in_flight() <= after_a_wait(max) || ledger.has_ended();
            if full && !publisher.wait(deadline, has_room) {
                self.link.suspect();
                return Err(self.too_late(format!("wait with {max} messages in flight")));
            }
        }
        if slot.as_ref().is_some_and(Publisher::is_spent)
            && let Some(publisher) = slot.take()
        {
            if !publisher.ledger().has_ended() {
                let (pool, connection) = (self.outlet.pool(), self.name());
                log::debug!(pool, connection; "{connection}: its publishing channel goes on refusing; the next message has another");
            }
            publisher.open.close(&self.link, self.left(deadline));
        }
        let mut publisher = match slot.take() {
            Some(publisher) => publisher,
            None => self.open_publisher(Route::new(exchange, routing_key), deadline)?,
        };
        if is_async && !publisher.dispatched {
            let mut dispatcher = self.dispatcher.borrow_mut();
            match dispatcher_in(&mut dispatcher) {
                Ok(dispatcher) => dispatcher.read(publisher.feed.clone()),
                Err(no_thread) => {
                    *slot = Some(publisher);
                    return Err(no_thread);
                }
            }
            publisher.dispatched = true;
        }
        Ok(RefMut::map(slot, |slot| slot.insert(publisher)))
    }

    fn open_publisher(&self, route: Route, deadline: Instant) -> Result<Publisher> {
        let during = || publish_to(&route);
        let open = self.link.open_channel(self.left(deadline), &during)?;
        let (confirms, returns) = self.link.call(self.left(deadline), &during, Some(open.id), || {
            // Both receivers stand before the first message; amiquip drops what nobody listens for.
            let confirms = open.channel.listen_for_publisher_confirms()?;
            let returns = open.channel.listen_for_returns()?;
            open.channel.enable_publisher_confirms()?;
            Ok((confirms, returns))
        })?;
        let feed = Feed {
            confirms,
            returns,
            ledger: Arc::new(SharedLedger::new(Arc::clone(&self.outlet.meter))),
            link: Arc::clone(&self.link),
            channel: open.id,
            confirm_timeout: self.settings.confirm_timeout,
        };
        Ok(Publisher { open, since: Instant::now(), feed, dispatched: false, route })
    }

    /// How long an operation may take that is to be done by `deadline`.
    fn left(&self, deadline: Instant) -> Duration {
        deadline.saturating_duration_since(Instant::now()).min(self.settings.broker.operation_timeout)
    }

    /// The error of a publish that has not been sent by its deadline.
    fn too_late(&self, during: String) -> Error {
        let after = self.settings.confirm_timeout;
        match self.link.wire.blocked() {
            Some(reason) => Error::Blocked { reason, waited: after, written: false },
            None => Error::Timeout { during, after },
        }
    }

    /// Waits until every message of `call` is settled; at `deadline`, those that are not are.
    pub(crate) fn wait_for(&self, call: &Call, deadline: Instant) {
        self.wait_until(deadline, || call.open() == 0);
    }

    /// Waits until `done`; at `deadline`, every message that is past its own is settled.
    pub(crate) fn wait_until(&self, deadline: Instant, done: impl Fn() -> bool) {
        let done = |_: &Ledger| done();
        if let Some(publisher) = &*self.publisher.borrow()
            && !publisher.wait(deadline, done)
        {
            // With a dispatcher this is its work, of which it may have much.
            if !publisher.dispatched || !publisher.wait(Instant::now() + WRITE_GRACE, done) {
                let settled = publisher.feed.expire(Instant::now().max(deadline));
                match &*self.dispatcher.borrow() {
                    Some(dispatcher) => dispatcher.run_all(settled),
                    None => run(settled),
                }
            }
        }
    }

    /// The largest frame the broker takes, in bytes.
    fn frame_max(&self) -> usize {
        self.link.wire.frame_max().filter(|&max| max > 0).unwrap_or(u32::MAX).min(crate::transport::FRAME_MAX) as usize
    }
}

/// How few may be in flight after a wait for room. Not just one less: that would wake the thread for every single confirm.
fn after_a_wait(max: usize) -> usize {
    max - (max / 4).max(1)
}

fn dispatcher_in(slot: &mut Option<Dispatcher>) -> Result<&Dispatcher> {
    match slot {
        Some(dispatcher) => Ok(dispatcher),
        empty => Ok(empty.insert(Dispatcher::start()?)),
    }
}

fn check(exchange: &str, routing_key: &str, message: &Message, frame_max: usize) -> Result<()> {
    check_short_string(|| "exchange name".to_owned(), exchange)?;
    check_short_string(|| "routing key".to_owned(), routing_key)?;
    message.check(frame_max)
}

/// Whether the rest of a batch has no chance after this error.
fn ends_batch(error: &Error) -> bool {
    matches!(
        error,
        Error::ConnectionLost { .. }
            | Error::ConnectionClosed { .. }
            | Error::Timeout { .. }
            | Error::Blocked { .. }
            | Error::Thread { .. }
    )
}
