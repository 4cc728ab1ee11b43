//! One half of the in2com pair: greets at random intervals, and prints what the other half, `loud`, makes of it.
//!
//! In two terminals, with a broker on localhost:
//!
//! ```text
//! cargo run --features cli -- broker         # unless there is one already
//! cargo run --example loud
//! cargo run --example hello                  # --every MS for the impatient, --url URL for a broker elsewhere
//! ```
//!
//! Ctrl-C ends it.

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use clap::Parser;
use coney::ExchangeKind;
use coney::bus::Bus;

/// Greets `loud` at random intervals.
#[derive(Parser)]
struct Arguments {
    /// The broker.
    #[arg(long, default_value = "amqp://localhost:5672")]
    url: String,
    /// Milliseconds between greetings, instead of 1 to 10 seconds at random.
    #[arg(long, value_name = "MS")]
    every: Option<u64>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hello: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> coney::Result<()> {
    let mut bus = Bus::connect(&arguments.url)?;
    bus.register_consumer("in2com", ExchangeKind::Direct, ["ticks"], |tick: u64, _| println!("tick {tick}"))?;
    let producer = bus.register_producer("in2com", ExchangeKind::Direct)?;
    let _running = bus.spawn()?; // ticks are printed on its thread
    loop {
        let millis = arguments.every.unwrap_or_else(|| fastrand::u64(1_000..=10_000));
        thread::sleep(Duration::from_millis(millis));
        if let Err(error) = producer.publish("greetings", "hello world!") {
            // The next one finds a connection again once the broker is back.
            eprintln!("hello: {error}");
        }
    }
}
