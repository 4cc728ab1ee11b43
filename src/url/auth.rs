//! How a connection logs in.

/// How a connection logs in: a SASL mechanism that the broker offers
/// (<https://www.rabbitmq.com/docs/access-control#mechanisms>).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum AuthMechanism {
    /// `plain`: user and password, as every broker takes them.
    #[default]
    Plain,
    /// `amqplain`: user and password in the form of earlier versions of AMQP.
    AmqPlain,
    /// `external`: the user is in the client certificate. RabbitMQ needs a plugin for it, `rabbitmq_auth_mechanism_ssl`.
    External,
}

impl AuthMechanism {
    /// All there are.
    pub(crate) const ALL: [AuthMechanism; 3] = [AuthMechanism::Plain, AuthMechanism::AmqPlain, AuthMechanism::External];

    /// The name on the wire; in settings it is written in lower case.
    pub(crate) fn name(self) -> &'static str {
        match self {
            AuthMechanism::Plain => "PLAIN",
            AuthMechanism::AmqPlain => "AMQPLAIN",
            AuthMechanism::External => "EXTERNAL",
        }
    }

    /// The mechanism of this name, in upper or lower case.
    pub(crate) fn parse(name: &str) -> Result<AuthMechanism, String> {
        AuthMechanism::ALL
            .into_iter()
            .find(|mechanism| mechanism.name().eq_ignore_ascii_case(name))
            .ok_or_else(|| "expected plain, amqplain or external".to_owned())
    }
}
