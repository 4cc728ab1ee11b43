//! Servers that are no brokers, or mean harm: every call ends with an error in time, and the process does not grow.
//!
//! A test binary of its own with one test, since it measures the memory of the whole process.

mod held;
mod raw;

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use coney::{App, ConnectError, Error, Received, Settings};
use held::{forget_peak, peak};
use raw::{frame, long, method, short};

const MIB: u64 = 1 << 20;

/// How much larger the process may ever have been for all that was claimed to it.
const GROWTH: u64 = 16 * MIB;

/// What every call below may take. The margin is for the machine.
const DEADLINE: Duration = Duration::from_secs(1);
const MARGIN: Duration = Duration::from_secs(9);

/// A server that does `what` with each client, one after another.
fn server(what: impl Fn(&mut TcpStream) -> io::Result<()> + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            // It ends when the client has had enough.
            let _ = what(&mut client);
        }
    });
    addr
}

fn app(addr: SocketAddr) -> App {
    let settings = format!(
        r#"
        [broker]
        url = "amqp://{addr}"
        heartbeat = "1s"
        connect_timeout = "1s"
        operation_timeout = "1s"
        [pools.publish]
        checkout_timeout = "1s"
        "#
    );
    App::from_settings(Settings::from_toml(&settings).unwrap()).unwrap()
}

/// Runs `call`, which must be back in time and must not have needed memory.
#[track_caller]
fn bounded<T>(what: &str, call: impl FnOnce() -> T) -> T {
    forget_peak();
    let (before, start) = (peak(), Instant::now());
    let result = call();
    let (took, grown) = (start.elapsed(), peak().saturating_sub(before));
    println!("{what}: {took:.1?}, {} KiB more", grown / 1024);
    assert!(took < DEADLINE + MARGIN, "{what}: took {took:?}");
    assert!(grown < GROWTH, "{what}: {grown} bytes more");
    result
}

/// Why no connection comes from a server that answers the protocol header so.
#[track_caller]
fn refused(what: &str, answer: impl Fn(&mut TcpStream) -> io::Result<()> + Send + 'static) -> ConnectError {
    let addr = server(move |client| {
        client.read_exact(&mut [0; 8])?;
        answer(client)
    });
    let error = bounded(what, || app(addr).publish_pool().connection().expect_err("no broker is there"));
    match error {
        Error::Connect { cause, .. } => cause,
        other => panic!("{what}: {other:?}"),
    }
}

/// The payload of the next frame from the client, which is to be a method.
fn hear(client: &mut TcpStream) -> io::Result<(u16, Vec<u8>)> {
    let mut header = [0; 7];
    client.read_exact(&mut header)?;
    let mut payload = vec![0; u32::from_be_bytes([header[3], header[4], header[5], header[6]]) as usize + 1];
    client.read_exact(&mut payload)?;
    Ok((u16::from_be_bytes([header[1], header[2]]), payload))
}

fn start(properties: &[u8]) -> Vec<u8> {
    method(0, (10, 10), &[&[0, 9][..], &long(properties), &long(b"PLAIN"), &long(b"en_US")].concat())
}

fn tune(frame_max: u32) -> Vec<u8> {
    method(0, (10, 30), &[&[0, 8][..], &frame_max.to_be_bytes(), &[0, 1]].concat())
}

/// Tables in one another, as many levels as are asked for.
fn nested(levels: usize) -> Vec<u8> {
    let mut content = Vec::new();
    for _ in 1..levels {
        content = [&[1, b'n', b'F'], &*long(&content)].concat();
    }
    content
}

