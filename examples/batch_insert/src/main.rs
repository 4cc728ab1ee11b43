//! Inserts messages into SQLite, many in one transaction.
//!
//! ```text
//! cargo run -p coney-batch-insert                         # 1000 messages
//! cargo run -p coney-batch-insert -- --messages 100000
//! ```
//!
//! Publishes readings to the embedded broker, and listens for them with batches of up to 500. A batch is one transaction, and
//! its messages are acked once that is committed. Prints `1000 rows in 2 batches`.
//!
//! A message may come again after a crash or a lost connection. Its number is the key of its row, so it is still one row.

use std::process::ExitCode;
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;

use coney::{App, Batch, Queue, Settings, Topology};
use rusqlite::Connection;

const QUEUE: &str = "readings";
/// How many rows a transaction has at most.
const MAX: u16 = 500;
/// How long the first message of a batch waits for others.
const WAIT: Duration = Duration::from_millis(200);
/// How long nothing may come before something is wrong.
const PATIENCE: Duration = Duration::from_secs(30);

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> ExitCode {
    env_logger::init_from_env(env_logger::Env::default().default_filter_or("warn"));
    match messages().and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("batch_insert: {error}");
            ExitCode::FAILURE
        }
    }
}

/// How many messages are asked for.
fn messages() -> Result<u32, Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [] => Ok(1000),
        ["--messages", count] => match count.parse() {
            Ok(count) if count > 0 => Ok(count),
            _ => Err(format!("--messages is {count:?}, expected a whole number from 1 to {}", u32::MAX).into()),
        },
        _ => Err(format!("got {}, expected nothing or --messages N", arguments.join(" ")).into()),
    }
}

fn run(messages: u32) -> Result<(), Failure> {
    let database = Connection::open_in_memory()?;
    database.execute_batch("CREATE TABLE readings (number INTEGER PRIMARY KEY, celsius REAL NOT NULL)")?;
    // A handler may be called by several threads.
    let database = Mutex::new(database);

    let app = App::from_settings(Settings::from_url("memory://batch_insert")?)?;
    let (told, inserted) = mpsc::channel();
    let listener = app
        .listener(QUEUE)
        .topology(Topology::new().queue(Queue::new(QUEUE)))
        // The next batch comes while one is inserted.
        .prefetch(2 * MAX)
        .batch(MAX, WAIT)
        .spawn_batch(move |_context, batch: &mut Batch| -> Result<(), Failure> {
            let mut database = database.lock().unwrap_or_else(PoisonError::into_inner);
            let rows = insert(&mut database, batch)?; // an error: the whole batch is tried again
            let _ = told.send(rows); // nobody asks any more once the program ends
            Ok(())
        })?;

    let publisher = app.publish_pool().connection()?;
    publisher.publish_batch((1..=messages).map(|number| {
        let celsius = f64::from(number % 400) / 10.0;
        ("", QUEUE, format!("{number} {celsius}"))
    }))?;
    drop(publisher);

    let (mut rows, mut batches) = (0, 0);
    while rows < u64::from(messages) {
        rows += inserted.recv_timeout(PATIENCE).map_err(|_| format!("{rows} rows of {messages} after {PATIENCE:?}"))?;
        batches += 1;
    }
    println!("{rows} rows in {batches} batches");
    listener.stop()?;
    app.shutdown(PATIENCE)?;
    Ok(())
}

/// Inserts what can be read, in one transaction; returns how many rows are new.
fn insert(database: &mut Connection, batch: &mut Batch) -> rusqlite::Result<u64> {
    let transaction = database.transaction()?;
    let mut rows = 0;
    {
        let mut insert = transaction.prepare("INSERT OR IGNORE INTO readings VALUES (?1, ?2)")?;
        for item in batch.iter_mut() {
            match reading(item.message().text().unwrap_or_default()) {
                Some((number, celsius)) => rows += insert.execute((number, celsius))? as u64,
                // The others are none the worse for it.
                None => item.fail("expected a number and a temperature"),
            }
        }
    }
    transaction.commit()?;
    Ok(rows)
}

fn reading(text: &str) -> Option<(u32, f64)> {
    let (number, celsius) = text.split_once(' ')?;
    Some((number.parse().ok()?, celsius.parse().ok()?))
}
