//! What a program meets when there is no broker, or something else in its place. Needs no RabbitMQ.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use coney::embedded::EmbeddedBroker;
use coney::{App, ConnectError, Error, Settings};

use crate::closed::{ClosedPort, closed_port};
use crate::support::app;

const PASSWORD: &str = "correct-horse-battery";

fn url_at(closed: &ClosedPort) -> String {
    format!("amqp://guest:{PASSWORD}@{closed}/%2f")
}

fn url(port: u16) -> String {
    format!("amqp://guest:{PASSWORD}@127.0.0.1:{port}/%2f")
}

/// A server that does `what` with each client, one after another, until the test is over.
fn server(what: impl Fn(TcpStream) + Send + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || listener.incoming().flatten().for_each(what));
    port
}

/// The error of a checkout with `timeout`, which must be back by then (with a generous margin) and tell no secret.
#[track_caller]
fn checkout_error(app: &App, timeout: Duration) -> Error {
    let start = Instant::now();
    let error = app.publish_pool().connection_timeout(timeout).expect_err("no broker is there");
    assert!(start.elapsed() < timeout + Duration::from_secs(5), "it took {:?}", start.elapsed());
    for text in [error.to_string(), format!("{error:?}"), format!("{app:?}")] {
        assert!(!text.contains(PASSWORD), "{text}");
    }
    error
}

fn cause(error: &Error) -> &ConnectError {
    match error {
        Error::Connect { cause, .. } => cause,
        other => panic!("unexpected: {other:?}"),
    }
}

#[test]
fn an_app_is_made_while_the_broker_is_down_and_the_checkout_says_why() {
    let closed = closed_port();
    let app = app(&url_at(&closed), "");
    let error = checkout_error(&app, Duration::from_millis(300));
    assert!(matches!(cause(&error), ConnectError::Io(io) if io.kind() == std::io::ErrorKind::ConnectionRefused));
    assert!(error.is_transient());
    let text = error.to_string();
    assert!(text.contains(&format!("amqp://guest:***@{closed}/%2f")), "{text}");
    assert!(text.contains("pool \"publish\"") && text.contains("refused"), "{text}");
    assert!(app.publish_pool().try_connection().is_none());
}

#[test]
fn a_silent_server_costs_no_more_than_connect_timeout_for_each_attempt() {
    let (keep, kept) = std::sync::mpsc::channel();
    let port = server(move |client| keep.send(client).unwrap_or(()));
    let app = app(&url(port), "connect_timeout = \"200ms\"");
    let error = checkout_error(&app, Duration::from_secs(1));
    assert!(matches!(cause(&error), ConnectError::Timeout { .. }), "{error}");
    assert!(kept.try_iter().count() >= 2, "it tried again");
    // A checkout with less time than one attempt has is over when its time is.
    checkout_error(&app, Duration::from_millis(50));
}

#[test]
fn a_dripping_server_is_held_to_the_whole_deadline() {
    let port = server(|mut client| {
        // The beginning of a believable connection.start, a byte at a time.
        for byte in [1, 0, 0, 0, 0, 1, 0, 0, 10, 0, 10, 0, 9].into_iter().chain(std::iter::repeat(0)) {
            if client.write_all(&[byte]).is_err() {
                return;
            }
            thread::park_timeout(Duration::from_millis(50));
        }
    });
    let app = app(&url(port), "connect_timeout = \"400ms\"");
    let error = checkout_error(&app, Duration::from_millis(500));
    assert!(matches!(cause(&error), ConnectError::Timeout { stage: "AMQP handshake", .. }), "{error}");
}

#[test]
fn what_is_no_amqp_port_is_recognised() {
    let answers: [(&'static [u8], &str); 5] = [
        (b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", "HTTP"),
        (b"AMQP\x03\x01\x00\x00", "the broker offers AMQP 3-1-0 instead of 0-0-9-1"),
        (b"AMQP", "the broker closed the socket"),
        (b"\x15\x03\x03\x00\x02\x02\x28", "not AMQP"),
        (b"", "closed the socket"),
    ];
    for (answer, says) in answers {
        let port = server(move |mut client| {
            let _ = client.read(&mut [0; 8]);
            let _ = client.write_all(answer);
        });
        let app = app(&url(port), "");
        let error = checkout_error(&app, Duration::from_millis(200));
        assert!(matches!(cause(&error), ConnectError::Handshake(_)), "{error:?}");
        assert!(error.to_string().contains(says), "{error}");
    }
}

#[test]
fn an_unknown_host_is_said_to_be_unknown() {
    let settings = Settings::from_url(&format!("amqp://guest:{PASSWORD}@no-such-host.invalid")).unwrap();
    let app = App::from_settings(settings).unwrap();
    let error = checkout_error(&app, Duration::from_secs(2));
    let cause = cause(&error);
    // A resolver without an upstream may also take its time.
    assert!(matches!(cause, ConnectError::Resolve(_) | ConnectError::Timeout { stage: "name resolution", .. }));
}

#[test]
fn those_who_wait_for_a_connection_that_cannot_be_made_get_the_cause() {
    let closed = closed_port();
    let app = app(&url_at(&closed), "[pools.publish]\nsize = 1");
    thread::scope(|scope| {
        let attempts: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| app.publish_pool().connection_timeout(Duration::from_millis(400)).map(drop)))
            .collect();
        for attempt in attempts {
            let error = attempt.join().unwrap().unwrap_err();
            assert!(matches!(error, Error::Connect { .. }), "not {error}");
        }
    });
    let status = app.publish_pool().status();
    assert_eq!((status.in_use, status.waiting, status.created), (0, 0, 0));
}

