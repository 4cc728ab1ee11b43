//! Publishing through a pool: one call that outlives the connection it began on.

use std::panic::Location;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::group::{Entry, GroupCommit, Notice, Request};
use super::shared::Tries;
use super::{Backoff, Pool, PooledConnection, deadline};
use crate::connection::confirms::Route;
use crate::connection::{Connection, publish_to};

use crate::connection::publisher::{Attempt, Begun};
use crate::error::{Error, Result};
use crate::message::Message;
use crate::session::Flush;

/// How long after its deadline the outcome of a message that the leader publishes is waited for, should the leader be late.
const GRACE: Duration = Duration::from_secs(1);

/// A leader with less time left than this publishes for nobody else: their messages would have no more time than its own.
const HURRIED: Duration = Duration::from_secs(1);

/// With less time left than this nothing is begun anew.
pub(super) const TOO_LITTLE: Duration = Duration::from_millis(100);

/// How often outcomes are looked at while the messages of a group are being written.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What one try has come to.
struct Try {
    attempt: Attempt,
    /// It went with others' messages, and what befell one of them may have befallen it.
    in_group: bool,
}

impl Pool {
    /// Publishes a message on a connection of this pool and waits for the broker to confirm it, through a restart of the
    /// broker if need be, for up to the pool's `publish_timeout`.
    ///
    /// Takes a connection, publishes as [`Connection::publish`](crate::Connection::publish) does, and gives it back. When
    /// the connection is lost in between, the message is published again on another, under the same `message_id`; one
    /// that has none is given a random one of 32 hexadecimal digits. So `Ok` means *at least once*: if the broker had taken
    /// it and only the confirm was lost, there are two of it, and a consumer can tell by the id. Messages that one thread
    /// publishes one after the other keep their order, but for such repetitions.
    ///
    /// Threads that find no connection free publish as a group (group commit): one of them takes the next connection and
    /// publishes the messages of all in a pipeline. Each thread is told as soon as its own message is settled; the one that
    /// publishes, when the last one is. Sometimes it cannot be told whose fault a failure was: one message costs all of them the
    /// channel, or the time of the thread that publishes is up. Then each message that has no outcome is published again alone,
    /// under the same `message_id`.
    ///
    /// Where many messages are sent by one thread, borrow a connection once and use
    /// [`publish_async`](crate::Connection::publish_async) or [`publish_batch`](crate::Connection::publish_batch).
    ///
    /// # Errors
    ///
    /// What the broker refuses is returned at once and never tried again (a message of a group after it was tried alone):
    /// [`Error::Returned`], [`Error::Nacked`],
    /// [`Error::ChannelClosed`] (404 for an exchange that does not exist, 403 where writing is not allowed),
    /// [`Error::ConnectionClosed`] with a code that is not [transient](Error::is_transient), [`Error::Connect`] where
    /// user, password or virtual host are refused, [`Error::InvalidArgument`]. So is what a hook refuses.
    ///
    /// When the time is up:
    ///
    /// - [`Error::OutcomeUnknown`]: the message has been written, at least in part, and there is no word on it.
    /// - [`Error::Blocked`]: the broker takes no messages at present; says whether this one had been written before.
    /// - [`Error::Connect`], [`Error::PoolExhausted`], [`Error::Timeout`]: there was no connection. Nothing was sent.
    /// - [`Error::ConnectionLost`], or [`Error::ConnectionClosed`] with a transient code: the last connection did not last
    ///   long enough. Nothing was sent.
    /// - [`Error::PoolClosed`]: the pool has been closed before anything was sent.
    ///
    /// ```no_run
    /// # fn main() -> coney::Result<()> {
    /// # let app = coney::App::from_file("app.toml")?;
    /// app.publish_pool().publish("events", "order.created", "{\"order\": 1}")?;
    /// # Ok(())
    /// # }
    /// ```
    #[track_caller]
    pub fn publish(&self, exchange: &str, routing_key: &str, message: impl Into<Message>) -> Result<()> {
        let timeout = self.settings().publish_timeout;
        self.publish_within(exchange, routing_key, message.into(), timeout, Location::caller())
    }

    /// Publishes a message like [`publish`](Pool::publish), for up to `timeout`.
    ///
    /// # Errors
    ///
    /// Those of [`publish`](Pool::publish).
    #[track_caller]
    pub fn publish_timeout(
        &self,
        exchange: &str,
        routing_key: &str,
        message: impl Into<Message>,
        timeout: Duration,
    ) -> Result<()> {
        self.publish_within(exchange, routing_key, message.into(), timeout, Location::caller())
    }

