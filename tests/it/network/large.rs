//! Large messages over slow lines.

use std::thread;
use std::time::{Duration, Instant};

use coney::Error;

use super::{proxy_before, url};
use crate::contract;
use crate::proxy::{Cut, Direction, Flow};
use crate::support::{Broker, PATIENCE, app, queue};

contract! {
    a_large_message_takes_the_time_it_takes_in_both_directions,
    a_large_message_that_does_not_move_ends_and_says_how_far_it_came,
}

const LARGE: usize = 12 << 20;
/// Bytes per second: some seconds for a large message, whatever the sockets in between can hold.
const SLOW: u32 = 2_000_000;

fn a_large_message_takes_the_time_it_takes_in_both_directions(broker: Broker) {
    let proxy = proxy_before(broker.addr());
    // No wait of these is as long as the message takes.
    let extra = "heartbeat = \"2s\"\noperation_timeout = \"2s\"\n[pools.publish]\nconfirm_timeout = \"2s\"";
    let app = app(&url(&proxy), extra);
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "large-slow");
    connection.publish("", &name, "small").unwrap();
    connection.get_and_ack(&name).unwrap().expect("the message");
    let large: Vec<u8> = (0..LARGE).map(|n| (n % 251) as u8).collect();

    proxy.flow(Flow::Throttle(SLOW));
    let start = Instant::now();
    connection.publish("", &name, large.as_slice()).unwrap();
    assert!(start.elapsed() > Duration::from_secs(2), "the line was slow: {:?}", start.elapsed());
    let start = Instant::now();
    let received = connection.get_and_ack(&name).unwrap().expect("the message");
    assert!(start.elapsed() > Duration::from_secs(2), "the line was slow: {:?}", start.elapsed());
    assert!(received.body() == large);
    proxy.flow(Flow::Pass);
    connection.publish("", &name, "small").unwrap();
    drop(connection);
    assert_eq!(app.publish_pool().status().discarded, 0);
}

fn a_large_message_that_does_not_move_ends_and_says_how_far_it_came(broker: Broker) {
    let proxy = proxy_before(broker.addr());
    // Heartbeats would notice it too, later.
    let app = app(
        &url(&proxy),
        "heartbeat = \"60s\"\noperation_timeout = \"1s\"\n[pools.publish]\nconfirm_timeout = \"60s\"",
    );
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "large-stalled");
    connection.publish("", &name, "small").unwrap();
    proxy.flow_of(Direction::Up, Flow::Stall);
    let start = Instant::now();
    let error = connection.publish("", &name, vec![7; 64 << 20]).unwrap_err();
    assert!(start.elapsed() < PATIENCE / 2, "{:?}", start.elapsed());
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    assert!(error.to_string().contains(&format!("of {} bytes written", 64 << 20)), "{error}");
    assert!(!connection.is_alive(), "half a message cannot be taken back");
    proxy.cut(Cut::Reset);
    thread::scope(|scope| drop(scope.spawn(|| drop(connection)).join()));
}
