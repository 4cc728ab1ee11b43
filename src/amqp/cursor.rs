//! Reading and writing the fields that methods, properties and tables are made of.

use super::short_string::ShortString;
use super::value::Table;

/// Bytes that are not what they should be. How a broker answers depends on where they stood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Malformed(pub(crate) &'static str);

impl Malformed {
    /// RabbitMQ has its own answer to this one.
    pub(crate) const NO_TEXT: Malformed = Malformed("Malformed UTF-8 in shortstr");
}

/// Reads fields off the front of some bytes.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    /// Bits that follow each other share a byte: that byte, and the place of the next bit in it.
    bits: Option<(u8, u8)>,
    /// Short strings must be text: those of most methods, not those of properties and tables.
    text: bool,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { bytes, bits: None, text: false }
    }

    /// Of the arguments of a method that carries no message.
    pub(crate) fn of_arguments(bytes: &'a [u8]) -> Reader<'a> {
        Reader { bytes, bits: None, text: true }
    }

    /// What has not been read.
    pub(crate) fn rest(&self) -> &'a [u8] {
        self.bytes
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The next `len` bytes. Looks only at what is there, so a claimed length costs nothing.
    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        self.bits = None;
        let (taken, rest) = self.bytes.split_at_checked(len).ok_or(Malformed("the bytes end too early"))?;
        self.bytes = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        self.bits = None;
        let (taken, rest) = self.bytes.split_first_chunk::<N>().ok_or(Malformed("the bytes end too early"))?;
        self.bytes = rest;
        Ok(*taken)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(u8::from_be_bytes(self.array()?))
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    pub(crate) fn bit(&mut self) -> Result<bool, Malformed> {
        let (byte, place) = match self.bits {
            Some((byte, place)) if place < 8 => (byte, place),
            _ => (self.u8()?, 0),
        };
        self.bits = Some((byte, place + 1));
        Ok(byte & (1 << place) != 0)
    }

    /// A short string, as the bytes it has.
    pub(crate) fn short(&mut self) -> Result<&'a [u8], Malformed> {
        let len = self.u8()?;
        self.take(usize::from(len))
    }

    /// A long string, or the inside of a table or array.
    pub(crate) fn long(&mut self) -> Result<&'a [u8], Malformed> {
        let len = self.u32()?;
        self.take(usize::try_from(len).map_err(|_| Malformed("the bytes end too early"))?)
    }
}

/// Writes fields behind what a buffer holds.
#[derive(Debug)]
pub(crate) struct Writer<'a> {
    bytes: &'a mut Vec<u8>,
    /// Where the byte of the current bits stands, and the place of the next bit in it.
    bits: Option<(usize, u8)>,
}

impl<'a> Writer<'a> {
    pub(crate) fn new(bytes: &'a mut Vec<u8>) -> Writer<'a> {
        Writer { bytes, bits: None }
    }

    pub(crate) fn put(&mut self, bytes: &[u8]) {
        self.bits = None;
        self.bytes.extend_from_slice(bytes);
    }

    pub(crate) fn bit(&mut self, bit: bool) {
        let (at, place) = match self.bits {
            Some((at, place)) if place < 8 => (at, place),
            _ => {
                self.bytes.push(0);
                (self.bytes.len() - 1, 0)
            }
        };
        self.bytes[at] |= u8::from(bit) << place;
        self.bits = Some((at, place + 1));
    }

    /// A short string; what is beyond its 255th byte is cut off.
    pub(crate) fn short(&mut self, bytes: &[u8]) {
        let bytes = &bytes[..bytes.len().min(ShortString::MAX)];
        // In range: it has just been cut to one byte's worth.
        self.put(&[bytes.len() as u8]);
        self.bytes.extend_from_slice(bytes);
    }

    pub(crate) fn long(&mut self, bytes: &[u8]) {
        self.sized(|writer| writer.put(bytes));
    }

    /// A length of four bytes, then what `inside` writes. A frame holds far less than the 4 GiB that would overflow.
    pub(crate) fn sized(&mut self, inside: impl FnOnce(&mut Writer<'_>)) {
        let at = self.bytes.len();
        self.put(&[0; 4]);
        inside(self);
        self.bits = None;
        let len = (self.bytes.len() - at - 4) as u32;
        self.bytes[at..at + 4].copy_from_slice(&len.to_be_bytes());
    }
}

/// A type that methods have fields of.
pub(crate) trait Field: Sized {
    fn read(reader: &mut Reader<'_>) -> Result<Self, Malformed>;
    fn write(&self, writer: &mut Writer<'_>);
}

macro_rules! integers {
    ($($integer:ty),*) => {$(
        impl Field for $integer {
            fn read(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
                Ok(<$integer>::from_be_bytes(reader.array()?))
            }

            fn write(&self, writer: &mut Writer<'_>) {
                writer.put(&self.to_be_bytes());
            }
        }
    )*};
}

integers!(u8, u16, u32, u64);

impl Field for bool {
    fn read(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        reader.bit()
    }

    fn write(&self, writer: &mut Writer<'_>) {
        writer.bit(*self);
    }
}

impl Field for ShortString {
    fn read(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let bytes = reader.short()?;
        if reader.text && std::str::from_utf8(bytes).is_err() {
            return Err(Malformed::NO_TEXT);
        }
        Ok(ShortString::new(bytes))
    }

    fn write(&self, writer: &mut Writer<'_>) {
        writer.short(self.as_bytes());
    }
}

/// A long string. In methods these carry credentials and texts.
impl Field for Vec<u8> {
    fn read(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        reader.long().map(<[u8]>::to_vec)
    }

    fn write(&self, writer: &mut Writer<'_>) {
        writer.long(self);
    }
}

impl Field for Table {
    fn read(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Table::read_from(reader)
    }

    fn write(&self, writer: &mut Writer<'_>) {
        self.write_to(writer);
    }
}
