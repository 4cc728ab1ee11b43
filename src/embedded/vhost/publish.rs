//! Publishing: checks, routing, distribution, verdicts.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::arguments::{expiry, type_name};
use super::super::confirm::{Release, Verdict};
use super::super::exchange::{Destination, ExchangeId, QueueId};
use super::super::headers::MessageHeaders;
use super::super::message::{Body, Keys, Message, PERSISTENT, sort};
use super::super::outbox::SessionId;
use super::super::refusal::Refusal;
use super::super::reply_to::{PSEUDO_QUEUE, address, suffix};
use super::super::transaction::Routed;
use super::super::users::Right;
use super::channel::{ChannelKey, Mode};
use super::state::State;
use super::timers::Due;
use crate::amqp::ShortString;
use crate::amqp::method::{BasicDeliver, BasicPublish, BasicReturn};
use crate::amqp::properties::Properties;
use crate::amqp::value::{Table, Value};

/// `basic.return` of a message that could not be routed.
const NO_ROUTE: u16 = 312;

impl State {
    pub(super) fn publish(
        &mut self,
        key: ChannelKey,
        publish: &BasicPublish,
        raw: Box<[u8]>,
        body: Box<[u8]>,
    ) -> Result<Option<Routed>, Refusal> {
        if publish.immediate {
            return Err(Refusal::not_implemented("immediate=true"));
        }
        let exchange = self.check_exchange(key, &publish.exchange)?;
        let mut properties = Properties::decode(&raw)
            .map_err(|malformed| Refusal::frame_error(format_args!("cannot decode properties: {}", malformed.0)))?;
        let mut changed = self.rewrite_reply_to(key, &mut properties)?;
        self.check_user(key, &properties)?;
        let ttl = expiration(&properties)?;
        let keys = keys(&publish.routing_key, properties.headers.as_ref())?;
        if !self.limits.release.takes_any_delivery_mode() {
            check_delivery_mode(&properties)?;
        }
        changed |= strip_bcc(&mut properties);
        if self.limits.release.rewrites_properties() {
            changed |= rewrite(&mut properties, ttl);
        }
        let message = Arc::new(Message {
            exchange,
            routing_key: publish.routing_key.clone(),
            properties: if changed { properties.encode().into() } else { raw },
            body: Body::Own(body),
            keys,
            priority: properties.priority.unwrap_or(0),
            persistent: properties.delivery_mode == Some(PERSISTENT),
            has_died: false,
            failures: 0,
        });
        let queues = self.route(&message, properties.headers.as_ref());
        let routed = Routed { message, ttl, mandatory: publish.mandatory, queues };
        let is_spoilt = self.mischief.nacks > 0;
        match &mut self.channel_mut(key)?.mode {
            Mode::Tx(transaction) => {
                transaction.publishes.push(routed);
                Ok(None)
            }
            Mode::Confirm(_) if is_spoilt => {
                self.mischief.nacks -= 1;
                self.confirm(key, false);
                Ok(None)
            }
            Mode::Plain | Mode::Confirm(_) => Ok(Some(routed)),
        }
    }

    /// The exchange's own name, so that its messages share it.
    fn check_exchange(&self, key: ChannelKey, name: &ShortString) -> Result<ShortString, Refusal> {
        self.permit(key, Right::Write, &self.exchange_named(name))?;
        if name.is_empty() {
            return Ok(name.clone());
        }
        let id = self.find_exchange(name)?;
        match self.exchanges.get(&id) {
            Some(exchange) if exchange.internal => {
                Err(Refusal::access_refused(format_args!("cannot publish to internal {}", self.exchange_named(name))))
            }
            Some(exchange) => Ok(exchange.name.clone()),
            None => Ok(name.clone()),
        }
    }

    /// Direct reply-to: the pseudo queue becomes the address of the channel's own reply consumer.
    fn rewrite_reply_to(&self, key: ChannelKey, properties: &mut Properties) -> Result<bool, Refusal> {
        if properties.reply_to.as_ref().is_none_or(|reply_to| reply_to != PSEUDO_QUEUE) {
            return Ok(false);
        }
        match &self.channel(key)?.reply {
            Some(reply) => {
                properties.reply_to = Some(address(&reply.suffix));
                Ok(true)
            }
            None => Err(Refusal::precondition_failed("fast reply consumer does not exist")),
        }
    }

    fn check_user(&self, key: ChannelKey, properties: &Properties) -> Result<(), Refusal> {
        let actual = &self.channel(key)?.user.name;
        match &properties.user_id {
            Some(claimed) if claimed != actual.as_str() => Err(Refusal::precondition_failed(format_args!(
                "user_id property set to '{claimed}' but authenticated user was '{actual}'"
            ))),
            _ => Ok(()),
        }
    }