    pub(super) fn publish_within(
        &self,
        exchange: &str,
        routing_key: &str,
        message: Message,
        timeout: Duration,
        location: &'static Location<'static>,
    ) -> Result<()> {
        self.maker().check()?;
        let deadline = deadline::after(timeout);
        let message = Arc::new(self.context().prepare(exchange, routing_key, message)?.with_some_id());
        let mandatory = self.settings().mandatory;
        let request = Request { route: Route::new(exchange, routing_key), message, mandatory, deadline };
        let outcome = self.publish_request(&request, timeout, location);
        if let Err(error) = &outcome {
            self.context().events.failed((exchange, routing_key), &request.message, error);
        }
        outcome
    }

    /// Publishes a message as often as it takes.
    pub(super) fn publish_request(
        &self,
        request: &Request,
        timeout: Duration,
        location: &'static Location<'static>,
    ) -> Result<()> {
        let Request { route: Route { exchange, routing_key }, message, deadline, .. } = request;
        let (exchange, routing_key, deadline) = (&**exchange, &**routing_key, *deadline);
        let mut backoff = Backoff::of_connecting();
        let mut written = false;
        let mut tried = self.try_at_once(request, location);
        let error = loop {
            let Try { attempt, in_group } = match tried {
                Ok(tried) => tried,
                Err(error) => {
                    self.context().events.meter.not_entered(&error);
                    break error;
                }
            };
            written |= attempt.written;
            let (error, wait) = match attempt.outcome {
                Ok(()) => return Ok(()),
                Err(error @ (Error::ConnectionLost { .. } | Error::ConnectionClosed { .. }))
                    if error.is_transient() =>
                {
                    (error, backoff.next())
                }
                // It may have been meant for another message, or have come at the deadline of the leader.
                Err(error @ (Error::ChannelClosed { .. } | Error::Blocked { .. } | Error::Timeout { .. }))
                    if in_group =>
                {
                    (error, Duration::ZERO)
                }
                Err(error @ Error::ConnectionClosed { .. }) if in_group => (error, backoff.next()),
                Err(error @ (Error::Blocked { .. } | Error::Timeout { .. })) => break error,
                // The broker has seen the message and will not have it, or it cannot be sent at all.
                Err(refused) => return Err(refused),
            };
            if Instant::now() + wait + TOO_LITTLE >= deadline {
                break error;
            }
            let (pool, message_id) = (self.name(), message.message_id().unwrap_or_default());
            log::debug!(pool, exchange, routing_key, message_id; "pool {pool:?}: {error}; publishing again");
            self.context().events.meter.retries.one();
            self.shared.sleep(wait);
            tried = self.try_alone(request, location);
        };
        Err(match error {
            Error::Blocked { reason, .. } => Error::Blocked { reason, waited: timeout, written },
            error if written => Error::OutcomeUnknown {
                message_id: message.message_id().unwrap_or_default().to_owned(),
                exchange: exchange.to_owned(),
                routing_key: routing_key.to_owned(),
                after: timeout,
                cause: Box::new(error),
            },
            Error::Timeout { during, .. } => Error::Timeout { during, after: timeout },
            other => other,
        })
    }

    /// Publishes alone if a connection is free and nobody waits for one, and in a group otherwise. An error says that
    /// there was no connection.
    fn try_at_once(&self, request: &Request, location: &'static Location<'static>) -> Result<Try> {
        if self.shared.group.is_empty()
            && let Some(connection) = self.idle_connection(location)
        {
            return Ok(self.publish_alone(&connection, request));
        }
        self.shared.refuse_if_closed()?;
        let (number, notices) = self.shared.group.join(request.clone(), self.context().events.meter.waiting.one());
        self.try_in_group(request, number, &notices, location)
    }

    /// Publishes on a connection of its own.
    fn try_alone(&self, request: &Request, location: &'static Location<'static>) -> Result<Try> {
        let left = request.deadline.saturating_duration_since(Instant::now());
        let connection = self.checkout(left, Tries::Many, location)?;
        Ok(self.publish_alone(&connection, request))
    }

    fn publish_alone(&self, connection: &PooledConnection, request: &Request) -> Try {
        Try { attempt: connection.attempt(request.outgoing(), request.deadline), in_group: false }
    }

