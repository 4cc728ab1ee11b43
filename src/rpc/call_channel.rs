//! The channel that an RPC client's calls go out on and their answers come back by.
//!
//! Answers to direct reply-to come on the channel that asked, so requests are published there and not on the connection's
//! publishing channel. Many threads use it at once: requests are counted and written under the writer's lock, so that
//! delivery tags and calls agree.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::flight::{Answered, Asker, Call, Counters, Flight, Slot, during};
use crate::amqp::value::Table;
use crate::connection::Received;
use crate::error::{Error, Result};
use crate::message::Message;
use crate::pool::PooledConnection;
use crate::session::{Channel, Consume, Flush, Session, Waker};

/// The queue that is none: answers come to whoever consumes from it on the channel that asked.
const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";

/// A request that has not been sent, and why.
pub(super) struct Unsent {
    call: Option<Call>,
    pub(super) error: Error,
}

impl Unsent {
    /// The callback that waits for an answer, if one does, and what it is to be told.
    pub(super) fn into_answered(self) -> Option<Answered> {
        match self.call?.asker {
            Asker::Callback(callback) => Some(Answered { callback, result: Err(self.error) }),
            Asker::Thread(_) => None,
        }
    }
}

pub(super) struct CallChannel {
    /// Empty once it is dropped.
    channel: Option<Channel>,
    session: Arc<Session>,
    pub(super) flight: Arc<Flight>,
    limit: Duration,
    /// Given back when the channel goes.
    connection: Mutex<Option<PooledConnection>>,
}

impl CallChannel {
    /// Opens a channel for calls.
    pub(super) fn open(connection: PooledConnection, counters: Arc<Counters>) -> Result<CallChannel> {
        let opening = || "opening of a channel for calls".to_owned();
        let limit = connection.settings.broker.operation_timeout;
        let session = Arc::clone(&connection.session);
        let flight = Arc::new(Flight::new(counters, Arc::clone(&connection.context)));
        let sink = Arc::clone(&flight);
        let channel = session.open_channel(limit, &opening, Some(sink))?;
        flight.ends_by(channel.endings());
        let connection = Mutex::new(Some(connection));
        // From here on whatever happens closes the channel.
        let opened = CallChannel { channel: Some(channel), session, flight, limit, connection };
        if let Some(channel) = &opened.channel {
            let (inbox, arguments) = (&opened.flight.inbox, Table::default());
            channel.select_confirms(inbox, limit, &opening)?;
            let consume = Consume { queue: DIRECT_REPLY_TO, exclusive: false, no_ack: true, arguments };
            channel.consume(inbox, consume, limit, &opening)?;
        }
        Ok(opened)
    }

    /// Whether calls can be made on it.
    pub(super) fn is_open(&self) -> bool {
        self.session.is_alive() && !self.flight.has_ended()
    }

    /// Puts a request on its way; returns the number of the call. What has not been sent comes back.
    pub(super) fn send(&self, message: Message, call: Call) -> Result<u64, Box<Unsent>> {
        let Some(channel) = &self.channel else {
            let error = Error::ConnectionLost { during: during(&call.queue), detail: "it is closed".to_owned() };
            return Err(Box::new(Unsent { call: Some(call), error }));
        };
        let message = message.with_reply_to(DIRECT_REPLY_TO);
        // The correlation id is not there yet, and is never longer than this.
        let room = self.flight.id(u64::MAX).len() + 1;
        if let Err(error) = message.check(self.session.frame_max().saturating_sub(room)) {
            return Err(Box::new(Unsent { call: Some(call), error }));
        }
        let queue = call.queue.clone();
        // While answers to others are to come, a request may go out with theirs. A thread that waits itself sees to it
        // that all there is is written.
        let others = match call.asker {
            Asker::Callback(_) => self.flight.has_callbacks(),
            Asker::Thread(_) => !self.flight.is_empty(),
        };
        let flush = if others { Flush::Together } else { Flush::Now };
        let mut call = Some(call);
        let enter = || match self.flight.enter(call.take()?) {
            Ok(number) => Some(number),
            Err(back) => {
                call = Some(back);
                None
            }
        };
        let sent = channel.publish_numbered(&queue, message, flush, self.limit, &|| during(&queue), enter, |number| {
            self.flight.id(number)
        });
        sent.map_err(|error| Box::new(Unsent { call, error }))
    }

    /// Waits until the broker takes messages.
    pub(super) fn wait_unblocked(&self, deadline: Instant, timeout: Duration) -> Result<()> {
        let blocked = |reason| Error::Blocked { reason, waited: timeout, written: false };
        self.session.wire.wait_unblocked(deadline).map_err(blocked)
    }

    /// Puts on their way what requests wait for others to join them.
    pub(super) fn flush(&self) {
        self.session.flush();
    }

    /// Waits for the answer to call `number` until `deadline`; `None` if there is none.
    pub(super) fn wait(&self, number: u64, slot: &Slot, deadline: Instant) -> Option<Result<Received>> {
        let answer = self.session.wait(&[&slot.waiters], None, deadline, || slot.take());
        // It may have come at the last moment.
        let answer = answer.or_else(|| slot.take());
        if answer.is_none() {
            self.flight.forget(number);
        }
        answer.or_else(|| slot.take())
    }

    /// Waits until there is something for the client's runner to do, or for whoever closes.
    pub(super) fn wait_until(&self, waker: Option<&Waker>, deadline: Instant, done: impl Fn() -> bool) {
        self.session.wait(&[self.flight.waiters()], waker, deadline, || done().then_some(()));
    }

    pub(super) fn waker(&self) -> Result<Waker> {
        self.session.waker(&|| "asynchronous call".to_owned())
    }
}

impl Drop for CallChannel {
    fn drop(&mut self) {
        if self.session.check_process().is_err() {
            std::mem::forget(self.channel.take());
            return;
        }
        if self.flight.has_ended() {
            self.session.suspect();
        }
        if let Some(channel) = self.channel.take() {
            channel.close(self.limit);
        }
        drop(self.connection.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}
