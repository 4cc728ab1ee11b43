//! The stream between a session and a socket that takes and gives as little as it likes.

use std::collections::VecDeque;

use rcgen::{CertificateParams, KeyPair};
use rustls::{ServerConfig, ServerConnection};

use super::*;

/// A server in memory, and the bytes on their way to it and back.
struct Line {
    server: ServerConnection,
    to_server: VecDeque<u8>,
    to_client: VecDeque<u8>,
    /// How much goes in or out at a time, before it would block once.
    step: usize,
    blocked: bool,
    heard: Vec<u8>,
}

impl Line {
    /// Has the server read what has come, and send what it has to say.
    fn turn(&mut self) {
        while !self.to_server.is_empty() {
            self.server.read_tls(&mut self.to_server).unwrap();
            self.server.process_new_packets().unwrap();
            let mut plain = [0; 4096];
            while let Ok(read @ 1..) = self.server.reader().read(&mut plain) {
                self.heard.extend_from_slice(&plain[..read]);
            }
        }
        while self.server.wants_write() {
            self.server.write_tls(&mut self.to_client).unwrap();
        }
    }

    fn would_block(&mut self) -> bool {
        self.blocked = !self.blocked;
        self.blocked
    }
}

impl Read for Line {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.turn();
        if self.to_client.is_empty() || self.would_block() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let step = self.step.min(buffer.len());
        self.to_client.read(&mut buffer[..step])
    }
}

impl Write for Line {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        if self.would_block() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let step = self.step.min(buffer.len());
        self.to_server.write(&buffer[..step])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn shaken(step: usize) -> TlsStream<Line> {
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().self_signed(&key).unwrap();
    let server = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], PrivateKeyDer::try_from(key.serialize_der()).unwrap())
        .unwrap();
    let settings = TlsSettings { danger_accept_any_certificate: true, ..TlsSettings::default() };
    let name = ServerName::try_from("localhost").unwrap();
    let session = ClientConnection::new(Arc::new(config(&settings).unwrap()), name).unwrap();
    let line = Line {
        server: ServerConnection::new(Arc::new(server)).unwrap(),
        to_server: VecDeque::new(),
        to_client: VecDeque::new(),
        step,
        blocked: false,
        heard: Vec::new(),
    };
    let mut stream = TlsStream::new(session, line);
    while stream.session.is_handshaking() || stream.session.wants_write() {
        match stream.session.complete_io(&mut stream.socket) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
    }
    stream
}

#[test]
fn what_is_said_to_be_written_has_gone_out_whole_and_once() {
    for step in [1, 7, 1000, usize::MAX] {
        let mut stream = shaken(step);
        let said: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
        let mut rest = said.as_slice();
        while !rest.is_empty() {
            // More joins what is offered, as it does with amiquip.
            let offered = rest.len().min(100_000);
            match stream.write(&rest[..offered]) {
                Ok(written) => {
                    assert!(!stream.session.wants_write(), "records are left, and nobody would ask for them");
                    rest = &rest[written..];
                }
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
        }
        stream.socket.turn();
        assert!(stream.socket.heard == said, "steps of {step}");
    }
}

#[test]
fn reading_goes_on_until_the_socket_would_block() {
    for step in [29, 1000, usize::MAX] {
        let mut stream = shaken(step);
        let said: Vec<u8> = (0..60_000_u32).map(|n| (n % 241) as u8).collect();
        stream.socket.server.writer().write_all(&said).unwrap();
        let mut heard = Vec::new();
        let mut buffer = [0; 4096];
        while heard.len() < said.len() {
            match stream.read(&mut buffer) {
                Ok(read) => heard.extend_from_slice(&buffer[..read]),
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
        }
        assert!(heard == said, "steps of {step}");
        stream.socket.server.send_close_notify();
        let end = loop {
            match stream.read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => break other.unwrap(),
            }
        };
        assert_eq!(end, 0);
    }
}
