//! The worker's half: typed functions behind queues, and their answers.

use std::any::type_name;
use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::connection::Connection;
use crate::connection::Received;
use crate::encoding::Encoding;
use crate::error::{Error, Result, panic_text};
use crate::listener::{AfterConfirm, Context, Listener};
use crate::message::Message;
use crate::outcome::{Outcome, RetryPolicy};
use crate::session::Outgoing;
use crate::worker::{Routes, settings};

/// The prefix of addresses that are no queues: an answer to one cannot be `mandatory`, for RabbitMQ returns it and delivers
/// it as well.
const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";

/// Queues with a function behind each, whose result is sent to whoever asked. See the [module](crate::rpc).
///
/// A request is acked once its answer is confirmed, so one whose worker dies is handled again by another. A function that
/// fails or panics is answered with `success: false`. So is one whose types panic when they are read, written or shown, a
/// request that cannot be decoded, and an answer that a [hook](crate::Pool::before_publish) refuses. A request without
/// `reply_to` is handled, and its result dropped. An answer to a queue that is gone is logged.
#[must_use = "a worker does nothing until it is run"]
pub struct RpcWorker {
    routes: Routes,
}

impl fmt::Debug for RpcWorker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RpcWorker").field("routes", &self.routes).finish()
    }
}

impl RpcWorker {
    settings!();

    fn of_routes(routes: Routes) -> RpcWorker {
        RpcWorker { routes: routes.without_retry() }
    }

    /// When requests are tried again whose answer cannot be written, for routes added after it: an error or a panic of the
    /// function is an answer, not a failure. Defaults to no policy, whatever the pool has: such a request is requeued once and
    /// then rejected, and no queues are declared beside those of the routes.
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.routes.set_retry(policy);
        self
    }

    /// Whether an answer that says of an error has its `Debug` form as `trace`, for routes added after it. Defaults to false:
    /// such a text may have a backtrace, paths of source files and values in it, and goes to whoever has asked.
    pub fn traces(mut self, traces: bool) -> Self {
        self.routes.traces = traces;
        self
    }

    /// Has `handler` called with what is in each request of `queue`; what it returns is the answer.
    pub fn route<Req, Resp, E, F>(self, queue: &str, handler: F) -> Self
    where
        Req: DeserializeOwned,
        Resp: Serialize,
        E: fmt::Display + fmt::Debug,
        F: Fn(Req) -> Result<Resp, E> + Send + Sync + 'static,
    {
        self.route_with_context(queue, move |_, request| handler(request))
    }

    /// Like [`route`](RpcWorker::route), for a handler that publishes too.
    pub fn route_with_context<Req, Resp, E, F>(mut self, queue: &str, handler: F) -> Self
    where
        Req: DeserializeOwned,
        Resp: Serialize,
        E: fmt::Display + fmt::Debug,
        F: Fn(&Context<'_>, Req) -> Result<Resp, E> + Send + Sync + 'static,
    {
        let (encoding, max_inflated, traces) = (self.routes.encoding, self.routes.max_inflated, self.routes.traces);
        let addresses = Arc::<Addresses>::default();
        self.routes.add(queue, move |context, delivery| {
            // All that is the route's own may panic: its function, and its types when they are read, written, shown or
            // dropped. Whoever asked is told so, and does not wait for nothing.
            let data = guarded(|| {
                let request = request::<Req>(encoding, delivery.body(), max_inflated)
                    .map_err(|error| Failure::new("DecodeError", error.to_string()))?;
                let value = handler(context, request).map_err(|error| Failure::of(&error, traces))?;
                serde_json::to_value(value).map_err(|error| Failure::new("EncodeError", error.to_string()))
            });
            if let Err(failure) = &data {
                let (listener, queue) = (context.listener(), context.queue());
                log::error!("worker {listener:?}, queue {queue:?}: {}: {}", failure.kind, failure.message);
            }
            answer(context, delivery, encoding, data, &addresses)
        });
        self
    }

    /// Connects, declares the queues and begins. The handle stops the worker when it is dropped, unless it is
    /// [detached](Listener::detach).
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] if there are no routes, or two for one queue; [`Error::TooManyListeners`], at once, if every
    /// connection of the pool has its listener; [`Error::Connect`] if the broker has not
    /// been reached after all attempts, or at once if it refuses; otherwise those of
    /// [`ListenerBuilder::spawn`](crate::ListenerBuilder::spawn).
    pub fn run(self) -> Result<Listener> {
        self.routes.run()
    }
}