#[test]
fn closing_the_pool_ends_the_wait_for_a_broker() {
    let closed = closed_port();
    let app = app(&url_at(&closed), "");
    thread::scope(|scope| {
        let waiting = scope.spawn(|| app.publish_pool().connection_timeout(Duration::from_secs(60)).map(drop));
        crate::support::wait_until("it is trying", || app.publish_pool().status().in_use == 1);
        let start = Instant::now();
        app.shutdown(Duration::from_secs(30)).unwrap();
        assert!(matches!(waiting.join().unwrap(), Err(Error::PoolClosed { .. })));
        assert!(start.elapsed() < Duration::from_secs(20));
    });
    assert!(matches!(app.listen_pool().connection(), Err(Error::PoolClosed { .. })));
}

#[test]
fn an_unknown_pool_is_answered_with_the_known_ones() {
    let closed = closed_port();
    let app = app(&url_at(&closed), "[pools.audit]\nsize = 1");
    match app.pool("audti").unwrap_err() {
        Error::UnknownPool { name, known } => {
            assert_eq!((name.as_str(), known), ("audti", vec!["audit".into(), "listen".into(), "publish".into()]));
        }
        other => panic!("unexpected: {other}"),
    }
    assert_eq!(app.pool("audit").unwrap().status().size, 1);
}

#[test]
fn several_hosts_are_all_tried() {
    let (seen, visits) = std::sync::mpsc::channel();
    let ports = [0, 1, 2].map(|n| {
        let seen = seen.clone();
        server(move |_| seen.send(n).unwrap_or(()))
    });
    let hosts = ports.map(|port| format!("\"127.0.0.1:{port}\"")).join(", ");
    let settings = Settings::from_toml(&format!("[broker]\nhosts = [{hosts}]")).unwrap();
    let app = App::from_settings(settings).unwrap();
    checkout_error(&app, Duration::from_millis(100));
    let mut visited: Vec<i32> = visits.try_iter().collect();
    visited.sort();
    visited.dedup();
    assert_eq!(visited, [0, 1, 2]);
}

/// Several nodes, of which one has other users, as a cluster that is put together anew may have.
#[test]
fn a_refusal_counts_once_all_hosts_have_been_tried_and_each_is_named() {
    let known =
        EmbeddedBroker::builder().user("app", PASSWORD).permissions("app", "/", ".*", ".*", ".*").start().unwrap();
    let strange = EmbeddedBroker::start().unwrap();
    let closed = closed_port();
    let at = |hosts: &[String]| {
        let settings = format!("user = \"app\"\npassword = \"{PASSWORD}\"\nhosts = {hosts:?}");
        let settings = format!("[broker]\n{settings}\n[pools.publish]\ncheckout_timeout = \"500ms\"");
        App::from_settings(Settings::from_toml(&settings).unwrap()).unwrap()
    };
    let [good, bad, nobody] = [known.addr().to_string(), strange.addr().to_string(), closed.to_string()];
    for _ in 0..40 {
        at(&[good.clone(), bad.clone()]).publish_pool().connection().unwrap();
    }
    let error =
        at(&[bad.clone(), strange.addr().to_string().replace("127.0.0.1", "localhost")]).publish_pool().connection();
    let error = error.map(drop).unwrap_err();
    assert!(matches!(cause(&error), ConnectError::Hosts(hosts) if hosts.len() == 2), "{error}");
    assert!(
        error.to_string().matches("refused user \"app\"").count() == 2 && error.to_string().contains(&bad),
        "{error}"
    );
    assert!(!error.is_transient() && error.code() == Some(403));
    // One that is not there may come back and know us.
    let error = at(&[bad, nobody.clone()]).publish_pool().connection().map(drop).unwrap_err();
    assert!(error.is_transient() && error.to_string().contains(&nobody), "{error}");
}
