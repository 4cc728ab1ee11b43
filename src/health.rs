//! How a program stands with its brokers, for probes and for people.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::{Serialize, Serializer};
use serde_json::json;

use crate::error::{ConnectError, Error};
use crate::listener::{ListenerState, PauseReason};

/// How an app stands: its pools, and the listeners that were started through it. See [`App::health`](crate::App::health).
///
/// `Display` gives one line for people. `Serialize` gives the same as a map, with durations in seconds. Neither holds a
/// password.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Health {
    /// The app's pools: `publish`, `listen`, then the others by name.
    pub pools: Vec<PoolHealth>,
    /// Its listeners, in the order in which they were started; those that have ended are not among them.
    pub listeners: Vec<ListenerHealth>,
    /// The outboxes that it forwards, in the order in which they were started.
    pub outboxes: Vec<OutboxHealth>,
}

/// How an [outbox](crate::outbox) stands, as of the last second.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct OutboxHealth {
    /// The outbox's name.
    pub name: String,
    /// How many messages wait to be forwarded.
    pub pending: u64,
    /// How many messages the broker has refused.
    pub refused: u64,
    /// How long ago the oldest of those that wait was stored.
    pub oldest: Option<Duration>,
    /// How long ago it may have been stored for the outbox to be ready.
    pub ready_within: Duration,
    /// Whether this process forwards; if not, another one does, or nothing can be forwarded at present.
    pub forwards: bool,
    /// Why nothing can be forwarded at present.
    pub last_error: Option<Error>,
}

/// How a pool stands.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PoolHealth {
    /// The pool's name.
    pub name: String,
    /// The most connections it lends at a time.
    pub size: u32,
    /// Connections that are up, as far as is known without asking the broker.
    pub open: u32,
    /// Guards that are out, those that are still connecting included.
    pub in_use: u32,
    /// Threads that wait for a guard.
    pub waiting: u32,
    /// Why the broker takes no messages on one of its connections at present, if so.
    pub blocked: Option<String>,
    /// Why the last attempt to connect failed; `None` once one succeeds.
    pub last_failure: Option<ConnectError>,
    /// Whether it lends no more.
    pub closed: bool,
    /// What the broker would not declare on its connections, such as `queue "orders"`, and why; and has not declared since. Only
    /// where such things are left out: see [`Topology::skip_failed`](crate::Topology::skip_failed). It may be ready all the same.
    pub not_declared: Vec<(String, Error)>,
    /// How long the broker took to answer, where [`App::check`](crate::App::check) asked it.
    pub round_trip: Option<Duration>,
    /// Why [`App::check`](crate::App::check) had no answer.
    pub error: Option<Error>,
}

/// How a listener stands.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ListenerHealth {
    /// The listener's name.
    pub name: String,
    /// The queues it was asked to listen on; one that the broker names is empty here.
    pub queues: Vec<String>,
    /// What it is doing.
    pub state: ListenerState,
    /// For how long.
    pub since: Duration,
    /// How many threads have a consumer.
    pub workers: usize,
    /// Why it has last lost its consumers or could not get them, which may be long ago.
    pub last_error: Option<Error>,
}

impl Health {
    /// Whether every pool, every listener and every outbox is ready.
    pub fn is_ready(&self) -> bool {
        self.pools.iter().all(PoolHealth::is_ready)
            && self.listeners.iter().all(ListenerHealth::is_ready)
            && self.outboxes.iter().all(OutboxHealth::is_ready)
    }
}

impl PoolHealth {
    /// Whether it can be used, as far as is known: it is not closed, the broker does not block it, and it has a
    /// connection, or has not failed to get one. One that was never used counts as ready.
    pub fn is_ready(&self) -> bool {
        !self.closed && self.blocked.is_none() && self.error.is_none() && !self.is_cut_off()
    }

    fn is_cut_off(&self) -> bool {
        self.open == 0 && self.last_failure.is_some()
    }

    /// What is in its way.
    fn trouble(&self) -> Option<String> {
        if self.closed {
            return Some("closed".to_owned());
        }
        if let Some(error) = &self.error {
            return Some(error.to_string());
        }
        if let Some(failure) = self.last_failure.as_ref().filter(|_| self.is_cut_off()) {
            return Some(failure.to_string());
        }
        self.blocked.as_ref().map(|reason| format!("blocked by the broker: {reason}"))
    }
}