/// What an answer calls a panic.
const PANIC: &str = "panic";

/// Runs what is the program's own, and makes a failure of a panic in it.
fn guarded<T>(run: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic_text(&*panic).to_owned();
        // What was thrown may throw again when it is dropped.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(panic)));
        Err(Failure::new(PANIC, text))
    })
}

/// What an answer says of an error.
struct Failure {
    kind: String,
    message: String,
    trace: String,
}

impl Failure {
    fn new(kind: &str, message: String) -> Failure {
        Failure { kind: kind.to_owned(), message, trace: String::new() }
    }

    fn of<E: fmt::Display + fmt::Debug>(error: &E, traced: bool) -> Failure {
        let path = type_name::<E>();
        // The name without the modules it is in; generic arguments would have modules of their own.
        let kind = if path.contains('<') { path } else { path.rsplit("::").next().unwrap_or(path) };
        let kind = if kind == "str" || kind == "&str" { "String" } else { kind };
        let trace = if traced { format!("{error:?}") } else { String::new() };
        Failure { kind: kind.to_owned(), message: error.to_string(), trace }
    }
}

/// The value in a request: what is under `data`, where that is all there is, or the whole.
fn request<Req: DeserializeOwned>(encoding: Encoding, body: &[u8], max_inflated: usize) -> Result<Req> {
    if encoding == Encoding::Raw {
        return encoding.decode(body, max_inflated);
    }
    let whole: Value = encoding.decode(body, max_inflated)?;
    let wrong = |error: serde_json::Error| Error::encoding("request", error);
    match whole {
        Value::Object(mut object) if object.len() == 1 && object.contains_key("data") => {
            let data = object.get_mut("data").map(Value::take).unwrap_or_default();
            serde_json::from_value(data.clone()).or_else(|error| {
                // A type of the handler's own may have one field of this name.
                serde_json::from_value(json!({ "data": data })).map_err(|_| wrong(error))
            })
        }
        whole => serde_json::from_value(whole).map_err(wrong),
    }
}

/// Addresses at which an answer has ended the connection: RabbitMQ does that (541) for a direct reply-to address that is
/// forged. Without knowing them a worker would meet the request again and again. Which of several answers under way it was
/// is not told, so all of them are suspects, until each has been sent alone.
#[derive(Debug, Default)]
struct Addresses {
    suspect: Mutex<VecDeque<String>>,
    fatal: Mutex<VecDeque<String>>,
}

impl Addresses {
    /// Of each kind. Far more than a worker meets between an answer and the redelivery of its request, unless it has a very
    /// large prefetch: then it takes more turns.
    const MOST: usize = 1000;

    fn list(list: &Mutex<VecDeque<String>>) -> MutexGuard<'_, VecDeque<String>> {
        list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_suspect(&self, address: &str) -> bool {
        Addresses::list(&self.suspect).iter().any(|known| known == address)
    }

    fn is_fatal(&self, address: &str) -> bool {
        Addresses::list(&self.fatal).iter().any(|known| known == address)
    }

    /// An answer to it has gone through.
    fn clear(&self, address: &str) {
        Addresses::list(&self.suspect).retain(|known| known != address);
    }

    /// The connection ended with an answer to it under way, `alone` or among others.
    fn blame(&self, address: &str, alone: bool) {
        let mut list = Addresses::list(if alone { &self.fatal } else { &self.suspect });
        list.truncate(Addresses::MOST - 1);
        list.push_front(address.to_owned());
    }
}

/// The message that answers `request`, as the pool's hooks let it out.
fn message(
    context: &Context<'_>,
    request: &Received,
    reply_to: &str,
    encoding: Encoding,
    data: Result<Value, Failure>,
) -> Result<Message, Failure> {
    let body = match data {
        Ok(data) => json!({ "success": true, "data": data }),
        Err(Failure { kind, message, trace }) => {
            let error = json!({ "type": kind, "message": message, "args": [message], "trace": trace });
            json!({ "success": false, "error": error })
        }
    };
    let unsent = |error: Error| Failure::new("SendError", error.to_string());
    // What is raw has no room for more than the result.
    let message = match (encoding, &body["data"]) {
        (Encoding::Raw, Value::Null) => Encoding::Json.encode(&body),
        (Encoding::Raw, data) => encoding.encode(data).or_else(|_| Encoding::Json.encode(&body)),
        _ => encoding.encode(&body),
    };
    let mut message = message.map_err(unsent)?.with_kind("result");
    if let Some(id) = request.message().correlation_id() {
        message = message.with_correlation_id(id);
    }
    context.connection().context.prepare("", reply_to, message).map_err(unsent)
}

