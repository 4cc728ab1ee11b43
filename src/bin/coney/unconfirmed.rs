//! Lines that were under way when the broker closed the channel. One of them it has refused; all get the same error.
//!
//! The broker takes the messages of a channel one after another. So it may have taken those before the refused one, though
//! their confirms were lost with the channel; and it has dropped those behind it.

use coney::{Error, Message};

use crate::exit::explain;

/// What one line asks for: exchange, routing key and message.
pub type Addressed = (String, String, Message);

/// A line that was not confirmed, as it was read, and why.
pub struct Unconfirmed {
    pub number: u64,
    pub line: Vec<u8>,
    pub error: Error,
}

impl Unconfirmed {
    pub fn is_of_closed_channel(&self) -> bool {
        self.closing().is_some()
    }

    /// With what the broker closed the channel.
    fn closing(&self) -> Option<(u16, &str)> {
        match &self.error {
            Error::ChannelClosed { code, text, .. } => Some((*code, text)),
            _ => None,
        }
    }
}

/// What is left to be done about a line.
#[derive(Debug)]
pub enum Left {
    /// To tell this.
    Told(u64, String),
    /// To send it again: the broker has not taken it.
    Dropped(u64, Addressed),
}

impl Left {
    /// What is left of lines that a closed channel has left without an answer.
    pub fn of(mut closed: Vec<Unconfirmed>, read: impl Fn(&[u8]) -> Option<Addressed>) -> Vec<Left> {
        closed.sort_by_key(|line| line.number);
        let mut left = Vec::new();
        while let Some((code, text)) = closed.first().and_then(Unconfirmed::closing) {
            let ending = (code, text.to_owned());
            let of_this = |line: &Unconfirmed| line.closing() == Some((ending.0, &ending.1));
            let (same, others): (Vec<_>, Vec<_>) = closed.into_iter().partition(of_this);
            closed = others;
            Left::of_one(same, &ending.1, &read, &mut left);
        }
        left
    }

    /// Those of one channel, in order.
    fn of_one(lines: Vec<Unconfirmed>, text: &str, read: impl Fn(&[u8]) -> Option<Addressed>, left: &mut Vec<Left>) {
        let is_refused = |one: &Unconfirmed| read(&one.line).is_some_and(|addressed| is_about(text, &addressed));
        let Some(refused) = lines.iter().find(|one| is_refused(one)).map(|one| one.number) else {
            let which = if lines.len() == 1 { "" } else { "; it may be another of these lines that it was closed for" };
            left.extend(lines.iter().map(|one| Left::Told(one.number, explain(&one.error) + which)));
            return;
        };
        for one in lines {
            left.push(match (one.number, read(&one.line)) {
                (number, Some(addressed)) if number > refused => Left::Dropped(number, addressed),
                (number, _) if number < refused => {
                    let unknown = "and whether it has taken this one before is unknown";
                    Left::Told(number, format!("the broker closed the channel for line {refused}, {unknown}"))
                }
                (number, _) => Left::Told(number, explain(&one.error)),
            });
        }
    }
}

/// Whether a broker that closes a channel with this text means this message. The texts are RabbitMQ's.
fn is_about(text: &str, (exchange, routing_key, message): &Addressed) -> bool {
    let named = if exchange.is_empty() { "amq.default" } else { exchange };
    if text.contains(&format!("exchange '{named}'")) {
        // Of an exchange that takes some keys and not others, the text names the key.
        return !text.contains("topic '") || text.contains(&format!("topic '{routing_key}'"));
    }
    text.contains(&format!("message size {} is larger", message.body().len()))
        || message.user_id().is_some_and(|user| text.contains(&format!("user_id property set to '{user}'")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unconfirmed(number: u64, text: &str) -> Unconfirmed {
        let error = Error::ChannelClosed { during: format!("publish {number}"), code: 404, text: text.to_owned() };
        Unconfirmed { number, line: number.to_string().into_bytes(), error }
    }

    /// Every tenth line is for an exchange that is not there.
    fn read(line: &[u8]) -> Option<Addressed> {
        let number: u64 = std::str::from_utf8(line).ok()?.parse().ok()?;
        let exchange = if number.is_multiple_of(10) { "gone" } else { "" };
        Some((exchange.to_owned(), "key".to_owned(), Message::new("body")))
    }

    #[test]
    fn those_before_the_refused_one_are_told_and_those_behind_it_are_sent_again() {
        let text = "NOT_FOUND - no exchange 'gone' in vhost '/'";
        let left = Left::of([12, 9, 20, 10, 8].map(|number| unconfirmed(number, text)).into(), read);
        let (mut told, mut dropped) = (Vec::new(), Vec::new());
        for left in left {
            match left {
                Left::Told(number, reason) => told.push((number, reason)),
                Left::Dropped(number, _) => dropped.push(number),
            }
        }
        assert_eq!(told.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [8, 9, 10]);
        assert!(told[0].1.contains("for line 10") && told[1].1.contains("for line 10"), "{told:?}");
        assert!(told[2].1.contains("no exchange 'gone'"), "{told:?}");
        assert_eq!(dropped, [12, 20]);
    }

    #[test]
    fn a_refusal_that_names_no_line_is_told_of_all() {
        let left = Left::of([1, 2].map(|number| unconfirmed(number, "SOMETHING ELSE")).into(), read);
        let told = |left: &Left, own: u64| matches!(left, Left::Told(number, reason) if *number == own && reason.contains("may be another"));
        assert!(left.len() == 2 && told(&left[0], 1) && told(&left[1], 2), "{left:?}");
    }

    #[test]
    fn texts_of_rabbitmq_name_what_they_are_about() {
        let message = Message::new("12345").with_user_id("somebody");
        let about = |text: &str, exchange: &str, key: &str| {
            is_about(text, &(exchange.to_owned(), key.to_owned(), message.clone()))
        };
        assert!(about("NOT_FOUND - no exchange 'x' in vhost '/'", "x", "k"));
        assert!(!about("NOT_FOUND - no exchange 'x' in vhost '/'", "y", "k"));
        assert!(about("ACCESS_REFUSED - access to exchange 'amq.default' in vhost '/' refused for user 'a'", "", "k"));
        let topic = "ACCESS_REFUSED - access to topic 'k' in exchange 'x' in vhost '/' refused for user 'a'";
        assert!(about(topic, "x", "k") && !about(topic, "x", "other"));
        assert!(about("PRECONDITION_FAILED - message size 5 is larger than configured max size 4", "x", "k"));
        let user = "PRECONDITION_FAILED - user_id property set to 'somebody' but authenticated user was 'guest'";
        assert!(about(user, "x", "k"));
    }
}
