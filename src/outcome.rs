//! What becomes of a delivery once its handler is done, and how often and when a failed one is tried again.
//!
//! Values only; carrying them out is the work of [`listener`](crate::listener).

use std::any::Any;
use std::error::Error as StdError;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{EncodingError, Error, Result};

/// What a handler makes of a delivery.
///
/// Handlers return anything that turns into one:
///
/// - `()` and `Ok(())` are [`Ack`](Outcome::Ack), `Ok(outcome)` is that outcome.
/// - `Err(error)` is [`Failed`](Outcome::Failed). The error is anything that `?` turns into a `Box<dyn Error + Send + Sync>`:
///   a text, an [`Error`] of this crate, an enum made with thiserror, an `anyhow::Error`. Its text and those of its sources are
///   the reason.
/// - It is [`Undecodable`](Outcome::Undecodable) instead if the error, or one of its sources, is [`Error::Json`],
///   [`Error::Encoding`] or a `serde_json::Error`. Wrap an error of serde_json that has nothing to do with the message in a text
///   (`.map_err(|error| error.to_string())`) to have it tried again. One in a variant that is `#[error(transparent)]` is hidden
///   from everybody, and counts as failed.
///
/// A handler that decides for itself, and also calls what may fail, returns `Result<Outcome, E>`:
///
/// ```
/// # #[cfg(feature = "embedded")]
/// # fn main() -> coney::Result<()> {
/// use std::num::ParseIntError;
///
/// use coney::{App, Context, Delivery, Outcome, Queue, Settings, Topology};
///
/// fn handle(_: &Context<'_>, delivery: &Delivery<'_>) -> Result<Outcome, ParseIntError> {
///     let Some(text) = delivery.message().text() else { return Ok(Outcome::Reject) };
///     let number: u32 = text.parse()?; // an error: tried again by the retry policy
///     println!("{number}");
///     Ok(Outcome::Ack)
/// }
///
/// let app = App::from_settings(Settings::from_url("memory://outcomes")?)?;
/// let numbers = Topology::new().queue(Queue::new("numbers"));
/// let listener = app.listener("numbers").topology(numbers).spawn(handle)?;
/// # listener.stop()
/// # }
/// # #[cfg(not(feature = "embedded"))]
/// # fn main() {}
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It has been dealt with.
    Ack,
    /// It is given up: dead-lettered where the queue says where to, dropped otherwise.
    Reject,
    /// It goes back into its queue at once. For a message that always fails this is a hot loop: prefer `Retry`.
    ///
    /// A quorum queue gives a message up that has come back too often, on RabbitMQ 4 after 20 times unless it is declared otherwise:
    /// see [`Queue::delivery_limit`](crate::Queue::delivery_limit). The log warns before.
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

impl Outcome {
    /// Why the message has not been dealt with, if it is to be tried again.
    pub(crate) fn failure(&self) -> Option<&str> {
        match self {
            Outcome::Failed(reason) => Some(reason),
            Outcome::Retry => Some("the handler asked for another attempt"),
            Outcome::Requeue => Some("the handler put it back"),
            Outcome::Ack | Outcome::Reject | Outcome::Undecodable(_) => None,
        }
    }
}

impl<T, E> From<Result<T, E>> for Outcome
where
    T: Into<Outcome>,
    E: Into<Box<dyn StdError + Send + Sync>> + 'static,
{
    fn from(result: Result<T, E>) -> Outcome {
        match result {
            Ok(outcome) => outcome.into(),
            // As a box, an error made with anyhow would not show what it was made of.
            Err(error) => match (&error as &dyn Any).downcast_ref::<anyhow::Error>() {
                Some(error) => of_error(error.as_ref()),
                None => of_error(&*error.into()),
            },
        }
    }
}

