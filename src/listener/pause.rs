//! Why a listener rests, and until when: by hand, or because most of its messages have failed.
//!
//! [`Pauses`] is asked by the supervisor what comes next, told by workers what became of messages, and told by others to pause or
//! to go on. Whoever changes what comes next marks the present run as due to end and wakes the supervisor.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::kill_switch::{KillSwitch, Trip};
use crate::pace::PauseOnFailures;

/// Why a listener is paused.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum PauseReason {
    /// [`Listener::pause`](super::Listener::pause) was called.
    ByHand,
    /// Most messages have failed: see [`ListenerBuilder::pause_on_failures`](super::ListenerBuilder::pause_on_failures).
    #[non_exhaustive]
    Failures {
        /// How many were handled within the time that counts.
        handled: u64,
        /// How many of them have failed.
        failed: u64,
        /// That time.
        within: Duration,
        /// Why the last one has failed.
        last: String,
    },
    /// The message that was tried after a pause has failed too.
    #[non_exhaustive]
    StillFailing {
        /// Why it has failed.
        last: String,
    },
}

impl fmt::Display for PauseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PauseReason::ByHand => f.write_str("it was told to"),
            PauseReason::Failures { handled, failed, within, last } => {
                let within = humantime::format_duration(*within);
                write!(f, "{failed} of {handled} messages within {within} failed, the last because of: {last}")
            }
            PauseReason::StillFailing { last } => write!(f, "the message that was tried failed: {last}"),
        }
    }
}

/// A pause, as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pause {
    pub(super) since: Instant,
    /// By hand there is no end.
    pub(super) until: Option<Instant>,
    pub(super) why: PauseReason,
}

/// How a run consumes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Mode {
    All,
    /// One message at a time, to see whether it fails: the pause goes on.
    Trying(Pause),
}

/// What a listener does next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    Rest(Pause),
    Run(Mode),
}

#[derive(Debug)]
enum Switch {
    Closed,
    Open {
        pause: Pause,
    },
    /// The pause is over, and one message is tried.
    Trying {
        pause: Pause,
    },
}

