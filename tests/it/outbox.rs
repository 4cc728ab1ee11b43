//! The outbox: what is committed is published, whatever happens in between, and nothing else is.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use coney::outbox::{EntryState, Outbox};
use coney::{App, Error, Event, Message, Overflow, Queue, StoreError};
use rusqlite::Connection as Database;
use tempfile::TempDir;

use crate::contract;
use crate::support::{Broker, PATIENCE, bodies, drain, unique, wait_until};

contract! {
    what_is_stored_is_forwarded_in_order,
    a_message_is_published_if_its_transaction_is_committed_and_only_then,
    what_was_stored_while_the_broker_was_away_is_forwarded_when_it_is_back,
    what_nobody_takes_is_put_aside_and_the_rest_goes_on,
    a_missing_exchange_costs_only_its_own_messages,
    a_refused_message_may_hold_up_its_key_and_no_other,
    a_full_queue_is_waited_for,
    properties_arrive_as_they_were_stored,
    many_threads_share_commits_and_each_message_arrives_once,
    a_shutdown_ends_it_and_the_rest_waits_for_the_next_start,
    of_two_apps_one_forwards_and_the_other_takes_over,
    how_it_stands_is_seen_in_health_and_events,
}

/// A database of its own.
struct Shop {
    path: PathBuf,
    _directory: TempDir,
}

impl Shop {
    fn new() -> Shop {
        let directory = tempfile::tempdir().unwrap();
        Shop { path: directory.path().join("shop.db"), _directory: directory }
    }

    fn outbox(&self) -> Outbox {
        Outbox::sqlite(&self.path).unwrap()
    }

    fn database(&self) -> Database {
        let database = Database::open(&self.path).unwrap();
        database.execute_batch("CREATE TABLE IF NOT EXISTS orders (number INTEGER)").unwrap();
        database.busy_timeout(PATIENCE).unwrap();
        database
    }
}

/// A queue of its own, by the default exchange.
fn queue(app: &App, what: &str) -> String {
    let name = unique(what);
    app.publish_pool().connection().unwrap().queue_declare(&Queue::new(&name)).unwrap();
    name
}

fn is_empty(outbox: &Outbox) -> bool {
    outbox.status().unwrap().pending == 0
}

fn all_of(app: &App, queue: &str) -> Vec<String> {
    bodies(&drain(&app.listen_pool().connection().unwrap(), queue))
}

fn numbers(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|number| number.to_string()).collect()
}

fn what_is_stored_is_forwarded_in_order(broker: Broker) {
    let (shop, app) = (Shop::new(), broker.app(""));
    let (outbox, queue) = (shop.outbox(), queue(&app, "forwarded"));
    (0..100).for_each(|number| outbox.publish("", &queue, number.to_string()).unwrap());
    assert_eq!(outbox.status().unwrap().pending, 100);
    assert_eq!(broker.queue_len(&queue), 0, "nothing is published before it forwards");
    outbox.forward(&app).unwrap();
    wait_until("it is empty", || is_empty(&outbox));
    (100..600).for_each(|number| outbox.publish("", &queue, number.to_string()).unwrap());
    wait_until("it is empty", || is_empty(&outbox));
    assert_eq!(all_of(&app, &queue), numbers(0..600));
}

fn a_message_is_published_if_its_transaction_is_committed_and_only_then(broker: Broker) {
    let (shop, app) = (Shop::new(), broker.app(""));
    let (outbox, queue, mut database) = (shop.outbox(), queue(&app, "committed"), shop.database());
    outbox.forward(&app).unwrap();
    for number in 0..40 {
        let transaction = database.transaction().unwrap();
        transaction.execute("INSERT INTO orders VALUES (?1)", [number]).unwrap();
        outbox.publish_in(&transaction, "", &queue, number.to_string()).unwrap();
        if number % 2 == 0 { transaction.commit().unwrap() } else { transaction.rollback().unwrap() }
    }
    wait_until("it is empty", || is_empty(&outbox));
    let even: Vec<String> = (0..40).step_by(2).map(|number| number.to_string()).collect();
    assert_eq!(all_of(&app, &queue), even);
}

