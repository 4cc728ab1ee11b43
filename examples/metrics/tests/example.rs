//! The example, run as a newcomer runs it.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How long it may take with anything.
const PATIENCE: Duration = Duration::from_secs(30);

struct Running {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Running {
    /// In the root of the repository, where its app.toml is.
    fn start() -> Running {
        let mut command = Command::new(env!("CARGO_BIN_EXE_coney-metrics"));
        command
            .arg("127.0.0.1:0")
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
            .env_remove("CONEY_PROFILE");
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Running { child, stdout }
    }

    fn end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it did not end in {PATIENCE:?}");
            thread::park_timeout(Duration::from_millis(10));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Ended already, where the test has got that far.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Status and body of a page.
fn page(address: &str, path: &str) -> (String, String) {
    let mut client = std::net::TcpStream::connect(address).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(client, "GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n").unwrap();
    let answer = std::io::read_to_string(client).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().to_owned(), body.to_owned())
}

#[test]
fn metrics_are_served_as_prometheus_reads_them_and_probes_are_answered() {
    let mut metrics = Running::start();
    let mut line = String::new();
    metrics.stdout.read_line(&mut line).unwrap();
    let address = line.trim_end().strip_prefix("http://").unwrap().strip_suffix("/metrics").unwrap();
    let deadline = Instant::now() + PATIENCE;
    let acked = "coney_outcomes_total{listener=\"metrics-example\",queue=\"metrics-example\",outcome=\"acked\"}";
    let text = loop {
        let (status, text) = page(address, "/metrics");
        assert_eq!(status, "200");
        let count = text.lines().find_map(|line| line.strip_prefix(acked)?.trim().parse::<f64>().ok());
        if count.is_some_and(|count| count >= 3.0) {
            break text;
        }
        assert!(Instant::now() < deadline, "{acked} is {count:?}: {text}");
        thread::park_timeout(Duration::from_millis(20));
    };
    for expected in [
        "# TYPE coney_publish_total counter",
        "coney_publish_total{pool=\"publish\",outcome=\"nacked\"} 0",
        "# TYPE coney_pool_in_use gauge",
        "# HELP coney_confirm_seconds From the writing of a message",
        "coney_confirm_seconds_count{pool=\"publish\"}",
        "coney_listener_consuming{listener=\"metrics-example\"} 1",
    ] {
        assert!(text.contains(expected), "{expected} is missing in {text}");
    }
    let (status, line) = page(address, "/ready");
    assert!(status == "200" && line.starts_with("ready; pool \"publish\": "), "{status} {line}");
    assert_eq!(page(address, "/live").0, "200");
    assert_eq!(page(address, "/").0, "404");
    kill_process(Pid::from_child(&metrics.child), Signal::TERM).unwrap();
    assert!(metrics.end().success());
}
