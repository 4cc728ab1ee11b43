//! Both halves of the in2com pair in one process, on the embedded broker: greetings go one way, ticks the other.
//!
//! ```text
//! cargo run --example in2com                 # --for SECONDS, --url URL for another broker
//! ```

mod options;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use coney::ExchangeKind;
use coney::bus::Bus;

use options::Options;

const USAGE: &str = "usage: in2com [--url URL] [--for SECONDS]";

fn main() -> ExitCode {
    match run(&Options::read(USAGE, &["--url", "--for"])) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("in2com: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> coney::Result<()> {
    let url: String = options.get("--url").unwrap_or_else(|| "memory://".to_owned());
    let seconds = options.get("--for").unwrap_or(10);
    let mut hello = Bus::connect(&url)?;
    hello.register_consumer("in2com", ExchangeKind::Direct, ["ticks"], |tick: u64, _| println!("tick {tick}"))?;
    let greetings = hello.register_producer("in2com", ExchangeKind::Direct)?;

    let mut loud = Bus::connect(&url)?;
    loud.register_consumer("in2com", ExchangeKind::Direct, ["greetings"], |greeting: String, _| {
        println!("{}", greeting.to_uppercase());
    })?;
    let ticks = loud.register_producer("in2com", ExchangeKind::Direct)?;

    let end = Instant::now() + Duration::from_secs(seconds);
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