    /// The queues a message goes to from its exchange, each once. Answers of direct reply-to are delivered on the way:
    /// to RabbitMQ they are routed nowhere.
    pub(super) fn route(&self, message: &Message, headers: Option<&Table>) -> Vec<QueueId> {
        let mut queues = Vec::new();
        if message.exchange.is_empty() {
            let mut keys: Vec<&[u8]> = message.routing_keys().collect();
            // A client that is named twice gets one answer.
            keys.sort_unstable();
            keys.dedup();
            for key in keys {
                match suffix(key) {
                    Some(suffix) => self.deliver_reply(suffix, message),
                    None => queues.extend(self.queue_names.get(key)),
                }
            }
        } else if let Some(&id) = self.exchange_names.get(&message.exchange) {
            self.route_from(id, message, &MessageHeaders::new(headers), &mut queues);
        }
        if queues.len() > 1 {
            queues.sort_unstable();
            queues.dedup();
        }
        queues
    }

    /// Follows bindings from exchange to exchange, through none twice.
    fn route_from(
        &self,
        first: ExchangeId,
        message: &Message,
        headers: &MessageHeaders<'_>,
        queues: &mut Vec<QueueId>,
    ) {
        let mut seen = HashSet::new();
        let mut ahead = vec![first];
        let mut found = Vec::new();
        while let Some(id) = ahead.pop() {
            let Some(exchange) = self.exchanges.get(&id) else { continue };
            exchange.route(message.routing_keys(), headers, &message.properties, &mut found);
            let alternate = if found.is_empty() { exchange.alternate() } else { None };
            let alternate = alternate.and_then(|name| self.exchange_names.get(&name).copied());
            for destination in found.drain(..).chain(alternate.map(Destination::Exchange)) {
                match destination {
                    Destination::Queue(queue) => queues.push(queue),
                    Destination::Exchange(next) => {
                        if next != first && seen.insert(next) {
                            ahead.push(next);
                        }
                    }
                }
            }
        }
    }

    fn deliver_reply(&self, suffix: &[u8], message: &Message) {
        let Some(channel) = self.repliers.get(suffix).and_then(|key| self.channels.get(key)) else { return };
        let Some(reply) = &channel.reply else { return };
        let deliver = BasicDeliver {
            consumer_tag: reply.tag.clone(),
            // Not counted, as there is nothing to ack.
            delivery_tag: channel.ledger.next_tag(),
            redelivered: false,
            exchange: message.exchange.clone(),
            routing_key: message.routing_key.clone(),
        };
        channel.outbox.push_content(channel.number, deliver, &message.properties, &message.body);
    }

    /// The queues that a routed message goes to. If there are none, it is returned should the client want that.
    pub(super) fn or_return<'r>(&mut self, key: ChannelKey, routed: &'r Routed) -> &'r [QueueId] {
        let Routed { message, mandatory, queues, .. } = routed;
        // In a transaction, they may have gone since.
        if queues.iter().any(|queue| self.queues.contains_key(queue)) {
            return queues;
        }
        if *mandatory {
            self.tell_confirms(key);
            if let Some(channel) = self.channels.get(&key) {
                let back = BasicReturn {
                    reply_code: NO_ROUTE,
                    reply_text: "NO_ROUTE".into(),
                    exchange: message.exchange.clone(),
                    routing_key: message.routing_key.clone(),
                };
                channel.outbox.push_content(channel.number, back, &message.properties, &message.body);
            }
        }
        &[]
    }

    /// Puts a routed message in some of its queues. False if one of them refused it.
    pub(super) fn distribute(&mut self, routed: &Routed, queues: &[QueueId]) -> bool {
        let mut accepted = true;
        for queue in queues {
            accepted &= self.enqueue(*queue, routed.message.clone(), routed.ttl);
        }
        accepted
    }

    /// Settles a publish, if the channel has confirms.
    pub(super) fn confirm(&mut self, key: ChannelKey, accepted: bool) {
        if !self.channels.get(&key).is_some_and(|channel| matches!(channel.mode, Mode::Confirm(_))) {
            return;
        }
        let verdict = if accepted { Verdict::Ack } else { Verdict::Nack };
        let mut release = Release::Now;
        if self.mischief.withhold_confirms {
            release = Release::Withheld;
        } else if let Some(delay) = self.mischief.confirm_delay {
            let at = crate::deadline::after(delay);
            self.timers.set_if_sooner(at, Due::Confirms(key));
            release = Release::At(at);
        }
        let Some(channel) = self.channels.get_mut(&key) else { return };
        let Mode::Confirm(confirms) = &mut channel.mode else { return };
        if confirms.settle(verdict, release)
            && let Some(session) = self.sessions.get_mut(&channel.outbox.id())
        {
            session.unflushed.push(key);
        }
    }

    pub(super) fn flush_confirms(&mut self, session: SessionId) {
        let Some(session) = self.sessions.get_mut(&session) else { return };
        for key in std::mem::take(&mut session.unflushed) {
            self.tell_confirms(key);
        }
    }

    /// Tells what may be told by now of what was held back.
    pub(super) fn release_confirms(&mut self, key: ChannelKey, now: Instant) {
        let freed = !self.mischief.withhold_confirms;
        let Some(channel) = self.channels.get_mut(&key) else { return };
        let Mode::Confirm(confirms) = &mut channel.mode else { return };
        if let Some(at) = confirms.release(now, freed) {
            self.timers.set(at, Due::Confirms(key));
        }
        self.tell_confirms(key);
    }

    /// Tells what may be told and has not been.
    pub(super) fn tell_confirms(&mut self, key: ChannelKey) {
        let Some(channel) = self.channels.get_mut(&key) else { return };
        if let Mode::Confirm(confirms) = &mut channel.mode {
            for frame in confirms.tell() {
                channel.outbox.push(channel.number, frame);
            }
        }
    }
}

