//! Callbacks that are run exactly once, and waiting until they have been.

use std::cell::Cell;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::error::{Error, Result, panic_text};

/// Counts what has been promised and not yet done.
#[derive(Debug, Default)]
pub(crate) struct Outstanding {
    counts: Mutex<Counts>,
    done: Condvar,
}

#[derive(Debug, Default)]
struct Counts {
    outstanding: usize,
    /// Threads that wait, and the most that is few enough for one of them. A wake-up costs a system call, also one of
    /// nobody, and far more if it was for nothing.
    waiting: usize,
    enough: usize,
}

impl Outstanding {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more, until the ticket is dropped.
    fn ticket(self: &Arc<Self>) -> Ticket {
        self.counts().outstanding += 1;
        Ticket(Arc::clone(self))
    }

    /// Whether the calling thread is in one of these callbacks. It runs the others too, and cannot wait for them.
    pub(crate) fn is_in_callback(&self) -> bool {
        // In a destructor of another thread-local the note may be gone.
        IN_CALLBACK_OF.try_with(Cell::get).is_ok_and(|of| of == self.address())
    }

    fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// Waits until nothing is outstanding; returns how many are, if that does not come about by `deadline`.
    pub(crate) fn wait(&self, deadline: Instant) -> Result<(), usize> {
        self.wait_for(deadline, 0)
    }

    /// Waits until at most `enough` are outstanding; returns how many are, if that does not come about by `deadline`.
    pub(crate) fn wait_for(&self, deadline: Instant, enough: usize) -> Result<(), usize> {
        let mut counts = self.counts();
        while counts.outstanding > enough {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(counts.outstanding);
            }
            counts.waiting += 1;
            counts.enough = counts.enough.max(enough);
            counts = self.done.wait_timeout(counts, left).unwrap_or_else(PoisonError::into_inner).0;
            counts.waiting -= 1;
            if counts.waiting == 0 {
                counts.enough = 0;
            }
        }
        Ok(())
    }
}

thread_local! {
    /// Where the callback counts that this thread is in; 0 if it is in none.
    static IN_CALLBACK_OF: Cell<usize> = const { Cell::new(0) };
}

/// Notes whose callback this thread is in, and gives back what was noted before.
fn note(of: usize) -> usize {
    IN_CALLBACK_OF.try_with(|noted| noted.replace(of)).unwrap_or_default()
}

#[derive(Debug)]
struct Ticket(Arc<Outstanding>);

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut counts = self.0.counts();
        counts.outstanding -= 1;
        let wake = counts.waiting > 0 && counts.outstanding <= counts.enough;
        drop(counts);
        if wake {
            self.0.done.notify_all();
        }
    }
}

/// A user's callback. It is run exactly once: by [`run`](Callback::run), or with an error if it is dropped before.
pub(crate) struct Callback<T = ()> {
    function: Option<Box<dyn FnOnce(Result<T>) + Send>>,
    /// Says in the log which callback it was that panicked.
    what: &'static str,
    _ticket: Ticket,
}

impl<T> fmt::Debug for Callback<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Callback").field("what", &self.what).finish_non_exhaustive()
    }
}

impl<T> Callback<T> {
    pub(crate) fn new(
        what: &'static str,
        outstanding: &Arc<Outstanding>,
        function: impl FnOnce(Result<T>) + Send + 'static,
    ) -> Callback<T> {
        Callback { function: Some(Box::new(function)), what, _ticket: outstanding.ticket() }
    }

    /// Runs it. A panic in it is caught and logged. Never call this with a lock held.
    pub(crate) fn run(mut self, result: Result<T>) {
        self.run_once(result);
    }

    fn run_once(&mut self, result: Result<T>) {
        let Some(function) = self.function.take() else { return };
        let before = note(self._ticket.0.address());
        let ended = catch_unwind(AssertUnwindSafe(|| function(result)));
        note(before);
        if let Err(panic) = ended {
            log::error!("the callback of {} panicked: {}", self.what, panic_text(&*panic));
            // What was thrown may throw again when it is dropped.
            let _ = catch_unwind(AssertUnwindSafe(|| drop(panic)));
        }
    }
}

impl<T> Drop for Callback<T> {
    fn drop(&mut self) {
        if self.function.is_some() {
            let during = self.what.to_owned();
            let detail = "its connection was given up".to_owned();
            self.run_once(Err(Error::ConnectionLost { during, detail }));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_dropped_callback_is_run_with_an_error_and_a_run_one_is_not_run_again() {
        let outstanding = Arc::new(Outstanding::default());
        let runs = Arc::new(AtomicUsize::new(0));
        for dropped in [true, false] {
            let callback = Callback::new("test", &outstanding, {
                let runs = Arc::clone(&runs);
                move |result: Result<()>| {
                    assert_eq!(result.is_err(), dropped);
                    runs.fetch_add(1, Ordering::Relaxed);
                }
            });
            assert_eq!(outstanding.wait(Instant::now()), Err(1));
            if dropped {
                drop(callback)
            } else {
                callback.run(Ok(()))
            }
            assert_eq!(outstanding.wait(Instant::now() + Duration::from_secs(10)), Ok(()));
        }
        assert_eq!(runs.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn a_panic_in_a_callback_is_caught_and_counts_as_done() {
        let outstanding = Arc::new(Outstanding::default());
        Callback::new("test", &outstanding, |_: Result<()>| panic!("no")).run(Ok(()));
        assert_eq!(outstanding.wait(Instant::now()), Ok(()));
    }
}
