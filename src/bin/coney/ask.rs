//! Questions to whoever sits at the terminal, before something is gone for good.

use std::io::{self, BufRead, IsTerminal, Write};

use crate::exit::{Failure, Result};
use crate::output::in_one_line;

/// Whether the answer is yes. Where there is no terminal to ask at, it takes `--yes`.
pub fn agrees(question: &str) -> Result<bool> {
    if !io::stdin().is_terminal() {
        return Err(Failure::usage(format!("{question} It takes --yes where there is no terminal to ask at")));
    }
    let question = in_one_line(question);
    let mut stderr = io::stderr();
    let mut answer = String::new();
    let read = write!(stderr, "{question} [y/N] ")
        .and_then(|()| stderr.flush())
        .and_then(|()| io::stdin().lock().read_line(&mut answer));
    read.map_err(|error| Failure::failed(format!("cannot read the answer: {error}")))?;
    Ok(["y", "yes"].contains(&answer.trim().to_lowercase().as_str()))
}
