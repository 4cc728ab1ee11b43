//! Threads that wait in a call when their connection is cut or goes silent: each comes back, with an error or done.

use std::mem;
use std::sync::mpsc;
use std::thread::{self, Builder};
use std::time::{Duration, Instant};

use coney::rpc::RpcClient;
use coney::{App, Error, PooledConnection, Queue, Result};

use super::{proxy_before, url};
use crate::contract;
use crate::faults::{CALL, in_time};
use crate::proxy::{Cut, Direction, Flow};
use crate::support::{Broker, app, queue, wait_until};

contract! {
    whoever_waits_when_the_connection_is_closed_is_told_at_once,
    whoever_waits_when_the_connection_is_reset_is_told_at_once,
    whoever_waits_on_a_silent_connection_is_told_by_the_deadline,
    heartbeats_end_the_wait_on_a_silent_connection_where_deadlines_are_long,
}

/// What a test waits in. It has been made ready on a sound line.
type Call = Box<dyn FnOnce() -> Result<()> + Send>;

/// When the line goes silent.
#[derive(Clone, Copy)]
enum Silent {
    /// Before the call begins.
    AtFirst,
    /// Once the call has opened a channel and says its next word.
    SecondRequest,
    /// Once the call has a consumer.
    Consumer,
}

/// A `channel.open`: frame header, class and method, an empty string, the end octet.
const CHANNEL_OPEN: u64 = 7 + 4 + 1 + 1;

struct Case {
    name: &'static str,
    silent: Silent,
    /// Whether what waits has something to fail at; otherwise it just ends.
    fails: bool,
    ready: fn(&App, &str, Duration) -> Call,
}

/// The guard of a connection that has been used for what `first` does.
fn used(app: &App, first: impl FnOnce(&PooledConnection)) -> PooledConnection {
    let guard = app.publish_pool().connection().unwrap();
    first(&guard);
    guard
}

