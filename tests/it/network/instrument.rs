//! The proxy does what it says. Plain sockets, no broker.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::{CUTS, proxy_before};
use crate::proxy::{Cut, Direction, Flow, Proxy};
use crate::support::{PATIENCE, wait_until};

fn client(proxy: &Proxy) -> TcpStream {
    let client = TcpStream::connect(proxy.addr()).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client
}

/// A client, the proxy, and the server's end of the same connection.
fn line() -> (TcpStream, Proxy, TcpStream) {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = proxy_before(server.local_addr().unwrap());
    let client = client(&proxy);
    let (server, _) = server.accept().unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    (client, proxy, server)
}

fn heard(socket: &mut TcpStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    socket.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn bytes_are_passed_on_and_counted_and_so_are_ends() {
    let (mut client, proxy, mut server) = line();
    client.write_all(b"question").unwrap();
    assert_eq!(heard(&mut server, 8), b"question");
    server.write_all(b"answer").unwrap();
    assert_eq!(heard(&mut client, 6), b"answer");
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(server.read(&mut [0]).unwrap(), 0);
    server.write_all(b"late").unwrap();
    assert_eq!(heard(&mut client, 4), b"late");
    let seen = proxy.traffic();
    assert_eq!((seen.accepted, seen.open, seen.up, seen.down), (1, 1, 8, 10));
    drop(server);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    wait_until("it has let go", || proxy.traffic().open == 0);
}

#[test]
fn a_cut_comes_after_exactly_so_many_bytes_and_is_what_it_says() {
    for cut in CUTS {
        for (client_sends, direction) in [(true, Direction::Up), (false, Direction::Down)] {
            let (client, proxy, server) = line();
            let (mut from, mut to) = if client_sends { (client, server) } else { (server, client) };
            from.write_all(b"abc").unwrap();
            assert_eq!(heard(&mut to, 3), b"abc");
            proxy.cut_after(direction, 4, cut);
            from.write_all(b"defghij").unwrap();
            // With a reset the last bytes may be overtaken by it.
            let mut rest = Vec::new();
            let end = to.read_to_end(&mut rest);
            assert!(b"defg".starts_with(&rest), "{rest:?}");
            match cut {
                Cut::Fin => assert_eq!((end.unwrap(), from.read(&mut [0]).unwrap()), (4, 0)),
                _ => {
                    for error in [end.unwrap_err(), from.read(&mut [0]).unwrap_err()] {
                        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
                    }
                }
            }
            let seen = proxy.traffic();
            assert_eq!((seen.up + seen.down, seen.open), (7, 0));
        }
    }
}

#[test]
fn a_stalled_line_fills_up_and_loses_nothing() {
    let (mut client, proxy, mut server) = line();
    proxy.flow_of(Direction::Up, Flow::Stall);
    client.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let mut written = 0;
    let full = loop {
        match client.write(&[7; 100_000]) {
            Ok(some) => written += some,
            Err(error) => break error,
        }
    };
    assert_eq!(full.kind(), ErrorKind::WouldBlock);
    assert_eq!(proxy.traffic().up, 0);
    server.write_all(b"x").unwrap();
    assert_eq!(heard(&mut client, 1), b"x", "the other way is open");
    proxy.flow_of(Direction::Up, Flow::Pass);
    assert!(heard(&mut server, written).iter().all(|&byte| byte == 7));
}

#[test]
fn what_is_swallowed_is_gone_and_the_connection_with_it() {
    let (mut client, proxy, mut server) = line();
    proxy.flow(Flow::Swallow);
    client.write_all(&[0; 1000]).unwrap();
    wait_until("it is swallowed", || proxy.traffic().swallowed_up == 1000);
    assert_eq!(proxy.traffic().up, 0);
    proxy.flow(Flow::Pass);
    for socket in [&mut client, &mut server] {
        assert_eq!(socket.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
}

#[test]
fn a_throttled_line_passes_no_more_than_it_may() {
    let (mut client, proxy, mut server) = line();
    proxy.flow_of(Direction::Down, Flow::Throttle(1000));
    let start = Instant::now();
    server.write_all(&[0; 500]).unwrap();
    heard(&mut client, 500);
    let took = start.elapsed();
    // The last beat of a twentieth of a second need not be waited for.
    assert!(took >= Duration::from_millis(440) && took < PATIENCE, "{took:?}");
}

#[test]
fn it_refuses_and_takes_again_and_ends_with_all_it_has() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let proxy = proxy_before(server.local_addr().unwrap());
    let mut first = client(&proxy);
    wait_until("it is there", || proxy.traffic().open == 1);
    proxy.refuse(true);
    let mut refused = client(&proxy);
    assert_eq!(refused.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(proxy.traffic().refused, 1);
    proxy.refuse(false);
    proxy.cut_new_after(Direction::Up, 0, Cut::Fin);
    let mut second = client(&proxy);
    assert_eq!(second.read(&mut [0]).unwrap(), 0);
    proxy.spare_new();
    let third = client(&proxy);
    wait_until("it is there", || proxy.traffic().accepted == 3);
    proxy.cut_one(3, Cut::Reset);
    assert_eq!(proxy.traffic().open, 1);
    drop(third);
    let addr = proxy.addr();
    thread::spawn(move || drop(proxy)).join().unwrap();
    assert_eq!(first.read(&mut [0]).unwrap(), 0);
    TcpStream::connect(addr).unwrap_err();
}
