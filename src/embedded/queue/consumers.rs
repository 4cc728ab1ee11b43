//! The consumers of a queue, and whose turn it is.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::super::ledger::ConsumerId;

/// Who gets the messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Sharing {
    /// Consumers in turn, those of the highest priority first.
    InTurn,
    /// One alone, until it goes; then the one of the highest priority.
    OneByPriority,
    /// One alone, until it goes; then the one that came first.
    OneByArrival,
    /// One alone, until it goes, or has nothing unsettled while one of a higher priority is there; then the one of the highest
    /// priority.
    OneMakesWay,
}

/// Where a consumer stands among the others: by priority, the highest first, then who came first.
type Rank = (Reverse<i64>, ConsumerId);

#[derive(Debug)]
pub(in super::super) struct Consumers {
    sharing: Sharing,
    /// With the turn of each that stands in line.
    all: BTreeMap<Rank, Option<u64>>,
    /// The consumers that may have room for a message, by priority and turn. One that was found to have none is not in here.
    line: BTreeMap<(Reverse<i64>, u64), ConsumerId>,
    last_turn: u64,
    /// The exclusive consumer, or the single active one.
    active: Option<ConsumerId>,
    /// The single active consumer gets no more, because one of a higher priority waits for its place.
    makes_way: bool,
}

impl Consumers {
    pub(in super::super) fn new(sharing: Sharing) -> Consumers {
        Consumers { sharing, all: BTreeMap::new(), line: BTreeMap::new(), last_turn: 0, active: None, makes_way: false }
    }

    pub(in super::super) fn len(&self) -> usize {
        self.all.len()
    }

