//! Messages that are to arrive later: when they come, as what, and what they outlive.

use std::time::{Duration, Instant};

use coney::{Binding, Connection, Error, Exchange, FieldValue, Message, Queue, Received};

use crate::contract;
use crate::support::{Broker, PATIENCE, queue, unique};

contract! {
    messages_come_when_their_time_has_come_and_none_waits_behind_another,
    a_message_comes_with_its_exchange_its_routing_key_and_its_properties,
    a_message_comes_to_whatever_its_exchange_binds_by_then,
    copies_come_with_the_delay_too,
    what_no_queue_takes_at_the_end_goes_to_the_alternate_exchange,
    the_end_may_be_a_queue_of_another_connection_or_one_that_is_to_come,
    no_delay_is_a_publish,
    a_year_is_waited_for,
    what_cannot_be_delayed_is_an_error_that_says_why,
    a_message_that_has_been_delayed_can_be_delayed_again,
    many_threads_delay_through_one_pool,
    quorum_queues_delay_too,
    waiting_outlives_a_restart_in_classic_queues,
    waiting_outlives_a_restart_in_quorum_queues,
    what_somebody_has_deleted_is_declared_anew,
}

fn millis(number: u64) -> Duration {
    Duration::from_millis(number)
}

#[track_caller]
fn next(connection: &Connection, queue: &str) -> Received {
    next_within(connection, queue, PATIENCE)
}

#[track_caller]
fn next_within(connection: &Connection, queue: &str, patience: Duration) -> Received {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(received) = connection.get_and_ack(queue).unwrap() {
            return received;
        }
        assert!(Instant::now() < deadline, "no message in {queue} after {patience:?}");
        std::thread::park_timeout(millis(10));
    }
}

fn messages_come_when_their_time_has_come_and_none_waits_behind_another(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let queue = queue(&connection, "delayed");
    // Whatever has to be declared for the longest of them is there before the time is taken.
    connection.publish_after(millis(4000), "", &queue, "4000").unwrap();
    let mut began = Vec::new();
    for delay in [4100, 2000, 150] {
        began.push((delay.to_string(), Instant::now()));
        connection.publish_after(millis(delay), "", &queue, delay.to_string()).unwrap();
    }
    let mut arrived = Vec::new();
    for _ in 0..4 {
        let body = next(&connection, &queue).message().text().unwrap().to_owned();
        if let Some((_, began)) = began.iter().find(|(of, _)| *of == body) {
            let waited = began.elapsed();
            assert!(waited >= millis(body.parse().unwrap()), "{body} has come after {waited:?}");
            arrived.push(body);
        }
    }
    assert_eq!(arrived, ["150", "2000", "4100"]);
}

fn a_message_comes_with_its_exchange_its_routing_key_and_its_properties(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (queue, exchange) = (queue(&connection, "delayed-properties"), unique("delayed"));
    connection.exchange_declare(&Exchange::topic(&exchange)).unwrap();
    connection.queue_bind(&queue, &exchange, "order.*").unwrap();
    let message = || {
        Message::new(vec![0, 159, 146, 150])
            .with_header("tenant", "a")
            .with_header("coney-other", 7_i64)
            .with_content_type("application/x-test")
            .with_correlation_id("c")
            .with_reply_to("r")
            .with_message_id("m")
            .with_kind("k")
            .with_app_id("a")
            .with_priority(3)
    };
    connection.publish_after(millis(700), &exchange, "order.created", message()).unwrap();
    let received = next(&connection, &queue);
    assert_eq!((received.exchange(), received.routing_key()), (&*exchange, "order.created"));
    let came = received.message().clone();
    let headers = came.headers().iter().filter(|(name, _)| {
        !name.starts_with("coney-delay-")
            && *name != "x-death"
            && !name.starts_with("x-first-death-")
            && !name.starts_with("x-last-death-")
    });
    let headers = headers.map(|(name, value)| (name.clone(), value.clone())).collect();
    assert_eq!(came.with_headers(headers), message());
    connection.publish_after(millis(1), "", &queue, "to a queue").unwrap();
    let received = next(&connection, &queue);
    assert_eq!((received.exchange(), received.routing_key()), ("", &*queue));
}

