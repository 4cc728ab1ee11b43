//! The talking half of the chat: sends what you type to everybody who listens. See `chat_listen`.
//!
//! ```text
//! cargo run --example chat_send              # --url URL for a broker elsewhere
//! printf 'Ada\nhello\n' | cargo run --example chat_send
//! ```
//!
//! Asks for your name first. `exit`, `quit` or the end of the input leaves.

mod options;

use std::io::{self, BufRead, IsTerminal, Write};
use std::process::ExitCode;

use coney::{App, Exchange, Settings};

use options::Options;

const USAGE: &str = "usage: chat_send [--url URL]";

fn main() -> ExitCode {
    match run(&Options::read(USAGE, &["--url"])) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("chat_send: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), Box<dyn std::error::Error>> {
    // Nobody listening is no mistake in a chat.
    let url: String = options.get("--url").unwrap_or_else(|| "amqp://localhost:5672".to_owned());
    let mut settings = Settings::from_url(&url)?;
    for pool in settings.pools.values_mut() {
        pool.mandatory = false;
    }
    let app = App::from_settings(settings)?;
    let pool = app.publish_pool();
    pool.connection()?.exchange_declare(&Exchange::fanout("broadcast_chat").durable(false))?;

    let name = loop {
        match ask("Your name: ")? {
            Some(name) if name.is_empty() => {}
            Some(name) => break name,
            None => return leave(),
        }
    };
    while let Some(text) = ask("> ")? {
        match text.as_str() {
            "exit" | "quit" => break,
            "" => {}
            // The routing key tells who speaks; a fanout exchange does not route by it.
            text => {
                if let Err(error) =
                    pool.connection().and_then(|connection| connection.publish("broadcast_chat", &name, text))
                {
                    eprintln!("chat_send: not sent: {error}");
                }
            }
        }
    }
    leave()
}

/// A line without the blanks around it; `None` at the end of the input. The prompt is for terminals only.
fn ask(prompt: &str) -> io::Result<Option<String>> {
    if io::stdin().is_terminal() {
        print!("{prompt}");
        io::stdout().flush()?;
    }
    let mut line = String::new();
    let read = io::stdin().lock().read_line(&mut line)?;
    Ok((read > 0).then(|| line.trim().to_owned()))
}

fn leave() -> Result<(), Box<dyn std::error::Error>> {
    println!("Goodbye!");
    Ok(())
}
