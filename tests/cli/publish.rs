//! `coney publish`, and what comes of its messages.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::Stdio;
use std::time::{Duration, Instant};

use coney::{FieldTable, FieldValue, Message, Queue};
use rustix::process::Signal;

use crate::contract;
use crate::program::{Program, coney, feed, run, run_with, settings};
use crate::support::{Broker, bodies, drain, queue, unique, wait_until};

contract!(
    a_message_is_what_the_arguments_say,
    each_line_of_stdin_is_a_message,
    ends_of_lines_are_not_part_of_the_messages,
    a_file_is_a_body,
    every_line_that_is_not_confirmed_is_told_with_its_number,
    a_missing_exchange_loses_no_line_silently,
    a_refused_line_costs_no_line_behind_it,
    what_no_broker_would_take_is_told_of_its_line_alone,
    a_queue_that_is_not_there_is_told_once,
    a_reason_is_told_though_lines_go_on_coming,
    what_get_prints_comes_back_the_same,
    options_count_for_more_than_the_lines,
    a_lost_connection_is_replaced,
    a_refused_login_is_told_without_the_password,
);

fn a_message_is_what_the_arguments_say(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let queue = queue(&connection, "publish");
    let options = [
        ["--content-type", "text/x"],
        ["--content-encoding", "none"],
        ["--header", "text=a=b"],
        ["--header", "typed:={\"$u8\": 7}"],
        ["--priority", "3"],
        ["--expiration", "1m"],
        ["--message-id", "m"],
        ["--correlation-id", "c"],
        ["--reply-to", "r"],
        ["--type", "t"],
        ["--app-id", "a"],
    ];
    let url = broker.url();
    let arguments = ["publish", "", &queue, "hello", "--url", &url, "--transient"];
    run(&[&arguments, options.as_flattened()].concat()).well();
    let expected = Message::new("hello")
        .with_content_type("text/x")
        .with_content_encoding("none")
        .with_header("text", "a=b")
        .with_header("typed", 7_u8)
        .with_priority(3)
        .with_expiration(Duration::from_secs(60))
        .with_message_id("m")
        .with_correlation_id("c")
        .with_reply_to("r")
        .with_kind("t")
        .with_app_id("a")
        .transient();
    assert_eq!(connection.get_and_ack(&queue).unwrap().unwrap().into_message(), expected);

    run(&["publish", "", &queue, "plain", "--url", &url]).well();
    assert_eq!(connection.get_and_ack(&queue).unwrap().unwrap().into_message(), Message::new("plain"));
}

fn each_line_of_stdin_is_a_message(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let queue = queue(&connection, "lines");
    let expected: Vec<String> = (0..2000).map(|number| format!("line {number}")).collect();
    // The last line has no end.
    feed(&["publish", "", &queue, "--url", &broker.url()], expected.join("\n").as_bytes()).well();
    assert_eq!(bodies(&drain(&connection, &queue)), expected);
}

fn ends_of_lines_are_not_part_of_the_messages(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (queue, url) = (queue(&connection, "crlf"), broker.url());
    let lines = b"one\r\n\r\ntwo\r\r\nthree\nfour\r";
    feed(&["publish", "", &queue, "--crlf", "--url", &url], lines).well();
    assert_eq!(bodies(&drain(&connection, &queue)), ["one", "", "two\r", "three", "four"]);
    feed(&["publish", "", &queue, "--url", &url], b"one\r\n").well();
    assert_eq!(bodies(&drain(&connection, &queue)), ["one\r"], "it says so in its help");
    let line = format!("{{\"exchange\":\"\",\"routing_key\":{queue:?},\"body\":\"b\"}}\r\n\r\n");
    feed(&["publish", "--json-lines", "--url", &url], line.as_bytes()).well();
    assert_eq!(bodies(&drain(&connection, &queue)), ["b"]);
}

fn a_file_is_a_body(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let queue = queue(&connection, "file");
    let directory = settings("two\nlines");
    let path = directory.path().join("app.toml");
    run(&["publish", "", &queue, "--file", path.to_str().unwrap(), "--url", &broker.url()]).well();
    feed(&["publish", "", &queue, "--file", "-", "--url", &broker.url()], b"\0\xff\n").well();
    let got: Vec<Vec<u8>> = drain(&connection, &queue).into_iter().map(|one| one.into_message().into_body()).collect();
    assert_eq!(got, [&b"two\nlines"[..], b"\0\xff\n"]);
    run(&["publish", "", &queue, "--file", "/no/such/file", "--url", &broker.url()])
        .failed(1, &["/no/such/file: No such"]);
}