fn what_was_stored_while_the_broker_was_away_is_forwarded_when_it_is_back(broker: Broker) {
    let hurt = broker.hurt();
    let (shop, app) = (Shop::new(), hurt.app("[pools.publish]\ncheckout_timeout = \"2s\""));
    let (outbox, queue) = (shop.outbox(), unique("away"));
    let declare = || app.publish_pool().connection().unwrap().queue_declare(&Queue::new(&queue)).map(drop);
    declare().unwrap();
    outbox.forward(&app).unwrap();
    outbox.publish("", &queue, "0").unwrap();
    wait_until("it is empty", || is_empty(&outbox));
    hurt.stop_app();
    (1..300).for_each(|number| outbox.publish("", &queue, number.to_string()).unwrap());
    wait_until("it has noticed", || app.health().outboxes[0].last_error.is_some());
    assert_eq!(outbox.status().unwrap().pending, 299);
    hurt.start_app();
    wait_until("it is empty", || is_empty(&outbox));
    let mut seen = HashSet::new();
    let arrived: Vec<String> = all_of(&app, &queue).into_iter().filter(|number| seen.insert(number.clone())).collect();
    assert_eq!(arrived, numbers(0..300), "all of them, in order, repetitions aside");
    assert!(app.health().outboxes[0].last_error.is_none());
}

fn what_nobody_takes_is_put_aside_and_the_rest_goes_on(broker: Broker) {
    let (shop, app) = (Shop::new(), broker.app(""));
    let (outbox, queue, nowhere) = (shop.outbox(), queue(&app, "taken"), unique("nowhere"));
    for number in 0..30 {
        let to = if number % 10 == 5 { &nowhere } else { &queue };
        outbox.publish("", to, number.to_string()).unwrap();
    }
    outbox.forward(&app).unwrap();
    wait_until("it is empty", || is_empty(&outbox));
    assert_eq!((all_of(&app, &queue).len(), outbox.status().unwrap().refused), (27, 3));
    let refused = outbox.list(EntryState::Refused, 10).unwrap();
    assert!(
        refused.iter().all(|one| one.reason.as_ref().is_some_and(|reason| reason.contains("NO_ROUTE"))),
        "{refused:?}"
    );
    let texts: Vec<_> = refused.iter().map(|one| one.stored.entry.message.text().unwrap()).collect();
    assert_eq!(texts, ["5", "15", "25"]);

    // Once there is a queue they may be tried again, or be given up.
    app.publish_pool().connection().unwrap().queue_declare(&Queue::new(&nowhere)).unwrap();
    assert_eq!(outbox.retry(Some(&[refused[0].stored.id])).unwrap(), 1);
    wait_until("it has come", || broker.queue_len(&nowhere) == 1);
    assert_eq!(outbox.discard(Some(&[refused[1].stored.id])).unwrap(), 1);
    assert_eq!(outbox.retry(None).unwrap(), 1);
    wait_until("it is empty", || is_empty(&outbox) && outbox.status().unwrap().refused == 0);
    assert_eq!(all_of(&app, &nowhere), ["5", "25"]);
}

fn a_missing_exchange_costs_only_its_own_messages(broker: Broker) {
    let (shop, app) = (Shop::new(), broker.app(""));
    let (outbox, queue, missing) = (shop.outbox(), queue(&app, "beside"), unique("missing"));
    for number in 0..20 {
        let exchange = if number % 10 == 3 { missing.as_str() } else { "" };
        outbox.publish(exchange, &queue, number.to_string()).unwrap();
    }
    outbox.forward(&app).unwrap();
    wait_until("it is empty", || is_empty(&outbox));
    let refused = outbox.list(EntryState::Refused, 10).unwrap();
    let reasons: Vec<&str> = refused.iter().filter_map(|one| one.reason.as_deref()).collect();
    assert!(reasons.len() == 2 && reasons.iter().all(|reason| reason.contains("404")), "{reasons:?}");
    let mut arrived = all_of(&app, &queue);
    arrived.dedup();
    let expected: Vec<String> = (0..20).filter(|number| number % 10 != 3).map(|number| number.to_string()).collect();
    let mut seen = HashSet::new();
    let arrived: Vec<String> = arrived.into_iter().filter(|number| seen.insert(number.clone())).collect();
    assert_eq!(arrived, expected);
}

