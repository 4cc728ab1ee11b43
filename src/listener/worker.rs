//! One thread of a session: a channel, a consumer, and what becomes of each delivery.

use std::any::Any;
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError, unbounded};

use super::batch;
use super::deferred::Deferred;
use super::in_place::Again;
use super::post::Post;
use super::retry;
use super::route::{AutoHandler, Handler, SingleHandler};
use super::settling::Settling;
use super::stream::Position;
use super::unsettled::{Settle, Unsettled};
use super::{Context, Route, Shared};
use crate::amqp::value::{Table, Value};
use crate::connection::{Connection, Delivery, Received};
use crate::error::{Error, Result, counted, panic_text};
use crate::metrics::meter::{Level, RouteMeter, Timer};
use crate::outcome::Outcome;
use crate::session::{Arrived, Channel, Consume, Endings, Inbox, Incoming, Sink, Waker};
use crate::trace;

/// One thread of a session.
pub(super) struct Worker<'a> {
    pub(super) shared: &'a Shared,
    pub(super) post: &'a Post<'a>,
    /// The channels that handlers publish on.
    pub(super) side: &'a Connection,
    /// Ends when the run is to end; the waker wakes the thread then.
    pub(super) stop: &'a Receiver<()>,
    pub(super) epoch: Instant,
    /// To be told when the consumer is gone, also while the handler is busy.
    pub(super) lost: &'a Sender<Lost>,
}

/// What has become of a consumer.
#[derive(Debug)]
pub(super) enum Lost {
    /// Its channel has ended, or its connection.
    Ended,
    /// The broker has ended it, on this queue.
    Cancelled(String),
}

/// An inbox that tells of its end.
struct Watched {
    inbox: Arc<Inbox>,
    queue: String,
    lost: Sender<Lost>,
    /// Then its end is no surprise.
    is_retiring: Arc<AtomicBool>,
}

impl Sink for Watched {
    fn take(&self, incoming: Incoming) {
        if let Incoming::Cancelled = incoming {
            // Full: there is a reason already.
            let _ = self.lost.try_send(Lost::Cancelled(self.queue.clone()));
        }
        self.inbox.take(incoming);
    }

    fn ended(&self) {
        if !self.is_retiring.load(Ordering::SeqCst) {
            let _ = self.lost.try_send(Lost::Ended);
        }
        self.inbox.ended();
    }
}

