//! The files that `tls` names: certificates and keys in PEM. Each thing that can be wrong with one has a sentence of its own,
//! which names the file and says what to do.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use webpki::EndEntityCert;

use crate::error::ConnectError;

/// A file, and the setting that names it.
#[derive(Debug, Clone, Copy)]
pub(super) struct File<'a> {
    key: &'static str,
    path: &'a Path,
}

impl<'a> File<'a> {
    pub(super) fn new(key: &'static str, path: &'a Path) -> File<'a> {
        File { key, path }
    }

    pub(super) fn problem(self, what: impl std::fmt::Display) -> ConnectError {
        ConnectError::Tls(format!("{} {}: {what}", self.key, self.path.display()))
    }

    fn read(self) -> Result<Vec<u8>, ConnectError> {
        let mut text = fs::read(self.path).map_err(|error| self.problem(error))?;
        // Editors of Windows put it in front of text; to PEM it is no part of a line.
        if text.starts_with(BYTE_ORDER_MARK) {
            text.drain(..BYTE_ORDER_MARK.len());
        }
        Ok(text)
    }

    /// What is in it, if that is PEM. `expected` is to be in it, which `command` of openssl makes PEM of.
    fn pem(&self, expected: &str, command: &str) -> Result<Vec<u8>, ConnectError> {
        let text = self.read()?;
        let path = self.path.display();
        match Content::of(&text) {
            Content::Pem => Ok(text),
            Content::Der => Err(self.problem(format_args!(
                "it is in DER, expected PEM; convert it: openssl {command} -inform der -in {path} -out {path}.pem"
            ))),
            other => {
                Err(self.problem(format_args!("{}, expected {expected} in PEM{}", other.is(), other.advice(self.path))))
            }
        }
    }

    /// The certificates in it. There is at least one.
    pub(super) fn certificates(self) -> Result<Vec<CertificateDer<'static>>, ConnectError> {
        let text = self.pem("certificates", "x509")?;
        let path = self.path.display();
        let certificates: Vec<_> = CertificateDer::pem_slice_iter(&text)
            .collect::<Result<_, _>>()
            .map_err(|error| self.problem(format_args!("expected certificates in PEM, and it is damaged: {error}")))?;
        if certificates.is_empty() {
            let labels = labels(&text);
            let advice = if labels.iter().any(|label| label == "PKCS7") {
                format!("; take them out of it: openssl pkcs7 -in {path} -print_certs -out {path}.pem")
            } else {
                String::new()
            };
            return Err(self.problem(format_args!(
                "expected certificates in PEM (BEGIN CERTIFICATE), and it has {}{advice}",
                listed(&labels)
            )));
        }
        Ok(certificates)
    }

    /// The private key in it.
    pub(super) fn private_key(self) -> Result<PrivateKeyDer<'static>, ConnectError> {
        let text = self.pem("a private key", "pkey")?;
        let path = self.path.display();
        let labels = labels(&text);
        let encrypted = labels.iter().any(|label| label == "ENCRYPTED PRIVATE KEY")
            || text.windows(ENCRYPTED.len()).any(|part| part == ENCRYPTED);
        if encrypted {
            return Err(self.problem(format_args!(
                "the private key is encrypted, expected one without a passphrase; decrypt it: openssl pkey -in {path} -out \
                 {path}.pem"
            )));
        }
        match PrivateKeyDer::from_pem_slice(&text) {
            Ok(key) => Ok(key),
            Err(rustls::pki_types::pem::Error::NoItemsFound) => Err(self.problem(format_args!(
                "expected a private key in PEM (BEGIN PRIVATE KEY), and it has {}",
                listed(&labels)
            ))),
            Err(error) => Err(self.problem(format_args!("expected a private key in PEM, and it is damaged: {error}"))),
        }
    }
}

