//! Protocol header → start → tune → open: from an accepted socket to a client that may open channels.
//!
//! All of it has one deadline, and until it is over no frame may be larger than 4096 bytes. The reader's thread does it
//! alone; the outbox and the writer come after it.

use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::channel::{decode_method, unknown_frame};
use super::inbound::{Came, Inbound, described};
use super::limits::FRAME_MIN;
use super::refusal::Refusal;
use super::server::Broker;
use super::session::linger;
use super::users::User;
use super::vhost::VHost;
use crate::amqp::cursor::{Field, Reader, Writer};
use crate::amqp::frame::{self, PROTOCOL_HEADER};
use crate::amqp::method::*;
use crate::amqp::value::{Table, Value};

/// RabbitMQ lets a client that cannot be told why it is refused wait, so that passwords are not tried quickly.
const SILENT_CLOSE_DELAY: Duration = Duration::from_secs(3);

/// What RabbitMQ can do beyond the specification, all of which this broker does too.
const CAPABILITIES: [&str; 9] = [
    "publisher_confirms",
    "exchange_exchange_bindings",
    "basic.nack",
    "consumer_cancel_notify",
    "connection.blocked",
    "consumer_priorities",
    "authentication_failure_close",
    "per_consumer_qos",
    "direct_reply_to",
];

/// A client that has logged in and opened a virtual host. `open-ok` has not been said yet.
pub(super) struct Guest {
    pub(super) user: Arc<User>,
    pub(super) host: Arc<VHost>,
    pub(super) properties: Table,
    pub(super) tuned: ConnectionTuneOk,
}

/// Why there is no client.
enum End {
    /// The socket has ended, or the time is over: nothing more to say.
    Gone,
    /// The client has closed by the protocol.
    Closed,
    Refused(Refusal),
    /// A wrong password from a client that does not know that a broker may say so.
    RefusedSilently,
}

impl From<Refusal> for End {
    fn from(refusal: Refusal) -> End {
        End::Refused(refusal)
    }
}

struct Handshake<'a> {
    broker: &'a Broker,
    socket: &'a TcpStream,
    inbound: &'a mut Inbound,
    deadline: Instant,
    /// As RabbitMQ calls it in its errors.
    stage: &'static str,
    /// How long a client that was refused has to end the socket.
    linger: Duration,
}

/// Receives a client. `None` if there is nobody to go on with; what there was to say has then been said.
pub(super) fn receive(broker: &Broker, socket: &TcpStream, inbound: &mut Inbound) -> Option<Guest> {
    let deadline = crate::deadline::after(broker.limits.handshake);
    let mut handshake = Handshake { broker, socket, inbound, deadline, stage: "starting", linger: SILENT_CLOSE_DELAY };
    let refusal = match handshake.run() {
        Ok(guest) => return Some(guest),
        Err(End::Gone) => return None,
        Err(End::Closed) => {
            handshake.say(ConnectionCloseOk {}).ok();
            handshake.await_close_ok();
            return None;
        }
        Err(End::RefusedSilently) => {
            // Woken early by the end of the broker or of the client.
            handshake.inbound.drain(SILENT_CLOSE_DELAY.min(deadline.saturating_duration_since(Instant::now())));
            return None;
        }
        Err(End::Refused(refusal)) => refusal,
    };
    handshake
        .say(ConnectionClose {
            reply_code: refusal.code,
            reply_text: refusal.text.into(),
            class_id: refusal.class_id,
            method_id: refusal.method_id,
        })
        .ok();
    // Closing the socket at once could reach the client before it has read why.
    handshake.await_close_ok();
    None
}

