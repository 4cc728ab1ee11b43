//! The broker as a server: listening sockets, who is connected, and how everything ends.
//!
//! Lock order: the block, then the guest list or an outbox. No other lock of a session is taken under either.

use std::collections::HashMap;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::clock::Clock;
use super::limits::Limits;
use super::news::News;
use super::outbox::SessionId;
use super::refusal::Refusal;
use super::session::{self, Session};
use super::users::User;
use super::vhost::{self, VHost};
use crate::amqp::value::{Table, Value};
use crate::fork::Maker;

/// How long clients have for their `close-ok` when the broker stops, before they are reset; and after that, before the
/// sockets of those are shut that do not even take what was said to them.
const STOP_GRACE: Duration = Duration::from_millis(300);
/// After a failed `accept` (no file descriptors left, mostly), before the next one.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// How many clients may wait to be accepted. The 128 of the standard library are too few for a test that starts a few
/// hundred clients at once: who finds the queue full is let in by his system's next attempt, a second later.
const BACKLOG: i32 = 1024;

/// What all the threads of a broker share.
pub(super) struct Broker {
    pub(super) limits: Limits,
    pub(super) users: HashMap<String, Arc<User>>,
    pub(super) vhosts: HashMap<String, Arc<VHost>>,
    pub(super) news: Arc<News>,
    cluster_name: String,
    next_session: AtomicU64,
    stopping: AtomicBool,
    /// New connections are closed at once.
    refusing: AtomicBool,
    /// How many more clients are refused at `connection.open`, and with what.
    refused_opens: Mutex<Option<(usize, Refusal)>>,
    is_blocked: AtomicBool,
    block: Mutex<Option<String>>,
    unblocked: Condvar,
    guests: Mutex<Guests>,
    /// Somebody has left the guest list.
    left: Condvar,
}

/// Everybody with a socket.
#[derive(Default)]
struct Guests {
    connected: HashMap<SessionId, Connected>,
    /// Readers that have ended, or are about to, and were not joined.
    ended: Vec<JoinHandle<()>>,
}

struct Connected {
    socket: Arc<TcpStream>,
    reader: Option<JoinHandle<()>>,
    /// From `connection.open` to the end of the connection.
    session: Option<Arc<Session>>,
    /// The connection is over, and the socket open until the client ends it or its time is up.
    lingers: bool,
}

impl Broker {
    /// The broker by itself, without any socket.
    pub(super) fn new(limits: Limits, users: Vec<User>, vhosts: &[String], clock: &Clock) -> Arc<Broker> {
        let news = Arc::<News>::default();
        let vhost_limits = vhost::Limits {
            release: limits.release,
            consumer_timeout: limits.consumer_timeout,
            quorum_queues: limits.quorum_queues,
        };
        let vhosts = vhosts.iter().map(|name| {
            let vhost = VHost::new(name, vhost_limits, clock.alarm(), news.clone());
            clock.watch(&vhost);
            (name.clone(), vhost)
        });
        Arc::new(Broker {
            users: users.into_iter().map(|user| (user.name.clone(), Arc::new(user))).collect(),
            vhosts: vhosts.collect(),
            news,
            limits,
            cluster_name: "coney@localhost".into(),
            next_session: AtomicU64::new(1),
            stopping: AtomicBool::new(false),
            refusing: AtomicBool::new(false),
            refused_opens: Mutex::default(),
            is_blocked: AtomicBool::new(false),
            block: Mutex::default(),
            unblocked: Condvar::new(),
            guests: Mutex::default(),
            left: Condvar::new(),
        })
    }

    /// What the broker says of itself in `connection.start`.
    pub(super) fn properties<const N: usize>(&self, capabilities: [&str; N]) -> Table {
        let release = self.limits.release;
        let able = capabilities.iter().fold(Table::default(), |table, name| table.with(name, Value::Bool(true)));
        Table::default()
            .with("capabilities", Value::Table(able))
            .with("cluster_name", Value::text(&self.cluster_name))
            .with("copyright", Value::text("Copyright (c) the authors of coney"))
            .with(
                "information",
                Value::text(&format!("The embedded broker of coney, which speaks as RabbitMQ {release} does")),
            )
            .with("platform", Value::text("Rust"))
            // Clients branch on these two.
            .with("product", Value::text("RabbitMQ"))
            .with("version", Value::text(release.version()))
    }

