//! What an embedded broker is started with.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::EmbeddedBroker;
use super::limits::{FRAME_MIN, Limits};
use super::release::Release;
use super::server::{Server, StartError};
use super::users::{Pattern, Permissions, User};
use crate::amqp::ShortString;
use crate::error::{Error, Result};

/// How an [`EmbeddedBroker`] is to be. See [`EmbeddedBroker::builder`].
#[derive(Clone)]
#[must_use = "a builder does nothing until start"]
pub struct Builder {
    addrs: Vec<SocketAddr>,
    allow_remote: bool,
    vhosts: Vec<String>,
    users: Vec<(String, String)>,
    /// User, virtual host, and the patterns for configure, write and read.
    permissions: Vec<(String, String, [String; 3])>,
    limits: Limits,
    /// As it was asked for, and checked at the start.
    heartbeat: Duration,
}

impl Builder {
    pub(super) fn new() -> Builder {
        let limits = Limits::default();
        Builder {
            addrs: Vec::new(),
            allow_remote: false,
            vhosts: vec!["/".into()],
            users: vec![("guest".into(), "guest".into())],
            permissions: Vec::new(),
            heartbeat: Duration::from_secs(limits.heartbeat.into()),
            limits,
        }
    }

    /// Adds an address to listen on; port 0 is any free port. Defaults to `127.0.0.1:0` if none is added.
    pub fn listen(mut self, addr: impl Into<SocketAddr>) -> Builder {
        self.addrs.push(addr.into());
        self
    }

    /// Whether addresses other than loopback may be listened on. Defaults to false.
    ///
    /// Passwords cross the network in clear: there is no TLS.
    pub fn allow_remote(mut self, allow: bool) -> Builder {
        self.allow_remote = allow;
        self
    }

    /// Adds a virtual host. Its name has 1 to 255 bytes. Defaults to `/` alone, which there always is.
    pub fn vhost(mut self, name: impl Into<String>) -> Builder {
        let name = name.into();
        if !self.vhosts.contains(&name) {
            self.vhosts.push(name);
        }
        self
    }

    /// Adds a user, or changes the password of one. Defaults to `guest` with the password `guest`.
    ///
    /// The password must not be blank: as with RabbitMQ, nobody can log in with a blank one.
    ///
    /// A user may do everything in every virtual host, unless [`permissions`](Builder::permissions) are set.
    pub fn user(mut self, name: impl Into<String>, password: impl Into<String>) -> Builder {
        let name = name.into();
        self.users.retain(|(known, _)| *known != name);
        self.users.push((name, password.into()));
        self
    }

    /// Leaves out the user `guest`, who is there by default, and every user added so far.
    pub fn without_users(mut self) -> Builder {
        self.users.clear();
        self
    }

    /// Sets what a user may do in a virtual host: regular expressions for the names of queues and exchanges, as in
    /// [RabbitMQ's permissions](https://www.rabbitmq.com/docs/access-control#authorisation). Defaults to everything
    /// everywhere.
    ///
    /// A user who has permissions in one virtual host may not open those where none are set. The expressions are
    /// unanchored; an empty one matches no name. User and virtual host must be there when the broker starts.
    pub fn permissions(
        mut self,
        user: impl Into<String>,
        vhost: impl Into<String>,
        configure: impl Into<String>,
        write: impl Into<String>,
        read: impl Into<String>,
    ) -> Builder {
        self.permissions.push((user.into(), vhost.into(), [configure.into(), write.into(), read.into()]));
        self
    }

    /// The release of RabbitMQ that the broker is to its clients. Defaults to 4.0.
    ///
    /// What differs is in the page on [releases](crate::guide::releases).
    pub fn release(mut self, release: Release) -> Builder {
        self.limits.release = release;
        self
    }

    /// The largest message body in bytes. Defaults to that of the release: 16 MiB in RabbitMQ 4.0, 128 MiB in 3.10.
    pub fn max_message_size(mut self, bytes: u64) -> Builder {
        self.limits.message = Some(bytes);
        self
    }

    /// The largest frame in bytes, from 4096 on. Defaults to 131072, as in RabbitMQ.
    pub fn frame_max(mut self, bytes: u32) -> Builder {
        self.limits.frame_max = bytes;
        self
    }

    /// How many channels a connection may have, from 1 on. Defaults to 2047, as in RabbitMQ.
    pub fn channel_max(mut self, channels: u16) -> Builder {
        self.limits.channel_max = channels;
        self
    }

    /// The heartbeat that is suggested to clients, rounded up to whole seconds; zero suggests none. At most 65535 s. Defaults
    /// to 60 s, as in RabbitMQ.
    pub fn heartbeat(mut self, heartbeat: Duration) -> Builder {
        self.heartbeat = heartbeat;
        self
    }

    /// How long a client has from connecting to having opened a virtual host; more than zero. Defaults to 10 s, as in
    /// RabbitMQ.
    pub fn handshake_timeout(mut self, timeout: Duration) -> Builder {
        self.limits.handshake = timeout;
        self
    }

    /// How long a delivery may stay unacknowledged before its channel is closed; more than zero, and `None` is for ever.
    /// Defaults to 30 minutes, as in RabbitMQ (<https://www.rabbitmq.com/docs/consumers#acknowledgement-timeout>).
    pub fn consumer_timeout(mut self, timeout: impl Into<Option<Duration>>) -> Builder {
        self.limits.consumer_timeout = timeout.into();
        self
    }

