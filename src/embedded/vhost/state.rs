//! What is under the lock of a virtual host, and how its parts are found.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::time::Duration;

use super::super::exchange::{Exchange, ExchangeId, Kind, QueueId};
use super::super::ledger::ConsumerId;
use super::super::outbox::SessionId;
use super::super::queue::Queue;
use super::super::refusal::Refusal;
use super::super::users::Right;
use super::Limits;
use super::channel::{Channel, ChannelKey, Consumer};
use super::rest::Rest;
use super::timers::Timers;
use crate::amqp::ShortString;
use crate::amqp::method::Method;

/// The exchanges that are there from the beginning, besides the nameless one, which needs no bindings.
const PREDECLARED: [(&str, Kind, bool); 6] = [
    ("amq.direct", Kind::Direct, false),
    ("amq.fanout", Kind::Fanout, false),
    ("amq.topic", Kind::Topic, false),
    ("amq.headers", Kind::Headers, false),
    ("amq.match", Kind::Headers, false),
    ("amq.rabbitmq.trace", Kind::Topic, true),
];

/// What the engine keeps of a connection.
#[derive(Debug, Default)]
pub(super) struct Session {
    pub(super) channels: BTreeSet<ChannelKey>,
    /// The exclusive queues that die with it.
    pub(super) queues: BTreeSet<QueueId>,
    /// Channels with confirms to be told.
    pub(super) unflushed: Vec<ChannelKey>,
}

/// What is freed outside the lock, since that may take a while: messages, or an exchange with its bindings.
pub(super) type Discarded = Box<dyn fmt::Debug + Send>;

/// What tests ask to go wrong.
#[derive(Debug, Default)]
pub(super) struct Mischief {
    /// So many publishes more are nacked.
    pub(super) nacks: usize,
    pub(super) confirm_delay: Option<Duration>,
    pub(super) withhold_confirms: bool,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) name: String,
    pub(super) limits: Limits,
    pub(super) exchange_names: BTreeMap<ShortString, ExchangeId>,
    pub(super) exchanges: BTreeMap<ExchangeId, Exchange>,
    /// The exchanges each exchange is bound to from.
    pub(super) sources: BTreeMap<ExchangeId, BTreeSet<ExchangeId>>,
    pub(super) queue_names: BTreeMap<ShortString, QueueId>,
    pub(super) queues: BTreeMap<QueueId, Queue>,
    pub(super) sessions: BTreeMap<SessionId, Session>,
    pub(super) channels: BTreeMap<ChannelKey, Channel>,
    pub(super) consumers: BTreeMap<ConsumerId, Consumer>,
    /// Consumers of direct reply-to, by what stands in their addresses.
    pub(super) repliers: BTreeMap<ShortString, ChannelKey>,
    pub(super) timers: Timers,
    /// What is left to do.
    pub(super) rest: VecDeque<Rest>,
    /// Somebody sees to the rest.
    pub(super) is_attended: bool,
    /// What nobody wants any more, to be freed when the lock is.
    pub(super) discarded: Vec<Discarded>,
    pub(super) mischief: Mischief,
    last_id: u64,
    /// The last number given out for the order in which consumers are served and passed over.
    pub(super) last_turn: u64,
}

/// A queue or an exchange as texts name it.
pub(super) struct Named<'a> {
    pub(super) kind: &'static str,
    pub(super) name: &'a ShortString,
    pub(super) vhost: &'a str,
}

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} '{}' in vhost '{}'", self.kind, self.name, self.vhost)
    }
}

impl State {
    pub(super) fn new(name: &str, limits: Limits) -> State {
        let mut state = State {
            name: name.to_string(),
            limits,
            exchange_names: BTreeMap::new(),
            exchanges: BTreeMap::new(),
            sources: BTreeMap::new(),
            queue_names: BTreeMap::new(),
            queues: BTreeMap::new(),
            sessions: BTreeMap::new(),
            channels: BTreeMap::new(),
            consumers: BTreeMap::new(),
            repliers: BTreeMap::new(),
            timers: Timers::default(),
            rest: VecDeque::new(),
            is_attended: false,
            discarded: Vec::new(),
            mischief: Mischief::default(),
            last_id: 0,
            last_turn: 0,
        };
        for (name, kind, internal) in PREDECLARED {
            let mut exchange = Exchange::new(name.into(), kind);
            exchange.durable = true;
            exchange.internal = internal;
            state.add_exchange(exchange);
        }
        state
    }

    pub(super) fn new_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    pub(super) fn add_exchange(&mut self, exchange: Exchange) {
        let id = ExchangeId(self.new_id());
        self.exchange_names.insert(exchange.name.clone(), id);
        self.exchanges.insert(id, exchange);
    }

