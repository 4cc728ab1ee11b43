//! The client's half: calls from many threads, one channel, and every answer to its own call.
//!
//! One thread owns the channel. It takes calls from a queue, publishes them, and matches what comes back by correlation id;
//! what it cannot match it counts. When the channel ends, all calls in flight get the cause, and the next call opens
//! another. Callbacks are run on a second thread, so that a slow one keeps no answer waiting.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use amiquip::{Confirm, ConsumerMessage, ConsumerOptions, Publish};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, at, bounded, never, select, unbounded};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::app::App;
use crate::callback::{Callback, Outstanding};
use crate::connection::Connection;
use crate::deadline;
use crate::delivery::Received;
use crate::encoding::Encoding;
use crate::error::{Error, Result};
use crate::field::check_short_string;
use crate::link::{OpenChannel, cancel};
use crate::message::Message;
use crate::outlet::Outlet;
use crate::pool::Pool;

/// The queue that is none: answers come to whoever consumes from it on the channel that asked.
const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";
/// How long a call waits for its answer where nothing else is said.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How long one attempt to connect goes on before the calls that wait for it are looked at.
const CONNECT_SLICE: Duration = Duration::from_secs(1);

type Answer = Box<dyn FnOnce(Result<Received>) + Send>;

/// A call on its way. However it ends, it is answered once.
struct Call {
    queue: String,
    message: Message,
    deadline: Instant,
    timeout: Duration,
    answer: Option<Answer>,
}

impl Call {
    fn answer(mut self, result: Result<Received>) {
        if let Some(answer) = self.answer.take() {
            answer(result);
        }
    }

    fn time_out(self) {
        let error = Error::Timeout { during: during(&self.queue), after: self.timeout };
        self.answer(Err(error));
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if let Some(answer) = self.answer.take() {
            let detail = "the client was closed".to_owned();
            answer(Err(Error::ConnectionLost { during: during(&self.queue), detail }));
        }
    }
}

fn during(queue: &str) -> String {
    format!("call to queue {queue:?}")
}

#[derive(Debug, Default)]
struct Counters {
    calls: AtomicU64,
    unmatched: AtomicU64,
}

/// What an RPC client has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct RpcClientStats {
    /// Requests that were sent.
    pub calls: u64,
    /// Answers that came too late, twice, or from strangers, and were dropped.
    pub unmatched: u64,
}

type Run = Box<dyn FnOnce() + Send>;

struct Inner {
    /// `None` once closed.
    calls: Mutex<Option<Sender<Call>>>,
    /// `None` once closed, after the calls.
    callbacks: Mutex<Option<Sender<Run>>>,
    outstanding: Arc<Outstanding>,
    counters: Arc<Counters>,
    owner: Mutex<Option<JoinHandle<()>>>,
    runner: Mutex<Option<JoinHandle<()>>>,
}

impl Inner {
    fn close(&self) {
        drop(take(&self.calls));
        join(&self.owner);
        // Every call is answered now, so no more callbacks come.
        drop(take(&self.callbacks));
        join(&self.runner);
    }

    fn enqueue(&self, call: Call) {
        let calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        match &*calls {
            // The owner ends once this sender is gone and not before.
            Some(calls) => drop(calls.send(call)),
            // Answered as one that is dropped.
            None => drop(call),
        }
    }

    fn run_later(&self, callback: Run) {
        let callbacks = self.callbacks.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match callbacks {
            Some(callbacks) => drop(callbacks.send(callback)),
            None => callback(),
        }
    }
}

fn take<T>(slot: &Mutex<Option<T>>) -> Option<T> {
    slot.lock().unwrap_or_else(PoisonError::into_inner).take()
}

fn join(slot: &Mutex<Option<JoinHandle<()>>>) {
    // A callback that drops the last client runs on a thread that cannot wait for itself.
    if let Some(thread) = take(slot)
        && thread.thread().id() != std::thread::current().id()
    {
        // There is nothing in it that could panic but what is caught.
        let _ = thread.join();
    }
}

/// Calls workers. Cheap to clone, and may be used from any thread; all clones share one channel. See the
/// [module](crate::rpc).
///
/// Dropping the last clone closes it.
#[derive(Clone)]
pub struct RpcClient {
    closing: Arc<Closing>,
    outlet: Arc<Outlet>,
    encoding: Encoding,
    max_inflated: usize,
    timeout: Duration,
}

