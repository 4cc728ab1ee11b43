//! `amqp://` and `memory://` URLs, and the two things they are made of that settings name by themselves: [`Endpoint`] and
//! [`Secret`].
//!
//! The form is RabbitMQ's URI specification, <https://www.rabbitmq.com/docs/uri-spec>, with two of the parameters of
//! <https://www.rabbitmq.com/docs/uri-query-parameters>. No error in here quotes the text it is about, because that
//! text may hold a password.

use std::fmt;
use std::net::Ipv6Addr;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use percent_encoding::percent_decode_str;

const SCHEME: &str = "amqp://";
const MEMORY_SCHEME: &str = "memory://";
/// The embedded broker that `memory://` means.
const DEFAULT_MEMORY: &str = "default";
const DEFAULT_HOST: &str = "localhost";
const DEFAULT_USER: &str = "guest";
const DEFAULT_PASSWORD: &str = "guest";
const DEFAULT_VHOST: &str = "/";
/// The port IANA has for AMQP.
const DEFAULT_PORT: u16 = 5672;
/// A virtual host is a short string on the wire, whose length is one octet (AMQP 0-9-1, section 4.2.5.3).
const MAX_VHOST: usize = 255;
/// The heartbeat is negotiated in seconds, as a 16-bit number (AMQP 0-9-1, `connection.tune`). 0 would mean none.
const HEARTBEAT_SECONDS: RangeInclusive<u64> = 1..=65_535;
/// Up to a day, like every other duration in the settings.
const CONNECTION_TIMEOUT_MS: RangeInclusive<u64> = 1..=86_400_000;

/// A password. Debug shows `***`, and there is no Display.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a password.
    pub fn new(secret: impl Into<String>) -> Secret {
        Secret(secret.into())
    }

    /// The password itself. Do not log it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl From<&str> for Secret {
    fn from(secret: &str) -> Secret {
        Secret::new(secret)
    }
}

impl From<String> for Secret {
    fn from(secret: String) -> Secret {
        Secret::new(secret)
    }
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
        if text.contains('@') || text.contains('/') {
            return Err(UrlError::NotAnEndpoint);
        }
        let (host, port) = split_port(text)?;
        Ok(Endpoint::new(check_host(host)?, port.map_or(Ok(DEFAULT_PORT), parse_port)?))
    }
}

/// A broker's URL: `amqp://user:password@host:port/vhost?heartbeat=10&connection_timeout=5000`.
///
/// Every part but the scheme may be left out; the defaults are `amqp://guest:guest@localhost:5672/%2f`. Display and
/// Debug mask the password.
///
/// `memory://NAME/vhost` is the embedded broker of that name in this process, `memory://` the one named `default`. There
/// is no port in it, and no virtual host but `/` unless the program has started that broker itself.
///
/// ```
/// use coney::AmqpUrl;
///
/// let url = AmqpUrl::parse("amqp://app:s3cret@rabbit.example/orders")?;
/// assert_eq!((url.host(), url.port(), url.vhost()), ("rabbit.example", 5672, "orders"));
/// assert_eq!(url.to_string(), "amqp://app:***@rabbit.example:5672/orders");
/// # Ok::<(), coney::UrlError>(())
/// ```
#[derive(Clone)]
pub struct AmqpUrl {
    endpoint: Endpoint,
    user: String,
    password: Secret,
    vhost: String,
    heartbeat: Option<Duration>,
    connect_timeout: Option<Duration>,
    written: Written,
}

/// Which parts are written in the URL; the others are at their defaults.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Written {
    pub(crate) user: bool,
    pub(crate) password: bool,
    pub(crate) vhost: bool,
}