    pub(super) fn queue_named<'a>(&'a self, name: &'a ShortString) -> Named<'a> {
        Named { kind: "queue", name, vhost: &self.name }
    }

    pub(super) fn exchange_named<'a>(&'a self, name: &'a ShortString) -> Named<'a> {
        Named { kind: "exchange", name, vhost: &self.name }
    }

    pub(super) fn channel(&self, key: ChannelKey) -> Result<&Channel, Refusal> {
        self.channels.get(&key).ok_or_else(gone)
    }

    pub(super) fn channel_mut(&mut self, key: ChannelKey) -> Result<&mut Channel, Refusal> {
        self.channels.get_mut(&key).ok_or_else(gone)
    }

    /// The queue of this name.
    pub(super) fn find_queue(&self, name: &ShortString) -> Result<QueueId, Refusal> {
        let id = self.queue_names.get(name).copied();
        id.ok_or_else(|| Refusal::not_found(format_args!("no {}", self.queue_named(name))))
    }

    /// The queue of this name, if it is not another connection's own.
    pub(super) fn find_open_queue(&self, key: ChannelKey, name: &ShortString) -> Result<QueueId, Refusal> {
        let id = self.find_queue(name)?;
        self.check_owner(key, id)?;
        Ok(id)
    }

    /// Refuses a queue that belongs to another connection.
    pub(super) fn check_owner(&self, key: ChannelKey, id: QueueId) -> Result<(), Refusal> {
        let owner = self.queues.get(&id).and_then(|queue| queue.owner);
        let session = self.channel(key)?.outbox.id();
        if owner.is_none_or(|owner| owner == session) { Ok(()) } else { Err(self.locked(id)) }
    }

    pub(super) fn locked(&self, id: QueueId) -> Refusal {
        let name = self.queues.get(&id).map(|queue| queue.name.clone()).unwrap_or_default();
        Refusal::resource_locked(format_args!(
            "cannot obtain exclusive access to locked {}. It could be originally declared on another connection or \
             the exclusive property value does not match that of the original declaration.",
            self.queue_named(&name)
        ))
    }

    pub(super) fn find_exchange(&self, name: &ShortString) -> Result<ExchangeId, Refusal> {
        let id = self.exchange_names.get(name).copied();
        id.ok_or_else(|| Refusal::not_found(format_args!("no {}", self.exchange_named(name))))
    }

    /// Refuses what the user of the channel has no right to.
    pub(super) fn permit(&self, key: ChannelKey, right: Right, what: &Named<'_>) -> Result<(), Refusal> {
        let user = &self.channel(key)?.user;
        let default = ShortString::from("amq.default");
        let name = if what.kind == "exchange" && what.name.is_empty() { &default } else { what.name };
        if user.may(&self.name, right, name.as_bytes()) {
            return Ok(());
        }
        let what = Named { kind: what.kind, name, vhost: what.vhost };
        Err(Refusal::access_refused(format_args!("access to {what} refused for user '{}'", user.name)))
    }

    /// Tells the client of a channel something, behind the confirms that are owed: to RabbitMQ they belong to what came
    /// before.
    pub(super) fn tell(&mut self, key: ChannelKey, method: impl Into<Method>) {
        self.tell_confirms(key);
        if let Some(channel) = self.channels.get(&key) {
            channel.outbox.push(channel.number, method);
        }
    }

    /// As [`tell`](State::tell), unless the client does not want to know.
    pub(super) fn answer(&mut self, key: ChannelKey, no_wait: bool, method: impl Into<Method>) {
        if !no_wait {
            self.tell(key, method);
        }
    }
}

/// The channel was closed while its last frames were still being worked through.
fn gone() -> Refusal {
    Refusal::channel_error("expected 'channel.open'")
}

/// Takes the line ends out of a name, as RabbitMQ does.
pub(super) fn without_line_ends(name: &ShortString) -> ShortString {
    let is_line_end = |byte: &u8| matches!(byte, b'\r' | b'\n');
    if !name.as_bytes().iter().any(is_line_end) {
        return name.clone();
    }
    let kept: Vec<u8> = name.as_bytes().iter().copied().filter(|byte| !is_line_end(byte)).collect();
    ShortString::new(&kept)
}

/// Refuses a name that is not a client's to take.
pub(super) fn check_name(kind: &str, name: &ShortString) -> Result<(), Refusal> {
    if name.as_bytes().starts_with(b"amq.") {
        return Err(Refusal::access_refused(format_args!("{kind} name '{name}' contains reserved prefix 'amq.*'")));
    }
    Ok(())
}
