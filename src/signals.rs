//! SIGINT and SIGTERM for [`App::run`](crate::App::run): the first one shuts down, the second ends the program.

use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};
use signal_hook::low_level::emulate_default_handler;

use crate::app::ShutdownHandle;
use crate::error::{Error, Result};

/// A thread that watches signals.
pub(crate) struct Watch {
    signals: Handle,
    thread: JoinHandle<()>,
}

pub(crate) fn watch(shutdown: ShutdownHandle) -> Result<Watch> {
    let mut incoming = Signals::new([SIGINT, SIGTERM]).map_err(|source| Error::Signals { source: Arc::new(source) })?;
    let signals = incoming.handle();
    let name = "coney-signals".to_owned();
    let thread = Builder::new()
        .name(name.clone())
        .spawn(move || {
            for (signal, earlier) in incoming.forever().zip(0..) {
                if earlier > 0 {
                    // What the signal does to a program that does not handle it. If it does not, there is no other way.
                    let _ = emulate_default_handler(signal);
                    std::process::abort();
                }
                shutdown.shutdown();
            }
        })
        .map_err(|source| Error::Thread { name, source: Arc::new(source) })?;
    Ok(Watch { signals, thread })
}

impl Watch {
    pub(crate) fn end(self) {
        self.signals.close();
        // It has nothing in it that could panic.
        let _ = self.thread.join();
    }
}
