//! What is written can be read, and what cannot be read is an error, whatever it is.

use super::Malformed;
use super::ShortString;
use super::cursor::{Field, Reader, Writer};
use super::frame::{self, Frame, Scan, scan};
use super::method::*;
use super::properties::Properties;
use super::value::{Table, Value};

fn table_bytes(table: &Table) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.write(&mut Writer::new(&mut bytes));
    bytes
}

fn read_table(bytes: &[u8]) -> Result<Table, Malformed> {
    Table::read(&mut Reader::new(bytes))
}

/// The inside of a table with one value, from its raw bytes.
fn one_value(raw: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    Writer::new(&mut bytes).sized(|writer| {
        writer.short(b"k");
        writer.put(raw);
    });
    bytes
}

fn every_value() -> Table {
    Table::default()
        .with("bool", Value::Bool(true))
        .with("i8", Value::I8(-8))
        .with("u8", Value::U8(200))
        .with("i16", Value::I16(-300))
        .with("u16", Value::U16(60_000))
        .with("i32", Value::I32(i32::MIN))
        .with("u32", Value::U32(u32::MAX))
        .with("i64", Value::I64(i64::MIN))
        .with("f32", Value::F32(1.5))
        .with("f64", Value::F64(-2.25))
        .with("decimal", Value::Decimal { scale: 2, value: -314 })
        .with("text", Value::LongString(vec![0xff, 0, 0xfe]))
        .with("array", Value::Array(vec![Value::Void, Value::Array(vec![]), Value::text("x")]))
        .with("time", Value::Timestamp(u64::MAX))
        .with("table", Value::Table(Table::default().with("", Value::Bool(false))))
        .with("void", Value::Void)
        .with("bytes", Value::Bytes(vec![1, 2, 3]))
        .with("void", Value::text("a name twice"))
}

fn random_value(random: &mut fastrand::Rng, depth: usize) -> Value {
    let bytes = |random: &mut fastrand::Rng| (0..random.usize(..20)).map(|_| random.u8(..)).collect::<Vec<_>>();
    match random.u8(..if depth == 0 { 14 } else { 16 }) {
        0 => Value::Bool(random.bool()),
        1 => Value::I8(random.i8(..)),
        2 => Value::U8(random.u8(..)),
        3 => Value::I16(random.i16(..)),
        4 => Value::U16(random.u16(..)),
        5 => Value::I32(random.i32(..)),
        6 => Value::U32(random.u32(..)),
        7 => Value::I64(random.i64(..)),
        8 => Value::F32(random.f32()),
        9 => Value::F64(random.f64()),
        10 => Value::Decimal { scale: random.u8(..), value: random.i32(..) },
        11 => Value::LongString(bytes(random)),
        12 => Value::Void,
        13 => Value::Bytes(bytes(random)),
        14 => Value::Array((0..random.usize(..4)).map(|_| random_value(random, depth - 1)).collect()),
        _ => Value::Table(random_table(random, depth - 1)),
    }
}

fn random_table(random: &mut fastrand::Rng, depth: usize) -> Table {
    Table((0..random.usize(..4)).map(|_| (random_short(random), random_value(random, depth))).collect())
}

fn random_short(random: &mut fastrand::Rng) -> ShortString {
    ShortString::new(&(0..random.usize(..256)).map(|_| random.u8(..)).collect::<Vec<_>>())
}

fn method_bytes(method: &Method) -> Vec<u8> {
    let mut bytes = Vec::new();
    method.encode(&mut bytes);
    bytes
}

fn decode(bytes: &[u8]) -> Option<Result<Method, Malformed>> {
    let [c1, c0, m1, m0] = *bytes.first_chunk()?;
    Method::decode(u16::from_be_bytes([c1, c0]), u16::from_be_bytes([m1, m0]), &bytes[4..])
}

#[test]
fn every_value_comes_back_byte_for_byte() {
    let table = every_value();
    let bytes = table_bytes(&table);
    let read = read_table(&bytes).unwrap();
    assert_eq!(read, table);
    assert_eq!(table_bytes(&read), bytes);
}

