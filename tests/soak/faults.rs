//! The faults: what is done to the network and to the node, and how it is lifted.

use std::fmt;
use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use coney::testing::{NodeError, RabbitMq};

use crate::authority::Authority;
use crate::proxy::{Cut, Direction, Flow, Proxy};

/// How long the node may take to boot, or to do whatever else it is told to.
const BOOT: Duration = Duration::from_secs(180);

/// What can go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// All connections end in order.
    Fin,
    /// All connections are reset.
    Reset,
    /// Each connection is reset after a few more bytes, most likely within a frame.
    MidFrame,
    /// One connection goes silent, for good.
    Silence,
    /// Nothing passes, and nothing is lost.
    Stall,
    /// Nothing passes, and what is sent is lost.
    Swallow,
    /// Everything passes slowly.
    Throttle,
    /// All connections are reset, and no new one comes about.
    Refuse,
    /// All connections are reset, and new ones in the middle of their handshake.
    Handshake,
    /// The broker closes all connections, as an operator would have it do.
    Close,
    /// The broker is short of memory.
    Alarm,
    /// The node stands still.
    Pause,
    /// The broker is shut down in order and started again.
    Stop,
    /// The node is killed and started again.
    Kill,
}

impl Fault {
    const ALL: [Fault; 14] = [
        Fault::Fin,
        Fault::Reset,
        Fault::MidFrame,
        Fault::Silence,
        Fault::Stall,
        Fault::Swallow,
        Fault::Throttle,
        Fault::Refuse,
        Fault::Handshake,
        Fault::Close,
        Fault::Alarm,
        Fault::Pause,
        Fault::Stop,
        Fault::Kill,
    ];

