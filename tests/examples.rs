//! The example programs, run as a newcomer runs them.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use coney::testing::RabbitMq;

fn example(name: &str) -> Command {
    // target/PROFILE/deps/this-test → target/PROFILE/examples/NAME
    let mut path: PathBuf = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    path.push("examples");
    path.push(name);
    assert!(path.exists(), "{} is not built; cargo test builds examples unless told otherwise", path.display());
    let mut command = Command::new(path);
    command.current_dir(env!("CARGO_MANIFEST_DIR")).env_remove("CONEY_PROFILE");
    command
}

fn texts(output: &Output) -> (String, String) {
    (String::from_utf8_lossy(&output.stdout).into_owned(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn quickstart_does_what_it_says() {
    let node = RabbitMq::start().expect("a RabbitMQ node");
    for _ in 0..2 {
        let output = example("quickstart").env("CONEY_BROKER__URL", node.url()).output().unwrap();
        let (stdout, stderr) = texts(&output);
        assert!(output.status.success(), "{stdout}{stderr}");
        for line in [
            "declared the topology of app.toml",
            "published 100 messages for user1 asynchronously",
            "listener1: Some(\"hello user1\") with routing key user1",
            "listener1: and 100 more",
            "listener2: [\"hello\", \"user2\"]",
            "done",
        ] {
            assert!(stdout.contains(line), "{line:?} is missing in:\n{stdout}");
        }
    }
}

#[test]
fn quickstart_without_a_broker_ends_in_time_with_one_readable_error() {
    // A loopback address where nothing listens.
    let nobody = "127.0.0.77:5672";
    let start = Instant::now();
    let output = example("quickstart")
        .env("CONEY_BROKER__URL", format!("amqp://guest:s3cret@{nobody}/%2f"))
        .env("CONEY_POOLS__PUBLISH__CHECKOUT_TIMEOUT", "500ms")
        .output()
        .unwrap();
    assert!(start.elapsed() < Duration::from_secs(20));
    let (stdout, stderr) = texts(&output);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!((stdout.as_str(), stderr.lines().count()), ("", 1), "{stderr}");
    assert!(stderr.contains("refused") && stderr.contains(&format!("guest:***@{nobody}")), "{stderr}");
    assert!(!stderr.contains("s3cret"));
}

#[test]
fn quickstart_names_every_mistake_of_its_settings() {
    let path = std::env::temp_dir().join(format!("coney-quickstart-{}.toml", std::process::id()));
    fs::write(&path, "[broker]\nheartbeat = \"0s\"\n[pools.publish]\nsize = 0\nsiez = 3\n").unwrap();
    let output = example("quickstart").arg(&path).output().unwrap();
    fs::remove_file(&path).unwrap();
    let (_, stderr) = texts(&output);
    assert_eq!(output.status.code(), Some(1));
    for mistake in ["broker.heartbeat", "pools.publish.size", "pools.publish.siez"] {
        assert!(stderr.contains(mistake), "{stderr}");
    }
}
