//! How a program begins and ends.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use coney::{App, Error};

use crate::contract;
use crate::listener::publish_numbers;
use crate::support::{Broker, PATIENCE, app, queue, unique, wait_until};

contract! {
    a_start_that_fails_stops_what_it_has_started,
    run_lasts_until_it_is_told_and_leaves_nothing,
    a_shutdown_waits_for_what_is_out_and_says_what_has_not_ended,
    dropping_the_app_stops_its_listeners,
}

#[test]
fn hooks_run_in_order_and_the_first_error_names_its_hook() {
    let app = app("amqp://127.0.0.77", "");
    let order = Arc::new(Mutex::new(Vec::new()));
    let note = |n: i32| {
        let order = Arc::clone(&order);
        move |_: &App| {
            order.lock().unwrap().push(n);
            Ok(())
        }
    };
    app.on_start(note(1));
    app.on_start_named("second", note(2));
    app.start().unwrap();
    assert_eq!(*order.lock().unwrap(), [1, 2]);
    app.on_start(|app| app.pool("nonsense").map(drop));
    app.on_start(note(4));
    match app.start().unwrap_err() {
        Error::Hook { hook, source } => {
            assert_eq!(hook, "number 3");
            assert!(matches!(*source, Error::UnknownPool { .. }));
        }
        other => panic!("unexpected: {other}"),
    }
    assert_eq!(*order.lock().unwrap(), [1, 2, 1, 2]);
}

fn a_start_that_fails_stops_what_it_has_started(broker: Broker) {
    let app = broker.app("");
    let name = queue(&app.publish_pool().connection().unwrap(), "undone");
    let before = app.spawn_listener(&name, |_, _| ()).unwrap();
    let from_hook = name.clone();
    app.on_start(move |app| {
        app.spawn_listener(&from_hook, |_, _| ())?.detach();
        Ok(())
    });
    let missing = unique("missing");
    let in_hook = missing.clone();
    app.on_start_named("the second", move |app| app.spawn_listener(&in_hook, |_, _| ()).map(drop));
    let text = app.start().unwrap_err().to_string();
    assert!(text.contains("\"the second\"") && text.contains(&missing), "{text}");
    assert_eq!(broker.consumers_of(&name).len(), 1, "that of before");
    before.stop().unwrap();
}

fn run_lasts_until_it_is_told_and_leaves_nothing(broker: Broker) {
    let app = broker.app("");
    let name = queue(&app.publish_pool().connection().unwrap(), "run");
    let handled = Arc::new(AtomicUsize::new(0));
    let (from_hook, counter) = (name.clone(), Arc::clone(&handled));
    app.on_start(move |app| {
        let counter = Arc::clone(&counter);
        app.spawn_listener(&from_hook, move |_, _| drop(counter.fetch_add(1, Ordering::Relaxed).to_string()))?.detach();
        Ok(())
    });
    let shutdown = app.shutdown_handle();
    thread::scope(|scope| {
        let running = scope.spawn(|| app.run());
        wait_until("it listens", || broker.consumers_of(&name).len() == 1);
        publish_numbers(&app, &name, 100);
        wait_until("all are handled", || handled.load(Ordering::Relaxed) == 100);
        shutdown.shutdown();
        running.join().unwrap().unwrap();
    });
    assert_eq!(broker.consumers_of(&name).len(), 0);
    assert!(matches!(app.publish_pool().connection(), Err(Error::PoolClosed { .. })));
}

fn a_shutdown_waits_for_what_is_out_and_says_what_has_not_ended(broker: Broker) {
    let app = broker.app("");
    let name = queue(&app.publish_pool().connection().unwrap(), "ending");
    let (begun, in_handler) = mpsc::channel();
    let (release, gate) = crossbeam_channel::bounded::<()>(0);
    app.spawn_listener(&name, move |_, _| {
        begun.send(()).unwrap();
        let _ = gate.recv_timeout(PATIENCE);
    })
    .unwrap()
    .detach();
    publish_numbers(&app, &name, 1);
    in_handler.recv_timeout(PATIENCE).unwrap();
    let guard = app.publish_pool().connection().unwrap();
    let start = Instant::now();
    match app.shutdown(Duration::from_millis(300)).unwrap_err() {
        Error::NotEnded { left, .. } => {
            let left = left.join("; ");
            assert!(left.contains(&name) && left.contains("pool \"publish\""), "{left}");
        }
        other => panic!("unexpected: {other}"),
    }
    assert!(start.elapsed() < Duration::from_secs(10));
    drop((guard, release));
    app.shutdown(PATIENCE).unwrap();
    wait_until("nothing is left", || broker.consumers_of(&name).is_empty() && broker.queue_unacked(&name) == 0);
}

fn dropping_the_app_stops_its_listeners(broker: Broker) {
    let app = broker.app("");
    let name = queue(&app.publish_pool().connection().unwrap(), "dropped");
    app.spawn_listener(&name, |_, _| ()).unwrap().detach();
    let kept = app.listener(&name).spawn(|_, _| ()).unwrap();
    assert_eq!(broker.consumers_of(&name).len(), 2);
    drop(app);
    assert_eq!(broker.consumers_of(&name).len(), 0);
    kept.join();
}
