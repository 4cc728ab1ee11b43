//! Publisher confirms of one channel: which tags are settled, which have been told, and which are held back.
//!
//! Verdicts are told in the order of the tags, so runs of the same verdict need one frame, `multiple` set.

use std::collections::VecDeque;
use std::time::Instant;

use crate::amqp::method::{BasicAck, BasicNack, Method};

/// What became of a publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Ack,
    Nack,
}

/// When a verdict may be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Release {
    Now,
    At(Instant),
    /// When somebody says so.
    Withheld,
}

/// A run of tags up to this one.
#[derive(Debug, Clone, Copy)]
struct Run {
    through: u64,
    verdict: Verdict,
}

#[derive(Debug)]
pub(super) struct Confirms {
    next_tag: u64,
    /// Everything up to here has been told.
    told: u64,
    /// What may be told, in order.
    ready: Vec<Run>,
    /// What may not yet, in order, behind all that may.
    held: VecDeque<(Run, Release)>,
}

impl Confirms {
    pub(super) fn new() -> Confirms {
        Confirms { next_tag: 1, told: 0, ready: Vec::new(), held: VecDeque::new() }
    }

    /// Settles the next publish. True if there was nothing to tell until now, and is.
    pub(super) fn settle(&mut self, verdict: Verdict, release: Release) -> bool {
        let run = Run { through: self.next_tag, verdict };
        self.next_tag += 1;
        if release != Release::Now || !self.held.is_empty() {
            self.held.push_back((run, release));
            return false;
        }
        self.make_ready(run)
    }

    fn make_ready(&mut self, run: Run) -> bool {
        match self.ready.last_mut() {
            Some(last) if last.verdict == run.verdict => {
                last.through = run.through;
                false
            }
            last => {
                let first = last.is_none();
                self.ready.push(run);
                first
            }
        }
    }

    /// Lets go what was held until `now`, and with `freed` what was withheld. Says when there is more to let go.
    pub(super) fn release(&mut self, now: Instant, freed: bool) -> Option<Instant> {
        while let Some(&(run, release)) = self.held.front() {
            match release {
                Release::Now => {}
                Release::At(at) if at <= now => {}
                Release::At(at) => return Some(at),
                Release::Withheld if freed => {}
                Release::Withheld => return None,
            }
            self.held.pop_front();
            self.make_ready(run);
        }
        None
    }

    /// The frames that tell what may be told.
    pub(super) fn tell(&mut self) -> Vec<Method> {
        let mut frames = Vec::with_capacity(self.ready.len());
        for Run { through, verdict } in self.ready.drain(..) {
            let multiple = through > self.told + 1;
            self.told = through;
            frames.push(match verdict {
                Verdict::Ack => BasicAck { delivery_tag: through, multiple }.into(),
                Verdict::Nack => BasicNack { delivery_tag: through, multiple, requeue: false }.into(),
            });
        }
        frames
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn ack(delivery_tag: u64, multiple: bool) -> Method {
        BasicAck { delivery_tag, multiple }.into()
    }

    fn nack(delivery_tag: u64, multiple: bool) -> Method {
        BasicNack { delivery_tag, multiple, requeue: false }.into()
    }

    #[test]
    fn runs_are_told_at_once() {
        let mut confirms = Confirms::new();
        assert!(confirms.settle(Verdict::Ack, Release::Now));
        assert!(!confirms.settle(Verdict::Ack, Release::Now));
        for verdict in [Verdict::Nack, Verdict::Ack, Verdict::Nack, Verdict::Nack] {
            confirms.settle(verdict, Release::Now);
        }
        assert_eq!(confirms.tell(), [ack(2, true), nack(3, false), ack(4, false), nack(6, true)]);
        assert!(confirms.settle(Verdict::Ack, Release::Now));
        assert_eq!(confirms.tell(), [ack(7, false)]);
        assert!(confirms.tell().is_empty());
    }

    #[test]
    fn what_is_held_holds_up_what_comes_after() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let mut confirms = Confirms::new();
        for release in [Release::At(later), Release::Now, Release::Withheld, Release::Now] {
            assert!(!confirms.settle(Verdict::Ack, release));
        }
        assert_eq!(confirms.release(now, false), Some(later));
        assert!(confirms.tell().is_empty());
        assert_eq!(confirms.release(later, false), None);
        assert_eq!(confirms.tell(), [ack(2, true)]);
        confirms.release(later, true);
        assert_eq!(confirms.tell(), [ack(4, true)]);
    }
}
