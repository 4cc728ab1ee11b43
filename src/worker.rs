//! Workers: queues with a typed function behind each.
//!
//! ```no_run
//! # fn main() -> coney::Result<()> {
//! use coney::App;
//! use coney::worker::QueueWorker;
//!
//! let app = App::from_file("app.toml")?;
//! let worker = QueueWorker::new(&app)
//!     .route("a-queue", |text: String| println!("data received {text}"))
//!     .route_with_context("another-route", |context, numbers: Vec<u32>| {
//!         context.publish("", "sums", numbers.iter().sum::<u32>().to_string())
//!     })
//!     .run()?;
//! worker.detach(); // the app stops it
//! app.run()
//! # }
//! ```
//!
//! A worker is a [listener](crate::Listener) with several queues: each has channels of its own on one connection, which is
//! brought back whenever it is lost. Its queues are declared durable. Bodies are gzip JSON, JSON or raw bytes: see
//! [`Encoding`]. What a function returns is an [`Outcome`], so an error or a panic follows the retry policy; a body that
//! cannot be decoded goes to the queue `NAME.dead` at once, with the reason in its headers.
//!
//! For replies see [`rpc`](crate::rpc).

use std::fmt;
use std::time::Duration;

use crossbeam_channel::after;
use serde::de::DeserializeOwned;

use crate::app::App;
use crate::connection::Delivery;
use crate::encoding::Encoding;
use crate::error::{Error, Result, counted};
use crate::listener::{Context, Listener, ListenerBuilder, Route, launch_enlisted};
use crate::outcome::{Outcome, RetryPolicy};
use crate::pace::Concurrency;
use crate::pool::Pool;
use crate::settings::{BrokerSettings, PoolSettings};
use crate::topology::{Queue, Topology};
use crate::url::{Endpoint, Secret};

/// How often, and how far apart, a worker tries to connect before it gives up.
const CONNECT_ATTEMPTS: u32 = 12;
const CONNECT_DELAY: Duration = Duration::from_secs(5);

/// Where a broker is and who connects to it, for programs without a settings file.
#[derive(Debug, Clone)]
pub struct ConnectionParameters {
    /// The host. Defaults to `localhost`.
    pub host: String,
    /// The port. Defaults to 5672.
    pub port: u16,
    /// The user. Defaults to `guest`.
    pub user: String,
    /// The password. Defaults to `guest`.
    pub password: Secret,
}

impl Default for ConnectionParameters {
    fn default() -> ConnectionParameters {
        let BrokerSettings { user, password, .. } = BrokerSettings::default();
        let Endpoint { host, port, .. } = Endpoint::default();
        ConnectionParameters { host, port, user, password }
    }
}

impl ConnectionParameters {
    /// A pool of its own with these parameters and defaults for all else.
    ///
    /// # Errors
    ///
    /// Those of [`Pool::new`].
    pub fn pool(&self, name: &str) -> Result<Pool> {
        let broker = BrokerSettings {
            endpoints: vec![Endpoint::new(&self.host, self.port)],
            user: self.user.clone(),
            password: self.password.clone(),
            ..BrokerSettings::default()
        };
        Pool::new(name, PoolSettings::new(broker))
    }
}

/// Where a worker's listeners come from.
#[derive(Debug, Clone)]
enum Source {
    App(App),
    Pool(Pool),
}

/// What the workers of both kinds have in common: routes that are collected and then started together.
#[derive(Debug)]
pub(crate) struct Routes {
    source: Source,
    pub(crate) encoding: Encoding,
    pub(crate) max_inflated: usize,
    prefetch: Option<u16>,
    concurrency: Option<Concurrency>,
    retry: Retry,
    /// Answers say where an error came from.
    pub(crate) traces: bool,
    connect_attempts: u32,
    connect_delay: Duration,
    routes: Vec<Result<Route>>,
}

/// Which retry policy routes have.
#[derive(Debug, Clone)]
enum Retry {
    /// That of the pool, and without one what cannot be decoded is kept all the same.
    OfPool,
    Policy(RetryPolicy),
    /// None: no queues are declared beside those of the routes.
    None,
}

