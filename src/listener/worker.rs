//! One thread of a session: a channel, a consumer, and what becomes of each delivery.

use std::cell::RefCell;
use std::collections::{BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError, unbounded};

use super::builder::Handler;
use super::deferred::Deferred;
use super::retry::{self, Gone};
use super::unsettled::{Settle, Unsettled};
use super::{Context, Route, Shared, count};
use crate::amqp::value::{Table, Value};
use crate::connection::callback::panic_text;
use crate::connection::confirms::Call;
use crate::connection::{Connection, Delivery, Received};
use crate::error::{Error, Result};
use crate::metrics::meter::{RouteMeter, Timer};
use crate::outcome::Outcome;
use crate::session::{Arrived, Channel, Consume, Inbox, Incoming, Settlement, Waker};
use crate::trace;

/// How long a stop waits for deliveries that their handler settles by itself.
const MANUAL_GRACE: Duration = Duration::from_secs(5);

/// How long a worker waits that has nothing to look after.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// How long an ack is held back at most, beyond the handler that is running.
const LONGEST_HOLD: Duration = Duration::from_millis(100);

pub(super) struct Worker<'a> {
    pub(super) shared: &'a Shared,
    pub(super) route: &'a Route,
    pub(super) queue: &'a str,
    /// The channels that handlers publish on.
    pub(super) side: &'a Connection,
    /// Ends when the session is to end; the waker wakes the thread then.
    pub(super) stop: &'a Receiver<()>,
    /// Filled by the worker, once it has a channel.
    pub(super) waker: &'a OnceLock<Arc<Waker>>,
    /// When the delivery in hand came, in milliseconds since `epoch`; 0 if there is none.
    pub(super) busy: &'a AtomicU64,
    /// The longest that a handler has taken, in milliseconds.
    pub(super) slowest: &'a AtomicU64,
    pub(super) epoch: Instant,
}

