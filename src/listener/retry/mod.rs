//! Carries out a [`RetryPolicy`]: the queues in which failed messages wait, and the one in which they end.
//!
//! A failed message is published to where it is to wait, confirmed, and only then acked where it came from, so that it
//! is at no time in neither place. It goes by the default exchange, which changes its exchange and routing key; those it
//! had are kept in its headers and given back to it when it returns.

mod copy;
mod queues;

use crate::connection::{Connection, Received};
use crate::error::Result;
use crate::outcome::RetryPolicy;

pub(crate) use self::copy::{failures_of, welcome_back};
use self::queues::retry_queue;
pub(crate) use self::queues::{dead_queue, declare};

/// Between the name of a queue and the delay of one in which its messages wait.
const RETRY: &str = ".retry.";

/// Whether messages of `queue` wait in `name`, after this delay or one that the policy had earlier.
fn is_waiting_queue(name: &str, queue: &str) -> bool {
    let delay = name.strip_prefix(queue).and_then(|rest| rest.strip_prefix(RETRY));
    delay.is_some_and(|delay| !delay.is_empty() && delay.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Where a failed message has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gone {
    ToWait,
    ToTheDead,
    /// To the dead, without a word of why: its own headers leave no room for one.
    BareToTheDead,
}

/// Puts a copy of the message where it is to wait, or to the dead; the caller acks the original.
///
/// `policy` is `None` for a message that is not to be tried again. It has been handled so many times.
pub(crate) fn put_away(
    connection: &Connection,
    queue: &str,
    policy: Option<&RetryPolicy>,
    received: &Received,
    attempts: u32,
    reason: &str,
) -> Result<Gone> {
    let delay = policy.and_then(|policy| policy.delay_after(attempts));
    let (to, gone) = match delay {
        Some(delay) => (retry_queue(queue, delay.as_millis()), Gone::ToWait),
        None => (dead_queue(queue), Gone::ToTheDead),
    };
    let frame_max = connection.session.frame_max();
    let room = frame_max.saturating_sub(copy::added_by_waiting(&to));
    match copy::of(received, queue, attempts, reason, room) {
        Some(copy) => connection.publish_copy("", &to, copy).map(|()| gone),
        None => {
            let bare = copy::bare(received, frame_max);
            connection.publish_copy("", &dead_queue(queue), bare).map(|()| Gone::BareToTheDead)
        }
    }
}
