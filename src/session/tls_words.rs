//! Why a TLS handshake has failed, in sentences that say what to do.

use std::path::Path;

use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::{AlertDescription, CertificateError, Error};
use webpki::EndEntityCert;

/// What the sentences need to know.
#[derive(Debug, Clone, Copy)]
pub(super) struct Case<'a> {
    /// Whom we wanted to talk to.
    pub(super) name: &'a str,
    pub(super) ca_file: Option<&'a Path>,
    /// Whether we have a certificate of our own.
    pub(super) has_certificate: bool,
}

impl Case<'_> {
    /// Of an error that comes from the connection as a whole.
    pub(super) fn of_handshake(&self, error: &Error) -> String {
        let name = self.name;
        match error {
            Error::InvalidMessage(_) => {
                format!("what {name} answered is not TLS; expected a port with TLS (5671), or a URL with amqp://")
            }
            Error::AlertReceived(alert) => format!("{name} {}", of_alert(*alert, self.has_certificate)),
            Error::InvalidCertificate(error) => self.of_certificate(error, None),
            Error::NoCertificatesPresented => format!("{name} has no certificate"),
            Error::PeerIncompatible(what) => {
                format!("{name} and coney share no TLS version or cipher ({what:?}); expected TLS 1.2 or 1.3")
            }
            error => format!("with {name}: {error}"),
        }
    }

    /// Of an error of the broker's certificate, with the certificate if it is at hand.
    pub(super) fn of_certificate(&self, error: &CertificateError, certificate: Option<&CertificateDer<'_>>) -> String {
        let name = self.name;
        let read = certificate.and_then(|certificate| EndEntityCert::try_from(certificate).ok());
        let of_webpki = match error {
            CertificateError::Other(other) => other.0.downcast_ref::<webpki::Error>(),
            _ => None,
        };
        match error {
            CertificateError::BadEncoding => format!("the certificate of {name} cannot be read"),
            CertificateError::ExpiredContext { not_after, .. } => format!(
                "the certificate of {name}, or of an authority of it, has expired: it was valid until {}",
                time(*not_after)
            ),
            CertificateError::NotValidYetContext { not_before, .. } => format!(
                "the certificate of {name}, or of an authority of it, is valid from {} on; is the clock right?",
                time(*not_before)
            ),
            CertificateError::Expired => format!("the certificate of {name}, or of an authority of it, has expired"),
            CertificateError::UnknownIssuer => {
                let is_alone = read.as_ref().is_some_and(|read| read.issuer() == read.subject());
                let which = if is_alone { "self-signed certificate" } else { "certificate" };
                match (self.ca_file, is_alone) {
                    (Some(path), false) => format!(
                        "the certificate of {name} was not issued by an authority in ca_file {}, expected the certificate of \
                         its authority there",
                        path.display()
                    ),
                    (Some(path), true) => {
                        format!("the {which} of {name} is not in ca_file {}, expected it there", path.display())
                    }
                    (None, false) => format!(
                        "the {which} of {name} was not issued by an authority that this system trusts; set ca_file to the \
                         certificate of its authority"
                    ),
                    (None, true) => {
                        format!("the {which} of {name} is not trusted by this system; set ca_file to that certificate")
                    }
                }
            }
            CertificateError::NotValidForNameContext { expected, presented } => {
                let expected = expected.to_str();
                let is_for = match presented.as_slice() {
                    [] => "has no subjectAltName, which alone is looked at".to_owned(),
                    presented => format!("is not valid for {expected}, only for {}", presented.join(", ")),
                };
                format!(
                    "the certificate of {name} {is_for}; expected {expected} in its subjectAltName, or server_name to be set"
                )
            }
            CertificateError::BadSignature if read.as_ref().is_some_and(has_small_rsa_key) => {
                format!("the certificate of {name} has an RSA key of less than 2048 bits, expected more")
            }
            CertificateError::BadSignature => format!(
                "a signature of {name} is wrong: its certificate was signed by another key than that of the authority of this \
                 name, or with an RSA key of less than 2048 bits"
            ),
            CertificateError::UnsupportedSignatureAlgorithmContext { signature_algorithm_id, .. }
            | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { signature_algorithm_id, .. } => {
                format!(
                    "the certificate of {name}, or of an authority of it, is signed with {}, expected SHA-256 or better",
                    algorithm(signature_algorithm_id)
                )
            }
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => format!(
                "the certificate of {name} is not for servers, expected serverAuth in its extendedKeyUsage, or no \
                 extendedKeyUsage"
            ),
            _ => match of_webpki {
                Some(webpki::Error::CaUsedAsEndEntity) => format!(
                    "the certificate of {name} is that of a certificate authority (CA:TRUE), not of a server; name this \
                     certificate in ca_file, or give the server one with CA:FALSE"
                ),
                Some(webpki::Error::EndEntityUsedAsCa) => format!(
                    "the certificate of {name} was issued by a certificate that is no authority's, expected CA:TRUE in its \
                     basicConstraints"
                ),
                Some(webpki::Error::UnsupportedCertVersion) => format!(
                    "the certificate of {name} is X.509 of version 1, expected version 3 with a subjectAltName; openssl x509 \
                     -req makes that with -extfile"
                ),
                Some(webpki::Error::UnsupportedCriticalExtension) => {
                    format!("the certificate of {name} has a critical extension that is not known here")
                }
                Some(webpki::Error::NameConstraintViolation) => {
                    format!("the certificate of {name} is for a name that its authority may not sign for")
                }
                Some(webpki::Error::PathLenConstraintViolated) => format!(
                    "the certificate of {name} has more authorities above it than the first of them allows (pathlen)"
                ),
                Some(error) => format!("the certificate of {name} is not accepted: {error}"),
                None => format!("the certificate of {name} is not accepted: {error}"),
            },
        }
    }
}

