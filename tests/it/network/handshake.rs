//! Connections that are cut before they are open.

use std::time::Instant;

use coney::Error;

use super::{CUTS, proxy_before, url};
use crate::contract;
use crate::faults::{IMPATIENT, in_time};
use crate::proxy::Direction;
use crate::support::{Broker, app, wait_until};

contract! {
    cut_after_any_byte_of_the_handshake_it_is_a_transient_error_at_once_and_nothing_stays_behind,
}

fn cut_after_any_byte_of_the_handshake_it_is_a_transient_error_at_once_and_nothing_stays_behind(broker: Broker) {
    let node = broker.hurt();
    let proxy = proxy_before(node.addr());
    // A listener that is started waits for one attempt to connect and says what became of it.
    let app = app(&url(&proxy), &IMPATIENT.replace("\nconnect_timeout = \"2s\"", "\nconnect_timeout = \"10s\""));
    drop(app.publish_pool().connection().unwrap());
    let whole = proxy.traffic();
    let start = Instant::now();
    let mut attempts = 0;
    for cut in CUTS {
        for (direction, len) in [(Direction::Up, whole.up), (Direction::Down, whole.down)] {
            let beyond = (0..).find(|&bytes| {
                proxy.cut_new_after(direction, bytes, cut);
                attempts += 1;
                let what = format!("{cut:?} after {bytes} bytes {direction:?}");
                let error = in_time(&what, || app.spawn_listener("handshake", |_, _| ())).map(drop).unwrap_err();
                assert!(error.is_transient(), "{what}: {error}");
                // Once the handshake is through, it is what comes after it that fails.
                !matches!(error, Error::Connect { .. })
            });
            // Later connections have a longer name than the first.
            assert!(beyond.is_some_and(|bytes| (len..len + 20).contains(&bytes)), "{beyond:?} instead of {len}");
        }
    }
    println!("{attempts} attempts of {} and {} bytes took {:?}", whole.up, whole.down, start.elapsed());
    proxy.spare_new();
    wait_until("only the first is left", || proxy.traffic().open == 1 && node.connections() == 1);
    app.listen_pool().connection().unwrap();
    assert_eq!(proxy.traffic().open, 2);
}
