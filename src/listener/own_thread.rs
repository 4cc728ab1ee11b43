//! Which listener the calling thread works for. A thread that waits for its own listener waits for itself.

use std::cell::Cell;
use std::sync::Arc;

use super::Shared;

thread_local! {
    /// The address of what the clones of the listener share; 0 on a thread of somebody else.
    static OWN: Cell<usize> = const { Cell::new(0) };
}

fn address(listener: &Shared) -> usize {
    std::ptr::from_ref(listener).addr()
}

/// Notes that this thread works for `listener`, until it ends.
pub(super) fn belongs_to(listener: &Shared) {
    OWN.set(address(listener));
}

/// Whether this thread works for `listener`.
pub(super) fn is_of(listener: &Shared) -> bool {
    // In a destructor of another thread-local the note may be gone. Then it is the end of the thread, and of its handlers.
    OWN.try_with(Cell::get).is_ok_and(|own| own == address(listener))
}

/// The one of these listeners that this thread works for.
pub(super) fn one_of(listeners: &[Arc<Shared>]) -> Option<&Arc<Shared>> {
    listeners.iter().find(|listener| is_of(listener))
}
