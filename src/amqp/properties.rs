//! The fourteen properties of a message, as they stand in a content header.

use super::cursor::{Field, Malformed, Reader, Writer};
use super::short_string::ShortString;
use super::value::Table;

macro_rules! properties {
    ($($bit:literal $name:ident: $type:ty,)*) => {
        /// The parsed properties. The broker passes on the bytes it got and parses only to route.
        #[derive(Debug, Clone, PartialEq, Default)]
        pub(crate) struct Properties {
            $(pub(crate) $name: Option<$type>,)*
        }

        impl Properties {
            /// Reads flags and values; there must be nothing behind them.
            pub(crate) fn decode(bytes: &[u8]) -> Result<Properties, Malformed> {
                let mut reader = Reader::new(bytes);
                let flags = read_flags(&mut reader)?;
                let properties = Properties {
                    $($name: if flags & (1 << $bit) != 0 { Some(Field::read(&mut reader)?) } else { None },)*
                };
                if reader.is_empty() { Ok(properties) } else { Err(Malformed("bytes behind the properties")) }
            }

            /// Flags and values, as they follow the body size in a content header.
            pub(crate) fn encode(&self) -> Vec<u8> {
                let mut flags = 0_u16;
                $(flags |= u16::from(self.$name.is_some()) << $bit;)*
                let mut bytes = Vec::new();
                let mut writer = Writer::new(&mut bytes);
                writer.put(&flags.to_be_bytes());
                $(if let Some(value) = &self.$name {
                    value.write(&mut writer);
                })*
                bytes
            }
        }
    };
}

// In the order of the values, which is that of the flags from the highest bit down.
properties! {
    15 content_type: ShortString,
    14 content_encoding: ShortString,
    13 headers: Table,
    12 delivery_mode: u8,
    11 priority: u8,
    10 correlation_id: ShortString,
    9 reply_to: ShortString,
    8 expiration: ShortString,
    7 message_id: ShortString,
    6 timestamp: u64,
    5 kind: ShortString,
    4 user_id: ShortString,
    3 app_id: ShortString,
    2 cluster_id: ShortString,
}

/// Bit 0 would announce another word of flags, and bit 1 no property at all; basic messages have neither.
fn read_flags(reader: &mut Reader<'_>) -> Result<u16, Malformed> {
    let flags = reader.u16()?;
    if flags & 0b11 != 0 { Err(Malformed("flags of properties there are not")) } else { Ok(flags) }
}
