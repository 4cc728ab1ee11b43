//! The channel that a connection publishes on: opening it, sending, and waiting for the broker's word.

use std::cell::RefMut;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use amiquip::Confirm;
use crossbeam_channel::Receiver;

use crate::confirms::{Call, Ledger, Route, Waiting};
use crate::connection::Connection;
use crate::dispatch::{Dispatcher, Feed, SharedLedger, publish_to, run};
use crate::error::{Error, Result};
use crate::field::check_short_string;
use crate::frames::Outgoing;
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
    pub(crate) call: Arc<Call>,
    pub(crate) sent: Result<()>,
    pub(crate) written: bool,
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

impl Connection {
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
    pub(crate) fn attempt(&self, outgoing: Outgoing<'_>, deadline: Instant) -> Attempt {
        let begun = self.begin(outgoing, deadline);
        self.wait_for(&begun.call, deadline);
        begun.end()
    }

    /// Publishes a message without waiting for its confirm.
    pub(crate) fn begin(&self, outgoing: Outgoing<'_>, deadline: Instant) -> Begun {
        let call = Arc::new(Call::default());
        let mut waiting = Some(Waiting::Call(Arc::clone(&call), 0));
        let sent = self.send(outgoing, &mut waiting, deadline);
        Begun { call, sent, written: waiting.is_none() }
    }

    /// Sends one message. Takes `waiting` when it enters the message in the ledger, which tells it from then on; what is
    /// left there after a failure has not been told.
    pub(crate) fn send(&self, outgoing: Outgoing<'_>, waiting: &mut Option<Waiting>, deadline: Instant) -> Result<()> {
        let sent = self.enter_and_write(outgoing, waiting, deadline);
        // The ledger counts the others.
        if let (Some(_), Err(error)) = (&waiting, &sent) {
            self.outlet.meter.not_entered(error);
        }
        sent
    }

    fn enter_and_write(&self, outgoing: Outgoing<'_>, waiting: &mut Option<Waiting>, deadline: Instant) -> Result<()> {
        let Outgoing { exchange, routing_key, message, mandatory, .. } = outgoing;
        check(exchange, routing_key, message, self.link.frame_max())?;
        let is_async = matches!(waiting, Some(Waiting::Callback(_)));
        self.wait_for_permission(is_async, deadline)?;
        let mut publisher = self.publisher(exchange, routing_key, is_async, deadline)?;
        let publisher = &mut *publisher;
        let route = publisher.route(exchange, routing_key);
        let during = || publish_to(&route);

        if Instant::now() >= deadline {
            return Err(self.too_late(during()));
        }
        let kept = mandatory.then(|| Likeness::of(message));
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
        let sent = publisher.open.publish(&self.link, limit, &during, outgoing);
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
}

/// How few may be in flight after a wait for room. Not just one less: that would wake the thread for every single confirm.
fn after_a_wait(max: usize) -> usize {
    max - (max / 4).max(1)
}

pub(crate) fn dispatcher_in(slot: &mut Option<Dispatcher>) -> Result<&Dispatcher> {
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
