//! Channels that both sides close at the same moment.
//!
//! Each side then answers the close of the other. For amiquip a channel ends with the broker's `close`, and its number is free;
//! the broker's `close-ok`, which answers amiquip's own `close`, comes later. If the number has been taken for another channel by
//! then, amiquip would take that answer for one to the `open`, and end the other channel. So it is not shown such an answer.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// `channel.open-ok`, `channel.close` and `channel.close-ok`.
const OPEN_OK: [u8; 4] = [0, 20, 0, 11];
const CLOSE: [u8; 4] = [0, 20, 0, 40];
const CLOSE_OK: [u8; 4] = [0, 20, 0, 41];

/// How far the end of a channel has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Closing {
    /// amiquip has sent its `close`.
    Ours,
    /// The broker's `close` has come, and amiquip has not answered it.
    Theirs,
    /// Both: the broker's answer to amiquip's `close` is one too many.
    Crossed,
}

/// See the [module](self). Its lock is a leaf.
#[derive(Debug, Default)]
pub(super) struct Closings(Mutex<HashMap<u16, Closing>>);

impl Closings {
    fn channels(&self) -> MutexGuard<'_, HashMap<u16, Closing>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// amiquip writes a method on a channel.
    pub(super) fn goes_out(&self, channel: u16, payload: &[u8]) {
        let mut channels = self.channels();
        match payload.first_chunk() {
            Some(&CLOSE) => {
                let closing = channels.entry(channel).or_insert(Closing::Ours);
                if *closing == Closing::Theirs {
                    *closing = Closing::Crossed;
                }
            }
            Some(&CLOSE_OK) if channels.get(&channel) == Some(&Closing::Theirs) => drop(channels.remove(&channel)),
            _ => {}
        }
    }

    /// The broker closes a channel. To be told before amiquip sees it.
    pub(super) fn close_comes(&self, channel: u16) {
        let mut channels = self.channels();
        let closing = channels.entry(channel).or_insert(Closing::Theirs);
        if *closing == Closing::Ours {
            *closing = Closing::Crossed;
        }
    }

    /// The broker answers a `close`. Returns whether amiquip waits for that.
    pub(super) fn close_ok_comes(&self, channel: u16) -> bool {
        self.channels().remove(&channel) != Some(Closing::Crossed)
    }

    /// Another method comes on a channel.
    pub(super) fn comes(&self, channel: u16, payload: &[u8]) {
        // What was before it has ended, answered or not.
        if payload.starts_with(&OPEN_OK) {
            self.channels().remove(&channel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_shown_unless_both_have_closed() {
        let closings = Closings::default();
        closings.goes_out(1, &CLOSE);
        assert!(closings.close_ok_comes(1), "only amiquip has");
        closings.close_comes(1);
        closings.goes_out(1, &CLOSE_OK);
        closings.goes_out(1, &CLOSE);
        assert!(closings.close_ok_comes(1), "it is another channel with that number");
        // In either order, and whoever sees what first.
        closings.goes_out(1, &CLOSE);
        closings.close_comes(1);
        closings.goes_out(1, &CLOSE_OK);
        assert!(!closings.close_ok_comes(1));
        closings.close_comes(1);
        closings.goes_out(1, &CLOSE);
        closings.goes_out(1, &CLOSE_OK);
        assert!(!closings.close_ok_comes(1));
        assert!(closings.close_ok_comes(1), "one answer only");
        // A broker that does not answer in that case.
        closings.goes_out(1, &CLOSE);
        closings.close_comes(1);
        closings.comes(1, &OPEN_OK);
        closings.goes_out(1, &CLOSE);
        assert!(closings.close_ok_comes(1));
        assert!(closings.channels().is_empty());
    }
}