#[test]
fn long_integers_have_two_tags_and_are_written_with_one() {
    let (written, read) = (one_value(b"l\0\0\0\0\0\0\0\x07"), one_value(b"L\0\0\0\0\0\0\0\x07"));
    assert_eq!(table_bytes(&read_table(&read).unwrap()), written);
    assert_eq!(table_bytes(&read_table(&written).unwrap()), written);
}

#[test]
fn every_method_comes_back() {
    let all = Method::all();
    assert_eq!(all.len(), 66);
    for method in all {
        let bytes = method_bytes(&method);
        assert_eq!(decode(&bytes).unwrap().unwrap(), method);
        assert_eq!(bytes[..2], method.class_id().to_be_bytes());
        assert_eq!(bytes[2..4], method.method_id().to_be_bytes());
    }
}

#[test]
fn bits_share_a_byte_and_no_more() {
    let declare = QueueDeclare {
        queue: "q".into(),
        durable: true,
        auto_delete: true,
        arguments: every_value(),
        ..Default::default()
    };
    let bytes = method_bytes(&declare.clone().into());
    assert_eq!(bytes[..9], [0, 50, 0, 10, 0, 0, 1, b'q', 0b01010]);
    assert_eq!(decode(&bytes).unwrap().unwrap(), declare.into());

    let publish = BasicPublish { exchange: "e".into(), immediate: true, ..Default::default() };
    assert_eq!(method_bytes(&publish.into()), [0, 60, 0, 40, 0, 0, 1, b'e', 0, 2]);
    let unbind_ok = method_bytes(&ExchangeUnbindOk {}.into());
    assert_eq!(unbind_ok, [0, 40, 0, 51]);
}

#[test]
fn properties_come_back_and_stand_in_order() {
    let all = Properties {
        content_type: Some("text/plain".into()),
        content_encoding: Some("gzip".into()),
        headers: Some(every_value()),
        delivery_mode: Some(2),
        priority: Some(9),
        correlation_id: Some("c".into()),
        reply_to: Some("r".into()),
        expiration: Some("60".into()),
        message_id: Some("m".into()),
        timestamp: Some(1),
        kind: Some("k".into()),
        user_id: Some("guest".into()),
        app_id: Some("a".into()),
        cluster_id: Some("i".into()),
    };
    let bytes = all.encode();
    assert_eq!(bytes[..2], [0xff, 0xfc]);
    assert_eq!(Properties::decode(&bytes).unwrap(), all);
    assert_eq!(Properties::default().encode(), [0, 0]);
    for wrong in [&[][..], &[0], &[0, 1], &[0, 2], &[0, 0, 0], &[0x80, 0, 5, b'x']] {
        assert!(Properties::decode(wrong).is_err(), "{wrong:?}");
    }
}

#[test]
fn nesting_has_a_bound() {
    let nested = |levels| {
        let mut table = Table::default();
        for level in 0..levels {
            let inner = std::mem::take(&mut table);
            let inner = if level % 2 == 0 { Value::Table(inner) } else { Value::Array(vec![Value::Table(inner)]) };
            table = table.with("n", inner);
        }
        table_bytes(&table)
    };
    assert!(read_table(&nested(85)).is_ok()); // every other level is two deep
    assert!(read_table(&nested(86)).is_err());

    let mut bytes = 0_u32.to_be_bytes().to_vec();
    for _ in 0..26_000 {
        bytes = one_value(&[b"F", bytes.as_slice()].concat());
        if bytes.len() > 130_000 {
            break;
        }
    }
    assert_eq!(read_table(&bytes), Err(Malformed("tables nested too deep")));
}

