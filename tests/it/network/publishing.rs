//! Publishing over a network that cuts, stalls and drips: nothing is said to be sent that was not confirmed.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use coney::Error;

use super::{CUTS, Sent, proxy_before, url};
use crate::contract;
use crate::faults::{IMPATIENT, in_time};
use crate::proxy::{Cut, Direction, Flow};
use crate::support::{Broker, PATIENCE, app, bodies, drain, queue, wait_until};

contract! {
    cut_anywhere_between_a_publish_and_its_confirm_it_is_never_said_to_be_sent,
    cut_anywhere_in_a_pipeline_every_callback_is_run_once_and_ok_means_kept,
    answers_that_are_stalled_are_only_a_delay_and_the_window_is_kept,
    over_a_line_that_is_too_slow_every_publish_ends_by_its_deadline,
}

/// No heartbeat comes between the bytes that are counted.
const CALM: &str = "heartbeat = \"600s\"\n";

/// All of the same length.
fn body(what: &str, n: usize) -> String {
    format!("{what:<10}{n:06}{}", "-".repeat(200))
}

/// Where to cut, and whether the message is with the broker then, as far as that is certain.
fn anywhere(random: &mut fastrand::Rng, up: u64, down: u64) -> (Direction, u64, Option<bool>) {
    if random.bool() {
        let bytes = random.u64(0..=up);
        // A reset may overtake the whole message within the broker's machine.
        (Direction::Up, bytes, (bytes < up).then_some(false))
    } else {
        let bytes = random.u64(0..down);
        (Direction::Down, bytes, (bytes > 0).then_some(true))
    }
}

fn cut_anywhere_between_a_publish_and_its_confirm_it_is_never_said_to_be_sent(broker: Broker) {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let proxy = proxy_before(broker.addr());
    let app = app(&url(&proxy), CALM);
    let owner = broker.app("");
    let owner = owner.publish_pool().connection().unwrap();
    let name = queue(&owner, "cut");
    let mut sent = Sent::default();
    let (mut certain, mut longest) = (Vec::new(), Duration::ZERO);
    for n in 0..200 {
        let connection = app.publish_pool().connection().unwrap();
        let mut marks = Vec::new();
        for what in ["opening", "whole"] {
            let body = body(what, n);
            sent.attempt(&body);
            connection.publish("", &name, &*body).unwrap();
            sent.confirm(&body);
            marks.push(proxy.traffic());
        }
        let (up, down) = (marks[1].up - marks[0].up, marks[1].down - marks[0].down);
        let (direction, bytes, arrives) = anywhere(&mut random, up, down);
        let cut = CUTS[n % 2];
        proxy.cut_after(direction, bytes, cut);
        let body = body("cut", n);
        sent.attempt(&body);
        let what = format!("seed {seed}, {n}: {cut:?} after {bytes} bytes {direction:?}");
        let start = Instant::now();
        let error = in_time(&what, || connection.publish("", &name, &*body)).expect_err(&what);
        longest = longest.max(start.elapsed());
        assert!(matches!(error, Error::ConnectionLost { .. }), "{what}: {error}");
        certain.extend(arrives.map(|arrives| (what, body, arrives)));
    }
    let arrived = bodies(&drain(&owner, &name));
    sent.check(&arrived);
    println!("{} of 200 arrived; the longest call took {longest:?}", arrived.len() - 400);
    for (what, body, arrives) in certain {
        assert_eq!(arrived.contains(&body), arrives, "{what}");
    }
}

fn cut_anywhere_in_a_pipeline_every_callback_is_run_once_and_ok_means_kept(broker: Broker) {
    const IN_FLIGHT: u64 = 20;
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let proxy = proxy_before(broker.addr());
    let app = app(&url(&proxy), CALM);
    let owner = broker.app("");
    let owner = owner.publish_pool().connection().unwrap();
    let name = queue(&owner, "cut-async");
    let mut sent = Sent::default();
    for n in 0..50 {
        let connection = app.publish_pool().connection().unwrap();
        let opening = body("opening", n);
        sent.attempt(&opening);
        connection.publish("", &name, &*opening).unwrap();
        sent.confirm(&opening);
        // What a message and its confirm are in bytes, or a little more.
        let (direction, bytes, _) = anywhere(&mut random, IN_FLIGHT * 300, IN_FLIGHT * 21);
        proxy.cut_after(direction, bytes, CUTS[n % 2]);
        let (tell, told) = mpsc::channel();
        for m in 0..IN_FLIGHT as usize {
            let body = body("pipelined", n * 100 + m);
            sent.attempt(&body);
            let tell = tell.clone();
            connection.publish_async("", &name, body.clone(), move |outcome| tell.send((body, outcome)).unwrap());
        }
        drop(tell);
        in_time("giving back", || drop(connection));
        let told: Vec<_> = told.iter().collect();
        assert_eq!(told.len() as u64, IN_FLIGHT, "seed {seed}, {n}");
        for (body, outcome) in told {
            match outcome {
                Ok(()) => sent.confirm(&body),
                Err(error) => assert!(matches!(error, Error::ConnectionLost { .. }), "seed {seed}, {n}: {error}"),
            }
        }
        // Confirms of several in one may have left it whole.
        proxy.cut(Cut::Reset);
        wait_until("the pool knows", || app.publish_pool().try_connection().is_none());
    }
    let arrived = bodies(&drain(&owner, &name));
    println!("{} confirmed, {} arrived, {} sent", sent.confirmed.len(), arrived.len(), sent.attempts.len());
    sent.check(&arrived);
}

