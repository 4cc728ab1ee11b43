//! The one place where all meets: settings become named pools, and a program's life has a beginning and an end.

#[cfg(feature = "outbox")]
mod companion;
mod run;
mod shutdown;

use std::collections::BTreeMap;
use std::fmt;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

#[cfg(feature = "outbox")]
pub(crate) use self::companion::Companion;
use self::run::Running;
pub use self::run::ShutdownHandle;
use crate::connection::{Delivery, Outgoing};
use crate::deadline;
use crate::error::{Error, Result};
use crate::event::{Event, Events};
use crate::fork::Kept;
use crate::health::{Health, PoolHealth};
use crate::listener::{Arounds, Context, Listener, ListenerBuilder, PartitionedListenerBuilder, Registry};
use crate::message::Message;
use crate::outcome::Outcome;
use crate::pool::{Patience, Pool, Workshop};
use crate::settings::{AppSettings, LISTEN_POOL, OutboxSettings, PUBLISH_POOL, PoolSettings, Settings};
use crate::signals;
use crate::topology::{Partitioned, Topology};

/// A program's pools, listeners and topology, made from its settings. Cheap to clone; all clones are the same app.
///
/// Making one opens no connection: it works while the broker is down.
///
/// ```no_run
/// # fn main() -> coney::Result<()> {
/// let app = coney::App::from_file("app.toml")?;
/// app.declare_topology()?;
/// app.publish_pool().connection()?.publish("unit_test_room", "user1", "hello")?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct App {
    inner: Arc<Kept<Inner>>,
}

type HookFunction = dyn Fn(&App) -> Result<()> + Send + Sync;

struct Hook {
    name: Option<String>,
    function: Arc<HookFunction>,
}

struct Inner {
    /// Every configured pool but the two that are always there.
    pools: BTreeMap<String, Pool>,
    publish: Pool,
    listen: Pool,
    topology: Topology,
    settings: AppSettings,
    #[cfg_attr(not(feature = "outbox-sqlite"), expect(dead_code, reason = "there is no outbox then"))]
    outbox: Option<OutboxSettings>,
    /// By when all was to have ended, as a shutdown has said.
    shut_down_by: Mutex<Option<Instant>>,
    hooks: Mutex<Vec<Hook>>,
    /// What is around the handlers of listeners to come.
    arounds: Mutex<Arounds>,
    /// Those that were started through the app and may be running.
    listeners: Arc<Registry>,
    /// What runs beside them.
    #[cfg(feature = "outbox")]
    companions: Mutex<Vec<Arc<dyn Companion>>>,
    /// What happens to the pools and listeners, for whoever wants to know.
    events: Events,
    is_running: AtomicBool,
    /// What `run` waits for.
    shutdown: Sender<()>,
    told_to_shut_down: Receiver<()>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("App").field("pools", &self.pools().collect::<Vec<_>>()).finish_non_exhaustive()
    }
}

impl App {
    /// Reads settings from a file, overlaid with the profile named by `CONEY_PROFILE` and with the environment.
    ///
    /// # Errors
    ///
    /// [`Error::Settings`] with every mistake in them.
    pub fn from_file(path: impl AsRef<Path>) -> Result<App> {
        App::from_settings(Settings::from_file(path)?)
    }

    /// Makes an app of settings that a program has put together itself.
    ///
    /// # Errors
    ///
    /// [`Error::Settings`] with every mistake in them; [`Error::Thread`] if a thread cannot be started.
    pub fn from_settings(settings: Settings) -> Result<App> {
        settings.check()?;
        let workshop = Workshop::start()?;
        let Settings { app, mut pools, topology, outbox } = settings;
        let make = |name: &str, settings: Option<PoolSettings>| {
            Pool::in_workshop(name.to_owned(), settings.unwrap_or_default(), &workshop)
        };
        let publish = make(PUBLISH_POOL, pools.remove(PUBLISH_POOL))?;
        let listen = make(LISTEN_POOL, pools.remove(LISTEN_POOL))?;
        let pools = pools
            .into_iter()
            .map(|(name, settings)| Ok((name.clone(), make(&name, Some(settings))?)))
            .collect::<Result<_>>()?;
        let (shutdown, told_to_shut_down) = bounded(1);
        Ok(App {
            inner: Arc::new(Kept::new(Inner {
                pools,
                publish,
                listen,
                topology,
                settings: app,
                outbox,
                shut_down_by: Mutex::default(),
                hooks: Mutex::default(),
                arounds: Mutex::default(),
                listeners: Arc::default(),
                #[cfg(feature = "outbox")]
                companions: Mutex::default(),
                events: workshop.events.clone(),
                is_running: AtomicBool::new(false),
                shutdown,
                told_to_shut_down,
            })),
        })
    }

