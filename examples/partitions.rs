//! Orders of many customers, over several queues and any number of processes; those of one customer are handled in order.
//!
//! ```text
//! cargo run --example partitions                                  # nothing installed: publishes and consumes
//!
//! # With RabbitMQ, each in a terminal of its own; as many consumers as you like:
//! cargo run --example partitions -- --url amqp://localhost --role consume
//! cargo run --example partitions -- --url amqp://localhost --role consume
//! cargo run --example partitions -- --url amqp://localhost --role publish --customers 100 --orders 20
//! ```
//!
//! A consumer prints, for each order, its queue, its customer and its number. Start one more: the consumers share the partitions
//! anew. End one with Ctrl-C, or kill it: the others have what it had. `--config FILE` takes the settings of a file, `--partitions`
//! sets their number (4), `--name` the name of the partitioned queue (`coney-partitions`).

use std::io::Write;
use std::process::ExitCode;

use coney::{App, Partitioned, Settings, Topology};

#[path = "options/mod.rs"]
mod options;
use options::Options;

const USAGE: &str = "usage: partitions [--url URL | --config FILE] [--role consume | publish | both] [--name NAME]
                  [--partitions N] [--customers N] [--orders N]";
const KNOWN: [&str; 7] = ["--url", "--config", "--role", "--name", "--partitions", "--customers", "--orders"];

fn main() -> ExitCode {
    env_logger::init_from_env(env_logger::Env::default().default_filter_or("warn"));
    match run(&Options::read(USAGE, &KNOWN)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("partitions: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> coney::Result<()> {
    let mut settings = match options.get::<String>("--config") {
        Some(file) => Settings::from_file(file)?,
        None => Settings::from_url(&options.get::<String>("--url").unwrap_or("memory://partitions".to_owned()))?,
    };
    let name = options.get("--name").unwrap_or("coney-partitions".to_owned());
    let partitioned = Partitioned::new(&name, options.get("--partitions").unwrap_or(4));
    settings.topology = Topology::new().partitioned(partitioned);
    let app = App::from_settings(settings)?;
    let (customers, orders) = (options.get("--customers").unwrap_or(10), options.get("--orders").unwrap_or(3));
    match options.get::<String>("--role").as_deref() {
        Some("consume") => {
            consume(&app, &name, || ())?;
            app.run()
        }
        Some("publish") => publish(&app, &name, customers, orders),
        _ => {
            let (done, handled) = crossbeam_channel::unbounded();
            consume(&app, &name, move || {
                // Received until all have come.
                let _ = done.send(());
            })?;
            publish(&app, &name, customers, orders)?;
            handled.iter().take(customers * orders).for_each(drop);
            Ok(())
        }
    }
}

/// Prints each order, and calls `done`.
fn consume(app: &App, name: &str, done: impl Fn() + Send + Sync + 'static) -> coney::Result<()> {
    let orders = app.partitioned(name)?.clone();
    let listener = app.listener_partitioned(name).spawn(move |context, delivery| {
        let (customer, order) = (orders.key_of(delivery.routing_key()), delivery.message().text().unwrap_or_default());
        // A reader that has gone away is an error, and the order is not done.
        writeln!(std::io::stdout(), "{} {customer} {order}", context.queue())?;
        done();
        Ok::<(), std::io::Error>(())
    })?;
    listener.detach();
    Ok(())
}

/// Publishes an order of each customer, and then another one of each.
fn publish(app: &App, name: &str, customers: usize, orders: usize) -> coney::Result<()> {
    app.declare_topology()?;
    let partitioned = app.partitioned(name)?;
    let exchange = partitioned.exchange();
    let messages = (1..=orders).flat_map(|order| {
        let exchange = &exchange;
        (1..=customers).map(move |customer| {
            (exchange, partitioned.routing_key(&format!("customer-{customer}")), format!("order-{order}"))
        })
    });
    let sent = app.publish_pool().connection()?.publish_batch(messages)?;
    eprintln!("published {sent} orders");
    Ok(())
}
