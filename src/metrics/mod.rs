//! What coney counts and measures, by the facade [`metrics`](https://docs.rs/metrics).
//!
//! With the feature `metrics`, whatever recorder the program installs gets them; without it, nothing is counted and
//! nothing costs anything. examples/metrics serves them to Prometheus.
//!
//! **Install the recorder first.** The facade binds a counter to the recorder that is there when the counter is made, and
//! coney makes them with the pool and with the listener: what is made before the recorder reports to nobody.
//!
//! | label | value |
//! |---|---|
//! | `pool` | the pool's name, as in `[pools.NAME]` |
//! | `listener` | the listener's name, which is that of its queue unless it has been given another |
//! | `queue` | the queue a route was asked to listen on; empty where the broker names it |
//! | `outbox` | the outbox: the path of its file, or the address of its server |
//! | `outcome` | what became of a message: see [`PUBLISH_TOTAL`] and [`OUTCOMES_TOTAL`] |
//!
//! Labels are made once for each pool and route, so nothing is allocated for a message. Two pools of one name count as one.
//! Gauges are back at 0 once everything has ended, but for those of an outbox, whose messages stay.

pub(crate) mod meter;

/// How a metric is described to the recorder.
#[cfg(feature = "metrics")]
macro_rules! describe {
    (counter, $name:ident, $unit:ident, $help:expr) => {
        ::metrics::describe_counter!($name, ::metrics::Unit::$unit, $help)
    };
    (gauge, $name:ident, $unit:ident, $help:expr) => {
        ::metrics::describe_gauge!($name, ::metrics::Unit::$unit, $help)
    };
    (histogram, $name:ident, $unit:ident, $help:expr) => {
        ::metrics::describe_histogram!($name, ::metrics::Unit::$unit, $help)
    };
}