impl AmqpUrl {
    /// Reads a URL.
    ///
    /// The virtual host is `/` for no path, for `/` and for `/%2f`, and `foo` for `/foo`. Parts are percent-decoded
    /// and must then be UTF-8. `heartbeat` is in seconds, 1 to 65535; `connection_timeout` in milliseconds, 1 to
    /// 86400000.
    ///
    /// # Errors
    ///
    /// What is wrong with it, without quoting it.
    pub fn parse(text: &str) -> Result<AmqpUrl, UrlError> {
        let (in_memory, rest) = after_scheme(text)?;
        if rest.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(UrlError::Blank);
        }
        if rest.contains('#') {
            return Err(UrlError::Fragment);
        }
        let authority_end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, rest) = rest.split_at(authority_end);
        // A password with a bare `/` or `?` ends the authority early. What follows would be taken for a virtual
        // host, which is no secret and gets shown; the `@` behind it gives it away.
        if rest.contains('@') {
            return Err(UrlError::At);
        }
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));

        let (userinfo, address) = match authority.split_once('@') {
            Some((_, address)) if address.contains('@') => return Err(UrlError::At),
            Some((userinfo, address)) => (Some(userinfo), address),
            None => (None, authority),
        };
        let (user, password) = match userinfo.map(|userinfo| userinfo.split_once(':').ok_or(userinfo)) {
            Some(Ok((user, password))) => (Some(user), Some(password)),
            Some(Err(user)) => (Some(user), None),
            None => (None, None),
        };
        let written = Written { user: user.is_some(), password: password.is_some(), vhost: !path.is_empty() };
        let (heartbeat, connect_timeout) = parse_query(query)?;
        Ok(AmqpUrl {
            endpoint: if in_memory { parse_memory(address)? } else { parse_address(address)? },
            user: user.map_or(Ok(DEFAULT_USER.to_owned()), |user| decode_credential(user, "user"))?,
            password: password
                .map_or(Ok(DEFAULT_PASSWORD.to_owned()), |password| decode_credential(password, "password"))?
                .into(),
            vhost: parse_vhost(path)?,
            heartbeat,
            connect_timeout,
            written,
        })
    }

    /// Host and port.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The host name or address, an IPv6 address without brackets. Defaults to `localhost`.
    pub fn host(&self) -> &str {
        &self.endpoint.host
    }

    /// The TCP port. Defaults to 5672.
    pub fn port(&self) -> u16 {
        self.endpoint.port
    }

    /// The user. Defaults to `guest`.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The password. Defaults to `guest`.
    pub fn password(&self) -> &Secret {
        &self.password
    }

    /// The virtual host. Defaults to `/`.
    pub fn vhost(&self) -> &str {
        &self.vhost
    }

    /// What the parameter `heartbeat` says, if it is there.
    pub fn heartbeat(&self) -> Option<Duration> {
        self.heartbeat
    }

    /// What the parameter `connection_timeout` says, if it is there.
    pub fn connect_timeout(&self) -> Option<Duration> {
        self.connect_timeout
    }

    pub(crate) fn written(&self) -> Written {
        self.written
    }
}

impl FromStr for AmqpUrl {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<AmqpUrl, UrlError> {
        AmqpUrl::parse(text)
    }
}

impl fmt::Display for AmqpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&masked(self.user(), std::slice::from_ref(&self.endpoint), self.vhost()))?;
        let heartbeat = self.heartbeat.map(|heartbeat| format!("heartbeat={}", heartbeat.as_secs()));
        let timeout = self.connect_timeout.map(|timeout| format!("connection_timeout={}", timeout.as_millis()));
        for (parameter, separator) in heartbeat.into_iter().chain(timeout).zip(['?', '&']) {
            write!(f, "{separator}{parameter}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for AmqpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AmqpUrl({self})")
    }
}

/// What is wrong with a URL or with a `host:port`, and what was expected.
///
/// Never holds any of the text, which may hold a password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UrlError {
    /// `amqps://`.
    #[error("TLS is not supported by this version; expected amqp://")]
    Tls,
    /// Another scheme, or none.
    #[error("expected a URL that begins with amqp:// or memory://")]
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
    /// A parameter that is not `heartbeat` or `connection_timeout`.
    #[error("unknown parameter {name}; expected heartbeat or connection_timeout")]
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
    /// Something that holds more than a host and a port, such as a URL.
    #[error("expected host or host:port and nothing else; user, password and virtual host have keys of their own")]
    NotAnEndpoint,
}

/// A broker as a URL to show to people.
pub(crate) fn masked(user: &str, endpoints: &[Endpoint], vhost: &str) -> String {
    if let [only] = endpoints
        && only.memory_name().is_some()
    {
        return format!("{only}/{}", encode(vhost));
    }
    // In a URL the % before the interface of a link-local address is an escape like any other.
    let endpoints: Vec<String> = endpoints.iter().map(|endpoint| endpoint.to_string().replace('%', "%25")).collect();
    format!("{SCHEME}{}:***@{}/{}", encode(user), endpoints.join(","), encode(vhost))
}

/// Escapes all but what RFC 3986, section 2.3, calls unreserved.
fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02x}"));
        }
    }
    encoded
}

