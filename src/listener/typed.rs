//! Handlers of decoded messages, and several handlers on one queue, chosen by the routing key.

use std::fmt;

use serde::de::DeserializeOwned;

use super::route::AutoHandler;
use super::{Context, Listener, ListenerBuilder};
use crate::connection::Delivery;
use crate::encoding::Encoding;
use crate::error::{Error, Result};
use crate::field::check_short_string;
use crate::outcome::Outcome;
use crate::topic::Patterns;

/// A handler that is given what JSON in the body says. What cannot be decoded is no work of its own.
pub(super) fn decoding<T, F, O>(handler: F) -> impl Fn(&Context<'_>, &Delivery<'_>) -> Outcome + Send + Sync + 'static
where
    T: DeserializeOwned,
    F: Fn(&Context<'_>, T) -> O + Send + Sync + 'static,
    O: Into<Outcome>,
{
    move |context, delivery| match Encoding::Json.decode(delivery.message().body(), Encoding::MAX_INFLATED) {
        Ok(value) => handler(context, value).into(),
        Err(undecodable) => Outcome::Undecodable(undecodable.to_string()),
    }
}

impl ListenerBuilder {
    /// Starts listening for a handler that is given the value in each message: JSON, also compressed with gzip or zlib, of at most
    /// 64 MiB once inflated ([`Encoding::decode`] tells more). What the handler returns decides what becomes of the message, as
    /// with [`spawn`](Self::spawn).
    ///
    /// A message that cannot be decoded as a `T` goes to the queue `NAME.dead` at once, also where there is no retry policy; after
    /// [`without_retry`](Self::without_retry) it is rejected. What else is in the message, such as headers, has
    /// [`spawn`](Self::spawn) with [`Message::decode_json`](crate::Message::decode_json).
    ///
    /// ```
    /// # #[cfg(feature = "embedded")]
    /// # fn main() -> coney::Result<()> {
    /// use coney::{App, Message, Queue, Settings, Topology};
    ///
    /// #[derive(serde::Deserialize)]
    /// struct Order {
    ///     number: u32,
    /// }
    ///
    /// let app = App::from_settings(Settings::from_url("memory://spawn_json")?)?;
    /// let (seen, orders) = std::sync::mpsc::channel();
    /// let listener = app
    ///     .listener("orders")
    ///     .topology(Topology::new().queue(Queue::new("orders")))
    ///     .spawn_json(move |_context, order: Order| seen.send(order.number))?;
    /// app.publish_pool().publish("", "orders", Message::json(&serde_json::json!({ "number": 7 }))?)?;
    /// assert_eq!(orders.recv(), Ok(7));
    /// # listener.stop()
    /// # }
    /// # #[cfg(not(feature = "embedded"))]
    /// # fn main() {}
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`spawn`](Self::spawn).
    pub fn spawn_json<T, F, O>(self, handler: F) -> Result<Listener>
    where
        T: DeserializeOwned,
        F: Fn(&Context<'_>, T) -> O + Send + Sync + 'static,
        O: Into<Outcome>,
    {
        self.keeping_undecodable_if_it_may().spawn(decoding(handler))
    }

    /// Has a handler for the messages whose routing key matches `pattern`: words between dots, `*` for any one word, `#` for any
    /// number of them, none included, as in the bindings of a topic exchange. See [`Routes`].
    pub fn route<F, O>(self, pattern: &str, handler: F) -> Routes
    where
        F: Fn(&Context<'_>, &Delivery<'_>) -> O + Send + Sync + 'static,
        O: Into<Outcome>,
    {
        Routes::new(self).route(pattern, handler)
    }

    /// As [`route`](Self::route), for a handler that is given the value in the message, as with [`spawn_json`](Self::spawn_json).
    pub fn route_json<T, F, O>(self, pattern: &str, handler: F) -> Routes
    where
        T: DeserializeOwned,
        F: Fn(&Context<'_>, T) -> O + Send + Sync + 'static,
        O: Into<Outcome>,
    {
        Routes::new(self).route_json(pattern, handler)
    }
}

/// Several handlers of one listener, chosen by the routing key of each message. Made by [`ListenerBuilder::route`].
///
/// Of several patterns that match, the one that was added first has the message. A message that no pattern matches goes to the
/// handler of [`otherwise`](Routes::otherwise); without one it is rejected, and the log says so. A message that is tried again has
/// the routing key that it first came with.
///
/// ```no_run
/// # fn main() -> coney::Result<()> {
/// # let app = coney::App::from_file("app.toml")?;
/// # #[derive(serde::Deserialize)]
/// # struct Order;
/// app.listener("events")
///     .route_json("order.*", |_context, order: Order| { /* one order */ })
///     .route("customer.#", |_context, delivery| println!("{}", delivery.routing_key()))
///     .otherwise(|_context, delivery| println!("nobody asked for {}", delivery.routing_key()))
///     .spawn()?
///     .detach();
/// # Ok(())
/// # }
/// ```
#[must_use = "a listener does nothing until it is spawned"]
pub struct Routes {
    builder: ListenerBuilder,
    patterns: Patterns<usize>,
    /// As they were added, with what cannot be one of them.
    added: Vec<String>,
    handlers: Vec<Box<AutoHandler>>,
    otherwise: Option<Box<AutoHandler>>,
    mistake: Option<Error>,
}

impl fmt::Debug for Routes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Routes").field("builder", &self.builder).field("patterns", &self.added).finish_non_exhaustive()
    }
}