impl Worker<'_> {
    /// Listens until told to stop (`Ok`) or until something comes in the way; calls `ready` once there is a consumer.
    pub(super) fn run(&self, ready: impl FnOnce()) -> Result<()> {
        let (limit, session) = (self.limit(), &self.side.session);
        let opening = || self.during("opening of a channel for");
        let waker = Arc::new(session.waker(&opening)?);
        let waker = self.waker.get_or_init(|| waker);
        let inbox = Arc::<Inbox>::default();
        let sink = Arc::clone(&inbox);
        let channel = session.open_channel(limit, &opening, Some(sink))?;
        let result = self.consume(&channel, &inbox, waker, ready);
        // Closing comes after the acks, and makes the broker requeue what is not settled.
        channel.close(limit);
        result
    }

    fn meter(&self) -> &RouteMeter {
        self.route.meter(&self.shared.name)
    }

    fn limit(&self) -> Duration {
        self.side.settings.broker.operation_timeout
    }

    fn during(&self, what: &str) -> String {
        format!("{what} listener {:?} on queue {:?}", self.shared.name, self.queue)
    }

    fn is_stopped(&self) -> bool {
        self.stop.try_recv() == Err(TryRecvError::Disconnected)
    }

    fn consume(&self, channel: &Channel, inbox: &Inbox, waker: &Arc<Waker>, ready: impl FnOnce()) -> Result<()> {
        let spec = &self.route.spec;
        let mut arguments = Table::default();
        if let Some(priority) = spec.priority {
            arguments = arguments.with("x-priority", Value::I32(priority));
        }
        let subscribing = || self.during("subscription of");
        // Before the consumer: the broker begins to send at once.
        channel.qos(inbox, spec.prefetch, self.limit(), &subscribing)?;
        let consume = Consume { queue: self.queue, exclusive: spec.exclusive, no_ack: false, arguments };
        channel.consume(inbox, consume, self.limit(), &subscribing)?;
        ready();
        let (settle, settles) = unbounded();
        let alive = Arc::new(());
        let mut settling = Settling {
            worker: self,
            channel,
            held: None,
            held_since: None,
            held_count: 0,
            held_acks: 0,
            began: self.epoch,
            most_held: if spec.ack_batch { u32::from(spec.prefetch / 2).max(1) } else { 1 },
            outstanding: BTreeSet::new(),
            deferred: Deferred::default(),
        };
        let claims = Claims { settle: &settle, waker, alive: &alive };
        let mut result = self.handle_all(inbox, &mut settling, &claims, &settles);
        // What has been sent ahead goes back to the queue when the channel is closed.
        let cancelled = match &result {
            Err(Error::ConsumerCancelled { .. }) => Ok(()),
            _ => channel.cancel(inbox, self.limit(), &|| self.during("cancelling of")),
        };
        drop(settle);
        if result.is_ok() {
            result = cancelled.and_then(|()| settling.wait_for_confirms());
            result = result.and_then(|()| settling.wait_for_rest(&settles));
        }
        if result.is_err() {
            settling.tell_of_the_end();
        }
        // Also after a failure: what has been handled need not be handled again. A channel that is gone takes no acks, and
        // the failure says so.
        let flushed = settling.flush();
        result.and(flushed)
    }

    fn handle_all(
        &self,
        inbox: &Inbox,
        settling: &mut Settling<'_>,
        claims: &Claims<'_>,
        settles: &Receiver<Settle>,
    ) -> Result<()> {
        let (connection, listener, queue) = (self.side, self.shared.name.as_str(), self.queue);
        let context = Context { connection, listener, queue, after: RefCell::default() };
        let mut events = VecDeque::new();
        loop {
            if self.is_stopped() {
                return Ok(());
            }
            for request in settles.try_iter() {
                settling.settle_later(request)?;
            }
            let look = settling.settle_confirmed()?;
            if inbox.has_ended() {
                // What has come on it is the broker's again.
                return Err(settling.ending(&self.during("run of")));
            }
            match events.pop_front() {
                Some(Incoming::Delivered(arrived)) => self.handle(&context, arrived, settling, claims)?,
                Some(Incoming::Cancelled) => return Err(Error::ConsumerCancelled { queue: self.queue.to_owned() }),
                // There is nothing else on a channel that only consumes.
                Some(_) => {}
                None => {
                    // Nothing is held back while there is nothing to do.
                    settling.flush()?;
                    if !settling.wait(inbox, claims.waker, look, settles, &mut events) {
                        return Err(settling.ending(&self.during("run of")));
                    }
                }
            }
        }
    }

    fn handle(
        &self,
        context: &Context<'_>,
        arrived: Arrived,
        settling: &mut Settling<'_>,
        claims: &Claims<'_>,
    ) -> Result<()> {
        let counters = &self.shared.counters;
        let tag = arrived.tag;
        let received = retry::welcome_back(Received::from(arrived), self.queue);
        count(&counters.delivered);
        let meter = self.meter();
        meter.deliveries.one();
        let now = Instant::now();
        *counters.last_delivery.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
        let since = u64::try_from(now.saturating_duration_since(self.epoch).as_millis()).unwrap_or(u64::MAX).max(1);
        self.busy.store(since, Ordering::Relaxed);
        settling.began = now;
        let _trace = trace::handling(received.message());
        let (running, began) = (meter.running.one(), Timer::start());
        let done = || {
            let _running = running;
            meter.handler.record(began);
            let took = u64::try_from(now.elapsed().as_millis()).unwrap_or(u64::MAX);
            self.slowest.fetch_max(took, Ordering::Relaxed);
        };
        let result = match &self.route.handler {
            Handler::Auto(handler) => {
                let delivery = Delivery::shown(received);
                let outcome = match catch_unwind(AssertUnwindSafe(|| handler(context, &delivery))) {
                    Ok(outcome) => outcome,
                    Err(panic) => self.panicked(&delivery, panic),
                };
                done();
                match (context.after.take(), outcome) {
                    (Some(after), Outcome::Ack) => {
                        settling.deferred.push(tag, delivery.into_received(), after);
                        Ok(())
                    }
                    (_, outcome) if settling.deferred.is_empty() => settling.settle(tag, &delivery, outcome),
                    (_, outcome) => {
                        settling.deferred.push_known(tag, delivery.into_received(), outcome);
                        Ok(())
                    }
                }
            }
            Handler::Manual(handler) => {
                settling.outstanding.insert(tag);
                let id = received.message().message_id().map(str::to_owned);
                let claim = (claims.settle.clone(), Arc::clone(claims.waker));
                let unsettled = Unsettled::new(received, claim, Arc::downgrade(claims.alive), tag);
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| handler(context, unsettled))) {
                    self.log_panic(id.as_deref(), panic);
                }
                done();
                Ok(())
            }
        };
        self.busy.store(0, Ordering::Relaxed);
        result
    }

    fn panicked(&self, delivery: &Received, panic: Box<dyn std::any::Any + Send>) -> Outcome {
        let text = panic_text(&*panic).to_owned();
        self.log_panic(delivery.message().message_id(), panic);
        Outcome::Failed(format!("the handler panicked: {text}"))
    }

    fn log_panic(&self, message_id: Option<&str>, panic: Box<dyn std::any::Any + Send>) {
        count(&self.shared.counters.panicked);
        self.meter().panics.one();
        log::error!(
            listener = self.shared.name.as_str(), queue = self.queue, message_id = message_id.unwrap_or_default();
            "listener {:?}: the handler of a message from queue {:?}, id {message_id:?}, panicked: {}",
            self.shared.name,
            self.queue,
            panic_text(&*panic)
        );
        // What was thrown may throw again when it is dropped.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(panic)));
    }
}

