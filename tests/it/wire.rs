//! What the wire itself may bring: headers longer than a frame, brokers without heartbeats, other ways to log in.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use coney::{ConnectError, Error, FieldValue, Message, Queue};

use crate::contract;
use crate::proxy::{Cut, Flow, Proxy};
use crate::raw::{Raw, frame, long, method, short};
use crate::support::{Broker, PATIENCE, app, queue, unique, wait_until};

contract! {
    headers_that_dead_lettering_has_made_longer_than_a_frame_are_read,
    headers_from_a_client_with_larger_frames_are_read,
    a_broker_without_heartbeats_gets_ours,
    who_waits_for_long_keeps_the_connection_and_its_neighbours_alive,
    amqplain_logs_in,
    channels_that_are_used_up_cost_no_connection,
    channels_are_limited_in_how_many_there_are_and_not_in_their_numbers,
}

/// As many bytes as the one header of a message may have that also has a timestamp.
const LARGEST: usize = 131_072 - 8 - 12 - 2 - 31 - 4 - 4 - 5;

fn headers_that_dead_lettering_has_made_longer_than_a_frame_are_read(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (name, dead) = (unique("outgrown"), queue(&connection, "outgrown-dead"));
    let from = Queue::new(&name).dead_letter_exchange("").dead_letter_routing_key(&dead);
    connection.queue_declare(&from).unwrap();
    let large = "z".repeat(LARGEST);
    for _ in 0..2 {
        connection.publish("", &name, Message::new("m").with_header("big", large.as_str())).unwrap();
        connection.get(&name).unwrap().expect("the message").reject().unwrap();
    }
    connection.publish("", &dead, "behind them").unwrap();
    wait_until("they are dead-lettered", || broker.queue_len(&dead) == 3);

    let received = connection.get_and_ack(&dead).unwrap().expect("the first");
    assert_eq!(received.message().headers()["big"], FieldValue::String(large.clone()));
    assert!(received.message().headers().contains_key("x-death"));
    let (seen, sees) = mpsc::channel();
    let listener = app
        .spawn_listener(&dead, move |_, delivery| seen.send(delivery.message().headers().get("big").cloned()).unwrap())
        .unwrap();
    let mut came = [sees.recv_timeout(PATIENCE).unwrap(), sees.recv_timeout(PATIENCE).unwrap()];
    came.sort_by_key(Option::is_none);
    assert_eq!(came, [Some(FieldValue::String(large)), None]);
    assert_eq!(listener.stats().recoveries, 0);
    listener.stop().unwrap();
    assert!(connection.is_alive());
}

fn headers_from_a_client_with_larger_frames_are_read(broker: Broker) {
    let broker = broker.tuned();
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "large-headers");
    let mut raw = Raw::greet(broker.addr());
    raw.open_with(1 << 20, 3);
    let big = [&b"\x03bigS"[..], &long(&vec![b'z'; 200_000])].concat();
    let publish = [&[0, 0][..], &short(""), &short(&name), &[0]].concat();
    let header = [&[0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x20, 0][..], &long(&big)].concat();
    raw.send(&[method(1, (60, 40), &publish), frame(2, 1, &header)].concat());
    wait_until("it is there", || broker.queue_len(&name) == 1);
    let received = connection.get_and_ack(&name).unwrap().expect("the message");
    assert_eq!(received.message().headers()["big"].as_str().map(str::len), Some(200_000));
    raw.close();
}

fn a_broker_without_heartbeats_gets_ours(broker: Broker) {
    let broker = broker.tuned();
    let proxy = Proxy::start(broker.addr()).unwrap();
    let app = app(&format!("amqp://guest:guest@{}/%2f", proxy.addr()), "heartbeat = \"1s\"");
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "no-heartbeats");
    connection.publish("", &name, "x").unwrap();
    let silent = Instant::now();
    proxy.flow(Flow::Swallow);
    wait_until("the silence is noticed", || !connection.is_alive());
    assert!(silent.elapsed() >= Duration::from_secs(1), "{:?}", silent.elapsed());
    let error = connection.publish("", &name, "x").unwrap_err().to_string();
    assert!(error.contains("heartbeats"), "{error}");
    proxy.cut(Cut::Reset);
}

