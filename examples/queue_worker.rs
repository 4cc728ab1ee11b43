//! A worker with two routes: prints what it gets.
//!
//! ```text
//! cargo run --features cli -- broker         # in another terminal, unless there is a broker on localhost
//! export CONEY_PROFILE=rabbitmq              # of app.toml in the current directory: localhost:5672
//! cargo run --example queue_worker
//! ```
//!
//! Feed it with gzip JSON, or plain JSON: `cargo run --features cli -- publish '' a-queue '"hello"'`, with the same
//! CONEY_PROFILE. What is not that ends in
//! `a-queue.dead`. Ctrl-C ends it.

mod alone;

use std::process::ExitCode;

use coney::App;
use coney::worker::QueueWorker;
use serde_json::Value;

fn main() -> ExitCode {
    env_logger::init_from_env(env_logger::Env::default().default_filter_or("info"));
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("queue_worker: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> coney::Result<()> {
    let app = App::from_file("app.toml")?;
    alone::warn(&app);
    QueueWorker::new(&app)
        .route("a-queue", |text: String| println!("data received {text}"))
        .route("another-route", |data: Value| println!("another-route: {data}"))
        .run()?
        .detach(); // the app stops it
    app.run()
}
