//! What a listener is started with.

use std::sync::Arc;
use std::time::Duration;

use super::launch::launch;
use super::route::{Arounds, AutoHandler, Handler, Route, SingleHandler};
use super::stream::{Offset, Store};
use super::unsettled::Unsettled;
use super::{Context, Listener, Registry};
use crate::connection::Delivery;
use crate::error::{Error, Result};
use crate::field::{FieldTable, FieldValue, check_short_string, check_table};
use crate::outcome::{Outcome, RetryPolicy};
use crate::pace::{Concurrency, PauseOnFailures};
use crate::pool::{Patience, Pool};
use crate::topology::{DeliveryLimit, Queue, QueueType, Topology};

/// Half of what RabbitMQ gives a consumer to ack (<https://www.rabbitmq.com/docs/consumers#acknowledgement-timeout>).
const WARN_AFTER: Duration = Duration::from_secs(15 * 60);

/// What a queue is to a partitioned one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// Nothing.
    None,
    /// One of its partitions: handled in order, also when another listener takes over.
    Partition,
    /// The queue whose consumers are counted.
    Members,
}

/// What a listener is started with. See [`App::listener`](crate::App::listener).
#[derive(Debug, Clone)]
#[must_use = "a listener does nothing until it is spawned"]
pub struct ListenerBuilder {
    pub(super) pool: Pool,
    pub(super) queue: String,
    pub(super) name: Option<String>,
    pub(super) prefetch: u16,
    /// The prefetch is the pool's, and not one that was asked for.
    pub(super) prefetch_of_pool: bool,
    pub(super) concurrency: Concurrency,
    /// In messages per second.
    pub(super) max_rate: Option<f64>,
    pub(super) pause_on_failures: Option<PauseOnFailures>,
    /// The kill switch is the pool's, and not one that was asked for.
    pub(super) pause_of_pool: bool,
    pub(super) topology: Topology,
    pub(super) exclusive: bool,
    pub(super) priority: Option<i32>,
    pub(super) arguments: FieldTable,
    pub(super) offset: Option<Offset>,
    pub(super) offset_store: Option<Store>,
    pub(super) retry: Option<RetryPolicy>,
    /// The policy is the pool's, and not one that was asked for.
    pub(super) retry_of_pool: bool,
    /// The type of the queues that the policy needs, if it is not to be that of the queue itself.
    pub(super) retry_queue_type: Option<QueueType>,
    /// The type of the queue in the settings of the app.
    pub(super) configured_type: Option<QueueType>,
    pub(super) configured_limit: DeliveryLimit,
    /// What the settings of the app say of declaring, and nothing else.
    pub(super) declare_defaults: Topology,
    pub(super) ack_batch: bool,
    /// What the queue is to a partitioned one.
    pub(super) part: Part,
    pub(super) in_background: bool,
    pub(super) warn_after: Duration,
    /// What cannot be decoded goes to the dead even without a retry policy.
    pub(super) keeps_undecodable: bool,
    arounds: Arounds,
    pub(super) registry: Option<Arc<Registry>>,
    /// How long to wait for a broker that is not there yet.
    pub(super) patience: Option<(Duration, Patience)>,
}

impl ListenerBuilder {
    pub(crate) fn new(pool: Pool, queue: impl Into<String>) -> ListenerBuilder {
        let settings = pool.settings();
        ListenerBuilder {
            queue: queue.into(),
            name: None,
            prefetch: settings.prefetch,
            prefetch_of_pool: true,
            concurrency: settings.concurrency,
            max_rate: settings.max_rate,
            pause_on_failures: settings.pause_on_failures,
            pause_of_pool: true,
            topology: Topology::new(),
            exclusive: false,
            priority: None,
            arguments: FieldTable::new(),
            offset: None,
            offset_store: None,
            retry: settings.retry.clone(),
            retry_of_pool: true,
            retry_queue_type: settings.retry_queue_type,
            configured_type: None,
            configured_limit: DeliveryLimit::default(),
            declare_defaults: Topology::new(),
            ack_batch: settings.ack_batch,
            part: Part::None,
            in_background: false,
            warn_after: WARN_AFTER,
            keeps_undecodable: false,
            arounds: Arounds::default(),
            registry: None,
            patience: None,
            pool,
        }
    }