impl ListenerHealth {
    /// Whether every one of its threads has a consumer.
    pub fn is_ready(&self) -> bool {
        matches!(self.state, ListenerState::Consuming)
    }

    /// Why it rests, if it does.
    fn pause(&self) -> Option<&PauseReason> {
        match &self.state {
            ListenerState::Paused { why, .. } => Some(why),
            _ => None,
        }
    }

    fn state(&self) -> &'static str {
        match self.state {
            ListenerState::Starting => "starting",
            ListenerState::Consuming => "consuming",
            ListenerState::Recovering { .. } => "recovering",
            ListenerState::Paused { .. } => "paused",
            ListenerState::Stopped => "stopped",
        }
    }
}

impl OutboxHealth {
    /// Whether nothing waits for longer than it may.
    pub fn is_ready(&self) -> bool {
        self.oldest.is_none_or(|oldest| oldest <= self.ready_within)
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_ready() { "ready" } else { "not ready" })?;
        self.pools.iter().try_for_each(|pool| write!(f, "; {pool}"))?;
        self.listeners.iter().try_for_each(|listener| write!(f, "; {listener}"))?;
        self.outboxes.iter().try_for_each(|outbox| write!(f, "; {outbox}"))
    }
}

impl fmt::Display for PoolHealth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PoolHealth { name, size, open, in_use, waiting, .. } = self;
        write!(f, "pool {name:?}: {open} open, {in_use} of {size} in use, {waiting} waiting")?;
        if let Some(round_trip) = self.round_trip {
            write!(f, ", answers in {round_trip:.1?}")?;
        }
        if let Some(trouble) = self.trouble() {
            write!(f, ", {trouble}")?;
        }
        self.not_declared.iter().try_for_each(|(entity, error)| write!(f, ", {entity} is not declared: {error}"))
    }
}

impl fmt::Display for ListenerHealth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "listener {:?}: {} for {:.1?}", self.name, self.state(), self.since)?;
        match (&self.last_error, self.pause()) {
            (_, Some(why)) => write!(f, ": {why}"),
            (Some(error), None) if !self.is_ready() => write!(f, " after {error}"),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for OutboxHealth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let OutboxHealth { name, pending, refused, .. } = self;
        write!(f, "outbox {name:?}: {pending} pending, {refused} refused")?;
        if let Some(oldest) = self.oldest {
            write!(f, ", the oldest for {oldest:.1?}")?;
        }
        self.last_error.as_ref().map_or(Ok(()), |error| write!(f, ", {error}"))
    }
}

impl Serialize for Health {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Health { pools, listeners, outboxes } = self;
        json!({ "ready": self.is_ready(), "pools": pools, "listeners": listeners, "outboxes": outboxes })
            .serialize(serializer)
    }
}

impl Serialize for PoolHealth {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        json!({
            "name": self.name,
            "ready": self.is_ready(),
            "size": self.size,
            "open": self.open,
            "in_use": self.in_use,
            "waiting": self.waiting,
            "blocked": self.blocked,
            "last_failure": text(&self.last_failure),
            "closed": self.closed,
            "not_declared": self.not_declared.iter().map(|(entity, error)| (entity.as_str(), error.to_string())).collect::<BTreeMap<_, _>>(),
            "round_trip": self.round_trip.map(|round_trip| round_trip.as_secs_f64()),
            "error": text(&self.error),
        })
        .serialize(serializer)
    }
}

impl Serialize for ListenerHealth {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        json!({
            "name": self.name,
            "ready": self.is_ready(),
            "queues": self.queues,
            "state": self.state(),
            "since": self.since.as_secs_f64(),
            "workers": self.workers,
            "pause": self.pause().map(PauseReason::to_string),
            "last_error": text(&self.last_error),
        })
        .serialize(serializer)
    }
}

impl Serialize for OutboxHealth {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        json!({
            "name": self.name,
            "ready": self.is_ready(),
            "pending": self.pending,
            "refused": self.refused,
            "oldest": self.oldest.map(|oldest| oldest.as_secs_f64()),
            "forwards": self.forwards,
            "last_error": text(&self.last_error),
        })
        .serialize(serializer)
    }
}

fn text<T: fmt::Display>(value: &Option<T>) -> Option<String> {
    value.as_ref().map(T::to_string)
}