    /// The pool of that name: `publish`, `listen`, or any other in the settings.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownPool`], which lists the names there are.
    pub fn pool(&self, name: &str) -> Result<&Pool> {
        self.pools().find(|pool| pool.name() == name).ok_or_else(|| {
            let mut known: Vec<String> = self.pools().map(|pool| pool.name().to_owned()).collect();
            known.sort();
            Error::UnknownPool { name: name.to_owned(), known }
        })
    }

    /// The pool to publish from.
    pub fn publish_pool(&self) -> &Pool {
        &self.inner.publish
    }

    /// The pool to receive from. Separate from publishing, for a broker short of memory stops reading from connections
    /// that publish, and acks on them with it (<https://www.rabbitmq.com/docs/connections#flow-control>).
    pub fn listen_pool(&self) -> &Pool {
        &self.inner.listen
    }

    /// All pools.
    pub fn pools(&self) -> impl Iterator<Item = &Pool> {
        self.inner.pools()
    }

    /// The topology of the settings.
    pub fn topology(&self) -> &Topology {
        &self.inner.topology
    }

    /// Declares the topology of the settings, on a connection of the publish pool. Declaring it again changes nothing. Waits
    /// for a broker that is not there yet as long as `[app] wait_for_broker` says.
    ///
    /// # Errors
    ///
    /// Those of [`Pool::connection`] and [`Connection::declare`](crate::Connection::declare).
    pub fn declare_topology(&self) -> Result<()> {
        Kept::maker(&self.inner).check()?;
        if self.inner.topology.is_empty() {
            return Ok(());
        }
        self.wait_as_configured(&[self.publish_pool()])?;
        self.publish_pool().connection()?.declare(&self.inner.topology).map(drop)
    }

    /// Waits until the brokers of all pools can be reached and let us in, at most for `timeout`. Logs a line for each attempt
    /// that fails.
    ///
    /// For a program that may be started before its broker. `[app] wait_for_broker` in the settings does the same by itself,
    /// before the topology is declared, before the hooks of [`start`](App::start) and before a listener is spawned.
    ///
    /// # Errors
    ///
    /// [`Error::Connect`] with the last reason: when the time is up, when the app is told to shut down, and at once for a
    /// refusal that will not pass by itself.
    pub fn wait_for_broker(&self, timeout: Duration) -> Result<()> {
        Kept::maker(&self.inner).check()?;
        self.wait_for(&self.pools().collect::<Vec<_>>(), timeout)
    }

    fn wait_as_configured(&self, pools: &[&Pool]) -> Result<()> {
        self.inner.settings.wait_for_broker.map_or(Ok(()), |timeout| self.wait_for(pools, timeout))
    }

    fn wait_for(&self, pools: &[&Pool], timeout: Duration) -> Result<()> {
        let deadline = deadline::after(timeout);
        let patience = self.patience();
        pools.iter().try_for_each(|pool| pool.wait_for_broker(deadline, &patience))
    }

    fn patience(&self) -> Patience {
        Patience { told_to_end: self.inner.told_to_shut_down.clone(), end: self.inner.shutdown.clone() }
    }

    /// A listener on `queue`, on a connection of the listen pool. See [`ListenerBuilder`] for what can be said about it.
    pub fn listener(&self, queue: impl Into<String>) -> ListenerBuilder {
        let builder = ListenerBuilder::new(self.listen_pool().clone(), queue);
        let builder = builder.within(self.arounds().clone()).configured(&self.inner.topology);
        let builder = builder.registered_with(Arc::clone(&self.inner.listeners));
        match self.inner.settings.wait_for_broker {
            Some(timeout) => builder.waiting_for_broker(timeout, self.patience()),
            None => builder,
        }
    }

