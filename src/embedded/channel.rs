//! One channel of a connection: frames to methods and messages, and how a channel ends.
//!
//! What the methods do is the virtual host's. A channel that was closed by the broker stays here until the client has
//! said `close-ok`. Everything the client had sent before that is read and ignored, as long as it is in order.

use super::inbound::{described, erlang_numbers};
use super::outbox::Outbox;
use super::refusal::Refusal;
use super::vhost::{ChannelKey, VHost};
use crate::amqp::Malformed;
use crate::amqp::cursor::Reader;
use crate::amqp::frame::{self, BASIC, Frame};
use crate::amqp::method::*;
use crate::amqp::properties::Properties;

/// Room made for a body before any of it has come.
const BODY_AT_FIRST: u64 = 128 << 10;

/// What the next frame of a channel may be.
#[derive(Debug)]
enum Expects {
    Method,
    /// The content header of this publish.
    Header(BasicPublish),
    Body(Incoming),
    /// The rest of a body that came after the channel was closed.
    Ignored(u64),
    /// The rest of a body that was refused for its size. RabbitMQ refuses it at its end. Here the client is told sooner,
    /// and may give it up.
    Unwanted(u64),
}

/// A message of which some body is still to come.
#[derive(Debug)]
struct Incoming {
    publish: BasicPublish,
    properties: Box<[u8]>,
    body: Vec<u8>,
    size: u64,
}

/// What a frame did to its channel.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    Done,
    /// A message went to the virtual host.
    Published,
    /// The channel is gone; its number may be used again.
    Closed,
}

#[derive(Debug)]
pub(super) struct Channel {
    number: u16,
    key: ChannelKey,
    /// `channel.close` was sent, `close-ok` has not come.
    closing: bool,
    expects: Expects,
}

impl Channel {
    pub(super) fn new(number: u16, key: ChannelKey) -> Channel {
        Channel { number, key, closing: false, expects: Expects::Method }
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing
    }

    /// Closes the channel from this side, unless that has been done.
    pub(super) fn close(&mut self, refusal: &Refusal, host: &VHost, outbox: &Outbox) {
        if self.closing {
            return;
        }
        self.closing = true;
        // What was confirmed before the mistake is told before the channel ends.
        host.flush_confirms(outbox.id());
        host.close_channel(self.key);
        outbox.push(
            self.number,
            ChannelClose {
                reply_code: refusal.code,
                reply_text: refusal.text.as_str().into(),
                class_id: refusal.class_id,
                method_id: refusal.method_id,
            },
        );
    }

    /// Whether this frame is a publish, which a blocked connection has to wait with.
    pub(super) fn begins_publish(&self, frame: &Frame<'_>) -> bool {
        frame.kind == frame::METHOD && frame.payload.starts_with(&[0, 60, 0, 40]) && !self.closing
    }

    /// Takes a frame. A refusal has not been acted upon when this returns.
    pub(super) fn take(
        &mut self,
        frame: &Frame<'_>,
        host: &VHost,
        outbox: &Outbox,
        message_max: u64,
    ) -> Result<Step, Refusal> {
        match frame.kind {
            frame::METHOD => self.method(frame, host, outbox),
            frame::HEADER => self.header(frame, host, message_max),
            frame::BODY => self.body(frame, host),
            frame::HEARTBEAT => Err(Refusal::unexpected_frame(described(frame))),
            _ => Err(unknown_frame(frame)),
        }
    }

    fn method(&mut self, frame: &Frame<'_>, host: &VHost, outbox: &Outbox) -> Result<Step, Refusal> {
        let method = decode_method(frame)?;
        match &self.expects {
            Expects::Method => (),
            Expects::Unwanted(_) => self.expects = Expects::Method,
            Expects::Header(_) => return Err(no_header()),
            Expects::Body(_) | Expects::Ignored(_) => return Err(no_body()),
        }
        if self.closing {
            return self.method_while_closing(&method, outbox);
        }
        let (class, id) = (method.class_id(), method.method_id());
        self.perform(method, host, outbox).map_err(|refusal| refusal.by_method(class, id))
    }

    fn method_while_closing(&mut self, method: &Method, outbox: &Outbox) -> Result<Step, Refusal> {
        match method {
            Method::ChannelCloseOk(_) => return Ok(Step::Closed),
            // The two closes have crossed. The client's close-ok is still to come.
            Method::ChannelClose(_) => outbox.push(self.number, ChannelCloseOk {}),
            Method::BasicPublish(publish) => self.expects = Expects::Header(publish.clone()),
            Method::ChannelOpen(_) => {
                return Err(second_open().by_method(ChannelOpen::CLASS_ID, ChannelOpen::METHOD_ID));
            }
            _ => (),
        }
        Ok(Step::Done)
    }

