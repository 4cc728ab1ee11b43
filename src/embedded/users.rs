//! Who may log in, and what each may touch: RabbitMQ's three regular expressions for each virtual host.

use std::collections::HashMap;
use std::fmt;

use regex::bytes::Regex;

/// What is done to a queue or an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Right {
    /// Declare, delete.
    Configure,
    /// Publish, be bound to.
    Write,
    /// Consume, get, purge, be bound from.
    Read,
}

/// Which names a right covers.
#[derive(Debug, Clone)]
pub(crate) enum Pattern {
    /// `.*`, which is what nearly everybody has: costs nothing.
    All,
    /// The empty pattern, which RabbitMQ reads as `^$`.
    None,
    /// Anything else, unanchored.
    Regex(Regex),
}

impl Pattern {
    pub(crate) fn parse(pattern: &str) -> Result<Pattern, regex::Error> {
        Ok(match pattern {
            "" | "^$" => Pattern::None,
            ".*" | "^.*$" | ".*?" => Pattern::All,
            other => Pattern::Regex(Regex::new(other)?),
        })
    }

    fn covers(&self, name: &[u8]) -> bool {
        match self {
            Pattern::All => true,
            Pattern::None => name.is_empty(),
            Pattern::Regex(regex) => regex.is_match(name),
        }
    }
}

/// The rights of one user in one virtual host.
#[derive(Debug, Clone)]
pub(crate) struct Permissions {
    pub(crate) configure: Pattern,
    pub(crate) write: Pattern,
    pub(crate) read: Pattern,
}

impl Permissions {
    pub(crate) fn all() -> Permissions {
        Permissions { configure: Pattern::All, write: Pattern::All, read: Pattern::All }
    }
}

/// A user, as sessions and the engine see it.
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) password: String,
    /// By virtual host; one that is not in here may not be opened.
    pub(crate) permissions: HashMap<String, Permissions>,
}

impl User {
    /// Whether the user may open this virtual host.
    pub(crate) fn may_open(&self, vhost: &str) -> bool {
        self.permissions.contains_key(vhost)
    }

    /// Whether the user has `right` on the queue or exchange `name`.
    pub(crate) fn may(&self, vhost: &str, right: Right, name: &[u8]) -> bool {
        self.permissions.get(vhost).is_some_and(|permissions| {
            let pattern = match right {
                Right::Configure => &permissions.configure,
                Right::Write => &permissions.write,
                Right::Read => &permissions.read,
            };
            pattern.covers(name)
        })
    }
}

/// Without the password.
impl fmt::Debug for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("User").field("name", &self.name).field("permissions", &self.permissions).finish()
    }
}
