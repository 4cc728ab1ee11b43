//! Opens connections: resolves, dials, shakes hands, all within one deadline.
//!
//! The one place that builds an [`amiquip::Connection`]. Name resolution and dialling cannot be cut short by a socket
//! that is not there yet, so they carry their own limits; from the socket on, the watchdog holds the deadline.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::thread::Builder;
use std::time::{Duration, Instant};

use amiquip::{Auth, ConnectionOptions, ConnectionTuning};

use super::control::{Control, ControlStream};
use super::core::{Core, FRAME_MAX};
use super::handshake::Introduction;
use super::idle::IdleReader;
use super::socket::Socket;
#[cfg(feature = "tls")]
use super::tls;
use super::watchdog::Watchdog;
use super::wire::{Loss, Wire};
use crate::error::ConnectError;
use crate::settings::BrokerSettings;
use crate::url::Endpoint;
#[cfg(not(feature = "embedded"))]
use crate::url::UrlError;

/// A connection whose handshake is done.
pub(crate) struct Opened {
    pub(super) connection: amiquip::Connection,
    pub(super) core: Arc<Core>,
}

/// Opens a connection named `name` to the first endpoint that gives one, in shuffled order.
pub(crate) fn open(
    broker: &BrokerSettings,
    name: &str,
    deadline: Instant,
    watchdog: &Watchdog,
    idle: &IdleReader,
) -> Result<Opened, ConnectError> {
    let start = Instant::now();
    let broker = &*broker.with_password()?;
    let mut endpoints: Vec<&Endpoint> = broker.endpoints.iter().collect();
    fastrand::shuffle(&mut endpoints);
    let mut failed: Vec<(String, ConnectError)> = Vec::new();
    for (tried, endpoint) in endpoints.iter().enumerate() {
        // One silent host must not use up the time of the others.
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / (endpoints.len() - tried) as u32;
        if share.is_zero() {
            break;
        }
        match open_endpoint(broker, endpoint, name, Instant::now() + share, watchdog, idle) {
            Ok(opened) => return Ok(opened),
            Err(error) => {
                log::debug!("{name}: no connection to {endpoint}: {error}");
                // Also after a refusal: another node may have another list of users, or know of a virtual host.
                failed.push((endpoint.to_string(), error));
            }
        }
    }
    if failed.len() > 1 && failed.iter().any(|(_, error)| !error.is_transient()) {
        return Err(ConnectError::Hosts(failed));
    }
    let last = failed.pop().map(|(_, error)| error);
    Err(last.unwrap_or(ConnectError::Timeout { stage: "before the first attempt", after: start.elapsed() }))
}

fn open_endpoint(
    broker: &BrokerSettings,
    endpoint: &Endpoint,
    name: &str,
    deadline: Instant,
    watchdog: &Watchdog,
    idle: &IdleReader,
) -> Result<Opened, ConnectError> {
    let socket = match endpoint.memory_name() {
        Some(name) => dial(&embedded_endpoint(name)?, deadline)?,
        None => dial(endpoint, deadline)?,
    };
    let io_error = |error| ConnectError::Io(Arc::new(error));
    socket.set_nodelay(true).map_err(io_error)?;
    let wire = Arc::new(Wire::new(socket.try_clone().map_err(io_error)?));

    let start = Instant::now();
    let mut stage = if broker.tls.is_some() { "TLS handshake" } else { "AMQP handshake" };
    let armed = watchdog.arm(deadline, &wire);
    let opened = secure(socket, broker, endpoint).and_then(|socket| {
        stage = "AMQP handshake";
        shake_hands(socket, &wire, name, broker, idle)
    });
    if armed.disarm() {
        return Err(ConnectError::Timeout { stage, after: start.elapsed() });
    }
    opened
}

/// The difference between an embedded broker and any other ends here: it is asked for its address.
#[cfg(feature = "embedded")]
fn embedded_endpoint(name: &str) -> Result<Endpoint, ConnectError> {
    let broker = crate::embedded::named(name).map_err(|error| ConnectError::Embedded(Arc::new(error)))?;
    Ok(Endpoint::new(broker.addr().ip().to_string(), broker.addr().port()))
}

#[cfg(not(feature = "embedded"))]
fn embedded_endpoint(_: &str) -> Result<Endpoint, ConnectError> {
    Err(ConnectError::Io(Arc::new(io::Error::new(io::ErrorKind::Unsupported, UrlError::NoMemory))))
}

fn dial(endpoint: &Endpoint, deadline: Instant) -> Result<TcpStream, ConnectError> {
    let start = Instant::now();
    let addresses = resolve(endpoint, deadline)?;
    let mut cause = ConnectError::Resolve(Arc::new(io::Error::new(io::ErrorKind::NotFound, "it has no addresses")));
    for (tried, address) in addresses.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / (addresses.len() - tried) as u32;
        if share.is_zero() {
            return Err(ConnectError::Timeout { stage: "TCP connect", after: start.elapsed() });
        }
        match TcpStream::connect_timeout(address, share) {
            Ok(socket) => return Ok(socket),
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                cause = ConnectError::Timeout { stage: "TCP connect", after: share };
            }
            Err(error) => cause = ConnectError::Io(Arc::new(error)),
        }
    }
    Err(cause)
}

