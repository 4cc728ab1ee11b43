//! `coney dead`: what listeners have given up is shown, put back as it was, or dropped.

use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use coney::{
    App, Connection, Exchange, FieldTable, FieldValue, Listener, Message, Outcome, Queue, Received, RetryPolicy,
};

use crate::contract;
use crate::program::{feed, run, run_unread};
use crate::support::{Broker, PATIENCE, bodies, drain, queue, unique, wait_until};

contract!(
    the_dead_are_shown_and_stay,
    bodies_that_are_json_are_shown_as_such,
    the_replayed_start_anew_as_they_were_published,
    what_cannot_be_put_back_stays,
    the_dead_of_a_broker_go_back_too,
    a_header_that_anybody_may_write_does_not_say_where_a_message_goes,
    the_dropped_are_gone,
    a_replay_ends_though_its_messages_come_back,
    without_a_dead_queue_it_says_so,
);

/// A listener that fails every message, and tells of each attempt.
fn failing(app: &App, queue: &str) -> (Listener, Receiver<Received>) {
    let (saw, seen) = channel();
    let policy = RetryPolicy::new([Duration::from_millis(1)]).unwrap().with_max_attempts(2);
    let listener = app.listener(queue).retry(policy).spawn(move |_context, delivery| {
        // The test may have seen enough.
        let _ = saw.send((**delivery).clone());
        Outcome::Failed(format!("cannot handle {}", delivery.message().text().unwrap_or("this")))
    });
    (listener.unwrap(), seen)
}

/// A queue whose messages came by an exchange and are all dead.
fn dead(broker: Broker, app: &App, bodies: &[&str]) -> (String, String) {
    let connection = app.publish_pool().connection().unwrap();
    let queue = queue(&connection, "failing");
    let exchange = unique("room");
    connection.exchange_declare(&Exchange::direct(&exchange)).unwrap();
    connection.queue_bind(&queue, &exchange, "key").unwrap();
    let (listener, _) = failing(app, &queue);
    for body in bodies {
        connection.publish(&exchange, "key", Message::new(*body).with_header("own", 1)).unwrap();
    }
    let expected = bodies.len() as u64;
    wait_until("all are dead", || broker.queue_len(&format!("{queue}.dead")) == expected);
    listener.stop().unwrap();
    (queue, exchange)
}

fn the_dead_are_shown_and_stay(broker: Broker) {
    let app = broker.app("");
    let (queue, exchange) = dead(broker, &app, &["one", "two", "three"]);
    let url = broker.url();
    // Again and again: what comes back redelivered is not to be given up for it.
    for _ in 0..3 {
        let ran = run(&["dead", "list", &queue, "--url", &url]).well();
        let lines = ran.lines();
        assert_eq!(lines.len(), 4, "{ran:?}");
        let words = format!("2 attempts, exchange \"{exchange}\", key \"key\", 3 bytes \"one\": cannot handle one");
        assert!(lines[0].starts_with("1. 20") && lines[0].ends_with(&words), "{}", lines[0]);
        assert_eq!(lines[3], format!("3 of 3 messages in {queue}.dead"));
    }
    let ran =
        run(&["dead", "list", &format!("{queue}.dead"), "--reason", "HANDLE T", "--json-lines", "--url", &url]).well();
    let json = ran.json();
    let of = |name: &str| json.iter().map(|one| one[name].clone()).collect::<Vec<_>>();
    assert_eq!(of("reason"), ["cannot handle two", "cannot handle three"]);
    assert_eq!((of("queue")[0].as_str(), of("attempts")[0].as_i64()), (Some(queue.as_str()), Some(2)));
    assert_eq!(json[1]["message"]["body"], "three");
    assert_eq!(json[1]["body"], "three");

    run_unread(&["dead", "list", &queue, "--url", &url]).failed(7, &["the reader of stdout has gone"]);
    let connection = app.publish_pool().connection().unwrap();
    let dead = format!("{queue}.dead");
    wait_until("all are back", || broker.queue_len(&dead) == 3);
    assert_eq!(bodies(&drain(&connection, &dead)), ["one", "two", "three"]);
}

