//! Listeners on partitioned queues: one that consumes from every partition, and keeps its share of them.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;

use super::builder::Part;
use super::launch::launch;
use super::rate::RateLimit;
use super::route::Route;
use super::typed::decoding;
use super::{Context, Listener, ListenerBuilder};
use crate::connection::Delivery;
use crate::error::Result;
use crate::outcome::{Outcome, RetryPolicy};
use crate::pace::Concurrency;
use crate::topology::{Partitioned, Queue, QueueType};

/// When a message that fails is tried again where nothing else is said.
const DELAYS: [Duration; 3] = [Duration::from_millis(100), Duration::from_secs(1), Duration::from_secs(10)];

/// What a listener on a partitioned queue is started with. See [`App::listener_partitioned`](crate::App::listener_partitioned).
///
/// The listener has a thread and a channel for each partition, on one connection. In each partition it handles one message after
/// another, in the order in which the broker has them, and different partitions at the same time.
///
/// **Sharing.** Any number of listeners may run, in any number of processes. The broker delivers the messages of a partition to one
/// of them, its active consumer, and to another one when that has ended, at once. The listeners count how many they are, twice a
/// second; one that is active on more than its share gives partitions back, so that each has as many as the others, or one more. A
/// listener knows a partition as its own once a message of it has come: those that get none are not shared evenly.
///
/// **Order.** A message is handled again if its listener ended before its ack was sent, and then all messages behind it in that
/// partition are handled after it. So the order of each key holds, with repetitions. Three things keep it:
///
/// - A message that fails is tried again in place: its partition waits for it. See [`retry`](Self::retry).
/// - What had been sent ahead goes back as a whole before another listener has it.
/// - All listeners have the same [`prefetch`](Self::prefetch). With a smaller one, a listener that takes over and ends at once
///   leaves what it had behind what it had not.
///
/// A listener whose connection is cut does not know it at once. It may still be in a handler while another one handles the same
/// message.
#[must_use = "a listener does nothing until it is spawned"]
pub struct PartitionedListenerBuilder {
    /// What all partitions have in common; or why there are none.
    whole: Result<(Partitioned, ListenerBuilder)>,
}

impl fmt::Debug for PartitionedListenerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let partitioned = self.whole.as_ref().map(|(partitioned, _)| partitioned);
        f.debug_struct("PartitionedListenerBuilder").field("partitioned", &partitioned).finish_non_exhaustive()
    }
}

impl PartitionedListenerBuilder {
    /// `builder` is one for a queue of that name.
    pub(crate) fn new(whole: Result<(Partitioned, ListenerBuilder)>) -> PartitionedListenerBuilder {
        PartitionedListenerBuilder { whole }
    }

    fn with(mut self, change: impl FnOnce(ListenerBuilder) -> ListenerBuilder) -> Self {
        self.whole = self.whole.map(|(partitioned, builder)| (partitioned, change(builder)));
        self
    }

    /// The name in logs and in the [`Context`]. Defaults to that of the partitioned queue.
    pub fn name(self, name: impl Into<String>) -> Self {
        self.with(|builder| builder.name(name))
    }

    /// How many deliveries of each partition the broker sends ahead of their acks, 1 to 65535; 0 counts as 1. The same in all
    /// processes, or order is lost when two of them end shortly after one another. Defaults to the pool's `prefetch`.
    pub fn prefetch(self, prefetch: u16) -> Self {
        self.with(|builder| builder.prefetch(prefetch))
    }

    /// How many messages are handled in a second at most, by all partitions of this listener together. Defaults to the pool's
    /// `max_rate`. See [`ListenerBuilder::max_rate`].
    pub fn max_rate(self, per_second: impl Into<f64>) -> Self {
        self.with(|builder| builder.max_rate(per_second))
    }

    /// When a message that fails is tried again, and when it is given up. Defaults to the pool's `retry`; without one, to three more
    /// attempts, after 100 ms, 1 s and 10 s.
    ///
    /// It is tried again in place, so that none behind it in its partition overtakes it: that partition waits, also for the delays
    /// of the policy. One that is given up goes to a queue like `orders.3-of-16.dead`, and those behind it go on without it. The
    /// attempts are counted in the process: if another listener takes over, it begins anew.
    /// [`Outcome::Requeue`] counts as a failure.
    pub fn retry(self, policy: RetryPolicy) -> Self {
        self.with(|builder| builder.retry(policy))
    }

    /// Has no retry policy, whatever the pool has: a message that fails is tried once more after 100 ms, and then rejected.
    pub fn without_retry(self) -> Self {
        self.with(ListenerBuilder::without_retry)
    }

