//! Outbox and inbox in PostgreSQL: what they promise in SQLite, and several processes that share the work.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use coney::inbox::Inbox;
use coney::outbox::{EntryState, Outbox};
use coney::{App, Error, Message, Outcome, Queue, RetryPolicy, StoreError, Topology};
use postgres::Client;

use crate::postgres::Server;
use crate::support::{Broker, PATIENCE, bodies, drain, unique, wait_until};

struct Shop {
    server: Arc<Server>,
    database: String,
    app: App,
    queue: String,
}

impl Shop {
    fn new(server: Arc<Server>) -> Shop {
        let (app, queue) = (Broker::Embedded.app(""), unique("postgres"));
        app.publish_pool().connection().unwrap().queue_declare(&Queue::new(&queue)).unwrap();
        Shop { database: server.database(), server, app, queue }
    }

    fn outbox(&self) -> Outbox {
        Outbox::postgres(&self.server.url(&self.database)).unwrap()
    }

    fn client(&self) -> Client {
        let mut client = self.server.connect(&self.database).unwrap();
        client.batch_execute("CREATE TABLE IF NOT EXISTS orders (number INT)").unwrap();
        client
    }

    fn arrived(&self) -> Vec<String> {
        bodies(&drain(&self.app.listen_pool().connection().unwrap(), &self.queue))
    }

    fn count(&self, table: &str) -> i64 {
        self.client().query_one(&format!("SELECT count(*) FROM {table}"), &[]).unwrap().get(0)
    }
}

fn is_empty(outbox: &Outbox) -> bool {
    outbox.status().unwrap().pending == 0
}

fn numbers(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|number| number.to_string()).collect()
}

#[test]
#[ignore = "needs PostgreSQL: scripts/test"]
fn what_is_stored_is_forwarded_in_order_and_with_its_properties() {
    let shop = Shop::new(Server::shared());
    let outbox = shop.outbox();
    (0..700).for_each(|number| outbox.publish("", &shop.queue, number.to_string()).unwrap());
    let status = outbox.status().unwrap();
    assert_eq!((status.pending, status.bytes), (700, 10 + 180 + 1800));
    outbox.forward(&shop.app).unwrap();
    wait_until("it is empty", || is_empty(&outbox));
    assert_eq!(shop.arrived(), numbers(0..700));
    let message = Message::json(&[1]).unwrap().with_header("tenant", "seven").with_message_id("mine");
    outbox.publish("", &shop.queue, message.clone()).unwrap();
    wait_until("it is empty", || is_empty(&outbox));
    let arrived = drain(&shop.app.listen_pool().connection().unwrap(), &shop.queue);
    assert_eq!(*arrived[0].message(), message);
}

#[test]
#[ignore = "needs PostgreSQL: scripts/test"]
fn a_message_is_published_if_its_transaction_is_committed_and_only_then() {
    let shop = Shop::new(Server::shared());
    let (outbox, mut client) = (shop.outbox(), shop.client());
    outbox.forward(&shop.app).unwrap();
    for number in 0..40_i32 {
        let mut transaction = client.transaction().unwrap();
        transaction.execute("INSERT INTO orders VALUES ($1)", &[&number]).unwrap();
        outbox.publish_in(&mut transaction, "", &shop.queue, number.to_string()).unwrap();
        if number % 2 == 0 { transaction.commit().unwrap() } else { transaction.rollback().unwrap() }
    }
    wait_until("it is empty", || is_empty(&outbox));
    assert_eq!(shop.arrived(), (0..40).step_by(2).map(|number| number.to_string()).collect::<Vec<_>>());
    assert_eq!(shop.count("orders"), 20);
}

#[test]
#[ignore = "needs PostgreSQL: scripts/test"]
fn many_threads_share_commits_and_each_message_arrives_once() {
    let shop = Shop::new(Server::shared());
    let outbox = shop.outbox();
    outbox.forward(&shop.app).unwrap();
    thread::scope(|scope| {
        for thread in 0..8 {
            let (outbox, queue) = (&outbox, &shop.queue);
            scope.spawn(move || {
                (0..50).for_each(|number| outbox.publish("", queue, format!("{thread}/{number}")).unwrap());
            });
        }
    });
    wait_until("it is empty", || is_empty(&outbox));
    let arrived = shop.arrived();
    assert_eq!((arrived.len(), arrived.iter().collect::<HashSet<_>>().len()), (400, 400));
}

#[test]
#[ignore = "needs PostgreSQL: scripts/test"]
fn several_share_the_work_by_ordering_key_and_send_nothing_twice() {
    let shop = Shop::new(Server::shared());
    let (outbox, others) = (shop.outbox(), [shop.outbox(), shop.outbox()]);
    for number in 0..60 {
        for key in 0..20 {
            let key = format!("key-{key}");
            outbox.with_ordering_key(&key).publish("", &shop.queue, format!("{key} {number}")).unwrap();
        }
    }
    let apps: Vec<App> = others.iter().map(|_| Broker::Embedded.app("")).collect();
    others.iter().zip(&apps).for_each(|(outbox, app)| outbox.forward(app).unwrap());
    wait_until("it is empty", || is_empty(&outbox));
    let arrived = shop.arrived();
    assert_eq!(arrived.len(), 20 * 60, "nothing twice");
    for key in 0..20 {
        let key = format!("key-{key} ");
        let of_key: Vec<&str> = arrived.iter().filter_map(|text| text.strip_prefix(key.as_str())).collect();
        assert_eq!(of_key, numbers(0..60), "{key}");
    }
    // One that ends leaves its keys to the others.
    apps[0].shutdown(PATIENCE).unwrap();
    (0..20).for_each(|number| outbox.publish("", &shop.queue, number.to_string()).unwrap());
    wait_until("it is empty", || is_empty(&outbox));
    assert_eq!(shop.arrived(), numbers(0..20));
}