/// What a get comes to, from a server that is a broker until then.
fn got(
    what: &str,
    answer: impl Fn(&mut TcpStream, u16) -> io::Result<()> + Send + 'static,
) -> Result<Option<Received>, Error> {
    let addr = server(move |client| {
        client.read_exact(&mut [0; 8])?;
        client.write_all(&start(b""))?;
        loop {
            let (channel, payload) = hear(client)?;
            let mut say = |id, arguments: &[u8]| client.write_all(&method(channel, id, arguments));
            match payload.get(..4) {
                Some([0, 10, 0, 11]) => client.write_all(&tune(131_072))?,
                Some([0, 10, 0, 40]) => say((10, 41), &[0])?,
                Some([0, 10, 0, 50]) => say((10, 51), &[])?,
                Some([0, 20, 0, 10]) => say((20, 11), &[0; 4])?,
                Some([0, 20, 0, 40]) => say((20, 41), &[])?,
                Some([0, 85, 0, 10]) => say((85, 11), &[])?,
                Some([0, 60, 0, 70]) => answer(client, channel)?,
                // Heartbeats, tune-ok, acks.
                _ => {}
            }
        }
    });
    let app = app(addr);
    bounded(what, || {
        let connection = app.publish_pool().connection().unwrap_or_else(|error| panic!("{what}: {error}"));
        connection.get_and_ack("queue")
    })
}

fn get_ok(channel: u16) -> Vec<u8> {
    method(channel, (60, 71), &[&[0, 0, 0, 0, 0, 0, 0, 1, 0][..], &short(""), &short("queue"), &[0; 4]].concat())
}

/// Body size, flags, and the content of the headers if the flags say that there are any.
fn header(channel: u16, size: u64, headers: Option<&[u8]>) -> Vec<u8> {
    let flags = if headers.is_some() { [0x20, 0] } else { [0, 0] };
    let table = headers.map(long).unwrap_or_default();
    frame(2, channel, &[&[0, 60, 0, 0][..], &size.to_be_bytes(), &flags, &table].concat())
}

fn for_ever(client: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    loop {
        client.write_all(bytes)?;
    }
}

#[test]
fn no_server_makes_us_wait_or_grow() {
    // What is allocated once is there after the first connection.
    got("an empty queue", |client, channel| client.write_all(&method(channel, (60, 72), &[0]))).unwrap();

    instead_of_a_handshake();
    in_place_of_a_message();
    any_frames();
}

fn instead_of_a_handshake() {
    let page = b"HTTP/1.1 400 Bad Request\r\n\r\n".repeat(1000);
    let why = refused("an HTTP port that does not end", move |client| for_ever(client, &page));
    assert!(why.to_string().contains("HTTP"), "{why}");
    let silent = AtomicBool::new(false);
    let why = refused("an HTTP port that falls silent", move |client| match silent.swap(true, Ordering::Relaxed) {
        false => client.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        true => client.read_to_end(&mut Vec::new()).map(drop),
    });
    assert!(why.to_string().contains("HTTP"), "{why}");
    let why = refused("a TLS port", |client| client.write_all(b"\x15\x03\x03\x00\x02\x02\x28"));
    assert!(why.to_string().contains("amqps://"), "{why}");
    let why = refused("a frame of 4 GiB", |client| {
        client.write_all(&[1, 0, 0, 0xff, 0xff, 0xff, 0xff])?;
        for_ever(client, &[0; 65_536])
    });
    assert!(matches!(why, ConnectError::Handshake(_)), "{why:?}");

    let heartbeats = frame(8, 0, &[]).repeat(1000);
    let why = refused("heartbeats and nothing else", move |client| for_ever(client, &heartbeats));
    assert!(matches!(why, ConnectError::Timeout { .. } | ConnectError::Handshake(_)), "{why:?}");
    let why = refused("one challenge after another", |client| {
        client.write_all(&start(b""))?;
        for_ever(client, &method(0, (10, 20), &long(b"who is there?")))
    });
    assert!(matches!(why, ConnectError::Timeout { .. } | ConnectError::Handshake(_)), "{why:?}");
    let why = refused("a byte at a time", |client| {
        for byte in start(&[0; 100_000]) {
            client.write_all(&[byte])?;
            thread::park_timeout(Duration::from_millis(100));
        }
        Ok(())
    });
    assert!(matches!(why, ConnectError::Timeout { .. }), "{why:?}");
    let why = refused("properties of 18,000 levels, and silence", |client| {
        client.write_all(&start(&nested(18_000)))?;
        client.read_to_end(&mut Vec::new()).map(drop)
    });
    assert!(matches!(why, ConnectError::Timeout { .. }), "{why:?}");
    let why = refused("a method of clients with a deep table", |client| {
        let arguments = [&[0, 0][..], &short("queue"), &[0], &long(&nested(18_000))].concat();
        client.write_all(&method(0, (50, 10), &arguments))
    });
    assert!(matches!(&why, ConnectError::Handshake(text) if text.contains("no server sends")), "{why:?}");
    for frame_max in [1, 4095] {
        let why = refused("a frame size that is too small", move |client| {
            client.write_all(&start(b""))?;
            hear(client)?;
            client.write_all(&tune(frame_max))?;
            client.read_to_end(&mut Vec::new()).map(drop)
        });
        assert!(matches!(why, ConnectError::Timeout { .. } | ConnectError::Handshake(_)), "{why:?}");
    }
}