    pub(crate) fn keeping_undecodable(mut self) -> Self {
        self.keeps_undecodable = true;
        self
    }

    /// The same, unless the program wants no queues beside its own.
    pub(crate) fn keeping_undecodable_if_it_may(self) -> Self {
        let has_said_none = self.retry.is_none() && !self.retry_of_pool;
        if has_said_none || self.queue.is_empty() { self } else { self.keeping_undecodable() }
    }

    pub(crate) fn within(mut self, arounds: Arounds) -> Self {
        self.arounds = arounds;
        self
    }

    /// Finds in `configured` what the settings say of the queue.
    pub(crate) fn configured(mut self, configured: &Topology) -> Self {
        self.configured_type = declared_type(configured, &self.queue);
        self.configured_limit = declared_limit(configured, &self.queue).unwrap_or_default();
        self.declare_defaults = Topology::new().or_as(configured);
        self
    }

    pub(crate) fn waiting_for_broker(mut self, timeout: Duration, patience: Patience) -> Self {
        self.patience = Some((timeout, patience));
        self
    }

    pub(crate) fn registered_with(mut self, registry: Arc<Registry>) -> Self {
        self.registry = Some(registry);
        self
    }

    /// The name in logs and in the [`Context`]. Defaults to the queue's.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// How many deliveries the broker sends each thread ahead of their acks, 1 to 65535; 0 counts as 1. Defaults to the
    /// pool's `prefetch`.
    pub fn prefetch(mut self, prefetch: u16) -> Self {
        self.prefetch = prefetch.max(1);
        self.prefetch_of_pool = false;
        self
    }

    /// What is declared before listening, at the start and after each reconnect. Defaults to nothing; the queue is then
    /// expected to exist. The queue "" is the one that the broker names.
    pub fn topology(mut self, topology: Topology) -> Self {
        self.topology = topology;
        self
    }

    /// Whether no other consumer may be on the queue. With more than one thread only the first would get in. Defaults
    /// to false.
    pub fn exclusive(mut self, exclusive: bool) -> Self {
        self.exclusive = exclusive;
        self
    }

    /// Which consumers the broker serves first: those with the higher number
    /// (`x-priority`, <https://www.rabbitmq.com/docs/consumer-priority>). Defaults to none, which counts as 0.
    pub fn consumer_priority(mut self, priority: i32) -> Self {
        self.priority = Some(priority);
        self
    }

    /// Sets an optional argument of its consumers, such as `x-stream-filter`; a second value for the same name replaces the first.
    /// Defaults to none. For `x-stream-offset` see [`offset`](Self::offset).
    ///
    /// There is no way to ask for `no-local`, which RabbitMQ does not know
    /// (<https://www.rabbitmq.com/docs/specification>).
    pub fn argument(mut self, name: impl Into<String>, value: impl Into<FieldValue>) -> Self {
        self.arguments.insert(name.into(), value.into());
        self
    }

