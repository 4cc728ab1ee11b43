//! A process that is forked inherits an app, a pool and a guard: it is told so at once, disturbs nothing, and can have an app of
//! its own.
//!
//! A test binary of its own and without the harness, whose threads a child would not have.

use std::process::exit;
use std::thread;
use std::time::{Duration, Instant};

use coney::embedded::EmbeddedBroker;
use coney::rpc::RpcClient;
use coney::{App, Error, Queue, Settings};
use fork::{Fork, fork, waitpid};

/// How long all that a child does may take.
const PATIENCE: Duration = Duration::from_secs(60);

fn is_forked<T>(what: &str, result: Result<T, Error>) {
    match result.map(drop) {
        Err(error @ Error::Forked { .. }) => assert!(error.to_string().contains("forked"), "{error}"),
        other => panic!("{what}: {other:?}"),
    }
}

/// What a child does with what it has inherited.
fn inherit(app: App, guard: coney::PooledConnection, client: RpcClient, url: &str) {
    let pool = app.publish_pool().clone();
    is_forked("publish", guard.publish("", "forked", "from the child"));
    is_forked("publish_batch", guard.publish_batch([("", "forked", "from the child")]));
    is_forked("get", guard.get("forked"));
    is_forked("get_timeout", guard.get_timeout("forked", PATIENCE));
    is_forked("declare", guard.queue_declare(&Queue::new("forked")));
    is_forked("flush", guard.flush(PATIENCE));
    let mut told = Vec::new();
    let (tell, tells) = std::sync::mpsc::channel();
    let also = tell.clone();
    guard.publish_async("", "forked", "from the child", move |outcome| tell.send(outcome).unwrap());
    guard.get_and_ack_async("forked", move |outcome| also.send(outcome.map(drop)).unwrap());
    told.extend(tells.try_iter());
    assert_eq!(told.len(), 2);
    told.into_iter().for_each(|outcome| is_forked("callback", outcome));
    assert!(!guard.is_alive());
    is_forked("pool.connection", pool.connection());
    is_forked("pool.publish", pool.publish("", "forked", "from the child"));
    assert!(pool.try_connection().is_none());
    assert_eq!(pool.status().in_use, 0);
    is_forked("a listener", app.spawn_listener("forked", |_, _| ()));
    is_forked("a call", client.call::<_, ()>("forked", &1));
    is_forked("declare_topology", app.declare_topology());
    is_forked("on_event", app.on_event(|_| ()));
    is_forked("shutdown", app.shutdown(PATIENCE));
    drop(guard);
    pool.close();
    client.close();
    drop((client, pool, app));

    let own = App::from_settings(Settings::from_url(url).unwrap()).unwrap();
    own.publish_pool().publish("", "forked", "from an app of the child's own").unwrap();
    let connection = own.listen_pool().connection().unwrap();
    assert!(connection.get_and_ack("forked").unwrap().is_some());
    drop(connection);
    own.shutdown(PATIENCE).unwrap();
}

fn main() {
    let broker = EmbeddedBroker::start().unwrap();
    let url = broker.url();
    let app = App::from_settings(Settings::from_url(&url).unwrap()).unwrap();
    // In the child there is no thread that could tell anything.
    let (tell, told) = std::sync::mpsc::channel();
    app.on_event(move |event| drop(tell.send(event.to_string()))).unwrap();
    let guard = app.publish_pool().connection().unwrap();
    guard.queue_declare(&Queue::new("forked")).unwrap();
    guard.publish("", "forked", "before").unwrap();
    guard.get("forked").unwrap().unwrap().ack().unwrap();
    let client = RpcClient::new(&app).unwrap();
    client.call_timeout::<_, ()>("no such queue", &1, PATIENCE).unwrap_err();

    match fork().unwrap() {
        Fork::Child => {
            let (done, is_done) = std::sync::mpsc::channel();
            // A call that hangs is seen by the thread that does not.
            thread::spawn(move || {
                inherit(app, guard, client, &url);
                done.send(()).unwrap();
            });
            let result = is_done.recv_timeout(PATIENCE);
            // The broker is the parent's.
            std::mem::forget(broker);
            exit(i32::from(result.is_err()));
        }
        Fork::Parent(child) => {
            let start = Instant::now();
            let status = waitpid(child).unwrap();
            assert!(status == 0, "the child ended with {status} after {:?}", start.elapsed());
            // What the child has done has changed nothing here.
            assert!(guard.is_alive());
            guard.publish("", "forked", "after").unwrap();
            assert_eq!(guard.get_and_ack("forked").unwrap().unwrap().body(), b"after");
            client.call_timeout::<_, ()>("no such queue", &1, PATIENCE).unwrap_err();
            assert_eq!(broker.control().connections().len(), 2);
            drop(guard);
            app.shutdown(PATIENCE).unwrap();
            let told: Vec<String> = told.iter().collect();
            let closed = told.iter().filter(|event| event.ends_with(": closed")).count();
            assert_eq!((told.len(), closed), (4, 2), "{told:#?}");
            println!("1 passed, 0 failed");
        }
    }
}