fn a_message_comes_to_whatever_its_exchange_binds_by_then(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (before, after, exchange) =
        (queue(&connection, "bound-before"), queue(&connection, "bound-after"), unique("bound-later"));
    connection.exchange_declare(&Exchange::headers(&exchange)).unwrap();
    let binding = |queue: &str| Binding::queue(queue).to(&exchange).argument("for", "us");
    connection.bind(&binding(&before)).unwrap();
    let message = Message::new("m").with_header("for", "us");
    connection.publish_after(millis(3000), &exchange, "", message).unwrap();
    connection.unbind(&binding(&before)).unwrap();
    connection.bind(&binding(&after)).unwrap();
    assert_eq!(next(&connection, &after).body(), b"m");
    assert_eq!(broker.queue_len(&before), 0);
}

fn copies_come_with_the_delay_too(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let [main, copy, blind] = ["main", "copy", "blind"].map(|what| queue(&connection, what));
    let key = |queue: &str| FieldValue::Array(vec![queue.into()]);
    let message = Message::new("m").with_header("CC", key(&copy)).with_header("BCC", key(&blind));
    let began = Instant::now();
    connection.publish_after(millis(600), "", &main, message).unwrap();
    for queue in [&main, &copy, &blind] {
        assert_eq!(next(&connection, queue).body(), b"m");
        assert!(began.elapsed() >= millis(600));
    }
}

fn what_no_queue_takes_at_the_end_goes_to_the_alternate_exchange(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let (queue, exchange, alternate) = (queue(&connection, "kept"), unique("delayed-to-nothing"), unique("alternate"));
    connection.exchange_declare(&Exchange::fanout(&alternate)).unwrap();
    connection.exchange_declare(&Exchange::direct(&exchange).alternate_exchange(&alternate)).unwrap();
    connection.queue_bind(&queue, &alternate, "").unwrap();
    connection.publish_after(millis(100), &exchange, "nobody", "kept").unwrap();
    let received = next(&connection, &queue);
    assert_eq!((received.body(), received.routing_key()), (&b"kept"[..], "nobody"));
}

fn the_end_may_be_a_queue_of_another_connection_or_one_that_is_to_come(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let holder = app.publish_pool().connection().unwrap();
    let exclusive = unique("exclusive");
    holder.queue_declare(&Queue::new(&exclusive).durable(false).exclusive(true)).unwrap();
    connection.publish_after(millis(100), "", &exclusive, "m").unwrap();
    assert_eq!(next(&holder, &exclusive).body(), b"m");
    let app = broker.app("[pools.publish]\nmandatory = false");
    let to_come = unique("to-come");
    let connection = app.publish_pool().connection().unwrap();
    connection.publish_after(millis(3000), "", &to_come, "m").unwrap();
    connection.queue_declare(&Queue::new(&to_come)).unwrap();
    assert_eq!(next(&connection, &to_come).body(), b"m");
}

fn no_delay_is_a_publish(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let queue = queue(&connection, "not-delayed");
    connection.publish_after(Duration::ZERO, "", &queue, "one").unwrap();
    app.publish_pool().publish_after(Duration::ZERO, "", &queue, "two").unwrap();
    for expected in [b"one", b"two"] {
        let received = connection.get_and_ack(&queue).unwrap().expect("it is there at once");
        assert_eq!((received.body(), received.message().headers().len()), (&expected[..], 0));
    }
    let missing = unique("missing");
    let returned = connection.publish_after(Duration::ZERO, "", &missing, "m").unwrap_err();
    assert!(matches!(returned, Error::Returned { code: 312, .. }), "{returned}");
    let returned = app.publish_pool().publish_after(Duration::ZERO, "", &missing, "m").unwrap_err();
    assert!(matches!(returned, Error::Returned { code: 312, .. }), "{returned}");
}

