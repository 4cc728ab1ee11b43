//! The handshake as it goes over the wire, where amiquip's own has to be another.
//!
//! amiquip says who it is, and a pool wants its connections told apart in the broker's listings (`connection_name`) and a
//! refused login answered with a reason (`authentication_failure_close`). amiquip logs what it logs in with, and gives a
//! broker that wants no heartbeats none. So it is shown a `start` and a `tune` of ours, and its answers are replaced:
//!
//! | the broker says | amiquip is shown | amiquip answers | what goes out |
//! |---|---|---|---|
//! | `start` | one without properties, that offers PLAIN | `start-ok` of a nobody | `start-ok` with our properties and login |
//! | `tune` | the same without heartbeats | `tune-ok` | the same with our heartbeat |

use std::time::Duration;

use crate::amqp::method::{ConnectionStart, ConnectionStartOk, ConnectionTune, ConnectionTuneOk};
use crate::amqp::text;
use crate::amqp::value::{Table, Value};
use crate::settings::{AuthMechanism, BrokerSettings};

/// What this client can do, each with the RabbitMQ extension it names
/// (<https://www.rabbitmq.com/docs/consumer-cancel#capabilities> and the pages beside it).
const CAPABILITIES: [&str; 6] = [
    "authentication_failure_close",
    "basic.nack",
    "connection.blocked",
    "consumer_cancel_notify",
    "exchange_exchange_bindings",
    "publisher_confirms",
];

/// What a connection says of itself, and logs in with.
pub(super) struct Introduction {
    name: String,
    auth: AuthMechanism,
    user: String,
    password: String,
    heartbeat: u16,
}

impl Introduction {
    pub(super) fn new(name: &str, broker: &BrokerSettings) -> Introduction {
        Introduction {
            name: name.to_owned(),
            auth: broker.auth,
            user: broker.user.clone(),
            password: broker.password.expose().to_owned(),
            heartbeat: u16::try_from(broker.heartbeat.as_secs()).unwrap_or(u16::MAX).max(1),
        }
    }

    /// The `start` that amiquip is shown, or why nothing can come of this one.
    pub(super) fn shown_start(&self, mechanisms: &[u8]) -> Result<ConnectionStart, String> {
        let wanted = self.auth.name();
        let offered = text(mechanisms);
        if !offered.split_ascii_whitespace().any(|offered| offered == wanted) {
            let offered = offered.split_ascii_whitespace().collect::<Vec<_>>();
            let offers = match offered.split_last() {
                None => "no mechanism of authentication".to_owned(),
                Some((last, [])) => (*last).to_owned(),
                Some((last, others)) => format!("{} and {last}", others.join(", ")),
            };
            return Err(format!(
                "the broker offers {offers}; coney was to speak {wanted} (setting auth: plain, amqplain or external)"
            ));
        }
        Ok(ConnectionStart {
            version_major: 0,
            version_minor: 9,
            mechanisms: b"PLAIN".to_vec(),
            locales: b"en_US".to_vec(),
            server_properties: Table::default(),
        })
    }

    /// The `start-ok` that goes out.
    pub(super) fn start_ok(&self) -> ConnectionStartOk {
        let response = match self.auth {
            AuthMechanism::Plain => format!("\0{}\0{}", self.user, self.password).into_bytes(),
            AuthMechanism::AmqPlain => {
                let login = Table::default()
                    .with("LOGIN", Value::text(&self.user))
                    .with("PASSWORD", Value::text(&self.password));
                login.encode_inside()
            }
            // Who we are is in our certificate.
            AuthMechanism::External => Vec::new(),
        };
        ConnectionStartOk {
            client_properties: self.properties(),
            mechanism: self.auth.name().into(),
            response,
            locale: "en_US".into(),
        }
    }

    fn properties(&self) -> Table {
        let capabilities =
            CAPABILITIES.iter().fold(Table::default(), |table, capability| table.with(capability, Value::Bool(true)));
        let platform = format!("Rust on {}", std::env::consts::OS);
        [
            ("connection_name", self.name.as_str()),
            ("information", env!("CARGO_PKG_DESCRIPTION")),
            ("platform", platform.as_str()),
            ("product", env!("CARGO_PKG_NAME")),
            ("version", env!("CARGO_PKG_VERSION")),
        ]
        .into_iter()
        .fold(Table::default().with("capabilities", Value::Table(capabilities)), |table, (key, value)| {
            table.with(key, Value::text(value))
        })
    }

    /// The `tune` that amiquip is shown: with heartbeats it would start timers of its own.
    pub(super) fn shown_tune(&self, tune: &ConnectionTune) -> ConnectionTune {
        ConnectionTune { heartbeat: 0, ..tune.clone() }
    }

    /// The heartbeat that is agreed. A broker that wants none gets ours all the same: without them a call on a line that has
    /// gone silent would never end.
    pub(super) fn heartbeat(&self, tune: &ConnectionTune) -> u16 {
        match tune.heartbeat {
            0 => self.heartbeat,
            offered => offered.min(self.heartbeat),
        }
    }

    /// The `tune-ok` that goes out instead of amiquip's.
    pub(super) fn tune_ok(amiquips: &ConnectionTuneOk, heartbeat: Duration) -> ConnectionTuneOk {
        let heartbeat = u16::try_from(heartbeat.as_secs()).unwrap_or(u16::MAX);
        ConnectionTuneOk { heartbeat, ..amiquips.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn introduction(auth: AuthMechanism) -> Introduction {
        let broker = BrokerSettings { auth, heartbeat: Duration::from_secs(10), ..BrokerSettings::default() };
        Introduction::new("coney publish #3", &broker)
    }

    #[test]
    fn the_properties_name_the_connection_and_what_it_can_do() {
        let start_ok = introduction(AuthMechanism::Plain).start_ok();
        assert_eq!(start_ok.client_properties.get("connection_name"), Some(&Value::text("coney publish #3")));
        let Some(Value::Table(capabilities)) = start_ok.client_properties.get("capabilities") else {
            panic!("no capabilities");
        };
        assert_eq!(capabilities.get("authentication_failure_close"), Some(&Value::Bool(true)));
        assert_eq!(start_ok.response, b"\0guest\0guest");
    }

    #[test]
    fn a_mechanism_that_is_not_offered_is_named_with_those_that_are() {
        let plain = introduction(AuthMechanism::Plain);
        assert_eq!(plain.shown_start(b"AMQPLAIN PLAIN").unwrap().mechanisms, b"PLAIN");
        let refused = plain.shown_start(b"EXTERNAL AMQPLAIN").unwrap_err();
        assert!(refused.starts_with("the broker offers EXTERNAL and AMQPLAIN; coney was to speak PLAIN"), "{refused}");
        let refused = introduction(AuthMechanism::External).shown_start(b"PLAIN").unwrap_err();
        assert!(refused.starts_with("the broker offers PLAIN; coney was to speak EXTERNAL"), "{refused}");
        assert!(plain.shown_start(b"").unwrap_err().contains("no mechanism"));
    }

    #[test]
    fn the_lower_heartbeat_counts_and_none_counts_as_ours() {
        let plain = introduction(AuthMechanism::Plain);
        for (offered, agreed) in [(0, 10), (60, 10), (10, 10), (3, 3)] {
            let tune = ConnectionTune { heartbeat: offered, ..ConnectionTune::default() };
            assert_eq!((plain.heartbeat(&tune), plain.shown_tune(&tune).heartbeat), (agreed, 0), "{offered}");
        }
    }
}
