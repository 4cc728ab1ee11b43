//! What is sent: a body and its AMQP properties. Knows nothing of where it goes or where it came from.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use amiquip::AmqpProperties;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::field::{
    FieldTable, FieldValue, check_short_string, check_table, table_from_amqp, table_len, table_to_amqp,
};

/// Header frame without short strings and headers: frame 8, class, weight and body size 12, flags 2, and the
/// properties of fixed length (delivery mode, priority, timestamp, expiration of at most 21).
const HEADER_FRAME_FIXED: usize = 8 + 12 + 2 + 1 + 1 + 8 + 21;
const PERSISTENT: u8 = 2;
const TRANSIENT: u8 = 1;

/// A message: the body, and the fourteen properties that AMQP gives every message.
///
/// Messages are persistent unless made [`transient`](Message::transient): a durable queue keeps them over a restart
/// of the broker.
///
/// ```
/// use coney::Message;
///
/// let message = Message::new("hello").with_content_type("text/plain").with_header("attempt", 1);
/// assert_eq!(message.body(), b"hello");
/// assert_eq!(message.headers()["attempt"], 1.into());
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    body: Vec<u8>,
    persistent: bool,
    content_type: Option<String>,
    content_encoding: Option<String>,
    headers: FieldTable,
    priority: Option<u8>,
    correlation_id: Option<String>,
    reply_to: Option<String>,
    expiration: Option<String>,
    message_id: Option<String>,
    timestamp: Option<u64>,
    kind: Option<String>,
    user_id: Option<String>,
    app_id: Option<String>,
    cluster_id: Option<String>,
}

impl Message {
    /// A persistent message with this body and no other properties.
    pub fn new(body: impl Into<Vec<u8>>) -> Message {
        Message {
            body: body.into(),
            persistent: true,
            content_type: None,
            content_encoding: None,
            headers: FieldTable::new(),
            priority: None,
            correlation_id: None,
            reply_to: None,
            expiration: None,
            message_id: None,
            timestamp: None,
            kind: None,
            user_id: None,
            app_id: None,
            cluster_id: None,
        }
    }

    /// A message with `value` as JSON, content type `application/json`.
    ///
    /// # Errors
    ///
    /// [`Error::Json`] if the value cannot be written as JSON, for instance a map whose keys are no strings.
    pub fn json<T: Serialize + ?Sized>(value: &T) -> Result<Message> {
        let body = serde_json::to_vec(value).map_err(|error| Error::json("message body to JSON", error))?;
        Ok(Message::new(body).with_content_type("application/json"))
    }

    /// The body.
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// The body, by value.
    pub fn into_body(self) -> Vec<u8> {
        self.body
    }

    /// The body as text, if it is UTF-8.
    pub fn text(&self) -> Option<&str> {
        std::str::from_utf8(&self.body).ok()
    }