fn a_year_is_waited_for(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let queue = queue(&connection, "a-year");
    let year = Duration::from_secs(365 * 24 * 60 * 60);
    connection.publish_after(year, "", &queue, "a year").unwrap();
    // The longest wait, which only this test uses.
    let waiting = next(&connection, "coney.delay.28");
    assert_eq!((waiting.body(), waiting.routing_key()), (&b"a year"[..], &*queue));
    let headers = waiting.message().headers();
    let steps = (0..28).filter(|bit| headers[&format!("coney-delay-{bit}")] == true.into()).map(|bit| 1_u64 << bit);
    assert_eq!((steps.sum::<u64>() + (1 << 28)) * 100, 365 * 24 * 60 * 60 * 1000);
}

fn what_cannot_be_delayed_is_an_error_that_says_why(broker: Broker) {
    let app = broker.app("");
    let pool = app.publish_pool();
    let connection = pool.connection().unwrap();
    let queue = queue(&connection, "refused");
    let refused = |delay: Duration, exchange: &str, key: &str, message: Message| {
        let by_connection = connection.publish_after(delay, exchange, key, message.clone()).unwrap_err().to_string();
        let by_pool = pool.publish_after(delay, exchange, key, message).unwrap_err().to_string();
        assert_eq!(by_connection, by_pool);
        by_connection
    };
    let second = Duration::from_secs(1);
    let message = || Message::new("m");
    let over = Duration::from_secs(365 * 24 * 60 * 60 + 1);
    assert_eq!(refused(over, "", &queue, message()), "delay: 31536001 s, expected at most 365 days");
    let text = refused(second, "", &queue, message().with_expiration(second));
    assert_eq!(text, "expiration: expected none of a delayed message: it would end the delay");
    let text = refused(second, &"x".repeat(241), "", message());
    assert_eq!(text, "exchange name: 241 bytes long, expected at most 240 for a delayed message");
    let text = refused(second, "", &"k".repeat(256), message());
    assert!(text.contains("routing key") && text.contains("255"), "{text}");
    let missing = unique("missing-exchange");
    for error in [
        connection.publish_after(second, &missing, "", "m").unwrap_err(),
        pool.publish_after(second, &missing, "", "m").unwrap_err(),
    ] {
        let Error::ChannelClosed { code: 404, text, .. } = &error else { panic!("{error}") };
        assert!(text.contains(&missing), "{text}");
    }
    let missing = unique("missing-queue");
    for error in [
        connection.publish_after(second, "", &missing, "m").unwrap_err(),
        pool.publish_after(second, "", &missing, "m").unwrap_err(),
    ] {
        let Error::ChannelClosed { code: 404, text, .. } = &error else { panic!("{error}") };
        assert!(text.contains(&missing), "{text}");
    }
    connection.publish_after(millis(1), "", &queue, "served all the same").unwrap();
    assert_eq!(next(&connection, &queue).body(), b"served all the same");
}

fn a_message_that_has_been_delayed_can_be_delayed_again(broker: Broker) {
    let app = broker.app("");
    let connection = app.publish_pool().connection().unwrap();
    let queue = queue(&connection, "again");
    let mut message = Message::new("again");
    // By more queues, by fewer, and by those that it has been in.
    for delay in [700, 100, 300, 700] {
        let began = Instant::now();
        connection.publish_after(millis(delay), "", &queue, message).unwrap();
        message = next(&connection, &queue).message().clone();
        let waited = began.elapsed();
        assert!(waited >= millis(delay), "{delay} ms were {waited:?}");
    }
    assert_eq!(message.headers()["coney-delay-first"], 2_i64.into());
}

fn many_threads_delay_through_one_pool(broker: Broker) {
    let app = broker.app("[pools.publish]\nsize = 2");
    let pool = app.publish_pool();
    let queue = queue(&pool.connection().unwrap(), "delayed-by-many");
    let began = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let queue = &queue;
            scope.spawn(move || {
                for number in 0..10 {
                    pool.publish_after(millis(300), "", queue, format!("{thread}-{number}")).unwrap();
                }
            });
        }
    });
    let connection = pool.connection().unwrap();
    let mut bodies = Vec::new();
    for _ in 0..80 {
        let received = next(&connection, &queue);
        assert!(began.elapsed() >= millis(300));
        assert!(received.message().message_id().is_some());
        bodies.push(received.message().text().unwrap().to_owned());
    }
    bodies.sort();
    bodies.dedup();
    assert_eq!(bodies.len(), 80);
}

