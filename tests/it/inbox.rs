//! The inbox: a message that is delivered several times changes the database once.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use coney::inbox::Inbox;
use coney::outbox::Outbox;
use coney::{App, Context, Delivery, Listener, Message, Outcome, Queue, RetryPolicy, Topology};
use rusqlite::{Connection as Database, Transaction};
use tempfile::TempDir;

use crate::contract;
use crate::support::{Broker, PATIENCE, unique, wait_until};

contract! {
    a_message_that_comes_twice_is_handled_once,
    what_fails_is_rolled_back_and_tried_again,
    a_panic_is_rolled_back,
    a_message_without_an_id_goes_to_the_dead,
    the_id_may_be_something_else,
    ids_are_told_apart_by_queue,
    ids_are_forgotten_after_the_retention,
    messages_go_from_database_to_database_once,
    several_threads_handle_each_message_once,
    a_listener_may_leave_out_what_it_has_handled,
}

struct Stock {
    path: PathBuf,
    _directory: TempDir,
}

impl Stock {
    fn new() -> Stock {
        let directory = tempfile::tempdir().unwrap();
        let stock = Stock { path: directory.path().join("stock.db"), _directory: directory };
        stock.database().execute_batch("CREATE TABLE sold (text TEXT)").unwrap();
        stock
    }

    fn database(&self) -> Database {
        let database = Database::open(&self.path).unwrap();
        database.busy_timeout(PATIENCE).unwrap();
        database
    }

    fn sold(&self) -> Vec<String> {
        let database = self.database();
        let mut query = database.prepare("SELECT text FROM sold ORDER BY rowid").unwrap();
        query.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect()
    }

    fn ids(&self) -> i64 {
        self.database().query_row("SELECT count(*) FROM coney_inbox", [], |row| row.get(0)).unwrap()
    }
}

fn sell(_: &Context<'_>, delivery: &Delivery<'_>, transaction: &Transaction<'_>) -> rusqlite::Result<()> {
    transaction.execute("INSERT INTO sold VALUES (?1)", [delivery.message().text()]).map(drop)
}

fn publish(app: &App, queue: &str, text: &str, id: &str) {
    app.publish_pool().publish("", queue, Message::new(text).with_message_id(id)).unwrap();
}

fn acked(listener: &Listener, count: u64) {
    wait_until("all are acked", || listener.stats().acked == count);
}

fn a_message_that_comes_twice_is_handled_once(broker: Broker) {
    let (stock, app, queue) = (Stock::new(), broker.app(""), unique("twice"));
    let inbox = Inbox::sqlite(&stock.path).unwrap();
    let listen = || {
        let topology = Topology::new().queue(Queue::new(&queue));
        app.listener(&queue).topology(topology).inbox(&inbox).spawn_tx(sell).unwrap()
    };
    let listener = listen();
    for (text, id) in [("a", "1"), ("b", "2"), ("a again", "1"), ("c", "3")] {
        publish(&app, &queue, text, id);
    }
    acked(&listener, 4);
    listener.stop().unwrap();
    // It knows them after a restart too.
    let listener = listen();
    publish(&app, &queue, "b again", "2");
    acked(&listener, 1);
    listener.stop().unwrap();
    assert_eq!((stock.sold(), stock.ids()), (vec!["a".to_owned(), "b".to_owned(), "c".to_owned()], 3));
}