    pub(in super::super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Highest priority first, then who came first.
    pub(in super::super) fn iter(&self) -> impl Iterator<Item = ConsumerId> {
        self.all.keys().map(|&(_, consumer)| consumer)
    }

    /// Whether nobody but the single active consumer gets messages.
    pub(in super::super) fn is_single(&self) -> bool {
        self.sharing != Sharing::InTurn
    }

    /// Whether there is an exclusive consumer, or a single active one.
    pub(in super::super) fn has_active(&self) -> bool {
        self.active.is_some()
    }

    /// This consumer is exclusive.
    pub(in super::super) fn set_exclusive(&mut self, consumer: ConsumerId) {
        self.active = Some(consumer);
    }

    fn rank(&self, consumer: ConsumerId, priority: i64) -> Rank {
        (Reverse(if self.sharing == Sharing::OneByArrival { 0 } else { priority }), consumer)
    }

    /// Adds a consumer, last in turn of its priority.
    pub(in super::super) fn add(&mut self, consumer: ConsumerId, priority: i64) {
        self.all.insert(self.rank(consumer, priority), None);
        if self.is_single() {
            self.active.get_or_insert(consumer);
        }
        self.line_up(consumer, priority);
    }

    /// Takes a consumer away. Of a single active one the next takes the place.
    pub(in super::super) fn remove(&mut self, consumer: ConsumerId, priority: i64) {
        let rank = self.rank(consumer, priority);
        if let Some(Some(turn)) = self.all.remove(&rank) {
            self.line.remove(&(rank.0, turn));
        }
        if self.active == Some(consumer) {
            self.active = if self.is_single() { self.iter().next() } else { None };
            self.makes_way = false;
        }
    }

    /// Lets a consumer of a higher priority have the place of the single active one, if that has nothing unsettled; otherwise it
    /// gets no more until then. True if the place has changed hands.
    pub(in super::super) fn change_places(&mut self, unsettled: impl Fn(ConsumerId) -> usize) -> bool {
        let (Some(active), Some((&(highest, best), _))) = (self.active, self.all.first_key_value()) else {
            return false;
        };
        if self.sharing != Sharing::OneMakesWay {
            return false;
        }
        self.makes_way |= !self.all.contains_key(&(highest, active));
        if !self.makes_way || unsettled(active) > 0 {
            return false;
        }
        self.active = Some(best);
        self.makes_way = false;
        true
    }

    /// Lets a consumer stand in line again, at the end.
    pub(in super::super) fn line_up(&mut self, consumer: ConsumerId, priority: i64) {
        let rank = self.rank(consumer, priority);
        if self.is_single() {
            return;
        }
        if let Some(turn @ None) = self.all.get_mut(&rank) {
            self.last_turn += 1;
            *turn = Some(self.last_turn);
            self.line.insert((rank.0, self.last_turn), consumer);
        }
    }

    /// The consumer whose turn it is, of those of whom `can_take` says so. It goes to the end of its line; those in front of it
    /// that could take nothing are handed to `passed_over` and leave the line.
    pub(in super::super) fn next(
        &mut self,
        mut can_take: impl FnMut(ConsumerId) -> bool,
        mut passed_over: impl FnMut(ConsumerId),
    ) -> Option<ConsumerId> {
        if self.is_single() {
            let active = self.active.filter(|_| !self.makes_way)?;
            if can_take(active) {
                return Some(active);
            }
            passed_over(active);
            return None;
        }
        loop {
            let (&(priority, turn), &consumer) = self.line.first_key_value()?;
            let can_take = can_take(consumer);
            // Alone, it is first and last in line.
            if can_take && self.line.len() == 1 {
                return Some(consumer);
            }
            self.line.remove(&(priority, turn));
            self.all.insert((priority, consumer), None);
            if can_take {
                self.line_up(consumer, priority.0);
                return Some(consumer);
            }
            passed_over(consumer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three(sharing: Sharing) -> Consumers {
        let mut consumers = Consumers::new(sharing);
        for (consumer, priority) in [(1, 0), (2, 0), (3, 5)] {
            consumers.add(ConsumerId(consumer), priority);
        }
        consumers
    }

    fn next(consumers: &mut Consumers, full: &[u64]) -> Option<u64> {
        consumers.next(|consumer| !full.contains(&consumer.0), |_| {}).map(|consumer| consumer.0)
    }

    #[test]
    fn in_turn_among_those_of_the_highest_priority_with_room() {
        let mut three = three(Sharing::InTurn);
        assert_eq!([next(&mut three, &[]), next(&mut three, &[])], [Some(3), Some(3)]);
        assert_eq!([next(&mut three, &[3]), next(&mut three, &[]), next(&mut three, &[])], [Some(1), Some(2), Some(1)]);
        three.line_up(ConsumerId(3), 5);
        assert_eq!(next(&mut three, &[]), Some(3));
        assert_eq!(next(&mut three, &[1, 2, 3]), None);
    }

    #[test]
    fn who_has_gone_stands_in_no_line() {
        let mut three = three(Sharing::InTurn);
        three.remove(ConsumerId(3), 5);
        three.remove(ConsumerId(1), 0);
        assert_eq!([next(&mut three, &[]), next(&mut three, &[])], [Some(2), Some(2)]);
        three.line_up(ConsumerId(1), 0);
        three.line_up(ConsumerId(2), 0);
        three.remove(ConsumerId(2), 0);
        assert_eq!(next(&mut three, &[]), None);
        assert!(three.is_empty() && three.line.is_empty());
    }

    #[test]
    fn a_single_active_consumer_is_followed_by_the_next() {
        for (sharing, second, third) in
            [(Sharing::OneByPriority, 3, 2), (Sharing::OneByArrival, 2, 3), (Sharing::OneMakesWay, 3, 2)]
        {
            let mut three = three(sharing);
            assert_eq!([next(&mut three, &[]), next(&mut three, &[])], [Some(1), Some(1)]);
            assert_eq!(next(&mut three, &[1]), None, "the others wait even so");
            three.remove(ConsumerId(1), 0);
            assert_eq!(next(&mut three, &[]), Some(second));
            three.remove(ConsumerId(second), if second == 3 { 5 } else { 0 });
            assert_eq!(next(&mut three, &[]), Some(third));
            three.remove(ConsumerId(third), if third == 3 { 5 } else { 0 });
            assert!(!three.has_active());
        }
    }

    #[test]
    fn a_single_active_consumer_makes_way_when_it_has_nothing_unsettled() {
        let mut three = three(Sharing::OneMakesWay);
        assert!(!three.change_places(|_| 1));
        assert_eq!(next(&mut three, &[]), None, "it gets no more");
        assert!(three.change_places(|_| 0) && !three.change_places(|_| 0));
        assert_eq!(next(&mut three, &[]), Some(3));
        for sharing in [Sharing::InTurn, Sharing::OneByPriority, Sharing::OneByArrival] {
            assert!(!self::three(sharing).change_places(|_| 0));
        }
    }
}
