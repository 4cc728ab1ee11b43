//! The TLS handshake.
//!
//! It is made on the blocking socket; the watchdog cuts that at the deadline like any other. What is verified is rustls's
//! default: the chain, the dates and the name.

use std::net::TcpStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::{io, mem};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_name;
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::SingleCertAndKey;
use rustls::{CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme};

use super::tls_files::{File, identity};
use super::tls_words::Case;
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
    let refused = Arc::<Refused>::default();
    let config = Arc::new(config(settings, &refused)?);
    let case =
        Case { name, ca_file: settings.ca_file.as_deref(), has_certificate: settings.certificate_file.is_some() };
    let mut session = ClientConnection::new(config, server_name).map_err(|error| problem(case.of_handshake(&error)))?;
    while session.is_handshaking() {
        session.complete_io(socket).map_err(|error| refusal(case, &refused, error))?;
    }
    Ok(session)
}

fn problem(text: String) -> ConnectError {
    ConnectError::Tls(text)
}

fn refusal(case: Case<'_>, refused: &Refused, error: io::Error) -> ConnectError {
    match (error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()), refused.take()) {
        (Some(rustls::Error::InvalidCertificate(why)), Some(certificate)) => {
            problem(case.of_certificate(why, Some(&certificate)))
        }
        (Some(error), _) => problem(case.of_handshake(error)),
        // It may pass: the server is going down, or was not ready yet.
        (None, _) => ConnectError::Handshake(format!("TLS with {}: {error}", case.name)),
    }
}

fn config(settings: &TlsSettings, refused: &Arc<Refused>) -> Result<ClientConfig, ConnectError> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| problem(error.to_string()))?;
    let verifier: Arc<dyn ServerCertVerifier> = if settings.danger_accept_any_certificate {
        Arc::new(AnyCertificate(Arc::clone(&provider)))
    } else {
        let (roots, named) = authorities(settings)?;
        let chains = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .map_err(|error| problem(error.to_string()))?;
        Arc::new(Known { chains, named, refused: Arc::clone(refused) })
    };
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    match (&settings.certificate_file, &settings.key_file) {
        (Some(certificate), Some(key)) => {
            let (certificate, key) = (File::new("certificate_file", certificate), File::new("key_file", key));
            let identity = identity(certificate, key, &provider)?;
            Ok(builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity))))
        }
        (None, None) => Ok(builder.with_no_client_auth()),
        _ => Err(problem("expected certificate_file and key_file together".to_owned())),
    }
}

/// Whom to trust, and the certificates that a file names for it.
fn authorities(settings: &TlsSettings) -> Result<(RootCertStore, Vec<CertificateDer<'static>>), ConnectError> {
    match &settings.ca_file {
        Some(path) => named(path),
        None => {
            let mut roots = RootCertStore::empty();
            let found = rustls_native_certs::load_native_certs();
            // A system's store holds the odd certificate that cannot be parsed, which nobody misses.
            let (added, _) = roots.add_parsable_certificates(found.certs);
            if added == 0 {
                let why = found.errors.first().map_or("it is empty".to_owned(), ToString::to_string);
                return Err(problem(format!("no certificate authorities in the system's store ({why}); set ca_file")));
            }
            Ok((roots, Vec::new()))
        }
    }
}

fn named(path: &Path) -> Result<(RootCertStore, Vec<CertificateDer<'static>>), ConnectError> {
    let file = File::new("ca_file", path);
    let certificates = file.certificates()?;
    let mut roots = RootCertStore::empty();
    for (at, certificate) in certificates.iter().enumerate() {
        roots.add(certificate.clone()).map_err(|_| {
            file.problem(format_args!("number {} of its certificates is damaged, expected X.509 certificates", at + 1))
        })?;
    }
    Ok((roots, certificates))
}

/// The certificate that was refused, for whoever says why.
#[derive(Debug, Default)]
struct Refused(Mutex<Option<CertificateDer<'static>>>);

impl Refused {
    fn note<T>(&self, outcome: Result<T, rustls::Error>, certificate: &CertificateDer<'_>) -> Result<T, rustls::Error> {
        if outcome.is_err() {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(certificate.clone().into_owned());
        }
        outcome
    }

    fn take(&self) -> Option<CertificateDer<'static>> {
        mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A server is known by an authority that has signed for it, or by its own certificate if `ca_file` has that.
#[derive(Debug)]
struct Known {
    chains: Arc<WebPkiServerVerifier>,
    /// What `ca_file` has.
    named: Vec<CertificateDer<'static>>,
    refused: Arc<Refused>,
}

impl Known {
    /// Whether a certificate was refused for nothing but being an authority's, as everything is that `openssl req -x509`
    /// makes. The dates have been looked at before that, and the signature says nothing in a certificate that signs itself.
    fn is_anchor(&self, why: &rustls::Error, certificate: &CertificateDer<'_>) -> bool {
        let rustls::Error::InvalidCertificate(CertificateError::Other(why)) = why else { return false };
        let is_authority = why.0.downcast_ref::<webpki::Error>() == Some(&webpki::Error::CaUsedAsEndEntity);
        is_authority && self.named.iter().any(|named| named == certificate)
    }
}

impl ServerCertVerifier for Known {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        stapled: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let outcome = match self.chains.verify_server_cert(certificate, between, name, stapled, now) {
            Err(why) if self.is_anchor(&why, certificate) => ParsedCertificate::try_from(certificate)
                .and_then(|parsed| verify_server_name(&parsed, name))
                .map(|()| ServerCertVerified::assertion()),
            outcome => outcome,
        };
        self.refused.note(outcome, certificate)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.refused.note(self.chains.verify_tls12_signature(message, certificate, signature), certificate)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.refused.note(self.chains.verify_tls13_signature(message, certificate, signature), certificate)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chains.supported_verify_schemes()
    }
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