const CASES: &[Case] = &[
    Case {
        name: "opening a connection",
        silent: Silent::AtFirst,
        fails: true,
        ready: |app, queue, _| {
            let (app, queue) = (app.clone(), queue.to_owned());
            Box::new(move || app.spawn_listener(queue, |_, _| ()).map(drop))
        },
    },
    Case {
        name: "opening a channel",
        silent: Silent::AtFirst,
        fails: true,
        ready: |app, queue, _| {
            let (guard, queue) = (used(app, |_| ()), queue.to_owned());
            Box::new(move || guard.get(&queue).map(drop))
        },
    },
    Case {
        name: "declare",
        silent: Silent::AtFirst,
        fails: true,
        ready: |app, queue, _| {
            let queue = Queue::new(queue);
            let guard = used(app, |guard| drop(guard.queue_declare(&queue).unwrap()));
            Box::new(move || guard.queue_declare(&queue).map(drop))
        },
    },
    Case {
        name: "get",
        silent: Silent::AtFirst,
        fails: true,
        ready: |app, queue, _| {
            let guard = used(app, |guard| drop(guard.get(queue).unwrap()));
            let queue = queue.to_owned();
            Box::new(move || guard.get(&queue).map(drop))
        },
    },
    Case {
        name: "get_timeout",
        silent: Silent::Consumer,
        fails: true,
        ready: |app, queue, limit| {
            let (guard, queue) = (used(app, |_| ()), queue.to_owned());
            Box::new(move || guard.get_timeout(&queue, limit).map(drop))
        },
    },
    Case {
        name: "get_and_ack_async",
        silent: Silent::AtFirst,
        fails: true,
        ready: |app, queue, _| {
            let (guard, queue) = (used(app, |_| ()), queue.to_owned());
            Box::new(move || {
                let (tell, told) = mpsc::channel();
                guard.get_and_ack_async(&queue, move |outcome| tell.send(outcome.map(drop)).unwrap());
                drop(guard);
                told.try_recv().expect("a callback is run before the connection is given back")
            })
        },
    },
    Case {
        name: "the first publish",
        silent: Silent::SecondRequest,
        fails: true,
        ready: |app, queue, _| {
            let (guard, queue) = (used(app, |_| ()), queue.to_owned());
            Box::new(move || guard.publish("", &queue, "x"))
        },
    },
    Case {
        name: "publish",
        silent: Silent::AtFirst,
        fails: true,
        ready: |app, queue, _| {
            let guard = used(app, |guard| guard.publish("", queue, "before").unwrap());
            let queue = queue.to_owned();
            Box::new(move || guard.publish("", &queue, "x"))
        },
    },
    Case {
        name: "publish_batch",
        silent: Silent::AtFirst,
        fails: true,
        ready: |app, queue, _| {
            let guard = used(app, |guard| guard.publish("", queue, "before").unwrap());
            let queue = queue.to_owned();
            // More than may be in flight.
            Box::new(move || guard.publish_batch((0..3000).map(|n| ("", &queue, n.to_string()))).map(drop))
        },
    },
    Case {
        name: "publish_async",
        silent: Silent::AtFirst,
        fails: true,
        ready: |app, queue, _| {
            let guard = used(app, |guard| guard.publish("", queue, "before").unwrap());
            let queue = queue.to_owned();
            Box::new(move || {
                let (tell, told) = mpsc::channel();
                guard.publish_async("", &queue, "x", move |outcome| tell.send(outcome).unwrap());
                drop(guard);
                told.try_recv().expect("a callback is run before the connection is given back")
            })
        },
    },
    Case {
        name: "starting a listener",
        silent: Silent::SecondRequest,
        fails: true,
        ready: |app, queue, _| {
            drop(app.listen_pool().connection().unwrap());
            let (app, queue) = (app.clone(), queue.to_owned());
            Box::new(move || app.spawn_listener(queue, |_, _| ()).map(drop))
        },
    },
    Case {
        name: "an RPC call",
        silent: Silent::AtFirst,
        fails: true,
        ready: |app, queue, limit| {
            let client = RpcClient::new(app).unwrap().with_timeout(limit);
            client.call::<_, ()>("no such queue", &1).unwrap_err();
            let queue = queue.to_owned();
            Box::new(move || client.call::<_, ()>(&queue, &1))
        },
    },
    Case {
        name: "stopping a listener",
        silent: Silent::AtFirst,
        fails: false,
        ready: |app, queue, _| {
            let listener = app.spawn_listener(queue, |_, _| ()).unwrap();
            Box::new(move || listener.stop())
        },
    },
    Case {
        name: "closing an RPC client",
        silent: Silent::AtFirst,
        fails: false,
        ready: |app, _, _| {
            let client = RpcClient::new(app).unwrap();
            client.call::<_, ()>("no such queue", &1).unwrap_err();
            Box::new(move || {
                client.close();
                Ok(())
            })
        },
    },
    Case {
        name: "giving back with a delivery forgotten",
        silent: Silent::AtFirst,
        fails: false,
        ready: |app, queue, _| {
            let guard = used(app, |guard| {
                guard.publish("", queue, "x").unwrap();
                mem::forget(guard.get(queue).unwrap().expect("the message"));
            });
            Box::new(move || {
                drop(guard);
                Ok(())
            })
        },
    },
    Case {
        name: "closing a pool",
        silent: Silent::AtFirst,
        fails: false,
        ready: |app, _, _| {
            drop([used(app, |_| ()), used(app, |_| ())]);
            let pool = app.publish_pool().clone();
            Box::new(move || {
                pool.close();
                Ok(())
            })
        },
    },
    Case {
        name: "shutting down an app",
        silent: Silent::AtFirst,
        fails: false,
        ready: |app, _, _| {
            drop((used(app, |_| ()), app.listen_pool().connection().unwrap()));
            let app = app.clone();
            Box::new(move || app.shutdown(Duration::from_secs(600)))
        },
    },
];

/// How the waiting is to end, and the settings for that.
struct Ending<'a> {
    settings: &'a str,
    cut: Option<Cut>,
    /// For calls that bring their time-out along.
    limit: Duration,
    /// When the test gives up.
    longest: Duration,
}

