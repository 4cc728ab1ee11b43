//! Nothing is left behind: threads, file descriptors and the broker's connections return to where they were.
//!
//! A test binary of its own with one test, since it counts what the whole process has.

mod held;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use coney::testing::RabbitMq;
use coney::{App, Queue, Settings, Topology};
use held::{back_to, settled};

/// How long what ends may take to be gone.
const QUIET: Duration = Duration::from_secs(30);

/// Connections, channels and consumers on the broker.
fn on_broker(node: &RabbitMq) -> (usize, usize, usize) {
    let connections = node.connections().expect("the connections").len();
    (connections, node.channels().expect("the channels").len(), node.consumers().expect("the consumers").len())
}

fn app(url: &str) -> App {
    let extra = "operation_timeout = \"2s\"\n[pools.publish]\nconfirm_timeout = \"2s\"\ncheckout_timeout = \"1s\"";
    let settings = Settings::from_toml(&format!("[broker]\nurl = {url:?}\n{extra}")).unwrap();
    let app = App::from_settings(settings).unwrap();
    app.on_event(|_| ()).unwrap();
    app
}

fn use_everything(app: &App) {
    let told = Arc::new(AtomicUsize::new(0));
    {
        let publisher = app.publish_pool().connection().unwrap();
        let listener = app.listen_pool().connection().unwrap();
        publisher.queue_declare(&Queue::new("leaks")).unwrap();
        publisher.publish("", "leaks", "sync").unwrap();
        publisher.publish("missing", "k", "404").unwrap_err();
        for _ in 0..100 {
            let told = Arc::clone(&told);
            publisher.publish_async("", "leaks", "async", move |_| {
                told.fetch_add(1, Ordering::Relaxed);
            });
        }
        publisher.publish_batch((0..100).map(|_| ("", "leaks", "batch"))).unwrap();
        listener.get("leaks").unwrap().unwrap().ack().unwrap();
        listener.get_timeout("leaks", Duration::from_secs(5)).unwrap().unwrap().ack().unwrap();
        listener.get_and_ack_async("leaks", |got| drop(got.unwrap().unwrap()));
        // Before the purge, which would leave it nothing to get.
        listener.flush(Duration::from_secs(30)).unwrap();
        publisher.queue_purge("leaks").unwrap();
    }
    assert_eq!(told.load(Ordering::Relaxed), 100);
}

/// Starts an app with a listener of two threads, has it handle a message, and ends it in one of the ways there are.
fn listen_once(app: &App, cycle: usize) {
    let (handled, wait) = mpsc::channel();
    app.on_start(move |app| {
        let handled = handled.clone();
        let topology = Topology::new().queue(Queue::new("leaks"));
        let listener = app.listener("leaks").concurrency(2).topology(topology);
        listener.spawn(move |_, _| handled.send(()).map_err(|gone| gone.to_string()))?.detach();
        app.publish_pool().connection()?.publish("", "leaks", "x")
    });
    let one_is_handled = || wait.recv_timeout(Duration::from_secs(30)).unwrap();
    match cycle % 3 {
        0 => {
            app.start().unwrap();
            one_is_handled();
            app.shutdown(Duration::from_secs(10)).unwrap();
        }
        1 => thread::scope(|scope| {
            let running = scope.spawn(|| app.run());
            one_is_handled();
            app.shutdown_handle().shutdown();
            running.join().unwrap().unwrap();
        }),
        // Dropping the app ends it too.
        _ => {
            app.start().unwrap();
            one_is_handled();
        }
    }
}

#[test]
#[ignore = "needs RabbitMQ: scripts/test"]
fn threads_descriptors_and_connections_return_to_where_they_were() {
    let node = RabbitMq::start().expect("a RabbitMQ node");
    let url = node.url();
    use_everything(&app(&url));
    listen_once(&app(&url), 1); // what the standard library starts once and keeps is there now
    // The worker that makes room in a pool ends shortly after its pool.
    let baseline = settled();
    let nobody = || on_broker(&node) == (0, 0, 0);

    for _ in 0..20 {
        use_everything(&app(&url));
    }
    back_to("20 apps", baseline, QUIET, nobody);

    for cycle in 0..50 {
        listen_once(&app(&url), cycle);
    }
    back_to("50 starts and stops", baseline, QUIET, nobody);
    assert!(node.consumers().unwrap().is_empty());

    {
        let app = app(&url);
        let connection = app.publish_pool().connection().unwrap();
        connection.publish_async("", "leaks", "x", |_| {});
        drop(connection);
        for _ in 0..10 {
            node.close_all_connections("for the test").unwrap();
            app.publish_pool().connection().unwrap().publish("", "leaks", "x").unwrap();
        }
    }
    back_to("connections closed by the broker", baseline, QUIET, nobody);

    {
        let app = app(&url);
        let (handled, wait) = mpsc::channel();
        let listener = app.listener("leaks").concurrency(3).spawn(move |_, _| handled.send(()).unwrap()).unwrap();
        let one_is_handled = || {
            app.publish_pool().connection().unwrap().publish("", "leaks", "x").unwrap();
            wait.recv_timeout(Duration::from_secs(30)).unwrap();
        };
        // What has been published before comes first.
        while node.queue_len("leaks").unwrap() + node.queue_unacked("leaks").unwrap() > 0 {
            let _ = wait.recv_timeout(Duration::from_millis(20));
        }
        while wait.try_recv().is_ok() {}
        one_is_handled();
        let (held_before, there) = (settled(), on_broker(&node));
        assert_eq!(there.2, 3, "a consumer for each thread");
        for round in 1..=10 {
            node.close_all_connections("for the test").unwrap();
            let deadline = Instant::now() + Duration::from_secs(30);
            while listener.stats().recoveries < round {
                assert!(Instant::now() < deadline, "the listener is not back for the {round}th time");
                thread::park_timeout(Duration::from_millis(10));
            }
            assert_eq!(node.consumers().unwrap().len(), 3);
            one_is_handled();
        }
        back_to("a listener's connection closed ten times", held_before, QUIET, || on_broker(&node) == there);
    }
    back_to("a listener that has come back ten times", baseline, QUIET, nobody);

    {
        let app = app(&url);
        let guards = [app.publish_pool().connection().unwrap(), app.publish_pool().connection().unwrap()];
        node.block_publishers().unwrap();
        for guard in &guards {
            guard.publish("", "leaks", "x").unwrap_err();
        }
        drop(guards);
        drop(app);
        node.unblock_publishers().unwrap();
    }
    back_to("a block", baseline, QUIET, nobody);

    {
        let app = app(&url);
        let connection = app.publish_pool().connection().unwrap();
        connection.publish("", "leaks", "x").unwrap();
        node.pause().unwrap();
        connection.publish("", "leaks", "x").unwrap_err();
        connection.get("leaks").map(drop).unwrap_err();
        connection.publish_async("", "leaks", "x", |outcome| drop(outcome.unwrap_err()));
        drop(connection);
        app.publish_pool().connection().map(drop).unwrap_err();
        drop(app);
        node.resume().unwrap();
    }
    back_to("a paused broker", baseline, QUIET, nobody);

    {
        let app = app(&url);
        let guards = [app.publish_pool().connection().unwrap(), app.publish_pool().connection().unwrap()];
        guards[0].publish_async("", "leaks", "x", |_| {});
        node.kill().unwrap();
        drop(guards);
        for _ in 0..5 {
            app.publish_pool().connection().map(drop).unwrap_err();
        }
    }
    back_to("a killed broker", baseline, QUIET, || true);
}
