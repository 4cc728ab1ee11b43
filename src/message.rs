//! What is sent: a body and its AMQP properties. Knows nothing of where it goes or where it came from.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::amqp::cursor::{Reader, Writer};
use crate::amqp::{Malformed, text};
use crate::encoding::from_json;
use crate::error::{Error, Result};
use crate::field::{FieldTable, FieldValue, check_short_string, check_table, read_table, table_len, write_table};

/// What every header frame has: frame 8, class, weight and body size 12, flags 2, delivery mode 1.
const HEADER_FRAME_FIXED: usize = 8 + 12 + 2 + 1;
/// Values of the property `delivery-mode`.
const PERSISTENT: u8 = 2;
const TRANSIENT: u8 = 1;
/// The longest expiration that RabbitMQ takes, in milliseconds: ten years of 365 days.
const LONGEST_EXPIRATION: u64 = 10 * 365 * 86_400 * 1000;
/// In `property-flags`: the delivery mode.
const DELIVERY_MODE: u16 = 1 << 12;
/// In `property-flags`: more flags follow, which class `basic` has not, and a bit that means nothing.
const UNKNOWN_FLAGS: u16 = 0b11;

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
#[derive(Debug, Clone)]
pub struct Message {
    body: Vec<u8>,
    persistent: bool,
    /// All properties but the delivery mode. Most messages have none, and are small for that.
    properties: Option<Box<Properties>>,
}