impl Handshake<'_> {
    /// Waits until the client ends the socket, says `close-ok`, or its time is up.
    fn await_close_ok(&mut self) {
        let until = Instant::now() + self.linger;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let heard = self.inbound.frame().map(|heard| heard.map(|(frame, len)| (decode_method(&frame).ok(), len)));
            match heard {
                Ok(Some((Some(Method::ConnectionCloseOk(_)), _))) => return,
                Ok(Some((method, len))) => {
                    self.inbound.consume(len);
                    if let Some(Method::ConnectionClose(_)) = method
                        && self.say(ConnectionCloseOk {}).is_err()
                    {
                        return;
                    }
                }
                Ok(None) => {
                    if left.is_zero() || self.inbound.read(Some(left)) == Came::End {
                        return;
                    }
                }
                // What comes is no protocol any more.
                Err(_) => return self.inbound.drain(left),
            }
        }
    }

    fn run(&mut self) -> Result<Guest, End> {
        let header: [u8; 8] = self.inbound.exactly(self.deadline).ok_or(End::Gone)?;
        // The second is the header of 0-9, which can be treated as 0-9-1.
        if header != PROTOCOL_HEADER && header != *b"AMQP\x01\x01\x00\x09" {
            self.write(&self.broker.limits.release.spoken_instead_of(header))?;
            return Err(End::Gone);
        }
        self.say(ConnectionStart {
            version_major: 0,
            version_minor: 9,
            server_properties: self.broker.properties(CAPABILITIES),
            mechanisms: b"PLAIN AMQPLAIN".to_vec(),
            locales: b"en_US".to_vec(),
        })?;
        let start_ok = match self.hear()? {
            Method::ConnectionStartOk(start_ok) => start_ok,
            other => return Err(self.out_of_turn(&other)),
        };
        let user = self.log_in(&start_ok)?;

        self.stage = "tuning";
        let limits = &self.broker.limits;
        self.say(ConnectionTune {
            channel_max: limits.channel_max,
            frame_max: limits.frame_max,
            heartbeat: limits.heartbeat,
        })?;
        let tuned = match self.hear()? {
            Method::ConnectionTuneOk(tune_ok) => self.tuned(&tune_ok)?,
            other => return Err(self.out_of_turn(&other)),
        };
        self.linger = linger(tuned.heartbeat);

        self.stage = "opening";
        let open = match self.hear()? {
            Method::ConnectionOpen(open) => open,
            other => return Err(self.out_of_turn(&other)),
        };
        let name = open.virtual_host.text();
        let by_open = |refusal: Refusal| refusal.by_method(ConnectionOpen::CLASS_ID, ConnectionOpen::METHOD_ID);
        let Some(host) = self.broker.vhosts.get(&*name) else {
            return Err(by_open(Refusal::not_allowed(format_args!("vhost {name} not found"))).into());
        };
        if !user.may_open(&name) {
            let user = &user.name;
            let text = format_args!("access to vhost '{name}' refused for user '{user}'");
            return Err(by_open(Refusal::not_allowed(text)).into());
        }
        if let Some(refusal) = self.broker.refusal_of_open() {
            return Err(by_open(refusal).into());
        }
        Ok(Guest { user, host: host.clone(), properties: start_ok.client_properties, tuned })
    }

    fn log_in(&self, start_ok: &ConnectionStartOk) -> Result<Arc<User>, End> {
        let mechanism = start_ok.mechanism.text();
        let credentials = match &*mechanism {
            "PLAIN" => plain(&start_ok.response),
            "AMQPLAIN" => amqplain(&start_ok.response),
            other => {
                let text = format_args!("unknown authentication mechanism '{other}'");
                return Err(Refusal::command_invalid(text).into());
            }
        };
        // RabbitMQ would repeat the response, with the password in it.
        let (name, password) = credentials.ok_or_else(|| Refusal::syntax_error("response <<...>> invalid"))?;
        let known = std::str::from_utf8(&name).ok().and_then(|name| self.broker.users.get(name));
        if let Some(user) = known.filter(|user| same(user.password.as_bytes(), &password)) {
            return Ok(user.clone());
        }
        log::info!(target: "coney", "embedded broker: a login by {mechanism} was refused");
        if !is_capable(&start_ok.client_properties, "authentication_failure_close") {
            return Err(End::RefusedSilently);
        }
        Err(End::Refused(Refusal::login_refused(format_args!(
            "Login was refused using authentication mechanism {mechanism}. For details see the broker logfile."
        ))))
    }

    /// Checks what the client has made of the offer.
    fn tuned(&self, tune_ok: &ConnectionTuneOk) -> Result<ConnectionTuneOk, Refusal> {
        let limits = &self.broker.limits;
        let check = |name, least: u32, most: u32, chosen: u32, unlimited| {
            let (than, bound) = if chosen != 0 && chosen < least {
                ("lower than the minimum", least)
            } else if most != 0 && (chosen == 0 || chosen > most) {
                ("higher than the maximum", most)
            } else {
                return Ok(());
            };
            let detail = if chosen == 0 { unlimited } else { "" };
            Err(Refusal::not_allowed(format_args!(
                "negotiated {name} = {chosen}{detail} is {than} allowed value ({bound})"
            ))
            .by_method(ConnectionTune::CLASS_ID, ConnectionTune::METHOD_ID))
        };
        check("frame_max", FRAME_MIN, limits.frame_max, tune_ok.frame_max, "")?;
        check("channel_max", 1, limits.channel_max.into(), tune_ok.channel_max.into(), " (no limit)")?;
        Ok(tune_ok.clone())
    }

    fn out_of_turn(&self, method: &Method) -> End {
        if matches!(method, Method::ConnectionClose(_)) {
            return End::Closed;
        }
        let text = format_args!("unexpected method in connection state {}", self.stage);
        Refusal::channel_error(text).by_method(method.class_id(), method.method_id()).into()
    }

    /// The next method on channel 0.
    fn hear(&mut self) -> Result<Method, End> {
        loop {
            let heard = match self.inbound.frame()? {
                None => None,
                Some((frame, len)) => Some((
                    match (frame.kind, frame.channel) {
                        (frame::METHOD, 0) => Some(decode_method(&frame)?),
                        (frame::HEARTBEAT, 0) => None,
                        (frame::METHOD | frame::HEADER | frame::BODY | frame::HEARTBEAT, _) => {
                            return Err(Refusal::unexpected_frame(described(&frame)).into());
                        }
                        _ => return Err(unknown_frame(&frame).into()),
                    },
                    len,
                )),
            };
            match heard {
                Some((method, len)) => {
                    self.inbound.consume(len);
                    if let Some(method) = method {
                        return Ok(method);
                    }
                }
                None => {
                    let left = self.deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() || self.inbound.read(Some(left)) == Came::End {
                        return Err(End::Gone);
                    }
                }
            }
        }
    }

    fn say(&self, method: impl Into<Method>) -> Result<(), End> {
        let mut bytes = Vec::new();
        frame::write_method(&mut bytes, 0, &method.into());
        self.write(&bytes)
    }

    /// Writes what is small enough for any socket's buffer, unless the client had it filled: then it is given up.
    fn write(&self, bytes: &[u8]) -> Result<(), End> {
        let mut socket = self.socket;
        socket.write_all(bytes).map_err(|_| End::Gone)
    }
}

