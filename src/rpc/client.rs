//! The client's half: calls from many threads, one channel, and every answer to its own call.
//!
//! A thread that calls writes its request itself and waits at the socket for its answer. The channel is opened by a thread that
//! is there for as long as that takes ([`dispatcher`](super::dispatcher)), so that a call ends by its deadline also while nobody answers
//! the door. Callbacks are run on a thread of the client's, which begins with the first of them.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use serde_json::Value;

use super::dispatcher::Dispatcher;
use super::flight::{Answered, Asker, Call, Slot};
use crate::app::App;
use crate::connection::PublishContext;
use crate::connection::Received;
use crate::connection::callback::{Callback, Outstanding};
use crate::deadline;
use crate::encoding::Encoding;
use crate::error::{Error, Result, panic_text};
use crate::field::check_short_string;
use crate::message::Message;
use crate::pool::Pool;

/// RabbitMQ counts expirations in 32 bits of milliseconds, 49 days (<https://www.rabbitmq.com/docs/ttl>). A call that waits
/// for longer does not expire.
const LONGEST_EXPIRATION: Duration = Duration::from_millis(u32::MAX as u64);
/// How long a call waits for its answer where nothing else is said.
const TIMEOUT: Duration = Duration::from_secs(30);

/// What an RPC client has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct RpcClientStats {
    /// Requests that were sent.
    pub calls: u64,
    /// Answers that came too late, twice, or from strangers, and were dropped.
    pub unmatched: u64,
}

/// Calls workers. Cheap to clone, and may be used from any thread; all clones share one channel. See the
/// [module](crate::rpc).
///
/// Dropping the last clone closes it.
#[derive(Clone)]
pub struct RpcClient {
    closing: Arc<Closing>,
    outstanding: Arc<Outstanding>,
    context: Arc<PublishContext>,
    encoding: Encoding,
    max_inflated: usize,
    timeout: Duration,
}