    /// Waits to lead a group, or to be told what became of the message.
    fn try_in_group(
        &self,
        request: &Request,
        number: u64,
        notices: &Receiver<Notice>,
        location: &'static Location<'static>,
    ) -> Result<Try> {
        let began = Instant::now();
        let notice = match notices.recv_deadline(request.deadline) {
            Ok(Notice::Lead) => {
                return self.try_as_leader(request, number, notices, location).map_err(|error| match error {
                    Error::PoolExhausted { pool, size, oldest, .. } => {
                        Error::PoolExhausted { pool, size, oldest, waited: began.elapsed() }
                    }
                    other => other,
                });
            }
            Err(RecvTimeoutError::Timeout) if self.shared.group.leave(number) => {
                self.context().events.meter.checkout_failures.one();
                return Err(self.shared.no_permit(began.elapsed()));
            }
            Err(RecvTimeoutError::Timeout) => notices.recv_timeout(GRACE),
            notice => notice,
        };
        Ok(match notice {
            Ok(notice) => told(Some(notice), request),
            Err(RecvTimeoutError::Disconnected) => told(None, request),
            Err(RecvTimeoutError::Timeout) => {
                let after = began.elapsed();
                lost(Error::Timeout { during: publish_to(&request.route), after })
            }
        })
    }

    /// Waits for a connection, and publishes the requests of all who wait by then.
    fn try_as_leader(
        &self,
        request: &Request,
        number: u64,
        notices: &Receiver<Notice>,
        location: &'static Location<'static>,
    ) -> Result<Try> {
        let group = &self.shared.group;
        // However this ends, another one leads.
        let place = Leaving { group, number };
        let left = request.deadline.saturating_duration_since(Instant::now());
        let mut opens = false;
        // A thread that has to open a connection does so for itself alone: a free one may come sooner for the others.
        let connection = self.checkout_or_open(left, Tries::Many, location, || {
            opens = true;
            group.leave(number);
        })?;
        let hurried = request.deadline.saturating_duration_since(Instant::now()) < HURRIED;
        if opens || hurried {
            drop(place);
            return Ok(self.publish_alone(&connection, request));
        }
        let entries = group.take(Instant::now() + TOO_LITTLE);
        drop(place);
        publish_together(&connection, entries, request.deadline);
        // Its own was among them.
        Ok(told(notices.try_recv().ok(), request))
    }
}

/// What became of a request that a leader has taken.
fn told(notice: Option<Notice>, request: &Request) -> Try {
    match notice {
        Some(Notice::Done { attempt, in_group }) => Try { attempt, in_group },
        // A request that is taken does not lead any more.
        Some(Notice::Lead) | None => {
            let detail = "the thread that published it for others too has panicked".to_owned();
            lost(Error::ConnectionLost { during: publish_to(&request.route), detail })
        }
    }
}

/// Another thread had it, and nothing is known of it.
fn lost(error: Error) -> Try {
    Try { attempt: Attempt { outcome: Err(error), written: true }, in_group: true }
}

/// A place that is given up unless its request has been taken.
struct Leaving<'a> {
    group: &'a GroupCommit,
    number: u64,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.group.leave(self.number);
    }
}

/// Publishes messages in a pipeline, and tells of each once it is known what became of it, which it is at its deadline and at
/// `limit` at the latest.
fn publish_together(connection: &Connection, mut entries: Vec<Entry>, limit: Instant) {
    let in_group = entries.len() > 1;
    // While the broker takes no messages each is waited with in turn, and the first to be over is the first.
    entries.sort_by_key(|entry| entry.request.deadline);
    let mut under_way: Vec<(Entry, Begun, Instant)> = Vec::with_capacity(entries.len());
    let tell = |under_way: &mut Vec<(Entry, Begun, Instant)>| {
        for (entry, begun, _) in under_way.extract_if(.., |(_, begun, _)| begun.is_settled()) {
            entry.tell(begun.end(), in_group);
        }
    };
    let settle = |under_way: &mut Vec<(Entry, Begun, Instant)>| {
        while let Some(next) = under_way.iter().map(|(.., deadline)| *deadline).min() {
            connection.wait_until(next, || under_way.iter().any(|(_, begun, _)| begun.is_settled()));
            tell(under_way);
        }
    };
    let mut looked = Instant::now();
    for entry in entries {
        if connection.session.wire.blocked().is_some() {
            // The next one waits until that is over, and what is under way is not to wait with it.
            settle(&mut under_way);
        }
        let deadline = limit.min(entry.request.deadline);
        let (begun, deadline) = connection.begin(entry.request.outgoing(), Flush::Together, deadline, None);
        under_way.push((entry, begun, deadline));
        // Once for each message would wake the other threads one by one, and they would come back one by one.
        if looked.elapsed() >= LOOK_EVERY {
            connection.look_after_publishes();
            tell(&mut under_way);
            looked = Instant::now();
        }
    }
    settle(&mut under_way);
}