    /// What the settings say of an outbox.
    #[cfg(feature = "outbox-sqlite")]
    pub(crate) fn outbox_settings(&self) -> Option<&OutboxSettings> {
        self.inner.outbox.as_ref()
    }

    /// The partitioned queue of that name, in the topology of the settings.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`], which lists the names there are.
    pub fn partitioned(&self, name: &str) -> Result<&Partitioned> {
        let all = &self.inner.topology.partitioned;
        all.iter().find(|partitioned| partitioned.name == name).ok_or_else(|| {
            let known: Vec<String> = all.iter().map(|partitioned| format!("{:?}", partitioned.name)).collect();
            let there = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            let problem =
                format!("the topology of the settings has no such entry in [[topology.partitioned]]; it has {there}");
            Error::invalid(format!("partitioned queue {name:?}"), problem)
        })
    }

    /// A listener on the [partitioned](Partitioned) queue of that name, in the topology of the settings. It shares the partitions
    /// with other listeners of its kind, in this process and in others. See [`PartitionedListenerBuilder`].
    ///
    /// ```no_run
    /// # fn main() -> coney::Result<()> {
    /// # let app = coney::App::from_file("app.toml")?;
    /// app.listener_partitioned("orders")
    ///     .spawn(|_context, delivery| println!("{}", delivery.routing_key()))?
    ///     .detach();
    /// # Ok(())
    /// # }
    /// ```
    pub fn listener_partitioned(&self, name: &str) -> PartitionedListenerBuilder {
        let partitioned = self.partitioned(name).cloned();
        PartitionedListenerBuilder::new(partitioned.map(|partitioned| (partitioned, self.listener(name))))
    }

    /// Has `around` called in the place of the handler, as [`ListenerBuilder::around`] has it, by every listener that this
    /// app is asked for from now on; routes of [`QueueWorker`](crate::worker::QueueWorker) and
    /// [`RpcWorker`](crate::rpc::RpcWorker) included.
    pub fn around_handlers<F>(&self, around: F)
    where
        F: Fn(&Context<'_>, &Delivery<'_>, &dyn Fn() -> Outcome) -> Outcome + Send + Sync + 'static,
    {
        self.arounds().add(around);
    }

    /// Has `hook` called with each message that any pool of this app publishes: see [`Pool::before_publish`].
    pub fn before_publish<F>(&self, hook: F)
    where
        F: Fn(&Outgoing<'_>, Message) -> Result<Message> + Send + Sync + 'static,
    {
        let hook = Arc::new(hook);
        for pool in self.pools() {
            let hook = Arc::clone(&hook);
            pool.before_publish(move |outgoing, message| hook(outgoing, message));
        }
    }

    /// Has `handler` called for each thing that happens to the pools and listeners of this app from now on: what an [`Event`]
    /// can be. It is for what a program does about them; the log has its lines without it.
    ///
    /// ```no_run
    /// # fn main() -> coney::Result<()> {
    /// # let app = coney::App::from_file("app.toml")?;
    /// use coney::Event;
    ///
    /// app.on_event(|event| match event {
    ///     Event::MessageDead { queue, reason, .. } => eprintln!("call somebody: {queue}: {reason}"),
    ///     other => println!("{other}"),
    /// })?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Handlers are run by a thread of their own, `coney-events`, which begins with the first of them: one event after another, in
    /// the order in which they happened, and for each event the handlers in the order in which they were added. Nobody waits for
    /// them. At most 1024 events wait to be told. What happens beyond that is left out, and counted in an [`Event::Missed`] at its
    /// place in the order. A panic in a handler is caught and logged.
    ///
    /// A handler may do what it likes: publish, hold a clone of the app, or call [`shutdown`](App::shutdown). A message
    /// that it publishes in vain is no event. A clone of the app that it holds keeps the app until a shutdown.
    ///
    /// A shutdown, and the end of the app, wait until the handlers have been told of all that has happened, within the time that
    /// they have. After that nothing more is told. A handler cannot be taken away before.
    ///
    /// # Errors
    ///
    /// [`Error::Thread`] if the thread cannot be started; [`Error::Forked`] in a child of the process that made the app.
    pub fn on_event<F>(&self, handler: F) -> Result<()>
    where
        F: Fn(&Event) + Send + Sync + 'static,
    {
        self.inner.events.add(handler)
    }

    /// Calls `handler` for each message of `queue`, on a thread of its own, until the listener is stopped or dropped.
    ///
    /// ```no_run
    /// # fn main() -> coney::Result<()> {
    /// # let app = coney::App::from_file("app.toml")?;
    /// app.spawn_listener("listener1", |_context, delivery| {
    ///     println!("{}: {:?}", delivery.routing_key(), delivery.message().text());
    /// })?
    /// .detach(); // the app stops it
    /// app.run()
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`ListenerBuilder::spawn`].
    pub fn spawn_listener<F, O>(&self, queue: impl Into<String>, handler: F) -> Result<Listener>
    where
        F: Fn(&Context<'_>, &Delivery<'_>) -> O + Send + Sync + 'static,
        O: Into<Outcome>,
    {
        self.listener(queue).spawn(handler)
    }

