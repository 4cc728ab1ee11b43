//! TLS: the right broker is believed, every other is not, and nothing of AMQP goes out in the clear.
//!
//! The certificates are made by the tests themselves.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use coney::testing::RabbitMq;
use coney::{App, ConnectError, Error};
use rcgen::date_time_ymd;

use crate::authority::Authority;
use crate::logs;
use crate::support::{PATIENCE, app, wait_until};

/// A node with a TLS port, its certificate from `authority`.
fn node(authority: &Authority, files: &(PathBuf, PathBuf), wants_certificate: bool) -> (RabbitMq, u16) {
    node_with(authority, files, wants_certificate, &[])
}

fn node_with(
    authority: &Authority,
    files: &(PathBuf, PathBuf),
    wants_certificate: bool,
    conf: &[&str],
) -> (RabbitMq, u16) {
    let builder = conf.iter().fold(RabbitMq::builder(), |builder, line| builder.conf(*line));
    let (builder, port) = authority.tls_port(builder, files);
    let node = builder.conf(format!("ssl_options.fail_if_no_peer_cert = {wants_certificate}")).start();
    (node.expect("a RabbitMQ node"), port)
}

/// What TLS has to say of it, with this in `[broker.tls]`.
fn with_tls(port: u16, tls: &str) -> App {
    app(&format!("amqps://127.0.0.1:{port}"), &format!("connect_timeout = \"10s\"\n[broker.tls]\n{tls}\n"))
}

fn ca(path: &Path) -> String {
    format!("ca_file = {:?}", path.display().to_string())
}

#[track_caller]
fn refused(app: &App) -> String {
    let start = Instant::now();
    match app.publish_pool().connection().unwrap_err() {
        Error::Connect { cause: ConnectError::Tls(why), .. } => {
            assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
            why
        }
        other => panic!("{other:?}"),
    }
}

/// Stands between client and node, and keeps what the client says.
struct Tap {
    port: u16,
    said: Arc<Mutex<Vec<u8>>>,
}

impl Tap {
    fn to(upstream: u16) -> Tap {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let said = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&said);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(("127.0.0.1", upstream)) else { return };
                let (back_from, back_to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                thread::spawn(move || relay(back_from, back_to, |_| {}));
                let heard = Arc::clone(&heard);
                thread::spawn(move || relay(client, server, |bytes| heard.lock().unwrap().extend_from_slice(bytes)));
            }
        });
        Tap { port, said }
    }

    fn has_heard(&self, text: &[u8]) -> bool {
        self.said.lock().unwrap().windows(text.len()).any(|window| window == text)
    }
}

fn relay(mut from: TcpStream, mut to: TcpStream, mut heard: impl FnMut(&[u8])) {
    let mut buffer = [0; 16 << 10];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        heard(&buffer[..read]);
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}