#[derive(Debug)]
struct Inner {
    by_hand_since: Option<Instant>,
    kill_switch: Option<KillSwitch>,
    switch: Switch,
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Pauses {
    /// A leaf among locks.
    inner: Mutex<Inner>,
    /// The present run is to end.
    is_run_over: AtomicBool,
    has_kill_switch: bool,
    signal: Sender<()>,
    signalled: Receiver<()>,
}

impl Pauses {
    pub(super) fn new(policy: Option<PauseOnFailures>) -> Pauses {
        let (signal, signalled) = bounded(1);
        let kill_switch = policy.map(KillSwitch::new);
        Pauses {
            has_kill_switch: kill_switch.is_some(),
            inner: Mutex::new(Inner { by_hand_since: None, kill_switch, switch: Switch::Closed }),
            is_run_over: AtomicBool::new(false),
            signal,
            signalled,
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gets a message when what comes next has changed.
    pub(super) fn signalled(&self) -> &Receiver<()> {
        &self.signalled
    }

    /// Whether the present run is to end. No message that comes from now on is handled in it.
    pub(super) fn is_run_over(&self) -> bool {
        self.is_run_over.load(Ordering::SeqCst)
    }

    fn end_run(&self) {
        self.is_run_over.store(true, Ordering::SeqCst);
        // Full: a signal is on its way.
        let _ = self.signal.try_send(());
    }

    /// Pauses until it is told to go on.
    pub(super) fn by_hand(&self) {
        let mut inner = self.inner();
        inner.by_hand_since.get_or_insert_with(Instant::now);
        self.end_run();
    }

    /// Ends every pause.
    pub(super) fn resume(&self) {
        let mut inner = self.inner();
        if inner.by_hand_since.take().is_none() && matches!(inner.switch, Switch::Closed) {
            return;
        }
        inner.close();
        self.end_run();
    }

    /// Whether anybody counts what fails.
    #[inline]
    pub(super) fn counts_failures(&self) -> bool {
        self.has_kill_switch
    }

    /// Counts a message that was handled, and why it has failed if it has. Returns whether it is to go back into its queue,
    /// unharmed, because the listener pauses.
    pub(super) fn record(&self, failure: Option<&str>, now: Instant) -> bool {
        let mut inner = self.inner();
        let Inner { kill_switch: Some(kill_switch), switch, .. } = &mut *inner else { return false };
        let policy = *kill_switch.policy();
        match (&*switch, failure) {
            (Switch::Closed, failure) => {
                let Some(Trip { handled, failed }) = kill_switch.record(failure.is_some(), now) else { return false };
                let last = failure.unwrap_or_default().to_owned();
                let why = PauseReason::Failures { handled, failed, within: policy.within, last };
                *switch = Switch::Open { pause: Pause { since: now, until: Some(now + policy.pause), why } };
            }
            // Of those that were in hand when it opened.
            (Switch::Open { .. }, failure) => return failure.is_some(),
            (Switch::Trying { .. }, None) => inner.close(),
            (Switch::Trying { pause }, Some(last)) => {
                let why = PauseReason::StillFailing { last: last.to_owned() };
                *switch = Switch::Open { pause: Pause { since: pause.since, until: Some(now + policy.pause), why } };
            }
        }
        self.end_run();
        failure.is_some()
    }

    /// What the listener is to do at this time. If that is a run, it begins now.
    pub(super) fn next(&self, now: Instant) -> Next {
        let mut inner = self.inner();
        if let Some(since) = inner.by_hand_since {
            return Next::Rest(Pause { since, until: None, why: PauseReason::ByHand });
        }
        let mode = match &inner.switch {
            Switch::Closed => Mode::All,
            Switch::Open { pause } if pause.until.is_some_and(|until| until > now) => return Next::Rest(pause.clone()),
            Switch::Open { pause } | Switch::Trying { pause } => Mode::Trying(pause.clone()),
        };
        if let Mode::Trying(pause) = &mode {
            inner.switch = Switch::Trying { pause: pause.clone() };
        }
        // Under the lock: who changes what comes next from here on ends this run again.
        self.is_run_over.store(false, Ordering::SeqCst);
        Next::Run(mode)
    }
}

impl Inner {
    fn close(&mut self) {
        self.switch = Switch::Closed;
        if let Some(kill_switch) = &mut self.kill_switch {
            kill_switch.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Trips when both of two have failed; rests for ten seconds.
    fn pauses() -> Pauses {
        Pauses::new(Some(PauseOnFailures::new(2, 1.0, 60 * SECOND, 10 * SECOND).unwrap()))
    }

    fn reason(next: Next) -> String {
        match next {
            Next::Rest(pause) => pause.why.to_string(),
            Next::Run(Mode::All) => "all".to_owned(),
            Next::Run(Mode::Trying(_)) => "one".to_owned(),
        }
    }

    #[test]
    fn it_rests_tries_one_rests_again_and_goes_on() {
        let (pauses, start) = (pauses(), Instant::now());
        assert_eq!(reason(pauses.next(start)), "all");
        assert!(!pauses.record(Some("no database"), start), "the first goes the usual way");
        assert!(pauses.record(Some("no database"), start), "the one that trips goes back");
        assert!(pauses.is_run_over());
        assert!(pauses.record(Some("no database"), start), "so does what is in hand");
        assert!(!pauses.record(None, start));
        let expected = "2 of 2 messages within 1m failed, the last because of: no database";
        assert_eq!(reason(pauses.next(start + 9 * SECOND)), expected);
        assert_eq!(reason(pauses.next(start + 10 * SECOND)), "one");
        assert!(!pauses.is_run_over());
        let later = start + 11 * SECOND;
        assert!(pauses.record(Some("still none"), later));
        assert_eq!(reason(pauses.next(later)), "the message that was tried failed: still none");
        let Next::Run(Mode::Trying(pause)) = pauses.next(later + 10 * SECOND) else { panic!("it does not try") };
        assert_eq!((pause.since, pause.until), (start, Some(later + 10 * SECOND)));
        assert!(!pauses.record(None, later + 10 * SECOND));
        assert!(pauses.is_run_over(), "trying is over");
        assert_eq!(reason(pauses.next(later + 10 * SECOND)), "all");
        assert!(!pauses.record(Some("one alone"), later + 11 * SECOND), "it counts anew");
    }

    #[test]
    fn by_hand_it_rests_until_it_is_told_to_go_on() {
        let (pauses, now) = (Pauses::new(None), Instant::now());
        pauses.by_hand();
        assert!(pauses.is_run_over());
        assert!(pauses.signalled().try_recv().is_ok());
        let later = now + 1000 * SECOND;
        assert_eq!(reason(pauses.next(later)), "it was told to");
        pauses.resume();
        assert!(pauses.signalled().try_recv().is_ok());
        assert_eq!(reason(pauses.next(later)), "all");
    }

    #[test]
    fn whoever_goes_on_by_hand_ends_a_pause_of_the_other_kind() {
        let (pauses, now) = (pauses(), Instant::now());
        assert!(!pauses.record(Some("no"), now));
        assert!(pauses.record(Some("no"), now));
        pauses.by_hand();
        assert_eq!(reason(pauses.next(now + 100 * SECOND)), "it was told to");
        pauses.resume();
        assert_eq!(reason(pauses.next(now)), "all");
    }

    #[test]
    fn going_on_disturbs_no_run() {
        let (pauses, now) = (pauses(), Instant::now());
        assert_eq!(reason(pauses.next(now)), "all");
        pauses.resume();
        assert!(!pauses.is_run_over());
        assert!(pauses.signalled().try_recv().is_err());
    }

    #[test]
    fn a_pause_between_two_runs_is_not_forgotten() {
        let (pauses, now) = (pauses(), Instant::now());
        assert_eq!(reason(pauses.next(now)), "all");
        pauses.by_hand();
        assert!(pauses.is_run_over());
        assert_eq!(reason(pauses.next(now)), "it was told to");
        assert!(pauses.is_run_over(), "nothing is handled before the next run");
    }
}
