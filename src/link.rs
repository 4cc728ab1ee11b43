//! The seam to amiquip: one of its connections, on which every call has a deadline and every failure a cause.
//!
//! A [`Link`] is shared by the threads that work on one connection; an [`OpenChannel`] belongs to one thread. Neither
//! knows of pools or queues.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use amiquip::{Consumer, ConsumerMessage, Publish};

use crate::deadline::{self, Watchdog};
use crate::error::{Error, Result};
use crate::frames::{self, Outgoing, Settlement};
use crate::transport::FRAME_MAX;
use crate::wire::Wire;
use crate::writer::Writer;

/// The longest body in bytes that is written beside amiquip, if one frame holds it: the socket is likely to take it whole.
const BESIDE_MAX: usize = 16 << 10;
/// Type, channel, size and end octet.
const FRAME_OVERHEAD: usize = 8;

/// Says what is being done, for an error; asked only when there is one.
pub(crate) type During<'a> = &'a dyn Fn() -> String;

pub(crate) struct Link {
    /// Empty once closed. Held only to open a channel and to close; both end by the watchdog at the latest.
    amqp: Mutex<Option<amiquip::Connection>>,
    pub(crate) wire: Arc<Wire>,
    writer: Arc<Writer>,
    frame_max: usize,
    /// The longest body in bytes that is written beside amiquip.
    longest_beside: usize,
    watchdog: Arc<Watchdog>,
    /// Something went wrong that a later borrower must not meet.
    suspect: AtomicBool,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link").field("wire", &self.wire).finish_non_exhaustive()
    }
}

impl Link {
    pub(crate) fn new(
        amqp: amiquip::Connection,
        wire: Arc<Wire>,
        writer: Arc<Writer>,
        watchdog: Arc<Watchdog>,
    ) -> Link {
        let frame_max = wire.frame_max().filter(|&max| max > 0).unwrap_or(u32::MAX).min(FRAME_MAX) as usize;
        let longest_beside = BESIDE_MAX.min(frame_max.saturating_sub(FRAME_OVERHEAD));
        Link {
            amqp: Mutex::new(Some(amqp)),
            wire,
            writer,
            frame_max,
            longest_beside,
            watchdog,
            suspect: AtomicBool::new(false),
        }
    }

    /// Whether the connection has not ended, as far as is known without asking the broker.
    pub(crate) fn is_alive(&self) -> bool {
        !self.wire.is_over()
    }

    /// Marks the connection as one that is not to be lent again.
    pub(crate) fn suspect(&self) {
        self.suspect.store(true, Ordering::Release);
    }

    /// Whether the next borrower may have this connection.
    pub(crate) fn is_reusable(&self) -> bool {
        self.is_alive() && !self.suspect.load(Ordering::Acquire)
    }

    /// The largest frame the broker takes, in bytes.
    pub(crate) fn frame_max(&self) -> usize {
        self.frame_max
    }

    /// Runs one step that may block, and cuts the connection if the step is not done after `limit`.
    pub(crate) fn call<T>(
        &self,
        limit: Duration,
        during: During<'_>,
        channel: Option<u16>,
        step: impl FnOnce() -> amiquip::Result<T>,
    ) -> Result<T> {
        let (result, overstayed) = self.watched(limit, step);
        match result {
            Ok(value) => Ok(value),
            Err(_) if overstayed => Err(Error::Timeout { during: during(), after: limit }),
            Err(error) => Err(self.cause(&error, during, channel)),
        }
    }

    /// Runs one step that may block, cuts the connection if it is not done after `limit`, and says whether that was so.
    fn watched<T>(&self, limit: Duration, step: impl FnOnce() -> amiquip::Result<T>) -> (amiquip::Result<T>, bool) {
        let armed = self.watchdog.arm(deadline::after(limit), &self.wire);
        let result = step();
        (result, armed.disarm())
    }

    /// The reason behind an amiquip error: the first cause on record, which amiquip may have told another caller.
    fn cause(&self, error: &amiquip::Error, during: During<'_>, channel: Option<u16>) -> Error {
        let during = during();
        if let amiquip::Error::ServerClosedChannel { code, message, .. } = error {
            return Error::ChannelClosed { during, code: *code, text: message.clone() };
        }
        let recorded = match channel {
            Some(channel) => self.wire.channel_ending(channel, &during),
            None => self.wire.ending(&during),
        };
        recorded.unwrap_or_else(|| {
            // An answer that does not fit its question, or an I/O thread that is just ending: either way this
            // connection is of no more use.
            let detail = error.to_string();
            self.wire.cut(detail.clone());
            Error::ConnectionLost { during, detail }
        })
    }

    /// Why channel `channel` gives no more answers.
    pub(crate) fn channel_ending(&self, channel: u16, during: &str) -> Error {
        self.wire.channel_ending(channel, during).unwrap_or_else(|| Error::ConnectionLost {
            during: during.to_owned(),
            detail: "the connection's I/O thread has ended".to_owned(),
        })
    }

