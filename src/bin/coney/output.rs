//! What goes to stdout in texts: lines, and how messages are written, so that a terminal is left in order.

use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};

use coney::Received;
use log::LevelFilter;
use serde::Serialize;

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
    /// A message in the form that is written.
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

/// A value as JSON in one line, to the same value for whoever reads it. In texts, what a terminal would obey is escaped too:
/// JSON itself asks for no more than the characters below U+0020.
pub fn json(value: &impl Serialize) -> io::Result<String> {
    let text = serde_json::to_string(value)?;
    if !text.contains(is_obeyed) {
        return Ok(text);
    }
    Ok(text.chars().fold(String::new(), |mut escaped, one| {
        if is_obeyed(one) {
            // They are within texts, and in the plane that has four digits.
            escaped += &format!("\\u{:04x}", u32::from(one));
        } else {
            escaped.push(one);
        }
        escaped
    }))
}

/// Whether this character does something to a terminal or to a log instead of being shown: the controls C0, DEL and C1, ends of
/// lines, and what turns the direction of writing.
pub fn is_obeyed(one: char) -> bool {
    let turns = ['\u{61c}', '\u{200e}', '\u{200f}'].contains(&one)
        || ('\u{202a}'..='\u{202e}').contains(&one)
        || ('\u{2066}'..='\u{2069}').contains(&one);
    one.is_control() || turns || matches!(one, '\u{2028}' | '\u{2029}')
}

/// Starts logging at this level, amiquip's own at another. A line of the log is one line, whatever is in it.
pub fn log_at(level: LevelFilter, amiquip: LevelFilter) {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(level).filter_module("amiquip", amiquip);
    builder.format(|out, record| {
        let style = out.default_level_style(record.level());
        let text = in_one_line(&record.args().to_string());
        let (level, target) = (record.level(), record.target());
        writeln!(out, "[{style}{level:<5}{style:#} {target}] {text}")
    });
    builder.init();
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
    let obeyed = |one: char| is_obeyed(one) && one != '\n' && one != '\t';
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

/// The text in one line, with such characters escaped.
pub fn in_one_line(text: &str) -> String {
    text.chars().fold(String::new(), |line, one| match is_obeyed(one) {
        true => line + &one.escape_default().to_string(),
        false => line + one.encode_utf8(&mut [0; 4]),
    })
}

/// Writes a line with names in it.
pub fn say(text: &str) -> io::Result<()> {
    line(&in_one_line(text))
}

/// `1 message`, `2 messages`.
pub fn count(number: u64, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// The beginning of a text, in one line.
pub fn beginning(text: &str, length: usize) -> String {
    let mut short: String = text.chars().take(length).map(|one| if is_obeyed(one) { ' ' } else { one }).collect();
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
        assert_eq!(shown("\u{9b}2J \u{202e}"), "\\u{9b}2J \\u{202e}");
        assert_eq!(beginning("a\u{9b}b\u{2066}c", 9), "a b c");
    }

    #[test]
    fn json_is_the_same_value_and_has_nothing_in_it_that_a_terminal_obeys() {
        let all: String = (0..0x3000).filter_map(char::from_u32).chain(['😀']).collect();
        let text = json(&[&all]).unwrap();
        assert!(!text.contains(is_obeyed), "{text:?}");
        assert!(text.contains("\\u009b") && text.contains("\\u007f") && text.contains("\\u202e"), "{text:?}");
        assert!(text.contains('ü') && text.contains('😀'), "what is harmless is left as it is");
        assert_eq!(serde_json::from_str::<Vec<String>>(&text).unwrap(), [all]);
    }
}
