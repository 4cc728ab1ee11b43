//! The TLS handshake.
//!
//! It is made on the blocking socket; the watchdog cuts that at the deadline like any other. What is verified is rustls's
//! default: the chain, the dates and the name.

use std::fs;
use std::io;
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme};

use crate::error::ConnectError;
use crate::settings::TlsSettings;

/// Shakes hands with `host`. The files are read each time, so that renewed certificates are used when they are there.
pub(crate) fn shake_hands(
    socket: &mut TcpStream,
    host: &str,
    settings: &TlsSettings,
) -> Result<ClientConnection, ConnectError> {
    let name = settings.server_name.as_deref().unwrap_or(host);
    let server_name = ServerName::try_from(name.to_owned())
        .map_err(|_| problem(format!("{name:?} cannot be a server's name in a certificate")))?;
    if settings.danger_accept_any_certificate {
        log::warn!(
            "TLS with {name} is not verified: danger_accept_any_certificate is set; anybody may read and answer"
        );
    }
    let mut session = ClientConnection::new(Arc::new(config(settings)?), server_name)
        .map_err(|error| problem(format!("with {name}: {error}")))?;
    while session.is_handshaking() {
        session.complete_io(socket).map_err(|error| refusal(name, error))?;
    }
    Ok(session)
}

fn problem(text: String) -> ConnectError {
    ConnectError::Tls(text)
}

fn refusal(name: &str, error: io::Error) -> ConnectError {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidMessage(_)) => {
            problem(format!("what {name} answered is not TLS; expected a port with TLS (5671), or a URL with amqp://"))
        }
        Some(error) => problem(format!("with {name}: {error}")),
        // It may pass: the server is going down, or was not ready yet.
        None => ConnectError::Handshake(format!("TLS with {name}: {error}")),
    }
}

fn config(settings: &TlsSettings) -> Result<ClientConfig, ConnectError> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| problem(error.to_string()))?;
    let builder = if settings.danger_accept_any_certificate {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
    } else {
        builder.with_root_certificates(roots(settings)?)
    };
    match (&settings.certificate_file, &settings.key_file) {
        (Some(certificate), Some(key)) => {
            let chain = certificates(certificate, "certificate_file")?;
            let key = PrivateKeyDer::from_pem_slice(&read(key, "key_file")?)
                .map_err(|error| in_file(key, "key_file", "expected a private key in PEM", error))?;
            builder
                .with_client_auth_cert(chain, key)
                .map_err(|error| problem(format!("the client certificate: {error}")))
        }
        (None, None) => Ok(builder.with_no_client_auth()),
        _ => Err(problem("expected certificate_file and key_file together".to_owned())),
    }
}

fn roots(settings: &TlsSettings) -> Result<RootCertStore, ConnectError> {
    let mut roots = RootCertStore::empty();
    match &settings.ca_file {
        Some(path) => {
            for certificate in certificates(path, "ca_file")? {
                roots
                    .add(certificate)
                    .map_err(|error| in_file(path, "ca_file", "expected certificates of authorities", error))?;
            }
        }
        None => {
            let found = rustls_native_certs::load_native_certs();
            // A system's store holds the odd certificate that cannot be parsed, which nobody misses.
            let (added, _) = roots.add_parsable_certificates(found.certs);
            if added == 0 {
                let why = found.errors.first().map_or("it is empty".to_owned(), ToString::to_string);
                return Err(problem(format!("no certificate authorities in the system's store ({why}); set ca_file")));
            }
        }
    }
    Ok(roots)
}

fn certificates(path: &Path, key: &str) -> Result<Vec<CertificateDer<'static>>, ConnectError> {
    let expected = "expected certificates in PEM";
    let text = read(path, key)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match certificates {
        Ok(certificates) if certificates.is_empty() => Err(in_file(path, key, expected, "there is none")),
        Ok(certificates) => Ok(certificates),
        Err(error) => Err(in_file(path, key, expected, error)),
    }
}

fn read(path: &Path, key: &str) -> Result<Vec<u8>, ConnectError> {
    fs::read(path).map_err(|error| problem(format!("{key} {}: {error}", path.display())))
}

fn in_file(path: &Path, key: &str, expected: &str, error: impl std::fmt::Display) -> ConnectError {
    problem(format!("{key} {}: {expected}: {error}", path.display()))
}

/// Whatever certificate the server has, as long as it has its key.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
