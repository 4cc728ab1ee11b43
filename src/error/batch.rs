//! What became of a batch of which not all was confirmed.

use std::fmt;

use super::{Error, counted};

/// Which messages of a batch were not confirmed, and why.
#[derive(Clone)]
#[non_exhaustive]
pub struct BatchError {
    /// How many messages were taken from the iterator. Those behind them were not sent: a lost connection or a time-out has
    /// ended the batch.
    pub taken: usize,
    /// How many messages of the batch were confirmed.
    pub confirmed: usize,
    /// The others that were taken: position in the batch, counted from 0, and what became of each, in order of position.
    pub failed: Vec<(usize, Error)>,
}

impl BatchError {
    /// Why the message at this position was not confirmed; `None` if it was. Of a message that was not taken it is what has
    /// ended the batch.
    pub fn error_at(&self, position: usize) -> Option<&Error> {
        if position >= self.taken {
            return self.failed.last().map(|(_, error)| error);
        }
        let at = self.failed.binary_search_by_key(&position, |(failed, _)| *failed).ok()?;
        self.failed.get(at).map(|(_, error)| error)
    }
}

// The first few failures only: there may be as many as the batch had messages.
impl fmt::Debug for BatchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BatchError")
            .field("taken", &self.taken)
            .field("confirmed", &self.confirmed)
            .field("failed", &self.failed.len())
            .field("first", &&self.failed[..self.failed.len().min(3)])
            .finish()
    }
}

impl fmt::Display for BatchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = self.taken;
        let were = if self.failed.len() == 1 { "was" } else { "were" };
        write!(f, "{} of {} of the batch {were} not confirmed", self.failed.len(), counted(total, "message"))?;
        if let Some((position, error)) = self.failed.first() {
            write!(f, "; the first is number {position}: {error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for BatchError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.failed.first().map(|(_, error)| error as _)
    }
}
