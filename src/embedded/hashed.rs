//! Exchanges of the type `x-consistent-hash`: each message to one of the destinations, the same for all messages that have the same
//! key, a header or a property in common.
//!
//! Each destination draws a number for each message, by the hash of both and by its weight, and the highest one wins (rendezvous
//! hashing). So a destination that comes takes from each of the others what is its share, and what one leaves behind is shared among
//! those that stay. Which destination wins is not what RabbitMQ's own hash says. It depends on nothing but the order in which they
//! were bound, so that it is the same in each run of a program.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use super::arguments::{hash_value, quoted, type_name};
use super::headers::MessageHeaders;
use super::refusal::Refusal;
use crate::amqp::ShortString;
use crate::amqp::properties::Properties;
use crate::amqp::value::{Table, Value};

/// What messages have in common that go the same way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum HashOn {
    RoutingKey,
    Header(Vec<u8>),
    MessageId,
    CorrelationId,
    Timestamp,
}

impl HashOn {
    /// Reads the arguments of an exchange, or refuses; `exchange` is the exchange as texts name it.
    pub(super) fn read(table: &Table, exchange: &str) -> Result<HashOn, Refusal> {
        let text = |name: &str| match table.get(name) {
            None => Ok(None),
            Some(Value::LongString(text)) => Ok(Some(text.clone())),
            Some(other) => Err(Refusal::precondition_failed(format_args!(
                "invalid type '{}' for arg '{name}' in {exchange}",
                type_name(other)
            ))),
        };
        match (text("hash-header")?, text("hash-property")?) {
            (None, None) => Ok(HashOn::RoutingKey),
            (Some(header), None) => Ok(HashOn::Header(header)),
            (None, Some(property)) => match &property[..] {
                b"message_id" => Ok(HashOn::MessageId),
                b"correlation_id" => Ok(HashOn::CorrelationId),
                b"timestamp" => Ok(HashOn::Timestamp),
                other => Err(Refusal::precondition_failed(format_args!(
                    "Unsupported property: {}",
                    String::from_utf8_lossy(other)
                ))),
            },
            (Some(_), Some(_)) => {
                Err(Refusal::precondition_failed("hash-header and hash-property are mutually exclusive"))
            }
        }
    }

    /// The hash of what a message has of it. Those that have none go the same way.
    fn hash(&self, key: &[u8], headers: &MessageHeaders<'_>, properties: &[u8]) -> u64 {
        let mut hasher = DefaultHasher::new();
        let properties = || Properties::decode(properties).unwrap_or_default();
        match self {
            HashOn::RoutingKey => key.hash(&mut hasher),
            HashOn::Header(name) => match headers.get(name) {
                // Which have no hash of their own.
                Some(nested @ (Value::Array(_) | Value::Table(_))) => {
                    Table::default().with("", nested.clone()).encode_inside().hash(&mut hasher);
                }
                Some(value) => hash_value(value, &mut hasher),
                None => {}
            },
            HashOn::MessageId => properties().message_id.hash(&mut hasher),
            HashOn::CorrelationId => properties().correlation_id.hash(&mut hasher),
            HashOn::Timestamp => properties().timestamp.hash(&mut hasher),
        }
        hasher.finish()
    }
}

/// The weight that a binding key says, or why it may not be one.
pub(super) fn weight(key: &ShortString) -> Result<f64, Refusal> {
    let text = key.text();
    let digits = text.strip_prefix(['+', '-']).unwrap_or(&text);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        let shown = match key.as_bytes() {
            b"" => "<<>>".to_owned(),
            key => quoted(&Value::LongString(key.to_vec())),
        };
        return Err(Refusal::precondition_failed(format_args!("The binding key must be an integer: {shown}")));
    }
    match text.parse::<f64>() {
        Ok(weight) if weight > 0.0 => Ok(weight.min(f64::from(u32::MAX))),
        _ => Err(Refusal::precondition_failed("The binding key must be greater than 0")),
    }
}

/// Destinations with their weights.
#[derive(Debug)]
pub(super) struct HashBindings<D> {
    on: HashOn,
    /// By the place that each has for as long as it is there, by which it draws its numbers.
    places: Vec<Option<(D, f64)>>,
    vacant: BTreeSet<usize>,
    of_destination: BTreeMap<D, usize>,
}

impl<D: Copy + Ord> HashBindings<D> {
    pub(super) fn new(on: HashOn) -> HashBindings<D> {
        HashBindings { on, places: Vec::new(), vacant: BTreeSet::new(), of_destination: BTreeMap::new() }
    }

    /// Adds a destination. Of several bindings to the same, the first one counts.
    pub(super) fn insert(&mut self, destination: D, weight: f64) {
        if self.of_destination.contains_key(&destination) {
            return;
        }
        let place = self.vacant.pop_first().unwrap_or(self.places.len());
        if place == self.places.len() {
            self.places.push(None);
        }
        self.places[place] = Some((destination, weight));
        self.of_destination.insert(destination, place);
    }

    /// Takes a destination away, even if there is another binding to it.
    pub(super) fn remove(&mut self, destination: D) {
        if let Some(place) = self.of_destination.remove(&destination) {
            self.places[place] = None;
            self.vacant.insert(place);
        }
    }

    /// Where a message goes.
    pub(super) fn route(&self, key: &[u8], headers: &MessageHeaders<'_>, properties: &[u8]) -> Option<D> {
        if self.of_destination.is_empty() {
            return None;
        }
        let hash = self.on.hash(key, headers, properties);
        let drawn = |(place, slot): (usize, &Option<(D, f64)>)| {
            let (destination, weight) = (*slot)?;
            Some((draw(hash, place as u64) / weight, destination))
        };
        // The lowest of the waits is the highest of the numbers.
        let waits = self.places.iter().enumerate().filter_map(drawn);
        waits.min_by(|(one, _), (other, _)| one.total_cmp(other)).map(|(_, destination)| destination)
    }
}