#[test]
#[ignore = "needs PostgreSQL: scripts/test"]
fn what_is_refused_is_put_aside_and_tried_again_or_dropped() {
    let shop = Shop::new(Server::shared());
    let (outbox, nowhere) = (shop.outbox(), unique("nowhere"));
    for number in 0..6 {
        let to = if number % 2 == 0 { &nowhere } else { &shop.queue };
        outbox.publish("", to, number.to_string()).unwrap();
    }
    outbox.forward(&shop.app).unwrap();
    wait_until("it is empty", || is_empty(&outbox));
    assert_eq!((shop.arrived(), outbox.status().unwrap().refused), (vec!["1".into(), "3".into(), "5".into()], 3));
    let refused = outbox.list(EntryState::Refused, 9).unwrap();
    assert!(refused[0].reason.as_ref().is_some_and(|reason| reason.contains("NO_ROUTE")), "{refused:?}");
    shop.app.publish_pool().connection().unwrap().queue_declare(&Queue::new(&nowhere)).unwrap();
    assert_eq!(outbox.discard(Some(&[refused[1].stored.id])).unwrap(), 1);
    assert_eq!(outbox.retry(None).unwrap(), 2);
    wait_until("they have come", || Broker::Embedded.queue_len(&nowhere) == 2);
    wait_until("none is left", || outbox.status().unwrap() == coney::outbox::Status::default());
}

#[test]
#[ignore = "needs PostgreSQL: scripts/test"]
fn a_server_that_goes_away_is_told_and_found_again() {
    let server = Arc::new(Server::start());
    let shop = Shop::new(Arc::clone(&server));
    let outbox = shop.outbox();
    outbox.forward(&shop.app).unwrap();
    outbox.publish("", &shop.queue, "0").unwrap();
    wait_until("it is empty", || is_empty(&outbox));
    server.stop();
    let error = outbox.publish("", &shop.queue, "lost").unwrap_err();
    assert!(matches!(&error, Error::Store { cause: StoreError::Disconnected(_), .. }), "{error:?}");
    assert!(error.is_transient() && !format!("{error} {error:?} {outbox:?}").contains("s3cret"));
    wait_until("health knows", || shop.app.health().outboxes[0].last_error.is_some());
    server.start_again();
    outbox.publish("", &shop.queue, "1").unwrap();
    wait_until("it is empty", || is_empty(&outbox));
    assert_eq!(shop.arrived(), numbers(0..2));
}

#[test]
#[ignore = "needs PostgreSQL: scripts/test"]
fn limits_and_versions_are_told() {
    let shop = Shop::new(Server::shared());
    let url = shop.server.url(&shop.database);
    let outbox = Outbox::builder().max_rows(2).postgres(&url).unwrap();
    (0..2).for_each(|_| outbox.publish("", "q", "x").unwrap());
    let error = outbox.publish("", "q", "x").unwrap_err();
    assert!(matches!(error, Error::Store { cause: StoreError::Full { there: 3, most: 2, .. }, .. }), "{error}");
    shop.client().batch_execute("UPDATE coney_versions SET version = 99").unwrap();
    let error = Outbox::postgres(&url).unwrap_err();
    assert!(matches!(error, Error::Store { cause: StoreError::Version { found: 99, .. }, .. }), "{error}");
    let error = Outbox::postgres("postgresql://u:s3cret@h:port/d").unwrap_err();
    assert!(error.to_string().contains("expected the URL") && !format!("{error:?}").contains("s3cret"), "{error:?}");
    let nobody = url.replace(&shop.database, "missing");
    assert!(matches!(Outbox::postgres(&nobody), Err(Error::Store { .. })));
}

#[test]
#[ignore = "needs PostgreSQL: scripts/test"]
fn an_inbox_handles_each_message_once_and_rolls_back_what_fails() {
    let shop = Shop::new(Server::shared());
    drop(shop.client());
    let inbox = Inbox::postgres(&shop.server.url(&shop.database)).unwrap();
    let (outbox, invoices) = (shop.outbox(), unique("invoices"));
    outbox.forward(&shop.app).unwrap();
    shop.app.publish_pool().connection().unwrap().queue_declare(&Queue::new(&invoices)).unwrap();
    let (sending, to, failures) = (outbox.clone(), invoices.clone(), AtomicUsize::new(3));
    let listener = shop
        .app
        .listener(&shop.queue)
        .concurrency(4)
        .topology(Topology::new().queue(Queue::new(&shop.queue)))
        .retry(RetryPolicy::new([Duration::from_millis(10)]).unwrap().with_max_attempts(9))
        .inbox(&inbox)
        .spawn_tx(move |_, delivery, transaction| -> Result<Outcome, Box<dyn std::error::Error + Send + Sync>> {
            let number: i32 = delivery.message().text().unwrap_or_default().parse()?;
            transaction.execute("INSERT INTO orders VALUES ($1)", &[&number])?;
            sending.publish_in(&mut *transaction, "", &to, "an invoice")?;
            let fails = failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok();
            Ok(if fails { Outcome::Retry } else { Outcome::Ack })
        })
        .unwrap();
    for number in 0..60 {
        let message = Message::new((number % 20).to_string()).with_message_id((number % 20).to_string());
        shop.app.publish_pool().publish("", &shop.queue, message).unwrap();
    }
    wait_until("all are acked", || listener.stats().acked == 60);
    listener.stop().unwrap();
    wait_until("it is empty", || is_empty(&outbox));
    assert_eq!((shop.count("orders"), shop.count("coney_inbox")), (20, 20));
    assert_eq!(Broker::Embedded.queue_len(&invoices), 20);
}