/// A listener whose handler changes the database, and then fails so often.
fn failing(broker: Broker, fail: impl Fn() -> Outcome + Send + Sync + 'static) {
    let (stock, app, queue) = (Stock::new(), broker.app(""), unique("failing"));
    let inbox = Inbox::sqlite(&stock.path).unwrap();
    let left = AtomicUsize::new(2);
    let handler = move |context: &Context<'_>, delivery: &Delivery<'_>, transaction: &Transaction<'_>| {
        sell(context, delivery, transaction).unwrap();
        match left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)) {
            Ok(_) => fail(),
            Err(_) => Outcome::Ack,
        }
    };
    let listener = app
        .listener(&queue)
        .topology(Topology::new().queue(Queue::new(&queue)))
        .retry(RetryPolicy::new([Duration::from_millis(10)]).unwrap().with_max_attempts(5))
        .inbox(&inbox)
        .spawn_tx(handler)
        .unwrap();
    publish(&app, &queue, "a", "1");
    wait_until("it is acked", || listener.stats().acked == 1);
    assert_eq!((stock.sold(), stock.ids(), listener.stats().retried), (vec!["a".to_owned()], 1, 2));
    listener.stop().unwrap();
}

fn what_fails_is_rolled_back_and_tried_again(broker: Broker) {
    failing(broker, || Outcome::Failed("not now".to_owned()));
}

fn a_panic_is_rolled_back(broker: Broker) {
    failing(broker, || panic!("as the test wants it"));
}

fn a_message_without_an_id_goes_to_the_dead(broker: Broker) {
    let (stock, app, queue) = (Stock::new(), broker.app(""), unique("without-id"));
    let inbox = Inbox::sqlite(&stock.path).unwrap();
    let topology = Topology::new().queue(Queue::new(&queue));
    let listener = app.listener(&queue).topology(topology).inbox(&inbox).spawn_tx(sell).unwrap();
    app.publish_pool().connection().unwrap().publish("", &queue, "nobody").unwrap();
    let dead_queue = format!("{queue}.dead");
    wait_until("it is with the dead", || broker.queue_len(&dead_queue) == 1);
    let connection = app.listen_pool().connection().unwrap();
    let dead = connection.get(&dead_queue).unwrap().unwrap();
    assert!(dead.message().header_str("coney-error").is_some_and(|error| error.contains("no message_id")));
    dead.ack().unwrap();
    drop(connection);
    assert!(stock.sold().is_empty());
    listener.stop().unwrap();
}

fn the_id_may_be_something_else(broker: Broker) {
    let (stock, app, queue) = (Stock::new(), broker.app(""), unique("other-id"));
    let inbox = Inbox::sqlite(&stock.path).unwrap();
    let listener = app
        .listener(&queue)
        .topology(Topology::new().queue(Queue::new(&queue)))
        .inbox(&inbox)
        .id(|delivery| delivery.message().header_str("order").map(str::to_owned))
        .spawn_tx(sell)
        .unwrap();
    for text in ["a", "a again"] {
        let message = Message::new(text).with_header("order", "7");
        app.publish_pool().publish("", &queue, message).unwrap();
    }
    acked(&listener, 2);
    assert_eq!(stock.sold(), ["a"]);
    listener.stop().unwrap();
}

fn ids_are_told_apart_by_queue(broker: Broker) {
    let (stock, app) = (Stock::new(), broker.app(""));
    let inbox = Inbox::sqlite(&stock.path).unwrap();
    let queues = [unique("one"), unique("other")];
    for queue in &queues {
        let topology = Topology::new().queue(Queue::new(queue));
        let listener = app.listener(queue).topology(topology).inbox(&inbox).spawn_tx(sell).unwrap();
        publish(&app, queue, "a", "1");
        acked(&listener, 1);
        listener.stop().unwrap();
    }
    assert_eq!((stock.sold().len(), stock.ids()), (2, 2));
}

fn ids_are_forgotten_after_the_retention(broker: Broker) {
    let (stock, app, queue) = (Stock::new(), broker.app(""), unique("retention"));
    let listen = || {
        // Each inbox looks for old ones with its first message.
        let inbox = Inbox::sqlite(&stock.path).unwrap().with_retention(Duration::from_secs(3600));
        let topology = Topology::new().queue(Queue::new(&queue));
        app.listener(&queue).topology(topology).inbox(&inbox).spawn_tx(sell).unwrap()
    };
    let listener = listen();
    publish(&app, &queue, "a", "1");
    acked(&listener, 1);
    listener.stop().unwrap();
    stock.database().execute("UPDATE coney_inbox SET handled_at = handled_at - 3600001", []).unwrap();
    let listener = listen();
    publish(&app, &queue, "b", "2");
    acked(&listener, 1);
    assert_eq!(stock.ids(), 1);
    publish(&app, &queue, "a again", "1");
    acked(&listener, 2);
    assert_eq!(stock.sold(), ["a", "b", "a again"]);
    listener.stop().unwrap();
}

