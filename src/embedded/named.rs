//! Brokers by name, one of each in this process.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use super::EmbeddedBroker;
use crate::error::Result;

static NAMED: LazyLock<Mutex<HashMap<String, Arc<EmbeddedBroker>>>> = LazyLock::new(Mutex::default);

/// The broker of this name. If there is none it is started with the defaults, and with
/// [`quorum_queues`](super::Builder::quorum_queues), so that a settings file for RabbitMQ serves it too.
///
/// It lives as long as the process, whoever drops it, unless it is stopped; then the next call starts another.
///
/// # Errors
///
/// As [`Builder::start`](super::Builder::start).
pub fn named(name: &str) -> Result<Arc<EmbeddedBroker>> {
    // Starting takes a few milliseconds at most, so that the others may well wait for it.
    let mut named = NAMED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(broker) = named.get(name).filter(|broker| !broker.server.is_stopped()) {
        return Ok(broker.clone());
    }
    let broker = Arc::new(EmbeddedBroker::builder().quorum_queues(true).start()?);
    log::info!("the embedded broker {name:?} listens on {}", broker.addr());
    // Dropping the one that was stopped does nothing more.
    named.insert(name.to_owned(), broker.clone());
    Ok(broker)
}
