//! Calls over queues.
