//! What goes to stdout in texts: lines, and how messages are written, so that a terminal is left in order.

use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};

use coney::Received;

use crate::lines;

/// How messages are shown.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Format {
    /// Prints each message as a line of JSON, with everything there is to it, as `coney publish --json-lines` reads it.
    /// Without it: the body, and the end of a line.
    #[arg(long)]
    json_lines: bool,
    /// Writes the body and nothing else: no end of a line, and on a terminal nothing is made visible. What is written is
    /// what `coney publish --file` sends.
    #[arg(long, conflicts_with = "json_lines")]
    raw: bool,
}

impl Format {
    /// One message as it is to be written.
    pub fn of(self, received: &Received) -> io::Result<Cow<'_, [u8]>> {
        if self.raw {
            return Ok(Cow::Borrowed(received.body()));
        }
        let mut text = if self.json_lines {
            lines::to_text(received)?.into_bytes()
        } else if io::stdout().is_terminal() {
            shown(&String::from_utf8_lossy(received.body())).into_owned().into_bytes()
        } else {
            received.body().to_vec()
        };
        text.push(b'\n');
        Ok(Cow::Owned(text))
    }
}

/// Writes a line.
pub fn line(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.write_all(b"\n")?;
    stdout.flush()
}

/// Text from a message, or of the broker, with what a terminal would obey made visible.
pub fn shown(text: &str) -> Cow<'_, str> {
    let obeyed = |one: char| one.is_control() && one != '\n' && one != '\t';
    if !text.contains(obeyed) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.chars().fold(String::new(), |mut shown, one| {
        if obeyed(one) {
            shown.extend(one.escape_default());
        } else {
            shown.push(one);
        }
        shown
    }))
}

/// `1 message`, `2 messages`.
pub fn count(number: u64, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// The beginning of a text, in one line.
pub fn beginning(text: &str, length: usize) -> String {
    let mut short: String = text.chars().take(length).map(|one| if one.is_control() { ' ' } else { one }).collect();
    if text.chars().nth(length).is_some() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_not_told_what_to_do_by_a_message() {
        assert_eq!(shown("a\tb\nc"), "a\tb\nc");
        assert_eq!(shown("\x1b[2J"), "\\u{1b}[2J");
        assert_eq!(beginning("a\nb\x1bc", 3), "a b…");
    }
}
