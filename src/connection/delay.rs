//! Messages that are to arrive later: the queues in which they wait, and the way through them.
//!
//! A delay is a number of steps of 100 ms, written in binary. For each bit there is a queue in which a message stays for so long:
//! `coney.delay.0` for one step, `coney.delay.1` for two, up to `coney.delay.28`. A message waits in the queue of its highest
//! bit first, and then in those of the lower bits that are set. All messages of one queue stay for the same time, so none waits
//! behind one that is due later.
//!
//! The way is told by headers, so that the routing key stays as it is. `coney-delay-first` takes the message from the exchange
//! `coney.delay` to its first queue. What has expired there comes to an exchange of the same name as the queue. It sends the
//! message by the next bit, `coney-delay-N`, to the next queue or to the next exchange. The last exchange is `coney.delay.to`. It
//! knows a queue for each exchange that messages are published to, by `coney-delay-to`. From there a message is passed on at once,
//! to the exchange that it was meant for, with the routing key that it has had all the time.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::publisher::Attempt;
use super::{Connection, expiring};
use crate::error::{Error, Result};
use crate::field::{FieldTable, check_short_string};
use crate::message::Message;
use crate::session::Outgoing;
use crate::settings::PoolSettings;
use crate::topology::{Binding, Exchange, Queue, QueueType};

/// The longest delay.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// What a delay is a multiple of.
const STEP: Duration = Duration::from_millis(100);

/// Which names the exchanges and queues have in which messages wait, by the type of the queues.
const CLASSIC: &str = "coney.delay";
const QUORUM: &str = "coney.delay.quorum";

/// The exchange at the end of the wait, and what the queues behind it are named by.
const TO: &str = "coney.delay.to";

/// Where the default exchange has no name, its queue has one. No exchange has the same: theirs have a dot there.
const TO_DEFAULT: &str = "coney.delay.to-default";

/// The exchange and the queue for messages whose queue has been deleted while they waited.
const UNROUTED: &str = "coney.delay.unrouted";

/// What begins like this is a header that tells the way.
const HEADERS: &str = "coney-delay-";
const FIRST_HEADER: &str = "coney-delay-first";
const TO_HEADER: &str = "coney-delay-to";

/// Where the broker keeps in which queues a message has expired. RabbitMQ 3 drops one that comes to such a queue once more.
const DEATHS: &str = "x-death";

/// How long a message is to wait: the highest bit and those below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Delay {
    steps: u64,
}

impl Delay {
    /// `None` for no delay at all.
    pub(crate) fn new(delay: Duration) -> Result<Option<Delay>> {
        if delay > LONGEST {
            return Err(Error::invalid("delay", format!("{} s, expected at most 365 days", delay.as_secs())));
        }
        let steps = u64::try_from(delay.as_nanos().div_ceil(STEP.as_nanos())).unwrap_or(u64::MAX);
        Ok((steps > 0).then_some(Delay { steps }))
    }

    /// The queue that comes first.
    fn first(self) -> u32 {
        self.steps.ilog2()
    }

    /// The message with the way to `exchange` in its headers.
    pub(crate) fn with_route(self, exchange: &str, message: Message) -> Result<Message> {
        let longest = usize::from(u8::MAX) - TO.len() - 1;
        if exchange.len() > longest {
            let problem = format!("{} bytes long, expected at most {longest} for a delayed message", exchange.len());
            return Err(Error::invalid("exchange name", problem));
        }
        if message.expiration().is_some() {
            return Err(Error::invalid("expiration", "expected none of a delayed message: it would end the delay"));
        }
        let is_of_route = |name: &str| name.starts_with(HEADERS) || name == DEATHS;
        let mut headers: FieldTable = message
            .headers()
            .iter()
            .filter(|(name, _)| !is_of_route(name))
            .map(|(n, v)| (n.clone(), v.clone()))
            .collect();
        let first = self.first();
        headers.insert(FIRST_HEADER.to_owned(), i64::from(first).into());
        headers.insert(TO_HEADER.to_owned(), exchange.into());
        headers.extend((0..first).map(|bit| (bit_header(bit), (self.steps >> bit & 1 == 1).into())));
        Ok(message.with_headers(headers))
    }
}

