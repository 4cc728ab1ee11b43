//! The example programs, run as a newcomer runs them.

mod closed;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use coney::embedded::EmbeddedBroker;
use coney::testing::RabbitMq;
use coney::{App, Message, Queue, Settings};
use rustix::process::{Pid, Signal, kill_process};

use crate::closed::closed_port;

/// How long a program may take that is to end.
const PATIENCE: Duration = Duration::from_secs(30);

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

/// Runs quickstart twice, since what it declares may be there already.
fn quickstart_does_what_it_says(url: Option<&str>) {
    for _ in 0..2 {
        let mut quickstart = example("quickstart");
        if let Some(url) = url {
            quickstart.env("CONEY_BROKER__URL", url);
        }
        let output = quickstart.output().unwrap();
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
fn quickstart_runs_with_nothing_installed() {
    quickstart_does_what_it_says(None);
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn quickstart_runs_on_rabbitmq() {
    let node = RabbitMq::start().expect("a RabbitMQ node");
    quickstart_does_what_it_says(Some(&node.url()));
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn stream_replay_reads_everything_twice_on_rabbitmq() {
    let node = RabbitMq::start().expect("a RabbitMQ node");
    stream_replay_does_what_it_says(&node.url());
}

#[test]
fn stream_replay_reads_everything_twice() {
    let broker = coney::embedded::EmbeddedBroker::start().unwrap();
    stream_replay_does_what_it_says(&broker.url());
}

fn stream_replay_does_what_it_says(url: &str) {
    for (run, last) in [(1, 99), (2, 199)] {
        let output = example("stream_replay").args(["--url", url]).output().unwrap();
        let (stdout, stderr) = texts(&output);
        assert!(output.status.success(), "{stdout}{stderr}");
        for time in ["once", "twice"] {
            let expected = format!(
                "read it {time}: {} messages, from offset 0, \"message 1\", to offset {last}, \"message 100\"",
                100 * run
            );
            assert!(stdout.contains(&expected), "{expected:?} is missing in:\n{stdout}");
        }
    }
}

#[test]
fn stream_replay_says_how_it_is_called() {
    let output = example("stream_replay").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(texts(&output).1.contains("usage: stream_replay --url URL"));
}

#[test]
fn paused_loses_nothing_while_its_database_is_away() {
    let output = example("paused").output().unwrap();
    let (stdout, stderr) = texts(&output);
    assert!(output.status.success(), "{stdout}{stderr}");
    for line in [
        "5 orders are stored",
        "the listener rests: 5 of 10 messages within 1m failed, the last because of: the database does not answer",
        "the listener still rests: the message that was tried failed: the database does not answer",
        "25 orders are stored, 0 were given up",
    ] {
        assert!(stdout.contains(line), "{line:?} is missing in:\n{stdout}");
    }
}

#[test]
fn quickstart_without_a_broker_ends_in_time_with_one_readable_error() {
    let nobody = closed_port();
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

fn end_of(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("it did not end in {PATIENCE:?}");
        }
        thread::park_timeout(Duration::from_millis(10));
    }
}

fn app_on(node: &RabbitMq) -> App {
    App::from_settings(Settings::from_toml(&format!("[broker]\nurl = {:?}", node.url())).unwrap()).unwrap()
}

/// The home of the node that `program` has started, as the node sees it, and how many processes live there.
fn node_of(program: &Child) -> (String, usize) {
    let environments = || {
        let entries = fs::read_dir("/proc").unwrap().flatten();
        entries.filter_map(|entry| Some((entry.path(), fs::read(entry.path().join("environ")).ok()?)))
    };
    let home = environments().find_map(|(process, environment)| {
        let status = fs::read_to_string(process.join("status")).ok()?;
        let is_child = status.lines().any(|line| line == format!("PPid:\t{}", program.id()));
        let home = environment.split(|byte| *byte == 0).find_map(|one| one.strip_prefix(b"HOME="))?;
        let home = String::from_utf8_lossy(home).into_owned();
        (is_child && home.contains("coney-rabbitmq")).then_some(home)
    });
    let home = home.expect("a node");
    (home.clone(), living_in(&home))
}

fn living_in(home: &str) -> usize {
    let environments = fs::read_dir("/proc").unwrap().flatten().filter_map(|e| fs::read(e.path().join("environ")).ok());
    environments.filter(|environment| environment.windows(home.len()).any(|part| part == home.as_bytes())).count()
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn a_node_ends_with_a_program_that_is_killed() {
    let mut program = example("rabbitmq").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut url = String::new();
    BufReader::new(program.stdout.take().unwrap()).read_line(&mut url).unwrap();
    let (home, processes) = node_of(&program);
    assert!(processes >= 2, "the node and its name server: {processes}");
    let root = std::env::var_os("CONEY_RABBITMQ").map(PathBuf::from).filter(|path| path.is_dir());
    let outside = root.unwrap_or_else(|| "/".into()).join(&home[1..]);
    assert!(outside.is_dir(), "{}", outside.display());
    program.kill().unwrap();
    program.wait().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while living_in(&home) > 0 || outside.exists() {
        assert!(
            Instant::now() < deadline,
            "{} processes, and {}: {}",
            living_in(&home),
            outside.display(),
            outside.exists()
        );
        thread::park_timeout(Duration::from_millis(10));
    }
    let port = url.trim().rsplit(':').next().and_then(|rest| rest.split('/').next()).unwrap().parse::<u16>().unwrap();
    std::net::TcpStream::connect(("127.0.0.1", port)).map(drop).unwrap_err();
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn listen_told_to_end_among_a_thousand_deliveries_loses_none_and_leaves_none_unsettled() {
    const MESSAGES: usize = 1000;
    let node = RabbitMq::start().expect("a RabbitMQ node");
    let app = app_on(&node);
    let connection = app.publish_pool().connection().unwrap();
    connection.queue_declare(&Queue::new("many")).unwrap();
    // Long bodies, so that the pipe to this test is full long before the queue is empty.
    let bodies = (0..MESSAGES).map(|n| ("", "many", Message::new(format!("{n} {:1000}", ""))));
    connection.publish_batch(bodies).unwrap();

    let mut child = example("listen")
        .arg("many")
        .env("CONEY_BROKER__URL", node.url())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let number = |line: String| -> usize {
        line.strip_prefix("[many] ").and_then(|body| body.split(' ').next()).unwrap().parse().unwrap()
    };
    let mut printed: Vec<usize> = lines.by_ref().take(100).map(|line| number(line.unwrap())).collect();
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    printed.extend(lines.map(|line| number(line.unwrap())));
    assert!(end_of(&mut child).success());

    assert!((100..MESSAGES).contains(&printed.len()), "{} printed", printed.len());
    assert_eq!(node.queue_unacked("many").unwrap(), 0);
    let mut rest = Vec::new();
    while let Some(received) = connection.get_and_ack("many").unwrap() {
        rest.push(received.message().text().unwrap().split(' ').next().unwrap().parse().unwrap());
    }
    assert_eq!(printed.len() + rest.len(), MESSAGES, "each is printed or still there, and not both");
    assert_eq!(printed.into_iter().chain(rest).collect::<BTreeSet<usize>>(), (0..MESSAGES).collect());
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn listen_declares_what_it_is_told_and_survives_a_restart_of_the_broker() {
    let node = RabbitMq::start().expect("a RabbitMQ node");
    let mut child = example("listen")
        .args(["room", "lobby", "user1"])
        .env("CONEY_BROKER__URL", node.url())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (line, lines) = mpsc::channel();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    let reader = thread::spawn(move || stdout.lines().for_each(|text| line.send(text.unwrap()).unwrap()));
    // The exchange is there once the example has declared it; until then the publish is refused.
    let publish = |node: &RabbitMq, text: &str| {
        let app = app_on(node);
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = app.publish_pool().connection().and_then(|c| c.publish("lobby", "user1", text)) {
            assert!(Instant::now() < deadline, "{error}");
            thread::park_timeout(Duration::from_millis(50));
        }
    };
    publish(&node, "before");
    assert_eq!(lines.recv_timeout(PATIENCE).unwrap(), "[user1] before");
    node.restart().unwrap();
    publish(&node, "after");
    assert_eq!(lines.recv_timeout(PATIENCE).unwrap(), "[user1] after");
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert!(end_of(&mut child).success());
    reader.join().unwrap();
    assert!(node.consumers().unwrap().is_empty());
}

#[test]
fn what_is_of_use_beside_another_program_says_when_nobody_else_sees_its_broker() {
    let alone = "memory:// is a broker of this process alone; for two programs: ";
    let output = example("rpc_client").args(["a-route", "hello"]).output().unwrap();
    let (_, stderr) = texts(&output);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr.starts_with(alone), "{stderr}");
    for (name, arguments) in [("rpc_worker", &[][..]), ("queue_worker", &[]), ("listen", &["a-queue"])] {
        let mut command = example(name);
        command.args(arguments).env("RUST_LOG", "off").stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with(alone), "{name}: {line}");
        // Whether it watches signals already is not known.
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

#[test]
fn two_examples_meet_at_a_broker() {
    let broker = EmbeddedBroker::start().unwrap();
    let mut command = example("rpc_worker");
    command.env("CONEY_BROKER__URL", broker.url()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut worker = command.spawn().unwrap();
    broker.control().wait_for_consumers("a-route", 1, PATIENCE).unwrap();
    let output =
        example("rpc_client").args(["a-route", "hello"]).env("CONEY_BROKER__URL", broker.url()).output().unwrap();
    assert_eq!(texts(&output), ("data received hello\n".to_owned(), String::new()));
    kill_process(Pid::from_child(&worker), Signal::TERM).unwrap();
    assert!(end_of(&mut worker).success());
}

#[test]
fn options_that_are_not_known_are_refused() {
    for arguments in [&["--evry", "5"][..], &["--every", "soon"], &["--url"], &["5"]] {
        let output = example("hello").args(arguments).output().unwrap();
        let (_, stderr) = texts(&output);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {stderr}");
        assert!(stderr.ends_with("\nusage: hello [--url URL] [--every MILLISECONDS]\n"), "{stderr}");
    }
    let output = example("hello").arg("--help").output().unwrap();
    assert!(output.status.success() && texts(&output).0.starts_with("usage: hello"));
}

#[test]
fn listen_says_how_it_is_used() {
    let output = example("listen").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(texts(&output).1, "usage: listen QUEUE [EXCHANGE KEY]\n");
}

/// An example that is running, and the lines it prints.
struct Running {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Running {
    fn start(name: &str, arguments: &[&str]) -> Running {
        let mut command = example(name);
        let mut child = command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (line, lines) = mpsc::channel();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        // Ends with the program's output.
        thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|text| line.send(text)));
        Running { child, lines }
    }

    /// Reads on until `expected` is printed.
    #[track_caller]
    fn prints(&self, expected: &str) {
        let deadline = Instant::now() + PATIENCE;
        let mut printed = Vec::new();
        while printed.last().map(String::as_str) != Some(expected) {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => printed.push(line),
                Err(_) => panic!("{expected:?} is not in {printed:#?}"),
            }
        }
    }

    fn types(&mut self, text: &str) {
        self.child.stdin.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Ended already, where the test has got that far.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn the_in2com_pair_talks(url: &str) {
    let loud = Running::start("loud", &["--url", url, "--every", "50"]);
    let hello = Running::start("hello", &["--url", url, "--every", "50"]);
    loud.prints("HELLO WORLD!");
    let tick = hello.lines.recv_timeout(PATIENCE).unwrap();
    assert!(tick.starts_with("tick "), "{tick}");
}

fn the_chat_reaches_everybody_and_is_left_with_goodbye(url: &str) {
    let mut listeners: Vec<Running> = (0..2).map(|_| Running::start("chat_listen", &["--url", url])).collect();
    for listener in &listeners {
        listener.prints("Listening. Ctrl-C leaves.");
    }
    let mut ada = Running::start("chat_send", &["--url", url]);
    ada.types("Ada\nhello\n\n  is anybody there?  \n");
    let mut bob = Running::start("chat_send", &["--url", url]);
    bob.types("Bob\nquit\nthis is not sent\n");
    for listener in &listeners {
        listener.prints("[Ada] hello");
        listener.prints("[Ada] is anybody there?");
    }
    bob.prints("Goodbye!");
    assert!(end_of(&mut bob.child).success());
    // The end of the input leaves too.
    drop(ada.child.stdin.take());
    ada.prints("Goodbye!");
    assert!(end_of(&mut ada.child).success());
    for listener in &mut listeners {
        kill_process(Pid::from_child(&listener.child), Signal::INT).unwrap();
        listener.prints("Goodbye!");
        assert!(end_of(&mut listener.child).success());
    }
}

fn one_process_is_enough_for_the_others(url: &str) {
    let output = example("chat_queue").args(["--url", url]).output().unwrap();
    let (stdout, stderr) = texts(&output);
    assert!(output.status.success(), "{stdout}{stderr}");
    for text in ["hello?", "is anybody there?", "it echoes", "half of it"] {
        assert_eq!(stdout.matches(text).count(), 1, "{text:?} is read once:\n{stdout}");
    }
    let output = example("in2com").args(["--url", url, "--for", "2"]).output().unwrap();
    let (stdout, stderr) = texts(&output);
    assert!(output.status.success(), "{stdout}{stderr}");
    for line in ["HELLO WORLD!", "tick 1", "tick 2"] {
        assert!(stdout.lines().any(|printed| printed == line), "{line:?} is missing in:\n{stdout}");
    }
}

#[test]
fn the_bus_and_the_chat_on_the_embedded_broker() {
    let broker = EmbeddedBroker::start().unwrap();
    the_in2com_pair_talks(&broker.url());
    the_chat_reaches_everybody_and_is_left_with_goodbye(&broker.url());
    one_process_is_enough_for_the_others("memory://");
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn the_bus_and_the_chat_on_rabbitmq() {
    let node = RabbitMq::start().expect("a RabbitMQ node");
    the_in2com_pair_talks(&node.url());
    the_chat_reaches_everybody_and_is_left_with_goodbye(&node.url());
    one_process_is_enough_for_the_others(&node.url());
}

#[test]
fn without_a_broker_they_end_with_one_line() {
    let nobody = closed_port();
    for name in ["hello", "loud", "chat_listen", "chat_send"] {
        let url = format!("amqp://guest:s3cret@{nobody}?connection_timeout=200");
        let output = example(name).args(["--url", &url]).env("RUST_LOG", "off").output().unwrap();
        let (stdout, stderr) = texts(&output);
        assert_eq!(
            (output.status.code(), stdout.as_str(), stderr.lines().count()),
            (Some(1), "", 1),
            "{name}: {stderr}"
        );
        assert!(stderr.starts_with(&format!("{name}: ")) && !stderr.contains("s3cret"), "{stderr}");
    }
}
