//! The worker's half: typed functions behind queues, and their answers.

use std::any::type_name;
use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::callback::panic_text;
use crate::delivery::Received;
use crate::encoding::Encoding;
use crate::error::{Error, Result};
use crate::listener::{Context, Listener};
use crate::outcome::Outcome;
use crate::worker::{Routes, settings};

/// The prefix of addresses that are no queues: an answer to one cannot be `mandatory`, for RabbitMQ returns it and delivers
/// it as well.
const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";

/// Queues with a function behind each, whose result is sent to whoever asked. See the [module](crate::rpc).
///
/// A request is acked once its answer is confirmed, so one whose worker dies is handled again by another. A function that
/// fails or panics is answered with `success: false`, and so is a request that cannot be decoded. A request without
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
        let (encoding, max_inflated) = (self.routes.encoding, self.routes.max_inflated);
        let fatal = FatalAddresses::default();
        self.routes.add(queue, move |context, delivery| {
            let result = match request::<Req>(encoding, delivery.body(), max_inflated) {
                Ok(request) => match catch_unwind(AssertUnwindSafe(|| handler(context, request))) {
                    Ok(result) => result.map_err(|error| Failure::of(&error)),
                    Err(panic) => {
                        let text = panic_text(&*panic).to_owned();
                        // What was thrown may throw again when it is dropped.
                        let _ = catch_unwind(AssertUnwindSafe(|| drop(panic)));
                        Err(Failure::new("panic", text))
                    }
                },
                Err(error) => Err(Failure::new("DecodeError", error.to_string())),
            };
            if let Err(failure) = &result {
                let (listener, queue) = (context.listener(), context.queue());
                log::error!("worker {listener:?}, queue {queue:?}: {}: {}", failure.kind, failure.message);
            }
            let data = result.and_then(|value| {
                serde_json::to_value(value).map_err(|error| Failure::new("EncodeError", error.to_string()))
            });
            answer(context, delivery, encoding, data, &fatal)
        });
        self
    }

    /// Connects, declares the queues and begins. The handle stops the worker when it is dropped, unless it is
    /// [detached](Listener::detach).
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`] if there are no routes, or two for one queue; [`Error::Connect`] if the broker has not
    /// been reached after all attempts, or at once if it refuses; otherwise those of
    /// [`ListenerBuilder::spawn`](crate::ListenerBuilder::spawn).
    pub fn run(self) -> Result<Listener> {
        self.routes.run()
    }
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

    fn of<E: fmt::Display + fmt::Debug>(error: &E) -> Failure {
        let path = type_name::<E>();
        // The name without the modules it is in; generic arguments would have modules of their own.
        let kind = if path.contains('<') { path } else { path.rsplit("::").next().unwrap_or(path) };
        let kind = if kind == "str" || kind == "&str" { "String" } else { kind };
        Failure { kind: kind.to_owned(), message: error.to_string(), trace: format!("{error:?}") }
    }
}

/// The value in a request: what is under `data`, where that is all there is, or the whole.
fn request<Req: DeserializeOwned>(encoding: Encoding, body: &[u8], max_inflated: usize) -> Result<Req> {
    if encoding == Encoding::Raw {
        return encoding.decode(body, max_inflated);
    }
    let whole: Value = encoding.decode(body, max_inflated)?;
    let wrong = |error: serde_json::Error| Error::Encoding { encoding: "request", problem: error.to_string() };
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
/// forged. Without knowing them a worker would meet the request again and again.
#[derive(Debug, Default)]
struct FatalAddresses(Mutex<VecDeque<String>>);

impl FatalAddresses {
    /// Far more than a worker meets between an answer and the redelivery of its request.
    const MOST: usize = 100;

    fn list(&self) -> MutexGuard<'_, VecDeque<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has(&self, address: &str) -> bool {
        self.list().iter().any(|known| known == address)
    }

    fn add(&self, address: &str) {
        let mut list = self.list();
        list.truncate(FatalAddresses::MOST - 1);
        list.push_front(address.to_owned());
    }
}

fn answer(
    context: &Context<'_>,
    request: &Received,
    encoding: Encoding,
    data: Result<Value, Failure>,
    fatal: &FatalAddresses,
) -> Outcome {
    let Some(reply_to) = request.message().reply_to() else {
        log::info!("worker {:?}: a request in queue {:?} wants no answer", context.listener(), context.queue());
        return Outcome::Ack;
    };
    if fatal.has(reply_to) {
        log::error!("worker {:?}: the broker takes no answer to {reply_to:?}", context.listener());
        return Outcome::Ack;
    }
    let body = match data {
        Ok(data) => json!({ "success": true, "data": data }),
        Err(Failure { kind, message, trace }) => {
            let error = json!({ "type": kind, "message": message, "args": [message], "trace": trace });
            json!({ "success": false, "error": error })
        }
    };
    // What is raw has no room for more than the result.
    let message = match (encoding, &body["data"]) {
        (Encoding::Raw, Value::Null) => Encoding::Json.encode(&body),
        (Encoding::Raw, data) => encoding.encode(data).or_else(|_| Encoding::Json.encode(&body)),
        _ => encoding.encode(&body),
    };
    let mut message = match message {
        Ok(message) => message.with_kind("result"),
        Err(error) => return Outcome::Failed(error.to_string()),
    };
    if let Some(id) = request.message().correlation_id() {
        message = message.with_correlation_id(id);
    }
    let sent = if reply_to.starts_with(DIRECT_REPLY_TO) {
        context.connection().publish_optional("", reply_to, message)
    } else {
        context.connection().publish_mandatory("", reply_to, message)
    };
    match sent {
        Ok(()) => Outcome::Ack,
        Err(
            error @ (Error::Returned { .. }
            | Error::ChannelClosed { .. }
            | Error::InvalidArgument { .. }
            | Error::Refused { .. }),
        ) => {
            log::warn!("worker {:?}: no answer was sent: {error}", context.listener());
            Outcome::Ack
        }
        Err(error) => {
            if let Error::ConnectionClosed { code: 541, .. } = error {
                fatal.add(reply_to);
            }
            log::warn!("worker {:?}: an answer was not sent, the request comes again: {error}", context.listener());
            Outcome::Requeue
        }
    }
}