    /// Has it rest when most messages fail. Defaults to the pool's `pause_on_failures`. See
    /// [`ListenerBuilder::pause_on_failures`]. While it rests, other listeners have its partitions.
    pub fn pause_on_failures(self, min: u32, ratio: f64, within: Duration, pause: Duration) -> Self {
        self.with(|builder| builder.pause_on_failures(min, ratio, within, pause))
    }

    /// Returns from spawning at once and keeps trying. Defaults to waiting until the broker has accepted it. See
    /// [`ListenerBuilder::in_background`].
    pub fn in_background(self) -> Self {
        self.with(ListenerBuilder::in_background)
    }

    /// After how long in a handler a warning is logged. Defaults to 15 minutes. See [`ListenerBuilder::warn_after`].
    pub fn warn_after(self, warn_after: Duration) -> Self {
        self.with(|builder| builder.warn_after(warn_after))
    }

    /// Has `around` called in the place of the handler. See [`ListenerBuilder::around`].
    pub fn around<F>(self, around: F) -> Self
    where
        F: Fn(&Context<'_>, &Delivery<'_>, &dyn Fn() -> Outcome) -> Outcome + Send + Sync + 'static,
    {
        self.with(|builder| builder.around(around))
    }

    /// Declares the partitions and starts listening. `handler` is called for each message, by as many threads as there are
    /// partitions with messages, one at a time for each partition. What it returns decides what becomes of the message. A panic in
    /// it is caught and counts as a failure.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if no partitioned queue has that name; else those of
    /// [`ListenerBuilder::spawn`].
    pub fn spawn<F, O>(self, handler: F) -> Result<Listener>
    where
        F: Fn(&Context<'_>, &Delivery<'_>) -> O + Send + Sync + 'static,
        O: Into<Outcome>,
    {
        let (partitioned, mut builder) = self.whole?;
        builder.name.get_or_insert_with(|| partitioned.name.clone());
        builder.concurrency = Concurrency::from(1);
        if builder.retry_of_pool && builder.retry.is_none() {
            builder.retry = Some(RetryPolicy::new(DELAYS)?);
        }
        let of_queue = |queue: String, part| {
            let mut builder = builder.clone();
            builder.queue = queue;
            builder.part = part;
            builder
        };
        let mut members = of_queue(partitioned.members_queue(), Part::Members).without_retry().prefetch(1);
        members.max_rate = None;
        members.keeps_undecodable = false;
        // Declared once, and before any other route.
        members.topology = partitioned.topology();
        let limit = members.topology.queues.last().map(Queue::declared_delivery_limit).unwrap_or_default();
        let mut routes = vec![members.into_route(not_for_members)?];
        let handler = Arc::new(handler);
        let rate = builder.max_rate;
        for queue in partitioned.queue_names() {
            let handler = Arc::clone(&handler);
            let mut partition = of_queue(queue, Part::Partition);
            // Known, so that nobody asks the broker for each.
            partition.configured_type = Some(QueueType::Quorum);
            partition.configured_limit = limit;
            routes.push(partition.into_route(move |context, delivery| handler(context, delivery))?);
        }
        if let Some(rate) = rate {
            let rate = Arc::new(RateLimit::new(rate));
            let partitions = routes.iter_mut().filter(|route| route.is_partition());
            partitions.for_each(|route: &mut Route| route.rate = Some(Arc::clone(&rate)));
        }
        launch(routes)
    }

    /// Starts listening for a handler that is given the value in each message. See [`ListenerBuilder::spawn_json`]: what cannot be
    /// decoded goes to a queue like `orders.3-of-16.dead` at once.
    ///
    /// # Errors
    ///
    /// Those of [`spawn`](Self::spawn).
    pub fn spawn_json<T, F, O>(self, handler: F) -> Result<Listener>
    where
        T: DeserializeOwned,
        F: Fn(&Context<'_>, T) -> O + Send + Sync + 'static,
        O: Into<Outcome>,
    {
        self.with(ListenerBuilder::keeping_undecodable_if_it_may).spawn(decoding(handler))
    }
}

/// Somebody has published to the queue whose consumers are counted.
fn not_for_members(context: &Context<'_>, delivery: &Delivery<'_>) -> Outcome {
    let (listener, queue, message_id) =
        (context.listener(), context.queue(), delivery.message().message_id().unwrap_or_default());
    log::error!(
        listener, queue, message_id, outcome = "rejected";
        "listener {listener:?}: queue {queue:?} is there for its consumers to be counted, and a message is in it; it is rejected"
    );
    Outcome::Reject
}

impl Listener {
    /// The queues of the partitions that it is active on, as far as it knows: those whose messages have come to it since it
    /// last subscribed. Empty for a listener that is not on a [partitioned](crate::Partitioned) queue.
    pub fn active_partitions(&self) -> Vec<String> {
        self.shared.active_partitions()
    }
}