fn a_refused_message_may_hold_up_its_key_and_no_other(broker: Broker) {
    let (shop, app) = (Shop::new(), broker.app(""));
    let (queue, nowhere) = (queue(&app, "other-keys"), unique("not-yet"));
    let outbox = Outbox::builder().block_on_refusal(true).sqlite(&shop.path).unwrap();
    for number in 0..10 {
        let to = if number == 3 { &nowhere } else { &queue };
        outbox.with_ordering_key("blocked").publish("", to, format!("blocked {number}")).unwrap();
        outbox.with_ordering_key("free").publish("", &queue, format!("free {number}")).unwrap();
    }
    outbox.forward(&app).unwrap();
    wait_until("only the rest of the key is left", || outbox.status().unwrap().pending == 7);
    app.publish_pool().connection().unwrap().queue_declare(&Queue::new(&nowhere)).unwrap();
    wait_until("it is empty", || is_empty(&outbox));
    let arrived = all_of(&app, &queue);
    let of = |key: &str| arrived.iter().filter(|text| text.starts_with(key)).cloned().collect::<Vec<String>>();
    assert_eq!(of("free"), (0..10).map(|number| format!("free {number}")).collect::<Vec<_>>());
    let blocked: Vec<String> =
        (0..10).filter(|number| *number != 3).map(|number| format!("blocked {number}")).collect();
    assert_eq!(of("blocked"), blocked);
    assert_eq!((all_of(&app, &nowhere), outbox.status().unwrap().refused), (vec!["blocked 3".to_owned()], 0));
}

fn a_full_queue_is_waited_for(broker: Broker) {
    let (shop, app) = (Shop::new(), broker.app(""));
    let (outbox, name) = (shop.outbox(), unique("full"));
    let queue = Queue::new(&name).max_length(2).overflow(Overflow::RejectPublish);
    let connection = app.publish_pool().connection().unwrap();
    connection.queue_declare(&queue).unwrap();
    (0..3).for_each(|number| outbox.publish("", &name, number.to_string()).unwrap());
    outbox.forward(&app).unwrap();
    wait_until("it is full", || broker.queue_len(&name) == 2);
    let first = connection.get(&name).unwrap().unwrap();
    first.ack().unwrap();
    wait_until("it is empty", || is_empty(&outbox));
    assert_eq!((all_of(&app, &name), outbox.status().unwrap().refused), (numbers(1..3), 0));
}

fn properties_arrive_as_they_were_stored(broker: Broker) {
    let (shop, app) = (Shop::new(), broker.app(""));
    let (outbox, queue) = (shop.outbox(), queue(&app, "properties"));
    let message =
        Message::json(&[1, 2]).unwrap().with_header("tenant", "seven").with_priority(3).with_message_id("mine");
    outbox.publish("", &queue, message.clone()).unwrap();
    outbox.publish("", &queue, "without an id").unwrap();
    // A row of another program.
    let insert = "INSERT INTO coney_outbox (message_id, exchange, routing_key, content_type, body, stored_at)
        VALUES ('theirs', '', ?1, 'text/plain', CAST('by hand' AS BLOB), 0)";
    shop.database().execute(insert, [&queue]).unwrap();
    let ids: Vec<_> = outbox.list(EntryState::Pending, 9).unwrap();
    outbox.forward(&app).unwrap();
    wait_until("it is empty", || is_empty(&outbox));
    let arrived = drain(&app.listen_pool().connection().unwrap(), &queue);
    assert_eq!(*arrived[0].message(), message);
    assert_eq!(arrived[1].message().message_id(), ids[1].stored.entry.message.message_id());
    assert!(arrived[1].message().message_id().is_some_and(|id| id.len() == 32));
    let theirs = arrived[2].message();
    assert_eq!(
        (theirs.message_id(), theirs.content_type(), theirs.text()),
        (Some("theirs"), Some("text/plain"), Some("by hand"))
    );
}

