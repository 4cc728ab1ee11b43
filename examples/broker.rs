//! An embedded broker on a port of its own, for clients in any language.
//!
//!     cargo run --example broker -- 5672
//!
//! Without a port it takes a free one. Prints the URL and runs until its standard input ends.

use std::io::Read;
use std::net::SocketAddr;

use coney::embedded::EmbeddedBroker;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    env_logger::init();
    let port = match std::env::args().nth(1) {
        Some(port) => port.parse()?,
        None => 0,
    };
    let broker = EmbeddedBroker::builder().listen(SocketAddr::from(([127, 0, 0, 1], port))).start()?;
    println!("{}", broker.url());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    broker.stop();
    Ok(())
}
