//! Why no connection came about.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::Error;

/// Why no connection came about.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The host name does not resolve.
    #[error("cannot resolve the host: {0}")]
    Resolve(#[source] Arc<io::Error>),

    /// No TCP connection, for instance because nothing listens there.
    #[error("{0}")]
    Io(#[source] Arc<io::Error>),

    /// The whole of TCP and AMQP handshake took longer than `connect_timeout`, or than the checkout had left.
    #[error("no answer within {after:?} ({stage})")]
    Timeout {
        /// What was being waited for.
        stage: &'static str,
        /// The time there was.
        after: Duration,
    },

    /// The broker is not the one that was expected, or does not accept our certificate; or there is something wrong with a
    /// file that `tls` names.
    #[error("TLS: {0}")]
    Tls(String),

    /// The file that `password_file` names cannot be read, or has no password in it.
    #[error("password_file {}: {problem}", path.display())]
    PasswordFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },

    /// The broker offers no way to log in that the settings allow.
    #[error("{0}")]
    Mechanism(String),

    /// The broker does not accept user and password.
    #[error("the broker refused user {user:?}: {text}")]
    AccessRefused {
        /// The user name that was sent.
        user: String,
        /// The broker's words, or what its silence means.
        text: String,
    },

    /// The broker closed the connection during the handshake: 530 for a virtual host that is not there, for example.
    #[error("the broker closed the connection: {code} {text}")]
    Closed {
        /// AMQP reply code.
        code: u16,
        /// AMQP reply text.
        text: String,
    },

    /// None of several hosts gave a connection, and one at least refused it: each of those that were tried, with its reason.
    #[error("{}", each_host(.0))]
    Hosts(Vec<(String, ConnectError)>),

    /// The embedded broker that a `memory://` URL names cannot be started.
    #[error("{0}")]
    Embedded(#[source] Arc<Error>),

    /// What answered is no AMQP 0-9-1 broker, or broke off in the middle of the handshake.
    #[error("the handshake failed: {0}")]
    Handshake(String),
}

impl ConnectError {
    /// Whether connecting may work later though nobody changes anything. See [`Error::is_transient`].
    pub fn is_transient(&self) -> bool {
        match self {
            ConnectError::Resolve(_)
            | ConnectError::Io(_)
            | ConnectError::Timeout { .. }
            | ConnectError::Handshake(_) => true,
            ConnectError::Embedded(error) => error.is_transient(),
            ConnectError::Hosts(hosts) => hosts.iter().any(|(_, cause)| cause.is_transient()),
            ConnectError::AccessRefused { .. }
            | ConnectError::PasswordFile { .. }
            | ConnectError::Mechanism(_)
            | ConnectError::Tls(_) => false,
            ConnectError::Closed { code, .. } => is_transient_code(*code) || self.is_connection_limit(),
        }
    }

    /// The broker's reply code, where it gave one; of several hosts, that of the first that did.
    pub(crate) fn code(&self) -> Option<u16> {
        match self {
            ConnectError::AccessRefused { .. } => Some(403),
            ConnectError::Closed { code, .. } => Some(*code),
            ConnectError::Hosts(hosts) => hosts.iter().find_map(|(_, cause)| cause.code()),
            _ => None,
        }
    }

    /// Whether the broker lets nobody in for now, because a virtual host, a user or the node has as many connections as it
    /// may have (<https://www.rabbitmq.com/docs/connections#limits>). RabbitMQ closes with the same code for what will not pass,
    /// so it takes its words to tell.
    pub(crate) fn is_connection_limit(&self) -> bool {
        match self {
            ConnectError::Closed { code: 530, text } => text.contains("connection limit ("),
            ConnectError::Hosts(hosts) => hosts.iter().any(|(_, cause)| cause.is_connection_limit()),
            _ => false,
        }
    }
}

fn each_host(hosts: &[(String, ConnectError)]) -> String {
    let each: Vec<String> = hosts.iter().map(|(host, cause)| format!("{host}: {cause}")).collect();
    each.join("; ")
}

/// Whether the specification says of this code that trying again may help. See [`Error::is_transient`].
pub(super) fn is_transient_code(code: u16) -> bool {
    matches!(code, 311 | 320 | 405 | 506 | 541)
}