impl Routes {
    fn new(builder: ListenerBuilder) -> Routes {
        Routes {
            builder,
            patterns: Patterns::new(),
            added: Vec::new(),
            handlers: Vec::new(),
            otherwise: None,
            mistake: None,
        }
    }

    /// Adds a handler for the messages whose routing key matches `pattern`.
    pub fn route<F, O>(mut self, pattern: &str, handler: F) -> Routes
    where
        F: Fn(&Context<'_>, &Delivery<'_>) -> O + Send + Sync + 'static,
        O: Into<Outcome>,
    {
        if let Err(mistake) = self.check(pattern) {
            self.mistake.get_or_insert(mistake);
        }
        self.patterns.insert(pattern.as_bytes(), self.handlers.len());
        self.added.push(pattern.to_owned());
        self.handlers.push(Box::new(move |context, delivery| handler(context, delivery).into()));
        self
    }

    fn check(&self, pattern: &str) -> Result<()> {
        check_short_string(|| format!("route {pattern:?}"), pattern)?;
        if self.added.iter().any(|added| added == pattern) {
            return Err(Error::invalid(format!("route {pattern:?}"), "there is one for this pattern already"));
        }
        Ok(())
    }

    /// As [`route`](Self::route), for a handler that is given the value in the message, as with [`ListenerBuilder::spawn_json`].
    pub fn route_json<T, F, O>(mut self, pattern: &str, handler: F) -> Routes
    where
        T: DeserializeOwned,
        F: Fn(&Context<'_>, T) -> O + Send + Sync + 'static,
        O: Into<Outcome>,
    {
        self.builder = self.builder.keeping_undecodable_if_it_may();
        self.route(pattern, decoding(handler))
    }

    /// Has a handler for the messages that no pattern matches. Of several the last counts.
    pub fn otherwise<F, O>(mut self, handler: F) -> Routes
    where
        F: Fn(&Context<'_>, &Delivery<'_>) -> O + Send + Sync + 'static,
        O: Into<Outcome>,
    {
        self.otherwise = Some(Box::new(move |context, delivery| handler(context, delivery).into()));
        self
    }

    /// Starts listening.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] for a pattern that was added twice or has more than 255 bytes; else those of
    /// [`ListenerBuilder::spawn`].
    pub fn spawn(self) -> Result<Listener> {
        let Routes { builder, patterns, handlers, otherwise, mistake, .. } = self;
        if let Some(mistake) = mistake {
            return Err(mistake);
        }
        builder.spawn(move |context, delivery| {
            let mut found = Vec::new();
            patterns.route(delivery.routing_key().as_bytes(), &mut found);
            match (found.into_iter().min().and_then(|first| handlers.get(first)), &otherwise) {
                (Some(handler), _) | (None, Some(handler)) => handler(context, delivery),
                (None, None) => unmatched(context, delivery),
            }
        })
    }
}

fn unmatched(context: &Context<'_>, delivery: &Delivery<'_>) -> Outcome {
    let (listener, queue, id) = (context.listener(), context.queue(), delivery.message().message_id());
    let (message_id, key) = (id.unwrap_or_default(), delivery.routing_key());
    log::error!(
        listener, queue, message_id, outcome = "rejected";
        "listener {listener:?}: message from queue {queue:?}, id {id:?}: no route matches the routing key {key:?}; it is rejected"
    );
    Outcome::Reject
}
