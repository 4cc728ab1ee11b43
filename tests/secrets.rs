//! A password put wherever one can be: no Debug, Display, error chain or log line of ours shows it.
//!
//! What is wrong in settings files and URLs is tested beside the settings. Here it is a program at work, with everything
//! it logs at the finest level. A test binary of its own, since a process has one log.

mod closed;

use std::error::Error as _;
use std::fmt::Debug;
use std::sync::Mutex;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use coney::bus::Bus;
use coney::embedded::EmbeddedBroker;
use coney::rpc::{RpcClient, RpcWorker};
use coney::worker::{ConnectionParameters, QueueWorker};
use coney::{AmqpUrl, App, Error, Pool, PoolSettings, Queue, Secret, Settings};
use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::closed::closed_port;

/// Nothing else in this program has these letters in it. As it is in a URL it has an escape.
const PASSWORD: &str = "hunter2@correct";
const IN_A_URL: &str = "hunter2%40correct";
/// Both forms, and whatever half of it may be cut off.
const TELLTALE: [&str; 2] = ["hunter2", "correct"];

static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Keeps what this crate logs, and what amiquip does, which is not told any credentials.
struct Ours;

impl Log for Ours {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        ["coney", "amiquip"].iter().any(|target| metadata.target().starts_with(target))
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let line = format!("{} {} {}", record.level(), record.target(), record.args());
            LINES.lock().unwrap().push(line);
        }
    }

    fn flush(&self) {}
}

#[track_caller]
fn clean(what: &str, text: &str) {
    for part in TELLTALE {
        assert!(!text.contains(part), "{what} shows the password: {text}");
    }
}

#[track_caller]
fn shows_nothing(what: &str, value: &impl Debug) {
    clean(what, &format!("{value:?} {value:#?}"));
}

#[track_caller]
fn says_nothing(what: &str, error: &Error) {
    shows_nothing(what, error);
    clean(what, &error.to_string());
    let mut source = error.source();
    while let Some(error) = source {
        clean(what, &format!("{error} {error:?}"));
        source = error.source();
    }
}

fn settings(url: &str) -> Settings {
    let text = format!(
        r#"
        [broker]
        url = "{url}"
        connect_timeout = "300ms"
        [pools.publish]
        checkout_timeout = "300ms"
        [pools.listen]
        checkout_timeout = "300ms"
        [pools.audit]
        hosts = ["127.0.0.1:1"]
        user = "app"
        password = "{PASSWORD}"
        checkout_timeout = "300ms"
        [profiles.test.broker]
        password = "{PASSWORD}"
        "#
    );
    Settings::loader().text(text).profile("test").environment([("CONEY_BROKER__PASSWORD", PASSWORD)]).load().unwrap()
}

#[test]
fn nothing_shows_a_password() {
    log::set_logger(&Ours).unwrap();
    log::set_max_level(LevelFilter::Trace);

    let builder = EmbeddedBroker::builder().user("app", PASSWORD).permissions("app", "/", ".*", ".*", ".*");
    shows_nothing("the builder of a broker", &builder);
    let broker = builder.start().unwrap();
    shows_nothing("a broker", &broker);
    shows_nothing("its control", &broker.control());
    let addr = broker.addr();
    let closed = closed_port();

    let url = format!("amqp://app:{IN_A_URL}@{addr}");
    values(&url);
    a_program_at_work(&broker, &url);
    what_does_not_connect(&format!("amqp://nobody:{IN_A_URL}@{addr}"));
    what_does_not_connect(&format!("amqp://app:{IN_A_URL}@{addr}/no-such-vhost"));
    what_does_not_connect(&format!("amqp://app:{IN_A_URL}@{closed}"));
    what_does_not_connect(&format!("amqp://app:{IN_A_URL}@no-such-host.invalid"));
    let refused = Bus::connect(&format!("amqp://nobody:{IN_A_URL}@{addr}")).unwrap_err();
    says_nothing("a bus in vain", &refused);
    shows_nothing("a bus", &Bus::connect(&url).unwrap());
    workers(&broker);

    drop(broker);
    let lines = LINES.lock().unwrap();
    let (events, logged): (Vec<&String>, Vec<&String>) = lines.iter().partition(|line| line.starts_with("event "));
    for event in ["ConnectionOpened", "ConnectFailed", "ListenerRecovering", "PublishFailed"] {
        assert!(events.iter().any(|line| line.contains(event)), "no {event}: {events:#?}");
    }
    assert!(logged.iter().any(|line| line.contains("connected to")), "nothing was logged: {lines:#?}");
    assert!(lines.iter().any(|line| line.starts_with(Level::Warn.as_str())), "no warning was logged: {lines:#?}");
    for line in &*lines {
        clean("a log line", line);
    }
}

