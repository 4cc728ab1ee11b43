//! The text of a JSON document in UTF-8, whatever form of Unicode it is in.
//!
//! RFC 8259 (section 8.1) wants UTF-8 without a byte order mark. RFC 4627, which it replaces, let the others in and told them
//! apart by where the zeros are in the first four bytes (section 3). Python's `json.loads` reads them all, and so do we.

use std::borrow::Cow;

const BOM: char = '\u{feff}';

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Utf8,
    Utf16(Order),
    Utf32(Order),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Big,
    Little,
}

/// The document in UTF-8 and without a byte order mark. That UTF-8 is well formed is not looked at.
pub(super) fn to_utf8(bytes: &[u8]) -> Result<Cow<'_, [u8]>, String> {
    let text = match form(bytes) {
        Form::Utf8 => return Ok(Cow::Borrowed(bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes))),
        Form::Utf16(order) => utf16(bytes, order)?,
        Form::Utf32(order) => utf32(bytes, order)?,
    };
    let text = text.strip_prefix(BOM).map(str::to_owned).unwrap_or(text);
    Ok(Cow::Owned(text.into_bytes()))
}

/// By the byte order mark, or by the zeros around the first two characters, which are ASCII in every JSON document.
fn form(bytes: &[u8]) -> Form {
    match bytes {
        [0, 0, 0xfe, 0xff, ..] => Form::Utf32(Order::Big),
        [0xff, 0xfe, 0, 0, ..] => Form::Utf32(Order::Little),
        [0xfe, 0xff, ..] => Form::Utf16(Order::Big),
        [0xff, 0xfe, ..] => Form::Utf16(Order::Little),
        [0, 0, _, _, ..] => Form::Utf32(Order::Big),
        [0, _, _, _, ..] | [0, _] => Form::Utf16(Order::Big),
        [_, 0, 0, 0, ..] => Form::Utf32(Order::Little),
        [_, 0, _, _, ..] | [_, 0] => Form::Utf16(Order::Little),
        _ => Form::Utf8,
    }
}

fn utf16(bytes: &[u8], order: Order) -> Result<String, String> {
    let (units, []) = bytes.as_chunks() else {
        return Err(format!("UTF-16 of {} bytes, expected an even number", bytes.len()));
    };
    let units = units.iter().map(|unit| match order {
        Order::Big => u16::from_be_bytes(*unit),
        Order::Little => u16::from_le_bytes(*unit),
    });
    char::decode_utf16(units).collect::<Result<_, _>>().map_err(|error| format!("UTF-16: {error}"))
}

fn utf32(bytes: &[u8], order: Order) -> Result<String, String> {
    let (units, []) = bytes.as_chunks() else {
        return Err(format!("UTF-32 of {} bytes, expected a multiple of 4", bytes.len()));
    };
    let units = units.iter().map(|unit| match order {
        Order::Big => u32::from_be_bytes(*unit),
        Order::Little => u32::from_le_bytes(*unit),
    });
    units.map(|unit| char::from_u32(unit).ok_or_else(|| format!("UTF-32: {unit:#x} is no character"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_told_apart_with_and_without_a_mark() {
        for text in ["1", "{}", "[]", "\"é\"", "{\"ä\":1}", "[\"😀\"]"] {
            for mark in ["", "\u{feff}"] {
                let marked = format!("{mark}{text}");
                let utf16 = |write: fn(u16) -> [u8; 2]| marked.encode_utf16().flat_map(write).collect::<Vec<u8>>();
                let utf32 =
                    |write: fn(u32) -> [u8; 4]| marked.chars().map(u32::from).flat_map(write).collect::<Vec<u8>>();
                let forms = [
                    marked.clone().into_bytes(),
                    utf16(u16::to_be_bytes),
                    utf16(u16::to_le_bytes),
                    utf32(u32::to_be_bytes),
                    utf32(u32::to_le_bytes),
                ];
                for bytes in forms {
                    assert_eq!(to_utf8(&bytes).as_deref(), Ok(text.as_bytes()), "{bytes:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_cut_off_or_no_character_is_told() {
        assert!(to_utf8(b"\xfe\xff\0").unwrap_err().contains("an even number"));
        assert!(to_utf8(b"\0\0\0[\0").unwrap_err().contains("a multiple of 4"));
        assert!(to_utf8(b"\0\"\xd8\0\0\"").unwrap_err().contains("UTF-16"));
        assert!(to_utf8(b"\0\0\0\"\0\x11\0\0").unwrap_err().contains("0x110000"));
        for bytes in [b"".as_slice(), b"\0", b"1", b"12", b"123", b"\xff", b"\xef\xbb"] {
            assert_eq!(to_utf8(bytes).as_deref(), Ok(bytes));
        }
    }
}