fn many_threads_share_commits_and_each_message_arrives_once(broker: Broker) {
    let (shop, app) = (Shop::new(), broker.app(""));
    let (outbox, queue) = (shop.outbox(), queue(&app, "threads"));
    outbox.forward(&app).unwrap();
    thread::scope(|scope| {
        for thread in 0..8 {
            let (outbox, queue) = (&outbox, &queue);
            scope.spawn(move || {
                (0..50).for_each(|number| outbox.publish("", queue, format!("{thread}/{number}")).unwrap());
            });
        }
    });
    wait_until("it is empty", || is_empty(&outbox));
    let arrived = all_of(&app, &queue);
    assert_eq!((arrived.len(), arrived.iter().collect::<HashSet<_>>().len()), (400, 400));
    for thread in 0..8 {
        let of_thread: Vec<&String> = arrived.iter().filter(|text| text.starts_with(&format!("{thread}/"))).collect();
        assert_eq!(
            of_thread,
            (0..50).map(|number| format!("{thread}/{number}")).collect::<Vec<_>>().iter().collect::<Vec<_>>()
        );
    }
}

fn a_shutdown_ends_it_and_the_rest_waits_for_the_next_start(broker: Broker) {
    let shop = Shop::new();
    let (outbox, app) = (shop.outbox(), broker.app(""));
    let queue = queue(&app, "next-start");
    outbox.forward(&app).unwrap();
    outbox.publish("", &queue, "0").unwrap();
    wait_until("it is empty", || is_empty(&outbox));
    app.shutdown(PATIENCE).unwrap();
    outbox.publish("", &queue, "1").unwrap();
    let error = outbox.forward(&app).unwrap_err();
    assert!(matches!(error, Error::PoolClosed { .. }), "{error}");
    drop((outbox, app));
    let (outbox, app) = (shop.outbox(), broker.app(""));
    assert_eq!(outbox.status().unwrap().pending, 1);
    outbox.forward(&app).unwrap();
    wait_until("it is empty", || is_empty(&outbox));
    assert_eq!(all_of(&app, &queue), numbers(0..2));
}

fn of_two_apps_one_forwards_and_the_other_takes_over(broker: Broker) {
    let shop = Shop::new();
    let (first, second) = (broker.app(""), broker.app(""));
    let (outbox, other, queue) = (shop.outbox(), shop.outbox(), queue(&first, "taken-over"));
    let forwards = |app: &App| app.health().outboxes[0].forwards;
    outbox.forward(&first).unwrap();
    wait_until("the first forwards", || forwards(&first));
    other.forward(&second).unwrap();
    (0..50).for_each(|number| other.publish("", &queue, number.to_string()).unwrap());
    wait_until("it is empty", || is_empty(&outbox));
    assert!(forwards(&first) && !forwards(&second));
    first.shutdown(PATIENCE).unwrap();
    (50..100).for_each(|number| other.publish("", &queue, number.to_string()).unwrap());
    wait_until("it is empty", || is_empty(&outbox));
    wait_until("the second forwards", || forwards(&second));
    assert_eq!(all_of(&second, &queue), numbers(0..100));
}

