//! A worker with two routes: prints what it gets.
//!
//! ```text
//! export CONEY_PROFILE=rabbitmq              # of app.toml in the current directory: localhost:5672
//! cargo run --example queue_worker
//! ```
//!
//! Feed it with gzip JSON, or plain JSON: `amqp-publish -r a-queue -b '"hello"'`. What is not that ends in
//! `a-queue.dead`. Ctrl-C ends it.

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
    QueueWorker::new(&app)
        .route("a-queue", |text: String| println!("data received {text}"))
        .route("another-route", |data: Value| println!("another-route: {data}"))
        .run()?
        .detach(); // the app stops it
    app.run()
}