fn every_line_that_is_not_confirmed_is_told_with_its_number(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let queue = queue(&connection, "told");
    let good = |body: &str| format!(r#"{{"exchange":"","routing_key":"{queue}","body":"{body}"}}"#);
    let lines = [
        good("one"),
        "not json".to_owned(),
        r#"{"routing_key":"k","body":"b"}"#.to_owned(),
        String::new(),
        r#"{"exchange":"","routing_key":"no such queue","body":"b"}"#.to_owned(),
        good("two").replace("body", "bodi"),
        good("three").replace("body", "body_base64"),
        good("four").replace(r#""body""#, r#""headers":{"h":{"$i8":300}},"body""#),
        good("five"),
    ];
    let ran = feed(&["publish", "--json-lines", "--url", &broker.url()], lines.join("\n").as_bytes());
    assert_eq!(ran.code, Some(1));
    let mut told: Vec<&str> = ran.stderr.lines().collect();
    // An answer of the broker comes when it comes.
    told.sort_unstable();
    let expected = [
        "6 of 9 lines were not confirmed",
        "line 2: not a message in JSON: expected ident, at column 2",
        "line 3: expected an exchange",
        "line 5: message to exchange \"\" with routing key \"no such queue\" was returned: 312 NO_ROUTE; there is no queue \"no such queue\"; `coney queue declare 'no such queue'`",
        "line 6: not a message in JSON: unknown field `bodi`",
        "line 7: body_base64: not base64",
        "line 8: headers: h: $i8",
    ];
    assert_eq!(told.len(), expected.len(), "{told:#?}");
    for (told, expected) in told.iter().zip(expected) {
        assert!(told.starts_with(&format!("coney: {expected}")), "{told:?} is not {expected:?}");
    }
    assert_eq!(bodies(&drain(&connection, &queue)), ["one", "five"]);
}

/// The lines of stdin that a line on stderr is about.
fn lines_told(told: &str) -> Vec<u64> {
    let told = told.strip_prefix("coney: ").unwrap();
    let told = told.split_once(" not confirmed; ").map_or(told, |(_, only)| only);
    let Some(ranges) = told.strip_prefix("lines ").or(told.strip_prefix("line ")) else { return Vec::new() };
    let ranges = ranges.split_once(": ").unwrap().0.split(", ");
    ranges
        .flat_map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            first.parse().unwrap()..=last.parse::<u64>().unwrap()
        })
        .collect()
}

fn a_queue_that_is_not_there_is_told_once(broker: Broker) {
    let (queue, url) = (unique("numbers"), broker.url());
    let lines: String = (1..=1000).map(|number| format!("{number}\n")).collect();
    let ran = feed(&["publish", "", &queue, "--url", &url], lines.as_bytes());
    let hint = format!("there is no queue {queue:?}; `coney queue declare {queue}` makes it");
    ran.failed(1, &["1000 of 1000 lines were not confirmed; lines 1-1000: ", "312 NO_ROUTE", &hint]);
    run(&["queue", "declare", &queue, "--url", &url]).well();
    feed(&["publish", "", &queue, "--url", &url], lines.as_bytes()).well();
    assert_eq!(broker.queue_len(&queue), 1000);

    let ran = feed(&["publish", "amq.topic", &queue, "--url", &url], b"one\n");
    let hint = format!("`coney bind QUEUE amq.topic {queue}`");
    ran.failed(1, &["1 of 1 line was not confirmed; line 1: ", &hint, "--no-mandatory"]);
}

