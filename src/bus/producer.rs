//! What publishes to one exchange of a bus.

use serde::Serialize;

use crate::error::Result;
use crate::message::Message;
use crate::pool::Pool;
use crate::topology::Exchange;

/// Publishes JSON to one exchange. Cheap to clone, and may be used from any thread.
#[derive(Debug, Clone)]
pub struct Producer {
    pool: Pool,
    exchange: Exchange,
}

impl Producer {
    /// Publishes a value as JSON and waits until the broker has confirmed it. A message that matches no queue goes
    /// nowhere, which is no error. If the exchange is gone, it is declared again.
    ///
    /// # Errors
    ///
    /// [`Error::Json`](crate::Error::Json) if the value has no JSON; otherwise those of
    /// [`Connection::publish`](crate::Connection::publish).
    pub fn publish<T: Serialize + ?Sized>(&self, routing_key: &str, value: &T) -> Result<()> {
        let message = Message::json(value)?;
        let connection = self.pool.connection()?;
        match connection.publish(&self.exchange.name, routing_key, message.clone()) {
            Err(error) if error.code() == Some(404) => {
                connection.exchange_declare(&self.exchange)?;
                connection.publish(&self.exchange.name, routing_key, message)
            }
            other => other,
        }
    }

    pub(super) fn register(pool: Pool, exchange: Exchange) -> Result<Producer> {
        let producer = Producer { pool, exchange };
        producer.declare()?;
        Ok(producer)
    }

    fn declare(&self) -> Result<()> {
        // The default exchange is there, and may not be declared.
        if self.exchange.name.is_empty() { Ok(()) } else { self.pool.connection()?.exchange_declare(&self.exchange) }
    }
}
