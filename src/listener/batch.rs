//! Listeners that take many messages at a time: how a batch is collected, what its handler sees, and how it is settled.
//!
//! What becomes of each message then is [`settling`](super::settling)'s, as for single ones.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::error::Error as StdError;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;

use super::launch::launch;
use super::route::Handler;
use super::settling::Settling;
use super::unsettled::Settle;
use super::worker::{At, Worker};
use super::{Context, Listener, ListenerBuilder};
use crate::connection::Received;
use crate::error::{Error, Result};
use crate::outcome::Outcome;
use crate::session::{Inbox, Incoming, Waker};

/// The longest that a batch may wait to become full: what is collected counts as held by this consumer.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

type Handle = dyn Fn(&Context<'_>, &mut Batch) -> Outcome + Send + Sync;

/// A handler of batches, and when one is full.
pub(super) struct BatchHandler {
    handle: Box<Handle>,
    pub(super) max: u16,
    wait: Duration,
}

impl ListenerBuilder {
    /// Takes many messages at a time: up to `max`, 1 to 65535, or as many as have come within `wait` of the first, more than
    /// zero and at most a minute. See [`Batches`].
    pub fn batch(self, max: u16, wait: Duration) -> Batches {
        Batches { builder: self, max, wait }
    }
}

/// A listener whose handler takes many messages at a time. Made by [`ListenerBuilder::batch`], after all else that is said of the
/// listener.
///
/// ```
/// # #[cfg(feature = "embedded")]
/// # fn main() -> coney::Result<()> {
/// use std::time::Duration;
///
/// use coney::{App, Batch, Queue, Settings, Topology};
///
/// let app = App::from_settings(Settings::from_url("memory://batches")?)?;
/// let (seen, sums) = std::sync::mpsc::channel();
/// let listener = app
///     .listener("numbers")
///     .topology(Topology::new().queue(Queue::new("numbers")))
///     .batch(3, Duration::from_secs(60))
///     .spawn_batch(move |_context, batch: &mut Batch| {
///         let mut sum = 0;
///         for item in batch.iter_mut() {
///             match item.message().text().unwrap_or_default().parse::<u32>() {
///                 Ok(number) => sum += number,
///                 Err(error) => item.fail(error), // this one alone
///             }
///         }
///         seen.send(sum) // Ok: all others are acked
///     })?;
/// for text in ["3", "no number", "4"] {
///     app.publish_pool().publish("", "numbers", text)?;
/// }
/// assert_eq!(sums.recv(), Ok(7));
/// # listener.stop()
/// # }
/// # #[cfg(not(feature = "embedded"))]
/// # fn main() {}
/// ```
#[derive(Debug, Clone)]
#[must_use = "a listener does nothing until it is spawned"]
pub struct Batches {
    builder: ListenerBuilder,
    max: u16,
    wait: Duration,
}

impl Batches {
    /// Starts listening. `handler` is called for each batch, by as many threads as the concurrency, each with batches of its own.
    ///
    /// The messages are in the order in which they came. When the handler has returned, what it has said of single messages is
    /// carried out, and what it returns is the outcome of all others. A panic in it is caught and counts as a failure of those.
    /// Each message that fails goes its own way, by the retry policy, as if it had been handled alone. Acks are sent in one go;
    /// [`ack_batch`](ListenerBuilder::ack_batch) has no part in it. Nothing is put [around](ListenerBuilder::around) the
    /// handler.
    ///
    /// When the listener stops, or has lost its connection, a batch that is not complete is not handed out. Its messages are in
    /// their queue again.
    ///
    /// The prefetch has to be `max` at least. The pool's `prefetch` is raised to it. With twice of it the next batch comes while
    /// one is handled.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] if `max`, `wait` or a [`prefetch`](ListenerBuilder::prefetch) of the listener's own are not
    /// what is expected. Else those of [`ListenerBuilder::spawn`].
    pub fn spawn_batch<F, O>(self, handler: F) -> Result<Listener>
    where
        F: Fn(&Context<'_>, &mut Batch) -> O + Send + Sync + 'static,
        O: Into<Outcome>,
    {
        let Batches { builder, max, wait } = self;
        if max == 0 {
            return Err(Error::invalid("batch", "max is 0, expected 1 to 65535"));
        }
        if wait.is_zero() || wait > LONGEST_WAIT {
            let got = humantime::format_duration(wait);
            return Err(Error::invalid(
                "batch",
                format!("wait is {got}, expected more than zero and at most 1 minute"),
            ));
        }
        let builder = builder.with_room_for(max)?;
        let handle = Box::new(move |context: &Context<'_>, batch: &mut Batch| handler(context, batch).into());
        launch(vec![builder.checked(Handler::Batch(BatchHandler { handle, max, wait }))?])
    }
}

/// Messages that are handled together: a slice of [`BatchItem`]s, in the order in which they came.
///
/// A message of which the handler says nothing has the outcome that the handler returns.
pub struct Batch {
    /// At least one, once it is handed out.
    items: Vec<BatchItem>,
}

impl Batch {
    /// Acks all messages of which nothing has been said, whatever the handler returns.
    pub fn ack_rest(&mut self) {
        for item in &mut self.items {
            item.said.get_or_insert(Outcome::Ack);
        }
    }
}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batch").field("len", &self.items.len()).finish_non_exhaustive()
    }
}

impl Deref for Batch {
    type Target = [BatchItem];

    fn deref(&self) -> &[BatchItem] {
        &self.items
    }
}

impl DerefMut for Batch {
    fn deref_mut(&mut self) -> &mut [BatchItem] {
        &mut self.items
    }
}

impl<'b> IntoIterator for &'b Batch {
    type Item = &'b BatchItem;
    type IntoIter = std::slice::Iter<'b, BatchItem>;

    fn into_iter(self) -> Self::IntoIter {
        self.items.iter()
    }
}

impl<'b> IntoIterator for &'b mut Batch {
    type Item = &'b mut BatchItem;
    type IntoIter = std::slice::IterMut<'b, BatchItem>;

    fn into_iter(self) -> Self::IntoIter {
        self.items.iter_mut()
    }
}

/// A message of a [`Batch`]. What is said of it is carried out when the handler has returned or panicked. If something is said
/// twice, the last counts.
pub struct BatchItem {
    received: Received,
    tag: u64,
    said: Option<Outcome>,
}

impl BatchItem {
    /// It has been dealt with.
    pub fn ack(&mut self) {
        self.settle(Outcome::Ack);
    }

    /// It has failed: it is tried again by the retry policy, or goes to the dead at once if `error` says that it cannot be
    /// decoded, as an error that a handler returns. See [`Outcome`].
    pub fn fail<E>(&mut self, error: E)
    where
        E: Into<Box<dyn StdError + Send + Sync>> + 'static,
    {
        self.settle(Err::<(), E>(error));
    }

    /// Gives it up: dead-lettered where the queue says where to, dropped otherwise.
    pub fn reject(&mut self) {
        self.settle(Outcome::Reject);
    }

    /// Puts it back into its queue.
    pub fn requeue(&mut self) {
        self.settle(Outcome::Requeue);
    }

    /// What becomes of it: anything that a handler may return.
    pub fn settle(&mut self, outcome: impl Into<Outcome>) {
        self.said = Some(outcome.into());
    }

    /// What has been said of it so far.
    pub fn outcome(&self) -> Option<&Outcome> {
        self.said.as_ref()
    }
}

impl fmt::Debug for BatchItem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BatchItem")
            .field("received", &self.received)
            .field("outcome", &self.said)
            .finish_non_exhaustive()
    }
}