/// What deliveries are given that their handler settles by itself.
struct Claims<'a> {
    settle: &'a Sender<Settle>,
    waker: &'a Arc<Waker>,
    /// Ends with the session.
    alive: &'a Arc<()>,
}

/// Settles deliveries of one channel, acks of several in one go where that is wanted.
struct Settling<'a> {
    worker: &'a Worker<'a>,
    channel: &'a Channel,
    /// The last of the deliveries to be acked, all of which are the oldest that are not settled.
    held: Option<u64>,
    /// When the handler of the first of them began.
    held_since: Option<Instant>,
    held_count: u32,
    /// How many of them count as acked; the others have been put away.
    held_acks: u64,
    /// When the last handler began.
    began: Instant,
    most_held: u32,
    /// Tags of deliveries that their handler settles by itself.
    outstanding: BTreeSet<u64>,
    deferred: Deferred,
}

impl Settling<'_> {
    fn ending(&self, during: &str) -> Error {
        self.channel.ending(during)
    }

    fn send(&self, tag: u64, settlement: Settlement) -> Result<()> {
        let worker = self.worker;
        let during = || worker.during("settling for");
        // In a slow handler the channel may have ended, and nobody has looked.
        let is_hurried = self.began.elapsed() >= LONGEST_HOLD;
        self.channel.settle(tag, settlement, is_hurried, &during)
    }

    fn settle(&mut self, tag: u64, received: &Received, outcome: Outcome) -> Result<()> {
        let counters = &self.worker.shared.counters;
        let (reason, try_again) = match outcome {
            Outcome::Ack => return self.ack(tag),
            Outcome::Reject => return self.reject(tag),
            Outcome::Requeue => return self.requeue(tag),
            Outcome::Retry => ("the handler asked for another attempt".to_owned(), true),
            Outcome::Failed(reason) => (reason, true),
            Outcome::Undecodable(reason) => (reason, false),
        };
        let worker = self.worker;
        let (listener, queue, id) = (worker.shared.name.as_str(), worker.queue, received.message().message_id());
        let message_id = id.unwrap_or_default();
        let message = format!("listener {listener:?}: message from queue {queue:?}, id {id:?}: {reason}");
        let spec = &worker.route.spec;
        let policy = match &spec.retry {
            Some(policy) => try_again.then_some(policy),
            None if !try_again && spec.keeps_undecodable => None,
            None if try_again && !received.redelivered() => {
                log::warn!(listener, queue, message_id, outcome = "requeued"; "{message}; it is requeued once");
                return self.requeue(tag);
            }
            None => {
                log::error!(listener, queue, message_id, outcome = "rejected"; "{message}; it is rejected");
                return self.reject(tag);
            }
        };
        let gone = retry::put_away(worker.side, worker.queue, policy, received, &reason)?;
        match gone {
            Gone::ToWait => {
                log::warn!(listener, queue, message_id, outcome = "retried"; "{message}; it is tried again later");
                count(&counters.retried);
                worker.meter().retried.one();
            }
            Gone::ToTheDead | Gone::BareToTheDead => {
                let dead_queue = retry::dead_queue(queue);
                let bare = match gone {
                    Gone::BareToTheDead => "; its headers leave no room to say why there",
                    _ => "",
                };
                log::error!(
                    listener, queue, message_id, outcome = "dead";
                    "{message}; it is in queue {dead_queue:?} now{bare}"
                );
                count(&counters.dead);
                worker.meter().dead.one();
            }
        }
        self.hold(tag)
    }

    fn ack(&mut self, tag: u64) -> Result<()> {
        self.held_acks += 1;
        self.hold(tag)
    }

    fn hold(&mut self, tag: u64) -> Result<()> {
        let since = *self.held_since.get_or_insert(self.began);
        self.held = Some(tag);
        self.held_count += 1;
        // A slow handler must not keep acks until the broker takes their messages back.
        if self.held_count >= self.most_held || since.elapsed() >= LONGEST_HOLD { self.flush() } else { Ok(()) }
    }

    // What follows is counted once it is sent: on a channel that has ended, the broker delivers the message again.

    fn reject(&mut self, tag: u64) -> Result<()> {
        self.send(tag, Settlement::Reject)?;
        count(&self.worker.shared.counters.rejected);
        self.worker.meter().rejected.one();
        Ok(())
    }

    fn requeue(&mut self, tag: u64) -> Result<()> {
        self.send(tag, Settlement::Requeue)?;
        count(&self.worker.shared.counters.requeued);
        self.worker.meter().requeued.one();
        Ok(())
    }

    fn has_acked(&self, deliveries: u64) {
        self.worker.shared.counters.acked.fetch_add(deliveries, Ordering::Relaxed);
        self.worker.meter().acked.add(deliveries);
    }

    /// Sends the acks that are held back.
    fn flush(&mut self) -> Result<()> {
        let several = std::mem::take(&mut self.held_count) > 1;
        let acks = std::mem::take(&mut self.held_acks);
        self.held_since = None;
        match self.held.take() {
            Some(tag) if several => self.send(tag, Settlement::AckUpTo)?,
            Some(tag) => self.send(tag, Settlement::Ack)?,
            None => {}
        }
        self.has_acked(acks);
        Ok(())
    }

    /// Settles a delivery at its handler's request. One that an `ack_up_to` has covered is settled already.
    fn settle_later(&mut self, Settle { how, tag }: Settle) -> Result<()> {
        if !self.outstanding.remove(&tag) {
            return Ok(());
        }
        match how {
            Settlement::Ack => {
                self.send(tag, Settlement::Ack)?;
                self.has_acked(1);
                Ok(())
            }
            Settlement::AckUpTo => {
                let later = self.outstanding.split_off(&tag);
                let covered = std::mem::replace(&mut self.outstanding, later).len() as u64 + 1;
                self.send(tag, Settlement::AckUpTo)?;
                self.has_acked(covered);
                Ok(())
            }
            Settlement::Reject => self.reject(tag),
            Settlement::Requeue => self.requeue(tag),
        }
    }

    /// Waits for something to do, in `events` or elsewhere; false if the connection has ended.
    fn wait(
        &self,
        inbox: &Inbox,
        waker: &Waker,
        look: Option<Instant>,
        settles: &Receiver<Settle>,
        events: &mut VecDeque<Incoming>,
    ) -> bool {
        let worker = self.worker;
        let until = look.unwrap_or_else(|| Instant::now() + LONGEST_WAIT);
        let awaited = self.deferred.first().cloned();
        let is_due = || {
            let is_confirmed = awaited.as_ref().is_some_and(|call| call.open() == 0);
            (is_confirmed || worker.is_stopped() || !settles.is_empty()).then_some(())
        };
        worker.side.with_publish_waiters(|waiters| {
            let others: Vec<_> = waiters.filter(|_| awaited.is_some()).into_iter().collect();
            self.channel.listen(inbox, Some(waker), &others, until, events, is_due);
        });
        worker.side.is_alive() || !events.is_empty()
    }

    /// Settles what waited for confirms that are there. Returns by when to look again, if something still waits.
    fn settle_confirmed(&mut self) -> Result<Option<Instant>> {
        if self.deferred.is_empty() {
            return Ok(None);
        }
        let look = self.worker.side.look_after_publishes();
        self.settle_known()?;
        Ok(self.deferred.first().map(|_| look))
    }

    fn settle_known(&mut self) -> Result<()> {
        while let Some((tag, received, outcome)) = self.deferred.pop(self.worker.side) {
            self.settle(tag, &received, outcome)?;
        }
        Ok(())
    }

    /// The session has failed. Settles what it can, and tells who waited for a confirm that will not come: it may be why.
    fn tell_of_the_end(&mut self) {
        let side = self.worker.side;
        side.look_after_publishes();
        while let Some((tag, received, outcome)) = self.deferred.pop(side) {
            // On a channel that is gone this does nothing, and the broker delivers it again.
            let _ = self.settle(tag, &received, outcome);
        }
    }

    /// Waits for the confirms that deliveries wait for, each until its deadline.
    fn wait_for_confirms(&mut self) -> Result<()> {
        while let Some(call) = self.deferred.first().cloned() {
            self.wait_for_confirm(&call)?;
        }
        Ok(())
    }

    fn wait_for_confirm(&mut self, call: &Call) -> Result<()> {
        let side = self.worker.side;
        side.wait_for(call, Instant::now() + side.settings.confirm_timeout);
        self.settle_known()
    }

    /// Waits a while for deliveries that their handlers have not settled.
    fn wait_for_rest(&mut self, settles: &Receiver<Settle>) -> Result<()> {
        let deadline = Instant::now() + MANUAL_GRACE;
        while !self.outstanding.is_empty() {
            match settles.recv_deadline(deadline) {
                Ok(request) => self.settle_later(request)?,
                Err(_) => break,
            }
        }
        Ok(())
    }
}
