//! Which of the partitions a listener keeps where several listeners share them.
//!
//! Every listener consumes from every partition, and the broker makes one of them the active one: the one that came first, and
//! after it the one that has waited longest. So the first listener has all of them at first. Each listener gives back what is
//! more than its share, and then waits behind the others. Pure: the supervisor looks, and carries out.

use std::time::{Duration, Instant};

/// How often a listener looks whether it has more than its share.
pub(super) const LOOK: Duration = Duration::from_millis(500);

/// For so long nothing must have changed before a listener gives back one of those that not all can have; the next time for twice
/// as long, and so on.
const CALM: Duration = Duration::from_secs(3);

/// How often it does so, for each change of the number of listeners.
const EVENINGS: u32 = 3;

/// The longest wait before more is given back, where that goes on and on.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Share {
    partitions: usize,
    /// How many listeners there are, as of the last look.
    members: usize,
    /// When that has changed, or something was given back.
    changed: Instant,
    /// How long to wait from then on before more is given back: it may be another consumer that is counted, and no listener.
    wait: Duration,
    /// How often it has given one back since, for the sake of those that have fewer.
    evened: u32,
}

impl Share {
    pub(super) fn new(partitions: usize, now: Instant) -> Share {
        Share { partitions, members: 1, changed: now, wait: Duration::ZERO, evened: 0 }
    }

    /// How many partitions to give back now, of so many that this listener is active on, where so many listeners share them.
    ///
    /// No listener keeps more than the partitions divided by the listeners, rounded up. If that leaves a rest, some listeners
    /// may have two fewer than others; so each gives one back now and then, until it has done so a few times.
    pub(super) fn surplus(&mut self, now: Instant, members: usize, active: usize) -> usize {
        let members = members.max(1);
        if members != self.members {
            self.members = members;
            self.changed = now;
            self.wait = Duration::ZERO;
            self.evened = 0;
        }
        let most = self.partitions.div_ceil(members);
        let least = self.partitions / members;
        let since = now.saturating_duration_since(self.changed);
        if active > most {
            if since < self.wait {
                return 0;
            }
            self.changed = now;
            self.wait = (self.wait * 2).clamp(LOOK, LONGEST_WAIT);
            return active - most;
        }
        let is_calm = since >= CALM * 2_u32.pow(self.evened);
        if is_calm && self.evened < EVENINGS && active == most && (1..most).contains(&least) {
            self.evened += 1;
            self.changed = now;
            return 1;
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// Partitions with their lines of consumers, the active one at the front, and listeners that look in turn.
    struct Model {
        lines: Vec<VecDeque<usize>>,
        shares: Vec<Share>,
        now: Instant,
    }

    impl Model {
        fn new(partitions: usize, listeners: usize) -> Model {
            let now = Instant::now();
            Model {
                lines: vec![(0..listeners).collect(); partitions],
                shares: (0..listeners).map(|_| Share::new(partitions, now)).collect(),
                now,
            }
        }

        fn actives(&self, listeners: &[usize]) -> Vec<usize> {
            let active = |listener| self.lines.iter().filter(|line| line.front() == Some(listener)).count();
            listeners.iter().map(active).collect()
        }

        /// Has everybody look for so long; returns how often a partition has changed hands.
        fn run(&mut self, listeners: &[usize], time: Duration) -> usize {
            let (mut handed, end) = (0, self.now + time);
            while self.now < end {
                self.now += LOOK;
                for &listener in listeners {
                    let active = self.actives(&[listener])[0];
                    let mut surplus = self.shares[listener].surplus(self.now, listeners.len(), active);
                    handed += surplus;
                    let own = self.lines.iter_mut().filter(|line| line.front() == Some(&listener));
                    for line in own {
                        if surplus > 0 {
                            surplus -= 1;
                            line.rotate_left(1);
                        }
                    }
                }
            }
            handed
        }
    }

    #[test]
    fn the_partitions_are_shared_evenly() {
        for partitions in [1, 2, 7, 16, 64] {
            for listeners in 1..=9 {
                let mut model = Model::new(partitions, listeners);
                let all: Vec<usize> = (0..listeners).collect();
                model.run(&all, Duration::from_secs(60));
                let actives = model.actives(&all);
                let (most, least) = (actives.iter().max().unwrap(), actives.iter().min().unwrap());
                assert!(most - least <= 1, "{partitions} by {listeners}: {actives:?}");
            }
        }
    }

    #[test]
    fn once_shared_they_stay_where_they_are() {
        let mut model = Model::new(16, 5);
        let all: Vec<usize> = (0..5).collect();
        let handed = model.run(&all, Duration::from_secs(60));
        assert!(handed <= 6 * 16, "{handed}");
        assert_eq!(model.run(&all, Duration::from_secs(600)), 0);
    }

    #[test]
    fn what_a_listener_leaves_is_shared_again() {
        let mut model = Model::new(16, 4);
        model.run(&[0, 1, 2, 3], Duration::from_secs(60));
        model.lines.iter_mut().for_each(|line| line.retain(|&listener| listener != 2));
        model.run(&[0, 1, 3], Duration::from_secs(60));
        let mut actives = model.actives(&[0, 1, 3]);
        actives.sort_unstable();
        assert_eq!(actives, [5, 5, 6]);
    }

    #[test]
    fn a_consumer_that_is_no_listener_costs_little() {
        let mut model = Model::new(16, 2);
        // The two of them, and six that are counted too: each of the two gives back what the other has given back.
        let handed: usize = (0..1200)
            .map(|_| {
                model.now += LOOK;
                (0..2).filter(|&listener| model.shares[listener].surplus(model.now, 8, 8) > 0).count()
            })
            .sum();
        assert!(handed <= 2 * 20, "{handed} times in ten minutes");
    }

    #[test]
    fn one_alone_keeps_all() {
        let now = Instant::now();
        let mut share = Share::new(16, now);
        assert_eq!(share.surplus(now + Duration::from_secs(60), 1, 16), 0);
        assert_eq!(share.surplus(now + Duration::from_secs(60), 0, 16), 0, "it counts itself");
    }
}
