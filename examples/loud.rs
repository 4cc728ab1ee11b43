//! The other half of the in2com pair: prints greetings in capitals, and ticks. See `hello`.
//!
//! ```text
//! cargo run --example loud                   # --every MS between ticks, --url URL for a broker elsewhere
//! ```

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use clap::Parser;
use coney::ExchangeKind;
use coney::bus::Bus;

/// Prints the greetings of `hello` in capitals, and ticks.
#[derive(Parser)]
struct Arguments {
    /// The broker.
    #[arg(long, default_value = "amqp://localhost:5672")]
    url: String,
    /// Milliseconds between ticks.
    #[arg(long, value_name = "MS", default_value_t = 1_000)]
    every: u64,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("loud: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> coney::Result<()> {
    let mut bus = Bus::connect(&arguments.url)?;
    bus.register_consumer("in2com", ExchangeKind::Direct, ["greetings"], |greeting: String, _| {
        println!("{}", greeting.to_uppercase());
    })?;
    let producer = bus.register_producer("in2com", ExchangeKind::Direct)?;
    let _running = bus.spawn()?; // greetings are printed on its thread
    for tick in 1_u64.. {
        thread::sleep(Duration::from_millis(arguments.every));
        if let Err(error) = producer.publish("ticks", &tick) {
            // The next one finds a connection again once the broker is back.
            eprintln!("loud: {error}");
        }
    }
    Ok(())
}
