//! What runs beside the listeners of an app and ends with it.

use std::sync::Arc;
use std::time::Instant;

use super::App;
use crate::error::{Error, Result};
use crate::fork::Kept;
use crate::health::OutboxHealth;

/// Something with a thread of its own that an app ends, after its listeners and before its pools.
pub(crate) trait Companion: Send + Sync {
    /// Gives the sign to end and does not wait.
    fn tell_to_end(&self);

    /// Waits for the end; says what is left at `deadline`.
    fn wait(&self, deadline: Instant) -> Result<(), String>;

    /// How it stands.
    fn health(&self) -> OutboxHealth;
}

impl App {
    /// Has `companion` end with the app.
    pub(crate) fn accompany(&self, companion: Arc<dyn Companion>) -> Result<()> {
        Kept::maker(&self.inner).check()?;
        self.inner.companions().push(Arc::clone(&companion));
        // A shutdown in between has not seen it.
        if self.publish_pool().is_closed() {
            companion.tell_to_end();
            return Err(Error::PoolClosed { pool: self.publish_pool().name().to_owned() });
        }
        Ok(())
    }
}

/// Ends them all; says what is left at `deadline`.
pub(super) fn end(companions: &[Arc<dyn Companion>], deadline: Instant) -> Vec<String> {
    companions.iter().for_each(|companion| companion.tell_to_end());
    companions.iter().filter_map(|companion| companion.wait(deadline).err()).collect()
}
