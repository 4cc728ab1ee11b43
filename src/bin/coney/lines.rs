//! JSON lines: one message to a line, as `get` and `listen` write it and `publish` reads it.
//!
//! ```json
//! {"exchange":"room","routing_key":"user1","body":"hello","headers":{"n":1},"properties":{"delivery_mode":2}}
//! ```
//!
//! A body that is not UTF-8 is in `body_base64`. Header values: see `values`.

use std::io;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use coney::{Message, Received};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::output;
use crate::values::{self, Whole};

const PERSISTENT: u8 = 2;
const TRANSIENT: u8 = 1;

/// What `--help` says of the format.
pub const FORMAT: &str = "JSON lines, one message each:
  {\"exchange\":\"room\",\"routing_key\":\"user1\",\"body\":\"hello\",\"headers\":{\"n\":1},\"properties\":{\"priority\":3}}
  A body that is not UTF-8 is \"body_base64\". Header values that JSON has no type for are {\"$i32\":5}, and so on:
  $i8 $u8 $i16 $u16 $i32 $u32 $i64 $f32 $f64 $decimal $bytes $timestamp $table. Whole numbers of 2^53 and more are text,
  since jq would round them: {\"$i64\":\"9007199254740993\"}. Properties: content_type, content_encoding, delivery_mode (2:
  persistent, the default; 1: transient), priority, correlation_id, reply_to, expiration (milliseconds), message_id,
  timestamp (seconds since 1970), type, user_id, app_id, cluster_id.
  What `get` prints is what `publish` sends, but for this: a message without a delivery mode has 1 afterwards, an
  expiration that is no number is gone, each byte of a name or property that is not UTF-8 is a ?, and the broker
  refuses the user_id of somebody else.";

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Line {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exchange: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub routing_key: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    body: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    body_base64: Option<String>,
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    headers: Map<String, Value>,
    #[serde(default)]
    properties: Properties,
    /// Told of a message that has come; of one that goes it means nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    redelivered: Option<bool>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Properties {
    #[serde(skip_serializing_if = "Option::is_none")]
    content_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_encoding: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delivery_mode: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    priority: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    correlation_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reply_to: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expiration: Option<Whole>,
    #[serde(skip_serializing_if = "Option::is_none")]
    message_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timestamp: Option<Whole>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    user_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    app_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster_id: Option<String>,
}

impl Line {
    /// Reads one line. An error says what is wrong with it.
    pub fn parse(text: &[u8]) -> Result<Line, String> {
        serde_json::from_slice(text).map_err(|error| {
            // It is one line, of which the caller has another number.
            format!("not a message in JSON: {error}").replace(" at line 1 column", ", at column")
        })
    }

    pub fn of(received: &Received) -> Line {
        let message = received.message();
        let text = message.text().map(str::to_owned);
        Line {
            exchange: Some(received.exchange().to_owned()),
            routing_key: Some(received.routing_key().to_owned()),
            body_base64: text.is_none().then(|| values::base64(message.body())),
            body: text,
            headers: values::table_to_json(message.headers()),
            properties: Properties::of(message),
            redelivered: Some(received.redelivered()),
        }
    }

    /// The message of this line.
    pub fn message(self) -> Result<Message, String> {
        let body = match (self.body, self.body_base64) {
            (Some(text), None) => text.into_bytes(),
            (None, Some(text)) => values::from_base64(&text).map_err(|problem| format!("body_base64: {problem}"))?,
            (None, None) => return Err("expected a body, or a body_base64".to_owned()),
            (Some(_), Some(_)) => return Err("expected a body or a body_base64, not both".to_owned()),
        };
        let headers = values::table_from_json(self.headers).map_err(|problem| format!("headers: {problem}"))?;
        self.properties.set_on(Message::new(body).with_headers(headers))
    }
}

/// The line as JSON, without its end.
pub fn to_text(received: &Received) -> io::Result<String> {
    output::json(&Line::of(received))
}

/// The message as this user may publish it: without a claim to come from another, which only that one's connection may make.
pub fn as_published_by(user: &str, message: &Message) -> Message {
    match message.user_id() {
        Some(claimed) if claimed != user => without_user_id(message),
        _ => message.clone(),
    }
}

fn without_user_id(message: &Message) -> Message {
    let properties = Properties { user_id: None, ..Properties::of(message) };
    let same = Message::new(message.body()).with_headers(message.headers().clone());
    properties.set_on(same).unwrap_or_else(|_| message.clone())
}

impl Properties {
    fn of(message: &Message) -> Properties {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        let since_1970 =
            |time: SystemTime| time.duration_since(UNIX_EPOCH).map_or(Whole(0), |since| Whole(since.as_secs()));
        Properties {
            content_type: owned(message.content_type()),
            content_encoding: owned(message.content_encoding()),
            delivery_mode: Some(if message.is_persistent() { PERSISTENT } else { TRANSIENT }),
            priority: message.priority(),
            correlation_id: owned(message.correlation_id()),
            reply_to: owned(message.reply_to()),
            expiration: message.expiration().map(|time| Whole(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))),
            message_id: owned(message.message_id()),
            timestamp: message.timestamp().map(since_1970),
            kind: owned(message.kind()),
            user_id: owned(message.user_id()),
            app_id: owned(message.app_id()),
            cluster_id: owned(message.cluster_id()),
        }
    }

    fn set_on(self, mut message: Message) -> Result<Message, String> {
        macro_rules! set {
            ($($field:ident => $with:ident),*) => {$(
                if let Some(value) = self.$field {
                    message = message.$with(value);
                }
            )*};
        }
        set!(content_type => with_content_type, content_encoding => with_content_encoding, priority => with_priority,
            correlation_id => with_correlation_id, reply_to => with_reply_to, message_id => with_message_id,
            kind => with_kind, user_id => with_user_id, app_id => with_app_id, cluster_id => with_cluster_id);
        if let Some(Whole(milliseconds)) = self.expiration {
            message = message.with_expiration(Duration::from_millis(milliseconds));
        }
        if let Some(Whole(seconds)) = self.timestamp {
            let time = UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
            message = message.with_timestamp(time.ok_or("properties: timestamp: too far away")?);
        }
        match self.delivery_mode {
            None | Some(PERSISTENT) => Ok(message),
            Some(TRANSIENT) => Ok(message.transient()),
            Some(other) => Err(format!("properties: delivery_mode: expected 1 or 2, got {other}")),
        }
    }
}
