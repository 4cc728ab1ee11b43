//! Reads the file and parses it, with errors that do not quote it: the line that a parser would show may be the one
//! with the password.

use std::path::Path;

use config::{ConfigError, File, FileFormat, Map, Source, Value};

use super::Problem;

/// Reads the file ourselves: `config` would take a file of a similar name if there is none of this one, and would
/// put replacement characters in the place of what is not UTF-8.
pub(super) fn read(path: &Path) -> Result<String, Problem> {
    let bytes = std::fs::read(path).map_err(|error| Problem::new("", format!("it cannot be read: {error}")))?;
    String::from_utf8(bytes).map_err(|error| {
        let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        Problem::new(format!("line {line}"), "expected UTF-8")
    })
}

pub(super) fn parse(text: &str) -> Result<Map<String, Value>, Vec<Problem>> {
    // Some editors begin a file with a byte order mark, which is not TOML.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    File::from_str(text, FileFormat::Toml).collect().map_err(|error| {
        let said = match &error {
            ConfigError::FileParse { cause, .. } => cause.to_string(),
            _ => String::new(),
        };
        vec![syntax_problem(&said).unwrap_or_else(|| number_problem(text))]
    })
}

/// Takes the position and the message out of what the parser says, which is
///
/// ```text
/// TOML parse error at line 3, column 7
///   |
/// 3 | size = oops
///   |        ^^^^
/// string values must be quoted, expected literal string
/// ```
///
/// and leaves out the three lines in between. The parser's messages are fixed texts.
fn syntax_problem(said: &str) -> Option<Problem> {
    let mut lines = said.split('\n');
    let position = lines.next()?.strip_prefix("TOML parse error at ")?;
    let message = lines.nth(3)?;
    Some(Problem::new(position, message))
}

/// What `config` itself refuses is a number of more than 64 bits, and it does not say where.
fn number_problem(text: &str) -> Problem {
    let ends = text.match_indices('\n').map(|(end, _)| end).chain([text.len()]);
    // The shortest beginning of the file that is TOML but for its numbers ends with the line of the number.
    let line = ends.enumerate().find(|(_, end)| {
        let parsed = File::from_str(&text[..*end], FileFormat::Toml).collect();
        matches!(parsed, Err(ConfigError::FileParse { cause, .. }) if syntax_problem(&cause.to_string()).is_none())
    });
    let key = line.map(|(index, _)| format!("line {}", index + 1)).unwrap_or_default();
    Problem::new(key, "expected a number of at most 64 bits")
}
