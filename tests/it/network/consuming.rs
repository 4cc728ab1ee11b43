//! Consuming over a network that cuts: everything comes, and what comes again says so.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use coney::Error;

use super::{CUTS, proxy_before, url};
use crate::contract;
use crate::faults::CALL;
use crate::listener::publish_numbers;
use crate::proxy::{Cut, Direction};
use crate::support::{Broker, PATIENCE, app, queue, wait_until};

contract! {
    cut_every_few_kilobytes_on_both_sides_all_messages_are_consumed,
    cut_between_delivery_and_ack_it_comes_once_more_and_says_so,
    an_ack_after_the_cut_is_an_error_and_settles_nothing_else,
    a_listener_on_a_silent_line_is_back_after_the_heartbeats_it_misses,
}

fn cut_every_few_kilobytes_on_both_sides_all_messages_are_consumed(broker: Broker) {
    /// For all that is published and consumed between cuts of one size.
    const LONGEST: Duration = Duration::from_secs(15);
    for kilobytes in 5..=10 {
        let [to_publisher, to_listener] = [0, 1].map(|_| proxy_before(broker.addr()));
        let name = queue(&broker.app("").publish_pool().connection().unwrap(), "cut-often");
        to_publisher.cut_new_after(Direction::Up, kilobytes << 10, Cut::Reset);
        to_listener.cut_new_after(Direction::Down, kilobytes << 10, Cut::Fin);
        let (publishing, listening) = (app(&url(&to_publisher), ""), app(&url(&to_listener), ""));
        let start = Instant::now();
        // With a larger prefetch the same few messages would be cut off before their acks each time.
        let (tell, told) = mpsc::channel();
        let listener = listening.listener(&name).prefetch(2).spawn(move |_, delivery| {
            let body = delivery.message().text().unwrap().trim().to_owned();
            tell.send((body, delivery.redelivered())).unwrap();
        });
        let listener = listener.unwrap();
        let mut attempts = HashMap::<String, usize>::new();
        for n in 0..50 {
            loop {
                *attempts.entry(n.to_string()).or_default() += 1;
                let pool = publishing.publish_pool();
                match pool.connection().and_then(|connection| connection.publish("", &name, format!("{n:1000}"))) {
                    Ok(()) => break,
                    Err(error) => assert!(error.is_transient(), "{error}"),
                }
            }
        }
        let (mut seen, mut first_time) = (HashSet::new(), HashMap::<String, usize>::new());
        let mut again = 0;
        while seen.len() < 50 {
            let (body, redelivered) = told.recv_timeout(LONGEST.saturating_sub(start.elapsed())).unwrap();
            if redelivered {
                again += 1;
            } else {
                *first_time.entry(body.clone()).or_default() += 1;
            }
            seen.insert(body);
        }
        let took = start.elapsed();
        for (body, times) in first_time {
            assert!(times <= attempts[&body], "{body} came {times} times as new and was sent {}", attempts[&body]);
        }
        println!(
            "{kilobytes} KiB: {took:?}, {} connections published with {} attempts, {} listened, {again} redelivered",
            to_publisher.traffic().accepted,
            attempts.values().sum::<usize>(),
            to_listener.traffic().accepted
        );
        assert!(to_publisher.traffic().accepted > 5 && to_listener.traffic().accepted > 5);
        to_listener.spare_new();
        wait_until("all is settled", || broker.queue_len(&name) + broker.queue_unacked(&name) == 0);
        listener.stop().unwrap();
    }
}

