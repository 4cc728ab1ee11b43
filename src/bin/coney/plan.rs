//! What a topology would change on the broker: compares, and changes nothing.
//!
//! AMQP has no way to list what there is. A passive declare says whether a name exists; declaring what exists once more, with
//! the properties that are wanted, changes nothing if they are its own, and is refused with 406 and the first difference if
//! not. Should somebody delete the thing between those two, the second one creates it: that much of a race is left. And it
//! counts as use of a queue with `x-expires`. Bindings can be neither listed nor asked for.

use coney::{Connection, Destination, Error, Exchange, OnConflict, Queue, Topology};
use serde_json::{Value, json};

use crate::exit::Exit;
use crate::output;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Equal,
    Create,
    Conflict,
    /// It is there with other properties, and the settings want it used as it is.
    Kept,
    Unknown,
}

impl State {
    pub fn as_str(self) -> &'static str {
        match self {
            State::Equal => "equal",
            State::Create => "create",
            State::Conflict => "conflict",
            State::Kept => "kept",
            State::Unknown => "unknown",
        }
    }
}

/// One exchange, queue or binding.
#[derive(Debug)]
pub struct Item {
    pub kind: &'static str,
    pub name: String,
    pub state: State,
    /// What else there is to say; for a conflict, how it conflicts in the broker's words.
    pub detail: String,
}

impl Item {
    /// With this word for its state.
    pub fn to_json(&self, state: &str) -> Value {
        let mut json = json!({ "kind": self.kind, "name": self.name, "state": state });
        if !self.detail.is_empty() {
            json["detail"] = self.detail.as_str().into();
        }
        json
    }
}

#[derive(Debug)]
pub struct Plan {
    pub items: Vec<Item>,
}

impl Plan {
    pub fn count(&self, state: State) -> usize {
        self.items.iter().filter(|item| item.state == state).count()
    }

    /// What the plan says to scripts. What cannot be told does not count.
    pub fn exit(&self) -> Exit {
        if self.count(State::Conflict) > 0 {
            Exit::Conflict
        } else if self.count(State::Create) > 0 {
            Exit::Pending
        } else {
            Exit::Done
        }
    }

    pub fn summary(&self) -> String {
        let [equal, create, conflict, unknown] =
            [State::Equal, State::Create, State::Conflict, State::Unknown].map(|state| self.count(state));
        let kept = self.kept();
        format!("{create} to create, {equal} equal{kept}, {conflict} in conflict, {unknown} that cannot be told")
    }

    fn kept(&self) -> String {
        match self.count(State::Kept) {
            0 => String::new(),
            kept => format!(", {kept} kept as they are"),
        }
    }

    /// The same once it has been carried out.
    pub fn done_summary(&self) -> String {
        let [equal, create, unknown] = [State::Equal, State::Create, State::Unknown].map(|state| self.count(state));
        let declared = if unknown > 0 { format!(", {unknown} declared (new or not)") } else { String::new() };
        format!("{create} created, {equal} equal{}{declared}", self.kept())
    }
}

/// Compares a topology with what there is.
///
/// # Errors
///
/// What keeps the comparison from being made at all; a refusal of one thing is part of the plan.
pub fn compare(connection: &Connection, topology: &Topology) -> coney::Result<Plan> {
    topology.check()?;
    let mut plan = Plan { items: Vec::new() };
    for exchange in &topology.exchanges {
        let exists = || connection.exchange_declare_passive(&exchange.name);
        let equals = || connection.exchange_declare(exchange);
        let (state, refusal) = look(exchange.on_conflict.or(topology.on_conflict), exists, equals)?;
        let detail = if refusal.is_empty() { exchange_words(exchange) } else { refusal };
        plan.items.push(Item { kind: "exchange", name: exchange.name.clone(), state, detail });
    }
    for queue in &topology.queues {
        plan.items.push(queue_item(connection, queue, topology)?);
    }
    for binding in &topology.bindings {
        let (kind, to) = match &binding.destination {
            Destination::Exchange(name) => ("exchange", name),
            Destination::Queue(name) => ("queue", name),
            _ => continue,
        };
        let is_new = |kind: &str, name: &str| {
            plan.items.iter().any(|item| item.kind == kind && item.name == name && item.state == State::Create)
        };
        let certain = is_new("exchange", &binding.source) || is_new(kind, to);
        let detail =
            if certain { "" } else { "whether it is new cannot be told over AMQP; to make it again changes nothing" };
        let state = if certain { State::Create } else { State::Unknown };
        let name = format!("{} -> {kind} {to} {:?}", binding.source, binding.routing_key);
        plan.items.push(Item { kind: "binding", name, state, detail: detail.to_owned() });
    }
    Ok(plan)
}

fn queue_item(connection: &Connection, queue: &Queue, topology: &Topology) -> coney::Result<Item> {
    let mut found = None;
    let exists = || connection.queue_declare_passive(&queue.name).map(|info| found = Some(info));
    let on_conflict = queue.on_conflict.or(topology.on_conflict);
    let (state, refusal) = look(on_conflict, exists, || connection.queue_declare(queue).map(drop))?;
    let detail = match found {
        _ if !refusal.is_empty() => refusal,
        Some(info) => format!(
            "{}, {}",
            output::count(info.message_count.into(), "message"),
            output::count(info.consumer_count.into(), "consumer")
        ),
        None if queue.exclusive => "exclusive: it goes again with the connection that declares it".to_owned(),
        None => String::new(),
    };
    Ok(Item { kind: "queue", name: queue.name.clone(), state, detail })
}

/// The state of one thing, and the broker's words if it refused to say, or to take it for the same.
fn look(
    on_conflict: Option<OnConflict>,
    exists: impl FnOnce() -> coney::Result<()>,
    equals: impl FnOnce() -> coney::Result<()>,
) -> coney::Result<(State, String)> {
    let is_passive = on_conflict == Some(OnConflict::Passive);
    match exists().and_then(|()| if is_passive { Ok(()) } else { equals() }) {
        Ok(()) if is_passive => Ok((State::Kept, String::new())),
        Ok(()) => Ok((State::Equal, String::new())),
        Err(Error::ChannelClosed { code: 404, text, .. }) if is_passive => Ok((State::Conflict, text)),
        Err(Error::ChannelClosed { code: 404, .. }) => Ok((State::Create, String::new())),
        Err(Error::ChannelClosed { code: 406, text, .. }) if on_conflict == Some(OnConflict::Warn) => {
            Ok((State::Kept, text))
        }
        Err(Error::ChannelClosed { code: 405 | 406, text, .. }) => Ok((State::Conflict, text)),
        Err(Error::ChannelClosed { code: 403, text, .. }) => Ok((State::Unknown, text)),
        // RabbitMQ closes the connection for what it cannot do at all, such as an exchange of a kind it does not have.
        Err(error) => Err(error),
    }
}

fn exchange_words(exchange: &Exchange) -> String {
    exchange.kind.to_string()
}
