//! What a program is told of by `App::on_event`: each event by its real cause, in order, and never in anybody's way.

use std::cell::RefCell;
use std::sync::Mutex;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use coney::rpc::RpcWorker;
use coney::{App, Error, Event, Message, Outcome, RetryPolicy};
use log::Level;

use crate::closed::closed_port;
use crate::contract;
use crate::logs;
use crate::proxy::{Cut, Proxy};
use crate::support::{Broker, PATIENCE, app, queue, unique, wait_until};

contract! {
    a_connection_is_told_of_when_it_opens_and_when_it_closes,
    an_idle_connection_that_is_closed_or_cut_is_told_of_once_and_at_once,
    a_connection_that_its_borrower_leaves_in_doubt_is_lost,
    an_attempt_to_connect_that_fails_is_told_with_its_cause,
    a_block_is_told_and_its_end,
    a_listener_tells_that_it_consumes_recovers_and_stops,
    a_listener_whose_pool_is_closed_says_why_it_stops,
    a_message_that_is_given_up_is_told_with_its_reason,
    a_message_that_fails_is_told_of_once_however_it_is_published,
    a_message_that_gets_there_after_a_cut_has_not_failed,
    a_handler_that_stands_still_delays_nobody_and_is_told_what_it_missed,
    a_handler_that_panics_is_told_of_the_next_event,
    a_shutdown_waits_until_all_is_told,
    the_end_of_the_app_waits_until_all_is_told,
    after_a_shutdown_nothing_is_told,
    a_handler_may_shut_its_app_down,
    a_handler_that_does_not_return_costs_a_shutdown_its_time_and_no_more,
    a_handler_that_publishes_in_vain_is_not_told_of_that,
}

/// What a handler has been told.
struct Told {
    events: Receiver<Event>,
    /// What has been looked at.
    past: RefCell<Vec<Event>>,
}

/// Has everything that happens to `app` put down.
fn watch(app: &App) -> Told {
    let (tell, events) = mpsc::channel();
    app.on_event(move |event| drop(tell.send(event.clone()))).unwrap();
    Told { events, past: RefCell::default() }
}

impl Told {
    /// Waits for the next event that `is_it` says something about.
    #[track_caller]
    fn next<T>(&self, what: &str, is_it: impl Fn(&Event) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(event) = self.events.recv_timeout(left) else {
                panic!("not told within {PATIENCE:?}: {what}; {:#?}", self.past.borrow());
            };
            let found = is_it(&event);
            self.past.borrow_mut().push(event);
            if let Some(found) = found {
                return found;
            }
        }
    }

    /// Everything, once the handler has been let go of.
    fn all(self) -> Vec<Event> {
        let mut all = self.past.into_inner();
        all.extend(until_let_go(&self.events));
        all
    }
}

/// What comes until the handler that sends it has been let go of.
#[track_caller]
fn until_let_go(events: &Receiver<Event>) -> Vec<Event> {
    let mut all = Vec::new();
    loop {
        match events.recv_timeout(PATIENCE) {
            Ok(event) => all.push(event),
            Err(RecvTimeoutError::Disconnected) => return all,
            Err(RecvTimeoutError::Timeout) => panic!("the handler is still there after {PATIENCE:?}: {all:#?}"),
        }
    }
}

fn opened(event: &Event) -> Option<String> {
    match event {
        Event::ConnectionOpened { connection, .. } => Some(connection.clone()),
        _ => None,
    }
}

fn lost(event: &Event) -> Option<(String, Error)> {
    match event {
        Event::ConnectionLost { connection, error, .. } => Some((connection.clone(), error.clone())),
        _ => None,
    }
}

fn failed(event: &Event) -> Option<(Option<String>, Error)> {
    match event {
        Event::PublishFailed { message_id, error, .. } => Some((message_id.clone(), error.clone())),
        _ => None,
    }
}

/// Waits until there is a line in the log that says what the event says.
#[track_caller]
fn is_logged(event: &Event, level: Level) {
    let said = || logs::lines_with(&event.to_string());
    wait_until("it is logged", || !said().is_empty());
    assert!(said().iter().all(|line| line.level == level), "{:?}", said());
}

