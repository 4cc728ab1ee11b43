//! What every message of a pool passes on its way out, before it is written: the trace context it carries, and the hooks
//! that a program has put there.

use std::cell::Cell;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::delay::Declared;
use crate::error::{Error, Result};
use crate::event::PoolEvents;
use crate::message::Message;
use crate::trace;

/// Where a message is bound for. See [`Pool::before_publish`](crate::Pool::before_publish).
#[derive(Debug, Clone, Copy)]
pub struct Outgoing<'a> {
    pool: &'a str,
    exchange: &'a str,
    routing_key: &'a str,
}

impl Outgoing<'_> {
    /// The pool that publishes it.
    pub fn pool(&self) -> &str {
        self.pool
    }

    /// The exchange; empty for the default exchange.
    pub fn exchange(&self) -> &str {
        self.exchange
    }

    /// The routing key.
    pub fn routing_key(&self) -> &str {
        self.routing_key
    }
}

type Hook = dyn Fn(&Outgoing<'_>, Message) -> Result<Message> + Send + Sync;

/// Shared by a pool and its connections.
pub(crate) struct PublishContext {
    /// Whether there are hooks at all, so that who has none pays no lock.
    has_hooks: AtomicBool,
    hooks: RwLock<Arc<[Arc<Hook>]>>,
    /// Counts what goes out, and counts and tells all else that happens to the pool.
    pub(crate) events: Arc<PoolEvents>,
    /// The largest body that the broker takes, in bytes, once it has said so; until then, the largest number.
    body_max: AtomicUsize,
    /// What is there for messages that are to arrive later.
    pub(crate) delays: Declared,
}

impl fmt::Debug for PublishContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PublishContext").field("pool", &self.pool()).finish_non_exhaustive()
    }
}

impl PublishContext {
    pub(crate) fn new(events: Arc<PoolEvents>) -> PublishContext {
        PublishContext {
            has_hooks: AtomicBool::new(false),
            hooks: RwLock::new(Arc::from([])),
            events,
            body_max: AtomicUsize::new(usize::MAX),
            delays: Declared::default(),
        }
    }

    /// Notes the largest body that the broker takes, if it has closed a channel for a larger one.
    pub(crate) fn heed(&self, close_text: &str) {
        if let Some(max) = told_body_max(close_text) {
            self.body_max.store(max, Ordering::Relaxed);
        }
    }

    /// Another broker may answer now, or the same with another limit.
    pub(crate) fn forget_body_max(&self) {
        self.body_max.store(usize::MAX, Ordering::Relaxed);
    }

    /// Refuses a body that the broker would close the channel for, and with it all that is under way there.
    pub(crate) fn check_body(&self, message: &Message) -> Result<()> {
        let (len, max) = (message.body().len(), self.body_max.load(Ordering::Relaxed));
        if len <= max {
            return Ok(());
        }
        Err(Error::invalid("message body", format!("{len} bytes, expected at most {max}, as the broker has said")))
    }

    /// The name of the pool.
    pub(crate) fn pool(&self) -> &str {
        self.events.pool()
    }

    /// Adds a hook behind those there are.
    pub(crate) fn add(&self, hook: impl Fn(&Outgoing<'_>, Message) -> Result<Message> + Send + Sync + 'static) {
        let mut hooks = self.hooks.write().unwrap_or_else(PoisonError::into_inner);
        *hooks = hooks.iter().cloned().chain([Arc::new(hook) as Arc<Hook>]).collect();
        self.has_hooks.store(true, Ordering::Release);
    }

    /// The message as it is to go out, or why it is not to.
    pub(crate) fn prepare(&self, exchange: &str, routing_key: &str, message: Message) -> Result<Message> {
        let message = trace::carried_by(message);
        if !self.has_hooks.load(Ordering::Acquire) {
            return Ok(message);
        }
        let outgoing = Outgoing { pool: self.pool(), exchange, routing_key };
        let Some(_in_hook) = InHook::enter() else { return Ok(message) };
        // Taken out of the lock: a hook may publish, and add hooks.
        let hooks = Arc::clone(&self.hooks.read().unwrap_or_else(PoisonError::into_inner));
        let noted = self.events.note(&message);
        let message = hooks.iter().try_fold(message, |message, hook| hook(&outgoing, message));
        // Nobody tries it again.
        message.inspect_err(|error| self.events.not_entered((exchange, routing_key), noted, error))
    }
}

/// The limit in `message size 20 is larger than configured max size 10`.
fn told_body_max(close_text: &str) -> Option<usize> {
    let (_, max) = close_text.split_once(" is larger than configured max size ")?;
    max.trim().parse().ok()
}

thread_local! {
    static IN_HOOK: Cell<bool> = const { Cell::new(false) };
}

/// This thread runs hooks. They are not run for what a hook publishes, which would go on without end.
struct InHook;

impl InHook {
    /// `None` on a thread that runs hooks already.
    fn enter() -> Option<InHook> {
        // In a destructor of another thread-local the note may be gone; then nothing is known of an earlier one.
        let was_in = IN_HOOK.try_with(|in_hook| in_hook.replace(true)).unwrap_or_default();
        // Made only then: dropping it ends the note.
        if was_in { None } else { Some(InHook) }
    }
}

impl Drop for InHook {
    fn drop(&mut self) {
        let _ = IN_HOOK.try_with(|in_hook| in_hook.set(false));
    }
}
