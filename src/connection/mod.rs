//! What a pool lends: one connection to the broker, with its channels opened as they are needed.
//!
//! This room holds the connection's life: whether it is fit for use, its channels, and its end. What one does with a
//! connection is in rooms of its own: declaring, publishing, getting.
//!
//! Each kind of work has its own channel, so that a refusal, with which the broker closes a channel, does not touch
//! what goes on beside it: deliveries stay settleable when a declaration is refused, and a publish to a missing
//! exchange takes no delivery with it.

pub(crate) mod callback;
pub(crate) mod confirms;
mod context;
mod declare;
pub(crate) mod delay;
mod delivery;
mod expiring;
mod publish;
pub(crate) mod publisher;
mod queue_type;
#[cfg(feature = "unstable-amiquip")]
mod raw;
mod returns;
mod runner;
mod topology;

use std::cell::{Cell, RefCell};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::callback::Outstanding;
pub use self::context::Outgoing;
pub(crate) use self::context::PublishContext;
pub use self::declare::QueueInfo;
pub use self::delivery::{Delivery, Received};
use self::delivery::{Fetcher, Gets};
pub(crate) use self::expiring::expiring;
use self::publisher::Publisher;
use self::runner::Runner;
pub(crate) use self::runner::publish_to;
use crate::deadline;
use crate::error::{Error, Result, counted};
use crate::metrics::meter::Level;
use crate::session::{Channel, During, Owner, Session};
use crate::settings::PoolSettings;

/// How long an orderly close may take before the socket is simply shut.
pub(crate) const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection to the broker.
///
/// Lent by [`Pool::connection`](crate::Pool::connection) and given back when the guard is dropped. It can be handed to
/// another thread, and is used by one thread at a time. To share one between threads does not build: the compiler says that
/// `OneThreadAtATime` cannot be shared. Take one guard for each thread, or call [`Pool::publish`](crate::Pool::publish).
///
/// Every call ends: by `operation_timeout` (declare, get, opening a channel) or `confirm_timeout` (publishing). A call
/// that cannot be ended otherwise is ended by closing the socket; the connection is then lost, says so in each further
/// call, and is not lent again.
///
/// After the broker has refused something ([`Error::ChannelClosed`]: 403, 404, 405, 406), the same connection goes on
/// working.
///
/// ```compile_fail
/// # fn f(connection: coney::PooledConnection) {
/// std::thread::scope(|scope| {
///     scope.spawn(|| connection.publish("", "q", "x")); // does not build: take one guard for each thread
///     scope.spawn(|| connection.publish("", "q", "y"));
/// });
/// # }
/// ```
pub struct Connection {
    name: String,
    pub(crate) settings: Arc<PoolSettings>,
    pub(crate) session: Arc<Session>,
    /// What its messages pass on their way out.
    pub(crate) context: Arc<PublishContext>,
    /// Whether the session ends with this; if not, only its channels do.
    owns_session: bool,
    /// Where the session ends with this.
    _open: Option<Level>,
    /// What makes it a thing of one thread at a time.
    one_thread: Box<dyn OneThreadAtATime + Send>,
    /// Callbacks that have not been run.
    outstanding: Arc<Outstanding>,
}

/// A connection is used by one thread at a time: it can be handed to another thread, but not be shared by two. Each thread
/// takes a connection of its own from the pool, or calls `Pool::publish`.
///
/// A trait, so that the compiler has this name to show where somebody shares one, and not those of what is inside.
trait OneThreadAtATime {
    fn state(&self) -> &State;
}

impl OneThreadAtATime for State {
    fn state(&self) -> &State {
        self
    }
}

