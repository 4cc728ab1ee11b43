//! How values become message bodies and back, for workers and RPC.
//!
//! What is sent is chosen; what is received is told by its bytes, since senders disagree about what they call it.

mod unicode;

use std::io::{Read, Write};

use flate2::Compression;
use flate2::bufread::{MultiGzDecoder, ZlibDecoder};
use flate2::write::GzEncoder;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde::de::value::{BytesDeserializer, Error as ValueError, SeqDeserializer};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::message::Message;

/// The first bytes of gzip (RFC 1952, section 2.3.1).
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// How values are written into message bodies. Bodies of every kind are read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Encoding {
    /// JSON in UTF-8, compressed with gzip. The default.
    #[default]
    GzipJson,
    /// JSON in UTF-8.
    Json,
    /// The bytes of a text or of a byte array, as they are. Read with it, bodies are not taken for JSON either.
    Raw,
}

impl Encoding {
    /// The largest body that is accepted, in bytes once inflated, where nothing else is said: 64 MiB.
    pub const MAX_INFLATED: usize = 64 << 20;

    fn name(self) -> &'static str {
        match self {
            Encoding::GzipJson => "gzip JSON",
            Encoding::Json => "JSON",
            Encoding::Raw => "raw",
        }
    }

    fn error(self, problem: impl ToString) -> Error {
        Error::encoding(self.name(), problem)
    }

    /// A message with `value` as its body.
    ///
    /// # Errors
    ///
    /// [`Error::Encoding`] if the value has no such form: a map with keys that are no texts as JSON, a number as raw
    /// bytes.
    pub fn encode<T: Serialize + ?Sized>(self, value: &T) -> Result<Message> {
        let json = || serde_json::to_vec(value).map_err(|problem| self.error(problem));
        match self {
            Encoding::GzipJson => {
                let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
                let body = gzip.write_all(&json()?).and_then(|()| gzip.finish());
                let body = body.map_err(|problem| self.error(problem))?;
                Ok(Message::new(body).with_content_type("application/json").with_content_encoding("gzip"))
            }
            Encoding::Json => Ok(Message::new(json()?).with_content_type("application/json")),
            Encoding::Raw => Ok(Message::new(self.raw(value)?).with_content_type("application/octet-stream")),
        }
    }

    fn raw<T: Serialize + ?Sized>(self, value: &T) -> Result<Vec<u8>> {
        let byte = |value: &Value| value.as_u64().and_then(|number| u8::try_from(number).ok());
        let bytes = match serde_json::to_value(value).map_err(|problem| self.error(problem))? {
            Value::String(text) => Some(text.into_bytes()),
            Value::Array(values) => values.iter().map(byte).collect(),
            _ => None,
        };
        bytes.ok_or_else(|| self.error("expected a text or an array of bytes"))
    }

    /// The value in a body: gzip and zlib are inflated by what the bytes are, whatever the message says of itself; the
    /// rest is JSON, unless this is [`Raw`](Encoding::Raw). Gzip of several members is one document. JSON may be in UTF-8 with or
    /// without a byte order mark, in UTF-16 or in UTF-32, as Python's `json.loads` takes it.
    ///
    /// # Errors
    ///
    /// [`Error::Encoding`] if the body is broken, is larger than `max_inflated` bytes, or holds something else.
    pub fn decode<T: DeserializeOwned>(self, body: &[u8], max_inflated: usize) -> Result<T> {
        if self == Encoding::Raw {
            let from_bytes = T::deserialize(BytesDeserializer::<ValueError>::new(body));
            // Byte arrays are sequences to serde.
            let or_sequence = |problem| {
                T::deserialize(SeqDeserializer::<_, ValueError>::new(body.iter().copied())).map_err(|_| problem)
            };
            return from_bytes.or_else(or_sequence).map_err(|problem| self.error(problem));
        }
        let inflated = match body {
            [first, second, ..] if [*first, *second] == GZIP => {
                // All members are one document (RFC 1952, section 2.2). What is behind the last is an error.
                Some(self.inflate(&mut MultiGzDecoder::new(body), max_inflated)?)
            }
            [first, second, ..] if is_zlib(*first, *second) => {
                let mut zlib = ZlibDecoder::new(body);
                let inflated = self.inflate(&mut zlib, max_inflated)?;
                match zlib.into_inner() {
                    [] => Some(inflated),
                    rest => {
                        return Err(
                            self.error(format_args!("{} bytes are behind the end of the zlib data", rest.len()))
                        );
                    }
                }
            }
            _ if body.len() > max_inflated => return Err(self.too_large(max_inflated)),
            _ => None,
        };
        from_json(inflated.as_deref().unwrap_or(body)).map_err(|problem| self.error(problem))
    }

    /// Inflates no further than the limit, so that a small body cannot fill the memory.
    fn inflate(self, deflated: &mut impl Read, max_inflated: usize) -> Result<Vec<u8>> {
        let mut inflated = Vec::new();
        let limit = (max_inflated as u64).saturating_add(1);
        deflated.take(limit).read_to_end(&mut inflated).map_err(|problem| self.error(problem))?;
        if inflated.len() > max_inflated { Err(self.too_large(max_inflated)) } else { Ok(inflated) }
    }

    fn too_large(self, max_inflated: usize) -> Error {
        self.error(format_args!("the body is larger than {max_inflated} bytes"))
    }
}