fn a_reason_is_told_though_lines_go_on_coming(broker: Broker) {
    let queue = unique("typed");
    let mut command = coney();
    command.args(["publish", "", &queue, "--url", &broker.url()]).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut program = Program::spawn(&mut command);
    let mut stdin = program.0.stdin.take().unwrap();
    stdin.write_all(b"one\ntwo\n").unwrap();
    let mut line = String::new();
    let mut stderr = BufReader::new(program.0.stderr.take().unwrap());
    stderr.read_line(&mut line).unwrap();
    assert!(line.starts_with("coney: lines 1-2: message to exchange "), "{line}");
    stdin.write_all(b"three\n").unwrap();
    drop(stdin);
    let mut rest = String::new();
    stderr.read_to_string(&mut rest).unwrap();
    let rest: Vec<&str> = rest.lines().collect();
    assert!(rest[0].starts_with("coney: line 3: ") && rest.len() == 2, "{rest:?}");
    assert_eq!(rest[1], "coney: 3 of 3 lines were not confirmed");
    assert_eq!(program.wait().code(), Some(1));
}

fn a_missing_exchange_loses_no_line_silently(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let queue = queue(&connection, "missing");
    let exchange = unique("no-exchange");
    let mut lines = String::new();
    for number in 0..1000 {
        let (exchange, key) = if number == 500 { (exchange.as_str(), "k") } else { ("", queue.as_str()) };
        lines += &format!("{{\"exchange\":\"{exchange}\",\"routing_key\":\"{key}\",\"body\":\"{number}\"}}\n");
    }
    let ran = feed(&["publish", "--json-lines", "--url", &broker.url()], lines.as_bytes());
    assert_eq!(ran.code, Some(1));
    // The broker answers by closing the channel: whatever was under way then may have arrived or not, and is told of.
    let lines: Vec<u64> = ran.stderr.lines().flat_map(lines_told).collect();
    let told = |number: usize| lines.contains(&(number as u64 + 1));
    assert!(told(500) && ran.stderr.contains(&format!("404 NOT_FOUND - no exchange '{exchange}'")), "{}", ran.stderr);
    let arrived = bodies(&drain(&connection, &queue));
    let lost: Vec<usize> =
        (0..1000).filter(|number| !told(*number) && !arrived.contains(&number.to_string())).collect();
    assert!(lost.is_empty(), "lost without a word: {lost:?}");
}

