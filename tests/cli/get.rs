//! `coney get`: nothing is lost that has not been printed.

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

use coney::{Connection, Message, Queue};
use rustix::process::Signal;

use crate::contract;
use crate::program::{Program, coney, run, run_read, run_redirected, run_unread, settings};
use crate::raw::Raw;
use crate::support::{Broker, bodies, drain, queue, unique, wait_until};

contract!(
    nothing_in_a_message_is_a_command_to_a_terminal,
    messages_are_printed_and_then_acked,
    looking_at_messages_changes_nothing,
    rejected_messages_are_dead_lettered,
    a_reader_that_has_gone_loses_nothing,
    what_a_reader_has_not_read_goes_back,
    a_stdout_that_takes_nothing_loses_nothing,
    a_body_is_written_as_it_is,
    a_queue_that_is_not_there_is_told,
    a_message_that_is_to_come_is_waited_for,
);

fn fill(connection: &Connection, queue: &str) {
    for body in ["one", "two", "three"] {
        connection.publish("", queue, body).unwrap();
    }
}

fn messages_are_printed_and_then_acked(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (queue, url) = (queue(&connection, "get"), broker.url());
    fill(&connection, &queue);
    connection.publish("", &queue, vec![0xff, 0]).unwrap();
    assert_eq!(run(&["get", &queue, "--url", &url]).well().text(), "one\n");
    assert_eq!(run(&["get", &queue, "--count", "2", "--url", &url]).well().text(), "two\nthree\n");
    assert_eq!(run(&["get", &queue, "--all", "--url", &url]).well().stdout, b"\xff\0\n");
    run(&["get", &queue, "--url", &url]).failed(6, &["has no message"]);
    assert_eq!(run(&["get", &queue, "--all", "--url", &url]).well().text(), "", "all of none");
}

fn looking_at_messages_changes_nothing(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (queue, url) = (queue(&connection, "look"), broker.url());
    fill(&connection, &queue);
    // More than once: what comes back redelivered is not to be given up for it.
    for _ in 0..3 {
        let ran = run(&["get", &queue, "--all", "--requeue", "--url", &url]).well();
        assert_eq!(ran.text(), "one\ntwo\nthree\n");
    }
    assert_eq!(bodies(&drain(&connection, &queue)), ["one", "two", "three"]);
}

fn rejected_messages_are_dead_lettered(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (to, url) = (queue(&connection, "to"), broker.url());
    let from = unique("from");
    let dead_lettering = Queue::new(&from).dead_letter_exchange("").dead_letter_routing_key(&to);
    connection.queue_declare(&dead_lettering).unwrap();
    fill(&connection, &from);
    run(&["get", &from, "--all", "--reject", "--url", &url]).well();
    wait_until("all are dead-lettered", || broker.queue_len(&to) == 3);
    assert_eq!(broker.queue_len(&from), 0);
}

fn a_reader_that_has_gone_loses_nothing(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (queue, url) = (queue(&connection, "unread"), broker.url());
    fill(&connection, &queue);
    for arguments in
        [&["--all"][..], &["--count", "2", "--json-lines"], &["--all", "--requeue"], &["--all", "--reject"]]
    {
        run_unread(&[&["get", &queue, "--url", &url], arguments].concat())
            .failed(7, &["the reader of stdout has gone", "back in its queue"]);
        assert_eq!(broker.queue_len(&queue), 3, "{arguments:?}");
    }
    assert_eq!(bodies(&drain(&connection, &queue)), ["one", "two", "three"]);
}

fn what_a_reader_has_not_read_goes_back(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (queue, url) = (queue(&connection, "half-read"), broker.url());
    fill(&connection, &queue);
    let (ran, read) = run_read(&["get", &queue, "--all", "--url", &url], 4);
    ran.failed(7, &["the reader of stdout has gone"]);
    assert_eq!(read, b"one\n");
    wait_until("the others are back", || broker.queue_len(&queue) == 2);
    let (ran, read) = run_read(&["get", &queue, "--count", "2", "--url", &url], 10);
    assert_eq!((ran.well().code, read), (Some(0), b"two\nthree\n".to_vec()));
}

fn a_stdout_that_takes_nothing_loses_nothing(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (queue, url) = (queue(&connection, "nowhere"), broker.url());
    fill(&connection, &queue);
    for arguments in [&[][..], &["--all"], &["--raw"], &["--all", "--json-lines"], &["--requeue"], &["--reject"]] {
        let arguments = [&["get", &queue, "--url", &url], arguments].concat();
        for redirection in [">&-", "1</dev/null"] {
            run_redirected(&arguments, redirection).failed(1, &["stdout is closed"]);
        }
        run_redirected(&arguments, "> /dev/full").failed(1, &["cannot write to stdout: No space left", "is back"]);
        wait_until("all are back", || broker.queue_len(&queue) == 3);
    }
    run_redirected(&["get", &queue, "--all", "--url", &url], "> /dev/null").well();
    assert_eq!(broker.queue_len(&queue), 0, "to throw them away is a choice");
}

