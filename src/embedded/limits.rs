//! What a client may ask for, how long it may take, and which release it meets.

use std::time::Duration;

use super::release::Release;

/// No client may be tuned below this, nor send larger frames before it is tuned (AMQP 0-9-1, 4.2.3: `frame-min-size`).
pub(super) const FRAME_MIN: u32 = 4096;

/// The limits of a broker. Defaults are RabbitMQ's.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    pub(crate) release: Release,
    /// In bytes of body; `None` is what the release has.
    pub(crate) message: Option<u64>,
    pub(crate) frame_max: u32,
    pub(crate) channel_max: u16,
    /// In seconds, as offered; the client decides. 0 offers none.
    pub(crate) heartbeat: u16,
    /// From the accepted socket to `connection.open-ok`.
    pub(crate) handshake: Duration,
    /// How long a delivery may stay unacknowledged.
    pub(crate) consumer_timeout: Option<Duration>,
    /// Whether queues may be declared as quorum queues.
    pub(crate) quorum_queues: bool,
}

impl Limits {
    /// The largest body of a message, in bytes.
    pub(crate) fn message_max(&self) -> u64 {
        self.message.unwrap_or_else(|| self.release.message_max())
    }
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            release: Release::default(),
            message: None,
            frame_max: 131_072,
            channel_max: 2047,
            heartbeat: 60,
            handshake: Duration::from_secs(10),
            consumer_timeout: Some(Duration::from_secs(30 * 60)),
            quorum_queues: false,
        }
    }
}
