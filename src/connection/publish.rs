//! Publishing: one message, many in a pipeline, or a batch; each with the broker's word on what became of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Connection;
use super::callback::Callback;
use super::confirms::{Call, Waiting};
use super::delay::{self, Delay};
use crate::error::{BatchError, Error, Result};
use crate::message::Message;
use crate::session::{Flush, Outgoing};

/// Publishing.
///
/// All messages of one connection go through one channel and reach the broker in the order of the calls.
impl Connection {
    /// Publishes a message and waits for the broker to confirm it.
    ///
    /// `Ok` means that the broker has taken responsibility: the message is in every queue it was routed to, and on
    /// disk where message and queue are to survive a restart
    /// (<https://www.rabbitmq.com/docs/confirms#when-publishes-are-confirmed>). The empty exchange name is the default
    /// exchange, which routes to the queue named by the routing key.
    ///
    /// # Errors
    ///
    /// - [`Error::Returned`]: no queue took it, and the pool publishes `mandatory` (the default).
    /// - [`Error::Nacked`]: the broker refused it.
    /// - [`Error::ChannelClosed`]: 404 for an exchange that does not exist, 403 where writing is not allowed.
    /// - [`Error::Blocked`], [`Error::Timeout`]: no confirm within the pool's `confirm_timeout`. The broker may have
    ///   the message all the same.
    /// - [`Error::ConnectionLost`], [`Error::ConnectionClosed`]: likewise unknown, if it happens while waiting.
    /// - [`Error::InvalidArgument`]: it cannot be put on the wire; nothing was sent.
    /// - [`Error::Refused`], or what else a [hook](crate::Pool::before_publish) returns; nothing was sent.
    pub fn publish(&self, exchange: &str, routing_key: &str, message: impl Into<Message>) -> Result<()> {
        let message = Arc::new(self.context.prepare(exchange, routing_key, message.into())?);
        let mandatory = self.settings.mandatory;
        let outgoing = Outgoing { exchange, routing_key, message: &message, mandatory };
        let outcome = self.attempt(outgoing, Instant::now() + self.settings.confirm_timeout).outcome;
        self.tell_failure(outgoing, &outcome);
        outcome
    }