/// Closes when the last client is gone; the threads know only what is within.
struct Closing(Arc<Dispatcher>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl fmt::Debug for RpcClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RpcClient").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl RpcClient {
    /// A client on the app's `publish` pool, of which it keeps one connection from its first call on.
    ///
    /// # Errors
    ///
    /// None so far. The broker is not asked for until the first call.
    pub fn new(app: &App) -> Result<RpcClient> {
        RpcClient::of_pool(app.publish_pool())
    }

    /// A client on a pool.
    ///
    /// # Errors
    ///
    /// Those of [`new`](RpcClient::new).
    pub fn of_pool(pool: &Pool) -> Result<RpcClient> {
        Ok(RpcClient {
            closing: Arc::new(Closing(Dispatcher::of(pool))),
            outstanding: Arc::default(),
            context: Arc::clone(pool.context()),
            encoding: Encoding::default(),
            max_inflated: Encoding::MAX_INFLATED,
            timeout: TIMEOUT,
        })
    }

    /// How requests are written, and whether answers are read as they are. Defaults to gzip JSON.
    #[must_use]
    pub fn with_encoding(mut self, encoding: Encoding) -> RpcClient {
        self.encoding = encoding;
        self
    }

    /// How long [`call`](RpcClient::call) and [`call_async`](RpcClient::call_async) wait for the answer. Defaults to 30 s.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> RpcClient {
        self.timeout = timeout;
        self
    }

    /// The largest answer that is accepted, in bytes once inflated. Defaults to 64 MiB.
    #[must_use]
    pub fn with_max_inflated(mut self, bytes: usize) -> RpcClient {
        self.max_inflated = bytes;
        self
    }

    /// Sends a request to a worker's queue and waits for the answer.
    ///
    /// # Errors
    ///
    /// [`Error::Remote`] with what the worker says; [`Error::Returned`] at once if there is no such queue;
    /// [`Error::Timeout`]; [`Error::Blocked`] if the broker takes no messages until then; [`Error::Encoding`] if the request has no JSON or the answer is not what was asked for; and why
    /// the connection was lost, if it was: whether the request was handled is then unknown.
    pub fn call<Req, Resp>(&self, queue: &str, request: &Req) -> Result<Resp>
    where
        Req: Serialize + ?Sized,
        Resp: DeserializeOwned,
    {
        self.call_timeout(queue, request, self.timeout)
    }

    /// Like [`call`](RpcClient::call), with a time-out of its own.
    ///
    /// # Errors
    ///
    /// Those of [`call`](RpcClient::call).
    pub fn call_timeout<Req, Resp>(&self, queue: &str, request: &Req, timeout: Duration) -> Result<Resp>
    where
        Req: Serialize + ?Sized,
        Resp: DeserializeOwned,
    {
        let message = self.message(queue, request, timeout)?;
        let slot = Arc::<Slot>::default();
        let asker = Asker::Thread(Arc::clone(&slot));
        let call = Call { queue: queue.to_owned(), deadline: deadline::after(timeout), timeout, asker };
        self.read(&self.closing.0.call(message, call, &slot)?)
    }

    /// Sends a request and does not wait; `callback` is run with the outcome, which is that of
    /// [`call`](RpcClient::call).
    ///
    /// Calls are pipelined: up to the pool's `max_in_flight` callbacks of all clones of a client may be outstanding. Then the
    /// call waits until there is room, and fails by its time-out. It also waits while the broker takes no messages. In a
    /// callback it does not wait, for nobody else would make room.
    ///
    /// The callback is run exactly once, on a thread of the client's, one after another; with an error on the calling thread
    /// if the client is closed. A panic in it is caught and logged. While a connection is being opened its deadline may be
    /// told late, by at most `connect_timeout` and `operation_timeout`.
    pub fn call_async<Req, Resp, F>(&self, queue: &str, request: &Req, callback: F)
    where
        Req: Serialize + ?Sized,
        Resp: DeserializeOwned + 'static,
        F: FnOnce(Result<Resp>) + Send + 'static,
    {
        let (encoding, max_inflated, timeout) = (self.encoding, self.max_inflated, self.timeout);
        let dispatcher = &self.closing.0;
        let callback = Callback::new("call_async", &self.outstanding, callback);
        let callback = Box::new(move |result: Result<Received>| {
            // The type is the caller's, and so is what it makes of the bytes.
            let read = |received| catch_unwind(AssertUnwindSafe(|| read(encoding, max_inflated, &received)));
            callback.run(result.and_then(|received| {
                read(received).unwrap_or_else(|panic| {
                    Err(Error::answer(format_args!("reading it panicked: {}", panic_text(&*panic))))
                })
            }));
        });
        let deadline = deadline::after(timeout);
        let message = self.message(queue, request, timeout);
        let message =
            message.and_then(|it| dispatcher.wait_for_room(&self.outstanding, queue, deadline, timeout).map(|()| it));
        match message {
            Ok(message) => {
                let asker = Asker::Callback(callback);
                let call = Call { queue: queue.to_owned(), deadline, timeout, asker };
                dispatcher.call_later(message, call);
            }
            Err(error) => dispatcher.run_later(Answered { callback, result: Err(error) }),
        }
    }

    /// What the client has done so far.
    pub fn stats(&self) -> RpcClientStats {
        let counters = self.closing.0.counters();
        RpcClientStats {
            calls: counters.calls.load(Ordering::Relaxed),
            unmatched: counters.unmatched.load(Ordering::Relaxed),
        }
    }

    /// Waits for the calls in flight, each until its own deadline, and gives the connection back, for all clones. A call
    /// after it is an error.
    pub fn close(&self) {
        self.closing.0.close();
    }

    fn message<Req: Serialize + ?Sized>(&self, queue: &str, request: &Req, timeout: Duration) -> Result<Message> {
        check_short_string(|| "queue name".to_owned(), queue)?;
        let message = match self.encoding {
            Encoding::Raw => self.encoding.encode(request),
            _ => self.encoding.encode(&Envelope(request)),
        }?;
        // Once nobody waits for the answer any more, the broker need not keep the request.
        let message = if timeout <= LONGEST_EXPIRATION {
            message.with_expiration(timeout.max(Duration::from_millis(1))).transient()
        } else {
            message.transient()
        };
        let message = self.context.prepare("", queue, message)?;
        self.context.check_body(&message)?;
        Ok(message)
    }

    fn read<Resp: DeserializeOwned>(&self, received: &Received) -> Result<Resp> {
        read(self.encoding, self.max_inflated, received)
    }
}

/// A request as workers take it.
struct Envelope<'a, T: ?Sized>(&'a T);

impl<T: Serialize + ?Sized> Serialize for Envelope<'_, T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(1))?;
        map.serialize_entry("data", self.0)?;
        map.end()
    }
}

/// What is in an answer: `data`, or the worker's error. Raw answers that are no such JSON are taken as they are.
fn read<Resp: DeserializeOwned>(encoding: Encoding, max_inflated: usize, received: &Received) -> Result<Resp> {
    let body = received.body();
    let envelope = match encoding {
        Encoding::Raw => Encoding::Json.decode::<Value>(body, max_inflated).ok(),
        _ => Some(encoding.decode::<Value>(body, max_inflated).map_err(Error::answer)?),
    };
    let (success, mut envelope) = match envelope {
        Some(envelope) if envelope["success"].is_boolean() => (envelope["success"] == true, envelope),
        _ if encoding == Encoding::Raw => return encoding.decode(body, max_inflated).map_err(Error::answer),
        _ => return Err(Error::answer("expected an object with \"success\" in it")),
    };
    if success {
        return serde_json::from_value(envelope["data"].take()).map_err(Error::answer);
    }
    let mut text = |name: &str| match envelope["error"][name].take() {
        Value::String(text) => text,
        Value::Null => String::new(),
        other => other.to_string(),
    };
    Err(Error::Remote { kind: text("type"), message: text("message"), trace: text("trace") })
}
