//! Networks that cut, stall, swallow and slow down what goes between client and broker, by way of a proxy in between.

mod consuming;
mod handshake;
mod instrument;
mod large;
mod publishing;
mod reconnecting;
mod rpc;
mod waiting;

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;

use crate::proxy::{Cut, Proxy};

/// How a network ends a connection that it tells both sides of.
const CUTS: [Cut; 2] = [Cut::Fin, Cut::Reset];

fn proxy_before(upstream: SocketAddr) -> Proxy {
    Proxy::start(upstream).expect("a proxy")
}

/// The URL of the broker behind a proxy.
fn url(proxy: &Proxy) -> String {
    format!("amqp://guest:guest@{}/%2f", proxy.addr())
}

/// What was published and what of it is known to be with the broker.
#[derive(Debug, Default)]
struct Sent {
    /// How often each body was sent.
    attempts: HashMap<String, usize>,
    confirmed: HashSet<String>,
}

impl Sent {
    fn attempt(&mut self, body: &str) {
        *self.attempts.entry(body.to_owned()).or_default() += 1;
    }

    fn confirm(&mut self, body: &str) {
        self.confirmed.insert(body.to_owned());
    }

    /// Checks that nothing confirmed is missing, nothing arrived that was not sent, and nothing more often than it was.
    #[track_caller]
    fn check(&self, arrived: &[String]) {
        let mut copies = HashMap::<&str, usize>::new();
        for body in arrived {
            *copies.entry(body).or_default() += 1;
        }
        let lost: Vec<_> = self.confirmed.iter().filter(|body| !copies.contains_key(body.as_str())).collect();
        assert!(lost.is_empty(), "{} confirmed messages are missing, such as {:?}", lost.len(), lost[0]);
        for (body, copies) in copies {
            let sent = self.attempts.get(body).copied().unwrap_or(0);
            assert!(copies <= sent, "{body:?} was sent {sent} times and is there {copies} times");
        }
    }
}
