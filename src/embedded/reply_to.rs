//! Names of direct reply-to: a consumer without a queue, answered through the default exchange.

use crate::amqp::ShortString;

/// The queue that is none: consumed from by who asks, and named in `reply_to`.
pub(super) const PSEUDO_QUEUE: &str = "amq.rabbitmq.reply-to";

/// Length of the random part of a server-made name, and its letters, which need no escaping anywhere.
const RANDOM_LEN: usize = 22;
const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// Whether `name` is the pseudo queue or the address of an answer.
pub(super) fn is_reply_name(name: &ShortString) -> bool {
    name.as_bytes().starts_with(PSEUDO_QUEUE.as_bytes())
}

/// What stands behind `amq.rabbitmq.reply-to.` in the address of an answer, `None` if `key` is no such address.
pub(super) fn suffix(key: &[u8]) -> Option<&[u8]> {
    key.strip_prefix(PSEUDO_QUEUE.as_bytes())?.strip_prefix(b".")
}

/// The address of an answer.
pub(super) fn address(suffix: &ShortString) -> ShortString {
    format!("{PSEUDO_QUEUE}.{suffix}").into()
}

/// A suffix nobody can guess.
pub(super) fn new_suffix() -> ShortString {
    format!("{}.{}==", random(), random()).into()
}

/// A name made by the server: `amq.gen-…`, `amq.ctag-…`.
pub(super) fn server_name(prefix: &str) -> ShortString {
    format!("{prefix}-{}", random()).into()
}

fn random() -> String {
    (0..RANDOM_LEN).map(|_| char::from(LETTERS[fastrand::usize(..LETTERS.len())])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_leads_back_to_its_suffix() {
        let made = new_suffix();
        assert_eq!(suffix(address(&made).as_bytes()), Some(made.as_bytes()));
        assert_eq!(suffix(PSEUDO_QUEUE.as_bytes()), None);
        assert!(is_reply_name(&PSEUDO_QUEUE.into()) && is_reply_name(&address(&made)));
        assert_ne!(new_suffix(), made);
    }
}