/// Closes when the last client is gone; the threads know only what is within.
struct Closing(Arc<Inner>);

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
    /// [`Error::Thread`] if a thread cannot be started. The broker is not asked for until the first call.
    pub fn new(app: &App) -> Result<RpcClient> {
        RpcClient::of_pool(app.publish_pool())
    }

    /// A client on a pool.
    ///
    /// # Errors
    ///
    /// Those of [`new`](RpcClient::new).
    pub fn of_pool(pool: &Pool) -> Result<RpcClient> {
        let (calls, work) = unbounded();
        let (callbacks, to_run) = unbounded::<Run>();
        let counters = Arc::<Counters>::default();
        let owner = Owner { pool: pool.clone(), work, counters: Arc::clone(&counters), waiting: Vec::new() };
        let owner = start("coney-rpc", move || owner.run())?;
        // Panics are caught by the callbacks themselves.
        let runner = start("coney-rpc-callbacks", move || to_run.iter().for_each(|callback| callback()))?;
        let inner = Inner {
            calls: Mutex::new(Some(calls)),
            callbacks: Mutex::new(Some(callbacks)),
            outstanding: Arc::default(),
            counters,
            owner: Mutex::new(Some(owner)),
            runner: Mutex::new(Some(runner)),
        };
        Ok(RpcClient {
            closing: Arc::new(Closing(Arc::new(inner))),
            outlet: Arc::clone(pool.outlet()),
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
    /// [`Error::Timeout`]; [`Error::Encoding`] if the request has no JSON or the answer is not what was asked for; and why
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
        let (answer, answered) = bounded(1);
        let deadline = deadline::after(timeout);
        // The caller may have stopped waiting.
        let answer: Answer = Box::new(move |result| drop(answer.try_send(result)));
        self.closing.0.enqueue(Call { queue: queue.to_owned(), message, deadline, timeout, answer: Some(answer) });
        match answered.recv_deadline(deadline) {
            Ok(result) => self.read(&result?),
            Err(RecvTimeoutError::Timeout) => Err(Error::Timeout { during: during(queue), after: timeout }),
            Err(RecvTimeoutError::Disconnected) => {
                Err(Error::ConnectionLost { during: during(queue), detail: "the client was closed".to_owned() })
            }
        }
    }

    /// Sends a request and does not wait; `callback` is run with the outcome, which is that of
    /// [`call`](RpcClient::call).
    ///
    /// The callback is run exactly once, on a thread of the client's, one after another. A panic in it is caught and logged.
    pub fn call_async<Req, Resp, F>(&self, queue: &str, request: &Req, callback: F)
    where
        Req: Serialize + ?Sized,
        Resp: DeserializeOwned + 'static,
        F: FnOnce(Result<Resp>) + Send + 'static,
    {
        let (encoding, max_inflated, timeout) = (self.encoding, self.max_inflated, self.timeout);
        let inner = &self.closing.0;
        let callback = Callback::new("call_async", &inner.outstanding, callback);
        match self.message(queue, request, timeout) {
            Ok(message) => {
                let runner = Arc::clone(inner);
                let answer: Answer = Box::new(move |result| {
                    let read =
                        move || callback.run(result.and_then(|received| read(encoding, max_inflated, &received)));
                    runner.run_later(Box::new(read));
                });
                let deadline = deadline::after(timeout);
                inner.enqueue(Call { queue: queue.to_owned(), message, deadline, timeout, answer: Some(answer) });
            }
            Err(error) => inner.run_later(Box::new(move || callback.run(Err(error)))),
        }
    }

    /// What the client has done so far.
    pub fn stats(&self) -> RpcClientStats {
        let counters = &self.closing.0.counters;
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
            _ => self.encoding.encode(&json!({ "data": to_value(request)? })),
        }?;
        // Once nobody waits for the answer any more, the broker need not keep the request.
        let message = message.with_expiration(timeout.max(Duration::from_millis(1))).transient();
        self.outlet.prepare("", queue, message)
    }

    fn read<Resp: DeserializeOwned>(&self, received: &Received) -> Result<Resp> {
        read(self.encoding, self.max_inflated, received)
    }
}

fn start(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let error = |source| Error::Thread { name: name.to_owned(), source: Arc::new(source) };
    Builder::new().name(name.to_owned()).spawn(run).map_err(error)
}

fn to_value<T: Serialize + ?Sized>(value: &T) -> Result<Value> {
    serde_json::to_value(value).map_err(|error| Error::Encoding { encoding: "request", problem: error.to_string() })
}