fn decode(text: &str, part: &'static str) -> Result<String, UrlError> {
    // The decoder passes a broken escape through as it is, which would turn a typing mistake into a wrong password.
    let mut escapes = text.split('%').skip(1);
    if !escapes.all(|escape| escape.len() >= 2 && escape.bytes().take(2).all(|byte| byte.is_ascii_hexdigit())) {
        return Err(UrlError::Escape { part });
    }
    match percent_decode_str(text).decode_utf8() {
        Ok(decoded) => Ok(decoded.into_owned()),
        Err(_) => Err(UrlError::NotUtf8 { part }),
    }
}

fn decode_credential(text: &str, part: &'static str) -> Result<String, UrlError> {
    let decoded = decode(text, part)?;
    if decoded.contains('\0') { Err(UrlError::Nul { part }) } else { Ok(decoded) }
}

/// Whether the scheme is that of an embedded broker, and what comes after it.
fn after_scheme(text: &str) -> Result<(bool, &str), UrlError> {
    let (scheme, rest) = text.split_once("://").ok_or(UrlError::Scheme)?;
    match scheme.to_ascii_lowercase().as_str() {
        "amqp" => Ok((false, rest)),
        "memory" if cfg!(feature = "embedded") => Ok((true, rest)),
        "memory" => Err(UrlError::NoMemory),
        "amqps" => Err(UrlError::Tls),
        _ => Err(UrlError::Scheme),
    }
}

fn parse_address(address: &str) -> Result<Endpoint, UrlError> {
    let (host, port) = split_port(address)?;
    let host = match decode(host, "host")? {
        // The specification lets a URL leave out the host.
        host if host.is_empty() => DEFAULT_HOST.to_owned(),
        host => check_host(&host)?,
    };
    Ok(Endpoint::new(host, port.map_or(Ok(DEFAULT_PORT), parse_port)?))
}

