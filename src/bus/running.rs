//! A bus on a thread of its own.

use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use crossbeam_channel::{Receiver, TryRecvError, bounded};

use super::{Bus, CLOSE_TIMEOUT, StopHandle};
use crate::deadline;
use crate::error::{Error, Result};
use crate::fork::Maker;

/// A bus that processes events on a thread of its own. Dropping it stops and closes it.
#[derive(Debug)]
pub struct RunningBus {
    stop: StopHandle,
    /// Nothing is sent; its end is the sign that the thread is done.
    done: Receiver<()>,
    thread: Option<JoinHandle<Bus>>,
    maker: Maker,
}

impl RunningBus {
    pub(super) fn start(mut bus: Bus) -> Result<RunningBus> {
        let stop = bus.stop_handle();
        let (alive, done) = bounded::<()>(0);
        let name = "coney-bus".to_owned();
        let thread = Builder::new()
            .name(name.clone())
            .spawn(move || {
                let _alive = alive;
                // Its one error is that there is no consumer.
                let _ = bus.process(None, Bus::handle_and_catch);
                bus
            })
            .map_err(|source| Error::Thread { name, source: Arc::new(source) })?;
        Ok(RunningBus { stop, done, thread: Some(thread), maker: Maker::this() })
    }

    /// A handle that stops it.
    pub fn stop_handle(&self) -> StopHandle {
        self.stop.clone()
    }

    /// Stops the processing, once the callback in hand returns, and gives the bus back.
    ///
    /// # Errors
    ///
    /// [`Error::NotEnded`] if the callback has not returned after 10 s. The bus then closes when it does.
    pub fn stop(mut self) -> Result<Bus> {
        self.stop.stop();
        self.end(CLOSE_TIMEOUT)
    }

    /// Waits until somebody uses the [`stop_handle`](RunningBus::stop_handle), and gives the bus back.
    ///
    /// # Errors
    ///
    /// [`Error::NotEnded`] if its thread has panicked.
    pub fn join(mut self) -> Result<Bus> {
        self.end(Duration::MAX)
    }

    fn end(&mut self, timeout: Duration) -> Result<Bus> {
        let _ = self.done.recv_deadline(deadline::after(timeout));
        let is_done = self.done.try_recv() == Err(TryRecvError::Disconnected);
        let thread = self.thread.take().filter(|_| is_done);
        let bus = thread.and_then(|thread| thread.join().ok());
        let left = || vec!["a callback of the bus".to_owned()];
        let bus = bus.ok_or_else(|| Error::NotEnded { left: left(), after: timeout })?;
        // Told twice is told once: what is left of it is not for the next to begin.
        let _ = bus.stopped.try_recv();
        Ok(bus)
    }
}

impl Drop for RunningBus {
    fn drop(&mut self) {
        if self.thread.is_some() && !self.maker.is_parent() {
            self.stop.stop();
            if let Err(error) = self.end(CLOSE_TIMEOUT) {
                log::error!("{error}");
            }
        }
    }
}
