//! SIGINT and SIGTERM for [`App::run`](crate::App::run): the first one shuts down, the second ends the program.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
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

/// How many watch. Several apps of one process may run.
static WATCHES: Mutex<usize> = Mutex::new(0);

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

/// Who counts among those that watch, until it is dropped.
struct Counted(&'static AtomicBool);

impl Counted {
    fn new() -> Result<Counted> {
        let mut watches = WATCHES.lock().unwrap_or_else(PoisonError::into_inner);
        let by_default = by_default()?;
        *watches += 1;
        by_default.store(false, Ordering::SeqCst);
        Ok(Counted(by_default))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut watches = WATCHES.lock().unwrap_or_else(PoisonError::into_inner);
        *watches -= 1;
        self.0.store(*watches == 0, Ordering::SeqCst);
    }
}

/// A thread that watches signals.
pub(crate) struct Watch {
    signals: Handle,
    thread: Option<JoinHandle<()>>,
    _counted: Counted,
}

pub(crate) fn watch(shutdown: ShutdownHandle) -> Result<Watch> {
    let _counted = Counted::new()?;
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
    Ok(Watch { signals, thread: Some(thread), _counted })
}

/// Also where a hook has panicked, so that the next signal ends the program.
impl Drop for Watch {
    fn drop(&mut self) {
        self.signals.close();
        if let Some(thread) = self.thread.take() {
            // It has nothing in it that could panic.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nothing else of these tests watches signals.
    #[test]
    fn signals_are_their_own_again_when_the_last_one_watches_no_more() {
        let handle = || crate::App::from_settings(crate::Settings::default()).unwrap().shutdown_handle();
        let is_default = || by_default().unwrap().load(Ordering::SeqCst);
        let (first, second) = (watch(handle()).unwrap(), watch(handle()).unwrap());
        assert!(!is_default());
        drop(first);
        assert!(!is_default(), "the second still watches");
        drop(second);
        assert!(is_default());
        let panicked = std::panic::catch_unwind(|| {
            let _watch = watch(handle()).unwrap();
            assert!(!is_default());
            panic!("this panic is part of the test");
        });
        assert!(panicked.is_err() && is_default());
    }
}
