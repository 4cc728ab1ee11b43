//! Publishes 100 messages to a stream and reads it twice from its first offset: a stream keeps what was read.
//!
//! ```text
//! cargo run --example stream_replay -- --url memory://streams
//! cargo run --example stream_replay -- --url amqp://guest:guest@localhost:5672/%2f
//! ```
//!
//! The broker is the embedded one, which needs nothing installed, or RabbitMQ 3.9 or later. Declares the stream
//! `coney-stream-replay`, of at most 10 MB, which stays with RabbitMQ when the program ends: run it again, and it reads 200. Prints,
//! for each time it has read the stream, how many messages there were, and the first and the last of them with their offsets.

use std::process::ExitCode;
use std::time::Duration;

use coney::{App, Offset, Queue, Settings};

const STREAM: &str = "coney-stream-replay";
const MESSAGES: u32 = 100;

/// How long nothing comes before the end of the stream is taken for reached.
const QUIET: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    env_logger::init_from_env(env_logger::Env::default().default_filter_or("warn"));
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [option, url] = arguments.as_slice() else { return usage() };
    if option != "--url" {
        return usage();
    }
    match replay(url) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stream_replay: {error}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("usage: stream_replay --url URL");
    ExitCode::from(2)
}

fn replay(url: &str) -> coney::Result<()> {
    let app = App::from_settings(Settings::from_url(url)?)?;
    let connection = app.publish_pool().connection()?;
    connection.queue_declare(&Queue::new(STREAM).stream().max_length_bytes(10_000_000))?;
    connection.publish_batch((1..=MESSAGES).map(|number| ("", STREAM, format!("message {number}"))))?;
    drop(connection);
    println!("published {MESSAGES} messages to {STREAM}");
    for time in ["once", "twice"] {
        let read = read_all(&app)?;
        if let (Some((first, text)), Some((last, last_text))) = (read.first(), read.last()) {
            println!(
                "read it {time}: {} messages, from offset {first}, {text:?}, to offset {last}, {last_text:?}",
                read.len()
            );
        }
    }
    Ok(())
}

/// Everything in the stream, with the offsets.
fn read_all(app: &App) -> coney::Result<Vec<(u64, String)>> {
    let (seen, messages) = crossbeam_channel::unbounded();
    let listener = app.listener(STREAM).offset(Offset::First).spawn(move |_context, delivery| {
        let text = delivery.message().text().unwrap_or_default().to_owned();
        seen.send((delivery.stream_offset().unwrap_or_default(), text))
    })?;
    let read = std::iter::from_fn(|| messages.recv_timeout(QUIET).ok()).collect();
    listener.stop()?;
    Ok(read)
}
