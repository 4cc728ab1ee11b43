//! Asking the broker for the type of a queue, for which AMQP has no method.
//!
//! A queue is declared with a type that there is not. That never makes a queue: the broker refuses it with the type that the
//! queue has, or because it has no such type. It names one difference at a time, so the others are declared as it says until
//! it comes to the type. Measured on RabbitMQ 3.10.8; each question ends the channel that it is asked on.

use super::Connection;
use crate::error::{Error, Result};
use crate::field::FieldValue;
use crate::topology::{QUEUE_TYPE, Queue, QueueType};

/// Not a type of any broker.
const ASKED: &str = "coney-asks";

/// A queue has fewer arguments than this that brokers compare.
const MOST_QUESTIONS: usize = 24;

impl Connection {
    /// The type of a queue; `None` if the broker does not say, be it that there is no such queue, or that it speaks in other
    /// words.
    ///
    /// # Errors
    ///
    /// Those of a call that got no answer.
    pub(crate) fn queue_type(&self, queue: &str) -> Result<Option<QueueType>> {
        let mut question = Queue::new(queue).argument(QUEUE_TYPE, ASKED);
        for _ in 0..MOST_QUESTIONS {
            let (code, text) = match self.queue_declare(&question) {
                Err(Error::ChannelClosed { code, text, .. }) => (code, text),
                Err(error) => return Err(error),
                // It cannot be: there is no such type.
                Ok(_) => return Ok(None),
            };
            match answer(code, &text) {
                Answer::Type(queue_type) => return Ok(Some(queue_type)),
                Answer::Argument(name, value) if !question.arguments.contains_key(&name) => {
                    question.arguments.insert(name, value);
                }
                Answer::Argument(..) | Answer::Unknown => return Ok(None),
            }
        }
        Ok(None)
    }
}

/// What a refusal says.
#[derive(Debug, PartialEq)]
enum Answer {
    Type(QueueType),
    /// An argument of the queue that the question lacks.
    Argument(String, FieldValue),
    Unknown,
}

fn answer(code: u16, text: &str) -> Answer {
    // An exclusive queue of another connection. There are none but classic ones.
    if code == 405 {
        return Answer::Type(QueueType::Classic);
    }
    let Some((_, rest)) = text.split_once("inequivalent arg '") else { return Answer::Unknown };
    let Some((name, rest)) = rest.split_once('\'') else { return Answer::Unknown };
    // Behind the names of queue and virtual host, in which there may be anything.
    let Some((_, current)) = rest.rsplit_once("but current is ") else { return Answer::Unknown };
    match name {
        // Those of the other types are durable, and stay when nobody uses them.
        "durable" | "auto_delete" | "exclusive" => Answer::Type(QueueType::Classic),
        QUEUE_TYPE if current == "none" => Answer::Type(QueueType::Classic),
        QUEUE_TYPE => {
            let quoted = current.strip_prefix("the value ").unwrap_or(current);
            let known = quoted.strip_prefix('\'').and_then(|quoted| quoted.split('\'').next()).map(str::parse);
            known.and_then(Result::ok).map_or(Answer::Unknown, Answer::Type)
        }
        name => typed(current).map_or(Answer::Unknown, |value| Answer::Argument(name.to_owned(), value)),
    }
}

/// The value in a text such as `the value '1000' of type 'long'`.
fn typed(current: &str) -> Option<FieldValue> {
    let (value, kind) = current.strip_prefix("the value '")?.rsplit_once("' of type '")?;
    match kind.strip_suffix('\'')? {
        "long" => value.parse().ok().map(FieldValue::I64),
        "signedint" => value.parse().ok().map(FieldValue::I32),
        "short" => value.parse().ok().map(FieldValue::I16),
        "byte" => value.parse().ok().map(FieldValue::I8),
        "unsignedbyte" => value.parse().ok().map(FieldValue::U8),
        "unsignedshort" => value.parse().ok().map(FieldValue::U16),
        "unsignedint" => value.parse().ok().map(FieldValue::U32),
        "bool" => value.parse().ok().map(FieldValue::Bool),
        "longstr" => Some(value.into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_the_type_or_what_else_is_different() {
        let told = |rest: &str| answer(406, &format!("PRECONDITION_FAILED - inequivalent arg {rest}"));
        let of = "for queue 'it's but current is none' in vhost '/':";
        assert_eq!(
            told(&format!("'x-queue-type' {of} received 'coney-asks' but current is 'quorum'")),
            Answer::Type(QueueType::Quorum)
        );
        assert_eq!(
            told(&format!("'x-queue-type' {of} received the value 'coney-asks' of type 'longstr' but current is none")),
            Answer::Type(QueueType::Classic)
        );
        assert_eq!(
            told(&format!("'durable' {of} received 'true' but current is 'false'")),
            Answer::Type(QueueType::Classic)
        );
        assert_eq!(
            told(&format!("'x-expires' {of} received none but current is the value '1000' of type 'long'")),
            Answer::Argument("x-expires".into(), FieldValue::I64(1000))
        );
        assert_eq!(
            told(&format!(
                "'x-dead-letter-exchange' {of} received none but current is the value 'it's' of type 'longstr'"
            )),
            Answer::Argument("x-dead-letter-exchange".into(), "it's".into())
        );
        assert_eq!(told(&format!("'x-queue-type' {of} received 'coney-asks' but current is 'other'")), Answer::Unknown);
        let missing =
            "PRECONDITION_FAILED - invalid arg 'x-queue-type' for queue 'q' in vhost '/': \"unsupported queue type\"";
        assert_eq!(answer(406, missing), Answer::Unknown);
        assert_eq!(answer(403, "ACCESS_REFUSED - no"), Answer::Unknown);
        assert_eq!(answer(405, "RESOURCE_LOCKED - no"), Answer::Type(QueueType::Classic));
    }
}
