//! That an app runs, and how it is made to stop.

use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::Sender;

use crate::error::{Error, Result};

/// One `run` of an app, until it is dropped.
pub(super) struct Running<'a>(&'a AtomicBool);

impl<'a> Running<'a> {
    pub(super) fn begin(is_running: &'a AtomicBool) -> Result<Running<'a>> {
        if is_running.swap(true, Ordering::AcqRel) {
            return Err(Error::invalid("App::run", "this app is running already, expected one run at a time"));
        }
        Ok(Running(is_running))
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Makes [`App::run`](crate::App::run) return. Cheap to clone, and may be called from any thread.
#[derive(Debug, Clone)]
pub struct ShutdownHandle {
    pub(super) shutdown: Sender<()>,
}

impl ShutdownHandle {
    /// Tells the app to shut down. Says so for the next [`App::run`](crate::App::run) if none is running; saying it twice is
    /// saying it once.
    pub fn shutdown(&self) {
        // Full: it has been told already. No receiver: the app is gone.
        let _ = self.shutdown.try_send(());
    }
}