/// The value that JSON says: in UTF-8, with a byte order mark or without, in UTF-16 or in UTF-32.
pub(crate) fn from_json<T: DeserializeOwned>(bytes: &[u8]) -> serde_json::Result<T> {
    match unicode::to_utf8(bytes) {
        Ok(text) => serde_json::from_slice(&text),
        Err(problem) => Err(serde::de::Error::custom(problem)),
    }
}

/// Whether two bytes are a zlib header (RFC 1950, section 2.2): deflate, a window that exists, divisible by 31. The one
/// such header that JSON can begin with too, the number 80, is left to it: nobody uses a window of 2 KiB.
fn is_zlib(first: u8, second: u8) -> bool {
    first & 0x0f == 8 && first >> 4 <= 7 && first != b'8' && u16::from_be_bytes([first, second]).is_multiple_of(31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use flate2::write::ZlibEncoder;

    use super::*;

    const LIMIT: usize = 1000;

    #[test]
    fn every_encoding_reads_what_it_writes() {
        let value: BTreeMap<String, Vec<u32>> = [("grüße".to_owned(), vec![1, 2])].into();
        for encoding in [Encoding::GzipJson, Encoding::Json] {
            let message = encoding.encode(&value).unwrap();
            assert_eq!(encoding.decode::<BTreeMap<String, Vec<u32>>>(message.body(), LIMIT).unwrap(), value);
        }
        let text = Encoding::Raw.encode("as it is").unwrap();
        assert_eq!(text.body(), b"as it is");
        assert_eq!(Encoding::Raw.decode::<String>(text.body(), LIMIT).unwrap(), "as it is");
        let bytes = Encoding::Raw.encode(&[0_u8, 255]).unwrap();
        assert_eq!(Encoding::Raw.decode::<Vec<u8>>(bytes.body(), LIMIT).unwrap(), [0, 255]);
        assert!(Encoding::Raw.encode(&7).is_err() && Encoding::Raw.decode::<String>(&[255], LIMIT).is_err());
    }

    #[test]
    fn what_the_bytes_are_counts_and_not_what_is_expected() {
        let mut zlib = ZlibEncoder::new(Vec::new(), Compression::default());
        zlib.write_all(b"[1,2]").unwrap();
        let gzip = Encoding::GzipJson.encode(&[1, 2]).unwrap().into_body();
        for body in [zlib.finish().unwrap(), gzip, b"[1,2]".to_vec(), b" [1, 2]".to_vec()] {
            for encoding in [Encoding::GzipJson, Encoding::Json] {
                assert_eq!(encoding.decode::<Vec<u32>>(&body, LIMIT).unwrap(), [1, 2]);
            }
        }
    }

    #[test]
    fn what_is_broken_or_too_large_is_an_error() {
        let whole = Encoding::GzipJson.encode(&"x".repeat(LIMIT * 1000)).unwrap().into_body();
        assert!(whole.len() < LIMIT * 2, "a bomb: {} bytes", whole.len());
        let told = |body: &[u8]| match Encoding::GzipJson.decode::<String>(body, LIMIT) {
            Err(Error::Encoding { source, .. }) => source.to_string(),
            other => panic!("unexpected: {other:?}"),
        };
        assert!(told(&whole).contains("larger than 1000 bytes"));
        let fits = Encoding::GzipJson.encode(&"x".repeat(100)).unwrap().into_body();
        for length in 0..fits.len() {
            told(&fits[..length]);
        }
        let mut flipped = fits.clone();
        *flipped.last_mut().unwrap() ^= 1;
        told(&flipped);
        assert!(told(b"{no json").contains("line 1"));
        assert!(told(b"7").contains("expected a string"));
        assert!(told(&vec![b' '; LIMIT + 1]).contains("larger than"));
    }

    #[test]
    fn gzip_of_several_members_is_one_document_and_nothing_may_be_behind_it() {
        let gzip = |text: &str| {
            let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
            gzip.write_all(text.as_bytes()).unwrap();
            gzip.finish().unwrap()
        };
        let decode =
            |body: &[u8]| Encoding::GzipJson.decode::<Vec<u32>>(body, LIMIT).map_err(|error| error.to_string());
        assert_eq!(decode(&[gzip("[1,"), gzip("2]")].concat()).unwrap(), [1, 2]);
        assert_eq!(decode(&[gzip(""), gzip("[1,2]"), gzip("")].concat()).unwrap(), [1, 2]);
        let two = decode(&[gzip("[1]"), gzip("[2]")].concat()).unwrap_err();
        assert!(two.contains("trailing characters"), "{two}");
        for rest in [b"x".as_slice(), b"garbage behind it", &gzip("[2]")[..9]] {
            decode(&[gzip("[1]"), rest.to_vec()].concat()).unwrap_err();
        }
        let limit = [gzip(&" ".repeat(LIMIT)), gzip("[1]")].concat();
        assert!(decode(&limit).unwrap_err().contains("larger than"), "the limit is for all of them together");
        let mut zlib = ZlibEncoder::new(Vec::new(), Compression::default());
        zlib.write_all(b"[1]").unwrap();
        let mut zlib = zlib.finish().unwrap();
        assert_eq!(decode(&zlib).unwrap(), [1]);
        zlib.extend(b"rest");
        assert!(decode(&zlib).unwrap_err().contains("4 bytes are behind the end"), "zlib");
    }

    #[test]
    fn json_in_other_forms_of_unicode_is_read() {
        let utf16 = |text: &str| text.encode_utf16().collect::<Vec<u16>>();
        let text = "{\"grüße\":\"😀\"}";
        let bodies = [
            text.as_bytes().to_vec(),
            [b"\xef\xbb\xbf", text.as_bytes()].concat(),
            utf16(text).into_iter().flat_map(u16::to_be_bytes).collect(),
            utf16(&format!("\u{feff}{text}")).into_iter().flat_map(u16::to_le_bytes).collect(),
            text.chars().flat_map(|c| u32::from(c).to_le_bytes()).collect(),
        ];
        for body in bodies {
            let read: BTreeMap<String, String> = Encoding::Json.decode(&body, LIMIT).unwrap();
            assert_eq!(read["grüße"], "😀");
            assert_eq!(Message::new(body).decode_json::<BTreeMap<String, String>>().unwrap(), read);
        }
    }

    #[test]
    fn json_is_never_taken_for_zlib() {
        for first in *b"{[\"-0123456789tfn \t\r\n" {
            assert!((0..=255).all(|second| !is_zlib(first, second)), "{}", char::from(first));
        }
    }
}
