//! Deliveries as RabbitMQ sends them, for the benchmark.

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    [&[kind, 0, 1][..], &(payload.len() as u32).to_be_bytes(), payload, &[0xce]].concat()
}

/// Method, header and body of a delivery, as RabbitMQ sends it.
pub fn delivery(body: usize, headers: &[u8]) -> Vec<u8> {
    let method = [&[0, 60, 0, 60, 4][..], b"ctag", &[0; 9], b"\x06events", b"\x0dorder.created"].concat();
    let header = [&[0, 60, 0, 0][..], &(body as u64).to_be_bytes(), &properties(headers)].concat();
    [frame(1, &method), frame(2, &header), frame(3, &vec![b'x'; body])].concat()
}

/// Content type, headers if there are any, and delivery mode.
pub fn properties(headers: &[u8]) -> Vec<u8> {
    let flags: u16 = if headers.is_empty() { 0x9000 } else { 0xb000 };
    let table =
        if headers.is_empty() { Vec::new() } else { [&(headers.len() as u32).to_be_bytes()[..], headers].concat() };
    [&flags.to_be_bytes()[..], b"\x10application/json", &table, &[2]].concat()
}

/// Two numbers and two texts.
pub fn four_headers() -> Vec<u8> {
    let number = |name: &str| [&[name.len() as u8], name.as_bytes(), b"l\0\0\0\0\0\0\0\x07"].concat();
    let text = |name: &str| [&[name.len() as u8], name.as_bytes(), b"S\0\0\0\x14some text of a width"].concat();
    [number("attempts"), text("source"), text("trace"), number("version")].concat()
}

/// Deliveries of several sizes, with their names.
pub fn streams() -> [(&'static str, Vec<u8>); 4] {
    let headers = four_headers();
    [
        ("100 B", delivery(100, &[])),
        ("100 B, 4 headers", delivery(100, &headers)),
        ("1 KiB", delivery(1024, &[])),
        ("64 KiB", delivery(65_536, &[])),
    ]
}