fn cut_between_delivery_and_ack_it_comes_once_more_and_says_so(broker: Broker) {
    for cut in CUTS {
        let proxy = proxy_before(broker.addr());
        let owner = broker.app("");
        let name = queue(&owner.publish_pool().connection().unwrap(), "cut-in-hand");
        let app = app(&url(&proxy), "");
        let (begun, in_handler) = mpsc::channel();
        let (release, gate) = crossbeam_channel::bounded::<()>(0);
        let gate = Mutex::new(Some(gate));
        let listener = app
            .spawn_listener(&name, move |_, delivery| {
                begun.send(delivery.redelivered()).unwrap();
                // Only the first one waits.
                let gate = gate.lock().unwrap().take();
                gate.map(|gate| gate.recv_timeout(PATIENCE));
            })
            .unwrap();
        publish_numbers(&owner, &name, 1);
        assert!(!in_handler.recv_timeout(PATIENCE).unwrap(), "the first time");
        proxy.cut(cut);
        wait_until("the broker has it back", || broker.queue_len(&name) == 1 && broker.queue_unacked(&name) == 0);
        drop(release);
        assert!(in_handler.recv_timeout(PATIENCE).unwrap(), "the second");
        wait_until("it is settled", || broker.queue_len(&name) + broker.queue_unacked(&name) == 0);
        // An ack of the first session on the second one's channel would have ended that.
        publish_numbers(&owner, &name, 1);
        assert!(!in_handler.recv_timeout(PATIENCE).unwrap(), "the next message");
        wait_until("it is settled", || broker.queue_len(&name) + broker.queue_unacked(&name) == 0);
        let stats = listener.stats();
        assert_eq!((stats.delivered, stats.recoveries), (3, 1));
        listener.stop().unwrap();
        assert!(in_handler.try_recv().is_err(), "and nothing more");
    }
}

fn an_ack_after_the_cut_is_an_error_and_settles_nothing_else(broker: Broker) {
    for cut in CUTS {
        let proxy = proxy_before(broker.addr());
        let owner = broker.app("");
        let name = queue(&owner.publish_pool().connection().unwrap(), "cut-got");
        publish_numbers(&owner, &name, 1);
        let app = app(&url(&proxy), "");
        let old = app.publish_pool().connection().unwrap();
        let delivery = old.get(&name).unwrap().expect("a message");
        assert!(!delivery.redelivered());
        proxy.cut(cut);
        wait_until("the broker has it back", || broker.queue_len(&name) == 1);
        // It has the same delivery tag on its channel as the old one had.
        let new = app.publish_pool().connection().unwrap();
        let again = new.get(&name).unwrap().expect("the message");
        assert!(again.redelivered());
        let error = delivery.ack().map(drop).unwrap_err();
        assert!(matches!(error, Error::ConnectionLost { .. } | Error::StaleDelivery), "{error}");
        assert_eq!((broker.queue_len(&name), broker.queue_unacked(&name)), (0, 1));
        again.ack().unwrap();
        wait_until("now it is settled", || broker.queue_unacked(&name) == 0);
        assert!(new.get(&name).unwrap().is_none(), "the channel is as it was");
    }
}

fn a_listener_on_a_silent_line_is_back_after_the_heartbeats_it_misses(broker: Broker) {
    let proxy = proxy_before(broker.addr());
    let owner = broker.app("");
    let name = queue(&owner.publish_pool().connection().unwrap(), "silent");
    let app = app(&url(&proxy), "heartbeat = \"2s\"");
    let (tell, told) = mpsc::channel();
    let listener = app.spawn_listener(&name, move |_, delivery| {
        tell.send(delivery.message().text().unwrap().to_owned()).unwrap();
    });
    let listener = listener.unwrap();
    publish_numbers(&owner, &name, 1);
    told.recv_timeout(PATIENCE).unwrap();
    wait_until("it is settled", || broker.queue_unacked(&name) == 0);
    proxy.cut(Cut::Silence);
    let start = Instant::now();
    // The broker has given them to a consumer that is not there any more, and has yet to notice.
    publish_numbers(&owner, &name, 10);
    wait_until("it is back", || listener.stats().recoveries == 1);
    let back = start.elapsed();
    assert!(back < CALL, "{back:?}");
    let handled: HashSet<_> = (0..10).map(|_| told.recv_timeout(PATIENCE).unwrap()).collect();
    println!("back after {back:?}, all handled after {:?}", start.elapsed());
    assert_eq!(handled.len(), 10);
    wait_until("all is settled", || broker.queue_len(&name) + broker.queue_unacked(&name) == 0);
}
