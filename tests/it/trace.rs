//! What belongs to one request can be told across every hop that coney makes.

use std::sync::mpsc;
use std::time::Duration;

use coney::bus::Bus;
use coney::rpc::{RpcClient, RpcWorker};
use coney::{ExchangeKind, Message, Received, RetryPolicy};

use crate::contract;
use crate::support::{Broker, PATIENCE, queue, unique, wait_until};

contract! {
    whatever_a_handler_publishes_carries_the_trace_of_its_delivery,
    waiting_and_dying_messages_keep_their_trace,
    calls_and_their_answers_carry_it_and_so_do_the_callbacks_of_a_bus,
}

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const OTHER: &str = "00-5bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";

fn traced(body: &str) -> Message {
    Message::new(body).with_traceparent(PARENT).with_tracestate("vendor=1")
}

/// Body, `traceparent` and `tracestate`.
fn trace_of(received: &Received) -> (String, Option<String>, Option<String>) {
    let message = received.message();
    let owned = |text: Option<&str>| text.map(str::to_owned);
    (message.text().unwrap().to_owned(), owned(received.traceparent()), owned(message.tracestate()))
}

fn whatever_a_handler_publishes_carries_the_trace_of_its_delivery(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (from, to) = (queue(&connection, "traced"), queue(&connection, "onward"));
    let (publisher, onward) = (app.publish_pool().clone(), to.clone());
    let listener = app
        .spawn_listener(&from, move |context, delivery| -> coney::Result<()> {
            context.publish("", &onward, "context")?;
            context.reply(delivery, "reply")?;
            publisher.publish("", &onward, "pool")?;
            let connection = publisher.connection()?;
            connection.publish_async("", &onward, "async", |outcome| outcome.unwrap());
            connection.publish_batch([("", &*onward, "batch")])?;
            connection.publish("", &onward, Message::new("own").with_traceparent(OTHER))
        })
        .unwrap();
    connection.publish("", &from, traced("1").with_reply_to(&to)).unwrap();
    wait_until("the first is handled", || listener.stats().acked == 1);
    connection.publish("", &from, Message::new("2").with_reply_to(&to).with_header("traceparent", "nonsense")).unwrap();
    wait_until("both are handled", || listener.stats().acked == 2);
    listener.stop().unwrap();
    let all = crate::support::drain(&connection, &to);
    assert_eq!(all.len(), 12);
    let (first, second) = all.split_at(6);
    let mut bodies: Vec<String> = first.iter().map(|received| trace_of(received).0).collect();
    bodies.sort();
    assert_eq!(bodies, ["async", "batch", "context", "own", "pool", "reply"]);
    for received in first {
        let (body, parent, state) = trace_of(received);
        let (expected, with_state) = if body == "own" { (OTHER, None) } else { (PARENT, Some("vendor=1".to_owned())) };
        assert_eq!((parent.as_deref(), state), (Some(expected), with_state), "{body}");
    }
    for received in second {
        let (body, parent, _) = trace_of(received);
        assert_eq!(parent.as_deref(), (body == "own").then_some(OTHER), "{body}: nothing is left of the one before");
        assert_eq!(received.message().headers().contains_key("traceparent"), body == "own", "{body}");
    }
}

fn waiting_and_dying_messages_keep_their_trace(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "traced-ladder");
    let (seen, attempts) = mpsc::channel();
    let listener = app
        .listener(&name)
        .retry(RetryPolicy::new([Duration::from_millis(50)]).unwrap())
        .spawn(move |_, delivery| {
            seen.send(trace_of(delivery)).unwrap();
            Err::<(), _>("no stock")
        })
        .unwrap();
    connection.publish("", &name, traced("order")).unwrap();
    let expected = ("order".to_owned(), Some(PARENT.to_owned()), Some("vendor=1".to_owned()));
    for _ in 0..2 {
        assert_eq!(attempts.recv_timeout(PATIENCE).unwrap(), expected);
    }
    let dead = connection.get_timeout(&format!("{name}.dead"), PATIENCE).unwrap().expect("the dead one");
    assert_eq!(trace_of(&dead), expected);
    dead.ack().unwrap();
    listener.stop().unwrap();
}

fn calls_and_their_answers_carry_it_and_so_do_the_callbacks_of_a_bus(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (from, calls, seen) = (queue(&connection, "caller"), unique("called"), queue(&connection, "seen"));
    let note = seen.clone();
    let worker = RpcWorker::new(&app)
        .route_with_context(&calls, move |context, n: u64| context.publish("", &note, "called").map(|()| n + 1));
    let worker = worker.run().unwrap();
    let client = RpcClient::new(&app).unwrap();
    let queue = calls.clone();
    let listener = app.spawn_listener(&from, move |_, _| client.call::<_, u64>(&queue, &1).map(drop)).unwrap();
    connection.publish("", &from, traced("call")).unwrap();
    let called = connection.get_timeout(&seen, PATIENCE).unwrap().expect("word of the call").ack().unwrap();
    assert_eq!(called.traceparent(), Some(PARENT), "from the handler to the worker to what the worker publishes");
    listener.stop().unwrap();

    // An answer, as another program gets it.
    let answers = crate::support::queue(&connection, "answers");
    connection.publish("", &calls, traced("1").with_reply_to(&answers)).unwrap();
    let answer = connection.get_timeout(&answers, PATIENCE).unwrap().expect("an answer").ack().unwrap();
    assert_eq!(answer.traceparent(), Some(PARENT));
    worker.stop().unwrap();

    let exchange = unique("bus-traced");
    let mut bus = Bus::connect(&broker.url()).unwrap();
    let (pool, onward) = (app.publish_pool().clone(), seen.clone());
    bus.register_consumer(&exchange, ExchangeKind::Direct, ["key"], move |_: u64, _| {
        pool.publish("", &onward, "from the bus")
    })
    .unwrap();
    connection.publish(&exchange, "key", traced("1")).unwrap();
    wait_until("the callback is run", || bus.process_events(Some(1)).unwrap() == 1);
    let from_bus =
        connection.get_timeout(&seen, PATIENCE).unwrap().expect("what the callback published").ack().unwrap();
    assert_eq!(from_bus.traceparent(), Some(PARENT));
}
