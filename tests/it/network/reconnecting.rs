//! The way back after a cut: refused, locked out, and ended in the middle.

use std::collections::HashSet;
use std::sync::{Barrier, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use coney::embedded::EmbeddedBroker;
use coney::{Error, ListenerState, Queue, Topology};

use super::{CUTS, proxy_before, url};
use crate::contract;
use crate::listener::publish_numbers;
use crate::proxy::{Cut, Flow};
use crate::support::{Broker, PATIENCE, app, queue, unique, wait_until};

contract! {
    an_exclusive_queue_that_somebody_else_has_meanwhile_is_waited_for,
    five_threads_end_all_in_the_middle_of_reconnecting_and_none_is_stuck,
    of_a_pool_with_all_connections_broken_each_costs_one_failure_at_most,
}

#[test]
fn a_broker_that_refuses_every_open_is_not_hammered_and_nothing_is_lost_or_doubled() {
    let broker = EmbeddedBroker::start().unwrap();
    let control = broker.control();
    let proxy = proxy_before(broker.addr());
    let app = app(&url(&proxy), "[pools.publish]\ncheckout_timeout = \"60s\"");
    let name = unique("refused-opens");
    let (tell, told) = mpsc::channel();
    let listener = app.listener(&name).topology(Topology::new().queue(Queue::new(&name))).spawn(move |_, delivery| {
        tell.send((delivery.message().text().unwrap().to_owned(), delivery.redelivered())).unwrap();
    });
    let listener = listener.unwrap();
    publish_numbers(&app, &name, 10);
    wait_until("they are settled", || listener.stats().acked == 10 && control.queue_unacked(&name) == 0);
    let before = proxy.traffic().accepted;
    let why = "CONNECTION_FORCED - broker forced connection closure with reason 'shutdown'";
    control.refuse_next_opens(usize::MAX, 320, why);
    let start = Instant::now();
    control.close_connections(320, why);
    wait_until("the pool knows", || app.publish_pool().try_connection().is_none());
    thread::scope(|scope| {
        // The publisher rides it out.
        scope.spawn(|| publish_numbers(&app, &name, 10));
        wait_until("it is refused again and again", || match listener.state() {
            ListenerState::Recovering { error, attempt } => attempt >= 6 && error.code() == Some(320),
            _ => false,
        });
        let (attempts, took) = (proxy.traffic().accepted - before, start.elapsed());
        control.refuse_next_opens(0, 0, "");
        // Six of the listener's, one perhaps under way. The publisher's waits grow to a second within six.
        let most = 7 + 6 + (took.as_secs_f64() / 0.75) as u64;
        println!("{attempts} attempts in {took:?}");
        // 100 ms doubled four times, less a quarter at most, are 2.3 s.
        assert!(took > Duration::from_secs(2), "{took:?}");
        assert!((6..=most).contains(&attempts), "{attempts} attempts in {took:?}");
    });
    let handled: Vec<_> = (0..20).map(|_| told.recv_timeout(PATIENCE).unwrap()).collect();
    assert!(handled.iter().all(|(_, redelivered)| !redelivered));
    for half in [&handled[..10], &handled[10..]] {
        let distinct: HashSet<_> = half.iter().map(|(body, _)| body).collect();
        assert_eq!(distinct.len(), 10);
    }
    listener.stop().unwrap();
    assert!(told.try_recv().is_err(), "and nothing more");
}

fn an_exclusive_queue_that_somebody_else_has_meanwhile_is_waited_for(broker: Broker) {
    let proxy = proxy_before(broker.addr());
    let (publishing, listening) = (broker.app(""), app(&url(&proxy), ""));
    let declared = Queue::new(unique("held")).exclusive(true);
    let name = &declared.name;
    let (tell, told) = mpsc::channel();
    let listener = listening.listener(name).topology(Topology::new().queue(declared.clone()));
    let listener = listener.spawn(move |_, _| tell.send(()).unwrap()).unwrap();
    publish_numbers(&publishing, name, 1);
    told.recv_timeout(PATIENCE).unwrap();
    proxy.refuse(true);
    proxy.cut(Cut::Fin);
    let other = broker.app("");
    let holder = other.publish_pool().connection().unwrap();
    wait_until("the other has it", || holder.queue_declare(&declared).is_ok());
    proxy.refuse(false);
    wait_until("it is locked out, and tries again", || match listener.state() {
        ListenerState::Recovering { error, attempt } => attempt >= 3 && error.code() == Some(405),
        _ => false,
    });
    drop((holder, other));
    wait_until("it is back", || listener.stats().recoveries == 1);
    publish_numbers(&publishing, name, 1);
    told.recv_timeout(PATIENCE).unwrap();
}

/// What a thread ends.
type End<'a> = Box<dyn FnOnce() + Send + 'a>;

/// What becomes of attempts to connect.
#[derive(Debug, Clone, Copy)]
enum Outage {
    Refused,
    Silent,
    OverJustNow,
}

fn five_threads_end_all_in_the_middle_of_reconnecting_and_none_is_stuck(broker: Broker) {
    const CLOSE: Duration = Duration::from_secs(5);
    for outage in [Outage::Refused, Outage::Silent, Outage::OverJustNow, Outage::OverJustNow] {
        let proxy = proxy_before(broker.addr());
        let name = queue(&broker.app("").publish_pool().connection().unwrap(), "ended");
        let extra = "connect_timeout = \"2s\"\n[pools.publish]\nsize = 5\ncheckout_timeout = \"60s\"";
        let app = app(&url(&proxy), extra);
        let listener = app.spawn_listener(&name, |_, _| ()).unwrap();
        let pool = app.publish_pool();
        let guards: Vec<_> = (0..5).map(|_| pool.connection().unwrap()).collect();
        guards.iter().for_each(|guard| guard.publish("", &name, "x").unwrap());
        drop(guards);
        match outage {
            Outage::Silent => proxy.flow(Flow::Swallow),
            Outage::Refused | Outage::OverJustNow => proxy.refuse(true),
        }
        proxy.cut(Cut::Reset);
        wait_until("the pool knows", || pool.try_connection().is_none());
        let gate = Barrier::new(6);
        thread::scope(|scope| {
            // They hold every place of the pool.
            let waiting: Vec<_> = (0..5).map(|_| scope.spawn(|| pool.connection().map(drop))).collect();
            wait_until("they are at it", || pool.status().in_use == 5 && pool.status().idle == 0);
            let ends: [(&str, End<'_>); 5] = [
                ("close", Box::new(|| pool.close())),
                ("a second close", Box::new(|| pool.close())),
                ("the drop of a clone", Box::new(|| drop(app.clone()))),
                ("the stop of a listener", Box::new(|| listener.stop().unwrap())),
                ("shutdown", Box::new(|| app.shutdown(CLOSE).unwrap())),
            ];
            for (what, end) in ends {
                let gate = &gate;
                scope.spawn(move || {
                    gate.wait();
                    let start = Instant::now();
                    end();
                    assert!(start.elapsed() < CLOSE, "{outage:?}: {what} took {:?}", start.elapsed());
                });
            }
            gate.wait();
            if let Outage::OverJustNow = outage {
                proxy.refuse(false);
            }
            for waiting in waiting {
                match waiting.join().unwrap() {
                    Err(Error::PoolClosed { .. }) => {}
                    // An attempt that was under way is brought to its end.
                    Err(Error::Connect { .. }) if matches!(outage, Outage::Silent) => {}
                    Ok(()) if matches!(outage, Outage::OverJustNow) => {}
                    other => panic!("{outage:?}: {other:?}"),
                }
            }
        });
        let status = pool.status();
        assert_eq!((status.idle, status.in_use, status.waiting), (0, 0, 0), "{outage:?}");
        proxy.flow(Flow::Pass);
        wait_until("nothing is left", || proxy.traffic().open == 0);
    }
}

fn of_a_pool_with_all_connections_broken_each_costs_one_failure_at_most(broker: Broker) {
    for cut in CUTS.into_iter().chain([Cut::Silence]) {
        let proxy = proxy_before(broker.addr());
        let app = app(&url(&proxy), "[pools.publish]\nsize = 5\nconfirm_timeout = \"1s\"");
        let pool = app.publish_pool();
        let guards: Vec<_> = (0..5).map(|_| pool.connection().unwrap()).collect();
        let name = queue(&guards[0], "broken");
        guards.iter().for_each(|guard| guard.publish("", &name, "before").unwrap());
        drop(guards);
        proxy.cut(cut);
        let outcomes: Vec<_> = (0..20).map(|_| pool.connection().unwrap().publish("", &name, "after")).collect();
        let failed = outcomes.iter().filter(|outcome| outcome.is_err()).count();
        println!("{cut:?}: {failed} of 20 failed");
        assert!(failed <= 5, "{cut:?}: {failed} failed");
        assert!(outcomes[failed..].iter().all(Result::is_ok), "{cut:?}: {outcomes:?}");
        assert!(outcomes.iter().all(|outcome| outcome.as_ref().err().is_none_or(Error::is_transient)), "{outcomes:?}");
    }
}