const HOUR: Duration = Duration::from_secs(3600);

/// Deadlines that show that it was not they.
const LONG: &str = r#"
heartbeat = "600s"
connect_timeout = "600s"
operation_timeout = "600s"
[pools.publish]
confirm_timeout = "600s"
checkout_timeout = "600s"
[pools.listen]
confirm_timeout = "600s"
checkout_timeout = "600s"
"#;

fn whoever_waits_when_the_connection_is_closed_is_told_at_once(broker: Broker) {
    everybody(broker, &Ending { settings: LONG, cut: Some(Cut::Fin), limit: HOUR, longest: CALL });
}

fn whoever_waits_when_the_connection_is_reset_is_told_at_once(broker: Broker) {
    everybody(broker, &Ending { settings: LONG, cut: Some(Cut::Reset), limit: HOUR, longest: CALL });
}

fn whoever_waits_on_a_silent_connection_is_told_by_the_deadline(broker: Broker) {
    let settings = r#"
        heartbeat = "600s"
        connect_timeout = "2s"
        operation_timeout = "2s"
        [pools.publish]
        confirm_timeout = "2s"
        [pools.listen]
        confirm_timeout = "2s"
    "#;
    // Closing has five seconds, everything else two; the wait of `get_timeout` and the one for its end are two waits.
    let longest = Duration::from_secs(7);
    everybody(broker, &Ending { settings, cut: None, limit: Duration::from_secs(2), longest });
}

fn heartbeats_end_the_wait_on_a_silent_connection_where_deadlines_are_long(broker: Broker) {
    // There are none before a connection is open.
    let settings = &LONG.replace("heartbeat = \"600s\"\nconnect_timeout = \"600s\"", "heartbeat = \"2s\"");
    let longest = Duration::from_secs(10);
    everybody(broker, &Ending { settings, cut: None, limit: HOUR, longest });
}

fn everybody(broker: Broker, ending: &Ending<'_>) {
    thread::scope(|scope| {
        for case in CASES {
            scope.spawn(move || wait_in(case, broker, ending));
        }
    });
}

fn wait_in(case: &Case, broker: Broker, ending: &Ending<'_>) {
    let proxy = proxy_before(broker.addr());
    let name = queue(&broker.app("").publish_pool().connection().unwrap(), "waited-in");
    let app = app(&url(&proxy), ending.settings);
    let call = (case.ready)(&app, &name, ending.limit);
    match case.silent {
        Silent::AtFirst => proxy.flow(Flow::Swallow),
        Silent::SecondRequest => proxy.cut_after(Direction::Up, CHANNEL_OPEN + 1, Cut::Silence),
        Silent::Consumer => {}
    }
    let (tell, told) = mpsc::channel();
    // Left to itself if it is stuck: the test says so and ends.
    Builder::new().name(case.name.to_owned()).spawn(move || tell.send(call())).unwrap();
    match case.silent {
        Silent::Consumer => {
            wait_until("it has a consumer", || broker.consumers_of(&name).len() == 1);
            proxy.flow(Flow::Swallow);
        }
        // The least that is said is the protocol's header.
        _ => wait_until("it has asked and waits", || proxy.traffic().swallowed_up >= 8),
    }
    let start = Instant::now();
    ending.cut.into_iter().for_each(|cut| proxy.cut(cut));
    let Ok(result) = told.recv_timeout(ending.longest) else {
        panic!("{} is stuck after {:?}", case.name, start.elapsed());
    };
    println!("{:>5.0?}  {}: {result:?}", start.elapsed(), case.name);
    match result {
        Err(error) if case.fails => assert!(error.is_transient(), "{}: {error}", case.name),
        Ok(()) if !case.fails => {}
        // What has not ended by the deadline of a stop is said so.
        Err(Error::NotEnded { .. }) if !case.fails => {}
        other => panic!("{}: {other:?}", case.name),
    }
    in_time(&format!("the end of the app after {}", case.name), || drop(app));
}
