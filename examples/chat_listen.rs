//! The listening half of the chat: prints what anybody says, with a queue of its own.
//!
//! ```text
//! cargo run --features cli -- broker         # unless there is a broker on localhost already
//! cargo run --example chat_listen            # --url URL for a broker elsewhere; as often as you like
//! cargo run --example chat_send
//! ```
//!
//! Ctrl-C ends it.

mod options;

use std::process::ExitCode;

use coney::{App, Binding, Exchange, Queue, Settings, Topology};

use options::Options;

const USAGE: &str = "usage: chat_listen [--url URL]";

fn main() -> ExitCode {
    match run(&Options::read(USAGE, &["--url"])) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("chat_listen: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> coney::Result<()> {
    let url: String = options.get("--url").unwrap_or_else(|| "amqp://localhost:5672".to_owned());
    let app = App::from_settings(Settings::from_url(&url)?)?;
    // A fanout exchange hands a copy to every queue. This one is named by the broker, is ours alone, and ends with us.
    let topology = Topology::new()
        .exchange(Exchange::fanout("broadcast_chat").durable(false))
        .queue(Queue::server_named())
        .bind(Binding::queue("").to("broadcast_chat"));
    let listener = app.listener("").name("chat").topology(topology).spawn(|_context, delivery| {
        println!("[{}] {}", delivery.routing_key(), String::from_utf8_lossy(delivery.body()));
    })?;
    listener.detach(); // the app stops it
    println!("Listening. Ctrl-C leaves.");
    app.run()?;
    println!("Goodbye!");
    Ok(())
}