fn of_error(error: &(dyn StdError + 'static)) -> Outcome {
    let reason = chain(error);
    match sources(error).any(is_undecodable) {
        true => Outcome::Undecodable(reason),
        false => Outcome::Failed(reason),
    }
}

/// An error and its sources, from the outside in.
fn sources<'e>(error: &'e (dyn StdError + 'static)) -> impl Iterator<Item = &'e (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |&error| {
        // An I/O error passes over the error that it wraps, and names the source of that one as its own.
        let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        wrapped.map(|wrapped| wrapped as _).or_else(|| error.source())
    })
}

fn is_undecodable(error: &(dyn StdError + 'static)) -> bool {
    // The sources of our errors count too: an error in a box that a report like that of anyhow has become shows only these.
    matches!(error.downcast_ref(), Some(Error::Json { .. }))
        || error.downcast_ref::<EncodingError>().is_some_and(|error| !error.is_of_answer())
        || error.is::<serde_json::Error>()
        || error.is::<Arc<serde_json::Error>>()
}

/// The texts of an error and its sources. One whose text its wrapper has at its end already is not told twice.
fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut texts = String::new();
    for error in sources(error) {
        let text = error.to_string();
        if texts.is_empty() {
            texts = text;
        } else if !texts.ends_with(&text) {
            texts = format!("{texts}: {text}");
        }
    }
    texts
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

    #[derive(Debug, thiserror::Error)]
    enum Handling {
        #[error("order 7")]
        Order(#[from] Error),
        #[error("order 7: {0}")]
        Told(#[source] Error),
        #[error("order 7: {0}")]
        Plain(#[source] serde_json::Error),
        #[error(transparent)]
        Own(Error),
        #[error("reading")]
        Io(#[from] io::Error),
        #[error("no stock")]
        Stock,
    }

    fn json() -> Result<()> {
        crate::Message::new("{").decode_json::<u32>().map(drop)
    }

    fn encoding() -> Result<()> {
        crate::Encoding::Raw.decode::<u32>(b"x", 10).map(drop)
    }

    /// What becomes of the message, and the reason.
    fn undecodable(outcome: impl Into<Outcome>) -> String {
        match outcome.into() {
            Outcome::Undecodable(reason) => reason,
            other => panic!("unexpected: {other:?}"),
        }
    }

    #[test]
    fn handlers_may_return_what_is_natural() {
        assert_eq!(Outcome::from(()), Outcome::Ack);
        assert_eq!(Outcome::from(Ok::<_, String>(())), Outcome::Ack);
        assert_eq!(Outcome::from(Ok::<_, String>(Outcome::Reject)), Outcome::Reject);
        assert_eq!(Outcome::from(Err::<(), _>("no")), Outcome::Failed("no".to_owned()));
        assert_eq!(Outcome::from(Err::<(), _>(Handling::Stock)), Outcome::Failed("no stock".to_owned()));
        assert_eq!(Outcome::from(Err::<(), _>(anyhow::anyhow!("no"))), Outcome::Failed("no".to_owned()));
        assert_eq!(Outcome::from(Err::<(), _>(Error::answer("no"))), Outcome::Failed("answer: no".to_owned()));
    }

    #[test]
    fn what_cannot_be_decoded_is_found_in_any_error_that_wraps_it() {
        let plain = || serde_json::from_str::<u32>("{").map(drop);
        let reason = undecodable(json());
        assert!(reason.starts_with("message body from JSON: ") && reason.matches("line 1").count() == 1, "{reason}");
        for wrong in [json, encoding] {
            let own = undecodable(wrong());
            assert_eq!(undecodable(wrong().map_err(Handling::from)), format!("order 7: {own}"));
            assert_eq!(undecodable(wrong().map_err(Handling::Told)), format!("order 7: {own}"), "told once");
            assert_eq!(undecodable(wrong().map_err(Handling::Own)), own);
            assert_eq!(undecodable(wrong().map_err(anyhow::Error::from)), own);
            let in_context = wrong().map_err(|error| anyhow::Error::from(error).context("order 7"));
            assert_eq!(undecodable(in_context), format!("order 7: {own}"));
            let deep = wrong().map_err(|error| anyhow::Error::from(Handling::Order(error)).context("deep"));
            assert_eq!(undecodable(deep), format!("deep: order 7: {own}"));
            let reported = wrong().map_err(|error| Box::from(anyhow::Error::from(error)));
            assert_eq!(undecodable(reported.map_err(|error: Box<dyn StdError + Send + Sync>| error)), own);
            let boxed = || -> Result<(), Box<dyn StdError + Send + Sync>> { Ok(wrong()?) };
            assert_eq!(undecodable(boxed()), own);
            let in_io = wrong().map_err(|error| Handling::Io(io::Error::other(error)));
            assert_eq!(undecodable(in_io), format!("reading: {own}"));
        }
        let own = undecodable(plain());
        assert!(own.contains("line 1"), "{own}");
        assert_eq!(undecodable(plain().map_err(Handling::Plain)), format!("order 7: {own}"));
        assert_eq!(undecodable(plain().map_err(anyhow::Error::from)), own);
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
