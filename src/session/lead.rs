//! Who reads the socket: leader and followers.
//!
//! Of the threads that wait for something from the broker one is the *leader*: it reads the socket and hands the others
//! theirs. The others are *followers*: they are parked. A leader that has what it waited for promotes a follower, if there is
//! one. While nobody leads, the idle reader may.
//!
//! This room only keeps who leads. It does no I/O, and its one lock is a leaf.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Thread};

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct Lead(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    led: bool,
    /// In the order of coming.
    followers: VecDeque<Arc<Follower>>,
    /// How often a thread has begun to lead.
    turns: u64,
}

/// A thread that waits while another one reads.
#[derive(Debug)]
pub(super) struct Follower {
    thread: Thread,
    promoted: AtomicBool,
}

impl Follower {
    fn current() -> Arc<Follower> {
        Arc::new(Follower { thread: thread::current(), promoted: AtomicBool::new(false) })
    }

    /// Whether it is the leader by now.
    pub(super) fn is_promoted(&self) -> bool {
        self.promoted.load(Ordering::Acquire)
    }
}

/// What a thread is that begins to wait.
#[derive(Debug)]
pub(super) enum Role {
    Leader,
    Follower(Arc<Follower>),
}

/// What came of giving up the lead.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Released {
    ToFollower,
    ToNobody,
}

impl Lead {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the lead, or a place among the followers.
    pub(super) fn enter(&self) -> Role {
        let mut state = self.state();
        if state.led {
            let follower = Follower::current();
            state.followers.push_back(Arc::clone(&follower));
            return Role::Follower(follower);
        }
        state.led = true;
        state.turns += 1;
        Role::Leader
    }

    /// Takes the lead if nobody has it.
    pub(super) fn try_lead(&self) -> bool {
        !std::mem::replace(&mut self.state().led, true)
    }

    /// Gives up the lead. The follower that has waited longest is promoted and woken.
    pub(super) fn release(&self) -> Released {
        let mut state = self.state();
        match state.followers.pop_front() {
            Some(follower) => {
                state.turns += 1;
                drop(state);
                follower.promoted.store(true, Ordering::Release);
                follower.thread.unpark();
                Released::ToFollower
            }
            None => {
                state.led = false;
                Released::ToNobody
            }
        }
    }

    /// Gives up a place among the followers; true if the thread is the leader now, and has the lead to give up as well.
    pub(super) fn leave(&self, follower: &Arc<Follower>) -> bool {
        let mut state = self.state();
        let before = state.followers.len();
        state.followers.retain(|other| !Arc::ptr_eq(other, follower));
        state.followers.len() == before
    }

    /// Wakes every follower, for a look at what has changed.
    pub(super) fn wake_followers(&self) {
        let state = self.state();
        state.followers.iter().for_each(|follower| follower.thread.unpark());
    }

    /// Whether somebody leads, and how often a thread has begun to.
    pub(super) fn look(&self) -> (bool, u64) {
        let state = self.state();
        (state.led, state.turns)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, AtomicUsize};
    use std::time::{Duration, Instant};

    use super::*;

    fn follow(lead: &Lead) -> Arc<Follower> {
        match lead.enter() {
            Role::Follower(follower) => follower,
            Role::Leader => panic!("nobody led"),
        }
    }

    #[test]
    fn the_lead_goes_to_the_follower_that_has_waited_longest() {
        let lead = Lead::default();
        assert!(matches!(lead.enter(), Role::Leader) && !lead.try_lead());
        let (first, second) = (follow(&lead), follow(&lead));
        assert_eq!(lead.release(), Released::ToFollower);
        assert!(first.is_promoted() && !second.is_promoted() && lead.look().0);
        assert_eq!(lead.release(), Released::ToFollower);
        assert!(second.is_promoted());
        assert_eq!(lead.release(), Released::ToNobody);
        assert!(lead.try_lead());
    }

    #[test]
    fn a_follower_that_leaves_learns_whether_it_has_been_promoted() {
        let lead = Lead::default();
        assert!(lead.try_lead());
        let (first, second) = (follow(&lead), follow(&lead));
        assert!(!lead.leave(&first));
        assert_eq!(lead.release(), Released::ToFollower);
        assert!(lead.leave(&second) && second.is_promoted(), "it has the lead to give up");
        assert_eq!(lead.release(), Released::ToNobody);
    }

    /// A stream of numbered events that one thread at a time may take from. Each event is one thread's to wait for.
    struct Events {
        lead: Lead,
        next: AtomicU64,
        given: Vec<AtomicBool>,
        owners: Mutex<Vec<Option<Thread>>>,
        leading: AtomicUsize,
    }

    impl Events {
        /// Waits until event `mine` has been taken, by whoever; false if `patience` runs out.
        fn wait(&self, mine: usize, patience: Duration) -> bool {
            let deadline = Instant::now() + patience;
            let is_given = || self.given[mine].load(Ordering::SeqCst);
            self.owners.lock().unwrap()[mine] = Some(thread::current());
            let leads = match self.lead.enter() {
                Role::Leader => true,
                Role::Follower(follower) => loop {
                    if is_given() || Instant::now() >= deadline {
                        if self.lead.leave(&follower) {
                            self.lead.release();
                        }
                        return is_given();
                    }
                    if follower.is_promoted() {
                        break true;
                    }
                    thread::park_timeout(deadline.saturating_duration_since(Instant::now()));
                },
            };
            assert!(leads);
            assert_eq!(self.leading.fetch_add(1, Ordering::SeqCst), 0, "one leads at a time");
            while !is_given() && Instant::now() < deadline {
                let event = self.next.fetch_add(1, Ordering::SeqCst) as usize % self.given.len();
                self.given[event].store(true, Ordering::SeqCst);
                if let Some(owner) = &self.owners.lock().unwrap()[event] {
                    owner.unpark();
                }
            }
            self.leading.fetch_sub(1, Ordering::SeqCst);
            self.lead.release();
            is_given()
        }
    }

    #[test]
    fn no_wake_up_is_lost_between_many_threads() {
        const THREADS: usize = 16;
        let events = Events {
            lead: Lead::default(),
            next: AtomicU64::new(0),
            given: (0..THREADS).map(|_| AtomicBool::new(false)).collect(),
            owners: Mutex::new(vec![None; THREADS]),
            leading: AtomicUsize::new(0),
        };
        let start = Instant::now();
        thread::scope(|scope| {
            for mine in 0..THREADS {
                let events = &events;
                scope.spawn(move || {
                    for round in 0..2_000 {
                        // Now and then one gives up at once, with the lead or without it.
                        let patience = if round % 7 == 0 { Duration::ZERO } else { Duration::from_secs(60) };
                        let given = events.wait(mine, patience);
                        assert!(given || patience.is_zero(), "thread {mine} was not woken in round {round}");
                        events.given[mine].store(false, Ordering::SeqCst);
                    }
                });
            }
        });
        assert!(start.elapsed() < Duration::from_secs(60), "a wake-up was lost: {:?}", start.elapsed());
        assert!(!events.lead.look().0);
    }
}