/// Transient or persistent; there are no others.
fn check_delivery_mode(properties: &Properties) -> Result<(), Refusal> {
    match properties.delivery_mode {
        None | Some(1 | PERSISTENT) => Ok(()),
        Some(mode) => {
            Err(Refusal::precondition_failed(format_args!("invalid message: {{delivery_mode_unknown,{mode}}}")))
        }
    }
}

/// How long the message itself says it is of use.
fn expiration(properties: &Properties) -> Result<Option<Duration>, Refusal> {
    let Some(text) = &properties.expiration else { return Ok(None) };
    match read_expiration(&text.text()) {
        Ok(millis) => Ok(Some(Duration::from_millis(millis))),
        Err(why) => Err(Refusal::precondition_failed(format_args!("invalid expiration '{text}': {why}"))),
    }
}

/// Reads a number as Erlang does: a sign, digits, and nothing left over.
fn read_expiration(text: &str) -> Result<u64, String> {
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    let digits = unsigned.bytes().take_while(u8::is_ascii_digit).count();
    if digits == 0 {
        return Err("no_integer".to_string());
    }
    let (number, rest) = text.split_at(text.len() - unsigned.len() + digits);
    if !rest.is_empty() {
        return Err(format!("{{leftover_string,\"{rest}\"}}"));
    }
    let Ok(number) = number.parse::<i64>() else {
        // Too many digits for any number we know: ten years were exceeded long ago.
        let which = if number.starts_with('-') { "negative" } else { "too_large" };
        return Err(format!("{{value_{which},{}}}", number.trim_start_matches('+')));
    };
    expiry(number)?;
    Ok(number.unsigned_abs())
}

/// All routing keys, if there are others in the headers `CC` and `BCC`.
fn keys(own: &ShortString, headers: Option<&Table>) -> Result<Option<Keys>, Refusal> {
    let Some(headers) = headers else { return Ok(None) };
    let mut all = vec![Box::from(own.as_bytes())];
    for name in ["CC", "BCC"] {
        match headers.get(name) {
            None => {}
            Some(Value::Array(keys)) => all.extend(keys.iter().filter_map(|key| match key {
                Value::LongString(key) => Some(Box::from(&key[..])),
                _ => None,
            })),
            Some(other) => {
                return Err(Refusal::precondition_failed(format_args!(
                    "invalid message: {{unacceptable_type_in_header,\"{name}\",{}}}",
                    type_name(other)
                )));
            }
        }
    }
    Ok(if all.len() == 1 { None } else { Some(all.into()) })
}

/// Blind copies are blind. True if there were any.
fn strip_bcc(properties: &mut Properties) -> bool {
    let Some(headers) = &mut properties.headers else { return false };
    let before = headers.0.len();
    headers.0.retain(|(name, _)| name != "BCC");
    headers.0.len() != before
}

/// Properties as newer releases give them to consumers. True if they may differ from what came: the types of the values are
/// written in one way only.
fn rewrite(properties: &mut Properties, ttl: Option<Duration>) -> bool {
    if let Some(headers) = &mut properties.headers {
        sort(headers);
        headers.0.dedup_by(|(later, _), (first, _)| later == first);
    }
    if let Some(expiration) = &mut properties.expiration
        && let Some(ttl) = ttl
    {
        *expiration = ttl.as_millis().to_string().as_str().into();
    }
    properties.headers.is_some() || properties.expiration.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expirations_as_erlang_reads_them() {
        for (text, wanted) in [
            ("0", Ok(0)),
            ("1000", Ok(1000)),
            ("+5", Ok(5)),
            ("", Err("no_integer")),
            ("abc", Err("no_integer")),
            ("-", Err("no_integer")),
            ("12x", Err("{leftover_string,\"x\"}")),
            ("1.5", Err("{leftover_string,\".5\"}")),
            ("-1", Err("{value_negative,-1}")),
            ("315360000001", Err("{value_too_large,315360000001}")),
            ("99999999999999999999", Err("{value_too_large,99999999999999999999}")),
        ] {
            assert_eq!(read_expiration(text), wanted.map_err(str::to_string), "{text:?}");
        }
    }
}
