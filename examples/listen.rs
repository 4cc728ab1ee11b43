//! Prints the messages of a queue until Ctrl-C.
//!
//! ```text
//! cargo run --features cli -- broker                # in another terminal, unless there is a broker on localhost
//! export CONEY_PROFILE=rabbitmq                     # of app.toml in the current directory: localhost:5672
//! cargo run --example listen QUEUE
//! cargo run --example listen QUEUE EXCHANGE KEY     # from a direct exchange, bound with this key
//! CONEY_BROKER__URL=amqp://user:password@host:5672/vhost cargo run --example listen QUEUE
//! ```
//!
//! With neither variable it runs on the embedded broker of app.toml, whose address it logs for others to publish to.
//!
//! Declares the queue (durable), and the exchange and the binding if they are named. Prints `[key] body` for each
//! message, and on stderr what happens to the connection: restart the broker and see. Ctrl-C or SIGTERM ends it once the
//! message in hand is done; what it has not printed stays in the queue.

mod alone;

use std::io::Write;
use std::process::ExitCode;

use coney::{App, Binding, Exchange, Outcome, Queue, Topology};

fn main() -> ExitCode {
    env_logger::init_from_env(env_logger::Env::default().default_filter_or("info"));
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut topology = Topology::new();
    let queue = match arguments.as_slice() {
        [queue] => queue,
        [queue, exchange, key] => {
            topology =
                topology.exchange(Exchange::direct(exchange)).bind(Binding::queue(queue).to(exchange).routing_key(key));
            queue
        }
        _ => {
            eprintln!("usage: listen QUEUE [EXCHANGE KEY]");
            return ExitCode::from(2);
        }
    };
    match run(queue, topology.queue(Queue::new(queue))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("listen: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(queue: &str, topology: Topology) -> coney::Result<()> {
    let app = App::from_file("app.toml")?;
    alone::warn(&app);
    let queue = queue.to_owned();
    // In a hook, so that a signal is an orderly end from the first message on.
    app.on_start_named(queue.clone(), move |app| {
        let shutdown = app.shutdown_handle();
        let listener = app.listener(&queue).topology(topology.clone()).spawn(move |_context, delivery| {
            let body = String::from_utf8_lossy(delivery.body());
            match writeln!(std::io::stdout(), "[{}] {body}", delivery.routing_key()) {
                Ok(()) => Outcome::Ack,
                Err(_) => {
                    // Nobody reads any more. What could not be printed goes back.
                    shutdown.shutdown();
                    Outcome::Requeue
                }
            }
        })?;
        listener.detach(); // the app stops it
        Ok(())
    });
    app.run()
}