fn quorum_queues_delay_too(broker: Broker) {
    let app = broker.app("[pools.publish]\ndelay_queue_type = \"quorum\"");
    let connection = app.publish_pool().connection().unwrap();
    let queue = queue(&connection, "delayed-by-quorum");
    let began = Instant::now();
    connection.publish_after(millis(500), "", &queue, "m").unwrap();
    let received = next(&connection, &queue);
    assert!(began.elapsed() >= millis(500));
    assert_eq!((received.exchange(), received.routing_key()), ("", &*queue));
    // It is declared as it says.
    let wait = Queue::new("coney.delay.quorum.2").message_ttl(millis(400)).dead_letter_exchange("coney.delay.quorum.2");
    let wait =
        wait.quorum().argument("x-dead-letter-strategy", "at-least-once").argument("x-overflow", "reject-publish");
    connection.queue_declare(&wait).unwrap();
}

fn waiting_outlives_a_restart_in_classic_queues(broker: Broker) {
    if broker.is_4() && !broker.is_embedded() {
        // RabbitMQ 4.0 loses what expires in a classic queue while it starts; see docs/publishing.md.
        return;
    }
    waiting_outlives_a_restart(broker, "classic");
}

fn waiting_outlives_a_restart_in_quorum_queues(broker: Broker) {
    waiting_outlives_a_restart(broker, "quorum");
}

fn waiting_outlives_a_restart(broker: Broker, queue_type: &str) {
    let node = broker.hurt();
    let app = node.app(&format!("[pools.publish]\ndelay_queue_type = {queue_type:?}\npublish_timeout = \"60s\""));
    let pool = app.publish_pool();
    let queue = queue(&pool.connection().unwrap(), "delayed-restart");
    let delay = Duration::from_secs(5);
    let began = Instant::now();
    for number in 0..20 {
        pool.publish_after(delay, "", &queue, format!("before-{number}")).unwrap();
    }
    node.stop_app();
    std::thread::scope(|scope| {
        let while_down = scope.spawn(|| {
            let began = Instant::now();
            pool.publish_after(millis(200), "", &queue, "while-down").unwrap();
            began
        });
        node.start_app();
        let began_down = while_down.join().unwrap();
        let connection = pool.connection().unwrap();
        let mut bodies = Vec::new();
        while bodies.len() < 21 {
            // A quorum queue that finds the next one not there yet tries again after three minutes, once for each queue on the way.
            let body = next_within(&connection, &queue, PATIENCE * 15).message().text().unwrap().to_owned();
            let (began, delay) = if body == "while-down" { (began_down, millis(200)) } else { (began, delay) };
            assert!(began.elapsed() >= delay, "{body} has come after {:?}", began.elapsed());
            // A repetition has the same identity, and may be there.
            if !bodies.contains(&body) {
                bodies.push(body);
            }
        }
    });
}

fn what_somebody_has_deleted_is_declared_anew(broker: Broker) {
    let node = broker.hurt();
    let app = node.app("");
    let pool = app.publish_pool();
    let connection = pool.connection().unwrap();
    let queue = queue(&connection, "deleted-wait");
    let round = |body: &str| {
        connection.publish_after(millis(300), "", &queue, body).unwrap();
        assert_eq!(next(&connection, &queue).body(), body.as_bytes());
        pool.publish_after(millis(300), "", &queue, body).unwrap();
        assert_eq!(next(&connection, &queue).body(), body.as_bytes());
    };
    round("first");
    connection.queue_delete("coney.delay.0").unwrap();
    connection.queue_delete("coney.delay.1").unwrap();
    round("without queues");
    connection.exchange_delete("coney.delay", false).unwrap();
    round("without the exchange");
    connection.queue_delete("coney.delay.1").unwrap();
    pool.publish_after(millis(300), "", &queue, "by the pool").unwrap();
    assert_eq!(next(&connection, &queue).body(), b"by the pool");
    // Nobody is told of what is lost on its way, so it is kept.
    connection.queue_delete("coney.delay.to-default").unwrap();
    connection.publish_after(millis(100), "", &queue, "lost on its way").unwrap();
    assert_eq!(next(&connection, "coney.delay.unrouted").body(), b"lost on its way");
}