/// What is in an answer: `data`, or the worker's error. Raw answers that are no such JSON are taken as they are.
fn read<Resp: DeserializeOwned>(encoding: Encoding, max_inflated: usize, received: &Received) -> Result<Resp> {
    let body = received.body();
    let envelope = match encoding {
        Encoding::Raw => Encoding::Json.decode::<Value>(body, max_inflated).ok(),
        _ => Some(encoding.decode::<Value>(body, max_inflated)?),
    };
    let wrong = |problem: String| Error::Encoding { encoding: "answer", problem };
    let (success, mut envelope) = match envelope {
        Some(envelope) if envelope["success"].is_boolean() => (envelope["success"] == true, envelope),
        _ if encoding == Encoding::Raw => return encoding.decode(body, max_inflated),
        _ => return Err(wrong("expected an object with \"success\" in it".to_owned())),
    };
    if success {
        return serde_json::from_value(envelope["data"].take()).map_err(|error| wrong(error.to_string()));
    }
    let mut text = |name: &str| match envelope["error"][name].take() {
        Value::String(text) => text,
        Value::Null => String::new(),
        other => other.to_string(),
    };
    Err(Error::Remote { kind: text("type"), message: text("message"), trace: text("trace") })
}

/// The thread that owns the channel.
struct Owner {
    pool: Pool,
    work: Receiver<Call>,
    counters: Arc<Counters>,
    /// Calls that were taken while there was no channel.
    waiting: Vec<Call>,
}

impl Owner {
    fn run(mut self) {
        while let Ok(call) = self.work.recv() {
            self.waiting.push(call);
            while !self.waiting.is_empty() {
                let Some(first) = self.waiting.iter().map(|call| call.deadline).min() else { break };
                let left = first.saturating_duration_since(Instant::now());
                match self.pool.connection_timeout(left.min(CONNECT_SLICE)) {
                    Ok(connection) => {
                        if let Err(error) = self.session(&connection) {
                            log::warn!("rpc client: {error}");
                        }
                    }
                    Err(error) => self.not_connected(&error),
                }
            }
        }
    }

    /// Calls whose time is over get the cause; the others go on waiting, unless it takes a person to mend it.
    fn not_connected(&mut self, error: &Error) {
        self.waiting.extend(self.work.try_iter());
        let now = Instant::now();
        let hopeless = !error.is_transient();
        for call in std::mem::take(&mut self.waiting) {
            if hopeless || call.deadline <= now {
                call.answer(Err(error.clone()));
            } else {
                self.waiting.push(call);
            }
        }
    }

    /// From opening a channel until it ends, or nobody can call any more and nothing is in flight.
    fn session(&mut self, connection: &Connection) -> Result<()> {
        let side = connection.beside();
        let (link, limit) = (&side.link, side.settings.broker.operation_timeout);
        let opening = || "open a channel for calls".to_owned();
        let open = match link.open_channel(limit, &opening) {
            Ok(open) => open,
            Err(error) => return Err(self.fail_waiting(error)),
        };
        let result = self.on_channel(&side, &open);
        open.close(link, limit);
        result
    }

    fn on_channel(&mut self, side: &Connection, open: &OpenChannel) -> Result<()> {
        let (link, limit) = (&side.link, side.settings.broker.operation_timeout);
        let opening = || "open a channel for calls".to_owned();
        let opened = link.call(limit, &opening, Some(open.id), || {
            let confirms = open.channel.listen_for_publisher_confirms()?;
            let returns = open.channel.listen_for_returns()?;
            open.channel.enable_publisher_confirms()?;
            let options = ConsumerOptions { no_ack: true, ..ConsumerOptions::default() };
            Ok((confirms, returns, open.channel.basic_consume(DIRECT_REPLY_TO, options)?))
        });
        let (confirms, returns, consumer) = match opened {
            Ok(opened) => opened,
            Err(error) => return Err(self.fail_waiting(error)),
        };
        let mut flight = Flight::new();
        let mut result = Ok(());
        for call in std::mem::take(&mut self.waiting) {
            result = result.and(flight.send(call, side, open, &self.counters));
        }
        let mut work = self.work.clone();
        let mut closed = false;
        while result.is_ok() && !(closed && flight.calls.is_empty()) {
            let timer = flight.next_deadline().map_or_else(never, at);
            result = select! {
                recv(work) -> call => match call {
                    Ok(call) => flight.send(call, side, open, &self.counters),
                    Err(_) => {
                        closed = true;
                        work = never();
                        Ok(())
                    }
                },
                recv(consumer.receiver()) -> event => match event {
                    Ok(ConsumerMessage::Delivery(mut delivery)) => {
                        flight.arrived(Received::take_from(&mut delivery, None), &self.counters);
                        Ok(())
                    }
                    _ => Err(link.channel_ending(open.id, "wait for answers")),
                },
                recv(returns) -> returned => match returned {
                    Ok(returned) => {
                        flight.returned(returned);
                        Ok(())
                    }
                    Err(_) => Err(link.channel_ending(open.id, "wait for answers")),
                },
                recv(confirms) -> confirm => match confirm {
                    Ok(confirm) => {
                        flight.confirmed(confirm);
                        Ok(())
                    }
                    Err(_) => Err(link.channel_ending(open.id, "wait for answers")),
                },
                recv(timer) -> now => {
                    flight.expire(now.unwrap_or_else(|_| Instant::now()));
                    Ok(())
                }
            };
        }
        if let Err(error) = &result {
            flight.calls.drain().for_each(|(_, call)| call.answer(Err(error.clone())));
            side.link.suspect();
        }
        // Its connection may be dead, in which case this says nothing new.
        let _ = link.call(limit, &|| "cancel".to_owned(), Some(open.id), || cancel(&consumer));
        result
    }

