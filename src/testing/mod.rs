//! A real RabbitMQ of one's own, for tests.
//!
//! [`RabbitMq::start`] runs the installed `rabbitmq-server` as a throw-away node: free ports on the loopback address,
//! a name, a cookie, a data directory and an Erlang name server of its own, no plugins but those it is told to have. It shares nothing with a
//! RabbitMQ the system may run, nor with other nodes of the same test, and accepts logins when `start` returns, some
//! two or three seconds later. When the value is dropped, every process it started has ended and its files are gone. The same
//! happens, by means of a small watching process, when the test is killed, or keeps the node in a `static`.
//!
//! The node can be stopped, killed, paused, made to block publishers or to close connections, and asked what it knows
//! of connections, channels, consumers and queues; those answers come from the processes concerned and are current.
//! What has no method here can be had by [`eval`](RabbitMq::eval).
//!
//! ```no_run
//! use coney::testing::RabbitMq;
//!
//! # fn main() -> Result<(), coney::testing::NodeError> {
//! let rabbit = RabbitMq::start()?;
//! // ... connect to rabbit.url(), declare and use the queue "orders", then pull the plug:
//! rabbit.kill()?;
//! rabbit.start_again()?;
//! assert_eq!(rabbit.queue_len("orders")?, 1);
//! # Ok(())
//! # }
//! ```
//!
//! [`RabbitMqCluster::start`] runs several such nodes as one broker.
//!
//! RabbitMQ 3.10 to 4.x will do. Which one is run is for [`Builder::server`] or the environment variable `CONEY_RABBITMQ` to
//! say, which takes the program `rabbitmq-server`, or the root directory of a system in which it is installed;
//! [`RabbitMq::version`] says which it was. So the same tests can be run on several releases, on one machine:
//!
//! ```sh
//! sudo debootstrap --variant=minbase --include=rabbitmq-server trixie /opt/rabbitmq4   # Debian 13's: 4.0
//! CONEY_RABBITMQ=/opt/rabbitmq4 cargo test
//! ```
//!
//! This is no broker in memory and no mock: without `rabbitmq-server` installed, `start` fails and says so. Nor is it
//! meant for anything that should last.

mod cluster;
mod error;
mod eval;
mod home;
mod node;
mod process;
mod reads;
mod reaper;
mod server;
mod version;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use self::cluster::RabbitMqCluster;
pub use self::error::{NodeError, Result};
use self::eval::binary;
use self::home::Home;
use self::node::{Node, READY, Settings};
pub use self::reads::{ChannelInfo, ConnectionInfo, ConsumerInfo, QueueInfo};
pub use self::version::Version;

/// Who RabbitMQ notes down as having made a change.
const ACTOR: &str = "<<\"coney\">>";

/// `Until(Wanted)` waits for the memory alarm to be as wanted. The watermark is set at once; the alarm follows by way of
/// an event handler, which has told every connection by the time it answers us.
const ALARMED: &str = "
    Alarmed = fun() -> lists:any(fun({{resource_limit, memory, _}, _}) -> true; (_) -> false end,
                                 rabbit_alarm:get_alarms()) end,
    Wait = fun(Again, Wanted) ->
        case Alarmed() of Wanted -> ok; _ -> timer:sleep(5), Again(Again, Wanted) end
    end,
    Until = fun(Wanted) -> Wait(Wait, Wanted) end";

/// RabbitMQ marks that it is booting by the process `rabbit_boot`, which lingers for some 200 ms after the boot. While it
/// is there, `rabbit:start` believes that somebody else is at it already, and does nothing; and with 4.x `rabbit:stop` ends
/// the Erlang machine, which is still in `rabbit:start_it`. The deadline is that of the call.
const CALM: &str = "
    Calm = fun(Again) ->
        case whereis(rabbit_boot) of undefined -> ok; _ -> timer:sleep(10), Again(Again) end
    end,
    ok = Calm(Calm)";

/// A running RabbitMQ node, private to the test that started it.
///
/// All methods take `&self`, so threads may share one node in an [`Arc`] or a `static`. Each has a deadline: the
/// [`timeout`](Builder::timeout), or for booting the [`boot_timeout`](Builder::boot_timeout).
#[derive(Debug)]
pub struct RabbitMq {
    node: Node,
}

/// What a node is started with. See [`RabbitMq::builder`].
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until start"]
pub struct Builder {
    settings: Settings,
}

impl Builder {
    /// Which RabbitMQ to run: the program `rabbitmq-server`, or the root directory of a system in which it is installed,
    /// with the Erlang it needs. Defaults to what the environment variable `CONEY_RABBITMQ` says, in the same way, or else
    /// to the one that is installed.
    ///
    /// The programs of a root directory are started by `chroot`, which takes root or a user namespace. A node has its
    /// files in `tmp` of the root directory, and sees no others: see [`conf_file`](Self::conf_file).
    pub fn server(mut self, path: impl Into<PathBuf>) -> Self {
        self.settings.server = Some(path.into());
        self
    }

