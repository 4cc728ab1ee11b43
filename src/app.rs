//! The one place where all meets: settings become named pools.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use crate::connection::CLOSE_TIMEOUT;
use crate::error::{Error, Result};
use crate::pool::{Pool, Workshop};
use crate::settings::{LISTEN_POOL, PUBLISH_POOL, PoolSettings, Settings};
use crate::topology::Topology;

/// A program's pools and topology, made from its settings. Cheap to clone; all clones are the same app.
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
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// Every configured pool but the two that are always there.
    pools: BTreeMap<String, Pool>,
    publish: Pool,
    listen: Pool,
    topology: Topology,
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
        let Settings { mut pools, topology, .. } = settings;
        let make = |name: &str, settings: Option<PoolSettings>| {
            Pool::in_workshop(name.to_owned(), settings.unwrap_or_default(), &workshop)
        };
        let publish = make(PUBLISH_POOL, pools.remove(PUBLISH_POOL))?;
        let listen = make(LISTEN_POOL, pools.remove(LISTEN_POOL))?;
        let pools = pools
            .into_iter()
            .map(|(name, settings)| Ok((name.clone(), make(&name, Some(settings))?)))
            .collect::<Result<_>>()?;
        Ok(App { inner: Arc::new(Inner { pools, publish, listen, topology }) })
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

    /// Declares the topology of the settings, on a connection of the publish pool. Declaring it again changes nothing.
    ///
    /// # Errors
    ///
    /// Those of [`Pool::connection`] and [`Connection::declare`](crate::Connection::declare).
    pub fn declare_topology(&self) -> Result<()> {
        if self.inner.topology.is_empty() {
            return Ok(());
        }
        self.publish_pool().connection()?.declare(&self.inner.topology).map(drop)
    }

    /// Closes every pool: nothing more is lent, and connections are closed as they come back. Takes at most 5 s.
    ///
    /// Dropping the last clone of the app does the same, to clones of its pools too.
    pub fn close(&self) {
        self.inner.close();
    }
}

impl Inner {
    fn pools(&self) -> impl Iterator<Item = &Pool> {
        [&self.publish, &self.listen].into_iter().chain(self.pools.values())
    }

    fn close(&self) {
        let deadline = Instant::now() + CLOSE_TIMEOUT;
        self.pools().for_each(|pool| pool.close_by(deadline));
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.close();
    }
}
