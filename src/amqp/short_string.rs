//! Short strings: at most 255 bytes, by AMQP any bytes, by custom UTF-8.

use std::borrow::{Borrow, Cow};
use std::fmt;
use std::sync::Arc;

/// A name on the wire: of a queue, an exchange, a consumer, a header. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(crate) struct ShortString(Arc<[u8]>);

impl ShortString {
    /// The most bytes a short string holds: its length is one byte.
    pub(crate) const MAX: usize = 255;

    /// These bytes; what is beyond the 255th is cut off.
    pub(crate) fn new(bytes: &[u8]) -> ShortString {
        ShortString(Arc::from(&bytes[..bytes.len().min(Self::MAX)]))
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// As text; what is no UTF-8 is replaced.
    pub(crate) fn text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.0)
    }
}

impl From<&str> for ShortString {
    fn from(text: &str) -> ShortString {
        ShortString::new(text.as_bytes())
    }
}

impl From<String> for ShortString {
    fn from(text: String) -> ShortString {
        ShortString::new(text.as_bytes())
    }
}

impl PartialEq<str> for ShortString {
    fn eq(&self, other: &str) -> bool {
        *self.0 == *other.as_bytes()
    }
}

impl PartialEq<&str> for ShortString {
    fn eq(&self, other: &&str) -> bool {
        *self.0 == *other.as_bytes()
    }
}

impl AsRef<[u8]> for ShortString {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Borrow<[u8]> for ShortString {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for ShortString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text())
    }
}

impl fmt::Debug for ShortString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.text())
    }
}
