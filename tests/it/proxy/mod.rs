//! A TCP proxy that stands between a client and a broker and does to their bytes what networks do.
//!
//! One thread owns every socket and polls them. An order is carried out by that thread, and has been by the time the method
//! that gives it returns. The proxy knows nothing of AMQP and nothing of tests.

// Each test binary uses some of it.
#![allow(dead_code)]

mod link;

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use self::link::{Link, reset};

/// A broker on this machine answers sooner, or not at all.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the broker.
    Up,
    /// From the broker to the client.
    Down,
}

/// What becomes of bytes that go one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// They are passed on.
    Pass,
    /// They are not read, so that the sender's window fills.
    Stall,
    /// They are read and thrown away. A connection that has lost bytes so is reset once its flow is another again.
    Swallow,
    /// They are passed on at so many bytes per second, on each connection.
    Throttle(u32),
}

/// How a connection ends, on both sides at once. Bytes that have not been passed on are lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// In order, as if the other side had closed.
    Fin,
    /// With a reset.
    Reset,
    /// Nobody is told: from here on bytes both ways are swallowed.
    Silence,
}

/// What the proxy has seen so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Connections passed on to the broker.
    pub accepted: u64,
    /// Connections reset as soon as they were there.
    pub refused: u64,
    /// Connections that have not ended.
    pub open: u64,
    /// Bytes passed on to the broker.
    pub up: u64,
    /// Bytes passed on to the client.
    pub down: u64,
    /// Bytes of the client that were thrown away.
    pub swallowed_up: u64,
    /// Bytes of the broker that were thrown away.
    pub swallowed_down: u64,
}

/// The proxy. It ends, with all its connections, when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    addr: SocketAddr,
    orders: Sender<(Order, Sender<Traffic>)>,
    wake: UnixStream,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Order {
    Flow(Direction, Flow),
    Cut(Option<u64>, Cut),
    CutAfter(Limit),
    CutNewAfter(Option<Limit>),
    Refuse(bool),
    /// Only to be answered.
    Look,
    Stop,
}

#[derive(Debug, Clone, Copy)]
struct Limit {
    direction: Direction,
    bytes: u64,
    cut: Cut,
}

impl Proxy {
    /// Listens on a free port of 127.0.0.1 for clients of `upstream`.
    pub fn start(upstream: SocketAddr) -> io::Result<Proxy> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let addr = listener.local_addr()?;
        let (wake, woken) = UnixStream::pair()?;
        woken.set_nonblocking(true)?;
        let (orders, given) = mpsc::channel();
        let relay = Relay {
            upstream,
            listener,
            woken,
            given,
            traffic: Traffic::default(),
            flows: [Flow::Pass; 2],
            for_new: None,
            refusing: false,
            links: Vec::new(),
        };
        let thread = Builder::new().name("proxy".to_owned()).spawn(move || relay.run())?;
        Ok(Proxy { addr, orders, wake, thread: Some(thread) })
    }

    /// Where clients connect to.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Changes what becomes of bytes both ways, on all connections, those to come included. What has been read is held.
    pub fn flow(&self, flow: Flow) {
        self.flow_of(Direction::Up, flow);
        self.flow_of(Direction::Down, flow);
    }

    /// The same for bytes that go one way.
    pub fn flow_of(&self, direction: Direction, flow: Flow) {
        self.order(Order::Flow(direction, flow));
    }

    /// Cuts every open connection.
    pub fn cut(&self, cut: Cut) {
        self.order(Order::Cut(None, cut));
    }

    /// Cuts one connection, by its number among those accepted, counted from 1.
    pub fn cut_one(&self, number: u64, cut: Cut) {
        self.order(Order::Cut(Some(number), cut));
    }

    /// Cuts each open connection once it has passed on so many more bytes in a direction.
    pub fn cut_after(&self, direction: Direction, bytes: u64, cut: Cut) {
        self.order(Order::CutAfter(Limit { direction, bytes, cut }));
    }

    /// Cuts each connection to come once it has passed on so many bytes in a direction.
    pub fn cut_new_after(&self, direction: Direction, bytes: u64, cut: Cut) {
        self.order(Order::CutNewAfter(Some(Limit { direction, bytes, cut })));
    }

    /// Lets connections to come be: the end of [`cut_new_after`](Proxy::cut_new_after).
    pub fn spare_new(&self) {
        self.order(Order::CutNewAfter(None));
    }

    /// Whether connections to come are reset as soon as they are there.
    pub fn refuse(&self, refuse: bool) {
        self.order(Order::Refuse(refuse));
    }

    /// What has been seen so far.
    pub fn traffic(&self) -> Traffic {
        self.order(Order::Look)
    }

    fn order(&self, order: Order) -> Traffic {
        let (done, carried_out) = mpsc::channel();
        self.orders.send((order, done)).expect("the proxy's thread runs");
        (&self.wake).write_all(&[0]).expect("the proxy's thread runs");
        carried_out.recv().expect("the proxy's thread runs")
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let (done, _) = mpsc::channel();
        // Both fail only if the thread has panicked, which the join tells.
        let _ = self.orders.send((Order::Stop, done));
        let _ = (&self.wake).write_all(&[0]);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the proxy's thread has panicked");
        }
    }
}