fn answers_that_are_stalled_are_only_a_delay_and_the_window_is_kept(broker: Broker) {
    const STALL: Duration = Duration::from_secs(5);
    let proxy = proxy_before(broker.addr());
    let app = app(&url(&proxy), &format!("{CALM}[pools.publish]\nmax_in_flight = 8\nconfirm_timeout = \"20s\""));
    let connection = app.publish_pool().connection().unwrap();
    let name = queue(&connection, "stalled");
    connection.publish("", &name, "before").unwrap();
    proxy.flow_of(Direction::Down, Flow::Stall);
    let (tell, told) = mpsc::channel();
    thread::scope(|scope| {
        let name = &name;
        let publishing = scope.spawn(move || {
            for n in 0..64 {
                let tell = tell.clone();
                connection.publish_async("", name, n.to_string(), move |outcome| tell.send(outcome).unwrap());
            }
        });
        wait_until("the window is full", || broker.queue_len(name) == 1 + 8);
        assert!(matches!(told.recv_timeout(STALL), Err(RecvTimeoutError::Timeout)), "nothing is told");
        assert_eq!(broker.queue_len(name), 1 + 8, "and nothing is sent");
        proxy.flow_of(Direction::Down, Flow::Pass);
        (0..64).for_each(|n| told.recv_timeout(PATIENCE).unwrap().unwrap_or_else(|error| panic!("{n}: {error}")));
        publishing.join().unwrap();
    });
    assert_eq!(told.try_iter().count(), 0);
    wait_until("all are there", || broker.queue_len(&name) == 1 + 64);
    assert_eq!(app.publish_pool().status().discarded, 0);
}

fn over_a_line_that_is_too_slow_every_publish_ends_by_its_deadline(broker: Broker) {
    /// The two seconds of a call, and the five after which heartbeats are missed.
    const LONGEST: Duration = Duration::from_secs(7);
    let proxy = proxy_before(broker.addr());
    let app = app(&url(&proxy), &format!("{IMPATIENT}[pools.slow]\nsize = 8\nconfirm_timeout = \"2s\""));
    let owner = broker.app("");
    let owner = owner.publish_pool().connection().unwrap();
    let name = queue(&owner, "slow");
    let pool = app.pool("slow").unwrap();
    let guards: Vec<_> = (0..8).map(|_| pool.connection().unwrap()).collect();
    proxy.flow_of(Direction::Up, Flow::Throttle(1000));
    let (tell, told) = mpsc::channel();
    let mut sent = Sent::default();
    (0..512).for_each(|n| sent.attempt(&body("slow", n)));
    thread::scope(|scope| {
        for (thread, guard) in guards.into_iter().enumerate() {
            let (tell, name) = (tell.clone(), &name);
            scope.spawn(move || {
                for n in thread * 64..(thread + 1) * 64 {
                    let (tell, start) = (tell.clone(), Instant::now());
                    guard.publish_async("", name, body("slow", n), move |outcome| {
                        tell.send((n, outcome, start.elapsed())).unwrap();
                    });
                    assert!(start.elapsed() < LONGEST, "the call itself took {:?}", start.elapsed());
                }
                // Giving back would end what has no outcome.
                guard.flush(LONGEST).unwrap();
                in_time("giving back", || drop(guard));
            });
        }
    });
    drop(tell);
    let told: Vec<_> = told.iter().collect();
    assert_eq!(told.len(), 512);
    let longest = told.iter().map(|(.., took)| *took).max().unwrap();
    assert!(longest < LONGEST, "{longest:?}");
    for (n, outcome, _) in told {
        match outcome {
            Ok(()) => sent.confirm(&body("slow", n)),
            Err(error) => assert!(error.is_transient(), "{n}: {error}"),
        }
    }
    println!("{} of 512 confirmed; the longest took {longest:?}", sent.confirmed.len());
    assert!((1..512).contains(&sent.confirmed.len()), "{} confirmed", sent.confirmed.len());
    sent.check(&bodies(&drain(&owner, &name)));
}