fn values(url: &str) {
    let parsed = AmqpUrl::parse(url).unwrap();
    assert_eq!(parsed.password().expose(), PASSWORD);
    shows_nothing("a URL", &parsed);
    clean("a URL", &parsed.to_string());
    shows_nothing("a secret", &Secret::new(PASSWORD));
    let settings = settings(url);
    shows_nothing("settings", &settings);
    shows_nothing("settings of a pool", &settings.pools["audit"]);
    clean("a masked URL", &settings.pools["publish"].broker.masked_url());
    shows_nothing("settings from a URL", &PoolSettings::new(parsed.into()));
}

/// An app whose events are among the lines.
fn watched(url: &str) -> App {
    let app = App::from_settings(settings(url)).unwrap();
    app.on_event(|event| LINES.lock().unwrap().push(format!("event {event} {event:?} {event:#?}"))).unwrap();
    app
}

fn a_program_at_work(broker: &EmbeddedBroker, url: &str) {
    let app = watched(url);
    shows_nothing("an app", &app);
    let pool = app.publish_pool();
    let connection = pool.connection().unwrap();
    shows_nothing("a guard", &connection);
    shows_nothing("a connection", &*connection);
    shows_nothing("a pool's status", &pool.status());
    connection.queue_declare(&Queue::new("work")).unwrap();
    says_nothing("a refusal", &connection.publish("missing", "k", "x").unwrap_err());
    let (seen, sees) = mpsc::channel();
    let listener = app.spawn_listener("work", move |_, _| seen.send(()).unwrap()).unwrap();
    shows_nothing("a listener", &listener);
    pool.publish("", "work", "x").unwrap();
    sees.recv_timeout(Duration::from_secs(30)).unwrap();

    // Lost and refused, so that it has something to say.
    broker.control().refuse_connections(true);
    broker.control().drop_connections();
    let error = pool.publish_timeout("", "work", "x", Duration::from_millis(300)).unwrap_err();
    says_nothing("a publish in vain", &error);
    let deadline = Instant::now() + Duration::from_secs(30);
    while !matches!(listener.state(), coney::ListenerState::Recovering { .. }) && Instant::now() < deadline {
        std::thread::park_timeout(Duration::from_millis(5));
    }
    shows_nothing("a listener that recovers", &listener.state());
    says_nothing("a lost connection", &connection.publish("", "work", "x").unwrap_err());
    broker.control().refuse_connections(false);
    listener.stop().unwrap();
    drop(connection);
    says_nothing("an unknown pool", &app.pool("other").unwrap_err());
    app.shutdown(Duration::from_secs(10)).unwrap();
    says_nothing("a closed pool", &app.publish_pool().connection().unwrap_err());
}

fn what_does_not_connect(url: &str) {
    let app = watched(url);
    for pool in app.pools() {
        let error = pool.connection().unwrap_err();
        says_nothing("a checkout in vain", &error);
        clean("a pool's name", pool.name());
    }
    says_nothing("a declaration in vain", &app.declare_topology().err().unwrap_or(Error::NothingToConsume));
    let listener = app.listener("q").in_background().spawn(|_, _| ()).unwrap();
    shows_nothing("a listener in vain", &listener);
    listener.stop().unwrap();
    let alone = Pool::new("alone", PoolSettings::new(AmqpUrl::parse(url).unwrap().into())).unwrap();
    shows_nothing("a pool alone", &alone);
}

fn workers(broker: &EmbeddedBroker) {
    let parameters = ConnectionParameters {
        host: "127.0.0.1".to_owned(),
        port: broker.addr().port(),
        user: "app".to_owned(),
        password: PASSWORD.into(),
    };
    shows_nothing("connection parameters", &parameters);
    let worker = QueueWorker::of_parameters(&parameters).unwrap().route("jobs", |_: String| ());
    shows_nothing("a worker", &worker);
    let worker = worker.run().unwrap();
    let rpc = RpcWorker::of_parameters(&parameters).unwrap().route("square", |n: i64| Ok::<_, String>(n * n));
    shows_nothing("an RPC worker", &rpc);
    let rpc = rpc.run().unwrap();
    let client = RpcClient::of_pool(&parameters.pool("calls").unwrap()).unwrap();
    shows_nothing("an RPC client", &client);
    assert_eq!(client.call::<_, i64>("square", &7).unwrap(), 49);
    says_nothing("a call in vain", &client.call::<_, i64>("no-such-queue", &7).unwrap_err());
    client.close();
    rpc.stop().unwrap();
    worker.stop().unwrap();

    let wrong = ConnectionParameters { user: "somebody".to_owned(), ..parameters };
    let worker = QueueWorker::of_parameters(&wrong).unwrap().connect_attempts(2, Duration::from_millis(10));
    says_nothing("a worker in vain", &worker.route("jobs", |_: String| ()).run().unwrap_err());
}