fn a_connection_is_told_of_when_it_opens_and_when_it_closes(broker: Broker) {
    logs::keep();
    let pool = unique("told");
    let app = broker.app(&format!("[pools.{pool}]\nsize = 2"));
    let told = watch(&app);
    let (one, two) = (app.pool(&pool).unwrap().connection().unwrap(), app.pool(&pool).unwrap().connection().unwrap());
    let names = [one.name().to_owned(), two.name().to_owned()];
    drop((one, two));
    app.shutdown(PATIENCE).unwrap();
    let events = told.all();
    for name in &names {
        let own: Vec<&Event> =
            events.iter().filter(|event| event.to_string().starts_with(&format!("{name}: "))).collect();
        match own[..] {
            [open @ Event::ConnectionOpened { pool: of, url, .. }, end @ Event::ConnectionClosed { .. }] => {
                assert_eq!(*of, pool);
                assert!(url.contains(&broker.addr().port().to_string()) && !url.contains("guest:guest"), "{url}");
                is_logged(open, Level::Debug);
                is_logged(end, Level::Debug);
            }
            _ => panic!("unexpected: {own:#?}"),
        }
    }
    assert_eq!(events.len(), 4, "{events:#?}");
}

fn an_idle_connection_that_is_closed_or_cut_is_told_of_once_and_at_once(broker: Broker) {
    logs::keep();
    let node = broker.hurt();
    let app = node.app("");
    let told = watch(&app);
    let closed = app.publish_pool().connection().unwrap().name().to_owned();
    node.close_all_connections("maintenance");
    // Nobody asks for it.
    let (name, error) = told.next("the broker closes it", lost);
    assert_eq!((&name, error.code()), (&closed, Some(320)), "{error}");
    assert!(matches!(&error, Error::ConnectionClosed { text, .. } if text.contains("maintenance")), "{error}");
    is_logged(told.past.borrow().last().unwrap(), Level::Debug);
    assert_eq!(app.publish_pool().status().discarded, 1, "it is counted when it is told");

    let proxy = Proxy::start(node.addr()).unwrap();
    let behind = crate::support::app(&format!("amqp://guest:guest@{}/%2f", proxy.addr()), "");
    let told_behind = watch(&behind);
    let cut = behind.publish_pool().connection().unwrap().name().to_owned();
    proxy.cut(Cut::Reset);
    let (name, error) = told_behind.next("it is cut", lost);
    assert!(name == cut && matches!(error, Error::ConnectionLost { .. }), "{name}: {error}");

    // What finds them dead afterwards is a consequence.
    for (app, told) in [(app, told), (behind, told_behind)] {
        drop(app.publish_pool().connection().unwrap());
        app.shutdown(PATIENCE).unwrap();
        let events = told.all();
        assert_eq!(events.iter().filter_map(lost).count(), 1, "{events:#?}");
        let ended = events.iter().filter(|event| matches!(event, Event::ConnectionClosed { .. })).count();
        assert_eq!((events.iter().filter_map(opened).count(), ended), (2, 1), "{events:#?}");
    }
}

fn a_connection_that_its_borrower_leaves_in_doubt_is_lost(broker: Broker) {
    let app = broker.app("");
    let told = watch(&app);
    std::thread::scope(|scope| {
        let panics = scope.spawn(|| {
            let _connection = app.publish_pool().connection().unwrap();
            panic!("this panic is part of the test");
        });
        panics.join().unwrap_err();
    });
    let (_, error) = told.next("the connection is given up", lost);
    assert!(error.to_string().contains("its borrower panicked"), "{error}");
}

fn an_attempt_to_connect_that_fails_is_told_with_its_cause(broker: Broker) {
    let attempt = |event: &Event| match event {
        Event::ConnectFailed { error, wait, .. } => Some((error.to_string(), *wait)),
        _ => None,
    };
    let refused = app(&broker.url_with("nobody:wrong", "%2f"), "");
    let told = watch(&refused);
    let error = refused.publish_pool().connection().map(drop).unwrap_err();
    assert_eq!(told.next("the login is refused", attempt), (error.to_string(), None), "it is not tried again");

    let closed = closed_port();
    let nobody = app(&format!("amqp://guest:guest@{closed}/%2f"), "");
    let told = watch(&nobody);
    nobody.publish_pool().connection_timeout(Duration::from_millis(400)).map(drop).unwrap_err();
    let (cause, wait) = told.next("nobody listens", attempt);
    assert!(cause.contains("refused") && wait.is_some(), "{cause}, {wait:?}");
    told.next("the last attempt", |event| attempt(event).filter(|(_, wait)| wait.is_none()));
}