    fn fail_waiting(&mut self, error: Error) -> Error {
        self.waiting.drain(..).for_each(|call| call.answer(Err(error.clone())));
        error
    }
}

/// The calls that a channel has sent and that are not answered.
struct Flight {
    /// What correlation ids begin with, so that answers to an earlier channel of ours are strangers'.
    prefix: String,
    next: u64,
    calls: HashMap<u64, Call>,
    deadlines: BTreeSet<(Instant, u64)>,
    /// By delivery tag, until confirmed.
    unconfirmed: BTreeMap<u64, u64>,
}

impl Flight {
    fn new() -> Flight {
        Flight {
            prefix: format!("{:016x}-", fastrand::u64(..)),
            next: 1,
            calls: HashMap::new(),
            deadlines: BTreeSet::new(),
            unconfirmed: BTreeMap::new(),
        }
    }

    fn send(&mut self, call: Call, side: &Connection, open: &OpenChannel, counters: &Counters) -> Result<()> {
        if call.deadline <= Instant::now() {
            call.time_out();
            return Ok(());
        }
        // The channel's messages are counted from 1 by both sides.
        let number = self.next;
        let message =
            call.message.clone().with_reply_to(DIRECT_REPLY_TO).with_correlation_id(format!("{}{number}", self.prefix));
        if let Err(error) = message.check(crate::transport::FRAME_MAX as usize) {
            call.answer(Err(error));
            return Ok(());
        }
        self.next += 1;
        counters.calls.fetch_add(1, Ordering::Relaxed);
        let limit = side.settings.broker.operation_timeout;
        let sent = side.link.call(limit, &|| during(&call.queue), Some(open.id), || {
            let mut publish = Publish::with_properties(message.body(), &*call.queue, message.amqp_properties());
            publish.mandatory = true;
            open.channel.basic_publish("", publish)
        });
        self.deadlines.insert((call.deadline, number));
        self.unconfirmed.insert(number, number);
        self.calls.insert(number, call);
        sent
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    fn take(&mut self, number: u64) -> Option<Call> {
        let call = self.calls.remove(&number)?;
        self.deadlines.remove(&(call.deadline, number));
        Some(call)
    }

    fn take_by_id(&mut self, correlation_id: Option<&str>) -> Option<Call> {
        let number = correlation_id?.strip_prefix(&self.prefix)?.parse().ok()?;
        self.take(number)
    }

    fn arrived(&mut self, received: Received, counters: &Counters) {
        match self.take_by_id(received.message().correlation_id()) {
            Some(call) => call.answer(Ok(received)),
            None => {
                counters.unmatched.fetch_add(1, Ordering::Relaxed);
                log::debug!("rpc client: an answer that nobody waits for was dropped");
            }
        }
    }

    fn returned(&mut self, returned: amiquip::Return) {
        let id = returned.properties.correlation_id().as_deref();
        if let Some(call) = self.take_by_id(id) {
            let (exchange, routing_key) = (String::new(), call.queue.clone());
            let error = Error::Returned { code: returned.reply_code, text: returned.reply_text, exchange, routing_key };
            call.answer(Err(error));
        }
    }

    fn confirmed(&mut self, confirm: Confirm) {
        let (payload, taken) = match confirm {
            Confirm::Ack(payload) => (payload, true),
            Confirm::Nack(payload) => (payload, false),
        };
        let settled = if payload.multiple {
            let later = self.unconfirmed.split_off(&(payload.delivery_tag + 1));
            std::mem::replace(&mut self.unconfirmed, later)
        } else {
            self.unconfirmed
                .remove(&payload.delivery_tag)
                .map(|number| (payload.delivery_tag, number))
                .into_iter()
                .collect()
        };
        for number in settled.into_values().filter(|_| !taken) {
            if let Some(call) = self.take(number) {
                let error = Error::Nacked { exchange: String::new(), routing_key: call.queue.clone() };
                call.answer(Err(error));
            }
        }
    }

    fn expire(&mut self, now: Instant) {
        while let Some((deadline, number)) = self.deadlines.first().copied()
            && deadline <= now
        {
            self.deadlines.pop_first();
            if let Some(call) = self.calls.remove(&number) {
                call.time_out();
            }
        }
    }
}
