//! What r2d2 lends: permits, which cost nothing to make; and the threads that all pools of an app share.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use scheduled_thread_pool::ScheduledThreadPool;

use crate::error::Result;
use crate::event::Events;
use crate::session::IdleReader;
use crate::session::Watchdog;

/// The right to hold one connection of the pool.
#[derive(Debug)]
pub(super) struct Permit {
    pub(super) number: u64,
}

#[derive(Debug, Default)]
pub(super) struct Permits {
    made: AtomicU64,
}

/// Making a permit cannot fail.
#[derive(Debug, thiserror::Error)]
pub(super) enum Never {}

impl r2d2::ManageConnection for Permits {
    type Connection = Permit;
    type Error = Never;

    fn connect(&self) -> Result<Permit, Never> {
        Ok(Permit { number: self.made.fetch_add(1, Ordering::Relaxed) })
    }

    fn is_valid(&self, _: &mut Permit) -> Result<(), Never> {
        Ok(())
    }

    fn has_broken(&self, _: &mut Permit) -> bool {
        false
    }
}

/// What pools share: threads, which are the watchdog, the idle reader, and the worker that r2d2 makes permits on; and whom they
/// tell what happens.
#[derive(Debug, Clone)]
pub(crate) struct Workshop {
    pub(super) watchdog: Arc<Watchdog>,
    pub(super) idle: Arc<IdleReader>,
    pub(super) worker: SharedWorker,
    pub(crate) events: Events,
}

#[derive(Clone)]
pub(super) struct SharedWorker(pub(super) Arc<ScheduledThreadPool>);

impl fmt::Debug for SharedWorker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedWorker")
    }
}

impl Workshop {
    pub(crate) fn start() -> Result<Workshop> {
        let worker = ScheduledThreadPool::builder().num_threads(1).thread_name_pattern("coney-permits").build();
        let idle = Arc::new(IdleReader::start()?);
        Ok(Workshop {
            watchdog: Watchdog::start()?,
            idle,
            worker: SharedWorker(Arc::new(worker)),
            events: Events::default(),
        })
    }
}
