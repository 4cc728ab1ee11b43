//! The releases of RabbitMQ that the broker can be, and all in which they differ. The other rooms ask here what a release
//! does; none of them compares releases. Each answer was measured on RabbitMQ 3.10.8 and 4.0.5.

use std::fmt;
use std::str::FromStr;

use super::refusal::Refusal;
use crate::amqp::frame::PROTOCOL_HEADER;

/// The release of RabbitMQ that an embedded broker is to its clients. See
/// [`Builder::release`](super::Builder::release).
///
/// ```
/// use coney::embedded::Release;
///
/// assert_eq!("3.10".parse(), Ok(Release::V3_10));
/// assert_eq!(Release::default().to_string(), "4.0");
/// assert_eq!("3".parse::<Release>().unwrap_err().to_string(), "\"3\" is no release of the broker, expected 3.10 or 4.0");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[non_exhaustive]
pub enum Release {
    /// RabbitMQ 3.10, as in Debian 12.
    V3_10,
    /// RabbitMQ 4.0, as in Debian 13.
    #[default]
    V4_0,
}

/// What is no [`Release`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownRelease(String);

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Release::V3_10 => "3.10",
            Release::V4_0 => "4.0",
        })
    }
}

impl FromStr for Release {
    type Err = UnknownRelease;

    /// Reads `3.10` or `4.0`.
    fn from_str(text: &str) -> Result<Release, UnknownRelease> {
        let mut all = [Release::V3_10, Release::V4_0].into_iter();
        all.find(|release| release.to_string() == text).ok_or_else(|| UnknownRelease(text.to_owned()))
    }
}

impl fmt::Display for UnknownRelease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is no release of the broker, expected {} or {}", self.0, Release::V3_10, Release::V4_0)
    }
}

impl std::error::Error for UnknownRelease {}

/// What is asked when a client connects.
impl Release {
    /// The version in the server properties. Clients branch on it.
    pub(super) fn version(self) -> &'static str {
        match self {
            Release::V3_10 => "3.10.8",
            Release::V4_0 => "4.0.5",
        }
    }

    /// What a client is told that speaks another protocol or version of it, before its socket is closed.
    pub(super) fn spoken_instead_of(self, header: [u8; 8]) -> [u8; 8] {
        let is_0_9 = matches!(header, [b'A', b'M', b'Q', b'P', 0, 0, 9..=255, _]);
        // RabbitMQ speaks AMQP 1.0 as well. This broker does not, and whoever asks for it is told so.
        let is_1_0 = matches!(header, [b'A', b'M', b'Q', b'P', _, 1, 0, 0]);
        match self {
            Release::V4_0 if !is_0_9 && !is_1_0 => *b"AMQP\x03\x01\x00\x00",
            _ => PROTOCOL_HEADER,
        }
    }

    /// The largest body of a message in bytes, unless the broker is set otherwise.
    pub(super) fn message_max(self) -> u64 {
        match self {
            Release::V3_10 => 128 << 20,
            Release::V4_0 => 16 << 20,
        }
    }
}

/// What is asked when something is declared or consumed.
impl Release {
    /// The refusal of an exchange type that there is not.
    pub(super) fn no_exchange_type(self, text: impl fmt::Display) -> Refusal {
        match self {
            Release::V3_10 => Refusal::command_invalid(text),
            Release::V4_0 => Refusal::precondition_failed(text),
        }
    }

    /// Whether a queue that is declared without a type is said to be declared as a classic one.
    pub(super) fn gives_every_queue_a_type(self) -> bool {
        self == Release::V4_0
    }

    /// Whether a classic queue knows `x-queue-leader-locator`, and so may be given it and compares it.
    pub(super) fn classic_has_leader_locator(self) -> bool {
        self == Release::V4_0
    }

    /// Whether `x-cancel-on-ha-failover` is an argument of consumers, for the mirrored queues that there once were.
    pub(super) fn has_mirrored_queues(self) -> bool {
        self == Release::V3_10
    }

    /// Whether streams can be filtered. The arguments for that are refused by the consumers of other queues then.
    pub(super) fn has_stream_filters(self) -> bool {
        self == Release::V4_0
    }

    /// The refusal of a consumer of a stream that has no prefetch of its own. `queue` is the queue as texts name it.
    pub(super) fn no_stream_prefetch(self, queue: &str) -> Refusal {
        let what = match self {
            Release::V3_10 => format!("'{queue}'"),
            Release::V4_0 => format!("stream {queue}"),
        };
        Refusal::precondition_failed(format_args!("consumer prefetch count is not set for {what}"))
    }

    /// The refusal of a consumer of a stream that does not acknowledge.
    pub(super) fn no_stream_without_acks(self, queue: &str) -> Refusal {
        let what = match self {
            Release::V3_10 => format!("stream queues {queue}"),
            Release::V4_0 => format!("stream {queue}"),
        };
        Refusal::not_implemented(format_args!("automatic acknowledgement not supported by {what}"))
    }

