//! A worker that answers calls. See `rpc_client`.
//!
//! ```text
//! cargo run --features cli -- broker         # in another terminal, unless there is a broker on localhost
//! export CONEY_PROFILE=rabbitmq              # of app.toml in the current directory: localhost:5672
//! cargo run --example rpc_worker
//! ```
//!
//! Ctrl-C ends it.

mod alone;

use std::process::ExitCode;

use coney::App;
use coney::rpc::RpcWorker;

fn main() -> ExitCode {
    env_logger::init_from_env(env_logger::Env::default().default_filter_or("info"));
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rpc_worker: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> coney::Result<()> {
    let app = App::from_file("app.toml")?;
    alone::warn(&app);
    RpcWorker::new(&app)
        .route("a-route", |text: String| match text.as_str() {
            "" => Err("there is no text".to_owned()),
            text => Ok(format!("data received {text}")),
        })
        .run()?
        .detach(); // the app stops it
    app.run()
}
