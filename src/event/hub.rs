//! Takes events from whoever has them to the handlers that a program has put there, on a thread of its own.
//!
//! Nobody who has an event waits for a handler: what the handlers have no time for is counted and left out. While there are no
//! handlers there is no thread, and an event costs one atomic load.
//!
//! Lock order: the one lock is a leaf. No handler is run and none is dropped under it, for a handler may hold an app.

use std::cell::Cell;
use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

use super::Event;
use crate::error::{Error, Result, panic_text};
use crate::fork::Maker;

/// How many events wait for the handlers at most.
const MOST_WAITING: usize = 1024;

type Handler = dyn Fn(&Event) + Send + Sync;

/// The events of an app, or of a pool of its own. Cheap to clone; all clones are the same.
#[derive(Clone)]
pub(crate) struct Events(Arc<Hub>);

struct Hub {
    maker: Maker,
    /// Whether there are handlers, so that an event costs next to nothing where there are none.
    is_heard: AtomicBool,
    state: Mutex<State>,
    /// An event has come, or no more events are taken.
    come: Condvar,
    /// The thread has told all and let go of the handlers.
    done: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Event>,
    /// How many were left out behind those that wait.
    missed: u64,
    handlers: Arc<[Arc<Handler>]>,
    thread: Option<JoinHandle<()>>,
    is_closed: bool,
    is_done: bool,
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").field("is_heard", &self.is_heard()).finish_non_exhaustive()
    }
}

impl Default for Events {
    fn default() -> Events {
        Events(Arc::new(Hub {
            maker: Maker::this(),
            is_heard: AtomicBool::new(false),
            state: Mutex::default(),
            come: Condvar::new(),
            done: Condvar::new(),
        }))
    }
}

impl Hub {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

thread_local! {
    /// The address of the hub whose handlers this thread runs; 0 on any other thread.
    static OWN: Cell<usize> = const { Cell::new(0) };
}

impl State {
    /// Puts an event behind those that wait, if there is room.
    fn add(&mut self, event: Event) {
        if self.waiting.len() >= MOST_WAITING {
            self.missed += 1;
            return;
        }
        if let Some(missed) = self.take_missed() {
            self.waiting.push_back(missed);
        }
        self.waiting.push_back(event);
    }

    fn take_missed(&mut self) -> Option<Event> {
        let count = std::mem::take(&mut self.missed);
        (count > 0).then_some(Event::Missed { count })
    }

    /// The event that is told next. Behind the last one comes how many were left out, if any were.
    fn next(&mut self) -> Option<Event> {
        self.waiting.pop_front().or_else(|| self.take_missed())
    }
}

impl Events {
    /// Whether anybody wants to know. Costs one atomic load.
    #[inline]
    pub(crate) fn is_heard(&self) -> bool {
        self.0.is_heard.load(Ordering::Acquire)
    }

    /// Whether the calling thread is the one that runs the handlers.
    pub(super) fn is_own_thread(&self) -> bool {
        // In a destructor of another thread-local the note may be gone. Then no handler is running.
        OWN.try_with(Cell::get).is_ok_and(|own| own == Arc::as_ptr(&self.0).addr())
    }

    /// Writes the event's line in the log, and hands it to the handlers. Waits for nothing.
    pub(super) fn emit(&self, event: Event) {
        event.log();
        self.hand_on(event);
    }

    fn hand_on(&self, event: Event) {
        // In a child there is no thread to tell it, and whoever had the lock may never give it back.
        if !self.is_heard() || self.0.maker.is_parent() {
            return;
        }
        let mut state = self.0.state();
        if !state.is_closed {
            state.add(event);
            self.0.come.notify_one();
        }
    }