/// What a connection keeps for the thread that uses it.
#[derive(Default)]
struct State {
    /// For declarations.
    admin: RefCell<Option<Channel>>,
    /// For deliveries that are settled one by one.
    gets: RefCell<Option<Gets>>,
    /// Counts the channels that `gets` has held, so that a delivery knows its own.
    gets_generation: Cell<u64>,
    /// Deliveries that are not settled.
    unsettled: Cell<usize>,
    publisher: RefCell<Option<Publisher>>,
    runner: RefCell<Option<Runner>>,
    fetcher: RefCell<Option<Fetcher>>,
    /// It has been ended already, so dropping it does nothing more.
    gone: Cell<bool>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("name", &self.name).field("alive", &self.is_alive()).finish_non_exhaustive()
    }
}

impl Connection {
    pub(crate) fn new(
        name: String,
        session: Session,
        settings: Arc<PoolSettings>,
        context: Arc<PublishContext>,
    ) -> Connection {
        context.forget_body_max();
        context.delays.forget();
        session.wire.belongs_to(Owner { events: Arc::clone(&context.events), connection: name.clone() });
        Connection::on_session(name, settings, Arc::new(session), context, true)
    }

    fn state(&self) -> &State {
        self.one_thread.state()
    }

    /// Another set of channels on the same connection, for another thread.
    pub(crate) fn beside(&self) -> Connection {
        let (settings, session) = (Arc::clone(&self.settings), Arc::clone(&self.session));
        Connection::on_session(self.name.clone(), settings, session, Arc::clone(&self.context), false)
    }

    fn on_session(
        name: String,
        settings: Arc<PoolSettings>,
        session: Arc<Session>,
        context: Arc<PublishContext>,
        owns_session: bool,
    ) -> Connection {
        Connection {
            name,
            settings,
            session,
            _open: owns_session.then(|| context.events.meter.open.one()),
            owns_session,
            context,
            one_thread: Box::new(State::default()),
            outstanding: Arc::default(),
        }
    }

    /// The name this connection has given the broker, such as `coney publish #3`: `connection_name` in the client
    /// properties that the broker lists.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the connection is up, as far as is known without asking the broker.
    ///
    /// A broker that has gone silent is noticed after two missed heartbeats.
    pub fn is_alive(&self) -> bool {
        self.session.check_process().is_ok() && self.session.is_alive()
    }

    /// The version that the broker says it has (`version` in its server properties), such as `4.0.5`; `None` if it says none.
    pub fn server_version(&self) -> Option<&str> {
        self.session.wire.server_version()
    }

    /// Why the broker takes no messages on this connection at present, such as `low on memory`; `None` if it does.
    ///
    /// RabbitMQ tells a connection once it publishes while a resource alarm is on
    /// (<https://www.rabbitmq.com/docs/connection-blocked>).
    pub fn blocked(&self) -> Option<String> {
        self.session.wire.blocked()
    }

    /// Waits until every callback given to [`publish_async`](Connection::publish_async) and
    /// [`get_and_ack_async`](Connection::get_and_ack_async) on this connection has been run.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] after `timeout`; the callbacks are still to come.
    pub fn flush(&self, timeout: Duration) -> Result<()> {
        self.session.check_process()?;
        self.outstanding.wait(deadline::after(timeout)).map_err(|count| Error::Timeout {
            during: format!("flush with {} outstanding", counted(count, "callback")),
            after: timeout,
        })
    }

    /// How long the broker takes to answer: it is asked for a channel, which is closed again.
    pub(crate) fn round_trip(&self, timeout: Duration) -> Result<Duration> {
        let start = Instant::now();
        let open = self.session.open_channel(timeout, &|| "round trip to the broker".to_owned(), None)?;
        let took = start.elapsed();
        open.close(timeout);
        Ok(took)
    }

    /// Whether the next borrower may have this connection.
    pub(crate) fn is_reusable(&self) -> bool {
        self.session.is_reusable()
    }

