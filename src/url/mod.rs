//! `amqp://`, `amqps://` and `memory://` URLs, and the two things they are made of that settings name by themselves: [`Endpoint`] and
//! [`Secret`].
//!
//! The form is RabbitMQ's URI specification, <https://www.rabbitmq.com/docs/uri-spec>, with two of the parameters of
//! <https://www.rabbitmq.com/docs/uri-query-parameters>. No error in here quotes the text it is about, because that
//! text may hold a password.

mod auth;
mod endpoint;
mod error;
mod secret;
#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use percent_encoding::percent_decode_str;

pub use self::auth::AuthMechanism;
pub use self::endpoint::Endpoint;
pub(crate) use self::endpoint::{default_port, host_and_port};
use self::endpoint::{is_host_byte, parse_address};
pub use self::error::UrlError;
pub use self::secret::Secret;

/// The embedded broker that `memory://` means.
const DEFAULT_MEMORY: &str = "default";
const DEFAULT_USER: &str = "guest";
const DEFAULT_PASSWORD: &str = "guest";
const DEFAULT_VHOST: &str = "/";
/// A virtual host is a short string on the wire, whose length is one octet (AMQP 0-9-1, section 4.2.5.3).
const MAX_VHOST: usize = 255;
/// The heartbeat is negotiated in seconds, as a 16-bit number (AMQP 0-9-1, `connection.tune`). 0 would mean none.
const HEARTBEAT_SECONDS: RangeInclusive<u64> = 1..=65_535;
/// Up to a day, like every other duration in the settings.
const CONNECTION_TIMEOUT_MS: RangeInclusive<u64> = 1..=86_400_000;

/// A broker's URL: `amqp://user:password@host:port/vhost?heartbeat=10&connection_timeout=5000`.
///
/// Every part but the scheme may be left out; the defaults are `amqp://guest:guest@localhost:5672/%2f`. `amqps://` means
/// TLS, and port 5671. Display and Debug mask the password.
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
    tls: bool,
    user: String,
    password: Secret,
    vhost: String,
    parameters: Parameters,
    written: Written,
}

/// What stands behind the `?`.
#[derive(Debug, Clone, Copy, Default)]
struct Parameters {
    heartbeat: Option<Duration>,
    connect_timeout: Option<Duration>,
    auth: Option<AuthMechanism>,
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
    /// 86400000; `auth_mechanism` is `plain`, `amqplain` or `external`.
    ///
    /// # Errors
    ///
    /// What is wrong with it, without quoting it.
    pub fn parse(text: &str) -> Result<AmqpUrl, UrlError> {
        let (scheme, rest) = after_scheme(text)?;
        let tls = scheme == Scheme::Amqps;
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
        let parameters = parse_query(query)?;
        Ok(AmqpUrl {
            endpoint: match scheme {
                Scheme::Memory => parse_memory(address)?,
                Scheme::Amqp | Scheme::Amqps => parse_address(address, tls)?,
            },
            tls,
            user: user.map_or(Ok(DEFAULT_USER.to_owned()), |user| decode_credential(user, "user"))?,
            password: password
                .map_or(Ok(DEFAULT_PASSWORD.to_owned()), |password| decode_credential(password, "password"))?
                .into(),
            vhost: parse_vhost(path)?,
            parameters,
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

    /// Whether it begins with `amqps://`.
    pub fn is_tls(&self) -> bool {
        self.tls
    }

    /// The TCP port. Defaults to 5672, with TLS to 5671.
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
        self.parameters.heartbeat
    }

    /// What the parameter `connection_timeout` says, if it is there.
    pub fn connect_timeout(&self) -> Option<Duration> {
        self.parameters.connect_timeout
    }

    /// What the parameter `auth_mechanism` says, if it is there.
    pub fn auth(&self) -> Option<AuthMechanism> {
        self.parameters.auth
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
        f.write_str(&masked(self.tls, self.user(), std::slice::from_ref(&self.endpoint), self.vhost()))?;
        let Parameters { heartbeat, connect_timeout, auth } = self.parameters;
        let heartbeat = heartbeat.map(|heartbeat| format!("heartbeat={}", heartbeat.as_secs()));
        let timeout = connect_timeout.map(|timeout| format!("connection_timeout={}", timeout.as_millis()));
        let auth = auth.map(|auth| format!("auth_mechanism={}", auth.name().to_ascii_lowercase()));
        for (parameter, separator) in [heartbeat, timeout, auth].into_iter().flatten().zip(['?', '&', '&']) {
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

/// A broker as a URL to show to people.
pub(crate) fn masked(tls: bool, user: &str, endpoints: &[Endpoint], vhost: &str) -> String {
    if let [only] = endpoints
        && only.memory_name().is_some()
    {
        return format!("{only}/{}", encode(vhost));
    }
    // In a URL the % before the interface of a link-local address is an escape like any other.
    let endpoints: Vec<String> = endpoints.iter().map(|endpoint| endpoint.to_string().replace('%', "%25")).collect();
    let scheme = if tls { "amqps" } else { "amqp" };
    format!("{scheme}://{}:***@{}/{}", encode(user), endpoints.join(","), encode(vhost))
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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scheme {
    Amqp,
    Amqps,
    Memory,
}

/// The scheme, and what comes after it.
fn after_scheme(text: &str) -> Result<(Scheme, &str), UrlError> {
    let (scheme, rest) = text.split_once("://").ok_or(UrlError::Scheme)?;
    match scheme.to_ascii_lowercase().as_str() {
        "amqp" => Ok((Scheme::Amqp, rest)),
        "amqps" if cfg!(feature = "tls") => Ok((Scheme::Amqps, rest)),
        "amqps" => Err(UrlError::NoTls),
        "memory" if cfg!(feature = "embedded") => Ok((Scheme::Memory, rest)),
        "memory" => Err(UrlError::NoMemory),
        _ => Err(UrlError::Scheme),
    }
}

fn parse_memory(name: &str) -> Result<Endpoint, UrlError> {
    match name {
        "" => Ok(Endpoint::memory(DEFAULT_MEMORY)),
        name if name.bytes().all(is_host_byte) => Ok(Endpoint::memory(name)),
        _ => Err(UrlError::MemoryName),
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

fn parse_query(query: &str) -> Result<Parameters, UrlError> {
    let mut parameters = Parameters::default();
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        let value = decode(value, "query")?;
        let (name, is_repeated) = match decode(name, "query")?.as_str() {
            "heartbeat" => {
                let seconds = number_within(&value, HEARTBEAT_SECONDS).ok_or(UrlError::Heartbeat)?;
                ("heartbeat", parameters.heartbeat.replace(Duration::from_secs(seconds)).is_some())
            }
            "connection_timeout" => {
                let millis = number_within(&value, CONNECTION_TIMEOUT_MS).ok_or(UrlError::ConnectionTimeout)?;
                ("connection_timeout", parameters.connect_timeout.replace(Duration::from_millis(millis)).is_some())
            }
            "auth_mechanism" => {
                let auth = AuthMechanism::parse(&value).map_err(|_| UrlError::AuthMechanism)?;
                ("auth_mechanism", parameters.auth.replace(auth).is_some())
            }
            unknown => return Err(UrlError::UnknownParameter { name: showable(unknown) }),
        };
        if is_repeated {
            return Err(UrlError::RepeatedParameter { name });
        }
    }
    Ok(parameters)
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