    /// Opens a channel within `limit`.
    pub(crate) fn open_channel(&self, limit: Duration, during: During<'_>) -> Result<OpenChannel> {
        if let Some(ending) = self.wire.is_over().then(|| self.wire.ending(&during())).flatten() {
            return Err(ending);
        }
        let mut amqp = self.amqp.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(amqp) = amqp.as_mut() else {
            return Err(Error::ConnectionLost { during: during(), detail: "it has been closed".to_owned() });
        };
        let channel = self.call(limit, during, None, || amqp.open_channel(None))?;
        let id = channel.channel_id();
        self.wire.channel_opened(id);
        // Were it not known, nothing would be written beside amiquip.
        let next = Cell::new(self.writer.first_of(id).unwrap_or(u64::MAX));
        Ok(OpenChannel { channel, id, next, frames: RefCell::default() })
    }

    /// Closes in order if the connection lives, and within `limit` in any case.
    pub(crate) fn close(&self, limit: Duration) {
        let amqp = self.amqp.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.wire.lost("it has been closed");
        if let Some(amqp) = amqp
            && let Err(error) = self.call(limit, &|| "close".to_owned(), None, || amqp.close())
        {
            log::debug!("connection not closed in order: {error}");
        }
    }
}

/// A channel of a [`Link`] and its number. Dropping it closes it, which waits for the broker: see [`OpenChannel::close`].
pub(crate) struct OpenChannel {
    pub(crate) channel: amiquip::Channel,
    pub(crate) id: u16,
    /// The number of the next message or settlement that amiquip is given to write: see [`Writer::write_beside`].
    next: Cell<u64>,
    /// Where they are made ready that are written beside amiquip.
    frames: RefCell<Vec<u8>>,
}

impl OpenChannel {
    /// Sends a message, within `limit`. That it has been sent says nothing about its having arrived.
    pub(crate) fn publish(
        &self,
        link: &Link,
        limit: Duration,
        during: During<'_>,
        outgoing: Outgoing<'_>,
    ) -> Result<()> {
        let Outgoing { exchange, routing_key, message, mandatory, of_stream } = outgoing;
        let may_be_beside = !of_stream && message.body().len() <= link.longest_beside;
        if self.write_beside(link, |frames| may_be_beside && frames::publish(frames, self.id, outgoing)) {
            return Ok(());
        }
        link.call(limit, during, Some(self.id), || {
            let mut publish = Publish::with_properties(message.body(), routing_key, message.amqp_properties());
            publish.mandatory = mandatory;
            self.channel.basic_publish(exchange, publish)
        })
    }

    /// Settles a delivery that came on this channel, within `limit`; the broker does not answer.
    pub(crate) fn settle(
        &self,
        link: &Link,
        limit: Duration,
        during: During<'_>,
        delivery: amiquip::Delivery,
        settlement: Settlement,
    ) -> Result<()> {
        let tag = delivery.delivery_tag();
        if self.write_beside(link, |frames| frames::settle(frames, self.id, tag, settlement)) {
            return Ok(());
        }
        link.call(limit, during, Some(self.id), || match settlement {
            Settlement::Ack => delivery.ack(&self.channel),
            Settlement::AckUpTo => delivery.ack_multiple(&self.channel),
            Settlement::Reject => delivery.reject(&self.channel, false),
            Settlement::Requeue => delivery.reject(&self.channel, true),
        })
    }

    /// Writes what `make` makes beside amiquip. False if that cannot be done, and amiquip is to be given it.
    fn write_beside(&self, link: &Link, make: impl FnOnce(&mut Vec<u8>) -> bool) -> bool {
        let mut frames = self.frames.borrow_mut();
        let number = self.next.get();
        let written = link.writer.is_open() && make(&mut frames) && link.writer.write_beside(self.id, number, &frames);
        if !written {
            self.next.set(number.saturating_add(1));
        }
        written
    }

    /// Closes the channel after everything it has been asked to send, within `limit`.
    pub(crate) fn close(self, link: &Link, limit: Duration) {
        let OpenChannel { channel, id, .. } = self;
        match link.watched(limit, || channel.close()).0 {
            Ok(()) => {}
            // It has ended before, and another may have its number by now: that is no fault of the connection's.
            Err(error @ (amiquip::Error::EventLoopDropped | amiquip::Error::ServerClosedChannel { .. })) => {
                log::debug!("channel {id} not closed in order: {error}");
            }
            Err(error) => {
                let cause = link.cause(&error, &|| format!("close of channel {id}"), Some(id));
                log::debug!("channel {id} not closed in order: {cause}");
            }
        }
    }
}

/// Cancels a consumer; gives back a delivery that crossed the cancel on its way, the first if there are several.
///
/// amiquip tells the one who cancels first and the consumer's receiver after that, and ends the whole connection if the
/// receiver is gone by then. So the receiver is held until its last word is in, which is when its other end is dropped.
pub(crate) fn cancel(consumer: &Consumer<'_>) -> amiquip::Result<Option<amiquip::Delivery>> {
    let cancelled = consumer.cancel();
    let mut crossed = None;
    for event in consumer.receiver() {
        if let ConsumerMessage::Delivery(delivery) = event {
            crossed.get_or_insert(delivery);
        }
    }
    cancelled.map(|()| crossed)
}