impl Routes {
    pub(crate) fn of_app(app: &App) -> Routes {
        Routes::new(Source::App(app.clone()))
    }

    pub(crate) fn of_pool(pool: &Pool) -> Routes {
        Routes::new(Source::Pool(pool.clone()))
    }

    fn new(source: Source) -> Routes {
        Routes {
            source,
            encoding: Encoding::default(),
            max_inflated: Encoding::MAX_INFLATED,
            prefetch: None,
            concurrency: None,
            retry: Retry::OfPool,
            traces: false,
            connect_attempts: CONNECT_ATTEMPTS,
            connect_delay: CONNECT_DELAY,
            routes: Vec::new(),
        }
    }

    fn pool(&self) -> &Pool {
        match &self.source {
            Source::App(app) => app.listen_pool(),
            Source::Pool(pool) => pool,
        }
    }

    pub(crate) fn add<F, O>(&mut self, queue: &str, handler: F)
    where
        F: Fn(&Context<'_>, &Delivery<'_>) -> O + Send + Sync + 'static,
        O: Into<Outcome>,
    {
        let mut listener = match &self.source {
            Source::App(app) => app.listener(queue),
            Source::Pool(pool) => ListenerBuilder::new(pool.clone(), queue),
        };
        listener = listener.topology(Topology::new().queue(Queue::new(queue)));
        if let Some(concurrency) = self.concurrency {
            listener = listener.concurrency(concurrency);
        }
        if let Some(prefetch) = self.prefetch {
            listener = listener.prefetch(prefetch);
        }
        listener = match &self.retry {
            Retry::OfPool => listener.keeping_undecodable(),
            Retry::Policy(policy) => listener.retry(policy.clone()).keeping_undecodable(),
            Retry::None => listener.without_retry(),
        };
        let route = if queue.is_empty() {
            Err(Error::invalid("route", "it has no name, expected that of a queue"))
        } else if self.routes.iter().flatten().any(|route| route.queue() == queue) {
            Err(Error::invalid(format!("route {queue:?}"), "there is one for this queue already"))
        } else {
            listener.into_route(handler)
        };
        self.routes.push(route);
    }

    pub(crate) fn run(self) -> Result<Listener> {
        if self.routes.is_empty() {
            return Err(Error::invalid("worker", "it has no routes, expected at least one"));
        }
        let pool = self.pool().clone();
        let routes = self.routes.into_iter().collect::<Result<Vec<Route>>>()?;
        // Before a connection is asked for, which a pool that is full of listeners would never lend.
        let enlisted = pool.enlist()?;
        let mut left = self.connect_attempts;
        while let Err(error) = pool.connection().map(drop) {
            left = left.saturating_sub(1);
            if left == 0 || !matches!(error, Error::Connect { .. }) || !error.is_transient() {
                return Err(error);
            }
            log::warn!(
                "worker: {error}; {} left, the next in {:?}",
                counted(left as usize, "attempt"),
                self.connect_delay
            );
            // A pause, with nothing to be woken by.
            let _ = after(self.connect_delay).recv();
        }
        launch_enlisted(routes, enlisted)
    }
}

