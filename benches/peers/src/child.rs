//! One run in a process of its own: started, waited for with a deadline, and what it tells.

use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::measure::{Measure, Result};

/// How long a run may take, connecting and everything.
const LIMIT: Duration = Duration::from_secs(60);

pub fn measure(mut command: Command) -> Result<Measure> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn()?;
    let mut output = child.stdout.take().ok_or("no output")?;
    let (told, telling) = mpsc::channel();
    let reader = thread::spawn(move || {
        let mut text = String::new();
        // Nobody waits any more once the deadline has passed.
        let _ = told.send(output.read_to_string(&mut text).map(|_| text));
    });
    let text = telling.recv_timeout(LIMIT);
    if text.is_err() {
        child.kill()?;
    }
    let status = child.wait()?;
    reader.join().map_err(|_| "the reader panicked")?;
    let text = text.map_err(|_| format!("killed after {LIMIT:?}"))??;
    if !status.success() {
        return Err(format!("it ended with {status}").into());
    }
    let measure: Measure = serde_json::from_str(&text)?;
    if measure.messages == 0 { Err("not one message".into()) } else { Ok(measure) }
}