    fn perform(&mut self, method: Method, host: &VHost, outbox: &Outbox) -> Result<Step, Refusal> {
        match method {
            Method::BasicPublish(publish) => {
                self.expects = Expects::Header(publish);
                Ok(Step::Done)
            }
            Method::ChannelOpen(_) => Err(second_open()),
            Method::ChannelFlow(ChannelFlow { active: true }) => {
                outbox.push(self.number, ChannelFlowOk { active: true });
                Ok(Step::Done)
            }
            Method::ChannelFlow(ChannelFlow { active: false }) => Err(Refusal::not_implemented("active=false")),
            Method::ChannelClose(_) => {
                host.flush_confirms(outbox.id());
                host.close_channel(self.key);
                outbox.push(self.number, ChannelCloseOk {});
                Ok(Step::Closed)
            }
            Method::AccessRequest(_)
            | Method::ExchangeDeclare(_)
            | Method::ExchangeDelete(_)
            | Method::ExchangeBind(_)
            | Method::ExchangeUnbind(_)
            | Method::QueueDeclare(_)
            | Method::QueueBind(_)
            | Method::QueuePurge(_)
            | Method::QueueDelete(_)
            | Method::QueueUnbind(_)
            | Method::BasicQos(_)
            | Method::BasicConsume(_)
            | Method::BasicCancel(_)
            | Method::BasicCancelOk(_)
            | Method::BasicGet(_)
            | Method::BasicAck(_)
            | Method::BasicReject(_)
            | Method::BasicRecoverAsync(_)
            | Method::BasicRecover(_)
            | Method::BasicNack(_)
            | Method::ConfirmSelect(_)
            | Method::TxSelect(_)
            | Method::TxCommit(_)
            | Method::TxRollback(_) => host.perform(self.key, method).map(|()| Step::Done),
            // The broker's own to say, or the connection's.
            Method::ConnectionStart(_)
            | Method::ConnectionStartOk(_)
            | Method::ConnectionSecure(_)
            | Method::ConnectionSecureOk(_)
            | Method::ConnectionTune(_)
            | Method::ConnectionTuneOk(_)
            | Method::ConnectionOpen(_)
            | Method::ConnectionOpenOk(_)
            | Method::ConnectionClose(_)
            | Method::ConnectionCloseOk(_)
            | Method::ConnectionBlocked(_)
            | Method::ConnectionUnblocked(_)
            | Method::ConnectionUpdateSecret(_)
            | Method::ConnectionUpdateSecretOk(_)
            | Method::ChannelOpenOk(_)
            | Method::ChannelFlowOk(_)
            | Method::ChannelCloseOk(_)
            | Method::AccessRequestOk(_)
            | Method::ExchangeDeclareOk(_)
            | Method::ExchangeDeleteOk(_)
            | Method::ExchangeBindOk(_)
            | Method::ExchangeUnbindOk(_)
            | Method::QueueDeclareOk(_)
            | Method::QueueBindOk(_)
            | Method::QueuePurgeOk(_)
            | Method::QueueDeleteOk(_)
            | Method::QueueUnbindOk(_)
            | Method::BasicQosOk(_)
            | Method::BasicConsumeOk(_)
            | Method::BasicReturn(_)
            | Method::BasicDeliver(_)
            | Method::BasicGetOk(_)
            | Method::BasicGetEmpty(_)
            | Method::BasicRecoverOk(_)
            | Method::ConfirmSelectOk(_)
            | Method::TxSelectOk(_)
            | Method::TxCommitOk(_)
            | Method::TxRollbackOk(_) => Err(Refusal::command_invalid("unimplemented method")),
        }
    }