    /// Whether queues may be declared with `x-queue-type = quorum`. Defaults to false: they are refused, because there
    /// is no cluster. The broker behind `memory://NAME` allows it.
    ///
    /// Such a queue looks to clients as a quorum queue of RabbitMQ on one node does: it must be durable and neither
    /// exclusive nor auto-delete; `x-delivery-limit`, the header `x-delivery-count` and the order of what is requeued are
    /// those of RabbitMQ, and so is what is refused, down to the texts. It is not replicated, has no leader and no disk,
    /// and `x-dead-letter-strategy = at-least-once` does what `at-most-once` does.
    pub fn quorum_queues(mut self, allow: bool) -> Builder {
        self.limits.quorum_queues = allow;
        self
    }

    /// Starts the broker. Clients can connect when this returns.
    ///
    /// # Errors
    ///
    /// [`Error::Listen`] if an address cannot be had, [`Error::InvalidArgument`] for a setting that cannot be, and
    /// [`Error::Thread`].
    pub fn start(mut self) -> Result<EmbeddedBroker> {
        let addrs =
            if self.addrs.is_empty() { vec![SocketAddr::from(([127, 0, 0, 1], 0))] } else { self.addrs.clone() };
        if let Some(remote) = addrs.iter().find(|addr| !addr.ip().is_loopback() && !self.allow_remote) {
            return Err(Error::invalid(
                format!("address {remote} of the embedded broker"),
                "not loopback; allow_remote(true) would permit it",
            ));
        }
        for (what, value, least) in
            [("frame_max", self.limits.frame_max, FRAME_MIN), ("channel_max", self.limits.channel_max.into(), 1)]
        {
            if value < least {
                return Err(Error::invalid(what, format!("{value}, expected at least {least}")));
            }
        }
        self.limits.heartbeat = self.heartbeat_seconds()?;
        self.check_times()?;
        self.check_vhosts()?;
        let users = self.users()?;
        let logins = self.users.into_iter().collect();
        match Server::start(&addrs, self.limits, users, &self.vhosts) {
            Ok(server) => Ok(EmbeddedBroker { server, logins }),
            Err(StartError::Bind(addr, source)) => Err(Error::Listen { addr, source: Arc::new(source) }),
            Err(StartError::Thread(name, source)) => Err(Error::Thread { name: name.into(), source: Arc::new(source) }),
        }
    }

    fn heartbeat_seconds(&self) -> Result<u16> {
        // Less than a second is not none.
        let seconds = self.heartbeat.as_secs().saturating_add(u64::from(self.heartbeat.subsec_nanos() > 0));
        u16::try_from(seconds)
            .map_err(|_| Error::invalid("heartbeat", format!("{seconds} s, expected at most {} s", u16::MAX)))
    }

    fn check_times(&self) -> Result<()> {
        let times =
            [("handshake_timeout", Some(self.limits.handshake)), ("consumer_timeout", self.limits.consumer_timeout)];
        match times.into_iter().find(|(_, time)| time.is_some_and(|time| time.is_zero())) {
            Some((what, _)) => Err(Error::invalid(what, "zero, expected a longer time")),
            None => Ok(()),
        }
    }

    fn check_vhosts(&self) -> Result<()> {
        match self.vhosts.iter().find(|name| name.is_empty() || name.len() > ShortString::MAX) {
            Some(name) => Err(Error::invalid(
                format!("virtual host {name:?}"),
                format!("the name has {} bytes, expected 1 to {}", name.len(), ShortString::MAX),
            )),
            None => Ok(()),
        }
    }

    fn users(&self) -> Result<Vec<User>> {
        let mut users: HashMap<&str, User> = HashMap::new();
        for (name, password) in &self.users {
            if password.is_empty() {
                return Err(Error::invalid(
                    format!("password of user {name:?}"),
                    "blank, and nobody can log in with a blank password",
                ));
            }
            let user = User { name: name.clone(), password: password.clone(), permissions: HashMap::new() };
            users.insert(name, user);
        }
        for (name, vhost, patterns) in &self.permissions {
            let Some(user) = users.get_mut(name.as_str()) else {
                return Err(Error::invalid(format!("permissions of user {name:?}"), "there is no such user"));
            };
            if !self.vhosts.contains(vhost) {
                return Err(Error::invalid(
                    format!("permissions of user {name:?}"),
                    format!("there is no virtual host {vhost:?}"),
                ));
            }
            let pattern = |pattern: &String| {
                Pattern::parse(pattern)
                    .map_err(|error| Error::invalid(format!("permissions of user {name:?}"), error.to_string()))
            };
            let [configure, write, read] = patterns;
            let permissions =
                Permissions { configure: pattern(configure)?, write: pattern(write)?, read: pattern(read)? };
            user.permissions.insert(vhost.clone(), permissions);
        }
        Ok(users
            .into_values()
            .map(|mut user| {
                if user.permissions.is_empty() {
                    user.permissions = self.vhosts.iter().map(|vhost| (vhost.clone(), Permissions::all())).collect();
                }
                user
            })
            .collect())
    }
}

// Without passwords.
impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("addrs", &self.addrs)
            .field("vhosts", &self.vhosts)
            .field("users", &self.users.iter().map(|(name, _)| name).collect::<Vec<_>>())
            .field("heartbeat", &self.heartbeat)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}
