//! Both halves of the in2com pair in one process, on the embedded broker: greetings go one way, ticks the other.
//!
//! ```text
//! cargo run --example in2com                 # --for SECONDS, --url URL for another broker
//! ```

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use coney::ExchangeKind;
use coney::bus::Bus;

/// Greets itself, loudly.
#[derive(Parser)]
struct Arguments {
    /// The broker.
    #[arg(long, default_value = "memory://")]
    url: String,
    /// How long to run, in seconds.
    #[arg(long = "for", value_name = "SECONDS", default_value_t = 10)]
    seconds: u64,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("in2com: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> coney::Result<()> {
    let mut hello = Bus::connect(&arguments.url)?;
    hello.register_consumer("in2com", ExchangeKind::Direct, ["ticks"], |tick: u64, _| println!("tick {tick}"))?;
    let greetings = hello.register_producer("in2com", ExchangeKind::Direct)?;

    let mut loud = Bus::connect(&arguments.url)?;
    loud.register_consumer("in2com", ExchangeKind::Direct, ["greetings"], |greeting: String, _| {
        println!("{}", greeting.to_uppercase());
    })?;
    let ticks = loud.register_producer("in2com", ExchangeKind::Direct)?;

    let end = Instant::now() + Duration::from_secs(arguments.seconds);
    let mut tick = 0;
    while Instant::now() < end {
        tick += 1;
        ticks.publish("ticks", &tick)?;
        if tick % 3 == 1 {
            greetings.publish("greetings", "hello world!")?;
        }
        // Five cycles of 100 ms at most are half a second. Callbacks are run on this thread.
        hello.process_events(Some(5))?;
        loud.process_events(Some(5))?;
    }
    hello.close()?;
    loud.close()
}
