//! Where a broker is: host and port, or the name of an embedded one.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use super::{UrlError, decode};

const DEFAULT_HOST: &str = "localhost";
/// The ports IANA has for AMQP, without TLS and with it.
const DEFAULT_PORT: u16 = 5672;
const DEFAULT_TLS_PORT: u16 = 5671;
pub(super) const MEMORY_SCHEME: &str = "memory://";

/// The port of a broker that none is said of.
pub(crate) fn default_port(tls: bool) -> u16 {
    if tls { DEFAULT_TLS_PORT } else { DEFAULT_PORT }
}

/// Where a broker is: a host and a port, or the name of an embedded broker in this process.
///
/// Written `a:5672`, `a` for port 5672, or `[::1]:5672`. An embedded broker is only named by URLs, `memory://NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub struct Endpoint {
    /// A host name or an address; an IPv6 address is without brackets here. Defaults to `localhost`. For an embedded
    /// broker its name.
    pub host: String,
    /// The TCP port, not 0. Defaults to 5672. For an embedded broker 0: where it listens is its own matter.
    pub port: u16,
    in_memory: bool,
}

impl Endpoint {
    /// A host name or address, without brackets around an IPv6 address, and a port.
    pub fn new(host: impl Into<String>, port: u16) -> Endpoint {
        Endpoint { host: host.into(), port, in_memory: false }
    }

    /// The embedded broker of that name in this process, which is started by the first who connects to it.
    pub fn memory(name: impl Into<String>) -> Endpoint {
        Endpoint { host: name.into(), port: 0, in_memory: true }
    }

    /// The name, if this is an embedded broker.
    pub fn memory_name(&self) -> Option<&str> {
        self.in_memory.then_some(self.host.as_str())
    }
}

impl Default for Endpoint {
    fn default() -> Endpoint {
        Endpoint::new(DEFAULT_HOST, DEFAULT_PORT)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(name) = self.memory_name() {
            write!(f, "{MEMORY_SCHEME}{name}")
        } else if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for Endpoint {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Endpoint, UrlError> {
        let (host, port) = host_and_port(text)?;
        Ok(Endpoint::new(host, port.unwrap_or(DEFAULT_PORT)))
    }
}

/// A host, and its port if one is said.
pub(crate) fn host_and_port(text: &str) -> Result<(String, Option<u16>), UrlError> {
    if text.contains('@') || text.contains('/') {
        return Err(UrlError::NotAnEndpoint);
    }
    let (host, port) = split_port(text)?;
    Ok((check_host(host)?, port.map(parse_port).transpose()?))
}

/// What stands between `//` and the path of a URL, behind user and password.
pub(super) fn parse_address(address: &str, tls: bool) -> Result<Endpoint, UrlError> {
    let (host, port) = split_port(address)?;
    let host = match decode(host, "host")? {
        // The specification lets a URL leave out the host.
        host if host.is_empty() => DEFAULT_HOST.to_owned(),
        host => check_host(&host)?,
    };
    Ok(Endpoint::new(host, port.map_or(Ok(default_port(tls)), parse_port)?))
}

/// Splits off the port. The host keeps its brackets.
fn split_port(address: &str) -> Result<(&str, Option<&str>), UrlError> {
    let (host, behind) = match address.find(']') {
        Some(end) if address.starts_with('[') => address.split_at(end + 1),
        Some(_) => return Err(UrlError::Host),
        None => address.split_at(address.find(':').unwrap_or(address.len())),
    };
    match behind.strip_prefix(':') {
        Some(port) => Ok((host, Some(port))),
        None if behind.is_empty() => Ok((host, None)),
        None => Err(UrlError::Port),
    }
}

fn check_host(host: &str) -> Result<String, UrlError> {
    if let Some(address) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        // A link-local address needs the name of an interface with it: fe80::1%eth0.
        let (address, zone) = address.split_once('%').map_or((address, None), |(address, zone)| (address, Some(zone)));
        let zone_is_fine = zone.is_none_or(|zone| !zone.is_empty() && zone.bytes().all(is_host_byte));
        if address.parse::<Ipv6Addr>().is_err() || !zone_is_fine {
            return Err(UrlError::Host);
        }
        return Ok(host[1..host.len() - 1].to_owned());
    }
    if host.is_empty() || !host.bytes().all(is_host_byte) {
        return Err(UrlError::Host);
    }
    Ok(host.to_owned())
}

pub(super) fn is_host_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)
}

fn parse_port(text: &str) -> Result<u16, UrlError> {
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(UrlError::Port);
    }
    match text.parse() {
        Ok(0) | Err(_) => Err(UrlError::Port),
        Ok(port) => Ok(port),
    }
}