fn resolve(endpoint: &Endpoint, deadline: Instant) -> Result<Vec<SocketAddr>, ConnectError> {
    if let Ok(address) = endpoint.host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, endpoint.port)]);
    }
    // The system's resolver knows no deadline. On a thread of its own it keeps only that thread waiting.
    let (answer, answered) = crossbeam_channel::bounded(1);
    let name = (endpoint.host.clone(), endpoint.port);
    Builder::new()
        .name("coney-resolve".to_owned())
        .spawn(move || {
            let addresses = name.to_socket_addrs().map(Iterator::collect);
            // Nobody waits any more once the deadline has passed.
            let _ = answer.send(addresses);
        })
        .map_err(|error| ConnectError::Io(Arc::new(error)))?;
    let start = Instant::now();
    match answered.recv_deadline(deadline) {
        Ok(Ok(addresses)) => Ok(addresses),
        Ok(Err(error)) => Err(ConnectError::Resolve(Arc::new(error))),
        Err(_) => Err(ConnectError::Timeout { stage: "name resolution", after: start.elapsed() }),
    }
}

/// Puts TLS on the socket if that is wanted. Without the feature, settings that want it have been refused.
#[cfg_attr(not(feature = "tls"), expect(unused_variables, reason = "all it asks is what TLS there is to be"))]
fn secure(socket: TcpStream, broker: &BrokerSettings, endpoint: &Endpoint) -> Result<Socket, ConnectError> {
    let io_error = |error| ConnectError::Io(Arc::new(error));
    #[cfg(feature = "tls")]
    if let Some(settings) = &broker.tls {
        let mut socket = socket;
        let session = tls::shake_hands(&mut socket, &endpoint.host, settings)?;
        return Socket::tls(socket, session).map_err(io_error);
    }
    Socket::plain(socket).map_err(io_error)
}

fn shake_hands(
    socket: Socket,
    wire: &Arc<Wire>,
    name: &str,
    broker: &BrokerSettings,
    idle: &IdleReader,
) -> Result<Opened, ConnectError> {
    let start = Instant::now();
    let (control, registration) = Control::new(Introduction::new(name, broker));
    let core =
        Arc::new(Core::new(Arc::clone(wire), socket, control, Arc::clone(idle.shared()), broker.max_message_size));
    core.control.begin();
    let stream = ControlStream::new(Arc::clone(&core), registration);
    // What it logs in with is replaced on its way, so it need not know the password, and cannot log it.
    let options = ConnectionOptions::<Auth>::default()
        .auth(Auth::Plain { username: String::new(), password: String::new() })
        .virtual_host(broker.vhost.as_str())
        .frame_max(FRAME_MAX);
    idle.shared().join(Arc::clone(&core));
    let connection =
        core.control_call(|| amiquip::Connection::insecure_open_stream(stream, options, ConnectionTuning::default()));
    match connection {
        Ok(connection) => Ok(Opened { connection, core }),
        Err(error) => {
            let refusal = refusal(&error, wire, broker, start.elapsed());
            wire.cut("its handshake failed");
            Err(refusal)
        }
    }
}

/// Why a handshake failed: the broker's words if it said any, for amiquip calls every failure after `start-ok` a
/// failure of the credentials.
fn refusal(error: &amiquip::Error, wire: &Wire, broker: &BrokerSettings, after: Duration) -> ConnectError {
    if let Some(reason) = wire.close_reason() {
        return match reason.code {
            403 => ConnectError::AccessRefused { user: broker.user.clone(), text: reason.text },
            code => ConnectError::Closed { code, text: reason.text },
        };
    }
    match wire.loss() {
        Some(Loss::Tls(text)) => ConnectError::Tls(text),
        Some(Loss::Mechanism(text)) => ConnectError::Mechanism(text),
        // amiquip knows best why it has given up, but for this: it says so of every failure after `start-ok`.
        Some(Loss::GivenUp) | None => ConnectError::Handshake(error.to_string()),
        Some(Loss::EndOfStream) if matches!(error, amiquip::Error::InvalidCredentials) => {
            ConnectError::Handshake(format!(
                "the broker closed the socket {after:.1?} into the handshake, after the credentials were sent; a broker \
                 that gives no reasons does so when it refuses them"
            ))
        }
        Some(Loss::EndOfStream) => ConnectError::Handshake("the broker closed the socket".to_owned()),
        Some(Loss::Other(text)) => ConnectError::Handshake(text),
    }
}
