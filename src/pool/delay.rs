//! Publishing through a pool what is to arrive later: declaring what it needs on its way outlives connections, too.

use std::panic::Location;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::group::Request;
use super::publish::TOO_LITTLE;
use super::shared::Tries;
use super::{Backoff, Pool, deadline};
use crate::connection::Connection;
use crate::connection::confirms::Route;
use crate::connection::delay::{self, Delay};
use crate::error::{Error, Result};
use crate::message::Message;

impl Pool {
    /// Publishes a message that is to arrive after `delay`, and waits for the broker to confirm it, through lost connections
    /// as [`publish`](Pool::publish) does.
    ///
    /// The delay is counted anew when the message is published again. What a delay is, and what becomes of the message, is as
    /// with [`Connection::publish_after`](crate::Connection::publish_after).
    ///
    /// # Errors
    ///
    /// Those of [`publish`](Pool::publish) and of
    /// [`Connection::publish_after`](crate::Connection::publish_after).
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # fn main() -> coney::Result<()> {
    /// # let app = coney::App::from_file("app.toml")?;
    /// app.publish_pool().publish_after(Duration::from_secs(3600), "events", "order.unpaid", "{\"order\": 1}")?;
    /// # Ok(())
    /// # }
    /// ```
    #[track_caller]
    pub fn publish_after(
        &self,
        delay: Duration,
        exchange: &str,
        routing_key: &str,
        message: impl Into<Message>,
    ) -> Result<()> {
        let (location, timeout) = (Location::caller(), self.settings().publish_timeout);
        let Some(delay) = Delay::new(delay)? else {
            return self.publish_within(exchange, routing_key, message.into(), timeout, location);
        };
        self.maker().check()?;
        let deadline = deadline::after(timeout);
        let message = self.context().prepare(exchange, routing_key, message.into())?;
        let message = Arc::new(delay.with_route(exchange, message)?.with_some_id());
        let route = Route::new(delay::entry(self.settings().delay_queue_type), routing_key);
        let request = Request { route, message, mandatory: true, deadline };
        let outcome = self
            .check_queue(exchange, &request, location)
            .and_then(|()| self.publish_delayed(delay, exchange, &request, timeout, location));
        if let Err(error) = &outcome {
            self.context().events.failed((exchange, routing_key), &request.message, error);
        }
        outcome
    }

    /// Publishes a message with a way, and once more if what was declared for it has been deleted.
    fn publish_delayed(
        &self,
        delay: Delay,
        exchange: &str,
        request: &Request,
        timeout: Duration,
        location: &'static Location<'static>,
    ) -> Result<()> {
        let attempt = || {
            self.declare_delay(delay, exchange, request, location)?;
            self.publish_request(request, timeout, location)
        };
        let delays = &self.context().delays;
        let was_known = delays.has(delay, exchange);
        let first = attempt();
        // A broker that has lost it may have come between the two steps.
        let is_known = delays.has(delay, exchange);
        if !delay::is_not_routed(&first) || !(was_known || is_known) {
            return first;
        }
        delays.forget();
        attempt()
    }

    /// See [`Connection::check_queue`].
    fn check_queue(&self, exchange: &str, request: &Request, location: &'static Location<'static>) -> Result<()> {
        if !delay::is_queue_checked(exchange, self.settings()) {
            return Ok(());
        }
        self.on_a_connection(request, location, |connection| {
            connection.check_queue(exchange, &request.route.routing_key)
        })
    }

    /// Declares what a message needs on its way, unless it is known to be there.
    fn declare_delay(
        &self,
        delay: Delay,
        exchange: &str,
        request: &Request,
        location: &'static Location<'static>,
    ) -> Result<()> {
        if self.context().delays.has(delay, exchange) {
            return Ok(());
        }
        self.on_a_connection(request, location, |connection| connection.declare_delay(delay, exchange))
    }

    /// Does something before a message is published, on one connection after another until one lasts long enough.
    fn on_a_connection(
        &self,
        request: &Request,
        location: &'static Location<'static>,
        step: impl Fn(&Connection) -> Result<()>,
    ) -> Result<()> {
        let deadline = request.deadline;
        let mut backoff = Backoff::of_connecting();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let connection = self.checkout(left, Tries::Many, location)?;
            let error = match step(&connection) {
                Err(error @ (Error::ConnectionLost { .. } | Error::ConnectionClosed { .. }))
                    if error.is_transient() =>
                {
                    error
                }
                outcome => return outcome,
            };
            drop(connection);
            let wait = backoff.next();
            if Instant::now() + wait + TOO_LITTLE >= deadline {
                return Err(error);
            }
            log::debug!(pool = self.name(); "pool {:?}: {error}; preparing the way of a delayed message again", self.name());
            self.shared.sleep(wait);
        }
    }
}