impl Deref for BatchItem {
    type Target = Received;

    fn deref(&self) -> &Received {
        &self.received
    }
}

/// Collects batches and has them handled, until told to stop (`Ok`) or until something comes in the way. What has been collected
/// and not handed out by then is not settled, so the broker has it again.
pub(super) fn handle_all(
    worker: &Worker<'_>,
    handler: &BatchHandler,
    inbox: &Inbox,
    settling: &mut Settling<'_>,
    waker: &Waker,
    settles: &Receiver<Settle>,
) -> Result<()> {
    let (connection, listener, queue) = (worker.side, worker.shared.name.as_str(), worker.queue());
    let context = Context { connection, listener, queue, after: RefCell::default() };
    let max = usize::from(handler.max);
    let mut events = VecDeque::new();
    let mut batch = Batch { items: Vec::new() };
    // By when the batch that is being collected is handed out.
    let mut due = None;
    // When the batch that is complete is handed out, if it is not yet.
    let mut turn: Option<Instant> = None;
    loop {
        if worker.is_stopped() {
            return Ok(());
        }
        worker.drain_if_retiring(inbox, settling)?;
        if inbox.has_ended() {
            return Err(settling.ending(&worker.during("run of")));
        }
        while turn.is_none()
            && batch.len() < max
            && let Some(event) = events.pop_front()
        {
            match event {
                Incoming::Delivered(arrived) => {
                    due.get_or_insert_with(|| Instant::now() + handler.wait);
                    let tag = arrived.tag;
                    batch.items.push(BatchItem { received: worker.receive(arrived), tag, said: None });
                }
                Incoming::Cancelled => return Err(Error::ConsumerCancelled { queue: queue.to_owned() }),
                // There is nothing else on a channel that only consumes.
                _ => {}
            }
        }
        let now = Instant::now();
        let is_last = settling.is_draining && events.is_empty() && inbox.is_empty();
        let is_complete = batch.len() == max || due.is_some_and(|due| due <= now) || is_last && !batch.is_empty();
        if turn.is_none() && is_complete {
            let rate = worker.route().rate.as_ref();
            turn = rate.map(|rate| rate.reserve(u32::try_from(batch.len()).unwrap_or(u32::MAX), now)).or(Some(now));
        }
        match turn {
            Some(begin) if begin <= now => {
                worker.looks_ahead(&events);
                handle(worker, handler, &context, &mut batch, settling)?;
                (due, turn) = (None, None);
            }
            None if is_last => return Ok(()),
            _ => worker.wait(inbox, waker, turn.or(due), settling, settles, &mut events)?,
        }
    }
}

/// Hands out a batch and settles it. It is empty then.
fn handle(
    worker: &Worker<'_>,
    handler: &BatchHandler,
    context: &Context<'_>,
    batch: &mut Batch,
    settling: &mut Settling<'_>,
) -> Result<()> {
    let handling = worker.begin(batch.len() as u64, settling);
    let returned = catch_unwind(AssertUnwindSafe(|| (handler.handle)(context, batch)));
    handling.done();
    let outcome = returned.unwrap_or_else(|panic| worker.panicked(At::Batch(batch.len()), panic));
    let result = settle(&mut batch.items, &outcome, settling);
    worker.post.busy.store(0, Ordering::Relaxed);
    result
}

/// Settles in the order of arrival, for one ack speaks for all before it.
fn settle(items: &mut Vec<BatchItem>, outcome: &Outcome, settling: &mut Settling<'_>) -> Result<()> {
    // The handler may have sorted them.
    items.sort_unstable_by_key(|item| item.tag);
    for BatchItem { received, tag, said } in items.drain(..) {
        // Acks of a batch are held from here on, and not since its handler began, which may be long ago.
        settling.held_since.get_or_insert_with(Instant::now);
        settling.settle(tag, &received, said.unwrap_or_else(|| outcome.clone()))?;
    }
    settling.flush()
}
