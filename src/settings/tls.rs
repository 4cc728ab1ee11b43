//! `tls`: whether a broker is talked to through TLS, and how it is recognised.

use std::path::PathBuf;

use config::{Value, ValueKind};

use super::reader::{Given, Reader, Section, boolean, kind, origin};
use crate::url::AmqpUrl;

pub(super) const TLS_KEYS: [&str; 5] =
    ["ca_file", "certificate_file", "key_file", "server_name", "danger_accept_any_certificate"];

/// How the broker is recognised in TLS, and this client by the broker.
///
/// The default verifies the broker's certificate against the authorities that the system trusts, and against the host
/// that is connected to. Files are in PEM, their paths relative to the working directory of the program; they are read at
/// every connect, so that renewed ones are used from then on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TlsSettings {
    /// The certificate authorities to trust, in place of the system's. A certificate of the broker that signs itself is
    /// trusted too if it is in here. Defaults to none.
    pub ca_file: Option<PathBuf>,
    /// The certificate of this client, and those between it and its authority. Goes with `key_file`. Defaults to none.
    pub certificate_file: Option<PathBuf>,
    /// The private key of that certificate. Defaults to none.
    pub key_file: Option<PathBuf>,
    /// The name that the broker's certificate must be for. Defaults to the host that is connected to.
    pub server_name: Option<String>,
    /// Accepts whatever certificate the broker has. Who can get in between then reads and writes everything, the password
    /// too. Logs a warning at every connect. Defaults to false.
    pub danger_accept_any_certificate: bool,
}

impl TlsSettings {
    /// What is wrong with these settings as a whole: the key, and the problem.
    pub(super) fn problem(&self) -> Option<(&'static str, &'static str)> {
        match (&self.certificate_file, &self.key_file) {
            (Some(_), None) => Some(("key_file", "expected beside certificate_file, the private key of it")),
            (None, Some(_)) => Some(("certificate_file", "expected beside key_file, the certificate of it")),
            _ => None,
        }
    }
}

/// What a section says of TLS.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Said {
    Off,
    /// With whatever settings it inherits.
    On,
    With(TlsSettings),
}

impl Said {
    /// Reads `tls`: true, false, or a table.
    pub(super) fn read(reader: &mut Reader, section: &Section<'_>) -> Option<Given<Said>> {
        let value = section.value("tls")?;
        if let ValueKind::Table(table) = &value.kind {
            let layer = table.values().map(origin::layer).max().unwrap_or(origin::layer(value));
            let value = Said::read_table(reader, value, section.key_of("tls"))?;
            return Some(Given { value, layer });
        }
        let read = |value: &Value| match &value.kind {
            ValueKind::Boolean(_) | ValueKind::String(_) => boolean(value),
            other => Err(format!("expected true, false or a table, got {}", kind(other))),
        };
        let said = reader.read(section, "tls", read)?;
        Some(Given { value: if said.value { Said::On } else { Said::Off }, layer: said.layer })
    }

    fn read_table(reader: &mut Reader, value: &Value, key: String) -> Option<Said> {
        let section = reader.section(value, key, &TLS_KEYS)?;
        let mut text = |name| reader.text(&section, name).map(|given| given.value);
        let [ca_file, certificate_file, key_file] =
            ["ca_file", "certificate_file", "key_file"].map(|name| text(name).map(PathBuf::from));
        let server_name = text("server_name");
        let danger = reader.boolean(&section, "danger_accept_any_certificate").is_some_and(|given| given.value);
        let settings =
            TlsSettings { ca_file, certificate_file, key_file, server_name, danger_accept_any_certificate: danger };
        if let Some((key, problem)) = settings.problem() {
            reader.mistake(section.key_of(key), problem);
        }
        Some(Said::With(settings))
    }

    /// What is wrong with saying this beside that URL.
    pub(super) fn contradicts(&self, url: &AmqpUrl) -> Option<&'static str> {
        match self {
            Said::Off if url.is_tls() => Some("the url says the opposite; expected amqp:// in it, or no tls beside it"),
            Said::On | Said::With(_) if !url.is_tls() => Some("the url says the opposite; expected amqps:// in it"),
            _ => None,
        }
    }
}

/// Whether and how to speak TLS, by what a section says and what it inherits.
///
/// A URL is about a server as a whole and says whether there is TLS, and no inherited name is expected of another server.
pub(super) fn over(
    inherited: Option<&TlsSettings>,
    url: Option<&Given<AmqpUrl>>,
    said: Option<&Given<Said>>,
) -> Option<TlsSettings> {
    let is_on = match (url, said.map(|said| &said.value)) {
        (Some(url), _) => url.value.is_tls(),
        (None, Some(Said::Off)) => false,
        (None, Some(Said::On | Said::With(_))) => true,
        (None, None) => inherited.is_some(),
    };
    let settings = match (said, url) {
        (Some(Given { value: Said::With(settings), .. }), _) => settings.clone(),
        (_, None) => inherited.cloned().unwrap_or_default(),
        (_, Some(_)) => TlsSettings { server_name: None, ..inherited.cloned().unwrap_or_default() },
    };
    is_on.then_some(settings)
}
