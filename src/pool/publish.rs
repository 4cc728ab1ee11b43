//! Publishing through a pool: one call that outlives the connection it began on.

use std::panic::Location;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::line::{Line, Parcel, Seat, Word};
use super::shared::Tries;
use super::{Pool, PooledConnection, deadline};
use crate::backoff::Backoff;
use crate::connection::confirms::Route;
use crate::connection::{Connection, publish_to};

use crate::connection::publisher::{Attempt, Begun};
use crate::error::{Error, Result};
use crate::message::Message;
use crate::session::{Flush, Outgoing};

/// How long after its deadline a message that somebody else publishes is waited for, should that thread not come round.
const GRACE: Duration = Duration::from_secs(1);

/// Who has less time left than this publishes for nobody else, whose messages would have no more time than its own.
const HURRIED: Duration = Duration::from_secs(1);

/// With less time left than this nothing is begun anew.
const TOO_LITTLE: Duration = Duration::from_millis(100);

/// How long answers may lie there while messages of others are being written.
const LOOK: Duration = Duration::from_millis(20);

/// What one try has come to.
struct Try {
    attempt: Attempt,
    /// Others' messages went with it, and what befell one of them may have befallen it.
    in_company: bool,
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
    /// Threads that find no connection free wait together: whoever gets the next one publishes the messages of all of them in
    /// a pipeline, is told when the last of them is settled, and the others each as soon as theirs is. Where it cannot be told
    /// whose fault it was that their company came to an end (one of them cost all the channel, or who published them had no more
    /// time), each that has no outcome is published again alone, under the same `message_id` too.
    ///
    /// Where many messages are sent by one thread, borrow a connection once and use
    /// [`publish_async`](crate::Connection::publish_async) or [`publish_batch`](crate::Connection::publish_batch).
    ///
    /// # Errors
    ///
    /// What the broker refuses is returned at once and never tried again (a message in company after it was tried alone):
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

    fn publish_within(
        &self,
        exchange: &str,
        routing_key: &str,
        message: Message,
        timeout: Duration,
        location: &'static Location<'static>,
    ) -> Result<()> {
        self.maker().check()?;
        let deadline = deadline::after(timeout);
        let message = with_id(self.outlet().prepare(exchange, routing_key, message)?);
        let parcel = Parcel { route: Route::new(exchange, routing_key), message, deadline };
        let mut backoff = Backoff::of_connecting();
        let mut written = false;
        let mut tried = self.try_at_once(&parcel, location);
        let error = loop {
            let Try { attempt, in_company } = match tried {
                Ok(tried) => tried,
                Err(error) => {
                    self.shared.outlet.meter.not_entered(&error);
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
                // It may have been meant for another of them, or come at the deadline of who published them.
                Err(error @ (Error::ChannelClosed { .. } | Error::Blocked { .. } | Error::Timeout { .. }))
                    if in_company =>
                {
                    (error, Duration::ZERO)
                }
                Err(error @ Error::ConnectionClosed { .. }) if in_company => (error, backoff.next()),
                Err(error @ (Error::Blocked { .. } | Error::Timeout { .. })) => break error,
                // The broker has seen the message and will not have it, or it cannot be sent at all.
                Err(refused) => return Err(refused),
            };
            if Instant::now() + wait + TOO_LITTLE >= deadline {
                break error;
            }
            let (pool, message_id) = (self.name(), parcel.message.message_id().unwrap_or_default());
            log::debug!(pool, exchange, routing_key, message_id; "pool {pool:?}: {error}; publishing again");
            self.outlet().meter.retries.one();
            self.shared.sleep(wait);
            tried = self.try_alone(&parcel, location);
        };
        Err(match error {
            Error::Blocked { reason, .. } => Error::Blocked { reason, waited: timeout, written },
            error if written => Error::OutcomeUnknown {
                message_id: parcel.message.message_id().unwrap_or_default().to_owned(),
                exchange: exchange.to_owned(),
                routing_key: routing_key.to_owned(),
                after: timeout,
                cause: Box::new(error),
            },
            Error::Timeout { during, .. } => Error::Timeout { during, after: timeout },
            other => other,
        })
    }

    /// Publishes alone if a connection is free and nobody waits for one, and in company otherwise. An error says that
    /// there was no connection.
    fn try_at_once(&self, parcel: &Parcel, location: &'static Location<'static>) -> Result<Try> {
        if self.shared.line.is_empty()
            && let Some(connection) = self.idle_connection(location)
        {
            return Ok(self.publish_alone(&connection, parcel));
        }
        self.shared.refuse_if_closed()?;
        let (number, words) = self.shared.line.join(parcel.clone(), self.outlet().meter.waiting.one());
        self.try_in_line(parcel, number, &words, location)
    }

    /// Publishes on a connection of its own.
    fn try_alone(&self, parcel: &Parcel, location: &'static Location<'static>) -> Result<Try> {
        let left = parcel.deadline.saturating_duration_since(Instant::now());
        let connection = self.checkout(left, Tries::Many, location)?;
        Ok(self.publish_alone(&connection, parcel))
    }

    fn publish_alone(&self, connection: &PooledConnection, parcel: &Parcel) -> Try {
        let Parcel { route: Route { exchange, routing_key }, message, deadline } = parcel;
        let mandatory = self.settings().mandatory;
        let outgoing = Outgoing { exchange, routing_key, message, mandatory };
        Try { attempt: connection.attempt(outgoing, *deadline), in_company: false }
    }

    /// Waits in the line: to be first, or to be told what became of the message.
    fn try_in_line(
        &self,
        parcel: &Parcel,
        number: u64,
        words: &Receiver<Word>,
        location: &'static Location<'static>,
    ) -> Result<Try> {
        let began = Instant::now();
        let word = match words.recv_deadline(parcel.deadline) {
            Ok(Word::First) => {
                return self.try_as_first(parcel, number, words, location).map_err(|error| match error {
                    Error::PoolExhausted { pool, size, oldest, .. } => {
                        Error::PoolExhausted { pool, size, oldest, waited: began.elapsed() }
                    }
                    other => other,
                });
            }
            Err(RecvTimeoutError::Timeout) if self.shared.line.leave(number) => {
                self.outlet().meter.checkout_failures.one();
                return Err(self.shared.no_permit(began.elapsed()));
            }
            Err(RecvTimeoutError::Timeout) => words.recv_timeout(GRACE),
            word => word,
        };
        Ok(match word {
            Ok(word) => told(Some(word), parcel),
            Err(RecvTimeoutError::Disconnected) => told(None, parcel),
            Err(RecvTimeoutError::Timeout) => {
                let after = began.elapsed();
                lost(Error::Timeout { during: publish_to(&parcel.route), after })
            }
        })
    }

    /// Waits for a connection, and publishes what all who are in the line by then want to.
    fn try_as_first(
        &self,
        parcel: &Parcel,
        number: u64,
        words: &Receiver<Word>,
        location: &'static Location<'static>,
    ) -> Result<Try> {
        let line = &self.shared.line;
        // However this ends, another one is first.
        let seat = Leaving { line, number };
        let left = parcel.deadline.saturating_duration_since(Instant::now());
        let mut opens = false;
        // Who has to open a connection first does so alone: a free one may come sooner for the others.
        let connection = self.checkout_or_open(left, Tries::Many, location, || {
            opens = true;
            line.leave(number);
        })?;
        let hurried = parcel.deadline.saturating_duration_since(Instant::now()) < HURRIED;
        if opens || hurried {
            drop(seat);
            return Ok(self.publish_alone(&connection, parcel));
        }
        let seats = line.take(Instant::now() + TOO_LITTLE);
        drop(seat);
        publish_together(&connection, seats, self.settings().mandatory, parcel.deadline);
        // Its own was among them.
        Ok(told(words.try_recv().ok(), parcel))
    }
}

/// What somebody has been told who was taken.
fn told(word: Option<Word>, parcel: &Parcel) -> Try {
    match word {
        Some(Word::Done { attempt, in_company }) => Try { attempt, in_company },
        // Who is taken is not made first any more.
        Some(Word::First) | None => {
            let detail = "the thread that published it for others too has panicked".to_owned();
            lost(Error::ConnectionLost { during: publish_to(&parcel.route), detail })
        }
    }
}

/// Somebody else had it, and nothing is known of it.
fn lost(error: Error) -> Try {
    Try { attempt: Attempt { outcome: Err(error), written: true }, in_company: true }
}

/// A seat that is given up unless it has been taken.
struct Leaving<'a> {
    line: &'a Line,
    number: u64,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.line.leave(self.number);
    }
}

