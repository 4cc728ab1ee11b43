//! A listener whose database goes away and comes back. It rests meanwhile, and every order is stored in the end.
//!
//! ```text
//! cargo run --example paused
//! ```
//!
//! Runs on a broker in its own process and ends by itself. It publishes 5 orders and stores them. Then the database refuses what it
//! is given, and 20 more orders are published. When half of the orders have failed, the listener rests for half a second. Then it
//! tries one order, which fails, and it rests again, until the database is back. Prints what the listener does and why, and at last
//! how many orders are stored and how many were given up.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use coney::{App, Listener, ListenerState, PauseReason, Queue, RetryPolicy, Settings, Topology};

/// A database that may be away.
#[derive(Default)]
struct Database {
    is_away: bool,
    orders: BTreeSet<String>,
}

impl Database {
    fn store(&mut self, order: &str) -> Result<(), &'static str> {
        if self.is_away {
            return Err("the database does not answer");
        }
        self.orders.insert(order.to_owned());
        Ok(())
    }
}

fn main() -> coney::Result<()> {
    env_logger::init_from_env(env_logger::Env::default().default_filter_or("off"));
    let app = App::from_settings(Settings::from_url("memory://paused")?)?;
    let database = Arc::new(Mutex::new(Database::default()));
    let of_listener = Arc::clone(&database);
    let listener = app
        .listener("orders")
        .topology(Topology::new().queue(Queue::new("orders")))
        .retry(RetryPolicy::new([Duration::from_millis(100)])?)
        .pause_on_failures(5, 0.5, Duration::from_secs(60), Duration::from_millis(500))
        .spawn(move |_context, delivery| lock(&of_listener).store(delivery.message().text().unwrap_or_default()))?;

    publish(&app, 1..=5)?;
    wait_until(|| lock(&database).orders.len() == 5);
    println!("{} orders are stored", lock(&database).orders.len());

    lock(&database).is_away = true;
    println!("the database is away");
    publish(&app, 6..=25)?;
    wait_until(|| why_paused(&listener).inspect(|why| println!("the listener rests: {why}")).is_some());
    let still_fails = || why_paused(&listener).filter(|why| matches!(why, PauseReason::StillFailing { .. }));
    wait_until(|| still_fails().inspect(|why| println!("the listener still rests: {why}")).is_some());

    lock(&database).is_away = false;
    println!("the database is back");
    wait_until(|| matches!(listener.state(), ListenerState::Consuming));
    println!("the listener goes on");
    wait_until(|| lock(&database).orders.len() == 25);
    println!("{} orders are stored, {} were given up", lock(&database).orders.len(), listener.stats().dead);
    listener.stop()
}

fn why_paused(listener: &Listener) -> Option<PauseReason> {
    match listener.state() {
        ListenerState::Paused { why, .. } => Some(why),
        _ => None,
    }
}

fn lock(database: &Mutex<Database>) -> MutexGuard<'_, Database> {
    database.lock().unwrap_or_else(PoisonError::into_inner)
}

fn publish(app: &App, mut numbers: RangeInclusive<u32>) -> coney::Result<()> {
    numbers.try_for_each(|number| app.publish_pool().publish("", "orders", format!("order {number}")))
}

fn wait_until(is_so: impl Fn() -> bool) {
    while !is_so() {
        thread::sleep(Duration::from_millis(10));
    }
}
