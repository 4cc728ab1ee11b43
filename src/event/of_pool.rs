//! What happens to a pool, its connections and its messages.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::{Event, Events};
use crate::error::{ConnectError, Error};
use crate::message::Message;
use crate::metrics::meter::{Level, PoolMeter};

/// Counts, logs and tells what happens to a pool. Shared by all that do something for it.
#[derive(Debug)]
pub(crate) struct PoolEvents {
    pool: String,
    /// The broker, without the password.
    url: String,
    events: Events,
    pub(crate) meter: PoolMeter,
    opened: AtomicU64,
    lost: AtomicU64,
    /// What the broker would not declare, and has not declared since; a leaf among locks.
    not_declared: Mutex<BTreeMap<String, Error>>,
    /// There is something in it.
    has_not_declared: AtomicBool,
}

/// What is to be told of a message, should it fail. It is small: whoever keeps messages keeps a place for it with each.
#[derive(Debug)]
pub(crate) struct Noted(Box<NotedMessage>);

#[derive(Debug)]
struct NotedMessage {
    message_id: Option<String>,
}

impl PoolEvents {
    pub(crate) fn new(pool: &str, size: u32, url: String, events: Events) -> PoolEvents {
        PoolEvents {
            pool: pool.to_owned(),
            url,
            events,
            meter: PoolMeter::new(pool, size),
            opened: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            not_declared: Mutex::default(),
            has_not_declared: AtomicBool::new(false),
        }
    }

    pub(crate) fn pool(&self) -> &str {
        &self.pool
    }

    /// The broker, without the password.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// The events that these are among.
    pub(crate) fn all(&self) -> &Events {
        &self.events
    }

    /// How many connections have been opened so far.
    pub(crate) fn connections_opened(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }

    /// How many of them have been lost.
    pub(crate) fn connections_lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    pub(crate) fn opened(&self, connection: &str) {
        self.opened.fetch_add(1, Ordering::Relaxed);
        self.meter.opened.one();
        self.events.emit(Event::ConnectionOpened {
            pool: self.pool.clone(),
            connection: connection.to_owned(),
            url: self.url.clone(),
        });
    }

    /// `wait` is how long it will be until the next attempt, if there is to be one.
    pub(crate) fn connect_failed(&self, connection: &str, cause: &ConnectError, wait: Option<Duration>) {
        self.meter.connect_failures.one();
        self.events.emit(Event::ConnectFailed {
            pool: self.pool.clone(),
            connection: connection.to_owned(),
            error: self.connect_error(cause.clone()),
            wait,
        });
    }

    pub(crate) fn connect_error(&self, cause: ConnectError) -> Error {
        Error::Connect { pool: self.pool.clone(), url: self.url.clone(), cause }
    }

    pub(crate) fn lost(&self, connection: &str, error: Error) {
        self.lost.fetch_add(1, Ordering::Relaxed);
        self.meter.discarded.one();
        self.events.emit(Event::ConnectionLost { pool: self.pool.clone(), connection: connection.to_owned(), error });
    }

    pub(crate) fn closed(&self, connection: &str) {
        self.events.emit(Event::ConnectionClosed { pool: self.pool.clone(), connection: connection.to_owned() });
    }

    /// A queue or an exchange is there with other properties, and is used as it is.
    pub(crate) fn conflicts(&self, entity: &str, error: Error) {
        self.events.emit(Event::DeclareConflict { pool: self.pool.clone(), entity: entity.to_owned(), error });
    }

    /// The broker would not declare something, and the rest is declared without it.
    pub(crate) fn not_declared(&self, entity: &str, error: Error) {
        self.not_declared_yet().insert(entity.to_owned(), error.clone());
        self.has_not_declared.store(true, Ordering::Release);
        self.events.emit(Event::DeclareFailed { pool: self.pool.clone(), entity: entity.to_owned(), error });
    }

    /// It has declared something. Costs one atomic load where it has never refused.
    pub(crate) fn declared(&self, entity: &str) {
        if self.has_not_declared.load(Ordering::Acquire) {
            self.not_declared_yet().remove(entity);
        }
    }

    /// What the broker would not declare, and why.
    pub(crate) fn all_not_declared(&self) -> Vec<(String, Error)> {
        self.not_declared_yet().iter().map(|(entity, error)| (entity.clone(), error.clone())).collect()
    }

    fn not_declared_yet(&self) -> MutexGuard<'_, BTreeMap<String, Error>> {
        self.not_declared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a blocked connection adds to the gauge, for as long as it is one.
    pub(crate) fn one_blocked(&self) -> Level {
        self.meter.blocked.one()
    }

    pub(crate) fn blocked(&self, connection: &str, reason: &str) {
        self.events.emit(Event::ConnectionBlocked {
            pool: self.pool.clone(),
            connection: connection.to_owned(),
            reason: reason.to_owned(),
        });
    }

    pub(crate) fn unblocked(&self, connection: &str) {
        self.events.emit(Event::ConnectionUnblocked { pool: self.pool.clone(), connection: connection.to_owned() });
    }

    /// What would be told of this message. Costs one atomic load where nobody wants to know.
    #[inline]
    pub(crate) fn note(&self, message: &Message) -> Option<Noted> {
        if self.events.is_heard() { self.note_it(message) } else { None }
    }

    #[cold]
    fn note_it(&self, message: &Message) -> Option<Noted> {
        // A handler that publishes what it is told of would be told of that, without end.
        let message_id = || message.message_id().map(str::to_owned);
        (!self.events.is_own_thread()).then(|| Noted(Box::new(NotedMessage { message_id: message_id() })))
    }

    /// A message that was published without being noted has failed for good.
    pub(crate) fn failed(&self, to: (&str, &str), message: &Message, error: &Error) {
        if let Some(noted) = self.note(message) {
            self.publish_failed(to, noted, error);
        }
    }

    /// A message was not written at all.
    pub(crate) fn not_entered(&self, to: (&str, &str), noted: Option<Noted>, error: &Error) {
        self.meter.not_entered(error);
        if let Some(noted) = noted {
            self.publish_failed(to, noted, error);
        }
    }

    /// A message has failed for good. The meter has counted it, each time it was tried.
    pub(crate) fn publish_failed(&self, (exchange, routing_key): (&str, &str), noted: Noted, error: &Error) {
        let Noted(message) = noted;
        self.events.emit(Event::PublishFailed {
            pool: self.pool.clone(),
            exchange: exchange.to_owned(),
            routing_key: routing_key.to_owned(),
            message_id: message.message_id,
            error: error.clone(),
        });
    }
}

#[cfg(test)]
impl PoolEvents {
    /// Of a pool that is not there.
    pub(crate) fn of_nobody() -> std::sync::Arc<PoolEvents> {
        std::sync::Arc::new(PoolEvents::new("test", 1, "amqp://localhost".to_owned(), Events::default()))
    }
}
