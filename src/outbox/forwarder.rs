//! The thread that publishes what is stored.
//!
//! It takes the oldest messages, publishes them in one pipeline, and notes in one transaction what has become of them. A message that
//! may not have arrived is published again, and with it all of its ordering key behind it, so that the order holds.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, after, bounded, never, select};

use super::store::{Forwarding, Status, Stored};
use super::{Inner, lock};
use crate::app::Companion;
use crate::error::{Error, Result};
use crate::event::OutboxEvents;
use crate::fork::Maker;
use crate::health::OutboxHealth;
use crate::pool::{Backoff, Pool};

/// How many messages are published at a time.
const BATCH: usize = 256;

/// The first wait after a failure, and the longest.
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// How often a message is published that the broker nacks, before it counts as refused.
const NACKS: u32 = 5;

/// How often a look is had for a commit that is expected.
const EXPECTING: Duration = Duration::from_millis(5);

/// How often the numbers for health and metrics are asked for.
const STATUS_EVERY: Duration = Duration::from_secs(1);

/// How long a process waits that cannot forward, because another one does.
const STANDBY: Duration = Duration::from_secs(1);

/// What others may know of a forwarder.
#[derive(Default)]
struct Standing {
    status: Status,
    as_of: Option<Instant>,
    forwards: bool,
    last_error: Option<Error>,
}

