//! What comes out of the guard, read with the parser that amiquip uses.

use std::io::{self, Read};

use amq_protocol::frame::AMQPFrame;
use amq_protocol::frame::parsing::parse_frame;
use amq_protocol::types::{AMQPValue, FieldTable};

use super::inbound::{End, Inbound, Seen, Step};
use super::mend;
use crate::field::DEPTH_MAX;
use crate::transport::FRAME_MAX;

const BODY_MAX: u64 = 1 << 20;

fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![kind];
    frame.extend(channel.to_be_bytes());
    frame.extend((payload.len() as u32).to_be_bytes());
    frame.extend(payload);
    frame.push(0xCE);
    frame
}

fn close(class: u16, method: u16, code: u16, text: &str) -> Vec<u8> {
    let mut payload = Vec::new();
    payload.extend(class.to_be_bytes());
    payload.extend(method.to_be_bytes());
    payload.extend(code.to_be_bytes());
    payload.push(text.len() as u8);
    payload.extend(text.as_bytes());
    payload.extend([0, 0, 0, 0]);
    payload
}

/// A content header with these properties, of which `flags` says which they are.
fn header(size: u64, flags: u16, properties: &[u8]) -> Vec<u8> {
    let mut payload = vec![0, 60, 0, 0];
    payload.extend(size.to_be_bytes());
    payload.extend(flags.to_be_bytes());
    payload.extend(properties);
    payload
}

/// Only the headers.
const HEADERS: u16 = 1 << 13;

fn short(text: &[u8]) -> Vec<u8> {
    [&[text.len() as u8], text].concat()
}

fn long(tag: u8, content: &[u8]) -> Vec<u8> {
    [&[tag], (content.len() as u32).to_be_bytes().as_slice(), content].concat()
}

/// A table as it stands among the properties: without a tag.
fn table(content: &[u8]) -> Vec<u8> {
    long(b'F', content)[1..].to_vec()
}

/// A socket that has so many bytes at a time, and would block in between.
struct Pieces<'a> {
    rest: &'a [u8],
    step: usize,
    ready: bool,
}

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.ready = !self.ready;
        if self.ready {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let step = self.step.min(self.rest.len()).min(buffer.len());
        buffer[..step].copy_from_slice(&self.rest[..step]);
        self.rest = &self.rest[step..];
        Ok(step)
    }
}

#[derive(Default)]
struct Fed {
    /// What amiquip would get.
    passed: Vec<u8>,
    seen: Vec<Seen>,
    end: Option<End>,
}

impl Fed {
    fn refusal(&self) -> &str {
        match &self.end {
            Some(End::NotAcceptable(why)) => why,
            other => panic!("not refused but {other:?}"),
        }
    }
}