fn use_it(app: &App) {
    let publisher = app.publish_pool().connection().unwrap();
    let name = crate::support::queue(&publisher, "tls");
    // Larger than what any buffer on the way holds, and in many records.
    let large = vec![b'x'; 5 << 20];
    publisher.publish("", &name, large.clone()).unwrap();
    let sent = publisher.publish_batch((0..2_000).map(|n| ("", name.as_str(), format!("message {n}")))).unwrap();
    assert_eq!(sent, 2_000);
    let consumer = app.listen_pool().connection().unwrap();
    assert!(consumer.get_and_ack(&name).unwrap().unwrap().body() == large);
    drop(consumer);
    let listener = app.spawn_listener(&name, |_, _| ()).unwrap();
    wait_until("all are handled", || listener.stats().acked == 2_000);
    listener.stop().unwrap();
    publisher.queue_delete(&name).unwrap();
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn the_right_broker_is_believed_and_every_other_is_not() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let files = ours.sign_server(|_| {});
    let (_node, port) = node(&ours, &files, false);
    let tap = Tap::to(port);

    let app = with_tls(tap.port, &ca(&ours.ca_file()));
    use_it(&app);
    assert_eq!(
        app.publish_pool().settings().broker.masked_url(),
        format!("amqps://guest:***@127.0.0.1:{}/%2f", tap.port)
    );
    app.shutdown(Duration::from_secs(10)).unwrap();
    use_it(&with_tls(tap.port, &format!("{}\nserver_name = \"localhost\"", ca(&ours.ca_file()))));

    let why = refused(&with_tls(tap.port, &ca(&theirs.ca_file())));
    assert!(why.contains("was not issued by an authority in ca_file"), "{why}");
    // Nobody's system trusts it.
    let why = refused(&with_tls(tap.port, ""));
    assert!(why.contains("that this system trusts; set ca_file") || why.contains("system's store"), "{why}");
    let why = refused(&with_tls(tap.port, &format!("{}\nserver_name = \"elsewhere.example\"", ca(&ours.ca_file()))));
    assert!(why.contains("not valid for") && why.contains("elsewhere.example"), "{why}");
    let why = refused(&with_tls(tap.port, &ca(&ours.file("no-such.pem"))));
    assert!(why.contains("ca_file") && why.contains("no-such.pem"), "{why}");
    let why = refused(&with_tls(tap.port, &ca(&files.1)));
    assert!(why.contains("expected certificates in PEM"), "{why}");
    // Whoever asks for it in so many words gets it, and a warning each time.
    logs::keep();
    let careless = "danger_accept_any_certificate = true\nserver_name = \"careless.example\"";
    use_it(&with_tls(tap.port, careless));
    let warnings = logs::lines_with("TLS with careless.example is not verified");
    assert!(!warnings.is_empty() && warnings.iter().all(|line| line.level == log::Level::Warn), "{warnings:?}");

    for secret in [b"AMQP".as_slice(), b"PLAIN", b"guest", b"coney"] {
        assert!(!tap.has_heard(secret), "{} went out in the clear", String::from_utf8_lossy(secret));
    }
    assert_eq!(tap.said.lock().unwrap().first(), Some(&22), "a TLS handshake record");
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn an_expired_certificate_is_not_believed() {
    let ours = Authority::new("ours");
    let files = ours.sign_server(|params| {
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2021, 1, 1);
    });
    let (_node, port) = node(&ours, &files, false);
    let tap = Tap::to(port);
    let why = refused(&with_tls(tap.port, &ca(&ours.ca_file())));
    assert!(why.contains("has expired: it was valid until 2021-01-01T00:00:00Z"), "{why}");
    assert!(!tap.has_heard(b"AMQP"));
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn a_broker_that_wants_to_know_its_clients_gets_their_certificate() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let files = ours.sign_server(|_| {});
    let (_node, port) = node(&ours, &files, true);
    let pair = |(certificate, key): (PathBuf, PathBuf)| {
        format!(
            "{}\ncertificate_file = {:?}\nkey_file = {:?}",
            ca(&ours.ca_file()),
            certificate.display().to_string(),
            key.display().to_string()
        )
    };
    use_it(&with_tls(port, &pair(ours.sign("client", |_| {}))));
    for tls in [ca(&ours.ca_file()), pair(theirs.sign("client", |_| {}))] {
        let why = refused(&with_tls(port, &tls));
        assert!(why.contains("alert"), "{why}");
    }
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn a_client_certificate_is_all_that_external_needs() {
    let ours = Authority::new("ours");
    let files = ours.sign_server(|_| {});
    let (node, port) =
        node_with(&ours, &files, true, &["auth_mechanisms.1 = EXTERNAL", "ssl_cert_login_from = common_name"]);
    node.add_user("client", "unknown-to-us").unwrap();
    node.set_permissions("/", "client", ".*", ".*", ".*").unwrap();
    node.eval(
        "code:add_patha(filename:join([code:lib_dir(rabbit), \"..\", \"rabbitmq_auth_mechanism_ssl-\" ++ \
         rabbit_misc:version(), \"ebin\"])), ok = application:load(rabbitmq_auth_mechanism_ssl), \
         rabbit_boot_steps:run_boot_steps([rabbitmq_auth_mechanism_ssl]), ok = \
         application:start(rabbitmq_auth_mechanism_ssl).",
    )
    .unwrap();
    let (certificate, key) = ours.sign("client", |_| {});
    let tls = format!(
        "{}\ncertificate_file = {:?}\nkey_file = {:?}",
        ca(&ours.ca_file()),
        certificate.display().to_string(),
        key.display().to_string()
    );
    let external = app(
        &format!("amqps://127.0.0.1:{port}?auth_mechanism=external"),
        &format!("connect_timeout = \"10s\"\n[broker.tls]\n{tls}\n"),
    );
    use_it(&external);
    // This broker takes nothing else.
    let error = with_tls(port, &tls).publish_pool().connection().unwrap_err();
    assert!(error.to_string().contains("offers EXTERNAL; coney was to speak PLAIN"), "{error}");
}

#[test]
fn a_port_without_tls_is_recognised_and_a_silent_one_is_given_up() {
    let broker = coney::embedded::EmbeddedBroker::start().unwrap();
    let why = refused(&with_tls(broker.addr().port(), ""));
    assert!(why.contains("not TLS") || why.contains("system's store"), "{why}");

    let authority = Authority::new("ours");
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("amqps://127.0.0.1:{}", silent.local_addr().unwrap().port());
    let extra = format!("connect_timeout = \"300ms\"\n[broker.tls]\n{}", ca(&authority.ca_file()));
    let error = app(&url, &extra).publish_pool().connection_timeout(Duration::from_millis(400)).unwrap_err();
    let is_late = matches!(&error, Error::Connect { cause: ConnectError::Timeout { stage: "TLS handshake", .. }, .. });
    assert!(is_late, "{error}");
}