    /// Adds a handler behind those there are, and starts the thread with the first.
    pub(crate) fn add(&self, handler: impl Fn(&Event) + Send + Sync + 'static) -> Result<()> {
        self.0.maker.check()?;
        let mut state = self.0.state();
        if state.is_closed {
            drop(state);
            // It may hold an app.
            drop(handler);
            return Ok(());
        }
        if state.thread.is_none() {
            let (name, hub) = ("coney-events".to_owned(), Arc::clone(&self.0));
            let thread = Builder::new().name(name.clone()).spawn(move || tell_all(&hub));
            state.thread = Some(thread.map_err(|source| Error::Thread { name, source: Arc::new(source) })?);
        }
        state.handlers = state.handlers.iter().cloned().chain([Arc::new(handler) as Arc<Handler>]).collect();
        self.0.is_heard.store(true, Ordering::Release);
        Ok(())
    }

    /// Takes no more events, and waits until the handlers have been told of those there are and have been let go of. A handler
    /// does not wait for itself. Returns whether all is done; what is not by `deadline` is done as soon as it can be.
    pub(crate) fn close(&self, deadline: Instant) -> bool {
        if self.0.maker.is_parent() {
            return true;
        }
        let mut state = self.0.state();
        state.is_closed = true;
        self.0.is_heard.store(false, Ordering::Release);
        self.0.come.notify_one();
        if state.thread.is_none() || self.is_own_thread() {
            return true;
        }
        while !state.is_done {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.0.done.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        let thread = state.thread.take();
        drop(state);
        if let Some(thread) = thread {
            // It runs nothing any more.
            let _ = thread.join();
        }
        true
    }
}

/// Tells the handlers of one event after another, until nothing more is to be told.
fn tell_all(hub: &Hub) {
    OWN.set(std::ptr::from_ref(hub).addr());
    let _done = Done(hub);
    let mut state = hub.state();
    loop {
        if let Some(event) = state.next() {
            let handlers = Arc::clone(&state.handlers);
            drop(state);
            if let Event::Missed { .. } = event {
                event.log();
            }
            for handler in handlers.iter() {
                caught(|| handler(&event), || format!("told: {event}"));
            }
            drop(handlers);
            state = hub.state();
        } else if state.is_closed {
            break;
        } else {
            state = hub.come.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
    let handlers = std::mem::take(&mut state.handlers);
    drop(state);
    // One of them may hold the last clone of an app, which then ends here.
    caught(|| drop(handlers), || "when it was dropped".to_owned());
}

/// Says that the thread is done, however it ends.
struct Done<'a>(&'a Hub);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.state().is_done = true;
        self.0.done.notify_all();
    }
}

/// Runs something of the program's. A panic in it is logged, with where it was.
fn caught(step: impl FnOnce(), at: impl FnOnce() -> String) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(step)) {
        log::error!("a handler of events panicked: {}; it was {}", panic_text(&*panic), at());
        // What was thrown may panic in its turn.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(panic)));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{self, Receiver, Sender};
    use std::time::Duration;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn soon() -> Instant {
        Instant::now() + PATIENCE
    }

    fn event(number: usize) -> Event {
        Event::ConnectionClosed { pool: "test".to_owned(), connection: number.to_string() }
    }

    /// Which event it was, or how many were missed.
    fn told(event: &Event) -> String {
        match event {
            Event::ConnectionClosed { connection, .. } => connection.clone(),
            Event::Missed { count } => format!("{count} missed"),
            other => panic!("unexpected: {other:?}"),
        }
    }

    /// Has a handler put down what it is told.
    fn written_down(events: &Events) -> Receiver<String> {
        let (tell, seen) = mpsc::channel();
        events.add(move |event| tell.send(told(event)).unwrap()).unwrap();
        seen
    }

    /// Has a handler wait, in its first event, until the sender is dropped. Returns once it does.
    fn stuck(events: &Events) -> Sender<()> {
        let (free, wait) = mpsc::channel::<()>();
        let (reached, is_stuck) = mpsc::channel();
        let wait = Mutex::new(wait);
        events
            .add(move |_| {
                // Nobody waits for it any more after the first time.
                let _ = reached.send(());
                let _ = wait.lock().unwrap().recv();
            })
            .unwrap();
        events.emit(event(0));
        is_stuck.recv_timeout(PATIENCE).unwrap();
        free
    }

    #[test]
    fn handlers_are_told_everything_in_order_one_after_the_other() {
        let events = Events::default();
        events.emit(event(0)); // nobody wants to know
        let (tell, seen) = mpsc::channel();
        for name in ["first", "second"] {
            let tell = tell.clone();
            events.add(move |event| tell.send(format!("{name} {}", told(event))).unwrap()).unwrap();
        }
        drop(tell);
        (1..=100).for_each(|number| events.emit(event(number)));
        assert!(events.close(soon()));
        let expected: Vec<String> =
            (1..=100).flat_map(|number| [format!("first {number}"), format!("second {number}")]).collect();
        // It ends because the handlers have been dropped.
        assert_eq!(seen.iter().collect::<Vec<_>>(), expected);
        events.emit(event(101));
        assert!(events.close(soon()), "twice is once");
    }

    #[test]
    fn what_there_is_no_room_for_is_counted_where_it_is_missing() {
        let events = Events::default();
        let free = stuck(&events);
        let seen = written_down(&events);
        let began = Instant::now();
        (1..=MOST_WAITING + 5).for_each(|number| events.emit(event(number)));
        assert!(began.elapsed() < PATIENCE, "nobody waits for the handler");
        drop(free);
        // The handler that was added last is told of the event in hand only if it came before it was taken.
        let mut next = seen.recv_timeout(PATIENCE).unwrap();
        if next == "0" {
            next = seen.recv_timeout(PATIENCE).unwrap();
        }
        assert_eq!(next, "1");
        for number in 2..=MOST_WAITING {
            assert_eq!(seen.recv_timeout(PATIENCE).unwrap(), number.to_string());
        }
        assert_eq!(seen.recv_timeout(PATIENCE).unwrap(), "5 missed", "also though nothing comes after it");
        events.emit(event(7));
        assert_eq!(seen.recv_timeout(PATIENCE).unwrap(), "7");
        assert!(events.close(soon()));
    }

    #[test]
    fn the_next_event_that_gets_through_comes_after_those_that_are_missing() {
        let mut state = State::default();
        (0..MOST_WAITING + 3).for_each(|number| state.add(event(number)));
        assert_eq!(told(&state.next().unwrap()), "0");
        state.add(event(9999));
        let rest: Vec<String> = std::iter::from_fn(|| state.next()).map(|event| told(&event)).collect();
        assert_eq!(rest.len(), MOST_WAITING + 1);
        assert_eq!(rest[MOST_WAITING - 1..], ["3 missed", "9999"]);
    }

    #[test]
    fn a_panic_costs_one_call_of_one_handler() {
        let events = Events::default();
        events
            .add(|event| {
                let told = told(event);
                assert!(told != "1", "this panic is part of the test");
            })
            .unwrap();
        let seen = written_down(&events);
        (0..3).for_each(|number| events.emit(event(number)));
        assert!(events.close(soon()));
        assert_eq!(seen.iter().collect::<Vec<_>>(), ["0", "1", "2"]);
    }

    #[test]
    fn a_close_that_waits_in_vain_says_so_and_all_is_told_later() {
        let events = Events::default();
        let seen = written_down(&events);
        let free = stuck(&events);
        events.emit(event(1));
        assert!(!events.close(Instant::now() + Duration::from_millis(20)));
        events.emit(event(2)); // too late
        drop(free);
        assert!(events.close(soon()));
        assert_eq!(seen.iter().collect::<Vec<_>>(), ["0", "1"]);
    }

    #[test]
    fn a_handler_may_close_and_emit_and_its_destructor_may_panic() {
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                panic!("this panic is part of the test");
            }
        }
        let events = Events::default();
        let (own, bomb) = (events.clone(), Bomb);
        events
            .add(move |told| {
                let _ = &bomb;
                own.emit(told.clone());
                assert!(own.is_own_thread() && own.close(soon()), "it does not wait for itself");
            })
            .unwrap();
        assert!(!events.is_own_thread());
        let seen = written_down(&events);
        events.emit(event(1));
        // The handlers are let go of, and with them what the receiver hears from.
        let all: Vec<String> = seen.iter().collect();
        assert_eq!(all, ["1", "1"]);
        assert!(events.close(soon()));
    }
}