    /// How the pools and the listeners of this app stand, as far as is known without asking the broker: cheap, and never
    /// waits for anything. A pool that nobody uses learns nothing, be it good or bad: where that matters, see
    /// [`check`](App::check).
    ///
    /// For metrics pages and for people: `println!("{}", app.health())`.
    pub fn health(&self) -> Health {
        self.health_of(self.pools().map(Pool::health).collect())
    }

    /// How the pools and the listeners of this app stand, after each pool has asked its broker something, within `timeout`.
    ///
    /// A pool asks on an idle connection, or on a new one if none is open. While all that are open are lent, it asks nothing:
    /// who holds them knows, and heartbeats watch them. A connection that does not answer in time is given up.
    ///
    /// This is what a **readiness** probe of Kubernetes is to be answered by: 200 if
    /// [`is_ready`](Health::is_ready), else 503, with the line that [`Health`] displays as the body, and with a `timeout` below
    /// the probe's own. A **liveness** probe is to be answered with 200 by whatever serves it and with nothing of this: a
    /// program that comes back by itself when its broker does is not mended by being killed, and all of its kind would be
    /// killed at once.
    ///
    /// ```no_run
    /// # fn main() -> coney::Result<()> {
    /// # let app = coney::App::from_file("app.toml")?;
    /// let health = app.check(std::time::Duration::from_secs(1));
    /// let answer = format!("HTTP/1.1 {}\r\n\r\n{health}\n", if health.is_ready() { "200 OK" } else { "503 Not Ready" });
    /// # drop(answer);
    /// # Ok(())
    /// # }
    /// ```
    pub fn check(&self, timeout: Duration) -> Health {
        let pools = thread::scope(|scope| {
            // All at once, so that one silent broker does not use up the time of the others.
            let ask = |pool: &'_ Pool| pool.checked_health(timeout);
            let asking: Vec<_> = self
                .pools()
                .map(|pool| {
                    let builder = thread::Builder::new().name("coney-check".to_owned());
                    (pool, builder.spawn_scoped(scope, move || ask(pool)))
                })
                .collect();
            let answers = asking.into_iter().map(|(pool, asking)| match asking {
                Ok(asking) => asking.join().unwrap_or_else(|panic| resume_unwind(panic)),
                // The system has no thread left, so it is one after the other.
                Err(_) => ask(pool),
            });
            answers.collect()
        });
        self.health_of(pools)
    }

    fn health_of(&self, pools: Vec<PoolHealth>) -> Health {
        let listeners = self.inner.listeners.all().iter().map(|listener| listener.health()).collect();
        #[cfg(feature = "outbox")]
        let outboxes = self.inner.companions().iter().map(|companion| companion.health()).collect();
        #[cfg(not(feature = "outbox"))]
        let outboxes = Vec::new();
        Health { pools, listeners, outboxes }
    }

    /// Adds what is to be done when the app starts. Hooks are run in the order in which they were added.
    pub fn on_start<F>(&self, hook: F)
    where
        F: Fn(&App) -> Result<()> + Send + Sync + 'static,
    {
        self.hooks().push(Hook { name: None, function: Arc::new(hook) });
    }

    /// Adds a hook under a name, by which an error of it goes.
    pub fn on_start_named<F>(&self, name: impl Into<String>, hook: F)
    where
        F: Fn(&App) -> Result<()> + Send + Sync + 'static,
    {
        self.hooks().push(Hook { name: Some(name.into()), function: Arc::new(hook) });
    }