fn bit_header(bit: u32) -> String {
    format!("{HEADERS}{bit}")
}

/// The exchange that delayed messages are published to.
pub(crate) fn entry(queue_type: QueueType) -> &'static str {
    if queue_type == QueueType::Quorum { QUORUM } else { CLASSIC }
}

/// What is known to be declared.
#[derive(Debug, Default)]
pub(crate) struct Declared(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// How many queues to wait in, from the shortest on.
    queues: u32,
    /// For which exchanges there is a queue at the end.
    exchanges: HashSet<String>,
}

impl Declared {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a message can be on its way.
    pub(crate) fn has(&self, delay: Delay, exchange: &str) -> bool {
        let known = self.known();
        known.queues > delay.first() && known.exchanges.contains(exchange)
    }

    /// Another broker may answer now, or somebody has deleted something.
    pub(crate) fn forget(&self) {
        *self.known() = Known::default();
    }
}

/// Whether a message could not be on its way because something is not there any more.
pub(crate) fn is_not_routed(outcome: &Result<()>) -> bool {
    matches!(outcome, Err(Error::Returned { .. } | Error::ChannelClosed { code: 404, .. }))
}

/// Whether a message is refused if the queue that it is for does not exist.
pub(crate) fn is_queue_checked(exchange: &str, settings: &PoolSettings) -> bool {
    exchange.is_empty() && settings.mandatory
}

impl Connection {
    /// Publishes a message with a way, and once more if what was declared for it has been deleted.
    pub(super) fn attempt_delayed(
        &self,
        delay: Delay,
        exchange: &str,
        outgoing: Outgoing<'_>,
        deadline: Instant,
    ) -> Attempt {
        let attempt = || match self.declare_delay(delay, exchange) {
            Ok(()) => self.attempt(outgoing, deadline),
            Err(error) => Attempt { outcome: Err(error), written: false },
        };
        let was_known = self.context.delays.has(delay, exchange);
        let first = attempt();
        if !was_known || !is_not_routed(&first.outcome) {
            return first;
        }
        self.context.delays.forget();
        attempt()
    }