/// A number above 0, as likely as the wait for something that happens once in a while: of several waits, each divided by a weight, each
/// is the shortest as often as its weight says.
fn draw(hash: u64, place: u64) -> f64 {
    // SplitMix64.
    let mut bits = hash ^ place.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^= bits >> 31;
    let between_0_and_1 = ((bits >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
    -between_0_and_1.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bindings(weights: &[f64]) -> HashBindings<usize> {
        let mut bindings = HashBindings::new(HashOn::RoutingKey);
        weights.iter().enumerate().for_each(|(destination, weight)| bindings.insert(destination, *weight));
        bindings
    }

    fn routed(bindings: &HashBindings<usize>) -> Vec<usize> {
        let route = |key: u32| bindings.route(key.to_string().as_bytes(), &MessageHeaders::new(None), &[0, 0]).unwrap();
        (0..10_000).map(route).collect()
    }

    fn share(routed: &[usize], destination: usize) -> f64 {
        routed.iter().filter(|one| **one == destination).count() as f64 / routed.len() as f64
    }

    #[test]
    fn each_has_the_share_that_its_weight_says() {
        let routed = routed(&bindings(&[1.0, 1.0, 2.0, 4.0]));
        for (destination, wanted) in [0.125, 0.125, 0.25, 0.5].into_iter().enumerate() {
            let share = share(&routed, destination);
            assert!((share - wanted).abs() < 0.02, "{destination}: {share}");
        }
    }

    #[test]
    fn who_comes_takes_its_share_and_who_goes_leaves_the_others_what_they_have() {
        let mut bindings = bindings(&[1.0; 4]);
        let before = routed(&bindings);
        bindings.insert(4, 1.0);
        let with_one_more = routed(&bindings);
        let moved = before.iter().zip(&with_one_more).filter(|(before, after)| before != after);
        assert!(moved.clone().all(|(_, after)| *after == 4));
        let moved = moved.count() as f64 / before.len() as f64;
        assert!((moved - 0.2).abs() < 0.02, "{moved}");
        bindings.remove(1);
        let with_one_less = routed(&bindings);
        let stay = with_one_more.iter().zip(&with_one_less).all(|(before, after)| before == after || *before == 1);
        assert!(stay && !with_one_less.contains(&1));
        // Another one in the same place has the same.
        bindings.insert(7, 1.0);
        let again: Vec<usize> = routed(&bindings).into_iter().map(|one| if one == 7 { 1 } else { one }).collect();
        assert_eq!(again, with_one_more);
    }

    #[test]
    fn of_several_bindings_to_one_destination_the_first_counts() {
        let mut bindings = bindings(&[1.0, 1.0]);
        let before = routed(&bindings);
        bindings.insert(0, 100.0);
        assert_eq!(routed(&bindings), before);
        bindings.remove(0);
        assert!(!routed(&bindings).contains(&0));
        bindings.remove(1);
        assert_eq!(bindings.route(b"k", &MessageHeaders::new(None), &[0, 0]), None);
    }

    #[test]
    fn weights_are_whole_numbers_above_0() {
        let of = |key: &str| weight(&key.into()).map_err(|refusal| refusal.text);
        assert_eq!([of("1"), of("+1"), of("01"), of("10000000")], [Ok(1.0), Ok(1.0), Ok(1.0), Ok(1e7)]);
        assert_eq!(of(&"9".repeat(250)), Ok(f64::from(u32::MAX)));
        for zero in ["0", "-1", "-0", "+0"] {
            assert_eq!(of(zero), Err("PRECONDITION_FAILED - The binding key must be greater than 0".to_owned()));
        }
        for (key, shown) in
            [("", "<<>>"), ("a", "<<\"a\">>"), ("1.5", "<<\"1.5\">>"), (" 1", "<<\" 1\">>"), ("-", "<<\"-\">>")]
        {
            assert_eq!(of(key), Err(format!("PRECONDITION_FAILED - The binding key must be an integer: {shown}")));
        }
    }

    #[test]
    fn what_is_hashed_is_read_from_the_message() {
        let table = |value| Table::default().with("h", value);
        let of = |value| HashOn::Header(b"h".to_vec()).hash(b"k", &MessageHeaders::new(Some(&table(value))), &[0, 0]);
        assert_eq!(of(Value::I32(7)), of(Value::I64(7)));
        assert_ne!(of(Value::I32(7)), of(Value::I32(8)));
        let array = |number| Value::Array(vec![Value::I32(number)]);
        assert_ne!(of(array(7)), of(array(8)));
        let property =
            |on: HashOn, properties: Properties| on.hash(b"k", &MessageHeaders::new(None), &properties.encode());
        let id = |id: &str| Properties { message_id: Some(id.into()), ..Properties::default() };
        assert_eq!(property(HashOn::MessageId, id("1")), property(HashOn::MessageId, id("1")));
        assert_ne!(property(HashOn::MessageId, id("1")), property(HashOn::MessageId, id("2")));
        assert_eq!(property(HashOn::CorrelationId, id("1")), property(HashOn::CorrelationId, id("2")));
        assert_eq!(property(HashOn::Timestamp, id("1")), property(HashOn::Timestamp, id("2")));
        let refused = Table::default().with("hash-header", Value::I32(1));
        let text = HashOn::read(&refused, "exchange 'x' in vhost '/'").unwrap_err().text;
        assert_eq!(
            text,
            "PRECONDITION_FAILED - invalid type 'signedint' for arg 'hash-header' in exchange 'x' in vhost '/'"
        );
    }
}
