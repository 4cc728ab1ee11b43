//! What can go wrong with a test node.

use std::path::PathBuf;
use std::time::Duration;
use std::{fmt, io};

/// The result of everything in this module.
pub type Result<T, E = NodeError> = std::result::Result<T, E>;

/// Why a test node could not do what it was asked.
///
/// A test would rather see the broker's own words than a code, so the variants carry text.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum NodeError {
    /// A program the node is made of was found neither where packages put it nor in `PATH`.
    #[error("{program} is not installed; scripts/test installs it (Debian: apt-get install rabbitmq-server)")]
    NotInstalled {
        /// `rabbitmq-server`, or `erl_call` or `epmd`, which come with Erlang.
        program: &'static str,
    },

    /// The server that was asked for cannot be run.
    #[error("cannot run RabbitMQ from {}, which {by} names: {reason}", path.display())]
    Server {
        /// What was given to [`server`](super::Builder::server), or by the variable.
        path: PathBuf,
        /// How it was given, `Builder::server` or `CONEY_RABBITMQ`.
        by: &'static str,
        /// What is wrong with it, and what was expected.
        reason: String,
    },

    /// The operating system refused something: a file, a process, a signal.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// The system's answer.
        source: io::Error,
    },

    /// The node ended while booting, or had not booted within
    /// [`boot_timeout`](super::Builder::boot_timeout).
    #[error("the RabbitMQ node did not boot: {reason}\n{log}")]
    Boot {
        /// How the boot ended.
        reason: String,
        /// The last lines the node wrote to its output and its log.
        log: String,
    },

    /// The node did not answer within [`timeout`](super::Builder::timeout).
    #[error("{what} took longer than {after:?}")]
    Timeout {
        /// What was being waited for.
        what: String,
        /// The time allowed for it.
        after: Duration,
    },

    /// The node is in the wrong state for the call: killed, paused, or running already.
    #[error("cannot {what}: the RabbitMQ node is {state}")]
    State {
        /// What was asked.
        what: &'static str,
        /// `killed`, `paused` or `running`.
        state: &'static str,
    },

    /// The node answered that an expression failed, or could not be reached to evaluate it.
    #[error("the RabbitMQ node did not evaluate `{expression}`: {reason}")]
    Eval {
        /// The Erlang expression.
        expression: String,
        /// The exception, the syntax error, or why the node was not reached.
        reason: String,
    },

    /// A cluster of no node, or of more than makes sense on one machine, was asked for.
    #[error("a cluster has 1 to {most} nodes; {asked} were asked for")]
    ClusterSize {
        /// How many were asked for.
        asked: usize,
        /// How many there may be.
        most: usize,
    },

    /// There is no such queue.
    #[error("no queue {queue:?} in virtual host {vhost:?}")]
    NoSuchQueue {
        /// The virtual host looked in.
        vhost: String,
        /// The queue looked for.
        queue: String,
    },
}

/// The same as `Display`: tests unwrap, and a log is not readable with its line ends escaped.
impl fmt::Debug for NodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// `map_err(failed_to("create the directory"))`.
pub(super) fn failed_to(what: impl Into<String>) -> impl FnOnce(io::Error) -> NodeError {
    let what = what.into();
    move |source| NodeError::Io { what, source }
}
