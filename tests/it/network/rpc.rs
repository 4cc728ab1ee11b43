//! Calls over a network that cuts.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use coney::rpc::{RpcClient, RpcWorker};
use coney::{Connection, Error, Message};
use serde_json::json;

use super::{CUTS, proxy_before, url};
use crate::contract;
use crate::faults::CALL;
use crate::rpc::request;
use crate::support::{Broker, PATIENCE, app, queue, unique, wait_until};

contract! {
    a_cut_fails_the_calls_in_flight_at_once_and_a_late_answer_is_nobodys,
    calls_with_little_time_neither_hammer_a_broker_that_is_away_nor_keep_it_away,
}

fn answer(connection: &Connection, (to, id): &(String, String), n: u64) {
    let message = Message::json(&json!({"success": true, "data": n})).unwrap().with_correlation_id(id);
    connection.publish("", to, message).unwrap();
}

fn a_cut_fails_the_calls_in_flight_at_once_and_a_late_answer_is_nobodys(broker: Broker) {
    for cut in CUTS {
        let proxy = proxy_before(broker.addr());
        let owner = broker.app("[pools.publish]\nmandatory = false");
        let worker = owner.publish_pool().connection().unwrap();
        let name = queue(&worker, "cut-call");
        let app = app(&url(&proxy), "");
        // Long enough to show that it is not the time-out that ends them.
        let client = RpcClient::new(&app).unwrap().with_timeout(Duration::from_secs(60));
        let (tell, told) = mpsc::channel();
        for n in 0..4_u64 {
            let tell = tell.clone();
            client.call_async::<_, u64, _>(&name, &n, move |outcome| tell.send(outcome).unwrap());
        }
        let old: Vec<_> = (0..4).map(|_| request(&worker, &name)).collect();
        proxy.cut(cut);
        for _ in 0..4 {
            let error = told.recv_timeout(CALL).unwrap().unwrap_err();
            assert!(matches!(error, Error::ConnectionLost { .. }), "{error}");
        }
        thread::scope(|scope| {
            let call = scope.spawn(|| client.call::<_, u64>(&name, &5));
            let new = request(&worker, &name);
            old.iter().for_each(|old| answer(&worker, old, 7));
            // The old answers at the new address: what tells them apart is the id alone.
            old.iter().for_each(|old| answer(&worker, &(new.0.clone(), old.1.clone()), 8));
            answer(&worker, &new, 25);
            assert_eq!(call.join().unwrap().unwrap(), 25);
        });
        assert_eq!(client.stats().unmatched, 4, "those that found their way");
        assert!(worker.get(&name).unwrap().is_none(), "nothing was sent twice");
        assert_eq!(client.stats().calls, 5);
    }
}

fn calls_with_little_time_neither_hammer_a_broker_that_is_away_nor_keep_it_away(broker: Broker) {
    let proxy = proxy_before(broker.addr());
    proxy.refuse(true);
    let owner = broker.app("");
    let name = unique("little-time");
    let _worker = RpcWorker::new(&owner).route(&name, |n: u64| Ok::<_, String>(n + 1)).run().unwrap();
    let app = app(&url(&proxy), "");
    let client = RpcClient::new(&app).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        // A call begins every few milliseconds, and has less time than a connection takes.
        scope.spawn(|| {
            let start = Instant::now();
            while !done.load(Ordering::Relaxed) && start.elapsed() < 2 * PATIENCE {
                let _ = client.call_timeout::<_, u64>(&name, &1, Duration::from_millis(3));
            }
        });
        let start = Instant::now();
        wait_until("some attempts have been refused", || proxy.traffic().refused >= 5);
        // 50, 100, 200 and 400 ms are between them, each less a quarter at most. Each call by itself would make it some hundred
        // a second.
        assert!(start.elapsed() >= Duration::from_millis(500), "5 attempts in {:?}", start.elapsed());
        proxy.refuse(false);
        assert_eq!(client.call::<_, u64>(&name, &1).unwrap(), 2);
        done.store(true, Ordering::Relaxed);
    });
}