    fn header(&mut self, frame: &Frame<'_>, host: &VHost, message_max: u64) -> Result<Step, Refusal> {
        let publish = match std::mem::replace(&mut self.expects, Expects::Method) {
            Expects::Header(publish) => publish,
            Expects::Method => return Err(no_method()),
            Expects::Body(_) | Expects::Ignored(_) | Expects::Unwanted(_) => return Err(no_body()),
        };
        let Ok((class, weight, size, properties)) = content_header(frame.payload) else {
            return Err(unknown_frame(frame));
        };
        if weight != 0 {
            return Err(no_header());
        }
        if class != BASIC {
            return Err(by_publish(Refusal::unexpected_frame(format_args!(
                "expected content header for class {BASIC}, got one for class {class} instead"
            ))));
        }
        if self.closing {
            self.expects = if size == 0 { Expects::Method } else { Expects::Ignored(size) };
            return Ok(Step::Done);
        }
        if Properties::decode(properties).is_err() {
            let bytes = erlang_numbers(properties);
            return Err(by_publish(Refusal::frame_error(format_args!("cannot decode {bytes}"))));
        }
        if size > message_max {
            self.expects = Expects::Unwanted(size);
            return Err(by_publish(Refusal::precondition_failed(format_args!(
                "message size {size} is larger than configured max size {message_max}"
            ))));
        }
        let properties = properties.into();
        if size == 0 {
            return self.publish(Incoming { publish, properties, body: Vec::new(), size }, host);
        }
        // At most this much before the bytes arrive; a larger body grows as they do.
        let body = Vec::with_capacity(size.min(BODY_AT_FIRST) as usize);
        self.expects = Expects::Body(Incoming { publish, properties, body, size });
        Ok(Step::Done)
    }

    fn body(&mut self, frame: &Frame<'_>, host: &VHost) -> Result<Step, Refusal> {
        let len = frame.payload.len() as u64;
        match std::mem::replace(&mut self.expects, Expects::Method) {
            Expects::Method => Err(no_method()),
            Expects::Header(_) => Err(no_header()),
            Expects::Ignored(left) => {
                if left > len {
                    self.expects = Expects::Ignored(left - len);
                }
                Ok(Step::Done)
            }
            Expects::Unwanted(left) => {
                if left > len {
                    self.expects = Expects::Unwanted(left - len);
                }
                Ok(Step::Done)
            }
            Expects::Body(incoming) if self.closing => {
                let left = (incoming.size - incoming.body.len() as u64).saturating_sub(len);
                if left > 0 {
                    self.expects = Expects::Ignored(left);
                }
                Ok(Step::Done)
            }
            Expects::Body(mut incoming) => {
                let left = incoming.size - incoming.body.len() as u64;
                if len > left {
                    return Err(by_publish(Refusal::frame_error(format_args!(
                        "{}: {{content_too_long,{len},{left}}}",
                        described(frame)
                    ))));
                }
                incoming.body.extend_from_slice(frame.payload);
                if len == left {
                    return self.publish(incoming, host);
                }
                self.expects = Expects::Body(incoming);
                Ok(Step::Done)
            }
        }
    }

    fn publish(&mut self, whole: Incoming, host: &VHost) -> Result<Step, Refusal> {
        let Incoming { publish, properties, body, .. } = whole;
        host.publish(self.key, publish, properties, body).map_err(by_publish)?;
        Ok(Step::Published)
    }
}

/// Class, weight, body size and properties.
fn content_header(payload: &[u8]) -> Result<(u16, u16, u64, &[u8]), Malformed> {
    let mut reader = Reader::new(payload);
    Ok((reader.u16()?, reader.u16()?, reader.u64()?, reader.rest()))
}

/// The method in a method frame.
pub(super) fn decode_method(frame: &Frame<'_>) -> Result<Method, Refusal> {
    let Some((&[c1, c0, m1, m0], arguments)) = frame.payload.split_first_chunk::<4>() else {
        return Err(unknown_frame(frame));
    };
    let (class, id) = (u16::from_be_bytes([c1, c0]), u16::from_be_bytes([m1, m0]));
    match Method::decode(class, id, arguments) {
        Some(Ok(method)) => Ok(method),
        Some(Err(no_text @ Malformed::NO_TEXT)) => Err(Refusal::frame_error(no_text)),
        Some(Err(_)) => {
            let bytes = erlang_numbers(arguments);
            Err(Refusal::frame_error(format_args!("cannot decode {bytes}")).by_method(class, id))
        }
        None => Err(Refusal::command_invalid("unimplemented method").by_method(class, id)),
    }
}

pub(super) fn unknown_frame(frame: &Frame<'_>) -> Refusal {
    Refusal::frame_error(format_args!("{}: unknown_frame", described(frame)))
}

fn by_publish(refusal: Refusal) -> Refusal {
    refusal.by_method(BasicPublish::CLASS_ID, BasicPublish::METHOD_ID)
}

fn second_open() -> Refusal {
    Refusal::channel_error("second 'channel.open' seen")
}

fn no_method() -> Refusal {
    Refusal::unexpected_frame("expected method frame, got non method frame instead")
}

fn no_header() -> Refusal {
    by_publish(Refusal::unexpected_frame(format_args!(
        "expected content header for class {BASIC}, got non content header frame instead"
    )))
}

fn no_body() -> Refusal {
    by_publish(Refusal::unexpected_frame("expected content body, got non content body frame instead"))
}
