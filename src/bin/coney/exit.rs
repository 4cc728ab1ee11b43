//! How the program ends: what its exit codes mean, and the one line on stderr that goes with a failure.

use std::error::Error as StdError;
use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

use coney::{ConnectError, Error};

/// What `--help` says of the exit codes, below every command.
pub const CODES: &str = "Exit codes:
  0  done
  1  failed, in whole or in part; each failure is one line on stderr
  2  a mistake in the arguments
  3  topology plan: something is still to be created
  4  topology plan and apply: something exists with other properties
  5  no connection: the broker cannot be reached, or refuses us
  6  get: there was no message";

/// An orderly end, with what it says to scripts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    Done = 0,
    Failed = 1,
    Usage = 2,
    Pending = 3,
    Conflict = 4,
    NoConnection = 5,
    Empty = 6,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// Why a command has not done what it was to do.
#[derive(Debug)]
pub enum Failure {
    /// Told in one line.
    Told { exit: Exit, line: String },
    /// Whoever read our output has gone: nobody is left to be told, and nothing is wrong.
    OutputClosed,
}

/// The result of a command.
pub type Result<T = Exit> = std::result::Result<T, Failure>;

impl Failure {
    pub fn new(exit: Exit, line: impl Into<String>) -> Failure {
        Failure::Told { exit, line: one_line(&line.into()) }
    }

    pub fn usage(line: impl Into<String>) -> Failure {
        Failure::new(Exit::Usage, line)
    }

    pub fn failed(line: impl Into<String>) -> Failure {
        Failure::new(Exit::Failed, line)
    }

    /// Says it on stderr, if there is something to say, and how the program is to end.
    pub fn tell(self) -> Exit {
        match self {
            Failure::Told { exit, line } => {
                complain(line);
                exit
            }
            Failure::OutputClosed => Exit::Done,
        }
    }
}

/// Says what went wrong, in one line on stderr.
pub fn complain(line: impl fmt::Display) {
    // Whoever read stderr may have gone.
    let _ = writeln!(io::stderr(), "coney: {}", one_line(&line.to_string()));
}

/// An error, and what may be done about it.
pub fn explain(error: &Error) -> String {
    match hint(error) {
        Some(hint) => format!("{error}; {hint}"),
        None => error.to_string(),
    }
}

/// What to try, where the error itself does not say.
pub fn hint(error: &Error) -> Option<&'static str> {
    Some(match error {
        Error::Connect { cause, .. } => match cause {
            ConnectError::Resolve(_) => "check the host in the URL or the settings",
            ConnectError::Io(_) => "is a broker running there? `coney broker` starts one to try things with",
            ConnectError::Timeout { .. } => "is it a broker, and does a firewall let us through?",
            ConnectError::Tls(_) => "check `tls` in the settings, and whether the port speaks TLS",
            ConnectError::AccessRefused { .. } => {
                "check user and password: the URL, the settings, CONEY_BROKER__PASSWORD"
            }
            ConnectError::Closed { code: 530, .. } => "check the virtual host; in a URL `/` is written %2f",
            ConnectError::Handshake(_) => "is it AMQP 0-9-1 without TLS that is spoken on this port?",
            _ => return None,
        },
        Error::Returned { .. } => "bind a queue to it, or let it be dropped with --no-mandatory",
        Error::Nacked { .. } => "the queue may be full and declared to refuse messages",
        Error::Blocked { .. } => "the broker is short of memory or disk space",
        Error::UnknownPool { .. } => "choose one with --pool",
        Error::ChannelClosed { code: 403, .. } => {
            "the user lacks this permission; rabbitmqctl set_permissions -p VHOST USER CONFIGURE WRITE READ gives it"
        }
        Error::ChannelClosed { code: 404, .. } => {
            "is the name right? `coney topology apply` declares what the settings name"
        }
        Error::ChannelClosed { code: 405, .. } => "it is exclusive to another connection",
        Error::ChannelClosed { code: 406, text, .. } if text.contains("inequivalent") => {
            "it exists with other properties; see `coney topology plan`"
        }
        Error::ChannelClosed { code: 406, text, .. } if text.contains("user_id") => {
            "a message can only claim to come from the user of the connection"
        }
        _ => return None,
    })
}

/// Lists are written in several lines elsewhere; stderr has one for each failure.
fn one_line(text: &str) -> String {
    let mut line = String::new();
    for part in text.lines().map(str::trim).filter(|part| !part.is_empty()) {
        if !line.is_empty() {
            line.push_str(if line.ends_with([':', ';']) { " " } else { "; " });
        }
        line.push_str(part);
    }
    line.chars().map(|one| if one.is_control() { ' ' } else { one }).collect()
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let exit = if matches!(error, Error::Connect { .. }) { Exit::NoConnection } else { Exit::Failed };
        Failure::new(exit, explain(&error))
    }
}

/// Errors of writing to stdout; there is no other input or output that is not given words of its own.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::OutputClosed,
            _ => Failure::failed(format!("cannot write to stdout: {error}")),
        }
    }
}

impl From<Box<dyn StdError>> for Failure {
    fn from(error: Box<dyn StdError>) -> Failure {
        Failure::failed(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_mistakes_becomes_one_line() {
        assert_eq!(one_line("app.toml has 2 mistakes:\n  a: b\n  c: d"), "app.toml has 2 mistakes: a: b; c: d");
        assert_eq!(one_line("rings a \x07"), "rings a  ");
    }
}