    fn guests(&self) -> MutexGuard<'_, Guests> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everybody who has opened a virtual host and not closed, the earliest first.
    pub(super) fn sessions(&self) -> Vec<Arc<Session>> {
        let mut sessions: Vec<_> =
            self.guests().connected.values().filter_map(|connected| connected.session.clone()).collect();
        sessions.sort_by_key(|session| session.id);
        sessions
    }

    /// Puts a session on the list and says `open-ok`. False if the broker is about to stop.
    pub(super) fn enter(&self, session: &Arc<Session>) -> bool {
        // Until it has been told, so that it does not hear of a block before it is in.
        let block = self.block();
        let mut guests = self.guests();
        if self.stopping.load(Ordering::SeqCst) {
            return false;
        }
        if let Some(connected) = guests.connected.get_mut(&session.id) {
            connected.session = Some(session.clone());
        }
        drop(guests);
        session.tell_open();
        drop(block);
        self.news.tell();
        true
    }

    /// Takes a session off the list. Its socket may be open for a while yet.
    pub(super) fn leave(&self, id: SessionId) {
        if let Some(connected) = self.guests().connected.get_mut(&id) {
            connected.session = None;
            connected.lingers = true;
        }
        self.news.tell();
    }

    /// Shuts the sockets of connections that are over.
    pub(super) fn shut_lingering(&self) {
        self.guests().connected.values().filter(|connected| connected.lingers).for_each(shut);
    }

    pub(super) fn is_blocked(&self) -> bool {
        self.is_blocked.load(Ordering::Relaxed)
    }

    /// Why no messages are taken at present.
    fn block(&self) -> MutexGuard<'_, Option<String>> {
        self.block.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes no messages any more, for this reason, or with `None` takes them again, and tells everybody.
    pub(super) fn set_blocked(&self, reason: Option<&str>) {
        let mut block = self.block();
        let was = std::mem::replace(&mut *block, reason.map(str::to_owned));
        self.is_blocked.store(reason.is_some(), Ordering::Relaxed);
        drop(block);
        if was.is_some() != reason.is_some() {
            self.sessions().iter().for_each(|session| session.tell_blocked(reason));
        }
        // Whoever was held up gets on once he has been told that he may.
        self.unblocked.notify_all();
        self.news.tell();
    }

    /// Tells a session that publishes that no messages are taken, if that is so.
    pub(super) fn tell_of_block(&self, session: &Session) {
        let block = self.block();
        if let Some(reason) = &*block {
            session.tell_blocked(Some(reason));
        }
    }