    /// Whether it has a length, within which something else can happen.
    fn lasts(self) -> bool {
        match self {
            Fault::Fin | Fault::Reset | Fault::MidFrame | Fault::Silence | Fault::Close => false,
            Fault::Stall
            | Fault::Swallow
            | Fault::Throttle
            | Fault::Refuse
            | Fault::Handshake
            | Fault::Alarm
            | Fault::Pause
            | Fault::Stop
            | Fault::Kill => true,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Fault::Fin => "cut, FIN",
            Fault::Reset => "cut, RST",
            Fault::MidFrame => "cut within a frame",
            Fault::Silence => "one connection silent",
            Fault::Stall => "network stalls",
            Fault::Swallow => "network swallows",
            Fault::Throttle => "network slow",
            Fault::Refuse => "connections refused",
            Fault::Handshake => "handshakes cut",
            Fault::Close => "broker closes all (320)",
            Fault::Alarm => "memory alarm",
            Fault::Pause => "node paused",
            Fault::Stop => "broker stopped, started",
            Fault::Kill => "node killed, started",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Faults in random order, each as often as any other. The first five include the node's death.
#[derive(Debug)]
pub struct Deck {
    rng: fastrand::Rng,
    cards: Vec<Fault>,
}

impl Deck {
    pub fn new(seed: u64) -> Deck {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut cards = Deck::shuffled(&mut rng);
        // They are taken from the end.
        let (kill, early) = (cards.iter().position(|&card| card == Fault::Kill), cards.len() - 1 - rng.usize(..5));
        if let Some(kill) = kill {
            cards.swap(kill, early);
        }
        Deck { rng, cards }
    }

    fn shuffled(rng: &mut fastrand::Rng) -> Vec<Fault> {
        let mut cards = Fault::ALL.to_vec();
        rng.shuffle(&mut cards);
        cards
    }

    /// The next fault.
    pub fn draw(&mut self) -> Fault {
        loop {
            if let Some(fault) = self.cards.pop() {
                return fault;
            }
            self.cards = Deck::shuffled(&mut self.rng);
        }
    }

    /// A duration at random.
    pub fn millis(&mut self, range: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(self.rng.u64(range))
    }

    fn direction(&mut self) -> Direction {
        if self.rng.bool() { Direction::Up } else { Direction::Down }
    }
}

/// The broker, and the network between it and the client.
pub struct Scene {
    pub node: RabbitMq,
    pub proxy: Proxy,
    /// With TLS, who has signed the node's certificate.
    authority: Option<Authority>,
}

/// How long a fault lasts is a part of it: nothing is waited for.
fn for_a_while(length: Duration) {
    thread::sleep(length);
}

impl Scene {
    pub fn set(tls: bool) -> Result<Scene, Box<dyn std::error::Error>> {
        // How long a node takes to boot on a busy machine is not what is looked at here.
        let builder = RabbitMq::builder().boot_timeout(BOOT).timeout(BOOT);
        let authority = tls.then(|| Authority::new("soak"));
        let (builder, tls_port) = match &authority {
            Some(authority) => {
                let (builder, port) = authority.tls_port(builder, &authority.sign_server(|_| {}));
                (builder, Some(port))
            }
            None => (builder, None),
        };
        let node = builder.start()?;
        let proxy = Proxy::start(SocketAddr::from(([127, 0, 0, 1], tls_port.unwrap_or(node.port()))))?;
        Ok(Scene { node, proxy, authority })
    }

    /// `[broker]` in the settings of its clients.
    pub fn broker(&self) -> String {
        let (scheme, tls) = match &self.authority {
            Some(authority) => ("amqps", format!("tls.ca_file = {:?}", authority.ca_file().display().to_string())),
            None => ("amqp", String::new()),
        };
        format!("url = \"{scheme}://guest:guest@{}/%2f\"\n{tls}", self.proxy.addr())
    }

    /// How many bytes of a handshake there are to cut within: the broker's half is some 600 bytes long, the client's 400,
    /// and TLS has some 2,000 and 700 of its own.
    fn handshake(&self) -> u64 {
        if self.authority.is_some() { 1_100 } else { 400 }
    }

    /// Brings a fault about and lifts it again. In one of three that last, all connections are reset meanwhile.
    pub fn suffer(&self, fault: Fault, deck: &mut Deck) -> Result<(), NodeError> {
        let reset = (fault.lasts() && deck.rng.u8(..3) == 0).then(|| deck.millis(0..3_000));
        thread::scope(|scope| {
            if let Some(moment) = reset {
                scope.spawn(move || {
                    for_a_while(moment);
                    self.proxy.cut(Cut::Reset);
                });
            }
            self.bring_about(fault, deck)
        })
    }

    fn bring_about(&self, fault: Fault, deck: &mut Deck) -> Result<(), NodeError> {
        let (node, proxy) = (&self.node, &self.proxy);
        match fault {
            Fault::Fin => proxy.cut(Cut::Fin),
            Fault::Reset => proxy.cut(Cut::Reset),
            Fault::MidFrame => {
                let cut = if deck.rng.bool() { Cut::Fin } else { Cut::Reset };
                proxy.cut_after(deck.direction(), deck.rng.u64(1..20_000), cut);
            }
            Fault::Silence => {
                // One of the latest: most of these are open.
                let accepted = proxy.traffic().accepted;
                let back = deck.rng.u64(..) % accepted.clamp(1, 6);
                proxy.cut_one(accepted.saturating_sub(back), Cut::Silence);
            }
            Fault::Stall => {
                // Shorter and longer than it takes to notice.
                match deck.rng.u8(..3) {
                    0 => proxy.flow(Flow::Stall),
                    _ => proxy.flow_of(deck.direction(), Flow::Stall),
                }
                for_a_while(deck.millis(500..8_000));
                proxy.flow(Flow::Pass);
            }
            Fault::Swallow => {
                match deck.rng.u8(..3) {
                    0 => proxy.flow(Flow::Swallow),
                    _ => proxy.flow_of(deck.direction(), Flow::Swallow),
                }
                for_a_while(deck.millis(500..8_000));
                proxy.flow(Flow::Pass);
            }
            Fault::Throttle => {
                proxy.flow_of(deck.direction(), Flow::Throttle(deck.rng.u32(2_000..50_000)));
                for_a_while(deck.millis(1_000..6_000));
                proxy.flow(Flow::Pass);
            }
            Fault::Refuse => {
                proxy.refuse(true);
                proxy.cut(Cut::Reset);
                for_a_while(deck.millis(500..5_000));
                proxy.refuse(false);
            }
            Fault::Handshake => {
                proxy.cut_new_after(deck.direction(), deck.rng.u64(1..self.handshake()), Cut::Reset);
                proxy.cut(Cut::Reset);
                for_a_while(deck.millis(500..4_000));
                proxy.spare_new();
            }
            Fault::Close => drop(node.close_all_connections("soak")?),
            Fault::Alarm => {
                node.block_publishers()?;
                for_a_while(deck.millis(500..5_000));
                node.unblock_publishers()?;
            }
            Fault::Pause => {
                node.pause()?;
                for_a_while(deck.millis(500..8_000));
                node.resume()?;
            }
            Fault::Stop => {
                node.stop_app()?;
                for_a_while(deck.millis(0..2_000));
                node.start_app()?;
            }
            Fault::Kill => {
                node.kill()?;
                for_a_while(deck.millis(0..2_000));
                node.start_again()?;
            }
        }
        Ok(())
    }

    /// Makes all whole again, whatever fault has been interrupted.
    pub fn heal(&self) -> Result<(), NodeError> {
        self.proxy.refuse(false);
        self.proxy.spare_new();
        self.proxy.flow(Flow::Pass);
        // These fail if there is nothing to be mended.
        self.node.resume().ok();
        self.node.start_again().ok();
        self.node.start_app()?;
        self.node.unblock_publishers()
    }

    /// Connections, channels and consumers, as the broker tells. None if it is not in a state to tell.
    pub fn held_by_broker(&self) -> Option<(usize, usize, usize)> {
        let node = &self.node;
        Some((node.connections().ok()?.len(), node.channels().ok()?.len(), node.consumers().ok()?.len()))
    }

    /// What the connections call themselves that the broker has.
    pub fn connection_names(&self) -> Vec<String> {
        let connections = self.node.connections().unwrap_or_default();
        let mut names: Vec<String> = connections.into_iter().filter_map(|one| one.connection_name).collect();
        names.sort();
        names
    }

    /// Messages in a queue, settled or not.
    pub fn queue_depth(&self, queue: &str) -> Option<u64> {
        Some(self.node.queue_len(queue).ok()? + self.node.queue_unacked(queue).ok()?)
    }
}