/// A forwarder, for the app that it belongs to.
pub(super) struct Handle {
    outbox: Arc<Inner>,
    standing: Arc<Mutex<Standing>>,
    maker: Maker,
    /// Nothing is sent; dropping it is the sign to end.
    stop: Mutex<Option<Sender<()>>>,
    /// Nothing is sent; its end is the sign that the thread is done.
    done: Receiver<()>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Companion for Handle {
    fn tell_to_end(&self) {
        drop(lock(&self.stop).take());
    }

    fn wait(&self, deadline: Instant) -> Result<(), String> {
        if let Err(RecvTimeoutError::Timeout) = self.done.recv_deadline(deadline) {
            return Err(format!("the forwarder of outbox {:?}", self.outbox.name));
        }
        if let Some(thread) = lock(&self.thread).take() {
            // A panic in it has been printed.
            let _ = thread.join();
        }
        Ok(())
    }

    fn health(&self) -> OutboxHealth {
        let standing = lock(&self.standing);
        let since = standing.as_of.map_or(Duration::ZERO, |at| at.elapsed());
        OutboxHealth {
            name: self.outbox.name.clone(),
            pending: standing.status.pending,
            refused: standing.status.refused,
            oldest: standing.status.oldest.map(|oldest| oldest + since),
            ready_within: self.outbox.builder.ready_within,
            forwards: standing.forwards,
            last_error: standing.last_error.clone(),
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if !self.maker.is_parent() {
            self.tell_to_end();
        }
    }
}

/// Starts a forwarder that publishes on connections of `pool`.
pub(super) fn start(outbox: &Arc<Inner>, pool: &Pool) -> Result<Arc<Handle>> {
    let (stop, stopped) = bounded(0);
    let (alive, done) = bounded::<()>(0);
    let standing = Arc::<Mutex<Standing>>::default();
    let forwarder = Forwarder {
        outbox: Arc::clone(outbox),
        pool: pool.clone(),
        standing: Arc::clone(&standing),
        events: OutboxEvents::new(&outbox.name, pool.context().events.all().clone()),
        stopped,
        forwarding: None,
        held: HashMap::new(),
        nacks: HashMap::new(),
        unsettled: Unsettled::default(),
    };
    let name = "coney-outbox".to_owned();
    let thread = Builder::new()
        .name(name.clone())
        .spawn(move || {
            let _alive = alive;
            forwarder.run();
        })
        .map_err(|source| Error::Thread { name, source: Arc::new(source) })?;
    Ok(Arc::new(Handle {
        outbox: Arc::clone(outbox),
        standing,
        maker: Maker::this(),
        stop: Mutex::new(Some(stop)),
        done,
        thread: Mutex::new(Some(thread)),
    }))
}

/// What has become of messages and is not noted in the database.
#[derive(Default)]
struct Unsettled {
    sent: Vec<i64>,
    refused: Vec<(i64, String)>,
}

impl Unsettled {
    fn is_empty(&self) -> bool {
        self.sent.is_empty() && self.refused.is_empty()
    }
}

/// An ordering key whose messages wait.
struct Hold {
    until: Instant,
    backoff: Backoff,
}

struct Forwarder {
    outbox: Arc<Inner>,
    pool: Pool,
    standing: Arc<Mutex<Standing>>,
    events: OutboxEvents,
    stopped: Receiver<()>,
    forwarding: Option<Box<dyn Forwarding>>,
    /// By ordering key.
    held: HashMap<String, Hold>,
    /// How often messages have been nacked, by id.
    nacks: HashMap<i64, u32>,
    unsettled: Unsettled,
}

/// What a round has come to.
enum Round {
    /// There may be more.
    Sent,
    /// There is nothing to do.
    Idle,
    /// Another process forwards.
    Standby,
}

/// What has become of one message.
enum Fate {
    Sent,
    Refused(String),
    /// It has to be published again, for this reason.
    Again(Error),
    /// Nobody knows, for the failure may have been meant for another message.
    Alone,
    Untried,
}

impl Forwarder {
    fn run(mut self) {
        let mut backoff = Backoff::new(FIRST_WAIT, LONGEST_WAIT);
        let mut counted = Instant::now();
        self.count();
        while !self.is_stopped() {
            let round = self.round();
            let is_failing = round.is_err();
            let wait = match round {
                Ok(Round::Sent) => {
                    self.fares(None);
                    backoff.reset();
                    Duration::ZERO
                }
                Ok(Round::Idle) => {
                    self.fares(None);
                    backoff.reset();
                    self.until_next_look()
                }
                Ok(Round::Standby) => STANDBY,
                Err(error) => {
                    let wait = backoff.next();
                    if let Error::Store { .. } = error {
                        // A connection of its own may be what is wrong.
                        self.forwarding = None;
                    }
                    self.fares(Some((error, wait)));
                    wait
                }
            };
            if counted.elapsed() >= STATUS_EVERY {
                self.count();
                counted = Instant::now();
            }
            if !wait.is_zero() {
                // What is stored meanwhile is no reason to try a broker sooner that is not there.
                let woken = if is_failing { never() } else { self.outbox.woken.clone() };
                select! {
                    recv(self.stopped) -> _ => {}
                    recv(woken) -> _ => {}
                    recv(after(wait)) -> _ => {}
                }
            }
        }
        // What is confirmed is not to be published once more by whoever comes next.
        if let Err(error) = self.settle() {
            let outbox = self.outbox.name.as_str();
            log::warn!(outbox; "outbox {outbox:?}: messages that were sent will be sent once more: {error}");
        }
    }

    fn is_stopped(&self) -> bool {
        self.stopped.try_recv() == Err(TryRecvError::Disconnected)
    }

    /// How long the thread waits when no message can be sent.
    fn until_next_look(&self) -> Duration {
        let poll = if self.outbox.is_commit_expected() { EXPECTING } else { self.outbox.builder.poll_interval };
        let now = Instant::now();
        self.held.values().map(|hold| hold.until.saturating_duration_since(now)).chain([poll]).min().unwrap_or(poll)
    }

    /// Notes how it fares, and tells if that is news.
    fn fares(&self, failure: Option<(Error, Duration)>) {
        let mut standing = lock(&self.standing);
        standing.forwards = self.forwarding.is_some();
        let was_failing = standing.last_error.is_some();
        standing.last_error = failure.as_ref().map(|(error, _)| error.clone());
        drop(standing);
        match failure {
            Some((error, wait)) => self.events.stalled(error, wait),
            None if was_failing => self.events.resumed(),
            None => {}
        }
    }

    /// Asks for the numbers that others may want.
    fn count(&self) {
        // A database that does not answer is told by the next round.
        let Ok(status) = self.outbox.store.status() else { return };
        self.events.counted(status.pending, status.oldest);
        let mut standing = lock(&self.standing);
        standing.status = status;
        standing.as_of = Some(Instant::now());
    }

    /// The side of the database that gives messages out. `None` if another process has it.
    fn forwarding(&mut self) -> Result<Option<&mut Box<dyn Forwarding>>> {
        if self.forwarding.is_none() {
            let forwarding = self.outbox.store.forwarding();
            self.forwarding = forwarding.map_err(|error| self.outbox.error("forwarding from", error))?;
        }
        Ok(self.forwarding.as_mut())
    }

    fn round(&mut self) -> Result<Round> {
        self.settle()?;
        let now = Instant::now();
        let held: Vec<String> =
            self.held.iter().filter(|(_, hold)| hold.until > now).map(|(key, _)| key.clone()).collect();
        let Some(forwarding) = self.forwarding()? else { return Ok(Round::Standby) };
        let taken = forwarding.take(BATCH, &held);
        let taken = taken.map_err(|error| self.outbox.error("forwarding from", error))?;
        if taken.is_empty() {
            self.held.retain(|_, hold| hold.until > now);
            return Ok(Round::Idle);
        }
        let published = self.publish(taken);
        // Also where nothing was sent: another process may be able to send what was taken.
        self.note()?;
        published.map(|()| Round::Sent)
    }

    /// Notes in the database what has become of messages, if that is not done.
    fn settle(&mut self) -> Result<()> {
        if self.unsettled.is_empty() { Ok(()) } else { self.note() }
    }

    /// Notes in the database what has become of messages, and lets go of the rest of those that were taken.
    fn note(&mut self) -> Result<()> {
        self.forwarding()?;
        let Some(forwarding) = &mut self.forwarding else { return Ok(()) };
        let Unsettled { sent, refused } = &self.unsettled;
        let settled = forwarding.settle(sent, refused, self.outbox.builder.keep_sent);
        settled.map_err(|error| self.outbox.error("settling in", error))?;
        self.unsettled = Unsettled::default();
        Ok(())
    }

    /// Publishes messages, in order. Fails if the broker cannot be reached at all.
    fn publish(&mut self, mut taken: Vec<Stored>) -> Result<()> {
        // Keys with a message that has to be published again. Messages behind it must not go before it.
        let mut waiting = HashSet::new();
        if !self.outbox.builder.blocks_on_refusal {
            return self.publish_wave(&taken, &mut waiting);
        }
        // What is behind a message must not be under way before that is known not to be refused.
        while !taken.is_empty() {
            let mut keys = HashSet::new();
            let (wave, rest): (Vec<_>, Vec<_>) =
                taken.into_iter().partition(|stored| keys.insert(stored.entry.ordering_key.clone()));
            self.publish_wave(&wave, &mut waiting)?;
            taken = rest.into_iter().filter(|stored| !waiting.contains(&stored.entry.ordering_key)).collect();
        }
        Ok(())
    }

    /// Publishes messages together. Adds to `waiting` the keys whose messages have to wait.
    fn publish_wave(&mut self, taken: &[Stored], waiting: &mut HashSet<String>) -> Result<()> {
        let fates = self.publish_together(taken)?;
        // Keys of which a message was published once more. What is behind it is too, or it would have been overtaken.
        let mut repeated = HashSet::new();
        let mut failure = None;
        for (stored, fate) in taken.iter().zip(fates) {
            let key = stored.entry.ordering_key.as_str();
            if waiting.contains(key) {
                continue;
            }
            let fate = match fate {
                Fate::Alone | Fate::Untried if failure.is_some() => Fate::Untried,
                Fate::Alone | Fate::Untried => {
                    repeated.insert(key);
                    self.publish_alone(stored)
                }
                Fate::Sent if repeated.contains(key) => self.publish_alone(stored),
                known => known,
            };
            match fate {
                Fate::Sent => {
                    self.held.remove(key);
                    self.nacks.remove(&stored.id);
                    self.events.forwarded();
                    self.unsettled.sent.push(stored.id);
                }
                Fate::Refused(reason) if self.outbox.builder.blocks_on_refusal => {
                    self.hold(stored, &reason);
                    waiting.insert(key.to_owned());
                }
                Fate::Refused(reason) => {
                    self.nacks.remove(&stored.id);
                    self.events.refused(stored.entry.message.message_id().unwrap_or_default(), &reason);
                    self.unsettled.refused.push((stored.id, reason));
                }
                Fate::Again(error @ Error::Nacked { .. }) => {
                    self.hold(stored, &error.to_string());
                    waiting.insert(key.to_owned());
                }
                Fate::Again(error) => {
                    failure.get_or_insert(error);
                    waiting.insert(key.to_owned());
                }
                Fate::Alone | Fate::Untried => {
                    waiting.insert(key.to_owned());
                }
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// Has the messages of a key wait, for longer each time.
    fn hold(&mut self, stored: &Stored, reason: &str) {
        let Stored { id, entry } = stored;
        let new = || Hold { until: Instant::now(), backoff: Backoff::new(FIRST_WAIT, LONGEST_WAIT) };
        let hold = self.held.entry(entry.ordering_key.clone()).or_insert_with(new);
        let wait = hold.backoff.next();
        hold.until = Instant::now() + wait;
        let (outbox, message_id) = (self.outbox.name.as_str(), entry.message.message_id().unwrap_or_default());
        log::warn!(
            outbox, message_id;
            "outbox {outbox:?}: message {id}, id {message_id:?}: {reason}; its ordering key {:?} waits for {wait:.1?}",
            entry.ordering_key
        );
    }

    fn publish_together(&mut self, taken: &[Stored]) -> Result<Vec<Fate>> {
        let connection = self.pool.connection_or_cause()?;
        let messages = taken
            .iter()
            .map(|Stored { entry, .. }| (entry.exchange.as_str(), entry.routing_key.as_str(), entry.message.clone()));
        let batch = match connection.publish_batch(messages) {
            Ok(_) => return Ok(taken.iter().map(|_| Fate::Sent).collect()),
            Err(Error::Batch(batch)) => batch,
            Err(error) => return Err(error),
        };
        let mut fates = Vec::with_capacity(taken.len());
        for (position, stored) in taken.iter().enumerate() {
            fates.push(match batch.error_at(position) {
                _ if position >= batch.taken => Fate::Untried,
                None => Fate::Sent,
                Some(error) => self.fate(stored, error, false),
            });
        }
        Ok(fates)
    }

    fn publish_alone(&mut self, stored: &Stored) -> Fate {
        let entry = &stored.entry;
        let published = self
            .pool
            .connection_or_cause()
            .and_then(|connection| connection.publish(&entry.exchange, &entry.routing_key, entry.message.clone()));
        match published {
            Ok(()) => Fate::Sent,
            Err(error) => self.fate(stored, &error, true),
        }
    }

    /// What an error says of a message, which may have been published with others.
    fn fate(&mut self, stored: &Stored, error: &Error, was_alone: bool) -> Fate {
        match error {
            Error::Nacked { .. } => {
                let nacks = self.nacks.entry(stored.id).or_default();
                *nacks += 1;
                if *nacks >= NACKS { Fate::Refused(error.to_string()) } else { Fate::Again(error.clone()) }
            }
            Error::Returned { .. } | Error::InvalidArgument { .. } | Error::Refused { .. } => {
                Fate::Refused(error.to_string())
            }
            Error::PoolClosed { .. } => Fate::Again(error.clone()),
            _ if !was_alone => Fate::Alone,
            error if error.is_transient() || matches!(error, Error::Connect { .. }) => Fate::Again(error.clone()),
            error => Fate::Refused(error.to_string()),
        }
    }
}