fn a_block_is_told_and_its_end(broker: Broker) {
    logs::keep();
    let node = broker.hurt();
    let app = node.app("[pools.publish]\nconfirm_timeout = \"2s\"");
    let told = watch(&app);
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "told-blocked");
    node.block_publishers();
    let error = connection.publish("", &name, Message::new("x").with_message_id("blocked")).unwrap_err();
    let blocked = told.next("the broker blocks", |event| match event {
        Event::ConnectionBlocked { connection, reason, .. } => Some((connection.clone(), reason.clone())),
        _ => None,
    });
    assert!(blocked.0 == connection.name() && blocked.1.contains("low on memory"), "{blocked:?}");
    is_logged(told.past.borrow().last().unwrap(), Level::Warn);
    let (id, told_error) = told.next("the message has failed", failed);
    assert_eq!((id.as_deref(), told_error.to_string()), (Some("blocked"), error.to_string()));
    node.unblock_publishers();
    told.next("the broker takes messages again", |event| {
        matches!(event, Event::ConnectionUnblocked { connection: of, .. } if of == connection.name()).then_some(())
    });
    is_logged(told.past.borrow().last().unwrap(), Level::Info);
}

fn a_listener_tells_that_it_consumes_recovers_and_stops(broker: Broker) {
    logs::keep();
    let node = broker.hurt();
    let app = node.app("");
    let told = watch(&app);
    let name = queue(&app.publish_pool().connection().unwrap(), "told-listener");
    app.spawn_listener(unique("told-missing"), |_, _| ()).map(drop).unwrap_err();
    let listener = app.spawn_listener(&name, |_, _| ()).unwrap();
    let consuming = |event: &Event| match event {
        Event::ListenerConsuming { listener, pool, again, .. } => Some((listener.clone(), pool.clone(), *again)),
        _ => None,
    };
    assert_eq!(told.next("it consumes", consuming), (name.clone(), "listen".to_owned(), false));
    is_logged(told.past.borrow().last().unwrap(), Level::Info);
    node.close_all_connections("maintenance");
    let recovering = told.next("it has lost its consumers", |event| match event {
        Event::ListenerRecovering { listener, error, attempt, wait, .. } => {
            Some((listener.clone(), error.code(), *attempt, *wait))
        }
        _ => None,
    });
    assert_eq!((recovering.0, recovering.1, recovering.2), (name.clone(), Some(320), 1));
    assert!(recovering.3 <= Duration::from_millis(100), "{:?}", recovering.3);
    is_logged(told.past.borrow().last().unwrap(), Level::Warn);
    let of_listen = |event: &Event| matches!(event, Event::ConnectionLost { pool, .. } if pool == "listen");
    assert!(told.past.borrow().iter().any(of_listen), "the connection is lost before its listener notices");
    assert_eq!(told.next("it is back", consuming), (name.clone(), "listen".to_owned(), true));
    listener.stop().unwrap();
    app.shutdown(PATIENCE).unwrap();
    let events = told.all();
    let stopped: Vec<&Event> = events.iter().filter(|event| matches!(event, Event::ListenerStopped { .. })).collect();
    match stopped[..] {
        [end @ Event::ListenerStopped { listener, error: None, .. }] if *listener == name => {
            is_logged(end, Level::Debug);
        }
        _ => panic!("one listener has ended, and one has not started: {stopped:#?}"),
    }
}

fn a_listener_whose_pool_is_closed_says_why_it_stops(broker: Broker) {
    logs::keep();
    let node = broker.hurt();
    let app = node.app("");
    let told = watch(&app);
    let name = queue(&app.publish_pool().connection().unwrap(), "told-closed");
    let listener = app.spawn_listener(&name, |_, _| ()).unwrap();
    app.listen_pool().close();
    node.close_all_connections("maintenance");
    let error = told.next("it has ended", |event| match event {
        Event::ListenerStopped { error, .. } => Some(error.clone()),
        _ => None,
    });
    assert!(matches!(error, Some(Error::PoolClosed { .. })), "{error:?}");
    is_logged(told.past.borrow().last().unwrap(), Level::Error);
    listener.stop().unwrap();
}