fn who_waits_for_long_keeps_the_connection_and_its_neighbours_alive(broker: Broker) {
    let app = broker.app("heartbeat = \"1s\"");
    let idle = app.publish_pool().connection().unwrap();
    let waits = app.publish_pool().connection().unwrap();
    let name = queue(&waits, "patience");
    // Four times as long as a broker waits for a heartbeat of either.
    assert!(waits.get_timeout(&name, Duration::from_secs(8)).unwrap().is_none());
    assert!(waits.is_alive() && idle.is_alive());
    idle.publish("", &name, "x").unwrap();
    assert!(waits.get_and_ack(&name).unwrap().is_some());
    drop((idle, waits));
    assert_eq!(app.publish_pool().status().discarded, 0);
}

fn amqplain_logs_in(broker: Broker) {
    let settings = app(&broker.url(), "auth = \"amqplain\"");
    settings.publish_pool().connection().unwrap();
    let by_url = app(&format!("{}?auth_mechanism=amqplain", broker.url()), "");
    by_url.publish_pool().connection().unwrap();
    let wrong = app(&broker.url_with("guest:wrong", "%2f"), "auth = \"amqplain\"");
    let error = wrong.publish_pool().connection().unwrap_err();
    assert!(matches!(error, Error::Connect { cause: ConnectError::AccessRefused { .. }, .. }), "{error}");
    let external = app(&broker.url(), "auth = \"external\"");
    let error = external.publish_pool().connection().unwrap_err();
    assert!(matches!(error, Error::Connect { cause: ConnectError::Mechanism(_), .. }), "{error}");
    assert!(error.to_string().contains("PLAIN") && error.to_string().contains("EXTERNAL"), "{error}");
}

fn channels_that_are_used_up_cost_no_connection(broker: Broker) {
    let broker = broker.tuned();
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    // One channel to declare on, one to publish, one to get: as many as this broker allows.
    let name = queue(&connection, "channels");
    connection.publish("", &name, "x").unwrap();
    connection.get_and_ack(&name).unwrap().expect("the message");
    #[cfg(feature = "unstable-amiquip")]
    {
        let error = connection.raw(PATIENCE, |_| Ok(())).unwrap_err();
        assert!(matches!(error, Error::ChannelsExhausted { .. }), "{error}");
        assert!(error.to_string().contains("channel_max"), "{error}");
    }
    assert!(connection.is_alive());
    connection.publish("", &name, "y").unwrap();
    assert_eq!(connection.get_and_ack(&name).unwrap().expect("the message").body(), b"y");
    drop(connection);
    assert_eq!(app.publish_pool().status().discarded, 0);
}

fn channels_are_limited_in_how_many_there_are_and_not_in_their_numbers(broker: Broker) {
    let text = "NOT_ALLOWED - number of channels opened (3) has reached the negotiated channel_max (3)";
    let open = |numbers: &[u16]| {
        let mut raw = Raw::greet(broker.addr());
        // With channel 1 open.
        raw.open_with(131_072, 3);
        for &number in numbers {
            raw.say(number, (20, 10), &short(""));
            assert_eq!(raw.method().0, (20, 11), "{number}");
        }
        raw
    };
    let limit = method(9, (60, 10), &[0; 7]);
    for fourth in [method(10, (20, 10), &short("")), limit.clone(), frame(2, 9, &[0; 14])] {
        let mut raw = open(&[2, 65_535]);
        raw.send(&fourth);
        assert_eq!(raw.refusal(), ((10, 50), 530, text.to_owned()));
    }
    // One that is there is not one more, and one that is closed makes room.
    let mut raw = open(&[10, 65_535]);
    raw.say(65_535, (60, 10), &[0; 7]);
    assert_eq!(raw.method().0, (60, 11));
    raw.say(10, (20, 40), &[&200_u16.to_be_bytes()[..], &short(""), &[0; 4]].concat());
    assert_eq!(raw.method().0, (20, 41));
    raw.say(7, (20, 10), &short(""));
    assert_eq!(raw.method().0, (20, 11));
    // Where there is room, a channel that is not open is what is wrong.
    let mut raw = open(&[]);
    raw.send(&limit);
    assert_eq!(raw.refusal(), ((10, 50), 504, "CHANNEL_ERROR - expected 'channel.open'".to_owned()));
}