fn messages_go_from_database_to_database_once(broker: Broker) {
    let (stock, app) = (Stock::new(), broker.app(""));
    let (orders, invoices) = (unique("orders"), unique("invoices"));
    let inbox = Inbox::sqlite(&stock.path).unwrap();
    let outbox = Outbox::sqlite(&stock.path).unwrap();
    outbox.forward(&app).unwrap();
    let topology = Topology::new().queue(Queue::new(&orders)).queue(Queue::new(&invoices));
    let (sending, to) = (outbox.clone(), invoices.clone());
    let listener = app
        .listener(&orders)
        .topology(topology)
        .inbox(&inbox)
        .spawn_tx(move |context, delivery, transaction| -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
            sell(context, delivery, transaction)?;
            sending.publish_in(transaction, "", &to, "an invoice")?;
            Ok(())
        })
        .unwrap();
    for number in 0..60 {
        publish(&app, &orders, &number.to_string(), &(number % 20).to_string());
    }
    acked(&listener, 60);
    wait_until("all are forwarded", || outbox.status().unwrap().pending == 0);
    wait_until("all have come", || broker.queue_len(&invoices) == 20);
    assert_eq!(stock.sold().len(), 20);
    listener.stop().unwrap();
}

fn several_threads_handle_each_message_once(broker: Broker) {
    let (stock, app, queue) = (Stock::new(), broker.app(""), unique("threads"));
    let inbox = Inbox::sqlite(&stock.path).unwrap();
    let topology = Topology::new().queue(Queue::new(&queue));
    let listener = app.listener(&queue).concurrency(4).topology(topology).inbox(&inbox).spawn_tx(sell).unwrap();
    let connection = app.publish_pool().connection().unwrap();
    let messages = (0..200).map(|number| {
        let id = (number % 50).to_string();
        ("", queue.as_str(), Message::new(id.as_str()).with_message_id(id))
    });
    connection.publish_batch(messages).unwrap();
    acked(&listener, 200);
    assert_eq!(stock.sold().len(), 50);
    listener.stop().unwrap();
}

fn a_listener_may_leave_out_what_it_has_handled(broker: Broker) {
    let (app, queue) = (broker.app(""), unique("dedupe"));
    let seen: Arc<Mutex<Vec<String>>> = Arc::default();
    let noted = Arc::clone(&seen);
    let failed = AtomicUsize::new(0);
    let listener = app
        .listener(&queue)
        .topology(Topology::new().queue(Queue::new(&queue)))
        .dedupe(Duration::from_secs(3600))
        .spawn(move |_, delivery| {
            let text = delivery.message().text().unwrap().to_owned();
            noted.lock().unwrap().push(text.clone());
            // What fails is not handled, and is handled once more.
            if text == "b" && failed.fetch_add(1, Ordering::SeqCst) == 0 { Outcome::Requeue } else { Outcome::Ack }
        })
        .unwrap();
    for (text, id) in [("a", "1"), ("a", "1"), ("b", "2")] {
        publish(&app, &queue, text, id);
    }
    app.publish_pool().connection().unwrap().publish("", &queue, "without").unwrap();
    app.publish_pool().connection().unwrap().publish("", &queue, "without").unwrap();
    acked(&listener, 5);
    let mut seen = seen.lock().unwrap().clone();
    seen.sort();
    assert_eq!(seen, ["a", "b", "b", "without", "without"]);
    listener.stop().unwrap();
}