fn a_message_that_is_given_up_is_told_with_its_reason(broker: Broker) {
    logs::keep();
    let app = broker.app("");
    let told = watch(&app);
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "told-dead");
    let retry = RetryPolicy::new([Duration::from_millis(20)]).unwrap();
    let listener = app
        .listener(&name)
        .retry(retry)
        .spawn(|_, delivery| match delivery.message().text() {
            Some("fails") => Outcome::Failed("no stock".to_owned()),
            _ => Outcome::Ack,
        })
        .unwrap();
    connection.publish("", &name, "fine").unwrap();
    connection.publish("", &name, Message::new("fails").with_message_id("order-7")).unwrap();
    let dead = told.next("it is dead", |event| match event {
        Event::MessageDead { listener, queue, dead_queue, message_id, reason, is_bare, .. } => {
            assert!(!is_bare);
            Some([listener, queue, dead_queue, message_id.as_ref().unwrap(), reason].map(String::clone))
        }
        _ => None,
    });
    assert_eq!(dead, [&name, &name, &format!("{name}.dead"), "order-7", "no stock"]);
    assert_eq!(listener.stats().dead, 1, "it is counted by then");
    is_logged(told.past.borrow().last().unwrap(), Level::Error);
    listener.stop().unwrap();
    app.shutdown(Duration::ZERO).unwrap_err(); // this test has a connection out
    drop(connection);
    let events = told.all();
    assert!(events.iter().filter_map(failed).count() == 0, "{events:#?}");
    assert_eq!(events.iter().filter(|event| matches!(event, Event::MessageDead { .. })).count(), 1, "{events:#?}");
}

fn a_message_that_fails_is_told_of_once_however_it_is_published(broker: Broker) {
    let app = broker.app("");
    let told = watch(&app);
    let connection = app.publish_pool().connection().unwrap();
    let (to, nowhere) = (queue(&connection, "told-published"), unique("nowhere"));
    let message = |id: &str| Message::new("x").with_message_id(id);
    connection.publish("", &to, message("fine")).unwrap();
    connection.publish_async("", &to, message("fine"), |outcome| outcome.unwrap());
    connection.publish_batch([("", to.as_str(), message("fine"))]).unwrap();
    app.publish_pool().publish("", &to, message("fine")).unwrap();

    connection.publish("", &nowhere, message("sync")).unwrap_err();
    connection.publish("", &nowhere, "none").unwrap_err();
    connection.publish_async("", &nowhere, message("async"), |outcome| assert!(outcome.is_err()));
    connection.flush(PATIENCE).unwrap();
    let batch = [("", to.as_str(), message("fine")), ("", nowhere.as_str(), message("batch"))];
    connection.publish_batch(batch).unwrap_err();
    app.publish_pool().publish("", &nowhere, message("pool")).unwrap_err();
    app.publish_pool().publish("no such exchange", "k", message("refused")).unwrap_err();
    connection.publish("", &"k".repeat(256), message("never sent")).unwrap_err();
    app.publish_pool().publish("", &"k".repeat(256), message("never sent by the pool")).unwrap_err();
    app.before_publish(|_, message| match message.message_id() {
        Some("hooked") => Err(Error::refused("not this one")),
        _ => Ok(message),
    });
    connection.publish("", &to, message("hooked")).unwrap_err();
    // A worker's answer for which there is no queue.
    let calls = unique("told-calls");
    let worker = RpcWorker::new(&app).route(&calls, |n: u64| Ok::<_, String>(n)).run().unwrap();
    let request = Message::json(&1).unwrap().with_reply_to(&nowhere).with_correlation_id("1");
    connection.publish("", &calls, request).unwrap();
    wait_until("it is answered", || worker.stats().acked == 1);
    worker.stop().unwrap();
    drop(connection);
    app.shutdown(PATIENCE).unwrap();

    let events = told.all();
    let of = |pool: &str| -> Vec<(Option<String>, Error)> {
        let is_of = |event: &&Event| matches!(event, Event::PublishFailed { pool: of, .. } if of == pool);
        events.iter().filter(is_of).filter_map(failed).collect()
    };
    let ids: Vec<Option<String>> = of("publish").into_iter().map(|(id, _)| id).collect();
    let expected = ["sync", "", "async", "batch", "pool", "refused", "never sent", "never sent by the pool", "hooked"];
    assert_eq!(ids, expected.map(|id| (!id.is_empty()).then(|| id.to_owned())), "{events:#?}");
    let errors: Vec<Error> = of("publish").into_iter().map(|(_, error)| error).collect();
    assert!(errors[..5].iter().all(|error| matches!(error, Error::Returned { code: 312, .. })), "{errors:#?}");
    assert_eq!(errors[5].code(), Some(404), "{}", errors[5]);
    assert!(errors[6..8].iter().all(|error| matches!(error, Error::InvalidArgument { .. })), "{errors:#?}");
    assert!(matches!(errors[8], Error::Refused { .. }), "{}", errors[8]);
    let answers = of("listen");
    assert!(matches!(answers[..], [(_, Error::Returned { .. })]), "{answers:#?}");
}

