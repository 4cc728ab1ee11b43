//! A virtual host, clients of it, and what they are told, one short line a frame.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::super::super::clock::Alarm;
use super::super::super::news::News;
use super::super::super::outbox::{Outbox, SessionId};
use super::super::super::refusal::Refusal;
use super::super::super::users::{Permissions, User};
use super::super::{ChannelKey, Limits, VHost};
use crate::amqp::frame::{self, Scan};
use crate::amqp::method::*;
use crate::amqp::properties::Properties;
use crate::amqp::value::{Table, Value};

pub(super) fn vhost() -> Arc<VHost> {
    vhost_with(Limits::default())
}

pub(super) fn vhost_with(limits: Limits) -> Arc<VHost> {
    VHost::new("/", limits, Alarm::default(), Arc::new(News::default()))
}

/// A connection with one channel.
pub(super) struct Client {
    pub(super) vhost: Arc<VHost>,
    pub(super) outbox: Arc<Outbox>,
    pub(super) key: ChannelKey,
}

impl Client {
    pub(super) fn new(vhost: &Arc<VHost>) -> Client {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let permissions = [("/".to_string(), Permissions::all())].into();
        Client::of(vhost, SessionId(NEXT.fetch_add(1, Ordering::Relaxed)), permissions)
    }

    pub(super) fn of(
        vhost: &Arc<VHost>,
        session: SessionId,
        permissions: std::collections::HashMap<String, Permissions>,
    ) -> Client {
        let outbox = Arc::new(Outbox::new(session, 131_072));
        let user = Arc::new(User { name: "guest".into(), password: String::new(), permissions });
        let key = vhost.open_channel(&outbox, &user, 1, true);
        Client { vhost: vhost.clone(), outbox, key }
    }

    pub(super) fn tries(&self, method: impl Into<Method>) -> Result<(), Refusal> {
        self.vhost.perform(self.key, method.into())
    }

    #[track_caller]
    pub(super) fn does(&self, method: impl Into<Method>) {
        self.tries(method).unwrap();
    }

    /// Performs what is to be refused, and gives the text.
    #[track_caller]
    pub(super) fn fails(&self, method: impl Into<Method>) -> String {
        self.tries(method).unwrap_err().text
    }

    pub(super) fn declares(&self, queue: &str, arguments: &[(&str, Value)]) {
        self.does(QueueDeclare {
            queue: queue.into(),
            arguments: table(arguments),
            no_wait: true,
            ..Default::default()
        });
    }

    pub(super) fn consumes(&self, queue: &str, tag: &str) {
        self.consumes_with(queue, tag, false, &[]);
    }

    pub(super) fn consumes_with(&self, queue: &str, tag: &str, no_ack: bool, arguments: &[(&str, Value)]) {
        self.does(BasicConsume {
            queue: queue.into(),
            consumer_tag: tag.into(),
            no_ack,
            no_wait: true,
            arguments: table(arguments),
            ..Default::default()
        });
    }

    pub(super) fn publishes(&self, queue: &str, body: &str) {
        self.publishes_with("", queue, body, &Properties::default()).unwrap();
    }

    pub(super) fn publishes_with(
        &self,
        exchange: &str,
        key: &str,
        body: &str,
        properties: &Properties,
    ) -> Result<(), Refusal> {
        let publish =
            BasicPublish { exchange: exchange.into(), routing_key: key.into(), mandatory: true, ..Default::default() };
        self.vhost.publish(self.key, publish, properties.encode().into(), body.into())
    }

    pub(super) fn acks(&self, delivery_tag: u64, multiple: bool) {
        self.does(BasicAck { delivery_tag, multiple });
    }

    pub(super) fn nacks(&self, delivery_tag: u64, requeue: bool) {
        self.does(BasicNack { delivery_tag, multiple: false, requeue });
    }

    pub(super) fn limits(&self, prefetch_count: u16, global: bool) {
        self.does(BasicQos { prefetch_size: 0, prefetch_count, global });
        self.hears();
    }

    /// Everything it has been told since the last time.
    pub(super) fn hears(&self) -> Vec<String> {
        self.vhost.flush_confirms(self.outbox.id());
        self.reads().into_iter().map(|(method, _, body)| line(&method, &body)).collect()
    }

    /// The same with all that is in it.
    pub(super) fn reads(&self) -> Vec<(Method, Properties, String)> {
        let bytes = self.outbox.drain();
        let mut rest = &bytes[..];
        let mut heard: Vec<(Method, Properties, String)> = Vec::new();
        while let Scan::Whole(frame, len) = frame::scan(rest, usize::MAX) {
            rest = &rest[len..];
            let id = |at: usize| u16::from_be_bytes([frame.payload[at], frame.payload[at + 1]]);
            match (frame.kind, heard.last_mut()) {
                (frame::METHOD, _) => {
                    let method = Method::decode(id(0), id(2), &frame.payload[4..]).unwrap().unwrap();
                    heard.push((method, Properties::default(), String::new()));
                }
                (frame::HEADER, Some(last)) => last.1 = Properties::decode(&frame.payload[12..]).unwrap(),
                (_, Some(last)) => last.2.push_str(std::str::from_utf8(frame.payload).unwrap()),
                (_, None) => panic!("content without a method"),
            }
        }
        assert!(rest.is_empty(), "half a frame");
        heard
    }
}

fn line(method: &Method, body: &str) -> String {
    let flag = |set: bool, sign: &'static str| if set { sign } else { "" };
    match method {
        Method::BasicDeliver(it) => {
            format!("deliver {} {} {body}{}", it.consumer_tag, it.delivery_tag, flag(it.redelivered, "!"))
        }
        Method::BasicGetOk(it) => format!("got {} {body}{}", it.delivery_tag, flag(it.redelivered, "!")),
        Method::BasicReturn(it) => format!("return {} {body}", it.reply_text),
        Method::BasicAck(it) => format!("ack {}{}", it.delivery_tag, flag(it.multiple, "*")),
        Method::BasicNack(it) => format!("nack {}{}", it.delivery_tag, flag(it.multiple, "*")),
        Method::BasicCancel(it) => format!("cancel {}", it.consumer_tag),
        Method::QueueDeclareOk(it) => format!("declared {} {} {}", it.queue, it.message_count, it.consumer_count),
        Method::QueueDeleteOk(it) => format!("deleted {}", it.message_count),
        other => {
            let name = format!("{other:?}");
            name.split(['(', ' ']).next().unwrap_or_default().to_string()
        }
    }
}

pub(super) fn table(arguments: &[(&str, Value)]) -> Table {
    arguments.iter().fold(Table::default(), |table, (name, value)| table.with(name, value.clone()))
}

/// As if the clock said so much later.
pub(super) fn later(vhost: &VHost, by: Duration) -> Vec<super::super::Overdue> {
    vhost.tick(Instant::now() + by).1
}
