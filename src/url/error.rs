//! What can be wrong with a URL.

/// What is wrong with a URL or with a `host:port`, and what was expected.
///
/// Never holds any of the text, which may hold a password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UrlError {
    /// `amqps://`, and this build has no TLS.
    #[error("amqps:// needs coney's cargo feature `tls`")]
    NoTls,
    /// Another scheme, or none.
    #[error("expected a URL that begins with amqp://, amqps:// or memory://")]
    Scheme,
    /// `memory://`, and this build has no embedded broker.
    #[error("memory:// needs coney's cargo feature `embedded`")]
    NoMemory,
    /// Something other than a plain name behind `memory://`.
    #[error("expected memory://NAME, a name of letters, digits and - . _ ~ without a port")]
    MemoryName,
    /// A space, tab, line break or control character.
    #[error("it has a blank or control character in it; write it as % and two hex digits")]
    Blank,
    /// A fragment.
    #[error("it has a # in it, which means nothing here; write %23 if it belongs to the password")]
    Fragment,
    /// More than one `@`, or one behind the host.
    #[error("it has an @ where none can be; in user, password and virtual host write / ? # @ as %2f %3f %23 %40")]
    At,
    /// No host name and no address.
    #[error("expected a host name, an IPv4 address, or an IPv6 address in brackets")]
    Host,
    /// A port that is no number from 1 to 65535.
    #[error("expected a port from 1 to 65535 behind the host")]
    Port,
    /// A `%` without two hex digits behind it.
    #[error("the {part} has a % without two hex digits behind it; a % itself is written %25")]
    Escape {
        /// Which part of the URL.
        part: &'static str,
    },
    /// A part that is not UTF-8 once decoded.
    #[error("the {part} is not UTF-8 once its %-escapes are decoded")]
    NotUtf8 {
        /// Which part of the URL.
        part: &'static str,
    },
    /// A NUL character, which separates user and password on the wire (SASL PLAIN, RFC 4616).
    #[error("the {part} has a NUL character in it, which cannot be sent")]
    Nul {
        /// Which part of the URL.
        part: &'static str,
    },
    /// More than one path segment.
    #[error("expected one virtual host behind the host; a / in its name is written %2f")]
    Path,
    /// A virtual host of more than 255 bytes.
    #[error("the virtual host is longer than 255 bytes")]
    LongVhost,
    /// A parameter that is not `heartbeat`, `connection_timeout` or `auth_mechanism`.
    #[error("unknown parameter {name}; expected heartbeat, connection_timeout or auth_mechanism")]
    UnknownParameter {
        /// Its name, if that is made of letters, digits and underscores; otherwise something to stand for it.
        name: String,
    },
    /// A parameter given twice.
    #[error("parameter {name} is there twice")]
    RepeatedParameter {
        /// Its name.
        name: &'static str,
    },
    /// A heartbeat that is not from 1 to 65535 seconds. 0 is refused: calls on a silent connection would never end.
    #[error("parameter heartbeat: expected seconds from 1 to 65535; it cannot be switched off")]
    Heartbeat,
    /// A connection time-out that is not from 1 to 86400000 milliseconds.
    #[error("parameter connection_timeout: expected milliseconds from 1 to 86400000")]
    ConnectionTimeout,
    /// A mechanism of authentication that coney does not speak.
    #[error("parameter auth_mechanism: expected plain, amqplain or external")]
    AuthMechanism,
    /// Something that holds more than a host and a port, such as a URL.
    #[error("expected host or host:port and nothing else; user, password and virtual host have keys of their own")]
    NotAnEndpoint,
}
