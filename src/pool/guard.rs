//! The guard by which a connection is lent.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use super::permits::Permits;
use super::shared::{Lending, Shared};
use crate::connection::Connection;
use crate::fork::Kept;

/// A lent [`Connection`]; dropping it gives the connection back.
///
/// Giving back waits until the callbacks of [`publish_async`](Connection::publish_async) and
/// [`get_and_ack_async`](Connection::get_and_ack_async) have been run, at most for the pool's `confirm_timeout` and half a
/// second; those that have no outcome by then get [`Error::Timeout`](crate::Error::Timeout) or
/// [`Error::ConnectionLost`](crate::Error::ConnectionLost). The connection is given up instead of kept if it is dead, if a
/// time-out has left it in doubt, and if the thread is panicking. Dropped in one of its own callbacks, it waits for none of them, and
/// the connection is given up.
pub struct PooledConnection {
    /// `None` only while it is being dropped.
    connection: Option<Connection>,
    permit: Kept<r2d2::PooledConnection<Permits>>,
    shared: Arc<Kept<Shared>>,
}

impl PooledConnection {
    pub(super) fn new(
        connection: Connection,
        permit: r2d2::PooledConnection<Permits>,
        lent: Lending<'_>,
    ) -> PooledConnection {
        let shared = lent.keep(&connection);
        PooledConnection { connection: Some(connection), permit: Kept::new(permit), shared }
    }
}

impl fmt::Debug for PooledConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PooledConnection")
            .field("pool", &self.shared.name())
            .field("connection", &self.connection)
            .finish_non_exhaustive()
    }
}

impl Deref for PooledConnection {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        // Taken out only when the guard is dropped, and then nobody can ask for it any more.
        self.connection.as_ref().expect("a guard holds its connection until it is dropped")
    }
}

impl Drop for PooledConnection {
    fn drop(&mut self) {
        if Kept::maker(&self.permit).is_parent() {
            std::mem::forget(self.connection.take());
            return;
        }
        if let Some(connection) = self.connection.take() {
            connection.settle_down(Instant::now() + self.shared.settings.confirm_timeout);
            if thread::panicking() {
                self.shared.discard(connection, "its borrower panicked");
            } else if !connection.is_reusable() {
                self.shared.discard(connection, "it died, or a time-out left it in doubt");
            } else {
                self.shared.put_back(connection);
            }
        }
        // The permit goes back after this, so that whoever gets it finds the connection.
        self.shared.holds_no_more(self.permit.number);
    }
}
