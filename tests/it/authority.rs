//! Certificates of test brokers, made when they are wanted, in a directory that goes with their authority.

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;

use coney::testing::Builder;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType};
use tempfile::TempDir;

/// An authority, and what it has signed, as PEM files.
pub struct Authority {
    home: TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    pub fn new(name: &str) -> Authority {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let home = TempDir::new().unwrap();
        fs::write(home.path().join("ca.pem"), issuer.pem()).unwrap();
        Authority { home, issuer }
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    pub fn ca_file(&self) -> PathBuf {
        self.file("ca.pem")
    }

    /// A certificate for this name, and one for its key: `NAME.pem` and `NAME.key`.
    pub fn sign(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> (PathBuf, PathBuf) {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let (certificate_file, key_file) = (self.file(&format!("{name}.pem")), self.file(&format!("{name}.key")));
        fs::write(&certificate_file, certificate.pem()).unwrap();
        fs::write(&key_file, key.serialize_pem()).unwrap();
        (certificate_file, key_file)
    }

    /// A certificate for `localhost` and 127.0.0.1.
    pub fn sign_server(&self, change: impl FnOnce(&mut CertificateParams)) -> (PathBuf, PathBuf) {
        self.sign("localhost", |params| {
            params.subject_alt_names.push(SanType::IpAddress([127, 0, 0, 1].into()));
            change(params);
        })
    }

    /// Gives a node a TLS port; returns which.
    pub fn tls_port(&self, builder: Builder, files: &(PathBuf, PathBuf)) -> (Builder, u16) {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let builder = builder
            .conf(format!("listeners.ssl.default = 127.0.0.1:{port}"))
            .conf_file("ssl_options.cacertfile", self.ca_file())
            .conf_file("ssl_options.certfile", &files.0)
            .conf_file("ssl_options.keyfile", &files.1)
            .conf("ssl_options.verify = verify_peer");
        (builder, port)
    }
}