    /// Waits for the broker of the publish and the listen pool, if `[app] wait_for_broker` says so, and runs the hooks.
    ///
    /// # Errors
    ///
    /// [`Error::Connect`] if the broker has not come in time; [`Error::Hook`] of the first one that fails. Those after it are not run, and the listeners started by those
    /// before it are stopped.
    pub fn start(&self) -> Result<()> {
        Kept::maker(&self.inner).check()?;
        self.wait_as_configured(&[self.publish_pool(), self.listen_pool()])?;
        let hooks: Vec<(Option<String>, Arc<HookFunction>)> =
            self.hooks().iter().map(|hook| (hook.name.clone(), Arc::clone(&hook.function))).collect();
        let before = self.inner.listeners.all();
        for (number, (name, function)) in (1..).zip(hooks) {
            if let Err(error) = function(self) {
                let timeout = self.inner.settings.shutdown_timeout;
                if let Err(not_ended) = self.inner.listeners.stop_all_but(&before, timeout) {
                    log::error!("start failed, and {not_ended}");
                }
                let hook = name.map_or_else(|| format!("number {number}"), |name| format!("{name:?}"));
                return Err(Error::Hook { hook, source: Box::new(error) });
            }
        }
        Ok(())
    }

    /// Starts, waits for SIGINT, SIGTERM or the [`ShutdownHandle`], and shuts down within `[app] shutdown_timeout`, 10 s where
    /// the settings do not say. A second signal ends the program at once.
    ///
    /// # Errors
    ///
    /// Those of [`start`](App::start) and [`shutdown`](App::shutdown); [`Error::Signals`] if the system does not let
    /// signals be watched; [`Error::InvalidArgument`] if the app is running already, [`Error::PoolClosed`] if it has been shut
    /// down. Told to shut down while it waits for the broker, it ends with `Ok`.
    pub fn run(&self) -> Result<()> {
        self.run_timeout(self.inner.settings.shutdown_timeout)
    }

    /// Like [`run`](App::run), with another time for the shutdown.
    ///
    /// It is the time for everything: what has not ended by then is told as the error, and neither the app nor a
    /// [`Listener`] waits for it once more when it is dropped. A handler that returns in time ends with `Ok`.
    ///
    /// # Errors
    ///
    /// Those of [`run`](App::run).
    pub fn run_timeout(&self, shutdown_timeout: Duration) -> Result<()> {
        Kept::maker(&self.inner).check()?;
        let _running = Running::begin(&self.inner.is_running)?;
        self.publish_pool().check_open()?;
        let signals = signals::watch(self.shutdown_handle())?;
        let started = match self.start() {
            Err(error @ Error::Connect { .. }) if !self.inner.told_to_shut_down.is_empty() => {
                log::info!("told to shut down while waiting for the broker: {error}");
                Ok(())
            }
            started => started,
        };
        let result = started.and_then(|()| {
            // The sender is in the app itself, so this ends with a message only.
            let _ = self.inner.told_to_shut_down.recv();
            log::info!("shutting down");
            self.shutdown(shutdown_timeout)
        });
        drop(signals);
        result
    }

    /// A handle that makes [`run`](App::run) return.
    pub fn shutdown_handle(&self) -> ShutdownHandle {
        ShutdownHandle { shutdown: self.inner.shutdown.clone() }
    }

    fn arounds(&self) -> MutexGuard<'_, Arounds> {
        self.inner.arounds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hooks(&self) -> MutexGuard<'_, Vec<Hook>> {
        self.inner.hooks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    #[cfg(feature = "outbox")]
    fn companions(&self) -> MutexGuard<'_, Vec<Arc<dyn Companion>>> {
        self.companions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends what runs beside the listeners; says what is left at `deadline`.
    fn end_companions(&self, deadline: Instant) -> Vec<String> {
        #[cfg(feature = "outbox")]
        let left = companion::end(&std::mem::take(&mut *self.companions()), deadline);
        #[cfg(not(feature = "outbox"))]
        let left = {
            let _ = deadline;
            Vec::new()
        };
        left
    }

    fn pools(&self) -> impl Iterator<Item = &Pool> {
        [&self.publish, &self.listen].into_iter().chain(self.pools.values())
    }
}