/// The settings of a worker, the same for both kinds.
macro_rules! settings {
    () => {
        /// A worker of an app, on the app's `listen` pool. The app stops it when it shuts down.
        pub fn new(app: &crate::App) -> Self {
            Self::of_routes(crate::worker::Routes::of_app(app))
        }

        /// A worker of a pool.
        pub fn of_pool(pool: &crate::Pool) -> Self {
            Self::of_routes(crate::worker::Routes::of_pool(pool))
        }

        /// A worker that needs no app, on a pool of its own.
        ///
        /// # Errors
        ///
        /// Those of [`Pool::new`](crate::Pool::new). The broker is not asked for until [`run`](Self::run).
        pub fn of_parameters(parameters: &crate::worker::ConnectionParameters) -> crate::Result<Self> {
            Ok(Self::of_pool(&parameters.pool("worker")?))
        }

        /// How bodies are written, and whether they are read as they are. Routes added after it have it. Defaults to gzip
        /// JSON.
        pub fn encoding(mut self, encoding: crate::Encoding) -> Self {
            self.routes.encoding = encoding;
            self
        }

        /// The largest body that is accepted, in bytes once inflated, by routes added after it. Defaults to 64 MiB.
        pub fn max_inflated(mut self, bytes: usize) -> Self {
            self.routes.max_inflated = bytes;
            self
        }

        /// How many threads, each with a channel of its own, a route added after it has: a number, or a range within which it
        /// varies. Defaults to the pool's `concurrency`; see [`ListenerBuilder::concurrency`](crate::ListenerBuilder::concurrency).
        pub fn concurrency(mut self, threads: impl Into<crate::Concurrency>) -> Self {
            self.routes.set_concurrency(threads.into());
            self
        }

        /// How many messages the broker sends each thread ahead, 1 to 65535, for routes added after it. Defaults to the
        /// pool's `prefetch`.
        pub fn prefetch(mut self, prefetch: u16) -> Self {
            self.routes.set_prefetch(prefetch);
            self
        }

        /// How often connecting is tried before [`run`](Self::run) gives up, and how far apart. Defaults to 12 times, 5 s
        /// apart.
        pub fn connect_attempts(mut self, attempts: u32, delay: std::time::Duration) -> Self {
            self.routes.set_connect_attempts(attempts, delay);
            self
        }
    };
}
pub(crate) use settings;

impl Routes {
    pub(crate) fn set_concurrency(&mut self, threads: Concurrency) {
        self.concurrency = Some(threads);
    }

    pub(crate) fn set_prefetch(&mut self, prefetch: u16) {
        self.prefetch = Some(prefetch);
    }

    pub(crate) fn set_retry(&mut self, policy: RetryPolicy) {
        self.retry = Retry::Policy(policy);
    }

    /// Routes to come have no retry policy, whatever the pool has.
    pub(crate) fn without_retry(mut self) -> Routes {
        self.retry = Retry::None;
        self
    }

    pub(crate) fn set_connect_attempts(&mut self, attempts: u32, delay: Duration) {
        self.connect_attempts = attempts.max(1);
        self.connect_delay = delay;
    }
}

/// Queues with a function behind each. See the [module](self).
#[must_use = "a worker does nothing until it is run"]
pub struct QueueWorker {
    routes: Routes,
}

impl fmt::Debug for QueueWorker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueWorker").field("routes", &self.routes).finish()
    }
}

impl QueueWorker {
    settings!();

    fn of_routes(routes: Routes) -> QueueWorker {
        QueueWorker { routes }
    }

    /// When messages that fail are tried again, for routes added after it. Defaults to the pool's `retry`; without one
    /// such a message is requeued once and then rejected.
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.routes.set_retry(policy);
        self
    }

    /// Has `handler` called with what is in each message of `queue`.
    pub fn route<T, O, F>(self, queue: &str, handler: F) -> Self
    where
        T: DeserializeOwned,
        O: Into<Outcome>,
        F: Fn(T) -> O + Send + Sync + 'static,
    {
        self.route_with_context(queue, move |_, value| handler(value))
    }

    /// Like [`route`](QueueWorker::route), for a handler that publishes too.
    pub fn route_with_context<T, O, F>(mut self, queue: &str, handler: F) -> Self
    where
        T: DeserializeOwned,
        O: Into<Outcome>,
        F: Fn(&Context<'_>, T) -> O + Send + Sync + 'static,
    {
        let (encoding, max_inflated) = (self.routes.encoding, self.routes.max_inflated);
        self.routes.add(queue, move |context, delivery| match encoding.decode(delivery.body(), max_inflated) {
            Ok(value) => handler(context, value).into(),
            Err(error) => Outcome::Undecodable(error.to_string()),
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
    /// been reached after all attempts, or at once if it refuses; otherwise those of [`ListenerBuilder::spawn`].
    pub fn run(self) -> Result<Listener> {
        self.routes.run()
    }
}
