//! `coney broker`: the embedded broker as a program of its own.

use std::net::SocketAddr;
use std::path::PathBuf;

use coney::embedded::{EmbeddedBroker, Release};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::config::Config;
use crate::exit::{Exit, Failure, Result};
use crate::output;

/// Runs a broker that speaks AMQP 0-9-1 as RabbitMQ 4.0 does, or 3.10, and keeps everything in memory.
///
/// For development and tests, by programs in any language. It is neither durable nor made for production.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  coney broker
  coney broker --listen 127.0.0.1:5673 --listen '[::1]:5673'
  coney broker --release 3.10
  coney broker --config broker.toml --log debug

A configuration file:
  release = \"4.0\"                   # or \"3.10\"; --release comes before it
  vhosts = [\"/\", \"orders\"]
  [limits]                          # all of it optional; these are the defaults
  max_message_size = 16777216       # bytes; with release 3.10, 134217728
  frame_max = 131072                # bytes, at least 4096
  channel_max = 2047
  heartbeat = \"60s\"                 # what clients are offered; \"0s\" for none
  handshake_timeout = \"10s\"
  consumer_timeout = \"30m\"          # how long a delivery may stay unacknowledged
  [users.app]                       # with users here there is no guest
  password = \"secret\"
  [users.app.permissions.\"/\"]       # regular expressions, unanchored; without any, all is permitted
  configure = \"^app\\\\.\"
  write = \".*\"
  read = \".*\"")]
pub struct Arguments {
    /// An address to listen on; may be given several times. Port 0 is any free port.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:5672")]
    listen: Vec<SocketAddr>,
    /// Allows addresses other than loopback. Passwords then cross the network in clear.
    #[arg(long)]
    allow_remote: bool,
    /// The release of RabbitMQ that clients see: 3.10 or 4.0. Defaults to that of the configuration file, or else 4.0.
    #[arg(long, value_name = "RELEASE")]
    release: Option<Release>,
    /// Allows queues with x-queue-type = quorum. They look like quorum queues to clients, and are not replicated.
    #[arg(long)]
    quorum_queues: bool,
    /// Virtual hosts, users with their permissions, and limits. Without it: `/`, and guest with the password guest.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// What is logged on stderr: off, error, warn, info, debug or trace.
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    log: log::LevelFilter,
}

/// Runs until SIGINT or SIGTERM.
pub fn run(arguments: &Arguments) -> Result {
    output::log_at(arguments.log, arguments.log);
    let mut builder = EmbeddedBroker::builder().allow_remote(arguments.allow_remote);
    builder = builder.quorum_queues(arguments.quorum_queues);
    for address in &arguments.listen {
        builder = builder.listen(*address);
    }
    if let Some(path) = &arguments.config {
        builder = Config::read(path)?.apply(builder);
    }
    if let Some(release) = arguments.release {
        builder = builder.release(release);
    }
    // Before it is ready, so that whoever waits for that can end it.
    let mut signals =
        Signals::new([SIGINT, SIGTERM]).map_err(|error| Failure::failed(format!("cannot watch signals: {error}")))?;
    let broker = builder.start()?;
    let addresses: Vec<String> = broker.addrs().iter().map(ToString::to_string).collect();
    output::line(&format!("coney: broker ready on {}", addresses.join(" and ")))?;
    signals.forever().next();
    broker.stop();
    Ok(Exit::Done)
}
