//! Orders go from the database of a shop to the database of a warehouse, each of them exactly once.
//!
//! ```text
//! cargo run --example orders --features outbox-sqlite        # nothing installed: SQLite, and a broker in the program
//!
//! # With RabbitMQ: the warehouse in one terminal, the shop in another. Kill them, and the broker, and start them again.
//! cargo run --example orders --features outbox-sqlite -- --role warehouse --url amqp://localhost --directory /tmp/orders
//! cargo run --example orders --features outbox-sqlite -- --role shop --url amqp://localhost --directory /tmp/orders
//! ```
//!
//! The shop has 4 threads. Each writes an order and, in the same transaction, a message about it, until there are 1,000 orders
//! (`--orders`). The outbox forwards the messages. The warehouse notes the orders by way of an inbox. In the end the shop prints how
//! many orders there are in both databases. `--config FILE` takes the settings of a file.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use coney::inbox::Inbox;
use coney::outbox::Outbox;
use coney::{App, Queue, Settings, Topology};
use rusqlite::{Connection, TransactionBehavior};

#[path = "options/mod.rs"]
mod options;
use options::Options;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const USAGE: &str =
    "usage: orders [--url URL | --config FILE] [--role shop | warehouse | both] [--orders N] [--directory DIR]";
const QUEUE: &str = "coney-orders";
const THREADS: usize = 4;
/// How long the broker may be away.
const PATIENCE: Duration = Duration::from_secs(600);

fn main() -> ExitCode {
    env_logger::init_from_env(env_logger::Env::default().default_filter_or("warn"));
    let options = Options::read(USAGE, &["--url", "--config", "--role", "--orders", "--directory"]);
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("orders: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let mut settings = match options.get::<String>("--config") {
        Some(file) => Settings::from_file(file)?,
        None => Settings::from_url(&options.get::<String>("--url").unwrap_or("memory://orders".to_owned()))?,
    };
    settings.topology = Topology::new().queue(Queue::new(QUEUE).quorum());
    let app = App::from_settings(settings)?;
    let given: Option<PathBuf> = options.get("--directory");
    let directory =
        given.clone().unwrap_or_else(|| std::env::temp_dir().join(format!("orders-{}", std::process::id())));
    std::fs::create_dir_all(&directory)?;
    let orders = options.get("--orders").unwrap_or(1_000);
    let done = match options.get::<String>("--role").as_deref() {
        Some("warehouse") => {
            warehouse(&app, &directory)?;
            app.run().map_err(Into::into)
        }
        Some("shop") => shop(&app, &directory, orders),
        _ => {
            warehouse(&app, &directory)?;
            shop(&app, &directory, orders)
        }
    };
    if given.is_none() {
        app.shutdown(Duration::from_secs(10))?;
        std::fs::remove_dir_all(&directory)?;
    }
    done
}

fn database(directory: &Path, name: &str, table: &str) -> Result<Connection> {
    let database = Connection::open(directory.join(name))?;
    database.busy_timeout(Duration::from_secs(60))?;
    database.execute_batch(&format!("CREATE TABLE IF NOT EXISTS {table} (number INTEGER)"))?;
    Ok(database)
}

fn numbers(database: &Connection, table: &str) -> Result<Vec<u32>> {
    let mut query = database.prepare(&format!("SELECT number FROM {table}"))?;
    let numbers = query.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
    Ok(numbers)
}

/// Writes orders and their messages until all are there, and waits until all are forwarded.
fn shop(app: &App, directory: &Path, orders: u32) -> Result<()> {
    let outbox = Outbox::sqlite(directory.join("shop.db"))?;
    let shop = database(directory, "shop.db", "orders")?;
    let there: BTreeSet<u32> = numbers(&shop, "orders")?.into_iter().collect();
    let left = Mutex::new((1..=orders).filter(|number| !there.contains(number)).collect::<Vec<u32>>());
    thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(|| order(directory, &outbox, &left))).collect();
        // The orders do not wait for the broker. What is forwarded needs the queue, or it would be put aside.
        app.wait_for_broker(PATIENCE)?;
        app.declare_topology()?;
        outbox.forward(app)?;
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| Err("a thread panicked".into())))
    })?;
    while outbox.status()?.pending > 0 {
        thread::sleep(Duration::from_millis(20));
    }
    let (written, warehouse) = (numbers(&shop, "orders")?, database(directory, "warehouse.db", "handled")?);
    // The last of them may still be on their way.
    for _ in 0..1_500 {
        if numbers(&warehouse, "handled")?.len() >= written.len() {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    let handled = numbers(&warehouse, "handled")?;
    let distinct: BTreeSet<&u32> = handled.iter().collect();
    let missing = written.iter().filter(|number| !distinct.contains(number)).count();
    let (orders, twice) = (written.len(), handled.len() - distinct.len());
    println!("{orders} orders, {} handled, {missing} missing, {twice} handled twice", handled.len());
    Ok(())
}

/// Takes one number after another, and writes its order and its message in one transaction.
fn order(directory: &Path, outbox: &Outbox, left: &Mutex<Vec<u32>>) -> Result<()> {
    let mut shop = database(directory, "shop.db", "orders")?;
    loop {
        let Some(number) = left.lock().map_err(|_| "a thread panicked")?.pop() else { return Ok(()) };
        let transaction = shop.transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction.execute("INSERT INTO orders VALUES (?1)", [number])?;
        outbox.publish_in(&transaction, "", QUEUE, number.to_string())?;
        transaction.commit()?;
    }
}

/// Handles each order once.
fn warehouse(app: &App, directory: &Path) -> Result<()> {
    drop(database(directory, "warehouse.db", "handled")?);
    let inbox = Inbox::sqlite(directory.join("warehouse.db"))?;
    let listener = app.listener(QUEUE).topology(app.topology().clone()).in_background().inbox(&inbox).spawn_tx(
        |_context, delivery, transaction| -> Result<()> {
            let number: u32 = delivery.message().text().unwrap_or_default().parse()?;
            transaction.execute("INSERT INTO handled VALUES (?1)", [number])?;
            Ok(())
        },
    )?;
    listener.detach(); // the app stops it
    Ok(())
}