fn a_refused_line_costs_no_line_behind_it(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let exchange = unique("no-exchange");
    // The broker closes the channel for some of them, in words of its own.
    let bad = |number: u64, queue: &str| match number {
        3000 | 3003 | 9000 => format!(r#"{{"exchange":"{exchange}","routing_key":"k","body":"{number}"}}"#),
        6000 => format!(
            r#"{{"exchange":"","routing_key":"{queue}","body":"{number}","properties":{{"user_id":"somebody"}}}}"#
        ),
        _ => format!(r#"{{"exchange":"","routing_key":"{queue}","body":"{number}"}}"#),
    };
    let queue = queue(&connection, "behind");
    let lines: String = (1..=10_000).map(|number| bad(number, &queue) + "\n").collect();
    let ran = feed(&["publish", "--json-lines", "--url", &broker.url()], lines.as_bytes());
    assert_eq!(ran.code, Some(1), "{ran:?}");
    let told: Vec<u64> = ran.stderr.lines().flat_map(lines_told).collect();
    let mut arrived: Vec<u64> = bodies(&drain(&connection, &queue)).iter().map(|body| body.parse().unwrap()).collect();
    arrived.sort_unstable();
    assert!(arrived.windows(2).all(|pair| pair[0] < pair[1]), "none has come twice");
    for refused in [3000, 3003, 6000, 9000] {
        assert!(told.contains(&refused) && arrived.binary_search(&refused).is_err(), "{refused}: {ran:?}");
    }
    for number in &told {
        // Those in front of a refused one may have arrived, without a confirm.
        let reason = ran.stderr.lines().find(|line| lines_told(line).contains(number)).unwrap();
        let refused = [3000, 3003, 6000, 9000].contains(number);
        assert!(refused != reason.contains("closed the channel for line"), "{number}: {reason}");
    }
    let lost: Vec<u64> =
        (1..=10_000).filter(|number| !told.contains(number) && arrived.binary_search(number).is_err()).collect();
    assert!(lost.is_empty(), "lost without a word: {lost:?}");
}

fn what_no_broker_would_take_is_told_of_its_line_alone(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (queue, url) = (queue(&connection, "refused"), broker.url());
    let mut lines: Vec<String> = (1..=1000).map(|number| format!(r#"{{"body":"{number}"}}"#)).collect();
    lines[499] = r#"{"body":"b","properties":{"expiration":99999999999999}}"#.to_owned();
    lines[599] = r#"{"body":"b","headers":{"CC":"copy"}}"#.to_owned();
    lines[699] = r#"{"body":"b","properties":{"reply_to":"amq.rabbitmq.reply-to"}}"#.to_owned();
    let ran = feed(&["publish", "", &queue, "--json-lines", "--url", &url], lines.join("\n").as_bytes());
    let mut told: Vec<&str> = ran.stderr.lines().collect();
    told.sort_unstable();
    assert_eq!((ran.code, told.len()), (Some(1), 4), "{told:#?}");
    let expected = [
        ("3 of 1000 lines were not confirmed", ""),
        ("line 500: ", "expiration"),
        ("line 600: ", "header CC"),
        ("line 700: ", "reply_to"),
    ];
    for (told, (line, word)) in told.iter().zip(expected) {
        assert!(told.starts_with(&format!("coney: {line}")) && told.contains(word), "{told}");
    }
    assert_eq!(broker.queue_len(&queue), 997);
    // The same for plain lines and for a message alone.
    for stdin in [&b"one\ntwo\n"[..], b""] {
        let body = if stdin.is_empty() { &["body"][..] } else { &[] };
        let arguments = [&["publish", "", &queue][..], body, &["--expiration", "11y", "--url", &url]].concat();
        let ran = feed(&arguments, stdin);
        assert!(ran.code == Some(1) && ran.stderr.contains("expected 0 to 315360000000 milliseconds"), "{ran:?}");
    }
}

/// One of each type.
fn all_headers() -> FieldTable {
    let values = [
        FieldValue::Bool(true),
        FieldValue::I8(-8),
        FieldValue::U8(8),
        FieldValue::I16(-16),
        FieldValue::U16(16),
        FieldValue::I32(-32),
        FieldValue::U32(32),
        FieldValue::I64(i64::MIN),
        FieldValue::I64((1 << 53) + 1),
        FieldValue::F64(3.0),
        FieldValue::Timestamp(u64::MAX),
        FieldValue::F32(0.1),
        FieldValue::F64(0.1 + 0.2),
        FieldValue::Decimal { scale: 2, value: 314 },
        FieldValue::String("text ☃".to_owned()),
        FieldValue::Bytes(vec![0, 255]),
        FieldValue::Timestamp(1_700_000_000),
        FieldValue::Array(vec![FieldValue::I8(1), FieldValue::Void]),
        FieldValue::Table(FieldTable::from([("$i8".to_owned(), FieldValue::Bool(false))])),
        FieldValue::Void,
    ];
    values.into_iter().enumerate().map(|(number, value)| (format!("h{number:02}"), value)).collect()
}

fn what_get_prints_comes_back_the_same(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let queue = queue(&connection, "round-trip");
    let url = broker.url();
    let whole = Message::new(vec![0, 159, 146, 150, b'\n', 255])
        .with_headers(all_headers())
        .with_content_type("application/octet-stream")
        .with_content_encoding("none")
        .with_priority(255)
        .with_expiration(Duration::from_millis(3_600_001))
        .with_timestamp(std::time::UNIX_EPOCH + Duration::from_secs(1_700_000_000))
        .with_message_id("m")
        .with_correlation_id("c")
        .with_reply_to("r")
        .with_kind("t")
        .with_user_id("guest")
        .with_app_id("a")
        .with_cluster_id("cluster")
        .transient();
    let sent = [whole, Message::new(""), Message::new("two\nlines\0\"\\\u{1b}")];
    for message in &sent {
        connection.publish("", &queue, message.clone()).unwrap();
    }
    let printed = run(&["get", &queue, "--all", "--json-lines", "--url", &url]).well();
    assert_eq!(printed.lines().len(), sent.len());
    assert!(connection.get(&queue).unwrap().is_none());
    feed(&["publish", "--json-lines", "--url", &url], &printed.stdout).well();
    let got: Vec<Message> = drain(&connection, &queue).into_iter().map(|one| one.into_message()).collect();
    assert_eq!(got, sent);
}

fn options_count_for_more_than_the_lines(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let queue = queue(&connection, "options");
    let line =
        br#"{"exchange":"nowhere","routing_key":"x","body":"b","headers":{"a":1,"b":2},"properties":{"type":"t"}}"#;
    let arguments =
        ["publish", "", &queue, "--json-lines", "--header", "b=other", "--type", "u", "--url", &broker.url()];
    feed(&arguments, line).well();
    let expected = Message::new("b").with_header("a", 1_i64).with_header("b", "other").with_kind("u");
    assert_eq!(connection.get_and_ack(&queue).unwrap().unwrap().into_message(), expected);
}

fn a_lost_connection_is_replaced(broker: Broker) {
    let hurt = broker.hurt();
    let queue = unique("lost");
    let connection = hurt.app("").publish_pool().connection().unwrap();
    connection.queue_declare(&Queue::new(&queue)).unwrap();
    drop(connection);
    let url = hurt.url();
    let (mut program, mut stdin, _) = Program::talk(&["publish", "", &queue, "--url", &url, "--log", "off"]);
    stdin.write_all(b"before\n").unwrap();
    wait_until("the first line is there", || hurt.queue_len(&queue) == 1);
    hurt.close_all_connections("test");
    // A line that crosses the end of the connection may be lost with it, and is told of then.
    wait_until("a later line is there", || {
        stdin.write_all(b"after\n").unwrap();
        hurt.queue_len(&queue) > 1
    });
    drop(stdin);
    assert!(matches!(program.wait().code(), Some(0 | 1)));
}

fn a_refused_login_is_told_without_the_password(broker: Broker) {
    let url = broker.url_with("guest:s3cret", "%2f");
    let ran = run(&["publish", "", "q", "b", "--url", &url]);
    let ran = ran.failed(5, &["guest:***@", "refused user \"guest\"", "check user and password"]);
    assert!(!ran.stderr.contains("s3cret"));
    let url = broker.url_with("guest", "%2f");
    let mut command = coney();
    command.args(["publish", "", "q", "b", "--url", &url, "--no-mandatory"]).env("CONEY_BROKER__PASSWORD", "s3cret");
    run_with(&mut command, b"").failed(5, &["refused user"]);
    run_with(command.env("CONEY_BROKER__PASSWORD", "guest"), b"").well();
}

#[test]
fn an_unreachable_broker_is_told_at_once() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = format!("amqp://a:s3cret@{free}");
    let commands = [
        &["publish", "", "q", "body"][..],
        &["publish", "", "q"],
        &["get", "q"],
        &["listen", "q"],
        &["dead", "list", "q"],
        &["bench"],
    ];
    for command in commands {
        let since = Instant::now();
        let ran = run(&[command, &["--url", &url]].concat()).failed(5, &["a:***@", "refused", "coney broker"]);
        assert!(!ran.stderr.contains("s3cret"));
        // A pool goes on trying for ten seconds where nobody waits for the answer.
        assert!(since.elapsed() < Duration::from_secs(8), "{command:?} took {:?}", since.elapsed());
    }
}

#[test]
fn an_interrupted_publish_sends_what_it_has_read() {
    let broker = Broker::Embedded;
    let connection = broker.app("").publish_pool().connection().unwrap();
    let queue = queue(&connection, "interrupted");
    let (mut program, mut stdin, _) = Program::talk(&["publish", "", &queue, "--url", &broker.url()]);
    stdin.write_all(b"one\n").unwrap();
    wait_until("the line is there", || broker.queue_len(&queue) == 1);
    program.signal(Signal::INT);
    assert_eq!(program.wait().code(), Some(1), "with stdin still open");
}

#[test]
fn arguments_that_make_no_sense_are_refused() {
    for arguments in [
        &["publish"][..],
        &["publish", "e"],
        &["publish", "e", "k", "b", "--file", "f"],
        &["publish", "e", "k", "--header", "x"],
        &["publish", "e", "k", "--header", "x:={"],
        &["publish", "e", "k", "--priority", "256"],
        &["publish", "e", "k", "b", "--url", "http://x"],
        &["get", "q", "--all", "--count", "2"],
        &["get", "q", "--requeue", "--reject"],
        &["listen"],
        &["listen", "q", "--count", "0"],
        &["get", "q", "--count", "0"],
        &["dead", "list", "q", "--count", "0"],
        &["dead", "drop", "q", "--url", "amqp://a", "--config", "f"],
    ] {
        assert_eq!(run(arguments).code, Some(2), "{arguments:?}");
    }
}