#[test]
fn claims_and_tags_are_not_believed() {
    for raw in [
        &b"S\xff\xff\xff\xff"[..],
        b"S\x7f\xff\xff\xffabc",
        b"A\xff\xff\xff\xff",
        b"F\xff\xff\xff\xff",
        b"x\x00\x00\x00\x02a",
        b"I\x00",
        b"Q",
        b"\x00",
        b"",
    ] {
        assert!(read_table(&one_value(raw)).is_err(), "{raw:?}");
    }
    assert!(read_table(&[0xff; 4]).is_err());
    assert!(decode(&[0, 50, 0, 10, 0, 0, 200, b'q']).unwrap().is_err());
    assert!(decode(&[0, 10, 0, 51, 1]).unwrap().is_err(), "bytes behind the arguments");
    assert!(decode(&[0, 50, 0, 99]).is_none());
}

#[test]
fn short_strings_are_cut_at_255_bytes() {
    let long = ShortString::new(&[b'a'; 300]);
    assert_eq!(long.as_bytes().len(), 255);
    let bytes = method_bytes(&BasicConsumeOk { consumer_tag: long.clone() }.into());
    assert_eq!(bytes.len(), 4 + 1 + 255);
    assert_eq!(decode(&bytes).unwrap().unwrap(), BasicConsumeOk { consumer_tag: long }.into());
    assert_eq!(ShortString::new(b"\xff").to_string(), "\u{fffd}");
}

#[test]
fn frames_are_found_and_told_apart() {
    let mut bytes = Vec::new();
    frame::write_method(&mut bytes, 7, &TxSelect {}.into());
    let payload = [0, 90, 0, 10];
    let whole = Frame { kind: frame::METHOD, channel: 7, payload: &payload };
    assert_eq!(scan(&bytes, 4), Scan::Whole(whole, 12));
    for len in 0..bytes.len() {
        assert_eq!(scan(&bytes[..len], 4), Scan::Partial);
    }
    assert_eq!(scan(&bytes, 3), Scan::TooLarge { kind: 1, channel: 7, claimed: 4 });
    *bytes.last_mut().unwrap() = 0;
    assert_eq!(scan(&bytes, 4), Scan::BadEnd { frame: whole, end: 0 });
}

#[test]
fn bodies_are_split_at_the_maximum_and_empty_ones_have_no_frame() {
    let kinds = |body: &[u8]| {
        let mut bytes = Vec::new();
        frame::write_content(&mut bytes, 1, &[0, 0], body, 4096);
        let (mut found, mut at) = (Vec::new(), 0);
        while let Scan::Whole(frame, len) = scan(&bytes[at..], 4088) {
            found.push((frame.kind, frame.payload.len()));
            at += len;
        }
        assert_eq!(at, bytes.len());
        found
    };
    assert_eq!(kinds(b""), [(2, 14)]);
    assert_eq!(kinds(&[0; 4088]), [(2, 14), (3, 4088)]);
    assert_eq!(kinds(&[0; 4089]), [(2, 14), (3, 4088), (3, 1)]);
}

#[test]
fn random_tables_come_back_and_random_bytes_do_no_harm() {
    let mut random = fastrand::Rng::with_seed(0xC0DE);
    for _ in 0..20_000 {
        let table = random_table(&mut random, 4);
        let mut bytes = table_bytes(&table);
        let read = read_table(&bytes).unwrap();
        assert_eq!(table_bytes(&read), bytes);
        for _ in 0..random.usize(1..5) {
            let at = random.usize(..bytes.len());
            bytes[at] = random.u8(..);
        }
        if let Ok(read) = read_table(&bytes) {
            table_bytes(&read);
        }
        let _ = scan(&bytes, 4096);
        let _ = Properties::decode(&bytes);
    }
    let all = Method::all();
    for round in 0..100_000 {
        let method = &all[round % all.len()];
        let arguments: Vec<u8> = (0..random.usize(..64)).map(|_| random.u8(..)).collect();
        if let Some(Ok(read)) = Method::decode(method.class_id(), method.method_id(), &arguments) {
            let bytes = method_bytes(&read);
            // Bits nobody named are lost, and a true may have been any number; what is read again is the same.
            assert_eq!(method_bytes(&decode(&bytes).unwrap().unwrap()), bytes);
        }
    }
}
