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

mod options;

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use coney::ExchangeKind;
use coney::bus::Bus;

use options::Options;

const USAGE: &str = "usage: hello [--url URL] [--every MILLISECONDS]";

fn main() -> ExitCode {
    match run(&Options::read(USAGE, &["--url", "--every"])) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hello: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> coney::Result<()> {
    let url: String = options.get("--url").unwrap_or_else(|| "amqp://localhost:5672".to_owned());
    let every: Option<u64> = options.get("--every");
    let mut bus = Bus::connect(&url)?;
    bus.register_consumer("in2com", ExchangeKind::Direct, ["ticks"], |tick: u64, _| println!("tick {tick}"))?;
    let producer = bus.register_producer("in2com", ExchangeKind::Direct)?;
    let _running = bus.spawn()?; // ticks are printed on its thread
    loop {
        // Between 1 and 10 seconds if it is not said.
        let millis = every.unwrap_or_else(|| fastrand::u64(1_000..=10_000));
        thread::sleep(Duration::from_millis(millis));
        if let Err(error) = producer.publish("greetings", "hello world!") {
            // The next one finds a connection again once the broker is back.
            eprintln!("hello: {error}");
        }
    }
}