    /// Adds a line to the node's `rabbitmq.conf`, for example `consumer_timeout = 3000`. Defaults to none.
    pub fn conf(mut self, line: impl Into<String>) -> Self {
        self.settings.conf.push(line.into());
        self
    }

    /// Adds a line that names a file to the node's `rabbitmq.conf`, for example `ssl_options.cacertfile`. The node gets a
    /// copy of the file, made when it is started first. Defaults to none.
    pub fn conf_file(mut self, key: impl Into<String>, file: impl Into<PathBuf>) -> Self {
        self.settings.conf_files.push((key.into(), file.into()));
        self
    }

    /// Adds a setting to the node's `advanced.config`, for what has no line in `rabbitmq.conf`: the application, the key
    /// and the value, an Erlang term; for example `rabbit`, `channel_tick_interval`, `1000`. Defaults to none.
    pub fn advanced(
        mut self,
        application: impl Into<String>,
        key: impl Into<String>,
        value: impl std::fmt::Display,
    ) -> Self {
        let settings = self.settings.advanced.entry(application.into()).or_default();
        settings.push((key.into(), value.to_string()));
        self
    }

    /// Enables a plugin that comes with the server, and those it depends on, for example `rabbitmq_consistent_hash_exchange`. A
    /// node does not boot with one that it does not have. Defaults to none.
    pub fn plugin(mut self, name: impl Into<String>) -> Self {
        self.settings.plugins.push(name.into());
        self
    }

    /// How long the node may take to boot, each time. Defaults to 180 s, for machines that are busy.
    pub fn boot_timeout(mut self, timeout: Duration) -> Self {
        self.settings.boot_timeout = timeout;
        self
    }

    /// How long any other method may take. Defaults to 30 s.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.settings.timeout = timeout;
        self
    }

    /// Boots the node; it accepts logins when this returns.
    ///
    /// # Errors
    /// [`NodeError::NotInstalled`], [`NodeError::Server`], [`NodeError::Boot`] with the end of the node's log, or
    /// [`NodeError::Io`].
    pub fn start(self) -> Result<RabbitMq> {
        let home = Arc::new(Home::new(self.settings.server.as_deref())?);
        Ok(RabbitMq { node: Node::boot_new(home, "coney", self.settings)? })
    }
}

impl Default for Builder {
    fn default() -> Self {
        let (boot_timeout, timeout) = (Duration::from_secs(180), Duration::from_secs(30));
        let (server, conf, conf_files) = (None, Vec::new(), Vec::new());
        let (advanced, plugins) = (BTreeMap::new(), Vec::new());
        Self { settings: Settings { server, conf, conf_files, advanced, plugins, boot_timeout, timeout } }
    }
}

impl RabbitMq {
    /// Boots a node with RabbitMQ's own defaults; it accepts logins when this returns.
    ///
    /// # Errors
    /// As [`Builder::start`].
    pub fn start() -> Result<Self> {
        Self::builder().start()
    }

