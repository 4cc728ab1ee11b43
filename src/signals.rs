//! SIGINT and SIGTERM for [`App::run`](crate::App::run): the first one shuts down, the second ends the program.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{Builder, JoinHandle};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag::register_conditional_default;
use signal_hook::iterator::{Handle, Signals};
use signal_hook::low_level::emulate_default_handler;

use crate::app::ShutdownHandle;
use crate::error::{Error, Result};

/// Whether signals do what they do to a program that does not handle them. A handler once set is never taken away again, so
/// this is what takes over when nobody watches any more.
static BY_DEFAULT: OnceLock<Arc<AtomicBool>> = OnceLock::new();

fn by_default() -> Result<&'static AtomicBool> {
    if let Some(flag) = BY_DEFAULT.get() {
        return Ok(flag);
    }
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        register_conditional_default(signal, Arc::clone(&flag))
            .map_err(|source| Error::Signals { source: Arc::new(source) })?;
    }
    Ok(BY_DEFAULT.get_or_init(|| flag))
}

/// A thread that watches signals.
pub(crate) struct Watch {
    by_default: &'static AtomicBool,
    signals: Handle,
    thread: JoinHandle<()>,
}

pub(crate) fn watch(shutdown: ShutdownHandle) -> Result<Watch> {
    let by_default = by_default()?;
    by_default.store(false, Ordering::SeqCst);
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
    Ok(Watch { by_default, signals, thread })
}

impl Watch {
    pub(crate) fn end(self) {
        self.by_default.store(true, Ordering::SeqCst);
        self.signals.close();
        // It has nothing in it that could panic.
        let _ = self.thread.join();
    }
}
