//! What is kept of a message in flight, to know it again should it come back.
//!
//! All of a small one. Of a large one its properties, and length and hash of its body: a window of a thousand messages
//! of 64 KiB would otherwise be 64 MiB, each written to memory that has long left the caches.

use std::hash::BuildHasher;
use std::sync::{Arc, LazyLock};

use foldhash::quality::RandomState;

use crate::message::Message;

/// Bytes of the largest body that is kept as it is.
const SMALL: usize = 4096;

/// The hash is 64 bits wide and seeded at random: two bodies that are not the same pass for it once in 2^64.
static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::default);

/// See the [module](self).
#[derive(Debug)]
pub(crate) enum Likeness {
    Whole(Arc<Message>),
    Print {
        /// The message without its body.
        rest: Box<Message>,
        length: usize,
        hash: u64,
    },
}

impl Likeness {
    pub(crate) fn of(message: &Arc<Message>) -> Likeness {
        let body = message.body();
        match body.len() {
            0..=SMALL => Likeness::Whole(Arc::clone(message)),
            length => Likeness::Print { rest: Box::new(message.without_body()), length, hash: HASHER.hash_one(body) },
        }
    }

    /// Whether `returned` is what the broker would send back of this message.
    pub(crate) fn came_back_as(&self, returned: &Likeness) -> bool {
        match (self, returned) {
            (Likeness::Whole(message), Likeness::Whole(returned)) => message.came_back_as(returned),
            (Likeness::Print { rest, length, hash }, Likeness::Print { rest: other, length: long, hash: with }) => {
                (length, hash) == (long, with) && rest.came_back_as(other)
            }
            // One body is longer than the other.
            _ => false,
        }
    }

    /// The identity that its publisher has given it.
    pub(crate) fn message_id(&self) -> Option<&str> {
        match self {
            Likeness::Whole(message) => message.message_id(),
            Likeness::Print { rest, .. } => rest.message_id(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn likeness(body: Vec<u8>, kind: &str) -> Likeness {
        Likeness::of(&Arc::new(Message::new(body).with_header("kind", kind).with_message_id("7")))
    }

    #[test]
    fn a_large_message_is_known_by_its_properties_and_by_every_byte_of_its_body() {
        for size in [SMALL, SMALL + 1, 100_000] {
            let kept = likeness(vec![7; size], "a");
            assert_eq!(matches!(kept, Likeness::Whole(_)), size == SMALL);
            assert_eq!(kept.message_id(), Some("7"));
            assert!(kept.came_back_as(&likeness(vec![7; size], "a")));
            assert!(!kept.came_back_as(&likeness(vec![7; size], "b")));
            assert!(!kept.came_back_as(&likeness(vec![7; size + 1], "a")));
            assert!(!kept.came_back_as(&likeness(vec![7; size - 1], "a")));
            for at in [0, size / 2, size - 1] {
                let mut body = vec![7; size];
                body[at] = 8;
                assert!(!kept.came_back_as(&likeness(body, "a")), "byte {at} of {size}");
            }
        }
    }
}
