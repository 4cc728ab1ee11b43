//! The other half of the in2com pair: prints greetings in capitals, and ticks. See `hello`.
//!
//! ```text
//! cargo run --example loud                   # --every MS between ticks, --url URL for a broker elsewhere
//! ```

mod options;

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use coney::ExchangeKind;
use coney::bus::Bus;

use options::Options;

const USAGE: &str = "usage: loud [--url URL] [--every MILLISECONDS]";

fn main() -> ExitCode {
    match run(&Options::read(USAGE, &["--url", "--every"])) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("loud: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> coney::Result<()> {
    let url: String = options.get("--url").unwrap_or_else(|| "amqp://localhost:5672".to_owned());
    let every = Duration::from_millis(options.get("--every").unwrap_or(1_000));
    let mut bus = Bus::connect(&url)?;
    bus.register_consumer("in2com", ExchangeKind::Direct, ["greetings"], |greeting: String, _| {
        println!("{}", greeting.to_uppercase());
    })?;
    let producer = bus.register_producer("in2com", ExchangeKind::Direct)?;
    let _running = bus.spawn()?; // greetings are printed on its thread
    for tick in 1_u64.. {
        thread::sleep(every);
        if let Err(error) = producer.publish("ticks", &tick) {
            // The next one finds a connection again once the broker is back.
            eprintln!("loud: {error}");
        }
    }
    Ok(())
}
