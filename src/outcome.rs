//! What becomes of a delivery once its handler is done, and how often and when a failed one is tried again.
//!
//! Values only; carrying them out is the work of [`listener`](crate::listener).

use std::any::Any;
use std::fmt;
use std::time::Duration;

use crate::error::{Error, Result};

/// What a handler makes of a delivery.
///
/// Handlers return anything that turns into one: `()` and `Ok(())` are [`Ack`](Outcome::Ack); an `Err` is
/// [`Failed`](Outcome::Failed) with its text, or [`Undecodable`](Outcome::Undecodable) if it is the [`Error::Json`] of
/// this crate, itself or in a `Box<dyn Error>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It has been dealt with.
    Ack,
    /// It is given up: dead-lettered where the queue says where to, dropped otherwise.
    Reject,
    /// It goes back into its queue at once. For a message that always fails this is a hot loop: prefer `Retry`.
    Requeue,
    /// It is tried again later, by the listener's [`RetryPolicy`]. Without one it is requeued, and rejected if it had been
    /// redelivered already, which it also is when a consumer has given it back unhandled: set a policy where no message
    /// may be lost.
    Retry,
    /// Like `Retry`, with the reason, which a message that is finally given up carries in its headers.
    Failed(String),
    /// It is not what the handler can read, so trying again is of no use: it goes to the queue `NAME.dead` at once, or
    /// is rejected where there is no [`RetryPolicy`].
    Undecodable(String),
}

impl From<()> for Outcome {
    fn from((): ()) -> Outcome {
        Outcome::Ack
    }
}

impl<T: Into<Outcome>, E: fmt::Display + 'static> From<Result<T, E>> for Outcome {
    fn from(result: Result<T, E>) -> Outcome {
        match result {
            Ok(outcome) => outcome.into(),
            Err(error) if is_undecodable(&error) => Outcome::Undecodable(error.to_string()),
            Err(error) => Outcome::Failed(error.to_string()),
        }
    }
}

fn is_undecodable(error: &dyn Any) -> bool {
    let error = if let Some(boxed) = error.downcast_ref::<Box<dyn std::error::Error + Send + Sync>>() {
        boxed.downcast_ref::<Error>()
    } else if let Some(boxed) = error.downcast_ref::<Box<dyn std::error::Error>>() {
        boxed.downcast_ref::<Error>()
    } else {
        error.downcast_ref::<Error>()
    };
    matches!(error, Some(Error::Json { .. } | Error::Encoding { .. }))
}

/// When a failed message is tried again, and when it is given up.
///
/// After its first failure a message waits for the first delay, after the second for the second, and so on; if there are
/// more attempts than delays the last delay repeats. A message whose last attempt has failed goes to the queue
/// `NAME.dead`.
///
/// A waiting message is in a queue of its own, `NAME.retry.MILLISECONDS`, one for each delay, from which the broker
/// moves it back. The queues are declared by the listener.
///
/// ```
/// use std::time::Duration;
/// use coney::RetryPolicy;
///
/// let policy = RetryPolicy::new([Duration::from_secs(1), Duration::from_secs(10)])?;
/// assert_eq!(policy.max_attempts(), 3);
/// # Ok::<(), coney::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RetryPolicy {
    delays: Vec<Duration>,
    max_attempts: u32,
}

impl RetryPolicy {
    /// The longest delay: a day.
    pub const MAX_DELAY: Duration = Duration::from_secs(24 * 60 * 60);

    /// A policy with these delays and one attempt more than there are delays.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] if there are no delays, or one is not from 1 ms to [`MAX_DELAY`](Self::MAX_DELAY).
    pub fn new(delays: impl IntoIterator<Item = Duration>) -> Result<RetryPolicy> {
        let delays: Vec<Duration> = delays.into_iter().collect();
        let in_range = |delay: &Duration| *delay >= Duration::from_millis(1) && *delay <= RetryPolicy::MAX_DELAY;
        if delays.is_empty() || !delays.iter().all(in_range) {
            return Err(Error::invalid("retry", "expected one delay or more, each from 1 ms to a day"));
        }
        let max_attempts = u32::try_from(delays.len()).unwrap_or(u32::MAX).saturating_add(1);
        Ok(RetryPolicy { delays, max_attempts })
    }

    /// Sets how often a message is handled at most, the first time included; 0 counts as 1. Defaults to one more than
    /// there are delays.
    #[must_use]
    pub fn with_max_attempts(mut self, max_attempts: u32) -> RetryPolicy {
        self.max_attempts = max_attempts.max(1);
        self
    }

    /// The delays, in order.
    pub fn delays(&self) -> &[Duration] {
        &self.delays
    }

    /// How often a message is handled at most.
    pub fn max_attempts(&self) -> u32 {
        self.max_attempts
    }

    /// How long a message waits that has failed `attempts` times; `None` if it is to be given up.
    pub(crate) fn delay_after(&self, attempts: u32) -> Option<Duration> {
        if attempts >= self.max_attempts {
            return None;
        }
        let index = usize::try_from(attempts.saturating_sub(1)).unwrap_or(usize::MAX);
        self.delays.get(index).or(self.delays.last()).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handlers_may_return_what_is_natural() {
        assert_eq!(Outcome::from(()), Outcome::Ack);
        assert_eq!(Outcome::from(Ok::<_, String>(())), Outcome::Ack);
        assert_eq!(Outcome::from(Ok::<_, String>(Outcome::Reject)), Outcome::Reject);
        assert_eq!(Outcome::from(Err::<(), _>("no")), Outcome::Failed("no".to_owned()));
        let json = || crate::Message::new("{").decode_json::<u32>().map(drop);
        assert!(matches!(Outcome::from(json()), Outcome::Undecodable(_)));
        let boxed = || -> Result<(), Box<dyn std::error::Error>> { Ok(json()?) };
        assert!(matches!(Outcome::from(boxed()), Outcome::Undecodable(_)));
        let shared = || -> Result<(), Box<dyn std::error::Error + Send + Sync>> { Ok(json()?) };
        assert!(matches!(Outcome::from(shared()), Outcome::Undecodable(_)));
    }

    #[test]
    fn delays_follow_the_ladder_and_the_last_repeats() {
        let seconds = [1, 10].map(Duration::from_secs);
        let policy = RetryPolicy::new(seconds).unwrap();
        let ladder = |policy: &RetryPolicy| (1..=5).map(|n| policy.delay_after(n)).collect::<Vec<_>>();
        assert_eq!(ladder(&policy), [Some(seconds[0]), Some(seconds[1]), None, None, None]);
        let longer = policy.clone().with_max_attempts(5);
        assert_eq!(ladder(&longer)[..], [Some(seconds[0]), Some(seconds[1]), Some(seconds[1]), Some(seconds[1]), None]);
        assert_eq!(ladder(&policy.with_max_attempts(0))[0], None);
    }

    #[test]
    fn delays_out_of_range_are_refused() {
        assert!(RetryPolicy::new([]).is_err());
        assert!(RetryPolicy::new([Duration::ZERO]).is_err());
        assert!(RetryPolicy::new([RetryPolicy::MAX_DELAY + Duration::from_secs(1)]).is_err());
    }
}