/// The thread's own.
struct Relay {
    upstream: SocketAddr,
    listener: TcpListener,
    woken: UnixStream,
    given: Receiver<(Order, Sender<Traffic>)>,
    traffic: Traffic,
    flows: [Flow; 2],
    for_new: Option<Limit>,
    refusing: bool,
    links: Vec<Link>,
}

impl Relay {
    fn run(mut self) {
        loop {
            self.wait();
            while let Ok((order, done)) = self.given.try_recv() {
                if let Order::Stop = order {
                    return;
                }
                self.carry_out(&order);
                self.settle();
                // Whoever ordered has waited for it, unless that thread has panicked.
                let _ = done.send(self.traffic);
            }
            while let Ok((client, _)) = self.listener.accept() {
                self.welcome(client);
            }
            let (flows, now) = (self.flows, Instant::now());
            for link in &mut self.links {
                link.step(flows, now, &mut self.traffic);
            }
            self.settle();
        }
    }

    /// Waits until there is something to do.
    fn wait(&self) {
        let now = Instant::now();
        let mut fds = vec![PollFd::new(&self.woken, PollFlags::IN), PollFd::new(&self.listener, PollFlags::IN)];
        let mut timeout: Option<Duration> = None;
        for link in &self.links {
            timeout = [timeout, link.wants(self.flows, now, &mut fds)].into_iter().flatten().min();
        }
        let timeout = timeout.map(|timeout| Timespec::try_from(timeout).expect("a second or so"));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("poll: {error}"),
        }
        while let Ok(1..) = (&self.woken).read(&mut [0; 64]) {}
    }

    fn carry_out(&mut self, order: &Order) {
        match *order {
            Order::Flow(direction, flow) => self.flows[direction as usize] = flow,
            Order::Cut(number, cut) => {
                let ordered = |link: &&mut Link| number.is_none_or(|number| number == link.number);
                self.links.iter_mut().filter(ordered).for_each(|link| link.end(cut));
            }
            Order::CutAfter(limit) => self.links.iter_mut().for_each(|link| link.limit(limit)),
            Order::CutNewAfter(limit) => self.for_new = limit,
            Order::Refuse(refuse) => self.refusing = refuse,
            Order::Look | Order::Stop => {}
        }
    }

    fn welcome(&mut self, client: TcpStream) {
        let broker = (!self.refusing).then(|| TcpStream::connect_timeout(&self.upstream, DIAL_TIMEOUT));
        let Some(Ok(broker)) = broker else {
            self.traffic.refused += 1;
            return reset(&client);
        };
        for socket in [&client, &broker] {
            // A socket that is gone already says so when it is read.
            let _ = socket.set_nodelay(true).and(socket.set_nonblocking(true));
        }
        self.traffic.accepted += 1;
        let mut link = Link::new(self.traffic.accepted, client, broker);
        self.for_new.into_iter().for_each(|limit| link.limit(limit));
        self.links.push(link);
    }

    /// Lets go of what has ended.
    fn settle(&mut self) {
        self.links.retain(|link| !link.is_over());
        self.traffic.open = self.links.iter().filter(|link| link.is_open()).count() as u64;
    }
}
