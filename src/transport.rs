//! Opens connections: resolves, dials, shakes hands, all within one deadline.
//!
//! The one place that builds an [`amiquip::Connection`]. Name resolution and dialling cannot be cut short by a socket
//! that is not there yet, so they carry their own limits; from the socket on, the watchdog holds the deadline.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::thread::Builder;
use std::time::{Duration, Instant};

use amiquip::{Auth, ConnectionOptions, ConnectionTuning};

use crate::deadline::Watchdog;
use crate::error::ConnectError;
use crate::greeting::Greeting;
use crate::guard::GuardedStream;
use crate::settings::BrokerSettings;
#[cfg(feature = "tls")]
use crate::tls::{self, TlsStream};
use crate::url::Endpoint;
#[cfg(not(feature = "embedded"))]
use crate::url::UrlError;
use crate::wire::{Loss, Wire};
use crate::writer::Writer;

/// RabbitMQ's own default, in bytes. A broker that offers less gets less.
pub(crate) const FRAME_MAX: u32 = 131_072;

/// Bytes that may wait to be written before the channels of a connection are held back, and when they go on. amiquip
/// goes on at 0 by default, which leaves acks waiting behind the last byte of a large message.
const WRITES_HIGH_WATER: usize = 16 << 20;
const WRITES_LOW_WATER: usize = 8 << 20;

/// Requests that one channel may have waiting for the I/O thread. A publish is three; amiquip's 16 makes a pipelining
/// publisher and the I/O thread hand the processor to each other every five messages.
const REQUESTS_PER_CHANNEL: usize = 96;

/// What goes to and from the broker, below the frame guard.
pub(crate) enum Socket {
    Plain(mio::net::TcpStream),
    #[cfg(feature = "tls")]
    Tls(Box<TlsStream<mio::net::TcpStream>>),
}

impl Socket {
    /// What is polled.
    pub(crate) fn evented(&self) -> &mio::net::TcpStream {
        match self {
            Socket::Plain(socket) => socket,
            #[cfg(feature = "tls")]
            Socket::Tls(stream) => stream.socket(),
        }
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Plain(socket) => socket.read(buffer),
            #[cfg(feature = "tls")]
            Socket::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Plain(socket) => socket.write(buffer),
            #[cfg(feature = "tls")]
            Socket::Tls(stream) => stream.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Socket::Plain(socket) => socket.flush(),
            #[cfg(feature = "tls")]
            Socket::Tls(stream) => stream.flush(),
        }
    }
}

/// A connection whose handshake is done.
pub(crate) struct Opened {
    pub(crate) connection: amiquip::Connection,
    pub(crate) wire: Arc<Wire>,
    pub(crate) writer: Arc<Writer>,
}

/// Opens a connection named `name` to the first endpoint that gives one, in shuffled order.
pub(crate) fn open(
    broker: &BrokerSettings,
    name: &str,
    deadline: Instant,
    watchdog: &Watchdog,
) -> Result<Opened, ConnectError> {
    let start = Instant::now();
    let mut endpoints: Vec<&Endpoint> = broker.endpoints.iter().collect();
    fastrand::shuffle(&mut endpoints);
    let mut cause = None;
    for (tried, endpoint) in endpoints.iter().enumerate() {
        // One silent host must not use up the time of the others.
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / (endpoints.len() - tried) as u32;
        if share.is_zero() {
            break;
        }
        match open_endpoint(broker, endpoint, name, Instant::now() + share, watchdog) {
            Ok(opened) => return Ok(opened),
            Err(error) => {
                log::debug!("{name}: no connection to {endpoint}: {error}");
                let fatal = !error.is_transient();
                cause = Some(error);
                if fatal {
                    break;
                }
            }
        }
    }
    Err(cause.unwrap_or(ConnectError::Timeout { stage: "before the first attempt", after: start.elapsed() }))
}

fn open_endpoint(
    broker: &BrokerSettings,
    endpoint: &Endpoint,
    name: &str,
    deadline: Instant,
    watchdog: &Watchdog,
) -> Result<Opened, ConnectError> {
    let socket = match endpoint.memory_name() {
        Some(name) => dial(&embedded_endpoint(name)?, deadline)?,
        None => dial(endpoint, deadline)?,
    };
    let io_error = |error| ConnectError::Io(Arc::new(error));
    socket.set_nodelay(true).map_err(io_error)?;
    let wire = Arc::new(Wire::new(socket.try_clone().map_err(io_error)?));
    let writer = Arc::new(Writer::new(Greeting::new(name), Arc::clone(&wire), broker.tls.is_none()));

    let start = Instant::now();
    let mut stage = if broker.tls.is_some() { "TLS handshake" } else { "AMQP handshake" };
    let armed = watchdog.arm(deadline, &wire);
    let opened = secure(socket, broker, endpoint).and_then(|socket| {
        stage = "AMQP handshake";
        shake_hands(socket, &wire, &writer, broker)
    });
    if armed.disarm() {
        return Err(ConnectError::Timeout { stage, after: start.elapsed() });
    }
    Ok(Opened { connection: opened?, wire, writer })
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
    #[cfg(feature = "tls")]
    if let Some(settings) = &broker.tls {
        let mut socket = socket;
        let session = tls::shake_hands(&mut socket, &endpoint.host, settings)?;
        return Ok(Socket::Tls(Box::new(TlsStream::new(session, pollable(socket)?))));
    }
    pollable(socket).map(Socket::Plain)
}

/// Makes the socket one that amiquip can poll.
fn pollable(socket: TcpStream) -> Result<mio::net::TcpStream, ConnectError> {
    mio::net::TcpStream::from_stream(socket).map_err(|error| ConnectError::Io(Arc::new(error)))
}

fn shake_hands(
    socket: Socket,
    wire: &Arc<Wire>,
    writer: &Arc<Writer>,
    broker: &BrokerSettings,
) -> Result<amiquip::Connection, ConnectError> {
    let start = Instant::now();
    let stream = GuardedStream::new(socket, Arc::clone(wire), Arc::clone(writer), broker.max_message_size);

    let heartbeat = u16::try_from(broker.heartbeat.as_secs()).unwrap_or(u16::MAX).max(1);
    let options = ConnectionOptions::<Auth>::default()
        .auth(Auth::Plain { username: broker.user.clone(), password: broker.password.expose().to_owned() })
        .virtual_host(broker.vhost.as_str())
        .heartbeat(heartbeat)
        .frame_max(FRAME_MAX);
    let tuning = ConnectionTuning::default()
        .mem_channel_bound(REQUESTS_PER_CHANNEL)
        .buffered_writes_high_water(WRITES_HIGH_WATER)
        .buffered_writes_low_water(WRITES_LOW_WATER);

    amiquip::Connection::insecure_open_stream(stream, options, tuning)
        .map_err(|error| refusal(&error, wire, broker, start.elapsed()))
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
    match error {
        amiquip::Error::InvalidCredentials => ConnectError::Handshake(format!(
            "the broker closed the socket {after:.1?} into the handshake, after the credentials were sent; a broker \
             that gives no reasons does so when it refuses them"
        )),
        other => match wire.loss() {
            Some(Loss::Tls(text)) => ConnectError::Tls(text),
            Some(Loss::Other(text)) => ConnectError::Handshake(text),
            None => ConnectError::Handshake(other.to_string()),
        },
    }
}