fn a_message_that_gets_there_after_a_cut_has_not_failed(broker: Broker) {
    let proxy = Proxy::start(broker.addr()).unwrap();
    let app = app(&format!("amqp://guest:guest@{}/%2f", proxy.addr()), "");
    let told = watch(&app);
    let name = queue(&app.publish_pool().connection().unwrap(), "told-cut");
    // The first of them is cut in the middle of the message, and the pool sends it again.
    proxy.cut_after(crate::proxy::Direction::Up, 20, Cut::Reset);
    app.publish_pool().publish("", &name, "x".repeat(1000)).unwrap();
    app.shutdown(PATIENCE).unwrap();
    let events = told.all();
    assert!(events.iter().any(|event| lost(event).is_some()), "{events:#?}");
    assert!(!events.iter().any(|event| failed(event).is_some()), "{events:#?}");
}

/// A handler that waits in its first event until the sender that this returns is gone; how it may be seen that it does; and
/// what it has been told since.
fn stuck(app: &App) -> (Sender<()>, Receiver<()>, Receiver<Event>) {
    let (free, wait) = mpsc::channel::<()>();
    let (reached, is_stuck) = mpsc::channel();
    let (tell, told) = mpsc::channel();
    let wait = Mutex::new(wait);
    app.on_event(move |event| {
        let _ = reached.send(());
        let _ = wait.lock().unwrap().recv();
        let _ = tell.send(event.clone());
    })
    .unwrap();
    (free, is_stuck, told)
}

fn a_handler_that_stands_still_delays_nobody_and_is_told_what_it_missed(broker: Broker) {
    let app = broker.app("");
    let (free, is_stuck, told) = stuck(&app);
    let connection = app.publish_pool().connection().unwrap();
    is_stuck.recv_timeout(PATIENCE).unwrap();
    // Each of these is an event, and three times as many as can wait.
    let nowhere = unique("nowhere");
    let many = 3 * 1024;
    let failed = connection.publish_batch((0..many).map(|_| ("", nowhere.as_str(), "x"))).unwrap_err();
    assert!(matches!(&failed, Error::Batch(batch) if batch.failed.len() == many), "{failed}");
    let name = queue(&connection, "told-still");
    let listener = app.spawn_listener(&name, |_, _| ()).unwrap();
    connection.publish("", &name, "everything goes on").unwrap();
    wait_until("it is handled", || listener.stats().acked == 1);
    listener.stop().unwrap();
    drop(connection);
    drop(free);
    app.shutdown(PATIENCE).unwrap();
    let events = until_let_go(&told);
    let missed: Vec<u64> = events
        .iter()
        .filter_map(|event| match event {
            Event::Missed { count, .. } => Some(*count),
            _ => None,
        })
        .collect();
    let failures = events.iter().filter(|event| matches!(event, Event::PublishFailed { .. })).count();
    assert_eq!(failures, 1024, "so many wait at most");
    assert_eq!(missed.len(), 1, "{missed:?}");
    // All other failures, and what happened to the listener and its connection.
    assert!(missed[0] >= 2 * 1024, "{missed:?}");
}

fn a_handler_that_panics_is_told_of_the_next_event(broker: Broker) {
    let app = broker.app("");
    app.on_event(|event| {
        assert!(opened(event).is_none(), "this panic is part of the test");
    })
    .unwrap();
    let told = watch(&app);
    let connection = app.publish_pool().connection().unwrap();
    assert_eq!(told.next("the others are told", opened), connection.name());
    connection.publish("", &unique("nowhere"), "x").unwrap_err();
    told.next("so is what comes after", failed);
}

