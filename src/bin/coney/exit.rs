//! How the program ends: what its exit codes mean, and the one line on stderr that goes with a failure.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

use coney::{ConnectError, Error};

use crate::colour::Colour;
use crate::output::is_obeyed;

/// What `--help` says of the exit codes, below every command.
pub const CODES: &str = "Exit codes:
  0  done
  1  failed, in whole or in part; each failure is one line on stderr
  2  a mistake in the arguments
  3  topology plan: something is still to be created; outbox status: messages were refused
  4  topology plan and apply: something exists with other properties
  5  no connection: the broker cannot be reached, or refuses us
  6  get: there was no message
  7  the reader of stdout has gone before it had everything";

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
    NoReader = 7,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// Why a command has not done what it was to do, told in one line.
#[derive(Debug)]
pub struct Failure {
    pub exit: Exit,
    pub line: String,
}

/// The result of a command.
pub type Result<T = Exit> = std::result::Result<T, Failure>;

impl Failure {
    pub fn new(exit: Exit, line: impl Into<String>) -> Failure {
        Failure { exit, line: one_line(&line.into()) }
    }

    pub fn usage(line: impl Into<String>) -> Failure {
        Failure::new(Exit::Usage, line)
    }

    pub fn failed(line: impl Into<String>) -> Failure {
        Failure::new(Exit::Failed, line)
    }

    /// The same with more to say.
    pub fn and(self, more: &str) -> Failure {
        Failure::new(self.exit, format!("{}; {more}", self.line))
    }

    /// Says it on stderr, and how the program is to end.
    pub fn tell(self) -> Exit {
        complain(self.line);
        self.exit
    }
}

/// Says what went wrong, in one line on stderr.
pub fn complain(line: impl fmt::Display) {
    // Whoever read stderr may have gone.
    let _ = writeln!(io::stderr(), "{} {}", Colour::Red.on_stderr("coney:"), one_line(&line.to_string()));
}

/// Why the message at this position of a batch was not confirmed, if it was not.
pub fn error_at(sent: &coney::Result<usize>, position: usize) -> Option<&Error> {
    match sent {
        Ok(_) => None,
        Err(Error::Batch(batch)) => batch.error_at(position),
        Err(error) => Some(error),
    }
}

/// An error, and what may be done about it.
pub fn explain(error: &Error) -> String {
    match hint(error) {
        Some(hint) => format!("{error}; {hint}"),
        None => error.to_string(),
    }
}

/// What to try, where the error itself does not say.
pub fn hint(error: &Error) -> Option<Cow<'static, str>> {
    // Those that name what is missing, and how it is made.
    match error {
        Error::Returned { code: 312, exchange, routing_key, .. } if exchange.is_empty() && !routing_key.is_empty() => {
            let made = format!("`coney queue declare {}` makes it", shell_word(routing_key));
            return Some(format!("there is no queue {routing_key:?}; {made}").into());
        }
        Error::Returned { code: 312, exchange, routing_key, .. } => {
            let key = if routing_key.is_empty() { String::new() } else { format!(" {}", shell_word(routing_key)) };
            let bound = format!("bind a queue to it (`coney bind QUEUE {}{key}`)", shell_word(exchange));
            return Some(format!("{bound}, or let it be dropped with --no-mandatory").into());
        }
        Error::ChannelClosed { code: 404, text, .. } => {
            let named = |kind: &str| Some(text.split_once(kind)?.1.split_once("' in vhost")?.0);
            let made = match (named("no queue '"), named("no exchange '")) {
                (Some(queue), _) => format!("`coney queue declare {}` makes it", shell_word(queue)),
                (_, Some(exchange)) => format!("`coney exchange declare {} KIND` makes it", shell_word(exchange)),
                _ => return Some("is the name right?".into()),
            };
            return Some(format!("is the name right? {made}, `coney topology apply` what the settings name").into());
        }
        _ => {}
    }
    fixed_hint(error).map(Cow::Borrowed)
}

/// A name as a shell takes it for one word.
fn shell_word(name: &str) -> Cow<'_, str> {
    let is_plain = |one: char| one.is_ascii_alphanumeric() || "_.-/:@%+=,".contains(one);
    if !name.is_empty() && name.chars().all(is_plain) {
        return Cow::Borrowed(name);
    }
    Cow::Owned(format!("'{}'", name.replace('\'', r"'\''")))
}

fn fixed_hint(error: &Error) -> Option<&'static str> {
    Some(match error {
        Error::Connect { cause: ConnectError::Hosts(_), .. } => {
            "the hosts are those of the settings: see `coney doctor`"
        }
        Error::Connect { cause, .. } => match cause {
            ConnectError::Resolve(_) => "check the host in the URL or the settings",
            ConnectError::Io(_) => "is a broker running there? `coney broker` starts one to try things with",
            ConnectError::Timeout { .. } => "is it a broker, and does a firewall let us through?",
            ConnectError::Tls(_) => "check `tls` in the settings, and whether the port speaks TLS",
            ConnectError::AccessRefused { .. } => {
                "check user and password: the URL, the settings, CONEY_BROKER__PASSWORD"
            }
            ConnectError::Closed { code: 530, text } if text.contains("connection limit (") => {
                "it is the limit of the virtual host, of the user or of the node; `rabbitmqctl list_connections` shows who is in"
            }
            ConnectError::Closed { code: 530, .. } => "check the virtual host; in a URL `/` is written %2f",
            ConnectError::Handshake(_) => "is it AMQP 0-9-1 without TLS that is spoken on this port?",
            _ => return None,
        },
        Error::Nacked { .. } => "the queue may be full and declared to refuse messages",
        Error::Blocked { .. } => "the broker is short of memory or disk space",
        Error::Listen { source, .. } if source.kind() == io::ErrorKind::AddrInUse => {
            "another program has the port; --listen 127.0.0.1:5673 is another one, and port 0 any free one"
        }
        Error::UnknownPool { .. } => "choose one with --pool",
        Error::ChannelClosed { code: 403, .. } => {
            "the user lacks this permission; rabbitmqctl set_permissions -p VHOST USER CONFIGURE WRITE READ gives it"
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
    line.chars().map(|one| if is_obeyed(one) { ' ' } else { one }).collect()
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
            io::ErrorKind::BrokenPipe => Failure::new(Exit::NoReader, "the reader of stdout has gone"),
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
        assert_eq!(one_line("no exchange '\u{9b}2J\u{202e}'"), "no exchange ' 2J '");
    }

    #[test]
    fn names_in_commands_are_one_word_to_a_shell() {
        assert_eq!(shell_word("orders.dead"), "orders.dead");
        assert_eq!(shell_word("it's #1"), r"'it'\''s #1'");
        assert_eq!(shell_word(""), "''");
    }
}
