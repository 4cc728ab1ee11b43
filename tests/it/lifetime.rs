//! How a program begins and ends.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use coney::{App, Error};

use crate::closed::closed_port;
use crate::listener::publish_numbers;
use crate::support::{Broker, PATIENCE, app, queue, unique, wait_until};
use crate::{contract, logs};

contract! {
    shutdowns_on_several_threads_count_no_guard_that_is_not_out,
    a_start_that_fails_stops_what_it_has_started,
    run_lasts_until_it_is_told_and_leaves_nothing,
    a_shutdown_waits_for_what_is_out_and_says_what_has_not_ended,
    dropping_the_app_stops_its_listeners,
    a_shutdown_has_one_deadline_and_nobody_waits_once_more,
    a_handler_that_ends_within_the_shutdown_timeout_ends_it_well,
    a_listener_can_be_stopped_from_its_own_handler,
    a_handler_may_shut_its_app_down,
    a_program_may_start_before_its_broker,
    a_refused_login_is_not_waited_for,
}

#[test]
fn hooks_run_in_order_and_the_first_error_names_its_hook() {
    let closed = closed_port();
    let app = app(&format!("amqp://{closed}"), "");
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

/// A listener whose handler stands until the gate is opened, with a message in it.
struct Stuck {
    listener: coney::Listener,
    release: crossbeam_channel::Sender<()>,
}

fn stuck(app: &App, name: &str) -> Stuck {
    let (begun, in_handler) = mpsc::channel();
    let (release, gate) = crossbeam_channel::bounded::<()>(0);
    let listener = app
        .spawn_listener(name, move |_, _| {
            begun.send(()).unwrap();
            let _ = gate.recv_timeout(PATIENCE);
        })
        .unwrap();
    publish_numbers(app, name, 1);
    in_handler.recv_timeout(PATIENCE).unwrap();
    Stuck { listener, release }
}

fn a_shutdown_has_one_deadline_and_nobody_waits_once_more(broker: Broker) {
    let app = broker.app("[app]\nshutdown_timeout = \"400ms\"");
    let name = queue(&app.publish_pool().connection().unwrap(), "once");
    let Stuck { listener, release } = stuck(&app, &name);
    app.shutdown_handle().shutdown();
    let start = Instant::now();
    match app.run().unwrap_err() {
        Error::NotEnded { left, after } => {
            assert_eq!(after, Duration::from_millis(400));
            assert!(left.join("; ").contains(&name), "{left:?}");
        }
        other => panic!("unexpected: {other}"),
    }
    // Each of these used to wait 10 s of its own.
    drop(listener);
    drop(app);
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    drop(release);
    wait_until("it ends by itself", || broker.consumers_of(&name).is_empty());
}

fn a_handler_that_ends_within_the_shutdown_timeout_ends_it_well(broker: Broker) {
    logs::keep();
    let app = broker.app("[app]\nshutdown_timeout = \"200ms\"");
    let name = queue(&app.publish_pool().connection().unwrap(), "in-time");
    let Stuck { listener, release } = stuck(&app, &name);
    let before = logs::lines_with("shutting down").len();
    app.shutdown_handle().shutdown();
    thread::scope(|scope| {
        let running = scope.spawn(|| app.run_timeout(PATIENCE));
        // It may be another app that says so. Then the handler ends before its shutdown begins, which is to end well too.
        wait_until("it shuts down", || logs::lines_with("shutting down").len() > before);
        drop(release);
        running.join().unwrap().unwrap();
    });
    assert_eq!(listener.stats().acked, 1);
}

fn a_listener_can_be_stopped_from_its_own_handler(broker: Broker) {
    let app = broker.app("[pools.listen]\nsize = 3");
    let name = queue(&app.publish_pool().connection().unwrap(), "own");
    // Stopped, dropped and joined.
    let ends: [fn(coney::Listener); 3] = [|own| own.stop().unwrap(), drop, |own| own.join()];
    for (round, end) in ends.into_iter().enumerate() {
        let own: Arc<Mutex<Option<coney::Listener>>> = Arc::default();
        let (took, ended) = mpsc::channel();
        let in_handler = Arc::clone(&own);
        let listener = app
            .listener(&name)
            .prefetch(1)
            .spawn(move |_, _| {
                let mut listener = None;
                wait_until("it is there", || {
                    listener = in_handler.lock().unwrap().take();
                    listener.is_some()
                });
                let start = Instant::now();
                end(listener.unwrap());
                took.send(start.elapsed()).unwrap();
            })
            .unwrap();
        *own.lock().unwrap() = Some(listener);
        publish_numbers(&app, &name, 1);
        let took = ended.recv_timeout(PATIENCE).unwrap();
        assert!(took < Duration::from_secs(5), "round {round}: {took:?}");
        if round == 2 {
            // Joining stops nothing.
            continue;
        }
        wait_until("it ends", || broker.consumers_of(&name).is_empty());
        wait_until("its message is settled", || broker.queue_len(&name) + broker.queue_unacked(&name) == 0);
    }
    app.shutdown(PATIENCE).unwrap();
}

fn a_handler_may_shut_its_app_down(broker: Broker) {
    let app = broker.app("");
    let name = queue(&app.publish_pool().connection().unwrap(), "from-handler");
    let (ended, result) = mpsc::channel();
    let in_handler = app.clone();
    let listener = app
        .spawn_listener(&name, move |_, _| {
            let start = Instant::now();
            let result = in_handler.shutdown(PATIENCE);
            ended.send((result, start.elapsed())).unwrap();
        })
        .unwrap();
    publish_numbers(&app, &name, 1);
    let (result, took) = result.recv_timeout(2 * PATIENCE).unwrap();
    result.unwrap();
    assert!(took < Duration::from_secs(8), "{took:?}");
    wait_until("it ends", || matches!(listener.state(), coney::ListenerState::Stopped));
    assert_eq!(listener.stats().acked, 1, "the message in hand is settled");
}

fn a_program_may_start_before_its_broker(broker: Broker) {
    logs::keep();
    let node = broker.hurt();
    let name = unique("early");
    let topology = format!("[[topology.queues]]\nname = {name:?}");
    let app = node.app(&format!("connect_timeout = \"2s\"\n[app]\nwait_for_broker = \"120s\"\n{topology}"));
    let (from_hook, handled) = (name.clone(), Arc::new(AtomicUsize::new(0)));
    let counter = Arc::clone(&handled);
    app.on_start(move |app| {
        app.declare_topology()?;
        let counter = Arc::clone(&counter);
        app.spawn_listener(&from_hook, move |_, _| {
            counter.fetch_add(1, Ordering::Relaxed);
        })?
        .detach();
        app.publish_pool().publish("", &from_hook, "from the hook")
    });
    node.kill();
    thread::scope(|scope| {
        let running = scope.spawn(|| app.run());
        let waits = || logs::lines_with("waiting for the broker: ").len();
        let before = waits();
        wait_until("it has tried more than once", || waits() >= before + 2 || running.is_finished());
        assert!(!running.is_finished(), "{:?}", running.join());
        node.start_again();
        wait_until("it is at work", || handled.load(Ordering::Relaxed) == 1);
        app.shutdown_handle().shutdown();
        running.join().unwrap().unwrap();
    });
}

fn a_refused_login_is_not_waited_for(broker: Broker) {
    let url = broker.url_with("nobody:wrong", "%2f");
    let app = app(&url, "[app]\nwait_for_broker = \"1day\"");
    let told = |result: coney::Result<()>| {
        assert!(matches!(&result, Err(Error::Connect { .. })), "{result:?}");
        assert!(!result.unwrap_err().is_transient());
    };
    told(app.wait_for_broker(Duration::from_secs(24 * 3600)));
    told(app.start());
    told(app.spawn_listener("any", |_, _| ()).map(drop));
}

#[test]
fn a_shutdown_ends_the_wait_for_the_broker() {
    let closed = closed_port();
    let app = app(&format!("amqp://{closed}"), "[app]\nwait_for_broker = \"1day\"");
    let shutdown = app.shutdown_handle();
    thread::scope(|scope| {
        let running = scope.spawn(|| app.run());
        shutdown.shutdown();
        running.join().unwrap().unwrap();
    });
}

#[test]
fn an_app_runs_once_at_a_time_and_not_after_its_shutdown() {
    logs::keep();
    let app = app("memory://runs", "");
    let started = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&started);
    app.on_start(move |_| {
        counter.fetch_add(1, Ordering::SeqCst);
        Ok(())
    });
    thread::scope(|scope| {
        let running = scope.spawn(|| app.run());
        wait_until("it runs", || started.load(Ordering::SeqCst) == 1);
        let error = app.run().unwrap_err();
        assert!(
            matches!(error, Error::InvalidArgument { .. }) && error.to_string().contains("running already"),
            "{error}"
        );
        app.shutdown_handle().shutdown();
        running.join().unwrap().unwrap();
    });
    assert!(matches!(app.run(), Err(Error::PoolClosed { .. })));
    assert_eq!(started.load(Ordering::SeqCst), 1);
}

fn shutdowns_on_several_threads_count_no_guard_that_is_not_out(broker: Broker) {
    for round in 0..50 {
        let app = broker.app("");
        drop(app.publish_pool().connection().unwrap());
        thread::scope(|scope| {
            let shutdowns: Vec<_> = (0..4).map(|_| scope.spawn(|| app.shutdown(Duration::from_secs(20)))).collect();
            for shutdown in shutdowns {
                shutdown.join().unwrap().unwrap_or_else(|error| panic!("round {round}: {error}"));
            }
        });
    }
}