/// Publishes messages in a pipeline, and tells of each once it is known what became of it, which it is at its deadline and at
/// `limit` at the latest.
fn publish_together(connection: &Connection, mut seats: Vec<Seat>, mandatory: bool, limit: Instant) {
    let in_company = seats.len() > 1;
    // While the broker takes no messages each is waited with in turn, and the first to be over is the first.
    seats.sort_by_key(|seat| seat.parcel.deadline);
    let mut under_way: Vec<(Seat, Begun, Instant)> = Vec::with_capacity(seats.len());
    let tell = |under_way: &mut Vec<(Seat, Begun, Instant)>| {
        for (seat, begun, _) in under_way.extract_if(.., |(_, begun, _)| begun.is_settled()) {
            seat.tell(begun.end(), in_company);
        }
    };
    let settle = |under_way: &mut Vec<(Seat, Begun, Instant)>| {
        while let Some(next) = under_way.iter().map(|(.., deadline)| *deadline).min() {
            connection.wait_until(next, || under_way.iter().any(|(_, begun, _)| begun.is_settled()));
            tell(under_way);
        }
    };
    let mut looked = Instant::now();
    for seat in seats {
        if connection.session.wire.blocked().is_some() {
            // The next one waits until that is over, and what is under way is not to wait with it.
            settle(&mut under_way);
        }
        let Parcel { route: Route { exchange, routing_key }, message, deadline } = &seat.parcel;
        let deadline = limit.min(*deadline);
        let outgoing = Outgoing { exchange, routing_key, message, mandatory };
        let (begun, deadline) = connection.begin(outgoing, Flush::Together, deadline);
        under_way.push((seat, begun, deadline));
        // Once for each message would be to wake the others one by one, who then come back one by one.
        if looked.elapsed() >= LOOK {
            connection.look_after_publishes();
            tell(&mut under_way);
            looked = Instant::now();
        }
    }
    settle(&mut under_way);
}

/// The message with an identity, by which repetitions of it can be told from others.
fn with_id(message: Message) -> Arc<Message> {
    Arc::new(match message.message_id() {
        Some(_) => message,
        None => message.with_message_id(format!("{:032x}", fastrand::u128(..))),
    })
}
