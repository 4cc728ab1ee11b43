//! One thread of a session: a channel, a consumer, and what becomes of each delivery.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use amiquip::{AmqpValue, Confirm, ConsumerMessage, ConsumerOptions};
use crossbeam_channel::{Receiver, Sender, TryRecvError, never, select_biased, unbounded};

use super::builder::Handler;
use super::deferred::Deferred;
use super::unsettled::{Settle, Unsettled};
use super::{Context, Route, Shared, count};
use crate::callback::panic_text;
use crate::confirms::Call;
use crate::connection::Connection;
use crate::delivery::{Delivery, Received};
use crate::error::{Error, Result};
use crate::frames::Settlement;
use crate::link::{OpenChannel, cancel};
use crate::meter::{RouteMeter, Timer};
use crate::outcome::Outcome;
use crate::retry::{self, Gone};
use crate::trace;

/// How long a stop waits for deliveries that their handler settles by itself.
const MANUAL_GRACE: Duration = Duration::from_secs(5);

/// How long an ack is held back at most, beyond the handler that is running.
const LONGEST_HOLD: Duration = Duration::from_millis(100);

pub(super) struct Worker<'a> {
    pub(super) shared: &'a Shared,
    pub(super) route: &'a Route,
    pub(super) queue: &'a str,
    /// The channels that handlers publish on.
    pub(super) side: &'a Connection,
    /// Ends when the session is to end.
    pub(super) stop: &'a Receiver<()>,
    /// When the delivery in hand came, in milliseconds since `epoch`; 0 if there is none.
    pub(super) busy: &'a AtomicU64,
    pub(super) epoch: Instant,
}

