//! An address at which nobody listens, for sure.

// Each test binary uses some of it.
#![allow(dead_code)]

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketType, bind, getsockname, socket};

/// A loopback port that is held, and at which nothing listens: connecting to it is refused for as long as this lives. A port
/// that just happens to be free may be somebody's a moment later, and 5672 is a broker's on many a machine.
pub struct ClosedPort {
    addr: SocketAddr,
    _held: OwnedFd,
}

pub fn closed_port() -> ClosedPort {
    let held = socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
    bind(&held, &SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).expect("a port");
    let addr = getsockname(&held).expect("an address").try_into().expect("an address of the Internet");
    ClosedPort { addr, _held: held }
}

impl ClosedPort {
    pub fn port(&self) -> u16 {
        self.addr.port()
    }

    pub fn ip(&self) -> IpAddr {
        self.addr.ip()
    }
}

/// As URLs have it.
impl fmt::Display for ClosedPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.addr.fmt(f)
    }
}
