//! How often a message may come back to a quorum queue.

use super::{Queue, QueueType};
use crate::field::FieldValue;

/// The argument that sets it.
pub(super) const DELIVERY_LIMIT: &str = "x-delivery-limit";

/// What RabbitMQ 4 sets where a queue says nothing (<https://www.rabbitmq.com/docs/quorum-queues#poison-message-handling>).
const DEFAULT: u64 = 20;

/// What is known of the limit of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum DeliveryLimit {
    /// Nothing was said of it: the broker has its default.
    #[default]
    Default,
    Of(u64),
    None,
}

impl DeliveryLimit {
    /// The limit on a broker of this version.
    pub(crate) fn on(self, version: Option<&str>) -> Option<u64> {
        match self {
            DeliveryLimit::Of(limit) => Some(limit),
            DeliveryLimit::None => None,
            DeliveryLimit::Default => {
                let major = version?.split('.').next()?.parse::<u32>().ok()?;
                (major >= 4).then_some(DEFAULT)
            }
        }
    }
}

impl Queue {
    /// The limit that it is declared with.
    pub(crate) fn declared_delivery_limit(&self) -> DeliveryLimit {
        match self.arguments.get(DELIVERY_LIMIT).and_then(FieldValue::as_i64) {
            None if matches!(self.declared_type(), Some(QueueType::Classic | QueueType::Stream)) => DeliveryLimit::None,
            // Of no type, it may be a quorum queue by the default of its virtual host.
            None => DeliveryLimit::Default,
            Some(limit) => u64::try_from(limit).map_or(DeliveryLimit::None, DeliveryLimit::Of),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_that_of_the_broker() {
        let quorum = Queue::new("q").quorum();
        for (queue, version, limit) in [
            (quorum.clone(), Some("4.0.5"), Some(20)),
            (quorum.clone(), Some("4"), Some(20)),
            (quorum.clone(), Some("3.10.8"), None),
            (quorum.clone(), Some("unheard of"), None),
            (quorum.clone(), None, None),
            (quorum.clone().delivery_limit(3), None, Some(3)),
            (quorum.without_delivery_limit(), Some("4.0.5"), None),
            (Queue::new("q"), Some("4.0.5"), Some(20)),
            (Queue::new("q").argument("x-queue-type", "classic"), Some("4.0.5"), None),
        ] {
            assert_eq!(queue.declared_delivery_limit().on(version), limit, "{queue:?} on {version:?}");
        }
    }
}