    /// How often a message may come back to a quorum queue of which `declared` is the delivery limit. `None` is any number
    /// of times.
    pub(super) fn delivery_limit(self, declared: Option<i64>) -> Option<i64> {
        match self {
            Release::V3_10 => declared,
            Release::V4_0 => Some(declared.unwrap_or(20)).filter(|limit| *limit >= 0),
        }
    }

    /// Whether a quorum queue gives two messages of a priority above 4 out for each other one.
    pub(super) fn quorum_has_priorities(self) -> bool {
        self == Release::V4_0
    }

    /// Whether the single active consumer of a quorum queue makes way for one of a higher priority, once it has nothing
    /// unsettled. It is the one of the highest priority, too, that follows one that has gone.
    pub(super) fn single_active_makes_way(self) -> bool {
        self == Release::V4_0
    }
}

/// What is asked when a message comes, comes back, or goes.
impl Release {
    /// Whether `delivery-mode` may have any value. All but 2 are transient then.
    pub(super) fn takes_any_delivery_mode(self) -> bool {
        self == Release::V4_0
    }

    /// Whether properties are written anew: headers in the order of their names, the first of each name alone, and the
    /// expiration as the number it is. Otherwise they stay as they came.
    pub(super) fn rewrites_properties(self) -> bool {
        self == Release::V4_0
    }

    /// Whether a delivery of a stream may be rejected, or asked for once more, which is as good as an ack. Otherwise it is
    /// refused.
    pub(super) fn stream_takes_rejections(self) -> bool {
        self == Release::V4_0
    }

    /// Whether a stream makes every message that is not persistent a transient one, those that do not say included.
    pub(super) fn stream_writes_delivery_mode(self) -> bool {
        self == Release::V4_0
    }

    /// Whether a stream keeps a header of this name that is a table or an array.
    pub(super) fn stream_keeps_nested(self, name: &str, is_dead_letter: bool) -> bool {
        let is_own = matches!(name, "CC" | "BCC") || name.starts_with("x-");
        self == Release::V4_0 && is_own && (name != "x-death" || is_dead_letter)
    }

    /// Whether `basic.get` from a quorum queue shows `x-delivery-count` of a message that has never come back.
    pub(super) fn get_shows_no_returns(self) -> bool {
        self == Release::V3_10
    }

    /// Whether a message takes along from one quorum queue to the next how often it was rejected or its channel lost.
    pub(super) fn failures_go_along(self) -> bool {
        self == Release::V4_0
    }
}

/// What is asked of dead letters.
impl Release {
    /// Whether the `x-death` with which a message was published counts as its history. Otherwise it is overwritten.
    pub(super) fn takes_deaths_from_clients(self) -> bool {
        self == Release::V3_10
    }

    /// Whether the earlier deaths stay in their order, and each as it was written first. Otherwise they are turned round
    /// each time, and the fields of the latest sorted.
    pub(super) fn leaves_deaths_in_order(self) -> bool {
        self == Release::V4_0
    }

    /// Whether `original-expiration` is the first field of a death. Otherwise it is the last.
    pub(super) fn expiration_comes_first(self) -> bool {
        self == Release::V4_0
    }

    /// Whether there are headers `x-last-death-…`.
    pub(super) fn notes_last_death(self) -> bool {
        self == Release::V4_0
    }

    /// Whether they arrive in a stream. Otherwise they are lost on the way.
    pub(super) fn streams_take_dead_letters(self) -> bool {
        self == Release::V4_0
    }

    /// Whether a routing key of the queue for its dead letters takes the header `CC` out of them.
    pub(super) fn dead_letter_key_removes_cc(self) -> bool {
        self == Release::V3_10
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_protocol_is_told_what_is_spoken_here() {
        let (amqp_1_0, amqp_0_9_1) = (*b"AMQP\x03\x01\x00\x00", PROTOCOL_HEADER);
        for (header, wanted) in [
            (b"HTTP/1.1", amqp_1_0),
            (b"AMQP\x00\x00\x08\x00", amqp_1_0),
            (b"AMQP\x01\x01\x08\x00", amqp_1_0),
            (b"AMQP\x00\x00\x09\x02", amqp_0_9_1),
            (b"AMQP\x00\x00\x0a\x00", amqp_0_9_1),
            (b"AMQP\x03\x01\x00\x00", amqp_0_9_1),
        ] {
            assert_eq!(Release::V4_0.spoken_instead_of(*header), wanted, "{header:?}");
            assert_eq!(Release::V3_10.spoken_instead_of(*header), amqp_0_9_1, "{header:?}");
        }
    }

    #[test]
    fn releases_are_read_as_they_are_written() {
        for release in [Release::V3_10, Release::V4_0] {
            assert_eq!(release.to_string().parse(), Ok(release));
        }
        for text in ["", "4", "4.0.5", "3.10.8", "v4.0", "latest"] {
            let error = text.parse::<Release>().unwrap_err().to_string();
            assert!(error.ends_with("expected 3.10 or 4.0") && error.contains(&format!("{text:?}")), "{error}");
        }
    }
}