/// One constant for each name, documented by the text that the recorder is told too.
macro_rules! names {
    ($($constant:ident = $name:literal, $kind:ident of $unit:ident { $($label:ident)* }: $(#[doc = $help:literal])+)*) => {
        $(
            #[doc = concat!("`", $name, "`, a ", stringify!($kind), " with the labels `", stringify!($($label)*), "`:")]
            $(#[doc = $help])+
            #[cfg_attr(not(feature = "outbox"), allow(dead_code, reason = "some are of an outbox"))]
            pub const $constant: &str = $name;
        )*

        /// Every name, in the order of this page.
        #[cfg(feature = "metrics")]
        pub const NAMES: &[&str] = &[$($constant),*];

        /// Tells the installed recorder what each name means and what it is measured in. Not needed for the counting; say it
        /// once, after the recorder is installed.
        #[cfg(feature = "metrics")]
        pub fn describe() {
            $(describe!($kind, $constant, $unit, concat!($($help),+).trim());)*
        }
    };
}

names! {
    PUBLISH_TOTAL = "coney_publish_total", counter of Count { pool outcome }:
    /// Messages published, by what became of each. The outcome is `confirmed`, `returned` (no queue took it), `nacked`,
    /// `refused` (the broker closed the channel, or a hook would not have it), `blocked`, `timeout`, `lost` (with the
    /// connection) or `failed` (it could not be sent at all). A message that is sent again counts again. Requests of an
    /// `RpcClient` are not counted, unless a hook refuses them.
    PUBLISH_RETRIES_TOTAL = "coney_publish_retries_total", counter of Count { pool }:
    /// How often a message was sent again after its connection was lost, or the channel it shared with messages of other threads.
    CONFIRM_SECONDS = "coney_confirm_seconds", histogram of Seconds { pool }:
    /// From the writing of a message to the broker's answer.
    PUBLISH_IN_FLIGHT = "coney_publish_in_flight", gauge of Count { pool }:
    /// Messages that are written and not settled.
    POOL_SIZE = "coney_pool_size", gauge of Count { pool }:
    /// The most connections that the pool lends at a time.
    POOL_IN_USE = "coney_pool_in_use", gauge of Count { pool }:
    /// Connections that are lent, those included that are being opened.
    POOL_WAITING = "coney_pool_waiting", gauge of Count { pool }:
    /// Threads that wait for a connection to be given back.
    POOL_WAIT_SECONDS = "coney_pool_wait_seconds", histogram of Seconds { pool }:
    /// From asking for a connection to having it, or to giving up; opening it included. Threads that `Pool::publish` has wait
    /// behind another one do not ask.
    POOL_CHECKOUT_FAILURES_TOTAL = "coney_pool_checkout_failures_total", counter of Count { pool }:
    /// How often somebody asked for a connection and got none.
    CONNECTIONS_OPEN = "coney_connections_open", gauge of Count { pool }:
    /// Connections that are open, or have not been found dead yet.
    CONNECTIONS_OPENED_TOTAL = "coney_connections_opened_total", counter of Count { pool }:
    /// Connections opened.
    CONNECTIONS_DISCARDED_TOTAL = "coney_connections_discarded_total", counter of Count { pool }:
    /// Connections lost or given up: dead, left by a panic, or in doubt after a time-out. Counted as soon as it is known.
    CONNECT_FAILURES_TOTAL = "coney_connect_failures_total", counter of Count { pool }:
    /// Attempts to connect that failed.
    CONNECTIONS_BLOCKED = "coney_connections_blocked", gauge of Count { pool }:
    /// Connections on which the broker takes no messages at present.
    DELIVERIES_TOTAL = "coney_deliveries_total", counter of Count { listener queue }:
    /// Messages handed to the handler.
    OUTCOMES_TOTAL = "coney_outcomes_total", counter of Count { listener queue outcome }:
    /// Messages by what became of them: `acked`, `rejected`, `requeued`, `retried` (put away to be tried again later, or in a partition tried again in place) or
    /// `dead` (put into the queue `NAME.dead`).
    HANDLER_PANICS_TOTAL = "coney_handler_panics_total", counter of Count { listener queue }:
    /// Handlers that panicked.
    HANDLER_SECONDS = "coney_handler_seconds", histogram of Seconds { listener queue }:
    /// How long handlers took.
    HANDLERS_RUNNING = "coney_handlers_running", gauge of Count { listener queue }:
    /// Handlers that are at a message.
    LISTENER_CONSUMING = "coney_listener_consuming", gauge of Count { listener }:
    /// 1 while every thread of the listener has its consumer, 0 while it has not.
    LISTENER_WORKERS = "coney_listener_workers", gauge of Count { listener queue }:
    /// Threads that have a consumer on the queue.
    LISTENER_PARTITION_ACTIVE = "coney_listener_partition_active", gauge of Count { listener queue }:
    /// 1 for a partition whose messages come to the listener, 0 for one whose messages do not.
    LISTENER_PAUSED = "coney_listener_paused", gauge of Count { listener }:
    /// 1 while the listener rests, by hand or because most messages failed, 0 while it does not.
    LISTENER_PAUSES_TOTAL = "coney_listener_pauses_total", counter of Count { listener }:
    /// How often the listener began to rest.
    LISTENER_RECOVERIES_TOTAL = "coney_listener_recoveries_total", counter of Count { listener }:
    /// How often the listener came back after it had lost its consumers.
    OUTBOX_PENDING = "coney_outbox_pending", gauge of Count { outbox }:
    /// Messages of an outbox that wait to be forwarded, as of the last second.
    OUTBOX_OLDEST_SECONDS = "coney_outbox_oldest_seconds", gauge of Seconds { outbox }:
    /// How long the oldest of them has waited.
    OUTBOX_FORWARDED_TOTAL = "coney_outbox_forwarded_total", counter of Count { outbox }:
    /// Messages of an outbox that the broker has confirmed.
    OUTBOX_REFUSED_TOTAL = "coney_outbox_refused_total", counter of Count { outbox }:
    /// Messages of an outbox that the broker has refused or returned, and that are put aside.
}