    /// Reads the body as JSON, whatever the content type says.
    ///
    /// # Errors
    ///
    /// [`Error::Json`] if it is not JSON, or not of this type.
    pub fn decode_json<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.body).map_err(|error| Error::json("message body from JSON", error))
    }

    /// Whether a durable queue keeps the message over a restart of the broker. Defaults to true.
    pub fn is_persistent(&self) -> bool {
        self.persistent
    }

    /// Makes the message transient: lost when the broker restarts, in return for fewer writes to its disk.
    pub fn transient(mut self) -> Message {
        self.persistent = false;
        self
    }

    /// The headers. Empty if there are none.
    pub fn headers(&self) -> &FieldTable {
        &self.headers
    }

    /// Sets one header; a name is at most 255 bytes long.
    pub fn with_header(mut self, name: impl Into<String>, value: impl Into<FieldValue>) -> Message {
        self.headers.insert(name.into(), value.into());
        self
    }

    /// Replaces all headers.
    pub fn with_headers(mut self, headers: FieldTable) -> Message {
        self.headers = headers;
        self
    }

    /// Priority, 0 to 255; only queues declared with `x-max-priority` heed it, up to their maximum.
    pub fn priority(&self) -> Option<u8> {
        self.priority
    }

    /// Sets the priority. Defaults to none, which counts as 0.
    pub fn with_priority(mut self, priority: u8) -> Message {
        self.priority = Some(priority);
        self
    }

    /// How long the message may wait in a queue, in steps of a millisecond. `None` also if it is no number.
    pub fn expiration(&self) -> Option<Duration> {
        self.expiration.as_ref()?.parse().ok().map(Duration::from_millis)
    }

    /// Sets how long the message may wait in a queue before it is dropped or dead-lettered, rounded down to
    /// milliseconds. Defaults to no limit. See <https://www.rabbitmq.com/docs/ttl#per-message-ttl-in-publishers>.
    pub fn with_expiration(mut self, expiration: Duration) -> Message {
        self.expiration = Some(expiration.as_millis().to_string());
        self
    }

    pub(crate) fn without_expiration(mut self) -> Message {
        self.expiration = None;
        self
    }

    pub(crate) fn take_user_id(&mut self) -> Option<String> {
        self.user_id.take()
    }

    /// When the message was made, to the second.
    pub fn timestamp(&self) -> Option<SystemTime> {
        UNIX_EPOCH.checked_add(Duration::from_secs(self.timestamp?))
    }

    /// Sets when the message was made, rounded down to the second; a time before 1970 becomes 1970. Defaults to none.
    pub fn with_timestamp(mut self, timestamp: SystemTime) -> Message {
        self.timestamp = Some(timestamp.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()));
        self
    }
}