/// Feeds `stream` in pieces of `step` bytes to a reader that takes `take` at a time.
fn feed(stream: &[u8], step: usize, take: usize) -> Fed {
    let mut inbound = Inbound::new(FRAME_MAX, BODY_MAX);
    let mut socket = Pieces { rest: stream, step, ready: false };
    let mut fed = Fed::default();
    let mut out = vec![0; take];
    loop {
        match inbound.read(&mut out, &mut socket, |seen| fed.seen.push(seen)) {
            Ok(Step::Bytes(read)) => fed.passed.extend_from_slice(&out[..read]),
            Ok(Step::EndOfFile) => return fed,
            Ok(Step::End(end)) => {
                fed.end = Some(end);
                return fed;
            }
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
    }
}

/// Feeds `stream` at once, and has amiquip's parser read what comes out.
fn parsed(stream: &[u8]) -> (Vec<AMQPFrame>, Option<End>) {
    let fed = feed(stream, usize::MAX, 4096);
    let mut rest = fed.passed.as_slice();
    let mut frames = Vec::new();
    while rest.len() > 7 {
        let length = u32::from_be_bytes([rest[3], rest[4], rest[5], rest[6]]) as usize + 8;
        // A body frame is handed on as it comes, and may not have come whole.
        let Some(whole) = rest.get(..length) else { break };
        match parse_frame(whole) {
            Ok((_, frame)) => frames.push(frame),
            Err(error) if matches!(whole[0], 1 | 2) => {
                panic!("let through, but cannot be parsed: {error:?}: {whole:?}")
            }
            // The end octet of body frames and heartbeats is amiquip's to check.
            Err(_) => break,
        }
        rest = &rest[length..];
    }
    (frames, fed.end)
}

fn headers_of(payload: &[u8]) -> FieldTable {
    match parsed(&frame(2, 1, payload)) {
        (frames, None) => match frames.as_slice() {
            [AMQPFrame::Header(1, 60, header)] => header.properties.headers().clone().expect("headers"),
            other => panic!("{other:?}"),
        },
        (_, end) => panic!("{end:?}"),
    }
}

#[test]
fn reasons_are_found_however_the_bytes_are_cut() {
    let mut stream = Vec::new();
    stream.extend(frame(1, 0, &[0, 10, 0, 30, 7, 255, 0, 2, 0, 0, 0, 60])); // tune, frame_max 131072
    stream.extend(frame(1, 3, &[0, 60, 0, 80, 0, 0, 0, 0, 0, 0, 0, 9, 0])); // ack
    stream.extend(frame(2, 3, &header(900, HEADERS, &table(&[]))));
    stream.extend(frame(3, 3, &[close(10, 50, 1, "a body that looks like a close"), vec![1; 800]].concat()));
    stream.extend(frame(1, 3, &close(20, 40, 404, "NOT_FOUND - no queue 'q'")));
    stream.extend(frame(8, 0, &[]));
    // Nothing that amiquip would know what to do with.
    let blocked = [frame(1, 0, b"\0\x0a\0\x3c\x0dlow on memory"), frame(1, 0, b"\0\x0a\0\x3d")].concat();
    let before_blocked = stream.len();
    stream.extend(&blocked);
    stream.extend(frame(1, 7, &close(10, 50, 320, "not on channel 0")));
    let for_amiquip = [&stream[..before_blocked], &stream[before_blocked + blocked.len()..]].concat();
    stream.extend(frame(1, 0, &close(10, 50, 320, "CONNECTION_FORCED - shutdown")));
    stream.extend(frame(8, 0, &[]));
    for step in 1..=stream.len() {
        for take in [1, 5, 4096] {
            let fed = feed(&stream, step, take);
            assert_eq!(fed.passed, for_amiquip, "steps of {step}, {take}");
            let Some(End::Close(reason)) = fed.end else { panic!("no close seen in steps of {step}, {take}") };
            assert_eq!((reason.code, reason.text.as_str()), (320, "CONNECTION_FORCED - shutdown"));
            let [Seen::Tune { frame_max: 131_072 }, Seen::ChannelClose { channel: 3, reason }, rest @ ..] =
                fed.seen.as_slice()
            else {
                panic!("{:?}", fed.seen);
            };
            assert_eq!((reason.code, reason.text.as_str()), (404, "NOT_FOUND - no queue 'q'"));
            assert_eq!(rest, [Seen::Blocked("low on memory".to_owned()), Seen::Unblocked]);
        }
    }
}

#[test]
fn frames_larger_than_a_read_pass_whole() {
    let text = vec![b'x'; 120_000];
    let large = header(0, HEADERS, &table(&[short(b"large"), long(b'S', &text)].concat()));
    let mut stream = frame(2, 1, &large);
    stream.extend(frame(1, 1, &[0, 60, 0, 80, 0, 0, 0, 0, 0, 0, 0, 9, 0]));
    stream.extend(frame(3, 1, &vec![7; FRAME_MAX as usize - 8]));
    stream.extend(frame(2, 1, &large));
    for (step, take) in [(usize::MAX, 4096), (1000, 300_000), (70_001, 1), (4096, 4096), (1, 4096)] {
        let fed = feed(&stream, step, take);
        assert!(fed.passed == stream && fed.end.is_none(), "steps of {step}, {take}");
    }
}

#[test]
fn what_is_not_amqp_is_stopped_before_amiquip_reads_a_length() {
    let huge = frame(1, 0, &vec![0; FRAME_MAX as usize - 7]);
    for (stream, says) in [
        (b"HTTP/1.1 400 Bad Request\r\n".as_slice(), "begins with \"H"),
        (b"AMQP\x00\x01\x00\x00", "another version of AMQP"),
        (b"\x15\x03\x01\x00\x02\x02\x28", "amqps://"),
        (b"\x16\x03\x01\x00\x02\x02\x28", "amqps://"),
        (b"\x15\x04\x01\x00\x02\x02\x28", "frame type 21"),
        (b"ABCDEFGHIJ", "not AMQP"),
        (&huge, "131073 bytes"),
    ] {
        for step in [1, 3, 5, 7, 8, 1000] {
            let fed = feed(stream, step, 4096);
            assert!(fed.refusal().contains(says), "{}", fed.refusal());
            assert!(fed.passed.is_empty(), "{:?} passed in steps of {step}", fed.passed);
        }
    }
}

#[test]
fn what_the_broker_offers_less_than_we_do_is_the_limit() {
    let tune = frame(1, 0, &[0, 10, 0, 30, 7, 255, 0, 0, 16, 0, 0, 60]); // frame_max 4096
    let fits = frame(3, 1, &[0; 4096 - 8]);
    let stream = [tune.clone(), fits.clone(), frame(3, 1, &[0; 4096 - 7])].concat();
    let fed = feed(&stream, 1000, 4096);
    assert!(fed.refusal().contains("a frame of 4097 bytes, where at most 4096"), "{}", fed.refusal());
    assert_eq!(fed.passed, [tune, fits].concat());
    // 0 means no limit of the broker's (AMQP 0-9-1, connection.tune), so it is ours.
    let tune = frame(1, 0, &[0, 10, 0, 30, 7, 255, 0, 0, 0, 0, 0, 60]);
    assert_eq!(feed(&[tune, frame(3, 1, &[0; 5000])].concat(), 1000, 4096).end, None);
}

#[test]
fn text_that_is_not_utf8_is_bytes_and_the_headers_behind_it_are_intact() {
    let content = [
        [short(b"before"), long(b'S', "grün".as_bytes())].concat(),
        [short(b"latin"), long(b'S', b"gr\xfcn")].concat(),
        [short(b"inside"), long(b'A', &long(b'S', b"\xff\xfe"))].concat(),
        [short(b"na\xffme"), vec![b't', 1]].concat(),
        [short(b"after"), vec![b'V']].concat(),
    ];
    let headers = headers_of(&header(0, HEADERS, &table(&content.concat())));
    let bytes = |bytes: &[u8]| AMQPValue::ByteArray(bytes.to_vec());
    assert_eq!(headers["before"], AMQPValue::LongString("grün".to_owned()));
    assert_eq!(headers["latin"], bytes(b"gr\xfcn"));
    assert_eq!(headers["inside"], AMQPValue::FieldArray(vec![bytes(b"\xff\xfe")]));
    assert_eq!(headers["na?me"], AMQPValue::Boolean(true));
    assert_eq!(headers["after"], AMQPValue::Void);
}

#[test]
fn properties_and_names_that_are_not_utf8_get_question_marks() {
    let payload = header(0, 1 << 15 | 1 << 10, &[short(b"text/\xe9\xe9"), short(b"\xf0\x9f\x90")].concat());
    let (frames, end) = parsed(&frame(2, 1, &payload));
    let ([AMQPFrame::Header(_, _, header)], None) = (frames.as_slice(), end) else { panic!("{frames:?}") };
    assert_eq!(header.properties.content_type().as_deref(), Some("text/??"));
    assert_eq!(header.properties.correlation_id().as_deref(), Some("???"));

    let deliver = [&[0, 60, 0, 60], &*short(b"ctag"), &[0; 9], &*short(b"logs"), &*short(b"key.\xff\xc3\xbc")].concat();
    let (frames, end) = parsed(&frame(1, 1, &deliver));
    assert_eq!((frames.len(), end), (1, None));
    assert!(format!("{frames:?}").contains("key.?ü"), "{frames:?}");
}

/// Tables or arrays in one another, `levels` of them counted with the headers, and in the innermost what amiquip could
/// not take.
fn nested(levels: usize, tag: u8) -> Vec<u8> {
    let name = if tag == b'F' { short(b"n") } else { Vec::new() };
    let mut content = [name.clone(), long(b'S', b"\xff")].concat();
    // Lengths grow inwards, so it is built from there.
    for _ in 2..levels {
        content = [name.clone(), long(tag, &content)].concat();
    }
    table(&[short(b"n"), long(tag, &content)].concat())
}

fn depth(value: &AMQPValue) -> usize {
    match value {
        AMQPValue::FieldTable(table) => 1 + table.values().map(depth).max().unwrap_or(0),
        AMQPValue::FieldArray(values) => 1 + values.iter().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

#[test]
fn what_is_nested_too_deep_is_opaque_and_what_is_not_is_as_it_was() {
    for tag in *b"FA" {
        for (levels, visible) in [(2, 2), (DEPTH_MAX, DEPTH_MAX), (DEPTH_MAX + 1, DEPTH_MAX), (5_000, DEPTH_MAX)] {
            let headers = headers_of(&header(0, HEADERS, &nested(levels, tag)));
            assert_eq!(depth(&AMQPValue::FieldTable(headers)), visible, "{levels} levels of {}", tag as char);
        }
    }
    // As deep as a frame has room for, in both.
    let deepest = header(0, HEADERS, &nested(18_000, b'F'));
    assert!(deepest.len() < FRAME_MAX as usize);
    assert_eq!(depth(&AMQPValue::FieldTable(headers_of(&deepest))), DEPTH_MAX);
}

#[test]
fn a_body_larger_than_is_accepted_is_refused_at_its_header() {
    for size in [BODY_MAX + 1, 1 << 63, u64::MAX] {
        let fed = feed(&frame(2, 9, &header(size, 0, &[])), 100, 100);
        assert!(fed.refusal().contains("max_message_size"), "{}", fed.refusal());
        assert!(fed.refusal().contains("on channel 9"), "{}", fed.refusal());
        assert!(fed.passed.is_empty());
    }
    assert_eq!(feed(&frame(2, 9, &header(BODY_MAX, 0, &[])), 100, 100).end, None);
}

#[test]
fn what_does_not_parse_is_refused() {
    let mut no_end = frame(1, 1, &[0, 60, 0, 11]);
    no_end[11] = 0;
    for (frame, says) in [
        (no_end, "without the end octet"),
        (frame(1, 1, &[0, 60, 0]), "too short"),
        (frame(1, 1, &[0, 60, 0, 80]), "malformed method (class 60, method 80)"),
        (frame(1, 0, &[0, 10, 0, 50, 1, 64, 200, b'x']), "malformed method (class 10, method 50)"),
        // A method of clients, with a table in it: amiquip would parse the table before it refuses the method.
        (frame(1, 1, &[0, 50, 0, 10, 0, 0, 0, 0, 0, 0, 0, 0]), "no server sends (class 50, method 10)"),
        (frame(1, 1, &[0, 99, 0, 1]), "no server sends (class 99, method 1)"),
        (frame(2, 1, &[0, 60, 0, 0]), "too short"),
        (frame(2, 1, &header(0, 1, &[])), "unknown properties"),
        (frame(2, 1, &header(0, 1 << 15, &[5, b'a'])), "malformed content header"),
        (frame(2, 1, &header(0, HEADERS, &[0, 0, 0, 9])), "malformed content header"),
        (frame(2, 1, &header(0, HEADERS, &table(&[1, b'n', b'?', 0]))), "malformed content header"),
        (frame(2, 1, &header(0, HEADERS, &table(&[1, b'n', b'l', 0]))), "malformed content header"),
        (frame(2, 1, &header(0, HEADERS, &table(&[9, b'n']))), "malformed content header"),
        // A value that would reach beyond its array, though not beyond the frame.
        (
            frame(2, 1, &header(0, HEADERS, &table(&[&*short(b"n"), &long(b'A', &[b'l', 0]), &[0; 20]].concat()))),
            "malformed content header",
        ),
    ] {
        let fed = feed(&frame, usize::MAX, 4096);
        assert!(fed.refusal().contains(says), "{}: {frame:?}", fed.refusal());
        assert!(fed.passed.is_empty());
    }
}

/// Writes a random value, and what amiquip should make of it.
fn value(random: &mut fastrand::Rng, depth: usize, out: &mut Vec<u8>) -> AMQPValue {
    let number: u64 = random.u64(..);
    let octets = number.to_be_bytes();
    let mut plain = |tag: u8, length: usize| {
        out.push(tag);
        out.extend(&octets[8 - length..]);
    };
    // Containers are rarer the deeper they are, and there are some beyond the limit.
    let kind = random.u8(..if depth > DEPTH_MAX + 2 { 12 } else { 16 });
    match kind {
        0 => (plain(b't', 1), AMQPValue::Boolean(octets[7] != 0)).1,
        1 => (plain(b'b', 1), AMQPValue::ShortShortInt(number as i8)).1,
        2 => (plain(b'B', 1), AMQPValue::ShortShortUInt(number as u8)).1,
        3 => (plain(*random.choice(b"sU").unwrap(), 2), AMQPValue::ShortInt(number as i16)).1,
        4 => (plain(b'u', 2), AMQPValue::ShortUInt(number as u16)).1,
        5 => (plain(b'I', 4), AMQPValue::LongInt(number as i32)).1,
        6 => (plain(b'i', 4), AMQPValue::LongUInt(number as u32)).1,
        7 => (plain(*random.choice(b"lL").unwrap(), 8), AMQPValue::LongLongInt(number as i64)).1,
        8 => (plain(b'T', 8), AMQPValue::Timestamp(number)).1,
        9 => (plain(b'V', 0), AMQPValue::Void).1,
        10 | 11 => {
            let text: Vec<u8> = (0..random.usize(..20)).map(|_| random.u8(b'a'..)).collect();
            let is_text = random.bool();
            let bytes = if is_text { random.alphabetic().to_string().repeat(3).into_bytes() } else { text };
            out.extend(long(b'S', &bytes));
            match String::from_utf8(bytes) {
                Ok(text) => AMQPValue::LongString(text),
                Err(error) => AMQPValue::ByteArray(error.into_bytes()),
            }
        }
        12 | 13 => {
            let mut content = Vec::new();
            let values = (0..random.usize(..4)).map(|_| value(random, depth + 1, &mut content)).collect();
            out.extend(long(b'A', &content));
            if depth < DEPTH_MAX { AMQPValue::FieldArray(values) } else { AMQPValue::ByteArray(content) }
        }
        _ => {
            let mut content = Vec::new();
            let values = fields(random, depth + 1, &mut content);
            out.extend(long(b'F', &content));
            if depth < DEPTH_MAX { AMQPValue::FieldTable(values) } else { AMQPValue::ByteArray(content) }
        }
    }
}

/// The content of a table at level `depth`.
fn fields(random: &mut fastrand::Rng, depth: usize, out: &mut Vec<u8>) -> FieldTable {
    let mut table = FieldTable::new();
    // One at least on the way down, so that the limit is reached now and then.
    for _ in 0..random.usize(1..4) {
        let name: String = (0..random.usize(..9)).map(|_| random.alphabetic()).collect();
        out.extend(short(name.as_bytes()));
        let value = value(random, depth, out);
        table.insert(name, value);
    }
    table
}

#[test]
fn any_headers_arrive_as_they_were_but_for_what_is_documented() {
    let mut deepest = 0;
    for seed in 0..5_000 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut content = Vec::new();
        let expected = fields(&mut random, 1, &mut content);
        if content.len() > 100_000 {
            continue;
        }
        deepest = deepest.max(depth(&AMQPValue::FieldTable(expected.clone())));
        assert_eq!(headers_of(&header(0, HEADERS, &table(&content))), expected, "seed {seed}");
    }
    assert!(deepest > 8, "only {deepest} levels");
}

#[test]
fn whatever_is_let_through_can_be_parsed() {
    let good = [
        frame(1, 0, &[&[0, 10, 0, 10, 0, 9], &*table(&[&*short(b"p"), &*long(b'S', b"x")].concat()), &[0; 8]].concat()),
        frame(1, 1, &[&[0, 60, 0, 60], &*short(b"ctag"), &[0; 9], &*short(b"logs"), &*short(b"key")].concat()),
        frame(1, 1, &[&[0, 60, 0, 50, 1, 56], &*short(b"NO_ROUTE"), &*short(b"logs"), &*short(b"key")].concat()),
        frame(2, 1, &header(3, HEADERS, &nested(40, b'F'))),
        frame(2, 1, &header(3, 0xFFFC, &[short(b"a"), short(b"b"), nested(3, b'A'), vec![1; 40]].concat())),
        frame(1, 1, &close(20, 40, 404, "NOT_FOUND")),
        frame(8, 0, &[]),
    ];
    let (mut let_through, mut refused) = (0, 0);
    for seed in 0..20_000 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut stream = random.choice(&good).unwrap().clone();
        for _ in 0..random.usize(..4) {
            let at = random.usize(..stream.len());
            let any = random.u8(..);
            stream[at] = *random.choice(&[0, 1, 2, 0x7f, 0xff, b'F', b'A', b'S', b'x', any]).unwrap();
        }
        let (frames, end) = parsed(&stream);
        let_through += frames.len();
        refused += usize::from(end.is_some());
    }
    assert!(let_through > 1_000 && refused > 1_000, "{let_through} let through, {refused} refused");
}

#[test]
fn a_mended_frame_is_mended_no_further() {
    let mut payload = header(0, HEADERS, &nested(40, b'A'));
    mend::header(&mut payload, BODY_MAX).unwrap();
    let once = payload.clone();
    mend::header(&mut payload, BODY_MAX).unwrap();
    assert_eq!(payload, once);
}
