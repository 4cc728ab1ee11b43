//! A private RabbitMQ of one's own, for clients in any language.
//!
//!     cargo run --example rabbitmq
//!
//! Runs the installed `rabbitmq-server`, or the one that `CONEY_RABBITMQ` names. Prints the URL and runs until its standard input ends; nothing is left then.

use std::io::Read;

use coney::testing::RabbitMq;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    env_logger::init();
    let node = RabbitMq::start()?;
    println!("{}", node.url());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    drop(node);
    Ok(())
}