impl Worker<'_> {
    /// Listens until told to stop (`Ok`) or until something comes in the way; calls `ready` once there is a consumer.
    pub(super) fn run(&self, ready: impl FnOnce()) -> Result<()> {
        let limit = self.limit();
        let open = self.side.link.open_channel(limit, &|| self.during("open a channel for"))?;
        let result = self.consume(&open, ready);
        // Closing comes after the acks, and makes the broker requeue what is not settled.
        open.close(&self.side.link, limit);
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

    fn consume(&self, open: &OpenChannel, ready: impl FnOnce()) -> Result<()> {
        let spec = &self.route.spec;
        let mut options = ConsumerOptions { exclusive: spec.exclusive, ..ConsumerOptions::default() };
        if let Some(priority) = spec.priority {
            options.arguments.insert("x-priority".to_owned(), AmqpValue::LongInt(priority));
        }
        let link = &self.side.link;
        let consumer = link.call(self.limit(), &|| self.during("subscribe"), Some(open.id), || {
            // Before the consumer: the broker begins to send at once.
            open.channel.qos(0, spec.prefetch, false)?;
            open.channel.basic_consume(self.queue, options)
        })?;
        ready();
        let (settle, settles) = unbounded();
        let alive = Arc::new(());
        let mut settling = Settling {
            worker: self,
            open,
            held: None,
            held_since: None,
            held_count: 0,
            most_held: if spec.ack_batch { u32::from(spec.prefetch / 2).max(1) } else { 1 },
            outstanding: BTreeSet::new(),
            deferred: Deferred::default(),
        };
        let mut result =
            self.handle_all(consumer.receiver(), &mut settling, &Claims { settle: &settle, alive: &alive }, &settles);
        // What has been sent ahead goes back to the queue when the channel is closed.
        let cancelled =
            link.call(self.limit(), &|| self.during("cancel"), Some(open.id), || cancel(&consumer)).map(drop);
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
        deliveries: &Receiver<ConsumerMessage>,
        settling: &mut Settling<'_>,
        claims: &Claims<'_>,
        settles: &Receiver<Settle>,
    ) -> Result<()> {
        let (connection, listener, queue) = (self.side, self.shared.name.as_str(), self.queue);
        let context = Context { connection, listener, queue, after: RefCell::default() };
        loop {
            if self.stop.try_recv() == Err(TryRecvError::Disconnected) {
                return Ok(());
            }
            for request in settles.try_iter() {
                settling.settle_later(request)?;
            }
            let (confirms, look) = settling.settle_confirmed()?;
            let event = match deliveries.try_recv() {
                Ok(event) => Ok(event),
                Err(TryRecvError::Disconnected) => Err(()),
                Err(TryRecvError::Empty) => {
                    // Nothing is held back while there is nothing to do.
                    settling.flush()?;
                    select_biased! {
                        recv(self.stop) -> _ => return Ok(()),
                        recv(settles) -> request => {
                            if let Ok(request) = request {
                                settling.settle_later(request)?;
                            }
                            continue;
                        }
                        recv(deliveries) -> event => event.map_err(drop),
                        recv(confirms) -> confirm => {
                            self.side.answered(confirm.ok());
                            continue;
                        }
                        default(look) => continue,
                    }
                }
            };
            match event {
                Ok(ConsumerMessage::Delivery(delivery)) => self.handle(&context, delivery, settling, claims)?,
                Ok(ConsumerMessage::ServerCancelled) => {
                    return Err(Error::ConsumerCancelled { queue: self.queue.to_owned() });
                }
                Ok(
                    ConsumerMessage::ServerClosedChannel(_)
                    | ConsumerMessage::ServerClosedConnection(_)
                    | ConsumerMessage::ClientCancelled
                    | ConsumerMessage::ClientClosedChannel
                    | ConsumerMessage::ClientClosedConnection,
                )
                | Err(()) => return Err(settling.ending(&self.during("run"))),
            }
        }
    }

    fn handle(
        &self,
        context: &Context<'_>,
        mut tag: amiquip::Delivery,
        settling: &mut Settling<'_>,
        claims: &Claims<'_>,
    ) -> Result<()> {
        let counters = &self.shared.counters;
        let received = retry::welcome_back(Received::take_from(&mut tag, None));
        count(&counters.delivered);
        let meter = self.meter();
        meter.deliveries.one();
        *counters.last_delivery.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        let now = u64::try_from(self.epoch.elapsed().as_millis()).unwrap_or(u64::MAX).max(1);
        self.busy.store(now, Ordering::Relaxed);
        let _trace = trace::handling(received.message());
        let (running, began) = (meter.running.one(), Timer::start());
        let done = || {
            let _running = running;
            meter.handler.record(began);
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
                settling.outstanding.insert(tag.delivery_tag());
                let id = received.message().message_id().map(str::to_owned);
                let unsettled = Unsettled::new(received, claims.settle.clone(), Arc::downgrade(claims.alive), tag);
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
    /// Ends with the session.
    alive: &'a Arc<()>,
}

/// Settles deliveries of one channel, acks of several in one go where that is wanted.
struct Settling<'a> {
    worker: &'a Worker<'a>,
    open: &'a OpenChannel,
    /// The last of the deliveries to be acked, all of which are the oldest that are not settled.
    held: Option<amiquip::Delivery>,
    /// When the first of them was.
    held_since: Option<Instant>,
    held_count: u32,
    most_held: u32,
    /// Tags of deliveries that their handler settles by itself.
    outstanding: BTreeSet<u64>,
    deferred: Deferred,
}

impl Settling<'_> {
    fn ending(&self, during: &str) -> Error {
        self.worker.side.link.channel_ending(self.open.id, during)
    }

    fn send(&self, tag: amiquip::Delivery, settlement: Settlement) -> Result<()> {
        let worker = self.worker;
        let during = || worker.during("settle for");
        self.open.settle(&worker.side.link, worker.limit(), &during, tag, settlement)
    }

    fn settle(&mut self, tag: amiquip::Delivery, received: &Received, outcome: Outcome) -> Result<()> {
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
        let gone = match retry::put_away(worker.side, worker.queue, policy, received, &reason) {
            Ok(gone) => gone,
            // A copy that cannot be made can never be made: its headers leave no room for ours.
            Err(error @ Error::InvalidArgument { .. }) => {
                log::error!(
                    listener, queue, message_id, outcome = "rejected";
                    "{message}; it is rejected, for it cannot be put away: {error}"
                );
                return self.reject(tag);
            }
            Err(error) => return Err(error),
        };
        match gone {
            Gone::ToWait => {
                log::warn!(listener, queue, message_id, outcome = "retried"; "{message}; it is tried again later");
                count(&counters.retried);
                worker.meter().retried.one();
            }
            Gone::ToTheDead => {
                let dead_queue = retry::dead_queue(queue);
                log::error!(
                    listener, queue, message_id, outcome = "dead";
                    "{message}; it is in queue {dead_queue:?} now"
                );
                count(&counters.dead);
                worker.meter().dead.one();
            }
        }
        self.hold(tag)
    }

    fn ack(&mut self, tag: amiquip::Delivery) -> Result<()> {
        count(&self.worker.shared.counters.acked);
        self.worker.meter().acked.one();
        self.hold(tag)
    }

    fn hold(&mut self, tag: amiquip::Delivery) -> Result<()> {
        let since = *self.held_since.get_or_insert_with(Instant::now);
        self.held = Some(tag);
        self.held_count += 1;
        // A slow handler must not keep acks until the broker takes their messages back.
        if self.held_count >= self.most_held || since.elapsed() >= LONGEST_HOLD { self.flush() } else { Ok(()) }
    }

    fn reject(&mut self, tag: amiquip::Delivery) -> Result<()> {
        count(&self.worker.shared.counters.rejected);
        self.worker.meter().rejected.one();
        self.send(tag, Settlement::Reject)
    }

    fn requeue(&mut self, tag: amiquip::Delivery) -> Result<()> {
        count(&self.worker.shared.counters.requeued);
        self.worker.meter().requeued.one();
        self.send(tag, Settlement::Requeue)
    }

    /// Sends the acks that are held back.
    fn flush(&mut self) -> Result<()> {
        let several = std::mem::take(&mut self.held_count) > 1;
        self.held_since = None;
        match self.held.take() {
            Some(tag) if several => self.send(tag, Settlement::AckUpTo),
            Some(tag) => self.send(tag, Settlement::Ack),
            None => Ok(()),
        }
    }

    /// Settles a delivery at its handler's request. One that an `ack_up_to` has covered is settled already.
    fn settle_later(&mut self, Settle { how, tag }: Settle) -> Result<()> {
        let number = tag.delivery_tag();
        if !self.outstanding.remove(&number) {
            return Ok(());
        }
        let counters = &self.worker.shared.counters;
        match how {
            Settlement::Ack => {
                count(&counters.acked);
                self.worker.meter().acked.one();
                self.send(tag, Settlement::Ack)
            }
            Settlement::AckUpTo => {
                let later = self.outstanding.split_off(&number);
                let covered = std::mem::replace(&mut self.outstanding, later).len() as u64 + 1;
                counters.acked.fetch_add(covered, Ordering::Relaxed);
                self.worker.meter().acked.add(covered);
                self.send(tag, Settlement::AckUpTo)
            }
            Settlement::Reject => self.reject(tag),
            Settlement::Requeue => self.requeue(tag),
        }
    }

    /// Settles what waited for confirms that are there. Returns where the next ones come in, and how long to wait for them.
    fn settle_confirmed(&mut self) -> Result<(Receiver<Confirm>, Duration)> {
        let side = self.worker.side;
        while let Some(call) = self.deferred.first().cloned() {
            let Some((confirms, look)) = side.answers() else {
                // A handler has published asynchronously, and another thread reads the answers.
                self.wait_for_confirm(&call)?;
                continue;
            };
            self.settle_known()?;
            if self.deferred.first().is_some_and(|first| Arc::ptr_eq(first, &call)) {
                return Ok((confirms, look.saturating_duration_since(Instant::now())));
            }
        }
        Ok((never(), Duration::MAX))
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
        side.answers();
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