fn how_it_stands_is_seen_in_health_and_events(broker: Broker) {
    let (shop, app) = (Shop::new(), broker.app(""));
    let events: Arc<Mutex<Vec<Event>>> = Arc::default();
    let noted = Arc::clone(&events);
    app.on_event(move |event| noted.lock().unwrap().push(event.clone())).unwrap();
    let nowhere = unique("nowhere");
    let outbox = Outbox::builder().ready_within(Duration::ZERO).block_on_refusal(true).sqlite(&shop.path).unwrap();
    outbox.publish("", &nowhere, "stuck").unwrap();
    outbox.forward(&app).unwrap();
    wait_until("it is not ready", || !app.health().is_ready());
    let health = app.health();
    assert_eq!((health.outboxes[0].pending, health.outboxes[0].refused), (1, 0));
    assert!(health.to_string().contains("1 pending, 0 refused, the oldest for"), "{health}");
    let json = serde_json::to_value(&health).unwrap();
    assert_eq!((&json["outboxes"][0]["pending"], &json["outboxes"][0]["ready"]), (&1.into(), &false.into()));
    app.shutdown(PATIENCE).unwrap();

    let (outbox, app) = (shop.outbox(), broker.app(""));
    let noted = Arc::clone(&events);
    app.on_event(move |event| noted.lock().unwrap().push(event.clone())).unwrap();
    outbox.forward(&app).unwrap();
    wait_until("it is put aside", || outbox.status().unwrap().refused == 1);
    app.shutdown(PATIENCE).unwrap();
    let events = events.lock().unwrap();
    let told =
        events.iter().any(|event| matches!(event, Event::OutboxRefused { reason, .. } if reason.contains("NO_ROUTE")));
    assert!(told, "{events:?}");
}

#[test]
fn a_full_outbox_refuses_and_stores_nothing() {
    let shop = Shop::new();
    let outbox = Outbox::builder().max_rows(3).max_bytes(10).sqlite(&shop.path).unwrap();
    let cause = |result: coney::Result<()>| match result.unwrap_err() {
        Error::Store { cause, .. } => cause,
        other => panic!("{other}"),
    };
    (0..2).for_each(|_| outbox.publish("", "q", "1234").unwrap());
    let error = cause(outbox.publish("", "q", "1234"));
    assert!(matches!(error, StoreError::Full { what: "bytes", there: 12, most: 10, .. }), "{error}");
    outbox.publish("", "q", "1").unwrap();
    let error = cause(outbox.publish("", "q", ""));
    assert!(matches!(error, StoreError::Full { what: "messages", there: 4, most: 3, .. }), "{error}");
    let mut database = shop.database();
    let transaction = database.transaction().unwrap();
    assert!(matches!(cause(outbox.publish_in(&transaction, "", "q", "")), StoreError::Full { .. }));
    transaction.commit().unwrap();
    let status = outbox.status().unwrap();
    assert_eq!((status.pending, status.bytes, status.refused), (3, 9, 0));
    let outbox = Outbox::builder().max_age(Duration::ZERO).sqlite(&shop.path).unwrap();
    wait_until("it has aged", || {
        matches!(outbox.publish("", "q", ""), Err(Error::Store { cause: StoreError::TooOld { .. }, .. }))
    });
}

#[test]
fn a_file_that_is_no_database_is_told() {
    let shop = Shop::new();
    std::fs::write(&shop.path, "no database at all, but long enough for a page header of one, which SQLite looks at")
        .unwrap();
    let error = Outbox::sqlite(&shop.path).unwrap_err();
    assert!(matches!(&error, Error::Store { cause: StoreError::Corrupt(_), .. }), "{error:?}");
    assert!(error.to_string().contains("shop.db"), "{error}");
    let error = Outbox::sqlite(shop.path.join("missing/shop.db")).unwrap_err();
    assert!(matches!(&error, Error::Store { cause: StoreError::Disconnected(_), .. }), "{error:?}");
}

#[test]
fn a_locked_database_and_a_later_version_are_told() {
    let shop = Shop::new();
    let outbox = shop.outbox();
    let database = shop.database();
    database.execute_batch("BEGIN IMMEDIATE").unwrap();
    let error = outbox.publish("", "q", "x").unwrap_err();
    assert!(matches!(&error, Error::Store { cause: StoreError::Locked(_), .. }) && error.is_transient(), "{error:?}");
    database.execute_batch("ROLLBACK").unwrap();
    outbox.publish("", "q", "x").unwrap();
    database.execute_batch("UPDATE coney_versions SET version = 99").unwrap();
    let error = Outbox::sqlite(&shop.path).unwrap_err();
    assert!(matches!(&error, Error::Store { cause: StoreError::Version { found: 99, .. }, .. }), "{error:?}");
    let error = outbox.publish("", &"k".repeat(256), "x").unwrap_err();
    assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
}
