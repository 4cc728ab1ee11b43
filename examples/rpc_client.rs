//! Calls a worker with a text, and prints the data of its answer. See `rpc_worker`, which has to run beside it.
//!
//! ```text
//! export CONEY_PROFILE=rabbitmq              # of app.toml in the current directory: localhost:5672; the worker's too
//! cargo run --example rpc_client a-route hello
//! ```

mod alone;

use std::process::ExitCode;

use coney::App;
use coney::rpc::RpcClient;
use serde_json::Value;

fn main() -> ExitCode {
    env_logger::init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [queue, text] = arguments.as_slice() else {
        eprintln!("usage: rpc_client QUEUE TEXT");
        return ExitCode::from(2);
    };
    match run(queue, text) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rpc_client: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(queue: &str, text: &str) -> coney::Result<()> {
    let app = App::from_file("app.toml")?;
    alone::warn(&app);
    match RpcClient::new(&app)?.call(queue, text)? {
        Value::String(data) => println!("{data}"),
        data => println!("{data}"),
    }
    Ok(())
}