    /// A node with other settings.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Where to connect, as `guest` to the default virtual host: `amqp://guest:guest@127.0.0.1:PORT/%2f`.
    ///
    /// It stays the same through restarts.
    pub fn url(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}/%2f", self.port())
    }

    /// The AMQP port, on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.node.amqp_port
    }

    /// Which version of RabbitMQ it is.
    pub fn version(&self) -> Version {
        self.node.version()
    }

    /// Stops the broker but not the Erlang machine around it, as `rabbitmqctl stop_app` does: it closes all connections
    /// and stops listening.
    ///
    /// # Errors
    /// [`NodeError::Eval`] or [`NodeError::Timeout`].
    pub fn stop_app(&self) -> Result<()> {
        self.node.run(&format!("{CALM}, ok = rabbit:stop()"))
    }

    /// Starts the broker after [`stop_app`](Self::stop_app); it accepts logins when this returns.
    ///
    /// # Errors
    /// [`NodeError::Eval`] or [`NodeError::Timeout`].
    pub fn start_app(&self) -> Result<()> {
        self.node.run(&format!("{CALM}, ok = rabbit:start(), {READY}"))
    }

    /// Shuts the node down in order and boots it again on the same ports and data.
    ///
    /// # Errors
    /// [`NodeError::State`], [`NodeError::Timeout`] or [`NodeError::Boot`].
    pub fn restart(&self) -> Result<()> {
        self.node.shut_down()?;
        self.node.boot()
    }

    /// Kills the node without warning to its clients (SIGKILL). Durable queues and what else was declared durable survive,
    /// and so do messages the broker has confirmed as persistent.
    ///
    /// RabbitMQ on its own may forget what was declared in the last moments before it is killed; so that tests can count
    /// on it, the node is made to write that down first, unless it is [paused](Self::pause).
    ///
    /// # Errors
    /// [`NodeError::State`] when it is killed already.
    pub fn kill(&self) -> Result<()> {
        self.node.kill()
    }

    /// Boots the node again after [`kill`](Self::kill), on the same ports and data.
    ///
    /// # Errors
    /// [`NodeError::State`] when it runs, or [`NodeError::Boot`].
    pub fn start_again(&self) -> Result<()> {
        self.node.boot()
    }

    /// Freezes the node (SIGSTOP): connections stay open and nothing answers. Methods that ask the node fail with
    /// [`NodeError::State`] until [`resume`](Self::resume).
    ///
    /// # Errors
    /// [`NodeError::State`] when it is killed, or [`NodeError::Io`].
    pub fn pause(&self) -> Result<()> {
        self.node.pause()
    }

    /// Lets a paused node go on (SIGCONT).
    ///
    /// # Errors
    /// [`NodeError::State`] when it is killed, or [`NodeError::Io`].
    pub fn resume(&self) -> Result<()> {
        self.node.resume()
    }

    /// Raises the memory alarm, by declaring nearly all memory too much; it is raised when this returns.
    ///
    /// From then on the broker reads nothing more from a connection that publishes, and tells the client so if it
    /// understands `connection.blocked`. It lasts until [`unblock_publishers`](Self::unblock_publishers) or the broker
    /// is started anew.
    ///
    /// # Errors
    /// [`NodeError::Eval`], [`NodeError::Timeout`] or [`NodeError::State`].
    pub fn block_publishers(&self) -> Result<()> {
        self.node.run(&format!("{ALARMED}, vm_memory_monitor:set_vm_memory_high_watermark(0.000000001), Until(true)"))
    }

    /// Ends the memory alarm of [`block_publishers`](Self::block_publishers); it is over when this returns.
    ///
    /// # Errors
    /// [`NodeError::Eval`], [`NodeError::Timeout`] or [`NodeError::State`].
    pub fn unblock_publishers(&self) -> Result<()> {
        self.node.run(&format!("{ALARMED}, vm_memory_monitor:set_vm_memory_high_watermark(0.4), Until(false)"))
    }

    /// Closes every connection of this node as an operator would, with code 320, `CONNECTION_FORCED`, and this reason. Gives their
    /// number. Each client has been told when this returns; it may not have answered yet.
    ///
    /// # Errors
    /// [`NodeError::Eval`], [`NodeError::Timeout`] or [`NodeError::State`].
    pub fn close_all_connections(&self, reason: &str) -> Result<usize> {
        let rows = self.node.rows(&format!(
            "Reason = binary_to_list({}),
             Closed = [ok || Pid <- rabbit_networking:local_connections(),
                             ok =:= (catch rabbit_networking:close_connection(Pid, Reason))],
             [[length(Closed)]]",
            binary(reason)
        ))?;
        reads::number(&rows)
    }

    /// Adds a user, without permissions.
    ///
    /// # Errors
    /// [`NodeError::Eval`] when there is such a user; else as [`eval`](Self::eval).
    pub fn add_user(&self, name: &str, password: &str) -> Result<()> {
        let (name, password) = (binary(name), binary(password));
        self.node.run(&format!("ok = rabbit_auth_backend_internal:add_user({name}, {password}, {ACTOR})"))
    }

    /// Sets what a user may configure, write and read in a virtual host: regular expressions for names of queues and
    /// exchanges, where `.*` is all and an empty one is none.
    ///
    /// # Errors
    /// [`NodeError::Eval`] when there is no such user or virtual host; else as [`eval`](Self::eval).
    pub fn set_permissions(&self, vhost: &str, user: &str, configure: &str, write: &str, read: &str) -> Result<()> {
        let [vhost, user, configure, write, read] = [vhost, user, configure, write, read].map(binary);
        self.node.run(&format!(
            "ok = rabbit_auth_backend_internal:set_permissions({user}, {vhost}, {configure}, {write}, {read}, {ACTOR})"
        ))
    }

    /// Adds a virtual host, in which `guest` gets all permissions. Nothing happens when there is one.
    ///
    /// # Errors
    /// As [`eval`](Self::eval).
    pub fn add_vhost(&self, name: &str) -> Result<()> {
        self.node.run(&format!("ok = rabbit_vhost:add({}, {ACTOR})", binary(name)))?;
        self.set_permissions(name, "guest", ".*", ".*", ".*")
    }

    /// Evaluates an Erlang expression, or several with commas between, on the node. Gives the value of the last one as
    /// Erlang prints it, on one line.
    ///
    /// ```no_run
    /// # fn main() -> Result<(), coney::testing::NodeError> {
    /// # let rabbit = coney::testing::RabbitMq::start()?;
    /// assert_eq!(rabbit.eval("Two = 1 + 1, {two, Two}")?, "{two,2}");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`NodeError::Eval`] with the exception or the syntax error, [`NodeError::Timeout`], or [`NodeError::State`].
    pub fn eval(&self, expression: &str) -> Result<String> {
        self.node.value(expression)
    }

    /// Everything the node has logged so far, through restarts.
    pub fn log(&self) -> String {
        self.node.log()
    }
}