impl Worker<'_> {
    /// Listens until told to stop (`Ok`) or until something comes in the way; calls `ready` once there is a consumer.
    pub(super) fn run(&self, ready: impl FnOnce(Endings)) -> Result<()> {
        let (limit, session) = (self.limit(), &self.side.session);
        let opening = || self.during("opening of a channel for");
        let waker = Arc::new(session.waker(&opening)?);
        let inbox = Arc::<Inbox>::default();
        self.post.occupy(&waker, &inbox);
        let sink = Watched {
            inbox: Arc::clone(&inbox),
            queue: self.queue().to_owned(),
            lost: self.lost.clone(),
            is_retiring: Arc::clone(&self.post.is_retiring),
        };
        let channel = session.open_channel(limit, &opening, Some(Arc::new(sink)))?;
        let result = self.consume(&channel, &inbox, &waker, ready);
        // Closing comes after the acks, and makes the broker requeue what is not settled.
        channel.close(limit);
        result
    }

    pub(super) fn route(&self) -> &Route {
        self.post.route
    }

    pub(super) fn queue(&self) -> &str {
        self.post.queue
    }

    pub(super) fn is_partition(&self) -> bool {
        self.route().is_partition()
    }

    pub(super) fn meter(&self) -> &RouteMeter {
        self.route().meter(&self.shared.name)
    }

    fn limit(&self) -> Duration {
        self.side.settings.broker.operation_timeout
    }

    pub(super) fn during(&self, what: &str) -> String {
        format!("{what} listener {:?} on queue {:?}", self.shared.name, self.queue())
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stop.try_recv() == Err(TryRecvError::Disconnected) || self.shared.pauses.is_run_over()
    }

    fn consume(&self, channel: &Channel, inbox: &Inbox, waker: &Arc<Waker>, ready: impl FnOnce(Endings)) -> Result<()> {
        let spec = &self.route().spec;
        let mut arguments = Table::from(&spec.arguments);
        if let Some(priority) = spec.priority {
            arguments = arguments.with("x-priority", Value::I32(priority));
        }
        if let Some(position) = &self.route().position {
            let (name, offset) = position.argument()?;
            arguments = arguments.with(name, (&offset).into());
        }
        let subscribing = || self.during("subscription of");
        // Before the consumer: the broker begins to send at once.
        channel.qos(inbox, self.post.prefetch, self.limit(), &subscribing)?;
        let consume = Consume { queue: self.queue(), exclusive: spec.exclusive, no_ack: false, arguments };
        channel.consume(inbox, consume, self.limit(), &subscribing)?;
        ready(channel.endings());
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
            most_held: match &self.route().handler {
                Handler::Batch(handler) => handler.max.into(),
                _ if spec.ack_batch => u32::from(self.post.prefetch / 2).max(1),
                _ => 1,
            },
            outstanding: BTreeMap::new(),
            last_offset: None,
            deferred: Deferred::default(),
            is_draining: false,
            has_failed: false,
        };
        let claims = Claims { settle: &settle, waker, alive: &alive };
        let mut result = match &self.route().handler {
            Handler::Batch(handler) => batch::handle_all(self, handler, inbox, &mut settling, waker, &settles),
            Handler::Single(handler) => self.handle_all(handler, inbox, &mut settling, &claims, &settles),
        };
        // What has been sent ahead goes back to the queue when the channel is closed. In a partition that comes first: once a
        // consumer is canceled, another one has what comes after it.
        let cancelled = match &result {
            _ if self.is_partition() => Ok(()),
            Err(Error::ConsumerCancelled { .. }) => Ok(()),
            _ if settling.is_draining => Ok(()),
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
        settling.store_offset(true);
        result.and(flushed)
    }

    fn handle_all(
        &self,
        handler: &SingleHandler,
        inbox: &Inbox,
        settling: &mut Settling<'_>,
        claims: &Claims<'_>,
        settles: &Receiver<Settle>,
    ) -> Result<()> {
        let (connection, listener, queue) = (self.side, self.shared.name.as_str(), self.queue());
        let context = Context { connection, listener, queue, after: RefCell::default() };
        let mut events = VecDeque::new();
        // When the next message is to be handled, if it is not yet.
        let mut turn = None;
        // A message that has failed in its partition and is tried again before any other.
        let mut again: Option<Again> = None;
        loop {
            if self.is_stopped() || self.is_partition() && self.post.is_retiring() {
                return Ok(());
            }
            self.drain_if_retiring(inbox, settling)?;
            for request in settles.try_iter() {
                settling.settle_later(request)?;
            }
            let look = settling.settle_confirmed()?;
            if inbox.has_ended() {
                // What has come on it is the broker's again.
                return Err(settling.ending(&self.during("run of")));
            }
            if let Some(due) = again.as_ref().map(|again| again.due)
                && due > Instant::now()
            {
                settling.flush()?;
                let until = look.map_or(due, |look| look.min(due));
                self.wait(inbox, claims.waker, Some(until), settling, settles, &mut events)?;
                continue;
            }
            if let (Some(Again { tag, received, failures, .. }), SingleHandler::Auto(handler)) = (again.take(), handler)
            {
                again = self.call(handler, &context, tag, received, failures, settling)?;
                continue;
            }
            if let Some(rate) = &self.route().rate
                && let Some(Incoming::Delivered(_)) = events.front()
            {
                let now = Instant::now();
                let due = *turn.get_or_insert_with(|| rate.reserve(1, now));
                if due > now {
                    let until = look.map_or(due, |look| look.min(due));
                    settling.flush()?;
                    self.wait(inbox, claims.waker, Some(until), settling, settles, &mut events)?;
                    continue;
                }
                turn = None;
            }
            match events.pop_front() {
                Some(Incoming::Delivered(arrived)) => {
                    self.looks_ahead(&events);
                    again = self.handle(handler, &context, arrived, settling, claims)?;
                }
                Some(Incoming::Cancelled) => return Err(Error::ConsumerCancelled { queue: self.queue().to_owned() }),
                // There is nothing else on a channel that only consumes.
                Some(_) => {}
                None => {
                    // Nothing is held back while there is nothing to do.
                    settling.flush()?;
                    if settling.is_draining && settling.is_done() && inbox.is_empty() {
                        return Ok(());
                    }
                    self.wait(inbox, claims.waker, look, settling, settles, &mut events)?;
                }
            }
        }
    }

    /// Waits for something to do, and adds what has come to `events`.
    pub(super) fn wait(
        &self,
        inbox: &Inbox,
        waker: &Waker,
        look: Option<Instant>,
        settling: &Settling<'_>,
        settles: &Receiver<Settle>,
        events: &mut VecDeque<Incoming>,
    ) -> Result<()> {
        settling.store_offset(false);
        let look = look.into_iter().chain(self.route().position.as_ref().and_then(Position::due)).min();
        if let Some(idle) = &self.post.idle {
            idle.begin(self.microseconds());
        }
        let is_alive = if events.is_empty() {
            settling.wait(inbox, waker, look, settles, events)
        } else {
            // What is there already is no reason not to wait.
            let mut came = VecDeque::new();
            let is_alive = settling.wait(inbox, waker, look, settles, &mut came);
            events.append(&mut came);
            is_alive
        };
        if let Some(idle) = &self.post.idle {
            idle.end(self.microseconds());
        }
        if is_alive { Ok(()) } else { Err(settling.ending(&self.during("run of"))) }
    }

    fn microseconds(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Notes what comes after the message that is handled next.
    pub(super) fn looks_ahead(&self, events: &VecDeque<Incoming>) {
        if self.post.idle.is_some() {
            self.post.ahead.store(events.len(), Ordering::Relaxed);
        }
    }

    /// Takes no more messages if it is to retire. Those that have come are handled.
    pub(super) fn drain_if_retiring(&self, inbox: &Inbox, settling: &mut Settling<'_>) -> Result<()> {
        if settling.is_draining || !self.post.is_retiring() {
            return Ok(());
        }
        settling.is_draining = true;
        settling.channel.cancel(inbox, self.limit(), &|| self.during("cancelling of"))
    }

    fn handle(
        &self,
        handler: &SingleHandler,
        context: &Context<'_>,
        arrived: Arrived,
        settling: &mut Settling<'_>,
        claims: &Claims<'_>,
    ) -> Result<Option<Again>> {
        let tag = arrived.tag;
        let received = self.receive(arrived);
        match handler {
            SingleHandler::Auto(handler) => self.call(handler, context, tag, received, 0, settling),
            SingleHandler::Manual(handler) => {
                let handling = self.begin(1, settling);
                let _trace = trace::handling(received.message());
                let offset = self.route().position.as_ref().and_then(|_| received.stream_offset());
                settling.outstanding.insert(tag, offset);
                settling.last_offset = offset.or(settling.last_offset);
                let id = received.message().message_id().map(str::to_owned);
                let claim = (claims.settle.clone(), Arc::clone(claims.waker));
                let unsettled = Unsettled::new(received, claim, Arc::downgrade(claims.alive), tag);
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| handler(context, unsettled))) {
                    self.log_panic(At::Message(id.as_deref()), panic);
                }
                handling.done();
                self.post.busy.store(0, Ordering::Relaxed);
                Ok(None)
            }
        }
    }

    /// Calls a handler with a message that it has failed with so many times.
    fn call(
        &self,
        handler: &AutoHandler,
        context: &Context<'_>,
        tag: u64,
        received: Received,
        failures: u32,
        settling: &mut Settling<'_>,
    ) -> Result<Option<Again>> {
        let handling = self.begin(1, settling);
        let _trace = trace::handling(received.message());
        let delivery = Delivery::shown(received);
        let outcome = match catch_unwind(AssertUnwindSafe(|| handler(context, &delivery))) {
            Ok(outcome) => outcome,
            Err(panic) => self.panicked(At::Message(delivery.message().message_id()), panic),
        };
        handling.done();
        let result = match (context.after.take(), outcome) {
            (_, outcome) if self.is_partition() && outcome.failure().is_some() => {
                self.failed_in_place(tag, delivery.into_received(), failures.saturating_add(1), &outcome, settling)
            }
            (Some(after), Outcome::Ack) => {
                settling.deferred.push(tag, delivery.into_received(), after);
                Ok(None)
            }
            (_, outcome) if settling.deferred.is_empty() => settling.settle(tag, &delivery, outcome).map(|()| None),
            (_, outcome) => {
                settling.deferred.push_known(tag, delivery.into_received(), outcome);
                Ok(None)
            }
        };
        self.post.busy.store(0, Ordering::Relaxed);
        result
    }

    /// A message as its handler is to see it.
    pub(super) fn receive(&self, arrived: Arrived) -> Received {
        let received = Received::from(arrived);
        if self.is_partition() {
            self.route().activate(&self.shared.name);
        }
        self.warn_of_delivery_limit(&received);
        retry::welcome_back(received, self.queue())
    }

    /// Notes that the handler is given so many deliveries now.
    pub(super) fn begin(&self, deliveries: u64, settling: &mut Settling<'_>) -> Handling<'_> {
        let (counters, meter) = (&self.shared.counters, self.meter());
        counters.delivered.fetch_add(deliveries, Ordering::Relaxed);
        meter.deliveries.add(deliveries);
        let since = Instant::now();
        *counters.last_delivery.lock().unwrap_or_else(PoisonError::into_inner) = Some(since);
        self.post.busy.store(self.since_epoch(since), Ordering::Relaxed);
        settling.began = since;
        Handling { slowest: &self.post.slowest, meter, _running: meter.running.one(), since, timer: Timer::start() }
    }

    /// A quorum queue gives a message up that has come back too often. Says so in the last quarter of the way there.
    fn warn_of_delivery_limit(&self, received: &Received) {
        let Some(count) = received.message().header_i64("x-delivery-count").and_then(|count| u64::try_from(count).ok())
        else {
            return;
        };
        let Some(limit) = self.route().spec.delivery_limit().on(self.side.server_version()) else { return };
        if count + limit / 4 < limit {
            return;
        }
        let (listener, queue, id) = (self.shared.name.as_str(), self.queue(), received.message().message_id());
        let message_id = id.unwrap_or_default();
        log::warn!(
            listener, queue, message_id;
            "listener {listener:?}: message from queue {queue:?}, id {id:?}, has come back {count} times; after {limit} the \
             broker dead-letters it, or drops it (x-delivery-limit of a quorum queue)"
        );
    }

    /// In milliseconds, and never 0.
    pub(super) fn since_epoch(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.epoch).as_millis()).unwrap_or(u64::MAX).max(1)
    }

    /// The outcome of a handler that has panicked.
    pub(super) fn panicked(&self, at: At<'_>, panic: Box<dyn Any + Send>) -> Outcome {
        let text = panic_text(&*panic).to_owned();
        self.log_panic(at, panic);
        Outcome::Failed(format!("the handler panicked: {text}"))
    }

    fn log_panic(&self, at: At<'_>, panic: Box<dyn Any + Send>) {
        let (listener, queue, text) = (self.shared.name.as_str(), self.queue(), panic_text(&*panic));
        let (deliveries, message_id, whose) = match at {
            At::Message(id) => (1, id.unwrap_or_default(), format!("a message from queue {queue:?}, id {id:?},")),
            At::Batch(size) => (size, "", format!("{} from queue {queue:?}", counted(size, "message"))),
        };
        self.shared.counters.panicked.fetch_add(deliveries as u64, Ordering::Relaxed);
        self.meter().panics.one();
        log::error!(
            listener, queue, message_id;
            "listener {listener:?}: the handler of {whose} panicked: {text}"
        );
        // What was thrown may throw again when it is dropped.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(panic)));
    }
}

/// A handler is running.
pub(super) struct Handling<'a> {
    slowest: &'a AtomicU64,
    meter: &'a RouteMeter,
    _running: Level,
    since: Instant,
    timer: Timer,
}

impl Handling<'_> {
    /// Notes how long it took.
    pub(super) fn done(self) {
        self.meter.handler.record(self.timer);
        let took = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.slowest.fetch_max(took, Ordering::Relaxed);
    }
}

/// What a handler was at.
pub(super) enum At<'a> {
    /// A message, with its id.
    Message(Option<&'a str>),
    /// So many messages.
    Batch(usize),
}

/// What deliveries are given that their handler settles by itself.
struct Claims<'a> {
    settle: &'a Sender<Settle>,
    waker: &'a Arc<Waker>,
    /// Ends with the session.
    alive: &'a Arc<()>,
}
