//! The line of those who publish through a pool and find no connection free.
//!
//! One of them, the *first*, waits for a connection. When it has one it takes the messages of all who wait along, so that
//! the wait for the broker's word is shared, and the next in the line is first. The others wait to be told.
//!
//! Only the first takes seats, so its own is there until it does. Pure bookkeeping, no I/O and no threads. Lock order: the
//! lock is a leaf; under it somebody is woken at most.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::connection::confirms::Route;
use crate::connection::publisher::Attempt;
use crate::message::Message;
use crate::meter::Level;

/// How many seats are taken at once: one that is slow to be confirmed keeps no more than that waiting.
const MOST: usize = 64;

/// A message and where it goes.
#[derive(Clone)]
pub(super) struct Parcel {
    pub(super) route: Route,
    pub(super) message: Arc<Message>,
    pub(super) deadline: Instant,
}

/// What somebody in the line is told.
pub(super) enum Word {
    /// It is the first now.
    First,
    /// What became of its message; in company if it was not published alone.
    Done { attempt: Attempt, in_company: bool },
}

/// A place in the line.
pub(super) struct Seat {
    number: u64,
    pub(super) parcel: Parcel,
    word: Sender<Word>,
    /// Behind the first, which is counted where it waits for a connection.
    _waits: Option<Level>,
}

impl Seat {
    pub(super) fn tell(&self, attempt: Attempt, in_company: bool) {
        // Who has stopped waiting need not be told.
        let _ = self.word.try_send(Word::Done { attempt, in_company });
    }
}

/// See the [module](self).
#[derive(Default)]
pub(super) struct Line(Mutex<State>);

#[derive(Default)]
struct State {
    seats: VecDeque<Seat>,
    /// The number of the seat that is first.
    first: Option<u64>,
    next: u64,
}

impl State {
    fn pass_on(&mut self) {
        self.first = self.seats.front_mut().map(|seat| {
            seat._waits = None;
            // There is room for both words that there are.
            let _ = seat.word.try_send(Word::First);
            seat.number
        });
    }
}

impl Line {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nobody waits.
    pub(super) fn is_empty(&self) -> bool {
        self.state().seats.is_empty()
    }

    /// How many wait behind the first.
    pub(super) fn behind_first(&self) -> usize {
        self.state().seats.len().saturating_sub(1)
    }

    /// Takes a seat; `waits` lives for as long as it waits behind the first. Returns its number, and where its words come
    /// in: that it is first, if it is, is there already.
    pub(super) fn join(&self, parcel: Parcel, waits: Level) -> (u64, Receiver<Word>) {
        let (word, words) = bounded(2);
        let mut state = self.state();
        let number = state.next;
        state.next += 1;
        state.seats.push_back(Seat { number, parcel, word, _waits: Some(waits) });
        if state.first.is_none() {
            state.pass_on();
        }
        (number, words)
    }

    /// Gives a seat up, and with it being the first; false if the first has taken it.
    pub(super) fn leave(&self, number: u64) -> bool {
        let mut state = self.state();
        let before = state.seats.len();
        state.seats.retain(|seat| seat.number != number);
        if state.first == Some(number) {
            state.pass_on();
        }
        state.seats.len() < before
    }

    /// Takes seats from the head of the line, for the first, which is first no longer. Those whose deadline is before `soon`
    /// stay.
    pub(super) fn take(&self, soon: Instant) -> Vec<Seat> {
        let mut state = self.state();
        let mut taken = Vec::new();
        for seat in std::mem::take(&mut state.seats) {
            if taken.len() < MOST && seat.parcel.deadline >= soon {
                taken.push(Seat { _waits: None, ..seat });
            } else {
                state.seats.push_back(seat);
            }
        }
        state.pass_on();
        taken
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::meter::PoolMeter;

    fn parcel() -> Parcel {
        let message = Arc::new(Message::new("x"));
        Parcel { route: Route::new("", "k"), message, deadline: Instant::now() + Duration::from_secs(60) }
    }

    fn join(line: &Line, parcel: Parcel) -> (u64, Receiver<Word>) {
        line.join(parcel, PoolMeter::new("test", 1).waiting.one())
    }

    fn is_first(words: &Receiver<Word>) -> bool {
        matches!(words.try_recv(), Ok(Word::First))
    }

    #[test]
    fn the_first_takes_all_and_who_comes_after_that_is_first() {
        let line = Line::default();
        let (_, first) = join(&line, parcel());
        let (_, second) = join(&line, parcel());
        assert!(is_first(&first) && !is_first(&second) && !line.is_empty());
        let taken = line.take(Instant::now());
        assert!(taken.len() == 2 && line.is_empty());
        let (number, third) = join(&line, parcel());
        assert!(is_first(&third));
        assert!(line.leave(number) && line.is_empty());
        taken[1].tell(Attempt { outcome: Ok(()), written: true }, true);
        assert!(matches!(second.try_recv(), Ok(Word::Done { in_company: true, .. })));
        drop(taken);
        // Nobody is left who could tell the other: it learns so.
        assert!(first.recv().is_err());
    }

    #[test]
    fn who_leaves_passes_on_being_first_and_who_was_taken_cannot_leave() {
        let line = Line::default();
        let seats: Vec<_> = (0..3).map(|_| join(&line, parcel())).collect();
        assert!(is_first(&seats[0].1));
        assert!(line.leave(seats[1].0) && !is_first(&seats[2].1), "one that is not first leaves");
        assert!(line.leave(seats[0].0) && is_first(&seats[2].1));
        let taken = line.take(Instant::now());
        assert!(taken.len() == 1 && !line.leave(seats[2].0));
    }

    #[test]
    fn a_long_line_is_taken_in_parts_in_the_order_of_coming() {
        let line = Line::default();
        let seats: Vec<_> = (0..=MOST).map(|_| join(&line, parcel())).collect();
        assert!(is_first(&seats[0].1));
        let taken: Vec<u64> = line.take(Instant::now()).iter().map(|seat| seat.number).collect();
        assert_eq!(taken, (0..MOST as u64).collect::<Vec<_>>());
        assert!(is_first(&seats[MOST].1), "the one that is left is first");
        assert_eq!(line.take(Instant::now()).len(), 1);
    }

    #[test]
    fn whose_time_is_over_is_left_and_does_not_keep_the_others() {
        let line = Line::default();
        let seats = [
            join(&line, parcel()),
            join(&line, Parcel { deadline: Instant::now(), ..parcel() }),
            join(&line, parcel()),
        ];
        let taken: Vec<u64> =
            line.take(Instant::now() + Duration::from_secs(1)).iter().map(|seat| seat.number).collect();
        assert_eq!(taken, [seats[0].0, seats[2].0]);
        assert!(is_first(&seats[1].1) && line.behind_first() == 0);
        assert!(line.leave(seats[1].0) && line.is_empty());
    }
}