/// Our certificate and its key, fitting each other.
pub(super) fn identity(
    certificate: File<'_>,
    key: File<'_>,
    provider: &CryptoProvider,
) -> Result<Arc<CertifiedKey>, ConnectError> {
    let chain = certificate.certificates()?;
    let private = key.private_key()?;
    let Ok(signing) = provider.key_provider.load_private_key(private) else {
        return Err(key.problem(
            "the private key is of a kind that cannot be used; expected RSA of 2048 to 4096 bits, ECDSA on P-256 or P-384, or \
             Ed25519",
        ));
    };
    match EndEntityCert::try_from(&chain[0]) {
        Ok(_) => (),
        Err(webpki::Error::UnsupportedCertVersion) => {
            return Err(certificate.problem(
                "the certificate is X.509 of version 1, expected version 3; openssl x509 -req makes that with -extfile",
            ));
        }
        Err(error) => return Err(certificate.problem(format_args!("the certificate cannot be read: {error}"))),
    }
    let fits = |at: usize| {
        let alone = CertifiedKey::new(chain[at..].to_vec(), Arc::clone(&signing));
        // A key that does not tell its public half has to be believed.
        !matches!(alone.keys_match(), Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::KeyMismatch)))
    };
    if !fits(0) {
        let elsewhere = (1..chain.len()).find(|at| EndEntityCert::try_from(&chain[*at]).is_ok() && fits(*at));
        return Err(match elsewhere {
            Some(at) => certificate.problem(format_args!(
                "the certificate of key_file {} is number {} in it, expected the first; those of authorities come after it",
                key.path.display(),
                at + 1
            )),
            None => key.problem(format_args!(
                "it is not the key of the certificate in certificate_file {}",
                certificate.path.display()
            )),
        });
    }
    Ok(Arc::new(CertifiedKey::new(chain, signing)))
}

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
const ENCRYPTED: &[u8] = b"Proc-Type: 4,ENCRYPTED";

/// What a file is, by how it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    Pem,
    Empty,
    Der,
    Pkcs12,
    Pkcs7,
    JavaKeyStore,
    Utf16,
    Unknown,
}

impl Content {
    fn of(bytes: &[u8]) -> Content {
        // What stands in the outermost sequence of DER.
        let inner = match bytes {
            [0x30, length @ ..=0x7f, inner @ ..] if usize::from(*length) <= inner.len() => Some(inner),
            [0x30, 0x81, _, inner @ ..] | [0x30, 0x82, _, _, inner @ ..] | [0x30, 0x83, _, _, _, inner @ ..] => {
                Some(inner)
            }
            _ => None,
        };
        match (bytes, inner) {
            (_, Some([2, 1, 3, ..])) => Content::Pkcs12,
            (_, Some([6, ..])) => Content::Pkcs7,
            (_, Some([2 | 0x30, ..])) => Content::Der,
            ([0xfe, 0xed, 0xfe, 0xed, ..], _) => Content::JavaKeyStore,
            ([0xff, 0xfe, ..] | [0xfe, 0xff, ..], _) => Content::Utf16,
            _ if bytes.trim_ascii().is_empty() => Content::Empty,
            _ if bytes.split(|byte| *byte == b'\n').any(|line| line.starts_with(b"-----BEGIN ")) => Content::Pem,
            _ => Content::Unknown,
        }
    }

    fn is(self) -> &'static str {
        match self {
            Content::Pem => "it is in PEM",
            Content::Empty => "it is empty",
            Content::Der => "it is in DER",
            Content::Pkcs12 => "it is in PKCS#12",
            Content::Pkcs7 => "it is in PKCS#7",
            Content::JavaKeyStore => "it is a Java key store",
            Content::Utf16 => "it is text in UTF-16",
            Content::Unknown => "it is not in PEM (no line begins with -----BEGIN)",
        }
    }

    fn advice(self, path: &Path) -> String {
        let path = path.display();
        match self {
            Content::Pkcs12 => format!("; convert it: openssl pkcs12 -in {path} -nodes -out {path}.pem"),
            Content::Pkcs7 => {
                format!("; convert it: openssl pkcs7 -inform der -in {path} -print_certs -out {path}.pem")
            }
            Content::Utf16 => "; save it as UTF-8 or ASCII".to_owned(),
            _ => String::new(),
        }
    }
}

/// What the sections of a PEM file call themselves.
fn labels(text: &[u8]) -> Vec<String> {
    let mut labels: Vec<String> = String::from_utf8_lossy(text)
        .lines()
        .filter_map(|line| line.trim_end().strip_prefix("-----BEGIN ")?.strip_suffix("-----").map(str::to_owned))
        .collect();
    labels.dedup();
    labels
}

fn listed(labels: &[String]) -> String {
    if labels.is_empty() { "no whole section".to_owned() } else { labels.join(", ") }
}
