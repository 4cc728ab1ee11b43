//! The configuration file of `coney broker`.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::Path;
use std::time::Duration;

use coney::embedded::{Builder, Release};
use serde::{Deserialize, Deserializer};

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    #[serde(deserialize_with = "release")]
    release: Option<Release>,
    vhosts: Vec<String>,
    users: BTreeMap<String, User>,
    limits: Limits,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct User {
    password: String,
    #[serde(default)]
    permissions: BTreeMap<String, Permissions>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Permissions {
    configure: String,
    write: String,
    read: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Limits {
    max_message_size: Option<u64>,
    frame_max: Option<u32>,
    channel_max: Option<u16>,
    #[serde(deserialize_with = "duration")]
    heartbeat: Option<Duration>,
    #[serde(deserialize_with = "duration")]
    handshake_timeout: Option<Duration>,
    #[serde(deserialize_with = "duration")]
    consumer_timeout: Option<Duration>,
}

fn release<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Release>, D::Error> {
    // Not what there is in its place: that may be a password.
    let release = String::deserialize(deserializer)?.parse();
    release.map(Some).map_err(|_| serde::de::Error::custom("expected a release, \"3.10\" or \"4.0\""))
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let duration = humantime::parse_duration(&text);
    duration.map(Some).map_err(|_| serde::de::Error::custom("expected a duration such as \"10s\" or \"1m 30s\""))
}

/// What was expected, where serde says first what there is.
fn without_value(message: &str) -> &str {
    let begins = |words: &&str| message.starts_with(*words);
    match message.rfind(", expected ") {
        Some(at) if ["invalid type: ", "invalid value: ", "invalid length "].iter().any(begins) => {
            &message[at + ", ".len()..]
        }
        _ => message,
    }
}

impl Config {
    /// Reads the file. An error gives the line, and not what is in it: that may be a password.
    pub fn read(path: &Path) -> Result<Config, Box<dyn Error>> {
        let shown = path.display();
        let text = fs::read_to_string(path).map_err(|error| format!("{shown}: {error}"))?;
        toml::from_str(&text).map_err(|error| {
            let start = error.span().map_or(0, |span| span.start.min(text.len()));
            let line = text.as_bytes()[..start].iter().filter(|byte| **byte == b'\n').count() + 1;
            format!("{shown}, line {line}: {}", without_value(error.message())).into()
        })
    }

    pub fn apply(self, mut builder: Builder) -> Builder {
        if let Some(release) = self.release {
            builder = builder.release(release);
        }
        for vhost in self.vhosts {
            builder = builder.vhost(vhost);
        }
        if !self.users.is_empty() {
            builder = builder.without_users();
        }
        for (name, user) in self.users {
            builder = builder.user(&name, user.password);
            for (vhost, Permissions { configure, write, read }) in user.permissions {
                builder = builder.permissions(&name, vhost, configure, write, read);
            }
        }
        let Limits { max_message_size, frame_max, channel_max, heartbeat, handshake_timeout, consumer_timeout } =
            self.limits;
        if let Some(bytes) = max_message_size {
            builder = builder.max_message_size(bytes);
        }
        if let Some(bytes) = frame_max {
            builder = builder.frame_max(bytes);
        }
        if let Some(channels) = channel_max {
            builder = builder.channel_max(channels);
        }
        if let Some(heartbeat) = heartbeat {
            builder = builder.heartbeat(heartbeat);
        }
        if let Some(timeout) = handshake_timeout {
            builder = builder.handshake_timeout(timeout);
        }
        if let Some(timeout) = consumer_timeout {
            builder = builder.consumer_timeout(timeout);
        }
        builder
    }
}