fn parse_memory(name: &str) -> Result<Endpoint, UrlError> {
    match name {
        "" => Ok(Endpoint::memory(DEFAULT_MEMORY)),
        name if name.bytes().all(is_host_byte) => Ok(Endpoint::memory(name)),
        _ => Err(UrlError::MemoryName),
    }
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

fn is_host_byte(byte: u8) -> bool {
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

fn parse_vhost(path: &str) -> Result<String, UrlError> {
    let segment = path.strip_prefix('/').unwrap_or(path);
    if segment.contains('/') {
        return Err(UrlError::Path);
    }
    let vhost = decode(segment, "virtual host")?;
    if vhost.len() > MAX_VHOST {
        return Err(UrlError::LongVhost);
    }
    // The specification has `amqp://host/` name the empty virtual host. RabbitMQ has none of that name, and people
    // who end a URL with a slash mean the default one.
    Ok(if vhost.is_empty() { DEFAULT_VHOST.to_owned() } else { vhost })
}

fn parse_query(query: &str) -> Result<(Option<Duration>, Option<Duration>), UrlError> {
    let (mut heartbeat, mut connect_timeout) = (None, None);
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        let value = decode(value, "query")?;
        let (slot, name, value) = match decode(name, "query")?.as_str() {
            "heartbeat" => {
                let seconds = number_within(&value, HEARTBEAT_SECONDS).ok_or(UrlError::Heartbeat)?;
                (&mut heartbeat, "heartbeat", Duration::from_secs(seconds))
            }
            "connection_timeout" => {
                let millis = number_within(&value, CONNECTION_TIMEOUT_MS).ok_or(UrlError::ConnectionTimeout)?;
                (&mut connect_timeout, "connection_timeout", Duration::from_millis(millis))
            }
            unknown => return Err(UrlError::UnknownParameter { name: showable(unknown) }),
        };
        if slot.replace(value).is_some() {
            return Err(UrlError::RepeatedParameter { name });
        }
    }
    Ok((heartbeat, connect_timeout))
}

fn number_within(text: &str, range: RangeInclusive<u64>) -> Option<u64> {
    text.parse().ok().filter(|number| range.contains(number))
}

/// Names of parameters are plain words. Anything else is more likely a password that was not escaped.
fn showable(name: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    if (1..=40).contains(&name.len()) && name.bytes().all(is_plain) {
        name.to_owned()
    } else {
        "(not shown)".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> AmqpUrl {
        AmqpUrl::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn parts(text: &str) -> (String, u16, String, String, String) {
        let url = parse(text);
        let own = str::to_owned;
        (own(url.host()), url.port(), own(url.user()), own(url.password().expose()), own(url.vhost()))
    }

    #[test]
    fn defaults() {
        for text in ["amqp://", "amqp:///", "amqp://localhost", "amqp://guest:guest@localhost:5672/%2f", "AMQP:///%2F"]
        {
            let url = parse(text);
            assert_eq!(url.to_string(), "amqp://guest:***@localhost:5672/%2f", "{text}");
            assert_eq!(parts(text).3, "guest");
            assert_eq!((url.heartbeat(), url.connect_timeout()), (None, None));
        }
    }

    /// The examples of appendix A of RabbitMQ's URI specification, but for the empty virtual host.
    #[test]
    fn examples_of_the_specification() {
        let table = [
            ("amqp://user:pass@host:10000/vhost", ("host", 10000, "user", "pass", "vhost")),
            ("amqp://user%61:%61pass@ho%61st:10000/v%2fhost", ("hoast", 10000, "usera", "apass", "v/host")),
            ("amqp://:@/", ("localhost", 5672, "", "", "/")),
            ("amqp://user@", ("localhost", 5672, "user", "guest", "/")),
            ("amqp://user:pass@", ("localhost", 5672, "user", "pass", "/")),
            ("amqp://host", ("host", 5672, "guest", "guest", "/")),
            ("amqp://:10000", ("localhost", 10000, "guest", "guest", "/")),
            ("amqp:///vhost", ("localhost", 5672, "guest", "guest", "vhost")),
            ("amqp://host/", ("host", 5672, "guest", "guest", "/")),
            ("amqp://host/%2f", ("host", 5672, "guest", "guest", "/")),
            ("amqp://[::1]", ("::1", 5672, "guest", "guest", "/")),
        ];
        for (text, (host, port, user, password, vhost)) in table {
            let (h, p, u, pw, v) = parts(text);
            assert_eq!((&*h, p, &*u, &*pw, &*v), (host, port, user, password, vhost), "{text}");
        }
    }

    #[test]
    #[cfg(feature = "embedded")]
    fn embedded_brokers_have_a_name_and_no_port() {
        let url = parse("memory://");
        assert_eq!((url.endpoint().memory_name(), url.port(), url.vhost()), (Some("default"), 0, "/"));
        assert_eq!(url.to_string(), "memory://default/%2f");
        let url = parse("memory://u:hunter2@a-b_1.~/v?heartbeat=5");
        assert_eq!((url.endpoint().memory_name(), url.user(), url.vhost()), (Some("a-b_1.~"), "u", "v"));
        assert_eq!(url.to_string(), "memory://a-b_1.~/v?heartbeat=5");
        assert_eq!(AmqpUrl::parse("memory://a:1").unwrap_err(), UrlError::MemoryName);
        assert_eq!(AmqpUrl::parse("memory://[::1]").unwrap_err(), UrlError::MemoryName);
        assert_eq!(Endpoint::new("a", 1).memory_name(), None);
    }

    #[test]
    fn decodes_every_part() {
        let (_, _, user, password, vhost) = parts("amqp://j%c3%bcrg:p%40s%3a%2f%25%23%3F@h/caf%C3%A9%2fx");
        assert_eq!((&*user, &*password, &*vhost), ("jürg", "p@s:/%#?", "café/x"));
    }

    #[test]
    fn shown_urls_read_back_and_mask() {
        let url = parse("amqp://j%c3%bcrg:hunter2@[fe80::1%25eth0]:1/a%2fb?connection_timeout=1500&heartbeat=7");
        assert_eq!(
            url.to_string(),
            "amqp://j%c3%bcrg:***@[fe80::1%25eth0]:1/a%2fb?heartbeat=7&connection_timeout=1500"
        );
        assert_eq!(url.host(), "fe80::1%eth0");
        assert_eq!(parse(&url.to_string()).to_string(), url.to_string());
        assert!(!format!("{url:?} {url:#?}").contains("hunter2"));
        assert_eq!(url.heartbeat(), Some(Duration::from_secs(7)));
        assert_eq!(url.connect_timeout(), Some(Duration::from_millis(1500)));
        assert_eq!(format!("{:?}", parse("amqp://")), "AmqpUrl(amqp://guest:***@localhost:5672/%2f)");
        let only_one = parse("amqp://h?connection_timeout=5");
        assert_eq!(only_one.to_string(), "amqp://guest:***@h:5672/%2f?connection_timeout=5");
    }

    #[test]
    fn mistakes_are_named_and_never_quoted() {
        use UrlError::*;
        let long_vhost = format!("amqp://u:hunter2@h/{}", "v".repeat(256));
        let table = [
            ("", Scheme),
            ("hunter2", Scheme),
            ("amqp:u:hunter2@h", Scheme),
            ("u:hunter2@h:5672", Scheme),
            ("http://u:hunter2@h", Scheme),
            ("amqps://u:hunter2@h", Tls),
            (" amqp://u:hunter2@h", Scheme),
            ("amqp://u:hunter2@h ", Blank),
            ("amqp://u:hun\tter2@h", Blank),
            ("amqp://u:hunter2#x@h", Fragment),
            ("amqp://u:hunter2/x@h", At),
            ("amqp://u:1/hunter2@h", At),
            ("amqp://u:1?hunter2@h", At),
            ("amqp://u:x@hunter2@h", At),
            ("amqp://u:hunter2@h/a@b", At),
            ("amqp://u:hunter2/h", Port),
            ("amqp://u:hunter2@h:0", Port),
            ("amqp://u:hunter2@h:65536", Port),
            ("amqp://u:hunter2@h:+1", Port),
            ("amqp://u:hunter2@h:", Port),
            ("amqp://u:hunter2@[::1]x", Port),
            ("amqp://u:hunter2@::1", Port),
            ("amqp://u:hunter2@[::g]", Host),
            ("amqp://u:hunter2@[::1%25]", Host),
            ("amqp://u:hunter2@h]", Host),
            ("amqp://u:hunter2@[h", Host),
            ("amqp://u:hunter2@a,b", Host),
            ("amqp://u:hunter2@%20", Host),
            ("amqp://u:hunter2%@h", Escape { part: "password" }),
            ("amqp://%zz:hunter2@h", Escape { part: "user" }),
            ("amqp://u:hunter2@h/%f", Escape { part: "virtual host" }),
            ("amqp://u:hunter2@h?a=%", Escape { part: "query" }),
            ("amqp://u:hunter2%ff@h", NotUtf8 { part: "password" }),
            ("amqp://u:hunter2@%ff", NotUtf8 { part: "host" }),
            ("amqp://u:hunter2%00@h", Nul { part: "password" }),
            ("amqp://u:hunter2@h/a/b", Path),
            ("amqp://u:hunter2@h/a/", Path),
            (&long_vhost, LongVhost),
            ("amqp://u:hunter2@h?verify=none", UnknownParameter { name: "verify".into() }),
            ("amqp://h?hunter2%20", UnknownParameter { name: "(not shown)".into() }),
            ("amqp://u:hunter2@h?heartbeat=1&heartbeat=2", RepeatedParameter { name: "heartbeat" }),
            ("amqp://u:hunter2@h?heartbeat=0", Heartbeat),
            ("amqp://u:hunter2@h?heartbeat=65536", Heartbeat),
            ("amqp://u:hunter2@h?heartbeat", Heartbeat),
            ("amqp://u:hunter2@h?heartbeat=10s", Heartbeat),
            ("amqp://u:hunter2@h?connection_timeout=0", ConnectionTimeout),
            ("amqp://u:hunter2@h?connection_timeout=86400001", ConnectionTimeout),
        ];
        for (text, expected) in table {
            let error = AmqpUrl::parse(text).expect_err(text);
            assert_eq!(error, expected, "{text}");
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{text}: {error:?}");
        }
    }

    #[test]
    fn endpoints() {
        let table = [("a:1", "a", 1), ("a", "a", 5672), ("10.0.0.1:5", "10.0.0.1", 5), ("[::1]:65535", "::1", 65535)];
        for (text, host, port) in table {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!(endpoint, Endpoint::new(host, port), "{text}");
            assert_eq!(endpoint.to_string().parse::<Endpoint>().unwrap(), endpoint);
        }
        assert_eq!(Endpoint::new("::1", 5672).to_string(), "[::1]:5672");
        for text in ["", ":1", "a:", "a:0", "a:x", "::1", "a b", "[::1", "u:hunter2@a:1", "amqp://a", "a/hunter2"] {
            let error = text.parse::<Endpoint>().expect_err(text);
            assert!(!format!("{error} {error:?}").contains("hunter2"), "{text}: {error:?}");
        }
    }

    #[test]
    fn secrets_do_not_show() {
        let secret = Secret::from("hunter2");
        assert_eq!((format!("{secret:?} {secret:#?}"), secret.expose()), ("*** ***".to_owned(), "hunter2"));
    }
}
