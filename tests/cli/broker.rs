//! `coney broker`.

use std::io::{BufRead, BufReader};
use std::process::{ExitStatus, Stdio};

use coney::{App, Error, Queue, Settings};
use rustix::process::Signal;

use crate::program::{Program, coney};

/// A broker that has said it is ready, and where.
struct Running {
    program: Program,
    addresses: Vec<String>,
}

impl Running {
    fn start(arguments: &[&str]) -> Running {
        let mut program = Program::spawn(coney().arg("broker").args(arguments).stdout(Stdio::piped()));
        let mut line = String::new();
        BufReader::new(program.0.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let addresses = line.strip_prefix("coney: broker ready on ").unwrap_or_else(|| panic!("{line:?}"));
        let addresses = addresses.trim_end().split(" and ").map(str::to_owned).collect();
        Running { program, addresses }
    }

    fn app(&self, user_and_password: &str, vhost: &str) -> App {
        let url = format!("amqp://{user_and_password}@{}/{vhost}", self.addresses[0]);
        App::from_settings(Settings::from_url(&url).unwrap()).unwrap()
    }

    fn end(mut self, signal: Signal) -> ExitStatus {
        self.program.signal(signal);
        self.program.wait()
    }
}

#[test]
fn quorum_queues_are_refused_unless_they_are_allowed() {
    for (arguments, allowed) in
        [(&["--listen", "127.0.0.1:0"][..], false), (&["--listen", "127.0.0.1:0", "--quorum-queues"], true)]
    {
        let broker = Running::start(arguments);
        let app = broker.app("guest:guest", "%2f");
        let connection = app.publish_pool().connection().unwrap();
        let declared = connection.queue_declare(&Queue::new("q").quorum());
        match declared {
            Ok(_) => assert!(allowed),
            Err(error) => {
                assert!(!allowed && error.to_string().contains("unsupported queue type 'quorum'"), "{error}");
            }
        }
        broker.end(Signal::TERM);
    }
}

#[test]
fn the_broker_serves_on_every_address_and_ends_on_a_signal() {
    let broker = Running::start(&["--listen", "127.0.0.1:0", "--listen", "[::1]:0"]);
    assert_eq!(broker.addresses.len(), 2);
    let app = broker.app("guest:guest", "%2f");
    let connection = app.publish_pool().connection().unwrap();
    connection.queue_declare(&Queue::new("q")).unwrap();
    connection.publish("", "q", "over IPv4").unwrap();
    let url = format!("amqp://{}", broker.addresses[1]);
    let other = App::from_settings(Settings::from_url(&url).unwrap()).unwrap();
    let received = other.listen_pool().connection().unwrap().get_and_ack("q").unwrap().expect("a message");
    assert_eq!(received.body(), b"over IPv4");
    assert!(broker.end(Signal::TERM).success(), "with clients connected");

    assert!(Running::start(&["--listen", "127.0.0.1:0"]).end(Signal::INT).success());
}

#[test]
fn a_configuration_file_gives_virtual_hosts_users_and_limits() {
    let path = std::env::temp_dir().join(format!("coney-broker-{}.toml", std::process::id()));
    let text = r#"
        vhosts = ["orders"]
        [limits]
        max_message_size = 1000
        heartbeat = "5s"
        [users.app]
        password = "s3cret"
        permissions."orders" = { configure = "^app\\.", write = ".*", read = ".*" }
    "#;
    std::fs::write(&path, text).unwrap();
    let broker = Running::start(&["--listen", "127.0.0.1:0", "--config", path.to_str().unwrap()]);
    std::fs::remove_file(&path).unwrap();

    let refused = |user: &str, vhost: &str| broker.app(user, vhost).publish_pool().connection().map(drop).unwrap_err();
    assert_eq!(refused("guest:guest", "orders").code(), Some(403), "with users in the file there is no guest");
    assert_eq!(refused("app:s3cret", "%2f").code(), Some(530));
    let app = broker.app("app:s3cret", "orders");
    let connection = app.publish_pool().connection().unwrap();
    connection.queue_declare(&Queue::new("app.in")).unwrap();
    assert_eq!(connection.queue_declare(&Queue::new("other")).map(drop).unwrap_err().code(), Some(403));
    connection.publish("", "app.in", vec![0; 1000]).unwrap();
    let error = connection.publish("", "app.in", vec![0; 1001]).unwrap_err();
    assert!(matches!(error, Error::ChannelClosed { code: 406, .. }), "{error}");
    assert!(broker.end(Signal::TERM).success());
}

#[test]
fn the_broker_is_the_release_that_the_command_line_or_the_file_says_or_else_4() {
    let path = std::env::temp_dir().join(format!("coney-release-{}.toml", std::process::id()));
    std::fs::write(&path, "release = \"3.10\"").unwrap();
    let file = path.to_str().unwrap();
    for (arguments, is_4) in [
        (&[][..], true),
        (&["--release", "3.10"], false),
        (&["--release", "4.0"], true),
        (&["--config", file], false),
        (&["--config", file, "--release", "4.0"], true),
    ] {
        let broker = Running::start(&[&["--listen", "127.0.0.1:0"][..], arguments].concat());
        let app = broker.app("guest:guest", "%2f");
        let connection = app.publish_pool().connection().unwrap();
        let queue = Queue::new("q").argument("x-queue-leader-locator", "balanced");
        assert_eq!(connection.queue_declare(&queue).is_ok(), is_4, "{arguments:?}");
        broker.end(Signal::TERM);
    }
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn mistakes_are_told_in_one_line_without_passwords() {
    let path = std::env::temp_dir().join(format!("coney-mistake-{}.toml", std::process::id()));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let file = path.to_str().unwrap();
    let table: [(&[&str], &str, i32, &str); 18] = [
        (&["--listen", "nonsense"], "", 2, "--listen"),
        (&["--release", "4"], "", 2, "\"4\" is no release of the broker, expected 3.10 or 4.0"),
        (&["--config", file], "release = \"s3cret\"", 1, "line 1: expected a release, \"3.10\" or \"4.0\""),
        (&["--listen", "0.0.0.0:0"], "", 1, "not loopback"),
        (&["--listen", &taken], "", 1, "another program has the port; --listen 127.0.0.1:"),
        (&["--config", "/no/such/file"], "", 1, "/no/such/file: No such file"),
        (&["--config", file], "[users.app]\npasswort = \"s3cret\"", 1, "line 2: unknown field `passwort`"),
        (&["--config", file], "[users]\napp = \"s3cret\"", 1, "line 2: expected struct User"),
        (&["--config", file], "[users.app]\npassword = [\"s3cret\"]", 1, "line 2: expected a string"),
        (&["--config", file], "[limits]\nheartbeat = \"s3cret\"", 1, "line 2: expected a duration"),
        (&["--config", file], "[limits]\nheartbeat = \"65536s\"", 1, "heartbeat: 65536 s, expected at most 65535 s"),
        (&["--config", file], "[limits]\nhandshake_timeout = \"0s\"", 1, "handshake_timeout: zero, expected a longer"),
        (&["--config", file], "[limits]\nconsumer_timeout = \"0s\"", 1, "consumer_timeout: zero, expected a longer"),
        (&["--config", file], "[limits]\nchannel_max = 0", 1, "channel_max: 0, expected at least 1"),
        (&["--config", file], "vhosts = [\"\"]", 1, "virtual host \"\": the name has 0 bytes, expected 1 to 255"),
        (&["--config", file], "[users.app]\npassword = \"\"", 1, "password of user \"app\": blank"),
        (
            &["--config", file],
            "[users.app]\npassword = \"s3cret\"\npermissions.\"order\" = { configure = \"\", write = \"\", read = \"\" }",
            1,
            "permissions of user \"app\": there is no virtual host \"order\"",
        ),
        (
            &["--config", file],
            "[users.app]\npassword = \"s3cret\"\npermissions.\"/\" = { configure = \"(\", write = \"\", read = \"\" }",
            1,
            "permissions of user \"app\": ",
        ),
    ];
    for (arguments, text, code, part) in table {
        std::fs::write(&path, text).unwrap();
        let output = coney().arg("broker").args(arguments).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {stderr}");
        assert!(stderr.contains(part) && !stderr.contains("s3cret"), "{arguments:?}: {stderr}");
        assert!(code == 2 || stderr.lines().count() == 1, "{stderr}");
    }
    std::fs::remove_file(&path).unwrap();
}