fn answer(
    context: &Context<'_>,
    request: &Received,
    encoding: Encoding,
    data: Result<Value, Failure>,
    addresses: &Arc<Addresses>,
) -> Outcome {
    let Some(reply_to) = request.message().reply_to() else {
        log::info!("worker {:?}: a request in queue {:?} wants no answer", context.listener(), context.queue());
        return Outcome::Ack;
    };
    if addresses.is_fatal(reply_to) {
        log::error!("worker {:?}: the broker takes no answer to {reply_to:?}", context.listener());
        return Outcome::Ack;
    }
    let told = |failure: &Failure| {
        let (listener, queue) = (context.listener(), context.queue());
        log::error!("worker {listener:?}, queue {queue:?}: no answer was sent: {}", failure.message);
    };
    // A hook may refuse an answer, or panic at it. Whoever asked is told so, unless that is refused too.
    let message = guarded(|| message(context, request, reply_to, encoding, data)).or_else(|failure| {
        told(&failure);
        guarded(|| message(context, request, reply_to, encoding, Err(failure)))
    });
    let message = match message {
        Ok(message) => Arc::new(message),
        Err(failure) => {
            told(&failure);
            return if failure.kind == PANIC { Outcome::Failed(failure.message) } else { Outcome::Ack };
        }
    };
    let answer = Answer {
        listener: context.listener().to_owned(),
        mandatory: !reply_to.starts_with(DIRECT_REPLY_TO),
        reply_to: reply_to.to_owned(),
        message,
        addresses: Arc::clone(addresses),
    };
    answer.send(context)
}

/// An answer, and what is to be known of it once the broker has judged it.
struct Answer {
    listener: String,
    reply_to: String,
    message: Arc<Message>,
    mandatory: bool,
    addresses: Arc<Addresses>,
}

impl Answer {
    /// Sends it without waiting, unless its address is suspected of ending connections: nothing else is to be under way
    /// then that could be blamed for it, or be lost by it.
    fn send(self, context: &Context<'_>) -> Outcome {
        let connection = context.connection();
        if self.addresses.is_suspect(&self.reply_to) {
            connection.wait_for_answers();
            let sent = self.send_alone(connection);
            return self.settled(connection, sent, true);
        }
        match connection.publish_later(self.outgoing()) {
            Ok(call) => {
                let then = Box::new(move |connection: &Connection, sent| match sent {
                    // It may be another message on the channel that was refused.
                    Err(Error::ChannelClosed { .. }) => {
                        let sent = self.send_alone(connection);
                        self.settled(connection, sent, false)
                    }
                    sent => self.settled(connection, sent, false),
                });
                context.settle_after(AfterConfirm { call, then });
                Outcome::Ack
            }
            Err(error) => self.settled(connection, Err(error), false),
        }
    }

    /// Sends it and waits.
    fn send_alone(&self, connection: &Connection) -> Result<()> {
        let deadline = Instant::now() + connection.settings.confirm_timeout;
        connection.attempt(self.outgoing(), deadline).outcome
    }

    fn outgoing(&self) -> Outgoing<'_> {
        let Answer { reply_to, message, mandatory, .. } = self;
        Outgoing { exchange: "", routing_key: reply_to, message, mandatory: *mandatory }
    }

    /// What becomes of the request. `alone` if no other answer was under way.
    fn settled(&self, connection: &Connection, sent: Result<()>, alone: bool) -> Outcome {
        connection.tell_failure(self.outgoing(), &sent);
        match sent {
            Ok(()) => {
                if alone {
                    self.addresses.clear(&self.reply_to);
                }
                Outcome::Ack
            }
            Err(error @ (Error::Returned { .. } | Error::ChannelClosed { .. } | Error::InvalidArgument { .. })) => {
                log::warn!("worker {:?}: no answer was sent: {error}", self.listener);
                Outcome::Ack
            }
            Err(error) => {
                if let Error::ConnectionClosed { code: 541, .. } = error {
                    self.addresses.blame(&self.reply_to, alone);
                }
                log::warn!("worker {:?}: an answer was not sent, the request comes again: {error}", self.listener);
                Outcome::Requeue
            }
        }
    }
}