/// Whether the client says that it knows this extension.
pub(super) fn is_capable(properties: &Table, capability: &str) -> bool {
    match properties.get("capabilities") {
        Some(Value::Table(capabilities)) => capabilities.get(capability) == Some(&Value::Bool(true)),
        _ => false,
    }
}

/// NUL, user, NUL, password: as RabbitMQ, with nobody to act for in front.
fn plain(response: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut parts = response.strip_prefix(&[0])?.split(|&byte| byte == 0).map(<[u8]>::to_vec);
    let credentials = (parts.next()?, parts.next()?);
    parts.next().is_none().then_some(credentials)
}

/// A table without its length, with LOGIN and PASSWORD in it.
fn amqplain(response: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut sized = Vec::with_capacity(response.len() + 4);
    Writer::new(&mut sized).long(response);
    let table = Table::read(&mut Reader::new(&sized)).ok()?;
    let text = |name| match table.get(name) {
        Some(Value::LongString(bytes)) => Some(bytes.clone()),
        _ => None,
    };
    Some((text("LOGIN")?, text("PASSWORD")?))
}

/// Compares without telling by the time it takes where the difference is.
fn same(one: &[u8], other: &[u8]) -> bool {
    one.len() == other.len() && one.iter().zip(other).fold(0, |differences, (a, b)| differences | (a ^ b)) == 0
}