#[derive(Debug, Clone, PartialEq)]
struct Properties {
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

/// Of a message that has none.
static NO_PROPERTIES: Properties = Properties::none();

impl Properties {
    const fn none() -> Properties {
        Properties {
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
}

impl PartialEq for Message {
    fn eq(&self, other: &Message) -> bool {
        self.persistent == other.persistent
            && self.body == other.body
            && (self.properties.is_none() && other.properties.is_none() || self.properties() == other.properties())
    }
}

impl Message {
    /// A persistent message with this body and no other properties.
    pub fn new(body: impl Into<Vec<u8>>) -> Message {
        Message { body: body.into(), persistent: true, properties: None }
    }

    fn properties(&self) -> &Properties {
        self.properties.as_deref().unwrap_or(&NO_PROPERTIES)
    }

    fn properties_mut(&mut self) -> &mut Properties {
        self.properties.get_or_insert_with(|| Box::new(Properties::none()))
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

    /// Reads the body as JSON, whatever the content type says: in UTF-8, with a byte order mark or without, in UTF-16 or in
    /// UTF-32.
    ///
    /// # Errors
    ///
    /// [`Error::Json`] if it is not JSON, or not of this type.
    pub fn decode_json<T: DeserializeOwned>(&self) -> Result<T> {
        from_json(&self.body).map_err(|error| Error::json("message body from JSON", error))
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
        &self.properties().headers
    }

    /// The integer in a header, of any width and sign; `None` if there is no such header, or no integer in it. RabbitMQ 4 gives
    /// integers back with another width than they were sent with.
    pub fn header_i64(&self, name: &str) -> Option<i64> {
        self.headers().get(name).and_then(FieldValue::as_i64)
    }

    /// The text in a header; `None` if there is no such header, or no text in it.
    pub fn header_str(&self, name: &str) -> Option<&str> {
        self.headers().get(name).and_then(FieldValue::as_str)
    }

    /// Sets one header; a name is at most 255 bytes long.
    pub fn with_header(mut self, name: impl Into<String>, value: impl Into<FieldValue>) -> Message {
        self.properties_mut().headers.insert(name.into(), value.into());
        self
    }

    /// Replaces all headers.
    pub fn with_headers(mut self, headers: FieldTable) -> Message {
        self.properties_mut().headers = headers;
        self
    }

    /// Priority, 0 to 255; only queues declared with `x-max-priority` heed it, up to their maximum.
    pub fn priority(&self) -> Option<u8> {
        self.properties().priority
    }

    /// Sets the priority. Defaults to none, which counts as 0.
    pub fn with_priority(mut self, priority: u8) -> Message {
        self.properties_mut().priority = Some(priority);
        self
    }

    /// How long the message may wait in a queue, in steps of a millisecond. `None` also if it is no number.
    pub fn expiration(&self) -> Option<Duration> {
        self.properties().expiration.as_ref()?.parse().ok().map(Duration::from_millis)
    }

    /// Sets how long the message may wait in a queue before it is dropped or dead-lettered, rounded down to
    /// milliseconds. Defaults to no limit. At most ten years of 365 days; publishing a message with more is
    /// [`Error::InvalidArgument`]. See <https://www.rabbitmq.com/docs/ttl#per-message-ttl-in-publishers>.
    pub fn with_expiration(mut self, expiration: Duration) -> Message {
        self.properties_mut().expiration = Some(expiration.as_millis().to_string());
        self
    }

    /// The expiration and the timestamp as they stand on the wire, for amiquip.
    #[cfg(feature = "unstable-amiquip")]
    pub(crate) fn raw_expiration(&self) -> Option<&str> {
        self.properties().expiration.as_deref()
    }

    #[cfg(feature = "unstable-amiquip")]
    pub(crate) fn with_raw_expiration(mut self, expiration: String) -> Message {
        self.properties_mut().expiration = Some(expiration);
        self
    }

    #[cfg(feature = "unstable-amiquip")]
    pub(crate) fn raw_timestamp(&self) -> Option<u64> {
        self.properties().timestamp
    }

    #[cfg(feature = "unstable-amiquip")]
    pub(crate) fn with_raw_timestamp(mut self, timestamp: u64) -> Message {
        self.properties_mut().timestamp = Some(timestamp);
        self
    }

    pub(crate) fn without_expiration(mut self) -> Message {
        if let Some(properties) = &mut self.properties {
            properties.expiration = None;
        }
        self
    }

    pub(crate) fn take_user_id(&mut self) -> Option<String> {
        self.properties.as_mut()?.user_id.take()
    }

    /// When the message was made, to the second.
    pub fn timestamp(&self) -> Option<SystemTime> {
        UNIX_EPOCH.checked_add(Duration::from_secs(self.properties().timestamp?))
    }

    /// Sets when the message was made, rounded down to the second; a time before 1970 becomes 1970. Defaults to none.
    pub fn with_timestamp(mut self, timestamp: SystemTime) -> Message {
        self.properties_mut().timestamp = Some(timestamp.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()));
        self
    }
}

macro_rules! short_string_properties {
    ($($(#[$get_doc:meta])* $get:ident, $(#[$set_doc:meta])* $set:ident => $field:ident;)*) => {
        impl Message {$(
            $(#[$get_doc])*
            pub fn $get(&self) -> Option<&str> {
                self.properties().$field.as_deref()
            }

            $(#[$set_doc])*
            ///
            /// Defaults to none; at most 255 bytes.
            pub fn $set(mut self, value: impl Into<String>) -> Message {
                self.properties_mut().$field = Some(value.into());
                self
            }
        )*}

        impl Message {
            fn short_strings(&self) -> impl Iterator<Item = (&'static str, &str)> {
                let properties = self.properties();
                [$((stringify!($get), properties.$field.as_deref())),*]
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
        if self.properties.is_none() {
            return Ok(());
        }
        for (name, value) in self.short_strings() {
            check_short_string(|| format!("message property {name}"), value)?;
        }
        self.check_expiration()?;
        if self.headers().is_empty() {
            return Ok(());
        }
        check_table(self.headers())?;
        for name in ["CC", "BCC"] {
            if !matches!(self.headers().get(name), None | Some(FieldValue::Array(_))) {
                let problem = "expected an array of routing keys, which RabbitMQ reads in it";
                return Err(Error::invalid(format!("message header {name}"), problem));
            }
        }
        let len = self.header_len();
        if len > frame_max {
            return Err(Error::invalid(
                "message headers",
                format!("{len} bytes with the other properties, expected at most {frame_max} (they go in one frame)"),
            ));
        }
        Ok(())
    }

    /// RabbitMQ closes the channel for an expiration that it does not take, and with it for whatever else is under way.
    fn check_expiration(&self) -> Result<()> {
        let Some(text) = &self.properties().expiration else { return Ok(()) };
        match text.parse::<u64>() {
            Ok(0..=LONGEST_EXPIRATION) => Ok(()),
            _ => Err(Error::invalid(
                "message property expiration",
                format!("{text:?}, expected 0 to {LONGEST_EXPIRATION} milliseconds (ten years)"),
            )),
        }
    }

    /// How long the frame with the properties is, in bytes.
    fn header_len(&self) -> usize {
        let headers = if self.headers().is_empty() { 0 } else { table_len(self.headers()) };
        self.header_len_without_headers() + headers
    }

    /// How long that frame would be without headers.
    pub(crate) fn header_len_without_headers(&self) -> usize {
        let Properties { priority, timestamp, expiration, .. } = self.properties();
        let short_strings = self.short_strings().map(|(_, value)| value).chain(expiration.as_deref());
        let short_strings: usize = short_strings.map(|value| 1 + value.len()).sum();
        HEADER_FRAME_FIXED + short_strings + usize::from(priority.is_some()) + 8 * usize::from(timestamp.is_some())
    }

    /// Writes flags and values: what follows the body size in a content header.
    pub(crate) fn write_properties(&self, into: &mut Vec<u8>) {
        let mode = if self.persistent { PERSISTENT } else { TRANSIENT };
        let Some(properties) = &self.properties else {
            let [high, low] = DELIVERY_MODE.to_be_bytes();
            into.extend_from_slice(&[high, low, mode]);
            return;
        };
        let flags_at = into.len();
        let mut flags = DELIVERY_MODE;
        let mut writer = Writer::new(into);
        writer.put(&[0; 2]);
        let Properties {
            content_type,
            content_encoding,
            headers,
            priority,
            correlation_id,
            reply_to,
            expiration,
            message_id,
            timestamp,
            kind,
            user_id,
            app_id,
            cluster_id,
        } = &**properties;
        let mut short = |writer: &mut Writer<'_>, bit: u16, value: &Option<String>| {
            if let Some(value) = value {
                flags |= 1 << bit;
                writer.short(value.as_bytes());
            }
        };
        // In the order of the flags, from the highest bit down (AMQP 0-9-1, section 4.2.6.1).
        short(&mut writer, 15, content_type);
        short(&mut writer, 14, content_encoding);
        if !headers.is_empty() {
            write_table(headers, &mut writer);
        }
        writer.put(&[mode]);
        if let Some(priority) = priority {
            writer.put(&[*priority]);
        }
        short(&mut writer, 10, correlation_id);
        short(&mut writer, 9, reply_to);
        short(&mut writer, 8, expiration);
        short(&mut writer, 7, message_id);
        if let Some(timestamp) = timestamp {
            writer.put(&timestamp.to_be_bytes());
        }
        short(&mut writer, 5, kind);
        short(&mut writer, 4, user_id);
        short(&mut writer, 3, app_id);
        short(&mut writer, 2, cluster_id);
        flags |= u16::from(!headers.is_empty()) << 13 | u16::from(priority.is_some()) << 11;
        flags |= u16::from(timestamp.is_some()) << 6;
        into[flags_at..flags_at + 2].copy_from_slice(&flags.to_be_bytes());
    }

    /// The message whose content header ends in these flags and values. The body is to come.
    ///
    /// In texts `?` stands for each byte that is not UTF-8.
    pub(crate) fn read_properties(bytes: &[u8]) -> Result<Message, Malformed> {
        let mut message = Message::new(Vec::new());
        let mut reader = Reader::new(bytes);
        let flags = reader.u16()?;
        if flags & UNKNOWN_FLAGS != 0 {
            return Err(Malformed("flags of properties there are not"));
        }
        if flags & !DELIVERY_MODE == 0 {
            message.persistent = flags != 0 && reader.u8()? == PERSISTENT;
        } else {
            message.persistent = false;
            let mut properties = Properties::none();
            let has = |bit: u16| flags & (1 << bit) != 0;
            let short = |reader: &mut Reader<'_>, bit: u16| -> Result<Option<String>, Malformed> {
                if has(bit) { reader.short().map(|bytes| Some(text(bytes))) } else { Ok(None) }
            };
            properties.content_type = short(&mut reader, 15)?;
            properties.content_encoding = short(&mut reader, 14)?;
            if has(13) {
                properties.headers = read_table(&mut reader)?;
            }
            if has(12) {
                message.persistent = reader.u8()? == PERSISTENT;
            }
            if has(11) {
                properties.priority = Some(reader.u8()?);
            }
            properties.correlation_id = short(&mut reader, 10)?;
            properties.reply_to = short(&mut reader, 9)?;
            properties.expiration = short(&mut reader, 8)?;
            properties.message_id = short(&mut reader, 7)?;
            if has(6) {
                properties.timestamp = Some(reader.u64()?);
            }
            properties.kind = short(&mut reader, 5)?;
            properties.user_id = short(&mut reader, 4)?;
            properties.app_id = short(&mut reader, 3)?;
            properties.cluster_id = short(&mut reader, 2)?;
            message.properties = Some(Box::new(properties));
        }
        if reader.is_empty() { Ok(message) } else { Err(Malformed("bytes behind the properties")) }
    }

    /// The message with an id, its own or a new one of 128 random bits, by which repetitions of it are told from others.
    pub(crate) fn with_some_id(self) -> Message {
        match self.message_id() {
            Some(_) => self,
            None => self.with_message_id(format!("{:032x}", fastrand::u128(..))),
        }
    }

    /// The body, to be filled as it comes in.
    pub(crate) fn body_mut(&mut self) -> &mut Vec<u8> {
        &mut self.body
    }

    /// Whether `returned` is what the broker would send back of this message: all of it but the header BCC, which
    /// RabbitMQ strips (<https://www.rabbitmq.com/docs/sender-selected>).
    pub(crate) fn came_back_as(&self, returned: &Message) -> bool {
        if !self.headers().contains_key("BCC") {
            return self == returned;
        }
        let mut stripped = self.clone();
        stripped.properties_mut().headers.remove("BCC");
        stripped == *returned
    }

    /// All of it but the body.
    pub(crate) fn without_body(&self) -> Message {
        Message { body: Vec::new(), persistent: self.persistent, properties: self.properties.clone() }
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
