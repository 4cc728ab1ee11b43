//! Connections that networks have cut, silenced and refused leave nothing behind: threads, file descriptors and what the
//! broker has return to where they were.
//!
//! A test binary of its own with one test, since it counts what the whole process has.

mod held;
#[path = "it/proxy/mod.rs"]
mod proxy;

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use coney::embedded::EmbeddedBroker;
use coney::rpc::RpcClient;
use coney::{App, Queue, Settings};
use held::{back_to, settled};
use proxy::{Cut, Direction, Flow, Proxy};

const PATIENCE: Duration = Duration::from_secs(30);
const QUIET: Duration = Duration::from_secs(5);

const EXTRA: &str = r#"
heartbeat = "2s"
connect_timeout = "1s"
operation_timeout = "1s"
[pools.publish]
size = 5
confirm_timeout = "1s"
checkout_timeout = "1s"
[pools.listen]
checkout_timeout = "1s"
"#;

fn app(proxy: &Proxy) -> App {
    let url = format!("amqp://guest:guest@{}/%2f", proxy.addr());
    let settings = Settings::from_toml(&format!("[broker]\nurl = {url:?}\n{EXTRA}")).unwrap();
    let app = App::from_settings(settings).unwrap();
    app.on_event(|_| ()).unwrap();
    app
}

/// Cuts a connection after each byte of its handshake, every way there is.
fn cut_handshakes(proxy: &Proxy) {
    let app = app(proxy);
    drop(app.publish_pool().connection().unwrap());
    let whole = proxy.traffic();
    for cut in [Cut::Fin, Cut::Reset] {
        for (direction, len) in [(Direction::Up, whole.up), (Direction::Down, whole.down)] {
            for bytes in 0..len {
                proxy.cut_new_after(direction, bytes, cut);
                // At the last bytes it is what comes after the handshake that fails.
                let _ = app.spawn_listener("leaks", |_, _| ());
            }
        }
    }
    proxy.spare_new();
}

/// An app that does everything, on connections that are cut at `moment` bytes from now.
fn cut_at_work(proxy: &Proxy, moment: u64, cut: Cut) {
    let app = app(proxy);
    let listener = app.spawn_listener("leaks", |_, _| ()).unwrap();
    let client = RpcClient::new(&app).unwrap().with_timeout(Duration::from_millis(200));
    client.call::<_, ()>("no such queue", &1).unwrap_err();
    let guards: Vec<_> = (0..3).map(|_| app.publish_pool().connection().unwrap()).collect();
    guards.iter().for_each(|guard| guard.publish("", "leaks", "before").unwrap());
    proxy.cut_after(if moment.is_multiple_of(2) { Direction::Up } else { Direction::Down }, moment, cut);
    // Whether these fail is not the point.
    let _ = client.call::<_, ()>("leaks", &1);
    for guard in &guards {
        for _ in 0..20 {
            guard.publish_async("", "leaks", "x", drop);
        }
        guard.get_and_ack_async("leaks", drop);
        let _ = guard.publish("", "leaks", "x");
        let _ = guard.get("leaks").map(std::mem::forget);
        let _ = guard.queue_declare(&Queue::new("leaks"));
    }
    drop(guards);
    client.close();
    // A listener may stop on a connection that is cut.
    let _ = listener.stop();
}

/// Five threads end an app while five others reconnect.
fn end_in_the_middle(proxy: &Proxy, outage: impl Fn(&Proxy)) {
    let app = app(proxy);
    let pool = app.publish_pool();
    let listener = app.spawn_listener("leaks", |_, _| ()).unwrap();
    let guards: Vec<_> = (0..5).map(|_| pool.connection().unwrap()).collect();
    guards.iter().for_each(|guard| guard.publish("", "leaks", "x").unwrap());
    drop(guards);
    outage(proxy);
    proxy.cut(Cut::Reset);
    let (tell, told) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..5 {
            let tell = tell.clone();
            scope.spawn(move || tell.send(pool.connection().map(drop)));
        }
        scope.spawn(|| pool.close());
        scope.spawn(|| pool.close());
        scope.spawn(|| listener.stop());
        scope.spawn(|| app.shutdown(PATIENCE));
        scope.spawn(|| drop(app.clone()));
    });
    assert_eq!(told.try_iter().count(), 5);
    proxy.refuse(false);
    proxy.flow(Flow::Pass);
}

#[test]
fn threads_descriptors_and_what_the_broker_has_return_to_where_they_were() {
    let broker = EmbeddedBroker::start().unwrap();
    let control = broker.control();
    let proxy = Proxy::start(broker.addr()).unwrap();
    app(&proxy).publish_pool().connection().unwrap().queue_declare(&Queue::new("leaks")).unwrap();
    let nothing = || {
        let open = (control.connections().len(), control.channel_count(), control.consumers().len());
        open == (0, 0, 0) && proxy.traffic().open == 0 && control.queue_unacked("leaks") == 0
    };
    let deadline = Instant::now() + PATIENCE;
    while !nothing() {
        assert!(Instant::now() < deadline, "the first connection is still there");
        thread::park_timeout(Duration::from_millis(5));
    }
    let baseline = settled();

    cut_handshakes(&proxy);
    back_to("cut handshakes", baseline, QUIET, nothing);

    for moment in (0..4000).step_by(421) {
        for cut in [Cut::Fin, Cut::Reset] {
            cut_at_work(&proxy, moment, cut);
        }
    }
    back_to("connections cut at work", baseline, QUIET, nothing);

    for moment in (0..1000).step_by(333) {
        cut_at_work(&proxy, moment, Cut::Silence);
    }
    // Their other half lives until the proxy lets go.
    proxy.cut(Cut::Reset);
    back_to("silent connections", baseline, QUIET, nothing);

    for _ in 0..5 {
        end_in_the_middle(&proxy, |proxy| proxy.refuse(true));
        end_in_the_middle(&proxy, |_| {});
    }
    end_in_the_middle(&proxy, |proxy| proxy.flow(Flow::Swallow));
    proxy.cut(Cut::Reset);
    back_to("apps ended while they reconnect", baseline, QUIET, nothing);
}
