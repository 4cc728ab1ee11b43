//! What the fuzzers in `fuzz/` feed with bytes: each function says what is wrong with how they were taken.
//!
//! Nothing here is part of the interface of this crate.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use super::limits::FRAME_MIN;
use super::{EmbeddedBroker, Release};
use crate::amqp::cursor::{Field, Reader, Writer};
use crate::amqp::frame::{self, FRAME_END, FRAME_OVERHEAD, PROTOCOL_HEADER, Scan, scan};
use crate::amqp::method::*;
use crate::amqp::properties::Properties;
use crate::amqp::value::Table;

/// What a check has found; the text is for people.
pub type Verdict = Result<(), String>;

const FRAME_MAX: usize = 131_072;

/// What the broker can be.
const RELEASES: [Release; 2] = [Release::V3_10, Release::V4_0];

/// Nothing that the broker does with some bytes takes this long.
const PATIENCE: Duration = Duration::from_secs(20);

/// Any bytes, as a client might send them after the protocol header.
pub fn frame(bytes: &[u8]) -> Verdict {
    let mut rest = bytes;
    while let Scan::Whole(frame, len) = scan(rest, FRAME_MAX) {
        let mut again = vec![frame.kind];
        again.extend_from_slice(&frame.channel.to_be_bytes());
        again.extend_from_slice(&(frame.payload.len() as u32).to_be_bytes());
        again.extend_from_slice(frame.payload);
        again.push(FRAME_END);
        same("frame", &rest[..len], &again)?;
        match frame.kind {
            frame::METHOD => method(frame.payload)?,
            frame::HEADER => properties(frame.payload.get(12..).unwrap_or_default())?,
            _ => {}
        }
        rest = &rest[len..];
    }
    Ok(())
}

/// The bytes of a table, its length in front.
pub fn table(bytes: &[u8]) -> Verdict {
    let encoded = |table: &Table| {
        let mut bytes = Vec::new();
        table.write(&mut Writer::new(&mut bytes));
        bytes
    };
    let mut reader = Reader::new(bytes);
    let Ok(table) = Table::read(&mut reader) else { return Ok(()) };
    let read = bytes.len() - reader.rest().len();
    let once = encoded(&table);
    same_length("table", &bytes[..read], &once)?;
    let again = Table::read(&mut Reader::new(&once)).map_err(|_| "a table cannot be read again".to_string())?;
    same("table", &once, &encoded(&again))
}

/// The ids of a method and its arguments: the payload of a method frame.
pub fn method(bytes: &[u8]) -> Verdict {
    let decoded = |bytes: &[u8]| {
        let (&[c1, c0, m1, m0], arguments) = bytes.split_first_chunk::<4>()?;
        Method::decode(u16::from_be_bytes([c1, c0]), u16::from_be_bytes([m1, m0]), arguments)?.ok()
    };
    let encoded = |method: &Method| {
        let mut bytes = Vec::new();
        method.encode(&mut bytes);
        bytes
    };
    let Some(method) = decoded(bytes) else { return Ok(()) };
    let once = encoded(&method);
    same_length("method", bytes, &once)?;
    let again = decoded(&once).ok_or("a method cannot be read again")?;
    same("method", &once, &encoded(&again))
}

/// Flags and values: a content header from its thirteenth byte on.
pub fn properties(bytes: &[u8]) -> Verdict {
    let Ok(properties) = Properties::decode(bytes) else { return Ok(()) };
    let once = properties.encode();
    same_length("properties", bytes, &once)?;
    let again = Properties::decode(&once).map_err(|_| "properties cannot be read again".to_string())?;
    same("properties", &once, &again.encode())
}

/// Everything that a client says: from the protocol header on, if the bytes begin with that, or else after it has logged
/// in and opened channel 1. The broker, whichever release it is, must answer in frames, let go when the client does, and serve
/// the next one.
pub fn session(bytes: &[u8]) -> Verdict {
    RELEASES.into_iter().try_for_each(|release| {
        session_with(release, bytes).map_err(|problem| format!("as RabbitMQ {release}: {problem}"))
    })
}

fn session_with(release: Release, bytes: &[u8]) -> Verdict {
    let broker = EmbeddedBroker::builder().release(release).quorum_queues(true).start();
    let broker = broker.map_err(|error| format!("the broker does not start: {error}"))?;
    let mut said = if bytes.starts_with(b"AMQP") { Vec::new() } else { greeting() };
    said.extend_from_slice(bytes);
    let answer = converse(&broker, &said).map_err(|error| format!("the session does not end: {error}"))?;
    understood(&answer)?;
    let answer = converse(&broker, &normal_client()).map_err(|error| format!("the next client is kept: {error}"))?;
    if methods(&answer).any(|method| method == ConnectionCloseOk {}.into())
        && understood(&answer)? == Some(b"well".into())
    {
        return Ok(());
    }
    Err("the next client is not served".into())
}