fn bodies_that_are_json_are_shown_as_such(broker: Broker) {
    let app = broker.app("");
    let (queue, exchange) = dead(broker, &app, &[r#"{"order": "a \"b\"", "lines": [1]}"#, "7", r#"{"half"#]);
    let url = broker.url();
    let ran = run(&["dead", "list", &queue, "--url", &url]).well();
    let shown = [r#"34 bytes {"order": "a \"b\"", "lines": [1]}: "#, r#"1 byte "7": "#, r#"6 bytes "{\"half": "#];
    for (line, shown) in ran.lines().iter().zip(shown) {
        assert!(line.contains(&format!("exchange \"{exchange}\", key \"key\", {shown}")), "{shown:?}: {line}");
    }
    let ran = run(&["dead", "list", &queue, "--json-lines", "--url", &url]).well();
    let json = ran.json();
    assert_eq!(json[0]["body"], serde_json::json!({ "order": "a \"b\"", "lines": [1] }));
    assert_eq!((&json[1]["body"], &json[2]["body"]), (&"7".into(), &"{\"half".into()));

    // What is printed can be published.
    let messages: Vec<String> = json.iter().map(|one| one["message"].to_string()).collect();
    let connection = app.publish_pool().connection().unwrap();
    let elsewhere = crate::support::queue(&connection, "elsewhere");
    feed(&["publish", "", &elsewhere, "--json-lines", "--url", &url], messages.join("\n").as_bytes()).well();
    let [there, dead] = [&elsewhere, &format!("{queue}.dead")]
        .map(|queue| drain(&connection, queue).into_iter().map(|one| one.into_message()).collect::<Vec<Message>>());
    assert_eq!(there, dead);
}

fn the_replayed_start_anew_as_they_were_published(broker: Broker) {
    let app = broker.app("");
    let (queue, exchange) = dead(broker, &app, &["one", "two"]);
    let url = broker.url();
    let ran = run(&["dead", "replay", &queue, "--reason", "two", "--url", &url]).well();
    assert_eq!(ran.text(), format!("replayed 1 of 2 messages in {queue}.dead\n"));
    let connection = app.publish_pool().connection().unwrap();
    let received = connection.get_and_ack(&queue).unwrap().unwrap();
    let headers = received.message().headers();
    assert_eq!(headers["own"], FieldValue::from(1));
    let left: Vec<&str> = headers.keys().map(String::as_str).collect();
    assert_eq!(left, ["coney-attempts", "coney-exchange", "coney-routing-key", "own"]);

    run(&["dead", "replay", &queue, "--url", &url]).well();
    let (listener, seen) = failing(&app, &queue);
    for attempt in 0..2 {
        let received = seen.recv_timeout(PATIENCE).expect("an attempt");
        assert_eq!((received.exchange(), received.routing_key()), (exchange.as_str(), "key"), "attempt {attempt}");
    }
    wait_until("it is dead again, after all its attempts", || broker.queue_len(&format!("{queue}.dead")) == 1);
    assert!(seen.try_recv().is_err());
    listener.stop().unwrap();
}

fn what_cannot_be_put_back_stays(broker: Broker) {
    let app = broker.app("");
    let (queue, _) = dead(broker, &app, &["one", "two"]);
    let connection = app.publish_pool().connection().unwrap();
    connection.queue_delete(&queue).unwrap();
    for _ in 0..2 {
        let ran = run(&["dead", "replay", &queue, "--url", &broker.url()]);
        assert_eq!((ran.code, ran.stderr.lines().count()), (Some(1), 1), "{ran:?}");
        assert!(ran.stderr.starts_with("coney: 2 messages not put back to "), "{ran:?}");
        assert!(ran.stderr.contains("NO_ROUTE") && ran.text().starts_with("replayed 0 of 2"), "{ran:?}");
    }
    assert_eq!(bodies(&drain(&connection, &format!("{queue}.dead"))), ["one", "two"]);
}

fn the_dead_of_a_broker_go_back_too(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (queue, url) = (unique("expiring"), broker.url());
    let dead = format!("{queue}.dead");
    connection.queue_declare(&Queue::new(&dead)).unwrap();
    let expiring = Queue::new(&queue).dead_letter_exchange("").dead_letter_routing_key(&dead);
    connection.queue_declare(&expiring).unwrap();
    connection.publish("", &queue, Message::new("late").with_expiration(Duration::from_millis(1))).unwrap();
    wait_until("it has expired", || broker.queue_len(&dead) == 1);
    let ran = run(&["dead", "list", &queue, "--json", "--url", &url]).well();
    assert_eq!((&ran.json()[0]["reason"], &ran.json()[0]["queue"]), (&"expired".into(), &queue.as_str().into()));
    run(&["dead", "replay", &queue, "--url", &url]).well();
    let received = connection.get_and_ack(&queue).unwrap().expect("it is back");
    assert!(!received.message().headers().contains_key("x-death"), "{received:?}");
}

fn a_header_that_anybody_may_write_does_not_say_where_a_message_goes(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let (victim, other) = (queue(&connection, "victim"), queue(&connection, "other"));
    let (asked, url) = (queue(&connection, "asked"), broker.url());
    let dead = format!("{asked}.dead");
    connection.queue_declare(&Queue::new(&dead)).unwrap();
    let died_in = |name: &str| {
        let expiring = Queue::new(name).dead_letter_exchange("").dead_letter_routing_key(&dead);
        connection.queue_declare(&expiring).unwrap();
        let message = Message::new(name).with_header("coney-queue", &*victim).with_header("coney-attempts", 2);
        connection.publish("", name, message.with_expiration(Duration::from_millis(1))).unwrap();
    };
    // The broker has found this one dead in a queue of another name.
    let elsewhere = unique("elsewhere");
    died_in(&elsewhere);
    wait_until("it has expired", || broker.queue_len(&dead) == 1);
    // This one was put there by somebody, who says where it comes from.
    let stranger = Message::new("stranger").with_header("coney-queue", &*victim);
    connection.publish("", &dead, stranger.clone()).unwrap();
    // The broker's last word is that a message expired among the dead, or while it waited: that is no home.
    for beside in [dead.clone(), format!("{asked}.retry.1000")] {
        let death = FieldTable::from([("queue".to_owned(), FieldValue::from(beside))]);
        let deaths = FieldValue::Array(vec![FieldValue::Table(death)]);
        connection.publish("", &dead, Message::new("beside").with_header("x-death", deaths)).unwrap();
    }
    let listed = run(&["dead", "list", &asked, "--json", "--url", &url]).well().json();
    assert_eq!((&listed[0]["queue"], &listed[1]["queue"]), (&elsewhere.as_str().into(), &victim.as_str().into()));

    // The first would expire again at once but for this.
    connection.queue_delete(&elsewhere).unwrap();
    connection.queue_declare(&Queue::new(&elsewhere)).unwrap();
    let ran = run(&["dead", "replay", &asked, "--url", &url]).well();
    assert_eq!(ran.text(), format!("replayed 4 of 4 messages in {dead}\n"));
    assert_eq!(bodies(&drain(&connection, &elsewhere)), [elsewhere.as_str()]);
    assert_eq!(bodies(&drain(&connection, &asked)), ["stranger", "beside", "beside"]);

    connection.publish("", &dead, stranger).unwrap();
    run(&["dead", "replay", &asked, "--to", &other, "--url", &url]).well();
    assert_eq!(bodies(&drain(&connection, &other)), ["stranger"]);
    assert_eq!(broker.queue_len(&victim), 0);
    assert_eq!(run(&["dead", "replay", &asked, "--to", "", "--url", &url]).code, Some(2));
}

fn the_dropped_are_gone(broker: Broker) {
    let app = broker.app("");
    let (queue, _) = dead(broker, &app, &["one", "two", "three"]);
    let url = broker.url();
    run(&["dead", "drop", &queue, "--url", &url]).failed(2, &["--yes"]);
    assert_eq!(broker.queue_len(&format!("{queue}.dead")), 3);
    let ran = run(&["dead", "drop", &queue, "--yes", "--reason", "handle t", "--count", "1", "--url", &url]).well();
    assert_eq!(ran.text(), format!("dropped 1 of 3 messages in {queue}.dead\n"));
    let connection = app.publish_pool().connection().unwrap();
    assert_eq!(bodies(&drain(&connection, &format!("{queue}.dead"))), ["one", "three"]);
}

fn a_replay_ends_though_its_messages_come_back(broker: Broker) {
    let connection = broker.app("").publish_pool().connection().unwrap();
    let queue = unique("no-room");
    let dead = format!("{queue}.dead");
    connection.queue_declare(&Queue::new(&dead)).unwrap();
    let no_room = Queue::new(&queue).max_length(0).dead_letter_exchange("").dead_letter_routing_key(&dead);
    connection.queue_declare(&no_room).unwrap();
    // More than are put back together.
    connection.publish_batch((0..450).map(|number| ("", &queue, number.to_string()))).unwrap();
    wait_until("none has found room", || broker.queue_len(&dead) == 450);
    let ran = run(&["dead", "replay", &queue, "--url", &broker.url()]).well();
    assert_eq!(ran.text(), format!("replayed 450 of 450 messages in {dead}\n"));
    wait_until("all are dead again", || broker.queue_len(&dead) == 450);
}

fn without_a_dead_queue_it_says_so(broker: Broker) {
    let connection: &Connection = &broker.app("").publish_pool().connection().unwrap();
    let queue = queue(connection, "healthy");
    for command in ["list", "replay"] {
        run(&["dead", command, &queue, "--url", &broker.url()]).failed(1, &[&format!("no queue \"{queue}.dead\"")]);
    }
}
