//! The one error of this room: a list of everything that is wrong.

use std::fmt;
use std::path::PathBuf;

/// The settings are wrong.
///
/// Displays as a headline and one line for each mistake:
///
/// ```text
/// app.toml has 2 mistakes:
///   pools.publish.size: expected a whole number from 1 to 1000, got 0
///   broker.heartbeat (from CONEY_BROKER__HEARTBEAT): expected a duration such as "10s"
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SettingsError {
    /// The file they were read from, if they were.
    pub file: Option<PathBuf>,
    /// Every mistake, at least one.
    pub problems: Vec<Problem>,
}

impl SettingsError {
    pub(crate) fn new(file: Option<PathBuf>, problems: Vec<Problem>) -> SettingsError {
        SettingsError { file, problems }
    }
}

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some(file) => write!(f, "{} has ", file.display())?,
            None => f.write_str("the settings have ")?,
        }
        match self.problems.len() {
            1 => f.write_str("1 mistake:")?,
            number => write!(f, "{number} mistakes:")?,
        }
        for problem in &self.problems {
            write!(f, "\n  {problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for SettingsError {}

/// One mistake in the settings.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Problem {
    /// The path of the key, such as `pools.publish.size` or `topology.bindings[0].queue`; the line and column for a
    /// syntax error; empty if it is the file as a whole.
    pub key: String,
    /// The environment variable the value came from, if it did.
    pub variable: Option<String>,
    /// What is wrong and what was expected. Never the text of the value where that could hold a password.
    pub problem: String,
}

impl Problem {
    pub(crate) fn new(key: impl Into<String>, problem: impl Into<String>) -> Problem {
        Problem { key: key.into(), variable: None, problem: problem.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.variable, self.key.is_empty()) {
            (None, true) => f.write_str(&self.problem),
            (None, false) => write!(f, "{}: {}", self.key, self.problem),
            (Some(variable), true) => write!(f, "{variable}: {}", self.problem),
            (Some(variable), false) => write!(f, "{} (from {variable}): {}", self.key, self.problem),
        }
    }
}
