//! How an app ends: in order, and within the time that it has.

use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{App, Inner};
use crate::connection::CLOSE_TIMEOUT;
use crate::deadline;
use crate::error::{Error, Result, counted};
use crate::fork::Kept;

/// What is left if a handler of events has not returned in time.
const UNTOLD: &str = "events that the handlers of on_event have not been told";

impl App {
    /// Ends in order: listeners take no more messages, finish what they have in hand, settle it and close; the pools lend
    /// no more; guards that are out, with their callbacks, are waited for; connections are closed; the handlers of
    /// [`on_event`](App::on_event) are told of all that.
    ///
    /// Dropping the last clone of the app does the same, within `[app] shutdown_timeout`, but for the guards, which it does not
    /// wait for. After a shutdown it waits for nothing once more.
    ///
    /// A handler of the app's own listeners may call it. That listener ends once the handler has returned, and is not waited
    /// for. To have [`run`](App::run) return, call [`ShutdownHandle::shutdown`](super::ShutdownHandle::shutdown).
    ///
    /// # Errors
    ///
    /// [`Error::NotEnded`] with all that had not ended after `timeout`. It ends by itself as soon as it can.
    pub fn shutdown(&self, timeout: Duration) -> Result<()> {
        Kept::maker(&self.inner).check()?;
        let deadline = deadline::after(timeout);
        *self.inner.shut_down_by() = Some(deadline);
        let mut left = match self.inner.listeners.stop_all_but(&[], timeout) {
            Err(Error::NotEnded { left, .. }) => left,
            _ => Vec::new(),
        };
        left.extend(self.inner.end_companions(deadline));
        let close_by = deadline.min(Instant::now() + CLOSE_TIMEOUT);
        self.inner.pools().for_each(|pool| pool.close_by(close_by));
        let own_pool = self.inner.listeners.own_pool();
        for pool in self.inner.pools() {
            // A handler has the connection of its listener.
            let own = own_pool.as_deref().is_some_and(|own| own == pool.name());
            let out = pool.wait_for_guards(deadline, u32::from(own));
            if out > 0 {
                let (are, connections) = (if out == 1 { "is" } else { "are" }, counted(out as usize, "connection"));
                left.push(format!("{connections} of pool {:?} {are} still out", pool.name()));
            }
        }
        if !self.inner.events.close(deadline) {
            left.push(UNTOLD.to_owned());
        }
        if left.is_empty() { Ok(()) } else { Err(Error::NotEnded { left, after: timeout }) }
    }
}

impl Inner {
    fn shut_down_by(&self) -> MutexGuard<'_, Option<Instant>> {
        self.shut_down_by.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let told = self.shut_down_by().take();
        let timeout = match told {
            Some(deadline) => deadline.saturating_duration_since(Instant::now()),
            None => self.settings.shutdown_timeout,
        };
        let end_by = deadline::after(timeout);
        // What a shutdown has waited for in vain, it has told.
        if let Err(not_ended) = self.listeners.stop_all_but(&[], timeout)
            && told.is_none()
        {
            log::error!("{not_ended}");
        }
        let left = self.end_companions(end_by);
        if !left.is_empty() && told.is_none() {
            log::error!("not ended by the end of the app: {}", left.join("; "));
        }
        let deadline = Instant::now() + CLOSE_TIMEOUT;
        self.pools().for_each(|pool| pool.close_by(deadline));
        if !self.events.close(told.unwrap_or(deadline.max(end_by))) && told.is_none() {
            log::error!("not ended by the end of the app: {UNTOLD}");
        }
    }
}