/// What a broker means by an alert, behind its name.
pub(super) fn of_alert(alert: AlertDescription, has_certificate: bool) -> String {
    let why = match alert {
        AlertDescription::CertificateRequired => "it wants a certificate of ours: set certificate_file and key_file",
        AlertDescription::HandshakeFailure | AlertDescription::BadCertificate if !has_certificate => {
            "it may want a certificate of ours: set certificate_file and key_file"
        }
        AlertDescription::UnknownCA => "it does not know the authority of the certificate in certificate_file",
        AlertDescription::CertificateExpired => "the certificate in certificate_file has expired",
        AlertDescription::CertificateRevoked => "the certificate in certificate_file has been revoked",
        AlertDescription::BadCertificate
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::CertificateUnknown => "it does not accept the certificate in certificate_file",
        AlertDescription::ProtocolVersion => "it speaks neither TLS 1.2 nor 1.3",
        _ => "see its log",
    };
    format!("refused the handshake (alert {alert:?}): {why}")
}

fn time(at: UnixTime) -> String {
    let at = std::time::UNIX_EPOCH.checked_add(std::time::Duration::from_secs(at.as_secs()));
    at.map_or_else(|| "an unknown time".to_owned(), |at| humantime::format_rfc3339_seconds(at).to_string())
}

/// Whether the key of a certificate is RSA and smaller than is verified here: the whole public key of one of 2048 bits has
/// 294 bytes.
fn has_small_rsa_key(certificate: &EndEntityCert<'_>) -> bool {
    const RSA: [u8; 11] = [6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1];
    let key = certificate.subject_public_key_info();
    key.len() < 290 && key.windows(RSA.len()).any(|part| part == RSA)
}

/// The name of a signature algorithm, of which `id` has the object identifier in DER.
fn algorithm(id: &[u8]) -> String {
    const PKCS1: [u8; 8] = [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1];
    const ECDSA_WITH_SHA1: [u8; 7] = [0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 1];
    let after =
        |prefix: &[u8]| id.windows(prefix.len()).position(|part| part == prefix).map(|at| &id[at + prefix.len()..]);
    match after(&PKCS1).and_then(<[u8]>::first) {
        Some(2) => "MD2".to_owned(),
        Some(4) => "MD5".to_owned(),
        Some(5) => "SHA-1".to_owned(),
        Some(14) => "SHA-224".to_owned(),
        _ if after(&ECDSA_WITH_SHA1).is_some() => "SHA-1".to_owned(),
        _ => {
            let id: Vec<String> = id.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("an algorithm that is not known here ({})", id.join(" "))
        }
    }
}