    /// What becomes of messages that fail. Defaults to the pool's `retry`; without one, to requeueing a message, and
    /// rejecting it if it had been redelivered already. A consumer that has given it back unhandled counts too, so set a
    /// policy where no message may be lost.
    /// A queue that the broker names goes without the pool's, for nothing could come back to it.
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.retry = Some(policy);
        self.retry_of_pool = false;
        self
    }

    /// Has no retry policy, whatever the pool has: for a listener that is to declare no queues of its own, or whose messages
    /// are not worth another attempt. A message that fails is requeued, and rejected if it had been redelivered already.
    pub fn without_retry(mut self) -> Self {
        self.retry = None;
        self.retry_of_pool = false;
        self
    }

    /// The type of the queues that a retry policy needs beside that of the listener, classic or quorum. Defaults to the pool's
    /// `retry_queue_type`; without one, to the type of the listener's queue: as its [`topology`](Self::topology) or the settings
    /// have it, and else as the broker says.
    pub fn retry_queue_type(mut self, queue_type: QueueType) -> Self {
        self.retry_queue_type = Some(queue_type);
        self
    }

    /// Whether acks are sent for many messages at once while more are waiting, at most for half the prefetch; nothing is
    /// held back once the listener has caught up. Defaults to the pool's `ack_batch`.
    pub fn ack_batch(mut self, ack_batch: bool) -> Self {
        self.ack_batch = ack_batch;
        self
    }

    /// Returns from spawning at once and keeps trying, instead of returning once the broker has accepted the
    /// subscription, or its refusal. Defaults to waiting.
    pub fn in_background(mut self) -> Self {
        self.in_background = true;
        self
    }

    /// After how long in a handler a warning is logged. Defaults to 15 minutes, half of RabbitMQ's `consumer_timeout`,
    /// after which the broker takes the message back.
    pub fn warn_after(mut self, warn_after: Duration) -> Self {
        self.warn_after = warn_after.max(Duration::from_millis(1));
        self
    }

    /// Has `around` called in the place of the handler, with what calls the handler: to look at what comes in and at what
    /// becomes of it, to measure, to open a span, to turn a message away or to give it another outcome.
    ///
    /// ```no_run
    /// # fn main() -> coney::Result<()> {
    /// # let app = coney::App::from_file("app.toml")?;
    /// use coney::Outcome;
    ///
    /// app.listener("orders")
    ///     .around(|_context, delivery, handler| match delivery.message().app_id() {
    ///         Some("orders") => handler(),
    ///         _ => Outcome::Reject,
    ///     })
    ///     .spawn(|_context, delivery| println!("{:?}", delivery.message().text()))?
    ///     .detach();
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// With several, the first one added is the outermost; those of
    /// [`App::around_handlers`](crate::App::around_handlers) are outside of all. A panic of the handler goes through them
    /// and is caught outside, where it counts as a failure. Calling the handler twice handles the message twice. A handler of
    /// [`spawn_manual`](Self::spawn_manual) has no outcome yet when it returns, so nothing is put around it.
    pub fn around<F>(mut self, around: F) -> Self
    where
        F: Fn(&Context<'_>, &Delivery<'_>, &dyn Fn() -> Outcome) -> Outcome + Send + Sync + 'static,
    {
        self.arounds.add(around);
        self
    }

    /// Starts listening. `handler` is called for each message, by as many threads as the concurrency; what it returns
    /// decides what becomes of the message. A panic in it is caught and counts as a failure.
    ///
    /// # Errors
    ///
    /// [`Error::TooManyListeners`] if every connection of the pool has its listener. Unless
    /// [`in_background`](Self::in_background): why the first attempt to listen failed.
    pub fn spawn<F, O>(self, handler: F) -> Result<Listener>
    where
        F: Fn(&Context<'_>, &Delivery<'_>) -> O + Send + Sync + 'static,
        O: Into<Outcome>,
    {
        launch(vec![self.into_route(handler)?])
    }

    /// Starts listening for a handler that settles messages by itself: later, in batches, or on another thread.
    ///
    /// Up to the prefetch may be unsettled at a time. Neither the retry policy nor `ack_batch` has a part in it. When
    /// the listener stops, it waits 5 s for what is unsettled; the broker requeues the rest.
    ///
    /// # Errors
    ///
    /// Those of [`spawn`](Self::spawn).
    pub fn spawn_manual<F>(self, handler: F) -> Result<Listener>
    where
        F: Fn(&Context<'_>, Unsettled) + Send + Sync + 'static,
    {
        launch(vec![self.checked(Handler::Single(SingleHandler::Manual(Box::new(handler))))?])
    }

    /// The same as a route of a listener that has several queues.
    pub(crate) fn into_route<F, O>(mut self, handler: F) -> Result<Route>
    where
        F: Fn(&Context<'_>, &Delivery<'_>) -> O + Send + Sync + 'static,
        O: Into<Outcome>,
    {
        let handler: Box<AutoHandler> = Box::new(move |context, delivery| handler(context, delivery).into());
        let handler = std::mem::take(&mut self.arounds).put_around(handler);
        self.checked(Handler::Single(SingleHandler::Auto(handler)))
    }

    /// How often a message of the queue may come back, as far as this program says.
    pub(super) fn delivery_limit(&self) -> DeliveryLimit {
        declared_limit(&self.topology, &self.queue).unwrap_or(self.configured_limit)
    }

    /// The type that the queue is declared with, as far as this program says.
    pub(super) fn declared_type(&self) -> Option<QueueType> {
        declared_type(&self.topology, &self.queue).or(self.configured_type)
    }

    /// Refuses a policy for a queue to which waiting messages would not come back.
    pub(super) fn check_type(&self, own: QueueType) -> Result<()> {
        if self.retry.is_none() || own != QueueType::Stream {
            return Ok(());
        }
        let problem = format!(
            "queue {:?} is a stream, and the broker puts no message back into one; expected a classic or a quorum queue, or \
             without_retry",
            self.queue
        );
        Err(Error::invalid("retry", problem))
    }

    /// Has a prefetch of `max` at least: raises the pool's, refuses a smaller one of its own.
    pub(super) fn with_room_for(mut self, max: u16) -> Result<Self> {
        if self.prefetch >= max {
            return Ok(self);
        }
        if !self.prefetch_of_pool {
            let problem = format!(
                "it is {}, expected at least {max}: a batch of up to {max} messages would never be full",
                self.prefetch
            );
            return Err(Error::invalid("prefetch", problem));
        }
        self.prefetch = max;
        Ok(self)
    }

    pub(super) fn checked(mut self, handler: Handler) -> Result<Route> {
        check_short_string(|| "queue name".to_owned(), &self.queue)?;
        self.topology.check()?;
        self.check_pace(&handler)?;
        check_arguments(&self.arguments)?;
        let position = self.position()?;
        if (self.queue.is_empty() || position.is_some()) && self.retry_of_pool {
            self.retry = None;
        }
        if self.queue.is_empty() && self.retry.is_some() && handler.has_outcomes() {
            let problem =
                "expected a queue with a name: messages that wait could not find back to one the broker names";
            return Err(Error::invalid("retry", problem));
        }
        if self.retry_queue_type == Some(QueueType::Stream) {
            return Err(Error::invalid(
                "retry_queue_type",
                "expected classic or quorum: nothing expires in a stream by its delay",
            ));
        }
        let known = if position.is_some() { Some(QueueType::Stream) } else { self.declared_type() };
        if let Some(known) = known
            && handler.has_outcomes()
        {
            self.check_type(known)?;
        }
        Ok(Route::new(self, position, handler))
    }
}

/// Refuses arguments of a consumer that cannot be sent.
fn check_arguments(arguments: &FieldTable) -> Result<()> {
    if arguments.contains_key("x-stream-offset") {
        return Err(Error::invalid(
            "argument \"x-stream-offset\"",
            "expected offset, which goes on after a lost connection",
        ));
    }
    arguments.keys().try_for_each(|name| check_short_string(|| format!("argument {name:?}"), name))?;
    check_table(arguments)
}

fn declared_type(topology: &Topology, queue: &str) -> Option<QueueType> {
    topology.queues.iter().rfind(|declared| declared.name == queue)?.declared_type()
}

fn declared_limit(topology: &Topology, queue: &str) -> Option<DeliveryLimit> {
    topology.queues.iter().rfind(|declared| declared.name == queue).map(Queue::declared_delivery_limit)
}