    /// Refuses a message for a queue that does not exist, where the pool publishes `mandatory`. At the end of the delay nobody is
    /// told.
    pub(crate) fn check_queue(&self, exchange: &str, routing_key: &str) -> Result<()> {
        if !is_queue_checked(exchange, &self.settings) {
            return Ok(());
        }
        check_short_string(|| "routing key".to_owned(), routing_key)?;
        match self.queue_declare_passive(routing_key) {
            // It exists, and is another connection's exclusive queue.
            Ok(_) | Err(Error::ChannelClosed { code: 405, .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Declares what a message needs on its way, unless it is known to be there.
    pub(crate) fn declare_delay(&self, delay: Delay, exchange: &str) -> Result<()> {
        let declared = &self.context.delays;
        if declared.has(delay, exchange) {
            return Ok(());
        }
        let (from, until) = (declared.known().queues, delay.first() + 1);
        if from == 0 {
            self.declare_ends()?;
        }
        (from..until).try_for_each(|bit| self.declare_wait(bit))?;
        let is_new = !declared.known().exchanges.contains(exchange);
        if is_new {
            self.declare_target(exchange)?;
        }
        let mut known = declared.known();
        known.queues = known.queues.max(until);
        known.exchanges.insert(exchange.to_owned());
        Ok(())
    }

    /// The exchanges at the beginning and at the end, and where a message goes that has lost its way.
    fn declare_ends(&self) -> Result<()> {
        self.exchange_declare(&Exchange::fanout(UNROUTED))?;
        self.queue_declare(&Queue::new(UNROUTED))?;
        self.queue_bind(UNROUTED, UNROUTED, "")?;
        self.exchange_declare(&Exchange::headers(TO).alternate_exchange(UNROUTED))?;
        // What has no queue here comes back to the publisher.
        self.exchange_declare(&Exchange::headers(entry(self.settings.delay_queue_type)))
    }

    /// The queue for a bit, and the exchange behind it. Those for the lower bits are there.
    fn declare_wait(&self, bit: u32) -> Result<()> {
        let queue_type = self.settings.delay_queue_type;
        let entry = entry(queue_type);
        let name = |bit: u32| format!("{entry}.{bit}");
        let behind = if bit == 0 { TO.to_owned() } else { name(bit) };
        if let Some(next) = bit.checked_sub(1) {
            self.exchange_declare(&Exchange::headers(&behind).alternate_exchange(UNROUTED))?;
            let rest = if next == 0 { TO.to_owned() } else { name(next) };
            self.bind(&Binding::queue(name(next)).to(&behind).argument(bit_header(next), true))?;
            self.bind(&Binding::exchange(rest).to(&behind).argument(bit_header(next), false))?;
        }
        let queue = Queue::new(name(bit)).message_ttl(STEP * (1 << bit)).dead_letter_exchange(behind);
        self.declare_or_use(|queue_type| expiring(queue.clone(), queue_type), queue_type)?;
        self.bind(&Binding::queue(name(bit)).to(entry).argument(FIRST_HEADER, i64::from(bit)))
    }

    /// The queue from which messages are passed on to an exchange. A quorum queue that passes on at least once would stop for
    /// minutes at 32 messages that no queue takes.
    fn declare_target(&self, exchange: &str) -> Result<()> {
        let name = match exchange {
            "" => TO_DEFAULT.to_owned(),
            exchange => {
                self.exchange_declare_passive(exchange)?;
                format!("{TO}.{exchange}")
            }
        };
        let queue = Queue::new(&name).message_ttl(Duration::ZERO).dead_letter_exchange(exchange);
        self.queue_declare(&queue)?;
        self.bind(&Binding::queue(&name).to(TO).argument(TO_HEADER, exchange))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(delay: Duration) -> u64 {
        Delay::new(delay).unwrap().map_or(0, |delay| delay.steps)
    }

    #[test]
    fn a_delay_is_rounded_up_to_whole_steps() {
        assert_eq!(steps(Duration::ZERO), 0);
        assert_eq!(steps(Duration::from_nanos(1)), 1);
        assert_eq!(steps(STEP), 1);
        assert_eq!(steps(STEP + Duration::from_nanos(1)), 2);
        assert_eq!(steps(LONGEST), 315_360_000);
        let error = Delay::new(LONGEST + Duration::from_nanos(1)).unwrap_err();
        assert_eq!(error.to_string(), "delay: 31536000 s, expected at most 365 days");
    }

    #[test]
    fn the_headers_are_the_bits_below_the_first_and_none_of_an_earlier_way() {
        let earlier =
            Message::new("m").with_header("kept", 1).with_header("coney-delay-9", true).with_header(DEATHS, 1);
        let delay = Delay::new(STEP * 0b1010).unwrap().unwrap();
        let message = delay.with_route("orders", earlier).unwrap();
        let expected = Message::new("m")
            .with_header("kept", 1)
            .with_header("coney-delay-first", 3_i64)
            .with_header("coney-delay-to", "orders")
            .with_header("coney-delay-0", false)
            .with_header("coney-delay-1", true)
            .with_header("coney-delay-2", false);
        assert_eq!(message.headers(), expected.headers());
    }

    #[test]
    fn what_cannot_be_delayed_is_refused() {
        let delay = Delay::new(STEP).unwrap().unwrap();
        let expiring = Message::new("m").with_expiration(STEP);
        let error = delay.with_route("", expiring).unwrap_err();
        assert!(error.to_string().contains("expiration"), "{error}");
        assert!(delay.with_route(&"x".repeat(240), Message::new("m")).is_ok());
        let error = delay.with_route(&"x".repeat(241), Message::new("m")).unwrap_err();
        assert!(error.to_string().contains("241 bytes long, expected at most 240"), "{error}");
    }
}
