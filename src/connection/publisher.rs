//! The channel that a connection publishes on: opening it, sending, and waiting for the broker's word.

use std::cell::RefMut;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Connection;
use super::confirms::{Call, Ledger, Route, Waiting};
use super::returns::Likeness;
use super::runner::{Feed, Runner, SharedLedger, publish_to};
use crate::error::{Error, Result, counted};
use crate::event::Noted;
use crate::field::check_short_string;
use crate::message::Message;
use crate::session::{Channel, Flush, Outgoing, Waiters};

/// The time a settled outcome may take to be told once it is past its deadline.
const GRACE: Duration = Duration::from_millis(200);

/// How soon answers are looked at again where no deadline says when.
const NEXT_LOOK: Duration = Duration::from_secs(1);

/// How long a channel that ends in a refusal is used at least.
const REFUSED_AGE: Duration = Duration::from_secs(1);

/// A body of this many bytes takes a while to write. The time to wait for its confirm is counted from when it is written.
const LARGE: usize = 128 << 10;

/// Means whoever consumes answers on the channel that asks. On a publishing channel nobody does, and RabbitMQ closes it.
const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";

/// A channel in confirm mode.
pub(crate) struct Publisher {
    channel: Channel,
    since: Instant,
    feed: Feed,
    /// A runner attends the feed too.
    has_runner: bool,
    /// Of the last message; the next one is often bound for the same place and then shares it.
    route: Route,
}

impl fmt::Debug for Publisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publisher").field("channel", &self.channel.number()).finish_non_exhaustive()
    }
}

impl Publisher {
    fn route(&mut self, exchange: &str, routing_key: &str) -> Route {
        if *self.route.exchange != *exchange || *self.route.routing_key != *routing_key {
            self.route = Route::new(exchange, routing_key);
        }
        self.route.clone()
    }

    /// There is no runner any more.
    pub(super) fn forget_runner(&mut self) {
        self.has_runner = false;
    }

    pub(super) fn into_channel(self) -> Channel {
        self.channel
    }

    fn with_ledger<T>(&self, step: impl FnOnce(&mut Ledger) -> T) -> T {
        self.feed.ledger.with(step)
    }

    /// Whether the next message is to have another channel: this one has ended, or refuses.
    ///
    /// A channel that first reached for a quorum queue while it had no leader gets nothing but nacks from RabbitMQ (3.10)
    /// until the node that led before is up again: the channel has noted that node as the one to ask and asks no other.
    /// On another channel the queue takes messages as soon as it has a leader. Where it is the queue that is full, this
    /// costs a channel for every second of refusals.
    fn is_spent(&self) -> bool {
        self.feed.look(Instant::now());
        self.with_ledger(|ledger| {
            ledger.has_ended() || (ledger.ends_in_refusal() && self.since.elapsed() >= REFUSED_AGE)
        })
    }