    /// Waits while no messages are taken, at most for `patience`, or until `over`.
    pub(super) fn wait_unblocked(&self, patience: Duration, over: impl Fn() -> bool) {
        let deadline = Instant::now() + patience;
        let mut block = self.block();
        while block.is_some() && !over() && !self.stopping.load(Ordering::SeqCst) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            block = self.unblocked.wait_timeout(block, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Has whoever waits for the end of a block look whether its connection is over.
    pub(super) fn wake_held_up(&self) {
        // Taken and given back, so that nobody is between looking and waiting.
        drop(self.block());
        self.unblocked.notify_all();
    }

    /// Whether new connections are closed at once.
    pub(super) fn set_refusing(&self, refusing: bool) {
        self.refusing.store(refusing, Ordering::SeqCst);
    }

    /// The next `count` clients are refused at `connection.open`.
    pub(super) fn refuse_opens(&self, count: usize, refusal: Refusal) {
        *self.refused_opens() = Some((count, refusal));
    }

    /// What the client is refused with that opens a virtual host now, if it is.
    pub(super) fn refusal_of_open(&self) -> Option<Refusal> {
        let mut refused = self.refused_opens();
        let (left, refusal) = refused.as_mut()?;
        *left = left.checked_sub(1)?;
        Some(refusal.clone())
    }

    fn refused_opens(&self) -> MutexGuard<'_, Option<(usize, Refusal)>> {
        self.refused_opens.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a client in, on a thread of its own.
    fn admit(self: &Arc<Self>, socket: TcpStream) {
        let id = SessionId(self.next_session.fetch_add(1, Ordering::Relaxed));
        let socket = Arc::new(socket);
        let (broker, theirs) = (self.clone(), socket.clone());
        let mut guests = self.guests();
        if self.stopping.load(Ordering::SeqCst) {
            return;
        }
        let reader = thread::Builder::new().name(format!("coney-broker-read-{}", id.0)).spawn(move || {
            session::run(&broker, id, theirs);
            broker.gone(id);
        });
        match reader {
            Ok(reader) => {
                guests.connected.insert(id, Connected { socket, reader: Some(reader), session: None, lingers: false });
            }
            Err(error) => log::error!(target: "coney", "embedded broker: no thread for a client: {error}"),
        }
        for ended in std::mem::take(&mut guests.ended).into_iter() {
            if ended.is_finished() { join(ended) } else { guests.ended.push(ended) }
        }
    }

    /// The reader of `id` ends; somebody else will join it.
    fn gone(&self, id: SessionId) {
        let mut guests = self.guests();
        if let Some(connected) = guests.connected.remove(&id) {
            guests.ended.extend(connected.reader);
        }
        drop(guests);
        self.left.notify_all();
    }

    /// Ends every connection and waits for every thread.
    fn dismiss_all(&self) {
        let forced = Refusal::connection_forced("broker forced connection closure with reason 'shutdown'");
        self.wake_held_up();
        let over = Instant::now() + STOP_GRACE;
        for session in self.sessions() {
            session.close(&forced);
            session.end_by(over);
        }
        let deadline = over + STOP_GRACE;
        let mut guests = self.guests();
        // A client that has opened no virtual host, or has closed, is told nothing.
        guests.connected.values().filter(|connected| connected.session.is_none()).for_each(shut);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if guests.connected.is_empty() || left.is_zero() {
                break;
            }
            guests = self.left.wait_timeout(guests, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        guests.connected.values().for_each(shut);
        let mut readers: Vec<_> =
            guests.connected.values_mut().filter_map(|connected| connected.reader.take()).collect();
        readers.append(&mut guests.ended);
        drop(guests);
        readers.into_iter().for_each(join);
        // Those that were just joined are off the list; what is left of it are their handles, which were taken.
        self.guests().ended.clear();
    }
}

fn shut(connected: &Connected) {
    // Fails where the client has closed already.
    let _ = connected.socket.shutdown(Shutdown::Both);
}

fn join(thread: JoinHandle<()>) {
    if thread.thread().id() != thread::current().id() && thread.join().is_err() {
        log::error!(target: "coney", "embedded broker: a thread panicked");
    }
}

/// A broker with its listening sockets.
pub(super) struct Server {
    pub(super) broker: Arc<Broker>,
    addrs: Vec<SocketAddr>,
    clock: Clock,
    listening: Mutex<Vec<(Arc<TcpListener>, JoinHandle<()>)>>,
    maker: Maker,
}

impl Server {
    /// Listens; clients can connect when this returns.
    pub(super) fn start(
        addrs: &[SocketAddr],
        limits: Limits,
        users: Vec<User>,
        vhosts: &[String],
    ) -> Result<Server, StartError> {
        let listeners: Vec<_> = addrs
            .iter()
            .map(|addr| listen(addr).map_err(|error| StartError::Bind(*addr, error)))
            .collect::<Result<_, _>>()?;
        let bound = listeners
            .iter()
            .zip(addrs)
            .map(|(listener, addr)| listener.local_addr().map_err(|error| StartError::Bind(*addr, error)))
            .collect::<Result<_, _>>()?;

        let late = Arc::new(Mutex::new(std::sync::Weak::<Broker>::new()));
        let seen = late.clone();
        let clock = Clock::start(move |overdue| {
            let broker = seen.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
            let sessions = broker.map(|broker| broker.sessions()).unwrap_or_default();
            if let Some(session) = sessions.iter().find(|session| session.id == overdue.session) {
                session.close_channels(Some(overdue.channel), &overdue.refusal);
            }
        })
        .map_err(|error| StartError::Thread("coney-broker-clock", error))?;
        let broker = Broker::new(limits, users, vhosts, &clock);
        *late.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&broker);

        let server = Server { broker, addrs: bound, clock, listening: Mutex::default(), maker: Maker::this() };
        for listener in listeners {
            let listener = Arc::new(listener);
            let (broker, listens) = (server.broker.clone(), listener.clone());
            let accepting = thread::Builder::new()
                .name("coney-broker-accept".into())
                .spawn(move || accept(&broker, &listens))
                // What has been started stops with the server.
                .map_err(|error| StartError::Thread("coney-broker-accept", error))?;
            server.listening().push((listener, accepting));
        }
        Ok(server)
    }

    fn listening(&self) -> MutexGuard<'_, Vec<(Arc<TcpListener>, JoinHandle<()>)>> {
        self.listening.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether [`stop`](Server::stop) has been called.
    pub(super) fn is_stopped(&self) -> bool {
        self.broker.stopping.load(Ordering::SeqCst)
    }

    pub(super) fn addrs(&self) -> &[SocketAddr] {
        &self.addrs
    }

    /// Ends everything: no thread is left and every port is free when this returns. The second time, does nothing.
    pub(super) fn stop(&self) {
        self.broker.stopping.store(true, Ordering::SeqCst);
        let listening = std::mem::take(&mut *self.listening());
        for (listener, accepting) in listening {
            wake(&listener);
            drop(listener);
            join(accepting);
        }
        self.broker.dismiss_all();
        self.clock.stop();
        self.broker.news.tell();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A forked child has none of its threads to wait for.
        if self.maker.is_parent() {
            return;
        }
        self.stop();
    }
}

/// Why there is no server.
pub(super) enum StartError {
    Bind(SocketAddr, io::Error),
    Thread(&'static str, io::Error),
}

fn listen(addr: &SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(addr)?;
    // Again, for the longer queue.
    rustix::net::listen(&listener, BACKLOG)?;
    Ok(listener)
}

fn accept(broker: &Arc<Broker>, listener: &TcpListener) {
    while !broker.stopping.load(Ordering::SeqCst) {
        match listener.accept() {
            Ok(_) if broker.stopping.load(Ordering::SeqCst) => return,
            Ok(_) if broker.refusing.load(Ordering::SeqCst) => (),
            Ok((socket, _)) => broker.admit(socket),
            Err(error) if broker.stopping.load(Ordering::SeqCst) => {
                log::debug!(target: "coney", "embedded broker: accept ended: {error}");
                return;
            }
            Err(error) => {
                log::warn!(target: "coney", "embedded broker: accept: {error}");
                thread::park_timeout(ACCEPT_PAUSE);
            }
        }
    }
}

/// Ends a blocked `accept`: by shutting the listener down, which Linux takes for an end, or by calling on it.
fn wake(listener: &TcpListener) {
    if rustix::net::shutdown(listener, rustix::net::Shutdown::Both).is_ok() {
        return;
    }
    if let Ok(mut addr) = listener.local_addr() {
        if addr.ip().is_unspecified() {
            let loopback = if addr.is_ipv4() {
                std::net::Ipv4Addr::LOCALHOST.into()
            } else {
                std::net::IpAddr::from(std::net::Ipv6Addr::LOCALHOST)
            };
            addr.set_ip(loopback);
        }
        let _ = TcpStream::connect_timeout(&addr, Duration::from_secs(1));
    }
}
