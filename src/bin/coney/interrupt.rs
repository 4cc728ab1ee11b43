//! Ctrl-C: the first one is a request that commands heed where they can end in order, the second one ends at once.

use std::thread;

use crossbeam_channel::{Receiver, bounded};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::exit::{Failure, Result};

/// What a shell says of a program that SIGINT has ended.
const INTERRUPTED: i32 = 130;

/// Gets one message when the program is asked to end.
pub fn watch() -> Result<Receiver<()>> {
    let cannot = |error| Failure::failed(format!("cannot watch signals: {error}"));
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(cannot)?;
    let (asked, asks) = bounded(1);
    let wait = move || {
        for (before, _) in signals.forever().enumerate() {
            if before > 0 {
                std::process::exit(INTERRUPTED);
            }
            // Nobody listens: it is ending already.
            let _ = asked.try_send(());
        }
    };
    // It ends with the process.
    thread::Builder::new().name("coney-interrupt".to_owned()).spawn(wait).map_err(cannot)?;
    Ok(asks)
}