fn in_place_of_a_message() {
    for size in [u64::MAX, 1 << 63, (128 << 20) + 1] {
        let error = got("an absurd body size", move |client, channel| {
            client.write_all(&[get_ok(channel), header(channel, size, None)].concat())
        });
        let error = error.expect_err("no such message");
        assert!(error.to_string().contains("max_message_size"), "{error}");
    }
    let error = got("a large body that does not come", |client, channel| {
        client.write_all(&[get_ok(channel), header(channel, 128 << 20, None), frame(3, channel, b"x")].concat())
    });
    assert!(matches!(error, Err(Error::Timeout { .. } | Error::ConnectionLost { .. })), "{error:?}");
    let error = got("more body than was said", |client, channel| {
        client.write_all(&[get_ok(channel), header(channel, 3, None), frame(3, channel, b"four")].concat())
    });
    assert!(matches!(error, Err(Error::ConnectionLost { .. })), "{error:?}");
    let error = got("bodies without a message", |client, channel| for_ever(client, &frame(3, channel, &[0; 100_000])));
    assert!(matches!(error, Err(Error::ConnectionLost { .. })), "{error:?}");
    let error = got("deliveries to nobody", |client, channel| {
        let deliver = [&*short("nobody"), &[0; 9], &short(""), &short("queue")].concat();
        for_ever(client, &[method(channel, (60, 60), &deliver), header(channel, 0, None)].concat())
    });
    assert!(matches!(error, Err(Error::ConnectionLost { .. })), "{error:?}");
    let error = got("an answer that is another's", |client, channel| client.write_all(&method(channel, (60, 11), &[])));
    assert!(error.is_err(), "{error:?}");

    let received = got("headers of 18,000 levels", |client, channel| {
        client.write_all(&[get_ok(channel), header(channel, 0, Some(&nested(18_000)))].concat())
    });
    assert_eq!(received.unwrap().unwrap().message().headers().len(), 1);
}

/// Frames that are well-formed as far as the guard cares, at random: whatever they do, it ends, and the process lives.
fn any_frames() {
    let methods: [(u16, u16, &[u8]); 12] = [
        (10, 30, &[0; 8]),
        (10, 41, &[0]),
        (10, 51, &[]),
        (10, 61, &[]),
        (20, 11, &[0; 4]),
        (20, 20, &[1]),
        (20, 41, &[]),
        (50, 11, &[0; 9]),
        (60, 21, b"\x04ctag"),
        (60, 30, b"\x04ctag\0"),
        (60, 80, &[0, 0, 0, 0, 0, 0, 0, 9, 1]),
        (60, 72, &[0]),
    ];
    for seed in 0..150 {
        let answer = move |client: &mut TcpStream, channel: u16| {
            let mut random = fastrand::Rng::with_seed(seed);
            for _ in 0..20 {
                let channel = *random.choice(&[0, channel, channel, channel + 1, 9999]).unwrap();
                let bytes = match random.u8(..6) {
                    0 => get_ok(channel),
                    1 => header(channel, random.u64(..4), None),
                    2 => frame(3, channel, &vec![0; random.usize(..4)]),
                    _ => {
                        let (class, id, arguments) = *random.choice(&methods).unwrap();
                        method(channel, (class, id), arguments)
                    }
                };
                client.write_all(&bytes)?;
            }
            Ok(())
        };
        // An error, or whatever message the frames happen to make.
        let _ = got(&format!("random frames {seed}"), answer);
    }
}