macro_rules! short_string_properties {
    ($($(#[$get_doc:meta])* $get:ident, $(#[$set_doc:meta])* $set:ident => $field:ident;)*) => {
        impl Message {$(
            $(#[$get_doc])*
            pub fn $get(&self) -> Option<&str> {
                self.$field.as_deref()
            }

            $(#[$set_doc])*
            ///
            /// Defaults to none; at most 255 bytes.
            pub fn $set(mut self, value: impl Into<String>) -> Message {
                self.$field = Some(value.into());
                self
            }
        )*}

        impl Message {
            fn short_strings(&self) -> impl Iterator<Item = (&'static str, &str)> {
                [$((stringify!($get), self.$field.as_deref())),*]
                    .into_iter()
                    .filter_map(|(name, value)| value.map(|value| (name, value)))
            }
        }
    };
}

short_string_properties! {
    /// MIME type of the body.
    content_type,
    /// Sets the MIME type of the body, such as `application/json`.
    with_content_type => content_type;
    /// MIME encoding of the body.
    content_encoding,
    /// Sets the MIME encoding of the body, such as `gzip`; the body itself is left as it is.
    with_content_encoding => content_encoding;
    /// Which request this answers.
    correlation_id,
    /// Sets which request this answers, or how an answer is to name this request.
    with_correlation_id => correlation_id;
    /// The queue an answer is wanted in.
    reply_to,
    /// Sets the queue an answer is wanted in.
    with_reply_to => reply_to;
    /// The name of this message.
    message_id,
    /// Sets the name of this message, by which a consumer can tell that it has seen it before.
    with_message_id => message_id;
    /// The application's name for what kind of message this is: the property `type`.
    kind,
    /// Sets the application's name for what kind of message this is: the property `type`.
    with_kind => kind;
    /// The user the message claims to come from; RabbitMQ has checked it.
    user_id,
    /// Sets the user the message claims to come from. RabbitMQ refuses any but the user of the connection (406).
    with_user_id => user_id;
    /// The application the message comes from.
    app_id,
    /// Sets the application the message comes from.
    with_app_id => app_id;
    /// A property reserved by AMQP 0-9-1, kept as it came.
    cluster_id,
    /// Sets the reserved property `cluster-id`, which is of use only where another program insists on it.
    with_cluster_id => cluster_id;
}

impl Message {
    /// Refuses what would make a frame that the broker cannot read; no frame may be longer than `frame_max` bytes.
    pub(crate) fn check(&self, frame_max: usize) -> Result<()> {
        for (name, value) in self.short_strings() {
            check_short_string(|| format!("message property {name}"), value)?;
        }
        if self.headers.is_empty() {
            return Ok(());
        }
        check_table(&self.headers)?;
        let len = self.header_len();
        if len > frame_max {
            return Err(Error::invalid(
                "message headers",
                format!("{len} bytes with the other properties, expected at most {frame_max} (they go in one frame)"),
            ));
        }
        Ok(())
    }

    /// How long the frame with the properties is at most, in bytes.
    pub(crate) fn header_len(&self) -> usize {
        let short_strings: usize = self.short_strings().map(|(_, value)| value.len() + 1).sum();
        HEADER_FRAME_FIXED + short_strings + table_len(&self.headers)
    }

    /// The properties as amiquip takes them.
    pub(crate) fn amqp_properties(&self) -> AmqpProperties {
        let mut properties =
            AmqpProperties::default().with_delivery_mode(if self.persistent { PERSISTENT } else { TRANSIENT });
        macro_rules! set {
            ($($field:ident => $with:ident),*) => {$(
                if let Some(value) = &self.$field {
                    properties = properties.$with(value.to_owned());
                }
            )*};
        }
        set!(content_type => with_content_type, content_encoding => with_content_encoding, priority => with_priority,
            correlation_id => with_correlation_id, reply_to => with_reply_to, expiration => with_expiration,
            message_id => with_message_id, timestamp => with_timestamp, kind => with_type_, user_id => with_user_id,
            app_id => with_app_id, cluster_id => with_cluster_id);
        if !self.headers.is_empty() {
            properties = properties.with_headers(table_to_amqp(self.headers.clone()));
        }
        properties
    }

    /// Whether `returned` is what the broker would send back of this message: all of it but the header BCC, which
    /// RabbitMQ strips (<https://www.rabbitmq.com/docs/sender-selected>).
    pub(crate) fn came_back_as(&self, returned: &Message) -> bool {
        if !self.headers.contains_key("BCC") {
            return self == returned;
        }
        let mut stripped = self.clone();
        stripped.headers.remove("BCC");
        stripped == *returned
    }

    /// All of it but the body.
    pub(crate) fn without_body(&self) -> Message {
        Message {
            body: Vec::new(),
            persistent: self.persistent,
            content_type: self.content_type.clone(),
            content_encoding: self.content_encoding.clone(),
            headers: self.headers.clone(),
            priority: self.priority,
            correlation_id: self.correlation_id.clone(),
            reply_to: self.reply_to.clone(),
            expiration: self.expiration.clone(),
            message_id: self.message_id.clone(),
            timestamp: self.timestamp,
            kind: self.kind.clone(),
            user_id: self.user_id.clone(),
            app_id: self.app_id.clone(),
            cluster_id: self.cluster_id.clone(),
        }
    }

    pub(crate) fn from_amqp(body: Vec<u8>, properties: AmqpProperties) -> Message {
        Message {
            body,
            persistent: *properties.delivery_mode() == Some(PERSISTENT),
            content_type: properties.content_type().clone(),
            content_encoding: properties.content_encoding().clone(),
            headers: properties.headers().clone().map(table_from_amqp).unwrap_or_default(),
            priority: *properties.priority(),
            correlation_id: properties.correlation_id().clone(),
            reply_to: properties.reply_to().clone(),
            expiration: properties.expiration().clone(),
            message_id: properties.message_id().clone(),
            timestamp: *properties.timestamp(),
            kind: properties.type_().clone(),
            user_id: properties.user_id().clone(),
            app_id: properties.app_id().clone(),
            cluster_id: properties.cluster_id().clone(),
        }
    }
}

impl From<&str> for Message {
    fn from(body: &str) -> Message {
        Message::new(body)
    }
}

impl From<String> for Message {
    fn from(body: String) -> Message {
        Message::new(body)
    }
}

impl From<&[u8]> for Message {
    fn from(body: &[u8]) -> Message {
        Message::new(body)
    }
}

impl<const N: usize> From<&[u8; N]> for Message {
    fn from(body: &[u8; N]) -> Message {
        Message::new(body.as_slice())
    }
}

impl From<Vec<u8>> for Message {
    fn from(body: Vec<u8>) -> Message {
        Message::new(body)
    }
}
