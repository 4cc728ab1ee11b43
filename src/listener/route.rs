//! One queue of a listener, and the handler of its messages with what is around it.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::batch::BatchHandler;
use super::builder::Part;
use super::rate::RateLimit;
use super::stream::Position;
use super::unsettled::Unsettled;
use super::{Context, ListenerBuilder};
use crate::connection::{Connection, Delivery};
use crate::error::Result;
use crate::metrics::meter::{Level, RouteMeter};
use crate::outcome::Outcome;
use crate::topology::QueueType;

pub(super) type AutoHandler = dyn Fn(&Context<'_>, &Delivery<'_>) -> Outcome + Send + Sync;
type Around = dyn Fn(&Context<'_>, &Delivery<'_>, &dyn Fn() -> Outcome) -> Outcome + Send + Sync;
type ManualHandler = dyn Fn(&Context<'_>, Unsettled) + Send + Sync;

/// A handler of one delivery at a time.
pub(super) enum SingleHandler {
    /// Returns what is to become of the delivery.
    Auto(Box<AutoHandler>),
    /// Takes the delivery, to settle it some other time.
    Manual(Box<ManualHandler>),
}

pub(super) enum Handler {
    Single(SingleHandler),
    /// Returns what is to become of many deliveries.
    Batch(BatchHandler),
}

impl Handler {
    /// Whether what fails goes by the retry policy.
    pub(super) fn has_outcomes(&self) -> bool {
        !matches!(self, Handler::Single(SingleHandler::Manual(_)))
    }

    /// How many messages it takes at a time.
    pub(super) fn batch_size(&self) -> u16 {
        match self {
            Handler::Single(_) => 1,
            Handler::Batch(handler) => handler.max,
        }
    }
}

/// What is around the handlers of a listener, the outermost first.
#[derive(Clone, Default)]
pub(crate) struct Arounds(Vec<Arc<Around>>);

impl fmt::Debug for Arounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Arounds").field(&self.0.len()).finish()
    }
}

impl Arounds {
    /// Adds one inside of those there are.
    pub(crate) fn add<F>(&mut self, around: F)
    where
        F: Fn(&Context<'_>, &Delivery<'_>, &dyn Fn() -> Outcome) -> Outcome + Send + Sync + 'static,
    {
        self.0.push(Arc::new(around));
    }

    pub(super) fn put_around(self, handler: Box<AutoHandler>) -> Box<AutoHandler> {
        self.0.into_iter().rev().fold(handler, |inner, around| {
            Box::new(move |context, delivery| around(context, delivery, &|| inner(context, delivery)))
        })
    }
}

/// One queue of a listener, and what is done with its messages.
pub(crate) struct Route {
    pub(super) spec: ListenerBuilder,
    pub(super) handler: Handler,
    pub(super) rate: Option<Arc<RateLimit>>,
    /// How far it has come, if the queue is a stream.
    pub(super) position: Option<Position>,
    /// There while this listener is the active consumer of the partition, as far as it knows: a message has come. A leaf among
    /// locks.
    active: Mutex<Option<Level>>,
    meter: OnceLock<RouteMeter>,
    /// What the broker has said of the type of the queue.
    asked_type: OnceLock<QueueType>,
}

impl Route {
    pub(super) fn new(spec: ListenerBuilder, position: Option<Position>, handler: Handler) -> Route {
        let rate = spec.max_rate.map(|rate| Arc::new(RateLimit::new(rate)));
        Route {
            spec,
            handler,
            rate,
            position,
            active: Mutex::default(),
            meter: OnceLock::new(),
            asked_type: OnceLock::new(),
        }
    }

    /// The type of the queues beside its own.
    pub(super) fn retry_queue_type(&self, connection: &Connection) -> Result<QueueType> {
        let spec = &self.spec;
        let known = spec.declared_type().or_else(|| self.asked_type.get().copied());
        if let Some(wanted) = spec.retry_queue_type.filter(|_| known.is_none()) {
            return Ok(wanted);
        }
        let own = match known {
            Some(known) => Some(known),
            None => connection.queue_type(&spec.queue)?,
        };
        if let Some(own) = own {
            spec.check_type(own)?;
            self.asked_type.get_or_init(|| own);
        }
        let own = own.filter(|own| *own != QueueType::Stream);
        Ok(spec.retry_queue_type.or(own).unwrap_or(QueueType::Classic))
    }

    /// Its metrics, which are named by a listener that may have several of its kind.
    pub(super) fn meter(&self, listener: &str) -> &RouteMeter {
        self.meter.get_or_init(|| RouteMeter::new(listener, &self.spec.queue))
    }

    pub(super) fn is_partition(&self) -> bool {
        self.spec.part == Part::Partition
    }

    fn active(&self) -> MutexGuard<'_, Option<Level>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A message of this partition has come to a listener of that name.
    pub(super) fn activate(&self, listener: &str) {
        self.active().get_or_insert_with(|| self.meter(listener).active.one());
    }

    /// Its consumer has gone.
    pub(super) fn deactivate(&self) {
        *self.active() = None;
    }

    pub(super) fn is_active(&self) -> bool {
        self.active().is_some()
    }

    pub(crate) fn queue(&self) -> &str {
        &self.spec.queue
    }
}

impl fmt::Debug for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Route").field("queue", &self.spec.queue).finish_non_exhaustive()
    }
}
