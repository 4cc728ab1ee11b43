//! Whether a host resolves and takes connections, one step at a time, for whoever has to say which of them fails.

use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::thread;
use std::time::Duration;

use coney::Endpoint;
use crossbeam_channel::bounded;

/// The addresses of a host, asked for on a thread that is left to itself if the answer takes longer than `limit`.
pub fn resolve(endpoint: &Endpoint, limit: Duration) -> io::Result<Vec<SocketAddr>> {
    let (answer, answered) = bounded(1);
    let (host, port) = (endpoint.host.clone(), endpoint.port);
    thread::Builder::new().name("coney-resolve".to_owned()).spawn(move || {
        // Whoever asked may have gone.
        let _ = answer.send((host.as_str(), port).to_socket_addrs().map(Vec::from_iter));
    })?;
    let late = || io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {limit:?}"));
    answered.recv_timeout(limit).unwrap_or_else(|_| Err(late()))
}

/// Connects to the first address that takes us. Otherwise why the last one did not.
pub fn dial(addresses: &[SocketAddr], limit: Duration) -> io::Result<SocketAddr> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "it has no address");
    for address in addresses {
        match TcpStream::connect_timeout(address, limit) {
            Ok(_) => return Ok(*address),
            Err(error) => last = error,
        }
    }
    Err(last)
}
