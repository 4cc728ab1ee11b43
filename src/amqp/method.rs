//! Every method of AMQP 0-9-1 with RabbitMQ's extensions, from one table.

use super::cursor::{Field, Malformed, Reader, Writer};
use super::short_string::ShortString;
use super::value::Table;

/// Long strings, as the method table names them.
type Long = Vec<u8>;

macro_rules! methods {
    ($($name:ident $class:literal $method:literal { $($field:ident: $type:ty),* })*) => {
        /// A method with its arguments.
        #[derive(Debug, Clone, PartialEq)]
        pub(crate) enum Method {
            $($name($name),)*
        }

        $(
            #[derive(Debug, Clone, PartialEq, Default)]
            pub(crate) struct $name {
                $(pub(crate) $field: $type,)*
            }

            // Few of the ids are asked for by name.
            #[allow(dead_code)]
            impl $name {
                pub(crate) const CLASS_ID: u16 = $class;
                pub(crate) const METHOD_ID: u16 = $method;
            }

            impl From<$name> for Method {
                fn from(method: $name) -> Method {
                    Method::$name(method)
                }
            }
        )*

        impl Method {
            pub(crate) fn class_id(&self) -> u16 {
                match self {
                    $(Method::$name(_) => $class,)*
                }
            }

            pub(crate) fn method_id(&self) -> u16 {
                match self {
                    $(Method::$name(_) => $method,)*
                }
            }

            /// Reads the arguments of method (`class`, `method`); `None` if there is no such method.
            pub(crate) fn decode(class: u16, method: u16, arguments: &[u8]) -> Option<Result<Method, Malformed>> {
                match (class, method) {
                    $(($class, $method) => Some(Method::read(($class, $method), arguments, |_reader| {
                        Ok(Method::$name($name { $($field: Field::read(_reader)?,)* }))
                    })),)*
                    _ => None,
                }
            }

            /// Writes the ids and the arguments: the payload of a method frame.
            pub(crate) fn encode(&self, into: &mut Vec<u8>) {
                let mut writer = Writer::new(into);
                match self {
                    $(Method::$name($name { $($field,)* }) => {
                        ($class as u16).write(&mut writer);
                        ($method as u16).write(&mut writer);
                        $($field.write(&mut writer);)*
                    })*
                }
            }

            /// Every method there is, with nothing in its arguments.
            #[cfg(test)]
            pub(crate) fn all() -> Vec<Method> {
                vec![$(Method::$name($name::default()),)*]
            }
        }
    };
}