/// A broker that offers these mechanisms and nothing more.
fn offering(mechanisms: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let arguments = [&[0, 9][..], &long(b""), &long(mechanisms), &long(b"en_US")].concat();
            let _ = client.read_exact(&mut [0; 8]);
            let _ = client.write_all(&method(0, (10, 10), &arguments));
            let _ = client.read_to_end(&mut Vec::new());
        }
    });
    format!("amqp://guest:hunter2@{addr}/%2f")
}

#[test]
fn a_broker_that_does_not_offer_plain_is_refused_at_once_and_by_name() {
    for (mechanisms, offers) in [
        (b"EXTERNAL AMQPLAIN".as_slice(), "the broker offers EXTERNAL and AMQPLAIN; coney was to speak PLAIN"),
        (b"RABBIT-CR-DEMO", "the broker offers RABBIT-CR-DEMO; coney was to speak PLAIN"),
        (b"", "the broker offers no mechanism of authentication; coney was to speak PLAIN"),
        // Not PLAIN, though it begins so.
        (b"PLAINER", "the broker offers PLAINER; coney was to speak PLAIN"),
    ] {
        let app = app(&offering(mechanisms), "connect_timeout = \"60s\"");
        let start = Instant::now();
        let error = app.publish_pool().connection().unwrap_err();
        assert!(start.elapsed() < PATIENCE / 2, "{:?}", start.elapsed());
        assert!(error.to_string().contains(offers), "{error}");
        assert!(!error.is_transient() && !error.to_string().contains("hunter2"), "{error}");
    }
}

#[test]
fn a_header_that_is_too_long_ends_the_get_by_its_name_and_not_the_process() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let mut raw = Raw { socket: client };
            let _ = raw.socket.read_exact(&mut [0; 8]);
            raw.say(0, (10, 10), &[&[0, 9][..], &long(b""), &long(b"PLAIN"), &long(b"en_US")].concat());
            while let Some((_, channel, payload)) = raw.frame() {
                match payload.get(..4) {
                    Some([0, 10, 0, 11]) => raw.say(0, (10, 30), &[7, 255, 0, 2, 0, 0, 0, 60]),
                    Some([0, 10, 0, 40]) => raw.say(0, (10, 41), &[0]),
                    Some([0, 20, 0, 10]) => raw.say(channel, (20, 11), &[0; 4]),
                    Some([0, 60, 0, 70]) => {
                        let ok = [&[0, 0, 0, 0, 0, 0, 0, 1, 0][..], &short(""), &short("huge"), &[0; 4]].concat();
                        raw.say(channel, (60, 71), &ok);
                        // The beginning of a header of 17 MiB.
                        raw.send(&[&[2, 0, channel as u8][..], &(17_u32 << 20).to_be_bytes(), &[0, 60]].concat());
                    }
                    _ => {}
                }
            }
        }
    });
    let app = app(&format!("amqp://guest:guest@{addr}/%2f"), "");
    let error = app.publish_pool().connection().unwrap().get("huge").map(drop).unwrap_err().to_string();
    assert!(error.contains("\"huge\"") && error.contains("content header") && error.contains("16777216"), "{error}");
}