fn a_body_is_written_as_it_is(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (queue, url) = (queue(&connection, "raw"), broker.url());
    let directory = settings("");
    let file = directory.path().join("body");
    for body in [&b""[..], b"no end", b"an end\n", b"\r\n\0\xff\x1b[2J\n\n"] {
        std::fs::write(&file, body).unwrap();
        run(&["publish", "", &queue, "--file", file.to_str().unwrap(), "--url", &url]).well();
        assert_eq!(run(&["get", &queue, "--raw", "--url", &url]).well().stdout, body);
    }
    fill(&connection, &queue);
    assert_eq!(run(&["get", &queue, "--raw", "--all", "--url", &url]).well().text(), "onetwothree");
    assert_eq!(run(&["get", &queue, "--raw", "--json-lines", "--url", &url]).code, Some(2));
}

fn a_queue_that_is_not_there_is_told(broker: Broker) {
    let queue = unique("no-queue");
    let words = format!("404 NOT_FOUND - no queue '{queue}'");
    run(&["get", &queue, "--url", &broker.url()]).failed(1, &[&words, "topology apply"]);
}

fn a_message_that_is_to_come_is_waited_for(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (queue, url) = (queue(&connection, "wait"), broker.url());
    let getting = std::thread::spawn({
        let queue = queue.clone();
        move || run(&["get", &queue, "--wait", "30s", "--url", &url])
    });
    wait_until("somebody waits", || broker.consumers_of(&queue).len() == 1);
    connection.publish("", &queue, "late").unwrap();
    assert_eq!(getting.join().unwrap().well().text(), "late\n");
    assert_eq!(broker.queue_len(&queue), 0);
}

/// Characters that do something to a terminal or to a log: C0, DEL, C1 with CSI, ends of lines, and what turns the writing.
const EVIL: &str =
    "\u{1b}[2J \u{7f} \u{85}\u{9b}2J\u{9f} \u{202a}\u{202e} \u{2066}\u{2069} \u{200e}\u{200f}\u{61c} \u{2028}\u{2029}";

fn is_harmless(text: &str) -> bool {
    let leads = |one: char| {
        one.is_control() && one != '\n'
            || EVIL.contains(one) && !one.is_ascii()
            || ('\u{202a}'..='\u{202e}').contains(&one)
            || ('\u{2066}'..='\u{2069}').contains(&one)
    };
    !text.contains(leads)
}

fn nothing_in_a_message_is_a_command_to_a_terminal(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (name, url) = (format!("{} {EVIL}", unique("evil")), broker.url());
    let dead = format!("{name}.dead");
    for queue in [&name, &dead] {
        connection.queue_declare(&Queue::new(queue)).unwrap();
    }
    let message = Message::new(EVIL)
        .with_header(EVIL, EVIL)
        .with_header("coney-error", EVIL)
        .with_header("coney-exchange", EVIL)
        .with_content_type(EVIL)
        .with_app_id(EVIL);
    for queue in [&name, &dead] {
        connection.publish("", queue, message.clone()).unwrap();
    }
    let commands = [
        &["get", &name, "--requeue", "--json-lines"][..],
        &["listen", &name, "--count", "1", "--json-lines"],
        &["dead", "list", &name, "--json-lines"],
        &["dead", "list", &name],
        &["queue", "list", &name, "--json-lines"],
        &["queue", "list", &name],
        &["queue", "declare", &name],
        &["queue", "purge", &name, "--yes"],
        &["bind", &name, "amq.topic", EVIL],
        &["dead", "drop", &name, "--yes"],
        &["queue", "delete", &name],
    ];
    for command in commands {
        let ran = run(&[command, &["--url", &url]].concat()).well();
        assert!(is_harmless(ran.text()), "{command:?}: {:?}", ran.text());
        let of_name = |json: serde_json::Value| json["body"] == EVIL || json["queue"] == name.as_str();
        if command.contains(&"--json-lines") {
            assert!(ran.json().into_iter().all(of_name), "it says the same: {}", ran.text());
        } else {
            assert!(command[0] == "dead" && command[1] == "list" || ran.lines().len() <= 2, "{}", ran.text());
        }
    }
    // The same where something is wrong.
    for command in [&["get", &name][..], &["queue", "purge", &name], &["publish", EVIL, EVIL, "b"]] {
        let ran = run(&[command, &["--url", &url]].concat());
        assert!(ran.code != Some(0) && is_harmless(&ran.stderr) && is_harmless(ran.text()), "{command:?}: {ran:?}");
        assert_eq!(ran.stderr.lines().count(), 1, "{ran:?}");
    }
    run(&["queue", "delete", &dead, "--yes", "--url", &url]);
}

#[test]
fn a_line_of_a_log_is_one_line_whatever_clients_call_themselves() {
    let mut command = coney();
    command.args(["broker", "--listen", "127.0.0.1:0", "--log", "info"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut broker = Program::spawn(&mut command);
    let mut ready = String::new();
    BufReader::new(broker.0.stdout.take().unwrap()).read_line(&mut ready).unwrap();
    let address = ready.trim_end().strip_prefix("coney: broker ready on ").unwrap();
    let mut client = Raw::open_named(address.parse().unwrap(), &format!("evil\n[ERROR coney] {EVIL}"));
    // A method that is cut short.
    client.say(7, (60, 40), &[]);
    assert_eq!(client.refused(), 501);
    broker.signal(Signal::TERM);
    let mut log = String::new();
    broker.0.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    let lines: Vec<&str> = log.lines().collect();
    assert!(is_harmless(&log) && lines.iter().all(|line| !line.starts_with("[ERROR")), "{log}");
    assert!(lines.iter().any(|line| line.contains("closing") && line.contains("evil")), "{log}");
}