    /// Waits until `done` holds for the ledger, at most until `deadline`; returns whether it does.
    fn wait(&self, deadline: Instant, done: impl Fn(&Ledger) -> bool) -> bool {
        loop {
            let due = self.feed.look(Instant::now());
            if self.with_ledger(|ledger| done(ledger)) {
                return true;
            }
            // After the look: what had come by the deadline counts.
            if Instant::now() >= deadline || self.with_ledger(|ledger| ledger.has_ended()) {
                return false;
            }
            let until = due.map_or(deadline, |due| due.min(deadline));
            let ledger = &self.feed.ledger;
            self.feed.session.wait(&[ledger.waiters()], None, until, || {
                (self.with_ledger(|ledger| done(ledger)) || ledger.inbox.has_ended()).then_some(())
            });
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
    /// Sees to the deadlines of what has been published, and to the end of its channel. Returns by when to look again.
    pub(crate) fn look_after_publishes(&self) -> Instant {
        let publisher = self.state().publisher.borrow();
        let due = publisher.as_ref().and_then(|publisher| publisher.feed.look(Instant::now()));
        due.unwrap_or_else(|| Instant::now() + NEXT_LOOK)
    }

    /// Does something with the threads that wait for the confirms of this connection.
    pub(crate) fn with_publish_waiters<T>(&self, step: impl FnOnce(Option<&Waiters>) -> T) -> T {
        let ledger = self.state().publisher.borrow().as_ref().map(|publisher| Arc::clone(&publisher.feed.ledger));
        step(ledger.as_ref().map(|ledger| ledger.waiters()))
    }

    /// Waits until everything that was published is settled, or past its deadline.
    pub(crate) fn wait_for_answers(&self) {
        self.wait_for_answers_until(Instant::now() + self.settings.confirm_timeout);
    }

    /// The same until `deadline`. Returns whether nothing is under way any more.
    pub(crate) fn wait_for_answers_until(&self, deadline: Instant) -> bool {
        let publisher = self.state().publisher.borrow();
        let Some(publisher) = &*publisher else { return true };
        let is_settled = |ledger: &Ledger| ledger.in_flight() == 0 || ledger.has_ended();
        if publisher.with_ledger(|ledger| is_settled(ledger)) {
            return true;
        }
        self.session.flush();
        publisher.wait(deadline, is_settled)
    }

    /// Publishes a message and waits for its confirm until `deadline`. Whoever calls it says so if that was all.
    pub(crate) fn attempt(&self, outgoing: Outgoing<'_>, deadline: Instant) -> Attempt {
        let (begun, deadline) = self.begin(outgoing, Flush::Now, deadline, None);
        self.wait_for(&begun.call, deadline);
        begun.end()
    }

    /// Publishes a message without waiting for its confirm. Returns by when that is to have come, too. What is `noted` of it is
    /// told if it fails: none if somebody may try it again.
    pub(crate) fn begin(
        &self,
        outgoing: Outgoing<'_>,
        flush: Flush,
        deadline: Instant,
        noted: Option<Noted>,
    ) -> (Begun, Instant) {
        let call = Arc::new(Call::default());
        let mut waiting = Some(Waiting::Call(Arc::clone(&call), 0));
        let sent = self.send(outgoing, flush, &mut waiting, deadline, noted);
        let (sent, deadline) = match sent {
            Ok(deadline) => (Ok(()), deadline),
            Err(error) => (Err(error), deadline),
        };
        (Begun { call, sent, written: waiting.is_none() }, deadline)
    }

    /// Sends one message. Takes `waiting` when it enters the message in the ledger, which tells it from then on; what is
    /// left there after a failure has not been told. Returns by when the confirm is to have come.
    pub(super) fn send(
        &self,
        outgoing: Outgoing<'_>,
        flush: Flush,
        waiting: &mut Option<Waiting>,
        deadline: Instant,
        mut noted: Option<Noted>,
    ) -> Result<Instant> {
        let (exchange, routing_key) = (outgoing.exchange, outgoing.routing_key);
        let sent = self.enter_and_write(outgoing, flush, waiting, deadline, &mut noted);
        // The ledger counts and tells the others.
        if let (Some(_), Err(error)) = (&waiting, &sent) {
            self.context.events.not_entered((exchange, routing_key), noted, error);
        }
        sent
    }

    fn enter_and_write(
        &self,
        outgoing: Outgoing<'_>,
        flush: Flush,
        waiting: &mut Option<Waiting>,
        deadline: Instant,
        noted: &mut Option<Noted>,
    ) -> Result<Instant> {
        self.session.check_process()?;
        let Outgoing { exchange, routing_key, message, mandatory } = outgoing;
        check(exchange, routing_key, message, self.session.frame_max())?;
        self.context.check_body(message)?;
        let is_async = matches!(waiting, Some(Waiting::Callback(_)));
        self.wait_for_permission(is_async, deadline)?;
        let mut publisher = self.publisher(exchange, routing_key, is_async, deadline)?;
        let publisher = &mut *publisher;
        let route = publisher.route(exchange, routing_key);

        let begun = Instant::now();
        if begun >= deadline {
            return Err(self.too_late(publish_to(&route)));
        }
        let kept = mandatory.then(|| Likeness::of(message));
        let entered = publisher.with_ledger(|ledger| {
            if ledger.has_ended() {
                return None;
            }
            if let Some(waiting) = waiting.take() {
                ledger.enter(route.clone(), kept, deadline, waiting, noted.take());
            }
            Some(ledger.in_flight())
        });
        let Some(in_flight) = entered else {
            // Between opening and here; the next message gets a new channel.
            return Err(publisher.channel.ending(&publish_to(&route)));
        };
        // What waits to be written goes out with the next confirm; if none is to come, nothing waits.
        let flush = if in_flight == 1 { Flush::Now } else { flush };
        let is_large = message.body().len() >= LARGE;
        if is_large {
            // While it is being written it cannot be too late.
            publisher.with_ledger(|ledger| ledger.extend_last(crate::deadline::after(Duration::MAX)));
        }
        let patience = self.settings.broker.operation_timeout;
        let sent = publisher.channel.publish(outgoing, flush, patience, &|| publish_to(&route));
        if let Err(error) = sent {
            // The channel is gone.
            publisher.feed.look(Instant::now());
            return Err(error);
        }
        if !is_large {
            return Ok(deadline);
        }
        // Counted from now, and as long again as writing took: what the sockets on the way still hold arrives no faster than
        // what they have passed on.
        let deadline = deadline + 2 * begun.elapsed();
        publisher.with_ledger(|ledger| ledger.extend_last(deadline));
        Ok(deadline)
    }

    /// Waits until the broker takes messages and the in-flight limit leaves room for one more callback.
    fn wait_for_permission(&self, is_async: bool, deadline: Instant) -> Result<()> {
        let limit = self.settings.confirm_timeout;
        if let Err(reason) = self.session.wire.wait_unblocked(deadline) {
            return Err(Error::Blocked { reason, waited: limit, written: false });
        }
        let max = self.settings.max_in_flight;
        // The callback in question counts already.
        if is_async && self.outstanding.wait_for(Instant::now(), max).is_err() {
            self.session.flush();
            let enough = after_a_wait(max);
            if let Err(count) = self.outstanding.wait_for(deadline, enough) {
                return Err(self.too_late(format!("wait with {} outstanding", counted(count, "callback"))));
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
        let mut slot = self.state().publisher.borrow_mut();
        if let Some(publisher) = &*slot {
            let max = self.settings.max_in_flight;
            let full = publisher.with_ledger(|ledger| ledger.in_flight() >= max);
            let has_room = |ledger: &Ledger| ledger.in_flight() <= after_a_wait(max) || ledger.has_ended();
            if full && !publisher.wait(deadline, has_room) {
                self.session.suspect();
                return Err(self.too_late(format!("wait with {} in flight", counted(max, "message"))));
            }
        }
        if slot.as_ref().is_some_and(Publisher::is_spent)
            && let Some(publisher) = slot.take()
        {
            if !publisher.with_ledger(|ledger| ledger.has_ended()) {
                let (pool, connection) = (self.context.pool(), self.name());
                log::debug!(pool, connection; "{connection}: its publishing channel goes on refusing; the next message has another");
            }
            publisher.channel.close(self.left(deadline));
        }
        let mut publisher = match slot.take() {
            Some(publisher) => publisher,
            None => self.open_publisher(Route::new(exchange, routing_key), deadline)?,
        };
        if is_async && !publisher.has_runner {
            let mut runner = self.state().runner.borrow_mut();
            match self.runner_in(&mut runner) {
                Ok(runner) => runner.attend(publisher.feed.clone()),
                Err(no_thread) => {
                    *slot = Some(publisher);
                    return Err(no_thread);
                }
            }
            publisher.has_runner = true;
        }
        Ok(RefMut::map(slot, |slot| slot.insert(publisher)))
    }

    fn open_publisher(&self, route: Route, deadline: Instant) -> Result<Publisher> {
        let during = || publish_to(&route);
        let ledger = Arc::new(SharedLedger::new(Arc::clone(&self.context.events)));
        let sink = Arc::clone(&ledger);
        let channel = self.session.open_channel(self.left(deadline), &during, Some(sink))?;
        channel.select_confirms(&ledger.inbox, self.left(deadline), &during)?;
        let feed = Feed {
            ledger,
            session: Arc::clone(&self.session),
            endings: channel.endings(),
            context: Arc::clone(&self.context),
            confirm_timeout: self.settings.confirm_timeout,
        };
        Ok(Publisher { channel, since: Instant::now(), feed, has_runner: false, route })
    }

    /// How long an operation may take that is to be done by `deadline`.
    fn left(&self, deadline: Instant) -> Duration {
        deadline.saturating_duration_since(Instant::now()).min(self.settings.broker.operation_timeout)
    }

    /// The error of a publish that has not been sent by its deadline.
    fn too_late(&self, during: String) -> Error {
        let after = self.settings.confirm_timeout;
        match self.session.wire.blocked() {
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
        if done() {
            return;
        }
        let done = |_: &Ledger| done();
        if let Some(publisher) = &*self.state().publisher.borrow()
            && !publisher.wait(deadline, done)
        {
            // With a runner this is its work, of which it may have much.
            if !publisher.has_runner || !publisher.wait(Instant::now() + GRACE, done) {
                publisher.feed.expire(Instant::now().max(deadline));
            }
        }
    }

    pub(super) fn runner_in<'a>(&self, slot: &'a mut Option<Runner>) -> Result<&'a Runner> {
        match slot {
            Some(runner) => Ok(runner),
            empty => Ok(empty.insert(Runner::start(&self.session)?)),
        }
    }
}

/// How few may be in flight after a wait for room. Not just one less: that would wake the thread for every single confirm.
pub(crate) fn after_a_wait(max: usize) -> usize {
    max - (max / 4).max(1)
}

fn check(exchange: &str, routing_key: &str, message: &Message, frame_max: usize) -> Result<()> {
    check_short_string(|| "exchange name".to_owned(), exchange)?;
    check_short_string(|| "routing key".to_owned(), routing_key)?;
    if message.reply_to() == Some(DIRECT_REPLY_TO) {
        let problem = format!("{DIRECT_REPLY_TO:?}, expected a queue: only an RpcClient has answers sent to itself");
        return Err(Error::invalid("message property reply_to", problem));
    }
    message.check(frame_max)
}