    /// Runs one step of amiquip's on the channel for declarations, which is opened if there is none. If the step fails the
    /// channel is gone, and the next call opens another.
    fn administer<T>(
        &self,
        during: During<'_>,
        step: impl FnOnce(&amiquip::Channel) -> amiquip::Result<T>,
    ) -> Result<T> {
        self.session.check_process()?;
        let limit = self.settings.broker.operation_timeout;
        let mut slot = self.state().admin.borrow_mut();
        let channel = match &mut *slot {
            Some(channel) => channel,
            empty => empty.insert(self.session.open_channel(limit, during, None)?),
        };
        let result = channel.call(limit, during, step);
        if result.is_err()
            && let Some(channel) = slot.take()
        {
            channel.close(limit);
        }
        result
    }

    /// Ends what the borrower of a pooled connection may have left behind: waits for callbacks, ends the threads that
    /// run them, and returns deliveries that were forgotten to their queue. Not longer than until `deadline`.
    pub(crate) fn settle_down(&self, deadline: Instant) {
        // In one of its own callbacks there is no waiting for the others, which are run on this thread. It tells them what becomes
        // of their messages when it ends, and whatever else is under way by then. So the next borrower has another connection.
        let is_own = self.outstanding.is_in_callback();
        if is_own {
            self.session.suspect();
        } else if let Err(count) = self.outstanding.wait(deadline) {
            let (pool, connection) = (self.context.pool(), self.name.as_str());
            log::warn!(pool, connection; "{connection}: not done by the deadline: {}", counted(count, "callback"));
            self.session.suspect();
        }
        // Messages of a batch whose iterator has panicked: the next borrower is not to be told what becomes of them.
        if !self.wait_for_answers_until(deadline) {
            self.session.suspect();
        }
        // The callbacks that remain are due now; the grace is for the time it takes to run them.
        let grace = deadline.max(Instant::now() + Duration::from_millis(500));
        let fetcher = self.state().fetcher.take();
        let runner = self.state().runner.take();
        if fetcher.is_some_and(|fetcher| !fetcher.stop(grace, is_own)) {
            self.session.suspect();
        }
        if let Some(runner) = runner {
            if !runner.stop(grace, is_own) {
                self.session.suspect();
            }
            if let Some(publisher) = &mut *self.state().publisher.borrow_mut() {
                publisher.forget_runner();
            }
        }
        if self.state().unsettled.replace(0) > 0
            && let Some(gets) = self.state().gets.take()
        {
            self.state().gets_generation.set(self.state().gets_generation.get() + 1);
            gets.channel.close(grace.saturating_duration_since(Instant::now()));
        }
    }

    /// Ends the connection at once; the broker puts what is unsettled back into its queues.
    pub(crate) fn discard(self, why: &str) {
        self.session.wire.cut(why);
        self.end(Instant::now());
    }

    /// Closes in order, by `deadline` at the latest. What a borrower may have left behind is dealt with before.
    pub(crate) fn close(self, deadline: Instant) {
        self.end(deadline);
    }

    fn end(&self, deadline: Instant) {
        if self.state().gone.replace(true) || self.session.check_process().is_err() {
            return;
        }
        let left = || deadline.saturating_duration_since(Instant::now());
        if !self.owns_session {
            let publisher = self.state().publisher.take().map(Publisher::into_channel);
            for channel in [self.state().gets.take().map(|gets| gets.channel), self.state().admin.take(), publisher]
                .into_iter()
                .flatten()
            {
                channel.close(left());
            }
            return;
        }
        if self.is_reusable() {
            // Acks have no answer: closing their channel, which has one, is what makes sure that they have left.
            if let Some(gets) = self.state().gets.take() {
                gets.channel.close(left());
            }
        } else {
            self.session.wire.cut("it was not fit for further use");
        }
        self.session.close(left());
        // The connection has ended, so the channels that remain are dropped without a word to the broker.
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let deadline = Instant::now() + CLOSE_TIMEOUT;
        if !self.state().gone.get() && self.session.check_process().is_ok() {
            self.settle_down(deadline);
        }
        self.end(deadline);
    }
}