/// Says it all at once and hears what the broker has to say until it closes.
fn converse(broker: &EmbeddedBroker, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let socket = TcpStream::connect(broker.addr())?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    let mut heard = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // The broker may have closed by now.
            let _ = (&socket).write_all(bytes);
            let _ = socket.shutdown(Shutdown::Write);
        });
        match (&socket).read_to_end(&mut heard) {
            // It closes without having read all that was said.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
            other => other.map(drop),
        }
    })?;
    Ok(heard)
}

fn greeting() -> Vec<u8> {
    let mut bytes = PROTOCOL_HEADER.to_vec();
    let start_ok = ConnectionStartOk {
        mechanism: "PLAIN".into(),
        response: b"\0guest\0guest".to_vec(),
        locale: "en_US".into(),
        ..Default::default()
    };
    let frame_max = FRAME_MAX as u32;
    frame::write_method(&mut bytes, 0, &start_ok.into());
    frame::write_method(&mut bytes, 0, &ConnectionTuneOk { channel_max: 2047, frame_max, heartbeat: 0 }.into());
    frame::write_method(&mut bytes, 0, &ConnectionOpen { virtual_host: "/".into(), ..Default::default() }.into());
    frame::write_method(&mut bytes, 1, &ChannelOpen::default().into());
    bytes
}

/// Declares a queue, publishes to it, gets what it has published, and closes.
fn normal_client() -> Vec<u8> {
    let mut bytes = greeting();
    let mut say = |method: Method| frame::write_method(&mut bytes, 1, &method);
    say(QueueDeclare { exclusive: true, ..Default::default() }.into());
    // The broker has made its name; this exchange finds it without, and is not to be deleted or changed.
    say(QueueBind { exchange: "amq.fanout".into(), ..Default::default() }.into());
    say(BasicPublish { exchange: "amq.fanout".into(), ..Default::default() }.into());
    frame::write_content(&mut bytes, 1, &[0, 0], b"well", FRAME_MIN as usize);
    frame::write_method(&mut bytes, 1, &BasicGet { no_ack: true, ..Default::default() }.into());
    frame::write_method(&mut bytes, 0, &ConnectionClose { reply_code: 200, ..Default::default() }.into());
    bytes
}

/// The methods that the broker has said.
fn methods(mut answer: &[u8]) -> impl Iterator<Item = Method> {
    std::iter::from_fn(move || {
        loop {
            let Scan::Whole(frame, len) = scan(answer, FRAME_MAX) else { return None };
            answer = &answer[len..];
            if let (frame::METHOD, Some((&[c1, c0, m1, m0], arguments))) =
                (frame.kind, frame.payload.split_first_chunk::<4>())
            {
                let method = Method::decode(u16::from_be_bytes([c1, c0]), u16::from_be_bytes([m1, m0]), arguments);
                return method?.ok();
            }
        }
    })
}

/// Checks that a client could read the answer, up to where the connection ends, and gives its last body.
fn understood(answer: &[u8]) -> Result<Option<Vec<u8>>, String> {
    // To a client that speaks another protocol.
    if RELEASES.iter().any(|release| answer == release.spoken_instead_of([0; 8])) {
        return Ok(None);
    }
    let mut body = None;
    let mut rest = answer;
    loop {
        let (frame, len) = match scan(rest, FRAME_MAX - FRAME_OVERHEAD) {
            Scan::Whole(frame, len) => (frame, len),
            Scan::Partial => return Ok(body),
            other => return Err(format!("an answer that is no frame: {other:?}")),
        };
        rest = &rest[len..];
        let legible = match frame.kind {
            frame::METHOD => methods(&answer[answer.len() - rest.len() - len..]).next().is_some(),
            frame::HEADER => frame.payload.get(12..).is_some_and(|bytes| Properties::decode(bytes).is_ok()),
            frame::BODY => {
                body = Some(frame.payload.to_vec());
                true
            }
            frame::HEARTBEAT => frame.payload.is_empty(),
            _ => false,
        };
        if !legible {
            return Err(format!("an answer that cannot be read: {frame:?}"));
        }
    }
}

fn same(what: &str, one: &[u8], other: &[u8]) -> Verdict {
    if one == other { Ok(()) } else { Err(format!("a {what} changes:\n{one:?}\n{other:?}")) }
}

/// What RabbitMQ writes in its own way has the same length: the tag of long integers, what is true, bits of no meaning.
fn same_length(what: &str, one: &[u8], other: &[u8]) -> Verdict {
    if one.len() == other.len() { Ok(()) } else { Err(format!("a {what} changes its length:\n{one:?}\n{other:?}")) }
}
