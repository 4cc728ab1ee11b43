//! Brokers come and go, and leave nothing.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use super::super::{EmbeddedBroker, named};
use super::raw::Raw;
use crate::amqp::method::*;

#[test]
fn it_stops_with_fifty_clients_and_the_port_is_free() {
    let broker = EmbeddedBroker::start().unwrap();
    let addr = broker.addr();
    let mut clients: Vec<Raw> = (0..50).map(|_| Raw::channel(addr)).collect();
    let control = broker.control();
    control.wait_for_connections(50, Duration::from_secs(5)).unwrap();
    let began = Instant::now();
    drop(broker);
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    TcpListener::bind(addr).unwrap();
    for raw in &mut clients {
        let text = "CONNECTION_FORCED - broker forced connection closure with reason 'shutdown'";
        assert_eq!(raw.refused(), (320, text.into(), (0, 0)));
        raw.ended();
    }
    assert_eq!(control.connections(), []);
}

#[test]
fn two_thousand_connections_leave_nothing() {
    let broker = EmbeddedBroker::start().unwrap();
    for _ in 0..2000 {
        Raw::channel(broker.addr()).close();
    }
    broker.control().wait_for_connections(0, Duration::from_secs(5)).unwrap();
    let began = Instant::now();
    broker.stop();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    broker.stop();
}

#[test]
fn exclusive_queues_are_gone_before_close_ok() {
    let broker = EmbeddedBroker::start().unwrap();
    for _ in 0..100 {
        let mut raw = Raw::channel(broker.addr());
        raw.say(1, QueueDeclare { queue: "mine".into(), exclusive: true, ..Default::default() });
        assert!(matches!(raw.method(1), Method::QueueDeclareOk(_)));
        raw.say(0, ConnectionClose { reply_code: 200, ..Default::default() });
        assert_eq!(raw.method(0), ConnectionCloseOk {}.into());
        assert_eq!(broker.control().connections(), []);
    }
}

#[test]
fn a_named_broker_is_one_until_it_is_stopped() {
    let one = named("a name of this test").unwrap();
    let addr = named("a name of this test").unwrap().addr();
    assert_eq!(one.addr(), addr);
    assert_ne!(named("another name of this test").unwrap().addr(), addr);
    Raw::open(addr).close();
    one.stop();
    let again = named("a name of this test").unwrap();
    Raw::open(again.addr()).close();
    again.stop();
}

#[test]
fn only_loopback_is_listened_on_unless_said_otherwise() {
    let any = std::net::SocketAddr::from(([0, 0, 0, 0], 0));
    let error = EmbeddedBroker::builder().listen(any).start().unwrap_err();
    assert!(error.to_string().contains("not loopback"), "{error}");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let error = EmbeddedBroker::builder().listen(taken.local_addr().unwrap()).start().unwrap_err();
    assert!(error.to_string().contains("cannot listen on 127.0.0.1"), "{error}");
}

#[test]
fn it_starts_at_once() {
    EmbeddedBroker::start().unwrap();
    let mut times: Vec<Duration> = (0..20)
        .map(|_| {
            let began = Instant::now();
            let _broker = EmbeddedBroker::start().unwrap();
            began.elapsed()
        })
        .collect();
    times.sort();
    assert!(times[10] < Duration::from_millis(250), "{times:?}");
}