/// Ends an app whose handler stands still until there is nothing more to wait for but the handler.
fn ends_once_all_is_told(broker: Broker, end: impl FnOnce(App) + Send) {
    logs::keep();
    let pool = unique("told-to-the-end");
    let app = broker.app(&format!("[app]\nshutdown_timeout = \"60s\"\n[pools.{pool}]\nsize = 1"));
    let (free, is_stuck, told) = stuck(&app);
    let connection = app.pool(&pool).unwrap().connection().unwrap();
    is_stuck.recv_timeout(PATIENCE).unwrap();
    let nowhere = unique("nowhere");
    connection.publish_batch((0..50).map(|_| ("", nowhere.as_str(), "x"))).unwrap_err();
    let closed = format!("{}: closed", connection.name());
    drop(connection);
    std::thread::scope(|scope| {
        let ending = scope.spawn(move || {
            end(app);
            told.try_iter().collect::<Vec<Event>>()
        });
        wait_until("the connection is closed", || !logs::lines_with(&closed).is_empty());
        drop(free);
        let events = ending.join().unwrap();
        assert_eq!(events.len(), 52, "{events:#?}");
        assert!(matches!(events.last(), Some(Event::ConnectionClosed { .. })), "{events:#?}");
    });
}

fn a_shutdown_waits_until_all_is_told(broker: Broker) {
    ends_once_all_is_told(broker, |app| app.shutdown(PATIENCE).unwrap());
}

fn the_end_of_the_app_waits_until_all_is_told(broker: Broker) {
    ends_once_all_is_told(broker, |app| {
        let clone = app.clone();
        drop((app, clone));
    });
}

fn after_a_shutdown_nothing_is_told(broker: Broker) {
    let app = broker.app("");
    let told = watch(&app);
    app.shutdown(PATIENCE).unwrap();
    let late = watch(&app);
    app.publish_pool().publish("", &unique("nowhere"), "x").unwrap_err();
    // Both handlers have been let go of.
    assert!(told.all().is_empty() && late.all().is_empty());
}

fn a_handler_may_shut_its_app_down(broker: Broker) {
    let app = broker.app("");
    let (tell, told) = mpsc::channel();
    let own = app.clone();
    app.on_event(move |event| {
        if failed(event).is_some() {
            let _ = tell.send(own.shutdown(PATIENCE).map_err(|error| error.to_string()));
        }
    })
    .unwrap();
    let rest = watch(&app);
    app.publish_pool().publish("", &unique("nowhere"), "x").unwrap_err();
    assert_eq!(told.recv_timeout(PATIENCE).unwrap(), Ok(()));
    let closed = app.publish_pool().connection().map(drop).unwrap_err();
    assert!(matches!(closed, Error::PoolClosed { .. }), "{closed}");
    // The handlers are let go of, and the clone of the app with them.
    let events = rest.all();
    assert!(matches!(events.last(), Some(Event::ConnectionClosed { .. })), "{events:#?}");
    assert_eq!(told.recv_timeout(PATIENCE), Err(RecvTimeoutError::Disconnected), "nobody can tell any more");
}

fn a_handler_that_does_not_return_costs_a_shutdown_its_time_and_no_more(broker: Broker) {
    let app = broker.app("");
    let (free, is_stuck, told) = stuck(&app);
    drop(app.publish_pool().connection().unwrap());
    is_stuck.recv_timeout(PATIENCE).unwrap();
    let error = app.shutdown(Duration::from_millis(200)).unwrap_err();
    assert!(error.to_string().contains("on_event"), "{error}");
    let began = Instant::now();
    drop(app);
    assert!(began.elapsed() < Duration::from_secs(5), "nothing waits for it once more: {:?}", began.elapsed());
    drop(free);
    // It ends by itself, and has been told of all by then.
    let events = until_let_go(&told);
    assert!(matches!(events[..], [Event::ConnectionOpened { .. }, Event::ConnectionClosed { .. }]), "{events:#?}");
}

fn a_handler_that_publishes_in_vain_is_not_told_of_that(broker: Broker) {
    let app = broker.app("");
    let (own, nowhere) = (app.clone(), unique("nowhere"));
    let to = nowhere.clone();
    app.on_event(move |event| {
        if failed(event).is_some() {
            own.publish_pool().publish("", &to, "nobody hears me").unwrap_err();
            let connection = own.publish_pool().connection().unwrap();
            connection.publish_async("", &to, "nor me", |outcome| assert!(outcome.is_err()));
        }
    })
    .unwrap();
    let told = watch(&app);
    app.publish_pool().publish("", &nowhere, Message::new("x").with_message_id("own")).unwrap_err();
    told.next("the first", failed);
    app.shutdown(PATIENCE).unwrap();
    let events = told.all();
    let ids: Vec<Option<String>> = events.iter().filter_map(failed).map(|(id, _)| id).collect();
    assert_eq!(ids, [Some("own".to_owned())]);
}