impl Method {
    fn read(
        id: (u16, u16),
        arguments: &[u8],
        fields: impl FnOnce(&mut Reader<'_>) -> Result<Method, Malformed>,
    ) -> Result<Method, Malformed> {
        // RabbitMQ spares itself the look at the texts of methods that carry a message.
        let mut reader =
            if CARRY_CONTENT.contains(&id) { Reader::new(arguments) } else { Reader::of_arguments(arguments) };
        let method = fields(&mut reader)?;
        if reader.is_empty() { Ok(method) } else { Err(Malformed("bytes behind the arguments")) }
    }
}

/// publish, return, deliver, get-ok.
const CARRY_CONTENT: [(u16, u16); 4] = [(60, 40), (60, 50), (60, 60), (60, 71)];

methods! {
    ConnectionStart 10 10 {
        version_major: u8, version_minor: u8, server_properties: Table, mechanisms: Long, locales: Long
    }
    ConnectionStartOk 10 11 { client_properties: Table, mechanism: ShortString, response: Long, locale: ShortString }
    ConnectionSecure 10 20 { challenge: Long }
    ConnectionSecureOk 10 21 { response: Long }
    ConnectionTune 10 30 { channel_max: u16, frame_max: u32, heartbeat: u16 }
    ConnectionTuneOk 10 31 { channel_max: u16, frame_max: u32, heartbeat: u16 }
    ConnectionOpen 10 40 { virtual_host: ShortString, capabilities: ShortString, insist: bool }
    ConnectionOpenOk 10 41 { known_hosts: ShortString }
    ConnectionClose 10 50 { reply_code: u16, reply_text: ShortString, class_id: u16, method_id: u16 }
    ConnectionCloseOk 10 51 {}
    ConnectionBlocked 10 60 { reason: ShortString }
    ConnectionUnblocked 10 61 {}
    ConnectionUpdateSecret 10 70 { new_secret: Long, reason: ShortString }
    ConnectionUpdateSecretOk 10 71 {}

    ChannelOpen 20 10 { out_of_band: ShortString }
    ChannelOpenOk 20 11 { channel_id: Long }
    ChannelFlow 20 20 { active: bool }
    ChannelFlowOk 20 21 { active: bool }
    ChannelClose 20 40 { reply_code: u16, reply_text: ShortString, class_id: u16, method_id: u16 }
    ChannelCloseOk 20 41 {}

    AccessRequest 30 10 {
        realm: ShortString, exclusive: bool, passive: bool, active: bool, write: bool, read: bool
    }
    AccessRequestOk 30 11 { ticket: u16 }

    ExchangeDeclare 40 10 {
        ticket: u16, exchange: ShortString, kind: ShortString, passive: bool, durable: bool, auto_delete: bool,
        internal: bool, no_wait: bool, arguments: Table
    }
    ExchangeDeclareOk 40 11 {}
    ExchangeDelete 40 20 { ticket: u16, exchange: ShortString, if_unused: bool, no_wait: bool }
    ExchangeDeleteOk 40 21 {}
    ExchangeBind 40 30 {
        ticket: u16, destination: ShortString, source: ShortString, routing_key: ShortString, no_wait: bool,
        arguments: Table
    }
    ExchangeBindOk 40 31 {}
    ExchangeUnbind 40 40 {
        ticket: u16, destination: ShortString, source: ShortString, routing_key: ShortString, no_wait: bool,
        arguments: Table
    }
    // 51, not 41: RabbitMQ's number, which every client has learnt.
    ExchangeUnbindOk 40 51 {}

    QueueDeclare 50 10 {
        ticket: u16, queue: ShortString, passive: bool, durable: bool, exclusive: bool, auto_delete: bool,
        no_wait: bool, arguments: Table
    }
    QueueDeclareOk 50 11 { queue: ShortString, message_count: u32, consumer_count: u32 }
    QueueBind 50 20 {
        ticket: u16, queue: ShortString, exchange: ShortString, routing_key: ShortString, no_wait: bool,
        arguments: Table
    }
    QueueBindOk 50 21 {}
    QueuePurge 50 30 { ticket: u16, queue: ShortString, no_wait: bool }
    QueuePurgeOk 50 31 { message_count: u32 }
    QueueDelete 50 40 { ticket: u16, queue: ShortString, if_unused: bool, if_empty: bool, no_wait: bool }
    QueueDeleteOk 50 41 { message_count: u32 }
    QueueUnbind 50 50 {
        ticket: u16, queue: ShortString, exchange: ShortString, routing_key: ShortString, arguments: Table
    }
    QueueUnbindOk 50 51 {}

    BasicQos 60 10 { prefetch_size: u32, prefetch_count: u16, global: bool }
    BasicQosOk 60 11 {}
    BasicConsume 60 20 {
        ticket: u16, queue: ShortString, consumer_tag: ShortString, no_local: bool, no_ack: bool, exclusive: bool,
        no_wait: bool, arguments: Table
    }
    BasicConsumeOk 60 21 { consumer_tag: ShortString }
    BasicCancel 60 30 { consumer_tag: ShortString, no_wait: bool }
    BasicCancelOk 60 31 { consumer_tag: ShortString }
    BasicPublish 60 40 {
        ticket: u16, exchange: ShortString, routing_key: ShortString, mandatory: bool, immediate: bool
    }
    BasicReturn 60 50 {
        reply_code: u16, reply_text: ShortString, exchange: ShortString, routing_key: ShortString
    }
    BasicDeliver 60 60 {
        consumer_tag: ShortString, delivery_tag: u64, redelivered: bool, exchange: ShortString,
        routing_key: ShortString
    }
    BasicGet 60 70 { ticket: u16, queue: ShortString, no_ack: bool }
    BasicGetOk 60 71 {
        delivery_tag: u64, redelivered: bool, exchange: ShortString, routing_key: ShortString, message_count: u32
    }
    BasicGetEmpty 60 72 { cluster_id: ShortString }
    BasicAck 60 80 { delivery_tag: u64, multiple: bool }
    BasicReject 60 90 { delivery_tag: u64, requeue: bool }
    BasicRecoverAsync 60 100 { requeue: bool }
    BasicRecover 60 110 { requeue: bool }
    BasicRecoverOk 60 111 {}
    BasicNack 60 120 { delivery_tag: u64, multiple: bool, requeue: bool }

    ConfirmSelect 85 10 { no_wait: bool }
    ConfirmSelectOk 85 11 {}

    TxSelect 90 10 {}
    TxSelectOk 90 11 {}
    TxCommit 90 20 {}
    TxCommitOk 90 21 {}
    TxRollback 90 30 {}
    TxRollbackOk 90 31 {}
}
