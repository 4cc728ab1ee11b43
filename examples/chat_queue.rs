//! The chat one step before: everybody reads from one shared queue, `chat`, so each message goes to one reader only.
//!
//! ```text
//! cargo run --example chat_queue             # two readers in one process, on the embedded broker
//! cargo run --example chat_queue -- --url amqp://localhost:5672
//! ```
//!
//! Publishes to the default exchange, where the routing key is the name of the queue.

mod options;

use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;

use coney::{App, Queue, Settings, Topology};

use options::Options;

const USAGE: &str = "usage: chat_queue [--url URL]";

fn main() -> ExitCode {
    match run(&Options::read(USAGE, &["--url"])) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("chat_queue: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> coney::Result<()> {
    let url: String = options.get("--url").unwrap_or_else(|| "memory://".to_owned());
    let app = App::from_settings(Settings::from_url(&url)?)?;
    let (read, reads) = mpsc::channel();
    for reader in ["Ada", "Bob"] {
        let read = read.clone();
        let topology = Topology::new().queue(Queue::new("chat"));
        // With a prefetch of 1 the readers take turns.
        let listener = app.listener("chat").name(reader).topology(topology).prefetch(1);
        listener
            .spawn(move |context, delivery| {
                let text = String::from_utf8_lossy(delivery.body());
                read.send(format!("{} reads: {text}", context.listener())).map_err(|gone| gone.to_string())
            })?
            .detach(); // the app stops it
    }
    let connection = app.publish_pool().connection()?;
    for text in ["hello?", "is anybody there?", "it echoes", "half of it"] {
        connection.publish("", "chat", text)?;
        match reads.recv_timeout(Duration::from_secs(10)) {
            Ok(line) => println!("{line}"),
            Err(_) => eprintln!("chat_queue: nobody has read {text:?} in 10 s"),
        }
    }
    drop(connection);
    app.shutdown(Duration::from_secs(10))?;
    println!("Each message was read once. For everybody to read everything, see chat_listen.");
    Ok(())
}