    /// Publishes a message that is to arrive after `delay`, and waits for the broker to confirm it.
    ///
    /// `Ok` means that the broker has taken the message and keeps it until then, through a restart too if the message is
    /// persistent. It is at the exchange after `delay` or a little later, never before. The delay is at most 365 days, and rounded
    /// up to a multiple of 100 ms; zero is [`publish`](Connection::publish). A message does not wait behind one with a longer delay.
    ///
    /// The message keeps its routing key and properties. It has headers in addition, whose names begin with `coney-delay-`, and
    /// `x-death` of the broker. The queues in which it waits are declared when they are needed. What they are named, what a
    /// delay costs, and what becomes of a message that no queue takes at the end is in the
    /// [guide](crate::guide::publishing#later).
    ///
    /// # Errors
    ///
    /// Those of [`publish`](Connection::publish), and of declaring. A message is routed by `exchange` when the delay is over, and
    /// nobody is told then if no queue takes it.
    ///
    /// - [`Error::ChannelClosed`]: 404 if `exchange` does not exist. With the default exchange, 404 if the queue does not exist
    ///   and the pool publishes `mandatory` (the default). 403 where queues named `coney.delay…` may not be declared.
    /// - [`Error::InvalidArgument`]: a delay of more than 365 days, an `exchange` with a name longer than 240 bytes, or a
    ///   message with an expiration, which would end the delay.
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # fn main() -> coney::Result<()> {
    /// # let app = coney::App::from_file("app.toml")?;
    /// let connection = app.publish_pool().connection()?;
    /// connection.publish_after(Duration::from_secs(3600), "events", "order.unpaid", "{\"order\": 1}")?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn publish_after(
        &self,
        delay: Duration,
        exchange: &str,
        routing_key: &str,
        message: impl Into<Message>,
    ) -> Result<()> {
        let Some(delay) = Delay::new(delay)? else { return self.publish(exchange, routing_key, message) };
        let message = self.context.prepare(exchange, routing_key, message.into())?;
        let message = Arc::new(delay.with_route(exchange, message)?);
        let entry = delay::entry(self.settings.delay_queue_type);
        let outgoing = Outgoing { exchange: entry, routing_key, message: &message, mandatory: true };
        let deadline = Instant::now() + self.settings.confirm_timeout;
        let outcome = self
            .check_queue(exchange, routing_key)
            .and_then(|()| self.attempt_delayed(delay, exchange, outgoing, deadline).outcome);
        self.tell_failure(Outgoing { exchange, ..outgoing }, &outcome);
        outcome
    }

    /// Tells that nobody tries this message again, if it has failed.
    pub(crate) fn tell_failure(&self, outgoing: Outgoing<'_>, outcome: &Result<()>) {
        if let Err(error) = outcome {
            let Outgoing { exchange, routing_key, message, .. } = outgoing;
            self.context.events.failed((exchange, routing_key), message, error);
        }
    }

    /// Publishes a message once more that has been received: as it is, and not to be dropped for want of a queue.
    ///
    /// A handler may have left messages under way on the channel, one of which the broker refuses by closing it. That is not
    /// this message's fault, so it is tried once more alone.
    pub(crate) fn publish_copy(&self, exchange: &str, routing_key: &str, message: Message) -> Result<()> {
        let message = Arc::new(message);
        let outgoing = Outgoing { exchange, routing_key, message: &message, mandatory: true };
        let attempt = || self.attempt(outgoing, Instant::now() + self.settings.confirm_timeout).outcome;
        let outcome = match attempt() {
            Err(Error::ChannelClosed { .. }) => attempt(),
            outcome => outcome,
        };
        self.tell_failure(outgoing, &outcome);
        outcome
    }

    /// Publishes a message without waiting. What becomes of it is to be asked of the call, by this thread, which meanwhile
    /// [looks after it](Connection::look_after_publishes), and [tells](Connection::tell_failure) if it has failed for good.
    pub(crate) fn publish_later(&self, outgoing: Outgoing<'_>) -> Result<Arc<Call>> {
        let (begun, _) = self.begin(outgoing, Flush::Together, Instant::now() + self.settings.confirm_timeout, None);
        // What has been entered in the ledger is told by the ledger, failed or not.
        if begun.written { Ok(begun.call) } else { begun.sent.map(|()| begun.call) }
    }

    /// Publishes a message without waiting; `callback` is run with the outcome, which is that of
    /// [`publish`](Connection::publish).
    ///
    /// The callback is run exactly once, whatever happens, on a thread that belongs to this connection, one after
    /// another. It may take another connection from a pool. A panic in it is caught and logged.
    ///
    /// Messages are pipelined: up to the pool's `max_in_flight` callbacks may be outstanding, then the call waits until
    /// there is room. Should the broker close the channel (a missing exchange), every message in flight gets that error.
    ///
    /// Giving the connection back to the pool waits for the callbacks; so does [`flush`](Connection::flush).
    pub fn publish_async<F>(&self, exchange: &str, routing_key: &str, message: impl Into<Message>, callback: F)
    where
        F: FnOnce(Result<()>) + Send + 'static,
    {
        if let Err(forked) = self.session.check_process() {
            return callback(Err(forked));
        }
        let callback = Callback::new("publish_async", &self.outstanding, callback);
        let deadline = Instant::now() + self.settings.confirm_timeout;
        let mut waiting = Some(Waiting::Callback(callback));
        let sent = self.send_of_stream(exchange, routing_key, message.into(), &mut waiting, deadline);
        // What has been entered in the ledger is told by the ledger, failed or not.
        let (Err(error), Some(Waiting::Callback(callback))) = (sent, waiting) else { return };
        let mut runner = self.state().runner.borrow_mut();
        match self.runner_in(&mut runner) {
            Ok(runner) => runner.run(callback, Err(error)),
            Err(no_thread) => {
                log::error!("publish_async: {no_thread}; the callback is run on the calling thread");
                drop(runner);
                callback.run(Err(error));
            }
        }
    }

    /// Publishes messages in a pipeline and returns how many there were, once all are confirmed.
    ///
    /// Each item is exchange, routing key and message. They are sent in order, at most the pool's `max_in_flight` of
    /// them unconfirmed at a time, each with `confirm_timeout` of its own.
    ///
    /// # Errors
    ///
    /// [`Error::Batch`] names every message that was not confirmed, by its position, with the reason. After a lost
    /// connection or a time-out nothing more is taken from the iterator, and [`BatchError::taken`] says how many were.
    ///
    /// ```no_run
    /// # fn main() -> coney::Result<()> {
    /// # let app = coney::App::from_file("app.toml")?;
    /// let connection = app.publish_pool().connection()?;
    /// let sent = connection.publish_batch((0..1000).map(|n| ("", "numbers", n.to_string())))?;
    /// assert_eq!(sent, 1000);
    /// # Ok(())
    /// # }
    /// ```
    pub fn publish_batch<I, E, K, M>(&self, messages: I) -> Result<usize>
    where
        I: IntoIterator<Item = (E, K, M)>,
        E: AsRef<str>,
        K: AsRef<str>,
        M: Into<Message>,
    {
        self.session.check_process()?;
        let call = Arc::new(Call::default());
        let mut len = 0;
        let mut failed = Vec::new();
        let mut is_hopeless = false;
        let mut looked_at = 0;
        let mut messages = messages.into_iter();
        // Also what became of a message that had been sent: each window would wait for a time-out of its own.
        while !is_hopeless && !call.has_failed_since(&mut looked_at, ends_batch) {
            let Some((exchange, routing_key, message)) = messages.next() else { break };
            let position = len;
            len += 1;
            let deadline = Instant::now() + self.settings.confirm_timeout;
            let mut waiting = Some(Waiting::Call(Arc::clone(&call), position));
            let (exchange, routing_key) = (exchange.as_ref(), routing_key.as_ref());
            let sent = self.send_of_stream(exchange, routing_key, message.into(), &mut waiting, deadline);
            if let Err(error) = sent {
                is_hopeless = ends_batch(&error);
                if waiting.is_some() {
                    failed.push((position, error));
                }
            }
        }
        self.wait_for(&call, Instant::now() + self.settings.confirm_timeout);
        failed.append(&mut call.take_failures());
        if failed.is_empty() {
            return Ok(len);
        }
        failed.sort_by_key(|(position, _)| *position);
        Err(Error::Batch(BatchError { taken: len, confirmed: len - failed.len(), failed }))
    }

    /// Sends one message of many. What is left in `waiting` after a failure has not been told.
    fn send_of_stream(
        &self,
        exchange: &str,
        routing_key: &str,
        message: Message,
        waiting: &mut Option<Waiting>,
        deadline: Instant,
    ) -> Result<()> {
        let message = Arc::new(self.context.prepare(exchange, routing_key, message)?);
        let mandatory = self.settings.mandatory;
        let outgoing = Outgoing { exchange, routing_key, message: &message, mandatory };
        let noted = self.context.events.note(&message);
        self.send(outgoing, Flush::Together, waiting, deadline, noted).map(drop)
    }
}

/// Whether the rest of a batch has no chance after this error.
fn ends_batch(error: &Error) -> bool {
    matches!(
        error,
        Error::ConnectionLost { .. }
            | Error::ConnectionClosed { .. }
            | Error::Timeout { .. }
            | Error::Blocked { .. }
            | Error::Thread { .. }
    )
}
